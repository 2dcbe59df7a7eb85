/* Accumulators of matrix products: registers, in an array of as many dimensions as wanted. */
#pragma once

static __device__ __forceinline__ void set_to_zero(float &x) {
    x = 0;
}
template <class T, int COUNT> static __device__ __forceinline__ void set_to_zero(T (&x)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        set_to_zero(x[i]);
}
