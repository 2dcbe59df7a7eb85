#pragma once

#include "ptx/copy.cuh"

typedef unsigned long long mbarrier;

struct mbarrier_ref {
    unsigned address;

    mbarrier_ref(mbarrier *b) : address(shared_address(b)) {}
    explicit mbarrier_ref(unsigned address_) : address(address_) {}
};

static inline void mbarrier_init(mbarrier_ref b, int arrivals) {
    emu_mbarrier_init(b.address, (unsigned)arrivals);
}

static inline void mbarrier_init_fence() {}

static inline void mbarrier_arrive(mbarrier_ref b) {
    emu_mbarrier_arrive(b.address);
}

static inline void mbarrier_arrive_expect(mbarrier_ref b, int bytes) {
    emu_mbarrier_expect(b.address, (unsigned)bytes);
    emu_mbarrier_arrive(b.address);
}

static inline bool mbarrier_try_wait(mbarrier_ref b, unsigned phase) {
    return emu_mbarrier_try_wait(b.address, phase);
}

static inline void mbarrier_wait(mbarrier_ref b, unsigned phase) {
    while (!mbarrier_try_wait(b, phase)) {
    }
}
