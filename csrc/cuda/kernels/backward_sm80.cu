/* The FlashAttention backward for sm_80 and up (Dao 2023, Algorithm 2), with mma.sync, ldmatrix and
 * cp.async.
 *
 * A block owns BLOCK_N keys of one key head; the queries of every head of the group pass by BLOCK_M
 * at a time, so that dK and dV stay in registers until they are finished. What limits the kernel is
 * the bandwidth of shared memory, so a warp has large pieces of each product, in two dimensions:
 *
 *     S^T = K Q^T, dP^T = V dO^T    WARP_KEYS x WARP_QUERIES
 *     dV += P^T dO, dK += dS^T Q    WARP_KEYS x a share of the columns
 *     dQ = dS K                     DQ_ROWS x a share of the columns
 *
 * Scores are transposed because as accumulators P^T and dS^T have the layout that the products with
 * dO and Q want as their first operand: a warp begins with its own queries, from registers, and
 * finds those of the other warps in shared memory after the barrier. The sum of dQ over the keys of
 * all blocks is made in global memory, in float.
 *
 * Compiled with the macros of forward_sm80.cu and FA_MASK_GRAD (0 none, 1 added atomically because
 * the mask broadcasts, 2 stored as floats, 3 stored in the dtype of q, with zeros where the window
 * hides it). */
#include "accumulators.cuh"
#include "backward_mask_tile.cuh"
#include "block_order.cuh"
#include "operand.cuh"
#include "ptx/mbarrier.cuh"
#include "query_tiles.cuh"
#include "scores.cuh"
#include "tile.cuh"
#include "workspace.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int DEPTH = round_up_16(HEAD_DIM), DEPTH_V = round_up_16(HEAD_DIM_V);
/* 32 keys a warp, unless that leaves less than 16 queries. */
constexpr int KEY_WARPS = BLOCK_M * BLOCK_N / WARPS >= 32 * 16 ? BLOCK_N / 32 : BLOCK_N / 16;
constexpr int QUERY_WARPS = WARPS / KEY_WARPS;
constexpr int WARP_KEYS = BLOCK_N / KEY_WARPS, WARP_QUERIES = BLOCK_M / QUERY_WARPS;
constexpr int KEY_TILES = WARP_KEYS / 16, QUERY_TILES = WARP_QUERIES / 8;
/* Steps of a product at a time; of more, the compiler loads more ahead than it has registers for,
 * soonest where it compiles for sm_100. */
#if __CUDA_ARCH__ >= 1000
constexpr int UNROLL = 1;
#else
constexpr int UNROLL = STAGES == 1 || PARTS > 1 || (FA_MASK && HEAD_DIM > 64) ? 1
                       : FA_MASK || FA_DROPOUT ? 2
                                               : DEPTH / 16; /* all */
#endif
constexpr int OTHERS_UNROLL = PARTS > 1 ? 1 : BLOCK_M / 16; /* all */
static_assert(KEY_WARPS * QUERY_WARPS == WARPS && WARP_QUERIES % 16 == 0, "scores are shared");
/* Warps for dQ: 32 queries each, if there are as many, and the columns shared by those that are
 * left. */
constexpr int DQ_ROWS = BLOCK_M < 32 ? BLOCK_M : 32;
constexpr int DQ_ROW_WARPS = BLOCK_M / DQ_ROWS, DQ_SHARES = WARPS / DQ_ROW_WARPS;
static_assert(BLOCK_M % DQ_ROWS == 0 && WARPS % DQ_ROW_WARPS == 0, "dQ is shared");
static_assert(FA_STATS_ROWS % BLOCK_M == 0, "row_stats are there for whole tiles");

using KTile = Tile<BLOCK_N, HEAD_DIM>;
using VTile = Tile<BLOCK_N, HEAD_DIM_V>;
using QTile = Tile<BLOCK_M, HEAD_DIM>;
using OTile = Tile<BLOCK_M, HEAD_DIM_V>;
using PTile = Tile<BLOCK_N, BLOCK_M>; /* P^T, dS^T */
using MaskTile = Tile<BLOCK_M, BLOCK_N>;

/* A tile of queries in shared memory: Q, dO and row_stats. */
constexpr int DO_OFFSET = QTile::BYTES, STATS_OFFSET = DO_OFFSET + OTile::BYTES;
constexpr int STAGE_BYTES = STATS_OFFSET + BLOCK_M / 2 * sizeof(PairStats);
/* K, V, P, dS, the mask where there is one of the dtype of q, and the stages. */
constexpr int P_OFFSET = KTile::BYTES + VTile::BYTES, MASK_OFFSET = P_OFFSET + 2 * PTile::BYTES;
constexpr bool HAS_MASK_TILE = FA_MASK == 2;
constexpr int STAGES_OFFSET = MASK_OFFSET + (HAS_MASK_TILE ? MaskTile::BYTES : 0);
/* Part of the next tile of queries is asked for late, and waited for after dQ, not before. */
constexpr bool LANDS_LATE = STAGES == 1 || HAS_MASK_TILE;
/* The mask's gradient is dS in shared memory, rounded as it is for dK; or that in registers. */
constexpr bool MASK_GRAD_OF_TILE = FA_MASK_GRAD == 3 || (FA_MASK_GRAD == 1 && HAS_MASK_TILE);
constexpr bool MASK_GRAD_OF_SCORES = FA_MASK_GRAD != 0 && !MASK_GRAD_OF_TILE;

extern __shared__ __align__(16) unsigned char shared_memory[];
__shared__ mbarrier shared_barriers[3];

/* Columns of a product, in pairs of 8, divided among SHARES warps; the last may have less. */
template <int COLS, int SHARES> struct Columns {
    static constexpr int PAIRS = COLS / 16, SHARE = (PAIRS + SHARES - 1) / SHARES;
    static constexpr int TILES = 2 * SHARE; /* accumulators of 8 columns in a warp */

    int first; /* column */

    __device__ __forceinline__ explicit Columns(int share) : first(share * SHARE * 16) {}
    __device__ __forceinline__ bool has(int pair) const {
        return PAIRS % SHARES == 0 || first + 16 * pair < COLS;
    }
};
using DKColumns = Columns<DEPTH, QUERY_WARPS>;
using DVColumns = Columns<DEPTH_V, QUERY_WARPS>;
using DQColumns = Columns<DEPTH, DQ_SHARES>;

/* Of a warp: keys x queries, as accumulators and as the first operand of the next product. */
typedef float Scores[KEY_TILES][QUERY_TILES][4];
typedef unsigned Factor[KEY_TILES][QUERY_TILES / 2][WORDS];

/* C += A B^T of 16 columns from d on. */
template <class A, class B>
static __device__ __forceinline__ void multiply_columns(Scores &C, const A &a_tile, int first_row,
                                                        const B &b_tile, int first_col, int d) {
    Operand a[KEY_TILES];
#pragma unroll
    for (int k = 0; k < KEY_TILES; k++) {
        a_tile.a(a[k].part[0], first_row + 16 * k, d);
        a[k].split();
    }
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m += 2) {
        Operand b;
        b_tile.b_of_rows(b.part[0], first_col + 8 * m, d);
        b.split();
        multiply(C, m, a, b);
    }
}

/* C = A B^T. The first step stands alone so that it adds to the zero register; in two parts, every
 * step does. */
template <class A, class B>
static __device__ __forceinline__ void multiply_rows(Scores &C, const A &a_tile, int first_row,
                                                     const B &b_tile, int first_col) {
    set_to_zero(C);
    constexpr bool ALONE = PARTS == 1;
    if (ALONE)
        multiply_columns(C, a_tile, first_row, b_tile, first_col, 0);
#pragma unroll UNROLL
    for (int d = ALONE ? 16 : 0; d < A::WIDTH; d += 16)
        multiply_columns(C, a_tile, first_row, b_tile, first_col, d);
}

/* C += A B, for 16 rows of B from first_row on. */
template <int ROW_TILES, class Cols, class B>
static __device__ __forceinline__ void multiply_step(float (&C)[ROW_TILES][Cols::TILES][4],
                                                     const Operand (&a)[ROW_TILES], const B &b_tile,
                                                     int first_row, const Cols &cols) {
#pragma unroll
    for (int d = 0; d < Cols::SHARE; d++) {
        if (!cols.has(d))
            continue;
        Operand b;
        b_tile.b_of_cols(b.part[0], first_row, cols.first + 16 * d);
        b.split();
        multiply(C, 2 * d, a, b);
    }
}

/* C += P^T B for the warp's own queries, from first_query on. */
template <class Cols, class B>
static __device__ __forceinline__ void multiply_own(float (&C)[KEY_TILES][Cols::TILES][4],
                                                    const Factor &P, const B &b_tile,
                                                    int first_query, const Cols &cols) {
#pragma unroll
    for (int m = 0; m < QUERY_TILES / 2; m++) {
        Operand a[KEY_TILES];
#pragma unroll
        for (int k = 0; k < KEY_TILES; k++)
            a[k].set(P[k][m]);
        multiply_step<KEY_TILES>(C, a, b_tile, first_query + 16 * m, cols);
    }
}

/* C += P^T B for the queries of the other warps, which come after those from first_query on. */
template <class Cols, class B>
static __device__ __forceinline__ void
multiply_others(float (&C)[KEY_TILES][Cols::TILES][4], const PTile &P, int first_key,
                const B &b_tile, int first_query, const Cols &cols) {
#pragma unroll OTHERS_UNROLL
    for (int w = 1; w < QUERY_WARPS; w++) {
        const int query = (first_query + w * WARP_QUERIES) % BLOCK_M;
#pragma unroll OTHERS_UNROLL
        for (int m = 0; m < WARP_QUERIES; m += 16) {
            Operand a[KEY_TILES];
#pragma unroll
            for (int k = 0; k < KEY_TILES; k++) {
                P.a(a[k].part[0], first_key + 16 * k, query + m);
                a[k].split();
            }
            multiply_step<KEY_TILES>(C, a, b_tile, query + m, cols);
        }
    }
}

/* From accumulators to a tile in shared memory. */
template <class Cols, class T>
static __device__ __forceinline__ void put_gradient(const T &tile, int first_row, const Cols &cols,
                                                    const float (&C)[KEY_TILES][Cols::TILES][4],
                                                    float scale, int g, int t) {
#pragma unroll
    for (int k = 0; k < KEY_TILES; k++)
#pragma unroll
        for (int d = 0; d < Cols::TILES; d++) {
            if (!cols.has(d / 2))
                continue;
#pragma unroll
            for (int r = 0; r < 2; r++)
                put_8_columns(tile, first_row + 16 * k + g + 8 * r, cols.first + 8 * d, t, C[k][d],
                              r, scale);
        }
}

/* Begins to copy a tile of queries to a stage in shared memory. */
static __device__ __forceinline__ void load_queries(unsigned stage, const fa_kernel_params &p,
                                                    int b, QueryTile tile) {
    const QTile Q{stage};
    const OTile dO{stage + DO_OFFSET};
    Q.load(row_of(p.q, b, tile.h, tile.i), p.q.stride_row, p.seq_q - tile.i);
    dO.load(row_of(p.dout, b, tile.h, tile.i), p.dout.stride_row, p.seq_q - tile.i);
    if (threadIdx.x < BLOCK_M / 2)
        cp_async_16(stage + STATS_OFFSET + 16 * threadIdx.x,
                    row_stats(p, b, tile.h, tile.i + 2 * threadIdx.x), 16);
}

/* S becomes P = exp(S - lse), with its sign changed where dropout drops it. stats are those of the
 * warp's first query. */
static __device__ __forceinline__ void exponentiate(Scores &S, const fa_kernel_params &p,
                                                    const PairStats *stats, const MaskTile &mask,
                                                    int warp_query, int warp_key, int b, int h,
                                                    int first_query, int first_key, int g, int t) {
    const Dropout dropout(p, b, h);
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m += 2)
#pragma unroll
        for (int k = 0; k < KEY_TILES; k++) {
            unsigned word[4], masks[WORDS];
            if (HAS_MASK_TILE)
                mask.a_transposed(masks, warp_query + 8 * m, warp_key + 16 * k);
            if (FA_DROPOUT)
                dropout.draw_transposed(word, first_query + 8 * m, first_key + 16 * k, g, t);
#pragma unroll
            for (int x = 0; x < 8; x++) {
                const int column = 8 * m + x / 4 * 8 + 2 * t + x % 2;
                const int i = first_query + column, j = first_key + 16 * k + g + x % 4 / 2 * 8;
                float &P = S[k][m + x / 4][x % 4];
                const float2 pair = stats[column / 2].lse;
                const float lse = x % 2 ? pair.y : pair.x;
#if FA_MASK
                const float term = HAS_MASK_TILE
                                       ? mask_term((mask_elem)(masks[x / 2] >> 16 * (x % 2)))
                                       : mask_value(p, mask_row(p.mask, b, h, min(i, p.seq_q - 1)),
                                                    min(j, p.seq_k - 1));
                P = probability(fmaf(P, p.scale_log2e, term), lse);
#else
                P = exp2_approx(min_nan(fmaf(P, p.scale_log2e, -lse), 0));
#endif
                const int number = x % 2 * 4 + x / 4 * 2 + x % 4 / 2;
                if (FA_DROPOUT && !dropout.keeps(word, number))
                    P = -P;
            }
        }
    /* Only here, in the few tiles that are cut, so that the others do not look. */
    if (is_cut(p, first_query, WARP_QUERIES, first_key, WARP_KEYS)) {
#pragma unroll
        for (int k = 0; k < KEY_TILES; k++)
#pragma unroll
            for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
                for (int x = 0; x < 4; x++)
                    if (!is_visible(p, first_query + 8 * m + 2 * t + x % 2,
                                    first_key + 16 * k + g + x / 2 * 8))
                        S[k][m][x] = 0;
    }
}

static __device__ __forceinline__ void add_to_mask_gradient(const fa_kernel_params &p,
                                                            long long index, float dS) {
    float *to = (float *)p.dmask.data + index;
    if (FA_MASK_GRAD == 1)
        atomicAdd(to, dS);
    else
        *to = dS;
}

/* dP becomes dS = P (dP - delta). */
static __device__ __forceinline__ void differentiate(Scores &dP, const Scores &P,
                                                     const fa_kernel_params &p,
                                                     const PairStats *stats, int b, int h,
                                                     int first_query, int first_key, int g, int t) {
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m++) {
        const float2 delta = stats[4 * m + t].delta;
#pragma unroll
        for (int k = 0; k < KEY_TILES; k++)
#pragma unroll
            for (int x = 0; x < 4; x++) {
                const float P_x = FA_DROPOUT ? fabsf(P[k][m][x]) : P[k][m][x];
                float &dS = dP[k][m][x];
                if (FA_DROPOUT)
                    dS = P[k][m][x] < 0 ? 0 : dS * p.dropout_scale;
                dS = P_x * (dS - (x % 2 ? delta.y : delta.x));
                const int i = first_query + 8 * m + 2 * t + x % 2;
                const int j = first_key + 16 * k + g + x / 2 * 8;
                if (MASK_GRAD_OF_SCORES && i < p.seq_q && j < p.seq_k)
                    add_to_mask_gradient(p, mask_row(p.dmask, b, h, i) + j * p.dmask.stride_col,
                                         dS);
            }
    }
}

/* dV wants P after dropout, dK wants dS as it is. */
template <bool IS_P>
static __device__ __forceinline__ void to_factor(Factor &a, const Scores &C,
                                                 const fa_kernel_params &p) {
#pragma unroll
    for (int k = 0; k < KEY_TILES; k++)
#pragma unroll
        for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float lo = C[k][m][2 * r], hi = C[k][m][2 * r + 1];
                if (FA_DROPOUT && IS_P) {
                    lo = lo < 0 ? 0 : lo * p.dropout_scale;
                    hi = hi < 0 ? 0 : hi * p.dropout_scale;
                }
                put_pair(a[k], m, r, lo, hi);
            }
}

/* An operand of a warp to shared memory, for the others. */
static __device__ __forceinline__ void put_factor(const PTile &tile, const Factor &P, int first_key,
                                                  int first_query, int g, int t) {
#pragma unroll
    for (int k = 0; k < KEY_TILES; k++)
#pragma unroll
        for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
            for (int r = 0; r < 2; r++)
                store_pair(tile, first_key + 16 * k + g + 8 * r, first_query + 8 * m, t, P[k], m,
                           r);
}

/* Adds a tile's dQ = dS K to the sum in global memory. */
static __device__ __forceinline__ void add_dq(const fa_kernel_params &p, const PTile &dS,
                                              const KTile &K, int b, int h, int query, int warp) {
    const int first_row = warp % DQ_ROW_WARPS * DQ_ROWS;
    const DQColumns cols(warp / DQ_ROW_WARPS);
    float dQ[DQ_ROWS / 16][DQColumns::TILES][4] = {};
#pragma unroll UNROLL
    for (int n = 0; n < BLOCK_N; n += 16) {
        Operand a[DQ_ROWS / 16];
#pragma unroll
        for (int m = 0; m < DQ_ROWS / 16; m++) {
            dS.a_transposed(a[m].part[0], n, first_row + 16 * m);
            a[m].split();
        }
        multiply_step<DQ_ROWS / 16>(dQ, a, K, n, cols);
    }
#pragma unroll
    for (int m = 0; m < DQ_ROWS / 16; m++) {
        const int i = query + first_row + 16 * m;
        if (i >= p.seq_q)
            break;
        float *row = dq_sum_tile(p, b, h, i, cols.first);
#pragma unroll
        for (int d = 0; d < DQColumns::TILES; d++) {
            if (cols.has(d / 2))
                add_to_dq_sum(row + d * DQ_TILE, dQ[m][d]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    fa_backward(const __grid_constant__ fa_kernel_params p) {
    const int warp = threadIdx.x / 32;
    /* Under a causal mask the first keys have the most queries. */
    const OrderedBlock block = ordered_block(p, p.heads_k, blockIdx.x);
    const int first_key = block.index * BLOCK_N;
    const int hk = block.head % p.heads_k, b = block.head / p.heads_k;
    const int warp_key = warp / QUERY_WARPS * WARP_KEYS;
    const int warp_query = warp % QUERY_WARPS * WARP_QUERIES;
    const DKColumns dk_columns(warp % QUERY_WARPS);
    const DVColumns dv_columns(warp % QUERY_WARPS);

    const KTile K{shared_address(shared_memory)};
    const VTile V{K.address + KTile::BYTES};
    const PTile shared_P{K.address + P_OFFSET}, shared_dS{shared_P.address + PTile::BYTES};

    const QueryTiles queries(p, hk, first_key);
    const MaskTile mask{K.address + MASK_OFFSET};
    /* Where there is no such tile, nothing is loaded. */
    const auto load = [&](int stage, QueryTile tile) {
        if (queries.has(tile))
            load_queries(K.address + STAGES_OFFSET + stage * STAGE_BYTES, p, b, tile);
        cp_async_commit();
    };
    const auto load_mask_of = [&](QueryTile tile) {
        if (HAS_MASK_TILE && queries.has(tile))
            load_mask(mask, p, b, tile.h, tile.i, first_key);
        cp_async_commit();
    };

    float dK[KEY_TILES][DKColumns::TILES][4] = {}, dV[KEY_TILES][DVColumns::TILES][4] = {};
    QueryTile tile = queries.first();
    if (queries.has(tile)) {
        K.load(row_of(p.k, b, hk, first_key), p.k.stride_row, p.seq_k - first_key);
        V.load(row_of(p.v, b, hk, first_key), p.v.stride_row, p.seq_k - first_key);
    }
    load(0, tile);
    load_mask_of(tile);
    if (FA_MASK_GRAD == 3 && FA_WINDOW)
        clear_hidden(p, queries, b, hk, first_key);

    /* Of each tile: it is there; P and dS of all warps are; nobody needs them any more. All threads
     * arrive, and wait later, so that warps get out of step: some multiply while others are at
     * their exponentials. (One arrival for a warp is no faster, and compute-sanitizer would see
     * races.) */
    const mbarrier_ref landed(shared_barriers);
    const mbarrier_ref put(landed.address + 8), finished(landed.address + 16);
    if (threadIdx.x == 0) {
        mbarrier_init(landed, THREADS);
        mbarrier_init(put, THREADS);
        mbarrier_init(finished, THREADS);
    }
    cp_async_wait<0>();
    __syncthreads();
    mbarrier_arrive(finished);
    mbarrier_arrive(landed);

    unsigned phase = 0;
    for (int stage = 0; queries.has(tile); stage = STAGES - 1 - stage, phase ^= 1) {
        const int h = tile.h, query = tile.i;
        tile = queries.after(tile);
        const int offset = STAGES_OFFSET + stage * STAGE_BYTES;
        const QTile Q{K.address + offset};
        const OTile dO{Q.address + DO_OFFSET};
        mbarrier_wait(landed, phase);

        const int lane = threadIdx.x % 32;
        const int g = lane / 4, t = lane % 4;
        const PairStats *stats =
            (PairStats *)(shared_memory + offset + STATS_OFFSET) + warp_query / 2;
        Factor factor;
        Scores P, dS;
        multiply_rows(P, K, warp_key, Q, warp_query);
        exponentiate(P, p, stats, mask, warp_query, warp_key, b, h, query + warp_query,
                     first_key + warp_key, g, t);
        mbarrier_wait(finished, phase); /* all warps, with the tile before this one */
        to_factor<true>(factor, P, p);
        put_factor(shared_P, factor, warp_key, warp_query, g, t);
        multiply_own(dV, factor, dO, warp_query, dv_columns);

        multiply_rows(dS, V, warp_key, dO, warp_query);
        differentiate(dS, P, p, stats, b, h, query + warp_query, first_key + warp_key, g, t);
        to_factor<false>(factor, dS, p);
        put_factor(shared_dS, factor, warp_key, warp_query, g, t);
        mbarrier_arrive(put);
        if (STAGES == 2) /* only now: it is long, and others wait for what has been put */
            load(1 - stage, tile);
        multiply_own(dK, factor, Q, warp_query, dk_columns);
        mbarrier_wait(put, phase); /* and nobody reads the mask any more */
        load_mask_of(tile);
        multiply_others(dV, shared_P, warp_key, dO, warp_query, dv_columns);
        multiply_others(dK, shared_dS, warp_key, Q, warp_query, dk_columns);
        if (STAGES == 1) {
            __syncthreads(); /* nobody reads Q and dO any more */
            load(0, tile);
        }
        if (!LANDS_LATE) {
            cp_async_wait<0>();
            mbarrier_arrive(landed);
        }
        if (MASK_GRAD_OF_TILE)
            put_mask_gradient(shared_dS, p, b, h, query, first_key);
        if (p.dq_sum)
            add_dq(p, shared_dS, K, b, h, query, warp);
        if (LANDS_LATE) {
            cp_async_wait<0>();
            mbarrier_arrive(landed);
        }
        mbarrier_arrive(finished);
    }
    __syncthreads(); /* nobody reads K and V any more: dK and dV take their places */

    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    put_gradient(K, warp_key, dk_columns, dK, p.scale, g, t);
    put_gradient(V, warp_key, dv_columns, dV, 1, g, t);
    __syncthreads();
    const int rows = p.seq_k - first_key;
    if (p.dk.data)
        K.store(row_of(p.dk, b, hk, first_key), p.dk.stride_row, rows, 0, BLOCK_N, threadIdx.x,
                THREADS);
    if (p.dv.data)
        V.store(row_of(p.dv, b, hk, first_key), p.dv.stride_row, rows, 0, BLOCK_N, threadIdx.x,
                THREADS);
}
