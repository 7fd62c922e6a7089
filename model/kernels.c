/* What lies between the matrix products of a decoder layer, for reads of a few rows on a CPU.
 *
 * Built by kernels.py, which says what each function computes. A
 * row's numbers depend on that row alone: the same code goes over each, whatever is read beside it.
 *
 * Numbers between the products come in one of three kinds (`kind`):
 *   FLOAT32   as they are
 *   BFLOAT16  rounded to 16 bits
 *   DIGITS    8-bit integers of quantized.py: first all rows' coarse digits, then their fine ones,
 *             each as a float, and one scale per row. What comes out of a product has that form too.
 * Everything else is float32; with EXACT, attention is float64.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef EXACT
typedef double Sum;
#define EXP exp_double
#define LOWEST -700.0
#else
typedef float Sum;
#define EXP exp_float
#define LOWEST -87.0f
#endif

enum { FLOAT32, BFLOAT16, DIGITS };

#define COARSE 63.0f
#define FINE 64.0f
#define SMALLEST 1e-30f
#define LANES 16
#define ROWS_AT_ONCE 4       /* tree nodes whose attention shares one reading of the keys */
#define SPLIT_ABOVE (1 << 15) /* numbers; less is done before a second thread has begun */

static inline float widened(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint16_t rounded(float value) { /* to the nearest, ties to even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t up = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)(value != value ? 0x7fc0u : up);
}

/* exp(x) for -87 <= x <= 87 by x = k ln 2 + r and the Taylor series of exp(r), whose terms shown are
 * exact to the last bit for |r| <= ln 2 / 2. Written out so that compilers do several at once. */
static inline float exp_float(float x) {
    float k = rintf(x * 1.442695041f);
    float r = fmaf(-k, 0.693145752f, x);
    r = fmaf(-k, 1.42860677e-6f, r);
    float p = 1.0f / 5040;
    p = fmaf(p, r, 1.0f / 720);
    p = fmaf(p, r, 1.0f / 120);
    p = fmaf(p, r, 1.0f / 24);
    p = fmaf(p, r, 1.0f / 6);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    int32_t bits = ((int32_t)k + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

/* The same for -700 <= x <= 0. */
static inline double exp_double(double x) {
    double k = rint(x * 1.4426950408889634);
    double r = fma(-k, 6.93147180369123816490e-01, x);
    r = fma(-k, 1.90821492927058770002e-10, r);
    double p = 1.0 / 479001600;
    p = fma(p, r, 1.0 / 39916800);
    p = fma(p, r, 1.0 / 3628800);
    p = fma(p, r, 1.0 / 362880);
    p = fma(p, r, 1.0 / 40320);
    p = fma(p, r, 1.0 / 5040);
    p = fma(p, r, 1.0 / 720);
    p = fma(p, r, 1.0 / 120);
    p = fma(p, r, 1.0 / 24);
    p = fma(p, r, 1.0 / 6);
    p = fma(p, r, 0.5);
    p = fma(p, r, 1.0);
    p = fma(p, r, 1.0);
    int64_t bits = ((int64_t)(int32_t)k + 1023) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

static inline float silu(float x) {
    float y = x < -87.0f ? 87.0f : x > 87.0f ? -87.0f : -x;
    return x / (1.0f + exp_float(y));
}

/* A maximum in lanes: compilers must not reorder it, NaN being neither larger nor smaller. */
static inline float largest_size(const float *values, long width) {
    float lanes[LANES] = {0}, largest = SMALLEST;
    long whole = width / LANES * LANES;
    for (long from = 0; from < whole; from += LANES)
        for (long i = 0; i < LANES; i++) {
            float size = fabsf(values[from + i]);
            lanes[i] = size > lanes[i] ? size : lanes[i];
        }
    for (long i = whole; i < width; i++) lanes[0] = fabsf(values[i]) > lanes[0] ? fabsf(values[i]) : lanes[0];
    for (long i = 0; i < LANES; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    return largest;
}

/* Columns [from, from + width) of a row of a product that is `stride` wide. */
static void take(const void *product, const float *scales, int kind, long row, long rows, long stride,
                 long from, long width, const float *bias, float *out) {
    long at = row * stride + from;
    if (kind == BFLOAT16) {
        const uint16_t *half = (const uint16_t *)product + at;
        for (long i = 0; i < width; i++) out[i] = widened(half[i]);
    } else if (kind == FLOAT32) {
        memcpy(out, (const float *)product + at, width * sizeof(float));
    } else {
        const float *coarse = (const float *)product + at, *fine = coarse + rows * stride;
        float scale = scales[row];
        for (long i = 0; i < width; i++) out[i] = (coarse[i] + fine[i] * (1.0f / FINE)) * scale;
        if (bias)
            for (long i = 0; i < width; i++) out[i] += bias[from + i];
    }
}

static void give(const float *values, int kind, long row, long rows, long width, void *out,
                 float *scales) {
    if (kind == BFLOAT16) {
        uint16_t *half = (uint16_t *)out + row * width;
        for (long i = 0; i < width; i++) half[i] = rounded(values[i]);
    } else if (kind == FLOAT32) {
        memcpy((float *)out + row * width, values, width * sizeof(float));
    } else {
        float *coarse = (float *)out + row * width, *fine = coarse + rows * width;
        float scale = largest_size(values, width) / COARSE;
        for (long i = 0; i < width; i++) {
            float steps = values[i] / scale;
            coarse[i] = rintf(steps);
            fine[i] = rintf((steps - coarse[i]) * FINE);
        }
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
                   const float *product_scales, const float *bias, const float *weight, double eps,
                   void *out, int kind, float *scales) {
#pragma omp parallel for if (rows * width > SPLIT_ABOVE)
    for (long row = 0; row < rows; row++) {
        float *values = malloc(width * sizeof(float)), *mine = hidden + row * width;
        if (product) {
            take(product, product_scales, product_kind, row, rows, width, 0, width, bias, values);
            for (long i = 0; i < width; i++) mine[i] += values[i];
        }
        memcpy(values, mine, width * sizeof(float));
        normed(values, width, weight, eps);
        give(values, kind, row, rows, width, out, scales);
        free(values);
    }
}

void rotate_store(long rows, long new_rows, long heads, long groups, long channels,
                  const void *product, int product_kind, const float *product_scales,
                  const float *bias, const float *query_norm, const float *key_norm, double eps,
                  const float *cosines, const float *sines, const int64_t *columns, void *keys,
                  void *values, int kind, long batch_stride, long group_stride, float *queries) {
    long all = heads + 2 * groups, half = channels / 2;
#pragma omp parallel for if (rows * all * channels > SPLIT_ABOVE)
    for (long row = 0; row < rows; row++) {
        float *from = malloc(2 * channels * sizeof(float)), *turned = from + channels;
        const float *cosine = cosines + row * channels, *sine = sines + row * channels;
        for (long head = 0; head < all; head++) {
            take(product, product_scales, product_kind, row, rows, all * channels, head * channels,
                 channels, bias, from);
            const float *result = from;
            if (head < heads + groups) {
                const float *norm = head < heads ? query_norm : key_norm;
                if (norm) normed(from, channels, norm, eps);
                for (long i = 0; i < half; i++) {
                    turned[i] = from[i] * cosine[i] - from[i + half] * sine[i];
                    turned[i + half] = from[i + half] * cosine[i + half] + from[i] * sine[i + half];
                }
                result = turned;
            }
            if (head < heads) {
                memcpy(queries + (row * heads + head) * channels, result, channels * sizeof(float));
                continue;
            }
            long group = (head - heads) % groups;
            long place = row / new_rows * batch_stride + group * group_stride + columns[row] * channels;
            char *kept = head < heads + groups ? keys : values;
            kept += place * (kind == BFLOAT16 ? sizeof(uint16_t) : sizeof(float));
            give(result, kind, 0, 1, channels, kept, NULL);
        }
        free(from);
    }
}

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

static inline Sum kept(const void *columns, int kind, long at) {
    return kind == FLOAT32 ? ((const float *)columns)[at] : widened(((const uint16_t *)columns)[at]);
}

static void softmax(Sum *scores, long seen) { /* seen: whole blocks */
    Sum lanes[LANES], largest = -INFINITY, sum = 0;
    for (long i = 0; i < LANES; i++) lanes[i] = -INFINITY;
    for (long from = 0; from < seen; from += LANES)
        for (long i = 0; i < LANES; i++)
            lanes[i] = scores[from + i] > lanes[i] ? scores[from + i] : lanes[i];
    for (long i = 0; i < LANES; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    for (long s = 0; s < seen; s++) {
        Sum x = scores[s] - largest;
        Sum power = EXP(x < LOWEST ? LOWEST : x);
        scores[s] = x < LOWEST ? 0 : power;
    }
    for (long s = 0; s < seen; s++) sum += scores[s];
    for (long s = 0; s < seen; s++) scores[s] /= sum;
}

/* One group's attention for a few rows of one text: `count` queries share its keys. Blocks of keys
 * and values are widened once for all of them. channels and seen are padded to whole blocks; scores
 * hold the mask, and -inf in the padding; sums hold zeros. */
static void attend_some(long count, long channels, long wide, long seen, long columns,
                        const Sum *queries, const void *keys, const void *values, int kind,
                        Sum *block, Sum *scores, Sum *sums) {
    for (long from = 0; from < columns; from += BLOCK) {
        long size = seen - from < BLOCK ? seen - from : BLOCK;
        memset(block, 0, channels * BLOCK * sizeof(Sum));
        for (long s = 0; s < size; s++)
            for (long i = 0; i < channels; i++)
                block[i * BLOCK + s] = kept(keys, kind, (from + s) * channels + i);
        for (long q = 0; q < count; q++)
            add_products(channels, queries + q * channels, block, BLOCK, scores + q * columns + from);
    }
    for (long q = 0; q < count; q++) softmax(scores + q * columns, columns);
    memset(block, 0, BLOCK * wide * sizeof(Sum));
    for (long from = 0; from < seen; from += BLOCK) {
        long size = seen - from < BLOCK ? seen - from : BLOCK;
        for (long s = 0; s < size; s++)
            for (long i = 0; i < channels; i++)
                block[s * wide + i] = kept(values, kind, (from + s) * channels + i);
        for (long q = 0; q < count; q++)
            for (long i = 0; i < wide; i += BLOCK)
                add_products(size, scores + q * columns + from, block + i, wide, sums + q * wide + i);
    }
}

void attend(long batch, long new_rows, long heads, long groups, long channels, long seen,
            const float *queries, const void *keys, const void *values, int cache_kind,
            long batch_stride, long group_stride, const float *mask, double scale, float *attended) {
    long shared = heads / groups, parts = (new_rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    long size = cache_kind == BFLOAT16 ? sizeof(uint16_t) : sizeof(float);
    long wide = (channels + BLOCK - 1) / BLOCK * BLOCK, columns = (seen + BLOCK - 1) / BLOCK * BLOCK;
#pragma omp parallel for schedule(dynamic) if (batch * new_rows * heads * seen * channels > SPLIT_ABOVE)
    for (long task = 0; task < batch * groups * parts; task++) {
        long part = task % parts, group = task / parts % groups, text = task / parts / groups;
        long first = part * ROWS_AT_ONCE, nodes = new_rows - first;
        nodes = nodes < ROWS_AT_ONCE ? nodes : ROWS_AT_ONCE;
        long count = nodes * shared, at = text * batch_stride + group * group_stride;
        Sum *block = calloc(wide * BLOCK + count * (channels + wide + columns), sizeof(Sum));
        Sum *scaled = block + wide * BLOCK, *sums = scaled + count * channels;
        Sum *scores = sums + count * wide;
        for (long q = 0; q < count; q++) {
            long row = text * new_rows + first + q / shared, head = group * shared + q % shared;
            const float *query = queries + (row * heads + head) * channels;
            for (long i = 0; i < channels; i++) scaled[q * channels + i] = query[i] * scale;
            for (long s = 0; s < seen && mask; s++) scores[q * columns + s] = mask[row * seen + s];
            for (long s = seen; s < columns; s++) scores[q * columns + s] = -INFINITY;
        }
        attend_some(count, channels, wide, seen, columns, scaled, (const char *)keys + at * size,
                    (const char *)values + at * size, cache_kind, block, scores, sums);
        for (long q = 0; q < count; q++) {
            long row = text * new_rows + first + q / shared, head = group * shared + q % shared;
            float *out = attended + (row * heads + head) * channels;
            for (long i = 0; i < channels; i++) out[i] = (float)sums[q * wide + i];
        }
        free(block);
    }
}

void convert(long rows, long width, const float *values, void *out, int kind, float *scales) {
#pragma omp parallel for if (rows * width > SPLIT_ABOVE)
    for (long row = 0; row < rows; row++)
        give(values + row * width, kind, row, rows, width, out, scales);
}

void gate(long rows, long width, const void *product, int product_kind, const float *product_scales,
          const float *bias, void *out, int kind, float *scales) {
#pragma omp parallel for if (rows * width > SPLIT_ABOVE)
    for (long row = 0; row < rows; row++) {
        float *values = malloc(2 * width * sizeof(float));
        take(product, product_scales, product_kind, row, rows, 2 * width, 0, 2 * width, bias, values);
        for (long i = 0; i < width; i++) values[i] = silu(values[i]) * values[width + i];
        give(values, kind, row, rows, width, out, scales);
        free(values);
    }
}

void combine(long rows, long width, const float *product, const float *scales, const float *bias,
             float *out) {
#pragma omp parallel for if (rows * width > SPLIT_ABOVE)
    for (long row = 0; row < rows; row++)
        take(product, scales, DIGITS, row, rows, width, 0, width, bias, out + row * width);
}
