/* The product of gemm.inl for few columns: C[i][j] = sum over p < depth of A[i * lda + p] * B[j *
 * ldb + p], with rows of LANES reals in C. Vectors run along the sum, so that no lane is idle and
 * every operand of A is loaded by the vector. */
enum {
    GEMM_FEW = LANES / 2,                  /* columns */
    GEMM_FEW_ROWS = LANES < 4 ? LANES : 4, /* that share a vector of B */
};

static void gemm_few(real *C, const operand *A, int64_t lda, const operand *B, int64_t ldb,
                     int64_t rows, int cols, int64_t depth, struct fa_ahead *ahead_1,
                     struct fa_ahead *ahead_2) {
    for (int64_t i = 0; i < rows; i += LANES) {
        vec block[LANES]; /* columns of C */
        for (int j = 0; j < LANES; j++) {
            block[j] = V(set1)(0);
            if (j >= cols)
                continue;
            vec sums[LANES];
            for (int x = 0; x < LANES; x += GEMM_FEW_ROWS) {
                fa_fetch(ahead_1);
                fa_fetch(ahead_2);
                const operand *a[GEMM_FEW_ROWS], *b = B + j * ldb;
                vec acc[GEMM_FEW_ROWS];
                FA_UNROLL for (int u = 0; u < GEMM_FEW_ROWS; u++) {
                    a[u] = A + fa_min(i + x + u, rows - 1) * lda;
                    acc[u] = V(set1)(0);
                }
                int64_t p = 0;
                FA_NO_UNROLL for (; p + LANES <= depth; p += LANES) {
                    FA_UNROLL for (int u = 0; u < GEMM_FEW_ROWS; u++) {
                        acc[u] = OP(dot)(OP(load)(a[u] + p), OP(load)(b + p), acc[u]);
                    }
                }
                const int left = (int)(depth - p);
                FA_UNROLL for (int u = 0; u < GEMM_FEW_ROWS; u++) {
                    if (left)
                        acc[u] =
                            OP(dot)(OP(load_n)(a[u] + p, left), OP(load_n)(b + p, left), acc[u]);
                    sums[x + u] = acc[u];
                }
            }
            V(transpose)(sums);
            FA_UNROLL for (int half = LANES / 2; half > 0; half /= 2) {
                FA_UNROLL for (int x = 0; x < half; x++) sums[x] = sums[x] + sums[x + half];
            }
            block[j] = sums[0];
        }
        V(transpose)(block);
        for (int x = 0; x < fa_min(LANES, rows - i); x++)
            V(store)(C + (i + x) * LANES, block[x]);
    }
}
