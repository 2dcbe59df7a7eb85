/* Accumulators of matrix products: arrays of registers, in as many dimensions as there are tiles.
 */
#pragma once

static __device__ __forceinline__ void set_to_zero(float &x) {
    x = 0;
}
template <class T, int COUNT> static __device__ __forceinline__ void set_to_zero(T (&x)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        set_to_zero(x[i]);
}
