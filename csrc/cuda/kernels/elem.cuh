/* The element type that a kernel is compiled for, and what arithmetic needs of it. */
#pragma once

#include "ptx/arithmetic.cuh"

#if FA_DTYPE_FP32
typedef float elem;

static __device__ __forceinline__ float to_float(elem x) {
    return x;
}
#else
typedef unsigned short elem;

static __device__ __forceinline__ float to_float(elem x) {
#if FA_DTYPE_BF16
    return __uint_as_float((unsigned)x << 16);
#else
    return half_to_float(x);
#endif
}
#endif

/* Registers of a thread for 16 x 16 elements. */
constexpr int WORDS = 2 * sizeof(elem);

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define NEGATIVE_INFINITY __int_as_float(0xff800000)
#define LOWEST_FINITE __int_as_float(0xff7fffff)
#define POSITIVE_INFINITY __int_as_float(0x7f800000)
