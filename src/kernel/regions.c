/* Totals over all processes, and the bounds of the regions that the manager uses. */
#include "process.h"
#include "shard.h"

#define HISTOGRAM_COUNTS (LEC_HISTOGRAM_BUCKETS - 1)    /* the last word is the sum */

/* One thread at a time stores to the record's words (the caller's promise) unless the handle is `concurrent`. */
static inline void add(const struct lec_handle *handle, _Atomic uint64_t *sum, uint64_t amount)
{
    if (handle->concurrent) atomic_fetch_add_explicit(sum, amount, memory_order_relaxed);
    else atomic_store_explicit(sum, atomic_load_explicit(sum, memory_order_relaxed) + amount, memory_order_relaxed);
}

bool lec_count(struct lec_handle *handle, uint32_t counter, uint64_t amount)
{
    if (counter >= LEC_COUNTERS) return false;
    add(handle, &handle->process->counters[counter], amount);
    return true;
}

/* The first bucket whose bound, LEC_HISTOGRAM_FIRST_NS << i, is not below. */
static inline uint32_t histogram_bucket(uint64_t elapsed_ns)
{
    uint64_t bounds_below = elapsed_ns == 0 ? 0 : (elapsed_ns - 1) / LEC_HISTOGRAM_FIRST_NS;
    uint32_t bucket = bounds_below == 0 ? 0 : 64 - (uint32_t)__builtin_clzll(bounds_below);
    return bucket < HISTOGRAM_COUNTS ? bucket : HISTOGRAM_COUNTS - 1;
}

bool lec_observe(struct lec_handle *handle, uint32_t histogram, uint64_t elapsed_ns)
{
    if (histogram >= LEC_HISTOGRAMS) return false;
    _Atomic uint64_t *words = handle->process->histograms[histogram];
    add(handle, &words[histogram_bucket(elapsed_ns)], 1);
    add(handle, &words[HISTOGRAM_COUNTS], elapsed_ns);
    return true;
}

void lec_counter_sums(struct lec_handle *handle, uint64_t sums[LEC_COUNTERS])
{
    for (uint32_t counter = 0; counter < LEC_COUNTERS; counter++) sums[counter] = 0;
    for (uint32_t process = 0; process < handle->geometry.process_count; process++)
        for (uint32_t counter = 0; counter < LEC_COUNTERS; counter++)
            sums[counter] += atomic_load_explicit(&lec_process_at(handle, process)->counters[counter], memory_order_relaxed);
}

static void add_histogram(struct lec_process *process, uint32_t histogram, uint64_t sums[LEC_HISTOGRAM_BUCKETS])
{
    for (uint32_t word = 0; word < LEC_HISTOGRAM_BUCKETS; word++)
        sums[word] += atomic_load_explicit(&process->histograms[histogram][word], memory_order_relaxed);
}

void lec_histogram_sums(struct lec_handle *handle, uint64_t sums[LEC_HISTOGRAMS][LEC_HISTOGRAM_BUCKETS])
{
    for (uint32_t histogram = 0; histogram < LEC_HISTOGRAMS; histogram++)
        for (uint32_t word = 0; word < LEC_HISTOGRAM_BUCKETS; word++) sums[histogram][word] = 0;
    for (uint32_t process = 0; process < handle->geometry.process_count; process++)
        for (uint32_t histogram = 0; histogram < LEC_HISTOGRAMS; histogram++)
            add_histogram(lec_process_at(handle, process), histogram, sums[histogram]);
}

_Atomic uint64_t *lec_word(struct lec_handle *handle, uint32_t index)
{
    return index < LEC_WORDS ? (_Atomic uint64_t *)(void *)(handle->base + handle->geometry.words) + index : NULL;
}

/* Tags share generations: a collision invalidates too much, never too little. */
_Atomic uint64_t *lec_tag(struct lec_handle *handle, uint64_t tag_hash)
{
    return (_Atomic uint64_t *)(void *)(handle->base + handle->geometry.tags) + tag_hash % handle->geometry.tag_count;
}

uint32_t lec_tag_count(const struct lec_handle *handle) { return handle->geometry.tag_count; }

bool lec_process_totals(struct lec_handle *handle, uint32_t index, struct lec_process_totals *totals)
{
    if (index >= handle->geometry.process_count) return false;
    struct lec_process *process = lec_process_at(handle, index);
    totals->owner = atomic_load_explicit(&process->owner, memory_order_relaxed);
    totals->hits = atomic_load_explicit(&process->stats[LEC_STAT_HITS], memory_order_relaxed);
    totals->misses = atomic_load_explicit(&process->stats[LEC_STAT_MISSES], memory_order_relaxed);
    return true;
}

struct lec_flight *lec_flight_at(struct lec_handle *handle, uint32_t index)
{
    return index < handle->geometry.flight_count ? (struct lec_flight *)(void *)(handle->base + handle->geometry.flights) + index : NULL;
}

uint64_t lec_entries(struct lec_handle *handle)
{
    uint64_t entries = 0;
    for (uint32_t index = 0; index < handle->geometry.shard_count; index++) {
        struct lec_shard_view view;
        lec_shard_view(handle, index, 0, &view);
        if (atomic_load_explicit(&view.shard->epoch, memory_order_acquire) == lec_epoch(handle))
            entries += atomic_load_explicit(&view.shard->entries, memory_order_relaxed);
    }
    return entries;
}

/* ---- samples ---- */

static void sum_add(uint64_t *sum, const _Atomic uint64_t *part) { *sum += atomic_load_explicit(part, memory_order_relaxed); }

void lec_samples_mark_locked(const struct lec_shard_view *view)
{
    const struct lec_handle *handle = view->handle;
    struct lec_sample_mark mark = {.at_ns = view->now_ns, .threshold = view->policy.state->shadow.threshold};
    for (uint32_t index = 0; index < handle->geometry.process_count; index++) {
        const struct lec_process *process = lec_process_at(handle, index);
        sum_add(&mark.hits, &process->stats[LEC_STAT_HITS]);
        sum_add(&mark.misses, &process->stats[LEC_STAT_MISSES]);
        sum_add(&mark.counted_hits, &process->counters[LEC_COUNTER_HITS]);
        sum_add(&mark.counted_misses, &process->counters[LEC_COUNTER_MISSES]);
    }
    lec_samples_mark(&view->policy.samples, &mark);
}

bool lec_samples_of(struct lec_handle *handle, uint32_t shard, struct lec_samples_copy *copy)
{
    struct lec_shard_view view;
    if (shard >= handle->geometry.shard_count) return false;
    lec_shard_view(handle, shard, 0, &view);
    lec_samples_read(&view.policy.samples, copy);
    copy->entries = view.node_count;
    copy->units = view.space.units;
    copy->threshold = __atomic_load_n(&view.policy.state->shadow.threshold, __ATOMIC_RELAXED);
    return true;
}

static void add_shard(struct lec_handle *handle, uint32_t index, struct lec_totals *totals)
{
    struct lec_shard_view view;
    lec_shard_view(handle, index, 0, &view);
    for (uint32_t stat = 0; stat < LEC_STAT_COUNT; stat++) totals->stats[stat] += atomic_load_explicit(&view.shard->stats[stat], memory_order_relaxed);
    uint64_t share = atomic_load_explicit(&view.shard->window_share, memory_order_relaxed);
    totals->window_ppm += (uint32_t)(share * 1000000u / LEC_SHARE_ONE / handle->geometry.shard_count);
    /* A cleared shard that nobody has swept yet holds nothing. */
    if (atomic_load_explicit(&view.shard->epoch, memory_order_acquire) != lec_epoch(handle)) return;
    uint32_t free_units = __atomic_load_n(&view.shard->space.free_units, __ATOMIC_RELAXED);
    totals->entries += atomic_load_explicit(&view.shard->entries, memory_order_relaxed);
    totals->payload_bytes += atomic_load_explicit(&view.shard->payload_bytes, memory_order_relaxed);
    if (free_units < view.space.units) totals->used_bytes += (uint64_t)(view.space.units - free_units) * LEC_UNIT;
}

void lec_totals(struct lec_handle *handle, struct lec_totals *totals)
{
    *totals = (struct lec_totals){.created_wall_ns = handle->header->created_wall_ns, .attached_processes = lec_attached(handle)};
    for (uint32_t index = 0; index < handle->geometry.shard_count; index++) add_shard(handle, index, totals);
    for (uint32_t process = 0; process < handle->geometry.process_count; process++)
        for (uint32_t stat = 0; stat < LEC_STAT_COUNT; stat++)
            totals->stats[stat] += atomic_load_explicit(&lec_process_at(handle, process)->stats[stat], memory_order_relaxed);
}
