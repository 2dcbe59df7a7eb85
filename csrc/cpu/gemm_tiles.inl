/* The product of gemm.inl on tile registers (isa/amx.h), which hold 16 rows of 16 operands or
 * reals.
 *
 * Tiles are always whole. Rows of B and C are padded to whole vectors wherever they lie. Where A
 * ends within a tile or is read by columns (a_row is 1, the rows padded to whole vectors then),
 * GEMM_ROWS rows of it are copied together first; so is the end of B. */

enum {
    TILE = LANES,      /* rows of a tile, and what is in one */
    PANEL_DEPTH = 128, /* operands of a row of A that are copied at a time */
};

/* dst[i][p] = A[i * a_row + p * a_col], with zeros up to a whole tile in p. Past the last row
 * anything will do. */
static void pack_rows(operand *dst, int64_t ld, const operand *A, int64_t a_row, int64_t a_col,
                      int64_t rows, int64_t depth) {
    for (int64_t i = 0; i < rows; i += TILE) {
        for (int64_t p = 0; p < depth; p += TILE) {
            const int64_t left = fa_min(TILE, depth - p);
            vec x[TILE]; /* bits */
            if (a_col == 1) {
                for (int64_t r = 0; r < TILE; r++) {
                    const operand *row = A + fa_min(i + r, rows - 1) * a_row + p;
                    x[r] = (vec)OP(load_n)(row, (int)left);
                }
            } else {
                for (int64_t c = 0; c < TILE; c++)
                    x[c] = c < left ? (vec)OP(load)(A + i + (p + c) * a_col) : V(set1)(0);
                V(transpose)(x);
            }
            for (int64_t r = 0; r < TILE; r++)
                memcpy(dst + (i + r) * ld + p, &x[r], sizeof(vec));
        }
    }
}

/* C += A B of one tile's depth: tiles 0 to 3 are C, 4 and 5 A, 6 and 7 B. */
FA_ALWAYS_INLINE void multiply_tiles(const int tall, const int wide, const operand *A, int64_t lda,
                                     const operand *B, int64_t ldb) {
    const int64_t a_stride = lda * (int64_t)sizeof(operand);
    const int64_t b_stride = ldb * (int64_t)sizeof(operand);
    tile_load(6, B, b_stride);
    tile_load(4, A, a_stride);
    tile_dot(0, 4, 6);
    if (wide) {
        tile_load(7, B + TILE, b_stride);
        tile_dot(1, 4, 7);
    }
    if (tall) {
        tile_load(5, A + TILE * lda, a_stride);
        tile_dot(2, 5, 6);
    }
    if (tall && wide)
        tile_dot(3, 5, 7);
}

/* One tile of C, or two if it is tall or wide, or four. */
FA_ALWAYS_INLINE void gemm_block(const int tall, const int wide, real *C, int64_t ldc,
                                 const operand *A, int64_t lda, const operand *B, int64_t ldb,
                                 int64_t depth, int accumulate) {
    const int64_t stride = ldc * (int64_t)sizeof(real);
    real *below = C + TILE * ldc;
#define EACH_TILE(DO)                                                                              \
    DO(0, C);                                                                                      \
    if (wide)                                                                                      \
        DO(1, C + TILE);                                                                           \
    if (tall)                                                                                      \
        DO(2, below);                                                                              \
    if (tall && wide)                                                                              \
        DO(3, below + TILE);
#define ZERO(X, P) tile_zero(X)
#define LOAD(X, P) tile_load(X, P, stride)
#define STORE(X, P) tile_store(X, P, stride)
    if (accumulate) {
        EACH_TILE(LOAD)
    } else {
        EACH_TILE(ZERO)
    }
    int64_t p = 0;
    FA_NO_UNROLL for (; p + TILE <= depth; p += TILE)
        multiply_tiles(tall, wide, A + p, lda, B + p * ldb, ldb);
    if (p < depth) {
        _Alignas(64) operand end[TILE * 2 * TILE];
        for (int64_t x = 0; x < TILE; x++) {
            for (int j = 0; j <= wide; j++) {
                const vec b =
                    p + x < depth ? (vec)OP(load)(B + (p + x) * ldb + j * TILE) : V(set1)(0);
                memcpy(end + (x * 2 + j) * TILE, &b, sizeof b);
            }
        }
        multiply_tiles(tall, wide, A + p, lda, end, 2 * TILE);
    }
    EACH_TILE(STORE)
#undef STORE
#undef LOAD
#undef ZERO
#undef EACH_TILE
}

static void copy_block(real *dst, int64_t ld_dst, const real *src, int64_t ld_src, int64_t rows,
                       int wide) {
    for (int64_t i = 0; i < rows; i++)
        memcpy(dst + i * ld_dst, src + i * ld_src, (size_t)(1 + wide) * sizeof(vec));
}

static void gemm(real *C, int64_t ldc, const operand *A, int64_t a_row, int64_t a_col,
                 const operand *B, int64_t ldb, int64_t rows, int64_t cols, int64_t depth,
                 int accumulate, struct fa_ahead *ahead) {
    _Alignas(64) operand panel[GEMM_ROWS * PANEL_DEPTH];
    _Alignas(64) real block[GEMM_ROWS * 2 * TILE];
    int64_t first = 0;
    do {
        const int64_t part = fa_min(PANEL_DEPTH, depth - first);
        for (int64_t i = 0; i < rows; i += GEMM_ROWS) {
            const int64_t m = fa_min(GEMM_ROWS, rows - i);
            const operand *a = A + i * a_row + first * a_col;
            int64_t lda = a_row;
            if (ahead)
                fa_fetch(ahead);
            if (a_col != 1 || m % TILE || part % TILE) {
                lda = fa_round_up(part, TILE);
                pack_rows(panel, lda, a, a_row, a_col, m, part);
                a = panel;
            }
            for (int64_t j = 0; j < cols; j += 2 * TILE) {
                const int tall = m > TILE, wide = cols - j > TILE;
                const operand *b = B + first * ldb + j;
                const int whole = m % TILE == 0;
                real *const there = C + i * ldc + j, *c = whole ? there : block;
                const int64_t ld = whole ? ldc : 2 * TILE;
                if (!whole && accumulate)
                    copy_block(block, ld, there, ldc, m, wide);
                if (tall && wide)
                    gemm_block(1, 1, c, ld, a, lda, b, ldb, part, accumulate);
                else if (tall)
                    gemm_block(1, 0, c, ld, a, lda, b, ldb, part, accumulate);
                else if (wide)
                    gemm_block(0, 1, c, ld, a, lda, b, ldb, part, accumulate);
                else
                    gemm_block(0, 0, c, ld, a, lda, b, ldb, part, accumulate);
                if (!whole)
                    copy_block(there, ldc, block, ld, m, wide);
            }
        }
        first += part;
        accumulate = 1;
    } while (first < depth);
}
