/* What every kernel shares: vectors of LANES numbers, bf16 in memory, and the thread team that torch computes with.
 *
 * bf16 is the upper half of an fp32 number, so a vector of pairs of them is two vectors of fp32 without a shuffle: the
 * even elements shifted up, the odd ones masked. Rounding is to nearest, ties to even, as torch's.
 * Written in the vector extensions of GCC and clang, which any processor runs. Vectors are as wide as the processor's:
 * compilers keep wider ones in memory.
 */
#ifndef LORAMUX_COMMON_H
#define LORAMUX_COMMON_H

#include <stdint.h>
#include <stdlib.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t halfwords __attribute__((vector_size(2 * LANES)));
typedef words words_stored __attribute__((aligned(2), may_alias));
typedef halfwords halfwords_stored __attribute__((aligned(2), may_alias));

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (integers){__VA_ARGS__})
#endif

INLINE words load_pairs(const bf16 *from) { return *(const words_stored *)from; }
INLINE floats even(words pairs) { return (floats)(pairs << 16); }
INLINE floats odd(words pairs) { return (floats)(pairs & 0xffff0000u); }

/* sums += a * b, of pairs of numbers */
INLINE floats dot(floats sums, words a, words b)
{
#if defined(__AVX512BF16__) && LANES == 16
    return (floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    sums += even(a) * even(b);
    return sums + odd(a) * odd(b);
#endif
}

INLINE words rounded(floats x)
{
    words bits = (words)x;
    return bits + 0x7fffu + ((bits >> 16) & 1u);
}

INLINE void store_pairs(bf16 *to, floats evens, floats odds)
{
    *(words_stored *)to = (rounded(evens) >> 16) | (rounded(odds) & 0xffff0000u);
}

INLINE floats load(const bf16 *from)
{
    return (floats)(__builtin_convertvector(*(const halfwords_stored *)from, words) << 16);
}

INLINE void store(bf16 *to, floats x)
{
    *(halfwords_stored *)to = __builtin_convertvector(rounded(x) >> 16, halfwords);
}

/* x as bf16 holds it */
INLINE floats through_bf16(floats x) { return (floats)(rounded(x) & 0xffff0000u); }

INLINE floats spread(float x) { return x - (floats){0}; }

INLINE floats where(integers condition, floats yes, floats no)
{
    return (floats)((condition & (integers)yes) | (~condition & (integers)no));
}

/* Of every four elements of two vectors: the first two in turns, the last two, the first two as they are, the last two. */
#if LANES == 16
#define LOW(x, y) PICK(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define HIGH(x, y) PICK(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define FIRST(x, y) PICK(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define SECOND(x, y) PICK(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#elif LANES == 8
#define LOW(x, y) PICK(x, y, 0, 8, 1, 9, 4, 12, 5, 13)
#define HIGH(x, y) PICK(x, y, 2, 10, 3, 11, 6, 14, 7, 15)
#define FIRST(x, y) PICK(x, y, 0, 1, 8, 9, 4, 5, 12, 13)
#define SECOND(x, y) PICK(x, y, 2, 3, 10, 11, 6, 7, 14, 15)
#else
#define LOW(x, y) PICK(x, y, 0, 4, 1, 5)
#define HIGH(x, y) PICK(x, y, 2, 6, 3, 7)
#define FIRST(x, y) PICK(x, y, 0, 1, 4, 5)
#define SECOND(x, y) PICK(x, y, 2, 3, 6, 7)
#endif

/* Of four vectors, the sum of each, in the first four elements. */
INLINE floats sums(floats a, floats b, floats c, floats d)
{
    floats ab = LOW(a, b) + HIGH(a, b); /* a0+a2 b0+b2 a1+a3 b1+b3 | ... */
    floats cd = LOW(c, d) + HIGH(c, d);
    floats all = FIRST(ab, cd) + SECOND(ab, cd);
#if LANES == 16
    all += PICK(all, all, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    all += PICK(all, all, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
#elif LANES == 8
    all += PICK(all, all, 4, 5, 6, 7, 0, 1, 2, 3);
#endif
    return all;
}

INLINE float sum(floats x)
{
    floats none = {0};
    return sums(x, none, none, none)[0];
}

/* e^x, relative error below 2e-7; from -87 to 88, which it is held to. Cephes' polynomial, http://www.netlib.org/cephes/ */
INLINE floats exponential(floats x)
{
    x = where(x < -87.0f, spread(-87.0f), x);
    x = where(x > 88.0f, spread(88.0f), x);
    floats n = x * 1.44269504088896341f + 12582912.0f; /* rounds to a whole number */
    n -= 12582912.0f;
    floats r = x - n * 0.693359375f;
    r -= n * -2.12194440e-4f;
    floats y = spread(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    integers scale = (__builtin_convertvector(n, integers) + 127) << 23;
    return y * (floats)scale;
}

/* --- threads: those of torch's OpenMP, so that no second team competes with it for the cores --------------------- */

typedef void (*Work)(void *);

struct Team {
    void (*parallel)(Work, void *, unsigned, unsigned); /* GOMP_parallel */
    int (*number)(void);                                /* omp_get_thread_num */
    int (*size)(void);                                  /* omp_get_num_threads */
};

extern struct Team loramux_team;

/* Run `work` on every thread of the team, or on this one alone where a team costs more than it saves. */
INLINE void run(Work work, void *data, int alone)
{
    if (alone)
        work(data);
    else
        loramux_team.parallel(work, data, 0, 0);
}

/* This thread's share of `count` things. */
INLINE void share(long count, long *begin, long *end)
{
    long size = loramux_team.size(), number = loramux_team.number();
    *begin = count * number / size;
    *end = count * (number + 1) / size;
}

/* `count` numbers that only this thread uses until its next call; NULL if there is no memory. */
float *loramux_scratch(size_t count);

#endif
