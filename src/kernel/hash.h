/* The key hash: folded 64x64 -> 128 bit multiplications, seeded with 128 random bits per segment.
 *
 * The construction is the one of wyhash and its relatives (Wang Yi, "Modern Non-Cryptographic Hash Function and
 * Pseudorandom Permutation", 2019): multiply two words that each hide a secret, fold the halves of the product.
 * The seed is in the segment, readable by its owner only; it defends the index and the sketch against crafted keys.
 */
#ifndef LEC_HASH_H
#define LEC_HASH_H

#include <stdint.h>
#include <string.h>

static inline uint64_t lec_hash_fold(uint64_t left, uint64_t right)
{
    __extension__ typedef unsigned __int128 wide;
    wide product = (wide)left * right;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline uint64_t lec_hash_word(const uint8_t *bytes)
{
    uint64_t word;
    memcpy(&word, bytes, 8);
    return word;
}

/* The (at most 16) bytes at the end of a key, as two words; keys of 16 bytes and more overlap with what came before. */
static inline void lec_hash_tail(const uint8_t *key, uint32_t bytes, uint64_t *low, uint64_t *high)
{
    if (bytes >= 16) {
        *low = lec_hash_word(key + bytes - 16);
        *high = lec_hash_word(key + bytes - 8);
        return;
    }
    uint8_t padded[16] = {0};
    memcpy(padded, key, bytes);
    *low = lec_hash_word(padded);
    *high = lec_hash_word(padded + 8);
}

static inline uint64_t lec_hash(const void *key, uint32_t bytes, const uint64_t seed[2])
{
    const uint8_t *at = key;
    uint64_t first = seed[0] ^ bytes, second = seed[1] + bytes, low, high;
    uint32_t left = bytes;
    for (; left > 32; left -= 32, at += 32) {
        first = lec_hash_fold(lec_hash_word(at) ^ seed[0], lec_hash_word(at + 8) ^ first);
        second = lec_hash_fold(lec_hash_word(at + 16) ^ seed[1], lec_hash_word(at + 24) ^ second);
    }
    if (left > 16) first = lec_hash_fold(lec_hash_word(at) ^ seed[0], lec_hash_word(at + 8) ^ first);
    lec_hash_tail(key, bytes, &low, &high);
    second = lec_hash_fold(low ^ seed[1], high ^ second);
    return lec_hash_fold(first ^ UINT64_C(0x9e3779b97f4a7c15), second ^ seed[0]);
}

#endif
