#pragma once

static inline unsigned shared_address(const void *p) {
    return emu_shared_address(p);
}

static inline unsigned thread_index() {
    return threadIdx.x;
}

static inline void cp_async_16(unsigned dst, const void *src, int bytes) {
    emu_cp_async(dst, src, (unsigned)bytes);
}

static inline void cp_async_commit() {
    emu_cp_async_commit();
}

template <int N> static inline void cp_async_wait() {
    emu_cp_async_wait(N);
}

static inline void store_global_4(void *to, const unsigned (&r)[4]) {
    emu_check_global(to, 16);
    memcpy(to, r, 16);
}

static inline unsigned char load_shared_u8(unsigned address) {
    unsigned char x;
    emu_load_shared(&x, address, 1);
    return x;
}
static inline unsigned short load_shared_u16(unsigned address) {
    unsigned short x;
    emu_load_shared(&x, address, 2);
    return x;
}
static inline unsigned load_shared_1(unsigned address) {
    unsigned x;
    emu_load_shared(&x, address, 4);
    return x;
}
static inline void load_shared_2(unsigned &x, unsigned &y, unsigned address) {
    unsigned r[2];
    emu_load_shared(r, address, 8);
    x = r[0], y = r[1];
}
static inline void load_shared_4(unsigned (&r)[4], unsigned address) {
    emu_load_shared(r, address, 16);
}
static inline void store_shared_1(unsigned address, unsigned x) {
    emu_store_shared(address, &x, 4);
}
static inline void store_shared_2(unsigned address, unsigned x, unsigned y) {
    const unsigned r[2] = {x, y};
    emu_store_shared(address, r, 8);
}
static inline void store_shared_4(unsigned address, unsigned x, unsigned y, unsigned z,
                                  unsigned w) {
    const unsigned r[4] = {x, y, z, w};
    emu_store_shared(address, r, 16);
}
