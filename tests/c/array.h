/* Random numbers, the element types, and strided arrays that catch whoever strays from them. */
#ifndef FLASH_ATTENTION_TESTS_ARRAY_H
#define FLASH_ATTENTION_TESTS_ARRAY_H

#include "flash_attention.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* --- random numbers: splitmix64 --- */

static uint64_t random_state;

static uint64_t random_bits(void) {
    uint64_t z = random_state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

static int64_t below(int64_t n) {
    return (int64_t)(random_bits() % (uint64_t)n);
}
static int one_in(int64_t n) {
    return below(n) == 0;
}
static double uniform(void) {
    return (double)(random_bits() >> 11) * 0x1p-53;
}

/* --- element types --- */

static const size_t element_size[] = {
    [FA_FLOAT32] = 4, [FA_FLOAT64] = 8, [FA_BFLOAT16] = 2, [FA_FLOAT16] = 2, [FA_BOOL] = 1};
static const double largest[] = {[FA_FLOAT32] = 0x1.fffffep127,
                                 [FA_FLOAT64] = 0x1.fffffffffffffp1023,
                                 [FA_BFLOAT16] = 0x1.fep127,
                                 [FA_FLOAT16] = 65504,
                                 [FA_BOOL] = 1};

static double half_value(uint16_t bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double value = exponent == 31  ? (fraction ? NAN : INFINITY)
                   : exponent == 0 ? ldexp(fraction, -24)
                                   : ldexp(fraction + 1024, exponent - 25);
    return bits >> 15 ? -value : value;
}

static uint16_t half_bits(double value) { /* rounds towards zero */
    int exponent;
    double fraction = frexp(fabs(value), &exponent); /* in [0.5, 1) */
    uint16_t sign = signbit(value) ? 0x8000 : 0;
    if (exponent > 16 || isinf(value))
        return sign | 0x7C00;
    if (exponent < -13 || value == 0)
        return sign | (uint16_t)ldexp(fabs(value), 24);
    return sign | (uint16_t)((exponent + 13) * 1024 + (int)(fraction * 2048));
}

static double load(enum fa_dtype dtype, const void *data, int64_t index) {
    const char *element = (const char *)data + index * (int64_t)element_size[dtype];
    double real64;
    float real32;
    uint32_t bits32;
    uint16_t bits16;
    switch (dtype) {
    case FA_FLOAT64:
        memcpy(&real64, element, 8);
        return real64;
    case FA_FLOAT32:
        memcpy(&real32, element, 4);
        return real32;
    case FA_BFLOAT16:
        memcpy(&bits16, element, 2);
        bits32 = (uint32_t)bits16 << 16;
        memcpy(&real32, &bits32, 4);
        return real32;
    case FA_FLOAT16:
        memcpy(&bits16, element, 2);
        return half_value(bits16);
    default:
        return *element ? 0 : -INFINITY; /* a bool mask, as what it adds to the score */
    }
}

static void store(enum fa_dtype dtype, void *data, int64_t index, double value) {
    char *element = (char *)data + index * (int64_t)element_size[dtype];
    float real32 = (float)value;
    uint32_t bits32;
    uint16_t bits16;
    switch (dtype) {
    case FA_FLOAT64:
        memcpy(element, &value, 8);
        break;
    case FA_FLOAT32:
        memcpy(element, &real32, 4);
        break;
    case FA_BFLOAT16:
        memcpy(&bits32, &real32, 4);
        bits16 = (uint16_t)(bits32 >> 16);
        memcpy(element, &bits16, 2);
        break;
    case FA_FLOAT16:
        bits16 = half_bits(value);
        memcpy(element, &bits16, 2);
        break;
    default:
        *element = value == 0 ? (char)(1 + below(255)) : 0; /* any byte but 0 means true */
    }
}

/* --- strided arrays --- */

enum { POISON = 0xFF }; /* four of these make a NaN, as do two and eight */

/* Lies alone in an allocation of exactly its extent, for AddressSanitizer to guard, and every byte
 * that is not an element's is POISON. */
struct array {
    enum fa_dtype dtype;
    int64_t size[4], stride[4]; /* a stride of 0 repeats the elements along that dimension */
    unsigned char *memory;
    size_t bytes;
    void *data; /* element (0, 0, 0, 0) */
};

static int64_t array_count(const struct array *a) {
    return a->size[0] * a->size[1] * a->size[2] * a->size[3];
}

/* Allocates an array whose dimensions lie in memory in the given order, innermost first, with gaps
 * between them where `gaps` is set. Bit d of `repeated`: dimension d has stride 0. */
static void array_create(struct array *a, enum fa_dtype dtype, const int64_t size[4],
                         const int order[4], int gaps, unsigned repeated) {
    *a = (struct array){.dtype = dtype};
    memcpy(a->size, size, sizeof a->size);
    int64_t stride = 1, last = 0;
    for (int n = 0; n < 4; n++) {
        int d = order[n];
        if (repeated >> d & 1)
            continue;
        if (gaps && n > 0 && one_in(2))
            stride += 1 + below(9);
        a->stride[d] = stride;
        last += (size[d] - 1) * stride;
        stride *= size[d];
    }
    size_t element = element_size[dtype];
    int empty = array_count(a) == 0;
    size_t lead = gaps && !empty ? (size_t)below(4) * element : 0; /* so that data is unaligned */
    a->bytes = empty ? 0 : lead + (size_t)(last + 1) * element;
    a->memory = malloc(a->bytes);
    memset(a->memory, POISON, a->bytes);
    a->data = empty && one_in(2) ? NULL : a->memory + lead; /* torch's empty tensors are at NULL */
}

static void array_free(struct array *a) {
    free(a->memory);
    *a = (struct array){0};
}

/* for each element of a, with its index in memory and its number n in row-major order */
#define FOR_EACH_ELEMENT(a, index, n)                                                              \
    for (int64_t n = 0, d0 = 0; d0 < (a)->size[0]; d0++)                                           \
        for (int64_t d1 = 0; d1 < (a)->size[1]; d1++)                                              \
            for (int64_t d2 = 0; d2 < (a)->size[2]; d2++)                                          \
                for (int64_t                                                                       \
                         index = d0 * (a)->stride[0] + d1 * (a)->stride[1] + d2 * (a)->stride[2],  \
                         d3 = 0;                                                                   \
                     d3 < (a)->size[3]; d3++, n++, index += (a)->stride[3])

/* The elements in row-major order, as doubles. */
static double *array_values(const struct array *a) {
    double *values = malloc((size_t)array_count(a) * sizeof *values);
    FOR_EACH_ELEMENT(a, index, n) {
        values[n] = load(a->dtype, a->data, index);
    }
    return values;
}

#endif
