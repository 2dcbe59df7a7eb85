#pragma once

#include "ptx/mbarrier.cuh"

static inline void cluster_sync() {
    emu_cluster_barrier();
}

static inline unsigned address_in_block(unsigned address, int block) {
    return emu_address_in_block(address, (unsigned)block);
}

static inline void mbarrier_arrive_in_block(mbarrier_ref b, int block) {
    emu_mbarrier_arrive(address_in_block(b.address, block));
}
static inline void mbarrier_arrive_expect_in_block(mbarrier_ref b, int bytes, int block) {
    emu_mbarrier_expect(address_in_block(b.address, block), (unsigned)bytes);
    emu_mbarrier_arrive(address_in_block(b.address, block));
}

static inline void bulk_send(unsigned dst, unsigned src, int bytes, mbarrier_ref b, int block) {
    emu_bulk_send(address_in_block(dst, block), src, (unsigned)bytes,
                  address_in_block(b.address, block));
}
