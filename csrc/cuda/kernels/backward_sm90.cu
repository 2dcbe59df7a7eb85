/* The FlashAttention backward for sm_90a (Dao 2023, Algorithm 2), with TMA and wgmma.
 *
 * A block owns BLOCK_N keys of one key head; the queries of every head of the group pass by BLOCK_M
 * at a time. Two of its warpgroups own 64 keys each, and keep their dK and dV in registers until
 * they are finished:
 *
 *     S^T = K Q^T, dP^T = V dO^T    64 keys x BLOCK_M
 *     dV += P^T dO, dK += dS^T Q    64 keys x all columns
 *
 * Scores are transposed because as accumulators P^T and dS^T have the layout of the first operand
 * of the products with dO and Q: they stay in registers. Only dQ wants all keys; for it dS goes
 * through shared memory to the first warpgroup, which makes
 *
 *     dQ^T = K^T dS^T               64 columns x 64 queries, of all keys of the block
 *
 * where K^T is an operand that stays in registers, and adds it to the sum in global memory, in
 * float. So the other two never wait for each other, and hardly for the first. Besides, the first
 * brings all tiles and takes the gradient of a mask from dS.
 *
 * What the threads of a warpgroup compute between products is hidden behind those of the others,
 * and partly behind its own: S of the next tile is asked for with dK, and the exponentials run
 * under dK.
 *
 * Compiled with: FA_DTYPE_BF16 or FA_DTYPE_FP16, HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, Q_BUFFERS,
 * STAGES (of dO), FA_WINDOW, FA_DROPOUT, and the macros of backward_mask_sm90.cuh. */
#include "backward_sm90.cuh"

constexpr int CONSUMERS = 2; /* warpgroups that own keys */
static_assert(BLOCK_N == KEYS * CONSUMERS && THREADS == 128 * (CONSUMERS + 1), "see above");

/* Whether K^T stays in registers of the first warpgroup: where the others have some to spare. */
constexpr bool K_IN_REGISTERS = DEPTH <= 64 && !(FA_MASK && (FA_DROPOUT || !FA_MASK_TILES));

/* Registers of a thread of the first warpgroup and of the others; at first all have the same. */
constexpr int DQ_REGISTERS = K_IN_REGISTERS ? 104 : 88;
constexpr int CONSUMER_REGISTERS = K_IN_REGISTERS ? 200 : 208;

constexpr int DS_BUFFERS = 2;
static_assert(Q_BUFFERS > 1, "S of the next tile is asked for before this Q is done with");

/* Where there are registers for dS, which dK reads, during the exponentials. */
constexpr bool DK_UNDER_EXPONENTIALS = !FA_DROPOUT && (!FA_MASK || FA_MASK_TILES);

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
    unsigned char mask[MASK_BYTES];
    PairStats stats[Q_BUFFERS][BLOCK_M / 2]; /* row_stats; come with Q */
    mbarrier K_full, V_full;
    mbarrier mask_full[1], mask_empty[1];
    mbarrier Q_full[Q_BUFFERS], Q_empty[Q_BUFFERS];
    mbarrier dO_full[STAGES], dO_empty[STAGES];
    mbarrier dS_full[DS_BUFFERS], dS_empty[DS_BUFFERS];
};
extern __shared__ __align__(1024) unsigned char shared_memory[];

/* --- the first warpgroup --- */

static_assert(FA_DQ_TRANSPOSED && DEPTH <= 128, "one panel or two of K");

/* 64 columns of K^T as the first operand of a product, of which each warp has 16. */
using Columns = unsigned[BLOCK_N / 16][4];

static __device__ __forceinline__ void load(Columns &A, KTile K, int warp) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < BLOCK_N; n += 16)
        ldmatrix_x4_trans(A[n / 16],
                          K.chunk(n + lane / 16 * 8 + lane % 8, 16 * warp + lane / 8 % 2 * 8));
}

/* dQ^T = K^T dS^T of 64 queries and of 64 columns, those of the first panel of K. */
static __device__ __forceinline__ void multiply(Gradient<64> &dQ, const Columns &K, STile dS) {
    wgmma_fence();
    Wgmma<64>::multiply<OVER_COLS>(dQ, K[0], dS.sum_over_cols(0));
#pragma unroll
    for (int n = 16; n < BLOCK_N; n += 16)
        Wgmma<64>::multiply_add<OVER_COLS>(dQ, K[n / 16], dS.sum_over_cols(n));
    wgmma_commit();
}
static __device__ __forceinline__ void multiply(Gradient<64> &dQ, KTile K, STile dS) {
    wgmma_fence();
    Wgmma<64>::multiply<OVER_ROWS, OVER_COLS>(dQ, K.sum_over_rows(0), dS.sum_over_cols(0));
#pragma unroll
    for (int n = 16; n < BLOCK_N; n += 16)
        Wgmma<64>::multiply_add<OVER_ROWS, OVER_COLS>(dQ, K.sum_over_rows(n), dS.sum_over_cols(n));
    wgmma_commit();
}

/* Adds what a warp has of it, 16 columns from `col` on of the queries from `query` on. */
static __device__ __forceinline__ void add_dQ(const fa_kernel_params &p, const Gradient<64> &dQ,
                                              int b, int h, int query, int col) {
    if (col >= DEPTH)
        return;
    float *to = dq_sum_tile(p, b, h, query, col);
#pragma unroll
    for (int m = 0; m < 8; m++)
        if (query + m / 2 * 16 < p.seq_q)
            add_to_dq_sum(to + (m / 2 * (DEPTH / 8) + m % 2) * DQ_TILE, dQ[m]);
}

/* Brings tiles; makes dQ, and the gradient of a mask, of dS. */
static __device__ __forceinline__ void serve(const fa_kernel_params &p, const Maps &maps,
                                             Shared &shared, const Work &work,
                                             const QueryTiles &queries, int warp) {
    QueryTile tile = queries.first(), coming = tile;
    unsigned brought = 0;
    /* One thread brings Q, one dO; then all lanes go on together, as wgmma wants it. */
    const auto bring_next = [&] {
        if (!queries.has(coming))
            return;
        if (threadIdx.x == 0)
            bring_Q(p, maps, shared, work, coming, brought);
        else if (threadIdx.x == 32)
            bring_dO(p, maps, shared, work, coming, brought);
        coming = queries.after(coming), brought++;
        __syncwarp();
    };
    if (!queries.has(tile)) {
        barrier_arrive(KEYS_DONE, THREADS);
        return;
    }
    if (threadIdx.x == 0)
        bring_K(p, maps, shared, work);
    else if (threadIdx.x == 32)
        bring_V(p, maps, shared, work);
#pragma unroll 1
    for (int i = 1; i < (warp == 0 ? Q_BUFFERS : STAGES); i++)
        bring_next();

    const KTile K{shared_address(shared.K)};
    Columns columns;
    mbarrier_wait(&shared.K_full, 0);
    if (K_IN_REGISTERS)
        load(columns, K, warp);
#pragma unroll 1
    for (unsigned n = 0; queries.has(tile); tile = queries.after(tile), n++) {
        bring_next();
        const STile dS{shared_address(shared.dS[n % DS_BUFFERS])};
        wait_full(shared.dS_full, n);
        if (FA_MASK_GRAD)
            take_mask_gradient<0, 4>(p, maps, dS, work, tile);
#pragma unroll
        for (int row = 0; p.dq_sum && row < BLOCK_M; row += 64)
#pragma unroll
            for (int panel = 0; panel < DEPTH; panel += 64) {
                Gradient<64> dQ;
                if (K_IN_REGISTERS)
                    multiply(dQ, columns, dS.from_row(row));
                else
                    multiply(dQ, K.from_panel_of(panel), dS.from_row(row));
                wgmma_wait<0>();
                pin(dQ);
                add_dQ(p, dQ, work.b, tile.h, tile.i + row, panel + 16 * warp);
            }
        if (FA_MASK_GRAD)
            tma_store_wait_read();
        release(&shared.dS_empty[n % DS_BUFFERS]);
    }
    barrier_arrive(KEYS_DONE, THREADS);
}

/* --- a warpgroup that owns keys --- */

/* dK and dV, in the places of K and V. */
static __device__ __forceinline__ void store_gradients(const fa_kernel_params &p, const Maps &maps,
                                                       Shared &shared, const Work &work,
                                                       Gradient<DEPTH> &dK, Gradient<DEPTH_V> &dV) {
    const int w = uniform(thread_index() / 128) - 1, row = KEYS * w;
    const KTile own_K = KTile{shared_address(shared.K)}.from_row(row);
    const VTile own_V = VTile{shared_address(shared.V)}.from_row(row);
    /* But for the first, a warpgroup has read its own rows alone. */
    put_gradient<DEPTH_V>(own_V, dV, FA_DROPOUT ? p.dropout_scale : 1);
    barrier_sync(KEYS_DONE, THREADS);
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

static __device__ __forceinline__ QueryTile after(const fa_kernel_params &p, const Work &work,
                                                  QueryTile tile) {
    return QueryTiles(p, work.h, work.first_key).after(tile);
}

/* Warpgroup w of those that compute. */
static __device__ __forceinline__ void compute(const fa_kernel_params &p, const Maps &maps,
                                               Shared &shared, const Work &work,
                                               const QueryTiles &queries, int w) {
    const int warp = uniform(threadIdx.x / 32) % 4, warp_row = KEYS * w + 16 * warp;
    const unsigned lane = lane_anew();
    const KTile K = KTile{shared_address(shared.K)}.from_row(KEYS * w);
    const VTile V = VTile{shared_address(shared.V)}.from_row(KEYS * w);
    const auto dS_tile = [&](unsigned n) {
        return STile{shared_address(shared.dS[n % DS_BUFFERS])};
    };
    const auto Q = [&](unsigned n) { return QTile{shared_address(shared.Q[n % Q_BUFFERS])}; };
    const auto dO = [&](unsigned n) { return OTile{shared_address(shared.dO[n % STAGES])}; };

    Gradient<DEPTH> dK;
    Gradient<DEPTH_V> dV;
    set_to_zero(dK);
    set_to_zero(dV);

    QueryTile tile = queries.first();
    const unsigned tiles = queries.count();
    Scores S, dP;
    Operand P, dS;
    Dropout dropout(p, work.b, tile.h);
    if (tiles > 0) {
        mbarrier_wait(&shared.K_full, 0);
        wait_full(shared.Q_full, 0);
        mbarrier_wait(&shared.V_full, 0);
        /* So that the zeros are there before: else the compiler lets products run one by one, as it
         * does where S is asked for in a loop that ends otherwise than by this break. */
        pin(dK);
        pin(dV);
        multiply_rows<DEPTH>(S, K, Q(0));
        wgmma_commit(); /* of nothing, where later tiles have dK */
        for (unsigned n = 0;; tile = after(p, anew(work), tile), n++) {
            QueryNumbers lse, delta;
            load_lse<0, AHEAD>(lse, shared.stats[n % Q_BUFFERS], lane);
            wgmma_wait<DK_UNDER_EXPONENTIALS ? 1 : 0>(); /* S */
            pin(S);
            load_lse<AHEAD, QUERY_TILES>(lse, shared.stats[n % Q_BUFFERS], lane);
            dropout.head = work.b * p.heads_q + tile.h;
            exponentiate(p, S, lse, shared, n, dropout, work, tile, warp_row, lane);
            round_P(P, S);
            wgmma_wait<0>(); /* dK of the tile before */
            if (n > 0)
                release(&shared.Q_empty[(n - 1) % Q_BUFFERS]);
            wait_full(shared.dO_full, n);
            multiply_rows<DEPTH_V>(dP, V, dO(n));
            if (!FA_DROPOUT)
                multiply_queries<DEPTH_V>(dV, P, dO(n));
            wgmma_wait<0>(); /* dP, dV */
            pin(dP);
            if (!FA_DROPOUT)
                release(&shared.dO_empty[n % STAGES]);
            load_delta(delta, shared.stats[n % Q_BUFFERS], lane_anew());
            differentiate(p, dS, dP, P, delta);
            if (FA_DROPOUT) { /* which has a P for dS and another one for dV */
                keep(P);
                wgmma_fence();
                multiply_queries<DEPTH_V>(dV, P, dO(n));
            }
            wait_empty(shared.dS_empty, n);
            put_dS(dS_tile(n), warp_row, dS, lane_anew());
            fence_proxy_async();
            release(&shared.dS_full[n % DS_BUFFERS]);
            if (FA_DROPOUT) {
                wgmma_wait<0>(); /* dV */
                release(&shared.dO_empty[n % STAGES]);
            }
            if (n + 1 == tiles)
                break;
            wait_full(shared.Q_full, n + 1);
            multiply_rows<DEPTH>(S, K, Q(n + 1));
            multiply_queries<DEPTH>(dK, dS, Q(n));
        }
        wgmma_fence();
        multiply_queries<DEPTH>(dK, dS, Q(tiles - 1));
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
            mbarrier_init(&shared.dS_empty[i], 4);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    const Work work(p);
    const QueryTiles queries(p, work.h, work.first_key);
    if (FA_MASK_GRAD >= 3 && FA_WINDOW)
        clear_hidden(p, queries, work.b, work.h, work.first_key);
    if (warp < 4) {
        registers_decrease<DQ_REGISTERS>();
        serve(p, maps, shared, work, queries, warp);
    } else {
        registers_increase<CONSUMER_REGISTERS>();
        compute(p, maps, shared, work, queries, warp / 4 - 1);
    }
}
