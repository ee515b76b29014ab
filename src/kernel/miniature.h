/* A cache of keys alone: the real policy at any size, in private memory, to which samples are replayed.
 *
 * It plays the kernel to the policy: it owns nodes and buckets, makes room before it inserts, and touches as a reader does.
 * There are no values and there is no lock: one thread, memory of its own. Any samples are safe to replay.
 */
#ifndef LEC_MINIATURE_H
#define LEC_MINIATURE_H

#include <stdbool.h>

#include "kernel.h"

struct lec_miniature {
    struct lec_policy_view policy;
    uint32_t *index;                /* open addressing: node + 1, 0 = free; placed by tag */
    uint32_t index_mask;            /* at least twice as many places as entries */
    uint32_t free_nodes;            /* linked by lec_node.next */
    uint32_t entries, units;        /* held now */
    uint32_t cursor;                /* next node to look at for one that has expired */
    uint64_t tti_ns;                /* 0 = off */
};

struct lec_miniature_size { uint32_t entries, units; };     /* as in struct lec_replay */

/* Bytes of memory, to be aligned to 64. */
LEC_INTERNAL uint64_t lec_miniature_bytes(uint32_t entries);
LEC_INTERNAL void lec_miniature_create(struct lec_miniature *miniature, void *memory, struct lec_miniature_size size, uint64_t tti_ns, uint64_t seed);
/* Insert and hit are a request, with a set where it misses. */
LEC_INTERNAL enum lec_outcome lec_miniature_replay(struct lec_miniature *miniature, uint64_t event, uint64_t at_ns);

#endif
