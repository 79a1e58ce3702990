/* A token of every running sample through a whole decoder layer. What one call each costs in Python and in torch is, for
   small models, as much as the work. */

#include "vector.h"

typedef struct {
    I hidden, inner, heads, groups, D, window; /* key heads, queries' heads to each of them; window 0: none */
    float scale, offset, eps;
    const num *before, *between, *q_norm, *k_norm; /* norms; the last two may be NULL */
    const num *q, *k, *v, *o, *gate, *up, *down;   /* panels */
    const num *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias, *up_bias, *down_bias; /* or NULL */
} Layer;

/* The running samples, as attention_decode takes them. */
typedef struct {
    I n, B, longest_prompt, length;
    const num *cosine, *sine, *prompt_keys, *prompt_values;
    num *keys, *values;
    const I *blocks, *slots, *prompt_of, *prompt_length, *drawn;
} Running;

void NAME(rms_norm_forward)(const num *, const num *, float, float, num *, float *, I, I, I);
void NAME(rope)(const num *, I, I, const num *, const num *, num *, I, I, I, I, I);
void NAME(swiglu_forward)(const num *, const num *, num *, I, I);
void NAME(panels_product)(const num *, const num *, const num *, num *, void *, I, I, I, I);
void NAME(attention_decode)(
    const num *, const num *, const num *, const num *, const num *, num *, num *, const I *, const I *, const I *,
    const I *, const I *, I, I, num *, I, const Shape *, I);

#define GRAIN 16384 /* numbers that a thread should have, or it is not worth waking */

static I awake(I numbers, I threads) {
    const I worth = numbers / GRAIN < 1 ? 1 : numbers / GRAIN;
    return worth < threads ? worth : threads;
}

static void multiply(
    const num *x, const num *panels, const num *bias, num *y, float *terms, I n, I N, I K, I threads) {
    NAME(panels_product)(x, panels, bias, y, terms, n, N, K, awake(n * N * K / 4, threads));
}

static void add(num *x, const num *y, I count) {
#pragma omp simd
    for (I i = 0; i < count; i++) x[i] = put(get(x[i]) + get(y[i]));
}

/* x [n, hidden] -> what the layer makes of it, in its place. To work in: room [n, hidden + the larger of 2 inner and
   3 (queries' and keys' width)], terms [n, 1 + the largest width]. */
void NAME(decoder_layer)(num *x, const Layer *layer, const Running *running, num *room, float *terms, I threads) {
    const Layer z = *layer;
    const Running r = *running;
    const I n = r.n, H = z.heads * z.groups, queries = H * z.D, keys = z.heads * z.D;
    num *normed = room, *q = normed + n * z.hidden, *k = q + n * queries, *v = k + n * keys;
    num *turned = v + n * keys, *turned_k = turned + n * queries, *out = turned_k + n * keys;
    num *gate = q, *up = gate + n * z.inner; /* attention is over by then */
    float *scales = terms; /* read by nobody here */
    const Shape shape = {z.heads, z.groups, z.D, z.window, z.scale, z.D, queries, z.D, keys, z.D, keys};

    NAME(rms_norm_forward)(x, z.before, z.offset, z.eps, normed, scales, n, z.hidden, awake(n * z.hidden, threads));
    multiply(normed, z.q, z.q_bias, q, terms, n, queries, z.hidden, threads);
    multiply(normed, z.k, z.k_bias, k, terms, n, keys, z.hidden, threads);
    multiply(normed, z.v, z.v_bias, v, terms, n, keys, z.hidden, threads);
    if (z.q_norm) NAME(rms_norm_forward)(q, z.q_norm, z.offset, z.eps, q, scales, n * H, z.D, awake(n * queries, threads));
    if (z.k_norm) NAME(rms_norm_forward)(k, z.k_norm, z.offset, z.eps, k, scales, n * z.heads, z.D, awake(n * keys, threads));
    NAME(rope)(q, z.D, queries, r.cosine, r.sine, turned, n, H, z.D, 0, awake(n * queries, threads));
    NAME(rope)(k, z.D, keys, r.cosine, r.sine, turned_k, n, z.heads, z.D, 0, awake(n * keys, threads));
    NAME(attention_decode)(turned, turned_k, v, r.prompt_keys, r.prompt_values, r.keys, r.values, r.blocks, r.slots,
                           r.prompt_of, r.prompt_length, r.drawn, r.longest_prompt, r.length, out, r.B, &shape,
                           awake(n * queries * 64, threads));
    multiply(out, z.o, z.o_bias, normed, terms, n, z.hidden, queries, threads);
    add(x, normed, n * z.hidden);
    NAME(rms_norm_forward)(x, z.between, z.offset, z.eps, normed, scales, n, z.hidden, awake(n * z.hidden, threads));
    multiply(normed, z.gate, z.gate_bias, gate, terms, n, z.inner, z.hidden, threads);
    multiply(normed, z.up, z.up_bias, up, terms, n, z.inner, z.hidden, threads);
    NAME(swiglu_forward)(gate, up, gate, n * z.inner, awake(n * z.inner, threads));
    multiply(gate, z.down, z.down_bias, normed, terms, n, z.hidden, z.inner, threads);
    add(x, normed, n * z.hidden);
}
