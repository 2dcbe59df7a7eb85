#pragma once

template <int COUNT> static inline void registers_increase() {
    emu_sync_warp();
}
template <int COUNT> static inline void registers_decrease() {
    emu_sync_warp();
}

static inline void barrier_sync(int barrier, int threads) {
    emu_barrier(barrier, threads, 1);
}
static inline void barrier_arrive(int barrier, int threads) {
    emu_barrier(barrier, threads, 0);
}

static inline int lane_anew() {
    return threadIdx.x % 32;
}

static inline int uniform(int x) {
    return __shfl_sync(~0u, x, 0);
}
