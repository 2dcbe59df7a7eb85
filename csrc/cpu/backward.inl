/* The FlashAttention backward for a share of one key head's keys (Dao et al. 2022, Algorithm 4):
 * P is rebuilt a tile at a time from Q, K and lse.
 *
 *     dV = P'^T dO               P' = dropout(P)
 *     dP' = dO V^T               dP = dropout(dP')
 *     dS = P * (dP - delta)      delta = rowsum(dO * O)
 *     dQ = scale * dS K,  dK = scale * dS^T Q
 *
 * A key tile stays while all queries of its group pass by, so that dK and dV are finished when it
 * is left. Gradients of rows that lie together are summed in their own tensors where those hold
 * reals, others in scratch, for which tasks that share a head's keys need a buffer for dQ each.
 *
 * Heads often lie side by side, so that a page of a gradient has rows of many. Tasks therefore
 * begin at different keys: else all threads touch a new page at the same time, and the operating
 * system fills it once for each. */

enum { T(sums_in_place) = sizeof(elem) == sizeof(real) };

struct T(backward_scratch) {
    operand *Qt, *dOt; /* [D / DEPTH][ld], [Dv / DEPTH][ld] */
    real *S, *dP;      /* [block_n][ld] */
    real *keep;        /* [block_n][ld], dropout */
    operand *P, *dS;   /* [block_n][ld / DEPTH], in place of S and dP where operands are reals */
    operand *dS_keys;  /* [block_n / DEPTH][ld], dS for a sum over keys, likewise */
    operand *Ka, *Va;  /* [block_n][operand_ld]; A of K Q^T and V dO^T; NULL: in place */
    operand *Kb, *Qb, *dOb; /* panels; B of dQ, dK and dV, likewise */
    real *dK, *dV;          /* [block_n][D, Dv in whole vectors], likewise */
    real *lse, *delta;      /* [Hq / Hk][statistics_ld] */
};

static int T(dq_in_place)(const struct fa_params *p) {
    return T(sums_in_place) && T(are_together)(&p->dq, p->seq_q, p->head_dim);
}

static int64_t T(statistics_ld)(const struct fa_params *p) {
    return fa_round_up(p->seq_q, LANES);
}

static size_t T(take_backward_scratch)(struct T(backward_scratch) * s, const struct fa_params *p,
                                       void *memory) {
    uintptr_t cursor = (uintptr_t)memory;
    const int64_t n = fa_round_up(fa_min(FA_BLOCK_N_BACKWARD, p->seq_k), 2);
    const int64_t ld = fa_round_up(fa_min(FA_BLOCK_M, p->seq_q), LANES);
    const int64_t d = p->head_dim, dv = p->head_dim_v;
#define TAKE(TYPE, COUNT) fa_take(&cursor, (size_t)(COUNT) * sizeof(TYPE))
    s->Qt = TAKE(operand, fa_div_up(d, DEPTH) * ld);
    s->dOt = TAKE(operand, fa_div_up(dv, DEPTH) * ld);
    s->S = TAKE(real, n * ld);
    s->dP = TAKE(real, n * ld);
    s->keep = TAKE(real, p->dropout_p > 0 ? n * ld : 0);
    s->P = DEPTH > 1 ? TAKE(operand, n * ld / DEPTH) : (operand *)s->S;
    s->dS = DEPTH > 1 ? TAKE(operand, n * ld / DEPTH) : (operand *)s->dP;
    s->dS_keys = DEPTH > 1 ? TAKE(operand, n * ld / DEPTH) : s->dS;
    const int copies_k = !T(are_operands)(&p->k, d) || !T(are_together)(&p->k, n, d);
    const int copies_v = !T(are_operands)(&p->v, dv) || !T(are_together)(&p->v, n, dv);
    const int copies_q = DEPTH > 1 || !T(are_operands)(&p->q, d) || !T(are_together)(&p->q, ld, d);
    const int copies_do =
        DEPTH > 1 || !T(are_operands)(&p->dout, dv) || !T(are_together)(&p->dout, ld, dv);
    s->Ka = copies_k ? TAKE(operand, n * T(operand_ld)(d)) : NULL;
    s->Va = copies_v ? TAKE(operand, n * T(operand_ld)(dv)) : NULL;
    s->Kb = DEPTH > 1 ? TAKE(operand, n / DEPTH * T(panel_ld)(d)) : NULL;
    s->Qb = copies_q ? TAKE(operand, ld / DEPTH * T(panel_ld)(d)) : NULL;
    s->dOb = copies_do ? TAKE(operand, ld / DEPTH * T(panel_ld)(dv)) : NULL;
    s->dK = s->dV = NULL;
    if (!T(sums_in_place) || !T(are_together)(&p->dk, n, d))
        s->dK = TAKE(real, n * fa_round_up(d, LANES));
    if (!T(sums_in_place) || !T(are_together)(&p->dv, n, dv))
        s->dV = TAKE(real, n * fa_round_up(dv, LANES));
    s->lse = TAKE(real, fa_heads_per_group(p) * T(statistics_ld)(p));
    s->delta = TAKE(real, fa_heads_per_group(p) * T(statistics_ld)(p));
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

/* lse and delta of the queries of a head. Lanes past the last query and rows that attend to nothing
 * get an infinite lse, which makes their P and dS zero. */
static void T(row_statistics)(real *lse, real *delta, const struct fa_params *p, int64_t batch,
                              int64_t head) {
    const real *forward_lse = (const real *)p->lse + (batch * p->heads_q + head) * p->seq_q;
    for (int64_t i = 0; i < T(statistics_ld)(p); i++) {
        lse[i] = (real)INFINITY;
        delta[i] = 0;
        if (i >= p->seq_q || forward_lse[i] == (real)-INFINITY)
            continue;
        lse[i] = forward_lse[i];
        const elem *O = T(at)(&p->out, batch, head, i), *dO = T(at)(&p->dout, batch, head, i);
        vec sum = V(set1)(0);
        int64_t d = 0;
        for (; d + LANES <= p->head_dim_v; d += LANES)
            sum = V(fma)(E(load)(O + d), E(load)(dO + d), sum);
        const int left = (int)(p->head_dim_v - d);
        if (left)
            sum = V(fma)(E(load_n)(O + d, left), E(load_n)(dO + d, left), sum);
        delta[i] = V(sum)(sum);
    }
}

/* P = exp(S * scale - lse), which is at most 1 also where scores are so large that lse has lost the
 * difference, and dS = P * (dP - delta), of the keys [j, j + n) and the queries [r, r + LANES);
 * with dropout, P' and dP' of them. As operands, and if `keeps_dS`, dS is left in place of dP, too.
 */
FA_ALWAYS_INLINE void T(probabilities_and_dS)(const struct T(backward_scratch) * s, int64_t ld,
                                              int64_t r, int64_t j, const int n, vec negative_scale,
                                              vec lse, vec delta, const real *keep, int keeps_dS) {
    const int64_t x = j * ld + r;
    const vec zero = V(set1)(0);
    vec P[EXP2_VECS], dS[EXP2_VECS];
    FA_UNROLL for (int u = 0; u < EXP2_VECS; u++) {
        const vec S = V(load)(s->S + x + (u < n ? u : 0) * ld);
        P[u] = V(max)(zero, V(fma)(S, negative_scale, lse)) * V(set1)((real)-FA_LOG2E);
    }
    exp2_vecs(P);
    FA_UNROLL for (int u = 0; u < EXP2_VECS; u++) {
        if (u >= n) {
            P[u] = dS[u] = zero;
            continue;
        }
        vec dP = V(load)(s->dP + x + u * ld);
        if (keep) {
            const vec kept = V(load)(keep + x + u * ld);
            dS[u] = P[u] * V(fma)(dP, kept, -delta);
            P[u] = P[u] * kept;
        } else {
            dS[u] = P[u] * (dP - delta);
        }
    }
#if DEPTH == 2
    FA_UNROLL for (int u = 0; u < EXP2_VECS; u += 2) {
        if (u < n) {
            const int64_t row = (x + u * ld) / 2, next = row + ld / 2;
            const operand_vec P_ = OP(narrow)(P[u], P[u + 1]), dS_ = OP(narrow)(dS[u], dS[u + 1]);
            OP(store_halves)(s->P + row, s->P + next, P_);
            OP(store_halves)(s->dS + row, s->dS + next, dS_);
            OP(store_pairs)(s->dS_keys + (j + u) / 2 * ld + r, dS_);
        }
    }
    if (keeps_dS) {
        for (int u = 0; u < n; u++)
            V(store)(s->dP + x + u * ld, dS[u]);
    }
#else
    (void)keeps_dS;
    FA_UNROLL for (int u = 0; u < EXP2_VECS; u++) {
        if (u < n) {
            V(store)(s->P + x + u * ld, P[u]);
            V(store)(s->dS + x + u * ld, dS[u]);
        }
    }
#endif
}

static void T(softmax_backward)(const struct T(backward_scratch) * s, int keys, int ld, real scale,
                                const real *lse_, const real *delta_, const real *keep,
                                int keeps_dS) {
    const vec c = V(set1)(-scale);
    for (int r = 0; r < ld; r += LANES) {
        const vec lse = V(load)(lse_ + r), delta = V(load)(delta_ + r);
        int j = 0;
        for (; j + EXP2_VECS <= keys; j += EXP2_VECS)
            T(probabilities_and_dS)(s, ld, r, j, EXP2_VECS, c, lse, delta, keep, keeps_dS);
        if (j < keys)
            T(probabilities_and_dS)(s, ld, r, j, keys - j, c, lse, delta, keep, keeps_dS);
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
 * of what is there already, if `in_place`. */
static void T(store_gradient)(const struct fa_tensor *grad, int64_t b, int64_t h, int64_t i,
                              int64_t count, int64_t cols, int in_place, const real *buffer,
                              int64_t size, int buffers, real scale) {
    const int64_t ld = fa_round_up(cols, LANES);
    for (int64_t r = 0; r < count; r++) {
        elem *row = T(at)(grad, b, h, i + r);
        for (int64_t d = 0; d < cols; d += LANES) {
            const int n = (int)fa_min(LANES, cols - d);
            vec sum = V(set1)(0);
            if (in_place)
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

    const int64_t next = i + queries->count, rows = fa_min(FA_BLOCK_M, p->seq_q - next);
    const int64_t steps = fa_div_up(keys, GEMM_ROWS);
    struct fa_ahead ahead_q = T(rows_ahead)(&p->q, batch, h, next, rows, p->head_dim, steps);
    struct fa_ahead ahead_do = T(rows_ahead)(&p->dout, batch, h, next, rows, p->head_dim_v, steps);
    struct fa_ahead ahead_dq = {.row = (const char *)(dQ.rows + queries->count * dQ.ld),
                                .stride = dQ.ld * (int64_t)sizeof(real),
                                .bytes = p->head_dim * (int64_t)sizeof(real),
                                .rows = rows,
                                .step = fa_div_up(rows, steps)};

    gemm(s->S, ld, tile->Ka + skip * tile->ld_ka, tile->ld_ka, 1, s->Qt, ld, keys, ld,
         fa_div_up(p->head_dim, DEPTH), 0, &ahead_q);
    gemm(s->dP, ld, tile->Va + skip * tile->ld_va, tile->ld_va, 1, s->dOt, ld, keys, ld,
         fa_div_up(p->head_dim_v, DEPTH), 0, &ahead_do);

    T(edit_scores)(s->S, p, batch, queries, key, keys);
    if (p->dropout_p > 0)
        T(draw_dropout)(s->keep, p, batch, queries, key, keys);
    const int64_t statistics = h % fa_heads_per_group(p) * T(statistics_ld)(p) + i;
    T(softmax_backward)(s, keys, ld, T(score_scale)(p), s->lse + statistics, s->delta + statistics,
                        p->dropout_p > 0 ? s->keep : NULL, p->dmask.data != NULL);
    if (p->dmask.data)
        T(mask_gradient)(p, batch, queries, key, keys, s->dP);
    if (p->dv.data) {
        int64_t ldb;
        const operand *dO = T(panel_operand)(T(at)(&p->dout, batch, h, i), p->dout.stride_row,
                                             queries->count, p->head_dim_v, s->dOb, &ldb);
        gemm(tile->dV.rows + skip * tile->dV.ld, tile->dV.ld, s->P, ld / DEPTH, 1, dO, ldb, keys,
             p->head_dim_v, fa_div_up(queries->count, DEPTH), 1, NULL);
    }
    if (p->dk.data) {
        int64_t ldb;
        const operand *Q = T(panel_operand)(T(at)(&p->q, batch, h, i), p->q.stride_row,
                                            queries->count, p->head_dim, s->Qb, &ldb);
        gemm(tile->dK.rows + skip * tile->dK.ld, tile->dK.ld, s->dS, ld / DEPTH, 1, Q, ldb, keys,
             p->head_dim, fa_div_up(queries->count, DEPTH), 1, &ahead_dq);
    }
    if (p->dq.data)
        gemm(dQ.rows, dQ.ld, s->dS_keys, 1, ld, tile->Kb + skip / DEPTH * tile->ld_kb, tile->ld_kb,
             queries->count, p->head_dim, fa_div_up(keys, DEPTH), 1, NULL);
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
    for (int64_t g = 0; g < group && p->dq.data; g++)
        T(clear_sums)(T(dq_sums)(p, share, g, 0), p->seq_q, p->head_dim);
    for (int64_t g = 0; g < group; g++)
        T(row_statistics)(s.lse + g * T(statistics_ld)(p), s.delta + g * T(statistics_ld)(p), p, b,
                          hk * group + g);

    const int64_t rounds = fa_div_up(fa_div_up(p->seq_k, FA_BLOCK_N_BACKWARD), share->count);
    for (int64_t x = 0; x < rounds; x++) {
        const int64_t round = (x + hk) % rounds;
        const int64_t index = round % 2 ? share->count - 1 - share->index : share->index;
        const int64_t first = (round * share->count + index) * FA_BLOCK_N_BACKWARD;
        if (first >= p->seq_k)
            continue;
        struct T(key_tile)
            tile = {.key = first, .keys = fa_min(FA_BLOCK_N_BACKWARD, p->seq_k - first)};
        const elem *K = T(at)(&p->k, b, hk, first), *V = T(at)(&p->v, b, hk, first);
        tile.Ka = T(rows_operand)(K, p->k.stride_row, tile.keys, p->head_dim, s.Ka, &tile.ld_ka);
        tile.Va = T(rows_operand)(V, p->v.stride_row, tile.keys, p->head_dim_v, s.Va, &tile.ld_va);
        tile.Kb = tile.Ka; /* the same where an operand is one element */
        tile.ld_kb = tile.ld_ka;
        if (DEPTH > 1)
            tile.Kb =
                T(panel_operand)(K, p->k.stride_row, tile.keys, p->head_dim, s.Kb, &tile.ld_kb);
        if (p->dmask.in_dtype && fa_is_windowed(p))
            T(clear_mask_gradient)(p, b, hk, first, tile.keys);
        if (p->dk.data) {
            tile.dK = T(sums_of)(&p->dk, b, hk, first, p->head_dim, s.dK);
            T(clear_sums)(tile.dK, tile.keys, p->head_dim);
        }
        if (p->dv.data) {
            tile.dV = T(sums_of)(&p->dv, b, hk, first, p->head_dim_v, s.dV);
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
            T(store_gradient)(&p->dk, b, hk, first, tile.keys, p->head_dim, !s.dK, s.dK, 0,
                              s.dK != NULL, (real)p->scale);
        if (p->dv.data && s.dV)
            T(store_gradient)(&p->dv, b, hk, first, tile.keys, p->head_dim_v, 0, s.dV, 0, 1, 1);
    }
}

static void T(backward_store_dq)(const struct fa_params *p, int64_t batch, int64_t head_k,
                                 int64_t begin, int64_t end, const void *buffers, int count) {
    const int64_t ld = fa_round_up(p->head_dim, LANES), group = fa_heads_per_group(p);
    const int64_t size = (int64_t)(T(backward_dq_bytes)(p) / sizeof(real));
    for (int64_t row = begin; row < end;) { /* a head at a time */
        const int64_t i = row % p->seq_q, rows = fa_min(p->seq_q - i, end - row);
        T(store_gradient)(&p->dq, batch, head_k * group + row / p->seq_q, i, rows, p->head_dim,
                          T(dq_in_place)(p), (const real *)buffers + row * ld, size, count,
                          (real)p->scale);
        row += rows;
    }
}
