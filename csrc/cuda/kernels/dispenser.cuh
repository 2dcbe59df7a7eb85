/* Hands out pieces of work to the blocks of a grid: to each block first the piece of its own
 * number, then, whenever it asks, the next one that nobody has. Where pieces differ in size and the
 * largest come first, blocks so end at about the same time. */
#pragma once

#include "params.h"
#include "ptx/order.cuh"

/* The counter lies in memory that nobody has initialised, which saves a launch: the first block to
 * ask claims it, with a number that no other launch has; the last one to leave gives it up, since
 * a CUDA graph launches the same number again. */
struct Dispenser {
    int piece = -1;

    __device__ __forceinline__ int next(const fa_kernel_params &p, int count) {
        fa_kernel_counter *counter = p.counter;
        if (piece < 0)
            return piece = blockIdx.x;
        if (!counter) /* pieces of the same size: in turns */
            return piece += gridDim.x;
        if (piece == blockIdx.x)
            claim(counter, p.launch);
        const int taken = atomicAdd(&counter->taken, 1);
        if (taken == count - 1) /* every block has asked once too often, but for its own piece */
            counter->owner = 0;
        return piece = gridDim.x + taken;
    }

    static __device__ __forceinline__ void claim(fa_kernel_counter *counter,
                                                 unsigned long long launch) {
        for (;;) {
            const unsigned long long owner = load_acquire(&counter->owner);
            if (owner == launch)
                return;
            if (owner == launch + 1) /* somebody is at it */
                continue;
            if (atomicCAS(&counter->owner, owner, launch + 1) == owner) {
                counter->taken = 0;
                store_release(&counter->owner, launch);
                return;
            }
        }
    }
};
