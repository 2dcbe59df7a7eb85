/* Which kernels a call takes, what each is compiled for, and the size of its tiles. */
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../check.h"
#include "../kernels/params.h"
#include "engine.h"

static const struct {
    const char *file, *entry;
} kernels[] = {
    [FA_CUDA_FORWARD] = {"forward_sm80.cu", "fa_forward"},
    [FA_CUDA_PREPARE] = {"backward_prepare.cu", "fa_backward_prepare"},
    [FA_CUDA_BACKWARD] = {"backward_sm80.cu", "fa_backward"},
    [FA_CUDA_CONVERT] = {"backward_convert.cu", "fa_backward_convert"},
    [FA_CUDA_BACKWARD_DQ] = {"backward_dq_sm80.cu", "fa_backward_dq"},
    [FA_CUDA_BACKWARD_MASK] = {"backward_mask_sm80.cu", "fa_backward_mask"},
    [FA_CUDA_FORWARD_SM90] = {"forward_sm90.cu", "fa_forward_sm90"},
    [FA_CUDA_MASK_MAP_SM90] = {"mask_map_sm90.cu", "fa_mask_map_sm90"},
    [FA_CUDA_FORWARD_F32_SM90] = {"forward_f32_sm90.cu", "fa_forward_f32_sm90"},
    [FA_CUDA_BACKWARD_SM90] = {"backward_sm90.cu", "fa_backward_sm90"},
    [FA_CUDA_BACKWARD_WIDE_SM90] = {"backward_wide_sm90.cu", "fa_backward_wide_sm90"},
    [FA_CUDA_BACKWARD_F32_SM90] = {"backward_f32_sm90.cu", "fa_backward_f32_sm90"},
};

const char *fa_cuda_file(const struct fa_cuda_variant *v) {
    return kernels[v->kernel].file;
}
const char *fa_cuda_entry(const struct fa_cuda_variant *v) {
    return kernels[v->kernel].entry;
}

/* The choice, once it is made. Threads that race to make it make the same one. */
static _Atomic(const char *) kernels_taken;

const char *fa_cuda_kernels(void) {
    const char *name = atomic_load_explicit(&kernels_taken, memory_order_relaxed);
    if (!name) {
        name = getenv("FLASH_ATTN_EXT_CUDA_KERNELS");
        name = name && *name ? name : "best";
        atomic_store_explicit(&kernels_taken, name, memory_order_relaxed);
    }
    return name;
}

static int are_portable(void) {
    return strcmp(fa_cuda_kernels(), "portable") == 0;
}

enum fa_status fa_cuda_set_kernels(const char *name) {
    static const char *const names[] = {"best", "portable"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strcmp(name, names[i]) == 0) {
            atomic_store_explicit(&kernels_taken, names[i], memory_order_relaxed);
            return FA_OK;
        }
    }
    return fa_cuda_fail(FA_INVALID, "kernels: \"best\" or \"portable\", not \"%s\"", name);
}

/* What products are made of: kernels/operand.cuh. */
enum operand { HALF = 1, TF32 = 2, TWO_TF32 = 4, FLOAT = TF32 | TWO_TF32 };

/* Features of a call; MANY: it has more blocks of 128 queries than the device multiprocessors. */
enum { MASK = 1, DROPOUT = 2, MANY = 4 };

/* Tiles of block_m queries x block_n keys, worked on by `threads`, with room for `stages` tiles of
 * what passes by. The first row is taken that is for the kernel, for the operand and the features,
 * has room for the head size and fits `resident` times into the shared memory of a multiprocessor.
 */
static const struct tile {
    int kernel;
    int operand;      /* one or several */
    int max_head_dim; /* the larger of D and Dv */
    int without;      /* only calls without these */
    int block_m, block_n, threads, stages, resident;
} tiles[] = {
    /* A block to a multiprocessor is a warp to each of its four parts, alone with all its waiting:
     * so blocks of half the queries, 4 warps of 16. */
    {FA_CUDA_FORWARD, HALF, 64, MANY, 64, 64, 128, 2, 2},
    {FA_CUDA_FORWARD, HALF, 128, MANY, 64, 64, 128, 2, 1},
    /* 4 warps of 32 queries: each operand that a warp loads of K and V serves two products, else
     * shared memory is the limit. A thread holds Dv registers of O, block_n of S and block_n / 4 of
     * P, of 255, with Q among them up to 64. Two blocks: one multiplies, one is at its softmax. */
    {FA_CUDA_FORWARD, HALF, 64, 0, 128, 64, 128, 2, 2},
    {FA_CUDA_FORWARD, HALF, 64, MASK, 128, 64, 128, 1, 2},
    {FA_CUDA_FORWARD, HALF, 64, 0, 128, 48, 128, 1, 2},
    {FA_CUDA_FORWARD, HALF, 128, MASK | DROPOUT, 128, 64, 128, 2, 2},
    {FA_CUDA_FORWARD, HALF, 128, 0, 128, 48, 128, 2, 2},
    {FA_CUDA_FORWARD, HALF, 128, MASK | DROPOUT, 128, 64, 128, 1, 2},
    {FA_CUDA_FORWARD, HALF, 128, DROPOUT, 128, 32, 128, 2, 2},
    {FA_CUDA_FORWARD, HALF, 128, 0, 128, 32, 128, 1, 2},
    {FA_CUDA_FORWARD, HALF, 128, 0, 64, 32, 128, 1, 2}, /* 99 KiB */
    /* 4 warps of 16 queries: half of that. */
    {FA_CUDA_FORWARD, HALF, 256, MASK | DROPOUT, 64, 64, 128, 1, 2},
    {FA_CUDA_FORWARD, HALF, 256, 0, 64, 32, 128, 1, 2},
    {FA_CUDA_FORWARD, HALF, 256, 0, 64, 32, 128, 1, 1}, /* 99 KiB */
    /* P takes block_n / 2. */
    {FA_CUDA_FORWARD, TF32, 64, 0, 128, 32, 128, 2, 2},
    {FA_CUDA_FORWARD, TF32, 64, 0, 64, 32, 128, 1, 2}, /* 99 KiB */
    {FA_CUDA_FORWARD, TF32, 128, MASK | DROPOUT, 128, 32, 128, 1, 2},
    {FA_CUDA_FORWARD, TF32, 128, 0, 128, 16, 128, 1, 2},
    {FA_CUDA_FORWARD, TF32, 128, 0, 64, 32, 128, 1, 2},
    {FA_CUDA_FORWARD, TF32, 128, 0, 64, 32, 128, 1, 1}, /* 99 KiB */
    {FA_CUDA_FORWARD, TF32, 256, 0, 64, 16, 128, 1, 2},
    {FA_CUDA_FORWARD, TF32, 256, 0, 64, 16, 128, 1, 1}, /* 99 KiB */
    /* Twice the operands, and sums on their way to O; but three products for each operand. What
     * counts is how often one is split: a warp of 32 queries does it half as often with K and V as
     * two of 16, for which there is no room at 128; there more keys spare Q some of it. */
    {FA_CUDA_FORWARD, TWO_TF32, 64, 0, 128, 32, 128, 2, 2},
    {FA_CUDA_FORWARD, TWO_TF32, 64, 0, 64, 32, 128, 1, 2}, /* 99 KiB */
    {FA_CUDA_FORWARD, TWO_TF32, 128, MASK | DROPOUT, 64, 64, 128, 1, 2},
    {FA_CUDA_FORWARD, TWO_TF32, 128, 0, 64, 48, 128, 1, 2},
    {FA_CUDA_FORWARD, TWO_TF32, 128, 0, 64, 32, 128, 1, 2},
    {FA_CUDA_FORWARD, TWO_TF32, 128, 0, 64, 32, 128, 1, 1}, /* 99 KiB */
    {FA_CUDA_FORWARD, TWO_TF32, 256, 0, 64, 16, 128, 1, 2},
    {FA_CUDA_FORWARD, TWO_TF32, 256, 0, 64, 16, 128, 1, 1}, /* 99 KiB */

    /* A thread of 256 holds (D + Dv) block_n / 256 registers of dK and dV, block_m block_n / 128 of
     * S and dP, and block_m D / 256 of dQ. Two stages for 227 KiB; then what fits into the 163 KiB
     * of sm_80 and the 99 KiB of sm_86, sm_89 and sm_120. */
    {FA_CUDA_BACKWARD, HALF, 64, MASK, 128, 128, 256, 2, 1},
    {FA_CUDA_BACKWARD, HALF, 64, 0, 64, 128, 256, 2, 1},
    {FA_CUDA_BACKWARD, HALF, 64, 0, 64, 128, 256, 1, 1},
    {FA_CUDA_BACKWARD, HALF, 128, 0, 64, 128, 256, 2, 1},
    {FA_CUDA_BACKWARD, HALF, 128, 0, 64, 128, 256, 1, 1},
    {FA_CUDA_BACKWARD, HALF, 128, 0, 64, 64, 256, 1, 1},
    {FA_CUDA_BACKWARD, HALF, 256, 0, 64, 64, 256, 2, 1},
    {FA_CUDA_BACKWARD, HALF, 256, 0, 64, 64, 256, 1, 1},
    {FA_CUDA_BACKWARD, HALF, 256, 0, 32, 32, 128, 1, 1},
    {FA_CUDA_BACKWARD, FLOAT, 64, 0, 64, 128, 256, 2, 1},
    {FA_CUDA_BACKWARD, FLOAT, 64, 0, 64, 64, 256, 2, 1},
    {FA_CUDA_BACKWARD, FLOAT, 64, 0, 32, 64, 256, 2, 1},
    {FA_CUDA_BACKWARD, FLOAT, 128, 0, 64, 64, 256, 1, 1},
    {FA_CUDA_BACKWARD, FLOAT, 128, 0, 32, 64, 256, 1, 1},
    {FA_CUDA_BACKWARD, FLOAT, 256, 0, 32, 64, 256, 1, 1},
    {FA_CUDA_BACKWARD, FLOAT, 256, 0, 32, 32, 128, 1, 1},
    {FA_CUDA_BACKWARD, FLOAT, 256, 0, 16, 32, 64, 1, 1},

    /* A warp for 16 queries: a thread holds D / 2 registers of dQ and block_n of S and dP. */
    {FA_CUDA_BACKWARD_DQ, HALF, 128, 0, 128, 64, 256, 2, 1},
    {FA_CUDA_BACKWARD_DQ, HALF, 128, 0, 64, 64, 128, 1, 1},
    {FA_CUDA_BACKWARD_DQ, HALF, 256, MASK, 128, 64, 256, 1, 1},
    {FA_CUDA_BACKWARD_DQ, HALF, 256, MASK, 64, 64, 128, 1, 1},
    {FA_CUDA_BACKWARD_DQ, HALF, 256, 0, 64, 32, 128, 1, 1},
    {FA_CUDA_BACKWARD_DQ, HALF, 256, 0, 32, 32, 64, 1, 1},
    {FA_CUDA_BACKWARD_MASK, HALF, 256, 0, 64, 32, 128, 1, 1},
    {FA_CUDA_BACKWARD_MASK, HALF, 256, 0, 32, 32, 64, 1, 1},
    {FA_CUDA_BACKWARD_DQ, FLOAT, 64, 0, 128, 64, 256, 2, 1},
    {FA_CUDA_BACKWARD_DQ, FLOAT, 64, 0, 64, 32, 128, 1, 1},
    {FA_CUDA_BACKWARD_DQ, FLOAT, 128, 0, 64, 32, 128, 1, 1},
    {FA_CUDA_BACKWARD_DQ, FLOAT, 256, 0, 32, 16, 64, 1, 1},
    {FA_CUDA_BACKWARD_MASK, FLOAT, 128, 0, 64, 32, 128, 1, 1},
    {FA_CUDA_BACKWARD_MASK, FLOAT, 256, 0, 32, 16, 64, 1, 1},

    {FA_CUDA_PREPARE, HALF | FLOAT, 256, 0, FA_STATS_ROWS, 0, 256, 0, 1},
    {FA_CUDA_CONVERT, HALF | FLOAT, 256, 0, 64, 0, 256, 0, 1},
};

static int operand_of(const struct fa_params *p) {
    return p->dtype != FA_FLOAT32 ? HALF : p->allow_tf32 ? TF32 : TWO_TF32;
}

static int element_bytes(enum fa_dtype dtype) {
    return dtype == FA_FLOAT32 ? 4 : 2;
}

static int round_up_16(int n) {
    return (n + 15) / 16 * 16;
}

/* Bytes of `rows` rows in shared memory: Tile<rows, cols> of kernels/tile.cuh. */
static int tile_bytes(int rows, int cols, int element) {
    return rows * (round_up_16(cols) * element + 16);
}

/* As FA_MASK says it. */
static int mask_kind(const struct fa_params *p) {
    if (!p->mask.data)
        return 0;
    return p->mask.dtype == FA_BOOL ? 1 : p->mask.dtype == FA_FLOAT32 ? 3 : 2;
}

/* What a kernel takes as dynamic shared memory. */
static int shared_bytes(const struct tile *t, const struct fa_params *p) {
    const int head_dim = (int)p->head_dim, head_dim_v = (int)p->head_dim_v;
    const int element = element_bytes(p->dtype);
    const int keys =
        tile_bytes(t->block_n, head_dim, element) + tile_bytes(t->block_n, head_dim_v, element);
    const int queries =
        tile_bytes(t->block_m, head_dim, element) + tile_bytes(t->block_m, head_dim_v, element);
    switch (t->kernel) {
    case FA_CUDA_FORWARD: /* Q, stages of K and V; O in their place */
        return max(tile_bytes(t->block_m, head_dim, element) + t->stages * keys,
                   tile_bytes(t->block_m, head_dim_v, element));
    case FA_CUDA_BACKWARD: /* K, V, P, dS, a mask, and the stages of Q, dO and their row_stats */
        return keys + 2 * tile_bytes(t->block_n, t->block_m, element) +
               (mask_kind(p) == 2 ? tile_bytes(t->block_m, t->block_n, element) : 0) +
               t->stages * (queries + t->block_m * 2 * (int)sizeof(float));
    case FA_CUDA_BACKWARD_DQ: /* Q, dO, and the stages of K and V */
    case FA_CUDA_BACKWARD_MASK:
        return queries + t->stages * keys;
    case FA_CUDA_CONVERT: /* dQ */
        return tile_bytes(t->block_m, head_dim, element);
    default:
        return 0;
    }
}

/* What a block takes besides, at most: sums over the queries of four warps that a kernel declares,
 * and 1 KiB of the system. */
enum { OTHER_SHARED = 2048 };

/* What a multiprocessor has (CUDA C++ Programming Guide, technical specifications). */
static int shared_limit(int arch) {
    switch (arch) {
    case 80:
    case 87:
        return 164 << 10;
    case 86:
    case 89:
        return 100 << 10;
    default:
        return arch / 10 == 12 ? 100 << 10 : 228 << 10;
    }
}

static const struct tile *find_tile(int kernel, const struct fa_params *p, int arch, int sm_count) {
    const int head_dim = fa_cuda_larger_head_dim(p);
    const int64_t blocks = p->batch * p->heads_q * div_up(p->seq_q, 128);
    const int features = (p->mask.data ? MASK : 0) | (p->dropout_p > 0 ? DROPOUT : 0) |
                         (blocks > sm_count ? MANY : 0);
    for (size_t i = 0; i < sizeof tiles / sizeof *tiles; i++) {
        const struct tile *t = &tiles[i];
        if (t->kernel == kernel && t->operand & operand_of(p) && head_dim <= t->max_head_dim &&
            !(t->without & features) &&
            t->resident * (shared_bytes(t, p) + OTHER_SHARED) <= shared_limit(arch))
            return t;
    }
    return NULL;
}

static int is_backward(const struct fa_params *p) {
    return p->dout.data != NULL;
}

int fa_cuda_has_window(const struct fa_params *p) {
    return p->window_left >= 0 || p->window_right >= 0;
}

/* Blocks of FA_CUDA_BACKWARD_MASK for a head: tiles of the gradient. */
static int64_t mask_grad_blocks(const struct fa_params *p, const struct tile *t) {
    return (p->dmask.stride_row ? div_up(p->seq_q, t->block_m) : 1) *
           (p->dmask.stride_col ? div_up(p->seq_k, t->block_n) : 1);
}

enum fa_status fa_cuda_check(const struct fa_params *p, int arch) {
#define REQUIRE(CONDITION, STATUS, ...)                                                            \
    if (!(CONDITION))                                                                              \
        return fa_cuda_fail(STATUS, __VA_ARGS__);
    const char *invalid = fa_check(p);
    REQUIRE(!invalid, FA_INVALID, "%s", invalid)
    REQUIRE(are_portable() || strcmp(fa_cuda_kernels(), "best") == 0, FA_INVALID,
            "FLASH_ATTN_EXT_CUDA_KERNELS=%s: must be best or portable", fa_cuda_kernels())
    REQUIRE(arch >= 80, FA_UNSUPPORTED, "the kernels need compute capability 8.0, this is %d.%d",
            arch / 10, arch % 10)
    REQUIRE(p->dtype != FA_FLOAT64, FA_UNSUPPORTED,
            "dtype: the CUDA kernels are for float32, float16 and bfloat16")
    REQUIRE(p->head_dim > 0 && p->head_dim_v > 0 &&
                find_tile(is_backward(p) ? FA_CUDA_BACKWARD : FA_CUDA_FORWARD, p, arch, -1),
            FA_UNSUPPORTED,
            "head size: the CUDA kernels are for 1 to 256; here the tiles of %d and %d do not fit",
            (int)p->head_dim, (int)p->head_dim_v)
    REQUIRE(p->seq_q <= FA_CUDA_FAR && p->seq_k <= FA_CUDA_FAR &&
                p->batch * p->heads_q * div_up(p->seq_q > p->seq_k ? p->seq_q : p->seq_k, 32) <=
                    INT_MAX,
            FA_UNSUPPORTED, "seq, heads, batch: too many for one launch")
    REQUIRE(!p->dmask.in_dtype || p->dtype != FA_FLOAT32, FA_UNSUPPORTED,
            "dmask: in_dtype is not for float32 in the CUDA kernels")
    REQUIRE(!p->dmask.data || !p->deterministic ||
                p->batch * p->heads_q *
                        mask_grad_blocks(p, find_tile(FA_CUDA_BACKWARD_MASK, p, arch, -1)) <=
                    INT_MAX,
            FA_UNSUPPORTED, "mask: its gradient is too large for one launch")
    REQUIRE(p->softcap == 0, FA_UNSUPPORTED, "softcap: not in the CUDA kernels")
    REQUIRE(!p->alibi_slopes, FA_UNSUPPORTED, "alibi_slopes: not in the CUDA kernels")
    REQUIRE(!p->sinks, FA_UNSUPPORTED, "sinks: not in the CUDA kernels")
    REQUIRE(!p->cu_seqlens_q && !p->cu_seqlens_k, FA_UNSUPPORTED,
            "cu_seqlens: packed sequences are not in the CUDA kernels")
    REQUIRE(!p->block_table, FA_UNSUPPORTED,
            "block_table: paged keys and values are not in the CUDA kernels")
    REQUIRE(!p->partial_out, FA_UNSUPPORTED, "partial_out: not in the CUDA kernels")
#undef REQUIRE
    return FA_OK;
}

/* Whether each row that a kernel touches starts at a multiple of 16 bytes. The stride of a
 * dimension of size 1 may be anything. */
static int is_aligned(const struct fa_params *p, const struct fa_tensor *t, int64_t heads,
                      int64_t rows) {
    uint64_t bits = 0;
    if (p->batch > 1)
        bits |= (uint64_t)t->stride_batch;
    if (heads > 1)
        bits |= (uint64_t)t->stride_head;
    if (rows > 1)
        bits |= (uint64_t)t->stride_row;
    return (((uintptr_t)t->data | bits * (unsigned)element_bytes(p->dtype)) & 15) == 0;
}

int fa_cuda_is_aligned(const struct fa_params *p) {
    const struct fa_tensor *of_queries[] = {&p->q, &p->out, &p->dout, &p->dq};
    const struct fa_tensor *of_keys[] = {&p->k, &p->v, &p->dk, &p->dv};
    for (int i = 0; i < 4; i++) {
        if (!is_aligned(p, of_queries[i], p->heads_q, p->seq_q) ||
            !is_aligned(p, of_keys[i], p->heads_k, p->seq_k))
            return 0;
    }
    return 1;
}

enum { CACHE = 32 << 20 }; /* of L2, with room for what passes by */

/* Heads of keys that fit into a cache together, in groups of one size: a small one at the end would
 * have no short blocks to go with its long ones. */
static int group_of_heads(const struct fa_params *p, int64_t bytes_of_head, int64_t cache) {
    const int64_t heads = p->batch * p->heads_k;
    const int64_t fit = bytes_of_head && bytes_of_head < cache ? cache / bytes_of_head : 1;
    const int64_t groups = div_up(heads, fit);
    return groups ? (int)div_up(heads, groups) : 1;
}

static int heads_per_key_head(const struct fa_params *p) {
    return p->heads_k ? (int)(p->heads_q / p->heads_k) : 1;
}

/* K and V go past blocks of queries. */
int fa_cuda_group_for_queries(const struct fa_params *p, int64_t cache) {
    const int64_t row = (p->head_dim + p->head_dim_v) * element_bytes(p->dtype);
    return group_of_heads(p, p->seq_k * row, cache) * heads_per_key_head(p);
}

/* For blocks of keys, past which Q and dO go: with the sum of dQ, and K, V, dK and dV. */
static int group_for_keys(const struct fa_params *p) {
    const int64_t row = (p->head_dim + p->head_dim_v) * element_bytes(p->dtype);
    const int64_t rows_q = p->seq_q * heads_per_key_head(p);
    return group_of_heads(p, rows_q * (row + p->head_dim * (int)sizeof(float)) + p->seq_k * 2 * row,
                          CACHE);
}

static struct fa_cuda_step step(int kernel, const struct fa_params *p, int arch, int sm_count) {
    const struct tile *t = find_tile(kernel, p, arch, sm_count);
    struct fa_cuda_step s = {
        .variant = {.kernel = (uint8_t)kernel,
                    .dtype = (uint8_t)p->dtype,
                    .aligned = (uint8_t)fa_cuda_is_aligned(p),
                    .head_dim = (uint16_t)p->head_dim,
                    .head_dim_v = (uint16_t)p->head_dim_v,
                    .block_m = (uint16_t)t->block_m,
                    .block_n = (uint16_t)t->block_n,
                    .threads = (uint16_t)t->threads,
                    .stages = (uint8_t)t->stages,
                    .arch = (uint16_t)arch},
        .blocks = (int)div_up(p->seq_q, t->block_m),
        .heads = (int)p->heads_q,
        .group_heads = fa_cuda_group_for_queries(p, CACHE),
        .shared_bytes = (unsigned)shared_bytes(t, p),
    };
    if (kernel != FA_CUDA_PREPARE && kernel != FA_CUDA_CONVERT) {
        s.variant.tf32 = p->dtype == FA_FLOAT32 && p->allow_tf32;
        s.variant.mask = (uint8_t)mask_kind(p);
        s.variant.window = (uint8_t)fa_cuda_has_window(p);
        s.variant.dropout = p->dropout_p > 0;
    }
    if (kernel == FA_CUDA_BACKWARD) {
        if (p->dmask.data)
            s.variant.mask_grad = p->dmask.in_dtype             ? 3
                                  : !fa_mask_grad_broadcasts(p) ? 2
                                                                : !p->deterministic;
        s.blocks = (int)div_up(p->seq_k, t->block_n);
        s.heads = (int)p->heads_k;
        s.group_heads = group_for_keys(p);
    }
    if (kernel == FA_CUDA_BACKWARD_MASK)
        s.blocks = (int)mask_grad_blocks(p, t);
    return s;
}

/* Makes the step of a main kernel one of its sibling for sm_90a, or says why not. */
static void try_sm90(const struct fa_params *p, int arch, struct fa_cuda_step *s) {
    static const struct sibling {
        const char *(*why_not)(const struct fa_params *p, int arch);
        void (*plan)(const struct fa_params *p, struct fa_cuda_step *s);
    } of_half[] = {{fa_cuda_not_forward_sm90, fa_cuda_forward_sm90},
                   {fa_cuda_not_backward_sm90, fa_cuda_backward_sm90}},
      of_float[] = {{fa_cuda_not_forward_f32_sm90, fa_cuda_forward_f32_sm90},
                    {fa_cuda_not_backward_f32_sm90, fa_cuda_backward_f32_sm90}};
    const struct sibling *sibling = &(p->dtype == FA_FLOAT32 ? of_float : of_half)[is_backward(p)];
    s->not_sm90 =
        are_portable() ? "only portable kernels are asked for" : sibling->why_not(p, arch);
    if (!s->not_sm90)
        sibling->plan(p, s);
}

int fa_cuda_plan(const struct fa_params *p, int arch, int sm_count,
                 struct fa_cuda_step steps[FA_CUDA_MAX_STEPS]) {
    int count = 0;
    if (!is_backward(p)) {
        struct fa_cuda_step forward = step(FA_CUDA_FORWARD, p, arch, sm_count);
        try_sm90(p, arch, &forward);
        if (!forward.not_sm90 && fa_cuda_mask_map_bytes(p, arch))
            steps[count++] = fa_cuda_mask_map(p, &forward);
        steps[count++] = forward;
        return count;
    }
    steps[count++] = step(FA_CUDA_PREPARE, p, arch, sm_count);
    struct fa_cuda_step *backward = &steps[count++];
    *backward = step(FA_CUDA_BACKWARD, p, arch, sm_count);
    try_sm90(p, arch, backward);
    if (p->dq.data) {
        struct fa_cuda_step *last = &steps[count++];
        *last = step(p->deterministic ? FA_CUDA_BACKWARD_DQ : FA_CUDA_CONVERT, p, arch, sm_count);
        if (!p->deterministic)
            last->variant.dq_transposed = backward->variant.dq_transposed;
    }
    if (p->dmask.data && p->deterministic && fa_mask_grad_broadcasts(p))
        steps[count++] = step(FA_CUDA_BACKWARD_MASK, p, arch, sm_count);
    return count;
}

void fa_cuda_options(const struct fa_cuda_variant *v, char options[FA_CUDA_OPTIONS_BYTES]) {
    char *at = options, *end = options + FA_CUDA_OPTIONS_BYTES - 1;
#define ADD(...) at += snprintf(at, (size_t)(end - at), __VA_ARGS__) + 1
    /* wgmma and setmaxnreg are in sm_90a alone */
    ADD("--gpu-architecture=sm_%d%s", v->arch, v->arch == 90 ? "a" : "");
    ADD("--std=c++17");
    ADD("--ptxas-options=-v"); /* registers and spills, into the log */
    ADD("-DFA_DTYPE_FP16=%d", v->dtype == FA_FLOAT16);
    ADD("-DFA_DTYPE_BF16=%d", v->dtype == FA_BFLOAT16);
    ADD("-DFA_DTYPE_FP32=%d", v->dtype == FA_FLOAT32);
    ADD("-DFA_TF32=%d", v->tf32);
    ADD("-DFA_ALIGNED=%d", v->aligned);
    ADD("-DFA_MASK=%d", v->mask);
    ADD("-DFA_WINDOW=%d", v->window);
    ADD("-DFA_DROPOUT=%d", v->dropout);
    ADD("-DFA_MASK_GRAD=%d", v->mask_grad);
    ADD("-DFA_DQ_TRANSPOSED=%d", v->dq_transposed);
    ADD("-DHEAD_DIM=%d", v->head_dim);
    ADD("-DHEAD_DIM_V=%d", v->head_dim_v);
    ADD("-DBLOCK_M=%d", v->block_m);
    ADD("-DBLOCK_N=%d", v->block_n);
    ADD("-DTHREADS=%d", v->threads);
    ADD("-DSTAGES=%d", v->stages);
    /* of sm_90a */
    ADD("-DFA_MASK_TILES=%d", v->mask_tiles);
    ADD("-DQ_BUFFERS=%d", v->q_buffers);
    ADD("-DPING_PONG=%d", v->ping_pong);
    ADD("-DO_PLACE=%d", v->o_place);
#undef ADD
    *at = 0;
}
