/* 2^x for the real type REAL, as accurate as the operand type OPERAND asks for.
 *
 * x = n + f with n whole and |f| <= 1/2; 2^f is a polynomial, fitted by Remez exchange for the
 * least relative error with its constant term fixed at 1: 2.6e-9 for f32 (the rounding of the sum
 * dominates, about 1 ulp), 1.8e-17 for f64, 1.1e-7 where the result becomes a bf16. Minus infinity
 * gives exactly 0, NaN stays NaN. */

// clang-format off
#define f32_EXP2_COEFFICIENTS {                                                                    \
    1.0f, 0.693147215f, 0.2402265278f, 0.05550310551f, 0.009617692973f, 0.00134066439f,            \
    0.0001559467816f}

#define bf16x2_EXP2_COEFFICIENTS {                                                                 \
    1.0f, 0.6931470037f, 0.2402224243f, 0.05550733581f, 0.009671512991f, 0.001326472731f}

#define f64_EXP2_COEFFICIENTS {                                                                    \
    1.0, 0.693147180559945697, 0.24022650695910098, 0.0555041086647903946,                         \
    0.00961812910760700238, 0.00133335581534399647, 0.000154035304415721303,                       \
    1.52527273851938682e-05, 1.32154426753298221e-06, 1.01806476592341389e-07,                     \
    7.07257041281442351e-09, 4.07807192958833667e-10}
// clang-format on

/* Of EXP2_VECS vectors, step by step: one alone is a chain of dependent instructions, and a
 * processor does not look far enough ahead to find the next one by itself. */
FA_ALWAYS_INLINE void exp2_vecs(vec x[EXP2_VECS]) {
    static const real coefficients[] = OP(EXP2_COEFFICIENTS);
    const int degree = (int)(sizeof coefficients / sizeof *coefficients) - 1;
    vec n[EXP2_VECS], y[EXP2_VECS];
    FA_UNROLL for (int u = 0; u < EXP2_VECS; u++) x[u] = V(split)(x[u], &n[u]);
    FA_UNROLL for (int u = 0; u < EXP2_VECS; u++) y[u] = V(set1)(coefficients[degree]);
    FA_UNROLL for (int i = degree - 1; i >= 0; i--) {
        FA_UNROLL for (int u = 0; u < EXP2_VECS; u++) {
            y[u] = V(fma)(y[u], x[u], V(set1)(coefficients[i]));
        }
    }
    FA_UNROLL for (int u = 0; u < EXP2_VECS; u++) x[u] = V(scale2)(y[u], n[u]);
}
