/* Attention for training (ragged sequences that share a beginning) and for decoding (one query to each sample). */

#include "vector.h"

/* Attention over trees of sequences ------------------------------------------------------------------------------ */

/* spans [S, 4]: first query, queries, first token of the context, tokens of the context. trees [T + 1]: first span of
   each; the tokens of a tree are a dense range, and a context lies in the tree. */
typedef struct {
    I first, queries, context, own; /* place of the block's first query in its span; places of keys in the tree */
    I before, behind;               /* columns of the scores: context, own tokens (both rounded up) */
    I length;                       /* tokens of the context */
    I skip, skip_own;               /* what a window hides from all queries of the block */
} Piece;

static Piece piece_of(const I *span, I base, I first, I window) {
    Piece p;
    I queries = span[1] - first < BLOCK ? span[1] - first : BLOCK, start = span[3] + first - window + 1;
    p.first = first, p.queries = queries, p.length = span[3];
    p.skip = window && start > 0 ? (start < span[3] ? start : span[3]) : 0;
    p.skip_own = window && start > span[3] ? start - span[3] : 0;
    p.context = span[2] - base + p.skip, p.own = span[0] - base + p.skip_own;
    p.before = UP(span[3] - p.skip), p.behind = UP(first + queries - p.skip_own);
    return p;
}

/* Scores of a block against the tree's keys (given as columns): s [queries, before + behind]. */
static void scores(Piece p, const float *q, I ldq, I D, const float *columns, I wide, float *s, I lds) {
    product(p.queries, p.before, D, q, ldq, 1, columns + p.context, wide, s, lds, 0);
    product(p.queries, p.behind, D, q, ldq, 1, columns + p.own, wide, s + p.before, lds, 0);
}

/* Which columns query i of the block may see: [from, to) of the context and of its own sequence. */
typedef struct { I from, to, own_from, own_to; } Seen;

static Seen seen_by(Piece p, I i, I window) {
    I place = p.length + p.first + i, oldest = window ? place - window + 1 : 0;
    I from = oldest > p.skip ? oldest - p.skip : 0, room = p.length - p.skip;
    I own = oldest - p.length - p.skip_own;
    Seen seen = {from < room ? from : room, room, p.before + (own > 0 ? own : 0),
                 p.before + p.first + i + 1 - p.skip_own};
    return seen;
}

static void blank(float *s, Seen seen, I before, I total) {
    memset(s, 0, seen.from * sizeof(float));
    memset(s + seen.to, 0, (before - seen.to) * sizeof(float));
    memset(s + before, 0, (seen.own_from - before) * sizeof(float));
    memset(s + seen.own_to, 0, (total - seen.own_to) * sizeof(float));
}

static inline float largest(const float *s, I from, I to, float top) {
#pragma omp simd reduction(max : top)
    for (I j = from; j < to; j++) top = s[j] > top ? s[j] : top;
    return top;
}

/* s <- e^(scale s - shift) on [from, to), and the sum. */
static inline float exponentials(float *s, I from, I to, float scale, float shift) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (I j = from; j < to; j++) {
        s[j] = exp_(s[j] * scale - shift);
        sum += s[j];
    }
    return sum;
}

/* c [queries, wide] (+)= weights times the rows of context and own tokens. */
static void weighted(Piece p, const float *s, I lds, const float *rows, I wide, float *c) {
    product(p.queries, wide, p.length - p.skip, s, lds, 1, rows + p.context * wide, wide, c, wide, 0);
    product(p.queries, wide, p.first + p.queries - p.skip_own, s + p.before, lds, 1, rows + p.own * wide, wide, c, wide, 1);
}

/* rows of context and own tokens += weights' transpose times b [queries, wide]. */
static void spread(Piece p, const float *s, I lds, const float *b, I wide, float *rows) {
    product(p.length - p.skip, wide, p.queries, s, 1, lds, b, wide, rows + p.context * wide, wide, 1);
    product(p.first + p.queries - p.skip_own, wide, p.queries, s + p.before, 1, lds, b, wide, rows + p.own * wide, wide, 1);
}

static I tree_size(const I *spans, const I *trees, I tree, I *longest) {
    I end = 0;
    *longest = 0;
    for (I i = trees[tree]; i < trees[tree + 1]; i++) {
        const I *span = spans + 4 * i;
        I width = UP(span[3]) + UP(span[1]);
        if (span[0] + span[1] > end) end = span[0] + span[1];
        if (width > *longest) *longest = width;
    }
    return end - spans[4 * trees[tree]];
}

/* out [N, H, D] = softmax(scale q k') v; lse [H, N]: log of the sum of exponentials of each query. */
void NAME(attention_forward)(
    const num *q, const num *k, const num *v, num *out, float *lse, const I *spans, const I *trees, I T, I N,
    const Shape *shape, I threads) {
    const Shape z = *shape;
    const I wide = UP(z.D);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (I tree = 0; tree < T; tree++)
        for (I head = 0; head < z.heads; head++) {
            I longest, n = tree_size(spans, trees, tree, &longest), base = spans[4 * trees[tree]], pad = n + 2 * COLS;
            float *columns = scratch(z.D * pad + n * wide + BLOCK * longest + 2 * BLOCK * wide);
            float *values = columns + z.D * pad, *s = values + n * wide, *o = s + BLOCK * longest;
            float *asked = o + BLOCK * wide;
            turn(k + head * z.kh + base * z.kn, z.kn, n, z.D, columns, pad);
            widen(v + head * z.vh + base * z.vn, z.vn, n, z.D, values, wide);
            for (I i = trees[tree]; i < trees[tree + 1]; i++)
                for (I h = head * z.groups; h < (head + 1) * z.groups; h++)
                    for (I first = 0; first < spans[4 * i + 1]; first += BLOCK) {
                        Piece p = piece_of(spans + 4 * i, base, first, z.window);
                        I token = spans[4 * i] + first, total = p.before + p.behind;
                        widen(q + h * z.qh + token * z.qn, z.qn, p.queries, z.D, asked, wide);
                        scores(p, asked, wide, z.D, columns, pad, s, total);
                        float inverse[BLOCK];
                        for (I r = 0; r < p.queries; r++) {
                            float *row = s + r * total;
                            Seen seen = seen_by(p, r, z.window);
                            float top = largest(row, seen.own_from, seen.own_to, largest(row, seen.from, seen.to, -INFINITY));
                            float shift = top * z.scale;
                            float sum = exponentials(row, seen.from, seen.to, z.scale, shift);
                            sum += exponentials(row, seen.own_from, seen.own_to, z.scale, shift);
                            blank(row, seen, p.before, total);
                            inverse[r] = 1.0f / sum;
                            lse[h * N + token + r] = shift + logf(sum);
                        }
                        weighted(p, s, total, values, wide, o);
                        for (I r = 0; r < p.queries; r++)
                            for (I d = 0; d < z.D; d++)
                                out[((token + r) * z.heads * z.groups + h) * z.D + d] = put(o[r * wide + d] * inverse[r]);
                    }
        }
}

/* Gradients by q [N, H, D], k and v [N, H_kv, D] of a loss whose gradient by `out` [N, H, D] is given. */
void NAME(attention_backward)(
    const num *q, const num *k, const num *v, const float *lse, const num *grad, num *dq, num *dk, num *dv,
    const I *spans, const I *trees, I T, I N, const Shape *shape, I threads) {
    const Shape z = *shape;
    const I wide = UP(z.D), H = z.heads * z.groups;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (I tree = 0; tree < T; tree++)
        for (I head = 0; head < z.heads; head++) {
            I longest, n = tree_size(spans, trees, tree, &longest), base = spans[4 * trees[tree]], pad = n + 2 * COLS;
            float *keys_by_column = scratch(2 * z.D * pad + 3 * n * wide + 2 * BLOCK * longest + 3 * BLOCK * wide);
            float *values_by_column = keys_by_column + z.D * pad, *keys = values_by_column + z.D * pad;
            float *sum_k = keys + n * wide, *sum_v = sum_k + n * wide, *s = sum_v + n * wide;
            float *ds = s + BLOCK * longest, *asked = ds + BLOCK * longest, *given = asked + BLOCK * wide;
            float *answer = given + BLOCK * wide;
            turn(k + head * z.kh + base * z.kn, z.kn, n, z.D, keys_by_column, pad);
            turn(v + head * z.vh + base * z.vn, z.vn, n, z.D, values_by_column, pad);
            widen(k + head * z.kh + base * z.kn, z.kn, n, z.D, keys, wide);
            memset(sum_k, 0, 2 * n * wide * sizeof(float));
            for (I i = trees[tree]; i < trees[tree + 1]; i++)
                for (I h = head * z.groups; h < (head + 1) * z.groups; h++)
                    for (I first = 0; first < spans[4 * i + 1]; first += BLOCK) {
                        Piece p = piece_of(spans + 4 * i, base, first, z.window);
                        I token = spans[4 * i] + first, total = p.before + p.behind;
                        widen(q + h * z.qh + token * z.qn, z.qn, p.queries, z.D, asked, wide);
                        widen(grad + (token * H + h) * z.D, H * z.D, p.queries, z.D, given, wide);
                        scores(p, asked, wide, z.D, keys_by_column, pad, s, total);
                        scores(p, given, wide, z.D, values_by_column, pad, ds, total);
                        for (I r = 0; r < p.queries; r++) {
                            float *row = s + r * total, *drow = ds + r * total, mean = 0.0f;
                            Seen seen = seen_by(p, r, z.window);
                            exponentials(row, seen.from, seen.to, z.scale, lse[h * N + token + r]);
                            exponentials(row, seen.own_from, seen.own_to, z.scale, lse[h * N + token + r]);
                            blank(row, seen, p.before, total);
#pragma omp simd reduction(+ : mean)
                            for (I j = 0; j < total; j++) mean += row[j] * drow[j];
#pragma omp simd
                            for (I j = 0; j < total; j++) drow[j] = row[j] * (drow[j] - mean) * z.scale;
                        }
                        weighted(p, ds, total, keys, wide, answer);
                        for (I r = 0; r < p.queries; r++)
                            narrow(answer + r * wide, z.D, dq + ((token + r) * H + h) * z.D);
                        spread(p, ds, total, asked, wide, sum_k);
                        spread(p, s, total, given, wide, sum_v);
                    }
            for (I t = 0; t < n; t++) {
                narrow(sum_k + t * wide, z.D, dk + ((base + t) * z.heads + head) * z.D);
                narrow(sum_v + t * wide, z.D, dv + ((base + t) * z.heads + head) * z.D);
            }
        }
}

/* One further token for each of n running samples ---------------------------------------------------------------- */

/* Four sums at once: lane j of the result is the sum over the lanes of x, y, z, w. */
typedef float four __attribute__((vector_size(16)));

#define BOTH(o) o, W + o, o + 1, W + o + 1
#define LOW(o) BOTH(o)
#define HIGH(o) BOTH(o + 2)
#define FRONT(o) o, o + 1, W + o, W + o + 1
#define BACK(o) o + 2, o + 3, W + o + 2, W + o + 3
#if W == 16
#define EVERY(of) of(0), of(4), of(8), of(12)
#elif W == 8
#define EVERY(of) of(0), of(4)
#else
#define EVERY(of) of(0)
#endif

static inline four sums(vec x, vec y, vec z, vec w) {
    vec xy = __builtin_shufflevector(x, y, EVERY(LOW)) + __builtin_shufflevector(x, y, EVERY(HIGH));
    vec zw = __builtin_shufflevector(z, w, EVERY(LOW)) + __builtin_shufflevector(z, w, EVERY(HIGH));
    vec all_four = __builtin_shufflevector(xy, zw, EVERY(FRONT)) + __builtin_shufflevector(xy, zw, EVERY(BACK));
    four parts[W / 4], sum;
    memcpy(parts, &all_four, sizeof all_four);
    sum = parts[0];
    for (int i = 1; i < W / 4; i++) sum += parts[i];
    return sum;
}

/* s[j] = q . rows[j] on [from, to): four rows at a time share the sums across a vector. Meanwhile as much is fetched
   of what is wanted next: a decode step reads each sample's store once, and the memory is what it waits for. */
static inline void dots(
    const float *q, const num *rows, I from, I to, I D, float *s, const num *soon, const num *later) {
    const I whole = D / W * W;
    I j = from;
    for (; j + 4 <= to; j += 4) {
        const num *a = rows + j * D, *b = a + D, *c = b + D, *d = c + D;
        for (I i = 0; i < 4 * D; i += 64 / sizeof(num)) {
            __builtin_prefetch(soon + j * D + i, 0, 2);
            __builtin_prefetch(later + j * D + i, 0, 2);
        }
        vec x = all(0.0f), y = x, z = x, w = x;
        for (I i = 0; i < whole; i += W) {
            vec asked = load(q + i);
            x += asked * load_num(a + i), y += asked * load_num(b + i);
            z += asked * load_num(c + i), w += asked * load_num(d + i);
        }
        four found = sums(x, y, z, w);
        for (I i = whole; i < D; i++) found += q[i] * (four){get(a[i]), get(b[i]), get(c[i]), get(d[i])};
        memcpy(s + j, &found, sizeof found);
    }
    for (; j < to; j++) s[j] = dot(q, rows + j * D, D);
}

/* o [D] += sum over [from, to) of s[j] * rows[j]. */
static inline void gather(const float *s, I from, I to, const num *rows, I D, float *o) {
    const I whole = D / W * W;
    for (I i = 0; i < whole; i += W) {
        vec x = load(o + i), y = all(0.0f), z = y, w = y;
        I j = from;
        for (; j + 4 <= to; j += 4) {
            const num *row = rows + j * D + i;
            x += s[j] * load_num(row), y += s[j + 1] * load_num(row + D);
            z += s[j + 2] * load_num(row + 2 * D), w += s[j + 3] * load_num(row + 3 * D);
        }
        for (; j < to; j++) x += s[j] * load_num(rows + j * D + i);
        store(o + i, (x + y) + (z + w));
    }
    for (I i = whole; i < D; i++)
        for (I j = from; j < to; j++) o[i] += s[j] * get(rows[j * D + i]);
}

/* Stores the new key and value of every slot and attends to its prompt and its own tokens. Stores by place and key head:
   prompt_keys [places * heads, D, longest_prompt] by column, so that all samples of a prompt are asked at once, the
   others by row, prompt_values [places * heads, longest_prompt, D], keys and values [slots * heads, length, D]. The
   slots of block b, which share a prompt, are slots[blocks[b] .. blocks[b + 1]); prompt_of, prompt_length, drawn [n]
   are by slot. out [n, H, D]. */
void NAME(attention_decode)(
    const num *q, const num *k, const num *v, const num *prompt_keys, const num *prompt_values, num *keys, num *values,
    const I *blocks, const I *slots, const I *prompt_of, const I *prompt_length, const I *drawn, I longest_prompt,
    I length, num *out, I B, const Shape *shape, I threads) {
    const Shape z = *shape;
    const I D = z.D, wide = UP(D);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (I b = 0; b < B; b++)
        for (I head = 0; head < z.heads; head++) {
            const I *members = slots + blocks[b], rows = (blocks[b + 1] - blocks[b]) * z.groups;
            const I prompt = prompt_length[members[0]], line = prompt_of[members[0]] * z.heads + head;
            const I before = UP(prompt), lds = before + UP(length);
            const num *pk = prompt_keys + line * D * longest_prompt, *pv = prompt_values + line * longest_prompt * D;
            float *s = scratch(rows * (lds + 2 * wide) + prompt * wide + (PLAIN ? 0 : D * before));
            float *asked = s + rows * lds, *answer = asked + rows * wide, *widened = answer + rows * wide;
            float *columns = widened + prompt * wide;
            if (!PLAIN) widen(pk, longest_prompt, D, before, columns, before);
            for (I r = 0; r < rows; r++)
                widen(q + (head * z.groups + r % z.groups) * z.qh + members[r / z.groups] * z.qn, D, 1, D,
                      asked + r * wide, wide);
            product(rows, before, D, asked, wide, 1, PLAIN ? (const float *)pk : columns, PLAIN ? longest_prompt : before,
                    s, lds, 0);
            for (I r = 0; r < rows; r++) {
                const I slot = members[r / z.groups], own = drawn[slot], place = prompt + own - 1;
                const I oldest = z.window && place - z.window + 1 > 0 ? place - z.window + 1 : 0;
                const I from = oldest < prompt ? oldest : prompt, own_from = oldest > prompt ? oldest - prompt : 0;
                const I next = members[r + z.groups < rows ? r / z.groups + 1 : r / z.groups], store = length * D;
                num *own_keys = keys + (slot * z.heads + head) * store;
                num *own_values = values + (slot * z.heads + head) * store;
                float *own_s = s + r * lds + before;
                if (r % z.groups == 0) {
                    memcpy(own_keys + (own - 1) * D, k + head * z.kh + slot * z.kn, D * sizeof(num));
                    memcpy(own_values + (own - 1) * D, v + head * z.vh + slot * z.vn, D * sizeof(num));
                }
                dots(asked + r * wide, own_keys, own_from, own, D, own_s, keys + (next * z.heads + head) * store,
                     own_values);
                float top = largest(own_s, own_from, own, largest(s + r * lds, from, prompt, -INFINITY));
                float sum = exponentials(s + r * lds, from, prompt, z.scale, z.scale * top);
                sum += exponentials(own_s, own_from, own, z.scale, z.scale * top);
                memset(s + r * lds, 0, from * sizeof(float));
                asked[r * wide] = 1.0f / sum; /* its query is not needed again */
            }
            const int as_it_is = PLAIN && D == wide;
            if (!as_it_is) widen(pv, D, prompt, D, widened, wide);
            product(rows, wide, prompt, s, lds, 1, as_it_is ? (const float *)pv : widened, wide, answer, wide, 0);
            for (I r = 0; r < rows; r++) {
                const I slot = members[r / z.groups], own = drawn[slot], oldest = prompt + own - z.window;
                const I own_from = z.window && oldest > prompt ? oldest - prompt : 0;
                float *o = answer + r * wide;
                gather(s + r * lds + before, own_from, own, values + (slot * z.heads + head) * length * D, D, o);
                num *to = out + ((slot * z.heads + head) * z.groups + r % z.groups) * D;
                for (I d = 0; d < D; d++) to[d] = put(o[d] * asked[r * wide]);
            }
        }
}
