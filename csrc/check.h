/* What no kernel could carry out, on whatever device. */
#ifndef FA_CHECK_H
#define FA_CHECK_H

#include "flash_attention.h"

/* Whether several scores have the same element of the mask's gradient. */
static inline int fa_mask_grad_broadcasts(const struct fa_params *p) {
    const struct fa_mask_grad *m = &p->dmask;
    return (p->batch > 1 && !m->stride_batch) || (p->heads_q > 1 && !m->stride_head) ||
           (p->seq_q > 1 && !m->stride_row) || (p->seq_k > 1 && !m->stride_col);
}

/* Why p is FA_INVALID, a static string that names the field; NULL: it is not. */
static inline const char *fa_check(const struct fa_params *p) {
    if (p->dtype != FA_FLOAT32 && p->dtype != FA_FLOAT64 && p->dtype != FA_BFLOAT16 &&
        p->dtype != FA_FLOAT16)
        return "dtype: must be float32, float64, bfloat16 or float16";
    if (p->batch < 0 || p->heads_q < 0 || p->heads_k < 0 || p->seq_q < 0 || p->seq_k < 0 ||
        p->head_dim < 0 || p->head_dim_v < 0)
        return "batch, heads, seq and head_dim: must not be negative";
    if (p->heads_k ? p->heads_q % p->heads_k != 0 : p->heads_q != 0)
        return "heads_q: must be a multiple of heads_k";
    if (!(p->dropout_p >= 0 && p->dropout_p <= 1)) /* a NaN, too */
        return "dropout_p: must be in [0, 1]";
    if (p->dropout_p > 0 && !p->rng_state)
        return "rng_state: needed for dropout";
    if (p->mask.data && p->mask.dtype != FA_BOOL && p->mask.dtype != FA_FLOAT32 &&
        p->mask.dtype != p->dtype)
        return "mask: must be bool, float32 or of the dtype of q";
    if (p->dmask.in_dtype && (p->mask.dtype != p->dtype || fa_mask_grad_broadcasts(p)))
        return "dmask: in_dtype is for a mask of the dtype of q that broadcasts nothing";
    return NULL;
}

#endif
