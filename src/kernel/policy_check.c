/* lec_policy_check(): the policy's lists against the nodes. */
#include "policy.h"

#include <stdbool.h>
#include <stddef.h>

struct audit {
    const struct lec_policy_view *view;
    lec_policy_report *report;
    void *context;
    uint32_t broken;
};

static void expect(struct audit *audit, bool holds, const char *invariant, uint32_t id)
{
    if (holds)
        return;
    audit->broken++;
    if (audit->report)
        audit->report(audit->context, invariant, id);
}

static void audit_list(struct audit *audit, enum lec_list which)
{
    const struct lec_policy_view *view = audit->view;
    const struct lec_policy_list *list = &view->state->lists[which];
    uint32_t entries = 0, units = 0, before = LEC_NONE, id = list->head;
    while (id < view->max_entries && entries < view->max_entries) {
        const struct lec_node *node = &view->nodes[id];
        expect(audit, node->prev == before, "prev and next agree", id);
        expect(audit, lec_node_list(node) == which, "the node names the list it is in", id);
        expect(audit, node->slot / LEC_SLOTS_PER_BUCKET < view->bucket_count, "the slot exists", id);
        entries++;
        units += lec_node_units(node);
        before = id;
        id = node->next;
    }
    expect(audit, id == LEC_NONE, "a list ends with LEC_NONE", id);
    expect(audit, list->tail == before, "the tail is the last node", list->tail);
    expect(audit, list->entries == entries, "a list counts its entries", LEC_NONE);
    expect(audit, list->units == units, "a list counts its units", LEC_NONE);
}

/* With sound links, a node is in exactly one list if as many nodes name a list as are in it. */
static void audit_membership(struct audit *audit)
{
    uint32_t named[4] = {0};
    for (uint32_t id = 0; id < audit->view->max_entries; id++)
        named[lec_node_list(&audit->view->nodes[id])]++;
    for (uint32_t which = LEC_LIST_WINDOW; which <= LEC_LIST_PROTECTED; which++)
        expect(audit, named[which] == audit->view->state->lists[which].entries, "every live node is in its list", LEC_NONE);
}

uint32_t lec_policy_check(const struct lec_policy_view *view, lec_policy_report *report, void *context)
{
    struct audit audit = {view, report, context, 0};
    for (uint32_t which = LEC_LIST_WINDOW; which <= LEC_LIST_PROTECTED; which++)
        audit_list(&audit, (enum lec_list)which);
    audit_membership(&audit);
    expect(&audit, view->state->random != 0, "the random state is not zero", LEC_NONE);
    return audit.broken;
}
