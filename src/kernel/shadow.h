/* Which window share would serve this traffic best? Eight miniature caches, one per share, race on a sample of the keys.
 *
 * Why simulate: hits are not a concave function of the window's size (a loop that overflows the window by one entry
 * hits nothing there and takes the main space's room as well), so neither hits on ghosts nor small steps of a hill
 * climber can tell what lies behind the next hill. A miniature with 1/k of the room that sees 1/k of the keys has
 * nearly the hit ratio of the whole (Waldspurger et al., USENIX ATC 2017; Einziger et al., Middleware 2018).
 *
 * Where the accesses come from: misses are inserts, which the policy sees. Hits nobody reports; the policy finds them
 * in the touch bytes of sampled entries, which it polls, a few at each insert, and takes when it examines an entry.
 * Neither may lose any: racers that are not told of hits see fewer keys than there are and find that all of them fit.
 *
 * Each miniature is the real policy in small: three FIFO rings with lazy promotion, contests by frequency. Ring items
 * are not searched for when a key leaves; the key's own record says which ring it is in, and a stale item is skipped.
 *
 * Guard: the shard's lock. Any bytes are a valid state: indices are masked, loops are bounded, and wrong contents wash
 * out within a few turnovers of the cache.
 */
#ifndef LEC_SHADOW_H
#define LEC_SHADOW_H

#include <stdbool.h>
#include <stdint.h>

#include "node.h"
#include "sketch.h"

#define LEC_SHARE_ONE 65536u            /* shares are fractions of this */
#define LEC_SHADOW_RACERS 8u
#define LEC_SHADOW_SETS 128u
#define LEC_SHADOW_WAYS 8u
#define LEC_SHADOW_KEYS (LEC_SHADOW_SETS * LEC_SHADOW_WAYS)
#define LEC_SHADOW_RING 256u
#define LEC_SHADOW_LINES 32u            /* of sketch: 8 bytes for each of LEC_SHADOW_RING keys */

/* A sampled key. In use while a racer holds it or it is live. */
struct lec_shadow_key {
    uint32_t tag;
    uint32_t node;                      /* where it lives in the real cache, LEC_NONE = it does not */
    uint32_t racers;                    /* 4 bits per racer: bits 0..1 enum lec_list, bits 2..3 touches */
    uint32_t polled;                    /* what the last poll left in the entry's touch byte */
};

/* A list of a racer: items[head - count .. head) modulo LEC_SHADOW_RING, oldest first. */
struct lec_shadow_ring {
    uint16_t count;                     /* stale items included */
    uint16_t head;
    uint16_t items[LEC_SHADOW_RING];    /* indices into the keys */
};

struct lec_shadow_racer {
    struct lec_shadow_ring rings[3];    /* by enum lec_list - 1 */
    uint32_t score;                     /* decayed hits on accesses that not all racers agreed on, in 1/256 */
    uint32_t beats[LEC_SHADOW_RACERS];  /* decayed accesses that were hits here and misses there, in 1/256 */
};

struct lec_shadow {
    uint64_t seed;
    uint32_t share;                     /* the recommendation, of LEC_SHARE_ONE */
    uint32_t threshold;                 /* a key is sampled if its sample hash does not exceed this */
    uint32_t live;                      /* sampled keys in the real cache */
    uint32_t room;                      /* entries a racer may hold, in 1/1024: live, smoothed once the cache is full */
    uint32_t cursor;                    /* of polling: keys looked at in this round */
    uint32_t counted;                   /* live keys seen in this round of polling */
    uint32_t accesses;                  /* since the racers were last judged */
    uint32_t is_full;                   /* the real cache has evicted a sampled key */
    struct lec_sketch_aging aging;
    uint64_t words[LEC_SHADOW_LINES * LEC_SKETCH_WORDS_PER_LINE];
    struct lec_shadow_key keys[LEC_SHADOW_KEYS];
    struct lec_shadow_racer racers[LEC_SHADOW_RACERS];
};

LEC_INTERNAL void lec_shadow_reset(struct lec_shadow *shadow, uint64_t seed);

/* Sampled are the keys whose sample hash does not exceed the threshold. */
LEC_INTERNAL uint32_t lec_shadow_sample_hash(const struct lec_shadow *shadow, uint32_t tag);

/* A key was inserted: node is where it lives now. False, and nothing is done, if it is not sampled. */
LEC_INTERNAL bool lec_shadow_insert(struct lec_shadow *shadow, uint32_t tag, uint32_t node);

/* A key left the cache: evicted (the racers decide for themselves), or deleted (the racers lose it too; true if it was known). */
LEC_INTERNAL void lec_shadow_evict(struct lec_shadow *shadow, uint32_t tag);
LEC_INTERNAL bool lec_shadow_remove(struct lec_shadow *shadow, uint32_t tag);

/* The entry of a key was examined and its touches (1..LEC_TOUCH_MAX) taken: hits, but for those that polls have seen.
 * Returns how many are news of a sampled key. */
LEC_INTERNAL uint32_t lec_shadow_touched(struct lec_shadow *shadow, uint32_t tag, uint32_t count);

/* Polling goes by the set: one that is due is returned as soon as there were looks for all its keys, with a bit in *live for
 * each that is live; NULL: the looks are spent. Found at once, their cache misses overlap, and there are fewer branches to guess. */
LEC_INTERNAL struct lec_shadow_key *lec_shadow_next(struct lec_shadow *shadow, uint32_t *looks, uint32_t *live);

/* What polling a key found: it had `count` hits (1..LEC_TOUCH_MAX), or its node is another entry's by now. */
LEC_INTERNAL void lec_shadow_hit(struct lec_shadow *shadow, struct lec_shadow_key *key, uint32_t count);
LEC_INTERNAL void lec_shadow_gone(struct lec_shadow *shadow, struct lec_shadow_key *key);

#endif
