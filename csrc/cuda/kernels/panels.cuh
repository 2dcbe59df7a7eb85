/* Tiles in shared memory as the copy engine of sm_90 brings them: panels of 64 columns, a row of a
 * panel 128 bytes, swizzled: its chunk of 16 bytes number c lies at place c ^ (row % 8), so that
 * eight rows of a column of chunks fall into different banks. The columns after the last, up to a
 * multiple of 64, are zeros, and so are the rows after the last row of the tensor. */
#pragma once

#include "elem.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

template <int ROWS, int COLS> struct Panels {
    static constexpr int COUNT = (COLS + 63) / 64;
    static constexpr int PANEL_BYTES = ROWS * 128, BYTES = COUNT * PANEL_BYTES;
    static_assert(ROWS % 8 == 0, "the swizzle repeats every eight rows");

    unsigned address; /* in shared memory, a multiple of 1024 */

    /* The chunk with columns col .. col + 7, a multiple of 8, of a row. */
    __device__ __forceinline__ unsigned chunk(int row, int col) const {
        return address + col / 64 * PANEL_BYTES + row * 128 + (col / 8 % 8 ^ row % 8) * 16;
    }

    /* The tile without the rows before `row`, a multiple of 8, or without the panels before that of
     * `col`. Its last rows and panels lie outside. */
    __device__ __forceinline__ Panels from_row(int row) const { return {address + row * 128}; }
    __device__ __forceinline__ Panels from_panel_of(int col) const {
        return {address + col / 64 * PANEL_BYTES};
    }

    /* Rows from `row` and columns from `col` on of head h of batch entry b; one thread. */
    __device__ __forceinline__ void load(const tensor_map *map, mbarrier *full, int row, int h,
                                         int b, int col = 0) const {
        mbarrier_arrive_expect(full, BYTES);
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            tma_load(address + i * PANEL_BYTES, map, full, col + 64 * i, row, h, b);
    }
    __device__ __forceinline__ void store(const tensor_map *map, int row, int h, int b) const {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            tma_store(map, address + i * PANEL_BYTES, 64 * i, row, h, b);
    }

    /* Operands of a wgmma: sums run over columns col .. col + 15, or over rows row .. row + 15. */
    __device__ __forceinline__ unsigned long long sum_over_cols(int col) const {
        return wgmma_operand(address, 0) + (col / 64 * PANEL_BYTES + col % 64 * 2) / 16;
    }
    __device__ __forceinline__ unsigned long long sum_over_rows(int row) const {
        return wgmma_operand(address, PANEL_BYTES) + row * 128 / 16;
    }
};
