/* The FlashAttention forward of float32 for sm_90a, with wgmma.
 *
 * wgmma has no product of floats: each operand is split into three parts, of which six products are
 * taken (bf16x3.cuh). A block owns 128 queries of one head. Its first warpgroup fetches K and V and
 * splits them, once for all the block; each of the other two owns 64 queries, whose parts stay in
 * shared memory.
 *
 * Tensor cores round sums toward zero, which would add up over a long sequence: so P V of a tile of
 * keys is a sum of its own, which the threads add to O.
 *
 * Compiled with: HEAD_DIM, HEAD_DIM_V (both at most 128), BLOCK_M, BLOCK_N, STAGES (of K and V),
 * FA_ALIGNED, FA_MASK (0 none, 1 bool, 3 float), FA_WINDOW, FA_DROPOUT. */
#include "accumulators.cuh"
#include "bf16x3.cuh"
#include "block_order.cuh"
#include "finish_scores.cuh"
#include "ptx/warpgroup.cuh"
#include "ring.cuh"
#include "softmax.cuh"
#include "tile.cuh"

constexpr int CONSUMERS = 2; /* warpgroups that compute */
constexpr int DEPTH = (HEAD_DIM + 15) / 16 * 16, WIDTH = (HEAD_DIM_V + 15) / 16 * 16;
constexpr int KEY_PANELS = (DEPTH + 63) / 64, VALUE_PANELS = (WIDTH + 63) / 64;
constexpr int KEY_TILES = BLOCK_N / 8, KEY_STEPS = BLOCK_N / 16;
constexpr int OUT_TILES = WIDTH / 8, FIRST_TILES = OUT_TILES < 8 ? OUT_TILES : 8;
constexpr int SECOND_TILES = VALUE_PANELS == 2 ? OUT_TILES - 8 : FIRST_TILES;
static_assert(BLOCK_M == 64 * CONSUMERS && THREADS == 128 * (CONSUMERS + 1) && BLOCK_N == 64,
              "a warpgroup that splits, and one for each 64 queries");
static_assert(KEY_PANELS <= 2 && VALUE_PANELS <= 2, "what registers and shared memory hold");

/* Registers of a thread that splits and of one that computes. The latter holds WIDTH / 2 of O, 32
 * of S, 32 of P, then 48 of its parts, and 32 of P V: 176 for a head size of 128. */
constexpr int PRODUCER_REGISTERS = 72, CONSUMER_REGISTERS = 216;

/* Whether S of the next tile is computed while P is still needed for V's second panel. */
constexpr bool SCORES_AHEAD = VALUE_PANELS == 1 || !(FA_MASK || FA_DROPOUT);

/* All of shared memory. */
struct Shared {
    unsigned char Q[CONSUMERS][KEY_PANELS][SplitPanel::BYTES];
    unsigned char K[STAGES][KEY_PANELS][SplitPanel::BYTES];
    unsigned char V[STAGES][VALUE_PANELS][SplitPanel::BYTES];
    mbarrier full[3][STAGES], empty[3][STAGES]; /* of each ring */
};

/* Buffers that are used by turns: of K, of V's first panel and of its second. */
enum Which { KEYS, VALUES };
struct Ring {
    unsigned full, empty; /* addresses of barriers */

    __device__ __forceinline__ Ring(Shared &shared, int which)
        : full(shared_address(shared.full) + which * STAGES * 8),
          empty(full + sizeof(shared.full)) {}
    __device__ __forceinline__ mbarrier_ref full_of(int tile) const {
        return mbarrier_ref(full + tile % STAGES * 8);
    }
    __device__ __forceinline__ mbarrier_ref empty_of(int tile) const {
        return mbarrier_ref(empty + tile % STAGES * 8);
    }
    /* For the tile to be there, and for the buffer of a tile to be free. */
    __device__ __forceinline__ void wait_full(int tile) const {
        mbarrier_wait(full_of(tile), tile / STAGES % 2);
    }
    __device__ __forceinline__ void wait_empty(int tile) const {
        mbarrier_wait(empty_of(tile), tile / STAGES % 2 ^ 1);
    }
};
extern __shared__ __align__(1024) unsigned char shared_memory[];

/* What a block works on. Worked out wherever it is wanted: there are no registers to keep it in. */
struct Work {
    int row, h, b; /* row: the first query */

    __device__ __forceinline__ Work(const fa_kernel_params &p) {
        const OrderedBlock block = ordered_block(p, p.heads_q, blockIdx.x);
        /* Under a causal mask the last queries have the most keys. */
        row = (p.blocks - 1 - block.index) * BLOCK_M;
        h = block.head % p.heads_q;
        b = block.head / p.heads_q;
    }
};

/* Tiles of keys, numbered in the order in which they pass by: the last keys first, since under a
 * causal mask the nearest keys mostly have the largest scores. */
struct Tiles {
    int end;   /* of keys that some query sees */
    int count; /* of tiles */

    /* Those that some of the queries row .. row + rows - 1 see. */
    __device__ __forceinline__ Tiles(const fa_kernel_params &p, int row, int rows) {
        int begin = 0;
        end = p.seq_k;
        if (FA_WINDOW) {
            begin = max(0, row + p.window_begin) / BLOCK_N * BLOCK_N;
            end = max(0, min(end, min(row + rows, p.seq_q) - 1 + p.window_end));
        }
        if (row >= p.seq_q)
            end = begin;
        end = (end + BLOCK_N - 1) / BLOCK_N * BLOCK_N;
        count = max(0, end - begin) / BLOCK_N;
    }
    __device__ __forceinline__ int key(int tile) const { return end - (tile + 1) * BLOCK_N; }
};

/* --- the warpgroup that splits --- */

/* The n-th panel to be split, in the order of the products: K of the first tile; then, for each
 * tile, the first panel of its V, K of the next tile, and the second panel of its V. */
struct Place {
    bool is_key;
    int tile, panel;

    static constexpr int TILE = KEY_PANELS + VALUE_PANELS; /* panels of a tile */

    __device__ __forceinline__ Place(int n, int tiles) {
        is_key = n < KEY_PANELS;
        tile = is_key ? 0 : (n - KEY_PANELS) / TILE;
        panel = is_key ? n : (n - KEY_PANELS) % TILE;
        if (is_key || panel == 0)
            return;
        if (tile + 1 == tiles) {
            panel = 1;
        } else if (panel <= KEY_PANELS) {
            is_key = true;
            tile++;
            panel--;
        } else
            panel -= KEY_PANELS;
    }
    __device__ __forceinline__ PanelSource source(const fa_kernel_params &p, const Tiles &tiles,
                                                  int b, int hk) const {
        const fa_kernel_tensor &tensor = is_key ? p.k : p.v;
        const int key = tiles.key(tile);
        return PanelSource(row_of(tensor, b, hk, key), tensor.stride_row, p.seq_k - key,
                           is_key ? HEAD_DIM : HEAD_DIM_V, panel);
    }
};

/* While a panel is split, the next one is on its way to the same registers. */
static __device__ __forceinline__ void bring_panels(const fa_kernel_params &p, Shared &shared) {
    const Work work(p);
    const Tiles tiles(p, work.row, BLOCK_M);
    const int b = work.b, hk = work.h / (p.heads_q / p.heads_k);
    const int count = tiles.count * Place::TILE;
    float4 x[PanelSource::COUNT];
    if (count > 0) {
        PanelSource first = Place(0, tiles.count).source(p, tiles, b, hk);
#pragma unroll
        for (int i = 0; i < PanelSource::COUNT; i++)
            x[i] = first.fetch();
    }
    for (int n = 0; n < count; n++) {
        const Place place(n, tiles.count);
        PanelSource next = Place(min(n + 1, count - 1), tiles.count).source(p, tiles, b, hk);
        const int stage = place.tile % STAGES;
        const Ring ring(shared, place.is_key ? KEYS : VALUES + place.panel);
        const SplitPanel panel{place.is_key ? shared_address(shared.K[stage][place.panel])
                                            : shared_address(shared.V[stage][place.panel])};
        ring.wait_empty(place.tile);
#pragma unroll
        for (int i = 0; i < PanelSource::COUNT; i++) {
            panel.put(i, x[i]);
            x[i] = next.fetch();
        }
        fence_proxy_async();
        release(ring.full_of(place.tile));
    }
}

/* --- a warpgroup that computes --- */

using Scores = float[KEY_TILES][4];
using Probabilities = unsigned[KEY_STEPS][WORDS]; /* floats, see put_pair */
using Output = float[OUT_TILES][4];

/* What is kept is divided by 1 - dropout_p at the end, in O. */
static __device__ __forceinline__ void drop(Probabilities &P, const Dropout &dropout, int row,
                                            int key) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < KEY_STEPS; step++) {
        unsigned word[4];
        dropout.draw(word, row, key + 16 * step, lane / 4, lane % 4);
#pragma unroll
        for (int x = 0; x < 4; x++)
            drop_pair(P, 2 * step + x % 2, x / 2, dropout.kept(word[x]));
    }
}

static __device__ __forceinline__ void split_probabilities(SplitOperand<KEY_STEPS> &parts,
                                                           const Probabilities &P) {
#pragma unroll
    for (int step = 0; step < KEY_STEPS; step++)
#pragma unroll
        for (int x = 0; x < 4; x++) { /* put_pair puts neighbours two apart */
            const int first = x / 2 * 4 + x % 2;
            unsigned part[BF16_PARTS];
            split(part, __uint_as_float(P[step][first]), __uint_as_float(P[step][first + 2]));
#pragma unroll
            for (int i = 0; i < BF16_PARTS; i++)
                parts[i][step][x] = part[i];
        }
}

/* Of the 16 queries of this warp among those of the block. */
static __device__ __forceinline__ int first_row_of_warp() {
    return uniform(thread_index() / 32) * 16 - 64;
}

/* O / l and the lse. */
static __device__ __forceinline__ void finish_output(const fa_kernel_params &p, const Output &O,
                                                     const Softmax &softmax) {
    const Work work(p);
    const int first_row = work.row + first_row_of_warp();
    const int lane = thread_index() % 32, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float sum = softmax.l[r];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        const float f = sum == 0 ? 0 : (FA_DROPOUT ? p.dropout_scale : 1) / sum;
        const int i = first_row + lane / 4 + 8 * r;
        if (i >= p.seq_q)
            continue;
        if (t == 0)
            p.lse[((long long)work.b * p.heads_q + work.h) * p.seq_q + i] =
                softmax.m[r] * LN2 + logf(sum);
        store_row<HEAD_DIM_V>(row_of(p.out, work.b, work.h, i), O, r, f);
    }
}

/* Warpgroup w of those that compute. It goes past all tiles of the block; those that its own
 * queries do not see it only releases. */
static __device__ __forceinline__ void compute(const fa_kernel_params &p, Shared &shared, int w) {
    const Work work(p);
    const Tiles tiles(p, work.row, BLOCK_M);
    const int b = work.b, h = work.h;
    const int row = work.row + 64 * w;
    const SplitPanel Q{shared_address(shared.Q) + w * KEY_PANELS * SplitPanel::BYTES};
    const SplitPanel K{shared_address(shared.K)}, V{shared_address(shared.V)};
    const Ring keys(shared, KEYS), values(shared, VALUES), more_values(shared, VALUES + 1);
    const auto pass_by = [&](const Ring &ring, int tile) {
        ring.wait_full(tile);
        release(ring.empty_of(tile));
    };
    const auto pass_tile_by = [&](int tile) {
        pass_by(keys, tile);
        pass_by(values, tile);
        if (VALUE_PANELS == 2)
            pass_by(more_values, tile);
    };

    split_rows<HEAD_DIM>(Q, row_of(p.q, b, h, row), p.q.stride_row, p.seq_q - row);
    barrier_sync(1 + w, 128); /* of the warpgroup: its Q is there */

    Softmax softmax;
    Scores S;
    SplitOperand<KEY_STEPS> P;
    Output O;
    set_to_zero(O);

    const auto start_scores = [&](int tile) {
        keys.wait_full(tile);
        multiply_split_cols<DEPTH>(S, Q, K.after(tile % STAGES * KEY_PANELS));
    };
    const auto finish_scores_of = [&](int tile) {
        wgmma_wait<0>();
        pin(S);
        release(keys.empty_of(tile));
        const int key = tiles.key(tile);
        const int warp_row = work.row + first_row_of_warp();
        const bool cut = is_cut(p, warp_row, 16, key, BLOCK_N);
        Probabilities whole;
        const float c = finish_scores(S, p, b, h, warp_row, key, cut);
        softmax(whole, S, c, O);
        if (FA_DROPOUT)
            drop(whole, Dropout(p, b, h), warp_row, key);
        split_probabilities(P, whole);
    };
    /* O += P V of a tile, of V's first panel and of its second. */
    float X[FIRST_TILES][4];
    set_to_zero(X);
    auto &Y = reinterpret_cast<float (&)[SECOND_TILES][4]>(X);
    const auto start_first = [&](int tile) {
        values.wait_full(tile);
        multiply_split_rows(X, P, V.after(tile % STAGES * VALUE_PANELS));
    };
    const auto finish_first = [&](int tile) {
        pin(X);
        release(values.empty_of(tile));
        add_to_sum(O, 0, X);
    };
    const auto start_second = [&](int tile) {
        more_values.wait_full(tile);
        multiply_split_rows(Y, P, V.after(tile % STAGES * VALUE_PANELS + 1));
    };
    const auto finish_second = [&](int tile) {
        wgmma_wait<0>();
        pin(Y);
        release(more_values.empty_of(tile));
        add_to_sum(O, FIRST_TILES, Y);
    };

    const Tiles own(p, row, 64);
    const int begin = own.count > 0 ? (tiles.end - own.end) / BLOCK_N : tiles.count;
    int tile = 0;
    for (; tile < begin; tile++)
        pass_tile_by(tile);
    if (own.count > 0) {
        start_scores(tile);
        finish_scores_of(tile);
        for (tile++; tile < begin + own.count; tile++) {
            start_first(tile - 1);
            if (SCORES_AHEAD)
                start_scores(tile);
            wgmma_wait<SCORES_AHEAD>();
            finish_first(tile - 1);
            if (VALUE_PANELS == 2) {
                start_second(tile - 1);
                finish_second(tile - 1);
            }
            if (!SCORES_AHEAD)
                start_scores(tile);
            finish_scores_of(tile);
        }
        start_first(tile - 1);
        wgmma_wait<0>();
        finish_first(tile - 1);
        if (VALUE_PANELS == 2) {
            start_second(tile - 1);
            finish_second(tile - 1);
        }
    }
    if (FA_WINDOW) /* counted anew: there is no register to keep the count in */
        for (const int end = Tiles(p, Work(p).row, BLOCK_M).count; tile < end; tile++)
            pass_tile_by(tile);
    finish_output(p, O, softmax);
}

/* A block stays alone on its multiprocessor. */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    fa_forward_f32_sm90(const __grid_constant__ fa_kernel_params p) {
    Shared &shared = *(Shared *)shared_memory;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++)
            for (int which = 0; which < 3; which++) { /* by each warp */
                mbarrier_init(&shared.full[which][i], which == KEYS ? 4 * KEY_PANELS : 4);
                mbarrier_init(&shared.empty[which][i], 4 * CONSUMERS);
            }
        mbarrier_init_fence();
    }
    __syncthreads();

    const int warpgroup = uniform(threadIdx.x / 128);
    if (warpgroup == 0) {
        registers_decrease<PRODUCER_REGISTERS>();
        bring_panels(p, shared);
    } else {
        registers_increase<CONSUMER_REGISTERS>();
        compute(p, shared, warpgroup - 1);
    }
}
