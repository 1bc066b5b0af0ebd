/* Attention of one token a sequence over keys and values that lie in blocks, where they lie.
 *
 * A block is read once, while the next one is fetched: scores, their weights, and the values' share are done for it before the
 * next, with the running maximum and sum of Milakov and Gimelshein 2018 (https://arxiv.org/abs/1805.02867) in fp32. A
 * row's result does not depend on which rows are beside it.
 */
#include <math.h>

#include "common.h"

#define GROUP 4 /* query heads that share a KV head, at a time */

struct Attention {
    const bf16 *query, *cache;
    bf16 *out;
    const int64_t *table, *lengths;
    long rows, width, heads, kv_heads, size, block_size, window, query_stride;
    float scale, softcap;
    long parts; /* of a row's KV heads, each a thread's at a time */
    long next;
    int failed;
};

/* What is known of some heads so far, of each: the largest score, the sum of weights, the weighted sum of values. */
struct So {
    float *most, *total, *values; /* [heads], [heads], [heads, size] of each two vectors the even numbers before the odd ones */
    float *scores;                /* [GROUP, padded block] of the block at hand */
    long padded;
};

INLINE void score(const struct Attention *a, const bf16 *keys, const bf16 *coming, long begin, long end, const bf16 *query,
                  const int count, const struct So *so)
{
    long token = 2 * a->kv_heads * a->size;
    for (long t = begin; t < end; t++) {
        floats acc[GROUP] = {{0}};
        for (long i = 0; i < a->size; i += 2 * LANES) {
            words key = load_pairs(keys + t * token + i);
            __builtin_prefetch(coming + t * token + i);
            __builtin_prefetch(coming + t * token + a->kv_heads * a->size + i);
            for (int g = 0; g < count; g++)
                acc[g] = dot(acc[g], load_pairs(query + g * a->size + i), key);
        }
        floats four = sums(acc[0], acc[1], acc[2], acc[3]);
        for (int g = 0; g < count; g++)
            so->scores[g * so->padded + t] = four[g] * a->scale;
    }
}

/* Scores of tokens [begin, end) to weights by the largest score so far, to which what was summed before is brought. */
INLINE void weigh(const struct Attention *a, float *scores, long begin, long end, long padded, float *most, float *total, float *values)
{
    float largest = *most;
    for (long t = 0; t < begin; t++)
        scores[t] = -1e30f;
    for (long t = end; t < padded; t++)
        scores[t] = -1e30f;
    for (long t = begin; t < end; t++) {
        if (a->softcap > 0.0f)
            scores[t] = tanhf(scores[t] / a->softcap) * a->softcap;
        largest = scores[t] > largest ? scores[t] : largest;
    }
    if (largest > *most) {
        float factor = exponential(spread(*most - largest))[0];
        *total *= factor;
        for (long i = 0; i < a->size; i++)
            values[i] *= factor;
        *most = largest;
    }
    floats weights = {0};
    for (long t = 0; t < padded; t += LANES) {
        floats part;
        __builtin_memcpy(&part, scores + t, sizeof part);
        part = exponential(part - largest);
        weights += part;
        __builtin_memcpy(scores + t, &part, sizeof part);
    }
    *total += sum(weights);
}

INLINE void mix(const struct Attention *a, const bf16 *values, long begin, long end, const int count, const struct So *so, long head)
{
    long token = 2 * a->kv_heads * a->size;
    for (long i = 0; i < a->size; i += 2 * LANES) {
        floats e[GROUP], o[GROUP];
        for (int g = 0; g < count; g++) {
            float *sum = so->values + (head + g) * a->size + i;
            __builtin_memcpy(&e[g], sum, sizeof e[g]);
            __builtin_memcpy(&o[g], sum + LANES, sizeof o[g]);
        }
        for (long t = begin; t < end; t++) {
            words pairs = load_pairs(values + t * token + i);
            floats ve = even(pairs), vo = odd(pairs);
            for (int g = 0; g < count; g++) {
                e[g] += so->scores[g * so->padded + t] * ve;
                o[g] += so->scores[g * so->padded + t] * vo;
            }
        }
        for (int g = 0; g < count; g++) {
            float *sum = so->values + (head + g) * a->size + i;
            __builtin_memcpy(sum, &e[g], sizeof e[g]);
            __builtin_memcpy(sum + LANES, &o[g], sizeof o[g]);
        }
    }
}

INLINE void heads_in_block(const struct Attention *a, const bf16 *block, const bf16 *coming, long begin, long end, const bf16 *query,
                           long kv_head, const int count, const struct So *so, long head)
{
    const bf16 *keys = block + kv_head * a->size;
    score(a, keys, coming + kv_head * a->size, begin, end, query, count, so);
    for (int g = 0; g < count; g++)
        weigh(a, so->scores + g * so->padded, begin, end, so->padded, so->most + head + g, so->total + head + g,
              so->values + (head + g) * a->size);
    mix(a, keys + a->kv_heads * a->size, begin, end, count, so, head);
}

/* The KV heads [kv_begin, kv_end) of a row, with their query heads. */
static void part_of_row(const struct Attention *a, long row, long kv_begin, long kv_end, const struct So *so)
{
    const int64_t *blocks = a->table + row * a->width;
    long group = a->heads / a->kv_heads, head = kv_begin * group, count = (kv_end - kv_begin) * group, size = a->block_size;
    long length = a->lengths[row], first = a->window > 0 && length > a->window ? length - a->window : 0;
    const bf16 *query = a->query + row * a->query_stride;
    for (long h = 0; h < count; h++)
        so->most[h] = -INFINITY, so->total[h] = 0.0f;
    for (long i = 0; i < count * a->size; i++)
        so->values[i] = 0.0f;
    for (long b = first / size; b * size < length; b++) {
        long begin = first > b * size ? first - b * size : 0, end = length - b * size < size ? length - b * size : size;
        const bf16 *block = a->cache + blocks[b] * size * 2 * a->kv_heads * a->size;
        const bf16 *coming = (b + 1) * size < length ? a->cache + blocks[b + 1] * size * 2 * a->kv_heads * a->size : block;
        for (long kv = kv_begin; kv < kv_end; kv++)
            for (long g = 0; g < group; g += GROUP) {
                long own = (kv - kv_begin) * group + g;
                const bf16 *q = query + (kv * group + g) * a->size;
                switch (group - g) {
                case 1: heads_in_block(a, block, coming, begin, end, q, kv, 1, so, own); break;
                case 2: heads_in_block(a, block, coming, begin, end, q, kv, 2, so, own); break;
                case 3: heads_in_block(a, block, coming, begin, end, q, kv, 3, so, own); break;
                default: heads_in_block(a, block, coming, begin, end, q, kv, 4, so, own);
                }
            }
    }
    for (long h = 0; h < count; h++)
        for (long i = 0; i < a->size; i += 2 * LANES) {
            floats e, o;
            __builtin_memcpy(&e, so->values + h * a->size + i, sizeof e);
            __builtin_memcpy(&o, so->values + h * a->size + i + LANES, sizeof o);
            store_pairs(a->out + (row * a->heads + head + h) * a->size + i, e / so->total[h], o / so->total[h]);
        }
}

static void attend(void *data)
{
    struct Attention *a = data;
    long padded = (a->block_size + LANES - 1) / LANES * LANES;
    float *scratch = loramux_scratch(a->heads * (2 + a->size) + GROUP * padded);
    if (!scratch) {
        a->failed = 1;
        return;
    }
    struct So so = {scratch, scratch + a->heads, scratch + 2 * a->heads, scratch + a->heads * (2 + a->size), padded};
    for (;;) {
        long unit = __atomic_fetch_add(&a->next, 1, __ATOMIC_RELAXED), part = unit % a->parts;
        if (unit >= a->rows * a->parts)
            return;
        part_of_row(a, unit / a->parts, a->kv_heads * part / a->parts, a->kv_heads * (part + 1) / a->parts, &so);
    }
}

/* query `[rows, heads, size]`, rows with their stride; cache `[blocks, block_size, 2, kv_heads, size]`; table `[rows, width]`; out
 * `[rows, heads, size]`. window 0: all tokens; softcap 0: none. Returns 1 if there was no memory. */
int loramux_attend(const bf16 *query, long query_stride, const bf16 *cache, bf16 *out, const int64_t *table, const int64_t *lengths,
                   long rows, long width, long heads, long kv_heads, long size, long block_size, long window, float scale,
                   float softcap)
{
    /* Few rows are divided, so that every thread has something to do. */
    long parts = rows < 16 ? kv_heads : 1;
    struct Attention attention = {query, cache, out, table, lengths, rows, width, heads, kv_heads, size, block_size, window,
                                  query_stride, scale, softcap, parts, 0, 0};
    run(attend, &attention, 0);
    return attention.failed;
}


struct Writing {
    const bf16 *key, *value;
    bf16 *cache;
    const int64_t *slots;
    long rows, heads, size, key_row, key_head, value_row, value_head;
};

static void write_rows(void *data)
{
    const struct Writing *w = data;
    long begin, end;
    share(w->rows, &begin, &end);
    for (long row = begin; row < end; row++) {
        bf16 *to = w->cache + w->slots[row] * 2 * w->heads * w->size;
        for (long head = 0; head < w->heads; head++) {
            __builtin_memcpy(to + head * w->size, w->key + row * w->key_row + head * w->key_head, w->size * sizeof(bf16));
            __builtin_memcpy(to + (w->heads + head) * w->size, w->value + row * w->value_row + head * w->value_head,
                             w->size * sizeof(bf16));
        }
    }
}

/* Keys and values `[rows, heads, size]`, with their strides, to the cache's tokens `slots [rows]`. */
void loramux_write(const bf16 *key, long key_row, long key_head, const bf16 *value, long value_row, long value_head, bf16 *cache,
                   const int64_t *slots, long rows, long heads, long size)
{
    struct Writing writing = {key, value, cache, slots, rows, heads, size, key_row, key_head, value_row, value_head};
    run(write_rows, &writing, rows * heads * size < 8192);
}
