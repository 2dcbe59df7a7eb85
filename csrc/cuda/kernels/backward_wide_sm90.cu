/* The FlashAttention backward for sm_90a, for head sizes above 128.
 *
 * As backward_sm90.cu, but dK and dV of 64 keys take all the registers of a warpgroup each. So the
 * two warpgroups that compute have the same BLOCK_N = 64 keys and different parts:
 *
 *     the first     S^T = K Q^T,   P = exp(S - lse),      dV += P^T dO
 *     the second    dP^T = V dO^T, dS = P (dP - delta),   dK += dS^T Q
 *
 * P goes from the first to the second through shared memory, where dS takes its place. The second
 * is half a tile behind.
 *
 * What dQ = dS K adds to global memory counts for every 64 keys, and would be the limit. So two
 * blocks with neighbouring keys are a cluster. The same queries pass by both. They send each other
 * dS, and each of them computes half of the columns of dQ, of the keys of both. The first warpgroup
 * takes its part of dQ two tiles late, the second one tile late, so that no one waits for another.
 *
 * Compiled with the macros of backward_sm90.cu, but STAGES counts pieces of dO, see OPiece. */
#define CLUSTER 2 /* blocks; before the headers, which ask for it */
#include "backward_sm90.cuh"
#include "ptx/cluster.cuh"

static_assert(BLOCK_N == KEYS && BLOCK_M == 64 && THREADS == 384, "see above");
static_assert(DEPTH > 64 && DEPTH <= 256 && DEPTH_V <= 256, "four panels at most");

/* Registers of a thread that moves data and of one that computes; at first all have the same. */
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;

constexpr int DS_BUFFERS = 2;

/* Columns of dO that come and go together: there is no room for all of the next tile. */
constexpr int PIECE_PANELS = OTile::COUNT == 4 ? 2 : 1, PIECE_COLS = 64 * PIECE_PANELS;
constexpr int PIECES = OTile::COUNT / PIECE_PANELS;
using OPiece = OPieces<PIECES>;
static_assert(STAGES >= PIECES, "there is room for a tile");

/* Of the four panels of dQ each of the four warpgroups of a cluster computes one. Of three the
 * first warpgroups share the one in the middle, of two they have none. A block needs two
 * neighbouring panels of the other's keys. */
using OtherKTile = Panels<KEYS, 128>;
template <bool HAS_P> struct DQPart {
    static constexpr int COLS = HAS_P ? 32 * (KTile::COUNT - 2) : 64;
    int first_panel, panel, col; /* of the two that the block needs; of these; in the panel */

    __device__ __forceinline__ explicit DQPart(int block)
        : first_panel(block * (KTile::COUNT - 2)), panel(HAS_P ? 1 - block : block),
          col(COLS == 32 ? 32 * block : 0) {}
    template <class Tile> __device__ __forceinline__ Tile of(Tile K, int first) const {
        return {K.address + (first + panel) * Tile::PANEL_BYTES + col * 2};
    }
};

/* Named barriers. */
enum { KEYS_DONE = 1, GRADIENTS_DONE = 2 /* and 3: one a warpgroup */ };

/* All of shared memory. */
struct Shared {
    unsigned char K[KTile::BYTES];
    unsigned char V[VTile::BYTES];
    unsigned char other_K[OtherKTile::BYTES];
    unsigned char Q[Q_BUFFERS][QTile::BYTES];
    unsigned char dO[STAGES][OPiece::BYTES];
    unsigned char dS[DS_BUFFERS][STile::BYTES]; /* and P before it */
    unsigned char other_dS[DS_BUFFERS][STile::BYTES];
    unsigned char mask[MASK_BYTES];
    PairStats stats[Q_BUFFERS][BLOCK_M / 2]; /* row_stats; come with Q */
    mbarrier K_full, V_full, other_K_full;
    mbarrier mask_full[1], mask_empty[1];
    mbarrier Q_full[Q_BUFFERS], Q_empty[Q_BUFFERS];
    mbarrier dO_full[STAGES], dO_empty[STAGES];
    mbarrier P_full[DS_BUFFERS], dS_full[DS_BUFFERS], dS_empty[DS_BUFFERS];
    mbarrier other_dS_full[DS_BUFFERS];
    mbarrier other_dS_empty[DS_BUFFERS]; /* in the other block */
};
extern __shared__ __align__(1024) unsigned char shared_memory[];

/* Which block of the cluster this is. */
static __device__ __forceinline__ int block_of_cluster() {
    return uniform(blockIdx.x % CLUSTER);
}
static __device__ __forceinline__ QueryTiles queries_of_cluster(const fa_kernel_params &p,
                                                                const Work &work) {
    return QueryTiles(p, work.h, work.first_key - block_of_cluster() * KEYS, CLUSTER * KEYS);
}

/* --- the first warpgroup: a warp brings K and Q, one V and dO, one sends dS; two take the gradient
 * of a mask from dS --- */

constexpr int FIRST_TAKER = 2, TAKERS = 2, SENDER = 3;

/* dS of the n-th tile to the other block. */
static __device__ __forceinline__ void send_dS(Shared &shared, unsigned n) {
    const int buffer = n % DS_BUFFERS, other = 1 - blockIdx.x % CLUSTER;
    mbarrier *full = &shared.other_dS_full[buffer];
    wait_full(shared.dS_full, n);
    wait_empty(shared.other_dS_empty, n);
    mbarrier_arrive_expect_in_block(full, STile::BYTES, other);
    bulk_send(shared_address(shared.other_dS[buffer]), shared_address(shared.dS[buffer]),
              STile::BYTES, full, other);
}

static __device__ __forceinline__ void move_data(const fa_kernel_params &p, const Maps &maps,
                                                 Shared &shared, int warp) {
    const int block = block_of_cluster();
    const Work work(p);
    const QueryTiles queries = queries_of_cluster(p, work);
    const bool first = threadIdx.x % 32 == 0;
    QueryTile tile = queries.first();
    if (!queries.has(tile))
        return;
    if (warp >= FIRST_TAKER) {
        if (warp == SENDER && first)
            OtherKTile{shared_address(shared.other_K)}.load(
                &maps.k, &shared.other_K_full, work.first_key + (block ? -KEYS : KEYS),
                head(p.k, work.h), entry(p.k, work.b), 64 * DQPart<true>(block).first_panel);
#pragma unroll 1
        for (unsigned n = 0; queries.has(tile); tile = queries.after(tile), n++) {
            if (warp == SENDER && threadIdx.x % 32 == 0)
                send_dS(shared, n);
            if (FA_MASK_GRAD) {
                wait_full(shared.dS_full, n);
                take_mask_gradient<FIRST_TAKER, TAKERS>(
                    p, maps, STile{shared_address(shared.dS[n % DS_BUFFERS])}, anew(work), tile);
                tma_store_wait_read();
                release(&shared.dS_empty[n % DS_BUFFERS]);
            }
        }
    } else if (first) {
        if (warp == 0)
            bring_K(p, maps, shared, work);
        else
            bring_V(p, maps, shared, work);
        for (unsigned n = 0; queries.has(tile); tile = queries.after(tile), n++) {
            if (warp == 0)
                bring_Q(p, maps, shared, work, tile, n);
            else
                bring_dO<PIECES>(p, maps, shared, work, tile, n);
        }
    }
}

/* --- the warpgroups that compute --- */

/* Adds what a warp has of a tile's dQ to the sum in global memory: 16 queries, which begin at
 * `query`, and the columns from `col` on. There is no shared memory for it to go through. */
template <int COLS>
static __device__ __forceinline__ void add_dQ(const fa_kernel_params &p, const Gradient<COLS> &dQ,
                                              int b, int h, int query, int col) {
    if (!p.dq_sum || query >= p.seq_q)
        return;
    float *tile = dq_sum_tile(p, b, h, query, col);
#pragma unroll
    for (int d = 0; d < COLS / 8; d++)
        if (DEPTH % 64 == 0 || col + 8 * d < DEPTH)
            add_to_dq_sum(tile + d * DQ_TILE, dQ[d]);
}

/* dQ = dS K, of the keys of both blocks. */
template <int COLS>
static __device__ __forceinline__ void multiply_keys(Gradient<COLS> &dQ, STile dS, KTile K,
                                                     STile other_dS, OtherKTile other_K) {
    wgmma_fence();
    Wgmma<COLS>::template multiply<OVER_COLS, OVER_ROWS>(dQ, dS.sum_over_cols(0),
                                                         K.sum_over_rows(0));
#pragma unroll
    for (int n = 16; n < KEYS; n += 16)
        Wgmma<COLS>::template multiply_add<OVER_COLS, OVER_ROWS>(dQ, dS.sum_over_cols(n),
                                                                 K.sum_over_rows(n));
#pragma unroll
    for (int n = 0; n < KEYS; n += 16)
        Wgmma<COLS>::template multiply_add<OVER_COLS, OVER_ROWS>(dQ, other_dS.sum_over_cols(n),
                                                                 other_K.sum_over_rows(n));
    wgmma_commit();
}

/* dP = V dO^T, of the n-th tile. */
static __device__ __forceinline__ void multiply_dO(Scores &dP, VTile V, Shared &shared,
                                                   unsigned n) {
    asm volatile("" : "+r"(V.address)); /* as in multiply_rows */
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
        wait_full(shared.dO_full, PIECES * n + piece);
    wgmma_fence();
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        OPiece dO{shared_address(shared.dO[(PIECES * n + piece) % STAGES])};
        asm volatile("" : "+r"(dO.address)); /* where it is the same for all n */
#pragma unroll
        for (int d = 0; d < PIECE_COLS; d += 16) {
            const int col = PIECE_COLS * piece + d;
            if (col == 0)
                Wgmma<BLOCK_M>::multiply(dP, V.sum_over_cols(0), dO.sum_over_cols(0));
            else if (col < DEPTH_V)
                Wgmma<BLOCK_M>::multiply_add(dP, V.sum_over_cols(col), dO.sum_over_cols(d));
        }
    }
    wgmma_commit();
}

/* dV += P dO, of the n-th tile: a group of products for each piece, from this one on. */
template <int PIECE>
static __device__ __forceinline__ void multiply_P(Gradient<DEPTH_V> &dV, const Operand &P,
                                                  Shared &shared, unsigned n) {
    constexpr int BEGIN = PIECE_COLS * PIECE, REST = DEPTH_V - BEGIN;
    if constexpr (REST > 0) {
        constexpr int COLS = REST < PIECE_COLS ? REST : PIECE_COLS;
        const OPiece dO{shared_address(shared.dO[(PIECES * n + PIECE) % STAGES])};
        wait_full(shared.dO_full, PIECES * n + PIECE);
        wgmma_fence();
        multiply_queries<COLS>(*(Gradient<COLS> *)&dV[BEGIN / 8], P, dO);
        multiply_P<PIECE + 1>(dV, P, shared, n);
    }
}
/* They are done with. One group was begun after them. */
template <int PIECE> static __device__ __forceinline__ void finish_P(Shared &shared, unsigned n) {
    if constexpr (PIECE < PIECES) {
        wgmma_wait<PIECES - PIECE>();
        release(&shared.dO_empty[(PIECES * n + PIECE) % STAGES]);
        finish_P<PIECE + 1>(shared, n);
    }
}

/* The first warpgroup that computes, HAS_P, or the second. */
template <bool HAS_P>
static __device__ __forceinline__ void compute(const fa_kernel_params &p, const Maps &maps,
                                               Shared &shared) {
    constexpr int COLS = HAS_P ? DEPTH_V : DEPTH; /* of dV or dK */
    constexpr unsigned DELAY = HAS_P ? 2 : 1;     /* of dQ, in tiles */
    constexpr bool HAS_DQ = DQPart<HAS_P>::COLS > 0;
    constexpr int DQ_PART = HAS_DQ ? DQPart<HAS_P>::COLS : 32;
    /* With these there are no registers for dQ while threads compute P. */
    constexpr bool DQ_FIRST = HAS_P && FA_MASK && FA_DROPOUT;
    const int warp = uniform(threadIdx.x / 32) % 4, block = block_of_cluster();
    const unsigned lane = threadIdx.x % 32;
    const Work work(p);
    const QueryTiles queries = queries_of_cluster(p, work);
    const KTile K{shared_address(shared.K)};
    const VTile V{shared_address(shared.V)};
    const auto Q = [&](unsigned n) { return QTile{shared_address(shared.Q[n % Q_BUFFERS])}; };
    const auto dS = [&](unsigned n) { return STile{shared_address(shared.dS[n % DS_BUFFERS])}; };

    const auto other_dS = [&](unsigned n) {
        return STile{shared_address(shared.other_dS[n % DS_BUFFERS])};
    };

    const DQPart<HAS_P> part(block);
    const KTile dq_K = part.of(K, part.first_panel);
    const OtherKTile dq_other_K = part.of(OtherKTile{shared_address(shared.other_K)}, 0);
    Gradient<DQ_PART> dQ;
    const auto wait_dS = [&](unsigned n) {
        wait_full(shared.dS_full, n);
        wait_full(shared.other_dS_full, n);
        if (!HAS_P && warp == 0 && lane == 0) /* it has arrived here */
            mbarrier_arrive_in_block(&shared.dS_empty[n % DS_BUFFERS], 1 - block);
    };
    const auto begin_dQ = [&](STile dS, STile other_dS) {
        if (HAS_DQ)
            multiply_keys<DQ_PART>(dQ, dS, dq_K, other_dS, dq_other_K);
    };
    /* That was begun while the n-th tile is worked on. */
    const auto finish_dQ = [&](unsigned n) {
        wgmma_wait<0>();
        pin(dQ);
        if (n < DELAY)
            return;
        const int buffer = (n - DELAY) % DS_BUFFERS;
        __syncwarp();
        if (lane == 0) {
            mbarrier_arrive(&shared.dS_empty[buffer]);
            mbarrier_arrive_in_block(&shared.other_dS_empty[buffer], 1 - block);
        }
    };
    const auto add = [&](QueryTile tile, unsigned n) {
        const int col = 64 * (part.first_panel + part.panel) + part.col;
        if (HAS_DQ && n >= DELAY)
            add_dQ<DQ_PART>(p, dQ, work.b, tile.h, tile.i + 16 * warp, col);
    };

    Gradient<COLS> sum; /* dV or dK */
    set_to_zero(sum);

    Scores S;  /* or dP */
    Operand A; /* P or dS */
    Dropout dropout(p, work.b, 0);

    QueryTile tile = queries.first(), before = tile, two_before = tile;
    const unsigned tiles = queries.count();
    if (tiles > 0) {
        mbarrier_wait(&shared.K_full, 0);
        mbarrier_wait(&shared.V_full, 0);
        mbarrier_wait(&shared.other_K_full, 0);
        wait_full(shared.Q_full, 0);
        pin(sum);
        if constexpr (HAS_P)
            multiply_rows<DEPTH>(S, K, Q(0));
        else
            multiply_dO(S, V, shared, 0);
        for (unsigned n = 0;; n++) {
            const QueryTile late = DELAY == 2 ? two_before : before; /* that of dQ */
            const unsigned last = n - DELAY;
            const bool has_dQ = n >= DELAY;
            if (has_dQ)
                wait_dS(last);
            /* Where there is none, of what does not change: it is not used. */
            begin_dQ(has_dQ ? dS(last) : STile{V.address},
                     has_dQ ? other_dS(last) : STile{V.address});
            QueryNumbers numbers; /* lse or delta */
            if constexpr (HAS_P) {
                load_lse<0, QUERY_TILES>(numbers, shared.stats[n % Q_BUFFERS], lane);
                wgmma_wait<HAS_DQ && !DQ_FIRST>(); /* S */
                pin(S);
                if (DQ_FIRST) {
                    finish_dQ(n);
                    add(late, n);
                }
                dropout.head = work.b * p.heads_q + tile.h;
                exponentiate(p, S, numbers, shared, n, dropout, work, tile, 16 * warp, lane);
                release(&shared.Q_empty[n % Q_BUFFERS]);
                round_P(A, S);
                if (!DQ_FIRST)
                    finish_dQ(n);
                wait_empty(shared.dS_empty, n);
                put_dS(dS(n), 16 * warp, A, lane);
                release(&shared.P_full[n % DS_BUFFERS]);
                if (FA_DROPOUT)
                    keep(A);
                multiply_P<0>(sum, A, shared, n);
            } else {
                wait_full(shared.Q_full, n);
                load_delta(numbers, shared.stats[n % Q_BUFFERS], lane);
                wgmma_wait<1>(); /* dP */
                pin(S);
#pragma unroll
                for (int piece = 0; piece < PIECES; piece++)
                    release(&shared.dO_empty[(PIECES * anew(n) + piece) % STAGES]);
                wait_full(shared.P_full, n);
                Operand P;
                get_dS(P, dS(n), 16 * warp, lane);
                differentiate(p, A, S, P, numbers);
                put_dS(dS(n), 16 * warp, A, lane);
                fence_proxy_async();
                release(&shared.dS_full[n % DS_BUFFERS]);
                finish_dQ(n);
                wgmma_fence();
                multiply_queries<COLS>(sum, A, Q(n));
            }
            if (!DQ_FIRST)
                add(late, n);
            two_before = before, before = tile, tile = queries.after(tile);
            if (n + 1 == tiles)
                break;
            if constexpr (HAS_P) {
                wait_full(shared.Q_full, n + 1);
                multiply_rows<DEPTH>(S, K, Q(n + 1));
                finish_P<0>(shared, n);
            } else {
                multiply_dO(S, V, shared, anew(n + 1));
                wgmma_wait<1>(); /* dK */
                release(&shared.Q_empty[n % Q_BUFFERS]);
            }
        }
        wgmma_wait<0>();
        pin(sum);
    }
    for (unsigned last = tiles < DELAY ? 0 : tiles - DELAY; HAS_DQ && last < tiles; last++) {
        wait_dS(last);
        begin_dQ(dS(last), other_dS(last));
        wgmma_wait<0>();
        pin(dQ);
        add(last + 1 == tiles ? before : two_before, DELAY);
    }

    /* dV in place of V, dK of K. */
    barrier_sync(KEYS_DONE, 256);
    if constexpr (HAS_P)
        put_gradient<COLS>(V, sum, FA_DROPOUT ? p.dropout_scale : 1);
    else
        put_gradient<COLS>(K, sum, p.scale);
    fence_proxy_async();
    barrier_sync(GRADIENTS_DONE + HAS_P, 128);
    if (threadIdx.x % 128 == 0) {
        if (HAS_P && p.dv.data)
            V.store(&maps.dv, work.first_key, work.h, work.b);
        if (!HAS_P && p.dk.data)
            K.store(&maps.dk, work.first_key, work.h, work.b);
        tma_store_commit();
        tma_store_wait_read();
    }
}

extern "C" __global__ void __cluster_dims__(CLUSTER) __launch_bounds__(THREADS, 1)
    fa_backward_wide_sm90(const __grid_constant__ fa_kernel_params p,
                          const __grid_constant__ Maps maps) {
    Shared &shared = *(Shared *)shared_memory;
    const int warp = uniform(threadIdx.x / 32);
    if (threadIdx.x == 0) {
        prepare_to_bring(maps, shared, 8, 4);
        mbarrier_init(&shared.other_K_full, 1);
        for (int i = 0; i < DS_BUFFERS; i++) {
            mbarrier_init(&shared.P_full[i], 4);
            mbarrier_init(&shared.dS_full[i], 4);
            mbarrier_init(&shared.dS_empty[i],
                          8 + 1 + (FA_MASK_GRAD ? TAKERS : 0)); /* 1: it has been sent */
            mbarrier_init(&shared.other_dS_full[i], 1);
            mbarrier_init(&shared.other_dS_empty[i], 8);
        }
        mbarrier_init_fence();
    }
    cluster_sync();

    if (FA_MASK_GRAD >= 3 && FA_WINDOW) {
        const Work work(p);
        clear_hidden(p, queries_of_cluster(p, work), work.b, work.h, work.first_key);
    }
    if (warp < 4) {
        registers_decrease<PRODUCER_REGISTERS>();
        move_data(p, maps, shared, warp);
    } else {
        registers_increase<CONSUMER_REGISTERS>();
        if (warp < 8)
            compute<true>(p, maps, shared);
        else
            compute<false>(p, maps, shared);
    }
    cluster_sync(); /* nobody reaches for this block's shared memory any more */
}
