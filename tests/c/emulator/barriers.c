/* What warps wait for: barriers by number, mbarriers in shared memory, registers. */
#include "inside.h"

#include <string.h>

/* --- registers: the block gets as many as a multiprocessor has, and takes no others --- */

static int registers[MAX_WARPS], registers_left; /* of a thread; of all that were given back */

void emu_registers(int count) {
    emu_sync_warp();
    int *mine = &registers[emu_warp()]; /* the first lane takes those of all */
    while (LANES * (count - *mine) > registers_left)
        emu_wait_for(&registers_left, "wait for %u registers; the block has %u left",
                     (unsigned)count, (unsigned)registers_left);
    registers_left -= LANES * (count - *mine);
    *mine = count;
    emu_wake(&registers_left);
}

/* --- bar.sync and bar.arrive --- */

enum { BARRIERS = 16 };

static struct barrier {
    int expected, arrived; /* threads; `expected` 0: all warps that have not ended */
    unsigned phase;
} barriers[BARRIERS];
static int warps_left;

struct arrival {
    int barrier, threads;
    unsigned phase;
};

static void end_phase_of(struct barrier *b) {
    if (b->arrived && b->arrived == (b->expected ? b->expected : warps_left * LANES)) {
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
    struct barrier *b = &barriers[first->barrier];
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

void emu_barrier(int barrier, int threads, int wait) {
    if (barrier < 0 || barrier >= BARRIERS || threads % LANES || threads < 0)
        emu_fail("there is no barrier %d for %d threads", barrier, threads);
    struct arrival mine = {barrier, threads, 0};
    emu_meet("bar.sync", run_arrive, &mine);
    while (wait && barriers[barrier].phase == mine.phase)
        emu_wait_for(&barriers[barrier],
                     threads ? "wait at barrier %u, for %u threads in all"
                             : "wait at __syncthreads",
                     (unsigned)barrier, (unsigned)threads);
}

void emu_barriers_begin(void) {
    const int each = (emu_block_size.x < 257 ? 255 : 65536 / (int)emu_block_size.x) / 8 * 8;
    registers_left = 0;
    for (int warp = 0; warp < emu_warps; warp++)
        registers[warp] = each;
    memset(barriers, 0, sizeof barriers);
    warps_left = emu_warps;
}

void emu_barriers_warp_ended(void) {
    warps_left--;
    for (int n = 0; n < BARRIERS; n++)
        if (!barriers[n].expected)
            end_phase_of(&barriers[n]);
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
