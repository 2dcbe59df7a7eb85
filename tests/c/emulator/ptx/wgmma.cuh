#pragma once

#include "wgmma_operand.cuh"

static inline void wgmma_fence() {
    emu_wgmma_fence();
}

static inline void wgmma_commit() {
    emu_wgmma_commit();
}

template <int PENDING> static inline void wgmma_wait() {
    emu_wgmma_wait(PENDING);
}

template <int N> static inline void pin(float (&)[N][4]) {}

enum { OVER_COLS, OVER_ROWS };

template <int N> struct Wgmma {
    static_assert(N % 8 == 0 && N <= 256, "what wgmma has");

    template <int A = OVER_COLS, int B = OVER_COLS>
    static inline void multiply(float (&d)[N / 8][4], unsigned long long a, unsigned long long b) {
        emu_wgmma(EMU_TYPE, d[0], N, NULL, a, b, (A ? EMU_A_MN : 0) | (B ? EMU_B_MN : 0));
    }
    template <int A = OVER_COLS, int B = OVER_COLS>
    static inline void multiply_over(float (&d)[N / 8][4], unsigned long long a,
                                     unsigned long long b) {
        multiply<A, B>(d, a, b);
    }
    template <int A = OVER_COLS, int B = OVER_COLS>
    static inline void multiply_add(float (&d)[N / 8][4], unsigned long long a,
                                    unsigned long long b) {
        emu_wgmma(EMU_TYPE, d[0], N, NULL, a, b,
                  EMU_ACCUMULATE | (A ? EMU_A_MN : 0) | (B ? EMU_B_MN : 0));
    }
    template <int B = OVER_ROWS>
    static inline void multiply(float (&d)[N / 8][4], const unsigned (&a)[4],
                                unsigned long long b) {
        emu_wgmma(EMU_TYPE, d[0], N, a, 0, b, B ? EMU_B_MN : 0);
    }
    template <int B = OVER_ROWS>
    static inline void multiply_over(float (&d)[N / 8][4], const unsigned (&a)[4],
                                     unsigned long long b) {
        multiply<B>(d, a, b);
    }
    template <int B = OVER_ROWS>
    static inline void multiply_add(float (&d)[N / 8][4], const unsigned (&a)[4],
                                    unsigned long long b) {
        emu_wgmma(EMU_TYPE, d[0], N, a, 0, b, EMU_ACCUMULATE | (B ? EMU_B_MN : 0));
    }
};
