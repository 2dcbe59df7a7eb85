/* Instantiates the kernels for the four dtypes and puts them into the table ISA_TABLE. */
#include "../template.h"

#define REAL f32
#define OPERAND f32
#include "../exp.inl"
#include "../gemm.inl"
#include "../gemm_few.inl"

#define ELEM f32
#include "../kernels.inl"
#undef ELEM
#define ELEM bf16
#include "../kernels.inl"
#undef ELEM
#define ELEM f16
#include "../kernels.inl"
#undef ELEM
#undef OPERAND
#undef REAL

#define REAL f64
#define OPERAND f64
#include "../exp.inl"
#include "../gemm.inl"
#include "../gemm_few.inl"

#define ELEM f64
#include "../kernels.inl"

const struct fa_cpu_kernels ISA_TABLE[4] = {
    [FA_FLOAT32] = FA_KERNELS_OF(f32),
    [FA_FLOAT64] = FA_KERNELS_OF(f64),
    [FA_BFLOAT16] = FA_KERNELS_OF(bf16),
    [FA_FLOAT16] = FA_KERNELS_OF(f16),
};
