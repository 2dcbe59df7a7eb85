/* The FlashAttention forward for one tile of queries (Dao et al. 2022, Algorithm 1; the order of
 * loops is that of FlashAttention-2): keys and values stream past in tiles, the softmax is
 * rescaled on line, and no more than block_n x block_m scores exist at a time.
 *
 * A tile of queries is a few blocks of block_m, which share what is read of K and V. */

/* A block of queries and what is known of its rows so far. */
struct T(query_block) {
    struct T(queries) queries;
    int64_t begin, end; /* the keys that some query sees */
    operand *Q;         /* [D / DEPTH][ld]; of few queries [rows][operand_ld(D)] */
    real *O;            /* [rows][ld_o], unnormalised */
    real *m, *l;        /* [ld] row maximum, before score_scale, and row sum */
};

struct T(forward_scratch) {
    struct T(query_block) blocks[FA_TILE_BLOCKS];
    real *S;       /* [block_n][ld] */
    operand *P;    /* [block_n / DEPTH][ld], in place of S where operands are reals */
    real *keep;    /* [block_n][ld], dropout */
    operand *K;    /* [block_n][operand_ld(D)], NULL: K can be read in place */
    operand *V;    /* [block_n / DEPTH][panel_ld(Dv)], likewise */
    real *rescale; /* [ld] */
    int64_t ld_o;  /* Dv rounded up to whole vectors */
};

static size_t T(take_forward_scratch)(struct T(forward_scratch) * s, const struct fa_params *p,
                                      int rows, void *memory) {
    uintptr_t cursor = (uintptr_t)memory;
    const int64_t n = fa_round_up(fa_min(FA_BLOCK_N, p->seq_k), 2);
    const int64_t ld = fa_round_up(fa_min(FA_BLOCK_M, rows), LANES);
    s->ld_o = fa_round_up(p->head_dim_v, LANES);
#define TAKE(TYPE, COUNT) fa_take(&cursor, (size_t)(COUNT) * sizeof(TYPE))
    for (int i = 0; i < fa_div_up(rows, FA_BLOCK_M); i++) {
        struct T(query_block) *block = &s->blocks[i];
        block->Q = rows <= GEMM_FEW ? TAKE(operand, rows * T(operand_ld)(p->head_dim))
                                    : TAKE(operand, fa_div_up(p->head_dim, DEPTH) * ld);
        block->O = TAKE(real, ld * s->ld_o);
        block->m = TAKE(real, ld);
        block->l = TAKE(real, ld);
    }
    s->S = TAKE(real, n * ld);
    s->P = DEPTH > 1 ? TAKE(operand, n / DEPTH * ld) : (operand *)s->S;
    s->keep = TAKE(real, p->dropout_p > 0 ? n * ld : 0);
    s->K = s->V = NULL;
    if (!T(are_operands)(&p->k, p->head_dim))
        s->K = TAKE(operand, n * T(operand_ld)(p->head_dim));
    if (DEPTH > 1 || !T(are_operands)(&p->v, p->head_dim_v))
        s->V = TAKE(operand, n / DEPTH * T(panel_ld)(p->head_dim_v));
    s->rescale = TAKE(real, ld);
#undef TAKE
    return (size_t)(cursor - (uintptr_t)memory);
}

static size_t T(forward_scratch_bytes)(const struct fa_params *p, int rows) {
    struct T(forward_scratch) s;
    return T(take_forward_scratch)(&s, p, rows, NULL);
}

/* P = exp2((S - m) * scale) of the keys [j, j + n) of a tile, times what dropout keeps if `keep` is
 * given; adds them to *sum. The pointers are to the first key of a vector of queries. */
FA_ALWAYS_INLINE void T(exponentials)(const real *S, operand *P, const real *keep, int64_t ld,
                                      int j, const int n, vec scale, vec m, vec sum[2]) {
    vec x[EXP2_VECS];
    FA_UNROLL for (int u = 0; u < EXP2_VECS; u++) {
        x[u] = V(set1)((real)-INFINITY);
        if (u < n)
            x[u] = (V(load)(S + (j + u) * ld) - m) * scale;
    }
    exp2_vecs(x);
    FA_UNROLL for (int u = 0; u < EXP2_VECS; u++) sum[u % 2] = sum[u % 2] + x[u];
    if (keep) {
        FA_UNROLL for (int u = 0; u < EXP2_VECS; u++) {
            if (u < n)
                x[u] = x[u] * V(load)(keep + (j + u) * ld);
        }
    }
    FA_UNROLL for (int u = 0; u < EXP2_VECS; u += DEPTH) {
        if (u < n) {
#if DEPTH == 2
            OP(store_pairs)(P + (j + u) / 2 * ld, OP(narrow)(x[u], x[u + 1]));
#else
            V(store)(P + (j + u) * ld, x[u]);
#endif
        }
    }
}

/* P = exp2((S - m) * scale), times `keep` if that is given; m, l and the factor for earlier results
 * are brought up to date (Milakov and Gimelshein 2018). scale > 0. */
static void T(online_softmax)(const real *S, operand *P, const real *keep, int keys, int ld,
                              real scale, real *m, real *l, real *rescale) {
    const vec c = V(set1)(scale), lowest = V(set1)((real)-INFINITY);
    for (int r = 0; r < ld; r += LANES) {
        vec most[4] = {lowest, lowest, lowest, lowest}; /* four chains hide the latency of max */
        int j = 0;
        for (; j + 4 <= keys; j += 4) {
            FA_UNROLL for (int u = 0; u < 4; u++) {
                most[u] = V(max)(most[u], V(load)(S + (j + u) * ld + r));
            }
        }
        for (; j < keys; j++)
            most[0] = V(max)(most[0], V(load)(S + j * ld + r));
        const vec m_old = V(load)(m + r);
        const vec m_new = V(max)(m_old, V(max)(V(max)(most[0], most[1]), V(max)(most[2], most[3])));
        /* A row that has seen no key yet has m = -inf; -inf - -inf would be NaN. */
        const vec finite = V(max)(V(set1)(-V(BIG)), m_new);
        vec factor[EXP2_VECS] = {(m_old - finite) * c, lowest, lowest, lowest};
        exp2_vecs(factor);

        vec sum[2] = {V(set1)(0), V(set1)(0)};
        const real *keep_r = keep ? keep + r : NULL;
        for (j = 0; j + EXP2_VECS <= keys; j += EXP2_VECS)
            T(exponentials)(S + r, P + r, keep_r, ld, j, EXP2_VECS, c, finite, sum);
        if (j < keys)
            T(exponentials)(S + r, P + r, keep_r, ld, j, keys - j, c, finite, sum);
        V(store)(m + r, m_new);
        V(store)(l + r, V(fma)(V(load)(l + r), factor[0], sum[0] + sum[1]));
        V(store)(rescale + r, factor[0]);
    }
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

/* out = O / l and lse. */
static void T(store_output)(const struct fa_params *p, int64_t batch,
                            const struct T(query_block) * block, int64_t ld_o) {
    const struct T(queries) *queries = &block->queries;
    for (int r = 0; r < queries->count; r++) {
        const int64_t h = queries->head[r], i = queries->row[r];
        elem *out = T(at)(&p->out, batch, h, i);
        const vec f = V(set1)(block->l[r] == 0 ? 0 : 1 / block->l[r]);
        for (int64_t d = 0; d < p->head_dim_v; d += LANES) {
            const vec x = V(load)(block->O + r * ld_o + d) * f;
            if (p->head_dim_v - d < LANES)
                E(store_n)(out + d, x, (int)(p->head_dim_v - d));
            else
                E(store)(out + d, x);
        }
        ((real *)p->lse)[(batch * p->heads_q + h) * p->seq_q + i] =
            (real)((double)block->m[r] * (double)T(score_scale)(p) + log((double)block->l[r]));
    }
}

static void T(start_block)(struct T(query_block) * block, const struct fa_params *p,
                           const struct fa_query_tile *t, int first, int64_t ld_o) {
    struct T(queries) *queries = &block->queries;
    T(find_queries)(queries, p, t->head_k, t->first_row + first,
                    (int)fa_min(FA_BLOCK_M, t->rows - first));
    memset(block->O, 0, (size_t)(queries->count * ld_o) * sizeof(real));
    for (int r = 0; r < queries->ld; r++) {
        block->m[r] = (real)-INFINITY;
        block->l[r] = 0;
    }
}

/* A tile of keys as gemm operands: K as A of K Q^T, V as B of P V. */
struct T(forward_keys) {
    int64_t key, end; /* what they are of all keys */
    const operand *K, *V;
    int64_t ldk, ldv;
};

/* The keys [first, end) of a tile. */
static struct T(forward_keys)
    T(load_keys)(const struct fa_params *p, const struct fa_query_tile *t,
                 const struct T(forward_scratch) * s, int64_t first, int64_t end) {
    struct T(forward_keys) keys = {.key = first, .end = end};
    keys.K = T(rows_operand)(T(at)(&p->k, t->batch, t->head_k, first), p->k.stride_row, end - first,
                             p->head_dim, s->K, &keys.ldk);
    keys.V = T(panel_operand)(T(at)(&p->v, t->batch, t->head_k, first), p->v.stride_row,
                              end - first, p->head_dim_v, s->V, &keys.ldv);
    return keys;
}

/* A block of queries against the keys of a tile that it sees. */
static void T(attend)(const struct T(query_block) * block, const struct T(forward_keys) * tile,
                      const struct T(forward_scratch) * s, const struct fa_params *p, int64_t batch,
                      int few, struct fa_ahead *ahead_k, struct fa_ahead *ahead_v) {
    const struct T(queries) *queries = &block->queries;
    const int ld = queries->ld;
    /* From an even key on: operands can be pairs of keys. */
    const int64_t key = fa_max(tile->key, block->begin / 2 * 2), skip = key - tile->key;
    const int keys = (int)fa_max(0, fa_min(tile->end, block->end) - key);
    if (keys == 0)
        return;
    const operand *K = tile->K + skip * tile->ldk;
    const int64_t depth = fa_div_up(p->head_dim, DEPTH);
    if (few)
        gemm_few(s->S, K, tile->ldk, block->Q, T(operand_ld)(p->head_dim), keys, queries->count,
                 depth, ahead_k, ahead_v);
    else
        gemm(s->S, ld, K, tile->ldk, 1, block->Q, ld, keys, ld, depth, 0, ahead_k);
    T(edit_scores)(s->S, p, batch, queries, key, keys);
    if (p->dropout_p > 0)
        T(draw_dropout)(s->keep, p, batch, queries, key, keys);
    T(online_softmax)(s->S, s->P, p->dropout_p > 0 ? s->keep : NULL, keys, ld,
                      T(score_scale)(p) * (real)FA_LOG2E, block->m, block->l, s->rescale);
    T(rescale_rows)(block->O, queries->count, s->ld_o, s->rescale);
    gemm(block->O, s->ld_o, s->P, 1, ld, tile->V + skip / DEPTH * tile->ldv, tile->ldv,
         queries->count, p->head_dim_v, fa_div_up(keys, DEPTH), 1, ahead_v);
}

/* A partial result is [block_m][ld_o] of unnormalised O, then m and l. */
static size_t T(forward_partial)(const struct fa_params *p) {
    return (size_t)(FA_BLOCK_M * (fa_round_up(p->head_dim_v, LANES) + 2)) * sizeof(real);
}

static void T(forward_tile)(const struct fa_params *p, const struct fa_query_tile *t,
                            void *scratch) {
    struct T(forward_scratch) s;
    T(take_forward_scratch)(&s, p, t->rows, scratch);
    const int blocks = (int)fa_div_up(t->rows, FA_BLOCK_M), few = t->rows <= GEMM_FEW;
    int64_t first = t->key_end, last = t->key_begin; /* the keys that some query of the tile sees */
    for (int i = 0; i < blocks; i++) {
        struct T(query_block) *block = &s.blocks[i];
        const struct T(queries) *queries = &block->queries;
        T(start_block)(block, p, t, i * FA_BLOCK_M, s.ld_o);
        if (few) {
            for (int r = 0; r < queries->count; r++)
                T(convert_row)(block->Q + r * T(operand_ld)(p->head_dim),
                               T(at)(&p->q, t->batch, queries->head[r], queries->row[r]),
                               p->head_dim);
        } else {
            T(transpose_operand)(block->Q, &p->q, t->batch, queries, p->head_dim);
        }
        block->begin = t->key_end;
        block->end = t->key_begin;
        for (int r = 0; r < queries->count; r++) {
            block->begin = fa_min(block->begin, fa_key_begin(p, queries->row[r]));
            block->end = fa_max(block->end, fa_key_end(p, queries->row[r]));
        }
        first = fa_min(first, fa_max(block->begin, t->key_begin));
        last = fa_max(last, fa_min(block->end, t->key_end));
    }
    /* Tiles of keys start at multiples of block_n: which queries share a tile changes nothing. */
    for (int64_t key = first / FA_BLOCK_N * FA_BLOCK_N; key < last; key += FA_BLOCK_N) {
        const int64_t end = fa_min(fa_min(key + FA_BLOCK_N, fa_round_up(last, 2)), t->key_end);
        const struct T(forward_keys) tile = T(load_keys)(p, t, &s, key, end);
        const int64_t next = fa_max(0, fa_min(FA_BLOCK_N, last - end));
        const int64_t steps_few = t->rows * fa_div_up(end - key, GEMM_FEW_ROWS);
        const int64_t steps_k = few ? steps_few : blocks * fa_div_up(end - key, GEMM_ROWS);
        const int64_t steps_v = few ? steps_few : blocks * fa_div_up(FA_BLOCK_M, GEMM_ROWS);
        struct fa_ahead ahead_k =
            T(rows_ahead)(&p->k, t->batch, t->head_k, end, next, p->head_dim, steps_k);
        struct fa_ahead ahead_v =
            T(rows_ahead)(&p->v, t->batch, t->head_k, end, next, p->head_dim_v, steps_v);
        for (int i = 0; i < blocks; i++)
            T(attend)(&s.blocks[i], &tile, &s, p, t->batch, few, &ahead_k, &ahead_v);
    }
    if (t->partial) { /* of one block */
        const struct T(query_block) *block = s.blocks;
        const int rows = block->queries.count;
        real *O = t->partial, *m = O + FA_BLOCK_M * s.ld_o, *l = m + FA_BLOCK_M;
        memcpy(O, block->O, (size_t)(rows * s.ld_o) * sizeof(real));
        memcpy(m, block->m, (size_t)rows * sizeof(real));
        memcpy(l, block->l, (size_t)rows * sizeof(real));
    } else {
        for (int i = 0; i < blocks; i++)
            T(store_output)(p, t->batch, &s.blocks[i], s.ld_o);
    }
}

/* Merges the partial results of one query tile, a block, over disjoint keys. */
static void T(forward_merge)(const struct fa_params *p, const struct fa_query_tile *t,
                             const void *partials, int count, void *scratch) {
    struct T(forward_scratch) s;
    T(take_forward_scratch)(&s, p, t->rows, scratch);
    struct T(query_block) *block = s.blocks;
    T(start_block)(block, p, t, 0, s.ld_o);
    for (int r = 0; r < block->queries.count; r++) {
        for (int part = 0; part < count; part++) {
            const real *O = (const real *)((const char *)partials + part * T(forward_partial)(p));
            const real m = O[FA_BLOCK_M * s.ld_o + r];
            block->m[r] = m > block->m[r] || m != m ? m : block->m[r];
        }
        for (int part = 0; part < count; part++) {
            const real *O = (const real *)((const char *)partials + part * T(forward_partial)(p));
            const real *m = O + FA_BLOCK_M * s.ld_o, *l = m + FA_BLOCK_M;
            if (l[r] == 0)
                continue; /* saw no key */
            const real factor = (real)exp((double)(m[r] - block->m[r]) * (double)T(score_scale)(p));
            block->l[r] += l[r] * factor;
            for (int64_t d = 0; d < s.ld_o; d++)
                block->O[r * s.ld_o + d] += O[r * s.ld_o + d] * factor;
        }
    }
    T(store_output)(p, t->batch, block, s.ld_o);
}
