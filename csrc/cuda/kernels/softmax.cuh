/* The online softmax (Milakov and Gimelshein 2018) of 16 rows of scores that a warp holds as
 * accumulators, with a lazy maximum: P = exp2(S - m) needs no more of m than that no sum overflows
 * and no weight that matters underflows. So m stays what it is, and nobody looks for the maximum,
 * until P has grown out of range. Exact, since O and l are relative to the same m. */
#pragma once

#include "operand.cuh"

/* Of the two rows g and g + 8 of a thread, in units of log2. */
struct Softmax {
    float m[2];   /* what scores are relative to; LOWEST_FINITE before the first one */
    float l[2];   /* row sums of P, of this thread's columns */
    bool settled; /* all 16 rows of the warp have an m */

    __device__ __forceinline__ Softmax() : settled(false) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            m[r] = LOWEST_FINITE;
            l[r] = 0;
        }
    }

    /* m = the maximum so far, with l and O relative to it. */
    template <int KEY_TILES, int OUT_TILES>
    __device__ __forceinline__ void raise(const float (&S)[KEY_TILES][4], float c,
                                          float (&O)[OUT_TILES][4]) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float most = S[0][2 * r];
#pragma unroll
            for (int n = 0; n < KEY_TILES; n++)
                most = fmaxf(most, fmaxf(S[n][2 * r], S[n][2 * r + 1]));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            const float m_new = fmaxf(m[r], most * c), rescale = exp2_approx(m[r] - m_new);
            m[r] = m_new;
            l[r] *= rescale;
#pragma unroll
            for (int d = 0; d < OUT_TILES; d++) {
                O[d][2 * r] *= rescale;
                O[d][2 * r + 1] *= rescale;
            }
        }
        settled = __all_sync(~0u, m[0] > LOWEST_FINITE && m[1] > LOWEST_FINITE);
    }

    /* P = exp2(c S - m), with c > 0, as an operand of P V. */
    template <int KEY_TILES, int STEPS, int OUT_TILES>
    __device__ __forceinline__ void operator()(unsigned (&P)[STEPS][WORDS],
                                               const float (&S)[KEY_TILES][4], float c,
                                               float (&O)[OUT_TILES][4]) {
        constexpr float LIMIT = 4096; /* of a sum; float16 ends at 65504 */
        float sum[2];
        bool in_range;
        bool raised = !settled;
#pragma unroll 1
        do {
            if (raised)
                raise(S, c, O);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                sum[r] = 0;
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++) {
                    const float first = exp2_approx(fmaf(S[n][2 * r], c, -m[r]));
                    const float second = exp2_approx(fmaf(S[n][2 * r + 1], c, -m[r]));
                    sum[r] += first + second;
                    put_pair(P, n, r, first, second);
                }
            }
            in_range = raised || __all_sync(~0u, sum[0] <= LIMIT && sum[1] <= LIMIT);
            raised = true;
        } while (!in_range); /* at most twice, also with a NaN */
        l[0] += sum[0];
        l[1] += sum[1];
    }
};
