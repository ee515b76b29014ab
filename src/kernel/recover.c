/* Rebuilding a shard after its lock's owner died, or after something in it proved damaged.
 *
 * Roots: the published slots, and the reservations of live owners. Everything else (free runs, bitmap, nodes, policy
 * order, expiry bounds, overflow counts, counters) is derived from them here. Each unit must be reached exactly once;
 * when that proof fails the shard is cleared. Roots are only ever dropped, never changed, so whoever is killed in the
 * middle leaves the same roots, and the next one starts over.
 */
#include "access.h"
#include "chain.h"
#include "expiry.h"
#include "index.h"
#include "reserve.h"

#define HOME_COUNT 7                /* the unused touch byte of a bucket where overflow is counted anew */

#define VERSION_LIMIT (UINT64_C(1) << 63)   /* no counter that started at 1 gets there */

struct salvage { uint64_t payload_bytes, highest_version; uint32_t entries; };

static _Atomic uint8_t *home_count(const struct lec_shard_view *view, uint32_t bucket) { return &view->buckets[bucket].touches[HOME_COUNT]; }

/* An entry in its alternate bucket: its home must send readers there. */
static void count_overflow(const struct lec_shard_view *view, uint32_t home)
{
    uint8_t count = atomic_load_explicit(home_count(view, home), memory_order_relaxed);
    if (count < LEC_OVERFLOW_MAX) atomic_store_explicit(home_count(view, home), (uint8_t)(count + 1), memory_order_relaxed);
}

/* lec_slot_load(), without a division for each. */
static uint64_t word_in(const struct lec_shard_view *view, uint32_t bucket, uint32_t position)
{
    return atomic_load_explicit(&view->buckets[bucket].slots[position], memory_order_relaxed);
}

static bool is_live(const struct lec_shard_view *view, uint32_t node) { return view->live[node / 64] >> (node % 64) & 1; }

/* All that a root in this bucket must fulfil before its chain is walked. */
static bool root_is_plausible(const struct lec_shard_view *view, uint32_t bucket, uint64_t word, const struct lec_entry *entry, struct lec_homes homes)
{
    if (lec_hash_tag(entry->hash) != lec_slot_tag(word) || lec_shard_of(view->handle, entry->hash) != view->index) return false;
    if (bucket != homes.home && bucket != homes.alternate) return false;
    if (entry->key_bytes == 0 || entry->key_bytes > LEC_MAX_KEY || entry->value_bytes > view->handle->config.max_value_bytes) return false;
    if (entry->version >= VERSION_LIMIT) return false;
    return entry->node < view->node_count && !is_live(view, entry->node);
}

/* The dead owner was moving this entry (move_resident()): it stands in its home as well. */
static bool is_second_copy(const struct lec_shard_view *view, uint32_t bucket, uint64_t word, uint32_t home)
{
    if (home == bucket) return false;
    for (uint32_t at = home * LEC_SLOTS_PER_BUCKET; at < (home + 1) * LEC_SLOTS_PER_BUCKET; at++)
        if (lec_slot_load(view, at) == word) return true;
    return false;
}

static void node_restore(const struct lec_shard_view *view, const struct lec_entry *entry, uint32_t slot, uint64_t word, uint32_t units)
{
    struct lec_node *node = &view->nodes[entry->node];
    node->tag = lec_slot_tag(word);
    node->units_list = (node->units_list & UINT32_C(0xc0000000)) | units;   /* the list is kept: a hint for its place */
    node->unit = lec_slot_unit(word);
    node->slot = slot;
    node->expires_at = entry->expires_at;
    if (entry->tti_ms == 0) atomic_store_explicit(&node->accessed_at, 0, memory_order_relaxed);
    else if (atomic_load_explicit(&node->accessed_at, memory_order_relaxed) == 0)
        atomic_store_explicit(&node->accessed_at, view->now_ns, memory_order_relaxed);
    view->live[entry->node / 64] |= UINT64_C(1) << (entry->node % 64);
}

/* Marks what one slot of this bucket reaches; false: the proof failed. */
static bool salvage_slot(const struct lec_shard_view *view, uint32_t bucket, uint32_t position, struct salvage *salvage)
{
    uint64_t word = word_in(view, bucket, position);
    uint32_t unit = lec_slot_unit(word), slot = bucket * LEC_SLOTS_PER_BUCKET + position, units;
    if (word == 0) return true;
    if (unit >= view->space.units) return false;
    const struct lec_entry *entry = lec_entry_at(&view->space, unit);
    struct lec_homes homes = lec_homes_of(entry->hash, view->bucket_count);
    if (is_second_copy(view, bucket, word, homes.home)) {
        lec_index_replace_locked(view, slot, 0);
        return true;
    }
    if (!root_is_plausible(view, bucket, word, entry, homes)) return false;
    if (entry->epoch != atomic_load_explicit(&view->shard->epoch, memory_order_relaxed)) return false;
    uint64_t payload_bytes = (uint64_t)entry->key_bytes + entry->value_bytes;
    if (!lec_chain_mark(&view->space, unit, payload_bytes, &units)) return false;
    if (bucket != homes.home) count_overflow(view, homes.home);
    node_restore(view, entry, slot, word, units);
    salvage->entries++;
    salvage->payload_bytes += payload_bytes;
    if (entry->version > salvage->highest_version) salvage->highest_version = entry->version;
    return true;
}

/* Headers and nodes lie anywhere, so a full shard is rebuilt in the time that memory takes. What counts is how much is
 * asked for at once: a prefetch into a page whose translation is not cached waits for it like a load, and between other
 * work only two or three such waits overlap. So buckets come in groups, and one group's headers are asked for in a row. */
#define GROUP_BUCKETS 8u

static uint32_t group_end(const struct lec_shard_view *view, uint32_t first)
{
    return first + GROUP_BUCKETS < view->bucket_count ? first + GROUP_BUCKETS : view->bucket_count;
}

static void headers_prefetch(const struct lec_shard_view *view, uint32_t first)
{
    for (uint32_t bucket = first; bucket < group_end(view, first); bucket++) {
        for (uint32_t position = 0; position < LEC_SLOTS_PER_BUCKET; position++) {
            uint32_t unit = lec_slot_unit(word_in(view, bucket, position));
            if (unit >= view->space.units) continue;
            __builtin_prefetch(lec_space_at(&view->space, unit));
            __builtin_prefetch(&view->space.used[unit / 64], 1);
        }
    }
}

/* Its headers have arrived. */
static void nodes_prefetch(const struct lec_shard_view *view, uint32_t first)
{
    for (uint32_t bucket = first; bucket < group_end(view, first); bucket++) {
        for (uint32_t position = 0; position < LEC_SLOTS_PER_BUCKET; position++) {
            uint32_t unit = lec_slot_unit(word_in(view, bucket, position));
            uint32_t node = unit < view->space.units ? lec_load32(&lec_entry_at(&view->space, unit)->node) : LEC_NONE;
            if (node < view->node_count) __builtin_prefetch(&view->nodes[node], 1);
        }
    }
}

static bool salvage_bucket(const struct lec_shard_view *view, uint32_t bucket, struct salvage *salvage)
{
    for (uint32_t position = 0; position < LEC_SLOTS_PER_BUCKET; position++)
        if (!salvage_slot(view, bucket, position, salvage)) return false;
    return true;
}

static bool salvage_slots(const struct lec_shard_view *view, struct salvage *salvage)
{
    for (uint32_t word = 0; word < (view->node_count + 63) / 64; word++) view->live[word] = 0;
    for (uint32_t bucket = 0; bucket < view->bucket_count; bucket++) atomic_store_explicit(home_count(view, bucket), 0, memory_order_relaxed);
    lec_space_unmark_all(&view->space);
    headers_prefetch(view, 0);
    for (uint32_t bucket = 0; bucket < view->bucket_count; bucket++) {
        if (bucket % GROUP_BUCKETS == 0) {
            headers_prefetch(view, bucket + GROUP_BUCKETS);
            nodes_prefetch(view, bucket);
        }
        if (!salvage_bucket(view, bucket, salvage)) return false;
    }
    return true;
}

/* ---- what follows from the roots ---- */

/* Counted beside the control words first, so that no reader sees a count below the truth. */
static void overflow_restore(const struct lec_shard_view *view)
{
    for (uint32_t bucket = 0; bucket < view->bucket_count; bucket++) {
        uint64_t control = atomic_load_explicit(&view->buckets[bucket].control, memory_order_relaxed);
        uint64_t count = atomic_load_explicit(home_count(view, bucket), memory_order_relaxed);
        atomic_store_explicit(&view->buckets[bucket].control, (control & ~LEC_OVERFLOW_MAX) | count, memory_order_release);
    }
}

static void free_nodes_rebuild(const struct lec_shard_view *view)
{
    uint32_t head = LEC_NONE;
    for (uint32_t node = view->node_count; node-- > 0;) {
        if (is_live(view, node)) continue;
        view->nodes[node].next = head;
        head = node;
    }
    view->shard->free_nodes = head;
}

static void expiry_rebuild(const struct lec_shard_view *view)
{
    lec_expiry_reset_locked(view);
    for (uint32_t node = 0; node < view->node_count; node++)
        if (is_live(view, node)) lec_expiry_note_locked(view, node, lec_expiry_deadline_locked(view, node));
}

/* The dead owner may have published or unlinked and not yet bumped the generation: outstanding tokens are void. */
static void tokens_void(const struct lec_shard_view *view)
{
    for (uint32_t at = 0; at < 2 * view->handle->geometry.generation_count; at++) lec_put32(&view->generations[at], lec_load32(&view->generations[at]) + 1);
}

static void derive(const struct lec_shard_view *view, const struct salvage *salvage)
{
    struct lec_shard *shard = view->shard;
    lec_space_rebuild(&view->space);
    lec_policy_rebuild(&view->policy, view->live, view->live + (view->node_count + 63) / 64);
    overflow_restore(view);
    free_nodes_rebuild(view);
    expiry_rebuild(view);
    atomic_store_explicit(&shard->entries, salvage->entries, memory_order_relaxed);
    atomic_store_explicit(&shard->payload_bytes, salvage->payload_bytes, memory_order_relaxed);
    if (shard->next_version <= salvage->highest_version || shard->next_version >= VERSION_LIMIT) shard->next_version = salvage->highest_version + 1;
}

/* Marks all that the roots reach; false: the proof failed. */
static bool mark_roots(const struct lec_shard_view *view, struct salvage *salvage)
{
    bool is_spoiled = true;
    for (uint32_t pass = 0; is_spoiled && pass < LEC_MARKING_PASSES; pass++) {
        *salvage = (struct salvage){0, 0, 0};
        if (!salvage_slots(view, salvage)) return false;
        view->shard->reserved_chains = lec_reservations_mark_locked(view, &is_spoiled);
    }
    return !is_spoiled;
}

LEC_ASIDE void lec_shard_recover_locked(const struct lec_shard_view *view)
{
    struct salvage salvage;
    view->shard->generation++;
    /* Before anything is freed: the dead owner may have stored a slot (U1) and not the version (U2), see index.h. */
    lec_index_invalidate_readers_locked(view);
    tokens_void(view);
    lec_samples_repair(&view->policy.samples);
    if (mark_roots(view, &salvage)) {
        derive(view, &salvage);
        return;
    }
    lec_stat_add_locked(view, LEC_STAT_SHARDS_CLEARED, 1);
    lec_shard_clear_locked(view);
}
