/* Scores in accumulators between Q K^T and the softmax of softmax.cuh. */
#pragma once

#include "scores.cuh"

static __device__ __forceinline__ void add_mask(float &s, float c, mask_elem value) {
    s = FA_MASK == 1 && !value ? NEGATIVE_INFINITY : s * c + mask_term(value);
}

/* The scores of 16 rows from i on and of the keys from j on, as the softmax takes them: minus
 * infinity where a query does not see a key, masks added; returns what they are to be multiplied
 * with, more than 0. */
template <int KEY_TILES>
static __device__ __forceinline__ float finish_scores(float (&S)[KEY_TILES][4],
                                                      const fa_kernel_params &p, int b, int h,
                                                      int i, int j, bool cut) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float c = p.scale_log2e;
    if (FA_MASK && !cut && has_pairs(p.mask)) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = min(i + g + 8 * r, p.seq_q - 1);
            const auto *pairs = (const MaskPair *)((const mask_elem *)p.mask.data +
                                                   mask_row(p.mask, b, h, row) + j + 2 * t);
#pragma unroll
            for (int n = 0; n < KEY_TILES; n++) {
                const MaskPair pair = pairs[4 * n];
                add_mask(S[n][2 * r], c, pair.first);
                add_mask(S[n][2 * r + 1], c, pair.second);
            }
        }
    } else if (FA_MASK) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = min(i + g + 8 * r, p.seq_q - 1);
            const auto *values = (const mask_elem *)p.mask.data + mask_row(p.mask, b, h, row);
#pragma unroll
            for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
                for (int x = 0; x < 2; x++) {
                    const int col = min(j + 8 * n + 2 * t + x, p.seq_k - 1);
                    add_mask(S[n][2 * r + x], c, values[col * p.mask.stride_col]);
                }
        }
    } else if (c <= 0) {
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int x = 0; x < 4; x++)
                S[n][x] *= c;
    }
    if (FA_MASK || c <= 0)
        c = 1;
    if (cut)
        hide_scores(S, p, i + g, j + 2 * t);
    return c;
}
