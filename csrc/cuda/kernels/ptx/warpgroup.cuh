/* What warps of one block do for each other. */
#pragma once

/* Registers of every thread of a warpgroup from here on. */
template <int COUNT> static __device__ __forceinline__ void registers_increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> static __device__ __forceinline__ void registers_decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

/* The block's barriers 1 to 15: `threads` counts those that wait and those that only arrive. */
static __device__ __forceinline__ void barrier_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
static __device__ __forceinline__ void barrier_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/* threadIdx.x % 32, and nothing that depends on it is kept in registers from earlier on. */
static __device__ __forceinline__ int lane_anew() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

/* Tells the compiler that x is the same in all threads of the warp. */
static __device__ __forceinline__ int uniform(int x) {
    return __shfl_sync(~0u, x, 0);
}
