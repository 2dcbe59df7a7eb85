/* Chooses the instruction set, and says what the CPU kernels can do. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "../check.h"
#include "kernels.h"

struct isa {
    const char *name;
    int (*usable)(void);
    const struct fa_cpu_kernels *kernels; /* [4] */
    const struct fa_cpu_kernels *bf16;    /* instead of kernels[FA_BFLOAT16], or NULL */
    const struct fa_cpu_kernels *tiles;   /* instead of bf16 from TILES_FROM_ROWS on, or NULL */
};

static int always(void) {
    return 1;
}

#ifdef __x86_64__
/* __builtin_cpu_supports also asks the operating system whether it saves the registers. */
static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}
static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
static int has_avx512_bf16(void) {
    return has_avx512() && __builtin_cpu_supports("avx512bf16");
}
#ifndef FA_NO_AMX /* the compiler's assembler knows its instructions */
#include "isa/amx.h"

static int has_amx_bf16(void) {
    return has_avx512_bf16() && amx_usable();
}
#endif
#endif

static const struct isa isas[] = {
/* best first */
#ifdef __x86_64__
#ifndef FA_NO_AMX
    {"amx_bf16", has_amx_bf16, fa_cpu_avx512, &fa_cpu_avx512_bf16, &fa_cpu_amx_bf16},
#endif
    {"avx512_bf16", has_avx512_bf16, fa_cpu_avx512, &fa_cpu_avx512_bf16, NULL},
    {"avx512", has_avx512, fa_cpu_avx512, NULL, NULL},
    {"avx2", has_avx2, fa_cpu_avx2, NULL, NULL},
#endif
    {"generic", always, fa_cpu_generic, NULL, NULL},
};
enum { ISAS = sizeof isas / sizeof *isas };

/* Queries of a key head that fill two tiles. With fewer, as in decoding, tiles are mostly padding,
 * and a unit that has to wake up first. */
enum { TILES_FROM_ROWS = 32 };

static const struct isa *find_isa(const char *name) {
    for (int i = 0; i < ISAS; i++) {
        if (name ? strcmp(isas[i].name, name) == 0 && isas[i].usable() : isas[i].usable())
            return &isas[i];
    }
    return NULL;
}

/* The choice, once it is made. Threads that race to make it make the same one. */
static _Atomic(const struct isa *) chosen;

static const struct isa *current_isa(void) {
    const struct isa *isa = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (!isa) {
        const char *name = getenv("FLASH_ATTN_EXT_ISA");
        isa = find_isa(name && *name ? name : NULL);
        atomic_store_explicit(&chosen, isa, memory_order_relaxed);
    }
    return isa;
}

const char *fa_cpu_isa(void) {
    const struct isa *isa = current_isa();
    return isa ? isa->name : NULL;
}

const char *fa_cpu_isa_list(int i, int *usable) {
    if (i < 0 || i >= ISAS)
        return NULL;
    *usable = isas[i].usable();
    return isas[i].name;
}

enum fa_status fa_cpu_set_isa(const char *name) {
    const struct isa *isa = name ? find_isa(name) : NULL;
    if (!isa)
        return FA_INVALID;
    atomic_store_explicit(&chosen, isa, memory_order_relaxed);
    return FA_OK;
}

const struct fa_cpu_kernels *fa_cpu_kernels_for(const struct fa_params *p) {
    const struct isa *isa = current_isa();
    if (p->dtype != FA_BFLOAT16 || !isa->bf16)
        return &isa->kernels[p->dtype];
    return isa->tiles && fa_heads_per_group(p) * p->seq_q >= TILES_FROM_ROWS ? isa->tiles
                                                                             : isa->bf16;
}

enum fa_status fa_cpu_supports(const struct fa_params *p, const char **reason) {
    const char *ignored;
    reason = reason ? reason : &ignored;
#define REQUIRE(CONDITION, STATUS, REASON)                                                         \
    if (!(CONDITION)) {                                                                            \
        *reason = REASON;                                                                          \
        return STATUS;                                                                             \
    }
    const char *invalid = fa_check(p);
    REQUIRE(!invalid, FA_INVALID, invalid)
    REQUIRE(p->executor.num_threads >= 0, FA_INVALID, "executor: must not have negative threads")
    REQUIRE(p->softcap == 0, FA_UNSUPPORTED, "softcap: not in the CPU kernels")
    REQUIRE(!p->alibi_slopes, FA_UNSUPPORTED, "alibi_slopes: not in the CPU kernels")
    REQUIRE(!p->sinks, FA_UNSUPPORTED, "sinks: not in the CPU kernels")
    REQUIRE(!p->cu_seqlens_q && !p->cu_seqlens_k, FA_UNSUPPORTED,
            "cu_seqlens: packed sequences are not in the CPU kernels")
    REQUIRE(!p->block_table, FA_UNSUPPORTED,
            "block_table: paged keys and values are not in the CPU kernels")
    REQUIRE(!p->partial_out, FA_UNSUPPORTED, "partial_out: not in the CPU kernels")
    REQUIRE(current_isa(), FA_UNSUPPORTED,
            "FLASH_ATTN_EXT_ISA: names an instruction set that is unknown or not on this machine")
#undef REQUIRE
    *reason = "";
    return FA_OK;
}
