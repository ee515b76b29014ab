/* How often was this key asked for lately: a blocked 4-bit count-min sketch.
 *
 * A key's four counters lie in one 64-byte line, one in each of four rows of 32 counters, so an estimate costs one
 * cache miss. Counters saturate at 15 and are all halved once per ten additions and entry that there is room for
 * (TinyLFU's aging: Einziger, Friedman, Manes, ACM ToS 2017), a few lines at a time so that no single call pays for it.
 * Guard: the shard's lock; an estimate may be made without it (words are relaxed atomics). Any bytes are a valid sketch; wrong ones cost hit ratio until they have aged.
 */
#ifndef LEC_SKETCH_H
#define LEC_SKETCH_H

#include <stdint.h>

#include "internal.h"

#define LEC_SKETCH_WORDS_PER_LINE 8u
#define LEC_SKETCH_ADDITIONS_PER_ENTRY 10u /* additions, in units of the entries there is room for, between two halvings */
#define LEC_SKETCH_COUNTER_MAX 15u

/* Where the aging stands; lies in the shard's policy state. */
struct lec_sketch_aging {
    uint32_t additions;     /* since the last halving began */
    uint32_t cursor;        /* next line to halve; at or beyond the line count = no halving under way */
};

/* Process-private: where the sketch lies, with trusted geometry. */
struct lec_sketch {
    uint64_t *words;        /* lines * LEC_SKETCH_WORDS_PER_LINE, 64-byte aligned */
    struct lec_sketch_aging *aging;
    uint32_t lines;         /* at least 1 */
};

/* Mixes a tag, with a seed that no attacker knows, into the hash the functions below want. The tag also places the
 * entry in the index: whoever learns to fill one bucket has not learnt to fill one line. (Finalizer of SplitMix64.) */
static inline uint64_t lec_sketch_hash(uint64_t seed, uint32_t tag)
{
    uint64_t x = (seed ^ tag) * 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* Lines for a shard of max_entries: 8 bytes of sketch per entry. */
LEC_INTERNAL uint32_t lec_sketch_lines(uint32_t max_entries);
LEC_INTERNAL void lec_sketch_reset(const struct lec_sketch *sketch);
/* Counts `count` accesses (0..15) of the key with this well mixed hash, and does its share of the aging: all counters are halved,
 * a few lines at each call, once in LEC_SKETCH_ADDITIONS_PER_ENTRY additions for each of the `entries` there is room for. */
LEC_INTERNAL void lec_sketch_add(const struct lec_sketch *sketch, uint64_t hash, uint32_t count, uint32_t entries);
/* Asks for the key's line. */
LEC_INTERNAL void lec_sketch_warm(const struct lec_sketch *sketch, uint64_t hash);
/* 0..15 */
LEC_INTERNAL uint32_t lec_sketch_estimate(const struct lec_sketch *sketch, uint64_t hash);

#endif
