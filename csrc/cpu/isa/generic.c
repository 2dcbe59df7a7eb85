#include "generic.h"

#define ISA_TABLE fa_cpu_generic
#include "all_dtypes.inl"
