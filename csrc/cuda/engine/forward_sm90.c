/* The forward for sm_90a (kernels/forward_sm90.cu): which calls it takes, its tiles and its tensor
 * maps. */
#include "../kernels/params.h"
#include "engine.h"

static int64_t div_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

static int max(int a, int b) {
    return a > b ? a : b;
}

/* Tiles of block_m queries x block_n keys; a warpgroup for each 64 queries. A thread holds
 * Dv / 2 registers of O, block_n / 2 of S and block_n / 4 of P; it has 240 registers where two
 * warpgroups compute and 160 where three do. The first row that has room is taken. */
static const struct tile {
    int max_head_dim; /* the larger of D and Dv */
    /* BARE: without mask and dropout, which take registers; PLAIN: of many queries, too; FULL:
     * without a window, too. */
    enum calls { ANY, BARE, PLAIN, FULL } calls;
    int block_m, block_n;
} tiles[] = {
    {64, PLAIN, 192, 128}, {96, FULL, 192, 96},  {128, FULL, 192, 80},
    {128, ANY, 128, 128},  {192, BARE, 128, 96}, {256, ANY, 128, 64},
};
enum { MANY_QUERIES = 1536, STAGES = 2, SHARED_LIMIT = 227 << 10 };

static const struct tile *find_tile(const struct fa_params *p, const struct fa_cuda_variant *v) {
    const enum calls calls = v->mask || v->dropout     ? ANY
                             : p->seq_q < MANY_QUERIES ? BARE
                             : v->window               ? PLAIN
                                                       : FULL;
    const struct tile *t = tiles;
    while (t->max_head_dim < max(v->head_dim, v->head_dim_v) || t->calls > calls)
        t++;
    return t;
}

/* Panels<rows, cols> of kernels/panels.cuh. */
static int panels_bytes(int rows, int cols) {
    return (cols + 63) / 64 * rows * 128;
}

/* The struct Shared of the kernel. */
static int shared_bytes(const struct fa_cuda_variant *v) {
    enum { BARRIERS = 512 };
    return v->q_buffers * panels_bytes(v->block_m, max(v->head_dim, v->head_dim_v)) +
           v->stages *
               (panels_bytes(v->block_n, v->head_dim) + panels_bytes(v->block_n, v->head_dim_v)) +
           BARRIERS;
}

size_t fa_cuda_counter_bytes(const struct fa_cuda_variant *v) {
    /* Without a window all pieces of work are of one size. */
    return v->kernel == FA_CUDA_FORWARD_SM90 && v->window ? sizeof(struct fa_kernel_counter) : 0;
}

/* A tensor map has 16-byte aligned strides of less than 2^40 bytes. */
static int can_be_mapped(const struct fa_tensor *t, int64_t rows) {
    const int64_t limit = (int64_t)1 << 39;
    return t->stride_batch < limit && t->stride_head < limit && t->stride_row < limit &&
           (t->stride_row > 0 || rows == 1);
}

int fa_cuda_forward_sm90(const struct fa_params *p, struct fa_cuda_step *step) {
    struct fa_cuda_variant *v = &step->variant;
    if (v->arch != 90 || !v->aligned || (v->dtype != FA_BFLOAT16 && v->dtype != FA_FLOAT16) ||
        p->seq_q == 0 || p->seq_k == 0 || !can_be_mapped(&p->q, p->seq_q) ||
        !can_be_mapped(&p->k, p->seq_k) || !can_be_mapped(&p->v, p->seq_k) ||
        !can_be_mapped(&p->out, p->seq_q))
        return 0;
    const struct tile *t = find_tile(p, v);
    v->kernel = FA_CUDA_FORWARD_SM90;
    v->block_m = (uint16_t)t->block_m;
    v->block_n = (uint16_t)t->block_n;
    v->threads = (uint16_t)(128 + 2 * t->block_m);
    v->stages = STAGES;
    v->q_buffers = 2;
    if (shared_bytes(v) > SHARED_LIMIT)
        v->q_buffers = 1;
    v->ping_pong = max(v->head_dim, v->head_dim_v) <= 128 || v->window;
    step->blocks = (int)div_up(p->seq_q, t->block_m);
    step->shared_bytes = (unsigned)shared_bytes(v);
    return 1;
}

/* Heads whose keys and values fit into the L2 cache together, with room for what passes by. */
int fa_cuda_group_heads(const struct fa_params *p, const struct fa_cuda_variant *v) {
    const int64_t bytes = p->seq_k * (p->head_dim + p->head_dim_v) * 2, cache = 32 << 20;
    const int64_t heads = v->window ? cache / bytes * (p->heads_q / p->heads_k) : 1;
    return (int)(heads < 1 ? 1 : heads < p->batch * p->heads_q ? heads : p->batch * p->heads_q);
}

/* [B, H, S, D], in boxes of box_rows x 64. */
static CUresult encode(CUtensorMap *map, const struct fa_params *p, const struct fa_tensor *t,
                       int64_t heads, int64_t rows, int64_t cols, int box_rows) {
    /* A dimension of size 1 may have any stride, one that is broadcast has 0; neither will do. */
    const int many_heads = heads > 1 && t->stride_head,
              many_batches = p->batch > 1 && t->stride_batch;
    const uint64_t size[4] = {(uint64_t)cols, (uint64_t)rows, many_heads ? (uint64_t)heads : 1,
                              many_batches ? (uint64_t)p->batch : 1};
    const uint64_t stride[3] = {rows > 1 ? 2 * (uint64_t)t->stride_row : 1024,
                                many_heads ? 2 * (uint64_t)t->stride_head : 1024,
                                many_batches ? 2 * (uint64_t)t->stride_batch : 1024};
    const uint32_t box[4] = {64, (uint32_t)box_rows, 1, 1}, step[4] = {1, 1, 1, 1};
    return fa_cuda_driver()->cuTensorMapEncodeTiled(
        map,
        p->dtype == FA_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        4, t->data, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

enum fa_status fa_cuda_encode_maps(const struct fa_params *p, const struct fa_cuda_variant *v,
                                   struct fa_cuda_maps *maps) {
    CUresult error = encode(&maps->q, p, &p->q, p->heads_q, p->seq_q, p->head_dim, 64);
    if (!error)
        error = encode(&maps->k, p, &p->k, p->heads_k, p->seq_k, p->head_dim, v->block_n);
    if (!error)
        error = encode(&maps->v, p, &p->v, p->heads_k, p->seq_k, p->head_dim_v, v->block_n);
    if (!error)
        error = encode(&maps->out, p, &p->out, p->heads_q, p->seq_q, p->head_dim_v, 64);
    return error ? fa_cuda_driver_error("tensor map", error) : FA_OK;
}
