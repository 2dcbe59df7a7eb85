/* The .inl files are written once and included for every dtype of every instruction set. Before it
 * includes one, an ISA file defines
 *
 *     ELEM     what tensors hold:               f32, f64, bf16, f16
 *     REAL     what is computed in ("acc"):     f32, f64
 *     OPERAND  what gemm multiplies:            f32, f64, or bf16x2, pairs along the sum
 *
 * and the names below, expanded where they are used, follow. Primitives are the ISA header's:
 * V(load) is f32_load, OP(dot) f32_dot or bf16x2_dot, E(store) bf16_store. */
#ifndef FA_CPU_TEMPLATE_H
#define FA_CPU_TEMPLATE_H

#include <float.h>
#include <math.h>
#include <string.h>

#include "../dropout.h"
#include "kernels.h"

#define FA_PASTE(a, b) a##_##b
#define FA_JOIN(a, b) FA_PASTE(a, b)

#define elem FA_JOIN(ELEM, elem)
#define real FA_JOIN(REAL, real)
#define vec FA_JOIN(REAL, vec)
#define operand FA_JOIN(OPERAND, operand)
#define operand_vec FA_JOIN(OPERAND, operand_vec)
#define LANES FA_JOIN(REAL, LANES)    /* reals in a vector */
#define DEPTH FA_JOIN(OPERAND, DEPTH) /* elements in an operand */
#define V(name) FA_JOIN(REAL, name)
#define E(name) FA_JOIN(ELEM, name)
#define OP(name) FA_JOIN(OPERAND, name)

/* Functions that exist once for every ELEM or OPERAND. */
#define gemm FA_JOIN(gemm, OPERAND)
#define gemm_block FA_JOIN(gemm_block, OPERAND)
#define gemm_few FA_JOIN(gemm_few, OPERAND)
#define GEMM_FEW FA_JOIN(GEMM_FEW, OPERAND)
#define GEMM_FEW_ROWS FA_JOIN(GEMM_FEW_ROWS, OPERAND)
#define exp2_vecs FA_JOIN(exp2_vecs, REAL)
#define T(name) FA_JOIN(name, ELEM)

#define FA_ALWAYS_INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define FA_UNROLL _Pragma("clang loop unroll(full)")
#define FA_NO_UNROLL _Pragma("clang loop unroll(disable)")
#else
#define FA_UNROLL _Pragma("GCC unroll 16")
#define FA_NO_UNROLL _Pragma("GCC unroll 1")
#endif

#define f32_BIG FLT_MAX
#define f64_BIG DBL_MAX

#define FA_LOG2E 1.44269504088896340736

enum { EXP2_VECS = 4 }; /* how many vectors exp2_vecs takes */

/* Rows that a later product reads. Hardware does not guess them where rows lie far apart, so they
 * are fetched into L2 between the blocks of an earlier one. */
struct fa_ahead {
    const char *row;
    int64_t stride, bytes; /* from row to row, and of one */
    int64_t rows, step;    /* left to fetch, and at a time */
};

static inline void fa_fetch(struct fa_ahead *ahead) {
    for (int64_t i = fa_min(ahead->step, ahead->rows); i > 0; i--) {
        for (int64_t x = 0; x < ahead->bytes; x += 64)
            __builtin_prefetch(ahead->row + x, 0, 2);
        ahead->row += ahead->stride;
        ahead->rows--;
    }
}

/* The entry points that kernels.inl gives for one ELEM. */
#define FA_KERNELS_OF(ELEM_)                                                                       \
    {                                                                                              \
        .forward_scratch = FA_JOIN(forward_scratch_bytes, ELEM_),                                  \
        .forward_tile = FA_JOIN(forward_tile, ELEM_),                                              \
        .forward_partial = FA_JOIN(forward_partial, ELEM_),                                        \
        .forward_merge = FA_JOIN(forward_merge, ELEM_),                                            \
        .backward_scratch = FA_JOIN(backward_scratch_bytes, ELEM_),                                \
        .backward_keys = FA_JOIN(backward_keys, ELEM_),                                            \
        .dq_in_place = FA_JOIN(dq_in_place, ELEM_),                                                \
        .backward_dq = FA_JOIN(backward_dq_bytes, ELEM_),                                          \
        .backward_store_dq = FA_JOIN(backward_store_dq, ELEM_),                                    \
    }

#endif
