/* The FlashAttention forward for sm_90a, with TMA and wgmma.
 *
 * A block stays on its SM and takes one piece of work after the other: BLOCK_M queries of one head.
 * Its first warpgroup moves data: one warp brings Q, one K, one V. Each of the others owns 64
 * queries; keys and values pass by, BLOCK_N at a time, from the last to the first.
 *
 * Three things keep the tensor cores busy while the exponentials are computed. While a warpgroup is
 * in the softmax of one tile, its product P V of the tile before is running. The warpgroups take
 * turns in starting products (PING_PONG), so that they are not all in the softmax at once. And the
 * softmax itself is short: it does not look for the maximum, see softmax().
 *
 * Compiled with: FA_DTYPE_BF16 or FA_DTYPE_FP16, HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, STAGES (of
 * K and V), O_PLACE, PING_PONG, FA_MASK (0 none, 1 bool, 2 dtype of q, 3 float), FA_MASK_TILES,
 * FA_WINDOW, FA_DROPOUT. */
#include "accumulators.cuh"
#include "block_order.cuh"
#include "dispenser.cuh"
#include "mask_map.cuh"
#include "mask_tile.cuh"
#include "panels.cuh"
#include "ptx/copy.cuh"
#include "ptx/mma.cuh"
#include "ptx/stmatrix.cuh"
#include "ptx/warpgroup.cuh"
#include "ring.cuh"
#include "scores.cuh"

constexpr int CONSUMERS = BLOCK_M / 64; /* warpgroups that compute */
constexpr int DEPTH = (HEAD_DIM + 15) / 16 * 16;
constexpr int WIDTH = (HEAD_DIM_V + 15) / 16 * 16;
constexpr int KEY_TILES = BLOCK_N / 8, OUT_TILES = WIDTH / 8;
static_assert(THREADS == 128 * (CONSUMERS + 1), "and one warpgroup that moves data");

/* Registers of a thread that moves data and of one that computes; at first all have the same. */
constexpr int PRODUCER_REGISTERS = CONSUMERS == 2 ? 40 : 32;
constexpr int CONSUMER_REGISTERS = CONSUMERS == 2 ? 232 : 160;

using QTile = Panels<64, HEAD_DIM>;
using KTile = Panels<BLOCK_N, HEAD_DIM>;
using VTile = Panels<BLOCK_N, HEAD_DIM_V>;
using OTile = Panels<16, HEAD_DIM_V>; /* of a warp */

/* Where there is room, O has a place after Q, on its way to memory. */
constexpr int O_BYTES = O_PLACE ? 4 * OTile::BYTES : 0;

enum { TURN = 1 }; /* the first of a named barrier for each warpgroup that computes */

/* Boxes of 64 columns; 64 rows of q, BLOCK_N of k and v, see MaskTile for mask. Heads and batch
 * entries that are broadcast, with a stride of 0, are there once. */
struct Maps {
    tensor_map q, k, v, mask;
};

/* --- who does what: all warps go through the same work in the same order --- */

struct Range {
    int begin, end; /* of tiles of keys */
};

/* The tiles with keys that some of the queries row .. row + rows - 1 see. */
static __device__ __forceinline__ Range visible_tiles(const fa_kernel_params &p, int row,
                                                      int rows) {
    int begin = 0, end = p.seq_k;
    if (FA_WINDOW) {
        begin = max(0, row + p.window_begin) / BLOCK_N;
        end = max(0, min(end, min(row + rows, p.seq_q) - 1 + p.window_end));
    }
    end = (end + BLOCK_N - 1) / BLOCK_N;
    return {min(begin, end), end};
}

struct Work {
    int head; /* of queries, counted through the batch; -1: there is no more work */
    int row;  /* the first query */
    Range tiles;

    __device__ __forceinline__ int b(const fa_kernel_params &p) const { return head / p.heads_q; }
    __device__ __forceinline__ int h(const fa_kernel_params &p) const { return head % p.heads_q; }
    __device__ __forceinline__ const unsigned *mask_map(const fa_kernel_params &p) const {
        return FA_MASK == 1 ? MaskMap::of(p, b(p), h(p), row / BLOCK_M) : nullptr;
    }
};

static __device__ __forceinline__ Work work_of(const fa_kernel_params &p, int piece) {
    /* Under a causal mask the last queries have the most keys. */
    const OrderedBlock block = ordered_block(p, p.heads_q, piece);
    const int row = (p.blocks - 1 - block.index) * BLOCK_M;
    Work work{(int)block.head, row, visible_tiles(p, row, BLOCK_M)};
    work.tiles.end = TilesDown(work.mask_map(p)).from(work.tiles.end - 1) + 1;
    return work;
}

/* What one thread posts for all warps of the block: the pieces to work on. */
constexpr int POSTS = 4;

struct Posts {
    int head[POSTS], row[POSTS], begin[POSTS], end[POSTS]; /* of struct Work */
    mbarrier full[POSTS], empty[POSTS];
};
constexpr int READERS = 2 + 4 * CONSUMERS; /* the warps of K and V and those that compute */

/* The n-th piece of this block, if there is one. Read by whole warps or by single threads. */
static __device__ __forceinline__ bool read_post(Posts &posts, unsigned n, bool whole_warp,
                                                 Work &work) {
    wait_full(posts.full, n);
    const unsigned i = n % POSTS;
    work = {posts.head[i], posts.row[i], {posts.begin[i], posts.end[i]}};
    if (whole_warp) {
        work = {uniform(work.head),
                uniform(work.row),
                {uniform(work.tiles.begin), uniform(work.tiles.end)}};
        release(&posts.empty[i]);
    } else
        mbarrier_arrive(&posts.empty[i]);
    return work.head >= 0;
}

/* All of shared memory. */
struct Shared {
    unsigned char Q[CONSUMERS][QTile::BYTES + O_BYTES];
    unsigned char K[STAGES][KTile::BYTES];
    unsigned char V[STAGES][VTile::BYTES];
    unsigned char mask[STAGES][MaskTile::BYTES]; /* comes and goes with K */
    int next_tile[STAGES];                       /* likewise, with a bool mask */
    mbarrier Q_full[CONSUMERS][1], Q_empty[CONSUMERS][1];
    mbarrier K_full[STAGES], K_empty[STAGES];
    mbarrier V_full[STAGES], V_empty[STAGES];
    Posts posts;
};
extern __shared__ __align__(1024) unsigned char shared_memory[];

/* --- the warpgroup that moves data; one thread of each warp --- */

/* Q, and before it the piece for the others. */
static __device__ __forceinline__ void bring_Q(const fa_kernel_params &p, const tensor_map *map,
                                               Shared &shared) {
    Dispenser dispenser;
    const int count = p.batch * p.heads_q * p.blocks;
    for (unsigned n = 0;; n++) {
        const int piece = dispenser.next(p, count);
        const Work work = piece < count ? work_of(p, piece) : Work{-1, 0, {0, 0}};
        wait_empty(shared.posts.empty, n);
        shared.posts.head[n % POSTS] = work.head;
        shared.posts.row[n % POSTS] = work.row;
        shared.posts.begin[n % POSTS] = work.tiles.begin;
        shared.posts.end[n % POSTS] = work.tiles.end;
        mbarrier_arrive(&shared.posts.full[n % POSTS]);
        if (piece >= count)
            return;
        const int h = p.q.stride_head ? work.h(p) : 0, b = p.q.stride_batch ? work.b(p) : 0;
        for (int w = 0; w < CONSUMERS; w++) {
            wait_empty(shared.Q_empty[w], n);
            QTile{shared_address(shared.Q[w])}.load(map, shared.Q_full[w], work.row + 64 * w, h, b);
        }
    }
}

/* K or V. */
template <class Tile, class Also, int BYTES>
static __device__ __forceinline__ void
bring_tiles(const fa_kernel_params &p, const fa_kernel_tensor &tensor, const tensor_map *map,
            unsigned char (&buffers)[STAGES][BYTES], mbarrier (&full)[STAGES],
            mbarrier (&empty)[STAGES], Posts &posts, const Also &bring_before) {
    Work work;
    unsigned n = 0; /* tiles so far */
    for (unsigned pieces = 0; read_post(posts, pieces, false, work); pieces++) {
        const int h = tensor.stride_head ? work.h(p) / (p.heads_q / p.heads_k) : 0;
        const int b = tensor.stride_batch ? work.b(p) : 0;
        TilesDown down(work.mask_map(p));
        for (int tile = work.tiles.end - 1; tile >= work.tiles.begin; n++) {
            const int key = tile * BLOCK_N;
            tile = down.from(tile - 1);
            wait_empty(empty, n);
            bring_before(work, key, n % STAGES, tile);
            Tile{shared_address(buffers[n % STAGES])}.load(map, &full[n % STAGES], key, h, b);
        }
    }
}

/* --- a warpgroup that computes --- */

using Scores = float[KEY_TILES][4];               /* then probabilities, see mma_16x8x16 */
using Probabilities = unsigned[KEY_TILES / 2][4]; /* as operands A */
using Output = float[OUT_TILES][4];

/* S = Q K^T */
static __device__ __forceinline__ void multiply_scores(Scores &S, QTile Q, KTile K) {
    /* Keeps the compiler from computing all operands of Q ahead, for which there are not enough
     * uniform registers. */
    asm volatile("" : "+r"(Q.address));
    wgmma_fence();
    Wgmma<BLOCK_N>::multiply(S, Q.sum_over_cols(0), K.sum_over_cols(0));
#pragma unroll
    for (int d = 16; d < DEPTH; d += 16)
        Wgmma<BLOCK_N>::multiply_add(S, Q.sum_over_cols(d), K.sum_over_cols(d));
    wgmma_commit();
}

/* O += P V */
static __device__ __forceinline__ void multiply_values(Output &O, const Probabilities &P, VTile V) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < KEY_TILES / 2; k++)
        Wgmma<WIDTH>::multiply_add(O, P[k], V.sum_over_rows(16 * k));
    wgmma_commit();
}

/* S = Q K^T for this warp alone, when the scores are wanted a second time. */
static __device__ __forceinline__ void recompute_scores(Scores &S, QTile Q, KTile K,
                                                        int first_row) {
    const int lane = lane_anew();
    set_to_zero(S);
#pragma unroll 1
    for (int d = 0; d < DEPTH; d += 16) {
        unsigned a[4], b[4];
        ldmatrix_x4(a, Q.chunk(first_row + lane % 16, d + lane / 16 * 8));
        const unsigned keys = K.chunk(lane / 16 * 8 + lane % 8, d + lane / 8 % 2 * 8);
#pragma unroll
        for (int n = 0; n < KEY_TILES; n += 2) {
            ldmatrix_x4(b, keys + 8 * n * 128);
            mma_16x8x16(S[n], a, b[0], b[1]);
            mma_16x8x16(S[n + 1], a, b[2], b[3]);
        }
    }
}

/* What a thread knows of its rows, g and g + 8 of its warp's 16. */
struct Rows {
    float m[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}; /* P = exp2(S - m), in units of log2 */
    float l[2] = {0, 0};                                 /* sum of P over this thread's columns */
    float rescale[2];                                    /* what O has to be multiplied by */
    bool unseen = true; /* some row of the warp has not seen a key, and so has no m */
    bool wary = false;  /* a score has been so far above m that P was infinite */
};

/* With a bias, scores are in natural units: the lowest finite number times log2(e) would not be
 * finite. */
constexpr bool NATURAL_UNITS = FA_MASK >= 2;

/* P may grow to this before m is raised. Far from what fp16 can hold, and with relative errors as
 * for P <= 1. */
constexpr float SUM_LIMIT = 4096, SLACK = NATURAL_UNITS ? 5.5f : 8;

/* S = exp2(c S - m) */
static __device__ __forceinline__ void exponentials(Scores &S, float c, const float (&m)[2],
                                                    float (&sum)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] = 0;
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int x = 2 * r; x < 2 * r + 2; x++) {
                S[n][x] =
                    exp2_approx(NATURAL_UNITS ? (S[n][x] - m[r]) * LOG2E : fmaf(S[n][x], c, -m[r]));
                sum[r] += S[n][x];
            }
    }
}

static __device__ __forceinline__ float max_of_row(const Scores &S, int r) {
    float most = NEGATIVE_INFINITY;
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++)
        most = fmaxf(most, fmaxf(S[n][2 * r], S[n][2 * r + 1]));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    return fmaxf(most, __shfl_xor_sync(~0u, most, 2));
}

/* For rows that have seen no key: the largest of a row's first eight scores, if they are not all
 * hidden. */
static __device__ __forceinline__ bool guess_maximum(const Scores &S, float c, Rows &rows) {
    float most[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        most[r] = fmaxf(S[0][2 * r], S[0][2 * r + 1]);
        most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
        most[r] = c * fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 2));
        most[r] = rows.m[r] == NEGATIVE_INFINITY ? most[r] : rows.m[r];
    }
    if (__any_sync(~0u, fminf(most[0], most[1]) == NEGATIVE_INFINITY))
        return false;
    rows.m[0] = most[0];
    rows.m[1] = most[1];
    rows.unseen = false;
    return true;
}

/* Of a bias or a bool mask: what is added to a score. */
static __device__ __forceinline__ float mask_value(const fa_kernel_params &p, long long at) {
#if FA_MASK == 1
    return ((const unsigned char *)p.mask.data)[at] ? 0 : NEGATIVE_INFINITY;
#elif FA_MASK == 2
    return to_float(((const elem *)p.mask.data)[at]);
#else
    return ((const float *)p.mask.data)[at];
#endif
}

/* A score that a bool mask hides may even be NaN. */
static __device__ __forceinline__ float add_mask(float score, float value) {
    return FA_MASK == 1 ? (value == 0 ? score : value) : score + value;
}

/* The scale, the mask, and what lies outside of the window or past the last key. */
static __device__ __forceinline__ void finish_scores(const fa_kernel_params &p, Scores &S,
                                                     long long mask_start, MaskTile mask,
                                                     int warp_row, int key, bool cut) {
    const int lane = lane_anew(), i = warp_row + lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
        for (int x = 0; x < 4; x++)
            S[n][x] *= NATURAL_UNITS ? p.scale : p.scale_log2e;
    if (FA_MASK_TILES) {
        const unsigned first = mask.first(i % BLOCK_M, t);
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int next_rows = FA_MASK_TILES == 1 ? 8 * r * 128 : 0;
                float value[2];
                MaskTile::values(MaskTile::at(first, n) + next_rows, value);
                S[n][2 * r] = add_mask(S[n][2 * r], value[0]);
                S[n][2 * r + 1] = add_mask(S[n][2 * r + 1], value[1]);
            }
    } else if (FA_MASK) {
        const long long at = mask_start + i * p.mask.stride_row + (key + 2 * t) * p.mask.stride_col;
        const int rows = p.seq_q - i, cols = p.seq_k - key - 2 * t; /* from this place on */
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++) {
#pragma unroll
            for (int x = 0; x < 4; x++)
                if (x / 2 * 8 < rows && 8 * n + x % 2 < cols)
                    S[n][x] =
                        add_mask(S[n][x], mask_value(p, at + x / 2 * 8 * p.mask.stride_row +
                                                            (8 * n + x % 2) * p.mask.stride_col));
            if (WIDTH > 128 || n % 4 == 3) /* there are no registers to load more at once */
                asm volatile("" ::: "memory");
        }
    }
    if (cut)
        hide_scores(S, p, i, key + 2 * t);
}

/* Makes probabilities of S; returns whether O has to be multiplied by rows.rescale.
 *
 * Any m will do in P = exp2(S - m): it cancels when O is divided by l. The maximum is only the safe
 * choice. So m stays what it was, a maximum of earlier keys, and all P are computed with it at
 * once; their sum, which is needed anyway, tells whether they have grown too much. If they have,
 * a power of two is taken out of them; if they have become infinite, they are computed again.
 * A row that has seen no key yet takes the largest of its first few scores. The maximum is looked
 * for where all of those are hidden, where there is a mask, and where the shortcut has failed
 * badly. */
static __device__ __forceinline__ bool softmax(const fa_kernel_params &p, Scores &S, Rows &rows,
                                               const Work &work, long long mask_start, int warp_row,
                                               int key, QTile Q, KTile K, MaskTile mask) {
    const bool cut = is_cut(p, warp_row, 16, key, BLOCK_N);
    const bool shortcut = !FA_MASK && (p.scale > 0 || !(cut || rows.unseen));
    bool look = rows.wary || !shortcut, rescaled = false;
    float sum[2];
    if (!look && cut) {
        const int lane = lane_anew();
        hide_scores(S, p, warp_row + lane / 4, key + lane % 4 * 2);
    }
    if (!look && rows.unseen)
        look = !guess_maximum(S, p.scale_log2e, rows);
    if (!look) {
        exponentials(S, p.scale_log2e, rows.m, sum);
        if (__any_sync(~0u, !(sum[0] + sum[1] <= SUM_LIMIT))) { /* a NaN comes here, too */
            if (__any_sync(~0u, !(sum[0] + sum[1] < POSITIVE_INFINITY))) {
                recompute_scores(S, Q, K, (warp_row - work.row) % 64);
                look = rows.wary = true;
            } else {
                rescaled = true;
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int exponent = (__float_as_int(max_of_row(S, r)) >> 23) - 127;
                    const int shift = max(0, min(exponent, 126));
                    rows.rescale[r] = __int_as_float((127 - shift) << 23);
                    rows.m[r] += shift;
                    rows.l[r] *= rows.rescale[r];
                    sum[r] *= rows.rescale[r];
#pragma unroll
                    for (int n = 0; n < KEY_TILES; n++) {
                        S[n][2 * r] *= rows.rescale[r];
                        S[n][2 * r + 1] *= rows.rescale[r];
                    }
                }
            }
        }
    }
    if (look) {
        finish_scores(p, S, mask_start, mask, warp_row, key, cut);
        const float most[2] = {max_of_row(S, 0), max_of_row(S, 1)};
        rescaled = __any_sync(~0u, most[0] > rows.m[0] + SLACK || most[1] > rows.m[1] + SLACK);
        float origin[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float m = rescaled ? fmaxf(rows.m[r], most[r]) : rows.m[r];
            origin[r] = m == NEGATIVE_INFINITY ? 0 : m;
            rows.rescale[r] = exp2_approx((rows.m[r] - origin[r]) * (NATURAL_UNITS ? LOG2E : 1));
            if (rescaled)
                rows.l[r] *= rows.rescale[r];
            rows.m[r] = m;
        }
        rows.unseen = __any_sync(~0u, fminf(rows.m[0], rows.m[1]) == NEGATIVE_INFINITY);
        exponentials(S, 1, origin, sum);
    }
    rows.l[0] += sum[0];
    rows.l[1] += sum[1];
    return rescaled;
}

static __device__ __forceinline__ void drop(const fa_kernel_params &p, const Dropout &dropout,
                                            Scores &P, int warp_row, int key) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < KEY_TILES; n += 2) {
        unsigned word[4];
        dropout.draw(word, warp_row, key + 8 * n, g, t);
#pragma unroll
        for (int x = 0; x < 8; x++)
            if (!dropout.keeps(word, x % 4 / 2 * 4 + x / 4 * 2 + x % 2))
                P[n + x / 4][x % 4] = 0;
    }
}

static __device__ __forceinline__ void round_probabilities(Probabilities &P, const Scores &S) {
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++) {
        P[n / 2][n % 2 * 2] = pack(S[n][0], S[n][1]);
        P[n / 2][n % 2 * 2 + 1] = pack(S[n][2], S[n][3]);
    }
}

static __device__ __forceinline__ void rescale_output(Output &O, const float (&rescale)[2]) {
#pragma unroll
    for (int n = 0; n < OUT_TILES; n++)
#pragma unroll
        for (int x = 0; x < 4; x++)
            O[n][x] *= rescale[x / 2];
}

/* The lse of a thread's rows, and in f what their O has to be multiplied by. */
static __device__ __forceinline__ void finish_rows(const fa_kernel_params &p, const Rows &rows,
                                                   int head, int warp_row, float (&f)[2]) {
    const int lane = lane_anew();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float sum = rows.l[r];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        f[r] = sum == 0 ? 0 : (FA_DROPOUT ? p.dropout_scale : 1) / sum;
        const int i = warp_row + lane / 4 + 8 * r;
        if (lane % 4 == 0 && i < p.seq_q)
            p.lse[(long long)head * p.seq_q + i] =
                rows.m[r] * (NATURAL_UNITS ? 1 : LN2) + logf(sum);
    }
}

/* O times f to global memory, through the warp's place for it, so that whole lines leave: a store
 * takes the load unit a cycle for each line that it touches. */
static __device__ __forceinline__ void write_lines(const fa_kernel_params &p, const Output &O,
                                                   const float (&f)[2], const Work &work,
                                                   int warp_row, OTile place) {
    const int lane = lane_anew(), row = lane / 8, col = lane % 8 * 8;
    elem *out = (elem *)p.out.data + work.b(p) * p.out.stride_batch +
                work.h(p) * p.out.stride_head + (warp_row + row) * p.out.stride_row + col;
#pragma unroll
    for (int n = 0; n < OUT_TILES; n += 2)
        stmatrix_x4(place.chunk(lane % 16, 8 * n + lane / 16 * 8),
                    pack(O[n][0] * f[0], O[n][1] * f[0]), pack(O[n][2] * f[1], O[n][3] * f[1]),
                    pack(O[n + 1][0] * f[0], O[n + 1][1] * f[0]),
                    pack(O[n + 1][2] * f[1], O[n + 1][3] * f[1]));
    __syncwarp();
#pragma unroll
    for (int n = 0; n < OUT_TILES; n += 8)
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
            unsigned eight[4];
            load_shared_4(eight, place.chunk(row + i, 8 * n + col));
            const int cols = warp_row + row + i < p.seq_q ? HEAD_DIM_V - 8 * n - col : 0;
            elem *to = out + i * p.out.stride_row + 8 * n;
            if (cols >= 8)
                store_global_4(to, eight);
            else if (HEAD_DIM_V % 8)
#pragma unroll
                for (int x = 0; x < HEAD_DIM_V % 8; x++)
                    if (x < cols)
                        to[x] = (elem)(eight[x / 2] >> x % 2 * 16);
        }
}

/* Likewise, if there is no such place. Of every 16 columns a thread has two and two, eight apart;
 * after an exchange with its neighbour it has four in a row. */
static __device__ __forceinline__ void write_output(const fa_kernel_params &p, const Output &O,
                                                    const float (&f)[2], const Work &work,
                                                    int warp_row) {
    const int lane = lane_anew(), t = lane % 4, row = warp_row + lane / 4;
    const int col = t % 2 * 8 + t / 2 * 4;
    elem *out = (elem *)p.out.data + work.b(p) * p.out.stride_batch +
                work.h(p) * p.out.stride_head + row * p.out.stride_row + col;
#pragma unroll
    for (int n = 0; n < OUT_TILES; n += 2)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const unsigned low = pack(O[n][2 * r] * f[r], O[n][2 * r + 1] * f[r]);
            const unsigned high = pack(O[n + 1][2 * r] * f[r], O[n + 1][2 * r + 1] * f[r]);
            const unsigned other = __shfl_xor_sync(~0u, t % 2 ? low : high, 1);
            if (row + 8 * r < p.seq_q && 8 * n + col < HEAD_DIM_V)
                *(uint2 *)(out + 8 * r * p.out.stride_row + 8 * n) =
                    t % 2 ? make_uint2(other, high) : make_uint2(low, other);
        }
}

static __device__ __forceinline__ void begin_turn(int w) {
    if (PING_PONG)
        barrier_sync(TURN + w, 256);
}
static __device__ __forceinline__ void end_turn(int w) {
    if (PING_PONG)
        barrier_arrive(TURN + (w == CONSUMERS - 1 ? 0 : w + 1), 256);
}

/* Warpgroup w of those that compute. All of them go past all tiles of a piece of work and take a
 * turn for each, so that turns and buffers stay in step, but a tile that its own queries do not see
 * is passed by. */
static __device__ __forceinline__ void compute(const fa_kernel_params &p, Shared &shared, int w) {
    const int warp_in_group = uniform(threadIdx.x / 32) % 4;
    const auto K = [&](unsigned n) { return KTile{shared_address(shared.K[n % STAGES])}; };
    const auto V = [&](unsigned n) { return VTile{shared_address(shared.V[n % STAGES])}; };
    const auto mask = [&](unsigned n) { return MaskTile{shared_address(shared.mask[n % STAGES])}; };
    unsigned n = 0; /* tiles so far */
    /* The tile after this one, once K is there. */
    const auto after = [&](int tile) {
        return FA_MASK == 1 ? uniform(shared.next_tile[n % STAGES]) : tile - 1;
    };
    const auto pass_by = [&](int &tile) {
        begin_turn(w);
        end_turn(w);
        wait_full(shared.K_full, n);
        tile = after(tile);
        release(&shared.K_empty[n % STAGES]);
        wait_full(shared.V_full, n);
        release(&shared.V_empty[n % STAGES]);
        n++;
    };
    if (w == 0)
        end_turn(CONSUMERS - 1);

    Work work;
    for (unsigned pieces = 0; read_post(shared.posts, pieces, true, work); pieces++) {
        const int row = work.row + 64 * w, warp_row = row + 16 * warp_in_group;
        Range own = work.tiles;
        if (row >= p.seq_q)
            own.end = own.begin;
        else if (FA_WINDOW)
            own = visible_tiles(p, row, 64);
        const QTile Q{shared_address(shared.Q[w])};
        const Dropout dropout(p, work.b(p), work.h(p));
        const long long mask_start = mask_row(p.mask, work.b(p), work.h(p), 0);

        Scores S;
        Probabilities P;
        Output O;
        Rows rows;
        set_to_zero(O);

        int tile = work.tiles.end - 1;
        while (tile >= own.end)
            pass_by(tile);
        wait_full(shared.Q_full[w], pieces);
        if (tile >= own.begin) {
            wait_full(shared.K_full, n);
            int next = after(tile);
            begin_turn(w);
            multiply_scores(S, Q, K(n));
            end_turn(w);
            wgmma_wait<0>();
            pin(S);
            softmax(p, S, rows, work, mask_start, warp_row, tile * BLOCK_N, Q, K(n), mask(n));
            release(&shared.K_empty[n % STAGES]);
            if (FA_DROPOUT)
                drop(p, dropout, S, warp_row, tile * BLOCK_N);
            round_probabilities(P, S);
            n++;

            for (tile = next; tile >= own.begin; tile = next, n++) {
                wait_full(shared.K_full, n);
                next = after(tile);
                begin_turn(w);
                multiply_scores(S, Q, K(n));
                wait_full(shared.V_full, n - 1);
                multiply_values(O, P, V(n - 1));
                end_turn(w);

                wgmma_wait<1>(); /* S */
                pin(S);
                const bool rescaled = softmax(p, S, rows, work, mask_start, warp_row,
                                              tile * BLOCK_N, Q, K(n), mask(n));
                release(&shared.K_empty[n % STAGES]);
                if (FA_DROPOUT)
                    drop(p, dropout, S, warp_row, tile * BLOCK_N);

                wgmma_wait<0>(); /* O */
                pin(O);
                pin(S);
                release(&shared.V_empty[(n - 1) % STAGES]);
                if (rescaled)
                    rescale_output(O, rows.rescale);
                round_probabilities(P, S);
            }
            wait_full(shared.V_full, n - 1);
            multiply_values(O, P, V(n - 1));
            release(shared.Q_empty[w]);
            wgmma_wait<0>();
            pin(O);
            release(&shared.V_empty[(n - 1) % STAGES]);
        } else
            release(shared.Q_empty[w]);
        float f[2];
        finish_rows(p, rows, work.head, warp_row, f);
        if (O_PLACE)
            write_lines(p, O, f, work, warp_row,
                        {Q.address + QTile::BYTES + warp_in_group * OTile::BYTES});
        else
            write_output(p, O, f, work, warp_row);
        while (FA_WINDOW && tile >= work.tiles.begin)
            pass_by(tile);
    }
    if (w == 0) /* takes the turn that nobody wants */
        begin_turn(w);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    fa_forward_sm90(const __grid_constant__ fa_kernel_params p, const __grid_constant__ Maps maps) {
    Shared &shared = *(Shared *)shared_memory;
    const int warp = uniform(threadIdx.x / 32);
    if (threadIdx.x == 32) {
        tma_prefetch_map(&maps.q);
        tma_prefetch_map(&maps.k);
        tma_prefetch_map(&maps.v);
    }
    if (threadIdx.x == 0) {
        for (int w = 0; w < CONSUMERS; w++) {
            mbarrier_init(shared.Q_full[w], 1);
            mbarrier_init(shared.Q_empty[w], 4);
        }
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(&shared.K_full[i], FA_MASK_TILES ? 2 : 1);
            mbarrier_init(&shared.V_full[i], 1);
            mbarrier_init(&shared.K_empty[i], 4 * CONSUMERS); /* by each warp */
            mbarrier_init(&shared.V_empty[i], 4 * CONSUMERS);
        }
        for (int i = 0; i < POSTS; i++) {
            mbarrier_init(&shared.posts.full[i], 1);
            mbarrier_init(&shared.posts.empty[i], READERS);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    if (warp < 4) {
        if (CONSUMERS > 1)
            registers_decrease<PRODUCER_REGISTERS>();
        if (threadIdx.x % 32 != 0)
            return;
        if (warp == 0)
            bring_Q(p, &maps.q, shared);
        else if (warp == 1)
            bring_tiles<KTile>(p, p.k, &maps.k, shared.K, shared.K_full, shared.K_empty,
                               shared.posts,
                               [&](const Work &work, int key, int stage, int next_tile) {
                                   if (FA_MASK == 1)
                                       shared.next_tile[stage] = next_tile;
                                   if (FA_MASK_TILES)
                                       MaskTile{shared_address(shared.mask[stage])}.load(
                                           &maps.mask, &shared.K_full[stage], work.row, key,
                                           p.mask.stride_head ? work.h(p) : 0,
                                           p.mask.stride_batch ? work.b(p) : 0);
                               });
        else if (warp == 2)
            bring_tiles<VTile>(p, p.v, &maps.v, shared.V, shared.V_full, shared.V_empty,
                               shared.posts, [](const Work &, int, int, int) {});
    } else {
        if (CONSUMERS > 1)
            registers_increase<CONSUMER_REGISTERS>();
        compute(p, shared, warp / 4 - 1);
    }
}
