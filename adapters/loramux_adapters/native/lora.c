/* y += x A^T B for rows of many adapters, each multiplied by its own factors and no others.
 *
 * Rows come in tiles of up to four that share an adapter: its factors are read once for all of them. The product x A^T is held in
 * fp32. A row's result does not depend on which rows are beside it.
 */
#include "common.h"

#define TILE 4

struct Tile {
    int32_t first, count; /* of `rows` */
    int32_t offset, rank; /* rank rows of the adapter */
};

struct Lora {
    const bf16 *a, *b;
    long in, out;
    const bf16 *x;
    bf16 *y;
    long x_stride, y_stride;
    const struct Tile *tiles;
    const int32_t *rows;
    long num_tiles;
    int failed;
};

/* h[t][j] = x[t] . a[j], of `ranks` rows of A. */
INLINE void shrink(const bf16 *const *x, const bf16 *a, long in, const int count, const int ranks, float *h, long rank)
{
    floats acc[TILE][TILE] = {{{0}}};
    for (long i = 0; i < in; i += 2 * LANES) {
        words own[TILE];
        for (int t = 0; t < count; t++)
            own[t] = load_pairs(x[t] + i);
        for (int j = 0; j < ranks; j++) {
            words factor = load_pairs(a + j * in + i);
            for (int t = 0; t < count; t++)
                acc[t][j] = dot(acc[t][j], own[t], factor);
        }
    }
    for (int t = 0; t < count; t++) {
        floats four = sums(acc[t][0], acc[t][1], acc[t][2], acc[t][3]);
        for (int j = 0; j < ranks; j++)
            h[t * rank + j] = four[j];
    }
}

INLINE void expand(const float *h, const bf16 *b, long out, const int count, long rank, bf16 *const *y)
{
    for (long o = 0; o < out; o += 2 * LANES) {
        floats e[TILE], d[TILE];
        for (int t = 0; t < count; t++) {
            words pairs = load_pairs(y[t] + o);
            e[t] = even(pairs), d[t] = odd(pairs);
        }
        for (long j = 0; j < rank; j++) {
            words pairs = load_pairs(b + j * out + o);
            floats be = even(pairs), bo = odd(pairs);
            for (int t = 0; t < count; t++) {
                e[t] += h[t * rank + j] * be;
                d[t] += h[t * rank + j] * bo;
            }
        }
        for (int t = 0; t < count; t++)
            store_pairs(y[t] + o, e[t], d[t]);
    }
}

INLINE void tile_of(const struct Lora *l, const struct Tile *tile, const int count, float *h)
{
    const bf16 *x[TILE];
    bf16 *y[TILE];
    for (int t = 0; t < count; t++) {
        x[t] = l->x + l->rows[tile->first + t] * l->x_stride;
        y[t] = l->y + l->rows[tile->first + t] * l->y_stride;
    }
    const bf16 *a = l->a + tile->offset * l->in, *b = l->b + tile->offset * l->out;
    long rank = tile->rank, j = 0;
    for (; j + TILE <= rank; j += TILE)
        shrink(x, a + j * l->in, l->in, count, TILE, h + j, rank);
    for (; j < rank; j++)
        shrink(x, a + j * l->in, l->in, count, 1, h + j, rank);
    expand(h, b, l->out, count, rank, y);
}

static void tiles_of(void *data)
{
    struct Lora *l = data;
    long begin, end;
    share(l->num_tiles, &begin, &end);
    for (long i = begin; i < end; i++) {
        const struct Tile *tile = l->tiles + i;
        float *h = loramux_scratch((size_t)tile->rank * TILE);
        if (!h) {
            l->failed = 1;
            return;
        }
        switch (tile->count) {
        case 1: tile_of(l, tile, 1, h); break;
        case 2: tile_of(l, tile, 2, h); break;
        case 3: tile_of(l, tile, 3, h); break;
        default: tile_of(l, tile, 4, h);
        }
    }
}

/* A `[ranks, in]`, B `[ranks, out]`; x and y rows with their strides; tiles of no rows come last. Returns 1 if there was
 * no memory. */
int loramux_lora(const bf16 *a, const bf16 *b, long in, long out, const bf16 *x, long x_stride, bf16 *y, long y_stride,
                 const struct Tile *tiles, long num_tiles, const int32_t *rows)
{
    while (num_tiles && !tiles[num_tiles - 1].count)
        num_tiles--;
    struct Lora lora = {a, b, in, out, x, y, x_stride, y_stride, tiles, rows, num_tiles, 0};
    run(tiles_of, &lora, num_tiles < 2);
    return lora.failed;
}
