/* The products of a warpgroup (sm_90a): 64 rows of A, N columns of B, 16 deep, in fp32. They run
 * while the threads go on; until a wait says that they have ended, nobody may touch their
 * registers.
 *
 * Of the 64 x N accumulator, warp w has rows 16w .. 16w + 15, and d[n] is what a thread holds of
 * the 16 x 8 accumulator n of mma_16x8x16. A in registers is laid out like A of mma_16x8x16. */
#pragma once

#include "wgmma_operand.cuh"

/* Before a product that reads registers, or accumulates in them, that other code has written. */
static __device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

/* The products since the last commit become a group. */
static __device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Waits until at most PENDING of the latest groups are under way. */
template <int PENDING> static __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/* Keeps the compiler from moving a use of d across this place. */
template <int N> static __device__ __forceinline__ void pin(float (&d)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
        asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
}

#if FA_DTYPE_BF16 || FA_DTYPE_FP32
#define WGMMA_TYPES "f32.bf16.bf16"
#else
#define WGMMA_TYPES "f32.f16.f16"
#endif

/* Operands of the inline assembly: eight registers for every 16 columns. */
#define D_8(MODE, n)                                                                               \
    MODE(d[n][0]), MODE(d[n][1]), MODE(d[n][2]), MODE(d[n][3]), MODE(d[n + 1][0]),                 \
        MODE(d[n + 1][1]), MODE(d[n + 1][2]), MODE(d[n + 1][3])
#define D_16_COLS(MODE) D_8(MODE, 0)
#define D_32_COLS(MODE) D_16_COLS(MODE), D_8(MODE, 2)
#define D_48_COLS(MODE) D_32_COLS(MODE), D_8(MODE, 4)
#define D_64_COLS(MODE) D_48_COLS(MODE), D_8(MODE, 6)
#define D_80_COLS(MODE) D_64_COLS(MODE), D_8(MODE, 8)
#define D_96_COLS(MODE) D_80_COLS(MODE), D_8(MODE, 10)
#define D_112_COLS(MODE) D_96_COLS(MODE), D_8(MODE, 12)
#define D_128_COLS(MODE) D_112_COLS(MODE), D_8(MODE, 14)
#define D_144_COLS(MODE) D_128_COLS(MODE), D_8(MODE, 16)
#define D_160_COLS(MODE) D_144_COLS(MODE), D_8(MODE, 18)
#define D_176_COLS(MODE) D_160_COLS(MODE), D_8(MODE, 20)
#define D_192_COLS(MODE) D_176_COLS(MODE), D_8(MODE, 22)
#define D_208_COLS(MODE) D_192_COLS(MODE), D_8(MODE, 24)
#define D_224_COLS(MODE) D_208_COLS(MODE), D_8(MODE, 26)
#define D_240_COLS(MODE) D_224_COLS(MODE), D_8(MODE, 28)
#define D_256_COLS(MODE) D_240_COLS(MODE), D_8(MODE, 30)
#define NAMES_16 "%0,%1,%2,%3,%4,%5,%6,%7"
#define NAMES_32 NAMES_16 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES_48 NAMES_32 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define NAMES_64 NAMES_48 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_80 NAMES_64 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define NAMES_96 NAMES_80 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define NAMES_112 NAMES_96 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define NAMES_128 NAMES_112 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES_144 NAMES_128 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define NAMES_160 NAMES_144 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define NAMES_176 NAMES_160 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define NAMES_192 NAMES_176 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define NAMES_208 NAMES_192 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define NAMES_224 NAMES_208 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define NAMES_240 NAMES_224 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define NAMES_256 NAMES_240 ",%120,%121,%122,%123,%124,%125,%126,%127"

/* Which dimension of an operand in shared memory the sum runs over; the other one is M or N. */
enum { OVER_COLS, OVER_ROWS };

template <int N> struct Wgmma;

/* in0 to in4 number the operands after the accumulators. */
#define DEFINE_WGMMA(N, in0, in1, in2, in3, in4, in5)                                              \
    template <> struct Wgmma<N> {                                                                  \
        /* D = A B */                                                                              \
        template <int A = OVER_COLS, int B = OVER_COLS>                                            \
        static __device__ __forceinline__ void                                                     \
        multiply(float (&d)[N / 8][4], unsigned long long a, unsigned long long b) {               \
            asm volatile("{.reg .pred p; setp.ne.b32 p, %" #in2 ", 0;\n"                           \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16." WGMMA_TYPES " {" NAMES_##N  \
                         "}, %" #in0 ", %" #in1 ", p, 1, 1, %" #in3 ", %" #in4 ";}"                \
                         : D_##N##_COLS("=f")                                                      \
                         : "l"(a), "l"(b), "n"(0), "n"(A), "n"(B));                                \
        }                                                                                          \
        /* D += A B */                                                                             \
        template <int A = OVER_COLS, int B = OVER_COLS>                                            \
        static __device__ __forceinline__ void                                                     \
        multiply_add(float (&d)[N / 8][4], unsigned long long a, unsigned long long b) {           \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16." WGMMA_TYPES " {" NAMES_##N  \
                         "}, %" #in0 ", %" #in1 ", 1, 1, 1, %" #in2 ", %" #in3 ";"                 \
                         : D_##N##_COLS("+f")                                                      \
                         : "l"(a), "l"(b), "n"(A), "n"(B));                                        \
        }                                                                                          \
        /* D = A B, where D has numbers that nobody wants any more: as the compiler does not know  \
         * that a grid is never of 0 blocks, they go into it, and so it gives D no other           \
         * registers. Of these there may be none, and it would wait for each wgmma, one by one. */ \
        template <int A = OVER_COLS, int B = OVER_COLS>                                            \
        static __device__ __forceinline__ void                                                     \
        multiply_over(float (&d)[N / 8][4], unsigned long long a, unsigned long long b) {          \
            asm volatile("{.reg .pred p; .reg .b32 y; mov.b32 y, %%nctaid.y;\n"                    \
                         "setp.eq.b32 p, y, 0;\n"                                                  \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16." WGMMA_TYPES " {" NAMES_##N  \
                         "}, %" #in0 ", %" #in1 ", p, 1, 1, %" #in2 ", %" #in3 ";}"                \
                         : D_##N##_COLS("+f")                                                      \
                         : "l"(a), "l"(b), "n"(A), "n"(B));                                        \
        }                                                                                          \
        /* Likewise, D = A B, and D += A B; A in registers. */                                     \
        template <int B = OVER_ROWS>                                                               \
        static __device__ __forceinline__ void                                                     \
        multiply_over(float (&d)[N / 8][4], const unsigned (&a)[4], unsigned long long b) {        \
            asm volatile("{.reg .pred p; .reg .b32 y; mov.b32 y, %%nctaid.y;\n"                    \
                         "setp.eq.b32 p, y, 0;\n"                                                  \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16." WGMMA_TYPES " {" NAMES_##N  \
                         "}, {%" #in0 ",%" #in1 ",%" #in2 ",%" #in3 "}, %" #in4                    \
                         ", p, 1, 1, %" #in5 ";}"                                                  \
                         : D_##N##_COLS("+f")                                                      \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(B));            \
        }                                                                                          \
        template <int B = OVER_ROWS>                                                               \
        static __device__ __forceinline__ void                                                     \
        multiply(float (&d)[N / 8][4], const unsigned (&a)[4], unsigned long long b) {             \
            asm volatile("{.reg .pred p; setp.ne.b32 p, 0, 0;\n"                                   \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16." WGMMA_TYPES " {" NAMES_##N  \
                         "}, {%" #in0 ",%" #in1 ",%" #in2 ",%" #in3 "}, %" #in4                    \
                         ", p, 1, 1, %" #in5 ";}"                                                  \
                         : D_##N##_COLS("=f")                                                      \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(B));            \
        }                                                                                          \
        template <int B = OVER_ROWS>                                                               \
        static __device__ __forceinline__ void                                                     \
        multiply_add(float (&d)[N / 8][4], const unsigned (&a)[4], unsigned long long b) {         \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16." WGMMA_TYPES " {" NAMES_##N  \
                         "}, {%" #in0 ",%" #in1 ",%" #in2 ",%" #in3 "}, %" #in4                    \
                         ", 1, 1, 1, %" #in5 ";"                                                   \
                         : D_##N##_COLS("+f")                                                      \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(B));            \
        }                                                                                          \
    };
DEFINE_WGMMA(16, 8, 9, 10, 11, 12, 13)
DEFINE_WGMMA(32, 16, 17, 18, 19, 20, 21)
DEFINE_WGMMA(48, 24, 25, 26, 27, 28, 29)
DEFINE_WGMMA(64, 32, 33, 34, 35, 36, 37)
DEFINE_WGMMA(80, 40, 41, 42, 43, 44, 45)
DEFINE_WGMMA(96, 48, 49, 50, 51, 52, 53)
DEFINE_WGMMA(112, 56, 57, 58, 59, 60, 61)
DEFINE_WGMMA(128, 64, 65, 66, 67, 68, 69)
DEFINE_WGMMA(144, 72, 73, 74, 75, 76, 77)
DEFINE_WGMMA(160, 80, 81, 82, 83, 84, 85)
DEFINE_WGMMA(176, 88, 89, 90, 91, 92, 93)
DEFINE_WGMMA(192, 96, 97, 98, 99, 100, 101)
DEFINE_WGMMA(208, 104, 105, 106, 107, 108, 109)
DEFINE_WGMMA(224, 112, 113, 114, 115, 116, 117)
DEFINE_WGMMA(240, 120, 121, 122, 123, 124, 125)
DEFINE_WGMMA(256, 128, 129, 130, 131, 132, 133)
#undef DEFINE_WGMMA
