/* Operands of the tensor cores: 16-bit elements as they are; floats as TF32, rounded, or, unless
 * FA_TF32, as the sum of two numbers of TF32, which has the accuracy of float (3xTF32). */
#pragma once

#include "elem.cuh"
#include "ptx/copy.cuh"
#include "ptx/mma.cuh"

constexpr int MMA_DEPTH = 32 / sizeof(elem);             /* columns of A, rows of B */
constexpr int PARTS = FA_DTYPE_FP32 && !FA_TF32 ? 2 : 1; /* of an operand, large to small */

struct Operand {
    unsigned part[PARTS][4]; /* one A, or two B side by side */

    __device__ __forceinline__ Operand() {}
    __device__ __forceinline__ explicit Operand(const unsigned (&r)[4]) {
#pragma unroll
        for (int x = 0; x < 4; x++) {
#if FA_DTYPE_FP32
            part[0][x] = round_to_tf32(__uint_as_float(r[x]));
            if (PARTS > 1)
                part[PARTS - 1][x] =
                    round_to_tf32(__uint_as_float(r[x]) - __uint_as_float(part[0][x]));
#else
            part[0][x] = r[x];
#endif
        }
    }
};

static __device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0,
                                                unsigned b1) {
#if FA_DTYPE_FP32
    mma_16x8x8(d, a, b0, b1);
#else
    mma_16x8x16(d, a, b0, b1);
#endif
}

/* C[w][n] and C[w][n + 1] += A[w] B. */
template <int COUNT, int TILES>
static __device__ __forceinline__ void multiply(float (&C)[COUNT][TILES][4], int n,
                                                const Operand (&a)[COUNT], const Operand &b) {
#if FA_DTYPE_FP32 && !FA_TF32
    /* Without the product of the small parts; that of the large parts last. A tensor core rounds
     * sums toward zero, which adds up over a long sequence: so the sum is kept outside. */
    float sum[2 * COUNT][4] = {};
#pragma unroll
    for (int product = 0; product < 3; product++)
#pragma unroll
        for (int w = 0; w < COUNT; w++) {
            const unsigned (&x)[4] = a[w].part[product == 0], (&y)[4] = b.part[product == 1];
            multiply(sum[2 * w], x, y[0], y[1]);
            multiply(sum[2 * w + 1], x, y[2], y[3]);
        }
#pragma unroll
    for (int w = 0; w < COUNT; w++)
#pragma unroll
        for (int x = 0; x < 4; x++) {
            C[w][n][x] += sum[2 * w][x];
            C[w][n + 1][x] += sum[2 * w + 1][x];
        }
#else
#pragma unroll
    for (int w = 0; w < COUNT; w++) {
        const unsigned (&x)[4] = a[w].part[0], (&y)[4] = b.part[0];
        multiply(C[w][n], x, y[0], y[1]);
        multiply(C[w][n + 1], x, y[2], y[3]);
    }
#endif
}

/* Columns 8n + 2t and 8n + 2t + 1 of row g + 8r of an A that is multiplied with Tile::b_of_cols. */
template <int STEPS>
static __device__ __forceinline__ void put_pair(unsigned (&A)[STEPS][4], int n, int r, float first,
                                                float second) {
#if FA_DTYPE_FP32
    A[n][r] = __float_as_uint(first);
    A[n][r + 2] = __float_as_uint(second);
#else
    A[n / 2][n % 2 * 2 + r] = pack(first, second);
#endif
}

/* Sets what put_pair has put to 0 where the half of the mask is. */
template <int STEPS>
static __device__ __forceinline__ void drop_pair(unsigned (&A)[STEPS][4], int n, int r,
                                                 unsigned mask) {
#if FA_DTYPE_FP32
    A[n][r] = mask & 0x8000 ? A[n][r] : 0;
    A[n][r + 2] = mask & 0x80000000 ? A[n][r + 2] : 0;
#else
    A[n / 2][n % 2 * 2 + r] &= mask;
#endif
}

/* What a product with Tile::b_of_cols has left of row g + 8r in the accumulators of its columns
 * col .. col + 15, times f, into a tile. */
template <class T>
static __device__ __forceinline__ void put_row(const T &tile, int row, int col, int t,
                                               const float (&C0)[4], const float (&C1)[4], int r,
                                               float f) {
#if FA_DTYPE_FP32
    store_shared_4(tile.at(row, col + 4 * t), __float_as_uint(C0[2 * r] * f),
                   __float_as_uint(C1[2 * r] * f), __float_as_uint(C0[2 * r + 1] * f),
                   __float_as_uint(C1[2 * r + 1] * f));
#else
    tile.put(row, col + 2 * t, pack(C0[2 * r] * f, C0[2 * r + 1] * f));
    tile.put(row, col + 8 + 2 * t, pack(C1[2 * r] * f, C1[2 * r + 1] * f));
#endif
}
