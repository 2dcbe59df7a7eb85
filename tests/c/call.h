/* A call of the kernels: how one is drawn, printed and let go. */
#ifndef FLASH_ATTENTION_TESTS_CALL_H
#define FLASH_ATTENTION_TESTS_CALL_H

#include "array.h"
#include "flash_attention.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>

struct call {
    uint64_t seed;
    struct fa_params p;
    uint64_t rng_state[2];
    const char *isa;
    struct array q, k, v, mask, dout;
    struct array out, lse, dq, dk, dv, dmask;
};

enum { OUTPUTS = 6 };
static const char *const output_names[OUTPUTS] = {"out", "lse", "dq", "dk", "dv", "dmask"};

static struct array *output(struct call *c, int n) {
    return (struct array *[OUTPUTS]){&c->out, &c->lse, &c->dq, &c->dk, &c->dv, &c->dmask}[n];
}

/* --- executors --- */

struct thread {
    pthread_t handle;
    void (*body)(void *ctx, int id);
    void *ctx;
    int id;
};

static void *thread_main(void *argument) {
    struct thread *thread = argument;
    thread->body(thread->ctx, thread->id);
    return NULL;
}

static void run_at_once(void (*body)(void *ctx, int id), void *ctx, int num_threads) {
    struct thread threads[8];
    for (int id = 1; id < num_threads; id++) {
        threads[id] = (struct thread){.body = body, .ctx = ctx, .id = id};
        pthread_create(&threads[id].handle, NULL, thread_main, &threads[id]);
    }
    body(ctx, 0);
    for (int id = 1; id < num_threads; id++)
        pthread_join(threads[id].handle, NULL);
}

/* One after the other, last id first: a body that waits for another one would hang here. */
static void run_in_turn(void (*body)(void *ctx, int id), void *ctx, int num_threads) {
    for (int id = num_threads - 1; id >= 0; id--)
        body(ctx, id);
}

/* --- drawing a call --- */

static int64_t draw_length(void) {
    return one_in(16) ? below(2000) : one_in(8) ? below(3) : one_in(4) ? 16 * below(6) : below(81);
}

static int64_t draw_head_dim(void) {
    return one_in(50)  ? 128 << below(2)
           : one_in(8) ? below(3)
           : one_in(3) ? 8 * below(9)
                       : below(71);
}

static int64_t draw_distance(void) {
    return one_in(8) ? below(INT64_C(1) << 40) : one_in(4) ? below(3) : below(100);
}

static void draw_sizes(struct fa_params *p) {
    p->batch = one_in(50) ? 0 : 1 + below(3);
    p->heads_k = one_in(200) ? 0 : 1 + below(3);
    int64_t groups = 1 + below(4);
    p->seq_q = draw_length();
    p->seq_k = draw_length();
    p->head_dim = draw_head_dim();
    p->head_dim_v = one_in(2) ? p->head_dim : draw_head_dim();
    int64_t budget = one_in(100) ? 10000000 : 500000; /* multiplications in Q K^T and P V */
    while (p->batch * p->heads_k * groups * p->seq_q * p->seq_k * (p->head_dim + p->head_dim_v) >
           budget) {
        int64_t *sizes[] = {&p->batch, &p->heads_k,  &groups,       &p->seq_q,
                            &p->seq_k, &p->head_dim, &p->head_dim_v};
        int64_t *size = sizes[below(7)];
        *size = (*size + 1) / 2;
    }
    p->heads_q = p->heads_k * groups;
}

/* An array of rows (the last dimension contiguous), as torch might stride it. */
static void draw_rows(struct array *a, enum fa_dtype dtype, const int64_t size[4],
                      unsigned repeated) {
    static const int orders[4][4] = {
        {3, 2, 1, 0}, {3, 1, 2, 0}, {3, 2, 0, 1}, {3, 0, 2, 1}}; /* BHSD, BSHD, HBSD, HSBD */
    array_create(a, dtype, size, orders[one_in(2) ? 0 : below(4)], one_in(2), repeated);
}

static void draw_input(struct array *a, enum fa_dtype dtype, const int64_t size[4]) {
    draw_rows(a, dtype, size, one_in(8) ? (unsigned)below(8) : 0);
    double amplitude = ldexp(1, (int)below(3));
    FOR_EACH_ELEMENT(a, index, n) {
        store(dtype, a->data, index, amplitude * (2 * uniform() - 1));
    }
}

/* [1 or B, 1 or Hq, 1 or Sq, 1 or Sk], in any order in memory. */
static void draw_mask_layout(struct array *a, enum fa_dtype dtype, const int64_t size[4]) {
    static const int orders[4][4] = {{3, 2, 1, 0}, {2, 3, 1, 0}, {1, 3, 2, 0}, {0, 1, 2, 3}};
    unsigned repeated = 0;
    for (int d = 0; d < 4; d++)
        repeated |= (unsigned)(size[d] == 1) << d;
    array_create(a, dtype, size, orders[one_in(2) ? 0 : below(4)], one_in(2), repeated);
}

static void draw_mask(struct call *c) {
    struct fa_params *p = &c->p;
    enum fa_dtype dtypes[] = {FA_BOOL, p->dtype, FA_FLOAT32};
    enum fa_dtype dtype = dtypes[below(3)];
    int64_t size[4] = {p->batch, p->heads_q, p->seq_q, p->seq_k};
    for (int d = 0; d < 4; d++)
        size[d] = one_in(3) ? 1 : size[d];
    draw_mask_layout(&c->mask, dtype, size);

    const double densities[] = {0, 0.1, 0.5, 0.95, 1};
    double hidden = densities[below(5)];
    double lowest = one_in(8) ? -largest[dtype] : -INFINITY; /* what hides a key in a float mask */
    FOR_EACH_ELEMENT(&c->mask, index, n) {
        double value = dtype == FA_BOOL ? 0 : 4 * uniform() - 2;
        store(dtype, c->mask.data, index,
              uniform() >= hidden ? value
              : dtype == FA_BOOL  ? -INFINITY
                                  : lowest);
    }
    if (dtype == FA_BOOL || one_in(2))
        return;
    const int64_t full[4] = {p->batch, p->heads_q, p->seq_q, p->seq_k};
    p->dmask.in_dtype = dtype == p->dtype && memcmp(size, full, sizeof full) == 0 &&
                        p->batch * p->heads_q * p->seq_q * p->seq_k > 0 && !one_in(4);
    if (p->dmask.in_dtype)
        draw_rows(&c->dmask, dtype, size, 0);
    else
        draw_mask_layout(&c->dmask, p->dtype == FA_FLOAT64 ? FA_FLOAT64 : FA_FLOAT32, size);
}

static struct fa_tensor tensor(const struct array *a) {
    return (struct fa_tensor){a->data, a->stride[0], a->stride[1], a->stride[2]};
}

static void draw_call(struct call *c, uint64_t seed) {
    *c = (struct call){.seed = seed};
    random_state = seed << 32;
    struct fa_params *p = &c->p;
    const char *usable_isas[8];
    int count = 0, usable;
    for (int i = 0; (c->isa = fa_cpu_isa_list(i, &usable)); i++)
        if (usable)
            usable_isas[count++] = c->isa;
    c->isa = usable_isas[seed % (uint64_t)count];

    p->dtype = (enum fa_dtype)below(4);
    draw_sizes(p);
    const double scales[] = {1, 1, 1, -1, 0, 4};
    p->scale = scales[below(6)] / sqrt((double)p->head_dim + (p->head_dim == 0));
    p->window_left = one_in(2) ? FA_NO_LIMIT - draw_distance() : draw_distance();
    p->window_right = one_in(2) ? FA_NO_LIMIT : one_in(2) ? 0 : draw_distance();
    p->diagonal_offset = one_in(2)   ? 0
                         : one_in(3) ? p->seq_k - p->seq_q
                         : one_in(2) ? draw_distance()
                                     : -draw_distance();
    const double dropouts[] = {0.1, 0.5, 1, 1e-6, uniform()};
    p->dropout_p = one_in(3) ? dropouts[below(5)] : 0;
    c->rng_state[0] = random_bits();
    c->rng_state[1] = random_bits();
    p->rng_state = p->dropout_p > 0 || one_in(2) ? c->rng_state : NULL;
    p->deterministic = one_in(2);
    p->executor.num_threads = 1 + (int)below(4);
    p->executor.run = one_in(8) ? NULL : one_in(4) ? run_in_turn : run_at_once;

    int64_t B = p->batch, Hq = p->heads_q, Hk = p->heads_k, Sq = p->seq_q, Sk = p->seq_k;
    int64_t D = p->head_dim, Dv = p->head_dim_v;
    const int64_t q_size[] = {B, Hq, Sq, D}, out_size[] = {B, Hq, Sq, Dv};
    const int64_t k_size[] = {B, Hk, Sk, D}, v_size[] = {B, Hk, Sk, Dv};
    const int64_t lse_size[] = {B, Hq, Sq, 1};
    draw_input(&c->q, p->dtype, q_size);
    draw_input(&c->k, p->dtype, k_size);
    draw_input(&c->v, p->dtype, v_size);
    draw_input(&c->dout, p->dtype, out_size);
    if (one_in(2))
        draw_mask(c);
    draw_rows(&c->out, p->dtype, out_size, 0);
    array_create(&c->lse, p->dtype == FA_FLOAT64 ? FA_FLOAT64 : FA_FLOAT32, lse_size,
                 (const int[]){3, 2, 1, 0}, 0, 0);
    if (!one_in(6))
        draw_rows(&c->dq, p->dtype, q_size, 0);
    if (!one_in(6))
        draw_rows(&c->dk, p->dtype, k_size, 0);
    if (!one_in(6))
        draw_rows(&c->dv, p->dtype, v_size, 0);

    p->q = tensor(&c->q);
    p->k = tensor(&c->k);
    p->v = tensor(&c->v);
    p->out = tensor(&c->out);
    p->lse = c->lse.data;
    p->dout = tensor(&c->dout);
    p->dq = tensor(&c->dq);
    p->dk = tensor(&c->dk);
    p->dv = tensor(&c->dv);
    const int64_t *stride = c->mask.stride;
    p->mask =
        (struct fa_mask){c->mask.data, c->mask.dtype, stride[0], stride[1], stride[2], stride[3]};
    stride = c->dmask.stride;
    p->dmask = (struct fa_mask_grad){c->dmask.data, stride[0], stride[1],
                                     stride[2],     stride[3], p->dmask.in_dtype};
}

static void free_call(struct call *c) {
    struct array *inputs[] = {&c->q, &c->k, &c->v, &c->mask, &c->dout};
    for (int n = 0; n < 5; n++)
        array_free(inputs[n]);
    for (int n = 0; n < OUTPUTS; n++)
        array_free(output(c, n));
}

/* --- printing --- */

static void print_tensor(const char *name, const struct array *a) {
    fprintf(stderr, "  %s %s, strides %" PRId64 " %" PRId64 " %" PRId64 " %" PRId64 "\n", name,
            a->data ? "" : "NULL", a->stride[0], a->stride[1], a->stride[2], a->stride[3]);
}

static void print_call(struct call *c) {
    static const char *const dtypes[] = {"float32", "float64", "bfloat16", "float16", "bool"};
    const struct fa_params *p = &c->p;
    fprintf(stderr, "call --seed %" PRIu64 " --calls 1: %s %s\n", c->seed, c->isa,
            dtypes[p->dtype]);
    fprintf(stderr, "  B %" PRId64 " Hq %" PRId64 " Hk %" PRId64 " Sq %" PRId64 " Sk %" PRId64,
            p->batch, p->heads_q, p->heads_k, p->seq_q, p->seq_k);
    fprintf(stderr, " D %" PRId64 " Dv %" PRId64 "\n", p->head_dim, p->head_dim_v);
    fprintf(stderr, "  scale %g window %" PRId64 " %" PRId64 " offset %" PRId64 " dropout %g\n",
            p->scale, p->window_left, p->window_right, p->diagonal_offset, p->dropout_p);
    fprintf(stderr, "  deterministic %d threads %d mask dtype %s\n", p->deterministic,
            p->executor.run ? p->executor.num_threads : 1, dtypes[p->mask.dtype]);
    print_tensor("q", &c->q);
    print_tensor("k", &c->k);
    print_tensor("v", &c->v);
    print_tensor("mask", &c->mask);
    print_tensor("dout", &c->dout);
    for (int n = 0; n < OUTPUTS; n++)
        print_tensor(output_names[n], output(c, n));
}

#endif
