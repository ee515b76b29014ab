#include "miniature.h"

#include <stdbool.h>
#include <string.h>

#define SWEPT_PER_EVENT 2u
#define INDEX_SPARSE 2u             /* places per entry, at least: probes stay short */

static uint64_t whole_lines(uint64_t bytes) { return (bytes + 63u) / 64u * 64u; }

static uint64_t index_places(uint32_t max_entries)
{
    uint64_t places = 1;
    while (places < (uint64_t)max_entries * INDEX_SPARSE) places *= 2;
    return places;
}

static uint32_t bucket_count_for(uint32_t max_entries) { return max_entries / LEC_SLOTS_PER_BUCKET + 1u; }

static uint64_t sketch_bytes(uint32_t max_entries) { return lec_policy_sketch_lines(max_entries) * UINT64_C(64); }

uint64_t lec_miniature_bytes(uint32_t entries)
{
    return whole_lines(sizeof(struct lec_policy)) + sizeof(struct lec_bucket) * (uint64_t)bucket_count_for(entries) + sketch_bytes(entries) +
           whole_lines(sizeof(struct lec_node) * (uint64_t)entries) + whole_lines(sizeof(uint32_t) * index_places(entries));
}

static void *part_take(uint8_t **memory, uint64_t bytes)
{
    void *part = *memory;
    *memory += whole_lines(bytes);
    return part;
}

static void nodes_create(struct lec_miniature *miniature)
{
    uint32_t count = miniature->policy.max_entries;
    for (uint32_t id = 0; id < count; id++) {
        miniature->policy.nodes[id].next = id + 1u < count ? id + 1u : LEC_NONE;
        miniature->policy.nodes[id].slot = id;
    }
    miniature->free_nodes = 0;
}

void lec_miniature_create(struct lec_miniature *miniature, void *memory, struct lec_miniature_size size, uint64_t tti_ns, uint64_t seed)
{
    uint8_t *at = memory;
    memset(memory, 0, lec_miniature_bytes(size.entries));
    memset(miniature, 0, sizeof *miniature);
    struct lec_policy_view *policy = &miniature->policy;
    policy->max_entries = size.entries;
    policy->bucket_count = bucket_count_for(size.entries);
    policy->total_units = size.units;
    policy->seed = seed;
    policy->state = part_take(&at, sizeof *policy->state);
    policy->buckets = part_take(&at, sizeof *policy->buckets * (uint64_t)policy->bucket_count);
    policy->sketch = part_take(&at, sketch_bytes(size.entries));
    policy->nodes = part_take(&at, sizeof *policy->nodes * (uint64_t)size.entries);
    miniature->index = part_take(&at, sizeof *miniature->index * index_places(size.entries));
    miniature->index_mask = (uint32_t)(index_places(size.entries) - 1u);
    miniature->tti_ns = tti_ns;
    nodes_create(miniature);
    lec_policy_reset(policy);
}

/* ---- index ---- */

/* Where a tag's search begins. Tags are hashes already, but those of a sample may have some of their bits in common. */
static uint32_t place_of(const struct lec_miniature *miniature, uint32_t tag)
{
    return (uint32_t)(lec_sketch_hash(miniature->policy.seed, tag) >> 16) & miniature->index_mask;
}

/* The tag's place, or the free one where it would come. */
static uint32_t place_find(const struct lec_miniature *miniature, uint32_t tag)
{
    uint32_t place = place_of(miniature, tag);
    while (miniature->index[place] && miniature->policy.nodes[miniature->index[place] - 1u].tag != tag)
        place = (place + 1u) & miniature->index_mask;
    return place;
}

/* Closes the gap: whoever was pushed beyond this place by it moves back. (Knuth, vol. 3, 6.4, algorithm R) */
static void place_free(struct lec_miniature *miniature, uint32_t place)
{
    uint32_t mask = miniature->index_mask;
    for (uint32_t next = (place + 1u) & mask; miniature->index[next]; next = (next + 1u) & mask) {
        uint32_t home = place_of(miniature, miniature->policy.nodes[miniature->index[next] - 1u].tag);
        if (((next - home) & mask) < ((next - place) & mask)) continue;
        miniature->index[place] = miniature->index[next];
        place = next;
    }
    miniature->index[place] = 0;
}

/* ---- entries ---- */

/* The policy has unlinked it. */
static void entry_free(struct lec_miniature *miniature, uint32_t id)
{
    struct lec_node *node = &miniature->policy.nodes[id];
    place_free(miniature, place_find(miniature, node->tag));
    miniature->entries--;
    miniature->units -= lec_node_units(node);
    node->next = miniature->free_nodes;
    miniature->free_nodes = id;
}

static uint64_t deadline(uint64_t from_ns, uint64_t left_ns) { return left_ns < UINT64_MAX - from_ns ? from_ns + left_ns : UINT64_MAX; }

static bool has_room(const struct lec_miniature *miniature, uint32_t units)
{
    return miniature->entries < miniature->policy.max_entries && miniature->units + units <= miniature->policy.total_units;
}

static bool entry_evict(struct lec_miniature *miniature)
{
    uint32_t id;
    if (lec_policy_victim(&miniature->policy, LEC_NONE, &id) != LEC_POLICY_OK || lec_policy_evict(&miniature->policy, id) != LEC_POLICY_OK)
        return false;
    entry_free(miniature, id);
    return true;
}

/* Without success: it is too large for this cache. */
static void entry_insert(struct lec_miniature *miniature, const struct lec_sample *sample, uint64_t at_ns)
{
    uint32_t units = sample->units ? sample->units : 1u;
    if (units > miniature->policy.total_units) return;
    while (!has_room(miniature, units))
        if (!entry_evict(miniature)) return;
    uint32_t id = miniature->free_nodes;
    struct lec_node *node = &miniature->policy.nodes[id];
    miniature->free_nodes = node->next;
    miniature->index[place_find(miniature, sample->hash)] = id + 1u;
    node->tag = sample->hash;
    node->units_list = units;
    node->expires_at = deadline(at_ns, sample->left_ns);
    atomic_store_explicit(&node->accessed_at, at_ns, memory_order_relaxed);
    miniature->entries++;
    miniature->units += units;
    (void)lec_policy_insert(&miniature->policy, id);
}

static void entry_drop(struct lec_miniature *miniature, uint32_t id)
{
    if (lec_policy_remove(&miniature->policy, id) == LEC_POLICY_OK) entry_free(miniature, id);
}

static bool is_dead(const struct lec_miniature *miniature, const struct lec_node *node, uint64_t at_ns)
{
    uint64_t accessed_at = atomic_load_explicit(&node->accessed_at, memory_order_relaxed);
    return node->expires_at <= at_ns || (miniature->tti_ns != 0 && deadline(accessed_at, miniature->tti_ns) <= at_ns);
}

/* What has expired takes no room for long: each event looks at a few nodes. */
static void sweep(struct lec_miniature *miniature, uint64_t at_ns)
{
    for (uint32_t look = 0; look < SWEPT_PER_EVENT; look++) {
        uint32_t id = miniature->cursor;
        const struct lec_node *node = &miniature->policy.nodes[id];
        miniature->cursor = id + 1u < miniature->policy.max_entries ? id + 1u : 0u;
        if (lec_node_list(node) != LEC_LIST_FREE && is_dead(miniature, node, at_ns)) entry_drop(miniature, id);
    }
}

/* The live entry of a tag, LEC_NONE if there is none; a dead one is dropped on the way. */
static uint32_t entry_find(struct lec_miniature *miniature, uint32_t tag, uint64_t at_ns)
{
    uint32_t held = miniature->index[place_find(miniature, tag)];
    if (!held) return LEC_NONE;
    if (!is_dead(miniature, &miniature->policy.nodes[held - 1u], at_ns)) return held - 1u;
    entry_drop(miniature, held - 1u);
    return LEC_NONE;
}

/* ---- events ---- */

/* As readers do. */
static void entry_touch(struct lec_miniature *miniature, uint32_t id, uint32_t hits, uint64_t at_ns)
{
    _Atomic uint8_t *touches = &miniature->policy.buckets[id / LEC_SLOTS_PER_BUCKET].touches[id % LEC_SLOTS_PER_BUCKET];
    uint32_t count = atomic_load_explicit(touches, memory_order_relaxed) + hits;
    atomic_store_explicit(touches, (uint8_t)(count < LEC_TOUCH_MAX ? count : LEC_TOUCH_MAX), memory_order_relaxed);
    atomic_store_explicit(&miniature->policy.nodes[id].accessed_at, at_ns, memory_order_relaxed);
}

static enum lec_outcome ask(struct lec_miniature *miniature, const struct lec_sample *sample, uint64_t at_ns)
{
    uint32_t id = entry_find(miniature, sample->hash, at_ns);
    if (id != LEC_NONE) {
        entry_touch(miniature, id, sample->hits, at_ns);
        return LEC_OUTCOME_HIT;
    }
    entry_insert(miniature, sample, at_ns);
    id = entry_find(miniature, sample->hash, at_ns);
    if (id != LEC_NONE) entry_touch(miniature, id, sample->hits - 1u, at_ns);
    return LEC_OUTCOME_MISS;
}

enum lec_outcome lec_miniature_replay(struct lec_miniature *miniature, uint64_t event, uint64_t at_ns)
{
    struct lec_sample sample = lec_sample_of(event);
    sweep(miniature, at_ns);
    if (sample.kind == LEC_SAMPLE_INSERT || sample.kind == LEC_SAMPLE_HIT) return ask(miniature, &sample, at_ns);
    uint32_t id = entry_find(miniature, sample.hash, at_ns);
    if (id != LEC_NONE) entry_drop(miniature, id);
    return LEC_OUTCOME_NONE;
}

/* ---- the whole ---- */

static uint64_t word_at(const void *words, uint64_t at)
{
    uint64_t word;
    memcpy(&word, (const uint8_t *)words + at * sizeof word, sizeof word);
    return word;
}

uint64_t lec_replay_bytes(uint32_t entries) { return lec_miniature_bytes(entries); }

void lec_replay(const struct lec_replay *replay, void *memory, uint8_t *outcomes)
{
    struct lec_miniature miniature;
    lec_miniature_create(&miniature, memory, (struct lec_miniature_size){replay->entries, replay->units}, replay->tti_ns, replay->seed);
    for (uint64_t at = 0; at < replay->count; at++)
        outcomes[at] = (uint8_t)lec_miniature_replay(&miniature, word_at(replay->events, at), word_at(replay->times, at));
}
