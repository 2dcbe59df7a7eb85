/* Shared memory, and the copies that run behind the threads' backs: cp.async and the copy engine.
 * A copy to shared memory is made when somebody waits for it and nobody can go on without, and
 * leaves NaN there until then. What a copy from shared memory reads is looked at when it begins,
 * when a wait has to be behind it, and must be the same both times. */
#include "inside.h"

#include <stdlib.h>
#include <string.h>

enum { POISON = 0xFF, CHUNK = 16, WORD = 4, LIMIT = 256 << 10 };

/* From this bit on an address has the number of the block in its cluster, as on sm_90. */
enum { BLOCK_SHIFT = 24, OFFSET = (1 << BLOCK_SHIFT) - 1 };

static const struct emu_kernel *const *kernels; /* of each block of a cluster */
static unsigned gap_begin, gap_end; /* dynamic shared memory that the block does not have */

/* --- access --- */

/* Who has written to a word, by an instruction that wgmma and the copy engine do not see before its
 * thread has come to a fence: the thread, counted from 1, and how many fences it had come to. */
static struct write {
    uint16_t thread, fences;
} writes[MAX_CLUSTER][LIMIT / WORD];
static uint16_t fences[MAX_THREADS];

unsigned emu_address_in_block(unsigned address, unsigned block) {
    if (block >= kernels[0]->cluster)
        emu_fail("there is no block %u in the cluster", block);
    return (address & OFFSET) | block << BLOCK_SHIFT;
}

unsigned emu_shared_address(const void *p) {
    return emu_address_in_block(
        (unsigned)((const unsigned char *)p - kernels[emu_rank]->shared_begin), emu_rank);
}

static unsigned block_of(unsigned address) {
    const unsigned block = address >> BLOCK_SHIFT;
    if (block >= kernels[0]->cluster)
        emu_fail("%u is no address in shared memory", address);
    if (emu_block_ended(block))
        emu_fail("block %u of the cluster has ended: its shared memory is gone", block);
    return block;
}
static unsigned char *memory_at(unsigned address) {
    return kernels[block_of(address)]->shared_begin + (address & OFFSET);
}

void *emu_shared_at(unsigned address, unsigned bytes, unsigned alignment) {
    const struct emu_kernel *kernel = kernels[block_of(address)];
    const unsigned end = (unsigned)(kernel->shared_end - kernel->shared_begin);
    void *memory = memory_at(address);
    address &= OFFSET;
    if (address >= end || bytes > end - address ||
        (address + bytes > gap_begin && address < gap_end))
        emu_fail("%u bytes at %u in shared memory, where the block has none: %u is the end of what "
                 "is dynamic",
                 bytes, address, gap_begin);
    if (address % alignment)
        emu_fail("%u in shared memory is not a multiple of %u", address, alignment);
    return memory;
}

void *emu_shared_async(unsigned address, unsigned bytes, unsigned alignment) {
    void *p = emu_shared_at(address, bytes, alignment);
    const unsigned block = block_of(address);
    address &= OFFSET;
    for (unsigned word = address / WORD; word <= (address + bytes - 1) / WORD; word++) {
        const struct write w = writes[block][word];
        if (w.thread && w.fences == fences[w.thread - 1])
            emu_fail("%u in shared memory, read by wgmma or the copy engine, was written by thread "
                     "%d, which has not come to a fence.proxy.async since",
                     word * WORD, w.thread - 1);
    }
    return p;
}

/* Bytes were written. */
static void mark(unsigned address, unsigned bytes, unsigned thread, int by_engine) {
    const struct write w = {(uint16_t)(thread + 1), fences[thread]};
    const unsigned block = block_of(address);
    address &= OFFSET;
    for (unsigned word = address / WORD; word <= (address + bytes - 1) / WORD; word++)
        writes[block][word] = by_engine ? (struct write){0, 0} : w;
}

void emu_load_shared(void *to, unsigned address, unsigned bytes) {
    memcpy(to, emu_shared_at(address, bytes, bytes), bytes);
}

void emu_store_shared(unsigned address, const void *from, unsigned bytes) {
    memcpy(emu_shared_at(address, bytes, bytes), from, bytes);
    mark(address, bytes, emu_self, 0);
}

void emu_fence_proxy_async(void) {
    fences[emu_self]++;
}

void emu_check_global(const void *p, unsigned alignment) {
    if ((uintptr_t)p % alignment)
        emu_fail("an access of %u bytes at %p", alignment, p);
}

/* --- copies under way --- */

struct copy {
    struct copy *next; /* younger */
    enum kind { CP_ASYNC, LOAD, STORE } kind;
    unsigned thread, group, address, bytes, mbarrier;
    const void *from; /* CP_ASYNC: `valid` bytes of it */
    unsigned valid;
    /* LOAD, STORE: of a box of a tensor, or of the bytes at `memory` */
    struct emu_map map;
    int at[5];
    unsigned char *memory;
    enum emu_bulk how;
    unsigned char *seen; /* STORE, or a LOAD from there: what was in shared memory at first */
};
/* Of each thread those that it alone can wait for; then the loads of all. */
static struct list {
    struct copy *first, **last;
} lists[MAX_THREADS + 1], *const loads = &lists[MAX_THREADS];
static struct {
    unsigned cp_async, bulk; /* groups committed */
} groups[MAX_THREADS];

static void begin_copy(struct copy copy) {
    struct list *list = copy.kind == LOAD ? loads : &lists[emu_self];
    struct copy *c = malloc(sizeof *c);
    if (!c)
        abort();
    *c = copy;
    c->thread = emu_self;
    *list->last = c, list->last = &c->next;
}

static void forget(struct list *list, struct copy *c) {
    struct copy **at = &list->first;
    while (*at != c)
        at = &(*at)->next;
    *at = c->next;
    if (list->last == &c->next)
        list->last = at;
    free(c->seen);
    free(c);
}

/* Calls `visit` for every element of a box, with where it is in memory (NULL: outside of the
 * tensor) and in shared memory. */
static void for_box(struct copy *c, void (*visit)(struct copy *c, void *memory, unsigned shared)) {
    const struct emu_map *m = &c->map;
    unsigned elements = 1;
    for (int d = 0; d < m->rank; d++)
        elements *= m->box[d];
    for (unsigned n = 0; n < elements; n++) {
        unsigned char *memory = m->data;
        unsigned rest = n;
        for (int d = 0; d < m->rank && memory; d++) {
            const int64_t x = c->at[d] + (int64_t)(rest % m->box[d]);
            rest /= m->box[d];
            memory = x < 0 || x >= m->size[d] ? NULL
                     : d == 0                 ? memory + x * m->elem_bytes
                                              : memory + x * (int64_t)m->stride[d - 1];
        }
        const unsigned to = c->address + n * m->elem_bytes; /* the block's number stays */
        visit(c, memory, m->swizzled ? emu_swizzle_128b(to) : to);
    }
}

static void load_element(struct copy *c, void *memory, unsigned shared) {
    if (memory)
        memcpy(memory_at(shared), memory, c->map.elem_bytes);
    else
        memset(memory_at(shared), 0, c->map.elem_bytes);
}

static void put(enum emu_bulk how, int is_float32, void *memory, const void *from, unsigned bytes) {
    float sum, more;
    if (how == EMU_STORE) {
        memcpy(memory, from, bytes);
        return;
    }
    if (!is_float32)
        emu_fail("the emulator adds floats only");
    for (unsigned n = 0; n < bytes; n += sizeof sum) {
        memcpy(&sum, (char *)memory + n, sizeof sum);
        memcpy(&more, (const char *)from + n, sizeof more);
        sum += more;
        memcpy((char *)memory + n, &sum, sizeof sum);
    }
}

static void store_element(struct copy *c, void *memory, unsigned shared) {
    if (memory)
        put(c->how, c->map.is_float32, memory, memory_at(shared), c->map.elem_bytes);
}

static void finish(struct list *list, struct copy *c) {
    unsigned char *shared = memory_at(c->address);
    const unsigned mbarrier = c->mbarrier, bytes = c->bytes;
    const int arrives = c->kind == LOAD;
    if (c->kind == CP_ASYNC) {
        memset(shared, 0, bytes);
        memcpy(shared, c->from, c->valid);
        mark(c->address, bytes, c->thread, 0);
    } else if (c->kind == LOAD && c->memory) {
        if (c->seen && memcmp(c->memory, c->seen, bytes) != 0)
            emu_fail("%u bytes of shared memory changed while the copy engine, told by thread %u, "
                     "was to send them",
                     bytes, c->thread);
        memcpy(shared, c->memory, bytes);
    } else if (c->kind == LOAD) {
        for_box(c, load_element);
    } else {
        if (memcmp(shared, c->seen, bytes) != 0)
            emu_fail("%u bytes at %u in shared memory changed while the copy engine, told by "
                     "thread %u, was to store them",
                     bytes, c->address, c->thread);
        if (c->memory)
            put(c->how, 1, c->memory, shared, bytes);
        else
            for_box(c, store_element);
    }
    forget(list, c);
    if (arrives)
        emu_mbarrier_complete(mbarrier, bytes);
}

/* This thread's copies of a kind, of groups before `group`. */
static void finish_groups(enum kind kind, unsigned group) {
    struct list *list = &lists[emu_self];
    for (struct copy *c = list->first, *next; c; c = next) {
        next = c->next;
        if (c->kind == kind && (int)(c->group - group) < 0)
            finish(list, c);
    }
}

int emu_shared_happen(void) {
    unsigned count = 0;
    for (struct copy *c = loads->first; c; c = c->next)
        count++;
    if (!count)
        return 0;
    struct copy *chosen = loads->first;
    for (unsigned n = emu_random(count); n > 0; n--)
        chosen = chosen->next;
    finish(loads, chosen);
    return 1;
}

/* --- cp.async --- */

void emu_cp_async(unsigned to, const void *from, unsigned bytes) {
    void *shared = emu_shared_at(to, CHUNK, CHUNK);
    if (bytes > CHUNK || (bytes && (uintptr_t)from % CHUNK))
        emu_fail("cp.async of %u bytes from %p", bytes, from);
    memset(shared, POISON, CHUNK);
    begin_copy((struct copy){.kind = CP_ASYNC,
                             .group = groups[emu_self].cp_async,
                             .address = to,
                             .bytes = CHUNK,
                             .from = from,
                             .valid = bytes});
}

void emu_cp_async_commit(void) {
    groups[emu_self].cp_async++;
}

void emu_cp_async_wait(unsigned pending) {
    finish_groups(CP_ASYNC, groups[emu_self].cp_async - pending);
}

/* --- the copy engine --- */

static void begin_load(struct copy copy) {
    memset(emu_shared_at(copy.address, copy.bytes, copy.memory ? CHUNK : 128), POISON, copy.bytes);
    mark(copy.address, copy.bytes, 0, 1);
    copy.kind = LOAD;
    begin_copy(copy);
}

static void begin_store(struct copy copy) {
    const void *shared = emu_shared_async(copy.address, copy.bytes, copy.memory ? CHUNK : 128);
    copy.kind = STORE;
    copy.group = groups[emu_self].bulk;
    copy.seen = malloc(copy.bytes);
    if (!copy.seen)
        abort();
    memcpy(copy.seen, shared, copy.bytes);
    begin_copy(copy);
}

static struct copy box_of(const void *map, const int *at, unsigned address) {
    struct copy c = {.address = address};
    memcpy(&c.map, map, sizeof c.map);
    if (c.map.magic != EMU_MAP_MAGIC)
        emu_fail("there is no tensor map at %p", map);
    c.bytes = c.map.elem_bytes;
    for (int d = 0; d < c.map.rank; d++) {
        c.bytes *= c.map.box[d];
        c.at[d] = at[d];
    }
    return c;
}

static struct copy bytes_of(const void *memory, unsigned bytes, unsigned address) {
    if (((uintptr_t)memory | bytes) % CHUNK)
        emu_fail("a bulk copy of %u bytes, with %p", bytes, memory);
    return (struct copy){.address = address, .bytes = bytes, .memory = (unsigned char *)memory};
}

void emu_tma_load(unsigned to, const void *map, const int *at, unsigned mbarrier) {
    struct copy c = box_of(map, at, to);
    c.mbarrier = mbarrier;
    begin_load(c);
}

void emu_tma_store(enum emu_bulk how, const void *map, const int *at, unsigned from) {
    struct copy c = box_of(map, at, from);
    c.how = how;
    begin_store(c);
}

void emu_bulk_load(unsigned to, const void *from, unsigned bytes, unsigned mbarrier) {
    struct copy c = bytes_of(from, bytes, to);
    c.mbarrier = mbarrier;
    begin_load(c);
}

void emu_bulk_send(unsigned to, unsigned from, unsigned bytes, unsigned mbarrier) {
    struct copy c = bytes_of(emu_shared_async(from, bytes, CHUNK), bytes, to);
    c.mbarrier = mbarrier;
    c.seen = malloc(bytes);
    if (!c.seen)
        abort();
    memcpy(c.seen, c.memory, bytes);
    begin_load(c);
}

void emu_bulk_store(enum emu_bulk how, void *to, unsigned from, unsigned bytes) {
    struct copy c = bytes_of(to, bytes, from);
    c.how = how;
    begin_store(c);
}

void emu_bulk_commit(void) {
    groups[emu_self].bulk++;
}

void emu_bulk_wait(unsigned pending) {
    finish_groups(STORE, groups[emu_self].bulk - pending);
}

/* --- blocks --- */

void emu_shared_begin(const struct emu_kernel *const kernels_[MAX_CLUSTER],
                      unsigned dynamic_bytes) {
    kernels = kernels_;
    const struct emu_kernel *kernel = kernels[0];
    gap_begin = (unsigned)(kernel->dynamic - kernel->shared_begin) + dynamic_bytes;
    gap_end = gap_begin - dynamic_bytes + EMU_MAX_DYNAMIC;
    for (unsigned block = 0; block < kernel->cluster; block++)
        memset(kernels[block]->shared_begin, POISON,
               (size_t)(kernel->shared_end - kernel->shared_begin));
    memset(writes, 0, sizeof writes);
    memset(fences, 0, sizeof fences);
    memset(groups, 0, sizeof groups);
    for (struct list *list = lists; list <= loads; list++) {
        while (list->first)
            forget(list, list->first);
        list->last = &list->first;
    }
}

void emu_shared_end(void) {
    for (const struct list *list = lists; list <= loads; list++)
        for (const struct copy *c = list->first; c; c = c->next)
            if (c->kind != CP_ASYNC)
                emu_fail("the block has ended while the copy engine, told by thread %u, still had "
                         "to %s %u bytes at %u in shared memory",
                         c->thread, c->kind == LOAD ? "load" : "store", c->bytes, c->address);
    for (unsigned block = 0; block < kernels[0]->cluster; block++)
        for (unsigned address = gap_begin; address < gap_end; address++)
            if (kernels[block]->shared_begin[address] != POISON)
                emu_fail("the block has written to %u in shared memory, past %u, where what is "
                         "dynamic ends",
                         address, gap_begin);
}
