/* The order in which a forward works on the tiles of queries of all heads. */
#pragma once

#include "params.h"

struct QueryBlock {
    unsigned head; /* counted through the batch */
    int row;       /* the first query */
};

/* Work is laid out in groups of p.group_heads heads, whose keys and values stay in the L2 cache
 * while all their queries are worked on, the last queries first: under a causal mask they have the
 * most keys, and at the end of a launch short pieces of work are left to even it out. Without
 * signs: divisions take fewer registers. */
static __device__ __forceinline__ QueryBlock query_block(const fa_kernel_params &p,
                                                         unsigned piece) {
    const unsigned group = piece / (unsigned)(p.group_heads * p.blocks) * p.group_heads;
    const unsigned group_heads = min(p.group_heads, p.batch * p.heads_q - (int)group);
    const unsigned in_group = piece - group * p.blocks;
    return {group + in_group % group_heads,
            (p.blocks - 1 - (int)(in_group / group_heads)) * BLOCK_M};
}
