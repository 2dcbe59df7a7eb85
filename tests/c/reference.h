/* Attention the plain way: a row of scores at a time, in double precision. Shares nothing with the
 * kernels but the random bits of dropout.
 *
 * Beside each row of a result stands a bound on the rounding error that a kernel may make there:
 * the same sums over absolute values, times the relative error that each term brings along. */
#ifndef FLASH_ATTENTION_TESTS_REFERENCE_H
#define FLASH_ATTENTION_TESTS_REFERENCE_H

#include "flash_attention.h"

struct input {
    double *value;      /* row-major, owned by the caller */
    double *norm, *max; /* of each row: length and largest absolute value */
};

struct result {
    double *value; /* row-major, rows of `width` */
    double *bound; /* one a row */
    int64_t width;
};

struct reference {
    const struct fa_params *p;
    struct input q, k, v, dout;         /* shaped as the kernels' */
    double *mask;                       /* row-major, [mask_size]; NULL: none */
    int64_t mask_size[4];               /* each 1 or that of the scores */
    struct result out, lse, dq, dk, dv; /* shaped as the kernels' */
    struct result dmask;                /* [mask_size]; here a row is one element */
};

/* Fills in the results. The caller has set p, the values of the inputs, mask and mask_size. */
void reference_run(struct reference *r);
void reference_free(struct reference *r);

#endif
