/* What CUDA adds to C++, as far as the kernels use it; included before a kernel's source. */
#pragma once

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <type_traits>
#include <utility>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))
/* All shared memory of a kernel lies together; the linker says where. */
#define __shared__ __attribute__((section("shared")))

#define threadIdx emu_thread
#define blockIdx emu_block
#define blockDim emu_block_size
#define gridDim emu_grid_size

#define EMU_TYPE (FA_DTYPE_BF16 || FA_DTYPE_FP32 ? EMU_BF16 : EMU_FP16)

/* --- vectors --- */

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
static inline float2 make_float2(float x, float y) {
    return {x, y};
}
static inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}
static inline uint2 make_uint2(unsigned x, unsigned y) {
    return {x, y};
}
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}

/* --- arithmetic --- */

template <class A, class B> static constexpr std::common_type_t<A, B> min(A a, B b) {
    return (std::common_type_t<A, B>)a < (std::common_type_t<A, B>)b ? a : b;
}
template <class A, class B> static constexpr std::common_type_t<A, B> max(A a, B b) {
    return (std::common_type_t<A, B>)a > (std::common_type_t<A, B>)b ? a : b;
}

template <class To, class From> static inline To emu_reinterpret(From x) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}
static inline float __int_as_float(int x) {
    return emu_reinterpret<float>(x);
}
static inline float __uint_as_float(unsigned x) {
    return emu_reinterpret<float>(x);
}
static inline int __float_as_int(float x) {
    return emu_reinterpret<int>(x);
}
static inline unsigned __float_as_uint(float x) {
    return emu_reinterpret<unsigned>(x);
}
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long bytes = x | (unsigned long long)y << 32;
    unsigned result = 0;
    for (int n = 0; n < 4; n++)
        result |= (unsigned)(bytes >> 8 * (selector >> 4 * n & 7) & 255) << 8 * n;
    return result;
}

/* --- warps and blocks; masks of less than a warp are not there --- */

template <class T> static inline T __shfl_sync(unsigned, T x, int lane) {
    return emu_reinterpret<T>(emu_shuffle(emu_reinterpret<unsigned>(x), (unsigned)lane));
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T x, int lanes) {
    return __shfl_sync(mask, x, (int)(threadIdx.x % 32) ^ lanes);
}
template <class T> static inline T __shfl_up_sync(unsigned mask, T x, int lanes) {
    const int lane = threadIdx.x % 32;
    return __shfl_sync(mask, x, lane < lanes ? lane : lane - lanes);
}
template <class T> static inline T __shfl_down_sync(unsigned mask, T x, int lanes) {
    const int lane = threadIdx.x % 32;
    return __shfl_sync(mask, x, lane + lanes > 31 ? lane : lane + lanes);
}
static inline unsigned __ballot_sync(unsigned, int predicate) {
    return emu_ballot(predicate);
}
static inline int __any_sync(unsigned, int predicate) {
    return emu_ballot(predicate) != 0;
}
static inline int __all_sync(unsigned, int predicate) {
    return emu_ballot(!predicate) == 0;
}
static inline int __clz(unsigned x) {
    return x ? __builtin_clz(x) : 32;
}
static inline void __syncwarp(unsigned = ~0u) {
    emu_sync_warp();
}
static inline void __syncthreads() {
    emu_barrier(0, 0, 1);
}
static inline void __threadfence() {}
static inline void __nanosleep(unsigned) {
    emu_yield();
}

/* --- memory --- */

template <class T, class U> static inline T atomicAdd(T *p, U x) {
    const T before = *p;
    *p = before + (T)x;
    return before;
}
template <class T> static inline T atomicCAS(T *p, T expected, T x) {
    const T before = *p;
    if (before == expected)
        *p = x;
    else
        emu_yield();
    return before;
}

/* --- how a kernel is called --- */

template <class... Parameters, size_t... I>
static inline void emu_call(void (*kernel)(Parameters...), void **parameters,
                            std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<Parameters> *)parameters[I]...);
}
template <class... Parameters>
static inline void emu_call(void (*kernel)(Parameters...), void **parameters) {
    emu_call(kernel, parameters, std::index_sequence_for<Parameters...>());
}

/* What driver.c appends to the source for each kernel; struct emu_kernel of inside.h. */
#define EMU_SHARED_MEMORY                                                                          \
    __shared__ __align__(1024) unsigned char shared_memory[EMU_MAX_DYNAMIC];                       \
    extern "C" unsigned char __start_shared[], __stop_shared[];
#define EMU_KERNEL(NAME, CLUSTER_BLOCKS)                                                           \
    static void NAME##_call(void **parameters) {                                                   \
        emu_call(NAME, parameters);                                                                \
    }                                                                                              \
    struct NAME##_description {                                                                    \
        void (*call)(void **);                                                                     \
        unsigned char *begin, *end, *dynamic;                                                      \
        unsigned cluster;                                                                          \
    };                                                                                             \
    extern "C" NAME##_description NAME##_kernel;                                                   \
    NAME##_description NAME##_kernel = {NAME##_call, __start_shared, __stop_shared, shared_memory, \
                                        CLUSTER_BLOCKS};
