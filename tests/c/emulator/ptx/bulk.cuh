/* Instead of csrc/cuda/kernels/ptx/bulk.cuh. */
#pragma once

#include "ptx/mbarrier.cuh"

static inline void bulk_load(unsigned dst, const void *src, int bytes, mbarrier *b) {
    emu_bulk_load(dst, src, bytes, shared_address(b));
}

static inline void bulk_add(float *dst, unsigned src, int bytes) {
    emu_bulk_store(EMU_ADD, dst, src, bytes);
}
