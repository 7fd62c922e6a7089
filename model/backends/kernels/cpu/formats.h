/* How rows are written between matrix products, and what all files here share.
 *
 * What a product reads comes in one of three kinds:
 *   FLOAT32   as it is
 *   BFLOAT16  rounded to 16 bits
 *   INT8    8-bit integers of int8.py: per row one scale, and two rows of levels, the coarse
 *             ones and the fine ones, each with ZERO added, padded to whole groups of GROUP
 * COARSE, FINE and GROUP are numbers of build.py. Everything else is float32. A row's numbers
 * depend on that row alone: the same code goes over each, whatever is read beside it.
 */
#pragma once
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { FLOAT32, BFLOAT16, INT8 };

#define ZERO FINE /* makes levels positive, as the products want them */
#define SMALLEST 1e-30f
#define LANES 16
#define SPLIT_ABOVE (1 << 15) /* operations; less is done before a second thread has begun */

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
