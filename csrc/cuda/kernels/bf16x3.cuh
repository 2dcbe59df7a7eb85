/* Floats as sums of three numbers of bf16, large to small, whose 3 x 8 bits are all that a float
 * has. Of the nine products of two such sums the six largest count: what is left out is below 2^-25
 * of the whole, less than a float can tell. For that wgmma takes as long as for three products in
 * TF32, of which it does half as many at a time; but an element needs 6 bytes of shared memory, not
 * 8, and may lie there with its rows or with its columns side by side, as V does.
 *
 * Compiled with: HEAD_DIM, HEAD_DIM_V, FA_ALIGNED. */
#pragma once

#include "panels.cuh"
#include "ptx/warpgroup.cuh"

constexpr int BF16_PARTS = 3, BF16_PRODUCTS = 6;

/* Which parts a product multiplies. Small products come first: a tensor core rounds sums toward
 * zero, which costs least while they are small. */
static __device__ __forceinline__ void parts_of_product(int product, int &a, int &b) {
    constexpr int PARTS_OF[BF16_PRODUCTS][2] = {{0, 2}, {2, 0}, {1, 1}, {0, 1}, {1, 0}, {0, 0}};
    a = PARTS_OF[product][0];
    b = PARTS_OF[product][1];
}

/* The parts of two floats, side by side. */
static __device__ __forceinline__ void split(unsigned (&part)[BF16_PARTS], float x, float y) {
#pragma unroll
    for (int i = 0; i < BF16_PARTS; i++) {
        part[i] = pack(x, y);
        x -= __uint_as_float(part[i] << 16);
        y -= __uint_as_float(part[i] & 0xffff0000);
    }
}

/* The parts of 64 x 64 floats in shared memory, a plane each. */
struct SplitPanel {
    using Plane = Panels<64, 64>;
    static constexpr int BYTES = BF16_PARTS * Plane::BYTES;

    unsigned address; /* a multiple of 1024 */

    /* Keeps the compiler from computing all operands of products ahead, for which there are not
     * enough uniform registers. */
    __device__ __forceinline__ SplitPanel anew() const { return {(unsigned)uniform(address)}; }

    /* The i-th of several, one after the other. */
    __device__ __forceinline__ SplitPanel after(int i) const { return {address + i * BYTES}; }

    /* Operands of a wgmma: of a part, sums run over 16 columns, of this panel or of those after
     * it, or over 16 rows. */
    __device__ __forceinline__ unsigned long long sum_over_cols(int part, int col) const {
        return operand(0, part * Plane::BYTES + col / 64 * BYTES + col % 64 * 2);
    }
    __device__ __forceinline__ unsigned long long sum_over_rows(int part, int row) const {
        return operand(Plane::BYTES, part * Plane::BYTES + row * 128);
    }

    /* Bytes are added to the lower half alone, which takes one instruction, not three. */
    __device__ __forceinline__ unsigned long long operand(int panel_bytes, int bytes) const {
        const unsigned long long first = wgmma_operand(address, panel_bytes);
        return first >> 32 << 32 | ((unsigned)first + bytes / 16);
    }

    /* Of a part, the 16 bytes with columns col .. col + 7 of a row. */
    __device__ __forceinline__ unsigned chunk(int part, int row, int col) const {
        return Plane{address}.chunk(row, col) + part * Plane::BYTES;
    }

    /* What one of 128 threads has as the i-th of its PanelSource. */
    __device__ __forceinline__ void put(int i, const float4 &x) const {
        const int row = threadIdx.x % 128 / 16 + 8 * i, col = threadIdx.x % 16 * 4;
        unsigned left[BF16_PARTS], right[BF16_PARTS];
        split(left, x.x, x.y);
        split(right, x.z, x.w);
        const unsigned at = chunk(0, row, col) + col % 8 * 2;
#pragma unroll
        for (int i = 0; i < BF16_PARTS; i++)
            store_shared_2(at + i * Plane::BYTES, left[i], right[i]);
    }
};

/* What one of the 128 threads that fill a SplitPanel fetches for it: four columns of every eighth
 * row, zeros where the tensor has ended. */
struct PanelSource {
    static constexpr int COUNT = 8; /* of float4 */

    const float *from;
    long long step; /* from one to the next, in elements */
    int rows, cols; /* that there are from the first one on */

    /* Rows that begin at `data`, of which columns 64 panel and on are wanted. */
    __device__ __forceinline__ PanelSource(const float *data, long long stride, int all_rows,
                                           int all_cols, int panel) {
        const int row = threadIdx.x % 128 / 16, col = 64 * panel + threadIdx.x % 16 * 4;
        from = data + row * stride + col;
        step = 8 * stride;
        rows = all_rows - row;
        cols = all_cols - col;
    }

    /* The next float4. */
    __device__ __forceinline__ float4 fetch() {
        constexpr bool WHOLE = FA_ALIGNED && HEAD_DIM % 4 == 0 && HEAD_DIM_V % 4 == 0;
        float4 x = make_float4(0, 0, 0, 0);
        if (rows > 0) {
            if (WHOLE) {
                if (cols > 0)
                    x = *(const float4 *)from;
            } else {
                x.x = cols > 0 ? from[0] : 0;
                x.y = cols > 1 ? from[1] : 0;
                x.z = cols > 2 ? from[2] : 0;
                x.w = cols > 3 ? from[3] : 0;
            }
        }
        from += step;
        rows -= 8;
        return x;
    }
};

/* Panels of the columns of 64 rows, by the 128 threads of a warpgroup. */
template <int COLS>
static __device__ __forceinline__ void split_rows(SplitPanel to, const float *data,
                                                  long long stride, int rows) {
#pragma unroll
    for (int panel = 0; panel < (COLS + 63) / 64; panel++) {
        PanelSource source(data, stride, rows, COLS, panel);
        float4 x[PanelSource::COUNT];
#pragma unroll
        for (int i = 0; i < PanelSource::COUNT; i++)
            x[i] = source.fetch();
#pragma unroll
        for (int i = 0; i < PanelSource::COUNT; i++)
            to.after(panel).put(i, x[i]);
    }
    fence_proxy_async();
}

/* The parts of an operand A, of 16 columns a step. */
template <int STEPS> using SplitOperand = unsigned[BF16_PARTS][STEPS][4];

/* C = A B^T, summed over columns, of which there are COLS; A and B are the first panels. */
template <int COLS, int TILES>
static __device__ __forceinline__ void multiply_split_cols(float (&C)[TILES][4], SplitPanel A,
                                                           SplitPanel B) {
    wgmma_fence();
#pragma unroll
    for (int product = 0; product < BF16_PRODUCTS; product++) {
        int of_a, of_b;
        parts_of_product(product, of_a, of_b);
        A = A.anew();
        B = B.anew();
#pragma unroll
        for (int col = 0; col < COLS; col += 16) {
            const auto a = A.sum_over_cols(of_a, col), b = B.sum_over_cols(of_b, col);
            if (product == 0 && col == 0)
                Wgmma<8 * TILES>::template multiply_over<>(C, a, b);
            else
                Wgmma<8 * TILES>::multiply_add(C, a, b);
        }
    }
    wgmma_commit();
}

/* C = A B, summed over the rows of B, the first columns of a panel. */
template <int STEPS, int TILES>
static __device__ __forceinline__ void
multiply_split_rows(float (&C)[TILES][4], const SplitOperand<STEPS> &A, SplitPanel B) {
    B = B.anew();
    wgmma_fence();
#pragma unroll
    for (int product = 0; product < BF16_PRODUCTS; product++) {
        int of_a, of_b;
        parts_of_product(product, of_a, of_b);
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            const auto b = B.sum_over_rows(of_b, 16 * step);
            if (product == 0 && step == 0)
                Wgmma<8 * TILES>::multiply_over(C, A[of_a][step], b);
            else
                Wgmma<8 * TILES>::multiply_add(C, A[of_a][step], b);
        }
    }
    wgmma_commit();
}

/* sum += C, of the columns from that of tile `first` on. */
template <int ALL, int TILES>
static __device__ __forceinline__ void add_to_sum(float (&sum)[ALL][4], int first,
                                                  const float (&C)[TILES][4]) {
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int x = 0; x < 4; x++)
            sum[first + n][x] += C[n][x];
}

/* Row g + 8r of the warp, times f, to a row of a tensor of COLS columns. */
template <int COLS, int TILES>
static __device__ __forceinline__ void store_row(float *to, const float (&C)[TILES][4], int r,
                                                 float f) {
    const int t = thread_index() % 4;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        const int col = 8 * n + 2 * t;
        const float first = C[n][2 * r] * f, second = C[n][2 * r + 1] * f;
        if (FA_ALIGNED && (COLS % 8 == 0 || col + 1 < COLS)) {
            if (col < COLS)
                *(float2 *)(to + col) = make_float2(first, second);
        } else {
            if (col < COLS)
                to[col] = first;
            if (col + 1 < COLS)
                to[col + 1] = second;
        }
    }
}
