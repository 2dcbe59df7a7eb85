/* What the scheduler (schedule.c) and the kernels (isa/) agree on. */
#ifndef FA_CPU_KERNELS_H
#define FA_CPU_KERNELS_H

#include "../flash_attention.h"

/* Tile sizes, the same for every instruction set.
 *
 * FA_BLOCK_M queries: as many lanes as the widest gemm panel (4 vectors of 16 floats).
 * FA_TILE_BLOCKS blocks of queries share what a tile reads of K and V from L2 and beyond, and what
 *                is packed of V; their O and Q stay in L2.
 * FA_BLOCK_N keys:    a score tile is 32 KiB of floats; it stays in L1 and L2 beside O and Q.
 * FA_BLOCK_N_BACKWARD keys: dK and dV of a tile stay in L2 while all queries pass by; the longer
 *                     the tile, the less often Q, dO and dQ are read again. */
enum { FA_BLOCK_M = 64, FA_TILE_BLOCKS = 4, FA_BLOCK_N = 128, FA_BLOCK_N_BACKWARD = 256 };

/* The query heads of one key head, one after the other, are a group: (Hq / Hk) * Sq rows. A query
 * tile is a run of a group's rows, so a tile can span heads and decoding fills one with heads. */
struct fa_query_tile {
    int64_t batch, head_k;
    int64_t first_row;
    int rows;                   /* 1 .. FA_TILE_BLOCKS * FA_BLOCK_M */
    int64_t key_begin, key_end; /* keys to look at, before the window narrows them */
    void *partial;              /* where to leave unnormalised results of at most FA_BLOCK_M rows;
                                   NULL: write out and lse */
};

/* The keys that one backward task handles, one tile of every `count` of a head: the tile `index`,
 * in the next round the one as far from the end, and so on, which is fair to all shares also where
 * a causal mask leaves less and less of the tiles. */
struct fa_key_share {
    int64_t batch, head_k;
    int64_t index, count;
    void *dq; /* sum dq here, acc [(Hq / Hk) * Sq, D in whole vectors]; NULL: in its own tensor */
};

/* The kernels of one instruction set for one dtype. Scratch is private to a thread. */
struct fa_cpu_kernels {
    size_t (*forward_scratch)(const struct fa_params *p, int rows); /* of a tile */
    void (*forward_tile)(const struct fa_params *p, const struct fa_query_tile *t, void *scratch);
    size_t (*forward_partial)(const struct fa_params *p); /* bytes of a tile's partial result */
    void (*forward_merge)(const struct fa_params *p, const struct fa_query_tile *t,
                          const void *partials, int count, void *scratch);

    size_t (*backward_scratch)(const struct fa_params *p);
    void (*backward_keys)(const struct fa_params *p, const struct fa_key_share *share,
                          void *scratch);
    int (*dq_in_place)(const struct fa_params *p);    /* whether dq is summed in its own tensor */
    size_t (*backward_dq)(const struct fa_params *p); /* bytes of one dq buffer */
    /* Rows [begin, end) of a group's dq = scale * the sum of `count` buffers, one after the other,
     * and of what is in the tensor itself where that is possible. */
    void (*backward_store_dq)(const struct fa_params *p, int64_t batch, int64_t head_k,
                              int64_t begin, int64_t end, const void *buffers, int count);
};

/* Kernels by enum fa_dtype; the last two files have bf16 ones alone. */
extern const struct fa_cpu_kernels fa_cpu_generic[4];
extern const struct fa_cpu_kernels fa_cpu_avx2[4];
extern const struct fa_cpu_kernels fa_cpu_avx512[4];
extern const struct fa_cpu_kernels fa_cpu_avx512_bf16;
extern const struct fa_cpu_kernels fa_cpu_amx_bf16;

/* The kernels in use for a call that fa_cpu_supports (dispatch.c). */
const struct fa_cpu_kernels *fa_cpu_kernels_for(const struct fa_params *p);

static inline int64_t fa_min(int64_t a, int64_t b) {
    return a < b ? a : b;
}
static inline int64_t fa_max(int64_t a, int64_t b) {
    return a > b ? a : b;
}
static inline int64_t fa_div_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}
static inline int64_t fa_round_up(int64_t a, int64_t b) {
    return fa_div_up(a, b) * b;
}

/* Takes the next `bytes` of scratch memory, keeping to cache lines. With a cursor that started at
 * 0 this only counts. */
static inline void *fa_take(uintptr_t *cursor, size_t bytes) {
    uintptr_t here = *cursor;
    *cursor += (bytes + 63) / 64 * 64;
    return (void *)here;
}

static inline int64_t fa_heads_per_group(const struct fa_params *p) {
    return p->heads_k ? p->heads_q / p->heads_k : 0;
}

/* --- the window --- */

static inline int fa_is_windowed(const struct fa_params *p) {
    return p->window_left >= 0 || p->window_right >= 0;
}
/* A sum that cannot overflow: far beyond any length, one distance is like another. */
static inline int64_t fa_far_sum(int64_t a, int64_t b) {
    const int64_t far = (int64_t)1 << 60;
    return fa_max(-far, fa_min(a, far)) + fa_max(-far, fa_min(b, far));
}
/* The keys that query i sees are [fa_key_begin, fa_key_end), both within [0, Sk]. */
static inline int64_t fa_key_begin(const struct fa_params *p, int64_t i) {
    if (p->window_left < 0)
        return 0;
    int64_t key = fa_far_sum(fa_far_sum(i, p->diagonal_offset), -p->window_left);
    return fa_max(0, fa_min(key, p->seq_k));
}
static inline int64_t fa_key_end(const struct fa_params *p, int64_t i) {
    if (p->window_right < 0)
        return p->seq_k;
    int64_t key = fa_far_sum(fa_far_sum(i, p->diagonal_offset), p->window_right);
    return fa_max(0, fa_min(fa_far_sum(key, 1), p->seq_k));
}

#endif
