#pragma once

static inline unsigned pack(float lo, float hi) {
    return emu_to_half(EMU_TYPE, lo) | (unsigned)emu_to_half(EMU_TYPE, hi) << 16;
}

static inline unsigned pack_finite(float lo, float hi) {
    const float largest = emu_from_half(EMU_TYPE, EMU_TYPE == EMU_FP16 ? 0x7bff : 0x7f7f);
#define FINITE(x) (fabsf(x) > largest ? copysignf(largest, x) : x)
    return pack(FINITE(lo), FINITE(hi));
#undef FINITE
}

static inline unsigned multiply_pairs(unsigned x, unsigned y) {
    float product[2];
    for (int half = 0; half < 2; half++)
        product[half] = emu_from_half(EMU_TYPE, (unsigned short)(x >> 16 * half)) *
                        emu_from_half(EMU_TYPE, (unsigned short)(y >> 16 * half));
    return pack(product[0], product[1]);
}

static inline unsigned limit_pairs(unsigned x) {
    float half[2];
    for (int i = 0; i < 2; i++) {
        half[i] = emu_from_half(EMU_TYPE, (unsigned short)(x >> 16 * i));
        half[i] = fabsf(half[i]) > 1 ? copysignf(1, half[i]) : half[i];
    }
    return pack(half[0], half[1]);
}

static inline float half_to_float(unsigned short x) {
    return emu_from_half(EMU_FP16, x);
}

static inline float exp2_approx(float x) {
    const float y = exp2f(fabsf(x) < 0x1p-126f ? 0 : x);
    return y < 0x1p-126f ? 0 : y;
}

static inline float min_nan(float x, float y) {
    return x != x || y != y ? NAN : x < y ? x : y;
}

static inline unsigned size_not_less_f16x2(unsigned x, unsigned y) {
    unsigned mask = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const float size = fabsf(half_to_float((unsigned short)(x >> shift)));
        mask |= size < half_to_float((unsigned short)(y >> shift)) ? 0 : 0xffffu << shift;
    }
    return mask;
}
