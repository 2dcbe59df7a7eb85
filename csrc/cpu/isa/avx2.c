#include "avx2.h"

#define ISA_TABLE fa_cpu_avx2
#include "all_dtypes.inl"
