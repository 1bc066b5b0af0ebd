/* Attention of prompts' rows over keys and values that lie in blocks, the rows' own included.
 *
 * A thread takes some rows of one sequence, all query heads of one KV head, and goes through the tokens they may see, TOKENS
 * at a time: these are widened to fp32 once for all rows, keys transposed, so that a vector holds scores of neighbouring
 * tokens. Weights are brought to a running maximum (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867). Groups of
 * tokens begin where the sequence does, and a token that a row may not see weighs nothing: a row's result does not depend
 * on which rows are beside it, nor on where a prompt was cut.
 */
#include "common.h"

#define TOKENS (2 * LANES) /* at a time */
#define ROWS 96            /* of queries at a time, at most */
#define SOME 6             /* rows whose sums are in registers */
#define NEVER -1e30f       /* a score that no row has */

typedef floats floats_stored __attribute__((aligned(4), may_alias));

struct Prompts {
    const bf16 *query, *cache;
    bf16 *out;
    const int64_t *table, *begins, *lengths;
    long sequences, width, heads, kv_heads, size, block_size, window, query_stride;
    float scale, softcap;
    long units; /* tiles of rows of the longest sequence */
    long next;
    int failed;
};

/* What one thread works on: rows of a sequence's tokens, a token's query heads side by side. */
struct Tile {
    long sequence, kv_head, rows, group; /* rows = tokens * group */
    long first;                          /* position of the first token in the sequence */
    float *query, *mixed;                /* [ROWS, size]; mixed: of every two vectors the even numbers first */
    float *scores;                       /* [ROWS, TOKENS] */
    float *keys, *values;                /* [size, TOKENS], [TOKENS, size] */
    float *most;                         /* [ROWS]: the largest score so far */
    floats *total;                       /* [ROWS]: sums of weights */
};

INLINE floats at(const float *from) { return *(const floats_stored *)from; }
INLINE void put(float *to, floats x) { *(floats_stored *)to = x; }

INLINE float largest(floats x)
{
#if LANES == 16
    floats other = PICK(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x = where(x > other, x, other);
    other = PICK(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x = where(x > other, x, other);
#elif LANES == 8
    floats other = PICK(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
    x = where(x > other, x, other);
#endif
    float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
    return a > b ? a : b;
}

/* Rows to columns. */
INLINE void transpose(floats *x)
{
    floats in_fours[LANES];
    for (int j = 0; j < LANES; j += 4) {
        floats a = LOW(x[j], x[j + 1]), b = HIGH(x[j], x[j + 1]), c = LOW(x[j + 2], x[j + 3]), d = HIGH(x[j + 2], x[j + 3]);
        in_fours[j] = FIRST(a, c), in_fours[j + 1] = SECOND(a, c);
        in_fours[j + 2] = FIRST(b, d), in_fours[j + 3] = SECOND(b, d);
    }
    for (int j = 0; j < 4; j++) {
#if LANES == 16
        floats a = in_fours[j], b = in_fours[j + 4], c = in_fours[j + 8], d = in_fours[j + 12];
        floats low = PICK(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        floats high = PICK(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
        floats lower = PICK(c, d, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        floats higher = PICK(c, d, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
        x[j] = PICK(low, lower, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        x[j + 4] = PICK(high, higher, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        x[j + 8] = PICK(low, lower, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
        x[j + 12] = PICK(high, higher, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#elif LANES == 8
        x[j] = PICK(in_fours[j], in_fours[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        x[j + 4] = PICK(in_fours[j], in_fours[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
#else
        x[j] = in_fours[j];
#endif
    }
}

/* Tokens [begin, begin + count) of the sequence to fp32. */
static void widen(const struct Prompts *p, const struct Tile *tile, long begin, long count)
{
    const int64_t *blocks = p->table + tile->sequence * p->width;
    const bf16 *keys[TOKENS];
    long token = 2 * p->kv_heads * p->size;
    for (long t = 0; t < count; t++) {
        long place = blocks[(begin + t) / p->block_size] * p->block_size + (begin + t) % p->block_size;
        keys[t] = p->cache + place * token + tile->kv_head * p->size;
        const bf16 *value = keys[t] + p->kv_heads * p->size;
        float *to = tile->values + t * p->size;
        for (long i = 0; i < p->size; i += 2 * LANES) {
            words pairs = load_pairs(value + i);
            put(to + i, even(pairs));
            put(to + i + LANES, odd(pairs));
        }
    }
    for (long t = 0; t < count; t += LANES)
        for (long i = 0; i < p->size; i += LANES) {
            floats numbers[LANES];
            for (int j = 0; j < LANES; j++)
                numbers[j] = t + j < count ? load(keys[t + j] + i) : spread(0.0f);
            transpose(numbers);
            for (int j = 0; j < LANES; j++)
                put(tile->keys + (i + j) * TOKENS + t, numbers[j]);
        }
}

/* Scores of all TOKENS, of `some` rows from `row` on. */
INLINE void score(const struct Prompts *p, const struct Tile *tile, long row, const int some)
{
    floats acc[SOME][2] = {{{0}}};
    for (long i = 0; i < p->size; i++) {
        floats first = at(tile->keys + i * TOKENS), second = at(tile->keys + i * TOKENS + LANES);
        for (int r = 0; r < some; r++) {
            floats own = spread(tile->query[(row + r) * p->size + i]);
            acc[r][0] += own * first;
            acc[r][1] += own * second;
        }
    }
    for (int r = 0; r < some; r++) {
        put(tile->scores + (row + r) * TOKENS, acc[r][0]);
        put(tile->scores + (row + r) * TOKENS + LANES, acc[r][1]);
    }
}

/* A row's scores of the tokens from `begin` on, of which it may see [low, high), to weights. */
INLINE void weigh(const struct Prompts *p, const struct Tile *tile, long row, long begin, long low, long high)
{
    float *scores = tile->scores + row * TOKENS, most = tile->most[row];
    floats part[2];
    integers seen[2];
    for (int half = 0; half < 2; half++) {
        part[half] = at(scores + half * LANES);
        if (p->softcap > 0.0f)
            for (int j = 0; j < LANES; j++)
                part[half][j] = __builtin_tanhf(part[half][j] / p->softcap) * p->softcap;
        integers position = {0};
        for (int j = 0; j < LANES; j++)
            position[j] = j;
        position += (int32_t)(begin + half * LANES);
        seen[half] = (position >= (int32_t)low) & (position < (int32_t)high);
        part[half] = where(seen[half], part[half], spread(NEVER));
    }
    float now = largest(where(part[0] > part[1], part[0], part[1]));
    if (now > most) {
        float factor = exponential(spread(most - now))[0];
        tile->total[row] *= factor;
        for (long i = 0; i < p->size; i += LANES)
            put(tile->mixed + row * p->size + i, at(tile->mixed + row * p->size + i) * factor);
        tile->most[row] = most = now;
    }
    for (int half = 0; half < 2; half++) {
        part[half] = where(seen[half], exponential(part[half] - most), spread(0.0f));
        tile->total[row] += part[half];
        put(scores + half * LANES, part[half]);
    }
}

/* The values of `count` tokens by their weights, of `some` rows from `row` on. */
INLINE void mix(const struct Prompts *p, const struct Tile *tile, long row, const int some, long count)
{
    for (long i = 0; i < p->size; i += 2 * LANES) {
        floats acc[SOME][2];
        for (int r = 0; r < some; r++) {
            acc[r][0] = at(tile->mixed + (row + r) * p->size + i);
            acc[r][1] = at(tile->mixed + (row + r) * p->size + i + LANES);
        }
        for (long t = 0; t < count; t++) {
            floats first = at(tile->values + t * p->size + i), second = at(tile->values + t * p->size + i + LANES);
            for (int r = 0; r < some; r++) {
                floats weight = spread(tile->scores[(row + r) * TOKENS + t]);
                acc[r][0] += weight * first;
                acc[r][1] += weight * second;
            }
        }
        for (int r = 0; r < some; r++) {
            put(tile->mixed + (row + r) * p->size + i, acc[r][0]);
            put(tile->mixed + (row + r) * p->size + i + LANES, acc[r][1]);
        }
    }
}

static void tokens(const struct Prompts *p, const struct Tile *tile, long begin, long count)
{
    widen(p, tile, begin, count);
    long row = 0;
    for (; row + SOME <= tile->rows; row += SOME)
        score(p, tile, row, SOME);
    for (; row < tile->rows; row++)
        score(p, tile, row, 1);
    for (row = 0; row < tile->rows; row++) {
        long high = tile->first + row / tile->group + 1, low = p->window > 0 && high > p->window ? high - p->window : 0;
        weigh(p, tile, row, begin, low, high);
    }
    for (row = 0; row + SOME <= tile->rows; row += SOME)
        mix(p, tile, row, SOME, count);
    for (; row < tile->rows; row++)
        mix(p, tile, row, 1, count);
}

/* Rows [from, to) of the step, which are the sequence's tokens from `tile->first` on. */
static void rows_of(const struct Prompts *p, const struct Tile *tile, long from, long to)
{
    long heads = tile->kv_head * tile->group, end = tile->first + (to - from);
    for (long row = 0; row < tile->rows; row++) {
        const bf16 *query = p->query + (from + row / tile->group) * p->query_stride + (heads + row % tile->group) * p->size;
        for (long i = 0; i < p->size; i += LANES)
            put(tile->query + row * p->size + i, load(query + i) * p->scale);
        for (long i = 0; i < p->size; i += LANES)
            put(tile->mixed + row * p->size + i, spread(0.0f));
        tile->most[row] = NEVER;
        tile->total[row] = spread(0.0f);
    }
    long begin = p->window > 0 && tile->first + 1 > p->window ? tile->first + 1 - p->window : 0;
    for (begin -= begin % TOKENS; begin < end; begin += TOKENS)
        tokens(p, tile, begin, end - begin < TOKENS ? end - begin : TOKENS);
    for (long row = 0; row < tile->rows; row++) {
        bf16 *out = p->out + ((from + row / tile->group) * p->heads + heads + row % tile->group) * p->size;
        float total = sum(tile->total[row]);
        const float *mixed = tile->mixed + row * p->size;
        for (long i = 0; i < p->size; i += 2 * LANES)
            store_pairs(out + i, at(mixed + i) / total, at(mixed + i + LANES) / total);
    }
}

static void attend(void *data)
{
    struct Prompts *p = data;
    long group = p->heads / p->kv_heads, most = group < ROWS ? ROWS / group : 1, rows = most * group, size = p->size;
    float *scratch = loramux_scratch(rows * (2 * size + TOKENS + 1 + LANES) + 2 * size * TOKENS);
    if (!scratch) {
        p->failed = 1;
        return;
    }
    struct Tile tile = {.group = group, .total = (floats *)scratch};
    tile.keys = scratch + rows * LANES;
    tile.values = tile.keys + size * TOKENS;
    tile.query = tile.values + size * TOKENS;
    tile.mixed = tile.query + rows * size;
    tile.scores = tile.mixed + rows * size;
    tile.most = tile.scores + rows * TOKENS;
    for (;;) {
        long unit = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED);
        if (unit >= p->units * p->sequences * p->kv_heads)
            return;
        /* The last rows of a prompt see most: they come first. */
        long part = p->units - 1 - unit / (p->sequences * p->kv_heads), rest = unit % (p->sequences * p->kv_heads);
        tile.sequence = rest / p->kv_heads, tile.kv_head = rest % p->kv_heads;
        long begin = p->begins[tile.sequence], end = p->begins[tile.sequence + 1], from = begin + part * most;
        if (from >= end)
            continue;
        long to = from + most < end ? from + most : end;
        tile.rows = (to - from) * group;
        tile.first = p->lengths[tile.sequence] - (end - from);
        rows_of(p, &tile, from, to);
    }
}

/* query `[T, heads, size]`, rows with their stride; cache `[blocks, block_size, 2, kv_heads, size]`; table `[sequences, width]`;
 * the last row of sequence i sees lengths[i] tokens; window 0: all; softcap 0: none; it has the rows begins[i] up to
 * begins[i + 1], longest: the most of one; out `[T, heads, size]`. Returns 1 if there was no memory. */
int loramux_attend_prompts(const bf16 *query, long query_stride, const bf16 *cache, bf16 *out, const int64_t *table,
                           const int64_t *lengths, long sequences, long width, long heads, long kv_heads, long size,
                           long block_size, long window, float scale, float softcap, const int64_t *begins, long longest)
{
    long group = heads / kv_heads, most = group < ROWS ? ROWS / group : 1;
    struct Prompts prompts = {query, cache, out, table, begins, lengths, sequences, width, heads, kv_heads, size, block_size,
                              window, query_stride, scale, softcap, (longest + most - 1) / most, 0, 0};
    run(attend, &prompts, 0);
    return prompts.failed;
}
