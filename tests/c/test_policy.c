/* The eviction policy on its own: invariants after every random step, bounds, damage, recovery, hit ratio.
 *
 * A harness plays the kernel: it owns nodes and buckets, evicts before it inserts, and touches like a reader. The
 * seed is the first argument (default 1) and is printed.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "policy.h"

#define MAX_ENTRIES 600u
#define KEYS 4096u
#define UNITS_MOST 64u

struct harness {
    struct lec_policy_view view;
    uint32_t where[KEYS];               /* node of a key, LEC_NONE = absent */
    uint32_t key_of[MAX_ENTRIES];
    uint32_t free_head;                 /* free nodes, linked by next */
    uint32_t live, used_units;
    uint64_t live_bits[MAX_ENTRIES / 64u + 1u], scratch[MAX_ENTRIES / 64u + 1u];
};

static uint64_t random_state;
static int failures;

static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static uint32_t draw(uint32_t below)
{
    random_state += 0x9e3779b97f4a7c15u;
    return (uint32_t)((mix(random_state) >> 32) * below >> 32);
}

static void expect(int holds, const char *what)
{
    if (holds)
        return;
    failures++;
    fprintf(stderr, "FAILED: %s\n", what);
}

static void print_broken(void *context, const char *invariant, uint32_t id)
{
    fprintf(stderr, "  %s: %s (node %u)\n", (const char *)context, invariant, id);
}

static uint32_t tag_of(uint32_t key)
{
    return (uint32_t)(mix(key + 0x1234567u) >> 32);
}

static void *lines(size_t bytes)
{
    void *memory = aligned_alloc(64, (bytes + 63u) / 64u * 64u);
    if (!memory)
        abort();
    return memset(memory, 0, (bytes + 63u) / 64u * 64u);
}

static void empty(struct harness *harness)
{
    memset(harness->where, 0xff, sizeof harness->where);
    memset(harness->live_bits, 0, sizeof harness->live_bits);
    for (uint32_t id = 0; id < MAX_ENTRIES; id++) {
        harness->view.nodes[id].next = id + 1u < MAX_ENTRIES ? id + 1u : LEC_NONE;
        harness->view.nodes[id].units_list = 0;
        harness->view.nodes[id].slot = id;
    }
    harness->free_head = 0;
    harness->live = harness->used_units = 0;
    lec_policy_reset(&harness->view);
}

static struct harness *create(uint32_t total_units)
{
    struct harness *harness = lines(sizeof *harness);
    struct lec_policy_view *view = &harness->view;
    view->max_entries = MAX_ENTRIES;
    view->seed = 42;
    view->bucket_count = MAX_ENTRIES / LEC_SLOTS_PER_BUCKET;
    view->total_units = total_units;
    view->state = lines(sizeof *view->state);
    view->nodes = lines(MAX_ENTRIES * sizeof *view->nodes);
    view->buckets = lines(view->bucket_count * sizeof *view->buckets);
    view->sketch = lines(lec_policy_sketch_lines(MAX_ENTRIES) * 64u);
    empty(harness);
    return harness;
}

static void destroy(struct harness *harness)
{
    free(harness->view.state);
    free(harness->view.nodes);
    free(harness->view.buckets);
    free(harness->view.sketch);
    free(harness);
}

static void forget(struct harness *harness, uint32_t id, uint32_t units)
{
    harness->where[harness->key_of[id]] = LEC_NONE;
    harness->live_bits[id / 64u] &= ~(1ull << (id % 64u));
    harness->view.nodes[id].next = harness->free_head;
    harness->free_head = id;
    harness->live--;
    harness->used_units -= units;
}

/* Status of the policy; the first one that is not OK ends the operation. */
static enum lec_policy_status make_room(struct harness *harness, uint32_t units, uint32_t protect)
{
    while (harness->live == harness->view.max_entries || harness->view.total_units - harness->used_units < units) {
        uint32_t id;
        enum lec_policy_status status = lec_policy_victim(&harness->view, protect, &id);
        if (status != LEC_POLICY_OK)
            return status;
        expect(id < MAX_ENTRIES && id != protect, "a victim is a node and not the protected one");
        uint32_t held = lec_node_units(&harness->view.nodes[id]);
        status = lec_policy_evict(&harness->view, id);
        if (status != LEC_POLICY_OK)
            return status;
        forget(harness, id, held);
    }
    return LEC_POLICY_OK;
}

static enum lec_policy_status set_absent(struct harness *harness, uint32_t key, uint32_t units)
{
    enum lec_policy_status status = make_room(harness, units, LEC_NONE);
    if (status != LEC_POLICY_OK)
        return status;
    uint32_t id = harness->free_head;
    struct lec_node *node = &harness->view.nodes[id];
    harness->free_head = node->next;
    node->tag = tag_of(key);
    node->units_list = units;
    harness->key_of[id] = key;
    harness->where[key] = id;
    harness->live_bits[id / 64u] |= 1ull << (id % 64u);
    harness->live++;
    harness->used_units += units;
    return lec_policy_insert(&harness->view, id);
}

static enum lec_policy_status set_present(struct harness *harness, uint32_t key, uint32_t units)
{
    uint32_t id = harness->where[key], held = lec_node_units(&harness->view.nodes[id]);
    if (units > held && harness->view.total_units - harness->used_units < units - held) {
        enum lec_policy_status status = make_room(harness, units - held, id);
        if (status != LEC_POLICY_OK)
            return status;
    }
    harness->used_units += units - held;
    return lec_policy_update(&harness->view, id, units);
}

static enum lec_policy_status drop(struct harness *harness, uint32_t key)
{
    uint32_t id = harness->where[key], held = lec_node_units(&harness->view.nodes[id]);
    enum lec_policy_status status = lec_policy_remove(&harness->view, id);
    if (status == LEC_POLICY_OK)
        forget(harness, id, held);
    return status;
}

static _Atomic uint8_t *touch_byte(struct harness *harness, uint32_t key)
{
    uint32_t slot = harness->where[key];
    return &harness->view.buckets[slot / LEC_SLOTS_PER_BUCKET].touches[slot % LEC_SLOTS_PER_BUCKET];
}

static void touch(struct harness *harness, uint32_t key)
{
    if (*touch_byte(harness, key) < LEC_TOUCH_MAX)
        (*touch_byte(harness, key))++;
}

/* Small keys are popular: the smaller of three draws. */
static uint32_t draw_key(void)
{
    uint32_t a = draw(KEYS), b = draw(KEYS), c = draw(KEYS);
    uint32_t least = a < b ? a : b;
    return least < c ? least : c;
}

static enum lec_policy_status step(struct harness *harness)
{
    uint32_t key = draw_key(), chance = draw(100);
    if (harness->where[key] == LEC_NONE)
        return set_absent(harness, key, 1u + draw(UNITS_MOST));
    if (chance < 5)
        return drop(harness, key);
    if (chance < 15)
        return set_present(harness, key, 1u + draw(UNITS_MOST));
    touch(harness, key);
    return LEC_POLICY_OK;
}

static void steps_keep_invariants(uint32_t total_units, const char *name)
{
    struct harness *harness = create(total_units);
    int sound = 1;
    for (uint32_t i = 0; i < 30000 && sound; i++) {
        sound = step(harness) == LEC_POLICY_OK
             && lec_policy_check(&harness->view, print_broken, (void *)(uintptr_t)name) == 0;
        const struct lec_policy_list *lists = harness->view.state->lists;
        sound = sound && lists[1].entries + lists[2].entries + lists[3].entries == harness->live
             && lists[1].units + lists[2].units + lists[3].units == harness->used_units;
    }
    expect(sound, name);
    destroy(harness);
}

static void an_empty_shard_has_no_victim(void)
{
    struct harness *harness = create(1000);
    uint32_t id = 7;
    expect(lec_policy_victim(&harness->view, LEC_NONE, &id) == LEC_POLICY_EMPTY && id == LEC_NONE, "empty: no victim");
    set_absent(harness, 1, 5);
    expect(lec_policy_victim(&harness->view, harness->where[1], &id) == LEC_POLICY_EMPTY, "only the protected one: no victim");
    expect(lec_policy_victim(&harness->view, LEC_NONE, &id) == LEC_POLICY_OK && id == harness->where[1], "else that one");
    destroy(harness);
}

static void every_entry_can_be_evicted_but_the_protected(void)
{
    struct harness *harness = create(MAX_ENTRIES);
    uint32_t id, evicted = 0;
    for (uint32_t key = 0; key < MAX_ENTRIES; key++)
        set_absent(harness, key, 1);
    uint32_t protect = harness->where[17];
    while (lec_policy_victim(&harness->view, protect, &id) == LEC_POLICY_OK && evicted < MAX_ENTRIES) {
        for (uint32_t key = 0; key < MAX_ENTRIES; key++)    /* all hot: the bound decides */
            if (harness->where[key] != LEC_NONE)
                touch(harness, key);
        lec_policy_evict(&harness->view, id);
        forget(harness, id, 1);
        evicted++;
    }
    expect(evicted == MAX_ENTRIES - 1u && harness->where[17] == protect, "all but the protected one can be evicted");
    destroy(harness);
}

/* Examined entries have their touches taken, so they can be counted from outside. */
static void a_hunt_examines_a_bounded_number(void)
{
    struct harness *harness = create(MAX_ENTRIES);
    uint32_t id, taken = 0;
    for (uint32_t key = 0; key < MAX_ENTRIES; key++)
        set_absent(harness, key, 1);
    for (uint32_t key = 0; key < MAX_ENTRIES; key++)
        touch(harness, key);
    uint32_t before = 0, after = 0;
    for (uint32_t slot = 0; slot < MAX_ENTRIES; slot++)
        before += harness->view.buckets[slot / 6u].touches[slot % 6u] != 0;
    lec_policy_victim(&harness->view, LEC_NONE, &id);
    for (uint32_t slot = 0; slot < MAX_ENTRIES; slot++)
        after += harness->view.buckets[slot / 6u].touches[slot % 6u] != 0;
    taken = before - after;
    expect(taken >= 1 && taken <= 32, "a hunt examines 1 to 32 entries");
    destroy(harness);
}

/* With all keys hit as often as touches can tell. What is not touched to the brim any more was polled. */
static void an_insert_polls_a_bounded_number(void)
{
    struct harness *harness = create(MAX_ENTRIES);
    uint32_t most = 0;
    for (uint32_t key = 0; key < MAX_ENTRIES; key++)
        set_absent(harness, key, 1);
    for (uint32_t i = 0; i < 200; i++) {
        drop(harness, i);
        for (uint32_t key = 0; key < MAX_ENTRIES + i; key++)
            for (uint32_t hit = 0; hit < LEC_TOUCH_MAX && harness->where[key] != LEC_NONE; hit++)
                touch(harness, key);
        set_absent(harness, MAX_ENTRIES + i, 1);
        uint32_t polled = 0;
        for (uint32_t key = 0; key < MAX_ENTRIES + i; key++)
            polled += harness->where[key] != LEC_NONE && *touch_byte(harness, key) < LEC_TOUCH_MAX;
        most = polled > most ? polled : most;
    }
    expect(most > 8 && most < 16 + LEC_SHADOW_WAYS, "an insert deals with 16 hits, and with those of the set it is at");
    destroy(harness);
}

static void a_newcomer_survives_its_own_insertion(void)
{
    struct harness *harness = create(MAX_ENTRIES);
    int survived = 1;
    for (uint32_t i = 0; i < 20000; i++) {
        uint32_t key = draw_key();
        if (harness->where[key] != LEC_NONE) {
            touch(harness, key);
            continue;
        }
        set_absent(harness, key, 1);
        survived = survived && lec_node_list(&harness->view.nodes[harness->where[key]]) != LEC_LIST_FREE;
    }
    expect(survived, "a newcomer is in the cache after its insertion");
    destroy(harness);
}

/* Counters are 4 bits. Counting a key raises those of its four that are below what is due (the least of them and the count) to
 * just that; none goes down. */
static void counting_a_key_leaves_the_others_alone(void)
{
    struct lec_sketch_aging aging;
    uint64_t *words = lines(8u * 64u), before[64];
    struct lec_sketch sketch = {words, &aging, 8};
    uint32_t wrong = 0;
    lec_sketch_reset(&sketch);
    for (uint32_t i = 0; i < 5000; i++) {
        uint64_t hash = lec_sketch_hash(3, draw(40));
        uint32_t count = draw(4), target = lec_sketch_estimate(&sketch, hash) + count, raised = 0;
        memcpy(before, words, sizeof before);
        lec_sketch_add(&sketch, hash, count, 1000000);
        target = target < LEC_SKETCH_COUNTER_MAX ? target : LEC_SKETCH_COUNTER_MAX;
        for (uint32_t nibble = 0; nibble < 64u * 16u; nibble++) {
            uint32_t was = before[nibble / 16u] >> (nibble % 16u * 4u) & 15u, is = words[nibble / 16u] >> (nibble % 16u * 4u) & 15u;
            wrong += is != was && (is != target || is < was);
            raised += is != was;
        }
        wrong += raised > 4 || lec_sketch_estimate(&sketch, hash) != target;
    }
    expect(!wrong, "counting a key raises its own counters, to what is due, and no other");
    free(words);
}

static void the_sketch_counts_and_ages(void)
{
    struct lec_sketch_aging aging;
    uint64_t *words = lines(8u * 64u);
    struct lec_sketch sketch = {words, &aging, 8};
    uint64_t hash = lec_sketch_hash(3, 99);
    lec_sketch_reset(&sketch);
    expect(lec_sketch_estimate(&sketch, hash) == 0, "a new sketch knows nothing");
    lec_sketch_add(&sketch, hash, 3, 64);
    expect(lec_sketch_estimate(&sketch, hash) == 3, "an estimate is what was added");
    for (uint32_t i = 0; i < 20; i++)
        lec_sketch_add(&sketch, hash, 3, 64);
    expect(lec_sketch_estimate(&sketch, hash) == LEC_SKETCH_COUNTER_MAX, "counters saturate");
    for (uint32_t i = 0; i < 700; i++)
        lec_sketch_add(&sketch, lec_sketch_hash(3, 1000u + i % 4u), 1, 64);
    expect(lec_sketch_estimate(&sketch, hash) < LEC_SKETCH_COUNTER_MAX, "counters are halved once per period");
    free(words);
}

/* Every hit of the real cache is a touch: nothing else tells the policy about it. */
static uint32_t replay(struct harness *harness, uint32_t (*next)(uint32_t), uint32_t accesses)
{
    uint32_t hits = 0;
    for (uint32_t i = 0; i < accesses; i++) {
        uint32_t key = next(i);
        if (harness->where[key] != LEC_NONE) {
            hits++;
            touch(harness, key);
        } else {
            set_absent(harness, key, 1);
        }
    }
    return hits;
}

static uint32_t next_of_loop(uint32_t i)
{
    return i % (MAX_ENTRIES + MAX_ENTRIES / 4u);
}

static uint32_t next_recent(uint32_t i)     /* a working set that drifts; whatever was popular never returns */
{
    return (i / 3u + (draw(MAX_ENTRIES) + draw(MAX_ENTRIES)) / 2u) % KEYS;
}

#define ROOM (MAX_ENTRIES / 4u)     /* entries of UNITS_EACH units that there is memory for: nodes abound */
#define UNITS_EACH 8u

/* As the kernel makes room: now and then more than is needed, so that what is in use wavers. */
static enum lec_policy_status set_where_memory_is_short(struct harness *harness, uint32_t key, uint32_t units)
{
    uint32_t more = draw(2) ? harness->view.total_units / 64u : 0u;
    enum lec_policy_status status = make_room(harness, units + more, LEC_NONE);
    return status == LEC_POLICY_OK ? set_absent(harness, key, units) : status;
}

static uint32_t replay_where_memory_is_short(struct harness *harness, uint32_t (*next)(uint32_t), uint32_t (*units_of)(uint32_t), uint32_t accesses)
{
    uint32_t hits = 0;
    for (uint32_t i = 0; i < accesses; i++) {
        uint32_t key = next(i);
        if (harness->where[key] == LEC_NONE) {
            set_where_memory_is_short(harness, key, units_of(key));
            continue;
        }
        hits++;
        touch(harness, key);
    }
    return hits;
}

static uint32_t units_alike(uint32_t key)
{
    (void)key;
    return UNITS_EACH;
}

static uint32_t next_of_loop_that_overflows_memory(uint32_t i)
{
    return i % (ROOM + ROOM / 4u);
}

/* Were the window's surplus moved on whenever something is free, every newcomer would pass without a contest: no hit at all. */
static void a_loop_hits_where_memory_is_short_too(void)
{
    struct harness *harness = create(ROOM * UNITS_EACH);
    replay_where_memory_is_short(harness, next_of_loop_that_overflows_memory, units_alike, 60000);
    expect(lec_policy_window_share(&harness->view) < LEC_SHARE_ONE / 10, "a loop leaves the window less than 10 %, memory being short");
    expect(replay_where_memory_is_short(harness, next_of_loop_that_overflows_memory, units_alike, 20000) > 12000,
           "a loop a quarter too long for the memory hits for the most part");
    destroy(harness);
}

/* Entries of one size that were asked for once each: those that came first stay, or a scan would empty the main space. */
static void a_tie_goes_to_the_incumbent_where_memory_is_short(void)
{
    struct harness *harness = create(ROOM * UNITS_EACH);
    uint32_t firsts = 0, left = 0;
    static uint8_t was_main[MAX_ENTRIES];
    for (uint32_t key = 0; key < ROOM * 2u; key++)
        set_where_memory_is_short(harness, key, UNITS_EACH);
    for (uint32_t key = 0; key < ROOM * 2u; key++) {
        was_main[key] = harness->where[key] != LEC_NONE && lec_node_list(&harness->view.nodes[harness->where[key]]) != LEC_LIST_WINDOW;
        firsts += was_main[key];
    }
    for (uint32_t key = ROOM * 2u; key < ROOM * 5u; key++)
        set_where_memory_is_short(harness, key, UNITS_EACH);
    for (uint32_t key = 0; key < ROOM * 2u; key++)
        left += was_main[key] && harness->where[key] != LEC_NONE;
    if (left * 2u <= firsts)
        fprintf(stderr, "  %u of %u are left\n", left, firsts);
    expect(firsts > ROOM / 3u && left * 2u > firsts, "a scan leaves the main space alone where memory is short");
    destroy(harness);
}

/* The counters must age by what the cache holds: by max_entries, four times as many, they would all saturate. */
static void the_sketch_ages_by_the_entries_there_is_room_for(void)
{
    struct harness *harness = create(ROOM * UNITS_EACH);
    for (uint32_t key = 0; key < ROOM * LEC_SKETCH_ADDITIONS_PER_ENTRY / 2u; key++)
        set_where_memory_is_short(harness, key % KEYS, UNITS_EACH);
    uint32_t before = harness->view.state->aging.additions;
    for (uint32_t key = 0; key < ROOM * LEC_SKETCH_ADDITIONS_PER_ENTRY; key++)
        if (harness->where[key % KEYS] == LEC_NONE)
            set_where_memory_is_short(harness, key % KEYS, UNITS_EACH);
    expect(before > 0 && harness->view.state->aging.additions <= ROOM * LEC_SKETCH_ADDITIONS_PER_ENTRY, "additions start over once per ten entries of room");
    destroy(harness);
}

/* A sweep that began is finished: where the period is short, it would begin again and again before the last lines. */
static void every_line_of_the_sketch_ages(uint32_t entries_in_memory)
{
    uint32_t units = 64, unaged = 0;
    struct harness *harness = create(entries_in_memory * units);
    uint32_t lines_in_all = lec_policy_sketch_lines(MAX_ENTRIES);
    memset(harness->view.sketch, 0xff, lines_in_all * 64u);
    for (uint32_t key = 0; key < KEYS; key++)
        set_where_memory_is_short(harness, key, units);
    for (uint32_t line = 0; line < lines_in_all; line++)
        unaged += harness->view.sketch[line * LEC_SKETCH_WORDS_PER_LINE] == UINT64_MAX;
    expect(unaged == 0, "every line of the sketch is halved now and then");
    destroy(harness);
}

/* Hits of 200 accesses per entry on a loop a quarter too long, with the window's share held fast. */
static uint32_t hits_of_a_loop(uint32_t entries, uint32_t percent, int is_memory_short)
{
    struct harness *harness = create(is_memory_short ? entries * UNITS_EACH : MAX_ENTRIES * UNITS_EACH);
    uint32_t hits = 0;
    if (!is_memory_short)
        harness->view.max_entries = entries;
    for (uint32_t i = 0; i < entries * 200u; i++) {
        harness->view.state->shadow.share = LEC_SHARE_ONE / 100u * percent;
        uint32_t key = i % (entries + entries / 4u);
        if (harness->where[key] != LEC_NONE) {
            hits++;
            touch(harness, key);
        } else {
            set_absent(harness, key, UNITS_EACH);
        }
    }
    destroy(harness);
    return hits;
}

/* A main space of few entries is never filled to its share exactly: what is missing is less than an entry, no room. */
static void few_large_entries_are_contested_as_many_small_ones(void)
{
    static const uint32_t entries[] = {8, 12, 16, 24, 40}, percents[] = {10, 15, 20, 30, 40};
    for (uint32_t at = 0; at < sizeof entries / sizeof *entries; at++)
        for (uint32_t of = 0; of < sizeof percents / sizeof *percents; of++) {
            uint32_t by_memory = hits_of_a_loop(entries[at], percents[of], 1), by_entries = hits_of_a_loop(entries[at], percents[of], 0);
            if (by_memory * 10u < by_entries * 6u)
                fprintf(stderr, "  %u entries, window %u %%: %u hits by memory, %u by entries\n", entries[at], percents[of], by_memory, by_entries);
            expect(by_memory * 10u >= by_entries * 6u, "a loop hits where few entries fill the memory");
        }
}

/* Small entries that are asked for, one access per large value that passes and never returns; percent of hits. */
static uint32_t hits_beside_large_ones(uint32_t large_units)
{
    struct harness *harness = create(MAX_ENTRIES * 4u);
    uint32_t small = 560, hits = 0, asked = 40000, large = small;
    for (uint32_t i = 0; i < asked; i++) {
        uint32_t key = draw(small);
        hits += harness->where[key] != LEC_NONE;
        if (harness->where[key] != LEC_NONE)
            touch(harness, key);
        else
            set_where_memory_is_short(harness, key, 4);
        if (i % 2u)
            continue;
        if (harness->where[large] == LEC_NONE)
            set_where_memory_is_short(harness, large, large_units);
        large = large + 1u < KEYS ? large + 1u : small;
    }
    destroy(harness);
    return 100u * hits / asked;
}

static void large_values_that_pass_leave_small_ones_in_use(void)
{
    uint32_t some = hits_beside_large_ones(68), more = hits_beside_large_ones(100), most = hits_beside_large_ones(200);
    if (some <= 75 || more <= 70 || most <= 60)
        fprintf(stderr, "  beside values of 68, 100 and 200 units: %u, %u and %u %% hits\n", some, more, most);
    expect(some > 75 && more > 70 && most > 60, "small entries in use hit for the most part beside large ones that pass");
}

/* Fills the memory with small entries that were asked for twice, then sets large ones, and asks for a small one in 64
 * before each if they are in use. Returns how many small ones are left. */
static uint32_t small_entries_left(int are_in_use)
{
    struct harness *harness = create(MAX_ENTRIES * 4u);
    uint32_t small = MAX_ENTRIES - 10u, left = 0;
    for (uint32_t key = 0; key < small; key++)
        set_absent(harness, key, 4);
    for (uint32_t large = 0; large < 300; large++) {
        for (uint32_t key = 0; key < small; key++)
            if (harness->where[key] != LEC_NONE && (large == 0 || (are_in_use && draw(64) == 0)))
                touch(harness, key);
        set_where_memory_is_short(harness, small + large, 100);
    }
    for (uint32_t key = 0; key < small; key++)
        left += harness->where[key] != LEC_NONE;
    expect(lec_policy_check(&harness->view, print_broken, (void *)(uintptr_t)"large after small") == 0, "sound after large ones came");
    destroy(harness);
    return left;
}

static void large_values_replace_small_ones_unless_they_are_in_use(void)
{
    expect(small_entries_left(0) < MAX_ENTRIES / 4u, "small entries that nobody asks for any more make way for large ones");
    expect(small_entries_left(1) > MAX_ENTRIES / 3u, "small entries in use hold their place against large ones");
}

/* One strong incumbent at the tail must not shield weak ones behind it: after it has won, another is met. */
static void an_incumbent_that_won_starts_over(void)
{
    struct harness *harness = create(MAX_ENTRIES);
    for (uint32_t again = 0; again < 5; again++) {
        set_absent(harness, 0, 1);
        drop(harness, 0);
    }
    for (uint32_t key = 0; key < MAX_ENTRIES; key++)
        set_absent(harness, key, 1);
    uint32_t tail = harness->view.state->lists[LEC_LIST_PROBATION].tail;
    expect(tail == harness->where[0], "the first entry is the first to meet a candidate");
    for (uint32_t more = 0; more < 16 && harness->view.state->lists[LEC_LIST_PROBATION].tail == tail; more++)
        set_absent(harness, MAX_ENTRIES + more, 1);
    expect(lec_node_list(&harness->view.nodes[tail]) == LEC_LIST_PROBATION && harness->where[0] == tail, "an incumbent that was asked for more often stays");
    expect(harness->view.state->lists[LEC_LIST_PROBATION].tail != tail, "and starts over: the next candidates meet another");
    destroy(harness);
}

static void the_window_shrinks_for_a_loop(void)
{
    struct harness *harness = create(MAX_ENTRIES);
    replay(harness, next_of_loop, 60000);
    expect(lec_policy_window_share(&harness->view) < LEC_SHARE_ONE / 10, "a loop leaves the window less than 10 %");
    expect(replay(harness, next_of_loop, 20000) > 13000, "a loop a quarter too long hits for the most part");
    destroy(harness);
}

static uint32_t next_of_tight_loop(uint32_t i)
{
    return i % (MAX_ENTRIES + MAX_ENTRIES / 16u);
}

/* Most accesses are hits, most of them between two polls of an entry that is examined all the time: none may be lost,
 * or the racers see fewer keys than there are and find that all of them fit. */
static void a_loop_that_just_overflows_hits_for_the_most_part(void)
{
    struct harness *harness = create(MAX_ENTRIES);
    replay(harness, next_of_tight_loop, 60000);
    expect(replay(harness, next_of_tight_loop, 20000) > 17000, "a loop a sixteenth too long hits on 85 % or more");
    destroy(harness);
}

static void the_race_knows_how_many_of_its_keys_are_live(void)
{
    struct harness *harness = create(MAX_ENTRIES);
    for (uint32_t round = 0; round < 20; round++) {
        replay(harness, round % 2u ? next_recent : next_of_loop, 2000);
        const struct lec_shadow *shadow = &harness->view.state->shadow;
        uint32_t live = 0;
        for (uint32_t i = 0; i < LEC_SHADOW_KEYS; i++)
            live += shadow->keys[i].node != LEC_NONE;
        expect(shadow->live == live, "the count of live sampled keys is exact");
    }
    destroy(harness);
}

/* However few keys are looked at each time: a set is polled when it was paid for, not before, and not left out. */
static void a_round_of_polling_shows_each_live_key_once(uint32_t looks_each)
{
    struct lec_shadow *shadow = calloc(1, sizeof *shadow);
    uint32_t seen = 0, looked = 0, live = 0, misled = 0;
    lec_shadow_reset(shadow, random_state);
    for (uint32_t key = 0; key < 150u; key++)
        (void)lec_shadow_insert(shadow, tag_of(key), key);
    for (uint32_t i = 0; i < LEC_SHADOW_KEYS; i++)
        live += shadow->keys[i].node != LEC_NONE;
    while (looked < LEC_SHADOW_KEYS) {
        uint32_t looks = looks_each < LEC_SHADOW_KEYS - looked ? looks_each : LEC_SHADOW_KEYS - looked, ways;
        looked += looks;
        for (struct lec_shadow_key *set; (set = lec_shadow_next(shadow, &looks, &ways)) != NULL;)
            for (uint32_t way = 0; way < LEC_SHADOW_WAYS; way++) {
                misled += (ways >> way & 1u) != (set[way].node != LEC_NONE) || &set[way] >= shadow->keys + looked;
                seen += ways >> way & 1u;
            }
    }
    expect(live > 50 && seen == live && !misled, "a round of polling shows each live key once");
    free(shadow);
}

/* A damaged cursor: polling still ends, with sets of the table. */
static void polling_starts_anywhere(void)
{
    struct lec_shadow *shadow = calloc(1, sizeof *shadow);
    uint32_t wrong = 0;
    lec_shadow_reset(shadow, random_state);
    for (uint32_t i = 0; i < 5000; i++) {
        uint32_t looks = draw(400), sets = 0, ways;
        shadow->cursor = draw(UINT32_MAX);
        for (struct lec_shadow_key *set; (set = lec_shadow_next(shadow, &looks, &ways)) != NULL; sets++)
            wrong += set < shadow->keys || set > shadow->keys + LEC_SHADOW_KEYS - LEC_SHADOW_WAYS || (set - shadow->keys) % LEC_SHADOW_WAYS != 0;
        wrong += sets > 400u / LEC_SHADOW_WAYS + 1u || shadow->cursor >= LEC_SHADOW_KEYS;
    }
    expect(!wrong, "polling with a damaged cursor stays in the table");
    free(shadow);
}

static void the_window_grows_for_recency(void)
{
    struct harness *harness = create(MAX_ENTRIES);
    replay(harness, next_recent, 60000);
    expect(lec_policy_window_share(&harness->view) > LEC_SHARE_ONE / 10 * 4, "a drifting working set gets a window of over 40 %");
    destroy(harness);
}

static void frequent_keys_are_known(void)
{
    struct harness *harness = create(MAX_ENTRIES);
    for (uint32_t i = 0; i < 8; i++) {
        set_absent(harness, 5, 1);
        drop(harness, 5);
    }
    expect(lec_policy_frequency(&harness->view, tag_of(5)) >= 8, "a key set eight times is known as frequent");
    expect(lec_policy_frequency(&harness->view, tag_of(6)) == 0, "a key never seen is not");
    destroy(harness);
}

static int order_is_kept(const struct harness *harness, const uint32_t *order, uint32_t count, enum lec_list which)
{
    uint32_t at = 0;
    for (uint32_t id = harness->view.state->lists[which].head; id != LEC_NONE; id = harness->view.nodes[id].next)
        if (at == count || order[at++] != id)
            return 0;
    return at == count;
}

static void rebuilding_a_sound_shard_changes_nothing(void)
{
    struct harness *harness = create(MAX_ENTRIES);
    uint32_t order[MAX_ENTRIES], count = 0;
    for (uint32_t i = 0; i < 20000; i++)
        step(harness);
    for (uint32_t id = harness->view.state->lists[2].head; id != LEC_NONE; id = harness->view.nodes[id].next)
        order[count++] = id;
    lec_policy_rebuild(&harness->view, harness->live_bits, harness->scratch);
    expect(lec_policy_check(&harness->view, NULL, NULL) == 0, "a rebuilt shard is sound");
    expect(order_is_kept(harness, order, count, LEC_LIST_PROBATION), "a rebuilt list keeps its order");
    destroy(harness);
}

/* As a death between two stores leaves it. */
static void rebuilding_keeps_the_order_on_both_sides_of_a_broken_link(void)
{
    struct harness *harness = create(MAX_ENTRIES * UNITS_MOST);
    struct lec_node *nodes = harness->view.nodes;
    uint32_t order[MAX_ENTRIES], count = 0;
    for (uint32_t i = 0; i < 20000; i++)
        step(harness);
    for (uint32_t id = harness->view.state->lists[2].head; id != LEC_NONE; id = nodes[id].next)
        order[count++] = id;
    expect(count > 2, "there is a list to break");
    uint32_t lost = count / 3u;         /* neither neighbour leads to it */
    nodes[order[lost - 1u]].next = MAX_ENTRIES + 1u;
    nodes[order[lost + 1u]].prev = MAX_ENTRIES + 1u;
    lec_policy_rebuild(&harness->view, harness->live_bits, harness->scratch);
    expect(lec_policy_check(&harness->view, NULL, NULL) == 0, "a shard rebuilt from a broken list is sound");
    uint32_t moved = order[lost];
    for (uint32_t at = lost; at + 1u < count; at++)
        order[at] = order[at + 1u];
    order[count - 1u] = moved;
    expect(order_is_kept(harness, order, count, LEC_LIST_PROBATION), "only the unreachable entry has lost its place");
    destroy(harness);
}

static void scribble(void *memory, size_t size, uint32_t bytes)
{
    for (uint32_t i = 0; i < bytes; i++)
        ((unsigned char *)memory)[draw((uint32_t)size)] = (unsigned char)draw(256);
}

/* Kernel and policy may disagree after damage, so any status will do; what counts is that every call returns. */
static void call_everything(struct harness *harness)
{
    uint32_t id = draw(MAX_ENTRIES + 8u), victim;
    lec_policy_victim(&harness->view, draw(2) ? LEC_NONE : id, &victim);
    lec_policy_evict(&harness->view, victim);
    lec_policy_insert(&harness->view, id);
    lec_policy_update(&harness->view, draw(MAX_ENTRIES + 8u), draw(UINT32_MAX));
    lec_policy_remove(&harness->view, draw(MAX_ENTRIES + 8u));
    lec_policy_frequency(&harness->view, draw(UINT32_MAX));
    expect(lec_policy_window_share(&harness->view) <= LEC_SHARE_ONE, "the window's share is a share");
}

static void damage(struct harness *harness)
{
    struct lec_policy_view *view = &harness->view;
    scribble(view->state, draw(2) ? sizeof *view->state : 64u, draw(400));
    scribble(view->nodes, MAX_ENTRIES * sizeof *view->nodes, draw(200));
    scribble(view->buckets, view->bucket_count * sizeof *view->buckets, draw(200));
    scribble(view->sketch, lec_policy_sketch_lines(MAX_ENTRIES) * 64u, draw(200));
}

/* What recovery knows for certain: which nodes are live, with sane units and slots. */
static void restore_facts(struct harness *harness)
{
    harness->live = harness->used_units = 0;
    for (uint32_t id = 0; id < MAX_ENTRIES; id++) {
        struct lec_node *node = &harness->view.nodes[id];
        if (!(harness->live_bits[id / 64u] >> (id % 64u) & 1u))
            continue;
        node->tag = tag_of(harness->key_of[id]);
        node->slot = id;
        node->units_list = (node->units_list & 0xc0000000u) | 1u;
        harness->live++;
        harness->used_units++;
    }
    harness->free_head = LEC_NONE;
    for (uint32_t id = 0; id < MAX_ENTRIES; id++)
        if (!(harness->live_bits[id / 64u] >> (id % 64u) & 1u)) {
            harness->view.nodes[id].slot = id;
            harness->view.nodes[id].next = harness->free_head;
            harness->free_head = id;
        }
}

static void any_damage_is_survived_and_repaired(void)
{
    struct harness *harness = create(MAX_ENTRIES * 4u);
    int sound = 1;
    for (uint32_t i = 0; i < 2000 && sound; i++) {
        for (uint32_t k = 0; k < 20; k++)
            sound = step(harness) == LEC_POLICY_OK && sound;
        damage(harness);
        for (uint32_t k = 0; k < 20; k++)
            call_everything(harness);
        lec_policy_check(&harness->view, NULL, NULL);
        restore_facts(harness);
        lec_policy_rebuild(&harness->view, harness->live_bits, harness->scratch);
        sound = sound && lec_policy_check(&harness->view, print_broken, "after rebuild") == 0;
    }
    expect(sound, "after any damage a rebuild makes the shard sound again");
    destroy(harness);
}

static void the_checker_complains(void)
{
    struct harness *harness = create(MAX_ENTRIES);
    for (uint32_t key = 0; key < 300; key++)
        set_absent(harness, key, 1);
    struct lec_policy_view *view = &harness->view;
    uint32_t id = view->nodes[view->state->lists[1].head].next;
    struct lec_node saved = view->nodes[id];
    view->nodes[id].prev = id;
    expect(lec_policy_check(view, NULL, NULL) > 0, "the checker sees a wrong link");
    view->nodes[id] = saved;
    view->nodes[id].units_list++;
    expect(lec_policy_check(view, NULL, NULL) > 0, "the checker sees wrong units");
    view->nodes[id] = saved;
    view->nodes[id].units_list ^= 3u << 30;
    expect(lec_policy_check(view, NULL, NULL) > 0, "the checker sees a wrong list");
    view->nodes[id] = saved;
    view->state->lists[2].entries++;
    expect(lec_policy_check(view, NULL, NULL) > 0, "the checker sees a wrong count");
    view->state->lists[2].entries--;
    view->nodes[MAX_ENTRIES - 1u].units_list = 1u | 3u << 30;
    expect(lec_policy_check(view, NULL, NULL) > 0, "the checker sees a node that is in no list");
    view->nodes[MAX_ENTRIES - 1u].units_list = 0;
    expect(lec_policy_check(view, NULL, NULL) == 0, "the checker is content with what is sound");
    destroy(harness);
}

static void misuse_is_refused(void)
{
    struct harness *harness = create(MAX_ENTRIES);
    set_absent(harness, 1, 1);
    expect(lec_policy_insert(&harness->view, harness->where[1]) == LEC_POLICY_DAMAGED, "inserting twice is refused");
    expect(lec_policy_remove(&harness->view, 500) == LEC_POLICY_DAMAGED, "removing a free node is refused");
    expect(lec_policy_remove(&harness->view, MAX_ENTRIES) == LEC_POLICY_DAMAGED, "removing no node is refused");
    destroy(harness);
}

int main(int argc, char **argv)
{
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
    random_state = mix(seed);
    steps_keep_invariants(MAX_ENTRIES * UNITS_MOST, "random steps, entries are scarce");
    steps_keep_invariants(MAX_ENTRIES * 8u, "random steps, units are scarce");
    an_empty_shard_has_no_victim();
    every_entry_can_be_evicted_but_the_protected();
    a_hunt_examines_a_bounded_number();
    an_insert_polls_a_bounded_number();
    a_newcomer_survives_its_own_insertion();
    counting_a_key_leaves_the_others_alone();
    the_sketch_counts_and_ages();
    the_window_shrinks_for_a_loop();
    a_loop_hits_where_memory_is_short_too();
    a_tie_goes_to_the_incumbent_where_memory_is_short();
    the_sketch_ages_by_the_entries_there_is_room_for();
    every_line_of_the_sketch_ages(100);
    every_line_of_the_sketch_ages(1);
    few_large_entries_are_contested_as_many_small_ones();
    large_values_that_pass_leave_small_ones_in_use();
    large_values_replace_small_ones_unless_they_are_in_use();
    an_incumbent_that_won_starts_over();
    a_loop_that_just_overflows_hits_for_the_most_part();
    the_race_knows_how_many_of_its_keys_are_live();
    a_round_of_polling_shows_each_live_key_once(1);
    a_round_of_polling_shows_each_live_key_once(3);
    a_round_of_polling_shows_each_live_key_once(40);
    polling_starts_anywhere();
    the_window_grows_for_recency();
    frequent_keys_are_known();
    rebuilding_a_sound_shard_changes_nothing();
    rebuilding_keeps_the_order_on_both_sides_of_a_broken_link();
    any_damage_is_survived_and_repaired();
    the_checker_complains();
    misuse_is_refused();
    if (!failures)
        printf("test_policy: passed (seed %llu)\n", (unsigned long long)seed);
    return failures != 0;
}
