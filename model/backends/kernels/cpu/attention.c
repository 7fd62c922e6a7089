/* Softmax attention of a few rows over the slots of a cache, with sums in float64: see
 * int8.py for why. attention_fp32.c is the same with sums in float32. */
#include "exp.h"

#define ROWS_AT_ONCE 4 /* tree nodes whose attention shares one reading of the keys */
#ifndef ATTEND
#define ATTEND attend_exactly
typedef double Sum;
#define EXP exp_double
#define LOWEST -700.0
#endif

/* acc[0..BLOCK) += sum over i of x[i] * matrix[i][0..BLOCK), in vectors of 64 bytes: the compiler
 * makes of them what the processor has. */
typedef Sum Wide __attribute__((vector_size(64), aligned(sizeof(Sum)), may_alias));
#define BLOCK (4 * 64 / (long)sizeof(Sum))

static inline void add_products(long count, const Sum *x, const Sum *matrix, long stride,
                                Sum *acc) {
    Wide *sums = (Wide *)acc;
    Wide a = sums[0], b = sums[1], c = sums[2], d = sums[3];
    for (long i = 0; i < count; i++) {
        const Wide *row = (const Wide *)(matrix + i * stride);
        a += x[i] * row[0];
        b += x[i] * row[1];
        c += x[i] * row[2];
        d += x[i] * row[3];
    }
    sums[0] = a, sums[1] = b, sums[2] = c, sums[3] = d;
}

static inline Sum kept(const void *slots, int kind, long at) {
    return kind == FLOAT32 ? ((const float *)slots)[at] : widened(((const uint16_t *)slots)[at]);
}

static void softmax(Sum *scores, long visible) { /* visible: whole blocks */
    Sum lanes[LANES], largest = -INFINITY, sum = 0;
    for (long i = 0; i < LANES; i++) lanes[i] = -INFINITY;
    for (long from = 0; from < visible; from += LANES)
        for (long i = 0; i < LANES; i++)
            lanes[i] = scores[from + i] > lanes[i] ? scores[from + i] : lanes[i];
    for (long i = 0; i < LANES; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    for (long s = 0; s < visible; s++) {
        Sum x = scores[s] - largest;
        Sum power = EXP(x < LOWEST ? LOWEST : x);
        scores[s] = x < LOWEST ? 0 : power;
    }
    for (long s = 0; s < visible; s++) sum += scores[s];
    for (long s = 0; s < visible; s++) scores[s] /= sum;
}

/* One kv_head's attention for a few rows of one sequence: `count` queries share its keys. Blocks of keys
 * and values are widened once for all of them. head_dim and visible are padded to whole blocks; scores
 * hold the mask, and -inf in the padding; sums hold zeros. */
static void attend_some(long count, long head_dim, long wide, long visible, long slots,
                        const Sum *queries, const void *keys, const void *values, int kind,
                        Sum *block, Sum *scores, Sum *sums) {
    for (long from = 0; from < slots; from += BLOCK) {
        long size = visible - from < BLOCK ? visible - from : BLOCK;
        memset(block, 0, head_dim * BLOCK * sizeof(Sum));
        for (long s = 0; s < size; s++)
            for (long i = 0; i < head_dim; i++)
                block[i * BLOCK + s] = kept(keys, kind, (from + s) * head_dim + i);
        for (long q = 0; q < count; q++)
            add_products(head_dim, queries + q * head_dim, block, BLOCK, scores + q * slots + from);
    }
    for (long q = 0; q < count; q++) softmax(scores + q * slots, slots);
    memset(block, 0, BLOCK * wide * sizeof(Sum));
    for (long from = 0; from < visible; from += BLOCK) {
        long size = visible - from < BLOCK ? visible - from : BLOCK;
        for (long s = 0; s < size; s++)
            for (long i = 0; i < head_dim; i++)
                block[s * wide + i] = kept(values, kind, (from + s) * head_dim + i);
        for (long q = 0; q < count; q++)
            for (long i = 0; i < wide; i += BLOCK)
                add_products(size, scores + q * slots + from, block + i, wide, sums + q * wide + i);
    }
}

void ATTEND(long batch, long new_rows, long heads, long kv_heads, long head_dim, long visible,
            const float *queries, const void *keys, const void *values, int cache_kind,
            long batch_stride, long head_stride, const float *mask, double scale, float *attended) {
    long shared = heads / kv_heads, parts = (new_rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    long size = cache_kind == BFLOAT16 ? sizeof(uint16_t) : sizeof(float);
    long wide = (head_dim + BLOCK - 1) / BLOCK * BLOCK, slots = (visible + BLOCK - 1) / BLOCK * BLOCK;
#pragma omp parallel for schedule(dynamic) if (batch * new_rows * heads * visible * head_dim > SPLIT_ABOVE)
    for (long task = 0; task < batch * kv_heads * parts; task++) {
        long part = task % parts, kv_head = task / parts % kv_heads, sequence = task / parts / kv_heads;
        long first = part * ROWS_AT_ONCE, nodes = new_rows - first;
        nodes = nodes < ROWS_AT_ONCE ? nodes : ROWS_AT_ONCE;
        long count = nodes * shared, at = sequence * batch_stride + kv_head * head_stride;
        Sum *block = calloc(wide * BLOCK + count * (head_dim + wide + slots), sizeof(Sum));
        Sum *scaled = block + wide * BLOCK, *sums = scaled + count * head_dim;
        Sum *scores = sums + count * wide;
        for (long q = 0; q < count; q++) {
            long row = sequence * new_rows + first + q / shared, head = kv_head * shared + q % shared;
            const float *query = queries + (row * heads + head) * head_dim;
            for (long i = 0; i < head_dim; i++) scaled[q * head_dim + i] = query[i] * scale;
            for (long s = 0; s < visible && mask; s++) scores[q * slots + s] = mask[row * visible + s];
            for (long s = visible; s < slots; s++) scores[q * slots + s] = -INFINITY;
        }
        attend_some(count, head_dim, wide, visible, slots, scaled, (const char *)keys + at * size,
                    (const char *)values + at * size, cache_kind, block, scores, sums);
        for (long q = 0; q < count; q++) {
            long row = sequence * new_rows + first + q / shared, head = kv_head * shared + q % shared;
            float *out = attended + (row * heads + head) * head_dim;
            for (long i = 0; i < head_dim; i++) out[i] = (float)sums[q * wide + i];
        }
        free(block);
    }
}
