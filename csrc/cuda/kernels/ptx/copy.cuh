/* Asynchronous copies of sm_80 from global to shared memory, and other ways in and out of it. */
#pragma once

static __device__ __forceinline__ unsigned shared_address(const void *p) {
    return (unsigned)__cvta_generic_to_shared(p);
}

/* threadIdx.x, read anew each time: what is derived from it takes no registers in between. */
static __device__ __forceinline__ unsigned thread_index() {
    unsigned x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

/* 16 bytes, of which the last 16 - bytes are zeros and not read. */
static __device__ __forceinline__ void cp_async_16(unsigned dst, const void *src, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes)
                 : "memory");
}

static __device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits until at most N of this thread's latest groups are under way. */
template <int N> static __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* 16 bytes of global memory. */
static __device__ __forceinline__ void store_global_4(void *to, const unsigned (&r)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

/* Words of shared memory, half a one, a quarter. */
static __device__ __forceinline__ unsigned char load_shared_u8(unsigned address) {
    unsigned x;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return (unsigned char)x;
}
static __device__ __forceinline__ unsigned short load_shared_u16(unsigned address) {
    unsigned short x;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address) : "memory");
    return x;
}
static __device__ __forceinline__ unsigned load_shared_1(unsigned address) {
    unsigned x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return x;
}
static __device__ __forceinline__ void load_shared_2(unsigned &x, unsigned &y, unsigned address) {
    asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(x), "=r"(y) : "r"(address) : "memory");
}
static __device__ __forceinline__ void load_shared_4(unsigned (&r)[4], unsigned address) {
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
static __device__ __forceinline__ void store_shared_1(unsigned address, unsigned x) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
static __device__ __forceinline__ void store_shared_2(unsigned address, unsigned x, unsigned y) {
    asm volatile("st.shared.v2.b32 [%0], {%1,%2};" ::"r"(address), "r"(x), "r"(y) : "memory");
}
static __device__ __forceinline__ void store_shared_4(unsigned address, unsigned x, unsigned y,
                                                      unsigned z, unsigned w) {
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x), "r"(y), "r"(z),
                 "r"(w)
                 : "memory");
}
