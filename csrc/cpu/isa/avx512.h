/* SIMD primitives for AVX-512 (F, BW, DQ, VL). isa/README.md says what each one means. */
#ifndef FA_ISA_AVX512_H
#define FA_ISA_AVX512_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>

/* 6 x 4 accumulators + 4 vectors of B + 1 broadcast of A = 29 of 32 registers. */
#define GEMM_ROWS 6
#define GEMM_VECS 4

/* --- f32 --- */

typedef float f32_elem;
typedef float f32_real;
typedef float f32_operand;
typedef __m512 f32_vec;
typedef __m512 f32_operand_vec;
#define f32_LANES 16
#define f32_DEPTH 1

static inline __mmask16 f32_first(int n) {
    return (__mmask16)((1u << n) - 1);
}
static inline f32_vec f32_load(const float *p) {
    return _mm512_loadu_ps(p);
}
static inline f32_vec f32_load_n(const float *p, int n) {
    return _mm512_maskz_loadu_ps(f32_first(n), p);
}
static inline void f32_store(float *p, f32_vec x) {
    _mm512_storeu_ps(p, x);
}
static inline void f32_store_n(float *p, f32_vec x, int n) {
    _mm512_mask_storeu_ps(p, f32_first(n), x);
}
static inline f32_vec f32_set1(float x) {
    return _mm512_set1_ps(x);
}
static inline f32_vec f32_broadcast(const float *p) {
    return _mm512_set1_ps(*p);
}
static inline f32_vec f32_fma(f32_vec a, f32_vec b, f32_vec c) {
    return _mm512_fmadd_ps(a, b, c);
}
static inline f32_vec f32_dot(f32_vec a, f32_vec b, f32_vec c) {
    return _mm512_fmadd_ps(a, b, c);
}
static inline f32_vec f32_max(f32_vec a, f32_vec b) {
    return _mm512_max_ps(a, b);
}
/* Of an infinity VREDUCEPS leaves 0, so that n is one, too. */
static inline f32_vec f32_split(f32_vec x, f32_vec *n) {
    const f32_vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    *n = _mm512_sub_ps(x, f);
    return f;
}
static inline f32_vec f32_scale2(f32_vec x, f32_vec n) {
    return _mm512_scalef_ps(x, n);
}
static inline f32_vec f32_where_between(f32_vec x, f32_vec j, f32_vec lo, f32_vec hi) {
    __mmask16 in = _mm512_cmp_ps_mask(j, lo, _CMP_NLT_UQ);
    in = _mm512_mask_cmp_ps_mask(in, j, hi, _CMP_NGT_UQ);
    return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), in, x);
}
static inline f32_vec f32_hide(const uint8_t *p) {
    const __m128i seen = _mm_loadu_si128((const __m128i *)p);
    return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), _mm_test_epi8_mask(seen, seen),
                              _mm512_setzero_ps());
}
static inline float f32_sum(f32_vec x) {
    return _mm512_reduce_add_ps(x);
}
static inline void f32_transpose(f32_vec x[16]) {
    f32_vec y[16];
    for (int i = 0; i < 16; i += 4) { /* 4 x 4 blocks within each 128-bit lane */
        __m512d ab_lo = _mm512_castps_pd(_mm512_unpacklo_ps(x[i], x[i + 1]));
        __m512d ab_hi = _mm512_castps_pd(_mm512_unpackhi_ps(x[i], x[i + 1]));
        __m512d cd_lo = _mm512_castps_pd(_mm512_unpacklo_ps(x[i + 2], x[i + 3]));
        __m512d cd_hi = _mm512_castps_pd(_mm512_unpackhi_ps(x[i + 2], x[i + 3]));
        y[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_lo, cd_lo));
        y[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_lo, cd_lo));
        y[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_hi, cd_hi));
        y[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_hi, cd_hi));
    }
    for (int i = 0; i < 4; i++) { /* then the lanes, 4 x 4 of them */
        f32_vec even_lo = _mm512_shuffle_f32x4(y[i], y[i + 4], 0x88);
        f32_vec odd_lo = _mm512_shuffle_f32x4(y[i], y[i + 4], 0xdd);
        f32_vec even_hi = _mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0x88);
        f32_vec odd_hi = _mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0xdd);
        x[i] = _mm512_shuffle_f32x4(even_lo, even_hi, 0x88);
        x[i + 4] = _mm512_shuffle_f32x4(odd_lo, odd_hi, 0x88);
        x[i + 8] = _mm512_shuffle_f32x4(even_lo, even_hi, 0xdd);
        x[i + 12] = _mm512_shuffle_f32x4(odd_lo, odd_hi, 0xdd);
    }
}

/* --- f64 --- */

typedef double f64_elem;
typedef double f64_real;
typedef double f64_operand;
typedef __m512d f64_vec;
typedef __m512d f64_operand_vec;
#define f64_LANES 8
#define f64_DEPTH 1

static inline __mmask8 f64_first(int n) {
    return (__mmask8)((1u << n) - 1);
}
static inline f64_vec f64_load(const double *p) {
    return _mm512_loadu_pd(p);
}
static inline f64_vec f64_load_n(const double *p, int n) {
    return _mm512_maskz_loadu_pd(f64_first(n), p);
}
static inline void f64_store(double *p, f64_vec x) {
    _mm512_storeu_pd(p, x);
}
static inline void f64_store_n(double *p, f64_vec x, int n) {
    _mm512_mask_storeu_pd(p, f64_first(n), x);
}
static inline f64_vec f64_set1(double x) {
    return _mm512_set1_pd(x);
}
static inline f64_vec f64_broadcast(const double *p) {
    return _mm512_set1_pd(*p);
}
static inline f64_vec f64_fma(f64_vec a, f64_vec b, f64_vec c) {
    return _mm512_fmadd_pd(a, b, c);
}
static inline f64_vec f64_dot(f64_vec a, f64_vec b, f64_vec c) {
    return _mm512_fmadd_pd(a, b, c);
}
static inline f64_vec f64_max(f64_vec a, f64_vec b) {
    return _mm512_max_pd(a, b);
}
static inline f64_vec f64_split(f64_vec x, f64_vec *n) {
    const f64_vec f = _mm512_reduce_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    *n = _mm512_sub_pd(x, f);
    return f;
}
static inline f64_vec f64_scale2(f64_vec x, f64_vec n) {
    return _mm512_scalef_pd(x, n);
}
static inline f64_vec f64_where_between(f64_vec x, f64_vec j, f64_vec lo, f64_vec hi) {
    __mmask8 in = _mm512_cmp_pd_mask(j, lo, _CMP_NLT_UQ);
    in = _mm512_mask_cmp_pd_mask(in, j, hi, _CMP_NGT_UQ);
    return _mm512_mask_mov_pd(_mm512_set1_pd(-INFINITY), in, x);
}
static inline f64_vec f64_hide(const uint8_t *p) {
    const __m128i seen = _mm_loadl_epi64((const __m128i *)p);
    return _mm512_mask_mov_pd(_mm512_set1_pd(-INFINITY), (__mmask8)_mm_test_epi8_mask(seen, seen),
                              _mm512_setzero_pd());
}
static inline double f64_sum(f64_vec x) {
    return _mm512_reduce_add_pd(x);
}
static inline void f64_transpose(f64_vec x[8]) {
    f64_vec y[8];
    for (int i = 0; i < 8; i += 2) { /* 2 x 2 blocks within each 128-bit lane */
        y[i] = _mm512_unpacklo_pd(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_pd(x[i], x[i + 1]);
    }
    for (int i = 0; i < 2; i++) { /* then the lanes, 4 x 4 of them */
        f64_vec even_lo = _mm512_shuffle_f64x2(y[i], y[i + 2], 0x88);
        f64_vec odd_lo = _mm512_shuffle_f64x2(y[i], y[i + 2], 0xdd);
        f64_vec even_hi = _mm512_shuffle_f64x2(y[i + 4], y[i + 6], 0x88);
        f64_vec odd_hi = _mm512_shuffle_f64x2(y[i + 4], y[i + 6], 0xdd);
        x[i] = _mm512_shuffle_f64x2(even_lo, even_hi, 0x88);
        x[i + 2] = _mm512_shuffle_f64x2(odd_lo, odd_hi, 0x88);
        x[i + 4] = _mm512_shuffle_f64x2(even_lo, even_hi, 0xdd);
        x[i + 6] = _mm512_shuffle_f64x2(odd_lo, odd_hi, 0xdd);
    }
}

/* --- bf16 and f16 in memory, f32 in registers --- */

typedef uint16_t bf16_elem;

static inline f32_vec bf16_widen(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
static inline __m256i bf16_narrow(f32_vec x) { /* to nearest, ties to even; NaN stays NaN */
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
static inline f32_vec bf16_load(const bf16_elem *p) {
    return bf16_widen(_mm256_loadu_si256((const __m256i *)p));
}
static inline f32_vec bf16_load_n(const bf16_elem *p, int n) {
    return bf16_widen(_mm256_maskz_loadu_epi16(f32_first(n), p));
}
static inline void bf16_store(bf16_elem *p, f32_vec x) {
    _mm256_storeu_si256((__m256i *)p, bf16_narrow(x));
}
static inline void bf16_store_n(bf16_elem *p, f32_vec x, int n) {
    _mm256_mask_storeu_epi16(p, f32_first(n), bf16_narrow(x));
}

typedef uint16_t f16_elem;

static inline f32_vec f16_load(const f16_elem *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
static inline f32_vec f16_load_n(const f16_elem *p, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(f32_first(n), p));
}
static inline void f16_store(f16_elem *p, f32_vec x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
static inline void f16_store_n(f16_elem *p, f32_vec x, int n) {
    _mm256_mask_storeu_epi16(p, f32_first(n), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#endif
