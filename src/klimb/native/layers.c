/* What lies between the matrix products of a decoder layer: norm, rotary positions, gated activation. */

#include "vector.h"

/* y = x / rms(x) * (offset + weight), rows [n, d]; scale [n]: 1 / rms. */
void rms_norm_forward(
    const float *x, const float *weight, float offset, float eps, float *y, float *scale, I n, I d, I threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (I i = 0; i < n; i++) {
        const float *row = x + i * d, r = 1.0f / sqrtf(dot(row, row, d) / d + eps);
        float *to = y + i * d;
        scale[i] = r;
#pragma omp simd
        for (I j = 0; j < d; j++) to[j] = row[j] * r * (offset + weight[j]);
    }
}

/* dx [n, d]; partial [threads, d]: the weight's gradient from each thread's rows. */
void rms_norm_backward(
    const float *x, const float *weight, float offset, const float *scale, const float *grad, float *dx,
    float *partial, I n, I d, I threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (I t = 0; t < threads; t++) {
        float *dw = partial + t * d;
        memset(dw, 0, d * sizeof(float));
        for (I i = t * n / threads; i < (t + 1) * n / threads; i++) {
            const float *row = x + i * d, *g = grad + i * d, r = scale[i];
            float *to = dx + i * d, mean = 0.0f;
#pragma omp simd reduction(+ : mean)
            for (I j = 0; j < d; j++) mean += g[j] * (offset + weight[j]) * row[j];
            mean *= r * r / d;
#pragma omp simd
            for (I j = 0; j < d; j++) {
                to[j] = r * (g[j] * (offset + weight[j]) - mean * row[j]);
                dw[j] += g[j] * row[j] * r;
            }
        }
    }
}

/* x [N, H, D] (strides xh, xn) -> y [N, H, D] dense, each half of a head turned against the other by cos, sin [N, D].
   inverse: the transposed map, which is what a gradient goes through. */
void rope(
    const float *x, I xh, I xn, const float *cosine, const float *sine, float *y, I N, I H, I D, I inverse, I threads) {
    const I half = D / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (I i = 0; i < N; i++)
        for (I h = 0; h < H; h++) {
            const float *a = x + i * xn + h * xh, *b = a + half, *c = cosine + i * D, *s = sine + i * D;
            float *to = y + (i * H + h) * D;
            if (inverse)
#pragma omp simd
                for (I d = 0; d < half; d++) {
                    to[d] = a[d] * c[d] + b[d] * s[d + half];
                    to[d + half] = b[d] * c[d + half] - a[d] * s[d];
                }
            else
#pragma omp simd
                for (I d = 0; d < half; d++) {
                    to[d] = a[d] * c[d] - b[d] * s[d];
                    to[d + half] = b[d] * c[d + half] + a[d] * s[d + half];
                }
        }
}

/* y = gate * sigmoid(gate) * up, [n]. */
void swiglu_forward(const float *gate, const float *up, float *y, I n, I threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (I i = 0; i < n; i++) y[i] = gate[i] / (1.0f + exp_(-gate[i])) * up[i];
}

void swiglu_backward(const float *gate, const float *up, const float *grad, float *dgate, float *dup, I n, I threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (I i = 0; i < n; i++) {
        float sigmoid = 1.0f / (1.0f + exp_(-gate[i]));
        dup[i] = grad[i] * gate[i] * sigmoid;
        dgate[i] = grad[i] * up[i] * sigmoid * (1.0f + gate[i] * (1.0f - sigmoid));
    }
}
