/* Which entries have expired: a tree of minima over the nodes' deadlines.
 *
 *     root           min of 16
 *     ...            min of 16 each
 *     leaves         min of the deadlines of 16 nodes
 *
 * Each word is a lower bound: never later than any deadline below it. Setting an entry lowers what must be lowered
 * (mostly nothing: with one TTL for all, a new deadline is the latest); removing one stores nothing. A bound that
 * proves too low is raised when a look for expired entries comes by. So expired memory is found in a few steps, and
 * no list is kept in order. Derived data; guard: the shard's lock.
 */
#ifndef LEC_EXPIRY_H
#define LEC_EXPIRY_H

#include "shard.h"

#define LEC_NEVER UINT64_MAX

/* Words of the tree over so many nodes, and its levels (>= 1). */
LEC_INTERNAL uint32_t lec_expiry_words(uint32_t node_count, uint32_t *leaves, uint32_t *levels);

LEC_INTERNAL void lec_expiry_reset_locked(const struct lec_shard_view *view);
/* The node's deadline is `deadline_ns` or later from now on. */
LEC_INTERNAL void lec_expiry_note_locked(const struct lec_shard_view *view, uint32_t node, uint64_t deadline_ns);
/* An expired node, or LEC_NONE. Looks at no more than LEC_EXPIRY_LOOKS leaves. */
LEC_INTERNAL uint32_t lec_expiry_due_locked(const struct lec_shard_view *view);
/* When this live node dies if nobody touches it: its expiry, or the end of its idle time. */
LEC_INTERNAL uint64_t lec_expiry_deadline_locked(const struct lec_shard_view *view, uint32_t node);
/* Bounds that are later than a deadline below them. */
LEC_INTERNAL uint32_t lec_expiry_check_locked(const struct lec_shard_view *view);

#define LEC_EXPIRY_LOOKS 8u

#endif
