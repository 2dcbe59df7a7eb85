#include "avx512.h"

#define ISA_TABLE fa_cpu_avx512
#include "all_dtypes.inl"
