/* The FlashAttention backward for a share of one key head's keys (Dao et al. 2022, Algorithm 4):
 * P is rebuilt a tile at a time from Q, K and lse.
 *
 *     dV = P'^T dO               P' = dropout(P)
 *     dP' = dO V^T               dP = dropout(dP')
 *     dS = P * (dP - delta)      delta = rowsum(dO * O)
 *     dQ = scale * dS K,  dK = scale * dS^T Q
 *
 * A key tile stays while all queries of its group pass by, so that dK and dV are finished when it
 * is left. Gradients are summed in their own tensors where those hold reals, else in scratch; tasks
 * that share a head's keys need a buffer for dQ each, but for one. */

enum { T(sums_in_place) = sizeof(elem) == sizeof(real) };

struct T(backward_scratch) {
    operand *Qt, *dOt;      /* [D / DEPTH][ld], [Dv / DEPTH][ld] */
    real *S, *dP;           /* [block_n][ld]; they become P' and dS */
    real *edit;             /* [block_n][ld], a mask, then dropout */
    operand *pairs;         /* P' or dS, where operands are not reals */
    operand *Ka, *Va;       /* [block_n][operand_ld], where not in place; A of K Q^T and V dO^T */
    operand *Kb, *Qb, *dOb; /* panels, where not in place; B of dQ, dK and dV */
    real *dK, *dV;          /* [block_n][D, Dv in whole vectors], where not in place */
    real *lse;              /* [block_m] */
    real *delta;            /* [block_m] */
};

static size_t T(take_backward_scratch)(struct T(backward_scratch) * s, const struct fa_params *p,
                                       void *memory) {
    uintptr_t cursor = (uintptr_t)memory;
    const int64_t n = fa_round_up(fa_min(FA_BLOCK_N_BACKWARD, p->seq_k), 2);
    const int64_t ld = fa_round_up(fa_min(FA_BLOCK_M, p->seq_q), LANES);
    const int64_t d = p->head_dim, dv = p->head_dim_v;
    const int copies = !T(sums_in_place); /* then operands are in place, too */
#define TAKE(TYPE, COUNT) fa_take(&cursor, (size_t)(COUNT) * sizeof(TYPE))
    s->Qt = TAKE(operand, fa_div_up(d, DEPTH) * ld);
    s->dOt = TAKE(operand, fa_div_up(dv, DEPTH) * ld);
    s->S = TAKE(real, n * ld);
    s->dP = TAKE(real, n * ld);
    s->edit = TAKE(real, p->mask.data || p->dropout_p > 0 ? n * ld : 0);
    s->pairs = TAKE(operand, DEPTH > 1 ? n * ld / DEPTH : 0);
    s->Ka = TAKE(operand, copies * n * T(operand_ld)(d));
    s->Va = TAKE(operand, copies * n * T(operand_ld)(dv));
    s->Kb = TAKE(operand, copies * n / DEPTH * T(panel_ld)(d));
    s->Qb = TAKE(operand, copies * ld / DEPTH * T(panel_ld)(d));
    s->dOb = TAKE(operand, copies * ld / DEPTH * T(panel_ld)(dv));
    s->dK = TAKE(real, copies * n * fa_round_up(d, LANES));
    s->dV = TAKE(real, copies * n * fa_round_up(dv, LANES));
    s->lse = TAKE(real, ld);
    s->delta = TAKE(real, ld);
#undef TAKE
    return (size_t)(cursor - (uintptr_t)memory);
}

static size_t T(backward_scratch_bytes)(const struct fa_params *p) {
    struct T(backward_scratch) s;
    return T(take_backward_scratch)(&s, p, NULL);
}

static size_t T(backward_dq_bytes)(const struct fa_params *p) {
    const int64_t rows = fa_heads_per_group(p) * p->seq_q;
    return (size_t)fa_round_up(rows * fa_round_up(p->head_dim, LANES) * (int64_t)sizeof(real), 64);
}

/* lse and delta of each query. Lanes past the last query and rows that attend to nothing get an
 * infinite lse, which makes their P and dS zero. */
static void T(load_row_statistics)(const struct T(backward_scratch) * s, const struct fa_params *p,
                                   int64_t batch, const struct T(queries) * queries) {
    for (int r = 0; r < queries->ld; r++) {
        s->lse[r] = (real)INFINITY;
        s->delta[r] = 0;
        if (r >= queries->count)
            continue;
        const int64_t h = queries->head[r], i = queries->row[r];
        const real lse = ((const real *)p->lse)[(batch * p->heads_q + h) * p->seq_q + i];
        if (lse == (real)-INFINITY)
            continue;
        s->lse[r] = lse;
        const elem *O = T(at)(&p->out, batch, h, i), *dO = T(at)(&p->dout, batch, h, i);
        vec sum = V(set1)(0);
        int64_t d = 0;
        for (; d + LANES <= p->head_dim_v; d += LANES)
            sum = V(fma)(E(load)(O + d), E(load)(dO + d), sum);
        const int left = (int)(p->head_dim_v - d);
        if (left)
            sum = V(fma)(E(load_n)(O + d, left), E(load_n)(dO + d, left), sum);
        s->delta[r] = V(sum)(sum);
    }
}

/* S becomes P = exp(S * scale - lse) and dP becomes dS; with dropout, S becomes P'. P is at
 * most 1 also where scores are so large that lse has lost the difference. */
static void T(probabilities_and_dS)(real *S, real *dP, int keys, int ld, real scale,
                                    const real *lse, const real *delta, const real *keep) {
    const vec zero = V(set1)(0), negative_c = V(set1)(-scale);
    const vec negative_log2e = V(set1)((real)-FA_LOG2E);
    for (int r = 0; r < ld; r += LANES) {
        const vec lse_r = V(load)(lse + r), delta_r = V(load)(delta + r);
        for (int j = 0; j < keys; j += EXP2_VECS) {
            real *s = S + (int64_t)j * ld + r, *dp = dP + (int64_t)j * ld + r;
            const int n = (int)fa_min(EXP2_VECS, keys - j);
            vec P[EXP2_VECS];
            FA_UNROLL for (int u = 0; u < EXP2_VECS; u++) {
                /* past the last key, any of the tile */
                const vec x = V(load)(s + (u < n ? u : 0) * ld);
                P[u] = V(max)(zero, V(fma)(x, negative_c, lse_r)) * negative_log2e;
            }
            exp2_vecs(P);
            FA_UNROLL for (int u = 0; u < EXP2_VECS; u++) {
                if (u >= n)
                    break;
                vec dPu = V(load)(dp + u * ld);
                if (keep) {
                    const vec kept = V(load)(keep + (int64_t)(j + u) * ld + r);
                    dPu = dPu * kept;
                    V(store)(s + u * ld, P[u] * kept);
                } else {
                    V(store)(s + u * ld, P[u]);
                }
                V(store)(dp + u * ld, P[u] * (dPu - delta_r));
            }
        }
    }
}

/* Rows of a gradient that is being summed. */
struct T(sums) {
    real *rows;
    int64_t ld;
};

/* Rows i, i + 1, ... of a gradient: in a buffer, or in the tensor itself. */
static struct T(sums) T(sums_of)(const struct fa_tensor *grad, int64_t b, int64_t h, int64_t i,
                                 int64_t cols, real *buffer) {
    if (buffer)
        return (struct T(sums)){buffer, fa_round_up(cols, LANES)};
    return (struct T(sums)){(real *)T(at)(grad, b, h, i), grad->stride_row};
}

static void T(clear_sums)(struct T(sums) sums, int64_t count, int64_t cols) {
    for (int64_t r = 0; r < count; r++)
        memset(sums.rows + r * sums.ld, 0, (size_t)cols * sizeof(real));
}

/* Rows i, i + 1, ... of a gradient = scale * the sum of `buffers` buffers, `size` reals each, and
 * of what is there already if one of the sums was made in place. */
static void T(store_gradient)(const struct fa_tensor *grad, int64_t b, int64_t h, int64_t i,
                              int64_t count, int64_t cols, const real *buffer, int64_t size,
                              int buffers, real scale) {
    const int64_t ld = fa_round_up(cols, LANES);
    for (int64_t r = 0; r < count; r++) {
        elem *row = T(at)(grad, b, h, i + r);
        for (int64_t d = 0; d < cols; d += LANES) {
            const int n = (int)fa_min(LANES, cols - d);
            vec sum = V(set1)(0);
            if (T(sums_in_place))
                sum = n < LANES ? E(load_n)(row + d, n) : E(load)(row + d);
            for (int x = 0; x < buffers; x++)
                sum = sum + V(load)(buffer + x * size + r * ld + d);
            sum = sum * V(set1)(scale);
            if (n < LANES)
                E(store_n)(row + d, sum, n);
            else
                E(store)(row + d, sum);
        }
    }
}

/* A tile of keys: its gradients, and its operands: K and V as A of K Q^T and V dO^T, K as B of
 * dS K. */
struct T(key_tile) {
    int64_t key, keys;
    struct T(sums) dK, dV;
    const operand *Ka, *Va, *Kb;
    int64_t ld_ka, ld_va, ld_kb;
    int64_t cols_kb;
};

/* One tile of queries, all of one head, against the keys [skip, skip + keys) of a key tile. */
static void T(backward_tile)(const struct T(backward_scratch) * s, const struct fa_params *p,
                             int64_t batch, const struct T(queries) * queries,
                             const struct T(key_tile) * tile, int64_t skip, int keys,
                             struct T(sums) dQ) {
    const int ld = queries->ld;
    const int64_t h = queries->head[0], i = queries->row[0], key = tile->key + skip;
    T(transpose_operand)(s->Qt, &p->q, batch, queries, p->head_dim);
    T(transpose_operand)(s->dOt, &p->dout, batch, queries, p->head_dim_v);
    T(load_row_statistics)(s, p, batch, queries);

    gemm(s->S, ld, tile->Ka + skip * tile->ld_ka, tile->ld_ka, 1, s->Qt, ld, keys, ld,
         fa_div_up(p->head_dim, DEPTH), 0, NULL);
    gemm(s->dP, ld, tile->Va + skip * tile->ld_va, tile->ld_va, 1, s->dOt, ld, keys, ld,
         fa_div_up(p->head_dim_v, DEPTH), 0, NULL);

    real scale = (real)p->scale;
    if (p->mask.data || T(window_cuts)(p, queries, key, keys)) {
        if (p->mask.data)
            T(load_mask)(s->edit, p, batch, queries, key, keys);
        T(edit_scores)(s->S, p, queries, key, keys, scale, p->mask.data ? s->edit : NULL);
        scale = 1;
    }
    if (p->dropout_p > 0)
        T(draw_dropout)(s->edit, p, batch, queries, key, keys);
    T(probabilities_and_dS)(s->S, s->dP, keys, ld, scale, s->lse, s->delta,
                            p->dropout_p > 0 ? s->edit : NULL);
    const real *P = s->S, *dS = s->dP;

    if (p->dmask.data)
        T(add_mask_gradient)(p, batch, queries, key, keys, dS);
    if (p->dv.data) {
        int64_t ldb, cols = p->head_dim_v;
        const operand *dO = T(panel_operand)(T(at)(&p->dout, batch, h, i), p->dout.stride_row,
                                             queries->count, &cols, s->dOb, &ldb);
        gemm(tile->dV.rows + skip * tile->dV.ld, tile->dV.ld,
             T(sum_over_queries)(P, keys, ld, s->pairs), ld / DEPTH, 1, dO, ldb, keys, cols,
             fa_div_up(queries->count, DEPTH), 1, NULL);
    }
    if (p->dk.data) {
        int64_t ldb, cols = p->head_dim;
        const operand *Q = T(panel_operand)(T(at)(&p->q, batch, h, i), p->q.stride_row,
                                            queries->count, &cols, s->Qb, &ldb);
        gemm(tile->dK.rows + skip * tile->dK.ld, tile->dK.ld,
             T(sum_over_queries)(dS, keys, ld, s->pairs), ld / DEPTH, 1, Q, ldb, keys, cols,
             fa_div_up(queries->count, DEPTH), 1, NULL);
    }
    if (p->dq.data)
        gemm(dQ.rows, dQ.ld, T(sum_over_keys)(dS, keys, ld, s->pairs), 1, ld,
             tile->Kb + skip / DEPTH * tile->ld_kb, tile->ld_kb, queries->count, tile->cols_kb,
             fa_div_up(keys, DEPTH), 1, NULL);
}

/* Rows i, i + 1, ... of query head g of a group. */
static struct T(sums)
    T(dq_sums)(const struct fa_params *p, const struct fa_key_share *share, int64_t g, int64_t i) {
    real *buffer = share->dq;
    if (buffer)
        buffer += (g * p->seq_q + i) * fa_round_up(p->head_dim, LANES);
    const int64_t head = share->head_k * fa_heads_per_group(p) + g;
    return T(sums_of)(&p->dq, share->batch, head, i, p->head_dim, buffer);
}

static void T(backward_keys)(const struct fa_params *p, const struct fa_key_share *share,
                             void *scratch) {
    struct T(backward_scratch) s;
    T(take_backward_scratch)(&s, p, scratch);
    const int64_t b = share->batch, hk = share->head_k, group = fa_heads_per_group(p);
    const int copies = !T(sums_in_place);
    for (int64_t g = 0; g < group && p->dq.data; g++)
        T(clear_sums)(T(dq_sums)(p, share, g, 0), p->seq_q, p->head_dim);

    for (int64_t first = share->first_tile * FA_BLOCK_N_BACKWARD; first < p->seq_k;
         first += share->step * FA_BLOCK_N_BACKWARD) {
        struct T(key_tile) tile = {.key = first,
                                   .keys = fa_min(FA_BLOCK_N_BACKWARD, p->seq_k - first),
                                   .cols_kb = p->head_dim};
        const elem *K = T(at)(&p->k, b, hk, first), *V = T(at)(&p->v, b, hk, first);
        tile.Ka = T(rows_operand)(K, p->k.stride_row, tile.keys, p->head_dim, s.Ka, &tile.ld_ka);
        tile.Va = T(rows_operand)(V, p->v.stride_row, tile.keys, p->head_dim_v, s.Va, &tile.ld_va);
        tile.Kb = T(panel_operand)(K, p->k.stride_row, tile.keys, &tile.cols_kb, s.Kb, &tile.ld_kb);
        if (p->dk.data) {
            tile.dK = T(sums_of)(&p->dk, b, hk, first, p->head_dim, copies ? s.dK : NULL);
            T(clear_sums)(tile.dK, tile.keys, p->head_dim);
        }
        if (p->dv.data) {
            tile.dV = T(sums_of)(&p->dv, b, hk, first, p->head_dim_v, copies ? s.dV : NULL);
            T(clear_sums)(tile.dV, tile.keys, p->head_dim_v);
        }

        for (int64_t g = 0; g < group; g++) {
            for (int64_t i = 0; i < p->seq_q; i += FA_BLOCK_M) {
                struct T(queries) queries;
                T(find_queries)(&queries, p, hk, g * p->seq_q + i,
                                (int)fa_min(FA_BLOCK_M, p->seq_q - i));
                /* The keys of the tile that some query sees, from an even one on: operands can be
                 * pairs of keys. */
                const int64_t last = i + queries.count - 1;
                const int64_t skip = fa_max(fa_key_begin(p, i) - first, 0) / 2 * 2;
                const int64_t end = fa_min(fa_key_end(p, last) - first, tile.keys);
                if (skip >= end)
                    continue;
                struct T(sums) dQ = {0};
                if (p->dq.data)
                    dQ = T(dq_sums)(p, share, g, i);
                T(backward_tile)(&s, p, b, &queries, &tile, skip, (int)(end - skip), dQ);
            }
        }
        if (p->dk.data)
            T(store_gradient)(&p->dk, b, hk, first, tile.keys, p->head_dim, s.dK, 0, copies,
                              (real)p->scale);
        if (p->dv.data && copies)
            T(store_gradient)(&p->dv, b, hk, first, tile.keys, p->head_dim_v, s.dV, 0, copies, 1);
    }
}

static void T(backward_store_dq)(const struct fa_params *p, int64_t batch, int64_t head_k,
                                 int64_t begin, int64_t end, const void *buffers, int count) {
    const int64_t ld = fa_round_up(p->head_dim, LANES), group = fa_heads_per_group(p);
    const int64_t size = (int64_t)(T(backward_dq_bytes)(p) / sizeof(real));
    for (int64_t row = begin; row < end;) { /* a head at a time */
        const int64_t i = row % p->seq_q, rows = fa_min(p->seq_q - i, end - row);
        T(store_gradient)(&p->dq, batch, head_k * group + row / p->seq_q, i, rows, p->head_dim,
                          (const real *)buffers + row * ld, size, count, (real)p->scale);
        row += rows;
    }
}
