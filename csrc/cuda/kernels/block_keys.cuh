/* The keys that a block of the backward for sm_90a owns. */
#pragma once

#include "params.h"
#include "ptx/warpgroup.cuh"

struct Work {
    int first_key, h, b; /* of the key head */

    __device__ __forceinline__ explicit Work(const fa_kernel_params &p)
        : first_key(uniform(blockIdx.x % p.blocks * BLOCK_N)),
          h(uniform(blockIdx.x / p.blocks % p.heads_k)),
          b(uniform(blockIdx.x / p.blocks / p.heads_k)) {}
};
