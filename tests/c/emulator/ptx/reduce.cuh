#pragma once

static inline void reduce_add_v4(float *to, const float (&x)[4]) {
    emu_check_global(to, 16);
    for (int n = 0; n < 4; n++)
        to[n] += x[n];
}
