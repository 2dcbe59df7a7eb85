/* The main kernel of the backward of float32 for sm_90a (kernels/backward_f32_sm90.cu): which calls
 * it takes, and its tiles. */
#include "engine.h"

enum { BLOCK_M = 64, WARPGROUP_KEYS = 64, MAX_HEAD_DIM = 128 };

const char *fa_cuda_not_backward_f32_sm90(const struct fa_params *p, int arch) {
    if (arch != 90)
        return "backward_f32_sm90.cu is for compute capability 9.0";
    if (p->allow_tf32)
        return "backward_f32_sm90.cu computes as accurately as float32, TF32 is allowed";
    if (fa_cuda_larger_head_dim(p) > MAX_HEAD_DIM)
        return "backward_f32_sm90.cu is for head sizes up to 128";
    if (p->mask.data)
        return "backward_f32_sm90.cu has no masks";
    if (p->dropout_p > 0)
        return "backward_f32_sm90.cu has no dropout";
    return NULL;
}

/* Two warpgroups compute where shared memory has room for their keys and a second Q. */
void fa_cuda_backward_f32_sm90(const struct fa_params *p, struct fa_cuda_step *step) {
    enum { BARRIERS = 256 };
    struct fa_cuda_variant *v = &step->variant;
    const int warpgroups = fa_cuda_larger_head_dim(p) <= 64 ? 2 : 1;
    const int of_k = (int)div_up(p->head_dim, 64), of_v = (int)div_up(p->head_dim_v, 64);
    v->kernel = FA_CUDA_BACKWARD_F32_SM90;
    v->block_m = BLOCK_M;
    v->block_n = (uint16_t)(WARPGROUP_KEYS * warpgroups);
    v->threads = (uint16_t)(128 * (warpgroups + 1));
    v->stages = 1;
    v->q_buffers = (uint8_t)warpgroups;
    step->blocks = (int)div_up(p->seq_k, v->block_n);
    /* The struct Shared of the kernel: K, V and dS, Q and dO, row_stats. */
    const int panels = warpgroups * (of_k + of_v + 1) + v->q_buffers * of_k + of_v;
    step->shared_bytes = (unsigned)(panels * FA_CUDA_SPLIT_PANEL_BYTES +
                                    v->q_buffers * BLOCK_M * 2 * (int)sizeof(float)) +
                         BARRIERS;
}
