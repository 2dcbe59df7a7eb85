/* A barrier of all warps of a block in two halves: a warp says that it has arrived, goes on with
 * what does not depend on the others, and only then waits for them. */
#pragma once

#include "ptx/mbarrier.cuh"

struct SplitBarrier {
    unsigned address; /* of 8 bytes in shared memory */

    /* By one thread, before a __syncthreads. */
    __device__ __forceinline__ void init() const { mbarrier_init(address, THREADS); }
    /* By every thread: one for its warp is no faster, and compute-sanitizer would see races. */
    __device__ __forceinline__ void arrive() const { mbarrier_arrive(address); }
    /* Until all warps have arrived; phase is 0 the first time, then 1, then 0. */
    __device__ __forceinline__ void wait(unsigned phase) const { mbarrier_wait(address, phase); }
};
