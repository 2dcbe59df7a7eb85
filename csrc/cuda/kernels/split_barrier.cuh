/* A barrier of all warps of a block in two halves: a warp says that it has arrived, goes on with
 * what does not depend on the others, and only then waits for them. */
#pragma once

#include "ptx/copy.cuh"

struct SplitBarrier {
    unsigned address; /* of 8 bytes in shared memory */

    /* By one thread, before a __syncthreads. */
    __device__ __forceinline__ void init() const {
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address), "n"(THREADS) : "memory");
    }
    /* By every thread: one for its warp is no faster, and compute-sanitizer would see races. */
    __device__ __forceinline__ void arrive() const {
        asm volatile("{\n"
                     ".reg .b64 state;\n"
                     "mbarrier.arrive.shared.b64 state, [%0];\n"
                     "}" ::"r"(address)
                     : "memory");
    }
    /* Until all warps have arrived; phase is 0 the first time, then 1, then 0. */
    __device__ __forceinline__ void wait(unsigned phase) const {
        unsigned done;
        do {
            asm volatile("{\n"
                         ".reg .pred p;\n"
#if __CUDA_ARCH__ >= 900 /* sleeps for a while */
                         "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
#else
                         "mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
#endif
                         "selp.u32 %0, 1, 0, p;\n"
                         "}"
                         : "=r"(done)
                         : "r"(address), "r"(phase)
                         : "memory");
        } while (!done);
    }
};
