/* Intel AMX: eight tile registers of 16 rows of 64 bytes, and a unit that multiplies two of them.
 * One instruction a macro, since the number of a tile is part of the instruction. Not the
 * compiler's intrinsics: GCC's do not say that they read memory. */
#ifndef FA_ISA_AMX_H
#define FA_ISA_AMX_H

#include <cpuid.h>
#include <stdint.h>
#include <sys/syscall.h>

long syscall(long number, ...); /* <unistd.h> has it only with extensions */

/* Whether this processor has tiles of bf16 and the operating system lets this process use them,
 * which Linux wants to be asked for: a thread that does has 8 KiB more to be saved. */
static inline int amx_usable(void) {
    enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 };                /* cpuid 7, edx */
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 }; /* of <asm/prctl.h> */
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_BF16) && (d & AMX_TILE) &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

/* Gives every tile of this thread 16 rows of 64 bytes. */
static inline void tiles_configure(void) {
    const struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {
        .palette = 1,
        .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
        .rows = {16, 16, 16, 16, 16, 16, 16, 16},
    };
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

/* Leaves the tiles as they are where nobody uses them, so that nothing is saved with a thread. */
static inline void tiles_release(void) {
    __asm__ volatile("tilerelease");
}

#define tile_zero(TILE) __asm__ volatile("tilezero %%tmm" #TILE ::)

/* Rows of 64 bytes, `stride` bytes apart. */
#define tile_load(TILE, P, STRIDE)                                                                 \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #TILE ::"r"(P), "r"((int64_t)(STRIDE))           \
                     : "memor"                                                                     \
                       "y")

#define tile_store(TILE, P, STRIDE)                                                                \
    __asm__ volatile("tilestored %%tmm" #TILE ", (%0,%1,1)" ::"r"(P), "r"((int64_t)(STRIDE))       \
                     : "memory")

/* C[i][j] += A[i][2p] * B[p][2j] + A[i][2p + 1] * B[p][2j + 1], summed over p < 16: 16 x 16 sums in
 * f32, subnormal numbers taken as 0. */
#define tile_dot(C, A, B) __asm__ volatile("tdpbf16ps %%tmm" #B ", %%tmm" #A ", %%tmm" #C::)

#endif
