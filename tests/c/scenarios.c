/* See scenarios.h. */
#include "scenarios.h"

#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "killpoints.h"

/* ---- stages ---- */

static void put(struct world *world, struct stage *stage, uint32_t id, uint64_t bytes)
{
    enum lec_status status = set_id(world, id, OLD_SEQUENCE, bytes);
    REQUIRE(status == LEC_OK, "preparing key %u of %llu bytes: %d", id, (unsigned long long)bytes, (int)status);
    stage->old_bytes[id] = bytes;
}

static void drop(struct world *world, struct stage *stage, uint32_t id)
{
    REQUIRE(delete_id(world, id) == LEC_OK, "preparing: key %u", id);
    stage->old_bytes[id] = NO_VALUE;
}

static void stage_begin(struct stage *stage, uint32_t ids)
{
    memset(stage, 0, sizeof *stage);
    stage->ids = ids;
    for (uint32_t id = 0; id < MAX_IDS; id++) stage->old_bytes[id] = NO_VALUE;
}

/* A value that fills its entry's last unit: the end of a free run there would lie on its last bytes. */
#define FULL_UNITS(units) ((units) * LEC_UNIT - sizeof(struct lec_entry) - 64)

/* Ten keys of several sizes and room for more. Key 10 is new, key 4 is the one to overwrite. */
static void ten_keys(struct world *world, struct stage *stage)
{
    stage_begin(stage, 12);
    for (uint32_t id = 0; id < 10; id++) put(world, stage, id, id == 4 ? FULL_UNITS(8) : 40 + id * 90);
    stage->target = 10;
    stage->new_bytes = 500;
}

static void overwrite_same(struct world *world, struct stage *stage)
{
    ten_keys(world, stage);
    stage->target = 4;
    stage->new_bytes = stage->old_bytes[4];
}

static void overwrite_larger(struct world *world, struct stage *stage)
{
    overwrite_same(world, stage);
    stage->new_bytes = 2100;
}

static void overwrite_smaller(struct world *world, struct stage *stage)
{
    overwrite_same(world, stage);
    stage->new_bytes = 9;
}

/* Where another set evicts: as many keys as the segment takes. */
static void full_of(struct world *world, struct stage *stage, uint64_t bytes)
{
    struct lec_totals totals;
    stage_begin(stage, 0);
    for (uint32_t id = 0; id < MAX_IDS - 2; id++) {
        put(world, stage, id, bytes);
        world_totals(world, &totals);
        stage->ids = id + 2;
        if (totals.stats[LEC_STAT_EVICTIONS] > 0) break;
    }
    REQUIRE(totals.stats[LEC_STAT_EVICTIONS] > 0, "never full: %llu entries", (unsigned long long)totals.entries);
    stage->target = stage->ids - 1;
    for (uint32_t id = 0; id < stage->ids; id++)        /* the one that was evicted is not expected back */
        if (get_id(world, id, NULL, NULL) == LEC_ABSENT) stage->old_bytes[id] = NO_VALUE;
}

static void full_by_entries(struct world *world, struct stage *stage)
{
    full_of(world, stage, 100);
    stage->new_bytes = 120;
}

static void full_by_bytes(struct world *world, struct stage *stage)
{
    full_of(world, stage, 200);
    stage->new_bytes = 4000;
}

static void full_large(struct world *world, struct stage *stage)
{
    full_of(world, stage, 1500);
    stage->new_bytes = 12000;
}

static const struct lec_bucket *buckets_in(const struct world *world, const uint8_t *base)
{
    return (const struct lec_bucket *)(const void *)(base + world->handle.geometry.shards + world->handle.geometry.buckets);
}

/* Entries that lie in more than one piece. */
static uint32_t chained_entries(const struct world *world)
{
    uint32_t chained = 0;
    const struct lec_bucket *buckets = buckets_in(world, world->base);
    const uint8_t *arena = world->base + world->handle.geometry.shards + world->handle.geometry.arena;
    for (uint32_t slot = 0; slot < world->handle.geometry.bucket_count * LEC_SLOTS_PER_BUCKET; slot++) {
        uint64_t word = buckets[slot / LEC_SLOTS_PER_BUCKET].slots[slot % LEC_SLOTS_PER_BUCKET];
        const struct lec_entry *entry = (const void *)(arena + (uint64_t)((uint32_t)word - 1) * LEC_UNIT);
        chained += word != 0 && entry->next != LEC_NONE;
    }
    return chained;
}

/* Free units enough, but in runs of a few: the next large entry is chained. */
static void in_pieces(struct world *world, struct stage *stage)
{
    full_of(world, stage, 200);
    for (uint32_t id = 0; id < stage->ids; id += 2)
        if (stage->old_bytes[id] != NO_VALUE) drop(world, stage, id);
    stage->new_bytes = 3000;
    world_save(world);
    REQUIRE(set_id(world, stage->target, NEW_SEQUENCE, stage->new_bytes) == LEC_OK && chained_entries(world) == 1, "the entry is not chained");
    world_restore(world);
}

static void chained_entry(struct world *world, struct stage *stage)
{
    in_pieces(world, stage);
    put(world, stage, stage->target, 3000);
}

/* ---- stages that need a look into the index ---- */

static uint64_t overflow_sum(const struct world *world, const uint8_t *base)
{
    uint64_t sum = 0;
    for (uint32_t bucket = 0; bucket < world->handle.geometry.bucket_count; bucket++)
        sum += buckets_in(world, base)[bucket].control & 255;
    return sum;
}

/* Slots that held an entry in the image and hold another or none now: a set of a new key changes one only by moving it. */
static uint32_t residents_moved(const struct world *world)
{
    const struct lec_bucket *before = buckets_in(world, world->image), *after = buckets_in(world, world->base);
    uint32_t moved = 0;
    for (uint32_t bucket = 0; bucket < world->handle.geometry.bucket_count; bucket++)
        for (uint32_t slot = 0; slot < LEC_SLOTS_PER_BUCKET; slot++)
            moved += before[bucket].slots[slot] != 0 && before[bucket].slots[slot] != after[bucket].slots[slot];
    return moved;
}

/* Adds keys until the set of the next one would spill into its alternate bucket, or, if `moving`, move a resident. */
static void crowded(struct world *world, struct stage *stage, bool moving)
{
    stage_begin(stage, 2);
    for (uint32_t id = 0; id < MAX_IDS - 2; id++) {
        world_save(world);
        uint64_t overflow = overflow_sum(world, world->base);
        REQUIRE(set_id(world, id, NEW_SEQUENCE, 30) == LEC_OK, "key %u", id);
        bool is_wanted = moving ? residents_moved(world) > 0 : overflow_sum(world, world->base) > overflow;
        world_restore(world);
        stage->target = id;
        stage->ids = id + 1;
        stage->new_bytes = 30;
        if (is_wanted) return;
        put(world, stage, id, 30);
    }
    REQUIRE(false, "no key spilled: %u buckets", world->handle.geometry.bucket_count);
}

static void about_to_overflow(struct world *world, struct stage *stage) { crowded(world, stage, false); }
static void about_to_move(struct world *world, struct stage *stage) { crowded(world, stage, true); }

static void overflowed_entry(struct world *world, struct stage *stage)
{
    crowded(world, stage, false);
    put(world, stage, stage->target, 30);
}

/* ---- stages with versions, tokens, time and the dead ---- */

static void with_version(struct world *world, struct stage *stage)
{
    struct lec_read read = {0};
    overwrite_same(world, stage);
    REQUIRE(get_id(world, stage->target, NULL, &read) == LEC_OK, "key %u", stage->target);
    stage->expected = read.version;
}

static void with_token(struct world *world, struct stage *stage)
{
    struct lec_read read = {.wants_token = true};
    ten_keys(world, stage);
    REQUIRE(get_id(world, stage->target, NULL, &read) == LEC_ABSENT, "key %u", stage->target);
    stage->expected = read.token;
}

static void with_counter(struct world *world, struct stage *stage)
{
    uint8_t key[LARGEST_KEY];
    ten_keys(world, stage);
    stage->target_is_counter = true;
    stage->old_bytes[10] = strlen(COUNTER_OLD);
    struct lec_store store = {.key = key, .value = COUNTER_OLD, .value_bytes = strlen(COUNTER_OLD),
                              .key_bytes = key_make(world, key, 10), .mode = LEC_SET};
    REQUIRE(lec_store(&world->handle, &store, world->now, LOCK_TIMEOUT) == LEC_OK, "the counter");
}

/* Six of ten keys are past their time. */
static void with_expired(struct world *world, struct stage *stage)
{
    ten_keys(world, stage);
    for (uint32_t id = 0; id < 6; id++)
        REQUIRE(store_id(world, id, OLD_SEQUENCE, stage->old_bytes[id], LEC_SET, 0, SECOND) == LEC_OK, "key %u", id);
    stage->expires_below = 6;
    world->now += 2 * SECOND;
}

static void overwrite_expired(struct world *world, struct stage *stage)
{
    with_expired(world, stage);
    stage->target = 2;
}

/* Somebody has cleared; nobody has swept. */
static void after_clear(struct world *world, struct stage *stage)
{
    ten_keys(world, stage);
    atomic_fetch_add(&world->handle.header->state, 1);
    for (uint32_t id = 0; id < 10; id++) stage->old_bytes[id] = NO_VALUE;
    stage->leave_unchecked = true;
}

/* A process that counted some reads and then died at point `at` of filling a large value; 0: right after counting. */
static void dead_process(struct world *world, uint64_t at)
{
    pid_t child = fork();
    int how;
    if (child == 0) {
        world_enter_child(world);
        lec_count_read(&world->handle, 5, 3);
        if (at == 0) kill(getpid(), SIGKILL);
        points_arm(POINTS_KILL, at, false);
        (void)set_id(world, 11, NEW_SEQUENCE, 12000);
        _exit(0);
    }
    REQUIRE(waitpid(child, &how, 0) == child && WIFSIGNALED(how), "the child filled its value: status %d", how);
}

/* One dead process's record is to be adopted, the other's reservation to be reaped first. */
static void with_dead_processes(struct world *world, struct stage *stage)
{
    ten_keys(world, stage);
    stage->target = ABSENT_ID;
    dead_process(world, 900);                           /* of some 1,500 words of the value */
    dead_process(world, 0);
    stage->leave_unchecked = true;
}

static void for_reading(struct world *world, struct stage *stage)
{
    ten_keys(world, stage);
    stage->target = ABSENT_ID;
    world->now += 3 * SECOND;                           /* one granule of the TTI stamp has passed */
}

/* ---- calls ---- */

static enum lec_status act_set(struct world *world, const struct stage *stage)
{
    return set_id(world, stage->target, NEW_SEQUENCE, stage->new_bytes);
}

static enum lec_status act_add(struct world *world, const struct stage *stage)
{
    return store_id(world, stage->target, NEW_SEQUENCE, stage->new_bytes, LEC_ADD, 0, 0);
}

static enum lec_status act_cas(struct world *world, const struct stage *stage)
{
    return store_id(world, stage->target, NEW_SEQUENCE, stage->new_bytes, LEC_CAS, stage->expected, 0);
}

static enum lec_status act_fill(struct world *world, const struct stage *stage)
{
    return store_id(world, stage->target, NEW_SEQUENCE, stage->new_bytes, LEC_FILL, stage->expected, 0);
}

static enum lec_status act_incr(struct world *world, const struct stage *stage)
{
    uint8_t key[LARGEST_KEY];
    int64_t sum;
    return lec_incr(&world->handle, key, key_make(world, key, stage->target), 1000, &sum, world->now, LOCK_TIMEOUT);
}

static enum lec_status act_touch(struct world *world, const struct stage *stage)
{
    uint8_t key[LARGEST_KEY];
    return lec_touch(&world->handle, key, key_make(world, key, stage->target), 77 * SECOND, world->now, LOCK_TIMEOUT);
}

static enum lec_status act_delete(struct world *world, const struct stage *stage) { return delete_id(world, stage->target); }

static enum lec_status act_clear(struct world *world, const struct stage *stage)
{
    (void)stage;
    return lec_clear(&world->handle, world->now, LOCK_TIMEOUT);
}

static enum lec_status act_reap(struct world *world, const struct stage *stage)
{
    (void)stage;
    lec_reap(&world->handle, world->now, LOCK_TIMEOUT);
    return LEC_OK;
}

static enum lec_status act_attach(struct world *world, const struct stage *stage)
{
    struct lec_handle handle;
    (void)stage;
    memset(&handle, 0, sizeof handle);
    return lec_attach(&handle, world->base, world->bytes, test_boot_id, lec_process_identity(getpid()), false);
}

static enum lec_status act_detach(struct world *world, const struct stage *stage)
{
    (void)stage;
    lec_detach(&world->handle);
    return LEC_OK;
}

static enum lec_status act_retire(struct world *world, const struct stage *stage)
{
    (void)stage;
    lec_retire(&world->handle, 1);
    return LEC_OK;
}

/* Everything a reader does, once per key. */
static enum lec_status act_read(struct world *world, const struct stage *stage)
{
    struct buffer buffer = {0};
    struct lec_read read = {.wants_token = true};
    for (uint32_t id = 0; id < stage->ids; id++)
        lec_count_read(&world->handle, get_id(world, id, &buffer, &read) == LEC_OK, 0);
    free(buffer.data);
    return LEC_OK;
}

static enum lec_status join_target(struct world *world, uint64_t lease_ns, enum lec_role expected, struct lec_ticket *ticket)
{
    uint8_t key[LARGEST_KEY];
    enum lec_role role;
    enum lec_status status = lec_flight_join(&world->handle, key, key_make(world, key, ABSENT_ID), lease_ns, world->now, LOCK_TIMEOUT, &role, ticket);
    return status == LEC_OK && role != expected ? LEC_MISMATCH : status;
}

static void for_flying(struct world *world, struct stage *stage)
{
    ten_keys(world, stage);
    stage->target = ABSENT_ID;
}

/* Somebody leads the key's flight, and is past its deadline. */
static void with_spent_flight(struct world *world, struct stage *stage)
{
    struct lec_ticket ticket;
    for_flying(world, stage);
    REQUIRE(join_target(world, SECOND, LEC_FLIGHT_LED, &ticket) == LEC_OK, "preparing the flight");
    world->now += 2 * SECOND;
}

/* All that a leader does; each call fails if an earlier one did not do what it says. */
static enum lec_status fly(struct world *world, enum lec_role expected)
{
    struct lec_ticket ticket;
    enum lec_status status = join_target(world, SECOND, expected, &ticket);
    if (status == LEC_OK) status = lec_flight_renew(&world->handle, ticket, 2 * SECOND, world->now, LOCK_TIMEOUT);
    if (status == LEC_OK) status = lec_flight_advance(&world->handle, ticket, 7, world->now, LOCK_TIMEOUT);
    if (status == LEC_OK && lec_flight_wait(&world->handle, ticket, 7, world->now, 1) != 7) status = LEC_DAMAGED;
    return status == LEC_OK ? lec_flight_end(&world->handle, ticket, world->now, LOCK_TIMEOUT) : status;
}

static enum lec_status act_fly(struct world *world, const struct stage *stage)
{
    (void)stage;
    return fly(world, LEC_FLIGHT_LED);
}

static enum lec_status act_take_over(struct world *world, const struct stage *stage)
{
    (void)stage;
    return fly(world, LEC_FLIGHT_TAKEN_OVER);
}

static enum lec_status act_count(struct world *world, const struct stage *stage)
{
    (void)stage;
    bool is_counted = lec_count(&world->handle, 5, 1) && lec_observe(&world->handle, 1, 300);
    return is_counted ? LEC_OK : LEC_DAMAGED;
}

static void visit_nothing(void *context, const struct lec_info *info) { (void)context; (void)info; }

static enum lec_status act_look_around(struct world *world, const struct stage *stage)
{
    struct lec_totals totals;
    (void)stage;
    for (uint64_t cursor = 0; cursor != UINT64_MAX;)
        if (lec_scan(&world->handle, &cursor, 16, world->now, visit_nothing, NULL) != LEC_OK) break;
    struct buffer buffer = {0};
    struct lec_info info;
    for (uint64_t cursor = 0; cursor != UINT64_MAX;)
        if (lec_scan_entry(&world->handle, &cursor, world->now, buffer_take, &buffer, &info) == LEC_RETIRED) break;
    free(buffer.data);
    uint64_t events[world->handle.geometry.sample_count + 1];
    struct lec_sample_mark marks[world->handle.geometry.mark_count + 1];
    struct lec_samples_copy copy = {.events = events, .marks = marks};
    REQUIRE(lec_samples_of(&world->handle, 0, &copy), "shard 0 has samples");
    world_totals(world, &totals);
    REQUIRE(world_check(world) == 0, "a sound segment");
    return LEC_OK;
}

/* ---- the table ---- */

#define ROOMY {.max_entries = 64, .max_value_bytes = 4096}
#define FEW {.max_entries = 20, .max_value_bytes = 4096}
#define MANY {.max_entries = 400, .max_value_bytes = 4096}
#define LARGE {.max_entries = 64, .max_value_bytes = 16384}
#define IDLE {.max_entries = 64, .max_value_bytes = 4096, .tti_ns = 20 * SECOND}
#define SPARE 32768

const struct scenario scenarios[] = {
    {"set a new key", ROOMY, SPARE, ten_keys, act_set, IS_NEW | IS_MISSING, IS_NEW},
    {"overwrite, same size", ROOMY, SPARE, overwrite_same, act_set, IS_OLD | IS_NEW | IS_MISSING, IS_NEW},
    {"overwrite, larger", ROOMY, SPARE, overwrite_larger, act_set, IS_OLD | IS_NEW | IS_MISSING, IS_NEW},
    {"overwrite, smaller", ROOMY, SPARE, overwrite_smaller, act_set, IS_OLD | IS_NEW | IS_MISSING, IS_NEW},
    {"set, evicting one", FEW, SPARE, full_by_entries, act_set, IS_NEW | IS_MISSING | OTHERS_MAY_GO, IS_NEW | OTHERS_MAY_GO},
    {"set, evicting many", MANY, 0, full_by_bytes, act_set, IS_NEW | IS_MISSING | OTHERS_MAY_GO, IS_NEW | OTHERS_MAY_GO},
    {"set into the alternate bucket", ROOMY, SPARE, about_to_overflow, act_set, IS_NEW | IS_MISSING, IS_NEW},
    {"set, moving a resident", MANY, 4 * SPARE, about_to_move, act_set, IS_NEW | IS_MISSING, IS_NEW},
    {"set, chained", MANY, 0, in_pieces, act_set, IS_NEW | IS_MISSING, IS_NEW},
    {"delete, chained", MANY, 0, chained_entry, act_delete, IS_OLD | IS_MISSING, IS_MISSING},
    {"overwrite, chained", MANY, 0, chained_entry, act_set, IS_OLD | IS_NEW | IS_MISSING, IS_NEW},
    {"delete from the alternate bucket", ROOMY, SPARE, overflowed_entry, act_delete, IS_OLD | IS_MISSING, IS_MISSING},
    {"set a large value", LARGE, SPARE, full_large, act_set, IS_NEW | IS_MISSING | OTHERS_MAY_GO, IS_NEW | OTHERS_MAY_GO},
    {"add", ROOMY, SPARE, ten_keys, act_add, IS_NEW | IS_MISSING, IS_NEW},
    {"cas", ROOMY, SPARE, with_version, act_cas, IS_OLD | IS_NEW | IS_MISSING, IS_NEW},
    {"fill", ROOMY, SPARE, with_token, act_fill, IS_NEW | IS_MISSING, IS_NEW},
    {"incr", ROOMY, SPARE, with_counter, act_incr, IS_OLD | IS_NEW | IS_MISSING, IS_NEW},
    {"touch", ROOMY, SPARE, overwrite_same, act_touch, IS_OLD, IS_OLD},
    {"delete", ROOMY, SPARE, overwrite_same, act_delete, IS_OLD | IS_MISSING, IS_MISSING},
    {"set among expired keys", ROOMY, SPARE, with_expired, act_set, IS_NEW | IS_MISSING, IS_NEW},
    {"overwrite an expired key", ROOMY, SPARE, overwrite_expired, act_set, IS_NEW | IS_MISSING, IS_NEW},
    {"clear", ROOMY, SPARE, ten_keys, act_clear, IS_MISSING | ALL_OR_NONE, IS_MISSING | ALL_OR_NONE},
    {"first set after a clear", ROOMY, SPARE, after_clear, act_set, IS_NEW | IS_MISSING, IS_NEW},
    {"attach", LARGE, SPARE, with_dead_processes, act_attach, IS_MISSING, IS_MISSING},
    {"reap", LARGE, SPARE, with_dead_processes, act_reap, IS_MISSING, IS_MISSING},
    {"fly", ROOMY, SPARE, for_flying, act_fly, IS_MISSING, IS_MISSING},
    {"take a flight over", ROOMY, SPARE, with_spent_flight, act_take_over, IS_MISSING, IS_MISSING},
    {"count", ROOMY, SPARE, for_flying, act_count, IS_MISSING, IS_MISSING},
    {"detach", ROOMY, SPARE, for_reading, act_detach, IS_MISSING, IS_MISSING},
    {"retire", ROOMY, SPARE, for_reading, act_retire, IS_MISSING | MAY_RETIRE, IS_MISSING | MAY_RETIRE},
    {"read", IDLE, SPARE, for_reading, act_read, IS_MISSING, IS_MISSING},
    {"scan, totals, check", ROOMY, SPARE, for_reading, act_look_around, IS_MISSING, IS_MISSING},
};
const unsigned scenario_count = sizeof scenarios / sizeof *scenarios;
