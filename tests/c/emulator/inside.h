/* What the files of the emulator share. */
#ifndef EMULATOR_INSIDE_H
#define EMULATOR_INSIDE_H

#include "emulator.h"

/* Of a kernel in a loaded library, see cuda.h. */
struct emu_kernel {
    void (*call)(void **parameters);                    /* as one thread */
    unsigned char *shared_begin, *shared_end, *dynamic; /* shared memory; EMU_MAX_DYNAMIC of it */
    unsigned cluster;                                   /* blocks */
};

/* --- block.c --- */

enum { MAX_CLUSTER = 2, MAX_THREADS = 1024, LANES = 32, MAX_WARPS = MAX_THREADS / LANES };

/* Of all threads and warps of the cluster; which of its blocks this is. A block without a cluster
 * is one of one block. */
extern int emu_warps;
extern unsigned emu_self, emu_rank;
static inline unsigned emu_warp(void) {
    return emu_self / LANES;
}

/* Until somebody wakes those who wait for `what`, an address. For reports: printf(text, a, b). */
void emu_wait_for(const void *what, const char *text, unsigned a, unsigned b);
void emu_wake(const void *what);

/* Runs all blocks; returns the report of what went wrong, or NULL. Each block of a cluster has the
 * kernel, with its shared memory, from a library of its own. */
const char *emu_run(const struct emu_kernel *const kernels[MAX_CLUSTER], void **parameters,
                    unsigned blocks, unsigned threads, unsigned shared_bytes);

/* 0: threads take turns in their order; else in an order of chance. */
void emu_set_seed(uint64_t seed);
unsigned emu_random(unsigned n);

/* --- called by block.c: a cluster begins; it has ended, and nothing may be under way; nobody can
 * go on, so something has to happen that a thread began (returns whether there was anything); a
 * warp that others may wait for has ended --- */

void emu_barriers_begin(void);
void emu_barriers_warp_ended(void);
void emu_shared_begin(const struct emu_kernel *const kernels[MAX_CLUSTER], unsigned dynamic_bytes);
void emu_shared_end(void);
int emu_shared_happen(void);
void emu_tensor_cores_begin(void);
void emu_tensor_cores_end(void);

/* --- barriers.c --- */

int emu_block_ended(unsigned rank); /* in the cluster */
void emu_mbarrier_complete(unsigned address, unsigned bytes);

/* --- shared.c --- */

/* Shared memory, if these bytes belong to the block, at a multiple of `alignment`. */
void *emu_shared_at(unsigned address, unsigned bytes, unsigned alignment);
/* Likewise, for an instruction that sees only what threads have fenced. */
void *emu_shared_async(unsigned address, unsigned bytes, unsigned alignment);

static inline unsigned emu_swizzle_128b(unsigned address) {
    return address ^ (address >> 7 & 7) << 4;
}

/* What cuTensorMapEncodeTiled leaves in its 128 bytes. */
struct emu_map {
    uint64_t magic;
    unsigned char *data;
    uint64_t stride[4]; /* in bytes, of the dimensions after the first */
    uint32_t size[5];
    uint16_t box[5];
    uint8_t rank, elem_bytes, is_float32, swizzled;
};
#define EMU_MAP_MAGIC UINT64_C(0x70616d20726f736e)

#endif
