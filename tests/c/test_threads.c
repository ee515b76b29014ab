/* Threads on one segment: every value read must be whole, of the right key, and not older than the last completed
 * write of that key. Built with ThreadSanitizer, AddressSanitizer and plain.
 *
 *   THREADS_SECONDS=n (default 3)    THREADS_SEED=n
 */
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#include "support.h"

#define WRITERS 2u
#define READERS 2u
#define KEYS 96u                    /* key id belongs to writer id % WRITERS: its sequence numbers only grow */
#define COUNTER_ID 5000u
#define CAS_ID 5001u
#define ADD_ID 6000u

static struct world world;
static _Atomic bool stop;
static uint64_t seed;
static _Atomic uint32_t begun[KEYS];        /* sequence of the newest operation that may be visible */
static _Atomic uint32_t completed[KEYS];    /* no value older than this one may be read any more */
static _Atomic uint64_t hits, misses, counted, swapped, cleared, checked, scanned, added;

static uint64_t value_size(uint32_t id, uint32_t sequence)
{
    uint64_t dice = mix64((uint64_t)id << 32 | sequence);
    if (dice % 64 == 0) return 9000 + dice / 64 % 4000;     /* through a reservation */
    if (dice % 64 < 16) return (3 + dice / 64 % 20) * LEC_UNIT - sizeof(struct lec_entry) - 64;    /* fills its last unit */
    return 8 + dice / 64 % 1500;
}

/* The number is visible as "may be read" before the call and as "must be read, or newer" after it. */
static void write_one(uint32_t id, uint32_t sequence, bool is_delete)
{
    atomic_store(&begun[id], sequence);
    enum lec_status status = is_delete ? delete_id(&world, id) : set_id(&world, id, sequence, value_size(id, sequence));
    REQUIRE(status == LEC_OK || (is_delete && status == LEC_ABSENT) || status == LEC_REFUSED, "writing key %u: %d", id, (int)status);
    atomic_store(&completed[id], sequence);
}

static void *writer(void *argument)
{
    uint32_t number = (uint32_t)(uintptr_t)argument;
    struct random random = {seed + number};
    for (uint32_t sequence = 1; !atomic_load(&stop); sequence++) {
        uint32_t id = (uint32_t)random_below(&random, KEYS / WRITERS) * WRITERS + number;
        write_one(id, sequence, random_below(&random, 8) == 0);
    }
    return NULL;
}

static void expect_fresh(uint32_t id, const struct buffer *buffer, uint32_t oldest)
{
    uint32_t sequence;
    REQUIRE(value_sequence(buffer->data, buffer->bytes, id, &sequence), "torn or foreign bytes under key %u", id);
    REQUIRE(buffer->bytes == value_size(id, sequence), "key %u: %llu bytes", id, (unsigned long long)buffer->bytes);
    REQUIRE(sequence >= oldest, "key %u: read write %u after write %u was complete", id, sequence, oldest);
    REQUIRE(sequence <= atomic_load(&begun[id]), "key %u: read write %u before it began", id, sequence);
}

static void *reader(void *argument)
{
    struct random random = {seed + 100 + (uintptr_t)argument};
    struct buffer buffer = {0};
    while (!atomic_load(&stop)) {
        uint32_t id = (uint32_t)random_below(&random, KEYS);
        uint32_t oldest = atomic_load(&completed[id]);
        enum lec_status status = get_id(&world, id, &buffer, NULL);
        REQUIRE(status == LEC_OK || status == LEC_ABSENT, "get: %d", (int)status);
        if (status == LEC_OK) expect_fresh(id, &buffer, oldest);
        atomic_fetch_add(status == LEC_OK ? &hits : &misses, 1);
        lec_count_read(&world.handle, status == LEC_OK, status != LEC_OK);
    }
    free(buffer.data);
    return NULL;
}

/* ---- read-modify-write ---- */

static void start_number(uint32_t id)
{
    uint8_t key[LARGEST_KEY];
    struct lec_store store = {.key = key, .value = "0", .value_bytes = 1, .key_bytes = key_make(&world, key, id), .mode = LEC_ADD};
    enum lec_status status = lec_store(&world.handle, &store, world.now, LOCK_TIMEOUT);
    REQUIRE(status == LEC_OK || status == LEC_EXISTS, "add of the number: %d", (int)status);
}

/* Evicted and cleared like any other key; sums_come_out_exactly() looks at the numbers. */
static void *counter(void *argument)
{
    uint8_t key[LARGEST_KEY];
    uint32_t key_bytes = key_make(&world, key, COUNTER_ID);
    (void)argument;
    while (!atomic_load(&stop)) {
        int64_t sum;
        enum lec_status status = lec_incr(&world.handle, key, key_bytes, 1, &sum, world.now, LOCK_TIMEOUT);
        REQUIRE(status == LEC_OK || status == LEC_ABSENT, "incr: %d", (int)status);
        if (status == LEC_ABSENT) start_number(COUNTER_ID);
        else atomic_fetch_add(&counted, 1);
    }
    return NULL;
}

/* ---- those who look at everything ---- */

static void visit(void *context, const struct lec_info *info)
{
    uint32_t id;
    (void)context;
    REQUIRE(info->key_bytes == 64, "scan: a key of %u bytes", info->key_bytes);
    memcpy(&id, info->key + 60, sizeof id);
    REQUIRE(id < KEYS || id == COUNTER_ID || id == CAS_ID || id >= ADD_ID, "scan: key %u", id);
}

/* Each value belongs to the key that it was scanned with, and is whole. */
static void scan_values(struct buffer *buffer)
{
    for (uint64_t cursor = 0; cursor != UINT64_MAX;) {
        struct lec_info info;
        uint32_t id, sequence;
        enum lec_status status = lec_scan_entry(&world.handle, &cursor, world.now, buffer_take, buffer, &info);
        REQUIRE(status == LEC_OK || status == LEC_ABSENT, "scan of values: %d", (int)status);
        if (status != LEC_OK) continue;
        visit(NULL, &info);
        memcpy(&id, info.key + 60, sizeof id);
        REQUIRE(info.value_bytes == buffer->bytes, "scan: %u bytes, %llu copied", info.value_bytes, (unsigned long long)buffer->bytes);
        if (id < KEYS) REQUIRE(value_sequence(buffer->data, buffer->bytes, id, &sequence), "scan: a torn value of key %u", id);
        atomic_fetch_add(&scanned, 1);
    }
}

static void *onlooker(void *argument)
{
    struct lec_totals totals;
    struct buffer buffer = {0};
    (void)argument;
    while (!atomic_load(&stop)) {
        for (uint64_t cursor = 0; cursor != UINT64_MAX;)
            REQUIRE(lec_scan(&world.handle, &cursor, 16, world.now, visit, NULL) == LEC_OK, "scan");
        scan_values(&buffer);
        REQUIRE(world_check(&world) == 0, "the checker complains");
        world_totals(&world, &totals);
        REQUIRE(totals.entries <= world.config.max_entries, "%llu entries", (unsigned long long)totals.entries);
        atomic_fetch_add(&checked, 1);
        usleep(500);
    }
    free(buffer.data);
    return NULL;
}

static void *clearer(void *argument)
{
    uint32_t before[KEYS];
    (void)argument;
    while (!atomic_load(&stop)) {
        usleep(20000);
        for (uint32_t id = 0; id < KEYS; id++) before[id] = atomic_load(&completed[id]);
        atomic_fetch_add(&cleared, 1);
        REQUIRE(lec_clear(&world.handle, world.now, LOCK_TIMEOUT) == LEC_OK, "clear");
        for (uint32_t id = 0; id < KEYS; id++) {
            struct buffer buffer = {0};
            if (get_id(&world, id, &buffer, NULL) == LEC_OK) expect_fresh(id, &buffer, before[id] + 1);
            free(buffer.data);
        }
    }
    return NULL;
}

static void run_together(void)
{
    struct { void *(*body)(void *); uintptr_t argument; } roles[] = {
        {writer, 0}, {writer, 1}, {reader, 0}, {reader, 1}, {counter, 0}, {counter, 1}, {onlooker, 0}, {clearer, 0},
    };
    enum { ROLES = sizeof roles / sizeof *roles };
    pthread_t threads[ROLES];
    for (unsigned index = 0; index < ROLES; index++)
        REQUIRE(pthread_create(&threads[index], NULL, roles[index].body, (void *)roles[index].argument) == 0, "thread");
    usleep((useconds_t)(setting("THREADS_SECONDS", 3) * 1000000));
    atomic_store(&stop, true);
    for (unsigned index = 0; index < ROLES; index++) pthread_join(threads[index], NULL);
    REQUIRE(world_check(&world) == 0, "at the end");
}

/* ---- exact sums, where nothing evicts or clears ---- */

#define ROUNDS 2000u

static void *adder(void *argument)
{
    uint8_t key[LARGEST_KEY];
    uint32_t key_bytes = key_make(&world, key, COUNTER_ID);
    int64_t sum;
    (void)argument;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        REQUIRE(lec_incr(&world.handle, key, key_bytes, 1, &sum, world.now, LOCK_TIMEOUT) == LEC_OK, "incr");
        /* Every round's key is won by exactly one thread. */
        if (store_id(&world, ADD_ID + round % 32, round, 100, LEC_ADD, 0, 0) == LEC_OK) {
            atomic_fetch_add(&added, 1);
            REQUIRE(delete_id(&world, ADD_ID + round % 32) == LEC_OK, "only the winner deletes");
            atomic_fetch_sub(&added, 1);
        }
    }
    return NULL;
}

static void *swapper(void *argument)
{
    struct buffer buffer = {0};
    struct lec_read read = {0};
    (void)argument;
    for (uint32_t round = 0; round < ROUNDS;) {
        uint32_t sequence;
        REQUIRE(get_id(&world, CAS_ID, &buffer, &read) == LEC_OK, "gets");
        REQUIRE(value_sequence(buffer.data, buffer.bytes, CAS_ID, &sequence), "torn");
        enum lec_status status = store_id(&world, CAS_ID, sequence + 1, 64, LEC_CAS, read.version, 0);
        REQUIRE(status == LEC_OK || status == LEC_MISMATCH, "cas: %d", (int)status);
        round += status == LEC_OK;
        atomic_fetch_add(&swapped, status == LEC_OK);
    }
    free(buffer.data);
    return NULL;
}

static void sums_come_out_exactly(void)
{
    struct lec_config config = {.max_entries = 200, .max_value_bytes = 4096};
    void *(*bodies[])(void *) = {adder, adder, swapper, swapper};
    pthread_t threads[4];
    struct buffer buffer = {0};
    char digits[24];
    uint32_t sequence;
    context_set("sums come out exactly");
    world_create(&world, &config, 300000);
    world.handle.concurrent = true;
    start_number(COUNTER_ID);
    REQUIRE(set_id(&world, CAS_ID, 0, 64) == LEC_OK, "set");
    for (unsigned index = 0; index < 4; index++) REQUIRE(pthread_create(&threads[index], NULL, bodies[index], NULL) == 0, "thread");
    for (unsigned index = 0; index < 4; index++) pthread_join(threads[index], NULL);
    int length = snprintf(digits, sizeof digits, "%u", 2 * ROUNDS);
    REQUIRE(get_id(&world, COUNTER_ID, &buffer, NULL) == LEC_OK && buffer.bytes == (uint64_t)length && !memcmp(buffer.data, digits, (size_t)length), "the counter is not %s", digits);
    REQUIRE(get_id(&world, CAS_ID, &buffer, NULL) == LEC_OK && value_sequence(buffer.data, buffer.bytes, CAS_ID, &sequence) && sequence == 2 * ROUNDS, "%u swaps arrived", sequence);
    REQUIRE(atomic_load(&added) == 0, "two threads won one add");
    REQUIRE(world_check(&world) == 0, "the checker complains");
    free(buffer.data);
    world_destroy(&world);
}

int main(void)
{
    struct lec_config config = {.max_entries = 64, .max_value_bytes = 16384};
    seed = setting("THREADS_SEED", 1);
    printf("test_threads: seed %llu\n", (unsigned long long)seed);
    sums_come_out_exactly();
    context_set("readers, writers, deleters, clear, scan and check together");
    world_create(&world, &config, 0);
    world.handle.concurrent = true;
    run_together();
    printf("test_threads: %llu hits, %llu misses, %llu counted, %llu clears, %llu checks\n", (unsigned long long)hits,
           (unsigned long long)misses, (unsigned long long)counted, (unsigned long long)cleared, (unsigned long long)checked);
    REQUIRE(scanned > 0, "no value was scanned");
    REQUIRE(hits > 0 && misses > 0 && cleared > 0 && checked > 0, "not everybody had a turn");
    world_destroy(&world);
    return 0;
}
