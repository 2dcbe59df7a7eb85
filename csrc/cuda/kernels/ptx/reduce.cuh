/* Addition in global memory. */
#pragma once

/* Four floats added to four adjacent ones, at a multiple of 16 bytes, in one access. */
static __device__ __forceinline__ void reduce_add_v4(float *to, const float (&x)[4]) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(
                     __cvta_generic_to_global(to)),
                 "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
                 : "memory");
}
