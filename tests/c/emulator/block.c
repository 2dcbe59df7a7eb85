/* Blocks run one after the other, those of a cluster together. Their threads are fibers: one runs
 * until it has to wait for others, and hands over to one that can go on. Where there is none, and
 * nothing is under way that could wake one, the kernel hangs, and all threads are asked where they
 * are. */
#define _GNU_SOURCE /* dladdr, ucontext */
#include "inside.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

enum { STACK = 256 << 10, GUARD = 16 << 10, DEPTH = 12, REPORT = 6000 };

static struct fiber {
    ucontext_t start;
    jmp_buf context;
    char *stack; /* STACK bytes, above GUARD bytes that cannot be touched */
    enum { NEW, READY, WAITING, ENDED } state;
    const void *waits_for;
    const char *text; /* of what it waits for */
    unsigned a, b;
    void **frame; /* where it waits */
} fibers[MAX_THREADS];

static struct warp {
    unsigned arrived, alive; /* lanes */
    const char *instruction; /* at which those are that have arrived */
    void (*run)(void *const lanes[LANES]);
    int all; /* lanes are needed, of those that have ended, too */
    void *lanes[LANES];
} warps[MAX_WARPS];

struct emu_index emu_thread, emu_block, emu_block_size, emu_grid_size;
int emu_warps;
unsigned emu_self, emu_rank;

static struct fiber *ready[MAX_THREADS]; /* a ring */
static unsigned ready_first, ready_count;
static unsigned spins; /* times that somebody looked in vain, since something happened */
static jmp_buf launcher;
static const struct emu_kernel *const *kernels; /* of each block of a cluster */
static unsigned cluster_threads;
static void **parameters;
static char report[REPORT];
static uint64_t random_state;

static struct fiber *current(void) {
    return &fibers[emu_self];
}

/* --- the order of threads --- */

void emu_set_seed(uint64_t seed) {
    random_state = seed * UINT64_C(0x9E3779B97F4A7C15);
}

unsigned emu_random(unsigned n) { /* xorshift; without a seed always 0 */
    random_state ^= random_state << 13, random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (unsigned)(random_state >> 32) % n;
}

static void make_ready(struct fiber *f) {
    if (f->state != NEW)
        f->state = READY;
    ready[(ready_first + ready_count++) % MAX_THREADS] = f;
}

static struct fiber *take_ready(void) {
    const unsigned chosen = (ready_first + emu_random(ready_count)) % MAX_THREADS;
    struct fiber *f = ready[chosen];
    ready[chosen] = ready[ready_first];
    ready_first = (ready_first + 1) % MAX_THREADS;
    ready_count--;
    return f;
}

static void report_hang(void);

static void become(unsigned self) {
    emu_self = self;
    emu_rank = self / emu_block_size.x;
    emu_thread.x = self % emu_block_size.x;
    emu_block.x = emu_block.x / kernels[0]->cluster * kernels[0]->cluster + emu_rank;
}

static _Noreturn void run_next(void) {
    if (emu_random(16) == 15)
        emu_shared_happen();
    while (ready_count == 0) {
        int ended = 1;
        for (unsigned n = 0; n < cluster_threads; n++)
            ended &= fibers[n].state == ENDED;
        if (ended)
            _longjmp(launcher, 1);
        if (!emu_shared_happen()) {
            report_hang();
            _longjmp(launcher, 1);
        }
    }
    struct fiber *f = take_ready();
    become((unsigned)(f - fibers));
    if (f->state == NEW) {
        f->state = READY;
        setcontext(&f->start);
    }
    _longjmp(f->context, 1);
}

static void switch_away(void) {
    current()->frame = __builtin_frame_address(0);
    if (!_setjmp(current()->context))
        run_next();
}

void emu_wait_for(const void *what, const char *text, unsigned a, unsigned b) {
    struct fiber *f = current();
    f->state = WAITING;
    f->waits_for = what;
    f->text = text, f->a = a, f->b = b;
    switch_away();
}

void emu_wake(const void *what) {
    spins = 0;
    for (unsigned n = 0; n < cluster_threads; n++)
        if (fibers[n].state == WAITING && fibers[n].waits_for == what)
            make_ready(&fibers[n]);
}

void emu_yield(void) {
    if (spins++ > 100 * cluster_threads && !emu_shared_happen())
        emu_fail("waits for something in global memory that nobody will write");
    make_ready(current());
    switch_away();
}

/* --- warps --- */

/* Once all lanes have arrived or ended. */
static void carry_out(struct warp *w) {
    if (w->all && w->alive != ~0u)
        emu_fail("%s by a warp of which some lanes have ended", w->instruction);
    void *lanes[LANES];
    memcpy(lanes, w->lanes, sizeof lanes);
    memset(w->lanes, 0, sizeof w->lanes);
    w->arrived = 0;
    w->run(lanes);
    emu_wake(w);
}

static void meet(const char *instruction, void (*run)(void *const lanes[LANES]), void *mine,
                 int all) {
    struct warp *w = &warps[emu_warp()];
    if (w->arrived && strcmp(w->instruction, instruction) != 0)
        emu_fail("%s, while other lanes of the warp are at %s", instruction, w->instruction);
    w->instruction = instruction, w->run = run, w->all = all;
    w->lanes[emu_thread.x % LANES] = mine;
    w->arrived |= 1u << emu_thread.x % LANES;
    if (w->arrived != w->alive) {
        emu_wait_for(w, instruction, 0, 0);
        return;
    }
    carry_out(w);
    if (random_state) { /* others may be faster */
        make_ready(current());
        switch_away();
    }
}

void emu_meet(const char *instruction, void (*run)(void *const lanes[LANES]), void *mine) {
    meet(instruction, run, mine, 0);
}

void emu_meet_all(const char *instruction, void (*run)(void *const lanes[LANES]), void *mine) {
    meet(instruction, run, mine, 1);
}

struct shuffle {
    unsigned value, from, result;
};

static void run_shuffle(void *const lanes[LANES]) {
    for (int lane = 0; lane < LANES; lane++) {
        struct shuffle *mine = lanes[lane];
        const struct shuffle *other = mine ? lanes[mine->from % LANES] : NULL;
        if (mine)
            mine->result = other ? other->value : ~0u; /* of one that has ended: undefined */
    }
}

unsigned emu_shuffle(unsigned x, unsigned from_lane) {
    struct shuffle mine = {x, from_lane, 0};
    emu_meet("shfl.sync", run_shuffle, &mine);
    return mine.result;
}

struct vote {
    int predicate;
    unsigned ballot;
};

static void run_vote(void *const lanes[LANES]) {
    unsigned ballot = 0;
    for (int lane = 0; lane < LANES; lane++)
        ballot |= (unsigned)(lanes[lane] && ((struct vote *)lanes[lane])->predicate) << lane;
    for (int lane = 0; lane < LANES; lane++)
        if (lanes[lane])
            ((struct vote *)lanes[lane])->ballot = ballot;
}

unsigned emu_ballot(int predicate) {
    struct vote mine = {predicate != 0, 0};
    emu_meet("vote.sync", run_vote, &mine);
    return mine.ballot;
}

static void run_nothing(void *const lanes[LANES]) {
    (void)lanes;
}

void emu_sync_warp(void) {
    emu_meet("__syncwarp", run_nothing, current());
}

/* --- reports --- */

static void append(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void append(const char *format, ...) {
    const size_t length = strlen(report);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(report + length, REPORT - length, format, arguments);
    va_end(arguments);
}

/* The addresses from which the thread has come to `frame`, as far as they are the kernel's. */
static int trace(const struct fiber *f, void **frame, void *addresses[DEPTH]) {
    Dl_info info, own;
    int depth = 0;
    if (!dladdr((void *)kernels[(f - fibers) / emu_block_size.x]->call, &own))
        return 0;
    while ((char *)frame >= f->stack && (char *)frame < f->stack + STACK && depth < DEPTH) {
        if (dladdr(frame[1], &info) && info.dli_fbase == own.dli_fbase)
            addresses[depth++] = (char *)frame[1] - (size_t)own.dli_fbase;
        frame = *frame > (void *)frame ? *frame : NULL;
    }
    return depth;
}

/* "release at forward_sm90.cu:75, called by compute at forward_sm90.cu:539", and so on */
static void append_place(void *const addresses[DEPTH], int depth) {
    Dl_info own;
    char command[4096];
    if (!dladdr((void *)kernels[0]->call, &own)) /* the others are the same */
        return;
    int length = snprintf(command, sizeof command, "addr2line -sfipCe %s", own.dli_fname);
    for (int n = 0; n < depth; n++) /* of the call, not of what comes after it */
        length += snprintf(command + length, sizeof command - (size_t)length, " %p",
                           (void *)((char *)addresses[n] - 1));
    FILE *lines = depth ? popen(command, "r") : NULL;
    char line[512];
    while (lines && fgets(line, sizeof line, lines)) {
        line[strcspn(line, "\n")] = 0;
        const char *text = line + strspn(line, " ");
        if (strncmp(text, "(inlined by) ", 13) == 0)
            text += 13;
        if (!strstr(text, "cuda.h"))
            append("        %s\n", text);
    }
    if (lines)
        pclose(lines);
}

void emu_fail(const char *format, ...) {
    *report = 0;
    append("block %u, thread %u (warp %u, lane %u): ", emu_block.x, emu_thread.x,
           emu_thread.x / LANES, emu_thread.x % LANES);
    const size_t length = strlen(report);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(report + length, REPORT - length, format, arguments);
    va_end(arguments);
    append("\n");
    void *addresses[DEPTH];
    append_place(addresses, trace(current(), __builtin_frame_address(0), addresses));
    _longjmp(launcher, 1);
}

static void report_hang(void) {
    snprintf(report, REPORT, "block %u hangs\n", emu_block.x);
    void *before[DEPTH] = {0}, *here[DEPTH];
    int depth_before = 0;
    char text_before[256] = "", text[256];
    unsigned first = 0;
    for (unsigned n = 0; n <= cluster_threads; n++) {
        int depth = 0;
        *text = 0;
        const struct fiber *f = &fibers[n];
        if (n < cluster_threads && f->state == ENDED)
            snprintf(text, sizeof text, "ended");
        else if (n < cluster_threads) {
            const struct warp *w = &warps[n / LANES];
            if (f->waits_for == w)
                snprintf(text, sizeof text, "at %s, without lanes %08x of the warp", f->text,
                         w->alive & ~w->arrived);
            else
                snprintf(text, sizeof text, f->text, f->a, f->b);
            depth = trace(f, f->frame, here);
        }
        if (n > 0 && (strcmp(text, text_before) != 0 || depth != depth_before ||
                      memcmp(here, before, (size_t)depth * sizeof *here) != 0)) {
            append("    threads %u to %u: %s\n", first, n - 1, text_before);
            append_place(before, depth_before);
            first = n;
        }
        strcpy(text_before, text);
        memcpy(before, here, (size_t)depth * sizeof *here);
        depth_before = depth;
    }
}

/* --- blocks --- */

static void fiber_main(void) {
    kernels[emu_rank]->call(parameters);
    struct warp *w = &warps[emu_warp()];
    current()->state = ENDED;
    w->alive &= ~(1u << emu_thread.x % LANES);
    if (w->arrived && w->arrived == w->alive)
        carry_out(w);
    if (!w->alive)
        emu_barriers_warp_ended();
    run_next();
}

static void prepare_fiber(struct fiber *f) {
    if (!f->stack) {
        char *memory = mmap(NULL, GUARD + STACK, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, GUARD, PROT_NONE))
            abort();
        f->stack = memory + GUARD;
    }
    f->state = NEW;
    getcontext(&f->start);
    f->start.uc_stack.ss_sp = f->stack;
    f->start.uc_stack.ss_size = STACK;
    f->start.uc_link = NULL; /* nobody comes back: fiber_main runs the next */
    makecontext(&f->start, fiber_main, 0);
    make_ready(f);
}

static void run_cluster(unsigned first_block, unsigned shared_bytes) {
    emu_block.x = first_block;
    memset(warps, 0, sizeof warps);
    ready_first = ready_count = 0, spins = 0;
    emu_barriers_begin();
    emu_shared_begin(kernels, shared_bytes);
    emu_tensor_cores_begin();
    for (int n = 0; n < emu_warps; n++)
        warps[n].alive = ~0u;
    for (unsigned n = 0; n < cluster_threads; n++)
        prepare_fiber(&fibers[n]);
    if (!_setjmp(launcher))
        run_next();
    become(0);
    if (!*report && !_setjmp(launcher)) {
        emu_shared_end();
        emu_tensor_cores_end();
    }
}

static void on_fault(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)context;
    emu_fail("touches memory at %p, where there is none", info->si_addr);
}

const char *emu_run(const struct emu_kernel *const kernels_[MAX_CLUSTER], void **parameters_,
                    unsigned blocks, unsigned threads, unsigned shared_bytes) {
    kernels = kernels_, parameters = parameters_;
    const unsigned cluster = kernels[0]->cluster;
    emu_block_size = (struct emu_index){threads, 1, 1};
    emu_grid_size = (struct emu_index){blocks, 1, 1};
    cluster_threads = cluster * threads;
    emu_warps = (int)(cluster_threads / LANES);
    if (cluster > MAX_CLUSTER || cluster_threads > MAX_THREADS || blocks % cluster)
        return "these blocks are no clusters";

    static char signal_stack[64 << 10];
    const int signals[] = {SIGSEGV, SIGBUS};
    struct sigaction action = {.sa_sigaction = on_fault,
                               .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER},
                     before[2];
    stack_t stack = {.ss_sp = signal_stack, .ss_size = sizeof signal_stack}, stack_before;
    sigaltstack(&stack, &stack_before);
    for (int n = 0; n < 2; n++)
        sigaction(signals[n], &action, &before[n]);
    *report = 0;
    for (unsigned block = 0; block < blocks && !*report; block += cluster)
        run_cluster(block, shared_bytes);
    for (int n = 0; n < 2; n++)
        sigaction(signals[n], &before[n], NULL);
    sigaltstack(&stack_before, NULL);
    return *report ? report : NULL;
}
