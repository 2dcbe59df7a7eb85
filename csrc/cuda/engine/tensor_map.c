/* Tensor maps for the kernels of sm_90a, and the tiles in shared memory that they fill. */
#include "engine.h"

int fa_cuda_panels_bytes(int rows, int cols) {
    return (cols + 63) / 64 * rows * 128;
}

int fa_cuda_can_be_mapped(const struct fa_tensor *t, int64_t rows) {
    return t->stride_batch < FA_CUDA_MAPPED && t->stride_head < FA_CUDA_MAPPED &&
           t->stride_row < FA_CUDA_MAPPED && (t->stride_row > 0 || rows == 1);
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
