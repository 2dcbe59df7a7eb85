/* The CUDA engine with a driver and a compiler that do nothing (fake_cuda.c): what it asks them
 * for, from one thread and from many, what it does where they fail, and what a call costs. */
#define _GNU_SOURCE
#include "cuda/engine/engine.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "fake_cuda.h"

/* The Makefile makes the list of names. */
const struct fa_cuda_source fa_cuda_sources[] = {
#define SOURCE(NAME) {NAME, "nothing"},
#include "kernel_names.h"
#undef SOURCE
    {NULL, NULL}};

#define CHECK(CONDITION)                                                                           \
    do {                                                                                           \
        if (!(CONDITION)) {                                                                        \
            fprintf(stderr, "FAIL: %s:%d: %s (last error: %s)\n", __FILE__, __LINE__, #CONDITION,  \
                    fa_cuda_last_error());                                                         \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

static atomic_int warnings;

static void on_warning(const char *message) {
    (void)message;
    warnings++;
}

/* --- no memory from the heap after the first call --- */

static atomic_int allocations;

#ifndef SANITIZED
void *__libc_malloc(size_t bytes);
void *__libc_calloc(size_t count, size_t bytes);
void *malloc(size_t bytes) {
    allocations++;
    return __libc_malloc(bytes);
}
void *calloc(size_t count, size_t bytes) {
    allocations++;
    return __libc_calloc(count, bytes);
}
#endif

/* --- calls --- */

static struct fa_params forward_of(int head_dim) {
    static _Alignas(64) char nothing[64]; /* nobody reads it */
    struct fa_tensor t = {nothing, 3 * 100 * 256, 100 * 256, 256};
    return (struct fa_params){
        .dtype = FA_FLOAT16,
        .batch = 2,
        .heads_q = 3,
        .heads_k = 3,
        .seq_q = 100,
        .seq_k = 100,
        .head_dim = head_dim,
        .head_dim_v = head_dim,
        .q = t,
        .k = t,
        .v = t,
        .out = t,
        .lse = nothing,
        .scale = 1,
        .window_left = FA_NO_LIMIT,
        .window_right = FA_NO_LIMIT,
    };
}

static struct fa_params backward_of(int head_dim) {
    struct fa_params p = forward_of(head_dim);
    p.dout = p.dq = p.dk = p.dv = p.q;
    return p;
}

static enum fa_status call_forward(struct fa_params p) {
    p.workspace_bytes = fa_cuda_forward_workspace(&p);
    p.workspace = p.q.data;
    return fa_cuda_forward(&p);
}

static enum fa_status call_backward(struct fa_params p) {
    p.workspace_bytes = fa_cuda_backward_workspace(&p);
    p.workspace = p.q.data;
    return fa_cuda_backward(&p);
}

/* --- tests --- */

static void fails_without_damage(void) {
    struct fa_params p = forward_of(64);
    fake_cuda.capturing = 1;
    CHECK(call_forward(p) == FA_FAILED);
    CHECK(strstr(fa_cuda_last_error(), "python -m flash_attn_ext warmup"));
    fake_cuda.capturing = 0;
    CHECK(fake_cuda.loads == 0 && fake_cuda.launches == 0);

    fake_cuda.load_error = 200;
    CHECK(call_forward(p) == FA_FAILED);
    fake_cuda.load_error = 2;
    CHECK(call_forward(p) == FA_OUT_OF_MEMORY);
    CHECK(strstr(fa_cuda_last_error(), "out of memory"));
    fake_cuda.load_error = 0;
    CHECK(fake_cuda.loads == 2 && fake_cuda.unloads == 0);
    /* The driver may take memory for the code only here. */
    fake_cuda.function_error = 2;
    CHECK(call_forward(p) == FA_OUT_OF_MEMORY);
    fake_cuda.function_error = 0;
    CHECK(fake_cuda.loads == 3 && fake_cuda.unloads == 1);
    CHECK(fake_cuda.launches == 0);

    fake_cuda.launch_error = 2;
    CHECK(call_forward(p) == FA_OUT_OF_MEMORY);
    CHECK(strstr(fa_cuda_last_error(), "out of memory"));
    fake_cuda.launch_error = 0;
    CHECK(fake_cuda.launches == 1);

    CHECK(call_forward(p) == FA_OK);
    CHECK(fake_cuda.launches == 2);
    fake_cuda.capturing = 1; /* in memory by now */
    CHECK(call_forward(p) == FA_OK);
    fake_cuda.capturing = 0;
    CHECK(fake_cuda.loads == 4 && fake_cuda.unloads == 1);
    CHECK(fake_cuda.grid % 6 == 0 && fake_cuda.grid > 0 && fake_cuda.threads % 32 == 0);

    p.workspace_bytes = 0, p.dout = p.q, p.dq = p.q;
    CHECK(fa_cuda_backward(&p) == FA_INVALID);
    CHECK(strstr(fa_cuda_last_error(), "workspace_bytes"));
    p.device = 9;
    CHECK(fa_cuda_supports(&p) == FA_FAILED);
    p.device = -1;
    CHECK(fa_cuda_supports(&p) == FA_INVALID);
    p.device = 2, fake_cuda.arch = 75;
    CHECK(fa_cuda_supports(&p) == FA_UNSUPPORTED);
    CHECK(strstr(fa_cuda_last_error(), "7.5"));
    fake_cuda.arch = 80;
}

static void another_device(void) {
    struct fa_params p = forward_of(64);
    p.device = 1;
    const int loads = fake_cuda.loads, pushes = fake_cuda.pushes;
    CHECK(call_forward(p) == FA_OK);
    CHECK(fake_cuda.pushes == pushes + 1 && fake_cuda.pops == fake_cuda.pushes);
    CHECK(fake_cuda.loads == loads + 1);
    fake_cuda.current_device = 1;
    CHECK(call_forward(p) == FA_OK);
    CHECK(fake_cuda.pushes == pushes + 1);
    fake_cuda.launch_error = 1;
    fake_cuda.current_device = 0;
    CHECK(call_forward(p) == FA_FAILED);
    CHECK(fake_cuda.pops == fake_cuda.pushes);
    fake_cuda.launch_error = 0;
}

/* One block for each SM of the device, tensor maps, and a counter where pieces of work differ. */
static void persistent_on_hopper(void) {
    struct fa_params p = forward_of(64);
    p.device = 3, fake_cuda.arch = 90;
    CHECK(fa_cuda_forward_workspace(&p) == 0);
    CHECK(call_forward(p) == FA_OK);
    CHECK(fake_cuda.tensor_maps == 3 && fake_cuda.grid == 5 && fake_cuda.threads % 128 == 0);
    struct fa_params with_rest = p;
    with_rest.seq_q = 512;
    CHECK(fa_cuda_forward_workspace(&with_rest) > 0);
    p.window_right = 0;
    CHECK(fa_cuda_forward_workspace(&p) > 0);
    CHECK(fa_cuda_forward(&p) == FA_INVALID);
    CHECK(call_forward(p) == FA_OK && fake_cuda.grid == 5);
    p.batch = p.heads_q = p.heads_k = 1;
    CHECK(call_forward(p) == FA_OK && fake_cuda.grid == 1);
    p.mask = (struct fa_mask){p.q.data, FA_FLOAT16, 0, 0, 104, 1};
    CHECK(call_forward(p) == FA_OK && fake_cuda.tensor_maps == 13);
    p.mask.stride_row = 101;
    CHECK(call_forward(p) == FA_OK && fake_cuda.tensor_maps == 16);
    p.mask.dtype = FA_BOOL, p.seq_k = 1024; /* and a map of its tiles */
    const int launches = fake_cuda.launches;
    CHECK(call_forward(p) == FA_OK && fake_cuda.launches == launches + 2);
    const int tensor_maps = fake_cuda.tensor_maps;
    p.q.stride_row = 65; /* not a multiple of 16 bytes: the kernel for all devices */
    CHECK(call_forward(p) == FA_OK && fake_cuda.tensor_maps == tensor_maps);
    fake_cuda.arch = 80;
}

enum { THREADS = 8, VARIANTS = 40 };
static pthread_barrier_t barrier;

static void *all_variants(void *argument) {
    const int first = (int)(intptr_t)argument;
    pthread_barrier_wait(&barrier);
    for (int i = 0; i < VARIANTS; i++) {
        const int head_dim = 65 + (first * 5 + i) % VARIANTS; /* compiled nowhere else */
        CHECK(call_forward(forward_of(head_dim)) == FA_OK);
    }
    return NULL;
}

static void threads_load_each_variant_once(void) {
    const int loads = fake_cuda.loads, launches = fake_cuda.launches;
    pthread_t threads[THREADS];
    pthread_barrier_init(&barrier, NULL, THREADS);
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, all_variants, (void *)(intptr_t)i) == 0);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    CHECK(fake_cuda.loads == loads + VARIANTS);
    CHECK(fake_cuda.launches == launches + THREADS * VARIANTS);
}

static double nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e9 * (double)now.tv_sec + (double)now.tv_nsec;
}

static void later_calls_are_cheap(void) {
    enum { CALLS = 20000 };
    const struct fa_params f = forward_of(64), b = backward_of(64);
    CHECK(call_forward(f) == FA_OK && call_backward(b) == FA_OK);
    setenv("FLASH_ATTN_EXT_CACHE", "/dev/null/no", 1); /* whoever looks there warns */
    const int loads = fake_cuda.loads, before = allocations;
    const double start = nanoseconds();
    for (int i = 0; i < CALLS; i++)
        call_forward(f);
    const double middle = nanoseconds();
    for (int i = 0; i < CALLS; i++)
        call_backward(b);
    const double end = nanoseconds();
    CHECK(fake_cuda.loads == loads && warnings == 0 && allocations == before);
    printf("engine: %.0f ns for a forward, %.0f ns for a backward, driver not counted\n",
           (middle - start) / CALLS, (end - middle) / CALLS);
}

int main(void) {
    char cache[] = "/tmp/flash_attn_ext_XXXXXX";
    CHECK(mkdtemp(cache));
    setenv("FLASH_ATTN_EXT_CACHE", cache, 1);
    fa_cuda_set_warning_handler(on_warning);

    fails_without_damage();
    another_device();
    persistent_on_hopper();
    threads_load_each_variant_once();
    later_calls_are_cheap();

    char command[64];
    snprintf(command, sizeof command, "rm -r %s", cache);
    return system(command);
}
