/* Barriers in shared memory, in two halves: a thread says that it has arrived, goes on with what
 * does not depend on the others, and only then waits for them. A phase ends when as many arrivals
 * have come as the barrier was made for, and all the bytes that were announced. Phases are numbered
 * 0, 1, 0, ...; to wait for the phase 1 of a new barrier returns at once, as if it lay behind. */
#pragma once

#include "ptx/copy.cuh"

typedef unsigned long long mbarrier;

/* A pointer to a barrier, or its address in shared memory: neighbours at an offset from one address
 * take fewer instructions than a pointer each. */
struct mbarrier_ref {
    unsigned address;

    __device__ __forceinline__ mbarrier_ref(mbarrier *b) : address(shared_address(b)) {}
    __device__ __forceinline__ explicit mbarrier_ref(unsigned address_) : address(address_) {}
};

static __device__ __forceinline__ void mbarrier_init(mbarrier_ref b, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b.address), "r"(arrivals)
                 : "memory");
}

/* Makes initialised barriers known to the copy engine. */
static __device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

static __device__ __forceinline__ void mbarrier_arrive(mbarrier_ref b) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b.address) : "memory");
}

/* Arrives, and announces bytes that the copy engine will bring. */
static __device__ __forceinline__ void mbarrier_arrive_expect(mbarrier_ref b, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b.address),
                 "r"(bytes)
                 : "memory");
}

/* Whether the phase has ended; on sm_90 and up, suspends the thread for a while if not. */
static __device__ __forceinline__ bool mbarrier_try_wait(mbarrier_ref b, unsigned phase) {
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
                 : "r"(b.address), "r"(phase)
                 : "memory");
    return done;
}

/* Barrier: mbarrier * or mbarrier_ref; what it is decides where the address is computed. */
template <class Barrier>
static __device__ __forceinline__ void mbarrier_wait(Barrier b, unsigned phase) {
    while (!mbarrier_try_wait(b, phase)) {
    }
}
