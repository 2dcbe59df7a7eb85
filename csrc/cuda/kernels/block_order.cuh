/* The order in which a launch works on the blocks of all heads. */
#pragma once

#include "params.h"

struct OrderedBlock {
    unsigned head; /* counted through the batch */
    int index;     /* the longest block of a head is 0 */
};

/* Under a window, work is laid out in groups of p.group_heads heads, whose tensors stay in the L2
 * cache while all their blocks are worked on, the longest first: so short ones are left at the end
 * of a launch, to even it out. Without signs: divisions take fewer registers. */
static __device__ __forceinline__ OrderedBlock ordered_block(const fa_kernel_params &p, int heads,
                                                             unsigned piece) {
    if (!FA_WINDOW)
        return {piece / p.blocks, (int)(piece % p.blocks)};
    const unsigned group = piece / (unsigned)(p.group_heads * p.blocks) * p.group_heads;
    const unsigned size = min(p.group_heads, p.batch * heads - (int)group);
    const unsigned in_group = piece - group * p.blocks;
    return {group + in_group % size, (int)(in_group / size)};
}
