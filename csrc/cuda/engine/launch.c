/* The entry points: describes a call to the kernels and launches them on the caller's stream. */
#include <limits.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "../../dropout.h"
#include "../kernels/params.h"
#include "engine.h"

static enum fa_status supports(const struct fa_params *p, int *arch) {
    int major, minor;
    enum fa_status status = fa_cuda_arch(p->device, arch);
    if (!status)
        status = fa_cuda_check(p, *arch);
    if (!status && !fa_cuda_compiler(&major, &minor))
        status = FA_UNSUPPORTED;
    return status;
}

enum fa_status fa_cuda_supports(const struct fa_params *p) {
    int arch;
    return supports(p, &arch);
}

static struct fa_kernel_tensor tensor(const struct fa_tensor *t) {
    return (struct fa_kernel_tensor){t->data, t->stride_batch, t->stride_head, t->stride_row};
}

static int clamp_to_far(int64_t distance) {
    return (int)(distance < -FA_CUDA_FAR  ? -FA_CUDA_FAR
                 : distance > FA_CUDA_FAR ? FA_CUDA_FAR
                                          : distance);
}

static struct fa_kernel_params describe(const struct fa_params *p) {
    return (struct fa_kernel_params){
        .batch = (int)p->batch,
        .heads_q = (int)p->heads_q,
        .heads_k = (int)p->heads_k,
        .seq_q = (int)p->seq_q,
        .seq_k = (int)p->seq_k,
        .q = tensor(&p->q),
        .k = tensor(&p->k),
        .v = tensor(&p->v),
        .out = tensor(&p->out),
        .lse = p->lse,
        .scale = (float)p->scale,
        .scale_log2e = (float)(p->scale * 1.4426950408889634),
        .window_begin =
            p->window_left < 0 ? -FA_CUDA_FAR : clamp_to_far(p->diagonal_offset - p->window_left),
        .window_end = p->window_right < 0 ? FA_CUDA_FAR
                                          : clamp_to_far(p->diagonal_offset + p->window_right + 1),
        .mask = {(void *)p->mask.data, p->mask.stride_batch, p->mask.stride_head,
                 p->mask.stride_row, p->mask.stride_col},
        .rng_state = (const unsigned long long *)p->rng_state,
        .dropout_threshold = fa_dropout_threshold(p->dropout_p),
        .dropout_scale = p->dropout_p < 1 ? (float)(1 / (1 - p->dropout_p)) : 0,
        .dout = tensor(&p->dout),
        .dq = tensor(&p->dq),
        .dk = tensor(&p->dk),
        .dv = tensor(&p->dv),
        .dmask = {p->dmask.data, p->dmask.stride_batch, p->dmask.stride_head, p->dmask.stride_row,
                  p->dmask.stride_col},
    };
}

/* Even numbers from a random one on: no other launch has it, and no memory by chance. */
static uint64_t launch_number(void) {
    static _Atomic uint64_t last;
    if (!atomic_load(&last)) {
        uint64_t random = 0, none = 0;
        (void)!getrandom(&random, sizeof random, 0);
        atomic_compare_exchange_strong(&last, &none, random & ~(uint64_t)1);
    }
    return atomic_fetch_add(&last, 2) + 2;
}

static enum fa_status launch_kernel(const struct fa_params *p, const struct fa_cuda_step *s,
                                    CUkernel function, int grid, struct fa_kernel_params *k,
                                    void *maps) {
    CUresult error =
        fa_cuda_driver()->cuLaunchKernel(function, (unsigned)grid, 1, 1, s->variant.threads, 1, 1,
                                         s->shared_bytes, p->stream, (void *[]){k, maps}, NULL);
    return error ? fa_cuda_driver_error(fa_cuda_entry(&s->variant), error) : FA_OK;
}

/* A block on each SM, which takes one piece of work after the other. */
static enum fa_status launch_forward_sm90(const struct fa_params *p, const struct fa_cuda_step *s,
                                          CUkernel function, int pieces, int sm_count,
                                          struct fa_kernel_params *k) {
    struct fa_cuda_maps maps;
    enum fa_status status = fa_cuda_encode_maps(p, &s->variant, &maps);
    if (status)
        return status;
    if (fa_cuda_counter_bytes(p, s->variant.arch)) {
        k->counter = p->workspace;
        k->launch = launch_number();
    }
    return launch_kernel(p, s, function, pieces < sm_count ? pieces : sm_count, k, &maps);
}

static enum fa_status launch_backward_sm90(const struct fa_params *p, const struct fa_cuda_step *s,
                                           CUkernel function, int blocks,
                                           struct fa_kernel_params *k) {
    struct fa_cuda_backward_maps maps;
    enum fa_status status = fa_cuda_encode_backward_maps(p, &s->variant, &maps);
    return status ? status : launch_kernel(p, s, function, blocks, k, &maps);
}

static enum fa_status launch(const struct fa_params *p, const struct fa_cuda_step *steps, int count,
                             int sm_count, struct fa_kernel_params *k) {
    for (int i = 0; i < count; i++) {
        const struct fa_cuda_step *s = &steps[i];
        CUkernel function;
        enum fa_status status = fa_cuda_function(s, p->device, p->stream, &function);
        if (status)
            return status;
        k->blocks = s->blocks;
        k->group_heads = s->group_heads;
        const int blocks = s->blocks * s->heads * k->batch;
        switch (s->variant.kernel) {
        case FA_CUDA_FORWARD_SM90:
            status = launch_forward_sm90(p, s, function, blocks, sm_count, k);
            break;
        case FA_CUDA_MASK_MAP_SM90:
            status = launch_kernel(p, s, function, s->blocks, k, NULL);
            break;
        case FA_CUDA_BACKWARD_SM90:
        case FA_CUDA_BACKWARD_WIDE_SM90:
            status = launch_backward_sm90(p, s, function, blocks, k);
            break;
        default:
            status = launch_kernel(p, s, function, blocks, k, NULL);
        }
        if (status)
            return status;
    }
    return FA_OK;
}

static enum fa_status run(const struct fa_params *p, struct fa_kernel_params *k) {
    int arch, sm_count, pushed;
    enum fa_status status = supports(p, &arch);
    if (!status)
        status = fa_cuda_sm_count(p->device, &sm_count);
    if (!status)
        status = fa_cuda_enter(p->device, &pushed);
    if (status)
        return status;
    struct fa_cuda_step steps[FA_CUDA_MAX_STEPS];
    const int count = fa_cuda_plan(p, arch, sm_count, steps);
    status = launch(p, steps, count, sm_count, k);
    fa_cuda_leave(pushed);
    return status;
}

size_t fa_cuda_forward_workspace(const struct fa_params *p) {
    int arch;
    if (fa_cuda_arch(p->device, &arch))
        return 0; /* as the forward will tell */
    return fa_cuda_counter_bytes(p, arch) + fa_cuda_mask_map_bytes(p, arch);
}

enum fa_status fa_cuda_forward(const struct fa_params *p) {
    if (p->workspace_bytes < fa_cuda_forward_workspace(p))
        return fa_cuda_fail(FA_INVALID, "workspace_bytes: too small");
    struct fa_kernel_params k = describe(p);
    int arch;
    if (!fa_cuda_arch(p->device, &arch) && fa_cuda_mask_map_bytes(p, arch))
        k.mask_map = (unsigned *)((char *)p->workspace + fa_cuda_counter_bytes(p, arch));
    return run(p, &k);
}

/* The workspace: row_stats, then, where blocks add it up, the sum of dq (kernels/workspace.cuh). */
static size_t round_up(int64_t n, int64_t multiple) {
    return (size_t)(div_up(n, multiple) * multiple);
}

static size_t stats_bytes(const struct fa_params *p) {
    return (size_t)(p->batch * p->heads_q) * round_up(p->seq_q, FA_STATS_ROWS) * 2 * sizeof(float);
}

static int has_dq_sum(const struct fa_params *p) {
    return p->dq.data && !p->deterministic;
}

size_t fa_cuda_backward_workspace(const struct fa_params *p) {
    const size_t dq_sum = (size_t)(p->batch * p->heads_q) * round_up(p->seq_q, 16) *
                          round_up(p->head_dim, 16) * sizeof(float);
    return stats_bytes(p) + (has_dq_sum(p) ? dq_sum : 0);
}

enum fa_status fa_cuda_backward(const struct fa_params *p) {
    if (p->workspace_bytes < fa_cuda_backward_workspace(p))
        return fa_cuda_fail(FA_INVALID, "workspace_bytes: too small");
    struct fa_kernel_params k = describe(p);
    k.row_stats = p->workspace;
    if (has_dq_sum(p))
        k.dq_sum = (float *)((char *)p->workspace + stats_bytes(p));
    return run(p, &k);
}

enum fa_status fa_cuda_compile(const struct fa_params *p, int arch,
                               void (*visit)(void *ctx, const struct fa_cuda_compiled *compiled),
                               void *ctx) {
    enum fa_status status = fa_cuda_check(p, arch);
    if (status)
        return status;
    /* As for a device with fewer multiprocessors than the call has blocks, and one with more. */
    struct fa_cuda_step steps[2 * FA_CUDA_MAX_STEPS];
    const int fewer = fa_cuda_plan(p, arch, 0, steps);
    const int count = fewer + fa_cuda_plan(p, arch, INT_MAX, steps + fewer);
    for (int i = 0; i < count; i++) {
        if (i >= fewer &&
            memcmp(&steps[i].variant, &steps[i - fewer].variant, sizeof steps[i].variant) == 0)
            continue;
        struct fa_cuda_code code;
        status = fa_cuda_code_of(&steps[i].variant, 1, &code);
        if (status)
            return status;
        visit(ctx, &(struct fa_cuda_compiled){
                       .file = fa_cuda_file(&steps[i].variant),
                       .block_m = steps[i].variant.block_m,
                       .block_n = steps[i].variant.block_n,
                       .threads = steps[i].variant.threads,
                       .shared_bytes = (int)steps[i].shared_bytes,
                       .cubin = code.data,
                       .cubin_bytes = code.cubin_bytes,
                       .log = (const char *)code.data + code.cubin_bytes,
                   });
        free(code.data);
    }
    return FA_OK;
}

enum fa_status fa_cuda_choice(const struct fa_params *p, int arch,
                              void (*visit)(void *ctx, const char *file, const char *not_sm90),
                              void *ctx) {
    enum fa_status status = fa_cuda_check(p, arch);
    if (status)
        return status;
    struct fa_cuda_step steps[FA_CUDA_MAX_STEPS];
    const int count = fa_cuda_plan(p, arch, 0, steps);
    for (int i = 0; i < count; i++)
        visit(ctx, fa_cuda_file(&steps[i].variant), steps[i].not_sm90);
    return FA_OK;
}
