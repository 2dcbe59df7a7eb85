/* The FlashAttention backward of float32 for sm_90a, with wgmma: backward_sm90.cu with operands
 * that are split into three parts (bf16x3.cuh).
 *
 * A block owns 64 keys of one key head for each warpgroup that computes; the queries of every head
 * of the group pass by BLOCK_M at a time. Its first warpgroup fetches Q and dO and splits them.
 * Each of the others keeps dK and dV of its keys in registers:
 *
 *     S^T = K Q^T, dP^T = V dO^T    64 keys x BLOCK_M
 *     dV += P^T dO, dK += dS^T Q    64 keys x all columns
 *     dQ = dS K                     BLOCK_M x all columns, of 64 keys
 *
 * Scores are transposed because as accumulators P^T and dS^T have the layout of the first operand
 * of the products with dO and Q; for dQ the parts of dS go through shared memory. Tensor cores
 * round sums toward zero, which would add up over a long sequence: each product is a sum of its
 * own, which the threads add to dK and dV, and to dQ in global memory.
 *
 * Compiled with: HEAD_DIM, HEAD_DIM_V (both at most 128), BLOCK_M, BLOCK_N, Q_BUFFERS, STAGES (1,
 * of dO), FA_ALIGNED, FA_WINDOW. */
#include "accumulators.cuh"
#include "bf16x3.cuh"
#include "block_keys.cuh"
#include "ptx/stmatrix.cuh"
#include "query_tiles.cuh"
#include "ring.cuh"
#include "scores.cuh"
#include "tile.cuh"
#include "workspace.cuh"

constexpr int KEYS = 64;                  /* of a warpgroup */
constexpr int CONSUMERS = BLOCK_N / KEYS; /* warpgroups that compute */
constexpr int DEPTH = (HEAD_DIM + 15) / 16 * 16, DEPTH_V = (HEAD_DIM_V + 15) / 16 * 16;
constexpr int KEY_PANELS = (DEPTH + 63) / 64, VALUE_PANELS = (DEPTH_V + 63) / 64;
constexpr int QUERY_TILES = BLOCK_M / 8;
static_assert(BLOCK_M == 64 && THREADS == 128 * (CONSUMERS + 1), "see above");
static_assert(KEY_PANELS <= 2 && VALUE_PANELS <= 2, "what registers and shared memory hold");
static_assert(FA_STATS_ROWS % BLOCK_M == 0, "row_stats are there for whole tiles");

/* 8 columns each: of a first panel, and of the second. */
constexpr int FIRST_K = KEY_PANELS == 2 ? 8 : DEPTH / 8;
constexpr int SECOND_K = KEY_PANELS == 2 ? DEPTH / 8 - 8 : FIRST_K;
constexpr int FIRST_V = VALUE_PANELS == 2 ? 8 : DEPTH_V / 8;
constexpr int SECOND_V = VALUE_PANELS == 2 ? DEPTH_V / 8 - 8 : FIRST_V;

/* Registers of a thread that splits and of one that computes, where two warpgroups compute; where
 * one does, there are 255 for all. The latter holds DEPTH / 2 of dK, DEPTH_V / 2 of dV, 48 of P's
 * or dS's parts, 32 of a product: 208 for a head size of 128. */
constexpr int PRODUCER_REGISTERS = 72, CONSUMER_REGISTERS = 216;

/* Named barriers: one a warpgroup each, by its number in the block. */
enum { dQ_DONE = 0, dS_READY = 2 };

/* All of shared memory. */
struct Shared {
    unsigned char K[CONSUMERS][KEY_PANELS][SplitPanel::BYTES];
    unsigned char V[CONSUMERS][VALUE_PANELS][SplitPanel::BYTES];
    unsigned char Q[Q_BUFFERS][KEY_PANELS][SplitPanel::BYTES];
    unsigned char dO[VALUE_PANELS][SplitPanel::BYTES];
    unsigned char dS[CONSUMERS][SplitPanel::BYTES]; /* transposed */
    PairStats stats[Q_BUFFERS][BLOCK_M / 2];        /* row_stats; come with Q */
    mbarrier Q_full[Q_BUFFERS], Q_empty[Q_BUFFERS];
    mbarrier dO_full[1], dO_empty[1];
};
extern __shared__ __align__(1024) unsigned char shared_memory[];

/* --- the warpgroup that splits --- */

/* The panels of a tile of queries: those of dO, of which room is free first, then of Q. */
constexpr int TILE_PANELS = VALUE_PANELS + KEY_PANELS;

static __device__ __forceinline__ PanelSource source_of(const fa_kernel_params &p, int b,
                                                        QueryTile tile, int place) {
    const bool is_Q = place >= VALUE_PANELS;
    const fa_kernel_tensor &tensor = is_Q ? p.q : p.dout;
    return PanelSource(row_of(tensor, b, tile.h, tile.i), tensor.stride_row, p.seq_q - tile.i,
                       is_Q ? HEAD_DIM : HEAD_DIM_V, is_Q ? place - VALUE_PANELS : place);
}

/* While a panel is split, the next one is on its way to the same registers. */
static __device__ __forceinline__ void bring_panels(const fa_kernel_params &p, Shared &shared,
                                                    const Work &work, const QueryTiles &queries) {
    QueryTile tile = queries.first();
    if (!queries.has(tile))
        return;
    float4 x[PanelSource::COUNT];
    PanelSource first = source_of(p, work.b, tile, 0);
#pragma unroll
    for (int i = 0; i < PanelSource::COUNT; i++)
        x[i] = first.fetch();
    for (int n = 0, place = 0; queries.has(tile);) {
        const bool is_Q = place >= VALUE_PANELS, is_last = place == TILE_PANELS - 1;
        const int buffer = n % Q_BUFFERS;
        const bool brings_stats = place == VALUE_PANELS && threadIdx.x < BLOCK_M / 2;
        PairStats stats;
        if (brings_stats)
            stats = row_stats(p, work.b, tile.h, tile.i)[threadIdx.x];
        QueryTile following = is_last ? queries.after(tile) : tile;
        if (!queries.has(following))
            following = tile; /* fetched in vain */
        PanelSource next = source_of(p, work.b, following, is_last ? 0 : place + 1);

        const SplitPanel panel{is_Q ? shared_address(shared.Q[buffer][place - VALUE_PANELS])
                                    : shared_address(shared.dO[place])};
        if (is_Q)
            wait_empty(shared.Q_empty, n);
        else
            wait_empty(shared.dO_empty, n);
#pragma unroll
        for (int i = 0; i < PanelSource::COUNT; i++) {
            panel.put(i, x[i]);
            x[i] = next.fetch();
        }
        if (brings_stats)
            shared.stats[buffer][threadIdx.x] = stats;
        fence_proxy_async();
        release(is_Q ? &shared.Q_full[buffer] : &shared.dO_full[0]);

        place++;
        if (is_last) {
            tile = queries.after(tile);
            place = 0;
            n++;
        }
    }
}

/* --- a warpgroup that computes --- */

using Scores = float[QUERY_TILES][4]; /* transposed: rows are keys, see mma_16x8x16 */
template <int COLS> using Gradient = float[COLS / 8][4];
using Parts = SplitOperand<QUERY_TILES / 2>; /* of P^T and dS^T */

/* S becomes P = exp(S - lse). */
static __device__ __forceinline__ void exponentiate(const fa_kernel_params &p, Scores &S,
                                                    const PairStats *stats, int query,
                                                    int warp_key) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m++) {
        const float2 lse = stats[4 * m + t].lse;
#pragma unroll
        for (int x = 0; x < 4; x++)
            S[m][x] = probability(S[m][x] * p.scale_log2e, x % 2 ? lse.y : lse.x);
    }
    if (is_cut(p, query, BLOCK_M, warp_key, 16)) {
#pragma unroll
        for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
            for (int x = 0; x < 4; x++)
                if (!is_visible(p, query + 8 * m + 2 * t + x % 2, warp_key + g + x / 2 * 8))
                    S[m][x] = 0;
    }
}

static __device__ __forceinline__ void split_scores(Parts &parts, const Scores &C) {
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            unsigned part[BF16_PARTS];
            split(part, C[m][2 * r], C[m][2 * r + 1]);
#pragma unroll
            for (int i = 0; i < BF16_PARTS; i++)
                parts[i][m / 2][m % 2 * 2 + r] = part[i];
        }
}

/* dP becomes dS = P (dP - delta). There are no registers to keep P beside its parts, of which it is
 * the exact sum. */
static __device__ __forceinline__ void differentiate(Scores &dP, const Parts &P,
                                                     const PairStats *stats) {
    const int t = threadIdx.x % 32 % 4;
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m++) {
        const float2 delta = stats[4 * m + t].delta;
#pragma unroll
        for (int x = 0; x < 4; x++) {
            float P_x = 0;
#pragma unroll
            for (int i = BF16_PARTS - 1; i >= 0; i--)
                /* The half of a word, by an instruction that split() does not use: else the
                 * compiler keeps what that has computed, in twice as many registers. */
                P_x += __uint_as_float(
                    __byte_perm(P[i][m / 2][m % 2 * 2 + x / 2], 0, x % 2 ? 0x3244 : 0x1044));
            dP[m][x] = P_x * (dP[m][x] - (x % 2 ? delta.y : delta.x));
        }
    }
}

/* A warp's 16 rows of dS^T. */
static __device__ __forceinline__ void put_parts(SplitPanel panel, const Parts &dS) {
    const int lane = threadIdx.x % 32, row = thread_index() % 128 / 32 * 16 + lane % 16;
#pragma unroll
    for (int i = 0; i < BF16_PARTS; i++)
#pragma unroll
        for (int m = 0; m < QUERY_TILES / 2; m++)
            stmatrix_x4(panel.chunk(i, row, 16 * m + lane / 16 * 8), dS[i][m][0], dS[i][m][1],
                        dS[i][m][2], dS[i][m][3]);
    fence_proxy_async();
}

/* C = dS K, of the first columns of a panel of K. */
template <int TILES>
static __device__ __forceinline__ void multiply_keys(float (&C)[TILES][4], SplitPanel dS,
                                                     SplitPanel K) {
    wgmma_fence();
#pragma unroll
    for (int product = 0; product < BF16_PRODUCTS; product++) {
        int of_s, of_k;
        parts_of_product(product, of_s, of_k);
        dS = dS.anew();
        K = K.anew();
#pragma unroll
        for (int key = 0; key < KEYS; key += 16) {
            const auto a = dS.sum_over_rows(of_s, key), b = K.sum_over_rows(of_k, key);
            if (product == 0 && key == 0)
                Wgmma<8 * TILES>::template multiply_over<OVER_ROWS, OVER_ROWS>(C, a, b);
            else
                Wgmma<8 * TILES>::template multiply_add<OVER_ROWS, OVER_ROWS>(C, a, b);
        }
    }
    wgmma_commit();
}

/* Adds 16 queries x 16 columns to the sum of dQ in global memory, where of 16 columns first the
 * even ones lie, then the odd ones: lanes of neighbouring columns exchange one each. */
static __device__ __forceinline__ void add_dQ(const fa_kernel_params &p, int b, QueryTile at,
                                              int col, const float (&left)[4],
                                              const float (&right)[4]) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const bool odd = t % 2;
    float *tile = dq_sum_tile(p, b, at.h, at.i, col + 8 * odd);
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const auto &C = n ? right : left;
        const float top = __shfl_xor_sync(~0u, odd ? C[0] : C[1], 1);
        const float bottom = __shfl_xor_sync(~0u, odd ? C[2] : C[3], 1);
        const float sum[4] = {odd ? top : C[0], odd ? C[1] : top, odd ? bottom : C[2],
                              odd ? C[3] : bottom};
        reduce_add_v4(tile + 4 * (4 * g + 2 * n + t / 2), sum);
    }
}
template <int TILES>
static __device__ __forceinline__ void add_dQ(const fa_kernel_params &p, int b, QueryTile at,
                                              int col, const float (&C)[TILES][4]) {
    at.i += uniform(thread_index() / 32) % 4 * 16;
    if (p.dq_sum && at.i < p.seq_q) {
#pragma unroll
        for (int n = 0; n < TILES; n += 2)
            add_dQ(p, b, at, col + 8 * n, C[n], C[n + 1]);
    }
}

/* Of the 16 keys of this warp among those of the block. */
static __device__ __forceinline__ int first_key_of_warp() {
    return uniform(thread_index() / 32) * 16 - 64;
}

static __device__ __forceinline__ void
store_gradients(const fa_kernel_params &p, const Gradient<DEPTH> &dK, const Gradient<DEPTH_V> &dV) {
    const Work work(p); /* anew: there are no registers to keep it in */
    const int first = work.first_key + first_key_of_warp() + thread_index() % 32 / 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int key = first + 8 * r;
        if (key < p.seq_k && p.dk.data)
            store_row<HEAD_DIM>(row_of(p.dk, work.b, work.h, key), dK, r, p.scale);
        if (key < p.seq_k && p.dv.data)
            store_row<HEAD_DIM_V>(row_of(p.dv, work.b, work.h, key), dV, r, 1);
    }
}

/* Warpgroup w of those that compute. */
static __device__ __forceinline__ void compute(const fa_kernel_params &p, Shared &shared,
                                               const Work &work, const QueryTiles &queries, int w) {
    const int key = work.first_key + KEYS * w;
    const SplitPanel K{shared_address(shared.K) + w * KEY_PANELS * SplitPanel::BYTES};
    const SplitPanel V{shared_address(shared.V) + w * VALUE_PANELS * SplitPanel::BYTES};
    const SplitPanel dS{shared_address(shared.dS) + w * SplitPanel::BYTES};
    const SplitPanel dO{shared_address(shared.dO)};
    const auto Q = [&](unsigned n) {
        return SplitPanel{shared_address(shared.Q)}.after(n % Q_BUFFERS * KEY_PANELS);
    };
    split_rows<HEAD_DIM>(K, row_of(p.k, work.b, work.h, key), p.k.stride_row, p.seq_k - key);
    split_rows<HEAD_DIM_V>(V, row_of(p.v, work.b, work.h, key), p.v.stride_row, p.seq_k - key);
    barrier_sync(dS_READY + 1 + w, 128);

    Gradient<DEPTH> dK;
    Gradient<DEPTH_V> dV;
    set_to_zero(dK);
    set_to_zero(dV);
    Scores S; /* then P, dP, dS; and what is on its way to dV, dK or dQ */
    Parts P;  /* then dS */
    set_to_zero(S);
    auto &first_V = reinterpret_cast<float (&)[FIRST_V][4]>(S);
    auto &second_V = reinterpret_cast<float (&)[SECOND_V][4]>(S);
    auto &first_K = reinterpret_cast<float (&)[FIRST_K][4]>(S);
    auto &second_K = reinterpret_cast<float (&)[SECOND_K][4]>(S);

    unsigned n = 0; /* tiles so far */
    for (QueryTile tile = queries.first(); queries.has(tile); tile = queries.after(tile), n++) {
        const auto &stats = shared.stats[n % Q_BUFFERS];
        wait_full(shared.Q_full, n);
        multiply_split_cols<DEPTH>(S, K, Q(n));
        wgmma_wait<0>();
        pin(S);
        exponentiate(p, S, stats, tile.i, work.first_key + first_key_of_warp());
        split_scores(P, S);

        wait_full(shared.dO_full, n);
        multiply_split_rows(first_V, P, dO);
        if (VALUE_PANELS == 2) {
            wgmma_wait<0>();
            pin(first_V);
            add_to_sum(dV, 0, first_V);
            multiply_split_rows(second_V, P, dO.after(1));
        }
        wgmma_wait<0>();
        pin(second_V);
        add_to_sum(dV, DEPTH_V / 8 - SECOND_V, second_V);
        multiply_split_cols<DEPTH_V>(S, V, dO);
        wgmma_wait<0>();
        pin(S);
        release(&shared.dO_empty[0]);
        differentiate(S, P, stats);
        split_scores(P, S);

        barrier_sync(dQ_DONE + 1 + w, 128); /* of the tile before, by all warps */
        put_parts(dS, P);
        multiply_split_rows(first_K, P, Q(n));
        if (KEY_PANELS == 2) {
            wgmma_wait<0>();
            pin(first_K);
            add_to_sum(dK, 0, first_K);
            multiply_split_rows(second_K, P, Q(n).after(1));
        }
        barrier_sync(dS_READY + 1 + w, 128);
        wgmma_wait<0>();
        pin(second_K);
        release(&shared.Q_empty[n % Q_BUFFERS]);
        add_to_sum(dK, DEPTH / 8 - SECOND_K, second_K);
        multiply_keys(first_K, dS, K);
        wgmma_wait<0>();
        pin(first_K);
        add_dQ(p, work.b, tile, 0, first_K);
        if (KEY_PANELS == 2) {
            multiply_keys(second_K, dS, K.after(1));
            wgmma_wait<0>();
            pin(second_K);
            add_dQ(p, work.b, tile, 64, second_K);
        }
    }

    store_gradients(p, dK, dV);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    fa_backward_f32_sm90(const __grid_constant__ fa_kernel_params p) {
    Shared &shared = *(Shared *)shared_memory;
    if (threadIdx.x == 0) {
        for (int i = 0; i < Q_BUFFERS; i++) { /* by each warp */
            mbarrier_init(&shared.Q_full[i], 4 * KEY_PANELS);
            mbarrier_init(&shared.Q_empty[i], 4 * CONSUMERS);
        }
        mbarrier_init(&shared.dO_full[0], 4 * VALUE_PANELS);
        mbarrier_init(&shared.dO_empty[0], 4 * CONSUMERS);
        mbarrier_init_fence();
    }
    __syncthreads();

    const Work work(p);
    const QueryTiles queries(p, work.h, work.first_key);
    const int warpgroup = uniform(threadIdx.x / 128);
    if (warpgroup == 0) {
        if (CONSUMERS > 1)
            registers_decrease<PRODUCER_REGISTERS>();
        bring_panels(p, shared, work, queries);
    } else {
        if (CONSUMERS > 1)
            registers_increase<CONSUMER_REGISTERS>();
        compute(p, shared, work, queries, CONSUMERS == 1 ? 0 : warpgroup - 1);
    }
}
