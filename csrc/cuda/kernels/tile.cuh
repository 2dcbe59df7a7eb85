/* Tiles in shared memory: rows of elements, as wide as the head size rounded up to 16 (what one mma
 * multiplies), zeros where the tensor has ended. Rows are 16 bytes apart more than they are
 * wide: an odd multiple of 16 bytes, so that the eight rows of an ldmatrix fall into different
 * banks, for any head size. */
#pragma once

#include "elem.cuh"
#include "params.h"
#include "ptx/copy.cuh"
#include "ptx/mma.cuh"

__host__ __device__ constexpr int round_up_16(int n) {
    return (n + 15) / 16 * 16;
}
__host__ __device__ constexpr int power_of_2_from(int n) {
    int power = 1;
    while (power < n)
        power *= 2;
    return power;
}

/* Of rows of 32 bytes: the first halves, and the second. */
static __device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[8], unsigned address) {
#pragma unroll
    for (int half = 0; half < 8; half += 4) {
        unsigned four[4];
        ldmatrix_x4(four, address + 8 * half);
#pragma unroll
        for (int x = 0; x < 4; x++)
            r[half + x] = four[x];
    }
}

template <int ROWS_, int COLS_> struct Tile {
    static constexpr int ROWS = ROWS_, COLS = COLS_, WIDTH = round_up_16(COLS_);
    static constexpr int PITCH = WIDTH * (int)sizeof(elem) + 16; /* bytes from row to row */
    static constexpr int BYTES = ROWS * PITCH;
    static constexpr int CHUNK = 16 / sizeof(elem); /* elements in 16 bytes */
    static constexpr int CHUNKS = WIDTH / CHUNK;    /* in a row */

    unsigned address; /* in shared memory */

    __device__ __forceinline__ unsigned at(int row, int col) const {
        return address + row * PITCH + col * (int)sizeof(elem);
    }

    /* Rows [0, rows) of src, by all threads of the block. With FA_ALIGNED, a row of the tensor
     * starts at a multiple of 16 bytes and the copy is asynchronous; otherwise it is at once. */
    __device__ __forceinline__ void load(const elem *src, long long stride, int rows) const {
        constexpr int LANES = power_of_2_from(CHUNKS), STEP = THREADS / LANES;
        const unsigned thread = thread_index();
        const int col = thread % LANES * CHUNK, first = thread / LANES;
        if (LANES != CHUNKS && col >= WIDTH)
            return;
        const elem *from = src + first * stride + col;
        unsigned to = at(first, col);
#pragma unroll
        for (int row = 0; row < ROWS; row += STEP) {
            if (ROWS % STEP != 0 && row + first >= ROWS)
                break;
#if FA_ALIGNED
            const int bytes =
                WIDTH == COLS ? 16 : max(0, min(CHUNK, COLS - col)) * (int)sizeof(elem);
            const bool valid = row + first < rows && bytes > 0;
            cp_async_16(to, valid ? from : src, valid ? bytes : 0);
#else
            unsigned word[4];
#pragma unroll
            for (int w = 0; w < 4; w++) {
                const bool valid = row + first < rows;
#if FA_DTYPE_FP32
                word[w] = __float_as_uint(valid && col + w < COLS ? from[w] : 0);
#else
                const unsigned lo = valid && col + 2 * w < COLS ? from[2 * w] : 0;
                const unsigned hi = valid && col + 2 * w + 1 < COLS ? from[2 * w + 1] : 0;
                word[w] = lo | hi << 16;
#endif
            }
            store_shared_4(to, word[0], word[1], word[2], word[3]);
#endif
            from += STEP * stride;
            to += STEP * PITCH;
        }
    }

    /* The first `count` elements of 16 bytes, or all. */
    static __device__ __forceinline__ void store_chunk(elem *to, const unsigned (&word)[4],
                                                       int count) {
        if (FA_ALIGNED && (COLS % CHUNK == 0 || count >= CHUNK)) {
            store_global_4(to, word);
        } else {
#pragma unroll
            for (int i = 0; i < CHUNK; i++) {
                if (i < count)
#if FA_DTYPE_FP32
                    to[i] = __uint_as_float(word[i]);
#else
                    to[i] = (elem)(word[i / 2] >> 16 * (i % 2));
#endif
            }
        }
    }

    /* Rows [0, rows) to dst, by `threads` threads of which this is number `thread`. */
    __device__ __forceinline__ void store(elem *dst, long long stride, int rows, int first_row,
                                          int row_count, int thread, int threads) const {
        constexpr int AHEAD = 8; /* loads on the way at a time */
        const int chunks = row_count * CHUNKS;
        for (int first = thread; first < chunks; first += AHEAD * threads) {
            unsigned word[AHEAD][4];
#pragma unroll
            for (int x = 0; x < AHEAD; x++) {
                const int chunk = min(first + x * threads, chunks - 1);
                load_shared_4(word[x], at(first_row + chunk / CHUNKS, chunk % CHUNKS * CHUNK));
            }
#pragma unroll
            for (int x = 0; x < AHEAD; x++) {
                const int chunk = first + x * threads;
                const int row = first_row + chunk / CHUNKS, col = chunk % CHUNKS * CHUNK;
                if (chunk < chunks && row < rows && col < COLS)
                    store_chunk(dst + row * stride + col, word[x], COLS - col);
            }
        }
    }

    __device__ __forceinline__ void put(int row, int col, unsigned pair) const {
        store_shared_1(at(row, col), pair);
    }

    /* --- operands of 16 x 16, for this thread: of one mma_16x8x16 or, for floats, of two
     * mma_16x8x8, one after the other --- */

    /* A = tile[row .. row + 15][col .. col + 15] */
    __device__ __forceinline__ void a(unsigned (&r)[WORDS], int row, int col) const {
        const int lane = threadIdx.x % 32;
        ldmatrix_x4(r, at(row + lane % 16, col + lane / 16 * CHUNK));
    }
    /* Two B: the transposes of tile[row .. row + 7][col .. col + 15] in the first half of each r of
     * four and of the next eight rows in the second: a product with the rows of the tile, as in
     * Q K^T. */
    __device__ __forceinline__ void b_of_rows(unsigned (&r)[WORDS], int row, int col) const {
        const int lane = threadIdx.x % 32;
        ldmatrix_x4(r, at(row + lane / 16 * 8 + lane % 8, col + lane / 8 % 2 * CHUNK));
    }
#if FA_DTYPE_FP32
    /* No instruction transposes floats on the way. So the rows are taken in the order 0 2 4 6 1 3 5
     * 7, which is that of the columns of P where it is an accumulator of Q K^T, and of two B one
     * has the even columns, the other the odd ones: two neighbours are loaded at once. */

    /* A = the transpose of what store_pair has stored in tile[row .. row + 15][col .. col + 15] */
    __device__ __forceinline__ void a_transposed(unsigned (&r)[WORDS], int row, int col) const {
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        const unsigned from = at(row + 2 * t, col + g / 2 + g % 2 * 4);
#pragma unroll
        for (int x = 0; x < WORDS; x++)
            r[x] = load_shared_1(from + (x / 4 * 8 + x / 2 % 2) * PITCH +
                                 x % 2 * 8 * (int)sizeof(elem));
    }
    /* Two B of tile[row .. row + 15][col .. col + 15] for a product with the columns, as in P V. */
    __device__ __forceinline__ void b_of_cols(unsigned (&r)[WORDS], int row, int col) const {
        const int lane = threadIdx.x % 32;
        const unsigned from = at(row + lane % 4 * 2, col + lane / 4 * 2);
#pragma unroll
        for (int half = 0; half < 8; half += 4) {
            load_shared_2(r[half], r[half + 2], from + half * 2 * PITCH);
            load_shared_2(r[half + 1], r[half + 3], from + (half * 2 + 1) * PITCH);
        }
    }
#else
    /* A = the transpose of tile[row .. row + 15][col .. col + 15] */
    __device__ __forceinline__ void a_transposed(unsigned (&r)[WORDS], int row, int col) const {
        const int lane = threadIdx.x % 32;
        ldmatrix_x4_trans(r, at(row + lane / 16 * 8 + lane % 8, col + lane / 8 % 2 * 8));
    }
    /* Two B: tile[row .. row + 15][col .. col + 7] in r[0], r[1] and the next eight columns in
     * r[2], r[3]: a product with the columns, as in P V. */
    __device__ __forceinline__ void b_of_cols(unsigned (&r)[WORDS], int row, int col) const {
        const int lane = threadIdx.x % 32;
        ldmatrix_x4_trans(r, at(row + lane % 16, col + lane / 16 * 8));
    }
#endif
};

/* Element (b, h, i, 0). */
static __device__ __forceinline__ elem *row_of(const fa_kernel_tensor &t, int b, int h, int i) {
    return (elem *)t.data + b * t.stride_batch + h * t.stride_head + i * t.stride_row;
}
