#include "avx512_bf16.h"

#include "../template.h"

#define REAL f32
#define OPERAND bf16x2
#include "../exp.inl"
#include "../gemm.inl"
#include "../gemm_few.inl"

#define ELEM bf16
#include "../kernels.inl"

const struct fa_cpu_kernels fa_cpu_avx512_bf16 = FA_KERNELS_OF(bf16);
