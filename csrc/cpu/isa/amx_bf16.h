/* AVX-512 with bf16 instructions, and AMX tiles for the matrix products (gemm_tiles.inl). */
#ifndef FA_ISA_AMX_BF16_H
#define FA_ISA_AMX_BF16_H

#include "avx512_bf16.h"

#include "amx.h"

/* 2 x 2 tiles of C + 2 of A + 2 of B = 8 of 8 registers: four products of 16 cycles for four loads
 * of 8. */
#undef GEMM_ROWS
#undef GEMM_VECS
#define GEMM_ROWS 32
#define GEMM_VECS 2

#endif
