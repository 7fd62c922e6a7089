/* attention.c with sums in float32. */
#define ATTEND attend
typedef float Sum;
#define EXP exp_float
#define LOWEST -87.0f
#include "attention.c"
