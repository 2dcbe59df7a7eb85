/* The FlashAttention backward for sm_90a, for head sizes above 128.
 *
 * As backward_sm90.cu, but dK and dV of 64 keys take all the registers of a warpgroup each. So the
 * two warpgroups that compute have the same BLOCK_N = 64 keys and different parts:
 *
 *     the first     S^T = K Q^T,   P = exp(S - lse),      dV += P^T dO
 *     the second    dP^T = V dO^T, dS = P (dP - delta),   dK += dS^T Q
 *
 * and half of the columns of dQ = dS K each, 64 at a time. P goes from the first to the second
 * through shared memory, and dS to both. The second is half a tile behind, and the first takes
 * its part of dQ two tiles late, so that neither waits for the other.
 *
 * Compiled with the macros of backward_sm90.cu. */
#include "backward_sm90.cuh"

static_assert(BLOCK_N == KEYS && BLOCK_M == 64 && THREADS == 384, "see above");
static_assert(DEPTH > 64 && DEPTH <= 256 && DEPTH_V <= 256, "four panels at most");

/* Registers of a thread that moves data and of one that computes; at first all have the same. */
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;

constexpr int DS_BUFFERS = 3;

/* Named barriers. */
enum { KEYS_DONE = 1, GRADIENTS_DONE = 2 /* and 3: one a warpgroup */ };

/* All of shared memory. */
struct Shared {
    unsigned char K[KTile::BYTES];
    unsigned char V[VTile::BYTES];
    unsigned char Q[Q_BUFFERS][QTile::BYTES];
    unsigned char dO[STAGES][OTile::BYTES];
    unsigned char dS[DS_BUFFERS][STile::BYTES];
    uint4 P[QUERY_TILES / 2][128]; /* as the threads of the first warpgroup hold it */
    unsigned char mask[MASK_BYTES];
    PairStats stats[Q_BUFFERS][BLOCK_M / 2]; /* row_stats; come with Q */
    mbarrier K_full, V_full;
    mbarrier mask_full[1], mask_empty[1];
    mbarrier Q_full[Q_BUFFERS], Q_empty[Q_BUFFERS];
    mbarrier dO_full[STAGES], dO_empty[STAGES];
    mbarrier dS_full[DS_BUFFERS], dS_empty[DS_BUFFERS];
    mbarrier P_full[1], P_empty[1];
};
extern __shared__ __align__(1024) unsigned char shared_memory[];

/* Adds what a warp has of a tile's dQ to the sum in global memory: 16 queries, which begin at
 * `query`, and the columns from `col` on. There is no shared memory for it to go through. */
static __device__ __forceinline__ void add_dQ(const fa_kernel_params &p, const Gradient<64> &dQ,
                                              int b, int h, int query, int col) {
    if (!p.dq_sum || query >= p.seq_q)
        return;
    float *tile = dq_sum_tile(p, b, h, query, col);
#pragma unroll
    for (int d = 0; d < 8; d++)
        if (DEPTH % 64 == 0 || col + 8 * d < DEPTH)
            add_to_dq_sum(tile + d * DQ_TILE, dQ[d]);
}

/* The first warpgroup: two warps bring all tiles, the others take the gradient of a mask from dS.
 */
constexpr int FIRST_TAKER = 2, TAKERS = FA_MASK_GRAD ? 2 : 0;

static __device__ __forceinline__ void move(const fa_kernel_params &p, const Maps &maps,
                                            Shared &shared, const Work &work,
                                            const QueryTiles &queries, int warp) {
    QueryTile tile = queries.first();
    if (warp >= FIRST_TAKER) {
#pragma unroll 1
        for (unsigned n = 0; FA_MASK_GRAD && queries.has(tile); tile = queries.after(tile), n++) {
            wait_full(shared.dS_full, n);
            take_mask_gradient<FIRST_TAKER, 2>(
                p, maps, STile{shared_address(shared.dS[n % DS_BUFFERS])}, anew(work), tile);
            tma_store_wait_read();
            release(&shared.dS_empty[n % DS_BUFFERS]);
        }
        return;
    }
    if (threadIdx.x % 32 != 0 || !queries.has(tile))
        return;
    if (warp == 0)
        bring_K(p, maps, shared, work);
    else
        bring_V(p, maps, shared, work);
    for (unsigned n = 0; queries.has(tile); tile = queries.after(tile), n++) {
        if (warp == 0)
            bring_Q(p, maps, shared, work, tile, n);
        else
            bring_dO(p, maps, shared, work, tile, n);
    }
}

/* 64 columns of dQ = dS K, summed over the keys of the block. */
static __device__ __forceinline__ void multiply_keys(Gradient<64> &dQ, STile dS, KTile K) {
    wgmma_fence();
    Wgmma<64>::multiply<OVER_COLS, OVER_ROWS>(dQ, dS.sum_over_cols(0), K.sum_over_rows(0));
#pragma unroll
    for (int n = 16; n < BLOCK_N; n += 16)
        Wgmma<64>::multiply_add<OVER_COLS, OVER_ROWS>(dQ, dS.sum_over_cols(n), K.sum_over_rows(n));
    wgmma_commit();
}

/* The first warpgroup that computes, HAS_P, or the second. */
template <bool HAS_P>
static __device__ __forceinline__ void compute(const fa_kernel_params &p, const Maps &maps,
                                               Shared &shared, const Work &work,
                                               const QueryTiles &queries) {
    constexpr int COLS = HAS_P ? DEPTH_V : DEPTH; /* of dV or dK */
    constexpr unsigned DELAY = HAS_P ? 2 : 1;     /* of dQ, in tiles */
    const int warp = uniform(threadIdx.x / 32) % 4;
    const unsigned thread = threadIdx.x % 128, lane = threadIdx.x % 32;
    const KTile K{shared_address(shared.K)};
    const VTile V{shared_address(shared.V)};
    const auto Q = [&](unsigned n) { return QTile{shared_address(shared.Q[n % Q_BUFFERS])}; };
    const auto dO = [&](unsigned n) { return OTile{shared_address(shared.dO[n % STAGES])}; };
    const auto dS = [&](unsigned n) { return STile{shared_address(shared.dS[n % DS_BUFFERS])}; };

    Gradient<COLS> sum; /* dV or dK */
    set_to_zero(sum);

    Scores S;  /* or dP */
    Operand A; /* P or dS */
    Gradient<64> dQ;
    Dropout dropout(p, work.b, 0);
    /* Half of this warpgroup's columns of a tile's dQ. */
    constexpr int FIRST = HAS_P ? 0 : 128, SECOND = FIRST + 64;
    const auto multiply_half = [&](Gradient<64> &C, unsigned n, int col) {
        multiply_keys(C, dS(n), K.from_panel_of(col < DEPTH ? col : 0));
    };
    const auto add = [&](const Gradient<64> &C, QueryTile tile, int col) {
        if (col < DEPTH)
            add_dQ(p, C, work.b, tile.h, tile.i + 16 * warp, col);
    };

    QueryTile tile = queries.first(), before = tile, two_before = tile;
    if (queries.has(tile)) {
        mbarrier_wait(&shared.K_full, 0);
        mbarrier_wait(&shared.V_full, 0);
    }
    unsigned n = 0; /* tiles so far */
    for (; queries.has(tile); n++) {
        const QueryTile late = DELAY == 2 ? two_before : before; /* that of dQ, from n = DELAY on */
        if (HAS_P) {
            wait_full(shared.Q_full, n);
            multiply_rows<DEPTH>(S, K, Q(n));
        } else {
            wait_full(shared.dO_full, n);
            multiply_rows<DEPTH_V>(S, V, dO(n));
        }
        if (n >= DELAY)
            wait_full(shared.dS_full, n - DELAY);
        multiply_half(dQ, n + DS_BUFFERS - DELAY, FIRST);

        QueryNumbers numbers; /* lse or delta */
        if (HAS_P)
            load_lse<0, QUERY_TILES>(numbers, shared.stats[n % Q_BUFFERS], lane);
        wgmma_wait<1>(); /* S or dP */
        pin(S);
        if (HAS_P) {
            dropout.head = work.b * p.heads_q + tile.h;
            exponentiate(p, S, numbers, shared, n, dropout, work, tile, 16 * warp, lane);
            release(&shared.Q_empty[n % Q_BUFFERS]);
            round_P(A, S);
            wait_empty(shared.P_empty, n);
#pragma unroll
            for (int m = 0; m < QUERY_TILES / 2; m++)
                store_shared_4(shared_address(&shared.P[m][thread]), A[m][0], A[m][1], A[m][2],
                               A[m][3]);
            release(&shared.P_full[0]);
            if (FA_DROPOUT)
                keep(A);
            wait_full(shared.dO_full, n);
        } else {
            release(&shared.dO_empty[n % STAGES]);
            wait_full(shared.P_full, n);
            Operand P;
#pragma unroll
            for (int m = 0; m < QUERY_TILES / 2; m++)
                load_shared_4(P[m], shared_address(&shared.P[m][thread]));
            release(&shared.P_empty[0]);
            wait_full(shared.Q_full, n);
            load_delta(numbers, shared.stats[n % Q_BUFFERS], lane);
            differentiate(p, A, S, P, numbers);
            wait_empty(shared.dS_empty, n);
            put_dS(dS(n), 16 * warp, A, lane);
            fence_proxy_async();
            release(&shared.dS_full[n % DS_BUFFERS]);
        }
        wgmma_fence();
        if (HAS_P)
            multiply_queries<COLS>(sum, A, dO(n));
        else
            multiply_queries<COLS>(sum, A, Q(n));
        multiply_half(S, n + DS_BUFFERS - DELAY, SECOND);

        wgmma_wait<2>(); /* the first half of dQ */
        pin(dQ);
        if (n >= DELAY)
            add(dQ, late, FIRST);
        wgmma_wait<0>();
        pin(S);
        release(HAS_P ? &shared.dO_empty[n % STAGES] : &shared.Q_empty[n % Q_BUFFERS]);
        if (n >= DELAY) {
            release(&shared.dS_empty[(n - DELAY) % DS_BUFFERS]);
            add(S, late, SECOND);
        }
        two_before = before, before = tile, tile = queries.after(tile);
    }
    for (unsigned last = n < DELAY ? 0 : n - DELAY; last < n; last++) {
        wait_full(shared.dS_full, last);
        multiply_half(dQ, last, FIRST);
        multiply_half(S, last, SECOND);
        wgmma_wait<0>();
        pin(dQ);
        pin(S);
        const QueryTile late = last + 1 == n ? before : two_before;
        add(dQ, late, FIRST);
        add(S, late, SECOND);
    }
    pin(sum);

    /* dV in place of V, dK of K. */
    barrier_sync(KEYS_DONE, 256);
    if (HAS_P)
        put_gradient<COLS>(V, sum, FA_DROPOUT ? p.dropout_scale : 1);
    else
        put_gradient<COLS>(K, sum, p.scale);
    fence_proxy_async();
    barrier_sync(GRADIENTS_DONE + HAS_P, 128);
    if (thread == 0) {
        if (HAS_P && p.dv.data)
            V.store(&maps.dv, work.first_key, work.h, work.b);
        if (!HAS_P && p.dk.data)
            K.store(&maps.dk, work.first_key, work.h, work.b);
        tma_store_commit();
        tma_store_wait_read();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    fa_backward_wide_sm90(const __grid_constant__ fa_kernel_params p,
                          const __grid_constant__ Maps maps) {
    Shared &shared = *(Shared *)shared_memory;
    const int warp = uniform(threadIdx.x / 32);
    if (threadIdx.x == 0) {
        prepare_to_bring(maps, shared, 8, 4);
        for (int i = 0; i < DS_BUFFERS; i++) {
            mbarrier_init(&shared.dS_full[i], 4);
            mbarrier_init(&shared.dS_empty[i], 8 + TAKERS);
        }
        mbarrier_init(&shared.P_full[0], 4);
        mbarrier_init(&shared.P_empty[0], 4);
        mbarrier_init_fence();
    }
    __syncthreads();

    const Work work(p);
    const QueryTiles queries(p, work.h, work.first_key);
    if (FA_MASK_GRAD >= 3 && FA_WINDOW)
        clear_hidden(p, queries, work.b, work.h, work.first_key);
    if (warp < 4) {
        registers_decrease<PRODUCER_REGISTERS>();
        move(p, maps, shared, work, queries, warp);
    } else {
        registers_increase<CONSUMER_REGISTERS>();
        if (warp < 8)
            compute<true>(p, maps, shared, work, queries);
        else
            compute<false>(p, maps, shared, work, queries);
    }
}
