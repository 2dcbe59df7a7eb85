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
#include "backward_sm90.cuh"
#include "bf16x3.cuh"
#include "tile.cuh"

constexpr int CONSUMERS = BLOCK_N / KEYS; /* warpgroups that compute */
constexpr int KEY_PANELS = (DEPTH + 63) / 64, VALUE_PANELS = (DEPTH_V + 63) / 64;
static_assert(BLOCK_M == 64 && THREADS == 128 * (CONSUMERS + 1), "see above");
static_assert(KEY_PANELS <= 2 && VALUE_PANELS <= 2, "what registers and shared memory hold");

/* 8 columns each: of a first panel, and of the second. */
constexpr int FIRST_K = KEY_PANELS == 2 ? 8 : DEPTH / 8;
constexpr int SECOND_K = KEY_PANELS == 2 ? DEPTH / 8 - 8 : FIRST_K;
constexpr int FIRST_V = VALUE_PANELS == 2 ? 8 : DEPTH_V / 8;
constexpr int SECOND_V = VALUE_PANELS == 2 ? DEPTH_V / 8 - 8 : FIRST_V;

/* Registers of a thread that splits and of one that computes, where two warpgroups compute; where
 * one does, there are 255 for all. The latter holds DEPTH / 2 of dK, DEPTH_V / 2 of dV, 48 of P's
 * or dS's parts, 32 of a product: 208 for a head size of 128. */
constexpr int PRODUCER_REGISTERS = 72, CONSUMER_REGISTERS = 216;

/* Whether there are registers for a product beside one that is on its way to dV or dK. */
constexpr bool AHEAD = KEY_PANELS + VALUE_PANELS < 4;

/* Named barriers: one a warpgroup each, by its number in the block. */
enum { dQ_DONE = 0, dS_READY = 2 };

/* All of shared memory. */
struct Shared {
    unsigned char K[CONSUMERS][KEY_PANELS][SplitPanel::BYTES];
    unsigned char V[CONSUMERS][VALUE_PANELS][SplitPanel::BYTES];
    unsigned char Q[Q_BUFFERS][KEY_PANELS][SplitPanel::BYTES];
    unsigned char dO[VALUE_PANELS][SplitPanel::BYTES];
    unsigned char dS[CONSUMERS][SplitPanel::BYTES]; /* transposed */
    float4 stats[Q_BUFFERS][BLOCK_M / 2];           /* row_stats of two queries; come with Q */
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
        float4 stats;
        if (brings_stats)
            stats = ((const float4 *)row_stats(p, work.b, tile.h, tile.i))[threadIdx.x];
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

using Parts = SplitOperand<QUERY_TILES / 2>; /* of P^T and dS^T */

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
                                                     const float4 *stats) {
    const int t = lane_anew() % 4;
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m++) {
        const float4 pair = stats[4 * m + t];
#pragma unroll
        for (int x = 0; x < 4; x++) {
            float P_x = 0;
#pragma unroll
            for (int i = BF16_PARTS - 1; i >= 0; i--)
                /* The half of a word, by an instruction that split() does not use: else the
                 * compiler keeps what that has computed, in twice as many registers. */
                P_x += __uint_as_float(
                    __byte_perm(P[i][m / 2][m % 2 * 2 + x / 2], 0, x % 2 ? 0x3244 : 0x1044));
            dP[m][x] = P_x * (dP[m][x] - (x % 2 ? pair.w : pair.y));
        }
    }
}

/* A warp's 16 rows of dS^T. */
static __device__ __forceinline__ void put_parts(SplitPanel panel, const Parts &dS) {
    const int lane = lane_anew(), row = thread_index() % 128 / 32 * 16 + lane % 16;
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
                                                     SplitPanel K, int zero) {
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
                Wgmma<8 * TILES>::template multiply_over<OVER_ROWS, OVER_ROWS>(C, a, b, zero);
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
    const int lane = lane_anew(), g = lane / 4, t = lane % 4;
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
    asm volatile("" : "+r"(b)); /* addresses anew: there are no registers to keep them in */
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
    const int zero = p.blocks < 0; /* see Wgmma */
    Scores S;                      /* then P, dP, dS, and dQ */
    Parts P;                       /* then dS */
    Scores ahead;
    auto &X = AHEAD ? ahead : S; /* on the way to dV or dK */
    set_to_zero(S);
    set_to_zero(ahead);
    auto &dV_first = reinterpret_cast<float (&)[FIRST_V][4]>(X);
    auto &dV_second = reinterpret_cast<float (&)[SECOND_V][4]>(X);
    auto &dK_first = reinterpret_cast<float (&)[FIRST_K][4]>(X);
    auto &dK_second = reinterpret_cast<float (&)[SECOND_K][4]>(X);
    auto &dQ_first = reinterpret_cast<float (&)[FIRST_K][4]>(S);
    auto &dQ_second = reinterpret_cast<float (&)[SECOND_K][4]>(S);

    unsigned n = 0; /* tiles so far */
    for (QueryTile tile = queries.first(); queries.has(tile); tile = queries.after(tile), n++) {
        const auto &stats = shared.stats[n % Q_BUFFERS];
        wait_full(shared.Q_full, n);
        multiply_split_cols<DEPTH>(S, K, Q(n), zero);
        wgmma_wait<0>();
        pin(S);
        exponentiate(p, S, stats, Dropout(p, work.b, tile.h), tile.i,
                     work.first_key + first_key_of_warp());
        split_scores(P, S);

        wait_full(shared.dO_full, n);
        multiply_split_rows(dV_first, P, dO, zero);
        if (VALUE_PANELS == 2) {
            wgmma_wait<0>();
            pin(dV_first);
            add_to_sum(dV, 0, dV_first);
            multiply_split_rows(dV_second, P, dO.after(1), zero);
        }
        if (AHEAD)
            multiply_split_cols<DEPTH_V>(S, V, dO, zero);
        wgmma_wait<AHEAD>();
        pin(dV_second);
        add_to_sum(dV, DEPTH_V / 8 - SECOND_V, dV_second);
        if (!AHEAD)
            multiply_split_cols<DEPTH_V>(S, V, dO, zero);
        wgmma_wait<0>();
        pin(S);
        release(&shared.dO_empty[0]);
        differentiate(S, P, stats);
        split_scores(P, S);

        barrier_sync(dQ_DONE + 1 + w, 128); /* of the tile before, by all warps */
        put_parts(dS, P);
        multiply_split_rows(dK_first, P, Q(n), zero);
        if (KEY_PANELS == 2) {
            wgmma_wait<0>();
            pin(dK_first);
            add_to_sum(dK, 0, dK_first);
            multiply_split_rows(dK_second, P, Q(n).after(1), zero);
        }
        barrier_sync(dS_READY + 1 + w, 128);
        if (AHEAD)
            multiply_keys(dQ_first, dS, K, zero);
        wgmma_wait<AHEAD>();
        pin(dK_second);
        release(&shared.Q_empty[n % Q_BUFFERS]);
        add_to_sum(dK, DEPTH / 8 - SECOND_K, dK_second);
        if (!AHEAD)
            multiply_keys(dQ_first, dS, K, zero);
        wgmma_wait<0>();
        pin(dQ_first);
        add_dQ(p, work.b, tile, 0, dQ_first);
        if (KEY_PANELS == 2) {
            multiply_keys(dQ_second, dS, K.after(1), zero);
            wgmma_wait<0>();
            pin(dQ_second);
            add_dQ(p, work.b, tile, 64, dQ_second);
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
