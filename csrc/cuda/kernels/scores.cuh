/* What happens to a score between Q K^T and the softmax, and to a probability after it. A thread
 * has scores in accumulators of mma_16x8x16, named by row and by the first of two columns. */
#pragma once

#include "elem.cuh"
#include "params.h"

#if FA_MASK == 1
typedef unsigned char mask_elem;
#elif FA_MASK == 2
typedef elem mask_elem;
#else
typedef float mask_elem;
#endif

/* What is added to a score in units of log2. The lowest finite numbers stay finite: where all keys
 * of a row have one, it is not a row that attends to nothing. */
static __device__ __forceinline__ float mask_term(mask_elem value) {
#if FA_MASK == 1
    return value ? 0 : NEGATIVE_INFINITY;
#else
#if FA_MASK == 2
    const float mask = to_float(value);
#else
    const float mask = value;
#endif
    const float scaled = mask * LOG2E;
    return scaled == NEGATIVE_INFINITY ? mask : scaled;
#endif
}

/* Added to the log2-scaled score (i, j); minus infinity where a bool mask is false. */
static __device__ __forceinline__ float mask_value(const fa_kernel_params &p, long long row_start,
                                                   int j) {
    return mask_term(((const mask_elem *)p.mask.data)[row_start + j * p.mask.stride_col]);
}

/* The values at columns j and j + 1, j even, where they can be loaded at once. */
struct alignas(2 * sizeof(mask_elem)) MaskPair {
    mask_elem first, second;
};
static __device__ __forceinline__ bool has_pairs(const fa_kernel_mask &mask) {
    return mask.stride_col == 1 && (long long)mask.data % sizeof(MaskPair) == 0 &&
           (mask.stride_batch | mask.stride_head | mask.stride_row) % 2 == 0;
}

static __device__ __forceinline__ long long mask_row(const fa_kernel_mask &mask, int b, int h,
                                                     int i) {
    return b * mask.stride_batch + h * mask.stride_head + i * mask.stride_row;
}

static __device__ __forceinline__ bool is_visible(const fa_kernel_params &p, int i, int j) {
    return j < p.seq_k && (!FA_WINDOW || (i + p.window_begin <= j && j < i + p.window_end));
}

/* Whether some score of rows [i, i + rows) and columns [j, j + cols) is not visible. */
static __device__ __forceinline__ bool is_cut(const fa_kernel_params &p, int i, int rows, int j,
                                              int cols) {
    return j + cols > p.seq_k ||
           (FA_WINDOW && (i + rows - 1 + p.window_begin > j || i + p.window_end < j + cols));
}

/* Of a thread's scores, which begin at row i and column j of S: what is not visible becomes minus
 * infinity. */
template <int TILES>
static __device__ __forceinline__ void hide_scores(float (&S)[TILES][4], const fa_kernel_params &p,
                                                   int i, int j) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = i + 8 * r, begin = FA_WINDOW ? row + p.window_begin - j : 0;
        const int end = min(p.seq_k, FA_WINDOW ? row + p.window_end : p.seq_k) - j;
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int x = 0; x < 2; x++) {
                if (8 * n + x >= end || (FA_WINDOW && 8 * n + x < begin))
                    S[n][2 * r + x] = NEGATIVE_INFINITY;
            }
    }
}

/* Whether none of these scores is visible through the window. */
static __device__ __forceinline__ bool is_hidden(const fa_kernel_params &p, int i, int rows, int j,
                                                 int cols) {
    return FA_WINDOW && (i + rows - 1 + p.window_end <= j || j + cols <= i + p.window_begin);
}

/* P in the backward, from a score and lse, both in log2. At most 1, also where scores are so large
 * that lse has lost the difference. */
static __device__ __forceinline__ float probability(float score, float lse) {
    return exp2_approx(min_nan(score - lse, 0));
}

/* --- dropout: the rule of csrc/dropout.h, whose eight numbers are what a thread holds of a 16 x 16
 * tile: rows g and g + 8, columns 2t, 2t + 1, 2t + 8 and 2t + 9 --- */

struct Dropout {
    unsigned key0, key1, offset, head;
    unsigned limit;   /* of numbers, twice */
    unsigned flipped; /* ~0: kept are those below */

    __device__ __forceinline__ Dropout() {}
    __device__ __forceinline__ Dropout(const fa_kernel_params &p, int b, int h) {
#if FA_DROPOUT
        /* From lane 0, for the compiler to know that they are the same in all. */
        const unsigned long long seed = p.rng_state[0];
        key0 = __shfl_sync(~0u, (unsigned)seed, 0);
        key1 = __shfl_sync(~0u, (unsigned)(seed >> 32), 0);
        offset = __shfl_sync(~0u, (unsigned)p.rng_state[1], 0);
        head = b * p.heads_q + h;
        flipped = p.dropout_threshold > 0x4000 ? ~0u : 0;
        limit = (flipped ? 0x8000 - p.dropout_threshold : p.dropout_threshold) * 0x10001;
#endif
    }

    /* The numbers of the 16 x 16 tile at (i, j), multiples of 16, for rows i + g and i + g + 8 and
     * the columns from j + 2t on. n = (row bit 3) * 4 + (column bit 3) * 2 + column bit 0. */
    __device__ __forceinline__ void draw(unsigned (&word)[4], int i, int j, int g, int t) const {
        unsigned c0 = (i >> 4 << 3) + g, c1 = (j >> 4 << 2) + t, c2 = head, c3 = offset;
        unsigned k0 = key0, k1 = key1;
#pragma unroll
        for (int round = 0; round < 7; round++) {
            const unsigned long long product0 = 0xD2511F53ull * c0, product1 = 0xCD9E8D57ull * c2;
            const unsigned lo0 = (unsigned)product0, hi0 = product0 >> 32;
            const unsigned lo1 = (unsigned)product1, hi1 = product1 >> 32;
            c0 = hi1 ^ c1 ^ k0;
            c1 = lo1;
            c2 = hi0 ^ c3 ^ k1;
            c3 = lo0;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
    }

    /* Of the same tile, transposed: for columns j + g and j + g + 8 and the rows from i + 2t on, n
     * = (row bit 0) * 4 + (row bit 3) * 2 + (column bit 3). Two lanes of neighbouring columns need
     * the same two counters, half the numbers of each: each draws one and they exchange halves. */
    __device__ __forceinline__ void draw_transposed(unsigned (&word)[4], int i, int j, int g,
                                                    int t) const {
        const bool odd = g % 2;
        const unsigned low = 0x5410, high = 0x7632; /* halves of two words, for __byte_perm */
        unsigned drawn[4], mine[2], theirs[2];
        draw(drawn, i, j, 2 * t + odd, g / 2);
#pragma unroll
        for (int w = 0; w < 2; w++) {
            mine[w] = __byte_perm(drawn[2 * w], drawn[2 * w + 1], odd ? high : low);
            theirs[w] = __byte_perm(drawn[2 * w], drawn[2 * w + 1], odd ? low : high);
            theirs[w] = __shfl_xor_sync(~0u, theirs[w], 4);
            word[w] = odd ? theirs[w] : mine[w];
            word[2 + w] = odd ? mine[w] : theirs[w];
        }
    }

    /* Ones in the halves of a word whose numbers say to keep. As floats of 16 bits without a sign
     * numbers have the same order, NaN last. */
    __device__ __forceinline__ unsigned kept(unsigned word) const {
        return size_not_less_f16x2(word, limit) ^ flipped;
    }

    __device__ __forceinline__ bool keeps(const unsigned (&word)[4], int n) const {
        return kept(word[n / 2]) & (n % 2 ? 0x80000000 : 0x8000);
    }
};
