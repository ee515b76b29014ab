/* One shard as one process sees it: pointers into the segment with trusted sizes, and its lock. */
#ifndef LEC_SHARD_H
#define LEC_SHARD_H

#include <pthread.h>

#include "kernel.h"

struct lec_shard_view {
    struct lec_handle *handle;
    struct lec_shard *shard;
    pthread_mutex_t *mutex;
    struct lec_bucket *buckets;
    struct lec_node *nodes;
    uint32_t *generations;          /* per key hash: bumped by every set and delete; what fill tokens are made of. Behind them
                                     * as many fences: bumped by deletes alone */
    uint64_t *expiry;               /* expiry.h */
    uint64_t *live;                 /* recovery: two bitmaps of nodes, what is live and a scratch area behind it */
    struct lec_space_view space;
    struct lec_policy_view policy;
    uint64_t now_ns;                /* of the operation under way */
    uint32_t index;
    uint32_t bucket_count;
    uint32_t node_count;            /* entries this shard may hold */
};

/* The segment was validated at attach; `index` is below shard_count. */
LEC_INTERNAL void lec_shard_view(struct lec_handle *handle, uint32_t index, uint64_t now_ns, struct lec_shard_view *view);

/* Only what lec_token() and lec_fence() look at: a read has no use for the rest. */
LEC_INTERNAL void lec_shard_view_tokens(struct lec_handle *handle, uint32_t index, struct lec_shard_view *view);

static inline uint32_t lec_shard_of(const struct lec_handle *handle, uint64_t hash) { return (uint32_t)hash & (handle->geometry.shard_count - 1); }

/* Formats a shard nobody uses yet. */
LEC_INTERNAL void lec_shard_create(struct lec_handle *handle, uint32_t index, const uint64_t seed[2]);

/* Takes the lock: LEC_OK, LEC_WOULD_BLOCK (timeout_ns == 0), LEC_BUSY or LEC_RETIRED. Afterwards the shard is sound
 * (recovered if its last owner died) and belongs to the current clear epoch. */
LEC_INTERNAL enum lec_status lec_shard_lock(const struct lec_shard_view *view, uint64_t timeout_ns);
LEC_INTERNAL void lec_shard_unlock(const struct lec_shard_view *view);

/* Everything published is gone, reservations stay; counters and versions go on. Needs the lock. */
LEC_INTERNAL void lec_shard_clear_locked(const struct lec_shard_view *view);

/* recover.c: rebuilds all derived structures from the slots and the live reservations; clears the shard if they
 * contradict each other. Idempotent: may be killed at any store and run again. Needs the lock. */
LEC_INTERNAL void lec_shard_recover_locked(const struct lec_shard_view *view);

/* regions.c: the next mark among the samples: when it is, and what all processes have looked up by now. */
LEC_INTERNAL void lec_samples_mark_locked(const struct lec_shard_view *view);

/* What lec_get() hands out for a key on a miss, and a fill must present (write.c). */
LEC_INTERNAL uint64_t lec_token(const struct lec_shard_view *view, uint64_t hash, uint32_t epoch);
LEC_INTERNAL uint64_t lec_fence(const struct lec_shard_view *view, uint64_t hash, uint32_t epoch);
/* From now on a fill that presents a token or a fence handed out before is refused. */
LEC_INTERNAL void lec_token_void_locked(const struct lec_shard_view *view, uint64_t hash);

/* The epoch that entries must belong to, now. */
static inline uint32_t lec_epoch(const struct lec_handle *handle) { return (uint32_t)atomic_load_explicit(&handle->header->state, memory_order_acquire); }
static inline bool lec_is_retired(const struct lec_handle *handle) { return atomic_load_explicit(&handle->header->state, memory_order_acquire) >> 32 != 0; }

/* What happens under the lock is counted in the shard: no locked instruction, and no process to attribute it to. */
static inline void lec_stat_add_locked(const struct lec_shard_view *view, enum lec_stat stat, uint64_t count)
{
    _Atomic uint64_t *sum = &view->shard->stats[stat];
    atomic_store_explicit(sum, atomic_load_explicit(sum, memory_order_relaxed) + count, memory_order_relaxed);
}

/* The rest in the process's own record; atomic, because threads without the GIL come here too. */
static inline void lec_stat_add(struct lec_handle *handle, enum lec_stat stat, uint64_t count)
{
    atomic_fetch_add_explicit(&handle->process->stats[stat], count, memory_order_relaxed);
}

#endif
