/* The ring of samples: what it records, what of it is read, and that any content of it is safe to read and to replay;
 * and the miniatures that replay it. The seed is the first argument (default 1) and is printed.
 */
#include <pthread.h>
#include <string.h>

#include "access.h"
#include "miniature.h"
#include "shard.h"
#include "support.h"

#define EVENTS 200u
#define MARKS 3u

static struct random rng;

/* ---- numbers ---- */

static void codes_are_ordered_and_close(void)
{
    uint32_t last = 0;
    for (uint64_t value = 0; value < UINT64_C(1) << 36; value += value / 300 + 1) {
        uint32_t code = lec_sample_code(value);
        uint64_t back = lec_sample_value(code);
        REQUIRE(code >= last && code < LEC_SAMPLE_FOREVER, "%llu has code %u", (unsigned long long)value, code);
        REQUIRE(code == LEC_SAMPLE_FOREVER - 1 || (back <= value && value - back <= value / 128), "%llu came back as %llu",
                (unsigned long long)value, (unsigned long long)back);
        last = code;
    }
    REQUIRE(lec_sample_value(lec_sample_code(127)) == 127, "small numbers are exact");
    REQUIRE(lec_sample_code(UINT64_MAX) == LEC_SAMPLE_FOREVER - 1, "the largest one is not for ever");
}

static void rings_fit_their_memory(void)
{
    for (uint64_t bytes = 0; bytes < 600000; bytes += 1 + random_below(&rng, 500)) {
        uint32_t events = lec_samples_for(bytes), marks = lec_sample_marks_for(events);
        REQUIRE(events == 0 || (events >= LEC_SAMPLES_LEAST && events <= LEC_SAMPLES_MOST), "%u events", events);
        REQUIRE(events * sizeof(uint64_t) + marks * sizeof(struct lec_sample_mark) <= bytes, "%u events in %llu bytes", events,
                (unsigned long long)bytes);
    }
    REQUIRE(lec_samples_for(UINT64_C(1) << 40) == LEC_SAMPLES_MOST, "a ring has a largest size");
}

/* ---- a ring by itself ---- */

struct ring {
    struct lec_samples state;
    uint64_t events[EVENTS], copied_events[EVENTS];
    struct lec_sample_mark marks[MARKS], copied_marks[MARKS];
    struct lec_samples_view view;
};

static void ring_create(struct ring *ring)
{
    memset(ring, 0, sizeof *ring);
    ring->view = (struct lec_samples_view){&ring->state, ring->events, ring->marks, EVENTS, MARKS};
}

static struct lec_samples_copy ring_read(struct ring *ring)
{
    struct lec_samples_copy copy = {.events = ring->copied_events, .marks = ring->copied_marks};
    lec_samples_read(&ring->view, &copy);
    REQUIRE(copy.event_count <= EVENTS && copy.mark_count <= MARKS, "a copy fits");
    return copy;
}

static void note(struct ring *ring, uint32_t hash)
{
    if (lec_samples_want_mark(&ring->view)) lec_samples_mark(&ring->view, &(struct lec_sample_mark){.hits = hash});
    lec_samples_note(&ring->view, &(struct lec_sample){hash, 2, 17, LEC_SAMPLE_HIT, 5 * SECOND});
}

static void a_ring_keeps_the_last_events_and_their_marks(void)
{
    struct ring ring;
    ring_create(&ring);
    REQUIRE(lec_samples_want_mark(&ring.view), "a mark comes before the first event");
    for (uint32_t number = 0; number < 1000; number++) {
        note(&ring, number);
        struct lec_samples_copy copy = ring_read(&ring);
        REQUIRE(copy.first + copy.event_count == number + 1, "the last event is there");
        REQUIRE(copy.event_count == (number + 1 < EVENTS ? number + 1 : EVENTS - 1), "%u events after %u", copy.event_count, number);
        for (uint32_t at = 0; at < copy.event_count; at++) {
            struct lec_sample sample = lec_sample_of(copy.events[at]);
            REQUIRE(sample.hash == copy.first + at && sample.hits == 2 && sample.units == 17 && sample.kind == LEC_SAMPLE_HIT, "event %u", at);
            REQUIRE(sample.left_ns <= 5 * SECOND && sample.left_ns > 5 * SECOND / 100 * 99, "the time that is left");
        }
        REQUIRE(copy.mark_count >= 1 && copy.marks[copy.mark_count - 1].number == number / LEC_SAMPLES_PER_MARK * LEC_SAMPLES_PER_MARK,
                "the last mark is of event %llu", (unsigned long long)copy.marks[copy.mark_count - 1].number);
        for (uint32_t at = 0; at < copy.mark_count; at++) REQUIRE(copy.marks[at].hits == copy.marks[at].number, "a mark is whole");
    }
}

static void an_empty_shard_begins_anew(void)
{
    struct ring ring;
    ring_create(&ring);
    for (uint32_t number = 0; number < 10; number++) note(&ring, number);
    lec_samples_restart(&ring.view);
    REQUIRE(ring_read(&ring).begun == 10, "what was before does not count");
    REQUIRE(lec_samples_want_mark(&ring.view), "a mark comes before the first event");
    REQUIRE(lec_samples_are_sound(&ring.view), "sound");
}

static void what_is_no_ring_is_left_alone(void)
{
    struct ring ring;
    ring_create(&ring);
    ring.view.event_count = ring.view.mark_count = 0;
    for (uint32_t number = 0; number < 3; number++) note(&ring, number);
    REQUIRE(!lec_samples_want_mark(&ring.view), "no marks are asked for");
    REQUIRE(lec_samples_are_sound(&ring.view) && ring_read(&ring).event_count == 0, "nothing is there");
    REQUIRE(ring.events[0] == 0 && ring.marks[0].hits == 0, "nothing was stored");
}

/* Damage of any kind is seen or harmless; once repaired, events come in and out again. */
static void damage_is_repaired(void)
{
    struct ring ring;
    ring_create(&ring);
    for (uint32_t round = 0; round < 20000; round++) {
        uint64_t *words[] = {&ring.state.written, &ring.state.begun, &ring.state.marked, &ring.state.mark_due};
        *words[random_below(&rng, 4)] = random_below(&rng, 2) ? random_next(&rng) : random_next(&rng) >> random_below(&rng, 64);
        (void)ring_read(&ring);
        note(&ring, round);
        (void)ring_read(&ring);
        lec_samples_repair(&ring.view);
        REQUIRE(lec_samples_are_sound(&ring.view), "sound after a repair");
        note(&ring, round);
        struct lec_samples_copy copy = ring_read(&ring);
        REQUIRE(copy.event_count && lec_sample_of(copy.events[copy.event_count - 1]).hash == round, "the event after a repair is there");
    }
    ring.state.begun = ring.state.written + 1;
    REQUIRE(!lec_samples_are_sound(&ring.view), "the checker sees a beginning after the end");
}

/* One thread writes and another one reads: what was overwritten meanwhile is left out, and nothing else is. It goes on
 * until that has happened often enough: on one core only where the reader loses it in the middle of a copy. */
static struct ring shared_ring;
static _Atomic bool is_over;
#define OVERWRITTEN_COPIES 50u
#define COPIES_MOST 20000000u

static void *write_on(void *unused)
{
    for (uint32_t number = 0; !is_over; number++) note(&shared_ring, number);
    return unused;
}

static void what_is_overwritten_meanwhile_is_left_out(void)
{
    pthread_t writer;
    uint32_t overwritten = 0, copies = 0;
    ring_create(&shared_ring);
    REQUIRE(pthread_create(&writer, NULL, write_on, NULL) == 0, "a thread");
    for (; overwritten < OVERWRITTEN_COPIES && copies < COPIES_MOST; copies++) {
        struct lec_samples_copy copy = ring_read(&shared_ring);
        overwritten += copy.first > 0 && copy.event_count < EVENTS - 1;
        for (uint32_t at = 0; at < copy.event_count; at++)
            REQUIRE(lec_sample_of(copy.events[at]).hash == (uint32_t)(copy.first + at), "event %u of %u", at, copy.event_count);
        for (uint32_t at = 0; at < copy.mark_count; at++) REQUIRE((uint32_t)copy.marks[at].hits == (uint32_t)copy.marks[at].number, "a mark is whole");
    }
    is_over = true;
    REQUIRE(pthread_join(writer, NULL) == 0, "the thread ends");
    REQUIRE(overwritten == OVERWRITTEN_COPIES, "only %u of %u copies were overwritten", overwritten, copies);
}

/* ---- in a segment ---- */

static struct world world;
static struct lec_samples_copy world_copy;

static void world_begin(void)
{
    /* All keys of a cache this small are sampled. */
    world_create(&world, &(struct lec_config){.max_entries = 50, .max_value_bytes = 4096}, 100000);
    world_copy.events = calloc(world.handle.geometry.sample_count, sizeof *world_copy.events);
    world_copy.marks = calloc(world.handle.geometry.mark_count, sizeof *world_copy.marks);
    REQUIRE(world.handle.geometry.sample_count >= LEC_SAMPLES_LEAST, "there is a ring");
    REQUIRE(world.handle.geometry.sample_count * 8 + world.handle.geometry.mark_count * sizeof *world_copy.marks <= world.bytes / 100,
            "it takes 1 %% at most");
}

static void world_end(void)
{
    REQUIRE(world_check(&world) == 0, "a sound segment");
    free(world_copy.events);
    free(world_copy.marks);
    world_destroy(&world);
}

static uint32_t count_kind(enum lec_sample_kind kind)
{
    uint32_t count = 0;
    REQUIRE(lec_samples_of(&world.handle, 0, &world_copy), "there is a shard 0");
    for (uint32_t at = 0; at < world_copy.event_count; at++) count += lec_sample_of(world_copy.events[at]).kind == kind;
    return count;
}

static void what_happens_to_keys_is_recorded(void)
{
    world_begin();
    for (uint32_t id = 0; id < 40; id++) REQUIRE(set_id(&world, id, 1, 300) == LEC_OK, "set");
    REQUIRE(count_kind(LEC_SAMPLE_INSERT) == 40, "every insert is an event");
    struct lec_sample first = lec_sample_of(world_copy.events[0]);
    REQUIRE(first.units == lec_node_units(&(struct lec_node){.units_list = first.units}) && first.units >= 5, "its size in units");
    REQUIRE(first.left_ns == UINT64_MAX, "it never expires");
    REQUIRE(set_id(&world, 7, 2, 300) == LEC_OK && count_kind(LEC_SAMPLE_INSERT) == 40, "a replaced value is none");
    REQUIRE(delete_id(&world, 8) == LEC_OK && count_kind(LEC_SAMPLE_GONE) == 1, "a deleted key is an event");
    struct lec_read read = {0};
    struct buffer buffer = {0};
    for (uint32_t id = 20; id < 25; id++) REQUIRE(get_id(&world, id, &buffer, &read) == LEC_OK, "get");
    REQUIRE(count_kind(LEC_SAMPLE_HIT) == 0, "a read stores no event");
    for (uint32_t id = 100; id < 150; id++) REQUIRE(set_id(&world, id, 1, 300) == LEC_OK, "set");
    REQUIRE(count_kind(LEC_SAMPLE_HIT) >= 5, "later inserts find the hits");
    REQUIRE(store_id(&world, 200, 1, 300, LEC_SET, 0, 10 * SECOND) == LEC_OK, "set with a ttl");
    (void)count_kind(LEC_SAMPLE_INSERT);
    struct lec_sample last = {0};
    for (uint32_t at = 0; at < world_copy.event_count; at++)
        if (lec_sample_of(world_copy.events[at]).left_ns != UINT64_MAX) last = lec_sample_of(world_copy.events[at]);
    REQUIRE(last.kind == LEC_SAMPLE_INSERT && last.left_ns > 9 * SECOND && last.left_ns <= 10 * SECOND, "the time it has left");
    REQUIRE(!lec_samples_of(&world.handle, 1, &world_copy), "there is no other shard");
    free(buffer.data);
    world_end();
}

static void marks_tell_what_was_looked_up(void)
{
    world_begin();
    lec_count_read(&world.handle, 3, 4);
    lec_count(&world.handle, LEC_COUNTER_HITS, 5);
    lec_count(&world.handle, LEC_COUNTER_MISSES, 6);
    REQUIRE(set_id(&world, 1, 1, 300) == LEC_OK, "set");
    REQUIRE(lec_samples_of(&world.handle, 0, &world_copy) && world_copy.mark_count == 1, "the first event has a mark");
    struct lec_sample_mark mark = world_copy.marks[0];
    REQUIRE(mark.number == 0 && mark.at_ns == world.now && mark.threshold == UINT32_MAX, "the mark's moment");
    REQUIRE(mark.hits == 3 && mark.misses == 4 && mark.counted_hits == 5 && mark.counted_misses == 6, "the mark's sums");
    REQUIRE(lec_clear(&world.handle, world.now, LOCK_TIMEOUT) == LEC_OK && set_id(&world, 2, 1, 300) == LEC_OK, "clear and set");
    REQUIRE(lec_samples_of(&world.handle, 0, &world_copy) && world_copy.begun == 1 && world_copy.mark_count == 2, "a clear begins anew");
    world_end();
}

static void reading_needs_no_lock_and_stores_nothing(void)
{
    world_begin();
    struct lec_shard_view view;
    for (uint32_t id = 0; id < 80; id++) REQUIRE(set_id(&world, id, 1, 300) == LEC_OK, "set");
    lec_shard_view(&world.handle, 0, world.now, &view);
    REQUIRE(lec_shard_lock(&view, LOCK_TIMEOUT) == LEC_OK, "the lock");
    uint8_t *before = malloc(world.bytes);
    memcpy(before, world.base, world.bytes);
    REQUIRE(count_kind(LEC_SAMPLE_INSERT) > 0, "read while another one has the lock");
    REQUIRE(memcmp(before, world.base, world.bytes) == 0, "nothing was stored");
    free(before);
    lec_shard_unlock(&view);
    world_end();
}

static void the_checker_sees_damage_and_repairs_it(void)
{
    world_begin();
    struct lec_shard_view view;
    REQUIRE(set_id(&world, 1, 1, 300) == LEC_OK, "set");
    lec_shard_view(&world.handle, 0, world.now, &view);
    view.shard->samples.begun = UINT64_MAX;
    REQUIRE(lec_check(&world.handle, world.now, LOCK_TIMEOUT, NULL, NULL) == 1, "one finding");
    world_end();
}

/* ---- miniatures ---- */

static void *miniature_create(struct lec_miniature *miniature, uint32_t entries, uint32_t units, uint64_t tti_ns)
{
    void *memory = aligned_alloc(LEC_LINE, lec_miniature_bytes(entries));
    REQUIRE(memory, "memory");
    lec_miniature_create(miniature, memory, (struct lec_miniature_size){entries, units}, tti_ns, random_next(&rng));
    return memory;
}

static uint64_t event(uint32_t hash, enum lec_sample_kind kind, uint32_t units, uint32_t left)
{
    return (uint64_t)hash << 32 | (uint32_t)kind << (2 * LEC_SAMPLE_CODE_BITS) | units << LEC_SAMPLE_CODE_BITS | left;
}

static void a_miniature_holds_what_fits(void)
{
    struct lec_miniature miniature;
    void *memory = miniature_create(&miniature, 100, 1000, 0);
    for (uint32_t round = 0; round < 10; round++)
        for (uint32_t key = 0; key < 100; key++) {
            enum lec_outcome outcome = lec_miniature_replay(&miniature, event(key * 977, LEC_SAMPLE_HIT, 1, LEC_SAMPLE_FOREVER), round);
            REQUIRE(outcome == (round ? LEC_OUTCOME_HIT : LEC_OUTCOME_MISS), "key %u in round %u", key, round);
        }
    REQUIRE(lec_miniature_replay(&miniature, event(977, LEC_SAMPLE_GONE, 1, 0), 11) == LEC_OUTCOME_NONE, "a key that goes is no request");
    REQUIRE(miniature.entries == 99, "and is gone");
    (void)lec_miniature_replay(&miniature, event(5000, LEC_SAMPLE_INSERT, lec_sample_code(4000), LEC_SAMPLE_FOREVER), 11);
    REQUIRE(miniature.entries == 99, "what is larger than the cache displaces nobody");
    for (uint32_t key = 1000; key < 1020; key++) (void)lec_miniature_replay(&miniature, event(key, LEC_SAMPLE_INSERT, 100, LEC_SAMPLE_FOREVER), 12);
    REQUIRE(miniature.units <= 1000 && miniature.entries < 100, "units are a limit as well");
    free(memory);
}

static void what_expires_is_a_miss(void)
{
    struct lec_miniature miniature;
    void *memory = miniature_create(&miniature, 100, 1000, 3 * SECOND);
    (void)lec_miniature_replay(&miniature, event(1, LEC_SAMPLE_INSERT, 1, lec_sample_code(2000)), 0);
    (void)lec_miniature_replay(&miniature, event(2, LEC_SAMPLE_INSERT, 1, LEC_SAMPLE_FOREVER), 0);
    REQUIRE(lec_miniature_replay(&miniature, event(1, LEC_SAMPLE_HIT, 1, lec_sample_code(2000)), SECOND) == LEC_OUTCOME_HIT, "alive");
    REQUIRE(lec_miniature_replay(&miniature, event(1, LEC_SAMPLE_HIT, 1, lec_sample_code(2000)), 2 * SECOND) == LEC_OUTCOME_MISS, "expired");
    REQUIRE(lec_miniature_replay(&miniature, event(2, LEC_SAMPLE_HIT, 1, LEC_SAMPLE_FOREVER), 3 * SECOND) == LEC_OUTCOME_MISS, "idle for too long");
    REQUIRE(lec_miniature_replay(&miniature, event(1, LEC_SAMPLE_HIT, 1, 1), 3 * SECOND) == LEC_OUTCOME_HIT, "the miss gave it a new life");
    free(memory);
}

static void any_events_can_be_replayed(void)
{
    struct lec_miniature miniature;
    for (uint32_t round = 0; round < 60; round++) {
        uint32_t entries = 1 + (uint32_t)random_below(&rng, 200), units = 1 + (uint32_t)random_below(&rng, 5000);
        void *memory = miniature_create(&miniature, entries, units, random_below(&rng, 2) ? 0 : random_next(&rng));
        for (uint32_t step = 0; step < 3000; step++) {
            uint64_t word = random_next(&rng) & (random_below(&rng, 2) ? UINT64_MAX : UINT64_C(0x1ff07ff0ffff));
            (void)lec_miniature_replay(&miniature, word, random_below(&rng, 2) ? step * SECOND : random_next(&rng));
            REQUIRE(miniature.entries <= entries && miniature.units <= units, "more than fits, round %u step %u", round, step);
        }
        REQUIRE(lec_policy_check(&miniature.policy, NULL, NULL) == 0, "the policy is sound");
        free(memory);
    }
}

int main(int count, char **arguments)
{
    rng.state = count > 1 ? strtoull(arguments[1], NULL, 10) : 1;
    printf("seed %llu\n", (unsigned long long)rng.state);
    codes_are_ordered_and_close();
    rings_fit_their_memory();
    a_ring_keeps_the_last_events_and_their_marks();
    an_empty_shard_begins_anew();
    what_is_no_ring_is_left_alone();
    damage_is_repaired();
    what_is_overwritten_meanwhile_is_left_out();
    what_happens_to_keys_is_recorded();
    marks_tell_what_was_looked_up();
    reading_needs_no_lock_and_stores_nothing();
    the_checker_sees_damage_and_repairs_it();
    a_miniature_holds_what_fits();
    what_expires_is_a_miss();
    any_events_can_be_replayed();
    puts("ok");
    return 0;
}
