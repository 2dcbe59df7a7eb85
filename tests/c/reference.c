#include "reference.h"

#include "dropout.h"

#include <math.h>
#include <stdlib.h>

enum { MAX_SEQ = 2048 };

static double dot(const double *a, const double *b, int64_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < n; d++)
        sum += a[d] * b[d];
    return sum;
}

static void add_scaled(double *sum, double factor, const double *a, int64_t n) {
    for (int64_t d = 0; d < n; d++)
        sum[d] += factor * a[d];
}

static double max_abs(const double *a, int64_t n) {
    double max = 0;
    for (int64_t d = 0; d < n; d++)
        max = fabs(a[d]) > max ? fabs(a[d]) : max;
    return max;
}

static int in_window(const struct fa_params *p, int64_t i, int64_t j) {
    int64_t distance = j - i - p->diagonal_offset;
    return (p->window_left < 0 || distance >= -p->window_left) &&
           (p->window_right < 0 || distance <= p->window_right);
}

/* What P(b, h, i, j) is multiplied by on its way to V. */
static double dropout_factor(const struct fa_params *p, int64_t b, int64_t h, int64_t i,
                             int64_t j) {
    if (p->dropout_p == 0)
        return 1;
    uint32_t words[4] = {(uint32_t)(i >> 4 << 3 | (i & 7)), (uint32_t)(j >> 4 << 2 | (j >> 1 & 3)),
                         (uint32_t)(b * p->heads_q + h), (uint32_t)p->rng_state[1]};
    fa_philox(words, (uint32_t)p->rng_state[0], (uint32_t)(p->rng_state[0] >> 32));
    int64_t n = (i >> 3 & 1) * 4 + (j >> 3 & 1) * 2 + (j & 1);
    uint32_t number = words[n >> 1] >> 16 * (n & 1) & 0x7FFF;
    uint32_t threshold = (uint32_t)(p->dropout_p * 32768 + 0.5);
    int kept = threshold <= 16384 ? number >= threshold : number < 32768 - threshold;
    return kept ? 1 / (1 - p->dropout_p) : 0;
}

static struct result result_row(const struct result *r, int64_t row) {
    return (struct result){r->value + row * r->width, r->bound + row, r->width};
}

/* Row i of query head h: out and lse, and what it adds to the gradients. */
static void reference_row(struct reference *r, int64_t b, int64_t h, int64_t i) {
    const struct fa_params *p = r->p;
    int64_t D = p->head_dim, Dv = p->head_dim_v, Sk = p->seq_k;
    int64_t row = (b * p->heads_q + h) * p->seq_q + i;
    int64_t key0 = (b * p->heads_k + h / (p->heads_q / p->heads_k)) * Sk; /* row of key 0 */
    const double *q = r->q.value + row * D, *k = r->k.value + key0 * D;
    const double *v = r->v.value + key0 * Dv, *dout = r->dout.value + row * Dv;
    const double *k_norm = r->k.norm + key0, *k_max = r->k.max + key0;
    const double *v_norm = r->v.norm + key0, *v_max = r->v.max + key0;
    double unit = p->dtype == FA_FLOAT64    ? 0x1p-53
                  : p->dtype == FA_FLOAT32  ? 0x1p-24
                  : p->dtype == FA_BFLOAT16 ? 0x1p-8
                                            : 0x1p-11;
    double acc_unit = p->dtype == FA_FLOAT64 ? 0x1p-53 : 0x1p-24;
    /* A long sum is off by up to a unit for each term, above all where inputs repeat. */
    double terms = (double)(Sk + p->seq_q * p->heads_q / p->heads_k);
    double sum_error = acc_unit * (8 + terms / 2);

    const int64_t *M = r->mask_size;
    int64_t mask0 = ((b % M[0] * M[1] + h % M[1]) * M[2] + i % M[2]) * M[3];

    double S[MAX_SEQ], S_error[MAX_SEQ], max = -INFINITY;
    for (int64_t j = 0; j < Sk; j++) {
        double mask = r->mask ? r->mask[mask0 + j % M[3]] : 0;
        S[j] = in_window(p, i, j) ? p->scale * dot(q, k + j * D, D) + mask : -INFINITY;
        S_error[j] = 8 * acc_unit * (1 + fabs(p->scale) * r->q.norm[row] * k_norm[j] + fabs(mask));
        max = S[j] > max ? S[j] : max;
    }
    r->lse.value[row] = -INFINITY;
    if (max == -INFINITY)
        return; /* attends to nothing: out and all gradients stay 0 */

    double sum = 0;
    for (int64_t j = 0; j < Sk; j++)
        sum += exp(S[j] - max);
    double lse = max + log(sum), lse_error = 0;

    double P[MAX_SEQ],
        P_error[MAX_SEQ]; /* the error: of what P is multiplied into, relative to P */
    for (int64_t j = 0; j < Sk; j++) {
        P[j] = exp(S[j] - max) / sum;
        lse_error += P[j] > 0 ? P[j] * S_error[j] : 0;
    }
    for (int64_t j = 0; j < Sk; j++) {
        P_error[j] = 3 * unit + sum_error + S_error[j] + lse_error;
        if (P_error[j] > 0.25)
            P_error[j] = 1e30; /* nothing but that the result is finite can be asked for */
    }
    r->lse.value[row] = lse;
    r->lse.bound[row] = lse_error + sum_error + 8 * acc_unit * fabs(lse);

    struct result out = result_row(&r->out, row), dq = result_row(&r->dq, row);
    struct result dk = result_row(&r->dk, key0), dv = result_row(&r->dv, key0);
    struct result dmask = result_row(&r->dmask, mask0);
    double dP[MAX_SEQ], dP_size[MAX_SEQ];
    /* delta = sum_j P dP = dot(dout, out); out may have been rounded to a subnormal half. */
    double delta = 0, delta_size = 0;
    double delta_error =
        p->dtype == FA_FLOAT16 ? 0x1p-25 * sqrt((double)Dv) * r->dout.norm[row] : 0;
    for (int64_t j = 0; j < Sk; j++) {
        if (P[j] == 0)
            continue;
        double factor = dropout_factor(p, b, h, i, j), weight = P[j] * factor;
        add_scaled(out.value, weight, v + j * Dv, Dv);
        *out.bound += weight * P_error[j] * v_max[j];
        add_scaled(dv.value + j * Dv, weight, dout, Dv);
        dv.bound[j] += weight * P_error[j] * r->dout.max[row];
        dP[j] = factor * dot(dout, v + j * Dv, Dv);
        dP_size[j] = factor * r->dout.norm[row] * v_norm[j];
        delta += P[j] * dP[j];
        delta_size += P[j] * dP_size[j];
        delta_error += P[j] * dP_size[j] * P_error[j];
    }
    for (int64_t j = 0; j < Sk; j++) {
        if (P[j] == 0)
            continue;
        double dS = P[j] * (dP[j] - delta);
        double dS_error = P[j] * (P_error[j] * (dP_size[j] + delta_size) + delta_error);
        add_scaled(dq.value, p->scale * dS, k + j * D, D);
        *dq.bound += fabs(p->scale) * dS_error * k_max[j];
        add_scaled(dk.value + j * D, p->scale * dS, q, D);
        dk.bound[j] += fabs(p->scale) * dS_error * r->q.max[row];
        dmask.value[j % M[3]] += dS;
        dmask.bound[j % M[3]] += dS_error;
    }
}

static void measure_rows(struct input *input, int64_t rows, int64_t width) {
    input->norm = malloc((size_t)rows * sizeof(double));
    input->max = malloc((size_t)rows * sizeof(double));
    for (int64_t n = 0; n < rows; n++) {
        const double *row = input->value + n * width;
        input->norm[n] = sqrt(dot(row, row, width));
        input->max[n] = max_abs(row, width);
    }
}

static struct result result_create(int64_t rows, int64_t width) {
    return (struct result){calloc((size_t)(rows * width), sizeof(double)),
                           calloc((size_t)rows, sizeof(double)), width};
}

void reference_run(struct reference *r) {
    const struct fa_params *p = r->p;
    int64_t rows_q = p->batch * p->heads_q * p->seq_q, rows_k = p->batch * p->heads_k * p->seq_k;
    const int64_t *M = r->mask_size;
    measure_rows(&r->q, rows_q, p->head_dim);
    measure_rows(&r->k, rows_k, p->head_dim);
    measure_rows(&r->v, rows_k, p->head_dim_v);
    measure_rows(&r->dout, rows_q, p->head_dim_v);
    r->out = result_create(rows_q, p->head_dim_v);
    r->lse = result_create(rows_q, 1);
    r->dq = result_create(rows_q, p->head_dim);
    r->dk = result_create(rows_k, p->head_dim);
    r->dv = result_create(rows_k, p->head_dim_v);
    r->dmask = result_create(M[0] * M[1] * M[2] * M[3], 1);
    for (int64_t b = 0; b < p->batch; b++)
        for (int64_t h = 0; h < p->heads_q; h++)
            for (int64_t i = 0; i < p->seq_q; i++)
                reference_row(r, b, h, i);
}

void reference_free(struct reference *r) {
    struct input *inputs[] = {&r->q, &r->k, &r->v, &r->dout};
    for (int n = 0; n < 4; n++) {
        free(inputs[n]->norm);
        free(inputs[n]->max);
    }
    struct result *results[] = {&r->out, &r->lse, &r->dq, &r->dk, &r->dv, &r->dmask};
    for (int n = 0; n < 6; n++) {
        free(results[n]->value);
        free(results[n]->bound);
    }
}
