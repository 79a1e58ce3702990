/* Vectors as wide as this processor's, e^x, memory of a thread, and products of small matrices.

   Everywhere in the kernels: strides in elements, the last dimension dense. Tensors hold `num`, which is float32 or, with
   -DBF16, bfloat16; all is computed in float32. A row (or a head of a tree of sequences) is computed by one thread, so
   the number of threads changes no result except the sum over rows in rms_norm_backward, whose order is fixed for a
   given number. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define W 16
#elif defined(__AVX__)
#define W 8
#else
#define W 4
#endif
#define COLS (2 * W)
#define BLOCK 16 /* queries whose scores are held at once */
#define UP(n) (((n) + COLS - 1) / COLS * COLS)

typedef int64_t I;
typedef float vec __attribute__((vector_size(4 * W)));
typedef float anywhere __attribute__((vector_size(4 * W), aligned(4), may_alias));

static inline vec load(const float *p) { return *(const anywhere *)p; }
static inline void store(float *p, vec x) { *(anywhere *)p = x; }
static inline vec all(float x) { return x - (vec){0}; }

#ifdef BF16
typedef uint16_t num; /* the upper half of a float32 */
typedef uint16_t halves __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef uint32_t wholes __attribute__((vector_size(4 * W)));
#define NAME(function) function##_bf16
#define PLAIN 0 /* products can read it as it is */

static inline float get(num x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

/* To the nearest, ties to even; what is no number stays none. */
static inline num put(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline vec load_num(const num *p) { return (vec)(__builtin_convertvector(*(const halves *)p, wholes) << 16); }
#else
typedef float num;
#define NAME(function) function
#define PLAIN 1

static inline float get(num x) { return x; }
static inline num put(float x) { return x; }
static inline vec load_num(const num *p) { return load(p); }
#endif

/* How attention is asked. */
typedef struct {
    I heads, groups, D, window; /* key heads, queries' heads to each of them; window 0: none */
    float scale;
    I qh, qn, kh, kn, vh, vn; /* strides by head and by token */
} Shape;

/* e^x within 2 units in the last place for -87 <= x <= 88, and that of the nearer end beyond. Range reduction by ln 2 in two parts, then a
   polynomial of degree 6; written without branches so that compilers vectorise the loops around it. */
static inline float exp_(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504088896341f + 12582912.0f; /* 1.5 * 2^23: the integer lands in the low bits */
    float n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

/* Memory that a thread keeps between calls: fresh pages cost more than the work. */
static float *scratch(size_t floats) {
    static _Thread_local float *held = NULL;
    static _Thread_local size_t size = 0;
    if (floats > size) {
        free(held);
        held = aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
        size = floats;
        if (!held) {
            fputs("klimb: the memory ran out in a kernel\n", stderr);
            abort();
        }
    }
    return held;
}

/* a . b for a in float32. */
static inline float dot(const float *a, const num *b, I D) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (I d = 0; d < D; d++) sum += a[d] * get(b[d]);
    return sum;
}

/* Products of small matrices ------------------------------------------------------------------------------------- */

#if W == 16
#define TALL 8 /* rows that are multiplied at once: their sums have to fit into the registers */
#else
#define TALL 4
#endif

/* c[r, 0:COLS] (+)= sum_k a[r*ar + k*ak] * b[k*ldb + 0:COLS] for r < rows <= TALL. */
static inline __attribute__((always_inline)) void
tile(const int rows, I depth, const float *a, I ar, I ak, const float *b, I ldb, float *c, I ldc, int add) {
    vec s[TALL][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) s[r][0] = s[r][1] = all(0.0f);
    for (I k = 0; k < depth; k++, a += ak, b += ldb) {
        vec b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            vec x = all(a[r * ar]);
            s[r][0] += x * b0, s[r][1] += x * b1;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        float *to = c + r * ldc;
        store(to, add ? load(to) + s[r][0] : s[r][0]);
        store(to + W, add ? load(to + W) + s[r][1] : s[r][1]);
    }
}

/* c [rows, cols] (+)= a [rows, depth] b [depth, cols]; cols is a multiple of COLS, rows of a are ar apart. */
static void product(
    I rows, I cols, I depth, const float *a, I ar, I ak, const float *b, I ldb, float *c, I ldc, int add) {
    for (I j = 0; j < cols; j += COLS) {
        I i = 0;
        for (; i + TALL <= rows; i += TALL) tile(TALL, depth, a + i * ar, ar, ak, b + j, ldb, c + i * ldc + j, ldc, add);
#define REST(n) case n: tile(n, depth, a + i * ar, ar, ak, b + j, ldb, c + i * ldc + j, ldc, add); break;
        switch (rows - i) {
            REST(1) REST(2) REST(3)
#if TALL == 8
            REST(4) REST(5) REST(6) REST(7)
#endif
        }
#undef REST
    }
}

/* rows [n, D] -> [n, wide] in float32, zeros behind D. */
static void widen(const num *from, I stride, I n, I D, float *to, I wide) {
    for (I i = 0; i < n; i++) {
        for (I d = 0; d < D; d++) to[i * wide + d] = get(from[i * stride + d]);
        memset(to + i * wide + D, 0, (wide - D) * sizeof(float));
    }
}

/* D numbers of float32 to where they belong. */
static inline void narrow(const float *from, I D, num *to) {
    for (I d = 0; d < D; d++) to[d] = put(from[d]);
}

/* rows [n, D] -> columns [D, wide] in float32, zeros behind n. */
static void turn(const num *from, I stride, I n, I D, float *to, I wide) {
    for (I i0 = 0; i0 < n; i0 += W)
        for (I d = 0; d < D; d++)
            for (I i = i0; i < (i0 + W < n ? i0 + W : n); i++) to[d * wide + i] = get(from[i * stride + d]);
    for (I d = 0; d < D; d++) memset(to + d * wide + n, 0, (wide - n) * sizeof(float));
}
