/* Random calls of the CPU kernels, without Python; meant to run under a sanitizer.
 *
 *     fuzz [--seed N] [--calls N]
 *
 * Call n is drawn from seed N + n alone, so a failure is repeated by the seed it prints and
 * --calls 1. Each call draws sizes, strides, dtypes, masks and flags, runs the forward and the
 * backward and compares all results with a double-precision reference. Whatever is not an element
 * of a tensor, in the tensors and the workspace alike, is NaN before the call; in the outputs it
 * must be so still after it. */
#include "array.h"
#include "call.h"
#include "flash_attention.h"
#include "reference.h"

#include <inttypes.h>
#include <sanitizer/common_interface_defs.h>
#include <signal.h>
#include <stdio.h>
#include <unistd.h>

static struct call current;
static int failures;
static double worst; /* the largest error seen, in units of its bound */

static void print_current(void) {
    print_call(&current);
}

static void on_signal(int signal) {
    fprintf(stderr, "FAIL: %s\n", signal == SIGALRM ? "timeout" : "abort");
    print_current();
    _exit(1);
}

/* UBSan takes no callback: it aborts, and the signal does. */
const char *__ubsan_default_options(void) {
    return "print_stacktrace=1:abort_on_error=1";
}

#define FAIL(...)                                                                                  \
    do {                                                                                           \
        fprintf(stderr, "FAIL: " __VA_ARGS__);                                                     \
        fputc('\n', stderr);                                                                       \
        print_current();                                                                           \
        failures++;                                                                                \
    } while (0)

/* --- carrying it out --- */

/* With a workspace of exactly the size asked for. */
static enum fa_status run_kernel(const struct fa_params *params,
                                 size_t (*workspace)(const struct fa_params *),
                                 enum fa_status (*kernel)(const struct fa_params *)) {
    struct fa_params p = *params;
    p.workspace_bytes = workspace(&p);
    if (p.workspace_bytes > 0 && posix_memalign(&p.workspace, 64, p.workspace_bytes) != 0)
        abort();
    if (p.workspace_bytes > 0)
        memset(p.workspace, POISON, p.workspace_bytes);
    enum fa_status status = kernel(&p);
    free(p.workspace);
    return status;
}

static enum fa_status run_forward(const struct fa_params *p) {
    return run_kernel(p, fa_cpu_forward_workspace, fa_cpu_forward);
}

static enum fa_status run_backward(const struct fa_params *p) {
    return run_kernel(p, fa_cpu_backward_workspace, fa_cpu_backward);
}

static void run_both(struct call *c) {
    if (!c->p.dmask.in_dtype) { /* to be added to */
        FOR_EACH_ELEMENT(&c->dmask, index, n) {
            store(c->dmask.dtype, c->dmask.data, index, 0);
        }
    }
    enum fa_status forward = run_forward(&c->p), backward = run_backward(&c->p);
    if (forward != FA_OK || backward != FA_OK)
        FAIL("status %d of the forward, %d of the backward", forward, backward);
}

/* --- checking the results --- */

/* Compares, then poisons what was compared: nothing else may have been written. */
static void check_output(const char *name, struct array *a, const struct result *want) {
    double tiny = a->dtype == FA_FLOAT64 ? 1e-290 : a->dtype == FA_FLOAT16 ? 0x1p-24 : 1e-30;
    int wrong = 0;
    FOR_EACH_ELEMENT(a, index, n) {
        double got = load(a->dtype, a->data, index), expected = want->value[n];
        double bound = want->bound[n / want->width] + tiny;
        double error = got == expected ? 0 : fabs(got - expected);
        int overflows = a->dtype == FA_FLOAT16 && isfinite(expected) && fabs(expected) > 65000;
        if (isfinite(got) == isfinite(expected) && error <= bound)
            worst = fmax(worst, error / bound);
        else if (!overflows && wrong++ == 0)
            FAIL("%s[%" PRId64 ", %" PRId64 ", %" PRId64 ", %" PRId64
                 "] is %.9g, not %.9g (error %.3g, bound %.3g)",
                 name, d0, d1, d2, d3, got, expected, error, bound);
        size_t size = element_size[a->dtype];
        memset((char *)a->data + index * (int64_t)size, POISON, size);
    }
    for (size_t n = 0; n < a->bytes; n++)
        if (a->memory[n] != POISON) {
            FAIL("%s: byte %zu of the padding was written", name, n);
            break;
        }
}

static void check_against_reference(struct call *c) {
    struct reference r = {.p = &c->p, .mask_size = {1, 1, 1, 1}};
    r.q.value = array_values(&c->q);
    r.k.value = array_values(&c->k);
    r.v.value = array_values(&c->v);
    r.dout.value = array_values(&c->dout);
    if (c->mask.memory) {
        r.mask = array_values(&c->mask);
        memcpy(r.mask_size, c->mask.size, sizeof r.mask_size);
    }
    reference_run(&r);
    const struct result *results[OUTPUTS] = {&r.out, &r.lse, &r.dq, &r.dk, &r.dv, &r.dmask};
    for (int n = 0; n < OUTPUTS; n++)
        check_output(output_names[n], output(c, n), results[n]);
    double *values[] = {r.q.value, r.k.value, r.v.value, r.dout.value, r.mask};
    for (int n = 0; n < 5; n++)
        free(values[n]);
    reference_free(&r);
}

/* The same call again gives the same bits. */
static void check_reproducible(struct call *c) {
    unsigned char *first[OUTPUTS];
    for (int n = 0; n < OUTPUTS; n++) {
        struct array *a = output(c, n);
        first[n] = malloc(a->bytes);
        if (a->bytes > 0) {
            memcpy(first[n], a->memory, a->bytes);
            memset(a->memory, POISON, a->bytes);
        }
    }
    run_both(c);
    for (int n = 0; n < OUTPUTS; n++) {
        int must = c->p.deterministic || n < 2; /* out and lse always */
        if (must && output(c, n)->bytes > 0 &&
            memcmp(first[n], output(c, n)->memory, output(c, n)->bytes))
            FAIL("%s differs from run to run", output_names[n]);
        free(first[n]);
    }
}

/* Runs the call; the inputs and what lies around them stay as they are. */
static void check_inputs_are_kept(struct call *c) {
    const struct array *inputs[] = {&c->q, &c->k, &c->v, &c->mask, &c->dout};
    enum { INPUTS = sizeof inputs / sizeof *inputs };
    unsigned char *before[INPUTS];
    for (int n = 0; n < INPUTS; n++) {
        before[n] = malloc(inputs[n]->bytes);
        if (inputs[n]->bytes > 0)
            memcpy(before[n], inputs[n]->memory, inputs[n]->bytes);
    }
    run_both(c);
    for (int n = 0; n < INPUTS; n++) {
        if (inputs[n]->bytes > 0 && memcmp(before[n], inputs[n]->memory, inputs[n]->bytes))
            FAIL("input %d was written to", n);
        free(before[n]);
    }
}

/* --- requests that must be refused --- */

static const int32_t some_int32;
static const float some_float;

/* Applies the n-th change to *p and returns its text, or NULL past the last. */
#define CHANGE(...)                                                                                \
    if (n-- == 0)                                                                                  \
    return (void)(p->__VA_ARGS__), #__VA_ARGS__

static const char *make_unsupported(struct fa_params *p, int n) {
    CHANGE(softcap = 1);
    CHANGE(alibi_slopes = &some_float);
    CHANGE(sinks = &some_float);
    CHANGE(cu_seqlens_q = &some_int32);
    CHANGE(cu_seqlens_k = &some_int32);
    CHANGE(block_table = &some_int32);
    CHANGE(partial_out = 1);
    return NULL;
}

static const char *make_invalid(struct fa_params *p, int n) {
    CHANGE(batch = -1);
    CHANGE(heads_q = -1);
    CHANGE(heads_k = -1);
    CHANGE(heads_k = 0);
    CHANGE(heads_k = p->heads_q + 1);
    CHANGE(seq_q = -1);
    CHANGE(seq_k = -1);
    CHANGE(head_dim = -1);
    CHANGE(head_dim_v = -1);
    CHANGE(dtype = FA_BOOL);
    CHANGE(dtype = (enum fa_dtype)99);
    CHANGE(dropout_p = -0.1);
    CHANGE(dropout_p = 1.1);
    CHANGE(dropout_p = NAN);
    CHANGE(mask = ((struct fa_mask){.data = &some_float, .dtype = (enum fa_dtype)99}));
    CHANGE(dmask.in_dtype = 1, p->mask.dtype = FA_BOOL);
    return NULL;
}

/* What only a look at the pointers shows, which fa_cpu_supports does not take. */
static const char *make_incomplete(struct fa_params *p, int n) {
    CHANGE(q.data = NULL);
    CHANGE(k.data = NULL);
    CHANGE(v.data = NULL);
    CHANGE(out.data = NULL);
    CHANGE(lse = NULL);
    CHANGE(dout.data = NULL);
    CHANGE(rng_state = NULL, p->dropout_p = 0.5);
    return NULL;
}

static void check_refusals(const struct call *c) {
    const struct {
        const char *(*change)(struct fa_params *, int);
        enum fa_status expected;
    } lists[] = {{make_unsupported, FA_UNSUPPORTED},
                 {make_invalid, FA_INVALID},
                 {make_incomplete, FA_INVALID}};
    for (int list = 0; list < 3; list++)
        for (int n = 0;; n++) {
            struct fa_params p = c->p;
            const char *what = lists[list].change(&p, n), *reason = NULL;
            if (!what)
                break;
            enum fa_status expected = lists[list].expected;
            enum fa_status supports = fa_cpu_supports(&p, &reason);
            if (lists[list].change != make_incomplete && (supports != expected || !reason))
                FAIL("%s: fa_cpu_supports says %d", what, supports);
            enum fa_status forward = run_forward(&p), backward = run_backward(&p);
            if ((forward != expected && p.dout.data) || (backward != expected && !p.partial_out))
                FAIL("%s: status %d of the forward, %d of the backward", what, forward, backward);
        }

    const struct {
        size_t (*workspace)(const struct fa_params *);
        enum fa_status (*kernel)(const struct fa_params *);
    } directions[] = {{fa_cpu_forward_workspace, fa_cpu_forward},
                      {fa_cpu_backward_workspace, fa_cpu_backward}};
    for (int n = 0; n < 2; n++) {
        struct fa_params p = c->p;
        p.workspace_bytes = directions[n].workspace(&p);
        if (p.workspace_bytes-- > 0 && directions[n].kernel(&p) != FA_INVALID)
            FAIL("a workspace that is a byte too small is taken");
    }
}

/* --- */

static void run_call(uint64_t seed) {
    struct call *c = &current;
    draw_call(c, seed);
    alarm(300);
    if (fa_cpu_set_isa(c->isa) != FA_OK || strcmp(fa_cpu_isa(), c->isa) != 0)
        FAIL("cannot switch to %s", c->isa);
    if (fa_cpu_supports(&c->p, NULL) != FA_OK)
        FAIL("not supported");
    int empty = array_count(&c->q) == 0 || array_count(&c->k) == 0 || array_count(&c->v) == 0;
    if (!empty && one_in(16))
        check_refusals(c);
    check_inputs_are_kept(c);
    if (one_in(8))
        check_reproducible(c);
    check_against_reference(c);
    free_call(c);
}

/* The instruction set is chosen at first use, which may come on several threads at once. */
static void first_use(void *ctx, int id) {
    (void)ctx, (void)id;
    if (!fa_cpu_isa())
        abort();
}

int main(int argc, char **argv) {
    uint64_t seed = 1, calls = 1000;
    for (int n = 1; n + 1 < argc; n += 2) {
        uint64_t value = strtoull(argv[n + 1], NULL, 10);
        if (strcmp(argv[n], "--seed") == 0)
            seed = value;
        else if (strcmp(argv[n], "--calls") == 0)
            calls = value;
        else
            return fprintf(stderr, "usage: fuzz [--seed N] [--calls N]\n"), 2;
    }
    printf("fuzz: seed %" PRIu64 ", %" PRIu64 " calls\n", seed, calls);
    __sanitizer_set_death_callback(print_current);
    signal(SIGABRT, on_signal);
    signal(SIGALRM, on_signal);
    run_at_once(first_use, NULL, 4);
    for (uint64_t n = 0; n < calls && failures < 10; n++)
        run_call(seed + n);
    printf("fuzz: %d failures; the largest error was %.2f of what is allowed\n", failures, worst);
    return failures > 0;
}
