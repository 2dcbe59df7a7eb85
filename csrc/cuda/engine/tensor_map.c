/* Tensor maps for the kernels of sm_90a, and the tiles in shared memory that they fill. */
#include "engine.h"

int fa_cuda_panels_bytes(int rows, int cols) {
    return (cols + 63) / 64 * rows * 128;
}

int fa_cuda_can_be_mapped(const struct fa_tensor *t, int64_t rows) {
    return t->stride_batch < FA_CUDA_MAPPED && t->stride_head < FA_CUDA_MAPPED &&
           t->stride_row < FA_CUDA_MAPPED && (t->stride_row > 0 || rows == 1);
}

int fa_cuda_mask_elem_bytes(int mask) {
    return mask == 3 ? 4 : mask;
}

int fa_cuda_mask_bytes(const struct fa_cuda_variant *v, int rows) {
    const int panels = (v->block_n * fa_cuda_mask_elem_bytes(v->mask) + 127) / 128;
    return panels * (rows == 1 ? 1024 : rows * 128);
}

int fa_cuda_scores_can_be_mapped(const void *data, const int64_t stride[4], int elem_bytes) {
    if (stride[0] != 1 || ((uintptr_t)data & 15))
        return 0;
    for (int i = 1; i < 4; i++) {
        const int64_t bytes = stride[i] * elem_bytes;
        if (bytes & 15 || bytes >> FA_CUDA_MAPPED_BITS)
            return 0;
    }
    return 1;
}

/* A dimension of size 1 may have any stride and one that is broadcast has 0, where a map wants
 * something that makes sense. */
CUresult fa_cuda_encode_map(CUtensorMap *map, int type, int64_t elem_bytes, void *data,
                            const int64_t size[4], const int64_t stride[3], int box_cols,
                            int box_rows) {
    uint64_t map_size[4] = {(uint64_t)size[0]}, map_stride[3];
    for (int i = 0; i < 3; i++) {
        const int many = size[i + 1] > 1 && stride[i];
        map_size[i + 1] = many ? (uint64_t)size[i + 1] : 1;
        map_stride[i] = many ? (uint64_t)(stride[i] * elem_bytes) : 1024;
    }
    const uint32_t box[4] = {(uint32_t)box_cols, (uint32_t)box_rows, 1, 1}, step[4] = {1, 1, 1, 1};
    return fa_cuda_driver()->cuTensorMapEncodeTiled(
        map, type, 4, data, map_size, map_stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

CUresult fa_cuda_encode_tensor(CUtensorMap *map, const struct fa_params *p,
                               const struct fa_tensor *t, int64_t heads, int64_t rows, int64_t cols,
                               int box_rows) {
    const int type = p->dtype == FA_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    return fa_cuda_encode_map(map, type, 2, t->data, (int64_t[]){cols, rows, heads, p->batch},
                              (int64_t[]){t->stride_row, t->stride_head, t->stride_batch}, 64,
                              box_rows);
}

CUresult fa_cuda_encode_mask(CUtensorMap *map, const struct fa_params *p,
                             const struct fa_cuda_variant *v, int box_rows) {
    const int type = p->mask.dtype == FA_BOOL       ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                     : p->mask.dtype == FA_FLOAT32  ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                     : p->mask.dtype == FA_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                    : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const int elem_bytes = fa_cuda_mask_elem_bytes(v->mask);
    return fa_cuda_encode_map(
        map, type, elem_bytes, (void *)p->mask.data,
        (int64_t[]){p->seq_k, p->seq_q, p->heads_q, p->batch},
        (int64_t[]){p->mask.stride_row, p->mask.stride_head, p->mask.stride_batch},
        128 / elem_bytes, box_rows);
}
