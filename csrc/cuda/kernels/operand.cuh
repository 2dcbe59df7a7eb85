/* Operands of the tensor cores, 16 x 16: 16-bit elements as they are; floats as TF32, rounded, or,
 * unless FA_TF32, as the sum of two numbers of TF32, which has the accuracy of float (3xTF32). */
#pragma once

#include "elem.cuh"
#include "ptx/copy.cuh"
#include "ptx/mma.cuh"

constexpr int PARTS = FA_DTYPE_FP32 && !FA_TF32 ? 2 : 1; /* of an operand, large to small */

struct Operand {
    unsigned part[PARTS][WORDS]; /* one A, or two B side by side */

    __device__ __forceinline__ Operand() {}
    __device__ __forceinline__ explicit Operand(const unsigned (&r)[WORDS]) { set(r); }

    __device__ __forceinline__ void set(const unsigned (&r)[WORDS]) {
#pragma unroll
        for (int x = 0; x < WORDS; x++)
            part[0][x] = r[x];
        split();
    }

    /* Of elements in part[0] makes the parts. */
    __device__ __forceinline__ void split() {
#if FA_DTYPE_FP32
#pragma unroll
        for (int x = 0; x < WORDS; x++) {
            const float value = __uint_as_float(part[0][x]);
#if FA_TF32
            part[0][x] = round_to_tf32(value);
#else
            /* Every warp does this with every operand: three instructions, where to round twice
             * takes a dozen. The large part is cut off, of a number so much larger that it is too
             * large about as often as too small; so the small part has either sign. Of its 12 to
             * 13 bits the tensor core ignores those that TF32 has not. */
            part[0][x] = __float_as_uint(value * 1.00034f) & 0xffffe000;
            part[1][x] = __float_as_uint(value - __uint_as_float(part[0][x]));
#endif
        }
#endif
    }
};

/* D0 += A B0, D1 += A B1, for the two B of y. */
static __device__ __forceinline__ void multiply_parts(float (&D0)[4], float (&D1)[4],
                                                      const unsigned (&x)[WORDS],
                                                      const unsigned (&y)[WORDS]) {
#if FA_DTYPE_FP32
#pragma unroll
    for (int half = 0; half < 8; half += 4) {
        const unsigned a[4] = {x[half], x[half + 1], x[half + 2], x[half + 3]};
        mma_16x8x8(D0, a, y[half], y[half + 1]);
        mma_16x8x8(D1, a, y[half + 2], y[half + 3]);
    }
#else
    mma_16x8x16(D0, x, y[0], y[1]);
    mma_16x8x16(D1, x, y[2], y[3]);
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
        for (int w = 0; w < COUNT; w++)
            multiply_parts(sum[2 * w], sum[2 * w + 1], a[w].part[product == 0],
                           b.part[product == 1]);
#pragma unroll
    for (int w = 0; w < COUNT; w++)
#pragma unroll
        for (int x = 0; x < 4; x++) {
            C[w][n][x] += sum[2 * w][x];
            C[w][n + 1][x] += sum[2 * w + 1][x];
        }
#else
#pragma unroll
    for (int w = 0; w < COUNT; w++)
        multiply_parts(C[w][n], C[w][n + 1], a[w].part[0], b.part[0]);
#endif
}

/* C[n] and C[n + 1] += A B. */
template <int TILES>
static __device__ __forceinline__ void multiply(float (&C)[TILES][4], int n, const Operand &a,
                                                const Operand &b) {
    multiply(reinterpret_cast<float (&)[1][TILES][4]>(C), n,
             reinterpret_cast<const Operand(&)[1]>(a), b);
}

/* Columns 8n + 2t and 8n + 2t + 1 of row g + 8r of an A that is multiplied with Tile::b_of_cols. */
template <int STEPS>
static __device__ __forceinline__ void put_pair(unsigned (&A)[STEPS][WORDS], int n, int r,
                                                float first, float second) {
#if FA_DTYPE_FP32
    A[n / 2][n % 2 * 4 + r] = __float_as_uint(first);
    A[n / 2][n % 2 * 4 + r + 2] = __float_as_uint(second);
#else
    A[n / 2][n % 2 * 2 + r] = pack(first, second);
#endif
}

/* Sets what put_pair has put to 0 where the half of the mask is. */
template <int STEPS>
static __device__ __forceinline__ void drop_pair(unsigned (&A)[STEPS][WORDS], int n, int r,
                                                 unsigned mask) {
#if FA_DTYPE_FP32
    unsigned &first = A[n / 2][n % 2 * 4 + r], &second = A[n / 2][n % 2 * 4 + r + 2];
    first = mask & 0x8000 ? first : 0;
    second = mask & 0x80000000 ? second : 0;
#else
    A[n / 2][n % 2 * 2 + r] &= mask;
#endif
}

/* Stores what put_pair has put into columns col .. col + 7 of a row of a tile, from which Tile::a
 * gets it back, or Tile::a_transposed its transpose. */
template <class T, int STEPS>
static __device__ __forceinline__ void store_pair(const T &tile, int row, int col, int t,
                                                  const unsigned (&A)[STEPS][WORDS], int n, int r) {
#if FA_DTYPE_FP32
    store_shared_1(tile.at(row, col + t), A[n / 2][n % 2 * 4 + r]);
    store_shared_1(tile.at(row, col + t + 4), A[n / 2][n % 2 * 4 + r + 2]);
#else
    tile.put(row, col + 2 * t, A[n / 2][n % 2 * 2 + r]);
#endif
}

/* What a product with Tile::b_of_cols has left of row g + 8r in the accumulators of its columns
 * col .. col + 7, times f, into a tile. */
template <class T>
static __device__ __forceinline__ void put_8_columns(const T &tile, int row, int col, int t,
                                                     const float (&C)[4], int r, float f) {
#if FA_DTYPE_FP32
    const int first = col / 16 * 16 + col / 8 % 2 + 4 * t; /* the even or the odd ones of 16 */
    store_shared_1(tile.at(row, first), __float_as_uint(C[2 * r] * f));
    store_shared_1(tile.at(row, first + 2), __float_as_uint(C[2 * r + 1] * f));
#else
    tile.put(row, col + 2 * t, pack(C[2 * r] * f, C[2 * r + 1] * f));
#endif
}

/* ... of its columns col .. col + 15. */
template <class T>
static __device__ __forceinline__ void put_row(const T &tile, int row, int col, int t,
                                               const float (&C0)[4], const float (&C1)[4], int r,
                                               float f) {
#if FA_DTYPE_FP32
    store_shared_4(tile.at(row, col + 4 * t), __float_as_uint(C0[2 * r] * f),
                   __float_as_uint(C1[2 * r] * f), __float_as_uint(C0[2 * r + 1] * f),
                   __float_as_uint(C1[2 * r + 1] * f));
#else
    put_8_columns(tile, row, col, t, C0, r, f);
    put_8_columns(tile, row, col + 8, t, C1, r, f);
#endif
}
