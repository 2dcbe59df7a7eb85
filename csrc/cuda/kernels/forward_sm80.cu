/* The FlashAttention forward for sm_80 and up (Dao 2023, Algorithm 1), with mma.sync, ldmatrix and
 * cp.async.
 *
 * A block owns BLOCK_M queries of one head, a warp WARP_TILES times 16 of them; keys and values
 * pass by BLOCK_N at a time, the last ones first: under a causal mask these are the nearest, which
 * mostly have the largest scores. With one stage, V of a tile is on its way while the warps
 * multiply with its K, and the next K while they multiply with V; with two, all of the next tile
 * is on its way.
 *
 * Compiled with: FA_DTYPE_BF16, FA_DTYPE_FP16 or FA_DTYPE_FP32, FA_TF32 (of floats: one product in
 * TF32, not three), HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, THREADS, STAGES (1 or 2 tiles of what
 * passes by are in shared memory), FA_ALIGNED, FA_MASK (0 none, 1 bool, 2 dtype of q, 3 float),
 * FA_WINDOW, FA_DROPOUT. */
#include "accumulators.cuh"
#include "block_order.cuh"
#include "finish_scores.cuh"
#include "operand.cuh"
#include "scores.cuh"
#include "softmax.cuh"
#include "tile.cuh"

constexpr int WARP_TILES = BLOCK_M / (THREADS / 32) / 16; /* of 16 queries */
constexpr int KEY_TILES = BLOCK_N / 8, KEY_STEPS = BLOCK_N / 16;
constexpr int OUT_TILES = round_up_16(HEAD_DIM_V) / 8;
constexpr int DEPTH_STEPS = round_up_16(HEAD_DIM) / 16;
static_assert(WARP_TILES * 16 * (THREADS / 32) == BLOCK_M, "a warp has whole tiles of queries");
static_assert(BLOCK_N % 16 == 0, "keys come in pairs of tiles");

/* How many steps of a product are unrolled: all, or one, since the compiler starts on later ones
 * early, for which operands of two parts leave no registers. */
constexpr int UNROLL = PARTS == 1 ? 64 : 1;

/* Q stays in registers if there is room beside O, S and P of 16 rows. */
constexpr bool KEEP_Q =
    PARTS == 1 &&
    WARP_TILES * (WORDS * DEPTH_STEPS + 4 * (OUT_TILES + KEY_TILES)) + WORDS * KEY_STEPS <= 190;

using QTile = Tile<BLOCK_M, HEAD_DIM>;
using KTile = Tile<BLOCK_N, HEAD_DIM>;
using VTile = Tile<BLOCK_N, HEAD_DIM_V>;
using OTile = Tile<BLOCK_M, HEAD_DIM_V>; /* takes the place of Q, K and V at the end */

extern __shared__ __align__(16) unsigned char shared_memory[];

/* A column of tiles of Q: dimensions 16 step and on. */
static __device__ __forceinline__ void load_queries(Operand (&a)[WARP_TILES], const QTile &Q,
                                                    int first_row, int step) {
#pragma unroll
    for (int w = 0; w < WARP_TILES; w++) {
        unsigned r[WORDS];
        Q.a(r, first_row + 16 * w, 16 * step);
        a[w] = Operand(r);
    }
}

/* S = Q K^T */
static __device__ __forceinline__ void
multiply_scores(float (&S)[WARP_TILES][KEY_TILES][4], const QTile &Q, int first_row,
                const Operand (&kept)[KEEP_Q ? DEPTH_STEPS : 1][WARP_TILES], const KTile &K) {
    set_to_zero(S);
#pragma unroll(UNROLL)
    for (int step = 0; step < DEPTH_STEPS; step++) {
        Operand loaded[WARP_TILES];
        if (!KEEP_Q)
            load_queries(loaded, Q, first_row, step);
        const auto &a = *(KEEP_Q ? &kept[step] : &loaded);
#pragma unroll
        for (int n = 0; n < KEY_TILES; n += 2) {
            unsigned b[WORDS];
            K.b_of_rows(b, 8 * n, 16 * step);
            multiply(S, n, a, Operand(b));
        }
    }
}

/* The numbers that decide which of P to keep, of 16 keys. */
struct Numbers {
    unsigned word[WARP_TILES][4];

    /* Of the warp's rows, from i on, and the keys from j on. */
    __device__ __forceinline__ void draw(const Dropout &dropout, int i, int j) {
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int w = 0; w < WARP_TILES; w++)
            dropout.draw(word[w], i + 16 * w, j, g, t);
    }

    /* P of these keys, which come first. What is kept is divided by 1 - dropout_p at the end, in O.
     */
    __device__ __forceinline__ void drop(unsigned (&P)[WARP_TILES][KEY_STEPS][WORDS],
                                         const Dropout &dropout) const {
#pragma unroll
        for (int w = 0; w < WARP_TILES; w++)
#pragma unroll
            for (int x = 0; x < 4; x++)
                drop_pair(P[w], x % 2, x / 2, dropout.kept(word[w][x]));
    }
};

/* O += P V, of the warp's rows, from i on, and the keys from j on; P is used up. The numbers of the
 * next keys are drawn while the tensor cores are busy. */
static __device__ __forceinline__ void multiply_values(float (&O)[WARP_TILES][OUT_TILES][4],
                                                       unsigned (&P)[WARP_TILES][KEY_STEPS][WORDS],
                                                       const VTile &V, const Dropout &dropout,
                                                       int i, int j) {
    Numbers numbers;
    if (FA_DROPOUT)
        numbers.draw(dropout, i, j);
#pragma unroll(UNROLL)
    for (int step = 0; step < KEY_STEPS; step++) {
        if (FA_DROPOUT) {
            numbers.drop(P, dropout);
            if (step + 1 < KEY_STEPS)
                numbers.draw(dropout, i, j + 16 * (step + 1));
        }
        Operand a[WARP_TILES];
#pragma unroll
        for (int w = 0; w < WARP_TILES; w++) {
            a[w] = Operand(P[w][0]);
#pragma unroll
            for (int next = 1; next < KEY_STEPS; next++)
#pragma unroll
                for (int x = 0; x < WORDS; x++)
                    P[w][next - 1][x] = P[w][next][x];
        }
#pragma unroll
        for (int d = 0; d < OUT_TILES; d += 2) {
            unsigned b[WORDS];
            V.b_of_cols(b, 16 * step, 8 * d);
            multiply(O, d, a, Operand(b));
        }
    }
}

/* At least two blocks of 128 threads on a multiprocessor, so that one multiplies while the other
 * is busy with its softmax: 255 registers for a thread. */
extern "C" __global__ void __launch_bounds__(THREADS, 256 / THREADS)
    fa_forward(const __grid_constant__ fa_kernel_params p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    /* Under a causal mask the last queries have the most keys. */
    const OrderedBlock block = ordered_block(p, p.heads_q, blockIdx.x);
    const int h = block.head % p.heads_q, b = block.head / p.heads_q;
    /* A division takes time, with signs more registers; for float32 a comparison, too. */
    const int hk = !FA_DTYPE_FP32 && p.heads_q == p.heads_k
                       ? h
                       : (unsigned)h / ((unsigned)p.heads_q / p.heads_k);
    const int first_query = (p.blocks - 1 - block.index) * BLOCK_M,
              warp_row = warp * 16 * WARP_TILES;

    const QTile Q{shared_address(shared_memory)};
    const unsigned stages = Q.address + QTile::BYTES;
    constexpr int STAGE_BYTES = KTile::BYTES + VTile::BYTES;
    const auto load_K = [&](int stage, int key) {
        KTile{stages + stage * STAGE_BYTES}.load(row_of(p.k, b, hk, key), p.k.stride_row,
                                                 p.seq_k - key);
    };
    const auto load_V = [&](int stage, int key) {
        VTile{stages + stage * STAGE_BYTES + KTile::BYTES}.load(row_of(p.v, b, hk, key),
                                                                p.v.stride_row, p.seq_k - key);
    };

    int begin = 0, end = p.seq_k;
    if (FA_WINDOW) {
        begin = max(0, first_query + p.window_begin) / BLOCK_N * BLOCK_N;
        end = min(end, min(first_query + BLOCK_M, p.seq_q) - 1 + p.window_end);
    }
    const int last = end > begin ? (end - 1) / BLOCK_N * BLOCK_N : begin - BLOCK_N;

    Q.load(row_of(p.q, b, h, first_query), p.q.stride_row, p.seq_q - first_query);
    if (last >= begin) {
        load_K(0, last);
        if (STAGES == 2)
            load_V(0, last);
    }
    cp_async_commit();

    float O[WARP_TILES][OUT_TILES][4] = {};
    Softmax softmax[WARP_TILES];
    Operand kept[KEEP_Q ? DEPTH_STEPS : 1][WARP_TILES];
    if (KEEP_Q) {
        cp_async_wait<0>();
        __syncthreads();
#pragma unroll
        for (int step = 0; step < DEPTH_STEPS; step++)
            load_queries(kept[step], Q, warp_row, step);
    }

    const Dropout dropout(p, b, h);
    for (int key = last, stage = 0; key >= begin; key -= BLOCK_N, stage ^= STAGES - 1) {
        const KTile K{stages + stage * STAGE_BYTES};
        const VTile V{K.address + KTile::BYTES};
        cp_async_wait<0>();
        __syncthreads(); /* K is there, and nobody reads the previous V any more */
        if (STAGES == 1) {
            load_V(0, key);
        } else if (key > begin) {
            load_K(1 - stage, key - BLOCK_N);
            load_V(1 - stage, key - BLOCK_N);
        }
        cp_async_commit();

        const int i = first_query + warp_row;
        const bool seen = !is_hidden(p, i, 16 * WARP_TILES, key, BLOCK_N);
        float S[WARP_TILES][KEY_TILES][4];
        if (seen)
            multiply_scores(S, Q, warp_row, kept, K);
        if (STAGES == 1) {
            cp_async_wait<0>();
            __syncthreads(); /* V is there, and nobody reads K any more */
            if (key > begin)
                load_K(0, key - BLOCK_N);
            cp_async_commit();
        }
        if (!seen)
            continue;

        const bool cut = is_cut(p, i, 16 * WARP_TILES, key, BLOCK_N);
        unsigned P[WARP_TILES][KEY_STEPS][WORDS];
#pragma unroll
        for (int w = 0; w < WARP_TILES; w++) {
            const float c = finish_scores(S[w], p, b, h, i + 16 * w, key, cut);
            softmax[w](P[w], S[w], c, O[w]);
        }
        multiply_values(O, P, V, dropout, i, key);
    }
    cp_async_wait<0>();
    __syncthreads();

    const OTile out{Q.address};
#pragma unroll
    for (int w = 0; w < WARP_TILES; w++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float sum = softmax[w].l[r];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            const float f = sum == 0 ? 0 : (FA_DROPOUT ? p.dropout_scale : 1) / sum;
            const int row = warp_row + 16 * w + g + 8 * r;
#pragma unroll
            for (int d = 0; d < OUT_TILES; d += 2)
                put_row(out, row, 8 * d, t, O[w][d], O[w][d + 1], r, f);
            if (t == 0 && first_query + row < p.seq_q)
                p.lse[((long long)b * p.heads_q + h) * p.seq_q + first_query + row] =
                    softmax[w].m[r] * LN2 + logf(sum);
        }
    __syncwarp();
    out.store(row_of(p.out, b, h, first_query), p.out.stride_row, p.seq_q - first_query, warp_row,
              16 * WARP_TILES, lane, 32);
}
