#include "room.h"

#include "access.h"
#include "chain.h"
#include "expiry.h"
#include "index.h"

/* ---- leaving ---- */

static void counters_drop(const struct lec_shard_view *view, const struct lec_entry *entry)
{
    struct lec_shard *shard = view->shard;
    uint64_t payload_bytes = (uint64_t)lec_load16(&entry->key_bytes) + lec_load32(&entry->value_bytes);
    atomic_store_explicit(&shard->entries, atomic_load_explicit(&shard->entries, memory_order_relaxed) - 1, memory_order_relaxed);
    atomic_store_explicit(&shard->payload_bytes, atomic_load_explicit(&shard->payload_bytes, memory_order_relaxed) - payload_bytes, memory_order_relaxed);
}

static void count_leaving(const struct lec_shard_view *view, enum lec_leaving how, enum lec_list from)
{
    if (how == LEC_LEAVES_EXPIRED) lec_stat_add_locked(view, LEC_STAT_EXPIRATIONS, 1);
    if (how != LEC_LEAVES_EVICTED) return;
    lec_stat_add_locked(view, LEC_STAT_EVICTIONS, 1);
    /* It came from the window's end and lost against the main space: it was not admitted. */
    if (from == LEC_LIST_WINDOW) lec_stat_add_locked(view, LEC_STAT_ADMISSION_REJECTIONS, 1);
}

static enum lec_status drop(const struct lec_shard_view *view, uint32_t node, enum lec_leaving how)
{
    if (node >= view->node_count) return LEC_DAMAGED;
    const struct lec_node *leaving = &view->nodes[node];
    enum lec_list from = lec_node_list(leaving);
    uint32_t slot = leaving->slot, unit = leaving->unit;
    if (from == LEC_LIST_FREE || slot >= view->bucket_count * LEC_SLOTS_PER_BUCKET || unit >= view->space.units) return LEC_DAMAGED;
    if (lec_slot_load(view, slot) != lec_slot_word(leaving->tag, unit)) return LEC_DAMAGED;
    const struct lec_entry *entry = lec_entry_at(&view->space, unit);
    counters_drop(view, entry);
    enum lec_policy_status unlinked = how == LEC_LEAVES_EVICTED ? lec_policy_evict(&view->policy, node) : lec_policy_remove(&view->policy, node);
    lec_index_unlink_locked(view, slot, lec_load64(&entry->hash));
    if (unlinked != LEC_POLICY_OK || lec_chain_give(&view->space, unit) != LEC_SPACE_OK) return LEC_DAMAGED;
    lec_node_give_locked(view, node);
    count_leaving(view, how, from);
    return LEC_OK;
}

LEC_ASIDE enum lec_status lec_drop_locked(const struct lec_shard_view *view, uint32_t node, enum lec_leaving how) { return drop(view, node, how); }

enum lec_status lec_room_expire_locked(const struct lec_shard_view *view, uint32_t count)
{
    for (; count > 0; count--) {
        uint32_t node = lec_expiry_due_locked(view);
        if (node == LEC_NONE) return LEC_OK;
        enum lec_status status = lec_drop_locked(view, node, LEC_LEAVES_EXPIRED);
        if (status != LEC_OK) return status;
    }
    return LEC_OK;
}

/* One entry leaves: an expired one if there is any, else the policy's victim. LEC_REFUSED: nobody is left. */
static LEC_STEP enum lec_status evict_one(const struct lec_shard_view *view, uint32_t protect)
{
    uint32_t node = lec_expiry_due_locked(view);
    if (node != LEC_NONE && node != protect) return lec_drop_locked(view, node, LEC_LEAVES_EXPIRED);
    switch (lec_policy_victim(&view->policy, protect, &node)) {
    case LEC_POLICY_OK: return drop(view, node, LEC_LEAVES_EVICTED);
    case LEC_POLICY_EMPTY: return LEC_REFUSED;
    default: return LEC_DAMAGED;
    }
}

/* ---- room ---- */

/* Memory filled to the last unit would scatter entries over ever more pieces: each splits the hole it is put into, and
 * holes only grow together where neighbours are free. So where no run is long enough, a few entries more leave, until
 * one sixty-fourth is free; then the entry is chained all the same. (Log-uniform sizes from 100 B to 100 KiB then lie in
 * 2 pieces on average and stay there; without this, in 8 and ever more.) */
#define FREE_SHARE 64u
#define EVICTIONS_FOR_ONE_RUN 4u

static bool lacks_room(const struct lec_shard_view *view, uint64_t needed, uint32_t *extra)
{
    uint32_t free_units = view->space.state->free_units;
    if (free_units < needed) return true;
    if (*extra == 0 || free_units >= needed + view->space.units / FREE_SHARE) return false;
    if (lec_space_has_run(&view->space, (uint32_t)needed)) return false;
    *extra -= 1;
    return true;
}

enum lec_status lec_room_take_locked(const struct lec_shard_view *view, uint64_t payload_bytes, uint32_t protect,
                                     uint32_t *unit, uint32_t *units)
{
    uint64_t needed = lec_chain_units(payload_bytes);
    uint32_t extra = EVICTIONS_FOR_ONE_RUN;
    if (needed > view->space.units) return LEC_REFUSED;
    for (;;) {
        while (lacks_room(view, needed, &extra)) {
            enum lec_status status = evict_one(view, protect);
            if (status != LEC_OK) return status;
        }
        switch (lec_chain_take(&view->space, payload_bytes, unit, units)) {
        case LEC_SPACE_OK: return LEC_OK;
        case LEC_SPACE_DAMAGED: return LEC_DAMAGED;
        case LEC_SPACE_FULL: break;
        }
        /* So scattered that the links between the pieces did not fit: a little more than what is missing. */
        needed = view->space.state->free_units + needed / 64 + 1;
    }
}

void lec_room_warm_locked(const struct lec_shard_view *view)
{
    uint32_t tails[LEC_POLICY_TAILS];
    if (view->shard->free_nodes != LEC_NONE && view->space.state->free_units > view->space.units / FREE_SHARE) return;
    lec_policy_tails(&view->policy, tails);
    for (uint32_t at = 0; at < LEC_POLICY_TAILS; at++) {
        if (tails[at] >= view->node_count) continue;
        const struct lec_node *node = &view->nodes[tails[at]];
        if (node->unit < view->space.units) __builtin_prefetch(lec_space_at(&view->space, node->unit), 1);
        if (node->slot / LEC_SLOTS_PER_BUCKET < view->bucket_count) __builtin_prefetch(&view->buckets[node->slot / LEC_SLOTS_PER_BUCKET], 1);
        if (node->prev < view->node_count) __builtin_prefetch(&view->nodes[node->prev], 1);
        lec_policy_warm(&view->policy, node->tag);
    }
}

void lec_node_give_locked(const struct lec_shard_view *view, uint32_t node)
{
    view->nodes[node].next = view->shard->free_nodes;
    view->shard->free_nodes = node;
}

enum lec_status lec_node_take_locked(const struct lec_shard_view *view, uint32_t *node)
{
    struct lec_shard *shard = view->shard;
    if (shard->free_nodes == LEC_NONE) {
        enum lec_status status = evict_one(view, LEC_NONE);
        if (status != LEC_OK) return status;
    }
    *node = shard->free_nodes;
    if (*node >= view->node_count || lec_node_list(&view->nodes[*node]) != LEC_LIST_FREE) return LEC_DAMAGED;
    shard->free_nodes = view->nodes[*node].next;
    return LEC_OK;
}
