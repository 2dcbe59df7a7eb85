/* A GPU made of the CPU: what the instructions of a kernel are to the emulator. The kernels are
 * compiled by the host's C++ compiler, with cuda.h for what CUDA adds to C++ and the headers of
 * emulator/ptx in place of those of csrc/cuda/kernels/ptx; these call what is declared here.
 *
 *     driver.c        stands in for libcuda and NVRTC: compiles a kernel, loads it, launches a grid
 *     block.c         runs a block: its threads are fibers that take turns where they meet or wait
 *     barriers.c      bar.sync, mbarriers
 *     shared.c        shared memory, and what copies to it and from it behind the threads' backs
 *     tensor_cores.c  ldmatrix, mma.sync, wgmma, and the number formats
 *
 * What hardware does some time between the start of an instruction and the wait for it happens here
 * as late as it can, and until then its results are NaN; what it reads meanwhile must not change.
 */
#ifndef EMULATOR_H
#define EMULATOR_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* --- block.c --- */

struct emu_index {
    unsigned x, y, z;
};
extern struct emu_index emu_thread, emu_block, emu_block_size, emu_grid_size;

/* Ends the launch with a report of where the thread is. */
void emu_fail(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

/* All threads of a warp have to come to the same instruction; the last one then carries it out:
 * `run` gets what each lane passed as `mine`, NULL for those that have ended. */
void emu_meet(const char *instruction, void (*run)(void *const lanes[32]), void *mine);
/* Likewise, by a warp that is complete. */
void emu_meet_all(const char *instruction, void (*run)(void *const lanes[32]), void *mine);

unsigned emu_shuffle(unsigned x, unsigned from_lane);
unsigned emu_ballot(int predicate);
void emu_sync_warp(void);
void emu_yield(void); /* by one who looks again and again whether something has changed */

/* --- barriers.c --- */

void emu_barrier(int barrier, int threads, int wait); /* threads 0: all that have not ended */
void emu_cluster_barrier(void);                       /* by all threads of the cluster */
void emu_registers(int count);                        /* of a thread, from now on */
void emu_mbarrier_init(unsigned address, unsigned arrivals);
void emu_mbarrier_arrive(unsigned address);
void emu_mbarrier_expect(unsigned address, unsigned bytes); /* without arriving */
/* Whether the phase has ended; if not, waits for that, or comes back early. */
int emu_mbarrier_try_wait(unsigned address, unsigned phase);

/* --- shared.c: addresses in shared memory are as those of `shared_address` --- */

enum { EMU_MAX_DYNAMIC = 227 << 10 }; /* bytes, of which the block gets the first */
unsigned emu_shared_address(const void *p);
/* The same place in a block of the cluster, for mbarriers and copies. */
unsigned emu_address_in_block(unsigned address, unsigned block);
void emu_load_shared(void *to, unsigned address, unsigned bytes);
void emu_store_shared(unsigned address, const void *from, unsigned bytes);
void emu_fence_proxy_async(void);
void emu_check_global(const void *p, unsigned alignment); /* of vector accesses */

/* 16 bytes of which the last are zeros; groups as in PTX. */
void emu_cp_async(unsigned to, const void *from, unsigned bytes);
void emu_cp_async_commit(void);
void emu_cp_async_wait(unsigned pending);

/* The copy engine. Boxes of `map`, at the coordinates `at`; or bytes, at multiples of 16. */
enum emu_bulk { EMU_STORE, EMU_ADD };
void emu_tma_load(unsigned to, const void *map, const int *at, unsigned mbarrier);
void emu_bulk_send(unsigned to, unsigned from, unsigned bytes, unsigned mbarrier);
void emu_tma_store(enum emu_bulk kind, const void *map, const int *at, unsigned from);
void emu_bulk_load(unsigned to, const void *from, unsigned bytes, unsigned mbarrier);
void emu_bulk_store(enum emu_bulk kind, void *to, unsigned from, unsigned bytes); /* adds floats */
void emu_bulk_commit(void);
void emu_bulk_wait(unsigned pending);

/* --- tensor_cores.c --- */

enum emu_type { EMU_FP16, EMU_BF16 };
unsigned short emu_to_half(enum emu_type type, float x); /* to nearest, even */
float emu_from_half(enum emu_type type, unsigned short x);

void emu_ldmatrix(unsigned r[4], unsigned address, int transposed);
void emu_stmatrix(unsigned address, const unsigned r[4], int transposed);
void emu_mma_16x8x16(enum emu_type type, float d[4], const unsigned a[4], const unsigned b[2]);
void emu_mma_16x8x8_tf32(float d[4], const unsigned a[4], const unsigned b[2]);

/* D[64][columns] = A B or, ACCUMULATE, += A B. Operands in shared memory are given by descriptors;
 * A may be in registers. MN: the operand is stored with its rows (of A), its columns (of B) side by
 * side, K lines of them, as "transposed" as wgmma can take it. */
enum emu_wgmma { EMU_ACCUMULATE = 1, EMU_A_MN = 2, EMU_B_MN = 4 };
void emu_wgmma(enum emu_type type, float *d, int columns, const unsigned *a_registers, uint64_t a,
               uint64_t b, int flags);
void emu_wgmma_fence(void);
void emu_wgmma_commit(void);
void emu_wgmma_wait(unsigned pending);

#ifdef __cplusplus
}
#endif
#endif
