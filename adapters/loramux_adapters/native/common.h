/* What every kernel shares: vectors of 16 numbers, bf16 in memory, and the thread team that torch computes with.
 *
 * bf16 is the upper half of an fp32 number, so 32 of them, loaded as 16 words, are two vectors of fp32 without a shuffle:
 * the even elements shifted up, the odd ones masked. Rounding is to nearest, ties to even, as torch's.
 * Written in the vector extensions of GCC and clang, which any processor runs; nothing here is specific to one.
 */
#ifndef LORAMUX_COMMON_H
#define LORAMUX_COMMON_H

#include <stdint.h>
#include <stdlib.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;
typedef float f32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef u32x16 u32x16_stored __attribute__((aligned(2), may_alias));
typedef u16x16 u16x16_stored __attribute__((aligned(2), may_alias));

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (i32x16){__VA_ARGS__})
#endif

INLINE u32x16 load_pairs(const bf16 *from) { return *(const u32x16_stored *)from; }
INLINE f32x16 even(u32x16 pairs) { return (f32x16)(pairs << 16); }
INLINE f32x16 odd(u32x16 pairs) { return (f32x16)(pairs & 0xffff0000u); }

/* sums += a * b, of 32 pairs of numbers, in 16 sums */
INLINE f32x16 dot(f32x16 sums, u32x16 a, u32x16 b)
{
#ifdef __AVX512BF16__
    return (f32x16)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    sums += even(a) * even(b);
    return sums + odd(a) * odd(b);
#endif
}

INLINE u32x16 rounded(f32x16 x)
{
    u32x16 bits = (u32x16)x;
    return bits + 0x7fffu + ((bits >> 16) & 1u);
}

INLINE void store_pairs(bf16 *to, f32x16 evens, f32x16 odds)
{
    *(u32x16_stored *)to = (rounded(evens) >> 16) | (rounded(odds) & 0xffff0000u);
}

INLINE f32x16 load(const bf16 *from)
{
    return (f32x16)(__builtin_convertvector(*(const u16x16_stored *)from, u32x16) << 16);
}

INLINE void store(bf16 *to, f32x16 x)
{
    *(u16x16_stored *)to = __builtin_convertvector(rounded(x) >> 16, u16x16);
}

/* x as bf16 holds it */
INLINE f32x16 through_bf16(f32x16 x) { return (f32x16)(rounded(x) & 0xffff0000u); }

INLINE f32x16 spread(float x) { return x - (f32x16){0}; }

INLINE f32x16 where(i32x16 condition, f32x16 yes, f32x16 no)
{
    return (f32x16)((condition & (i32x16)yes) | (~condition & (i32x16)no));
}

/* Of four vectors, the sum of each, in the first four elements. */
INLINE f32x16 sums(f32x16 a, f32x16 b, f32x16 c, f32x16 d)
{
#define LOW(x, y) PICK(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define HIGH(x, y) PICK(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
    f32x16 ab = LOW(a, b) + HIGH(a, b); /* a0+a2 b0+b2 a1+a3 b1+b3 | ... */
    f32x16 cd = LOW(c, d) + HIGH(c, d);
#undef LOW
#undef HIGH
    f32x16 all = PICK(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
        + PICK(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    all += PICK(all, all, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    return all + PICK(all, all, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
}

INLINE float sum(f32x16 x)
{
    f32x16 none = {0};
    return sums(x, none, none, none)[0];
}

/* e^x, relative error below 2e-7; from -87 to 88, which it is held to. Cephes' polynomial, http://www.netlib.org/cephes/ */
INLINE f32x16 exponential(f32x16 x)
{
    x = where(x < -87.0f, spread(-87.0f), x);
    x = where(x > 88.0f, spread(88.0f), x);
    f32x16 n = x * 1.44269504088896341f + 12582912.0f; /* rounds to a whole number */
    n -= 12582912.0f;
    f32x16 r = x - n * 0.693359375f;
    r -= n * -2.12194440e-4f;
    f32x16 y = spread(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    i32x16 scale = (__builtin_convertvector(n, i32x16) + 127) << 23;
    return y * (f32x16)scale;
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
