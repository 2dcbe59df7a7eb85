/* The forward for sm_90a (kernels/forward_sm90.cu): which calls it takes, its tiles and its tensor
 * maps. */
#include "../kernels/params.h"
#include "engine.h"

/* Tiles of block_m queries x block_n keys; a warpgroup for each 64 queries. A thread holds
 * Dv / 2 registers of O, block_n / 2 of S and block_n / 4 of P; it has 240 registers where two
 * warpgroups compute and 160 where three do. The first row that has room is taken. */
static const struct tile {
    int max_head_dim; /* the larger of D and Dv */
    /* BARE: without mask and dropout, which take registers; FULL: without a window, too. */
    enum calls { ANY, BARE, FULL } calls;
    int min_queries;
    int block_m, block_n, stages;
} tiles[] = {
    {64, BARE, 129, 192, 128, 3},  {96, FULL, 1536, 192, 96, 2},  {96, BARE, 4096, 192, 96, 2},
    {128, FULL, 1536, 192, 80, 2}, {128, BARE, 4096, 192, 80, 2}, {128, ANY, 1, 128, 128, 2},
    {192, BARE, 1, 128, 96, 2},    {256, ANY, 1, 128, 64, 2},
};

/* MaskTile of kernels/mask_tile.cuh. */
static int mask_bytes(const struct fa_cuda_variant *v) {
    return v->mask_tiles == 0 ? 16 : fa_cuda_mask_bytes(v, v->mask_tiles == 2 ? 1 : v->block_m);
}

/* The struct Shared of the kernel. */
static int shared_bytes(const struct fa_cuda_variant *v) {
    enum { BARRIERS = 512 };
    return fa_cuda_panels_bytes(v->block_m, v->head_dim) +
           v->o_place * fa_cuda_panels_bytes(v->block_m, v->head_dim_v) +
           v->stages * (fa_cuda_panels_bytes(v->block_n, v->head_dim) +
                        fa_cuda_panels_bytes(v->block_n, v->head_dim_v) + mask_bytes(v)) +
           BARRIERS;
}

/* The first tile that is for the call and has room in shared memory. */
static int choose_tile(const struct fa_params *p, struct fa_cuda_variant *v) {
    const enum calls calls = v->mask || v->dropout ? ANY : v->window ? BARE : FULL;
    for (size_t i = 0; i < sizeof tiles / sizeof *tiles; i++) {
        const struct tile *t = &tiles[i];
        if (t->max_head_dim < max(v->head_dim, v->head_dim_v) || t->calls > calls ||
            t->min_queries > p->seq_q)
            continue;
        v->block_m = (uint16_t)t->block_m;
        v->block_n = (uint16_t)t->block_n;
        v->stages = (uint8_t)t->stages;
        for (int place = 1; place >= 0; place--) {
            v->o_place = (uint8_t)place;
            if (shared_bytes(v) <= FA_CUDA_SHARED_SM90)
                return 1;
        }
    }
    return 0;
}

/* Whether the warpgroups take turns. Under a window the tiles at the ends of a piece are of some
 * warpgroups alone, but turns are of all: with three and few tiles they keep more waiting than they
 * order. */
static int has_turns(const struct fa_params *p, const struct fa_cuda_variant *v) {
    enum { FEW_KEYS = 1536 };
    if (v->block_m == 192 && v->window)
        return p->seq_k >= FEW_KEYS;
    return max(v->head_dim, v->head_dim_v) <= 128 || v->window;
}

/* 0: the mask is read element by element; 1: in tiles; 2: in tiles of one row. */
static int mask_tiles(const struct fa_params *p, int mask) {
    const int64_t stride[] = {p->mask.stride_col, p->mask.stride_row, p->mask.stride_head,
                              p->mask.stride_batch};
    if (!mask || !fa_cuda_scores_can_be_mapped(p->mask.data, stride, fa_cuda_mask_elem_bytes(mask)))
        return 0;
    return p->mask.stride_row ? 1 : 2;
}

const char *fa_cuda_not_forward_sm90(const struct fa_params *p, int arch) {
    if (arch != 90)
        return "forward_sm90.cu is for compute capability 9.0";
    if (p->dtype != FA_BFLOAT16 && p->dtype != FA_FLOAT16)
        return "forward_sm90.cu is for float16 and bfloat16";
    if (p->seq_q == 0 || p->seq_k == 0)
        return "forward_sm90.cu wants queries and keys";
    if (!fa_cuda_is_aligned(p))
        return "forward_sm90.cu wants rows that start at multiples of 16 bytes";
    if (!fa_cuda_can_be_mapped(&p->q, p->seq_q) || !fa_cuda_can_be_mapped(&p->k, p->seq_k) ||
        !fa_cuda_can_be_mapped(&p->v, p->seq_k) || !fa_cuda_can_be_mapped(&p->out, p->seq_q))
        return "forward_sm90.cu wants strides below 2^30, and no row broadcast";
    return NULL;
}

size_t fa_cuda_counter_bytes(const struct fa_params *p, int arch) {
    /* Without a window all pieces of work are of one size, if tiles of 128 and of 192 queries leave
     * no rest. Dealt out in turns, a rest would fall to the same blocks of the grid every time. */
    const int has_rest = p->seq_q > 128 && p->seq_q % 384;
    return (fa_cuda_has_window(p) || has_rest) && !fa_cuda_not_forward_sm90(p, arch)
               ? sizeof(struct fa_kernel_counter)
               : 0;
}

/* Where each tile of a mask is. */
struct mask_blocks {
    int64_t heads, blocks, words;
};
static struct mask_blocks mask_blocks(const struct fa_params *p, int block_m, int block_n) {
    return (struct mask_blocks){
        .heads = (p->mask.stride_batch ? p->batch : 1) * (p->mask.stride_head ? p->heads_q : 1),
        .blocks = p->mask.stride_row ? div_up(p->seq_q, block_m) : 1,
        .words = div_up(p->seq_k, 32 * block_n),
    };
}

size_t fa_cuda_mask_map_bytes(const struct fa_params *p, int arch) {
    enum { FEW_KEYS = 1024, MIN_BLOCK_M = 128, MIN_BLOCK_N = 64 }; /* of tiles for masks */
    if (!p->mask.data || p->mask.dtype != FA_BOOL || p->seq_k < FEW_KEYS ||
        fa_cuda_not_forward_sm90(p, arch))
        return 0;
    const struct mask_blocks m = mask_blocks(p, MIN_BLOCK_M, MIN_BLOCK_N);
    return (size_t)(m.heads * m.blocks * m.words) * sizeof(unsigned);
}

struct fa_cuda_step fa_cuda_mask_map(const struct fa_params *p,
                                     const struct fa_cuda_step *forward) {
    enum { THREADS = 1024 };
    const struct fa_cuda_variant *v = &forward->variant;
    const struct mask_blocks m = mask_blocks(p, v->block_m, v->block_n);
    return (struct fa_cuda_step){
        .variant = {.kernel = FA_CUDA_MASK_MAP_SM90,
                    .mask = v->mask,
                    .block_m = v->block_m,
                    .block_n = v->block_n,
                    .threads = THREADS,
                    .arch = v->arch},
        .blocks = (int)(m.heads * m.blocks * m.words),
    };
}

void fa_cuda_forward_sm90(const struct fa_params *p, struct fa_cuda_step *step) {
    struct fa_cuda_variant *v = &step->variant;
    v->kernel = FA_CUDA_FORWARD_SM90;
    v->mask_tiles = (uint8_t)mask_tiles(p, v->mask);
    if (!choose_tile(p, v)) {
        v->mask_tiles = 0;
        choose_tile(p, v);
    }
    v->threads = (uint16_t)(128 + 2 * v->block_m);
    v->ping_pong = has_turns(p, v);
    step->blocks = (int)div_up(p->seq_q, v->block_m);
    /* Of long sequences the blocks at work see only a part at a time, so that more heads fit. */
    step->group_heads = fa_cuda_group_for_queries(p, p->seq_k < 2048 ? 32 << 20 : 64 << 20);
    step->shared_bytes = (unsigned)shared_bytes(v);
}

enum fa_status fa_cuda_encode_maps(const struct fa_params *p, const struct fa_cuda_variant *v,
                                   struct fa_cuda_maps *maps) {
    CUresult error =
        fa_cuda_encode_tensor(&maps->q, p, &p->q, p->heads_q, p->seq_q, p->head_dim, 64);
    if (!error)
        error = fa_cuda_encode_tensor(&maps->k, p, &p->k, p->heads_k, p->seq_k, p->head_dim,
                                      v->block_n);
    if (!error)
        error = fa_cuda_encode_tensor(&maps->v, p, &p->v, p->heads_k, p->seq_k, p->head_dim_v,
                                      v->block_n);
    if (!error && v->mask_tiles)
        error = fa_cuda_encode_mask(&maps->mask, p, v, v->mask_tiles == 2 ? 1 : v->block_m);
    return error ? fa_cuda_driver_error("tensor map", error) : FA_OK;
}
