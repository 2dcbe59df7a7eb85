/* The one matrix product that attention is made of, for the operand type OPERAND.
 *
 *     C[i][j] (+)= sum over p < depth of A[i * a_row + p * a_col] * B[p * ldb + j]
 *
 * A is read one operand at a time and broadcast, so that its two strides can be anything: K and V
 * are read in place, P and dS as they are or transposed. B is read, and C written, in vectors along
 * j. Sums start from zero in registers and are added to C at the end, which halves the rounding
 * error against adding every product to C. `ahead`, if given, is fetched meanwhile. */

/* `rows` x `vecs` vectors of C. Both are constants where this is called, so that `acc` lives in
 * registers; tail is the number of lanes that the last vector of a row has, 0 for all. */
FA_ALWAYS_INLINE void gemm_block(const int rows, const int vecs, const int tail, real *C,
                                 int64_t ldc, const operand *A, int64_t a_row, int64_t a_col,
                                 const operand *B, int64_t ldb, int64_t depth, int accumulate) {
    vec acc[GEMM_ROWS][GEMM_VECS];
    FA_UNROLL for (int i = 0; i < rows; i++) {
        FA_UNROLL for (int j = 0; j < vecs; j++) acc[i][j] = V(set1)(0);
    }
    FA_NO_UNROLL for (int64_t p = 0; p < depth; p++) {
        operand_vec b[GEMM_VECS];
        FA_UNROLL for (int j = 0; j < vecs; j++) {
            b[j] =
                tail && j == vecs - 1 ? OP(load_n)(B + j * LANES, tail) : OP(load)(B + j * LANES);
        }
        FA_UNROLL for (int i = 0; i < rows; i++) {
            operand_vec a = OP(broadcast)(A + i * a_row);
            FA_UNROLL for (int j = 0; j < vecs; j++) acc[i][j] = OP(dot)(a, b[j], acc[i][j]);
        }
        A += a_col;
        B += ldb;
    }
    FA_UNROLL for (int i = 0; i < rows; i++) {
        FA_UNROLL for (int j = 0; j < vecs; j++) {
            real *c = C + i * ldc + j * LANES;
            const int part = tail && j == vecs - 1;
            if (accumulate)
                acc[i][j] += part ? V(load_n)(c, tail) : V(load)(c);
            if (part)
                V(store_n)(c, acc[i][j], tail);
            else
                V(store)(c, acc[i][j]);
        }
    }
}

static void gemm(real *C, int64_t ldc, const operand *A, int64_t a_row, int64_t a_col,
                 const operand *B, int64_t ldb, int64_t rows, int64_t cols, int64_t depth,
                 int accumulate, struct fa_ahead *ahead) {
    for (int64_t j = 0; j < cols; j += GEMM_VECS * LANES) {
        const int64_t left = cols - j;
        const int vecs = left < GEMM_VECS * LANES ? (int)((left + LANES - 1) / LANES) : GEMM_VECS;
        const int tail = left < GEMM_VECS * LANES ? (int)(left % LANES) : 0;
        int step;
        for (int64_t i = 0; i < rows; i += step) {
            step = rows - i >= GEMM_ROWS ? GEMM_ROWS : rows - i >= 4 ? 4 : rows - i >= 2 ? 2 : 1;
            if (ahead)
                fa_fetch(ahead);
            real *c = C + i * ldc + j;
            const operand *a = A + i * a_row, *b = B + j;
#define CASE(ROWS, VECS)                                                                           \
    case 2 * (4 * ROWS + VECS):                                                                    \
        gemm_block(ROWS, VECS, 0, c, ldc, a, a_row, a_col, b, ldb, depth, accumulate);             \
        break;                                                                                     \
    case 2 * (4 * ROWS + VECS) + 1:                                                                \
        gemm_block(ROWS, VECS, tail, c, ldc, a, a_row, a_col, b, ldb, depth, accumulate);          \
        break;
#define CASES(VECS) CASE(1, VECS) CASE(2, VECS) CASE(4, VECS) CASE(GEMM_ROWS, VECS)
            switch (2 * (4 * step + vecs) + (tail != 0)) {
                CASES(1)
                CASES(2)
#if GEMM_VECS > 2
                CASES(3)
                CASES(4)
#endif
            }
        }
    }
}

#undef CASES
#undef CASE
