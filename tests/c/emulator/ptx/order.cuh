#pragma once

static inline unsigned long long load_acquire(const unsigned long long *p) {
    emu_yield();
    return *p;
}

static inline void store_release(unsigned long long *p, unsigned long long x) {
    *p = x;
}
