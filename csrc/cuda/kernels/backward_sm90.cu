/* The FlashAttention backward for sm_90a (Dao 2023, Algorithm 2), with TMA and wgmma.
 *
 * A block owns BLOCK_N keys of one key head; the queries of every head of the group pass by BLOCK_M
 * at a time. Its first warpgroup moves data: one warp brings K and Q, one V and dO. The other two
 * own 64 keys each, and keep their dK and dV in registers until they are finished:
 *
 *     S^T = K Q^T, dP^T = V dO^T    64 keys x BLOCK_M
 *     dV += P^T dO, dK += dS^T Q    64 keys x all columns
 *     dQ = dS K                     64 queries x at most 64 columns, of all keys of the block
 *
 * Scores are transposed because as accumulators P^T and dS^T have the layout of the first operand
 * of the products with dO and Q: they stay in registers. Only dQ wants all keys; for it dS goes
 * through shared memory. The sum of dQ over all blocks is made in global memory, in float, by the
 * copy engine.
 *
 * What the threads compute is hidden behind products: S of the next tile is asked for before dK and
 * dQ of this one, under which its exponentials run; dS runs under dV; dQ is taken away under dP.
 * The order of compute() is also what leaves registers enough: the compiler gives S, dP, P and dS
 * fixed places only if each is dead before the next is asked for.
 *
 * Compiled with: FA_DTYPE_BF16 or FA_DTYPE_FP16, HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, Q_BUFFERS,
 * STAGES (of dO), FA_WINDOW, FA_DROPOUT, and the macros of backward_mask_sm90.cuh. */
#include "backward_sm90.cuh"

constexpr int CONSUMERS = 2; /* warpgroups that compute */
static_assert(BLOCK_N == KEYS * CONSUMERS && THREADS == 128 * (CONSUMERS + 1), "see above");

/* Registers of a thread that moves data and of one that computes; at first all have the same. */
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;

/* The warpgroups share dQ by its rows where there are 128, else by its columns, if these are more
 * than 64. */
constexpr bool DQ_BY_ROWS = BLOCK_M == 128;
static_assert(DEPTH <= (DQ_BY_ROWS ? 64 : 128), "all of dQ is computed");

/* Named barriers. */
enum { KEYS_DONE = 1, GRADIENTS_DONE = 2 /* and 3: one a warpgroup */ };

/* All of shared memory. */
struct Shared {
    unsigned char K[KTile::BYTES];
    unsigned char V[VTile::BYTES];
    unsigned char Q[Q_BUFFERS][QTile::BYTES];
    unsigned char dO[STAGES][OTile::BYTES];
    unsigned char dS[1][STile::BYTES];
    float dQ[4 * CONSUMERS][DQ_COLS / 8][DQ_TILE]; /* of each warp, on its way to global memory */
    unsigned char mask[MASK_BYTES];
    float4 stats[Q_BUFFERS][BLOCK_M / 2]; /* row_stats of two queries; come with Q */
    mbarrier K_full, V_full;
    mbarrier mask_full[1], mask_empty[1];
    mbarrier Q_full[Q_BUFFERS], Q_empty[Q_BUFFERS];
    mbarrier dO_full[STAGES], dO_empty[STAGES];
    mbarrier dS_full[1], dS_empty[1];
};
extern __shared__ __align__(1024) unsigned char shared_memory[];

/* --- a warpgroup that computes --- */

/* Adds what a warp has of a tile's dQ to the sum in global memory: 16 queries, which begin at
 * `query`, and the columns from `col` on. */
static __device__ __forceinline__ void add_dQ(const fa_kernel_params &p,
                                              float (&staging)[DQ_COLS / 8][DQ_TILE],
                                              const Gradient<DQ_COLS> &dQ, int b, int h, int query,
                                              int col) {
    const int lane = lane_anew(), bytes = min(DQ_COLS, DEPTH - col) / 8 * sizeof staging[0];
    if (!p.dq_sum || query >= p.seq_q || bytes <= 0)
        return;
    if (lane == 0)
        tma_store_wait_read(); /* of the tile before */
    __syncwarp();
#pragma unroll
    for (int d = 0; d < DQ_COLS / 8; d++)
        *(float4 *)&staging[d][4 * lane] = make_float4(dQ[d][0], dQ[d][1], dQ[d][2], dQ[d][3]);
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) {
        bulk_add(dq_sum_tile(p, b, h, query, col), shared_address(staging), bytes);
        tma_store_commit();
    }
}

/* dK and dV, in the places of K and V. */
static __device__ __forceinline__ void store_gradients(const fa_kernel_params &p, const Maps &maps,
                                                       Shared &shared, const Work &work,
                                                       Gradient<DEPTH> &dK, Gradient<DEPTH_V> &dV) {
    const int w = uniform(thread_index() / 128) - 1, row = KEYS * w;
    const KTile own_K = KTile{shared_address(shared.K)}.from_row(row);
    const VTile own_V = VTile{shared_address(shared.V)}.from_row(row);
    /* A warpgroup has read its own rows of V, but all of K. */
    put_gradient<DEPTH_V>(own_V, dV, FA_DROPOUT ? p.dropout_scale : 1);
    barrier_sync(KEYS_DONE, 128 * CONSUMERS);
    put_gradient<DEPTH>(own_K, dK, p.scale);
    fence_proxy_async();
    barrier_sync(GRADIENTS_DONE + w, 128);
    if (threadIdx.x % 128 == 0) {
        if (p.dv.data)
            own_V.store(&maps.dv, work.first_key + row, work.h, work.b);
        if (p.dk.data)
            own_K.store(&maps.dk, work.first_key + row, work.h, work.b);
        tma_store_commit();
    }
    tma_store_wait_read();
}

/* Warpgroup w of those that compute. */
static __device__ __forceinline__ void compute(const fa_kernel_params &p, const Maps &maps,
                                               Shared &shared, const Work &work,
                                               const QueryTiles &queries, int w) {
    const int warp = uniform(threadIdx.x / 32) % 4, warp_row = KEYS * w + 16 * warp;
    const KTile K{shared_address(shared.K)}, own_K = K.from_row(KEYS * w);
    const VTile V{shared_address(shared.V)}, own_V = V.from_row(KEYS * w);
    const STile dS_tile{shared_address(shared.dS[0])};
    const auto Q = [&](unsigned n) { return QTile{shared_address(shared.Q[n % Q_BUFFERS])}; };
    const auto dO = [&](unsigned n) { return OTile{shared_address(shared.dO[n % STAGES])}; };
    /* Of dQ. Where there are no columns for the second warpgroup, its part is not used. */
    const int dq_row = DQ_BY_ROWS ? 64 * w : 0, dq_col = DQ_BY_ROWS ? 0 : 64 * w;
    const KTile dq_K = K.from_panel_of(DEPTH > 64 ? dq_col : 0);
    const auto add = [&](const Gradient<DQ_COLS> &dQ, QueryTile tile) {
        add_dQ(p, shared.dQ[4 * w + warp], dQ, work.b, tile.h, tile.i + dq_row + 16 * warp, dq_col);
    };

    Gradient<DEPTH> dK;
    Gradient<DEPTH_V> dV;
    set_to_zero(dK);
    set_to_zero(dV);

    QueryTile tile = queries.first();
    if (queries.has(tile)) {
        unsigned n = 0; /* tiles so far */
        Scores S, dP;
        Operand P, dS;
        Gradient<DQ_COLS> dQ;
        Dropout dropout(p, work.b, tile.h);
        /* dP, and dV += P^T dO. */
        const auto multiply_dO = [&] {
            Operand kept;
            if (FA_DROPOUT)
                keep(kept, P);
            wait_full(shared.dO_full, n);
            multiply_rows<DEPTH_V>(dP, own_V, dO(n));
            multiply_queries<DEPTH_V>(dV, FA_DROPOUT ? kept : P, dO(n));
        };
        /* dS of dP. */
        const auto score_gradients = [&] {
            wgmma_wait<1>(); /* dP */
            pin(dP);
            differentiate(p, dP, P, shared.stats[n % Q_BUFFERS]);
            /* Here so that the compiler does not take the next wait ahead of the arithmetic. */
            wait_empty(shared.dS_empty, n);
            wgmma_wait<0>(); /* dV */
            pin(dP);
            release(&shared.dO_empty[n % STAGES]);
            round_scores(dS, dP);
        };
        /* dK += dS^T Q, and dQ. */
        const auto multiply_dS = [&] {
            put_dS(dS_tile, warp_row, dS);
            fence_proxy_async();
            release(&shared.dS_full[0]);
            wgmma_fence();
            multiply_queries<DEPTH>(dK, dS, Q(n));
            wait_full(shared.dS_full, n);
            multiply_keys(dQ, dS_tile.from_row(dq_row), dq_K);
        };

        mbarrier_wait(&shared.K_full, 0);
        wait_full(shared.Q_full, 0);
        pin(dK);
        pin(dV);
        multiply_rows<DEPTH>(S, own_K, Q(0));
        wgmma_wait<0>();
        pin(S);
        exponentiate(p, S, shared, 0, dropout, work, tile, warp_row);
        round_scores(P, S);
        mbarrier_wait(&shared.V_full, 0);
        multiply_dO();
        score_gradients();

        for (QueryTile next; next = queries.after(tile), queries.has(next); tile = next) {
            wait_full(shared.Q_full, n + 1);
            multiply_rows<DEPTH>(S, own_K, Q(n + 1));
            multiply_dS();

            wgmma_wait<2>(); /* S */
            pin(S);
            dropout.head = work.b * p.heads_q + next.h;
            exponentiate(p, S, shared, n + 1, dropout, work, next, warp_row);
            wgmma_wait<1>(); /* dK */
            pin(S);
            release(&shared.Q_empty[n % Q_BUFFERS]);
            round_scores(P, S);

            n++;
            if (!FA_DROPOUT)
                multiply_dO();
            wgmma_wait<FA_DROPOUT ? 0 : 2>(); /* dQ */
            pin(dQ);
            release(&shared.dS_empty[0]);
            add(dQ, tile);
            if (FA_DROPOUT) /* only now there are registers for a second P */
                multiply_dO();
            score_gradients();
        }
        multiply_dS();
        wgmma_wait<0>();
        pin(dQ);
        pin(dK);
        pin(dV);
        add(dQ, tile);
    }

    store_gradients(p, maps, shared, work, dK, dV);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    fa_backward_sm90(const __grid_constant__ fa_kernel_params p,
                     const __grid_constant__ Maps maps) {
    Shared &shared = *(Shared *)shared_memory;
    const int warp = uniform(threadIdx.x / 32);
    if (threadIdx.x == 0) {
        prepare_to_bring(maps, shared, 4 * CONSUMERS, 4 * CONSUMERS);
        mbarrier_init(&shared.dS_full[0], 4 * CONSUMERS);
        mbarrier_init(&shared.dS_empty[0], 4 * CONSUMERS + TAKERS);
        mbarrier_init_fence();
    }
    __syncthreads();

    const Work work(p);
    const QueryTiles queries(p, work.h, work.first_key);
    if (FA_MASK_GRAD >= 3 && FA_WINDOW)
        clear_hidden(p, queries, work.b, work.h, work.first_key);
    if (warp < 4) {
        registers_decrease<PRODUCER_REGISTERS>();
        bring(p, maps, shared, work, queries, warp);
    } else {
        registers_increase<CONSUMER_REGISTERS>();
        compute(p, maps, shared, work, queries, warp / 4 - 1);
    }
}
