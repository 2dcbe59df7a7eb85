/* A tile of a bias or of a bool mask in shared memory, as the copy engine brings it: rows of 128
 * bytes, swizzled like those of Panels, panel after panel. A mask that is the same for all queries
 * has one row.
 *
 * Compiled with: FA_MASK_TILES (0 none, the mask is read from global memory; 1; 2 with one row). */
#pragma once

#include "elem.cuh"
#include "ptx/tma.cuh"
#include "scores.cuh"

struct MaskTile {
    static constexpr int ELEM_BYTES = FA_MASK == 3 ? 4 : FA_MASK == 2 ? 2 : 1;
    static constexpr int ROWS = FA_MASK_TILES == 2 ? 1 : BLOCK_M, COLS = 128 / ELEM_BYTES;
    static constexpr int COUNT = (BLOCK_N + COLS - 1) / COLS;
    static constexpr int PANEL_BYTES = ROWS == 1 ? 1024 : ROWS * 128;
    static constexpr int BYTES = FA_MASK_TILES ? COUNT * PANEL_BYTES : 16;

    unsigned address;

    __device__ __forceinline__ void load(const tensor_map *map, mbarrier *full, int row, int col,
                                         int h, int b) const {
        mbarrier_arrive_expect(full, COUNT * ROWS * 128);
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            tma_load(address + i * PANEL_BYTES, map, full, col + COLS * i,
                     FA_MASK_TILES == 2 ? 0 : row, h, b);
    }

    /* Where element (row, col) is. */
    __device__ __forceinline__ unsigned element(int row, int col) const {
        const int byte = col * ELEM_BYTES;
        return address + byte / 128 * PANEL_BYTES + row * 128 + (byte % 128 / 16 ^ row % 8) * 16 +
               byte % 16;
    }

    /* Where a thread has its columns 8n + 2t and 8n + 2t + 1, given where it has those of n = 0. */
    __device__ __forceinline__ unsigned first(int row, int t) const {
        row = FA_MASK_TILES == 2 ? 0 : row;
        const int byte = 2 * t * ELEM_BYTES;
        return address + row * 128 + (byte / 16 ^ row % 8) * 16 + byte % 16;
    }
    static __device__ __forceinline__ unsigned at(unsigned first, int n) {
        const int byte = 8 * n * ELEM_BYTES;
        return (first ^ byte % 128) + byte / 128 * PANEL_BYTES;
    }

    /* One element as it is. */
    static __device__ __forceinline__ mask_elem load_element(unsigned at) {
#if FA_MASK == 1
        return load_shared_u8(at);
#elif FA_MASK == 2
        return load_shared_u16(at);
#else
        return __uint_as_float(load_shared_1(at));
#endif
    }

    /* What is added to the scores. */
    static __device__ __forceinline__ void values(unsigned at, float (&value)[2]) {
#if FA_MASK == 1
        const unsigned short pair = load_shared_u16(at);
        value[0] = pair & 0xff ? 0 : NEGATIVE_INFINITY;
        value[1] = pair >> 8 ? 0 : NEGATIVE_INFINITY;
#elif FA_MASK == 2
        const unsigned pair = load_shared_1(at);
        value[0] = to_float((elem)pair);
        value[1] = to_float((elem)(pair >> 16));
#else
        unsigned bits[2];
        load_shared_2(bits[0], bits[1], at);
        value[0] = __uint_as_float(bits[0]);
        value[1] = __uint_as_float(bits[1]);
#endif
    }
};
