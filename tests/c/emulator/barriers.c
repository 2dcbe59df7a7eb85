/* What warps wait for: barriers by number, mbarriers in shared memory, registers. */
#include "inside.h"

#include <string.h>

/* --- registers: a block gets as many as a multiprocessor has, and takes no others --- */

/* Of a thread of each warp; of all that were given back in each block. */
static int registers[MAX_WARPS], registers_left[MAX_CLUSTER];

void emu_registers(int count) {
    emu_sync_warp();
    int *mine = &registers[emu_warp()]; /* the first lane takes those of all */
    int *left = &registers_left[emu_rank];
    while (LANES * (count - *mine) > *left)
        emu_wait_for(left, "wait for %u registers; the block has %u left", (unsigned)count,
                     (unsigned)*left);
    *left -= LANES * (count - *mine);
    *mine = count;
    emu_wake(left);
}

/* --- bar.sync, bar.arrive, barrier.cluster --- */

enum { BARRIERS = 16, OF_CLUSTER = BARRIERS };

static struct barrier {
    int expected, arrived; /* threads; `expected` 0: all warps that have not ended */
    unsigned phase;
} barriers[MAX_CLUSTER][BARRIERS + 1]; /* the last one, of the first block, is the cluster's */
static int warps_left[MAX_CLUSTER];

struct arrival {
    int barrier, threads;
    unsigned phase;
};

static struct barrier *barrier_of(int barrier) {
    return &barriers[barrier == OF_CLUSTER ? 0 : emu_rank][barrier];
}

int emu_block_ended(unsigned rank) {
    return warps_left[rank] == 0;
}

static int warps_left_for(const struct barrier *b) {
    if (b != &barriers[0][OF_CLUSTER])
        return warps_left[(b - barriers[0]) / (BARRIERS + 1)];
    int left = 0;
    for (int rank = 0; rank < MAX_CLUSTER; rank++)
        left += warps_left[rank];
    return left;
}

static void end_phase_of(struct barrier *b) {
    if (b->arrived && b->arrived == (b->expected ? b->expected : warps_left_for(b) * LANES)) {
        b->arrived = 0;
        b->phase++;
        emu_wake(b);
    }
}

static void run_arrive(void *const lanes[LANES]) {
    struct arrival *first = NULL;
    for (int lane = 0; lane < LANES; lane++) {
        const struct arrival *mine = lanes[lane];
        first = first ? first : lanes[lane];
        if (mine && (mine->barrier != first->barrier || mine->threads != first->threads))
            emu_fail("bar.sync: the lanes of a warp name different barriers");
    }
    struct barrier *b = barrier_of(first->barrier);
    if (b->arrived && b->expected != first->threads)
        emu_fail("barrier %d for %d threads, while others wait there for %d", first->barrier,
                 first->threads, b->expected);
    b->expected = first->threads;
    b->arrived += LANES;
    if (b->expected && b->arrived > b->expected)
        emu_fail("barrier %d for %d threads: more have come", first->barrier, b->expected);
    for (int lane = 0; lane < LANES; lane++)
        if (lanes[lane])
            ((struct arrival *)lanes[lane])->phase = b->phase;
    end_phase_of(b);
}

static void meet_at(int barrier, int threads, int wait, const char *text) {
    struct arrival mine = {barrier, threads, 0};
    emu_meet(barrier == OF_CLUSTER ? "barrier.cluster" : "bar.sync", run_arrive, &mine);
    const struct barrier *b = barrier_of(barrier);
    while (wait && b->phase == mine.phase)
        emu_wait_for(b, text, (unsigned)barrier, (unsigned)threads);
}

void emu_barrier(int barrier, int threads, int wait) {
    if (barrier < 0 || barrier >= BARRIERS || threads % LANES || threads < 0)
        emu_fail("there is no barrier %d for %d threads", barrier, threads);
    meet_at(barrier, threads, wait,
            threads ? "wait at barrier %u, for %u threads in all" : "wait at __syncthreads");
}

void emu_cluster_barrier(void) {
    meet_at(OF_CLUSTER, 0, 1, "wait for all threads of the cluster");
}

void emu_barriers_begin(void) {
    const int each = (emu_block_size.x < 257 ? 255 : 65536 / (int)emu_block_size.x) / 8 * 8;
    memset(registers_left, 0, sizeof registers_left);
    for (int warp = 0; warp < emu_warps; warp++)
        registers[warp] = each;
    memset(barriers, 0, sizeof barriers);
    memset(warps_left, 0, sizeof warps_left);
    for (int warp = 0; warp < emu_warps; warp++)
        warps_left[warp * LANES / (int)emu_block_size.x]++;
}

void emu_barriers_warp_ended(void) {
    warps_left[emu_rank]--;
    for (int n = 0; n <= BARRIERS; n++)
        if (!barrier_of(n)->expected)
            end_phase_of(barrier_of(n));
}

/* --- mbarriers: 64 bits that are none of the kernel's business --- */

struct mbarrier {
    int64_t arrivals : 16, pending : 16, bytes : 24, phase : 2, unused : 6; /* 0 */
};

static struct mbarrier *mbarrier_at(unsigned address) {
    struct mbarrier *b = emu_shared_at(address, 8, 8);
    if (b->unused || b->arrivals <= 0)
        emu_fail("there is no initialised mbarrier at %u", address);
    return b;
}

static void end_phase(struct mbarrier *b) {
    if (b->pending == 0 && b->bytes == 0) {
        b->phase ^= 1;
        b->pending = b->arrivals;
        emu_wake(b);
    }
}

void emu_mbarrier_init(unsigned address, unsigned arrivals) {
    struct mbarrier *b = emu_shared_at(address, 8, 8);
    *b = (struct mbarrier){.arrivals = (int)arrivals & 0x7fff, .pending = (int)arrivals & 0x7fff};
}

void emu_mbarrier_arrive(unsigned address) {
    struct mbarrier *b = mbarrier_at(address);
    if (b->pending == 0)
        emu_fail("the mbarrier at %u has had all the arrivals of this phase", address);
    b->pending--;
    end_phase(b);
}

void emu_mbarrier_expect(unsigned address, unsigned bytes) {
    mbarrier_at(address)->bytes += (int)bytes;
}

void emu_mbarrier_complete(unsigned address, unsigned bytes) {
    struct mbarrier *b = mbarrier_at(address);
    b->bytes -= (int)bytes;
    end_phase(b);
}

int emu_mbarrier_try_wait(unsigned address, unsigned phase) {
    struct mbarrier *b = mbarrier_at(address);
    if (emu_random(8) == 7) {
        emu_yield();
        return 0;
    }
    if ((b->phase & 1) == (int)(phase & 1))
        emu_wait_for(b, "wait at the mbarrier at %u, for phase %u", address, phase);
    return (b->phase & 1) != (int)(phase & 1);
}
