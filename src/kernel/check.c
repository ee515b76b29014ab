/* lec_check(): every broken invariant of the whole segment, shard by shard under its lock.
 *
 * That each unit is reached exactly once is shown by marking everything anew in the bitmap: a unit reached twice is
 * reported by the marking, one reached by nobody by the comparison with the bins. A shard with findings is rebuilt
 * afterwards, as recovery would; a checker killed in the middle is a dead owner like any other.
 */
#include <string.h>

#include "access.h"
#include "chain.h"
#include "expiry.h"
#include "flight.h"
#include "index.h"
#include "process.h"
#include "reserve.h"

struct findings { lec_report_fn report; void *context; uint64_t shard, count; };

static void find(struct findings *findings, const char *message, uint64_t detail)
{
    findings->count++;
    if (findings->report) findings->report(findings->context, message, findings->shard, detail);
}

static void find_in_space(void *context, const char *message, uint64_t detail) { find(context, message, detail); }
static void find_in_policy(void *context, const char *invariant, uint32_t id) { find(context, invariant, id); }
static void find_in_flights(void *context, const char *invariant, uint32_t index) { find(context, invariant, index); }

struct tally { uint64_t entries, payload_bytes; };

/* The entry behind a slot, against the slot, the node and the shard. */
static bool entry_is_sound(const struct lec_shard_view *view, uint32_t slot, uint64_t word, struct findings *findings)
{
    uint32_t unit = lec_slot_unit(word);
    if (unit >= view->space.units) { find(findings, "slot points out of the arena", slot); return false; }
    const struct lec_entry *entry = lec_entry_at(&view->space, unit);
    struct lec_homes homes = lec_homes_of(entry->hash, view->bucket_count);
    uint32_t bucket = slot / LEC_SLOTS_PER_BUCKET;
    if (lec_hash_tag(entry->hash) != lec_slot_tag(word)) find(findings, "slot's tag is not its entry's", slot);
    if (lec_shard_of(view->handle, entry->hash) != view->index) find(findings, "entry of another shard", slot);
    if (bucket != homes.home && bucket != homes.alternate) find(findings, "entry in neither of its buckets", slot);
    if (entry->key_bytes == 0 || entry->key_bytes > LEC_MAX_KEY) { find(findings, "key length out of bounds", slot); return false; }
    if (entry->value_bytes > view->handle->config.max_value_bytes) { find(findings, "value length out of bounds", slot); return false; }
    if (entry->epoch != atomic_load_explicit(&view->shard->epoch, memory_order_relaxed)) find(findings, "entry of another epoch", slot);
    if (entry->version >= view->shard->next_version) find(findings, "entry's version lies in the future", slot);
    if (entry->node >= view->node_count) { find(findings, "entry's node out of bounds", slot); return false; }
    return true;
}

static void check_node(const struct lec_shard_view *view, uint32_t slot, uint64_t word, uint32_t units, struct findings *findings)
{
    const struct lec_entry *entry = lec_entry_at(&view->space, lec_slot_unit(word));
    const struct lec_node *node = &view->nodes[entry->node];
    if (lec_node_list(node) == LEC_LIST_FREE) find(findings, "published entry's node is free", entry->node);
    if (node->slot != slot) find(findings, "node points to another slot", entry->node);
    if (node->unit != lec_slot_unit(word)) find(findings, "node points to another entry", entry->node);
    if (node->tag != lec_slot_tag(word)) find(findings, "node's tag is not its entry's", entry->node);
    if (lec_node_units(node) != units) find(findings, "node's size is not its entry's", entry->node);
    if (node->expires_at != entry->expires_at) find(findings, "node's expiry is not its entry's", entry->node);
}

static void check_slot(const struct lec_shard_view *view, uint32_t slot, struct tally *tally, struct findings *findings)
{
    uint64_t word = lec_slot_load(view, slot);
    uint32_t units = 0;
    if (word == 0 || !entry_is_sound(view, slot, word, findings)) return;
    const struct lec_entry *entry = lec_entry_at(&view->space, lec_slot_unit(word));
    uint64_t payload_bytes = (uint64_t)entry->key_bytes + entry->value_bytes;
    if (!lec_chain_mark(&view->space, lec_slot_unit(word), payload_bytes, &units)) find(findings, "entry's units are reached twice or its chain is broken", slot);
    check_node(view, slot, word, units, findings);
    tally->entries++;
    tally->payload_bytes += payload_bytes;
}

static void check_counts(const struct lec_shard_view *view, const struct tally *tally, struct findings *findings)
{
    uint32_t live = 0, free_nodes = 0, node = view->shard->free_nodes;
    for (uint32_t at = 0; at < view->node_count; at++) live += lec_node_list(&view->nodes[at]) != LEC_LIST_FREE;
    for (; node < view->node_count && free_nodes <= view->node_count; node = view->nodes[node].next) free_nodes++;
    if (node != LEC_NONE) find(findings, "list of free nodes has no end or leaves the table", node);
    if (live != tally->entries) find(findings, "live nodes differ from published entries", live);
    if (free_nodes + live != view->node_count) find(findings, "nodes are lost", view->node_count - live - free_nodes);
    if (atomic_load_explicit(&view->shard->entries, memory_order_relaxed) != tally->entries) find(findings, "count of entries is wrong", tally->entries);
    if (atomic_load_explicit(&view->shard->payload_bytes, memory_order_relaxed) != tally->payload_bytes) find(findings, "count of payload bytes is wrong", tally->payload_bytes);
}

/* Overflow counts, counted anew per home by looking into each bucket's residents' homes. */
static void check_overflow(const struct lec_shard_view *view, struct findings *findings)
{
    uint64_t counted = 0, claimed = 0;
    for (uint32_t slot = 0; slot < view->bucket_count * LEC_SLOTS_PER_BUCKET; slot++) {
        uint32_t unit = lec_slot_unit(lec_slot_load(view, slot));
        if (unit >= view->space.units) continue;
        uint32_t home = lec_homes_of(lec_entry_at(&view->space, unit)->hash, view->bucket_count).home;
        if (home == slot / LEC_SLOTS_PER_BUCKET) continue;
        counted++;
        if (lec_overflow(atomic_load_explicit(&view->buckets[home].control, memory_order_relaxed)) == 0) find(findings, "entry in its alternate bucket cannot be found", slot);
    }
    for (uint32_t bucket = 0; bucket < view->bucket_count; bucket++) claimed += lec_overflow(atomic_load_explicit(&view->buckets[bucket].control, memory_order_relaxed));
    if (counted != claimed) find(findings, "overflow counts differ from the entries in alternate buckets", claimed);
}

static void check_reservations(const struct lec_shard_view *view, struct findings *findings)
{
    /* Not lec_reservations_mark_locked(), which drops those of the dead: 1 the checker reaps  2 an owner dies  3 its units
     * are reached from nowhere: a sound shard would be reported, and rebuilt. */
    uint32_t count = lec_reservations_count_locked(view), sound = lec_reservations_verify_locked(view);
    if (count != sound) find(findings, "reservation of units that something else holds", count - sound);
    if (view->shard->reserved_chains != count) find(findings, "count of reservations is wrong", view->shard->reserved_chains);
}

static void check_shard_locked(const struct lec_shard_view *view, struct findings *findings)
{
    struct tally tally = {0, 0};
    uint64_t count_before = findings->count;
    lec_reservations_reap_locked(view, true);
    lec_space_check(&view->space, find_in_space, findings);
    lec_policy_check(&view->policy, find_in_policy, findings);
    lec_space_unmark_all(&view->space);
    for (uint32_t slot = 0; slot < view->bucket_count * LEC_SLOTS_PER_BUCKET; slot++) check_slot(view, slot, &tally, findings);
    check_reservations(view, findings);
    lec_space_check(&view->space, find_in_space, findings);
    check_counts(view, &tally, findings);
    check_overflow(view, findings);
    uint32_t late = lec_expiry_check_locked(view);
    if (!lec_samples_are_sound(&view->policy.samples)) find(findings, "counts of samples contradict each other", 0);
    if (late > 0) find(findings, "expiry bounds later than a deadline below them", late);
    if (findings->count != count_before) lec_shard_recover_locked(view);
}

/* ---- what belongs to no shard ---- */

static void check_header(const struct lec_handle *handle, struct findings *findings)
{
    const struct lec_header *header = handle->header;
    if (atomic_load_explicit(&header->magic, memory_order_relaxed) != LEC_MAGIC) find(findings, "magic is gone", 0);
    if (header->layout_version != LEC_LAYOUT_VERSION || header->segment_bytes != handle->bytes) find(findings, "header's version or size changed", 0);
    if (memcmp(&header->config, &handle->config, sizeof handle->config) != 0) find(findings, "header's configuration changed", 0);
    if (memcmp(header->seed, handle->seed, sizeof handle->seed) != 0) find(findings, "header's seed changed", 0);
}

static void check_processes(const struct lec_handle *handle, struct findings *findings)
{
    for (uint32_t index = 0; index < handle->geometry.process_count; index++) {
        const struct lec_process *process = lec_process_at(handle, index);
        for (uint32_t at = 0; at < LEC_RESERVATIONS; at++) {
            uint32_t state = atomic_load_explicit(&process->reservations[at].state, memory_order_acquire);
            if (state > LEC_RESERVATION_ABANDONED) find(findings, "reservation in no state", index);
            if (state >= LEC_RESERVATION_HELD && lec_load32(&process->reservations[at].shard) >= handle->geometry.shard_count) find(findings, "reservation of no shard", index);
        }
    }
}

uint64_t lec_check(struct lec_handle *handle, uint64_t now_ns, uint64_t timeout_ns, lec_report_fn report, void *context)
{
    struct findings findings = {report, context, UINT64_MAX, 0};
    check_header(handle, &findings);
    check_processes(handle, &findings);
    for (uint32_t index = 0; index < handle->geometry.shard_count; index++) {
        struct lec_shard_view view;
        lec_shard_view(handle, index, now_ns, &view);
        findings.shard = index;
        enum lec_status status = lec_shard_lock(&view, timeout_ns);
        if (status == LEC_RETIRED) break;
        if (status != LEC_OK) { find(&findings, "shard's lock is held and its holder does not move", 0); continue; }
        check_shard_locked(&view, &findings);
        lec_flights_check_locked(&view, find_in_flights, &findings);
        lec_shard_unlock(&view);
    }
    return findings.count;
}
