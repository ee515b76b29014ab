#include "shard.h"

#include <errno.h>
#include <time.h>

#include "chain.h"
#include "expiry.h"
#include "index.h"
#include "reserve.h"

static void samples_view(const struct lec_shard_view *view, uint8_t *base, struct lec_samples_view *samples)
{
    const struct lec_geometry *geometry = &view->handle->geometry;
    samples->state = &view->shard->samples;
    samples->marks = (struct lec_sample_mark *)(void *)(base + geometry->marks);
    samples->events = (uint64_t *)(void *)(base + geometry->samples);
    samples->event_count = geometry->sample_count;
    samples->mark_count = geometry->mark_count;
}

static void policy_view(const struct lec_shard_view *view, uint64_t *sketch, struct lec_policy_view *policy)
{
    policy->state = &view->shard->policy;
    policy->nodes = view->nodes;
    policy->buckets = view->buckets;
    policy->sketch = sketch;
    policy->seed = view->handle->seed[0] ^ view->index;
    policy->max_entries = view->node_count;
    policy->bucket_count = view->bucket_count;
    policy->total_units = view->space.units;
    policy->now_ns = view->now_ns;
}

void lec_shard_view(struct lec_handle *handle, uint32_t index, uint64_t now_ns, struct lec_shard_view *view)
{
    const struct lec_geometry *geometry = &handle->geometry;
    uint8_t *base = handle->base + geometry->shards + geometry->shard_stride * index;
    /* Field by field: every write comes here, and a compound literal is built elsewhere and copied. */
    view->handle = handle;
    view->shard = (struct lec_shard *)(void *)base;
    view->mutex = (pthread_mutex_t *)(void *)(handle->base + geometry->mutexes + (uint64_t)LEC_MUTEX_STRIDE * index);
    view->buckets = (struct lec_bucket *)(void *)(base + geometry->buckets);
    view->nodes = (struct lec_node *)(void *)(base + geometry->nodes);
    view->generations = (uint32_t *)(void *)(base + geometry->generations);
    view->expiry = (uint64_t *)(void *)(base + geometry->expiry);
    view->live = (uint64_t *)(void *)(base + geometry->live);
    view->now_ns = now_ns;
    view->index = index;
    view->bucket_count = geometry->bucket_count;
    view->node_count = lec_shard_entries(geometry, index);
    view->space.state = &view->shard->space;
    view->space.used = (uint64_t *)(void *)(base + geometry->used);
    view->space.arena = base + geometry->arena;
    view->space.units = geometry->units;
    policy_view(view, (uint64_t *)(void *)(base + geometry->sketch), &view->policy);
    samples_view(view, base, &view->policy.samples);
}

void lec_shard_view_tokens(struct lec_handle *handle, uint32_t index, struct lec_shard_view *view)
{
    const struct lec_geometry *geometry = &handle->geometry;
    view->handle = handle;
    view->generations = (uint32_t *)(void *)(handle->base + geometry->shards + geometry->shard_stride * index + geometry->generations);
}

/* ---- the lock ---- */

static void mutex_create(pthread_mutex_t *mutex)
{
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(mutex, &attributes);
    pthread_mutexattr_destroy(&attributes);
}

static struct timespec deadline_after(clockid_t clock, uint64_t timeout_ns)
{
    struct timespec at;
    clock_gettime(clock, &at);
    uint64_t nanoseconds = (uint64_t)at.tv_nsec + timeout_ns;
    at.tv_sec += (time_t)(nanoseconds / 1000000000u);
    at.tv_nsec = (long)(nanoseconds % 1000000000u);
    return at;
}

static LEC_ASIDE int mutex_wait(pthread_mutex_t *mutex, uint64_t timeout_ns)
{
#if defined(__GLIBC__) && __GLIBC_PREREQ(2, 30)
    struct timespec deadline = deadline_after(CLOCK_MONOTONIC, timeout_ns);
    return pthread_mutex_clocklock(mutex, CLOCK_MONOTONIC, &deadline);
#else
    struct timespec deadline = deadline_after(CLOCK_REALTIME, timeout_ns);  /* a clock step may shorten or stretch it */
    return pthread_mutex_timedlock(mutex, &deadline);
#endif
}

#define LOCK_SPINS 64u              /* critical sections last around a microsecond: try that long before sleeping */

static int mutex_try(pthread_mutex_t *mutex)
{
    int error = pthread_mutex_trylock(mutex);
    for (uint32_t spin = 0; error == EBUSY && spin < LOCK_SPINS; spin++) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        error = pthread_mutex_trylock(mutex);
    }
    return error;
}

/* The dead owner may have stopped between any two stores. Consistent is said last: whoever is killed while recovering
 * leaves the mutex as it found it, and the next one recovers from the start. */
static LEC_ASIDE void adopt_from_dead_owner(const struct lec_shard_view *view)
{
    lec_shard_recover_locked(view);
    lec_stat_add_locked(view, LEC_STAT_RECOVERIES, 1);
    pthread_mutex_consistent(view->mutex);
}

enum lec_status lec_shard_lock(const struct lec_shard_view *view, uint64_t timeout_ns)
{
    if (lec_is_retired(view->handle)) return LEC_RETIRED;
    int error = mutex_try(view->mutex);
    if (error == EBUSY) {
        if (timeout_ns == 0) return LEC_WOULD_BLOCK;
        error = mutex_wait(view->mutex, timeout_ns);
    }
    if (error != 0 && error != EOWNERDEAD) {
        lec_stat_add(view->handle, LEC_STAT_BUSY, 1);
        return LEC_BUSY;
    }
    if (error == EOWNERDEAD) adopt_from_dead_owner(view);
    /* Units that another thread unlinked and gave back are ours to fill now. Its bucket version store happened before
     * our acquisition; this fence puts it before our stores for readers as well (index.h, U4):
     * 1 A unlinks E, version + 1, unlocks  2 B locks, fills E's units  3 a reader copying E sees B's bytes: without the
     * fence it may on a weakly ordered machine still see the old version, and return B's bytes as E's. */
    lec_fence_release();
    if (atomic_load_explicit(&view->shard->epoch, memory_order_relaxed) != lec_epoch(view->handle)) lec_shard_clear_locked(view);
    return LEC_OK;
}

void lec_shard_unlock(const struct lec_shard_view *view) { pthread_mutex_unlock(view->mutex); }

/* ---- emptying ---- */

/* All nodes on the free list, lowest first. */
static void nodes_reset(const struct lec_shard_view *view)
{
    for (uint32_t node = 0; node < view->node_count; node++) {
        view->nodes[node].units_list = LEC_LIST_FREE;
        view->nodes[node].next = node + 1 < view->node_count ? node + 1 : LEC_NONE;
    }
    view->shard->free_nodes = 0;
}

LEC_ASIDE void lec_shard_clear_locked(const struct lec_shard_view *view)
{
    struct lec_shard *shard = view->shard;
    uint32_t epoch = lec_epoch(view->handle);
    atomic_store_explicit(&shard->entries, 0, memory_order_relaxed);
    atomic_store_explicit(&shard->payload_bytes, 0, memory_order_relaxed);
    lec_index_reset_locked(view);
    bool is_spoiled = true;
    for (uint32_t pass = 0; is_spoiled && pass < LEC_MARKING_PASSES; pass++) {
        lec_space_unmark_all(&view->space);
        shard->reserved_chains = lec_reservations_mark_locked(view, &is_spoiled);
    }
    lec_space_rebuild(&view->space);
    nodes_reset(view);
    lec_policy_reset(&view->policy);
    lec_samples_restart(&view->policy.samples);
    lec_expiry_reset_locked(view);
    /* Last: killed before, the next owner clears again. */
    atomic_store_explicit(&shard->epoch, epoch, memory_order_release);
}

void lec_shard_create(struct lec_handle *handle, uint32_t index, const uint64_t seed[2])
{
    struct lec_shard_view view;
    lec_shard_view(handle, index, 0, &view);
    mutex_create(view.mutex);
    /* Versions and tokens of another segment under the same name do not fit this one. */
    view.shard->next_version = (seed[0] >> 2) + 1;
    for (uint32_t at = 0; at < 2 * handle->geometry.generation_count; at++) view.generations[at] = (uint32_t)(seed[1] + at * UINT64_C(0x9e3779b1));
    lec_shard_clear_locked(&view);
}
