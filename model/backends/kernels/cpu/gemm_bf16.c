/* Matrix products in bfloat16 with sums in float32, the same for a row whatever is read beside it:
 * libraries choose another order of summing for other numbers of rows. Weights lie in blocks of
 * OUTPUTS columns of the result, within a block by pairs of inputs. */
#include "formats.h"

typedef float Wide __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Pairs __attribute__((vector_size(64), aligned(4), may_alias));
#define WIDE 16 /* outputs of a vector */
#define VECTORS 4
#define OUTPUTS (VECTORS * WIDE)
#define AT_ONCE 6 /* rows whose sums fit into the registers */

#if defined(__AVX512BF16__)
#include <immintrin.h>
#define ADD_PRODUCTS(sums, pair, weights)                                                          \
    sums = (Wide)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32((int)(pair)),          \
                                  (__m512bh)weights)
#else
#define ADD_PRODUCTS(sums, pair, weights)                                                          \
    sums += widened((uint16_t)(pair)) * (Wide)(weights << 16);                                     \
    sums += widened((uint16_t)((pair) >> 16)) * (Wide)(weights & 0xffff0000u)
#endif

long bf16_padded_outputs(long outputs) { return (outputs + OUTPUTS - 1) / OUTPUTS * OUTPUTS; }

void pack_bf16(long outputs, long inputs, const uint16_t *weights, uint16_t *packed) {
    memset(packed, 0, bf16_padded_outputs(outputs) * inputs * sizeof(uint16_t));
#pragma omp parallel for
    for (long v = 0; v < outputs; v++) {
        uint16_t *block = packed + v / OUTPUTS * OUTPUTS * inputs;
        for (long k = 0; k < inputs; k++)
            block[k / 2 * OUTPUTS * 2 + v % OUTPUTS * 2 + k % 2] = weights[v * inputs + k];
    }
}

/* Sums of a few rows for one block: `count` is a constant where this is used. */
static inline void multiply_some(long count, long inputs, const uint16_t *rows,
                                 const uint16_t *weights, float *out) {
    Wide sums[AT_ONCE][VECTORS];
    memset(sums, 0, sizeof sums);
    for (long k = 0; k < inputs; k += 2) {
        const Pairs *from = (const Pairs *)(weights + k * OUTPUTS);
        Pairs block[VECTORS];
        for (long v = 0; v < VECTORS; v++) block[v] = from[v];
        for (long row = 0; row < count; row++) {
            uint32_t pair;
            memcpy(&pair, rows + row * inputs + k, sizeof pair);
            for (long v = 0; v < VECTORS; v++) {
                ADD_PRODUCTS(sums[row][v], pair, block[v]);
            }
        }
    }
    memcpy(out, sums, count * OUTPUTS * sizeof(float));
}

void multiply_bf16(long rows, long outputs, long inputs, const uint16_t *values,
                     const uint16_t *packed, const float *bias, float *out) {
    long blocks = bf16_padded_outputs(outputs) / OUTPUTS;
#pragma omp parallel for schedule(static) if (rows * outputs * inputs > SPLIT_ABOVE)
    for (long block = 0; block < blocks; block++) {
        const uint16_t *weights = packed + block * OUTPUTS * inputs;
        long first = block * OUTPUTS, width = outputs - first < OUTPUTS ? outputs - first : OUTPUTS;
        float sums[AT_ONCE * OUTPUTS];
        for (long from = 0; from < rows; from += AT_ONCE) {
            long count = rows - from < AT_ONCE ? rows - from : AT_ONCE;
            const uint16_t *some = values + from * inputs;
            switch (count) {
            case 1: multiply_some(1, inputs, some, weights, sums); break;
            case 2: multiply_some(2, inputs, some, weights, sums); break;
            case 3: multiply_some(3, inputs, some, weights, sums); break;
            case 4: multiply_some(4, inputs, some, weights, sums); break;
            case 5: multiply_some(5, inputs, some, weights, sums); break;
            default: multiply_some(AT_ONCE, inputs, some, weights, sums);
            }
            for (long row = 0; row < count; row++) {
                float *into = out + (from + row) * outputs + first;
                for (long v = 0; v < width; v++) into[v] = sums[row * OUTPUTS + v];
                for (long v = 0; v < width && bias; v++) into[v] += bias[first + v];
            }
        }
    }
}
