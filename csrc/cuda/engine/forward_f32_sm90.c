/* The forward of float32 for sm_90a (kernels/forward_f32_sm90.cu): which calls it takes, and its
 * tiles. */
#include "engine.h"

enum { BLOCK_M = 128, BLOCK_N = 64, THREADS = 384 };
enum { MAX_HEAD_DIM = 128 };

const char *fa_cuda_not_forward_f32_sm90(const struct fa_params *p, int arch) {
    if (arch != 90)
        return "forward_f32_sm90.cu is for compute capability 9.0";
    if (p->allow_tf32)
        return "forward_f32_sm90.cu computes as accurately as float32, TF32 is allowed";
    if (fa_cuda_larger_head_dim(p) > MAX_HEAD_DIM)
        return "forward_f32_sm90.cu is for head sizes up to 128";
    return NULL;
}

/* The struct Shared of the kernel. */
static int shared_bytes(const struct fa_params *p, int stages) {
    enum { BARRIERS = 256 };
    const int of_k = (int)div_up(p->head_dim, 64), of_v = (int)div_up(p->head_dim_v, 64);
    return (BLOCK_M / 64 * of_k + stages * (of_k + of_v)) * FA_CUDA_SPLIT_PANEL_BYTES + BARRIERS;
}

void fa_cuda_forward_f32_sm90(const struct fa_params *p, struct fa_cuda_step *step) {
    struct fa_cuda_variant *v = &step->variant;
    v->kernel = FA_CUDA_FORWARD_F32_SM90;
    v->block_m = BLOCK_M;
    v->block_n = BLOCK_N;
    v->threads = THREADS;
    v->stages = shared_bytes(p, 2) <= FA_CUDA_SHARED_SM90 ? 2 : 1;
    step->blocks = (int)div_up(p->seq_q, BLOCK_M);
    step->shared_bytes = (unsigned)shared_bytes(p, v->stages);
}
