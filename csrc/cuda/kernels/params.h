/* What a CUDA kernel gets: the fields of struct fa_params that differ from call to call. Everything
 * else (dtype, head sizes, which features there are) is fixed when the kernel is compiled. Included
 * by the engine and by the kernels; lengths fit an int, distances in memory do not. */
#ifndef FA_KERNEL_PARAMS_H
#define FA_KERNEL_PARAMS_H

enum { FA_STATS_ROWS = 128 }; /* all tiles of queries divide it */

struct fa_kernel_tensor {
    void *data;
    long long stride_batch, stride_head, stride_row; /* in elements */
};

struct fa_kernel_mask {
    void *data;
    long long stride_batch, stride_head, stride_row, stride_col; /* 0 broadcasts */
};

struct fa_kernel_counter {
    unsigned long long owner; /* launch, or launch + 1 while it is made ready */
    int taken;
};

struct fa_kernel_params {
    int batch, heads_q, heads_k;
    int seq_q, seq_k;
    int blocks;      /* of queries (forward) or of keys (backward) for one head */
    int group_heads; /* of block_order.cuh: heads that are worked on together */

    struct fa_kernel_counter *counter; /* of dispenser.cuh; NULL: work is dealt out in turns */
    unsigned long long launch;         /* an even number that no other launch has */

    struct fa_kernel_tensor q;   /* [B, Hq, Sq, D] */
    struct fa_kernel_tensor k;   /* [B, Hk, Sk, D] */
    struct fa_kernel_tensor v;   /* [B, Hk, Sk, Dv] */
    struct fa_kernel_tensor out; /* [B, Hq, Sq, Dv] */
    float *lse;                  /* [B, Hq, Sq] */

    float scale;       /* of scores */
    float scale_log2e; /* times log2(e) */
    /* Query i sees the keys i + window_begin <= j < i + window_end. */
    int window_begin, window_end;
    struct fa_kernel_mask mask; /* broadcast to [B, Hq, Sq, Sk] */
    unsigned int *mask_map;     /* of mask_map.cuh; NULL: no tile is known to be empty */

    const unsigned long long *rng_state; /* {seed, offset} */
    unsigned int dropout_threshold;      /* see dropout.h */
    float dropout_scale;                 /* 1 / (1 - p) */

    struct fa_kernel_tensor dout; /* [B, Hq, Sq, Dv] */
    struct fa_kernel_tensor dq;   /* [B, Hq, Sq, D];  data NULL: not wanted, as in the next two */
    struct fa_kernel_tensor dk;   /* [B, Hk, Sk, D] */
    struct fa_kernel_tensor dv;   /* [B, Hk, Sk, Dv] */
    struct fa_kernel_mask dmask;  /* float, zeroed by the caller */
    float *row_stats;             /* see workspace.cuh */
    float *dq_sum;                /* likewise; NULL: the main kernel leaves dQ alone */
};

#endif
