/* AVX-512 with its bf16 instruction: operands are pairs of bf16 that VDPBF16PS multiplies and adds
 * into one f32 lane. isa/README.md says what each primitive means. */
#ifndef FA_ISA_AVX512_BF16_H
#define FA_ISA_AVX512_BF16_H

#include "avx512.h"

typedef uint32_t bf16x2_operand __attribute__((aligned(2), may_alias));
typedef __m512i bf16x2_operand_vec;
#define bf16x2_DEPTH 2

static inline bf16x2_operand_vec bf16x2_load(const bf16x2_operand *p) {
    return _mm512_loadu_si512(p);
}
static inline bf16x2_operand_vec bf16x2_load_n(const bf16x2_operand *p, int n) {
    return _mm512_maskz_loadu_epi32(f32_first(n), p);
}
static inline bf16x2_operand_vec bf16x2_broadcast(const bf16x2_operand *p) {
    return _mm512_set1_epi32((int)*p);
}
static inline f32_vec bf16x2_dot(bf16x2_operand_vec a, bf16x2_operand_vec b, f32_vec c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
}
/* The lanes of lo, then those of hi, rounded to nearest. */
static inline bf16x2_operand_vec bf16x2_narrow(f32_vec lo, f32_vec hi) {
    return (__m512i)_mm512_cvtne2ps_pbh(hi, lo);
}
static inline void bf16x2_store_halves(bf16x2_operand *p, bf16x2_operand *q, bf16x2_operand_vec x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_castsi512_si256(x));
    _mm256_storeu_si256((__m256i *)q, _mm512_extracti64x4_epi64(x, 1));
}
static inline void bf16x2_store_pairs(bf16x2_operand *p, bf16x2_operand_vec x) {
    const __m512i pairs =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(pairs, x));
}
/* Pairs of two rows that are bf16 already. */
static inline void bf16x2_store_rows(bf16x2_operand *p, const bf16_elem *lo, const bf16_elem *hi,
                                     int n) {
    __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(f32_first(n), lo));
    __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(f32_first(hi ? n : 0), hi));
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
/* Two neighbours of a row become one operand, the last of an odd row with a zero. */
static inline void bf16x2_store_row(bf16x2_operand *p, f32_vec x) {
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(x));
}

#endif
