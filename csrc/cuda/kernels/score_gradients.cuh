/* dS of 16 queries against a tile of keys, for the kernels that own queries: S and dP are computed
 * again. */
#pragma once

#include "accumulators.cuh"
#include "operand.cuh"
#include "scores.cuh"
#include "tile.cuh"
#include "workspace.cuh"

/* The row_stats of queries i and i + 8. */
struct RowStats {
    float lse[2], delta[2];

    __device__ __forceinline__ RowStats(const fa_kernel_params &p, int b, int h, int i) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const PairStats pair = *row_stats(p, b, h, (i + 8 * r) / 2 * 2);
            lse[r] = i % 2 ? pair.lse.y : pair.lse.x;
            delta[r] = i % 2 ? pair.delta.y : pair.delta.x;
        }
    }
};

/* C = A B^T: 16 rows of A against all rows of B. */
template <int TILES, class A, class B>
static __device__ __forceinline__ void multiply_rows(float (&C)[TILES][4], const A &a_tile,
                                                     int first_row, const B &b_tile) {
    set_to_zero(C);
#pragma unroll(PARTS == 1 ? 4                                                                      \
                          : 1) /* of more, the compiler loads more ahead than it has registers */
    for (int d = 0; d < A::WIDTH; d += 16) {
        Operand a;
        a_tile.a(a.part[0], first_row, d);
        a.split();
#pragma unroll
        for (int n = 0; n < TILES; n += 2) {
            Operand b;
            b_tile.b_of_rows(b.part[0], 8 * n, d);
            b.split();
            multiply(C, n, a, b);
        }
    }
}

/* dS = P (dP - delta) in place of dP, with P = exp(S - lse). The warp's queries begin at i, row
 * first_row of the tiles, the keys at j; stats are those of i + g and i + g + 8. */
template <int TILES, class QTile, class OTile, class KTile, class VTile>
static __device__ __forceinline__ void
score_gradients(float (&dS)[TILES][4], const fa_kernel_params &p, const RowStats &stats,
                const QTile &Q, const OTile &dO, int first_row, const KTile &K, const VTile &V,
                int b, int h, int i, int j) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float S[TILES][4];
    multiply_rows(S, Q, first_row, K);
    multiply_rows(dS, dO, first_row, V);

    const bool cut = is_cut(p, i, 16, j, 8 * TILES);
    const Dropout dropout(p, b, h);
    unsigned word[4];
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        if (FA_DROPOUT && n % 2 == 0)
            dropout.draw(word, i, j + 8 * n, g, t);
#pragma unroll
        for (int x = 0; x < 4; x++) {
            const int row = i + g + x / 2 * 8, col = j + 8 * n + 2 * t + x % 2;
            float s = S[n][x] * p.scale_log2e;
            if (FA_MASK)
                s += mask_value(p, mask_row(p.mask, b, h, min(row, p.seq_q - 1)),
                                min(col, p.seq_k - 1));
            if (cut && !is_visible(p, row, col))
                s = NEGATIVE_INFINITY;
            float kept = 1;
            if (FA_DROPOUT) {
                const int number = x / 2 * 4 + n % 2 * 2 + x % 2;
                kept = dropout.keeps(word, number) ? p.dropout_scale : 0;
            }
            dS[n][x] = probability(s, stats.lse[x / 2]) * (dS[n][x] * kept - stats.delta[x / 2]);
        }
    }
}
