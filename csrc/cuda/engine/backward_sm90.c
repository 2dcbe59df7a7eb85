/* The main kernel of the backward for sm_90a (kernels/backward_sm90.cu, for head sizes above 128
 * kernels/backward_wide_sm90.cu): which calls it takes, its tiles and its tensor maps. */
#include "../kernels/params.h"
#include "engine.h"

/* Two warpgroups own 64 keys each. Of the 200 or 208 registers of a thread dK and dV take
 * (D + Dv) / 2, S and then dP block_m / 2, P and dS block_m / 4 each: 192 (D = 64 and D = 128). Of
 * the wide kernel, with 240, both have the same 64 keys, one dK, the other dV: 208 (D = 256); two
 * of its blocks are a cluster. The first row that has room for the head size is taken. */
static const struct tile {
    int max_head_dim; /* the larger of D and Dv */
    int kernel, block_m, block_n, q_buffers;
} tiles[] = {
    {64, FA_CUDA_BACKWARD_SM90, 128, 128, 3},
    {128, FA_CUDA_BACKWARD_SM90, 64, 128, 3},
    {256, FA_CUDA_BACKWARD_WIDE_SM90, 64, 64, 2},
};
enum { THREADS = 384, STAGES = 2 };

/* As FA_MASK_TILES says it. */
enum { NO_TILES, TILES, ONE_FOR_ALL_QUERIES };

static int is_wide(const struct fa_cuda_variant *v) {
    return v->kernel == FA_CUDA_BACKWARD_WIDE_SM90;
}

/* Of the wide kernel: pieces of a tile of dO, of as many panels each. */
static int pieces(const struct fa_cuda_variant *v) {
    const int panels = (v->head_dim_v + 63) / 64;
    return panels == 4 ? 2 : panels;
}

/* The struct Shared of the kernel. */
static int shared_bytes(const struct fa_cuda_variant *v) {
    enum { BARRIERS = 272 }; /* 16 bytes for no tile of a mask, too */
    const int mask = v->mask_tiles == TILES ? fa_cuda_mask_bytes(v, v->block_m) : 0;
    const int dS = fa_cuda_panels_bytes(v->block_n, v->block_m);
    return fa_cuda_panels_bytes(v->block_n, v->head_dim) +
           fa_cuda_panels_bytes(v->block_n, v->head_dim_v) +
           v->q_buffers * fa_cuda_panels_bytes(v->block_m, v->head_dim) +
           v->stages * fa_cuda_panels_bytes(v->block_m, v->head_dim_v) /
               (is_wide(v) ? pieces(v) : 1) +
           v->q_buffers * v->block_m * 2 * (int)sizeof(float) + BARRIERS + mask +
           (is_wide(v) ? 2 * 2 * dS + fa_cuda_panels_bytes(v->block_n, 128) /* the other block's */
                       : 2 * dS);
}

static const struct tile *find_tile(const struct fa_params *p) {
    const struct tile *t = tiles;
    while (t->max_head_dim < fa_cuda_larger_head_dim(p))
        t++;
    return t;
}

const char *fa_cuda_not_backward_sm90(const struct fa_params *p, int arch) {
    if (arch != 90)
        return "backward_sm90.cu is for compute capability 9.0";
    if (p->dtype != FA_BFLOAT16 && p->dtype != FA_FLOAT16)
        return "backward_sm90.cu is for float16 and bfloat16";
    if (p->seq_q == 0 || p->seq_k == 0)
        return "backward_sm90.cu wants queries and keys";
    if (find_tile(p)->kernel == FA_CUDA_BACKWARD_WIDE_SM90 && p->head_dim <= 64)
        return "backward_wide_sm90.cu wants a head size of queries and keys above 64";
    /* The sum over all keys is 0: it would be made of roundings, and there P is rounded, too. */
    if (p->dmask.data && !p->dmask.stride_col && p->seq_k > 1 && !p->deterministic)
        return "backward_sm90.cu does not add up the gradient of a mask over the keys";
    if (!fa_cuda_is_aligned(p))
        return "backward_sm90.cu wants rows that start at multiples of 16 bytes";
    if (!fa_cuda_can_be_mapped(&p->q, p->seq_q) || !fa_cuda_can_be_mapped(&p->dout, p->seq_q) ||
        !fa_cuda_can_be_mapped(&p->k, p->seq_k) || !fa_cuda_can_be_mapped(&p->v, p->seq_k) ||
        (p->dk.data && !fa_cuda_can_be_mapped(&p->dk, p->seq_k)) ||
        (p->dv.data && !fa_cuda_can_be_mapped(&p->dv, p->seq_k)))
        return "backward_sm90.cu wants strides below 2^30, and no row broadcast";
    return NULL;
}

static int mask_tiles(const struct fa_params *p, int mask) {
    const int64_t stride[] = {p->mask.stride_col, p->mask.stride_row, p->mask.stride_head,
                              p->mask.stride_batch};
    if (!mask)
        return NO_TILES;
    if (!p->mask.stride_row)
        return ONE_FOR_ALL_QUERIES;
    return fa_cuda_scores_can_be_mapped(p->mask.data, stride, fa_cuda_mask_elem_bytes(mask))
               ? TILES
               : NO_TILES;
}

static int mask_grad_can_be_mapped(const struct fa_params *p) {
    const int64_t stride[] = {p->dmask.stride_col, p->dmask.stride_row, p->dmask.stride_head,
                              p->dmask.stride_batch};
    return p->dmask.in_dtype && fa_cuda_scores_can_be_mapped(p->dmask.data, stride, 2);
}

void fa_cuda_backward_sm90(const struct fa_params *p, struct fa_cuda_step *step) {
    struct fa_cuda_variant *v = &step->variant;
    const struct tile *t = find_tile(p);
    v->kernel = (uint8_t)t->kernel;
    v->block_m = (uint16_t)t->block_m;
    v->block_n = (uint16_t)t->block_n;
    v->threads = THREADS;
    v->dq_transposed = t->kernel == FA_CUDA_BACKWARD_SM90;
    v->stages = STAGES;
    v->mask_tiles = (uint8_t)mask_tiles(p, v->mask);
    if (mask_grad_can_be_mapped(p))
        v->mask_grad = 4;
    v->q_buffers = (uint8_t)t->q_buffers;
    if (is_wide(v)) {
        v->stages = (uint16_t)(STAGES * pieces(v));
        while (v->stages > pieces(v) && shared_bytes(v) > FA_CUDA_SHARED_SM90)
            v->stages--;
    }
    while (shared_bytes(v) > FA_CUDA_SHARED_SM90)
        v->q_buffers--;
    const int cluster = is_wide(v) ? 2 : 1; /* blocks */
    step->blocks = (int)div_up(p->seq_k, t->block_n * cluster) * cluster;
    step->shared_bytes = (unsigned)shared_bytes(v);
}

enum fa_status fa_cuda_encode_backward_maps(const struct fa_params *p,
                                            const struct fa_cuda_variant *v,
                                            struct fa_cuda_backward_maps *maps) {
    enum { WARPGROUP_KEYS = 64 };
    const struct {
        CUtensorMap *map;
        const struct fa_tensor *tensor;
        int64_t heads, rows, cols;
        int box_rows;
    } wanted[] = {
        {&maps->q, &p->q, p->heads_q, p->seq_q, p->head_dim, v->block_m},
        {&maps->k, &p->k, p->heads_k, p->seq_k, p->head_dim, v->block_n},
        {&maps->v, &p->v, p->heads_k, p->seq_k, p->head_dim_v, v->block_n},
        {&maps->dout, &p->dout, p->heads_q, p->seq_q, p->head_dim_v, v->block_m},
        {&maps->dk, &p->dk, p->heads_k, p->seq_k, p->head_dim, WARPGROUP_KEYS},
        {&maps->dv, &p->dv, p->heads_k, p->seq_k, p->head_dim_v, WARPGROUP_KEYS},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        if (!wanted[i].tensor->data) /* a gradient that is not wanted */
            continue;
        CUresult error = fa_cuda_encode_tensor(wanted[i].map, p, wanted[i].tensor, wanted[i].heads,
                                               wanted[i].rows, wanted[i].cols, wanted[i].box_rows);
        if (error)
            return fa_cuda_driver_error("tensor map", error);
    }
    CUresult error = 0;
    if (v->mask_tiles == TILES)
        error = fa_cuda_encode_mask(&maps->mask, p, v, v->block_m);
    if (!error && v->mask_grad == 4) {
        const struct fa_tensor dmask = {p->dmask.data, p->dmask.stride_batch, p->dmask.stride_head,
                                        p->dmask.stride_row};
        error = fa_cuda_encode_tensor(&maps->dmask, p, &dmask, p->heads_q, p->seq_q, p->seq_k,
                                      v->block_m);
    }
    return error ? fa_cuda_driver_error("tensor map", error) : FA_OK;
}
