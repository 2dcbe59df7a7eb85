/* What the files of the engine share. The way of a call to the GPU:
 *
 *     launch.c     the entry points: fill in a struct fa_kernel_params and launch
 *     variants.c   which kernels a call takes, compiled for what, with which tiles
 *     forward_sm90.c  ... for the forward of sm_90a, and its tensor maps
 *     forward_f32_sm90.c ... of float32
 *     backward_sm90.c ... for its backward
 *     backward_f32_sm90.c ... of float32
 *     tensor_map.c what these two share
 *     functions.c  a variant's function on a device, found in memory or loaded
 *     cache.c      a variant's machine code, from disk or from the compiler
 *     compiler.c   NVRTC: embedded source -> machine code
 *     driver.c     libcuda: devices and contexts
 *
 * What can fail returns a status and leaves the reason for fa_cuda_last_error(). */
#ifndef FA_CUDA_ENGINE_H
#define FA_CUDA_ENGINE_H

#include <stdint.h>

#include "../../flash_attention.h"
#include "cuda_api.h"

static inline int64_t div_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

static inline int max(int a, int b) {
    return a > b ? a : b;
}

static inline int fa_cuda_larger_head_dim(const struct fa_params *p) {
    return max((int)p->head_dim, (int)p->head_dim_v);
}

/* Bytes of shared memory: what a block can have on sm_90, and what a SplitPanel of bf16x3.cuh
 * takes, 64 rows and 64 columns in three parts of bf16. */
enum { FA_CUDA_SHARED_SM90 = 227 << 10, FA_CUDA_SPLIT_PANEL_BYTES = 3 * 64 * 64 * 2 };

/* --- error.c --- */

/* Leaves a message, formatted as by printf, for fa_cuda_last_error(); returns the status. */
enum fa_status fa_cuda_fail(enum fa_status status, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Tells the handler of fa_cuda_set_warning_handler. */
void fa_cuda_warn(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* --- variants.c --- */

enum fa_cuda_kernel {
    FA_CUDA_FORWARD,
    FA_CUDA_PREPARE,
    FA_CUDA_BACKWARD,
    FA_CUDA_CONVERT,
    FA_CUDA_BACKWARD_DQ,
    FA_CUDA_BACKWARD_MASK,
    FA_CUDA_FORWARD_SM90,
    FA_CUDA_MASK_MAP_SM90,
    FA_CUDA_FORWARD_F32_SM90,
    FA_CUDA_BACKWARD_SM90,
    FA_CUDA_BACKWARD_WIDE_SM90,
    FA_CUDA_BACKWARD_F32_SM90,
};

/* All that a kernel is compiled for: equal bytes, equal machine code. What does not concern a
 * kernel is 0 in its variants, so that it is not compiled twice. */
struct fa_cuda_variant {
    uint8_t kernel;    /* enum fa_cuda_kernel */
    uint8_t dtype;     /* enum fa_dtype */
    uint8_t tf32;      /* of float32: products in plain TF32, not 3xTF32 */
    uint8_t aligned;   /* every row of every tensor starts at a multiple of 16 bytes */
    uint8_t mask;      /* 0 none, 1 bool, 2 of dtype, 3 float32 */
    uint8_t window;    /* some scores are hidden by it */
    uint8_t dropout;   /* dropout_p > 0 */
    uint8_t mask_grad; /* 0 none, 1 added up atomically, 2 stored, for it broadcasts nothing, 3
                          stored in dtype; 4, of sm_90a, as 3, by the copy engine */

    /* of sm_90a: FA_MASK_TILES; in the backward, buffers of Q; in the forward, whether warpgroups
     * take turns, and whether O has a place in shared memory */
    uint8_t mask_tiles, q_buffers, ping_pong, o_place;
    uint8_t dq_transposed; /* the sum of dQ is, see kernels/workspace.cuh */

    uint8_t stages; /* tiles that there is room for, of what passes by */
    uint16_t head_dim, head_dim_v;
    uint16_t block_m, block_n, threads;
    uint16_t arch; /* 90: compute capability 9.0 */
};
_Static_assert(sizeof(struct fa_cuda_variant) == 26, "no padding: it is compared as bytes");

/* One launch of a call. */
struct fa_cuda_step {
    struct fa_cuda_variant variant;
    const char *not_sm90; /* why not its sibling for sm_90a; NULL: it is that, or has none */
    int blocks;           /* thread blocks for each head */
    int heads;            /* heads of queries, or of keys in the main kernel of the backward */
    int group_heads;      /* of them: see kernels/block_order.cuh */
    unsigned shared_bytes;
};
enum { FA_CUDA_MAX_STEPS = 4 };

/* Farther than a sequence may be long; sums of two such distances fit an int. */
enum { FA_CUDA_FAR = 1 << 29 };

/* Whether there are kernels for p on an architecture, whatever this machine has. */
enum fa_status fa_cuda_check(const struct fa_params *p, int arch);

/* The launches of a call that passed fa_cuda_check, in order; returns how many. Where the device
 * has more multiprocessors than the call has blocks, these are smaller. */
int fa_cuda_plan(const struct fa_params *p, int arch, int sm_count,
                 struct fa_cuda_step steps[FA_CUDA_MAX_STEPS]);

/* Whether some scores are hidden by the window. */
int fa_cuda_has_window(const struct fa_params *p);

/* Whether every row of every tensor but the mask starts at a multiple of 16 bytes. */
int fa_cuda_is_aligned(const struct fa_params *p);

/* A variant's file in csrc/cuda/kernels, its function there, and its macros as options of the
 * compiler, one after the other, each ending in a NUL, with an empty one last. */
const char *fa_cuda_file(const struct fa_cuda_variant *v);
const char *fa_cuda_entry(const struct fa_cuda_variant *v);
enum { FA_CUDA_OPTIONS_BYTES = 1024 };
void fa_cuda_options(const struct fa_cuda_variant *v, char options[FA_CUDA_OPTIONS_BYTES]);

/* fa_cuda_step.group_heads of a kernel in which keys pass by: those that fit into a cache. */
int fa_cuda_group_for_queries(const struct fa_params *p, int64_t cache);

/* --- forward_sm90.c --- */

/* Why that kernel does not take a forward that passes fa_cuda_check; NULL: it does. */
const char *fa_cuda_not_forward_sm90(const struct fa_params *p, int arch);

/* Makes the step of a forward that it takes of that of FA_CUDA_FORWARD. */
void fa_cuda_forward_sm90(const struct fa_params *p, struct fa_cuda_step *step);

/* The second parameter of the kernel. */
struct fa_cuda_maps {
    CUtensorMap q, k, v, mask;
};
enum fa_status fa_cuda_encode_maps(const struct fa_params *p, const struct fa_cuda_variant *v,
                                   struct fa_cuda_maps *maps);

/* Of the workspace of a forward, for fa_kernel_params.counter. */
size_t fa_cuda_counter_bytes(const struct fa_params *p, int arch);

/* Likewise, after it, for fa_kernel_params.mask_map; 0: the call has none. */
size_t fa_cuda_mask_map_bytes(const struct fa_params *p, int arch);
/* The step that makes it, before the forward. */
struct fa_cuda_step fa_cuda_mask_map(const struct fa_params *p, const struct fa_cuda_step *forward);

/* --- forward_f32_sm90.c: likewise, of float32 --- */

const char *fa_cuda_not_forward_f32_sm90(const struct fa_params *p, int arch);
void fa_cuda_forward_f32_sm90(const struct fa_params *p, struct fa_cuda_step *step);

/* --- backward_sm90.c --- */

/* Why its kernels do not take a backward that passes fa_cuda_check; NULL: one does. */
const char *fa_cuda_not_backward_sm90(const struct fa_params *p, int arch);

/* Makes the step of a backward that they take of that of FA_CUDA_BACKWARD. */
void fa_cuda_backward_sm90(const struct fa_params *p, struct fa_cuda_step *step);

/* The second parameter of the kernel. */
struct fa_cuda_backward_maps {
    CUtensorMap q, k, v, dout, dk, dv, mask, dmask;
};
enum fa_status fa_cuda_encode_backward_maps(const struct fa_params *p,
                                            const struct fa_cuda_variant *v,
                                            struct fa_cuda_backward_maps *maps);

/* --- backward_f32_sm90.c: likewise, of float32 --- */

const char *fa_cuda_not_backward_f32_sm90(const struct fa_params *p, int arch);
void fa_cuda_backward_f32_sm90(const struct fa_params *p, struct fa_cuda_step *step);

/* --- tensor_map.c --- */

/* Strides of a tensor map are multiples of 16 bytes, below 2^40. */
enum { FA_CUDA_MAPPED = 1 << 30, FA_CUDA_MAPPED_BITS = 40 };
int fa_cuda_can_be_mapped(const struct fa_tensor *t, int64_t rows);

/* Columns, rows, heads and batch entries, in boxes of columns and rows. Strides count elements. */
CUresult fa_cuda_encode_map(CUtensorMap *map, int type, int64_t elem_bytes, void *data,
                            const int64_t size[4], const int64_t stride[3], int box_cols,
                            int box_rows);

/* A tensor of p->dtype, in boxes of 64 columns. */
CUresult fa_cuda_encode_tensor(CUtensorMap *map, const struct fa_params *p,
                               const struct fa_tensor *t, int64_t heads, int64_t rows, int64_t cols,
                               int box_rows);

/* Panels<rows, cols> of kernels/panels.cuh. */
int fa_cuda_panels_bytes(int rows, int cols);

/* The mask of a call: the size of an element of what a variant's `mask` says; a tile of so many
 * rows (kernels/mask_tile.cuh); whether what has an element for each score, or a gradient of it,
 * can be mapped, given its strides from the columns up; its map. */
int fa_cuda_mask_elem_bytes(int mask);
int fa_cuda_mask_bytes(const struct fa_cuda_variant *v, int rows);
int fa_cuda_scores_can_be_mapped(const void *data, const int64_t stride[4], int elem_bytes);
CUresult fa_cuda_encode_mask(CUtensorMap *map, const struct fa_params *p,
                             const struct fa_cuda_variant *v, int box_rows);

/* --- functions.c --- */

/* The function of a variant on a device whose context is current. What is not in memory is loaded
 * from the disk or compiled, but not compiled while the stream is being captured. */
enum fa_status fa_cuda_function(const struct fa_cuda_step *step, int device, CUstream stream,
                                CUkernel *function);

/* --- cache.c --- */

struct fa_cuda_code {
    unsigned char *data; /* from malloc: the cubin, then the compiler's log (with a NUL) */
    size_t cubin_bytes, log_bytes;
};

/* The machine code of a variant. With compile = 0, only what is on the disk. */
enum fa_status fa_cuda_code_of(const struct fa_cuda_variant *v, int compile,
                               struct fa_cuda_code *code);

/* --- compiler.c --- */

enum fa_status fa_cuda_compile_variant(const struct fa_cuda_variant *v, const char *options,
                                       struct fa_cuda_code *code);

int fa_cuda_is_header(const char *source_name);

/* The kernels' sources, from csrc/cuda/kernels; setup.py writes the file that defines this. */
struct fa_cuda_source {
    const char *name; /* as in #include; NULL past the last */
    const char *text;
};
extern const struct fa_cuda_source fa_cuda_sources[];

/* --- sha256.c --- */

struct fa_sha256 {
    uint32_t state[8];
    uint64_t length;
    unsigned char block[64];
};
void fa_sha256_init(struct fa_sha256 *h);
void fa_sha256_add(struct fa_sha256 *h, const void *data, size_t bytes);
void fa_sha256_finish(struct fa_sha256 *h, unsigned char digest[32]);

/* --- driver.c --- */

struct fa_cuda_driver {
#define DECLARE(NAME, SYMBOL, PARAMETERS) CUresult(*NAME) PARAMETERS;
    FA_DRIVER_FUNCTIONS(DECLARE)
#undef DECLARE
};

/* The driver, loaded and initialised at first use; NULL where there is none that will do. */
const struct fa_cuda_driver *fa_cuda_driver(void);

/* FA_FAILED, or FA_OUT_OF_MEMORY, with the driver's words for the error. */
enum fa_status fa_cuda_driver_error(const char *what, CUresult error);

/* What a device is: 90 for compute capability 9.0. */
enum fa_status fa_cuda_arch(int device, int *arch);

/* How many SMs a device has. */
enum fa_status fa_cuda_sm_count(int device, int *count);

/* Makes a context of the device current, if none is; *pushed then says that it has to be popped. */
enum fa_status fa_cuda_enter(int device, int *pushed);
void fa_cuda_leave(int pushed);

#endif
