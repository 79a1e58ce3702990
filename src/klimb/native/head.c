/* From logits to log-probabilities of chosen tokens and their entropies, and back. A head is in float32 always. */

#include "vector.h"

#ifndef BF16

#define PART 1024 /* terms that are summed in float32 before they are added in double */

/* e^x is not told from 0 below this; what lies there, minus infinity too, takes part with next to nothing. */
static inline float bounded(float x) { return x < -87.0f ? -87.0f : x; }

/* z [m, V], targets [m] -> under softmax(z * inverse): log-probs of the targets, the logs of the sums, and where
   entropies is not NULL those; [m] each. */
void token_logps_forward(
    const float *z, const I *targets, float inverse, float *logps, float *normalisers, float *entropies, I m, I V,
    I threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (I i = 0; i < m; i++) {
        const float *row = z + i * V;
        float top = -INFINITY;
#pragma omp simd reduction(max : top)
        for (I v = 0; v < V; v++) top = row[v] > top ? row[v] : top;
        double sum = 0.0, mean = 0.0;
        for (I v0 = 0; v0 < V; v0 += PART) {
            const I end = v0 + PART < V ? v0 + PART : V;
            float s = 0.0f, t = 0.0f;
            if (entropies)
#pragma omp simd reduction(+ : s, t)
                for (I v = v0; v < end; v++) {
                    const float x = bounded((row[v] - top) * inverse), e = exp_(x);
                    s += e, t += e * x;
                }
            else
#pragma omp simd reduction(+ : s)
                for (I v = v0; v < end; v++) s += exp_((row[v] - top) * inverse);
            sum += s, mean += t;
        }
        const double log_sum = log(sum);
        normalisers[i] = (float)((double)top * inverse + log_sum);
        logps[i] = (float)(((double)row[targets[i]] - top) * inverse - log_sum);
        if (entropies) entropies[i] = (float)(log_sum - mean / sum);
    }
}

/* In the place of the logits their gradient: ((1[target] - p) * grad - p (log p + H) * entropy_grad) * inverse.
   entropy_grads may be NULL. */
void token_logps_backward(
    float *z, const I *targets, float inverse, const float *normalisers, const float *entropies, const float *grads,
    const float *entropy_grads, I m, I V, I threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (I i = 0; i < m; i++) {
        float *row = z + i * V;
        const float n = normalisers[i], h = entropies[i], g = grads[i], e = entropy_grads ? entropy_grads[i] : 0.0f;
        if (e != 0.0f)
#pragma omp simd
            for (I v = 0; v < V; v++) {
                const float x = bounded(row[v] * inverse - n);
                row[v] = -exp_(x) * (g + (x + h) * e) * inverse;
            }
        else
#pragma omp simd
            for (I v = 0; v < V; v++) row[v] = -exp_(row[v] * inverse - n) * g * inverse;
        row[targets[i]] += g * inverse;
    }
}

#endif
