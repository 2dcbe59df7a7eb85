/* Copies of the copy engine of sm_90 that need no tensor map: bytes in a row, a multiple of 16, at
 * multiples of 16. */
#pragma once

#include "ptx/mbarrier.cuh"

/* To shared memory. The bytes count for the barrier, which has to expect them. */
static __device__ __forceinline__ void bulk_load(unsigned dst, const void *src, int bytes,
                                                 mbarrier *b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1], %2, [%3];" ::"r"(dst),
                 "l"(__cvta_generic_to_global(src)), "r"(bytes), "r"(shared_address(b))
                 : "memory");
}

/* Adds floats in shared memory to those in global memory. Part of this thread's group of stores,
 * see tma_store_commit. */
static __device__ __forceinline__ void bulk_add(float *dst, unsigned src, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32"
                 " [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(dst)),
                 "r"(src), "r"(bytes)
                 : "memory");
}
