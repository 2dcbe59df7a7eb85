#include "amx_bf16.h"

#include "../template.h"

#define REAL f32
#define OPERAND bf16x2
#include "../exp.inl"
#include "../gemm_few.inl"
#include "../gemm_tiles.inl"

#define ELEM bf16
#include "../kernels.inl"

/* A thread has tiles for as long as a task takes. */

static void forward_tile(const struct fa_params *p, const struct fa_query_tile *t, void *scratch) {
    tiles_configure();
    T(forward_tile)(p, t, scratch);
    tiles_release();
}

static void backward_keys(const struct fa_params *p, const struct fa_key_share *share,
                          void *scratch) {
    tiles_configure();
    T(backward_keys)(p, share, scratch);
    tiles_release();
}

const struct fa_cpu_kernels fa_cpu_amx_bf16 = {
    .forward_scratch = T(forward_scratch_bytes),
    .forward_tile = forward_tile,
    .forward_partial = T(forward_partial),
    .forward_merge = T(forward_merge),
    .backward_scratch = T(backward_scratch_bytes),
    .backward_keys = backward_keys,
    .dq_in_place = T(dq_in_place),
    .backward_dq = T(backward_dq_bytes),
    .backward_store_dq = T(backward_store_dq),
};
