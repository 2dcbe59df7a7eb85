/* What a machine can do at most, measured beside what a kernel does: multiply and add in registers,
 * read memory. machine.py compiles it for the machine at hand. */
#include <stddef.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include "../csrc/cpu/isa/amx.h"
#define HAS_TILES
#endif

#ifdef __AVX512F__
enum { BYTES = 64, CHAINS = 24 }; /* of 32 registers: enough chains to hide the latency of each */
#else
enum { BYTES = 32, CHAINS = 12 }; /* of 16 */
#endif
typedef float vec __attribute__((vector_size(BYTES)));
typedef float vec_in_memory __attribute__((vector_size(BYTES), aligned(4)));

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 24")
#endif

/* Floating-point operations done in `rounds` rounds. */
double fma_float32(long rounds) {
    vec sum[CHAINS], a = {0}, b = {0};
    UNROLL for (int i = 0; i < CHAINS; i++) {
        sum[i] = (vec){0};
        __asm__ volatile("" : "+x"(sum[i])); /* no compiler knows that they are all alike */
    }
    __asm__ volatile("" : "+x"(a), "+x"(b));
    for (long n = 0; n < rounds; n++) {
        UNROLL for (int i = 0; i < CHAINS; i++) sum[i] = sum[i] * a + b;
    }
    UNROLL for (int i = 0; i < CHAINS; i++) __asm__ volatile("" ::"x"(sum[i]));
    return 2.0 * (double)rounds * CHAINS * BYTES / sizeof(float);
}

/* On tiles where there are some; 0 where the processor has no such instruction. */
double fma_bfloat16(long rounds) {
#ifdef HAS_TILES
    if (amx_usable()) {
        tiles_configure();
        for (long n = 0; n < rounds / 4; n++) {
            tile_dot(0, 4, 6);
            tile_dot(1, 4, 7);
            tile_dot(2, 5, 6);
            tile_dot(3, 5, 7);
        }
        tiles_release();
        return 2.0 * (double)(rounds / 4) * 4 * 16 * 16 * 32;
    }
#endif
#ifdef __AVX512BF16__
    __m512 sum[CHAINS];
    __m512i a = _mm512_setzero_si512(), b = a;
    UNROLL for (int i = 0; i < CHAINS; i++) {
        sum[i] = _mm512_setzero_ps();
        __asm__ volatile("" : "+x"(sum[i]));
    }
    __asm__ volatile("" : "+x"(a), "+x"(b));
    for (long n = 0; n < rounds; n++) {
        UNROLL for (int i = 0; i < CHAINS; i++) {
            sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)a, (__m512bh)b);
        }
    }
    UNROLL for (int i = 0; i < CHAINS; i++) __asm__ volatile("" ::"x"(sum[i]));
    return 2.0 * (double)rounds * CHAINS * BYTES / 2;
#else
    (void)rounds;
    return 0;
#endif
}

/* Reads memory once, from the first byte to the last. */
void read_memory(const char *memory, size_t bytes) {
    vec sum[4] = {{0}};
    for (size_t i = 0; i + 4 * BYTES <= bytes; i += 4 * BYTES) {
        UNROLL for (int u = 0; u < 4; u++) sum[u] +=
            *(const vec_in_memory *)(memory + i + u * BYTES);
    }
    UNROLL for (int u = 0; u < 4; u++) __asm__ volatile("" ::"x"(sum[u]));
}
