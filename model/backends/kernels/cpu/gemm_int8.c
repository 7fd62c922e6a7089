/* Matrix products of levels. Weights lie in blocks of OUTPUTS columns of the result, within a block by
 * groups of GROUP inputs: one vector holds a group of LANES outputs. */
#include "formats.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
typedef __m512i Vector;
#define AT_ONCE 6 /* rows whose sums fit into the registers */
#define LOAD(from) _mm512_loadu_si512(from)
#define STORE(to, vector) _mm512_storeu_si512(to, vector)
#define REPEAT(four) _mm512_set1_epi32(four)
#define ADD_PRODUCTS(sums, levels, weights) _mm512_dpbusd_epi32(sums, levels, weights)
#elif defined(__AVX2__)
#include <immintrin.h>
typedef __m256i Vector;
#define AT_ONCE 2
#define LOAD(from) _mm256_loadu_si256((const __m256i *)(from))
#define STORE(to, vector) _mm256_storeu_si256((__m256i *)(to), vector)
#define REPEAT(four) _mm256_set1_epi32(four)
#if defined(__AVXVNNI__)
#define ADD_PRODUCTS(sums, levels, weights) _mm256_dpbusd_avx_epi32(sums, levels, weights)
#else /* two products of levels up to 127 and weights up to 127 fit into 16 bits */
#define ADD_PRODUCTS(sums, levels, weights)                                                      \
    _mm256_add_epi32(                                                                            \
        sums, _mm256_madd_epi16(_mm256_maddubs_epi16(levels, weights), _mm256_set1_epi16(1)))
#endif
#else /* any other processor: the compiler does what it can */
typedef int32_t Vector __attribute__((vector_size(16)));
typedef int8_t Bytes __attribute__((vector_size(16)));
#define AT_ONCE 2
static inline Vector LOAD(const void *from) {
    Vector vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}
static inline void STORE(void *to, Vector vector) { memcpy(to, &vector, sizeof vector); }
static inline Vector REPEAT(int32_t four) { return (Vector){four, four, four, four}; }
static inline Vector ADD_PRODUCTS(Vector sums, Vector levels, Vector weights) {
    Bytes left = (Bytes)levels, right = (Bytes)weights;
    for (int i = 0; i < 16; i++) sums[i / GROUP] += (uint8_t)left[i] * right[i];
    return sums;
}
#endif
#define WIDE ((long)(sizeof(Vector) / sizeof(int32_t))) /* outputs of a vector */
#define VECTORS 4
#define OUTPUTS (VECTORS * WIDE)

long int8_padded_outputs(long outputs) { return (outputs + OUTPUTS - 1) / OUTPUTS * OUTPUTS; }

void pack_int8(long outputs, long inputs, const int8_t *weights, int8_t *packed, int32_t *zeros) {
    long groups = (inputs + GROUP - 1) / GROUP, all = int8_padded_outputs(outputs);
    memset(packed, 0, all * groups * GROUP);
    memset(zeros, 0, all * sizeof(int32_t));
    for (long v = 0; v < outputs; v++) {
        int8_t *block = packed + v / OUTPUTS * groups * OUTPUTS * GROUP;
        for (long k = 0; k < inputs; k++) {
            block[k / GROUP * OUTPUTS * GROUP + v % OUTPUTS * GROUP + k % GROUP] = weights[v * inputs + k];
            zeros[v] -= ZERO * weights[v * inputs + k];
        }
    }
}

/* Sums of a few rows of levels for one block: `count` is a constant where this is used. */
static inline void multiply_some(long count, long groups, const uint8_t *levels, const int8_t *weights,
                                 const int32_t *zeros, int32_t *out) {
    Vector sums[AT_ONCE][VECTORS];
    for (long row = 0; row < count; row++)
        for (long v = 0; v < VECTORS; v++) sums[row][v] = LOAD(zeros + v * WIDE);
    for (long group = 0; group < groups; group++) {
        const int8_t *from = weights + group * OUTPUTS * GROUP;
        Vector block[VECTORS];
        for (long v = 0; v < VECTORS; v++) block[v] = LOAD(from + v * sizeof(Vector));
        for (long row = 0; row < count; row++) {
            int32_t four;
            memcpy(&four, levels + (row * groups + group) * GROUP, sizeof four);
            Vector repeated = REPEAT(four);
            for (long v = 0; v < VECTORS; v++)
                sums[row][v] = ADD_PRODUCTS(sums[row][v], repeated, block[v]);
        }
    }
    for (long row = 0; row < count; row++)
        for (long v = 0; v < VECTORS; v++) STORE(out + row * OUTPUTS + v * WIDE, sums[row][v]);
}

void multiply_int8(long rows, long outputs, long inputs, const uint8_t *levels, const float *scales,
              const int8_t *packed, const int32_t *zeros, const float *weight_scales,
              const float *bias, float *out) {
    long groups = (inputs + GROUP - 1) / GROUP, blocks = int8_padded_outputs(outputs) / OUTPUTS;
#pragma omp parallel for schedule(static) if (rows * outputs * inputs > SPLIT_ABOVE)
    for (long block = 0; block < blocks; block++) {
        const int8_t *weights = packed + block * groups * OUTPUTS * GROUP;
        long first = block * OUTPUTS, width = outputs - first < OUTPUTS ? outputs - first : OUTPUTS;
        int32_t sums[AT_ONCE * OUTPUTS];
        for (long from = 0; from < 2 * rows; from += AT_ONCE) {
            long count = 2 * rows - from < AT_ONCE ? 2 * rows - from : AT_ONCE;
            const uint8_t *some = levels + from * groups * GROUP;
            if (count == 2)
                multiply_some(2, groups, some, weights, zeros + first, sums);
            else if (AT_ONCE > 4 && count == 4)
                multiply_some(4, groups, some, weights, zeros + first, sums);
            else
                multiply_some(AT_ONCE, groups, some, weights, zeros + first, sums);
            for (long row = from / 2; row < (from + count) / 2; row++) {
                const int32_t *coarse = sums + (2 * row - from) * OUTPUTS, *fine = coarse + OUTPUTS;
                float *into = out + row * outputs + first;
                for (long v = 0; v < width; v++) {
                    float sum = (float)coarse[v] + (float)fine[v] * (1.0f / FINE);
                    into[v] = sum * (scales[row] * weight_scales[first + v]);
                }
                for (long v = 0; v < width && bias; v++) into[v] += bias[first + v];
            }
        }
    }
}
