/* A few rows times a large weight: the products of decoding. Weights come from far away there, and each is used for a few
   rows only, so what counts is that they are read once, in the order in which they lie. */

#include "vector.h"

/* Rows that are multiplied at once: as many as there are registers for their sums. */
#if W == 16
#define ROWS 14
#else
#define ROWS 6
#endif

#if defined(BF16) && defined(__AVX512BF16__)
#include <immintrin.h>
#define PAIR 2 /* one instruction adds two products: terms lie in pairs */
typedef uint32_t term;
static inline term together(num x, num y) { return x | (uint32_t)y << 16; }
static inline vec add_product(vec sum, term a, const num *b) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)_mm512_loadu_si512(b));
}
#else
#define PAIR 1
typedef float term;
static inline term together(num x, num y) { return get(x); }
static inline vec add_product(vec sum, term a, const num *b) { return sum + a * load_num(b); }
#endif

#define LINE (COLS * PAIR)
#define STEPS(depth) (((depth) + PAIR - 1) / PAIR)

/* weight [N, K] (strides wn, wk) -> panels [N / COLS, K / PAIR, COLS, PAIR], both rounded up and filled with zeros. */
void NAME(panels)(const num *weight, I wn, I wk, num *panels, I N, I K, I threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (I n0 = 0; n0 < N; n0 += COLS) {
        num *to = panels + n0 * STEPS(K) * PAIR;
        memset(to, 0, STEPS(K) * LINE * sizeof(num));
        for (I k = 0; k < K; k++)
            for (I n = n0; n < (n0 + COLS < N ? n0 + COLS : N); n++)
                to[k / PAIR * LINE + (n - n0) * PAIR + k % PAIR] = weight[n * wn + k * wk];
    }
}

/* y [rows, cols <= COLS] = terms' [steps, rows] times a panel, plus bias. */
static inline __attribute__((always_inline)) void
tall(const int rows, I steps, const term *a, const num *b, const float *bias, num *y, I ldy, I cols) {
    vec s[ROWS][2];
    float sums[ROWS][COLS];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) s[r][0] = load(bias), s[r][1] = load(bias + W);
    for (I k = 0; k < steps; k++, a += rows, b += LINE) {
        __builtin_prefetch(b + 8 * LINE, 0, 3);
        __builtin_prefetch(b + 8 * LINE + LINE / 2, 0, 3);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
            s[r][0] = add_product(s[r][0], a[r], b), s[r][1] = add_product(s[r][1], a[r], b + LINE / 2);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) store(sums[r], s[r][0]), store(sums[r] + W, s[r][1]);
    for (int r = 0; r < rows; r++)
        for (I j = 0; j < cols; j++) y[r * ldy + j] = put(sums[r][j]);
}

static void some(I rows, I steps, const term *a, const num *b, const float *bias, num *y, I ldy, I cols) {
#define CASE(n) case n: tall(n, steps, a, b, bias, y, ldy, cols); break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if ROWS == 14
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14)
#endif
    }
}

/* y [m, N] = x [m, K] times the panels of a weight [N, K], plus bias [N] where that is not NULL. A number of y is summed in the order of
   K, whatever the other rows and the threads. terms [m, K / PAIR]: to work in. */
void NAME(panels_product)(
    const num *x, const num *panels, const num *bias, num *y, term *terms, I m, I N, I K, I threads) {
    const I steps = STEPS(K), groups = (m + ROWS - 1) / ROWS;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (I g = 0; g < groups; g++) {
            const I first = g * m / groups, rows = (g + 1) * m / groups - first;
            term *to = terms + first * steps;
            for (I k0 = 0; k0 < steps; k0 += 16)
                for (I r = 0; r < rows; r++)
                    for (I k = k0; k < (k0 + 16 < steps ? k0 + 16 : steps); k++) {
                        const num *from = x + (first + r) * K + k * PAIR;
                        to[k * rows + r] = together(from[0], k * PAIR + 1 < K ? from[PAIR - 1] : 0);
                    }
        }
#pragma omp for schedule(static)
        for (I n0 = 0; n0 < N; n0 += COLS) {
            const I cols = N - n0 < COLS ? N - n0 : COLS;
            float start[COLS] = {0};
            for (I j = 0; bias && j < cols; j++) start[j] = get(bias[n0 + j]);
            for (I g = 0; g < groups; g++) {
                const I first = g * m / groups, rows = (g + 1) * m / groups - first;
                some(rows, steps, terms + first * steps, panels + n0 * steps * PAIR, start, y + first * N + n0, N, cols);
            }
        }
    }
}
