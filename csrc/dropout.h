/* Which probabilities dropout keeps: a function of (seed, offset, b, h, i, j) alone, so that the
 * forward, the backward, every device, every tile size and the PyTorch walkthrough
 * (flash_attn_ext/series/dropout.py) agree to the bit.
 *
 * Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) turns a
 * counter into 128 bits: eight numbers for eight scores. Seven rounds are the fewest that
 * pass BigCrush there. Those eight are the ones a thread of a tensor-core kernel holds of a 16 x 16
 * tile: rows i and i + 8, columns j, j + 1, j + 8 and j + 9. Within a tile, bit 3 of the row and
 * bits 3 and 0 of the column choose the number; all other bits of the position make the counter.
 *
 *     key     = seed (low word, high word)
 *     counter = { (i >> 4) << 3 | (i & 7),
 *                 (j >> 4) << 2 | (j >> 1 & 3),
 *                 b * Hq + h,
 *                 offset (low word) }
 *     number  = low 15 bits of half n & 1 of output word n >> 1 (low half first),
 *               with n = (i >> 3 & 1) * 4 + (j >> 3 & 1) * 2 + (j & 1)
 *     kept    = threshold <= 16384 ? number >= threshold : number < 32768 - threshold,
 *               with threshold = round(dropout_p * 32768)
 *
 * So no number is compared with more than 16384, and a GPU can compare two at once, as float16
 * without a sign: up to 0x7c00, which is infinity, these have the order of their bits, and a NaN,
 * 0x7c01 and up, is then just "not less".
 */
#ifndef FLASH_ATTENTION_DROPOUT_H
#define FLASH_ATTENTION_DROPOUT_H

#include <stdint.h>

static inline void fa_philox(uint32_t counter[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 7; round++) {
        uint64_t product0 = (uint64_t)0xD2511F53u * counter[0];
        uint64_t product1 = (uint64_t)0xCD9E8D57u * counter[2];
        counter[0] = (uint32_t)(product1 >> 32) ^ counter[1] ^ key0;
        counter[1] = (uint32_t)product1;
        counter[2] = (uint32_t)(product0 >> 32) ^ counter[3] ^ key1;
        counter[3] = (uint32_t)product0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

static inline uint32_t fa_dropout_threshold(double dropout_p) {
    return (uint32_t)(dropout_p * 32768.0 + 0.5);
}

static inline int fa_dropout_keeps(uint32_t half, uint32_t threshold) {
    const uint32_t number = half & 0x7fff;
    return threshold <= 16384 ? number >= threshold : number < 32768 - threshold;
}

#endif
