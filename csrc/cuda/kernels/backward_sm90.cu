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
 * What the threads compute between products is hidden behind those of the other warpgroup, and
 * partly behind their own: exponentials run under dP, and under dK dQ goes to shared memory, from
 * where a warp of the first warpgroup adds it to the sum in global memory. S of the next tile is
 * asked for while dK runs. The same two warps take the gradient of a mask from dS.
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

/* One where a tile of a float32 mask takes the place of the other. */
constexpr int DS_BUFFERS = MASK_BYTES > 32 << 10 ? 1 : 2;

static_assert(Q_BUFFERS > 1, "S of the next tile is asked for before this Q is done with");

/* Where there are no registers for dP during exponentials, it is asked for after them, and dV at
 * once after it, for dS to run under something; but dropout has a P for dS and another one for dV.
 */
constexpr bool LATE_DP = BLOCK_M == 128 && (FA_DROPOUT || FA_MASK);
constexpr bool EARLY_DV = LATE_DP && !FA_DROPOUT;

/* Of lse, what is loaded before S is waited for. */
constexpr int AHEAD = QUERY_TILES < 8 ? QUERY_TILES : 8;

/* Named barriers. */
enum { KEYS_DONE = 1, GRADIENTS_DONE = 2 /* and 3: one a warpgroup */ };

/* All of shared memory. */
struct Shared {
    unsigned char K[KTile::BYTES];
    unsigned char V[VTile::BYTES];
    unsigned char Q[Q_BUFFERS][QTile::BYTES];
    unsigned char dO[STAGES][OTile::BYTES];
    unsigned char dS[DS_BUFFERS][STile::BYTES];
    float dQ[CONSUMERS][4][DQ_COLS / 8][DQ_TILE]; /* of each warp, on its way to global memory */
    unsigned char mask[MASK_BYTES];
    PairStats stats[Q_BUFFERS][BLOCK_M / 2]; /* row_stats; come with Q */
    mbarrier K_full, V_full;
    mbarrier mask_full[1], mask_empty[1];
    mbarrier Q_full[Q_BUFFERS], Q_empty[Q_BUFFERS];
    mbarrier dO_full[STAGES], dO_empty[STAGES];
    mbarrier dS_full[DS_BUFFERS], dS_empty[DS_BUFFERS];
    mbarrier dQ_full[CONSUMERS][1], dQ_empty[CONSUMERS][1];
};
extern __shared__ __align__(1024) unsigned char shared_memory[];

/* What warpgroup w of those that compute has of dQ: 64 queries from `row` of a tile on, and up to
 * 64 columns from `col` on. Where there are none for the second warpgroup, its part is not used. */
struct DQPart {
    int row, col, bytes; /* of 16 queries */

    __device__ __forceinline__ explicit DQPart(int w)
        : row(DQ_BY_ROWS ? 64 * w : 0), col(DQ_BY_ROWS ? 0 : 64 * w),
          bytes(min(DQ_COLS, DEPTH - col) / 8 * DQ_TILE * (int)sizeof(float)) {}
};

static __device__ __forceinline__ QueryTile after(const fa_kernel_params &p, const Work &work,
                                                  QueryTile tile) {
    return QueryTiles(p, work.h, work.first_key).after(tile);
}

/* --- what takes away what warpgroup w computes: a warp --- */

/* Adds the n-th dQ to the sum in global memory: a thread for each warp of the warpgroup. Which
 * thread that is it finds out anew for each tile, for it has few registers. */
static __device__ __forceinline__ void add_dQ(const fa_kernel_params &p, Shared &shared,
                                              const Work &work, QueryTile tile, unsigned n) {
    const int w = thread_index() / 32 - FIRST_TAKER, warp = thread_index() % 32;
    const DQPart part(w);
    const int query = tile.i + part.row + 16 * warp;
    if (!p.dq_sum || warp >= 4)
        return;
    wait_full(shared.dQ_full[w], n);
    if (query < p.seq_q && part.bytes > 0)
        bulk_add(dq_sum_tile(p, work.b, tile.h, query, part.col),
                 shared_address(shared.dQ[w][warp]), part.bytes);
    tma_store_commit();
    tma_store_wait_read();
    mbarrier_arrive(&shared.dQ_empty[w][0]);
}

/* Both gradients that are made of dS in shared memory: of the mask, and dQ. */
static __device__ __forceinline__ void take(const fa_kernel_params &p, const Maps &maps,
                                            Shared &shared, const Work &work,
                                            const QueryTiles &queries) {
    if (!FA_MASK_GRAD && (!p.dq_sum || threadIdx.x % 32 >= 4))
        return;
    QueryTile tile = queries.first();
    bool more = queries.has(tile);
#pragma unroll 1
    for (unsigned n = 0; more; n++) {
        if (FA_MASK_GRAD) {
            take_mask_gradient<STile>(p, maps, shared, anew(work), tile, n);
            tile = {anew(tile.h), anew(tile.i)}, n = anew(n);
        }
        add_dQ(p, shared, anew(work), tile, n);
        const Work here = FA_MASK_GRAD ? Work(p) : work;
        const QueryTiles now = FA_MASK_GRAD ? QueryTiles(p, here.h, here.first_key) : queries;
        tile = now.after(tile), more = now.has(tile);
    }
}

/* --- a warpgroup that computes --- */

/* The n-th dQ of a warp, for add_dQ. */
static __device__ __forceinline__ void put_dQ(Shared &shared, const Gradient<DQ_COLS> &dQ, int w,
                                              int warp, unsigned lane, unsigned n) {
    wait_empty(shared.dQ_empty[w], n);
#pragma unroll
    for (int d = 0; d < DQ_COLS / 8; d++)
        *(float4 *)&shared.dQ[w][warp][d][4 * lane] =
            make_float4(dQ[d][0], dQ[d][1], dQ[d][2], dQ[d][3]);
    fence_proxy_async();
    release(&shared.dQ_full[w][0]);
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
    const unsigned lane = lane_anew();
    const KTile K{shared_address(shared.K)}, own_K = K.from_row(KEYS * w);
    const VTile V{shared_address(shared.V)}, own_V = V.from_row(KEYS * w);
    const auto dS_tile = [&](unsigned n) {
        return STile{shared_address(shared.dS[n % DS_BUFFERS])};
    };
    const auto Q = [&](unsigned n) { return QTile{shared_address(shared.Q[n % Q_BUFFERS])}; };
    const auto dO = [&](unsigned n) { return OTile{shared_address(shared.dO[n % STAGES])}; };
    const DQPart part(w);
    const KTile dq_K = K.from_panel_of(DEPTH > 64 ? part.col : 0);

    Gradient<DEPTH> dK;
    Gradient<DEPTH_V> dV;
    set_to_zero(dK);
    set_to_zero(dV);

    QueryTile tile = queries.first();
    const unsigned tiles = queries.count();
    Scores S, dP;
    Operand P, dS;
    Gradient<DQ_COLS> dQ;
    Dropout dropout(p, work.b, tile.h);
    if (tiles > 0) {
        mbarrier_wait(&shared.K_full, 0);
        wait_full(shared.Q_full, 0);
        mbarrier_wait(&shared.V_full, 0);
        /* So that the zeros are there before: else the compiler lets products run one by one, as it
         * does where S is asked for in a loop that ends otherwise than by this break. */
        pin(dK);
        pin(dV);
        multiply_rows<DEPTH>(S, own_K, Q(0));
        for (unsigned n = 0;; tile = after(p, anew(work), tile), n++) {
            wait_full(shared.dO_full, n);
            if (!LATE_DP)
                multiply_rows<DEPTH_V>(dP, own_V, dO(n));
            QueryNumbers lse, delta;
            load_lse<0, AHEAD>(lse, shared.stats[n % Q_BUFFERS], lane);
            wgmma_wait<LATE_DP ? 0 : 1>(); /* S */
            pin(S);
            load_lse<AHEAD, QUERY_TILES>(lse, shared.stats[n % Q_BUFFERS], lane);
            dropout.head = work.b * p.heads_q + tile.h;
            exponentiate(p, S, lse, shared, n, dropout, work, tile, warp_row, lane);
            round_P(P, S);
            if (LATE_DP)
                multiply_rows<DEPTH_V>(dP, own_V, dO(n));
            if (EARLY_DV)
                multiply_queries<DEPTH_V>(dV, P, dO(n));
            load_delta(delta, shared.stats[n % Q_BUFFERS], lane);
            wgmma_wait<EARLY_DV ? 1 : 0>(); /* dP */
            pin(dP);
            differentiate(p, dS, dP, P, delta);
            wait_empty(shared.dS_empty, n);
            put_dS(dS_tile(n), warp_row, dS, lane_anew());
            fence_proxy_async();
            release(&shared.dS_full[n % DS_BUFFERS]);
            if (FA_DROPOUT)
                keep(P);
            wgmma_fence();
            if (!EARLY_DV)
                multiply_queries<DEPTH_V>(dV, P, dO(n));
            wait_full(shared.dS_full, n);
            multiply_keys(dQ, dS_tile(n).from_row(part.row), dq_K);
            multiply_queries<DEPTH>(dK, dS, Q(n));

            wgmma_wait<1>(); /* dV, dQ */
            pin(dQ);
            release(&shared.dO_empty[n % STAGES]);
            release(&shared.dS_empty[n % DS_BUFFERS]);
            if (p.dq_sum)
                put_dQ(shared, dQ, w, warp, lane_anew(), n);
            if (n + 1 == tiles)
                break;
            wait_full(shared.Q_full, n + 1);
            multiply_rows<DEPTH>(S, own_K, Q(n + 1));
            wgmma_wait<1>(); /* dK */
            release(&shared.Q_empty[n % Q_BUFFERS]);
        }
        wgmma_wait<0>();
        pin(dK);
        pin(dV);
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
        for (int i = 0; i < DS_BUFFERS; i++) {
            mbarrier_init(&shared.dS_full[i], 4 * CONSUMERS);
            mbarrier_init(&shared.dS_empty[i], 4 * CONSUMERS + TAKERS);
        }
        for (int w = 0; w < CONSUMERS; w++) {
            mbarrier_init(&shared.dQ_full[w][0], 4);
            mbarrier_init(&shared.dQ_empty[w][0], 4);
        }
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
        if (warp >= FIRST_TAKER)
            take(p, maps, shared, work, queries);
    } else {
        registers_increase<CONSUMER_REGISTERS>();
        compute(p, maps, shared, work, queries, warp / 4 - 1);
    }
}
