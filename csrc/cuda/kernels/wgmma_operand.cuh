/* The descriptor of an operand of a wgmma in shared memory (sm_90a). */
#pragma once

#ifndef CLUSTER
#define CLUSTER 1 /* blocks */
#endif

/* Rows of 128 bytes, swizzled as by the copy engine, eight of them every 1024 bytes; `panel_bytes`
 * lie between two blocks of 64 columns, which matters where columns are not the dimension that is
 * summed over. From bit 24 on the address has the number of the block in its cluster, for which
 * there is no place here: a product reads its own block's memory. (Where there are no clusters, it
 * is 0, and to take it away costs registers.) */
static __device__ __forceinline__ unsigned long long wgmma_operand(unsigned address,
                                                                   unsigned panel_bytes) {
    constexpr unsigned long long SWIZZLE_128B = 1ull << 62, EIGHT_ROWS = 1024 >> 4;
    if (CLUSTER > 1)
        address &= 0x3ffff;
    return address >> 4 | panel_bytes >> 4 << 16 | EIGHT_ROWS << 32 | SWIZZLE_128B;
}
