/* The two fixed-size records every shard keeps per entry: its node and its bucket slot.
 *
 * Both live in tables of their own where payload never goes ("type-stable" memory): a reader that lost its
 * race may still touch a stale node or bucket, and finds there a node or a bucket, never somebody's value.
 */
#ifndef LEC_NODE_H
#define LEC_NODE_H

#include <stdatomic.h>
#include <stdint.h>

#define LEC_NONE UINT32_MAX         /* "no node", "no unit" */
#define LEC_SLOTS_PER_BUCKET 6u
#define LEC_TOUCH_MAX 3u            /* hits between two examinations that are told apart; hot keys stay here and store nothing */

enum lec_list { LEC_LIST_FREE = 0, LEC_LIST_WINDOW = 1, LEC_LIST_PROBATION = 2, LEC_LIST_PROTECTED = 3 };

/* One entry's bookkeeping. Guard: the shard's lock, but for accessed_at. Valid while list != FREE. */
struct lec_node {
    uint32_t prev, next;            /* neighbours in its list, LEC_NONE at the ends; a free node uses next only */
    uint32_t tag;                   /* the upper 32 bits of the key's hash: what the sketch and the ghosts are keyed by */
    uint32_t units_list;            /* bits 0..29: units (64 bytes) the entry occupies; bits 30..31: enum lec_list */
    uint32_t unit;                  /* first unit of the entry in the shard's arena */
    uint32_t slot;                  /* its place in the index: bucket * LEC_SLOTS_PER_BUCKET + position */
    _Atomic uint64_t accessed_at;   /* ns, CLOCK_MONOTONIC; stored by readers too, only when the entry has a TTI */
    uint64_t expires_at;            /* ns; a copy of the header's for the sweep, UINT64_MAX = never */
};
_Static_assert(sizeof(struct lec_node) == 40, "lec_node is part of the layout");

/* One cache line of the index. A reader needs nothing else to find an entry and to validate what it copied. */
struct lec_bucket {
    _Atomic uint64_t control;       /* bits 0..7: entries of this home that live in their alternate bucket; bits 8..63: version */
    _Atomic uint8_t touches[8];     /* hits per slot since last examined, saturating at LEC_TOUCH_MAX; [6], [7] unused */
    _Atomic uint64_t slots[LEC_SLOTS_PER_BUCKET]; /* 0 = empty, else tag << 32 | unit + 1 */
};
_Static_assert(sizeof(struct lec_bucket) == 64, "a bucket is one cache line");

static inline uint32_t lec_node_units(const struct lec_node *node) { return node->units_list & 0x3fffffffu; }
static inline enum lec_list lec_node_list(const struct lec_node *node) { return (enum lec_list)(node->units_list >> 30); }
static inline void lec_node_set_list(struct lec_node *node, enum lec_list list) { node->units_list = lec_node_units(node) | (uint32_t)list << 30; }

#endif
