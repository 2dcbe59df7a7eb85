/* Accesses to global memory that order others, between the blocks of a grid. */
#pragma once

static __device__ __forceinline__ unsigned long long load_acquire(const unsigned long long *p) {
    unsigned long long x;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(p) : "memory");
    return x;
}

static __device__ __forceinline__ void store_release(unsigned long long *p, unsigned long long x) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(x) : "memory");
}
