/* Tensor-core products of sm_80 and the loads that feed them, one instruction a function. */
#pragma once

/* D[16][8] += A[16][16] B[16][8]. Of each 16 x 8 accumulator a thread holds, with g = lane / 4 and
 * t = lane % 4: rows g (d[0], d[1]) and g + 8 (d[2], d[3]), columns 2t and 2t + 1. */
static __device__ __forceinline__ void mma_16x8x16(float (&d)[4], const unsigned (&a)[4],
                                                   unsigned b0, unsigned b1) {
#if FA_DTYPE_BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* D[16][8] += A[16][8] B[8][8], of floats that are numbers of TF32; D is held as above. */
static __device__ __forceinline__ void mma_16x8x8(float (&d)[4], const unsigned (&a)[4],
                                                  unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* The nearest number of TF32: a float with 10 bits of mantissa. */
static __device__ __forceinline__ unsigned round_to_tf32(float x) {
    unsigned y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

/* Four 8 x 8 matrices of 16-bit elements, or 8 x 4 of 32-bit ones; lanes 8i .. 8i + 7 give the rows
 * of matrix i. */
static __device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

/* The transpose of an 8 x 8 matrix of 16-bit elements, of which a thread holds two of row lane / 4.
 */
static __device__ __forceinline__ unsigned movmatrix_trans(unsigned two) {
    unsigned y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(two));
    return y;
}

static __device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
