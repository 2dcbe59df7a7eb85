/* Blocks of a cluster (sm_90): they run at the same time, and reach each other's shared memory. */
#pragma once

#include "ptx/mbarrier.cuh"

/* For all threads of the cluster: what was written before it is seen after it. */
static __device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\n"
                 "barrier.cluster.wait.acquire;" ::
                     : "memory");
}

/* An address in this block's shared memory, in that of a block of the cluster. */
static __device__ __forceinline__ unsigned address_in_block(unsigned address, int block) {
    unsigned there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
    return there;
}

/* As in mbarrier.cuh, for the barrier at that place in a block of the cluster. */
static __device__ __forceinline__ void mbarrier_arrive_in_block(mbarrier_ref b, int block) {
    asm volatile(
        "mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_in_block(b.address, block))
        : "memory");
}
static __device__ __forceinline__ void mbarrier_arrive_expect_in_block(mbarrier_ref b, int bytes,
                                                                       int block) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%0], %1;" ::"r"(
                     address_in_block(b.address, block)),
                 "r"(bytes)
                 : "memory");
}

/* Copies bytes, a multiple of 16, from this block's shared memory to `dst` in that of a block,
 * where they count for the barrier. When they have left is not told here. */
static __device__ __forceinline__ void bulk_send(unsigned dst, unsigned src, int bytes,
                                                 mbarrier_ref b, int block) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes"
                 " [%0], [%1], %2, [%3];" ::"r"(address_in_block(dst, block)),
                 "r"(src), "r"(bytes), "r"(address_in_block(b.address, block))
                 : "memory");
}
