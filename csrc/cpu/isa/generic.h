/* SIMD primitives in portable C: 16-byte vectors of GCC and Clang, which become SSE2, NEON or
 * plain scalar code. isa/README.md says what each one means. */
#ifndef FA_ISA_GENERIC_H
#define FA_ISA_GENERIC_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* 6 x 2 accumulators + 2 vectors of B + 1 broadcast of A + 1 product = 16 registers of SSE2. */
#define GEMM_ROWS 6
#define GEMM_VECS 2

/* What differs between f32 and f64 is the width of a lane and of its exponent. */
#define DEFINE_REAL(T, REAL, LANES, UINT, INT, MANTISSA, MIN_EXPONENT, MAX_EXPONENT)               \
    typedef REAL T##_elem;                                                                         \
    typedef REAL T##_real;                                                                         \
    typedef REAL T##_operand;                                                                      \
    typedef REAL T##_vec __attribute__((vector_size(16)));                                         \
    typedef T##_vec T##_operand_vec;                                                               \
    typedef UINT T##_bits __attribute__((vector_size(16)));                                        \
    typedef INT T##_mask __attribute__((vector_size(16)));                                         \
                                                                                                   \
    static inline T##_vec T##_load(const REAL *p) {                                                \
        T##_vec x;                                                                                 \
        memcpy(&x, p, sizeof x);                                                                   \
        return x;                                                                                  \
    }                                                                                              \
    static inline T##_vec T##_load_n(const REAL *p, int n) {                                       \
        T##_vec x = {0};                                                                           \
        memcpy(&x, p, (size_t)n * sizeof *p);                                                      \
        return x;                                                                                  \
    }                                                                                              \
    static inline void T##_store(REAL *p, T##_vec x) {                                             \
        memcpy(p, &x, sizeof x);                                                                   \
    }                                                                                              \
    static inline void T##_store_n(REAL *p, T##_vec x, int n) {                                    \
        memcpy(p, &x, (size_t)n * sizeof *p);                                                      \
    }                                                                                              \
    static inline T##_vec T##_set1(REAL x) {                                                       \
        return (T##_vec){0} + x;                                                                   \
    }                                                                                              \
    static inline T##_vec T##_broadcast(const REAL *p) {                                           \
        return T##_set1(*p);                                                                       \
    }                                                                                              \
    static inline T##_vec T##_fma(T##_vec a, T##_vec b, T##_vec c) {                               \
        return a * b + c;                                                                          \
    }                                                                                              \
    static inline T##_vec T##_dot(T##_vec a, T##_vec b, T##_vec c) {                               \
        return a * b + c;                                                                          \
    }                                                                                              \
    static inline T##_vec T##_select(T##_mask which, T##_vec a, T##_vec b) {                       \
        return (T##_vec)(((T##_mask)a & which) | ((T##_mask)b & ~which));                          \
    }                                                                                              \
    static inline T##_vec T##_max(T##_vec a, T##_vec b) {                                          \
        return T##_select((T##_mask)(a > b), a, b);                                                \
    }                                                                                              \
    /* Adding 1.5 * 2^MANTISSA leaves no room for a fraction; for |x| < 2^(MANTISSA - 1). */       \
    static inline T##_vec T##_split(T##_vec x, T##_vec *n) {                                       \
        REAL shift = (REAL)(3ull << (MANTISSA - 1));                                               \
        *n = (x + shift) - shift;                                                                  \
        return x - *n;                                                                             \
    }                                                                                              \
    static inline T##_vec T##_scale2(T##_vec x, T##_vec n) {                                       \
        REAL shift = (REAL)(3ull << (MANTISSA - 1));                                               \
        T##_vec top = T##_set1(MAX_EXPONENT);                                                      \
        T##_bits low = (T##_bits)(T##_select((T##_mask)(n > top), top, n) + shift);                \
        T##_bits bits = (low + (MAX_EXPONENT - 1)) << MANTISSA;                                    \
        return (T##_vec)((T##_mask)(x * (T##_vec)bits) & ~(T##_mask)(n < (REAL)MIN_EXPONENT));     \
    }                                                                                              \
    static inline T##_vec T##_where_between(T##_vec x, T##_vec j, T##_vec lo, T##_vec hi) {        \
        T##_mask out = (T##_mask)(j < lo) | (T##_mask)(j > hi);                                    \
        return T##_select(out, T##_set1(-INFINITY), x);                                            \
    }                                                                                              \
    static inline T##_vec T##_hide(const uint8_t *p) {                                             \
        T##_vec x;                                                                                 \
        for (int i = 0; i < (LANES); i++)                                                          \
            x[i] = p[i] ? 0 : (REAL) - INFINITY;                                                   \
        return x;                                                                                  \
    }                                                                                              \
    static inline REAL T##_sum(T##_vec x) {                                                        \
        REAL sum = x[0];                                                                           \
        for (int i = 1; i < (LANES); i++)                                                          \
            sum += x[i];                                                                           \
        return sum;                                                                                \
    }                                                                                              \
    static inline void T##_transpose(T##_vec x[LANES]) {                                           \
        for (int i = 0; i < (LANES); i++) {                                                        \
            for (int j = i + 1; j < (LANES); j++) {                                                \
                REAL swap = x[i][j];                                                               \
                x[i][j] = x[j][i];                                                                 \
                x[j][i] = swap;                                                                    \
            }                                                                                      \
        }                                                                                          \
    }

#define f32_LANES 4
#define f32_DEPTH 1
DEFINE_REAL(f32, float, f32_LANES, uint32_t, int32_t, 23, -126, 128)

#define f64_LANES 2
#define f64_DEPTH 1
DEFINE_REAL(f64, double, f64_LANES, uint64_t, int64_t, 52, -1022, 1024)

/* --- bf16 and f16 in memory, f32 in registers --- */

static inline float bits_to_f32(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
static inline uint32_t f32_to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

typedef uint16_t bf16_elem;

static inline float bf16_widen(bf16_elem x) {
    return bits_to_f32((uint32_t)x << 16);
}
static inline bf16_elem bf16_narrow(float x) { /* to nearest, ties to even; NaN stays NaN */
    uint32_t bits = f32_to_bits(x);
    return x != x ? 0x7fc0 : (bf16_elem)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

typedef uint16_t f16_elem;

static inline float f16_widen(f16_elem x) {
    uint32_t sign = (uint32_t)(x & 0x8000) << 16, magnitude = x & 0x7fff;
    if (magnitude >= 0x7c00) /* infinity or NaN */
        return bits_to_f32(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    /* The exponent of f32 is biased by 112 more; a multiplication also mends subnormals. */
    return bits_to_f32(sign | f32_to_bits(bits_to_f32(magnitude << 13) * 0x1p112f));
}
static inline f16_elem f16_narrow(float x) { /* to nearest, ties to even; NaN stays NaN */
    uint32_t bits = f32_to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000)
        return 0x7e00;
    if (magnitude >= 0x477ff000) /* 65520 and up round to infinity */
        return (f16_elem)(sign | 0x7c00);
    if (magnitude < 0x38800000) /* subnormal: 0.5 has the unit of f16 subnormals, 2^-24, as ulp */
        return (f16_elem)(sign | (f32_to_bits(bits_to_f32(magnitude) + 0.5f) - 0x3f000000));
    return (f16_elem)(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

#define DEFINE_HALF(T)                                                                             \
    static inline f32_vec T##_load_n(const T##_elem *p, int n) {                                   \
        f32_vec x = {0};                                                                           \
        for (int i = 0; i < n; i++)                                                                \
            x[i] = T##_widen(p[i]);                                                                \
        return x;                                                                                  \
    }                                                                                              \
    static inline f32_vec T##_load(const T##_elem *p) {                                            \
        return T##_load_n(p, f32_LANES);                                                           \
    }                                                                                              \
    static inline void T##_store_n(T##_elem *p, f32_vec x, int n) {                                \
        for (int i = 0; i < n; i++)                                                                \
            p[i] = T##_narrow(x[i]);                                                               \
    }                                                                                              \
    static inline void T##_store(T##_elem *p, f32_vec x) {                                         \
        T##_store_n(p, x, f32_LANES);                                                              \
    }

DEFINE_HALF(bf16)
DEFINE_HALF(f16)

#endif
