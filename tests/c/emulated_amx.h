/* Intel AMX in plain C: included first, this stands in for csrc/cpu/isa/amx.h, whose names and
 * meaning it has, so that kernels on tiles can be tested where there are none. Tiles that were not
 * configured abort. */
#ifndef FA_ISA_AMX_H
#define FA_ISA_AMX_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static inline int amx_usable(void) {
    return 1;
}

struct emulated_tile {
    uint32_t bits[16][16];
};
static _Thread_local struct {
    int configured;
    struct emulated_tile tile[8];
} emulated_amx;

static inline struct emulated_tile *emulated_tile(int tile) {
    if (!emulated_amx.configured)
        abort();
    return &emulated_amx.tile[tile];
}

/* The instruction sets all tiles to 0. */
static inline void tiles_configure(void) {
    memset(&emulated_amx, 0, sizeof emulated_amx);
    emulated_amx.configured = 1;
}

static inline void tiles_release(void) {
    emulated_amx.configured = 0;
}

static inline void tile_zero(int tile) {
    memset(emulated_tile(tile), 0, sizeof(struct emulated_tile));
}

static inline void tile_load(int tile, const void *p, int64_t stride) {
    for (int i = 0; i < 16; i++)
        memcpy(emulated_tile(tile)->bits[i], (const char *)p + i * stride, 64);
}

static inline void tile_store(int tile, void *p, int64_t stride) {
    for (int i = 0; i < 16; i++)
        memcpy((char *)p + i * stride, emulated_tile(tile)->bits[i], 64);
}

/* The float of these bits; 0 where it is subnormal. */
static inline float emulated_float(uint32_t bits) {
    float x;
    bits = bits & 0x7f800000 ? bits : bits & 0x80000000;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline void tile_dot(int c, int a, int b) {
    const struct emulated_tile *A = emulated_tile(a), *B = emulated_tile(b);
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 16; j++) {
            float sum = emulated_float(emulated_tile(c)->bits[i][j]);
            for (int p = 0; p < 16; p++) {
                sum += emulated_float(A->bits[i][p] << 16) * emulated_float(B->bits[p][j] << 16);
                sum += emulated_float(A->bits[i][p] & 0xffff0000) *
                       emulated_float(B->bits[p][j] & 0xffff0000);
            }
            memcpy(&emulated_tile(c)->bits[i][j], &sum, sizeof sum);
        }
    }
}

#endif
