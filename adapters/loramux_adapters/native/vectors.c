/* y = x W^T in vectors of fp32, for processors without matrix tiles; W as bitsandbytes packs NF4, or as bf16.
 *
 * Weights are multiplied as the dense matrix has them, rounded to bf16: of a block of 64 that is a table of 16 numbers,
 * which the codes choose from. A few rows of x are multiplied with weights as they come out of the table; for more, a
 * thread dequantizes as many rows of W as stay near the core and multiplies them with all rows of x. Either way a sum
 * runs over the inputs in the same order, in fp32: a row's result does not depend on which rows are beside it.
 * A vector holds even inputs or the odd ones beside them: one nibble of some bytes, or one half of some pairs of bf16.
 */
#include "product.h"

#if defined(__AVX2__) && defined(__FMA__)

#include <immintrin.h>
#include <string.h>

#define NEAR (64 * 1024) /* numbers of a strip of W that stay near the core */
#define AHEAD 4096       /* bytes of W that are fetched before they are needed */

/* Rows of x and of W whose sums fit in the registers; rows of x that are multiplied without a strip. */
#ifdef __AVX512F__
#define ROWS 6
#define OUTPUTS 4
#define FEW 4
#else
#define ROWS 4
#define OUTPUTS 2
#define FEW 4
#endif

typedef floats floats_stored __attribute__((aligned(4), may_alias));

struct Halves {
    floats even, odd;
};

/* The 16 values that codes choose from. */
struct Table {
#if LANES == 16
    floats all;
#else
    floats low, high;
#endif
};

/* The numbers that LANES bytes of codes choose: high nibbles are the even ones. */
INLINE struct Halves chosen(struct Table table, const uint8_t *bytes)
{
#if LANES == 16
    __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes));
    return (struct Halves){(floats)_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), (__m512)table.all),
                           (floats)_mm512_permutexvar_ps(codes, (__m512)table.all)};
#else
    __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)bytes)), high = _mm256_srli_epi32(codes, 4);
#define CHOOSE(c)                                                                                                      \
    _mm256_blendv_ps(_mm256_permutevar8x32_ps((__m256)table.low, c), _mm256_permutevar8x32_ps((__m256)table.high, c), \
                     _mm256_castsi256_ps(_mm256_slli_epi32(c, 28)))
    return (struct Halves){(floats)CHOOSE(high), (floats)CHOOSE(codes)};
#undef CHOOSE
#endif
}

INLINE struct Halves apart(const bf16 *numbers)
{
    words pairs = load_pairs(numbers);
    return (struct Halves){even(pairs), odd(pairs)};
}

INLINE struct Table table_of(const struct Product *p, long output, long block)
{
    const floats_stored *codes = (const floats_stored *)p->codes;
    float scale = p->scales[output * (p->in / BLOCK) + block];
#if LANES == 16
    return (struct Table){through_bf16(codes[0] * scale)};
#else
    return (struct Table){through_bf16(codes[0] * scale), through_bf16(codes[1] * scale)};
#endif
}

/* Bytes of `inputs` weights. */
INLINE long bytes_of(const struct Product *p, long inputs) { return p->scales ? inputs / 2 : inputs * 2; }

INLINE const uint8_t *weights_of(const struct Product *p, long output)
{
    return (const uint8_t *)p->weight + output * bytes_of(p, p->in);
}

/* One row of numbers to fp32: of every two vectors the even ones, then the odd ones. */
INLINE void widen(const bf16 *from, long in, float *to)
{
    for (long i = 0; i < in; i += 2 * LANES) {
        struct Halves halves = apart(from + i);
        *(floats_stored *)(to + i) = halves.even;
        *(floats_stored *)(to + i + LANES) = halves.odd;
    }
}

static void dequantize(const struct Product *p, long output, float *to)
{
    if (!p->scales) {
        widen((const bf16 *)weights_of(p, output), p->in, to);
        return;
    }
    const uint8_t *codes = weights_of(p, output);
    for (long block = 0; block < p->in / BLOCK; block++) {
        struct Table table = table_of(p, output, block);
        for (int i = 0; i < BLOCK; i += 2 * LANES, codes += LANES, to += 2 * LANES) {
            struct Halves halves = chosen(table, codes);
            *(floats_stored *)to = halves.even;
            *(floats_stored *)(to + LANES) = halves.odd;
        }
    }
}

/* Sums to y: of `rows` rows from `row` on, of `outputs` outputs from `output` on. */
INLINE void write_out(const struct Product *p, floats (*acc)[OUTPUTS], long row, const int rows, long output, const int outputs)
{
    const floats none = {0};
    floats bias = none;
    for (int n = 0; p->bias && n < outputs; n++)
        bias[n] = even((words){p->bias[output + n]})[0];
    for (int t = 0; t < rows; t++) {
        floats *own = acc[t];
        floats y = sums(own[0], outputs > 1 ? own[1] : none, outputs > 2 ? own[2] : none, outputs > 3 ? own[3] : none);
        halfwords numbers = __builtin_convertvector(rounded(y + bias) >> 16, halfwords);
        memcpy(p->y + (row + t) * p->out + output, &numbers, outputs * sizeof(bf16));
    }
}

/* `rows` rows of x, wide, with `outputs` rows of W as they come out of memory. */
INLINE void from_memory(const struct Product *p, const float *x, const int rows, long output, const int outputs)
{
    floats acc[FEW][OUTPUTS] = {{{0}}};
    for (long block = 0; block < p->in / BLOCK; block++) {
        struct Table table[OUTPUTS];
        for (int n = 0; p->scales && n < outputs; n++)
            table[n] = table_of(p, output + n, block);
        for (long i = block * BLOCK; i < (block + 1) * BLOCK; i += 2 * LANES)
            for (int n = 0; n < outputs; n++) {
                const uint8_t *from = weights_of(p, output + n) + bytes_of(p, i);
                __builtin_prefetch(from + AHEAD);
                struct Halves w = p->scales ? chosen(table[n], from) : apart((const bf16 *)from);
                for (int t = 0; t < rows; t++) {
                    const floats_stored *own = (const floats_stored *)(x + t * p->in + i);
                    acc[t][n] += own[0] * w.even;
                    acc[t][n] += own[1] * w.odd;
                }
            }
    }
    write_out(p, acc, 0, rows, output, outputs);
}

/* The same of a strip that was dequantized. */
INLINE void from_strip(const struct Product *p, const float *x, long row, const int rows, const float *w, long output,
                       const int outputs)
{
    floats acc[ROWS][OUTPUTS] = {{{0}}};
    for (long i = 0; i < p->in; i += LANES) {
        floats weights[OUTPUTS];
        for (int n = 0; n < outputs; n++)
            weights[n] = *(const floats_stored *)(w + n * p->in + i);
        for (int t = 0; t < rows; t++) {
            floats own = *(const floats_stored *)(x + t * p->in + i);
            for (int n = 0; n < outputs; n++)
                acc[t][n] += own * weights[n];
        }
    }
    write_out(p, acc, row, rows, output, outputs);
}

INLINE void few(const struct Product *p, const float *x, const int rows, long begin, long end)
{
    for (; begin + OUTPUTS <= end; begin += OUTPUTS)
        from_memory(p, x, rows, begin, OUTPUTS);
    for (; begin < end; begin++)
        from_memory(p, x, rows, begin, 1);
}

INLINE void many(const struct Product *p, const float *x, long row, const int rows, const float *w, long begin, long end)
{
    for (; begin + OUTPUTS <= end; begin += OUTPUTS, w += OUTPUTS * p->in)
        from_strip(p, x, row, rows, w, begin, OUTPUTS);
    for (; begin < end; begin++, w += p->in)
        from_strip(p, x, row, rows, w, begin, 1);
}

static void widen_rows(const struct Product *p, long row, long rows, float *x)
{
    for (long t = 0; t < rows; t++)
        widen(p->x + (row + t) * p->in, p->in, x + t * p->in);
}

/* Numbers of rows are constants below, so that sums stay in registers. */
#define EACH(n, call) \
    case n:           \
        call;         \
        break;

static void multiply_few(const struct Product *p, float *x, long begin, long end)
{
    widen_rows(p, 0, p->rows, x);
    switch (p->rows) {
        EACH(1, few(p, x, 1, begin, end))
        EACH(2, few(p, x, 2, begin, end))
        EACH(3, few(p, x, 3, begin, end))
        EACH(4, few(p, x, 4, begin, end))
    }
}

static void multiply_many(const struct Product *p, float *x, const float *w, long begin, long end)
{
    for (long row = 0; row < p->rows; row += ROWS) {
        long rows = p->rows - row < ROWS ? p->rows - row : ROWS;
        widen_rows(p, row, rows, x);
        switch (rows) {
            EACH(1, many(p, x, row, 1, w, begin, end))
            EACH(2, many(p, x, row, 2, w, begin, end))
            EACH(3, many(p, x, row, 3, w, begin, end))
            EACH(4, many(p, x, row, 4, w, begin, end))
#if ROWS > 4
            EACH(5, many(p, x, row, 5, w, begin, end))
            EACH(6, many(p, x, row, 6, w, begin, end))
#endif
        }
    }
}

static void outputs(void *data)
{
    struct Product *p = data;
    long begin, end, most = NEAR / p->in / OUTPUTS * OUTPUTS;
    share((p->out + OUTPUTS - 1) / OUTPUTS, &begin, &end);
    begin *= OUTPUTS;
    end = end * OUTPUTS < p->out ? end * OUTPUTS : p->out;
    if (begin >= end)
        return;
    if (most < OUTPUTS)
        most = OUTPUTS;
    int is_few = p->rows <= FEW;
    float *x = loramux_scratch((is_few ? FEW : ROWS + most) * p->in), *w = x + ROWS * p->in;
    if (!x) {
        p->failed = 1;
        return;
    }
    if (is_few) {
        multiply_few(p, x, begin, end);
        return;
    }
    for (; begin < end; begin += most) {
        long last = begin + most < end ? begin + most : end;
        for (long output = begin; output < last; output++)
            dequantize(p, output, w + (output - begin) * p->in);
        multiply_many(p, x, w, begin, last);
    }
}

int loramux_vectors(void) { return 1; }

/* weight uint8 `[out, in/2]`, the first of two codes in the high nibble, or bf16 `[out, in]`; scales `[out, in/64]`. */
int loramux_vector_product(const void *weight, const float *scales, const float *codes, const bf16 *bias, const bf16 *x,
                           bf16 *y, long rows, long in, long out)
{
    if (!rows)
        return 0;
    struct Product product = {weight, scales, codes, bias, x, y, rows, in, out, 0};
    run(outputs, &product, 0);
    return product.failed;
}

#else

int loramux_vectors(void) { return 0; }

int loramux_vector_product(const void *weight, const float *scales, const float *codes, const bf16 *bias, const bf16 *x,
                           bf16 *y, long rows, long in, long out)
{
    (void)weight, (void)scales, (void)codes, (void)bias, (void)x, (void)y;
    (void)rows, (void)in, (void)out;
    return 1;
}

#endif
