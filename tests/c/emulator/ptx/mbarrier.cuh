#pragma once

#include "ptx/copy.cuh"

typedef unsigned long long mbarrier;

static inline void mbarrier_init(unsigned address, int arrivals) {
    emu_mbarrier_init(address, (unsigned)arrivals);
}
static inline void mbarrier_init(mbarrier *b, int arrivals) {
    mbarrier_init(shared_address(b), arrivals);
}

static inline void mbarrier_init_fence() {}

static inline void mbarrier_arrive(unsigned address) {
    emu_mbarrier_arrive(address);
}
static inline void mbarrier_arrive(mbarrier *b) {
    mbarrier_arrive(shared_address(b));
}

static inline void mbarrier_arrive_expect(mbarrier *b, int bytes) {
    emu_mbarrier_expect(shared_address(b), (unsigned)bytes);
    mbarrier_arrive(b);
}

static inline bool mbarrier_try_wait(unsigned address, unsigned phase) {
    return emu_mbarrier_try_wait(address, phase);
}

static inline void mbarrier_wait(unsigned address, unsigned phase) {
    while (!mbarrier_try_wait(address, phase)) {
    }
}
static inline void mbarrier_wait(mbarrier *b, unsigned phase) {
    mbarrier_wait(shared_address(b), phase);
}
