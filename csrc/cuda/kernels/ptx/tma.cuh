/* The copy engine of sm_90 (TMA): boxes of a tensor of four dimensions, which a tensor map
 * describes, to and from shared memory. */
#pragma once

#include "ptx/mbarrier.cuh"

/* Made by cuTensorMapEncodeTiled. */
struct alignas(64) tensor_map {
    unsigned long long opaque[16];
};

static __device__ __forceinline__ void tma_prefetch_map(const tensor_map *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* What lies outside of the tensor becomes 0. The bytes of the whole box count for the barrier. */
static __device__ __forceinline__ void tma_load(unsigned dst, const tensor_map *map, mbarrier *b,
                                                int x0, int x1, int x2, int x3) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(dst),
                 "l"(map), "r"(shared_address(b)), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
                 : "memory");
}

/* What lies outside of the tensor is not written. */
static __device__ __forceinline__ void tma_store(const tensor_map *map, unsigned src, int x0,
                                                 int x1, int x2, int x3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group"
                 " [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
                 "r"(src), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
                 : "memory");
}

static __device__ __forceinline__ void tma_store_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/* Waits until the stores of this thread have read shared memory. */
static __device__ __forceinline__ void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

/* Orders this thread's own stores to shared memory before what the copy engine or a wgmma reads
 * there. */
static __device__ __forceinline__ void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
