/* Random operations against a plain table of what must be there; the kernel's checker runs after every step.
 *
 *   MODEL_SEED=n    MODEL_STEPS=n per configuration
 *
 * A key may be missing where the table has it only if the slab counted an eviction for it.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "chain.h"
#include "hash.h"
#include "reserve.h"
#include "room.h"
#include "support.h"

#define MAX_KEYS 4096u
#define NEVER UINT64_MAX

struct record {
    bool is_present, is_counter;
    uint32_t sequence;
    uint64_t bytes;
    int64_t number;                 /* of a counter */
    uint64_t expires_at;
    uint64_t tti_ns;                /* 0 = off */
    uint64_t surely_accessed, maybe_accessed;
    uint64_t version;               /* 0 = not known */
    uint64_t token;                 /* last one handed out; 0 = none, or used up */
    bool token_is_stale;
};

struct model {
    struct world world;
    struct random random;
    struct record *records;
    uint32_t keys, sequence;
    uint64_t lost;                  /* found missing, and not expired, in this life of the segment */
    uint64_t fills, steps, check_every;
    struct buffer buffer;
};

struct setup {
    const char *name;
    struct lec_config config;
    uint64_t spare_bytes;
    uint32_t keys, key_bytes_min, key_bytes_max;
    uint64_t value_bytes;           /* values are 0 .. this */
    uint64_t check_every;
    bool may_evict;
};

static const struct setup setups[] = {
    {"one entry", {.max_entries = 1, .max_value_bytes = 256}, 0, 4, 8, 8, 256, 1, true},
    {"evicts by entries", {.max_entries = 16, .max_value_bytes = 1024}, 65536, 40, 64, 64, 300, 1, true},
    {"evicts by bytes", {.max_entries = 300, .max_value_bytes = 4096}, 0, 200, 64, 64, 4096, 1, true},
    {"nothing to evict", {.max_entries = 64, .max_value_bytes = 4096}, 400000, 40, 64, 64, 4096, 1, false},
    {"keys of 4 to 1024 bytes", {.max_entries = 64, .max_value_bytes = 2048}, 8192, 80, 4, LEC_MAX_KEY, 2048, 1, true},
    {"large values", {.max_entries = 64, .max_value_bytes = 40000}, 8192, 40, 64, 64, 40000, 1, true},
    {"ttl", {.max_entries = 64, .max_value_bytes = 1024, .ttl_ns = 3 * SECOND}, 8192, 80, 64, 64, 1024, 1, true},
    {"ttl and tti", {.max_entries = 64, .max_value_bytes = 1024, .ttl_ns = 9 * SECOND, .tti_ns = 2 * SECOND}, 8192, 80, 64, 64, 1024, 1, true},
    {"several shards", {.max_entries = 40000, .max_value_bytes = 8192, .memory_bytes = 6u << 20}, 0, 4000, 64, 64, 8192, 997, true},
};

/* ---- what the table knows ---- */

static bool is_surely_dead(const struct model *model, const struct record *record)
{
    uint64_t now = model->world.now;
    if (!record->is_present || now >= record->expires_at) return true;
    return record->tti_ns && now >= record->maybe_accessed + record->tti_ns;
}

/* The idle stamp may be older than the last access by one granule (and is kept in whole milliseconds). */
static bool is_surely_alive(const struct model *model, const struct record *record)
{
    uint64_t granule = record->tti_ns / 16 < SECOND ? record->tti_ns / 16 : SECOND;
    if (is_surely_dead(model, record)) return false;
    return !record->tti_ns || model->world.now + granule + MILLISECOND < record->surely_accessed + record->tti_ns;
}

static void forget(struct record *record)
{
    record->is_present = false;
    record->version = 0;
}

static void lose(struct model *model, struct record *record)
{
    if (is_surely_alive(model, record)) model->lost++;
    forget(record);
}

static void remember(struct model *model, struct record *record, uint32_t sequence, uint64_t bytes, uint64_t ttl_ns)
{
    record->is_present = true;
    record->is_counter = false;
    record->sequence = sequence;
    record->bytes = bytes;
    record->version = 0;
    record->expires_at = ttl_ns ? model->world.now + ttl_ns : NEVER;
    record->tti_ns = model->world.config.tti_ns;
    record->surely_accessed = record->maybe_accessed = model->world.now;
    record->token_is_stale = true;
}

static void accessed(struct model *model, struct record *record, bool surely)
{
    record->maybe_accessed = model->world.now;
    if (surely) record->surely_accessed = model->world.now;
}

static void expect_value(struct model *model, uint32_t id, const struct record *record)
{
    char digits[24];
    REQUIRE(!is_surely_dead(model, record), "key %u outlived itself", id);
    if (record->is_counter) {
        int length = snprintf(digits, sizeof digits, "%lld", (long long)record->number);
        REQUIRE(model->buffer.bytes == (uint64_t)length && !memcmp(model->buffer.data, digits, (size_t)length), "counter %u is not %s", id, digits);
        return;
    }
    REQUIRE(model->buffer.bytes == record->bytes, "key %u has %llu bytes, not %llu", id, (unsigned long long)model->buffer.bytes,
            (unsigned long long)record->bytes);
    REQUIRE(value_is(model->buffer.data, record->bytes, id, record->sequence), "key %u has other bytes", id);
}

/* ---- one step of each kind ---- */

static void step_get(struct model *model, uint32_t id)
{
    struct record *record = &model->records[id];
    struct lec_read read = {.wants_token = true};
    enum lec_status status = get_id(&model->world, id, &model->buffer, &read);
    REQUIRE(status == LEC_OK || status == LEC_ABSENT, "get: %d", (int)status);
    record->token = read.token;
    record->token_is_stale = false;
    if (status == LEC_ABSENT) {
        lose(model, record);
        return;
    }
    expect_value(model, id, record);
    REQUIRE(!record->version || read.version == record->version, "the version of key %u changed by itself", id);
    REQUIRE(read.expires_at == record->expires_at, "key %u expires at another time", id);
    record->version = read.version;
    accessed(model, record, true);
}

static void step_contains(struct model *model, uint32_t id)
{
    struct record *record = &model->records[id];
    enum lec_status status = get_id(&model->world, id, NULL, NULL);
    REQUIRE(status == LEC_OK || status == LEC_ABSENT, "contains: %d", (int)status);
    if (status == LEC_ABSENT) lose(model, record);
    else REQUIRE(!is_surely_dead(model, record), "key %u outlived itself", id);
    if (status == LEC_OK) accessed(model, record, false);
}

static uint64_t some_ttl(struct model *model)
{
    return model->world.config.ttl_ns ? 1 + random_below(&model->random, 2 * model->world.config.ttl_ns) : 0;
}

static void step_store(struct model *model, uint32_t id, enum lec_mode mode, uint64_t expected, uint64_t bytes)
{
    struct record *record = &model->records[id];
    uint64_t ttl_ns = some_ttl(model);
    uint32_t sequence = ++model->sequence;
    bool is_too_large = bytes > model->world.config.max_value_bytes;
    enum lec_status status = store_id(&model->world, id, sequence, bytes, mode, expected, ttl_ns);
    if (status == LEC_OK) {
        REQUIRE(!is_too_large, "stored %llu bytes", (unsigned long long)bytes);
        REQUIRE(mode != LEC_ADD || !is_surely_alive(model, record) || ++model->lost, "unreachable");
        REQUIRE(mode != LEC_CAS || !is_surely_dead(model, record), "cas of a dead key");
        remember(model, record, sequence, bytes, ttl_ns);
        return;
    }
    if (status == LEC_REFUSED) {
        REQUIRE(is_too_large, "refused %llu bytes", (unsigned long long)bytes);
        forget(record);
        record->token_is_stale = true;
        return;
    }
    REQUIRE(status == (mode == LEC_ADD ? LEC_EXISTS : LEC_MISMATCH) && mode != LEC_SET, "store in mode %d: %d", (int)mode, (int)status);
    if (mode == LEC_ADD) REQUIRE(!is_surely_dead(model, record), "add found a dead key %u", id);
}

static void step_cas(struct model *model, uint32_t id, uint64_t bytes)
{
    struct record *record = &model->records[id];
    uint64_t version = record->version;
    bool is_right = version != 0 && random_below(&model->random, 3) > 0;
    uint32_t sequence = model->sequence + 1;
    if (!is_right) version = version + 1 + random_below(&model->random, 3);
    step_store(model, id, LEC_CAS, version, bytes);
    bool is_stored = record->is_present && record->sequence == sequence;
    REQUIRE(is_right || !is_stored, "cas with a wrong version stored key %u", id);
    if (is_right && !is_stored && bytes <= model->world.config.max_value_bytes) lose(model, record);
}

static void step_fill(struct model *model, uint32_t id, uint64_t bytes)
{
    struct record *record = &model->records[id];
    uint32_t sequence = model->sequence + 1;
    if (!record->token) return;
    bool was_stale = record->token_is_stale;
    step_store(model, id, LEC_FILL, record->token, bytes);
    bool is_stored = record->is_present && record->sequence == sequence;
    REQUIRE(!was_stale || !is_stored, "fill with a stale token stored key %u", id);
    model->fills += is_stored;
}

static void step_delete(struct model *model, uint32_t id)
{
    struct record *record = &model->records[id];
    uint8_t key[LARGEST_KEY];
    uint32_t key_bytes = key_make(&model->world, key, id);
    uint64_t version = random_below(&model->random, 4) == 0 ? record->version : 0;
    bool is_wrong = version && random_below(&model->random, 2);
    enum lec_status status = lec_delete(&model->world.handle, key, key_bytes, version + is_wrong, model->world.now, LOCK_TIMEOUT);
    REQUIRE(status == LEC_OK || status == LEC_ABSENT || (status == LEC_MISMATCH && is_wrong), "delete: %d", (int)status);
    if (status == LEC_OK) REQUIRE(!is_wrong && !is_surely_dead(model, record), "deleted key %u that was not there", id);
    if (status == LEC_ABSENT) lose(model, record);
    if (status != LEC_MISMATCH) {
        forget(record);
        record->token_is_stale = true;
    }
}

static void step_touch(struct model *model, uint32_t id)
{
    struct record *record = &model->records[id];
    uint8_t key[LARGEST_KEY];
    uint64_t ttl_ns = some_ttl(model);
    enum lec_status status = lec_touch(&model->world.handle, key, key_make(&model->world, key, id), ttl_ns, model->world.now, LOCK_TIMEOUT);
    REQUIRE(status == LEC_OK || status == LEC_ABSENT, "touch: %d", (int)status);
    if (status == LEC_ABSENT) {
        lose(model, record);
        return;
    }
    REQUIRE(!is_surely_dead(model, record), "touched a dead key %u", id);
    record->expires_at = ttl_ns ? model->world.now + ttl_ns : NEVER;
    record->version = 0;
    accessed(model, record, false);
}

static void step_new_counter(struct model *model, uint32_t id)
{
    struct record *record = &model->records[id];
    uint8_t key[LARGEST_KEY];
    char digits[24];
    static const int64_t starts[] = {0, 9, 99, -1, -100, INT64_MAX - 5, INT64_MIN + 5};
    int64_t number = starts[random_below(&model->random, sizeof starts / sizeof *starts)];
    int length = snprintf(digits, sizeof digits, "%lld", (long long)number);
    struct lec_store store = {.key = key, .value = digits, .value_bytes = (uint64_t)length, .key_bytes = key_make(&model->world, key, id),
                              .mode = LEC_SET, .tti_ns = model->world.config.tti_ns};
    enum lec_status status = lec_store(&model->world.handle, &store, model->world.now, LOCK_TIMEOUT);
    REQUIRE(status == LEC_OK, "set of a counter: %d", (int)status);
    remember(model, record, ++model->sequence, (uint64_t)length, 0);
    record->is_counter = true;
    record->number = number;
}

static void step_incr(struct model *model, uint32_t id)
{
    struct record *record = &model->records[id];
    uint8_t key[LARGEST_KEY];
    int64_t delta = (int64_t)random_below(&model->random, 7) - 3, result = 0, sum = 0;
    enum lec_status status = lec_incr(&model->world.handle, key, key_make(&model->world, key, id), delta, &result, model->world.now, LOCK_TIMEOUT);
    if (status == LEC_ABSENT) {
        lose(model, record);
        return;
    }
    REQUIRE(!is_surely_dead(model, record), "counted a dead key %u", id);
    if (!record->is_counter) {
        REQUIRE(status == LEC_NOT_A_NUMBER, "incr of no number: %d", (int)status);
        return;
    }
    bool overflows = __builtin_add_overflow(record->number, delta, &sum);
    REQUIRE(status == (overflows ? LEC_OVERFLOW : LEC_OK), "incr of %lld by %lld: %d", (long long)record->number, (long long)delta, (int)status);
    accessed(model, record, false);
    if (overflows) return;
    REQUIRE(result == sum, "incr says %lld, not %lld", (long long)result, (long long)sum);
    record->number = sum;
    record->version = 0;
    record->token_is_stale = true;
}

static void step_clear(struct model *model)
{
    struct lec_totals totals;
    REQUIRE(lec_clear(&model->world.handle, model->world.now, LOCK_TIMEOUT) == LEC_OK, "clear");
    world_totals(&model->world, &totals);
    REQUIRE(totals.entries == 0 && totals.payload_bytes == 0, "%llu entries after clear", (unsigned long long)totals.entries);
    for (uint32_t id = 0; id < model->keys; id++) {
        forget(&model->records[id]);
        model->records[id].token_is_stale = true;
    }
}

static void step_reattach(struct model *model)
{
    struct world *world = &model->world;
    lec_detach(&world->handle);
    memset(&world->handle, 0, sizeof world->handle);
    enum lec_status status = lec_attach(&world->handle, world->base, world->bytes, test_boot_id, lec_process_identity(getpid()), false);
    REQUIRE(status == LEC_OK, "attach: %d", (int)status);
}

/* ---- looking at everything ---- */

struct seen { struct model *model; uint32_t count; };

static void visit(void *context, const struct lec_info *info)
{
    struct seen *seen = context;
    uint32_t id;
    memcpy(&id, info->key + info->key_bytes - sizeof id, sizeof id);
    REQUIRE(id < seen->model->keys, "scan shows key %u", id);
    struct record *record = &seen->model->records[id];
    REQUIRE(!is_surely_dead(seen->model, record), "scan shows the dead key %u", id);
    REQUIRE(record->is_counter || info->value_bytes == record->bytes, "scan shows %u bytes for key %u", info->value_bytes, id);
    REQUIRE(info->expires_at == record->expires_at, "scan shows another expiry for key %u", id);
    seen->count++;
}

/* A scan of a segment at rest shows each live key once; get agrees with it. */
static void look_at_all(struct model *model)
{
    struct seen seen = {model, 0};
    uint32_t hits = 0;
    for (uint64_t cursor = 0; cursor != UINT64_MAX;)
        REQUIRE(lec_scan(&model->world.handle, &cursor, 7, model->world.now, visit, &seen) == LEC_OK, "scan");
    for (uint32_t id = 0; id < model->keys; id++) {
        step_get(model, id);
        hits += model->records[id].is_present;
    }
    REQUIRE(seen.count == hits, "scan shows %u keys, get finds %u", seen.count, hits);
}

static void expect_totals(struct model *model, const struct setup *setup)
{
    struct lec_totals totals;
    uint64_t present = 0, payload_bytes = 0;
    uint8_t key[LARGEST_KEY];
    world_totals(&model->world, &totals);
    REQUIRE(totals.entries <= setup->config.max_entries, "%llu entries", (unsigned long long)totals.entries);
    REQUIRE(model->lost <= totals.stats[LEC_STAT_EVICTIONS], "%llu keys lost, %llu evictions", (unsigned long long)model->lost,
            (unsigned long long)totals.stats[LEC_STAT_EVICTIONS]);
    REQUIRE(setup->may_evict || totals.stats[LEC_STAT_EVICTIONS] == 0, "evicted where there was room");
    REQUIRE(world_rebuilds(&model->world) == 0, "a shard was found damaged and rebuilt");
    look_at_all(model);
    for (uint32_t id = 0; id < model->keys; id++) {
        const struct record *record = &model->records[id];
        present += record->is_present;
        if (record->is_present) payload_bytes += key_make(&model->world, key, id) + (record->is_counter ? 0 : record->bytes);
    }
    world_totals(&model->world, &totals);
    REQUIRE(totals.entries >= present, "%llu entries counted, %llu found", (unsigned long long)totals.entries, (unsigned long long)present);
    REQUIRE(setup->config.ttl_ns || setup->config.tti_ns || totals.entries == present, "%llu entries counted, %llu found",
            (unsigned long long)totals.entries, (unsigned long long)present);
    REQUIRE(totals.payload_bytes >= payload_bytes, "payload bytes");
}

static void step(struct model *model, const struct setup *setup)
{
    uint32_t id = (uint32_t)random_below(&model->random, model->keys);
    uint64_t dice = random_below(&model->random, 1000);
    uint64_t bytes = random_below(&model->random, setup->value_bytes + 1);
    if (random_below(&model->random, 4)) bytes = bytes % 200;
    if (random_below(&model->random, 200) == 0) bytes = setup->config.max_value_bytes + random_below(&model->random, 2);
    context_set("%s: step %llu, key %u, dice %llu", setup->name, (unsigned long long)model->steps, id, (unsigned long long)dice);
    if (dice < 300) step_get(model, id);
    else if (dice < 340) step_contains(model, id);
    else if (dice < 600) step_store(model, id, LEC_SET, 0, bytes);
    else if (dice < 660) step_store(model, id, LEC_ADD, 0, bytes);
    else if (dice < 720) step_cas(model, id, bytes);
    else if (dice < 780) step_fill(model, id, bytes);
    else if (dice < 860) step_delete(model, id);
    else if (dice < 890) step_touch(model, id);
    else if (dice < 910) step_new_counter(model, id);
    else if (dice < 980) step_incr(model, id);
    else if (dice < 990) model->world.now += random_below(&model->random, SECOND);
    else if (dice < 992) step_clear(model);
    else if (dice < 994) step_reattach(model);
    else lec_reap(&model->world.handle, model->world.now, LOCK_TIMEOUT);
}

static void run(const struct setup *setup, uint64_t seed, uint64_t steps)
{
    struct model model = {.random = {seed}, .keys = setup->keys, .check_every = setup->check_every};
    world_create(&model.world, &setup->config, setup->spare_bytes);
    model.world.key_bytes_min = setup->key_bytes_min;
    model.world.key_bytes_max = setup->key_bytes_max;
    model.records = calloc(setup->keys, sizeof *model.records);
    REQUIRE(model.records, "no memory");
    for (; model.steps < steps; model.steps++) {
        step(&model, setup);
        if (model.steps % model.check_every == 0) REQUIRE(world_check(&model.world) == 0, "the checker complains");
        if (model.steps % 1000 == 999) expect_totals(&model, setup);
    }
    expect_totals(&model, setup);
    printf("%-26s %llu steps, %u shards, %llu keys evicted, %llu fills taken\n", setup->name, (unsigned long long)steps,
           model.world.handle.geometry.shard_count, (unsigned long long)model.lost, (unsigned long long)model.fills);
    REQUIRE(model.fills > 0, "no fill was ever taken");
    free(model.records);
    free(model.buffer.data);
    world_destroy(&model.world);
}

/* ---- keys that share a tag ---- */

#define CANDIDATES (1u << 19)

static int by_tag(const void *left, const void *right)
{
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

/* Sets both keys of a pair and takes them away again: neither may ever be taken for the other. */
static void expect_apart(struct world *world, uint32_t first, uint32_t second)
{
    struct buffer buffer = {0};
    context_set("keys %u and %u share a tag", first, second);
    REQUIRE(set_id(world, first, 1, 100) == LEC_OK, "set of the first");
    REQUIRE(get_id(world, second, &buffer, NULL) == LEC_ABSENT, "the second was never set");
    REQUIRE(delete_id(world, second) == LEC_ABSENT, "the second was never set");
    REQUIRE(set_id(world, second, 2, 100) == LEC_OK, "set of the second");
    REQUIRE(get_id(world, first, &buffer, NULL) == LEC_OK && value_is(buffer.data, buffer.bytes, first, 1), "the first");
    REQUIRE(get_id(world, second, &buffer, NULL) == LEC_OK && value_is(buffer.data, buffer.bytes, second, 2), "the second");
    REQUIRE(delete_id(world, first) == LEC_OK, "delete of the first");
    REQUIRE(get_id(world, second, &buffer, NULL) == LEC_OK && value_is(buffer.data, buffer.bytes, second, 2), "the second");
    REQUIRE(world_check(world) == 0, "the checker complains");
    REQUIRE(delete_id(world, second) == LEC_OK, "delete of the second");
    free(buffer.data);
}

/* The upper half of the hash and the key's number, sorted: neighbours with an equal upper half share a tag. */
static void keys_that_share_a_tag_are_told_apart(void)
{
    struct lec_config config = {.max_entries = 64, .max_value_bytes = 1024};
    struct world world;
    uint8_t key[LARGEST_KEY];
    uint32_t pairs = 0;
    uint64_t *tags = malloc(CANDIDATES * sizeof *tags);
    REQUIRE(tags, "no memory");
    world_create(&world, &config, 65536);
    for (uint32_t id = 0; id < CANDIDATES; id++) {
        uint32_t key_bytes = key_make(&world, key, id);
        tags[id] = (lec_hash(key, key_bytes, world.handle.seed) & UINT64_C(0xffffffff00000000)) | id;
    }
    qsort(tags, CANDIDATES, sizeof *tags, by_tag);
    for (uint32_t at = 1; at < CANDIDATES; at++)
        if (tags[at] >> 32 == tags[at - 1] >> 32) {
            expect_apart(&world, (uint32_t)tags[at - 1], (uint32_t)tags[at]);
            pairs++;
        }
    REQUIRE(pairs >= 4, "only %u pairs among %u keys", pairs, CANDIDATES);
    printf("%u pairs of keys with one tag told apart\n", pairs);
    free(tags);
    world_destroy(&world);
}

/* A fill under way in a shard that has room for four of the largest values. */
static void begin_fill(struct world *world, uint32_t value_bytes)
{
    struct lec_shard_view view;
    uint32_t unit, units;
    lec_shard_view(&world->handle, 0, world->now, &view);
    REQUIRE(lec_shard_lock(&view, 0) == LEC_OK, "the lock is free");
    REQUIRE(lec_room_take_locked(&view, 1u + value_bytes, LEC_NONE, &unit, &units) == LEC_OK, "room for a fill");
    lec_entry_at(&view.space, unit)->key_bytes = 1;
    lec_entry_at(&view.space, unit)->value_bytes = value_bytes;
    REQUIRE(lec_reservation_open_locked(&view, unit), "a reservation");
    lec_shard_unlock(&view);
}

static void the_value_to_be_replaced_makes_room_when_fills_hold_the_rest(void)
{
    struct lec_config config = {.max_entries = 64, .max_value_bytes = 100000};
    struct world world;
    world_create(&world, &config, 0);
    REQUIRE(set_id(&world, 1, 1, 100000) == LEC_OK, "first set");
    for (uint32_t fill = 0; fill < 3; fill++) begin_fill(&world, 100000);
    REQUIRE(set_id(&world, 1, 2, 100000) == LEC_OK, "its successor");
    REQUIRE(world_check(&world) == 0, "the checker complains");
    world_destroy(&world);
}

int main(void)
{
    uint64_t seed = setting("MODEL_SEED", 1), steps = setting("MODEL_STEPS", 20000), begun = wall_clock_ns();
    printf("test_model: seed %llu\n", (unsigned long long)seed);
    for (unsigned index = 0; index < sizeof setups / sizeof *setups; index++) run(&setups[index], seed + index, steps);
    keys_that_share_a_tag_are_told_apart();
    the_value_to_be_replaced_makes_room_when_fills_hold_the_rest();
    printf("test_model: done, %.1f s\n", (double)(wall_clock_ns() - begun) / 1e9);
    return 0;
}
