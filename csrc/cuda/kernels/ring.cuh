/* A ring of buffers in shared memory, used by turns: the n-th use of the ring is a use of buffer n
 * % COUNT, and its barriers are then in phase n / COUNT % 2. */
#pragma once

#include "ptx/mbarrier.cuh"

template <int COUNT>
static __device__ __forceinline__ void wait_full(mbarrier (&full)[COUNT], unsigned n) {
    mbarrier_wait(&full[n % COUNT], n / COUNT % 2);
}
template <int COUNT> /* by the use before */
static __device__ __forceinline__ void wait_empty(mbarrier (&empty)[COUNT], unsigned n) {
    mbarrier_wait(&empty[n % COUNT], n / COUNT % 2 ^ 1);
}

/* This warp is done with a buffer, or has filled its part of it. */
static __device__ __forceinline__ void release(mbarrier_ref b) {
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        mbarrier_arrive(b);
}
