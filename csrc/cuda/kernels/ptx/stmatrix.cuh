/* The reverse of ldmatrix, of sm_90. */
#pragma once

/* Four 8 x 8 matrices of 16-bit elements; lanes 8i .. 8i + 7 give the rows of matrix i. */
static __device__ __forceinline__ void stmatrix_x4(unsigned address, unsigned r0, unsigned r1,
                                                   unsigned r2, unsigned r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
                 "r"(r0), "r"(r1), "r"(r2), "r"(r3)
                 : "memory");
}

static __device__ __forceinline__ void stmatrix_x4_trans(unsigned address, unsigned r0, unsigned r1,
                                                         unsigned r2, unsigned r3) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
        "r"(r0), "r"(r1), "r"(r2), "r"(r3)
        : "memory");
}
