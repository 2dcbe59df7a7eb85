/* Barriers in shared memory. A phase ends when as many arrivals have come as the barrier was made
 * for, and all the bytes that were announced. Phases are numbered 0, 1, 0, ...; to wait for the
 * phase 1 of a new barrier returns at once, as if it lay behind. */
#pragma once

#include "ptx/copy.cuh"

typedef unsigned long long mbarrier;

static __device__ __forceinline__ void mbarrier_init(mbarrier *b, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals)
                 : "memory");
}

/* Makes initialised barriers known to the copy engine. */
static __device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

static __device__ __forceinline__ void mbarrier_arrive(mbarrier *b) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}

/* Arrives, and announces bytes that the copy engine will bring. */
static __device__ __forceinline__ void mbarrier_arrive_expect(mbarrier *b, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)),
                 "r"(bytes)
                 : "memory");
}

/* Whether the phase has ended; suspends the thread for a while if not. */
static __device__ __forceinline__ bool mbarrier_try_wait(mbarrier *b, unsigned phase) {
    unsigned done;
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n"
                 "}"
                 : "=r"(done)
                 : "r"(shared_address(b)), "r"(phase)
                 : "memory");
    return done;
}

static __device__ __forceinline__ void mbarrier_wait(mbarrier *b, unsigned phase) {
    while (!mbarrier_try_wait(b, phase)) {
    }
}
