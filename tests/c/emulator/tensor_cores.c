/* Tensor cores and the number formats they take. Products are summed in float, without the
 * hardware's way of rounding sums. */
#include "inside.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* --- numbers --- */

static float bits_to_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
static uint32_t float_to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

float emu_from_half(enum emu_type type, unsigned short x) {
    if (type == EMU_BF16)
        return bits_to_float((uint32_t)x << 16);
    const int exponent = x >> 10 & 31, fraction = x & 1023;
    const float value = exponent == 31  ? (fraction ? NAN : INFINITY)
                        : exponent == 0 ? ldexpf((float)fraction, -24)
                                        : ldexpf((float)(fraction + 1024), exponent - 25);
    return x >> 15 ? -value : value;
}

unsigned short emu_to_half(enum emu_type type, float x) {
    if (isnan(x))
        return 0x7fff;
    const uint32_t bits = float_to_bits(x);
    if (type == EMU_BF16)
        return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    const uint32_t sign = bits >> 16 & 0x8000;
    const float size = fabsf(x);
    if (size >= 65520)
        return (unsigned short)(sign | 0x7c00);
    if (size < 0x1p-14f) /* subnormal: counted in units of 2^-24 */
        return (unsigned short)(sign | (uint32_t)lrintf(size * 0x1p24f));
    const uint32_t rebased = (bits & 0x7fffffff) - ((127 - 15) << 23);
    return (unsigned short)(sign | (rebased + 0xfff + (rebased >> 13 & 1)) >> 13);
}

/* emu_from_half of every number, by type. */
static const float *values_of(enum emu_type type) {
    static float values[2][1 << 16];
    static int known[2];
    if (!known[type])
        for (unsigned x = 0; x < 1 << 16; x++)
            values[type][x] = emu_from_half(type, (unsigned short)x);
    known[type] = 1;
    return values[type];
}

/* --- matrices of 8 rows of 16 bytes, four at a time --- */

struct matrices {
    unsigned *r, address;
    int transposed;
};

/* Row i of matrix m begins where lane 8m + i says; of each matrix a lane holds two neighbours of
 * row lane / 4, or, transposed, of column lane / 4. */
static void run_ldmatrix(void *const lanes[LANES]) {
    unsigned short matrix[4][8][8];
    for (int lane = 0; lane < LANES; lane++) {
        const struct matrices *mine = lanes[lane];
        emu_load_shared(matrix[lane / 8][lane % 8], mine->address, 16);
    }
    for (int lane = 0; lane < LANES; lane++) {
        const struct matrices *mine = lanes[lane];
        const int g = lane / 4, t = 2 * (lane % 4);
        for (int m = 0; m < 4; m++) {
            const unsigned lo = mine->transposed ? matrix[m][t][g] : matrix[m][g][t];
            const unsigned hi = mine->transposed ? matrix[m][t + 1][g] : matrix[m][g][t + 1];
            mine->r[m] = lo | hi << 16;
        }
    }
}

void emu_ldmatrix(unsigned r[4], unsigned address, int transposed) {
    struct matrices mine = {r, address, transposed};
    emu_meet_all("ldmatrix", run_ldmatrix, &mine);
}

static void run_stmatrix(void *const lanes[LANES]) {
    for (int row = 0; row < LANES; row++) {
        const struct matrices *mine = lanes[row];
        unsigned short elements[8];
        for (int col = 0; col < 8; col++) {
            const int g = mine->transposed ? col : row % 8, x = mine->transposed ? row % 8 : col;
            const unsigned pair = ((const struct matrices *)lanes[4 * g + x / 2])->r[row / 8];
            elements[col] = (unsigned short)(pair >> 16 * (x % 2));
        }
        emu_store_shared(mine->address, elements, 16);
    }
}

void emu_stmatrix(unsigned address, const unsigned r[4], int transposed) {
    struct matrices mine = {(unsigned *)r, address, transposed};
    emu_meet_all("stmatrix", run_stmatrix, &mine);
}

/* --- mma.sync: of A a lane has rows g and g + 8, of B column g; columns of A, rows of B, in pairs
 * from 2t and 2t + 8 on, or, of tf32, t and t + 4 --- */

struct mma {
    float *d;
    const unsigned *a, *b;
    enum emu_type type;
};

/* D[16][8] += A[16][depth] B[depth][8]. */
static void multiply(void *const lanes[LANES], float A[16][16], float B[16][8], int depth) {
    float D[16][8];
    for (int lane = 0; lane < LANES; lane++)
        for (int x = 0; x < 4; x++)
            D[lane / 4 + x / 2 * 8][lane % 4 * 2 + x % 2] = ((const struct mma *)lanes[lane])->d[x];
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < depth; k++)
            for (int col = 0; col < 8; col++)
                D[row][col] += A[row][k] * B[k][col];
    for (int lane = 0; lane < LANES; lane++)
        for (int x = 0; x < 4; x++)
            ((struct mma *)lanes[lane])->d[x] = D[lane / 4 + x / 2 * 8][lane % 4 * 2 + x % 2];
}

/* The part of A that a lane holds in registers, [16][16], of halves. */
static void unpack_a(float A[16][16], const unsigned a[4], int lane, const float *values) {
    for (int x = 0; x < 8; x++)
        A[lane / 4 + x / 2 % 2 * 8][lane % 4 * 2 + x % 2 + x / 4 * 8] =
            values[a[x / 2] >> 16 * (x % 2) & 0xffff];
}

static void run_mma_16(void *const lanes[LANES]) {
    const float *values = values_of(((const struct mma *)lanes[0])->type);
    float A[16][16], B[16][8];
    for (int lane = 0; lane < LANES; lane++) {
        const struct mma *mine = lanes[lane];
        unpack_a(A, mine->a, lane, values);
        for (int x = 0; x < 4; x++)
            B[lane % 4 * 2 + x % 2 + x / 2 * 8][lane / 4] =
                values[mine->b[x / 2] >> 16 * (x % 2) & 0xffff];
    }
    multiply(lanes, A, B, 16);
}

static void run_mma_8(void *const lanes[LANES]) {
    float A[16][16], B[16][8];
    for (int lane = 0; lane < LANES; lane++) {
        const struct mma *mine = lanes[lane];
        const int g = lane / 4, t = lane % 4;
        for (int x = 0; x < 4; x++) /* tensor cores do not look at the last 13 bits */
            A[g + x % 2 * 8][t + x / 2 * 4] = bits_to_float(mine->a[x] & ~0x1fffu);
        for (int x = 0; x < 2; x++)
            B[t + 4 * x][g] = bits_to_float(mine->b[x] & ~0x1fffu);
    }
    multiply(lanes, A, B, 8);
}

void emu_mma_16x8x16(enum emu_type type, float d[4], const unsigned a[4], const unsigned b[2]) {
    struct mma mine = {d, a, b, type};
    emu_meet_all("mma.sync.m16n8k16", run_mma_16, &mine);
}

void emu_mma_16x8x8_tf32(float d[4], const unsigned a[4], const unsigned b[2]) {
    struct mma mine = {d, a, b, EMU_FP16};
    emu_meet_all("mma.sync.m16n8k8", run_mma_8, &mine);
}

/* --- wgmma: each warp of a warpgroup has 16 rows --- */

enum { ROWS = 16, DEPTH = 16, MAX_COLUMNS = 256 };

/* Accumulators that products are under way to. What a lane sees of its own is NaN meanwhile. */
struct sum {
    struct sum *next;
    float *d[LANES];
    int columns;
    unsigned group; /* of the last product */
    float value[LANES][MAX_COLUMNS / 2];
};

struct product {
    struct product *next;
    unsigned group;
    int columns, flags, a_in_registers;
    uint64_t a, b;
    unsigned short A[ROWS][DEPTH], B[DEPTH][MAX_COLUMNS]; /* what lay in shared memory */
};

static struct warp {
    struct sum *sums;
    struct product *products; /* youngest first */
    unsigned committed;       /* groups */
    int fenced;               /* since the last wait */
    uint64_t history;         /* of all products: those of four warps have to agree */
} warps[MAX_WARPS];

struct wgmma {
    enum emu_type type;
    float *d;
    const unsigned *a_registers;
    uint64_t a, b;
    int columns, flags;
};

/* Element k of line `line` (a row of A, a column of B). A descriptor has, in units of 16 bytes, the
 * start, the leading and the stride byte offset. With the swizzle of 128 bytes, eight lines of 64
 * elements of K each are 1024 bytes, and the stride leads to the next eight; or, MN, eight lines of
 * K of 64 elements each are 1024 bytes, the stride leads to the next eight, and the leading offset
 * to the next 64 elements. */
static unsigned short element(uint64_t descriptor, int mn, int line, int k) {
    const unsigned start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
    const unsigned stride = (descriptor >> 32 & 0x3fff) << 4;
    const int row = mn ? k : line, col = mn ? line : k;
    const unsigned address = start + (unsigned)(row / 8) * stride + (unsigned)(row % 8) * 128 +
                             (unsigned)(col / 64) * leading + (unsigned)(col % 64) * 2;
    unsigned short x;
    const unsigned own = emu_address_in_block(emu_swizzle_128b(address), emu_rank);
    memcpy(&x, emu_shared_async(own, 2, 2), 2);
    return x;
}

static void read_operands(struct product *p, int warp) {
    for (int row = 0; row < ROWS && !p->a_in_registers; row++)
        for (int k = 0; k < DEPTH; k++)
            p->A[row][k] = element(p->a, p->flags & EMU_A_MN, warp % 4 * ROWS + row, k);
    for (int col = 0; col < p->columns; col++)
        for (int k = 0; k < DEPTH; k++)
            p->B[k][col] = element(p->b, p->flags & EMU_B_MN, col, k);
}

static struct sum *sum_of(struct warp *w, void *const lanes[LANES]) {
    const struct wgmma *first = lanes[0];
    for (struct sum *s = w->sums; s; s = s->next)
        if (s->d[0] == first->d && s->columns == first->columns)
            return s;
    if (!w->fenced)
        emu_fail("wgmma on registers that other code may have written: a wgmma.fence is missing");
    struct sum *s = malloc(sizeof *s);
    if (!s)
        abort();
    s->next = w->sums, w->sums = s;
    s->columns = first->columns;
    for (int lane = 0; lane < LANES; lane++) {
        s->d[lane] = ((const struct wgmma *)lanes[lane])->d;
        for (int x = 0; x < s->columns / 2; x++)
            s->value[lane][x] = first->flags & EMU_ACCUMULATE ? s->d[lane][x] : 0;
    }
    return s;
}

static void run_wgmma(void *const lanes[LANES]) {
    const int warp = (int)emu_warp();
    struct warp *w = &warps[warp];
    const struct wgmma *first = lanes[0];
    const float *values = values_of(first->type);
    if (emu_block_size.x % 128 || (first->a | first->b) >> 49 & 7 || first->b >> 62 != 1 ||
        (!first->a_registers && first->a >> 62 != 1))
        emu_fail("wgmma: the emulator has the swizzle of 128 bytes only, and whole warpgroups");

    struct sum *s = sum_of(w, lanes);
    struct product *p = calloc(1, sizeof *p);
    if (!p)
        abort();
    *p = (struct product){.next = w->products,
                          .group = w->committed,
                          .columns = first->columns,
                          .flags = first->flags,
                          .a_in_registers = first->a_registers != NULL,
                          .a = first->a,
                          .b = first->b};
    w->products = p;
    read_operands(p, warp);

    static float A[ROWS][DEPTH], B[DEPTH][MAX_COLUMNS], D[ROWS][MAX_COLUMNS];
    for (int lane = 0; lane < LANES; lane++) {
        const struct wgmma *mine = lanes[lane];
        if (mine->a != first->a || mine->b != first->b || mine->columns != first->columns)
            emu_fail("wgmma: the lanes of a warp have different operands");
        if (mine->a_registers)
            unpack_a(A, mine->a_registers, lane, values);
    }
    for (int row = 0; row < ROWS && !p->a_in_registers; row++)
        for (int k = 0; k < DEPTH; k++)
            A[row][k] = values[p->A[row][k]];
    for (int k = 0; k < DEPTH; k++)
        for (int col = 0; col < p->columns; col++)
            B[k][col] = values[p->B[k][col]];
    memset(D, 0, sizeof D);
    for (int row = 0; row < ROWS; row++)
        for (int k = 0; k < DEPTH; k++)
            for (int col = 0; col < p->columns; col++)
                D[row][col] += A[row][k] * B[k][col];
    for (int lane = 0; lane < LANES; lane++)
        for (int x = 0; x < p->columns / 2; x++) {
            const int row = lane / 4 + x / 2 % 2 * 8, col = x / 4 * 8 + lane % 4 * 2 + x % 2;
            if (!(first->flags & EMU_ACCUMULATE))
                s->value[lane][x] = 0;
            s->value[lane][x] += D[row][col];
            s->d[lane][x] = NAN;
        }
    s->group = w->committed;
    w->history =
        (w->history ^ first->a ^ first->b * 31 ^ (uint64_t)first->columns) * 0x9E3779B97F4A7C15;
}

void emu_wgmma(enum emu_type type, float *d, int columns, const unsigned *a_registers, uint64_t a,
               uint64_t b, int flags) {
    struct wgmma mine = {type, d, a_registers, a, b, columns, flags};
    emu_meet_all("wgmma", run_wgmma, &mine);
}

static void run_fence(void *const lanes[LANES]) {
    (void)lanes;
    warps[emu_warp()].fenced = 1;
}

void emu_wgmma_fence(void) {
    emu_meet_all("wgmma.fence", run_fence, &emu_thread);
}

static void run_commit(void *const lanes[LANES]) {
    (void)lanes;
    warps[emu_warp()].committed++;
}

void emu_wgmma_commit(void) {
    emu_meet_all("wgmma.commit_group", run_commit, &emu_thread);
}

static void run_wait(void *const lanes[LANES]) {
    struct warp *w = &warps[emu_warp()];
    const unsigned end = w->committed - *(const unsigned *)lanes[0];
    static struct product now;
    for (struct product **at = &w->products; *at;) {
        struct product *p = *at;
        if ((int)(p->group - end) >= 0) {
            at = &p->next;
            continue;
        }
        now = *p;
        read_operands(&now, (int)emu_warp());
        if (memcmp(&now, p, sizeof now) != 0)
            emu_fail("an operand of a wgmma in shared memory (%u, %u) changed before the wgmma was "
                     "waited for",
                     (unsigned)(p->a & 0x3fff) << 4, (unsigned)(p->b & 0x3fff) << 4);
        *at = p->next;
        free(p);
    }
    for (struct sum **at = &w->sums; *at;) {
        struct sum *s = *at;
        if ((int)(s->group - end) >= 0) {
            at = &s->next;
            continue;
        }
        for (int lane = 0; lane < LANES; lane++)
            for (int x = 0; x < s->columns / 2; x++)
                if (!isnan(s->d[lane][x]))
                    emu_fail("wgmma: its accumulators were written to before it was waited for");
        for (int lane = 0; lane < LANES; lane++)
            memcpy(s->d[lane], s->value[lane], (size_t)s->columns / 2 * sizeof(float));
        *at = s->next;
        free(s);
    }
    w->fenced = 0;
}

void emu_wgmma_wait(unsigned pending) {
    emu_meet_all("wgmma.wait_group", run_wait, &pending);
}

/* --- blocks --- */

void emu_tensor_cores_begin(void) {
    for (int n = 0; n < MAX_WARPS; n++) {
        while (warps[n].sums) {
            struct sum *next = warps[n].sums->next;
            free(warps[n].sums);
            warps[n].sums = next;
        }
        while (warps[n].products) {
            struct product *next = warps[n].products->next;
            free(warps[n].products);
            warps[n].products = next;
        }
    }
    memset(warps, 0, sizeof warps);
}

void emu_tensor_cores_end(void) {
    for (int n = 0; n < emu_warps; n++) {
        if (warps[n].products)
            emu_fail("the block has ended before a wgmma of warp %d was waited for", n);
        if (warps[n].history != warps[n / 4 * 4].history)
            emu_fail("warps %d and %d of a warpgroup had different wgmmas", n / 4 * 4, n);
    }
}
