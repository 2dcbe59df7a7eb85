/* Barriers in shared memory. A phase ends when as many arrivals have come as the barrier was made
 * for, and all the bytes that were announced. Phases are numbered 0, 1, 0, ...; to wait for the
 * phase 1 of a new barrier returns at once, as if it lay behind. */
#pragma once

#include "ptx/copy.cuh"

typedef unsigned long long mbarrier;

static __device__ __forceinline__ void mbarrier_init(unsigned address, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(arrivals)
                 : "memory");
}
static __device__ __forceinline__ void mbarrier_init(mbarrier *b, int arrivals) {
    mbarrier_init(shared_address(b), arrivals);
}

/* Makes initialised barriers known to the copy engine. */
static __device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

static __device__ __forceinline__ void mbarrier_arrive(unsigned address) {
    asm volatile("{\n"
                 ".reg .b64 state;\n"
                 "mbarrier.arrive.shared::cta.b64 state, [%0];\n"
                 "}" ::"r"(address)
                 : "memory");
}
static __device__ __forceinline__ void mbarrier_arrive(mbarrier *b) {
    mbarrier_arrive(shared_address(b));
}

/* Arrives, and announces bytes that the copy engine will bring. */
static __device__ __forceinline__ void mbarrier_arrive_expect(mbarrier *b, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)),
                 "r"(bytes)
                 : "memory");
}

/* Whether the phase has ended; sm_90 suspends the thread for a while if not. */
static __device__ __forceinline__ bool mbarrier_try_wait(unsigned address, unsigned phase) {
    unsigned done;
    asm volatile("{\n"
                 ".reg .pred p;\n"
#if __CUDA_ARCH__ >= 900
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
#else
                 "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
#endif
                 "selp.u32 %0, 1, 0, p;\n"
                 "}"
                 : "=r"(done)
                 : "r"(address), "r"(phase)
                 : "memory");
    return done;
}

static __device__ __forceinline__ void mbarrier_wait(unsigned address, unsigned phase) {
    while (!mbarrier_try_wait(address, phase)) {
    }
}
static __device__ __forceinline__ void mbarrier_wait(mbarrier *b, unsigned phase) {
    mbarrier_wait(shared_address(b), phase);
}
