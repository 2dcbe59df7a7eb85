/* Splits a call into tasks and runs them on the caller's threads. */
#include <stdatomic.h>

#include "kernels.h"

struct tasks {
    atomic_llong next;
    int64_t count;
    void (*task)(const void *ctx, int64_t i, int slot);
    const void *ctx;
};

static void take_tasks(void *ctx, int slot) {
    struct tasks *tasks = ctx;
    int64_t i;
    while ((i = atomic_fetch_add_explicit(&tasks->next, 1, memory_order_relaxed)) < tasks->count)
        tasks->task(tasks->ctx, i, slot);
}

static int num_threads(const struct fa_params *p) {
    return p->executor.run && p->executor.num_threads > 1 ? p->executor.num_threads : 1;
}

/* Runs task(ctx, i, slot) for every i in [0, count); a thread that is done takes the next one.
 * slot < num_threads(p) is the thread's own. */
static void run_tasks(const struct fa_params *p, int64_t count,
                      void (*task)(const void *ctx, int64_t i, int slot), const void *ctx) {
    struct tasks tasks = {.count = count, .task = task, .ctx = ctx};
    const int threads = (int)fa_min(num_threads(p), count);
    atomic_init(&tasks.next, 0);
    if (threads > 1)
        p->executor.run(take_tasks, &tasks, threads);
    else
        take_tasks(&tasks, 0);
}

/* NULL is for tensors without elements, and for results that are not wanted. */
static int is_missing(const struct fa_tensor *t, int64_t elements) {
    return elements > 0 && !t->data;
}

static int inputs_are_missing(const struct fa_params *p) {
    const int64_t rows_q = p->batch * p->heads_q * p->seq_q,
                  rows_k = p->batch * p->heads_k * p->seq_k;
    return is_missing(&p->q, rows_q * p->head_dim) || is_missing(&p->k, rows_k * p->head_dim) ||
           is_missing(&p->v, rows_k * p->head_dim_v) ||
           is_missing(&p->out, rows_q * p->head_dim_v) || (rows_q > 0 && !p->lse);
}

/* Whole cache lines, at least one: a workspace is never NULL. */
static size_t cache_lines(size_t bytes) {
    return (bytes / 64 + 1) * 64;
}

/* --- forward: a task is a tile of queries, or with few of them a tile and a share of the keys ---
 */

struct forward_plan {
    const struct fa_params *p;
    const struct fa_cpu_kernels *kernels;
    int64_t rows;   /* of a tile */
    int64_t tiles;  /* of one group */
    int64_t shares; /* that the keys of a tile are split into */
    int64_t share;  /* keys in one */
    size_t scratch, partial;
    char *scratches, *partials;
};

/* Fewer blocks of queries than this, and long keys, get split. Not a function of the number of
 * threads, so that results do not depend on it. How many blocks make a tile changes no result. */
enum { ENOUGH_TASKS = 32, SHORTEST_SHARE = 4 * FA_BLOCK_N, TASKS_PER_THREAD = 8 };

static struct forward_plan plan_forward(const struct fa_params *p) {
    struct forward_plan plan = {.p = p, .kernels = fa_cpu_kernels_for(p)};
    const int64_t groups = p->batch * p->heads_k;
    const int64_t rows = fa_heads_per_group(p) * p->seq_q, blocks = fa_div_up(rows, FA_BLOCK_M);
    plan.shares =
        fa_max(1, fa_min(ENOUGH_TASKS / fa_max(1, groups * blocks), p->seq_k / SHORTEST_SHARE));
    int64_t per_tile = plan.shares > 1 ? 1 : FA_TILE_BLOCKS;
    while (per_tile > 1 && groups * blocks < per_tile * TASKS_PER_THREAD * num_threads(p))
        per_tile /= 2;
    plan.rows = fa_min(per_tile * FA_BLOCK_M, rows);
    plan.tiles = fa_div_up(rows, per_tile * FA_BLOCK_M);
    plan.share = fa_round_up(fa_div_up(p->seq_k, plan.shares), FA_BLOCK_N);
    plan.scratch = cache_lines(plan.kernels->forward_scratch(p, (int)plan.rows));
    plan.partial = plan.kernels->forward_partial(p);
    plan.scratches = p->workspace;
    plan.partials = plan.scratches + plan.scratch * (size_t)num_threads(p);
    return plan;
}

static size_t forward_bytes(const struct forward_plan *plan) {
    const int64_t tiles = plan->p->batch * plan->p->heads_k * plan->tiles;
    return plan->scratch * (size_t)num_threads(plan->p) +
           (plan->shares > 1 ? plan->partial * (size_t)(tiles * plan->shares) : 0);
}

size_t fa_cpu_forward_workspace(const struct fa_params *p) {
    if (fa_cpu_supports(p, NULL) != FA_OK)
        return 0;
    const struct forward_plan plan = plan_forward(p);
    return forward_bytes(&plan);
}

/* Tile i, the last of a group first: under a causal mask it has the most keys. */
static struct fa_query_tile query_tile(const struct forward_plan *plan, int64_t i) {
    const struct fa_params *p = plan->p;
    const int64_t group = i / plan->tiles, row = (plan->tiles - 1 - i % plan->tiles) * plan->rows;
    return (struct fa_query_tile){
        .batch = group / p->heads_k,
        .head_k = group % p->heads_k,
        .first_row = row,
        .rows = (int)fa_min(plan->rows, fa_heads_per_group(p) * p->seq_q - row),
        .key_begin = 0,
        .key_end = p->seq_k,
    };
}

static void forward_task(const void *ctx, int64_t i, int slot) {
    const struct forward_plan *plan = ctx;
    struct fa_query_tile tile = query_tile(plan, i / plan->shares);
    if (plan->shares > 1) {
        tile.key_begin = i % plan->shares * plan->share;
        tile.key_end = fa_min(tile.key_begin + plan->share, plan->p->seq_k);
        tile.partial = plan->partials + plan->partial * (size_t)i;
    }
    plan->kernels->forward_tile(plan->p, &tile, plan->scratches + plan->scratch * (size_t)slot);
}

static void merge_task(const void *ctx, int64_t i, int slot) {
    const struct forward_plan *plan = ctx;
    struct fa_query_tile tile = query_tile(plan, i);
    plan->kernels->forward_merge(plan->p, &tile,
                                 plan->partials + plan->partial * (size_t)(i * plan->shares),
                                 (int)plan->shares, plan->scratches + plan->scratch * (size_t)slot);
}

enum fa_status fa_cpu_forward(const struct fa_params *p) {
    enum fa_status status = fa_cpu_supports(p, NULL);
    if (status != FA_OK)
        return status;
    const struct forward_plan plan = plan_forward(p);
    if (p->workspace_bytes < forward_bytes(&plan) || inputs_are_missing(p))
        return FA_INVALID;
    const int64_t tiles = p->batch * p->heads_k * plan.tiles;
    run_tasks(p, tiles * plan.shares, forward_task, &plan);
    if (plan.shares > 1)
        run_tasks(p, tiles, merge_task, &plan);
    return FA_OK;
}

/* --- backward: a task is the keys of a head, or with few heads a share of them ---
 *
 * Tasks never write to the same place, so the result does not depend on who is first. Where heads
 * or batches share a mask's gradient they are one task's, one after the other. */

struct backward_plan {
    const struct fa_params *p;
    const struct fa_cpu_kernels *kernels;
    int64_t owners; /* groups of heads that no other task may share a mask gradient with */
    int64_t batches, heads_k; /* of one owner */
    int64_t shares;           /* that the keys of a head are split into */
    int64_t buffers;          /* that they sum dq in; where possible one does so in its tensor */
    size_t scratch, dq;
    char *scratches, *dqs;
};

static int64_t gcd(int64_t a, int64_t b) {
    return b ? gcd(b, a % b) : a;
}

static struct backward_plan plan_backward(const struct fa_params *p) {
    struct backward_plan plan = {.p = p, .kernels = fa_cpu_kernels_for(p)};
    const struct fa_mask_grad *dmask = &p->dmask;
    const int64_t threads = num_threads(p), tiles = fa_div_up(p->seq_k, FA_BLOCK_N_BACKWARD);
    plan.batches = dmask->data && dmask->stride_batch == 0 ? p->batch : 1;
    plan.heads_k = dmask->data && dmask->stride_head == 0 ? p->heads_k : 1;
    plan.owners = fa_max(1, p->batch * p->heads_k) / fa_max(1, plan.batches * plan.heads_k);
    /* Many owners keep the threads busy; few are split so that threads get equal numbers. Keys
     * that share a mask gradient cannot be split. */
    plan.shares = plan.owners >= 4 * threads ? 1 : threads / gcd(plan.owners, threads);
    plan.shares = dmask->data && dmask->stride_col == 0 ? 1 : fa_min(plan.shares, fa_max(1, tiles));
    plan.scratch = cache_lines(plan.kernels->backward_scratch(p));
    plan.buffers = plan.shares - plan.kernels->dq_in_place(p);
    plan.dq = p->dq.data ? plan.kernels->backward_dq(p) : 0;
    plan.scratches = p->workspace;
    plan.dqs = plan.scratches + plan.scratch * (size_t)threads;
    return plan;
}

/* With whole heads a thread reuses one dq buffer; shares of keys need theirs until they are summed.
 */
static size_t dq_buffers(const struct backward_plan *plan) {
    const struct fa_params *p = plan->p;
    return (size_t)(plan->buffers * (plan->shares > 1 ? p->batch * p->heads_k : num_threads(p)));
}

static size_t backward_bytes(const struct backward_plan *plan) {
    return plan->scratch * (size_t)num_threads(plan->p) + plan->dq * dq_buffers(plan);
}

size_t fa_cpu_backward_workspace(const struct fa_params *p) {
    if (fa_cpu_supports(p, NULL) != FA_OK)
        return 0;
    const struct backward_plan plan = plan_backward(p);
    return backward_bytes(&plan);
}

enum { DQ_ROWS = 256 }; /* whose dq buffers are summed at a time */

static void backward_task(const void *ctx, int64_t task, int slot) {
    const struct backward_plan *plan = ctx;
    const struct fa_params *p = plan->p;
    const int64_t owner = task / plan->shares, share = task % plan->shares;
    const int64_t owners_of_batch = p->heads_k / plan->heads_k;
    const int64_t rows = fa_heads_per_group(p) * p->seq_q, blocks = fa_div_up(rows, DQ_ROWS);
    for (int64_t b = 0; b < plan->batches; b++) {
        for (int64_t h = 0; h < plan->heads_k; h++) {
            struct fa_key_share keys = {
                .batch = plan->batches > 1 ? b : owner / owners_of_batch,
                .head_k = plan->heads_k > 1 ? h : owner % owners_of_batch,
                .index = share,
                .count = plan->shares,
            };
            const int64_t group = keys.batch * p->heads_k + keys.head_k;
            const int64_t first = plan->buffers * (plan->shares > 1 ? group : slot);
            const int64_t buffer = share - (plan->shares - plan->buffers);
            char *dqs = plan->dqs + plan->dq * (size_t)first;
            if (buffer >= 0)
                keys.dq = dqs + plan->dq * (size_t)buffer;
            plan->kernels->backward_keys(p, &keys, plan->scratches + plan->scratch * (size_t)slot);
            for (int64_t x = 0; x < blocks && p->dq.data && plan->shares == 1; x++) {
                const int64_t begin = (x + keys.head_k) % blocks * DQ_ROWS;
                plan->kernels->backward_store_dq(p, keys.batch, keys.head_k, begin,
                                                 fa_min(begin + DQ_ROWS, rows), dqs,
                                                 (int)plan->buffers);
            }
        }
    }
}

static void sum_dq_task(const void *ctx, int64_t task, int slot) {
    (void)slot;
    const struct backward_plan *plan = ctx;
    const struct fa_params *p = plan->p;
    const int64_t rows = fa_heads_per_group(p) * p->seq_q, blocks = fa_div_up(rows, DQ_ROWS);
    const int64_t group = task / blocks, begin = task % blocks * DQ_ROWS;
    plan->kernels->backward_store_dq(
        p, group / p->heads_k, group % p->heads_k, begin, fa_min(begin + DQ_ROWS, rows),
        plan->dqs + plan->dq * (size_t)(group * plan->buffers), (int)plan->buffers);
}

enum fa_status fa_cpu_backward(const struct fa_params *p) {
    enum fa_status status = fa_cpu_supports(p, NULL);
    if (status != FA_OK)
        return status;
    const struct backward_plan plan = plan_backward(p);
    if (p->workspace_bytes < backward_bytes(&plan) || inputs_are_missing(p) ||
        is_missing(&p->dout, p->batch * p->heads_q * p->seq_q * p->head_dim_v))
        return FA_INVALID;
    if (p->batch * p->heads_k == 0)
        return FA_OK;
    run_tasks(p, plan.owners * plan.shares, backward_task, &plan);
    if (p->dq.data && plan.shares > 1)
        run_tasks(p, p->batch * p->heads_k * fa_div_up(fa_heads_per_group(p) * p->seq_q, DQ_ROWS),
                  sum_dq_task, &plan);
    return FA_OK;
}
