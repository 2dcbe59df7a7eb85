#pragma once

#include "ptx/mbarrier.cuh"

struct alignas(64) tensor_map {
    unsigned long long opaque[16];
};

static inline void tma_prefetch_map(const tensor_map *) {}

static inline void tma_load(unsigned dst, const tensor_map *map, mbarrier *b, int x0, int x1,
                            int x2, int x3) {
    const int at[] = {x0, x1, x2, x3};
    emu_tma_load(dst, map, at, shared_address(b));
}

static inline void tma_store(const tensor_map *map, unsigned src, int x0, int x1, int x2, int x3) {
    const int at[] = {x0, x1, x2, x3};
    emu_tma_store(EMU_STORE, map, at, src);
}

static inline void tma_store_commit() {
    emu_bulk_commit();
}

static inline void tma_store_wait_read() {
    emu_bulk_wait(0);
}

static inline void fence_proxy_async() {
    emu_fence_proxy_async();
}
