/* What lies between the matrix products of a decoder layer. functions.py says what each function
 * computes. */
#include "exp.h"

static inline float silu(float x) {
    float y = x < -87.0f ? 87.0f : x > 87.0f ? -87.0f : -x;
    return x / (1.0f + exp_float(y));
}

/* A maximum in lanes: compilers must not reorder it, NaN being neither larger nor smaller. NaN where
 * any number is NaN or infinite. */
static inline float largest_size(const float *values, long width) {
    float lanes[LANES] = {0}, largest = SMALLEST;
    int odd = 0;
    for (long i = 0; i < width; i++) odd |= !(fabsf(values[i]) <= FLT_MAX);
    long whole = width / LANES * LANES;
    for (long from = 0; from < whole; from += LANES)
        for (long i = 0; i < LANES; i++) {
            float size = fabsf(values[from + i]);
            lanes[i] = size > lanes[i] ? size : lanes[i];
        }
    for (long i = whole; i < width; i++) lanes[0] = fabsf(values[i]) > lanes[0] ? fabsf(values[i]) : lanes[0];
    for (long i = 0; i < LANES; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    return odd ? NAN : largest;
}

/* Columns [from, from + width) of a row that is `stride` wide. */
static void take(const void *product, int kind, long row, long stride, long from, long width,
                 float *out) {
    long at = row * stride + from;
    if (kind == BFLOAT16)
        for (long i = 0; i < width; i++) out[i] = widened(((const uint16_t *)product)[at + i]);
    else
        memcpy(out, (const float *)product + at, width * sizeof(float));
}

static void give(const float *values, int kind, long row, long width, void *out, float *scales) {
    if (kind == BFLOAT16) {
        uint16_t *half = (uint16_t *)out + row * width;
        for (long i = 0; i < width; i++) half[i] = rounded(values[i]);
    } else if (kind == FLOAT32) {
        memcpy((float *)out + row * width, values, width * sizeof(float));
    } else {
        long padded = (width + GROUP - 1) / GROUP * GROUP;
        uint8_t *coarse = (uint8_t *)out + 2 * row * padded, *fine = coarse + padded;
        float scale = largest_size(values, width) / COARSE;
        for (long i = 0; i < width; i++) {
            float steps = scale == scale ? values[i] / scale : 0, whole = rintf(steps);
            coarse[i] = (uint8_t)((int)whole + ZERO);
            fine[i] = (uint8_t)((int)rintf((steps - whole) * FINE) + ZERO);
        }
        for (long i = width; i < padded; i++) coarse[i] = fine[i] = ZERO;
        scales[row] = scale;
    }
}

static void normed(float *row, long width, const float *weight, double eps) {
    double squares = 0;
    for (long i = 0; i < width; i++) squares += (double)row[i] * row[i];
    float factor = (float)(1.0 / sqrt(squares / width + eps));
    for (long i = 0; i < width; i++) row[i] = row[i] * factor * weight[i];
}

void residual_norm(long rows, long width, float *hidden, const void *product, int product_kind,
                   const float *weight, double eps, void *out, int kind, float *scales) {
#pragma omp parallel for if (rows * width > SPLIT_ABOVE)
    for (long row = 0; row < rows; row++) {
        float *values = malloc(width * sizeof(float)), *mine = hidden + row * width;
        if (product) {
            take(product, product_kind, row, width, 0, width, values);
            for (long i = 0; i < width; i++) mine[i] += values[i];
        }
        memcpy(values, mine, width * sizeof(float));
        normed(values, width, weight, eps);
        give(values, kind, row, width, out, scales);
        free(values);
    }
}

void rotate_store(long rows, long new_rows, long heads, long kv_heads, long head_dim,
                  const void *product, int product_kind, const float *query_norm,
                  const float *key_norm, double eps,
                  const float *cosines, const float *sines, const int64_t *slots, void *keys,
                  void *values, int kind, long batch_stride, long head_stride, float *queries) {
    long all = heads + 2 * kv_heads, half = head_dim / 2;
#pragma omp parallel for if (rows * all * head_dim > SPLIT_ABOVE)
    for (long row = 0; row < rows; row++) {
        float *from = malloc(2 * head_dim * sizeof(float)), *turned = from + head_dim;
        const float *cosine = cosines + row * head_dim, *sine = sines + row * head_dim;
        for (long head = 0; head < all; head++) {
            take(product, product_kind, row, all * head_dim, head * head_dim, head_dim, from);
            const float *result = from;
            if (head < heads + kv_heads) {
                const float *norm = head < heads ? query_norm : key_norm;
                if (norm) normed(from, head_dim, norm, eps);
                for (long i = 0; i < half; i++) {
                    turned[i] = from[i] * cosine[i] - from[i + half] * sine[i];
                    turned[i + half] = from[i + half] * cosine[i + half] + from[i] * sine[i + half];
                }
                result = turned;
            }
            if (head < heads) {
                memcpy(queries + (row * heads + head) * head_dim, result, head_dim * sizeof(float));
                continue;
            }
            long kv_head = (head - heads) % kv_heads;
            long place = row / new_rows * batch_stride + kv_head * head_stride + slots[row] * head_dim;
            char *kept = head < heads + kv_heads ? keys : values;
            kept += place * (kind == BFLOAT16 ? sizeof(uint16_t) : sizeof(float));
            give(result, kind, 0, head_dim, kept, NULL);
        }
        free(from);
    }
}

void convert(long rows, long width, const float *values, void *out, int kind, float *scales) {
#pragma omp parallel for if (rows * width > SPLIT_ABOVE)
    for (long row = 0; row < rows; row++)
        give(values + row * width, kind, row, width, out, scales);
}

void gate(long rows, long width, const void *product, int product_kind, void *out, int kind,
          float *scales) {
#pragma omp parallel for if (rows * width > SPLIT_ABOVE)
    for (long row = 0; row < rows; row++) {
        float *values = malloc(2 * width * sizeof(float));
        take(product, product_kind, row, 2 * width, 0, 2 * width, values);
        for (long i = 0; i < width; i++) values[i] = silu(values[i]) * values[width + i];
        give(values, kind, row, width, out, scales);
        free(values);
    }
}

#define SEARCHED 256 /* numbers whose largest is found at once */

void argmax(long rows, long width, const float *scores, int64_t *places) {
#pragma omp parallel for if (rows * width > 4 * SPLIT_ABOVE)
    for (long row = 0; row < rows; row++) {
        const float *mine = scores + row * width;
        float best = -INFINITY;
        long place = 0;
        for (long from = 0; from < width; from += SEARCHED) {
            long until = from + SEARCHED < width ? from + SEARCHED : width;
            float lanes[LANES], largest = -INFINITY;
            for (long i = 0; i < LANES; i++) lanes[i] = -INFINITY;
            long at = from;
            for (; at + LANES <= until; at += LANES)
                for (long i = 0; i < LANES; i++)
                    lanes[i] = mine[at + i] > lanes[i] ? mine[at + i] : lanes[i];
            for (; at < until; at++) lanes[0] = mine[at] > lanes[0] ? mine[at] : lanes[0];
            for (long i = 0; i < LANES; i++) largest = lanes[i] > largest ? lanes[i] : largest;
            if (largest > best) {
                best = largest;
                for (place = from; mine[place] != best; place++) continue;
            }
        }
        places[row] = place;
    }
}
