/* The FlashAttention forward for one tile of queries (Dao et al. 2022, Algorithm 1; the order of
 * loops is that of FlashAttention-2): keys and values stream past in tiles, the softmax is
 * rescaled on line, and no more than block_n x block_m scores exist at a time. */

struct T(forward_scratch) {
    operand *Qt;   /* [D / DEPTH][ld] */
    real *S;       /* [block_n][ld]; becomes P */
    real *edit;    /* [block_n][ld], a mask, then dropout */
    real *O;       /* [rows][ld_o] */
    operand *K;    /* [block_n][operand_ld(D)], where K cannot be read in place */
    operand *V;    /* [block_n / DEPTH][panel_ld(Dv)], likewise */
    operand *P;    /* [block_n / DEPTH][ld], where operands are not reals */
    real *m, *l;   /* [block_m] running row maximum and row sum */
    real *rescale; /* [block_m] */
    int64_t ld_o;  /* Dv rounded up to whole vectors */
};

static size_t T(take_forward_scratch)(struct T(forward_scratch) * s, const struct fa_params *p,
                                      void *memory) {
    uintptr_t cursor = (uintptr_t)memory;
    const size_t n = (size_t)fa_round_up(fa_min(FA_BLOCK_N, p->seq_k), 2);
    const int64_t rows = fa_min(FA_BLOCK_M, p->seq_q * fa_heads_per_group(p));
    const size_t ld = (size_t)fa_round_up(rows, LANES);
    s->ld_o = fa_round_up(p->head_dim_v, LANES);
    s->Qt = fa_take(&cursor, (size_t)fa_div_up(p->head_dim, DEPTH) * ld * sizeof(operand));
    s->S = fa_take(&cursor, n * ld * sizeof(real));
    s->edit = fa_take(&cursor, p->mask.data || p->dropout_p > 0 ? n * ld * sizeof(real) : 0);
    s->O = fa_take(&cursor, (size_t)(rows * s->ld_o) * sizeof(real));
    s->K = fa_take(&cursor, n * (size_t)T(operand_ld)(p->head_dim) * sizeof(operand));
    s->V = fa_take(&cursor, n / DEPTH * (size_t)T(panel_ld)(p->head_dim_v) * sizeof(operand));
    s->P = fa_take(&cursor, DEPTH > 1 ? n / DEPTH * ld * sizeof(operand) : 0);
    s->m = fa_take(&cursor, ld * sizeof(real));
    s->l = fa_take(&cursor, ld * sizeof(real));
    s->rescale = fa_take(&cursor, ld * sizeof(real));
    return (size_t)(cursor - (uintptr_t)memory);
}

static size_t T(forward_scratch_bytes)(const struct fa_params *p) {
    struct T(forward_scratch) s;
    return T(take_forward_scratch)(&s, p, NULL);
}

/* S becomes P = exp(S * scale - m); m, l and the factor for earlier results are brought up to
 * date (Milakov and Gimelshein 2018). */
static void T(online_softmax)(real *S, int keys, int ld, real scale, real *m, real *l,
                              real *rescale) {
    const vec c = V(set1)(scale);
    for (int r = 0; r < ld; r += LANES) {
        const vec m_old = V(load)(m + r);
        vec most[4] = {m_old, m_old, m_old, m_old}; /* four chains hide the latency of max */
        int j = 0;
        for (; j + 4 <= keys; j += 4) {
            FA_UNROLL for (int u = 0; u < 4; u++) {
                most[u] = V(max)(most[u], V(load)(S + (j + u) * ld + r) * c);
            }
        }
        for (; j < keys; j++)
            most[0] = V(max)(most[0], V(load)(S + j * ld + r) * c);
        const vec m_new = V(max)(V(max)(most[0], most[1]), V(max)(most[2], most[3]));
        /* A row that has seen no key yet has m = -inf; -inf - -inf would be NaN. */
        const vec finite = V(max)(V(set1)(-V(BIG)), m_new);
        const vec factor = exp_vec(m_old - finite);
        vec sum[2] = {V(set1)(0), V(set1)(0)};
        for (j = 0; j + 2 <= keys; j += 2) {
            FA_UNROLL for (int u = 0; u < 2; u++) {
                real *s = S + (j + u) * ld + r;
                const vec x = exp_vec(V(fma)(V(load)(s), c, V(set1)(0) - finite));
                V(store)(s, x);
                sum[u] = sum[u] + x;
            }
        }
        if (j < keys) {
            real *s = S + j * ld + r;
            const vec x = exp_vec(V(fma)(V(load)(s), c, V(set1)(0) - finite));
            V(store)(s, x);
            sum[0] = sum[0] + x;
        }
        V(store)(m + r, m_new);
        V(store)(l + r, V(fma)(V(load)(l + r), factor, sum[0] + sum[1]));
        V(store)(rescale + r, factor);
    }
}

static void T(multiply_tile)(real *tile, const real *factor, int count) {
    for (int x = 0; x < count; x += LANES)
        V(store)(tile + x, V(load)(tile + x) * V(load)(factor + x));
}

static void T(rescale_rows)(real *O, int rows, int64_t ld, const real *factor) {
    for (int r = 0; r < rows; r++) {
        if (factor[r] == 1)
            continue;
        const vec f = V(set1)(factor[r]);
        for (int64_t d = 0; d < ld; d += LANES)
            V(store)(O + r * ld + d, V(load)(O + r * ld + d) * f);
    }
}

/* out = O / l and lse, from what is in scratch. */
static void T(store_output)(const struct fa_params *p, const struct fa_query_tile *t,
                            const struct T(queries) * queries,
                            const struct T(forward_scratch) * s) {
    for (int r = 0; r < queries->count; r++) {
        const int64_t h = queries->head[r], i = queries->row[r];
        elem *out = T(at)(&p->out, t->batch, h, i);
        const vec f = V(set1)(s->l[r] == 0 ? 0 : 1 / s->l[r]);
        for (int64_t d = 0; d < p->head_dim_v; d += LANES) {
            const vec x = V(load)(s->O + r * s->ld_o + d) * f;
            if (p->head_dim_v - d < LANES)
                E(store_n)(out + d, x, (int)(p->head_dim_v - d));
            else
                E(store)(out + d, x);
        }
        ((real *)p->lse)[(t->batch * p->heads_q + h) * p->seq_q + i] =
            (real)(s->m[r] + log((double)s->l[r]));
    }
}

/* A partial result is [block_m][ld_o] of unnormalised O, then m and l. */
static size_t T(forward_partial)(const struct fa_params *p) {
    return (size_t)(FA_BLOCK_M * (fa_round_up(p->head_dim_v, LANES) + 2)) * sizeof(real);
}

static void T(forward_tile)(const struct fa_params *p, const struct fa_query_tile *t,
                            void *scratch) {
    struct T(forward_scratch) s;
    T(take_forward_scratch)(&s, p, scratch);
    struct T(queries) queries;
    T(find_queries)(&queries, p, t->head_k, t->first_row, t->rows);
    const int rows = queries.count, ld = queries.ld;

    int64_t begin = t->key_end, end = t->key_begin; /* the keys that some query sees */
    for (int r = 0; r < rows; r++) {
        begin = fa_min(begin, fa_key_begin(p, queries.row[r]));
        end = fa_max(end, fa_key_end(p, queries.row[r]));
    }
    begin = fa_max(begin, t->key_begin);
    end = fa_min(end, t->key_end);

    T(transpose_operand)(s.Qt, &p->q, t->batch, &queries, p->head_dim);
    memset(s.O, 0, (size_t)(rows * s.ld_o) * sizeof(real));
    for (int r = 0; r < ld; r++) {
        s.m[r] = (real)-INFINITY;
        s.l[r] = 0;
    }
    for (int64_t key = begin; key < end; key += FA_BLOCK_N) {
        const int keys = (int)fa_min(FA_BLOCK_N, end - key);
        real scale = (real)p->scale;

        int64_t ldk, ldv, cols = p->head_dim_v;
        const operand *K = T(rows_operand)(T(at)(&p->k, t->batch, t->head_k, key), p->k.stride_row,
                                           keys, p->head_dim, s.K, &ldk);
        gemm(s.S, ld, K, ldk, 1, s.Qt, ld, keys, ld, fa_div_up(p->head_dim, DEPTH), 0);

        if (p->mask.data || T(window_cuts)(p, &queries, key, keys)) {
            if (p->mask.data)
                T(load_mask)(s.edit, p, t->batch, &queries, key, keys);
            T(edit_scores)(s.S, p, &queries, key, keys, scale, p->mask.data ? s.edit : NULL);
            scale = 1;
        }
        T(online_softmax)(s.S, keys, ld, scale, s.m, s.l, s.rescale);
        T(rescale_rows)(s.O, rows, s.ld_o, s.rescale);
        if (p->dropout_p > 0) {
            T(draw_dropout)(s.edit, p, t->batch, &queries, key, keys);
            T(multiply_tile)(s.S, s.edit, keys * ld);
        }
        const operand *P = T(sum_over_keys)(s.S, keys, ld, s.P);
        const operand *values = T(panel_operand)(T(at)(&p->v, t->batch, t->head_k, key),
                                                 p->v.stride_row, keys, &cols, s.V, &ldv);
        gemm(s.O, s.ld_o, P, 1, ld, values, ldv, rows, cols, fa_div_up(keys, DEPTH), 1);
    }
    if (t->partial) {
        real *O = t->partial, *m = O + FA_BLOCK_M * s.ld_o, *l = m + FA_BLOCK_M;
        memcpy(O, s.O, (size_t)(rows * s.ld_o) * sizeof(real));
        memcpy(m, s.m, (size_t)rows * sizeof(real));
        memcpy(l, s.l, (size_t)rows * sizeof(real));
    } else {
        T(store_output)(p, t, &queries, &s);
    }
}

/* Merges the partial results of one query tile over disjoint keys. */
static void T(forward_merge)(const struct fa_params *p, const struct fa_query_tile *t,
                             const void *partials, int count, void *scratch) {
    struct T(forward_scratch) s;
    T(take_forward_scratch)(&s, p, scratch);
    struct T(queries) queries;
    T(find_queries)(&queries, p, t->head_k, t->first_row, t->rows);
    memset(s.O, 0, (size_t)(queries.count * s.ld_o) * sizeof(real));
    for (int r = 0; r < queries.count; r++) {
        s.m[r] = (real)-INFINITY;
        s.l[r] = 0;
        for (int part = 0; part < count; part++) {
            const real *O = (const real *)((const char *)partials + part * T(forward_partial)(p));
            const real m = O[FA_BLOCK_M * s.ld_o + r];
            s.m[r] = m > s.m[r] || m != m ? m : s.m[r];
        }
        for (int part = 0; part < count; part++) {
            const real *O = (const real *)((const char *)partials + part * T(forward_partial)(p));
            const real *m = O + FA_BLOCK_M * s.ld_o, *l = m + FA_BLOCK_M;
            if (l[r] == 0)
                continue; /* saw no key */
            const real factor = (real)exp((double)(m[r] - s.m[r]));
            s.l[r] += l[r] * factor;
            for (int64_t d = 0; d < s.ld_o; d++)
                s.O[r * s.ld_o + d] += O[r * s.ld_o + d] * factor;
        }
    }
    T(store_output)(p, t, &queries, &s);
}
