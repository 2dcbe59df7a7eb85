/* Arithmetic that CUDA C has no name for. */
#pragma once

/* Two numbers of 16 bits side by side, as instructions name them. Of float32: bf16, see bf16x3.cuh.
 */
#if FA_DTYPE_FP16
#define PAIR "f16x2"
#define PAIR_OF_ONES 0x3c003c00
#else
#define PAIR "bf16x2"
#define PAIR_OF_ONES 0x3f803f80
#endif

/* Two floats, rounded to nearest; lo has the lower address. */
static __device__ __forceinline__ unsigned pack(float lo, float hi) {
    unsigned pair;
    asm("cvt.rn." PAIR ".f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
    return pair;
}

/* The same, but what is too large for the type becomes its largest number. */
static __device__ __forceinline__ unsigned pack_finite(float lo, float hi) {
    unsigned pair;
    asm("cvt.rn.satfinite." PAIR ".f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
    return pair;
}

/* Products of both halves. */
static __device__ __forceinline__ unsigned multiply_pairs(unsigned x, unsigned y) {
    unsigned pair;
    asm("mul.rn." PAIR " %0, %1, %2;" : "=r"(pair) : "r"(x), "r"(y));
    return pair;
}

/* Of both halves, what is larger than 1 in size becomes 1 or -1; NaN stays. */
static __device__ __forceinline__ unsigned limit_pairs(unsigned x) {
    unsigned pair;
    asm("min.NaN.xorsign.abs." PAIR " %0, %1, %2;" : "=r"(pair) : "r"(x), "r"(PAIR_OF_ONES));
    return pair;
}

static __device__ __forceinline__ float half_to_float(unsigned short x) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x));
    return f;
}

static __device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* NaN if either is. */
static __device__ __forceinline__ float min_nan(float x, float y) {
    float least;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(x), "f"(y));
    return least;
}

/* Of two floats of 16 bits in each: ones where the first, without its sign, is not less than the
 * second, or a NaN. */
static __device__ __forceinline__ unsigned size_not_less_f16x2(unsigned x, unsigned y) {
    unsigned mask;
    asm("{.reg .b32 size;\n"
        "abs.f16x2 size, %1;\n"
        "set.geu.u32.f16x2 %0, size, %2;}"
        : "=r"(mask)
        : "r"(x), "r"(y));
    return mask;
}
