/* y = x W^T by the processor's matrix tiles (Intel AMX), W as NF4 codes or bf16, laid out in tiles when it was packed.
 *
 * A thread takes 32 rows of W at a time, dequantizes them once, each weight rounded to bf16 as the dense matrix has it, and
 * multiplies them with all rows of x. Sums are fp32 and run over the inputs in order: a row's result does not depend on
 * which rows are beside it.
 * Layout: tiles of 16 outputs x 32 inputs; in a tile, row p has for each output the inputs 2p and 2p+1. As codes such a row is 16
 * bytes: low nibbles are its first 16 numbers, high nibbles the others.
 */
#include "product.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)

#include <immintrin.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ROWS 16
#define INPUTS 32
#define NUMBERS (ROWS * INPUTS) /* in a tile */
#define AHEAD 2048              /* bytes of codes that are fetched before they are needed */

/* What was written before is in memory: compilers do not know what the tile instructions read. */
INLINE void written(const void *what) { __asm__ volatile("" : : "r"(what) : "memory"); }

/* Tiles 0 to 3 are sums, 4 and 5 rows of x, of which the second has `second`, 6 and 7 weights. */
static void configure(long first, long second)
{
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } set;
    memset(&set, 0, sizeof set);
    set.palette = 1;
    const uint8_t rows[8] = {first, first, second ? second : 1, second ? second : 1, first, second ? second : 1, ROWS, ROWS};
    for (int i = 0; i < 8; i++)
        set.bytes[i] = 64, set.rows[i] = rows[i];
    written(&set);
    _tile_loadconfig(&set);
}

static void dequantize(const struct Product *p, long tile, bf16 *to)
{
    const uint8_t *from = (const uint8_t *)p->weight + tile * (p->in / INPUTS) * (NUMBERS / 2);
    const float *scales = p->scales + tile * (p->in / 64) * ROWS;
    const __m512 codes = _mm512_loadu_ps(p->codes);
    const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (long block = 0; block < p->in / 64; block++) {
        __m512 scale = _mm512_loadu_ps(scales + block * ROWS);
        __m512 first = _mm512_permutexvar_ps(low, scale), second = _mm512_permutexvar_ps(high, scale);
        for (int row = 0; row < 2 * ROWS; row++, from += 16, to += INPUTS) {
            if (row % 4 == 0)
                __builtin_prefetch(from + AHEAD);
            __m512i indices = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
            __m512 a = _mm512_mul_ps(_mm512_permutexvar_ps(indices, codes), first);
            __m512 b = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(indices, 4), codes), second);
            _mm512_store_si512((void *)to, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        }
    }
}

static void write_out(const struct Product *p, const float *sums, long row, long rows, long output)
{
    floats bias = {0};
    if (p->bias)
        bias = load(p->bias + output);
    for (long t = 0; t < rows; t++) {
        floats sum;
        memcpy(&sum, sums + t * ROWS, sizeof sum);
        store(p->y + (row + t) * p->out + output, sum + bias);
    }
}

/* Rows `row` and further of x, `first` and `second` many, with two tiles' width of weights. */
INLINE void multiply(const struct Product *p, long row, long first, long second, const bf16 *w0, const bf16 *w1, long output)
{
    const bf16 *x = p->x + row * p->in, *x1 = x + ROWS * p->in;
    long stride = p->in * sizeof(bf16);
    _tile_zero(0);
    _tile_zero(1);
    if (second) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long k = 0; k < p->in / INPUTS; k++) {
        _tile_loadd(4, x + k * INPUTS, stride);
        /* Weights come by; the rows of x, which the next strip multiplies too, stay. */
        _tile_stream_loadd(6, w0 + k * NUMBERS, 64);
        _tile_stream_loadd(7, w1 + k * NUMBERS, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (second) {
            _tile_loadd(5, x1 + k * INPUTS, stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    float sums[ROWS * ROWS] __attribute__((aligned(64)));
    _tile_stored(0, sums, 64);
    write_out(p, sums, row, first, output);
    _tile_stored(1, sums, 64);
    write_out(p, sums, row, first, output + ROWS);
    if (second) {
        _tile_stored(2, sums, 64);
        write_out(p, sums, row + ROWS, second, output);
        _tile_stored(3, sums, 64);
        write_out(p, sums, row + ROWS, second, output + ROWS);
    }
}

/* Numbers of weights that are dequantized before rows are multiplied with them: what stays near the core. */
#define NEAR (256 * 1024)

static void strips(void *data)
{
    struct Product *p = data;
    long begin, end, size = p->in * ROWS, full = p->rows / (2 * ROWS) * (2 * ROWS), rest = p->rows - full;
    long first = rest < ROWS ? rest : ROWS, second = rest - first, most = NEAR / (2 * size);
    share(p->out / (2 * ROWS), &begin, &end);
    if (begin == end)
        return;
    if (most < 1 || !full)
        most = 1;
    if (most > end - begin)
        most = end - begin;
    bf16 *dense = p->scales ? (bf16 *)loramux_scratch(most * size) : 0;
    if (p->scales && !dense) {
        p->failed = 1;
        return;
    }
    if (!full)
        configure(first, second);
    for (long strip = begin; strip < end; strip += most) {
        long count = most < end - strip ? most : end - strip;
        const bf16 *w = dense ? dense : (const bf16 *)p->weight + 2 * strip * size;
        if (dense) {
            for (long tile = 0; tile < 2 * count; tile++)
                dequantize(p, 2 * strip + tile, dense + tile * size);
            written(dense);
        }
        if (full)
            configure(ROWS, ROWS);
        for (long row = 0; row < full; row += 2 * ROWS)
            for (long i = 0; i < count; i++)
                multiply(p, row, ROWS, ROWS, w + 2 * i * size, w + (2 * i + 1) * size, 2 * (strip + i) * ROWS);
        if (full && rest)
            configure(first, second);
        for (long i = 0; rest && i < count; i++)
            multiply(p, full, first, second, w + 2 * i * size, w + (2 * i + 1) * size, 2 * (strip + i) * ROWS);
    }
    _tile_release();
}

/* 1 if this process may use the tiles: the system must save them when it switches threads. Documented in the kernel's
 * arch/x86/xstate. */
int loramux_tiles(void)
{
    const long request = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

/* weight uint8 `[N/16, K/32, 256]` or bf16 `[N/16, K/32, 512]`, scales `[N/16, K/64, 16]`; out a multiple of 32. */
int loramux_tile_product(const void *weight, const float *scales, const float *codes, const bf16 *bias, const bf16 *x, bf16 *y,
                         long rows, long in, long out)
{
    if (!rows)
        return 0;
    struct Product product = {weight, scales, codes, bias, x, y, rows, in, out, 0};
    run(strips, &product, 0);
    return product.failed;
}

#else

int loramux_tiles(void) { return 0; }

int loramux_tile_product(const void *weight, const float *scales, const float *codes, const bf16 *bias, const bf16 *x, bf16 *y,
                         long rows, long in, long out)
{
    (void)weight, (void)scales, (void)codes, (void)bias, (void)x, (void)y;
    (void)rows, (void)in, (void)out;
    return 1;
}

#endif
