/* What lies between the matrix products of a decoder layer: norm, rotary positions, gated activation. */

#include "vector.h"

/* y = x / rms(x) * (offset + weight), rows [n, d]; scale [n]: 1 / rms. */
void NAME(rms_norm_forward)(
    const num *x, const num *weight, float offset, float eps, num *y, float *scale, I n, I d, I threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (I i = 0; i < n; i++) {
        const num *row = x + i * d;
        num *to = y + i * d;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (I j = 0; j < d; j++) sum += get(row[j]) * get(row[j]);
        const float r = scale[i] = 1.0f / sqrtf(sum / d + eps);
#pragma omp simd
        for (I j = 0; j < d; j++) to[j] = put(get(row[j]) * r * (offset + get(weight[j])));
    }
}

/* dx [n, d]; partial [threads, d]: the weight's gradient from each thread's rows. */
void NAME(rms_norm_backward)(
    const num *x, const num *weight, float offset, const float *scale, const num *grad, num *dx, float *partial, I n,
    I d, I threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (I t = 0; t < threads; t++) {
        float *dw = partial + t * d;
        memset(dw, 0, d * sizeof(float));
        for (I i = t * n / threads; i < (t + 1) * n / threads; i++) {
            const num *row = x + i * d, *g = grad + i * d;
            const float r = scale[i];
            num *to = dx + i * d;
            float mean = 0.0f;
#pragma omp simd reduction(+ : mean)
            for (I j = 0; j < d; j++) mean += get(g[j]) * (offset + get(weight[j])) * get(row[j]);
            mean *= r * r / d;
#pragma omp simd
            for (I j = 0; j < d; j++) {
                to[j] = put(r * (get(g[j]) * (offset + get(weight[j])) - mean * get(row[j])));
                dw[j] += get(g[j]) * get(row[j]) * r;
            }
        }
    }
}

/* x [N, H, D] (strides xh, xn) -> y [N, H, D] dense, each half of a head turned against the other by cos, sin [N, D].
   inverse: the transposed map, which is what a gradient goes through. */
void NAME(rope)(
    const num *x, I xh, I xn, const num *cosine, const num *sine, num *y, I N, I H, I D, I inverse, I threads) {
    const I half = D / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (I i = 0; i < N; i++)
        for (I h = 0; h < H; h++) {
            const num *a = x + i * xn + h * xh, *b = a + half, *c = cosine + i * D, *s = sine + i * D;
            num *to = y + (i * H + h) * D;
            if (inverse)
#pragma omp simd
                for (I d = 0; d < half; d++) {
                    to[d] = put(get(a[d]) * get(c[d]) + get(b[d]) * get(s[d + half]));
                    to[d + half] = put(get(b[d]) * get(c[d + half]) - get(a[d]) * get(s[d]));
                }
            else
#pragma omp simd
                for (I d = 0; d < half; d++) {
                    to[d] = put(get(a[d]) * get(c[d]) - get(b[d]) * get(s[d]));
                    to[d + half] = put(get(b[d]) * get(c[d + half]) + get(a[d]) * get(s[d + half]));
                }
        }
}

/* y = gate * sigmoid(gate) * up, [n]. */
void NAME(swiglu_forward)(const num *gate, const num *up, num *y, I n, I threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (I i = 0; i < n; i++) y[i] = put(get(gate[i]) / (1.0f + exp_(-get(gate[i]))) * get(up[i]));
}

/* again: in the place of y's gradient y itself. */
void NAME(swiglu_backward)(const num *gate, const num *up, num *grad, num *dgate, num *dup, I n, I again, I threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (I i = 0; i < n; i++) {
        float x = get(gate[i]), g = get(grad[i]), below = 1.0f + exp_(-x), sigmoid = 1.0f / below;
        dup[i] = put(g * x * sigmoid);
        dgate[i] = put(g * get(up[i]) * sigmoid * (1.0f + x * (1.0f - sigmoid)));
        if (again) grad[i] = put(x / below * get(up[i]));
    }
}
