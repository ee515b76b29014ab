#include "policy.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>

#define PROTECTED_SHARE (LEC_SHARE_ONE / 10u * 8u) /* of the main space */
#define EXAMINED_PER_VICTIM 32u         /* after that many the tail leaves, touched or not */
#define CONTEST_VICTIMS 16u             /* main entries that one candidate is weighed against, at most */
#define ROTATE_EVERY 4u                 /* an incumbent that wins starts over at one count of accesses in so many */
#define STALE_LOSSES 64u                /* so many larger candidates lost, and no main entry was found touched: let them in */
#define WAVER 32u                       /* what is free of a full memory wavers by up to this part of it (twice room.c's FREE_SHARE) */
#define SPILLS_PER_INSERT 2u            /* one more than comes in: an over-full window drains */
#define POLLS_USUAL 12u                 /* sampled keys looked at per insert; */
#define POLL_ROUNDS_LEAST 16u           /* more in small caches: each is looked at this often per turnover, */
#define POLLS_MOST 64u                  /* but not more than this; */
#define POLL_ROUNDS_ENOUGH 36u          /* fewer in large ones, where they cost cache misses: so often is enough, */
#define POLLS_LEAST 3u                  /* but not fewer than this; */
#define POLLS_PER_HIT 16u               /* and some more for each hit found, */
#define POLLS_FOR_HITS_MOST 256u        /* but not more than this: what is left of its looks then is forfeited */
#define WARM_FREQUENCY 6u               /* rejected candidates at least this warm are sometimes admitted ... */
#define WARM_ADMISSION_ODDS 100u        /* ... one in this many */

/* One hunt for a victim: what may still be examined, and whom to leave alone. */
struct hunt {
    const struct lec_policy_view *view;
    uint32_t protect_id;
    uint32_t steps_left;
    bool damaged;
};

/* ---- room ---------------------------------------------------------------------------------------------------- */

static uint32_t live_entries(const struct lec_policy_view *view)
{
    const struct lec_policy_list *lists = view->state->lists;
    return lists[LEC_LIST_WINDOW].entries + lists[LEC_LIST_PROBATION].entries + lists[LEC_LIST_PROTECTED].entries;
}

static uint64_t live_units(const struct lec_policy_view *view)
{
    const struct lec_policy_list *lists = view->state->lists;
    return (uint64_t)lists[LEC_LIST_WINDOW].units + lists[LEC_LIST_PROBATION].units + lists[LEC_LIST_PROTECTED].units;
}

/* How many entries there is room for; where memory is short before they are max_entries, those that are there. */
static uint32_t capacity(const struct lec_policy_view *view)
{
    uint32_t live = live_entries(view);
    return view->state->is_memory_short && live && live < view->max_entries ? live : view->max_entries;
}

/* ---- sketch -------------------------------------------------------------------------------------------------- */

static struct lec_sketch sketch_of(const struct lec_policy_view *view)
{
    return (struct lec_sketch){view->sketch, &view->state->aging, lec_sketch_lines(view->max_entries)};
}

static void count_accesses(const struct lec_policy_view *view, uint32_t tag, uint32_t count)
{
    struct lec_sketch sketch = sketch_of(view);
    lec_sketch_add(&sketch, lec_sketch_hash(view->seed, tag), count, capacity(view));
}

uint32_t lec_policy_frequency(const struct lec_policy_view *view, uint32_t tag)
{
    struct lec_sketch sketch = sketch_of(view);
    return lec_sketch_estimate(&sketch, lec_sketch_hash(view->seed, tag));
}

void lec_policy_warm(const struct lec_policy_view *view, uint32_t tag)
{
    struct lec_sketch sketch = sketch_of(view);
    lec_sketch_warm(&sketch, lec_sketch_hash(view->seed, tag));
}

void lec_policy_tails(const struct lec_policy_view *view, uint32_t tails[LEC_POLICY_TAILS])
{
    tails[0] = view->state->lists[LEC_LIST_WINDOW].tail;
    tails[1] = view->state->lists[LEC_LIST_PROBATION].tail;
}

static uint32_t next_random(struct lec_policy *state)
{
    uint64_t x = state->random ? state->random : 1;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    state->random = x;
    return (uint32_t)(x >> 32);
}

/* ---- touches ------------------------------------------------------------------------------------------------- */

static _Atomic uint8_t *touches_of(const struct lec_policy_view *view, const struct lec_node *node)
{
    uint32_t bucket = node->slot / LEC_SLOTS_PER_BUCKET;
    if (bucket >= view->bucket_count)
        return NULL;
    return &view->buckets[bucket].touches[node->slot % LEC_SLOTS_PER_BUCKET];
}

static uint32_t touches_peek(const struct lec_policy_view *view, const struct lec_node *node)
{
    const _Atomic uint8_t *touches = touches_of(view, node);
    uint32_t count = touches ? atomic_load_explicit(touches, memory_order_relaxed) : 0;
    return count < LEC_TOUCH_MAX ? count : LEC_TOUCH_MAX;
}

static void touches_clear(const struct lec_policy_view *view, const struct lec_node *node)
{
    _Atomic uint8_t *touches = touches_of(view, node);
    if (touches)
        atomic_store_explicit(touches, 0, memory_order_relaxed);
}

/* ---- samples ------------------------------------------------------------------------------------------------- */

/* Something happened to a sampled key; hits: 1..LEC_TOUCH_MAX. */
static LEC_ASIDE void sample(const struct lec_policy_view *view, const struct lec_node *node, enum lec_sample_kind kind, uint32_t hits)
{
    uint64_t left_ns = node->expires_at == UINT64_MAX ? UINT64_MAX : node->expires_at > view->now_ns ? node->expires_at - view->now_ns : 0u;
    uint32_t hash = lec_shadow_sample_hash(&view->state->shadow, node->tag);
    lec_samples_note(&view->samples, &(struct lec_sample){hash, hits, lec_node_units(node), kind, left_ns});
}

/* An entry was asked for: if it is one of the main space, that is in use. */
static void note_use(const struct lec_policy_view *view, const struct lec_node *node)
{
    if (lec_node_list(node) != LEC_LIST_WINDOW)
        view->state->large_losses = 0;
}

/* An entry was found touched. A touch that lands before they are cleared is lost, which costs one count. */
static LEC_ASIDE void touches_take(const struct lec_policy_view *view, const struct lec_node *node, uint32_t count)
{
    touches_clear(view, node);
    count_accesses(view, node->tag, count);
    uint32_t news = lec_shadow_touched(&view->state->shadow, node->tag, count);
    if (news)
        sample(view, node, LEC_SAMPLE_HIT, news);
    note_use(view, node);
}

/* ---- lists --------------------------------------------------------------------------------------------------- */

static struct lec_policy_list *list_of(const struct lec_policy_view *view, enum lec_list list)
{
    return &view->state->lists[list];
}

static void list_push(const struct lec_policy_view *view, enum lec_list which, uint32_t id)
{
    struct lec_policy_list *list = list_of(view, which);
    struct lec_node *node = &view->nodes[id];
    node->prev = LEC_NONE;
    node->next = list->head;
    if (list->head < view->max_entries)
        view->nodes[list->head].prev = id;
    else
        list->tail = id;
    list->head = id;
    list->entries++;
    list->units += lec_node_units(node);
    lec_node_set_list(node, which);
}

/* Is what the node says about its neighbours also what they say about it? */
static bool is_linked(const struct lec_policy_view *view, uint32_t id)
{
    if (id >= view->max_entries || lec_node_list(&view->nodes[id]) == LEC_LIST_FREE)
        return false;
    const struct lec_node *node = &view->nodes[id];
    const struct lec_policy_list *list = list_of(view, lec_node_list(node));
    bool before = node->prev == LEC_NONE ? list->head == id
                                         : node->prev < view->max_entries && view->nodes[node->prev].next == id;
    bool after = node->next == LEC_NONE ? list->tail == id
                                        : node->next < view->max_entries && view->nodes[node->next].prev == id;
    return before && after && list->entries != 0;
}

/* Needs is_linked(id). */
static void list_remove(const struct lec_policy_view *view, uint32_t id)
{
    struct lec_node *node = &view->nodes[id];
    struct lec_policy_list *list = list_of(view, lec_node_list(node));
    if (node->prev == LEC_NONE)
        list->head = node->next;
    else
        view->nodes[node->prev].next = node->next;
    if (node->next == LEC_NONE)
        list->tail = node->prev;
    else
        view->nodes[node->next].prev = node->prev;
    list->entries--;
    list->units -= lec_node_units(node);
    lec_node_set_list(node, LEC_LIST_FREE);
}

static enum lec_policy_status unlink_entry(const struct lec_policy_view *view, uint32_t id)
{
    if (!is_linked(view, id))
        return LEC_POLICY_DAMAGED;
    list_remove(view, id);
    return LEC_POLICY_OK;
}

static LEC_ASIDE void move_to_head(struct hunt *hunt, uint32_t id, enum lec_list to)
{
    if (!is_linked(hunt->view, id)) {
        hunt->damaged = true;
        return;
    }
    list_remove(hunt->view, id);
    list_push(hunt->view, to, id);
}

/* ---- budgets ------------------------------------------------------------------------------------------------- */

uint32_t lec_policy_window_share(const struct lec_policy_view *view)
{
    uint32_t share = view->state->shadow.share;
    return share < LEC_SHARE_ONE ? share : LEC_SHARE_ONE - 1u;
}

static uint32_t part(uint32_t whole, uint32_t share)
{
    uint32_t size = (uint32_t)((uint64_t)whole * share / LEC_SHARE_ONE);
    return size ? size : 1u;
}

/* What the main space's part leaves: rounded down as well, the window would be over by one for ever. */
static uint32_t window_part(const struct lec_policy_view *view, uint32_t whole)
{
    uint32_t main = part(whole, LEC_SHARE_ONE - lec_policy_window_share(view));
    return main < whole ? whole - main : 1u;
}

static bool is_over(const struct lec_policy_list *list, uint32_t entries, uint32_t units)
{
    return list->entries > entries || list->units > units;
}

/* Units that the lists share: all, or, when memory is short, those in use. What is free then belongs to nobody: of all
 * units, the window would take its share in full and the main space what is left. */
static uint32_t shared_units(const struct lec_policy_view *view)
{
    uint64_t units = live_units(view);
    return view->state->is_memory_short && units < view->total_units ? (uint32_t)units : view->total_units;
}

/* With `coming` entries more, of one unit each, for want of their sizes. */
static bool is_window_over(const struct lec_policy_view *view, uint32_t coming)
{
    struct lec_policy_list window = *list_of(view, LEC_LIST_WINDOW);
    window.entries += coming;
    window.units += coming;
    return is_over(&window, window_part(view, view->max_entries), window_part(view, shared_units(view)));
}

/* Has the main space room for so many units more, within its share? When memory is short, nearly its share is enough: an
 * eviction that freed more than was needed must not let others in without a contest. */
static bool has_main_room(const struct lec_policy_view *view, uint32_t units)
{
    const struct lec_policy_list *probation = list_of(view, LEC_LIST_PROBATION);
    const struct lec_policy_list *protected = list_of(view, LEC_LIST_PROTECTED);
    uint32_t share = LEC_SHARE_ONE - lec_policy_window_share(view), spare = view->total_units / WAVER;
    uint64_t slack = !view->state->is_memory_short ? 0u : units > spare ? units : spare;
    return probation->entries + protected->entries < part(view->max_entries, share)
        && probation->units + protected->units + slack < part(shared_units(view), share);
}

static bool is_protected_over(const struct lec_policy_view *view)
{
    uint32_t share = (uint32_t)((uint64_t)(LEC_SHARE_ONE - lec_policy_window_share(view)) * PROTECTED_SHARE / LEC_SHARE_ONE);
    return is_over(list_of(view, LEC_LIST_PROTECTED), part(view->max_entries, share), part(view->total_units, share));
}

/* ---- hunting for a victim ------------------------------------------------------------------------------------ */

/* The tail of the list if it may be examined and is not protected (then it goes to the head, once), else LEC_NONE. What
 * it says about its neighbours is proven by whoever unlinks it: most tails that are looked at stay. */
static uint32_t tail_of(struct hunt *hunt, enum lec_list which)
{
    uint32_t id = hunt->damaged ? LEC_NONE : list_of(hunt->view, which)->tail;
    if (id == hunt->protect_id && id != LEC_NONE) {
        move_to_head(hunt, id, which);
        id = hunt->damaged ? LEC_NONE : list_of(hunt->view, which)->tail;
    }
    if (id == LEC_NONE || id == hunt->protect_id)
        return LEC_NONE;
    if (id >= hunt->view->max_entries || lec_node_list(&hunt->view->nodes[id]) != which)
        hunt->damaged = true;
    return hunt->damaged ? LEC_NONE : id;
}

/* Examines an entry: takes its touches while the hunt has steps left. */
static bool is_touched(struct hunt *hunt, uint32_t id)
{
    if (!hunt->steps_left)
        return false;
    hunt->steps_left--;
    const struct lec_node *node = &hunt->view->nodes[id];
    uint32_t count = touches_peek(hunt->view, node);
    if (count)
        touches_take(hunt->view, node, count);
    return count != 0;
}

/* Second chance: touched tails start over at the head. */
static uint32_t untouched_tail(struct hunt *hunt, enum lec_list which)
{
    uint32_t id;
    while ((id = tail_of(hunt, which)) != LEC_NONE && is_touched(hunt, id))
        move_to_head(hunt, id, which);
    return id;
}

static LEC_ASIDE void shrink_protected(struct hunt *hunt)
{
    while (is_protected_over(hunt->view) && hunt->steps_left && !hunt->damaged) {
        uint32_t id = untouched_tail(hunt, LEC_LIST_PROTECTED);
        if (id == LEC_NONE)
            return;
        move_to_head(hunt, id, LEC_LIST_PROBATION);
    }
}

/* Memory being short: did the main space win again and again over larger candidates, while nobody asked for its entries? */
static bool is_main_stale(const struct lec_policy_view *view)
{
    return view->state->is_memory_short && view->state->large_losses >= STALE_LOSSES;
}

/* The protected entry that leaves a stale main space, before those in probation: else it would stay as long as nobody else
 * is promoted. LEC_NONE if it is touched: then the main space is not stale. */
static uint32_t stale_victim(struct hunt *hunt)
{
    uint32_t id = is_main_stale(hunt->view) ? tail_of(hunt, LEC_LIST_PROTECTED) : LEC_NONE;
    if (id == LEC_NONE || !is_touched(hunt, id))
        return id;
    move_to_head(hunt, id, LEC_LIST_PROTECTED);
    return LEC_NONE;
}

/* Who leaves the main space next: promotes what was touched on the way. */
static uint32_t main_victim(struct hunt *hunt)
{
    uint32_t id = stale_victim(hunt);
    if (id != LEC_NONE || hunt->damaged)
        return id;
    id = tail_of(hunt, LEC_LIST_PROBATION);
    while (id != LEC_NONE && is_touched(hunt, id)) {
        move_to_head(hunt, id, LEC_LIST_PROTECTED);
        shrink_protected(hunt);
        id = hunt->damaged ? LEC_NONE : tail_of(hunt, LEC_LIST_PROBATION);
    }
    if (id != LEC_NONE || hunt->damaged)
        return id;
    return untouched_tail(hunt, LEC_LIST_PROTECTED);
}

/* Accesses beyond the first, which everybody had: the evidence that an entry is worth its place. */
static uint32_t evidence(uint32_t frequency)
{
    return frequency ? frequency - 1u : 0u;
}

/* Summed evidence for the main entries that `units` would displace, first victim `id`; stops above `enough`. */
static LEC_ASIDE uint32_t displaced_evidence(const struct hunt *hunt, uint32_t id, uint32_t units, uint32_t enough)
{
    const struct lec_policy_view *view = hunt->view;
    uint32_t sum = 0, freed = 0;
    for (uint32_t i = 0; i < CONTEST_VICTIMS && id < view->max_entries && freed < units && sum <= enough; i++) {
        const struct lec_node *node = &view->nodes[id];
        sum += evidence(lec_policy_frequency(view, node->tag) + touches_peek(view, node));
        freed += lec_node_units(node);
        id = node->prev;
    }
    return sum;
}

static bool is_larger(const struct hunt *hunt, uint32_t candidate, uint32_t victim)
{
    const struct lec_node *nodes = hunt->view->nodes;
    return lec_node_units(&nodes[candidate]) > lec_node_units(&nodes[victim]);
}

/* Is the window's candidate worth more than what it displaces? That is the one victim if entries are scarce, not units,
 * or if the victim is as large; a tie goes to the incumbent. Otherwise it is the set of victims that its units displace
 * ("aggregated victims": Einziger et al., ACM ToS 2022), by evidence: many small entries that nobody asked for again
 * must not outweigh every larger newcomer for ever, only because each was once stored. Nor must those that were asked
 * for again, but not lately: traffic of larger values would wait for the sketch to age, for many turnovers. */
static bool is_worth_more(const struct hunt *hunt, uint32_t candidate, uint32_t victim, uint32_t frequency)
{
    const struct lec_policy_view *view = hunt->view;
    const struct lec_node *loser = &view->nodes[victim];
    if (!view->state->is_memory_short || !is_larger(hunt, candidate, victim))
        return frequency > lec_policy_frequency(view, loser->tag) + touches_peek(view, loser);
    if (is_main_stale(view))
        return true;
    uint32_t displaced = displaced_evidence(hunt, victim, lec_node_units(&view->nodes[candidate]), evidence(frequency));
    return displaced == 0 || evidence(frequency) > displaced;
}

/* Now and then a warm loser is let in: who floods the sketch to blow up a victim's count must not win for ever. */
static bool is_admitted(const struct hunt *hunt, uint32_t candidate, uint32_t victim)
{
    uint32_t frequency = lec_policy_frequency(hunt->view, hunt->view->nodes[candidate].tag);
    if (is_worth_more(hunt, candidate, victim, frequency))
        return true;
    return frequency >= WARM_FREQUENCY && next_random(hunt->view->state) % WARM_ADMISSION_ODDS == 0;
}

/* The window is over its budget: its tail meets the main space's. An incumbent that wins starts over at the head, so that
 * candidates meet others: one strong entry at the tail would shield all the weak ones behind it. Where entries are
 * alike, now and then is as good as always, and each new victim costs cache misses. */
static uint32_t contest(struct hunt *hunt)
{
    const struct lec_policy_view *view = hunt->view;
    uint32_t candidate = untouched_tail(hunt, LEC_LIST_WINDOW);
    uint32_t victim = hunt->damaged ? LEC_NONE : main_victim(hunt);
    if (victim == LEC_NONE || candidate == LEC_NONE)
        return victim == LEC_NONE ? candidate : victim;
    if (is_admitted(hunt, candidate, victim)) {
        move_to_head(hunt, candidate, LEC_LIST_PROBATION);
        return victim;
    }
    if (view->state->is_memory_short && is_larger(hunt, candidate, victim) && !is_main_stale(view))
        view->state->large_losses++;
    if (view->state->is_memory_short || view->state->aging.additions % ROTATE_EVERY == 0)
        move_to_head(hunt, victim, lec_node_list(&view->nodes[victim]));
    return candidate;
}

enum lec_policy_status lec_policy_victim(const struct lec_policy_view *view, uint32_t protect_id, uint32_t *victim)
{
    struct hunt hunt = {view, protect_id, EXAMINED_PER_VICTIM, false};
    view->state->is_memory_short = live_entries(view) < view->max_entries;
    uint32_t id = is_window_over(view, 1) ? contest(&hunt) : main_victim(&hunt);
    if (id == LEC_NONE && !hunt.damaged)
        id = untouched_tail(&hunt, LEC_LIST_WINDOW);
    if (id == LEC_NONE && live_entries(view) > (protect_id != LEC_NONE))
        hunt.damaged = true;    /* counted, but not to be found */
    *victim = hunt.damaged ? LEC_NONE : id;
    if (hunt.damaged)
        return LEC_POLICY_DAMAGED;
    return id == LEC_NONE ? LEC_POLICY_EMPTY : LEC_POLICY_OK;
}

/* ---- the hits that nobody reports ----------------------------------------------------------------------------- */

/* The entry of a sampled key, if the key still has one. */
static struct lec_node *polled_node(const struct lec_policy_view *view, const struct lec_shadow_key *key)
{
    if (key->node >= view->max_entries)
        return NULL;
    struct lec_node *node = &view->nodes[key->node];
    return node->tag == key->tag && lec_node_list(node) != LEC_LIST_FREE ? node : NULL;
}

/* Hits since the last poll. One touch is left behind, for the examination that decides on promotion; the others are
 * counted here and now, or a saturated byte would hide all later hits. */
static uint32_t poll_touches(const struct lec_policy_view *view, const struct lec_node *node, struct lec_shadow_key *key)
{
    uint32_t touches = touches_peek(view, node);
    uint32_t before = key->polled <= touches ? key->polled : 0u; /* fewer than we left: examined since */
    if (touches > 1u) {
        atomic_store_explicit(touches_of(view, node), 1, memory_order_relaxed);
        count_accesses(view, node->tag, touches - 1u);
    }
    key->polled = touches ? 1u : 0u;
    return touches - before;
}

static uint32_t poll_key(const struct lec_policy_view *view, struct lec_shadow_key *key)
{
    const struct lec_node *node = polled_node(view, key);
    uint32_t hits = node ? poll_touches(view, node, key) : 0u;
    if (!node)
        lec_shadow_gone(&view->state->shadow, key);
    if (hits) {
        note_use(view, node);
        lec_shadow_hit(&view->state->shadow, key, hits);
        sample(view, node, LEC_SAMPLE_HIT, hits);
    }
    return hits;
}

static uint32_t between(uint32_t least, uint32_t value, uint32_t most)
{
    return value < least ? least : value > most ? most : value;
}

/* How many keys to look at, at each insert. */
static uint32_t polls(const struct lec_policy_view *view)
{
    uint32_t entries = capacity(view);
    uint32_t enough = between(POLLS_LEAST, LEC_SHADOW_KEYS * POLL_ROUNDS_ENOUGH / entries, POLLS_USUAL);
    return between(enough, LEC_SHADOW_KEYS * POLL_ROUNDS_LEAST / entries, POLLS_MOST);
}

/* Looks at a few sampled keys, and at more as long as it finds hits: where inserts are rare, there is time for it. */
static void poll_hits(const struct lec_policy_view *view)
{
    struct lec_shadow *shadow = &view->state->shadow;
    uint32_t looks = polls(view), extra = 0, live;
    for (struct lec_shadow_key *set; extra < POLLS_FOR_HITS_MOST && (set = lec_shadow_next(shadow, &looks, &live)) != NULL;)
        for (; live; live &= live - 1u)
            if (poll_key(view, &set[__builtin_ctz(live)])) {
                looks += POLLS_PER_HIT;
                extra += POLLS_PER_HIT;
            }
}

/* ---- what happens to entries --------------------------------------------------------------------------------- */

/* While the main space has room, what the window has too much moves there without a contest. */
static enum lec_policy_status spill_window(const struct lec_policy_view *view)
{
    struct hunt hunt = {view, LEC_NONE, 0, false};
    for (uint32_t i = 0; i < SPILLS_PER_INSERT && has_main_room(view, 0) && is_window_over(view, 0); i++) {
        uint32_t id = tail_of(&hunt, LEC_LIST_WINDOW);
        if (id == LEC_NONE || id == list_of(view, LEC_LIST_WINDOW)->head || !has_main_room(view, lec_node_units(&view->nodes[id])))
            break;
        move_to_head(&hunt, id, LEC_LIST_PROBATION);
    }
    return hunt.damaged ? LEC_POLICY_DAMAGED : LEC_POLICY_OK;
}

enum lec_policy_status lec_policy_insert(const struct lec_policy_view *view, uint32_t id)
{
    if (id >= view->max_entries || lec_node_list(&view->nodes[id]) != LEC_LIST_FREE)
        return LEC_POLICY_DAMAGED;
    touches_clear(view, &view->nodes[id]);
    list_push(view, LEC_LIST_WINDOW, id);
    count_accesses(view, view->nodes[id].tag, 1);
    poll_hits(view);    /* first: they came before */
    if (lec_shadow_insert(&view->state->shadow, view->nodes[id].tag, id))
        sample(view, &view->nodes[id], LEC_SAMPLE_INSERT, 1);
    return spill_window(view);
}

enum lec_policy_status lec_policy_update(const struct lec_policy_view *view, uint32_t id, uint32_t new_units)
{
    if (!is_linked(view, id))
        return LEC_POLICY_DAMAGED;
    struct lec_node *node = &view->nodes[id];
    struct lec_policy_list *list = list_of(view, lec_node_list(node));
    list->units += new_units - lec_node_units(node);
    node->units_list = (node->units_list & 0xc0000000u) | (new_units & 0x3fffffffu);
    _Atomic uint8_t *touches = touches_of(view, node);
    if (touches && touches_peek(view, node) < LEC_TOUCH_MAX)
        atomic_fetch_add_explicit(touches, 1, memory_order_relaxed);
    return LEC_POLICY_OK;
}

enum lec_policy_status lec_policy_remove(const struct lec_policy_view *view, uint32_t id)
{
    if (unlink_entry(view, id) != LEC_POLICY_OK)
        return LEC_POLICY_DAMAGED;
    /* That it is past its deadline whoever replays this sees by himself. */
    if (lec_shadow_remove(&view->state->shadow, view->nodes[id].tag) && view->nodes[id].expires_at > view->now_ns)
        sample(view, &view->nodes[id], LEC_SAMPLE_GONE, 1);
    return LEC_POLICY_OK;
}

enum lec_policy_status lec_policy_evict(const struct lec_policy_view *view, uint32_t id)
{
    enum lec_policy_status status = unlink_entry(view, id);
    if (status == LEC_POLICY_OK)
        lec_shadow_evict(&view->state->shadow, view->nodes[id].tag);
    return status;
}

uint32_t lec_policy_sketch_lines(uint32_t max_entries)
{
    return lec_sketch_lines(max_entries);
}

void lec_policy_reset(const struct lec_policy_view *view)
{
    struct lec_sketch sketch = sketch_of(view);
    memset(view->state, 0, sizeof *view->state);
    for (uint32_t which = 0; which < 4; which++)
        view->state->lists[which] = (struct lec_policy_list){LEC_NONE, LEC_NONE, 0, 0};
    view->state->random = view->seed | 1u;
    lec_shadow_reset(&view->state->shadow, view->seed);
    lec_sketch_reset(&sketch);
}
