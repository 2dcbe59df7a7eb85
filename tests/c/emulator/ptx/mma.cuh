#pragma once

static inline void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const unsigned b[2] = {b0, b1};
    emu_mma_16x8x16(EMU_TYPE, d, a, b);
}

static inline void mma_16x8x8(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const unsigned b[2] = {b0, b1};
    emu_mma_16x8x8_tf32(d, a, b);
}

static inline unsigned round_to_tf32(float x) {
    const unsigned bits = __float_as_uint(x);
    return isfinite(x) ? (bits + 0x1000) & ~0x1fffu : isnan(x) ? 0x7fffffff : bits;
}

static inline void ldmatrix_x4(unsigned (&r)[4], unsigned address) {
    emu_ldmatrix(r, address, 0);
}

static inline void ldmatrix_x4_trans(unsigned (&r)[4], unsigned address) {
    emu_ldmatrix(r, address, 1);
}

static inline unsigned movmatrix_trans(unsigned two) {
    const unsigned lane = threadIdx.x % 32, from = lane % 4 * 8 + lane / 8;
    const unsigned shift = lane / 4 % 2 * 16;
    const unsigned low = __shfl_sync(~0u, two, from) >> shift & 0xffff;
    return low | (__shfl_sync(~0u, two, from + 4) >> shift & 0xffff) << 16;
}
