/* The contract between the attention kernels and whoever calls them.
 *
 * Plain C, no torch, no CUDA: the PyTorch binding fills in a `struct fa_params`, and so can any
 * C program. One struct serves the forward and the backward, on every device, so that no kernel
 * grows a private signature. A kernel that does not implement a field answers FA_UNSUPPORTED; it
 * never ignores one.
 *
 *     S = scale * Q K^T + mask        scores        [B, Hq, Sq, Sk], only ever a tile at a time
 *     P = softmax(S)                  probabilities [B, Hq, Sq, Sk], likewise
 *     O = dropout(P) V                output        [B, Hq, Sq, Dv]
 *     lse = log(sum_j exp(S_ij))      what the backward needs to rebuild P from S
 *
 * Letters in shape comments: B batch, Hq query heads, Hk key/value heads, Sq and Sk sequence
 * lengths, D head size of Q and K, Dv head size of V. "acc" is the type sums are kept in: double
 * for FA_FLOAT64, float for every other dtype.
 */
#ifndef FLASH_ATTENTION_H
#define FLASH_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum fa_status {
    FA_OK = 0,
    FA_UNSUPPORTED,   /* a legal request that this kernel does not implement */
    FA_INVALID,       /* no kernel could carry it out; the caller has a bug */
    FA_FAILED,        /* the driver or the compiler did not do as asked (CUDA) */
    FA_OUT_OF_MEMORY, /* the device's memory, or the host's, does not suffice */
};

enum fa_dtype { FA_FLOAT32, FA_FLOAT64, FA_BFLOAT16, FA_FLOAT16, FA_BOOL };

/* Element (b, h, i, d) is data[b * stride_batch + h * stride_head + i * stride_row + d].
 * Strides count elements; the last dimension is contiguous. A stride of 0 broadcasts an input. */
struct fa_tensor {
    void *data;
    int64_t stride_batch, stride_head, stride_row;
};

/* Score (b, h, i, j) reads data[b * stride_batch + h * stride_head + i * stride_row +
 * j * stride_col]; strides of 0 broadcast. FA_BOOL: a key takes part where the byte is not 0.
 * Any other dtype (that of Q, or FA_FLOAT32): the value is added to the scaled score. */
struct fa_mask {
    const void *data; /* NULL: no mask */
    enum fa_dtype dtype;
    int64_t stride_batch, stride_head, stride_row, stride_col;
};

/* The gradient of an additive mask, summed over what the mask broadcasts (strides of 0, which
 * must be those of the mask). Type acc; the caller fills it with zeros. */
struct fa_mask_grad {
    void *data; /* NULL: not wanted */
    int64_t stride_batch, stride_head, stride_row, stride_col;
    int in_dtype; /* where mask has the dtype of q and broadcasts nothing: type dtype, the last
                     dimension contiguous, and the kernels write every element */
};

/* Threads belong to the caller. run() calls body(ctx, id) for every id in [0, num_threads), as
 * many at once as it can, and returns when all have. NULL: everything runs on this thread. */
struct fa_executor {
    int num_threads;
    void (*run)(void (*body)(void *ctx, int id), void *ctx, int num_threads);
};

/* A negative window_left or window_right: no limit on that side. */
#define FA_NO_LIMIT (-1)

struct fa_params {
    enum fa_dtype dtype; /* of q, k, v, out and their gradients */
    int64_t batch;       /* B */
    int64_t heads_q;     /* Hq, a multiple of Hk: query head h reads key head h / (Hq / Hk) */
    int64_t heads_k;     /* Hk */
    int64_t seq_q;       /* Sq; the longest where cu_seqlens_q is set */
    int64_t seq_k;       /* Sk; the longest where cu_seqlens_k is set */
    int64_t head_dim;    /* D */
    int64_t head_dim_v;  /* Dv */

    struct fa_tensor q;   /* [B, Hq, Sq, D] */
    struct fa_tensor k;   /* [B, Hk, Sk, D] */
    struct fa_tensor v;   /* [B, Hk, Sk, Dv] */
    struct fa_tensor out; /* [B, Hq, Sq, Dv]; written by the forward, read by the backward */
    void *lse;            /* [B, Hq, Sq] contiguous, acc, natural log; written, read likewise.
                             A row that attends to nothing has out = 0 and lse = -infinity. */

    /* --- scores --- */
    double scale;
    int allow_tf32; /* CUDA kernels, FA_FLOAT32: products may round their factors to TF32 */
    /* Query i sees key j where
     * i + diagonal_offset - window_left <= j <= i + diagonal_offset + window_right.
     * Causal is window (FA_NO_LIMIT, 0); offset 0 aligns top-left, Sk - Sq bottom-right. */
    int64_t window_left, window_right, diagonal_offset;
    struct fa_mask mask;       /* broadcast to [B, Hq, Sq, Sk] */
    double softcap;            /* 0: none; else S = softcap * tanh(S / softcap) */
    const float *alibi_slopes; /* [B, Hq] or NULL: adds -slope * |i + diagonal_offset - j| */
    int64_t alibi_stride_batch;
    const float *sinks; /* [Hq] or NULL: one more score in each row's softmax, with no value */

    /* --- dropout --- */
    double dropout_p;          /* 0: none. Kept probabilities are divided by 1 - dropout_p. */
    const uint64_t *rng_state; /* {seed, offset}; what is dropped depends on these and on
                                  (b, h, i, j) alone: see dropout.h */

    /* --- packed and paged sequences --- */
    const int32_t *cu_seqlens_q; /* [B + 1] or NULL: sequences back to back along Sq */
    const int32_t *cu_seqlens_k; /* [B + 1] or NULL: likewise along Sk */
    const int32_t *block_table;  /* [B, pages] or NULL: k and v are pages of page_size rows */
    int64_t block_table_stride;
    int64_t page_size;

    /* --- forward only --- */
    int partial_out; /* write out as acc, not dtype, so that partial results can be merged by lse */

    /* --- backward only; out and lse may come from a merge of several forwards --- */
    struct fa_tensor dout;     /* [B, Hq, Sq, Dv] */
    struct fa_tensor dq;       /* [B, Hq, Sq, D];  data NULL: not wanted, as in the next two */
    struct fa_tensor dk;       /* [B, Hk, Sk, D]  */
    struct fa_tensor dv;       /* [B, Hk, Sk, Dv] */
    struct fa_mask_grad dmask; /* broadcast like mask */
    int deterministic;         /* the same bits every run, whatever it costs */

    /* --- where to run --- */
    struct fa_executor executor; /* CPU kernels */
    int device;                  /* CUDA kernels: number of the device */
    void *stream;                /* CUDA kernels: a CUstream of that device */
    void *workspace;             /* scratch memory, 64-byte aligned */
    size_t workspace_bytes;      /* at least what the *_workspace function asks for */
};

/* --- CPU kernels (csrc/cpu) --- */

/* Whether the CPU kernels can carry out p: FA_OK or why not, in *reason (a static string naming
 * the field; may be NULL). Looks at sizes, dtypes and flags, not at tensor data. */
enum fa_status fa_cpu_supports(const struct fa_params *p, const char **reason);

size_t fa_cpu_forward_workspace(const struct fa_params *p);
enum fa_status fa_cpu_forward(const struct fa_params *p);

size_t fa_cpu_backward_workspace(const struct fa_params *p);
enum fa_status fa_cpu_backward(const struct fa_params *p);

/* The instruction set in use: "generic", "avx2", "avx512", "avx512_bf16" or "amx_bf16". The best
 * that this machine has, or the one the environment variable FLASH_ATTN_EXT_ISA names; read once,
 * at first use. NULL where that variable names one that is unknown or that this machine lacks. */
const char *fa_cpu_isa(void);

/* The i-th instruction set compiled in, best first, or NULL past the last; *usable says whether
 * this machine has it. */
const char *fa_cpu_isa_list(int i, int *usable);

/* Use the named instruction set from now on; FA_INVALID where it is unknown or not usable. For
 * tests: calls must not be under way on other threads. */
enum fa_status fa_cpu_set_isa(const char *name);

/* --- CUDA kernels (csrc/cuda) ---
 *
 * A kernel is compiled for the exact case (architecture, dtype, head sizes, kind of mask, ...) when
 * a call first needs it, and kept: in memory for the process, in a directory for the next one. The
 * driver and the compiler, NVRTC, are loaded at first use; where they are missing, these functions
 * answer FA_UNSUPPORTED. All pointers in p are to memory of the device; work is queued on
 * p->stream.
 *
 * p is a backward where p->dout.data is not NULL. */

/* Why the thread's last call of a function here that failed did so. */
const char *fa_cuda_last_error(void);

/* Whether the CUDA kernels can carry out p on p->device. Looks at sizes, dtypes and flags only. */
enum fa_status fa_cuda_supports(const struct fa_params *p);

size_t fa_cuda_forward_workspace(const struct fa_params *p);
enum fa_status fa_cuda_forward(const struct fa_params *p);

size_t fa_cuda_backward_workspace(const struct fa_params *p);
enum fa_status fa_cuda_backward(const struct fa_params *p);

/* What was compiled, valid during the visit. */
struct fa_cuda_compiled {
    const char *file; /* "forward_sm80.cu" */
    int block_m, block_n, threads, shared_bytes;
    const void *cubin;
    size_t cubin_bytes;
    const char *log; /* the compiler's, with registers and spills */
};

/* Compiles what p takes on an architecture (90: compute capability 9.0) unless the directory has
 * it, and shows each kernel. Needs no GPU. Of the pointers in p it matters which are NULL, and how
 * they and the strides are aligned; of the strides of dmask, which are 0. */
enum fa_status fa_cuda_compile(const struct fa_params *p, int arch,
                               void (*visit)(void *ctx, const struct fa_cuda_compiled *compiled),
                               void *ctx);

/* Shows each kernel that p takes on an architecture, in order: its file and, where it is one for
 * all GPUs that has a sibling for sm_90a, why it is not the sibling, else NULL. Compiles nothing.
 */
enum fa_status fa_cuda_choice(const struct fa_params *p, int arch,
                              void (*visit)(void *ctx, const char *file, const char *not_sm90),
                              void *ctx);

/* Which kernels are taken: "best", those for sm_90a where they apply, or "portable", those for
 * every GPU. What the environment variable FLASH_ATTN_EXT_CUDA_KERNELS says, read once, at first
 * use. */
const char *fa_cuda_kernels(void);

/* Use these from now on; FA_INVALID for another name. For tests and benchmarks: calls must not be
 * under way on other threads. */
enum fa_status fa_cuda_set_kernels(const char *name);

int fa_cuda_device_count(void);
enum fa_status fa_cuda_device(int device, char *name, size_t name_bytes, int *arch);

/* 13000: CUDA 13.0; 0: there is no driver. */
int fa_cuda_driver_version(void);

/* The path and version of NVRTC; NULL: there is none. */
const char *fa_cuda_compiler(int *major, int *minor);

/* Where compiled kernels are kept: $FLASH_ATTN_EXT_CACHE or ~/.cache/flash_attn_ext. */
const char *fa_cuda_cache_directory(char *path, size_t bytes);

/* The NVRTC to take, unless the process has loaded one. To be called before anything else. */
void fa_cuda_set_nvrtc(const char *path);

/* What is to be done with warnings; nothing, unless this is called. */
void fa_cuda_set_warning_handler(void (*handler)(const char *message));

#ifdef __cplusplus
}
#endif
#endif
