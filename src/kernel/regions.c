/* Totals over all processes, and the bounds of the regions that the manager uses. */
#include "process.h"
#include "shard.h"

_Atomic uint64_t *lec_counter(struct lec_handle *handle, uint32_t index)
{
    return index < LEC_COUNTERS ? &handle->process->counters[index] : NULL;
}

/* Records of the dead count too, so the sum never falls. */
uint64_t lec_counter_sum(struct lec_handle *handle, uint32_t index)
{
    uint64_t sum = 0;
    for (uint32_t process = 0; index < LEC_COUNTERS && process < handle->geometry.process_count; process++)
        sum += atomic_load_explicit(&lec_process_at(handle, process)->counters[index], memory_order_relaxed);
    return sum;
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
