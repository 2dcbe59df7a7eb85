/* SIMD primitives for AVX2 with FMA and F16C. isa/README.md says what each one means. */
#ifndef FA_ISA_AVX2_H
#define FA_ISA_AVX2_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

/* 6 x 2 accumulators + 2 vectors of B + 1 broadcast of A = 15 of 16 registers. */
#define GEMM_ROWS 6
#define GEMM_VECS 2

/* --- f32 --- */

typedef float f32_elem;
typedef float f32_real;
typedef float f32_operand;
typedef __m256 f32_vec;
typedef __m256 f32_operand_vec;
#define f32_LANES 8
#define f32_DEPTH 1

static inline __m256i f32_first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline f32_vec f32_load(const float *p) {
    return _mm256_loadu_ps(p);
}
static inline f32_vec f32_load_n(const float *p, int n) {
    return _mm256_maskload_ps(p, f32_first(n));
}
static inline void f32_store(float *p, f32_vec x) {
    _mm256_storeu_ps(p, x);
}
static inline void f32_store_n(float *p, f32_vec x, int n) {
    _mm256_maskstore_ps(p, f32_first(n), x);
}
static inline f32_vec f32_set1(float x) {
    return _mm256_set1_ps(x);
}
static inline f32_vec f32_broadcast(const float *p) {
    return _mm256_broadcast_ss(p);
}
static inline f32_vec f32_fma(f32_vec a, f32_vec b, f32_vec c) {
    return _mm256_fmadd_ps(a, b, c);
}
static inline f32_vec f32_dot(f32_vec a, f32_vec b, f32_vec c) {
    return _mm256_fmadd_ps(a, b, c);
}
static inline f32_vec f32_max(f32_vec a, f32_vec b) {
    return _mm256_max_ps(a, b);
}
static inline f32_vec f32_split(f32_vec x, f32_vec *n) {
    *n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm256_sub_ps(x, *n);
}
static inline f32_vec f32_scale2(f32_vec x, f32_vec n) {
    __m256i exponent = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_set1_ps(128), n));
    __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23);
    f32_vec normal = _mm256_cmp_ps(n, _mm256_set1_ps(-126), _CMP_NLT_UQ); /* or NaN */
    return _mm256_and_ps(normal, _mm256_mul_ps(x, _mm256_castsi256_ps(bits)));
}
static inline f32_vec f32_where_between(f32_vec x, f32_vec j, f32_vec lo, f32_vec hi) {
    f32_vec in =
        _mm256_and_ps(_mm256_cmp_ps(j, lo, _CMP_NLT_UQ), _mm256_cmp_ps(j, hi, _CMP_NGT_UQ));
    return _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), x, in);
}
static inline f32_vec f32_hide(const uint8_t *p) {
    const __m256i seen = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
    const __m256i hidden = _mm256_cmpeq_epi32(seen, _mm256_setzero_si256());
    return _mm256_and_ps(_mm256_castsi256_ps(hidden), _mm256_set1_ps(-INFINITY));
}
static inline float f32_sum(f32_vec x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

static inline void f32_transpose(f32_vec x[8]) {
    f32_vec y[8];
    for (int i = 0; i < 8; i += 4) { /* 4 x 4 blocks within each 128-bit lane */
        __m256d ab_lo = _mm256_castps_pd(_mm256_unpacklo_ps(x[i], x[i + 1]));
        __m256d ab_hi = _mm256_castps_pd(_mm256_unpackhi_ps(x[i], x[i + 1]));
        __m256d cd_lo = _mm256_castps_pd(_mm256_unpacklo_ps(x[i + 2], x[i + 3]));
        __m256d cd_hi = _mm256_castps_pd(_mm256_unpackhi_ps(x[i + 2], x[i + 3]));
        y[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab_lo, cd_lo));
        y[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab_lo, cd_lo));
        y[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab_hi, cd_hi));
        y[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab_hi, cd_hi));
    }
    for (int i = 0; i < 4; i++) {
        x[i] = _mm256_permute2f128_ps(y[i], y[i + 4], 0x20);
        x[i + 4] = _mm256_permute2f128_ps(y[i], y[i + 4], 0x31);
    }
}

/* --- f64 --- */

typedef double f64_elem;
typedef double f64_real;
typedef double f64_operand;
typedef __m256d f64_vec;
typedef __m256d f64_operand_vec;
#define f64_LANES 4
#define f64_DEPTH 1

static inline __m256i f64_first(int n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
static inline f64_vec f64_load(const double *p) {
    return _mm256_loadu_pd(p);
}
static inline f64_vec f64_load_n(const double *p, int n) {
    return _mm256_maskload_pd(p, f64_first(n));
}
static inline void f64_store(double *p, f64_vec x) {
    _mm256_storeu_pd(p, x);
}
static inline void f64_store_n(double *p, f64_vec x, int n) {
    _mm256_maskstore_pd(p, f64_first(n), x);
}
static inline f64_vec f64_set1(double x) {
    return _mm256_set1_pd(x);
}
static inline f64_vec f64_broadcast(const double *p) {
    return _mm256_broadcast_sd(p);
}
static inline f64_vec f64_fma(f64_vec a, f64_vec b, f64_vec c) {
    return _mm256_fmadd_pd(a, b, c);
}
static inline f64_vec f64_dot(f64_vec a, f64_vec b, f64_vec c) {
    return _mm256_fmadd_pd(a, b, c);
}
static inline f64_vec f64_max(f64_vec a, f64_vec b) {
    return _mm256_max_pd(a, b);
}
static inline f64_vec f64_split(f64_vec x, f64_vec *n) {
    *n = _mm256_round_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm256_sub_pd(x, *n);
}
static inline f64_vec f64_scale2(f64_vec x, f64_vec n) {
    __m128i exponent = _mm256_cvtpd_epi32(_mm256_min_pd(_mm256_set1_pd(1024), n));
    __m256i biased = _mm256_cvtepi32_epi64(_mm_add_epi32(exponent, _mm_set1_epi32(1023)));
    __m256i bits = _mm256_slli_epi64(biased, 52);
    f64_vec normal = _mm256_cmp_pd(n, _mm256_set1_pd(-1022), _CMP_NLT_UQ); /* or NaN */
    return _mm256_and_pd(normal, _mm256_mul_pd(x, _mm256_castsi256_pd(bits)));
}
static inline f64_vec f64_where_between(f64_vec x, f64_vec j, f64_vec lo, f64_vec hi) {
    f64_vec in =
        _mm256_and_pd(_mm256_cmp_pd(j, lo, _CMP_NLT_UQ), _mm256_cmp_pd(j, hi, _CMP_NGT_UQ));
    return _mm256_blendv_pd(_mm256_set1_pd(-INFINITY), x, in);
}
static inline f64_vec f64_hide(const uint8_t *p) {
    int bytes;
    __builtin_memcpy(&bytes, p, sizeof bytes);
    const __m256i seen = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes));
    const __m256i hidden = _mm256_cmpeq_epi64(seen, _mm256_setzero_si256());
    return _mm256_and_pd(_mm256_castsi256_pd(hidden), _mm256_set1_pd(-INFINITY));
}
static inline double f64_sum(f64_vec x) {
    __m128d half = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
    return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
}

static inline void f64_transpose(f64_vec x[4]) {
    f64_vec y[4];
    for (int i = 0; i < 4; i += 2) {
        y[i] = _mm256_unpacklo_pd(x[i], x[i + 1]);
        y[i + 1] = _mm256_unpackhi_pd(x[i], x[i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        x[i] = _mm256_permute2f128_pd(y[i], y[i + 2], 0x20);
        x[i + 2] = _mm256_permute2f128_pd(y[i], y[i + 2], 0x31);
    }
}

/* --- bf16 and f16 in memory, f32 in registers --- */

/* n <= 8 half words, zeros behind them: AVX2 has no masked load of 16-bit lanes. */
static inline __m128i halves_load_n(const uint16_t *p, int n) {
    uint16_t lanes[8] = {0};
    memcpy(lanes, p, (size_t)n * sizeof *p);
    return _mm_loadu_si128((const __m128i *)lanes);
}
static inline void halves_store_n(uint16_t *p, __m128i x, int n) {
    uint16_t lanes[8];
    _mm_storeu_si128((__m128i *)lanes, x);
    memcpy(p, lanes, (size_t)n * sizeof *p);
}

typedef uint16_t bf16_elem;

static inline f32_vec bf16_widen(__m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
static inline __m128i bf16_narrow(f32_vec x) { /* to nearest, ties to even; NaN stays NaN */
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
    rounded = _mm256_srli_epi32(rounded, 16);
    __m256i packed = _mm256_packus_epi32(rounded, rounded); /* within each 128-bit half */
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
static inline f32_vec bf16_load(const bf16_elem *p) {
    return bf16_widen(_mm_loadu_si128((const __m128i *)p));
}
static inline f32_vec bf16_load_n(const bf16_elem *p, int n) {
    return bf16_widen(halves_load_n(p, n));
}
static inline void bf16_store(bf16_elem *p, f32_vec x) {
    _mm_storeu_si128((__m128i *)p, bf16_narrow(x));
}
static inline void bf16_store_n(bf16_elem *p, f32_vec x, int n) {
    halves_store_n(p, bf16_narrow(x), n);
}

typedef uint16_t f16_elem;

static inline f32_vec f16_load(const f16_elem *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
static inline f32_vec f16_load_n(const f16_elem *p, int n) {
    return _mm256_cvtph_ps(halves_load_n(p, n));
}
static inline void f16_store(f16_elem *p, f32_vec x) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
static inline void f16_store_n(f16_elem *p, f32_vec x, int n) {
    halves_store_n(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT), n);
}

#endif
