/* What modeling code does element by element, each in one pass over memory: norms, rotary embeddings, gated activations.
 *
 * Every intermediate result that torch would round to bf16 is rounded here.
 */
#include "common.h"

struct Team loramux_team;

static __thread float *scratch;
static __thread size_t scratch_size;

float *loramux_scratch(size_t count)
{
    if (count > scratch_size) {
        free(scratch);
        scratch = aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64);
        scratch_size = scratch ? count : 0;
    }
    return scratch;
}

/* Of the OpenMP runtime that torch has loaded. Call once, before anything else. */
void loramux_setup(void *parallel, void *number, void *size)
{
    loramux_team.parallel = (void (*)(Work, void *, unsigned, unsigned))parallel;
    loramux_team.number = (int (*)(void))number;
    loramux_team.size = (int (*)(void))size;
}

struct Norm {
    const bf16 *x, *weight;
    bf16 *out;
    long rows, size;
    float epsilon;
    int around_one;
};

static void norm_rows(void *data)
{
    const struct Norm *norm = data;
    long begin, end;
    share(norm->rows, &begin, &end);
    for (long row = begin; row < end; row++) {
        const bf16 *x = norm->x + row * norm->size;
        bf16 *out = norm->out + row * norm->size;
        floats squares = {0};
        for (long i = 0; i < norm->size; i += LANES)
            squares += load(x + i) * load(x + i);
        float scale = 1.0f / __builtin_sqrtf(sum(squares) / norm->size + norm->epsilon);
        for (long i = 0; i < norm->size; i += LANES) {
            floats normed = load(x + i) * scale, weight = load(norm->weight + i);
            store(out + i, norm->around_one ? normed * (weight + 1.0f) : through_bf16(normed) * weight);
        }
    }
}

/* RMSNorm, Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, of rows `[rows, size]`; with `around_one` the weight
 * is what it differs from one by, as in Gemma. */
void loramux_rms_norm(const bf16 *x, const bf16 *weight, bf16 *out, long rows, long size, float epsilon, int around_one)
{
    struct Norm norm = {x, weight, out, rows, size, epsilon, around_one};
    run(norm_rows, &norm, rows * size < 32768);
}

struct Rotation {
    const bf16 *x, *cosine, *sine;
    bf16 *out;
    long tokens, heads, size, token_stride, head_stride;
};

static void rotate_tokens(void *data)
{
    const struct Rotation *r = data;
    long begin, end, half = r->size / 2;
    share(r->tokens, &begin, &end);
    for (long token = begin; token < end; token++) {
        const bf16 *c = r->cosine + token * r->size, *s = r->sine + token * r->size;
        for (long head = 0; head < r->heads; head++) {
            const bf16 *x = r->x + token * r->token_stride + head * r->head_stride;
            bf16 *out = r->out + (token * r->heads + head) * r->size;
            for (long i = 0; i < half; i += LANES) {
                floats first = load(x + i), second = load(x + half + i);
                store(out + i, through_bf16(first * load(c + i)) + through_bf16(-second * load(s + i)));
                store(out + half + i,
                      through_bf16(second * load(c + half + i)) + through_bf16(first * load(s + half + i)));
            }
        }
    }
}

/* Rotary position embedding, Su et al. 2021, https://arxiv.org/abs/2104.09864, halves rotated: x, with its strides, by cosine
 * and sine `[tokens, size]` to out `[tokens, heads, size]`. */
void loramux_rotate(const bf16 *x, const bf16 *cosine, const bf16 *sine, bf16 *out, long tokens, long heads, long size,
                    long token_stride, long head_stride)
{
    struct Rotation rotation = {x, cosine, sine, out, tokens, heads, size, token_stride, head_stride};
    run(rotate_tokens, &rotation, tokens * heads * size < 32768);
}

struct Gate {
    const bf16 *gate, *up;
    bf16 *out;
    long rows, size, gate_stride, up_stride;
};

static void gate_rows(void *data)
{
    const struct Gate *g = data;
    long begin, end;
    share(g->rows, &begin, &end);
    for (long row = begin; row < end; row++) {
        const bf16 *gate = g->gate + row * g->gate_stride, *up = g->up + row * g->up_stride;
        bf16 *out = g->out + row * g->size;
        for (long i = 0; i < g->size; i += LANES) {
            floats x = load(gate + i);
            floats silu = x / (1.0f + exponential(-x));
            store(out + i, through_bf16(silu) * load(up + i));
        }
    }
}

/* silu(gate) * up, Shazeer 2020, https://arxiv.org/abs/2002.05202, of rows with their strides to out `[rows, size]`. */
void loramux_gate(const bf16 *gate, const bf16 *up, bf16 *out, long rows, long size, long gate_stride, long up_stride)
{
    struct Gate work = {gate, up, out, rows, size, gate_stride, up_stride};
    run(gate_rows, &work, rows * size < 16384);
}
