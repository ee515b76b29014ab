#include "expiry.h"

#include "access.h"
#include "chain.h"

uint32_t lec_expiry_words(uint32_t node_count, uint32_t *leaves, uint32_t *levels)
{
    uint32_t words = 0, width = node_count;
    *levels = 0;
    do {
        width = (width + LEC_EXPIRY_FAN - 1) / LEC_EXPIRY_FAN;
        if (*levels == 0) *leaves = width;
        words += width;
        *levels += 1;
    } while (width > 1);
    return words;
}

void lec_expiry_reset_locked(const struct lec_shard_view *view)
{
    for (uint32_t word = 0; word < view->handle->geometry.expiry_words; word++) view->expiry[word] = LEC_NEVER;
}

void lec_expiry_note_locked(const struct lec_shard_view *view, uint32_t node, uint64_t deadline_ns)
{
    uint32_t base = 0, width = view->handle->geometry.expiry_leaves, at = node / LEC_EXPIRY_FAN;
    for (uint32_t level = 0; level < view->handle->geometry.expiry_levels; level++) {
        uint64_t *word = &view->expiry[base + at];
        if (*word <= deadline_ns) return;       /* every word above is at least as low */
        *word = deadline_ns;
        base += width;
        width = (width + LEC_EXPIRY_FAN - 1) / LEC_EXPIRY_FAN;
        at /= LEC_EXPIRY_FAN;
    }
}

uint64_t lec_expiry_deadline_locked(const struct lec_shard_view *view, uint32_t node)
{
    const struct lec_node *entry_node = &view->nodes[node];
    if (entry_node->unit >= view->space.units) return LEC_NEVER;
    uint64_t accessed_at = atomic_load_explicit(&entry_node->accessed_at, memory_order_relaxed);
    if (accessed_at == 0) return entry_node->expires_at;    /* no idle limit: the header's line stays untouched */
    uint32_t tti_ms = lec_load32(&lec_entry_at(&view->space, entry_node->unit)->tti_ms);
    uint64_t idle_end = tti_ms == 0 ? LEC_NEVER : accessed_at + tti_ms * UINT64_C(1000000);
    return idle_end < entry_node->expires_at ? idle_end : entry_node->expires_at;
}

/* Looks at the nodes of one leaf: an expired one, or LEC_NONE and *minimum of the live ones' deadlines. */
static uint32_t leaf_due(const struct lec_shard_view *view, uint32_t leaf, uint64_t *minimum)
{
    uint32_t from = leaf * LEC_EXPIRY_FAN, to = from + LEC_EXPIRY_FAN < view->node_count ? from + LEC_EXPIRY_FAN : view->node_count;
    *minimum = LEC_NEVER;
    for (uint32_t node = from; node < to; node++) {
        if (lec_node_list(&view->nodes[node]) == LEC_LIST_FREE) continue;
        uint64_t deadline = lec_expiry_deadline_locked(view, node);
        if (deadline <= view->now_ns) return node;
        if (deadline < *minimum) *minimum = deadline;
    }
    return LEC_NONE;
}

struct level { uint32_t base, width; };

/* The levels from the leaves up; returns how many. */
static uint32_t levels_of(const struct lec_shard_view *view, struct level levels[8])
{
    uint32_t base = 0, width = view->handle->geometry.expiry_leaves, count = view->handle->geometry.expiry_levels;
    for (uint32_t level = 0; level < count; level++) {
        levels[level] = (struct level){base, width};
        base += width;
        width = (width + LEC_EXPIRY_FAN - 1) / LEC_EXPIRY_FAN;
    }
    return count;
}

/* The lowest of the children [first, first + fan) of a word. */
static uint32_t lowest_child(const struct lec_shard_view *view, struct level level, uint32_t first)
{
    uint32_t best = first;
    for (uint32_t child = first; child < first + LEC_EXPIRY_FAN && child < level.width; child++)
        if (view->expiry[level.base + child] < view->expiry[level.base + best]) best = child;
    return best;
}

/* Raises the bounds above a leaf whose true minimum was just found. */
static void raise_bounds(const struct lec_shard_view *view, const struct level *levels, uint32_t count, uint32_t leaf, uint64_t minimum)
{
    view->expiry[leaf] = minimum;
    for (uint32_t level = 1, at = leaf / LEC_EXPIRY_FAN; level < count; level++, at /= LEC_EXPIRY_FAN) {
        uint32_t lowest = lowest_child(view, levels[level - 1], at * LEC_EXPIRY_FAN);
        view->expiry[levels[level].base + at] = view->expiry[levels[level - 1].base + lowest];
    }
}

uint32_t lec_expiry_due_locked(const struct lec_shard_view *view)
{
    struct level levels[8];
    if (view->expiry[view->handle->geometry.expiry_words - 1] > view->now_ns) return LEC_NONE;  /* the root: mostly so */
    uint32_t count = levels_of(view, levels);
    for (uint32_t look = 0; look < LEC_EXPIRY_LOOKS; look++) {
        if (view->expiry[levels[count - 1].base] > view->now_ns) return LEC_NONE;
        uint32_t at = 0;
        for (uint32_t level = count - 1; level > 0; level--) at = lowest_child(view, levels[level - 1], at * LEC_EXPIRY_FAN);
        uint64_t minimum;
        uint32_t node = leaf_due(view, at, &minimum);
        if (node != LEC_NONE) return node;
        raise_bounds(view, levels, count, at, minimum);
    }
    return LEC_NONE;
}

uint32_t lec_expiry_check_locked(const struct lec_shard_view *view)
{
    struct level levels[8];
    uint32_t broken = 0, count = levels_of(view, levels);
    for (uint32_t node = 0; node < view->node_count; node++)
        if (lec_node_list(&view->nodes[node]) != LEC_LIST_FREE)
            broken += view->expiry[node / LEC_EXPIRY_FAN] > lec_expiry_deadline_locked(view, node);
    for (uint32_t level = 1; level < count; level++)
        for (uint32_t child = 0; child < levels[level - 1].width; child++)
            broken += view->expiry[levels[level].base + child / LEC_EXPIRY_FAN] > view->expiry[levels[level - 1].base + child];
    return broken;
}
