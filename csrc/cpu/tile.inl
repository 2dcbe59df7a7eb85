/* What the forward and the backward do to a tile: read it as gemm operands, edit its scores, draw
 * its dropout. Score tiles are transposed, [keys][queries], so that a row maximum, a row sum and
 * everything else that belongs to a query is one lane, and no shuffle is needed. */

FA_ALWAYS_INLINE elem *T(at)(const struct fa_tensor *t, int64_t b, int64_t h, int64_t i) {
    return (elem *)t->data + b * t->stride_batch + h * t->stride_head + i * t->stride_row;
}

/* Rows [i, i + rows) of a tensor, to be fetched in `steps` steps. */
static struct fa_ahead T(rows_ahead)(const struct fa_tensor *t, int64_t b, int64_t h, int64_t i,
                                     int64_t rows, int64_t cols, int64_t steps) {
    return (struct fa_ahead){
        .row = rows ? (const char *)T(at)(t, b, h, i) : NULL,
        .stride = t->stride_row * (int64_t)sizeof(elem),
        .bytes = cols * (int64_t)sizeof(elem),
        .rows = rows,
        .step = fa_div_up(rows, steps),
    };
}

/* The queries of a tile, each with the head it belongs to. */
struct T(queries) {
    int count, ld; /* ld: count rounded up to whole vectors, the row length of a score tile */
    int64_t head[FA_BLOCK_M], row[FA_BLOCK_M];
};

/* `count` rows of a group, from row `first` on. */
static void T(find_queries)(struct T(queries) * queries, const struct fa_params *p, int64_t head_k,
                            int64_t first, int count) {
    queries->count = count;
    queries->ld = (int)fa_round_up(count, LANES);
    for (int r = 0; r < count; r++) {
        queries->head[r] = head_k * fa_heads_per_group(p) + (first + r) / p->seq_q;
        queries->row[r] = (first + r) % p->seq_q;
    }
}

/* --- operands --- */

/* The operands of columns 0 .. cols - 1 of one row, padded with zeros to whole operands. */
FA_ALWAYS_INLINE void T(convert_row)(operand *dst, const elem *src, int64_t cols) {
    for (int64_t d = 0; d < cols; d += LANES) {
        const int n = (int)fa_min(LANES, cols - d);
        vec x = n < LANES ? E(load_n)(src + d, n) : E(load)(src + d);
#if DEPTH == 2
        OP(store_row)(dst + d / 2, x);
#else
        V(store)(dst + d, x);
#endif
    }
}

/* Row length of a converted tile, in operands. */
static int64_t T(operand_ld)(int64_t cols) {
    return fa_round_up(cols, LANES) / DEPTH;
}

/* Whether rows can be read as the operand A of a sum over their columns, as they are. */
static int T(are_operands)(const struct fa_tensor *t, int64_t cols) {
    return sizeof(elem) * DEPTH == sizeof(operand) && cols % DEPTH == 0 &&
           t->stride_row % DEPTH == 0;
}

/* Whether rows follow each other without a gap, or are few. Others are scattered over many pages
 * and over few sets of a cache: what is used often is better copied together first. */
static int T(are_together)(const struct fa_tensor *t, int64_t rows, int64_t cols) {
    return t->stride_row == cols || rows <= LANES;
}

/* Rows as the operand A of a sum over their columns, converted into scratch
 * [rows][operand_ld(cols)]; in place where that is NULL. */
static const operand *T(rows_operand)(const elem *src, int64_t stride, int64_t rows, int64_t cols,
                                      operand *scratch, int64_t *ld) {
    if (!scratch) {
        *ld = stride / DEPTH;
        return (const operand *)src;
    }
    *ld = T(operand_ld)(cols);
    for (int64_t i = 0; i < rows; i++)
        T(convert_row)(scratch + i * *ld, src + i * stride, cols);
    return scratch;
}

/* Row length of a panel, in operands. */
static int64_t T(panel_ld)(int64_t cols) {
    return fa_round_up(cols, LANES);
}

/* Rows as the operand B of a sum over the rows, in scratch [ceil(rows / DEPTH)][panel_ld(cols)]; in
 * place where that is NULL. */
static const operand *T(panel_operand)(const elem *src, int64_t stride, int64_t rows, int64_t cols,
                                       operand *scratch, int64_t *ld) {
#if DEPTH == 1
    return T(rows_operand)(src, stride, rows, cols, scratch, ld);
#else
    *ld = T(panel_ld)(cols);
    for (int64_t i = 0; i < rows; i += 2) {
        const elem *lo = src + i * stride, *hi = i + 1 < rows ? lo + stride : NULL;
        for (int64_t d = 0; d < cols; d += LANES)
            OP(store_rows)(scratch + i / 2 * *ld + d, lo + d, hi ? hi + d : NULL,
                           (int)fa_min(LANES, cols - d));
    }
    return scratch;
#endif
}

/* The first LANES operands of a row of `cols` columns, as bits; zeros past its end. */
FA_ALWAYS_INLINE vec T(load_operands)(const elem *src, int64_t cols) {
#if DEPTH == 1
    return cols < LANES ? E(load_n)(src, (int)cols) : E(load)(src);
#else
    operand line[LANES] = {0};
    if (cols >= LANES * DEPTH)
        memcpy(line, src, sizeof line);
    else
        T(convert_row)(line, src, cols);
    vec x;
    memcpy(&x, line, sizeof x);
    return x;
#endif
}

/* The transpose of a query tile as the operand B of a sum over columns: dst[p][r], with zeros for
 * the lanes past the last query. */
static void T(transpose_operand)(operand *dst, const struct fa_tensor *src, int64_t batch,
                                 const struct T(queries) * queries, int64_t cols) {
    const int64_t depth = fa_div_up(cols, DEPTH);
    for (int first = 0; first < queries->ld; first += LANES) {
        const int rows = (int)fa_min(LANES, queries->count - first);
        const elem *row[LANES];
        for (int r = 0; r < rows; r++)
            row[r] = T(at)(src, batch, queries->head[first + r], queries->row[first + r]);
        for (int64_t p = 0; p < depth; p += LANES) {
            const int64_t left = cols - p * DEPTH;
            vec block[LANES]; /* moved about as bits, whatever the operand is */
            if (rows == LANES && left >= LANES * DEPTH) {
                FA_UNROLL for (int r = 0; r < LANES; r++) {
                    block[r] = T(load_operands)(row[r] + p * DEPTH, LANES * DEPTH);
                }
            } else {
                for (int r = 0; r < LANES; r++)
                    block[r] = r < rows ? T(load_operands)(row[r] + p * DEPTH, left) : V(set1)(0);
            }
            V(transpose)(block);
            for (int64_t x = 0; x < fa_min(LANES, depth - p); x++)
                memcpy(dst + (p + x) * queries->ld + first, &block[x], sizeof(vec));
        }
    }
}

/* --- scores --- */

/* line[j] = what the mask adds at element x + j * stride_col, for j < n; a value of the mask for
 * every lane. */
FA_ALWAYS_INLINE vec T(mask_line)(const struct fa_params *p, int64_t x, int n) {
    const struct fa_mask *mask = &p->mask;
    const int64_t stride = mask->stride_col;
    real line[LANES] = {0};
    if (mask->dtype == FA_BOOL) {
        const uint8_t *value = (const uint8_t *)mask->data + x;
        if (stride == 1 && n == LANES)
            return V(hide)(value);
        for (int j = 0; j < n; j++)
            line[j] = value[j * stride] ? 0 : (real)-INFINITY;
    } else if (mask->dtype == FA_FLOAT32 && p->dtype != FA_FLOAT32) {
        const float *value = (const float *)mask->data + x;
        for (int j = 0; j < n; j++)
            line[j] = (real)value[j * stride];
    } else {
        const elem *value = (const elem *)mask->data + x;
        if (stride == 1)
            return n < LANES ? E(load_n)(value, n) : E(load)(value);
        for (int j = 0; j < n; j++)
            line[j] = E(load_n)(value + j * stride, 1)[0];
    }
    return V(load)(line);
}

/* S = S * scale + mask. */
static void T(add_mask)(real *S, const struct fa_params *p, int64_t batch,
                        const struct T(queries) * queries, int64_t key, int keys, real scale) {
    const struct fa_mask *mask = &p->mask;
    for (int first = 0; first < queries->ld; first += LANES) {
        int64_t start[LANES];
        const int rows = (int)fa_min(LANES, queries->count - first);
        for (int r = 0; r < rows; r++)
            start[r] = batch * mask->stride_batch + queries->head[first + r] * mask->stride_head +
                       queries->row[first + r] * mask->stride_row + key * mask->stride_col;
        for (int j = 0; j < keys; j += LANES) {
            const int n = (int)fa_min(LANES, keys - j);
            vec block[LANES];
            for (int r = 0; r < LANES; r++)
                block[r] =
                    r < rows ? T(mask_line)(p, start[r] + j * mask->stride_col, n) : V(set1)(0);
            V(transpose)(block);
            for (int x = 0; x < n; x++) {
                real *s = S + (j + x) * queries->ld + first;
                V(store)(s, V(fma)(V(load)(s), V(set1)(scale), block[x]));
            }
        }
    }
}

/* Row `row` of the gradient of a mask, from key `key` on: += or, if it is written in the type of
 * elements, = dS of n keys. */
FA_ALWAYS_INLINE void T(put_mask_gradient)(const struct fa_mask_grad *grad, int64_t row,
                                           int64_t key, vec dS, int n) {
    const int64_t x = row + key * grad->stride_col;
    if (grad->in_dtype) {
        elem *to = (elem *)grad->data + x;
        if (n < LANES)
            E(store_n)(to, dS, n);
        else
            E(store)(to, dS);
        return;
    }
    real *to = (real *)grad->data + x;
    if (grad->stride_col != 1) {
        for (int j = 0; j < n; j++)
            to[j * grad->stride_col] += dS[j];
    } else if (n < LANES) {
        V(store_n)(to, V(load_n)(to, n) + dS, n);
    } else {
        V(store)(to, V(load)(to) + dS);
    }
}

/* Zeros for the queries that do not see these keys, where the gradient is not summed up. */
static void T(clear_mask_gradient)(const struct fa_params *p, int64_t batch, int64_t head_k,
                                   int64_t key, int64_t keys) {
    const struct fa_mask_grad *grad = &p->dmask;
    const int64_t group = fa_heads_per_group(p);
    for (int64_t h = head_k * group; h < (head_k + 1) * group; h++) {
        for (int64_t i = 0; i < p->seq_q; i++)
            memset((elem *)grad->data + batch * grad->stride_batch + h * grad->stride_head +
                       i * grad->stride_row + key,
                   0, (size_t)keys * sizeof(elem));
    }
}

/* What dS of a tile, [keys][ld], is to the gradient of the mask. */
static void T(mask_gradient)(const struct fa_params *p, int64_t batch,
                             const struct T(queries) * queries, int64_t key, int keys,
                             const real *dS) {
    const struct fa_mask_grad *grad = &p->dmask;
    for (int first = 0; first < queries->ld; first += LANES) {
        const int rows = (int)fa_min(LANES, queries->count - first);
        for (int j = 0; j < keys; j += LANES) {
            const int n = (int)fa_min(LANES, keys - j);
            vec block[LANES];
            for (int x = 0; x < LANES; x++)
                block[x] = x < n ? V(load)(dS + (j + x) * queries->ld + first) : V(set1)(0);
            V(transpose)(block);
            for (int r = 0; r < rows; r++) {
                const int64_t row = batch * grad->stride_batch +
                                    queries->head[first + r] * grad->stride_head +
                                    queries->row[first + r] * grad->stride_row;
                T(put_mask_gradient)(grad, row, key + j, block[r], n);
            }
        }
    }
}

/* S = S * scale, minus infinity outside the window. */
static void T(cut_window)(real *S, const struct fa_params *p, const struct T(queries) * queries,
                          int64_t key, int keys, real scale) {
    const int ld = queries->ld;
    /* Query r sees the keys first[r] .. last[r] of this tile. Small whole numbers, exact as reals.
     */
    real first[FA_BLOCK_M], last[FA_BLOCK_M];
    for (int r = 0; r < ld; r++) {
        const int64_t i = queries->row[r < queries->count ? r : 0];
        first[r] = (real)fa_max(0, fa_min(fa_key_begin(p, i) - key, keys));
        last[r] = (real)fa_max(-1, fa_min(fa_key_end(p, i) - 1 - key, keys - 1));
    }
    for (int j = 0; j < keys; j++) {
        for (int r = 0; r < ld; r += LANES) {
            real *s = S + j * ld + r;
            const vec x = V(load)(s) * V(set1)(scale);
            V(store)(s,
                     V(where_between)(x, V(set1)((real)j), V(load)(first + r), V(load)(last + r)));
        }
    }
}

/* Whether some query of the tile does not see all of the keys [key, key + keys). */
static int T(window_cuts)(const struct fa_params *p, const struct T(queries) * queries, int64_t key,
                          int keys) {
    if (!fa_is_windowed(p))
        return 0;
    for (int r = 0; r < queries->count; r++) {
        const int64_t i = queries->row[r];
        if (fa_key_begin(p, i) > key || fa_key_end(p, i) < key + keys)
            return 1;
    }
    return 0;
}

/* Whether edit_scores scales every tile: a mask is added to scaled scores, the maximum of scores is
 * not that of scaled ones unless the scale is positive, and minus infinity stays what it is. */
static int T(scales_early)(const struct fa_params *p) {
    return p->mask.data || !(p->scale > 0);
}

/* What scores have to be multiplied by after edit_scores. */
static real T(score_scale)(const struct fa_params *p) {
    return T(scales_early)(p) ? 1 : (real)p->scale;
}

/* The mask and the window of a tile. */
static void T(edit_scores)(real *S, const struct fa_params *p, int64_t batch,
                           const struct T(queries) * queries, int64_t key, int keys) {
    const int scales = T(scales_early)(p) && !p->mask.data;
    if (p->mask.data)
        T(add_mask)(S, p, batch, queries, key, keys, (real)p->scale);
    if (scales || T(window_cuts)(p, queries, key, keys))
        T(cut_window)(S, p, queries, key, keys, scales ? (real)p->scale : 1);
}

/* --- dropout --- */

/* keep[j][r] = 1 / (1 - p) where the probability of query r and key `key + j` is kept, else 0.
 * dropout.h says which are; one Philox output serves four keys of a query here. */
static void T(draw_dropout)(real *keep, const struct fa_params *p, int64_t batch,
                            const struct T(queries) * queries, int64_t key, int keys) {
    const uint32_t threshold = fa_dropout_threshold(p->dropout_p);
    const real scale = p->dropout_p < 1 ? (real)(1 / (1 - p->dropout_p)) : 0;
    const uint32_t key0 = (uint32_t)p->rng_state[0], key1 = (uint32_t)(p->rng_state[0] >> 32);
    const uint32_t offset = (uint32_t)p->rng_state[1];
    const int ld = queries->ld;
    uint32_t row_counter[FA_BLOCK_M] = {0}, head_counter[FA_BLOCK_M] = {0};
    uint32_t half[FA_BLOCK_M] = {0}; /* words 0 and 1, or 2 and 3 */
    for (int r = 0; r < queries->count; r++) {
        const int64_t i = queries->row[r];
        row_counter[r] = (uint32_t)(i >> 4 << 3 | (i & 7));
        head_counter[r] = (uint32_t)(batch * p->heads_q + queries->head[r]);
        half[r] = (uint32_t)(i >> 3 & 1);
    }
    const int64_t begin = key / 16 * 16, end = key + keys;
    for (int64_t block = begin; block < end; block += 16) {
        for (int pair = 0; pair < 4; pair++) {
            uint32_t words[2][FA_BLOCK_M]; /* this query's: columns j, j + 1 and j + 8, j + 9 */
            for (int r = 0; r < ld; r++) {
                uint32_t x[4] = {row_counter[r], (uint32_t)(block / 16 * 4 + pair), head_counter[r],
                                 offset};
                fa_philox(x, key0, key1);
                words[0][r] = half[r] ? x[2] : x[0];
                words[1][r] = half[r] ? x[3] : x[1];
            }
            for (int n = 0; n < 4; n++) {
                const int64_t j = block + 2 * pair + 8 * (n >> 1) + (n & 1) - key;
                if (j < 0 || j >= keys)
                    continue;
                for (int r = 0; r < ld; r++) {
                    const uint32_t half = words[n >> 1][r] >> 16 * (n & 1);
                    keep[j * ld + r] = fa_dropout_keeps(half, threshold) ? scale : 0;
                }
            }
        }
    }
}
