#pragma once

static inline void stmatrix_x4(unsigned address, unsigned r0, unsigned r1, unsigned r2,
                               unsigned r3) {
    const unsigned r[4] = {r0, r1, r2, r3};
    emu_stmatrix(address, r, 0);
}

static inline void stmatrix_x4_trans(unsigned address, unsigned r0, unsigned r1, unsigned r2,
                                     unsigned r3) {
    const unsigned r[4] = {r0, r1, r2, r3};
    emu_stmatrix(address, r, 1);
}
