/* lec_policy_rebuild(): the policy's lists after a crash, in their old order as far as it can still be read. */
#include "policy.h"

#include <stdbool.h>
#include <string.h>

uint32_t lec_policy_bitmap_words(uint32_t max_entries)
{
    return (max_entries + 63u) / 64u;
}

static bool bit_test(const uint64_t *bits, uint32_t id)
{
    return bits[id / 64u] >> (id % 64u) & 1u;
}

static void list_append(const struct lec_policy_view *view, enum lec_list which, uint32_t id)
{
    struct lec_policy_list *list = &view->state->lists[which];
    struct lec_node *node = &view->nodes[id];
    node->prev = list->tail;
    node->next = LEC_NONE;
    if (list->tail < view->max_entries)
        view->nodes[list->tail].next = id;
    else
        list->head = id;
    list->tail = id;
    list->entries++;
    list->units += lec_node_units(node);
    lec_node_set_list(node, which);
}

/* What one end of an old list leads to, linked anew. Each step depends on a cache miss, so all ends are walked at once:
 * two ends each of three lists. A node's old link is read before the node is written, and nodes not yet reached are not
 * written, so nothing of the old order is lost. Each node is placed once, which bounds the walks: the two of a sound list
 * end where they meet. */
struct strand { uint32_t next, first, last, entries, units; };

static bool strand_step(const struct lec_policy_view *view, struct strand *strand, enum lec_list which, bool from_head,
                        const uint64_t *live, uint64_t *placed)
{
    uint32_t id = strand->next;
    if (id >= view->max_entries || !bit_test(live, id) || bit_test(placed, id))
        return false;
    struct lec_node *node = &view->nodes[id];
    strand->next = from_head ? node->next : node->prev;
    if (strand->next < view->max_entries)
        __builtin_prefetch(&view->nodes[strand->next], 1);
    placed[id / 64u] |= 1ull << (id % 64u);
    *(from_head ? &node->prev : &node->next) = strand->last;
    *(from_head ? &node->next : &node->prev) = LEC_NONE;
    if (strand->last != LEC_NONE)
        *(from_head ? &view->nodes[strand->last].next : &view->nodes[strand->last].prev) = id;
    else
        strand->first = id;
    strand->last = id;
    strand->entries++;
    strand->units += lec_node_units(node);
    lec_node_set_list(node, which);
    return true;
}

static void strands_join(const struct lec_policy_view *view, enum lec_list which, const struct strand *front, const struct strand *back)
{
    view->state->lists[which] = (struct lec_policy_list){
        front->first != LEC_NONE ? front->first : back->last, back->first != LEC_NONE ? back->first : front->last,
        front->entries + back->entries, front->units + back->units};
    if (front->last == LEC_NONE || back->last == LEC_NONE)
        return;
    view->nodes[front->last].next = back->last;
    view->nodes[back->last].prev = front->last;
}

static void rebuild_lists(const struct lec_policy_view *view, const uint64_t *live, uint64_t *placed)
{
    struct strand front[4], back[4];
    for (uint32_t which = LEC_LIST_WINDOW; which <= LEC_LIST_PROTECTED; which++) {
        const struct lec_policy_list *list = &view->state->lists[which];
        front[which] = (struct strand){list->head, LEC_NONE, LEC_NONE, 0, 0};
        back[which] = (struct strand){list->tail, LEC_NONE, LEC_NONE, 0, 0};
    }
    for (bool goes_on = true; goes_on;) {
        goes_on = false;
        for (uint32_t which = LEC_LIST_WINDOW; which <= LEC_LIST_PROTECTED; which++) {
            goes_on |= strand_step(view, &front[which], (enum lec_list)which, true, live, placed);
            goes_on |= strand_step(view, &back[which], (enum lec_list)which, false, live, placed);
        }
    }
    for (uint32_t which = LEC_LIST_WINDOW; which <= LEC_LIST_PROTECTED; which++)
        strands_join(view, (enum lec_list)which, &front[which], &back[which]);
}

void lec_policy_rebuild(const struct lec_policy_view *view, const uint64_t *live, uint64_t *scratch)
{
    memset(scratch, 0, lec_policy_bitmap_words(view->max_entries) * sizeof *scratch);
    view->state->random |= 1u;
    view->state->large_losses = 0;
    rebuild_lists(view, live, scratch);
    for (uint32_t id = 0; id < view->max_entries; id++) {
        if (!bit_test(live, id))
            lec_node_set_list(&view->nodes[id], LEC_LIST_FREE);
        else if (!bit_test(scratch, id))
            list_append(view, LEC_LIST_PROBATION, id);
    }
}
