/* What fake_cuda.c, a CUDA driver that does nothing, was asked for and shall answer. */
#ifndef FAKE_CUDA_H
#define FAKE_CUDA_H

#include <stdatomic.h>

struct fake_cuda {
    atomic_int loads, unloads, launches, pushes, pops, tensor_maps; /* calls so far */
    atomic_int capturing, arch, load_error, function_error, launch_error,
        current_device;                      /* answers */
    atomic_uint grid, threads, shared_bytes; /* of the last launch */
};
extern struct fake_cuda fake_cuda;

#endif
