/* What a call stores to shared memory, counted: reads leave no trace but in the process's own record (and one stamp
 * per key and granule with TTI), and no call's work grows with the size of the slab. */
#include <string.h>

#include "crashing.h"

static struct { const struct world *world; uint64_t own, foreign, first_foreign; } stores;

static void sort_store(void *context, uint64_t offset, uint64_t bytes)
{
    const struct world *world = context;
    uint64_t record = (uint64_t)((const uint8_t *)world->handle.process - world->base);
    (void)bytes;
    if (offset - record < sizeof(struct lec_process)) {
        stores.own++;
        return;
    }
    if (stores.foreign++ == 0) stores.first_foreign = offset;
}

static void listen(struct world *world)
{
    memset(&stores, 0, sizeof stores);
    points_watch(world->base, world->bytes);
    points_listen(sort_store, world);
}

static void hit(struct world *world, uint32_t id, struct buffer *buffer)
{
    enum lec_status status = get_id(world, id, buffer, NULL);
    REQUIRE(status == LEC_OK, "get of %u: %d", id, (int)status);
    lec_count_read(&world->handle, 1, 0);
}

static void a_hot_key_is_read_without_a_trace(void)
{
    struct lec_config config = {.max_entries = 64, .max_value_bytes = 16384};
    struct world world;
    struct buffer buffer = {0};
    context_set("a hot key is read without a trace");
    world_create(&world, &config, 65536);
    for (uint32_t id = 0; id < 20; id++) REQUIRE(set_id(&world, id, 1, id == 7 ? 12000 : 100 + id) == LEC_OK, "key %u", id);
    for (uint32_t round = 0; round <= LEC_TOUCH_MAX; round++)
        for (uint32_t id = 0; id < 20; id++) hit(&world, id, &buffer);
    listen(&world);
    for (uint32_t round = 0; round < 1000; round++) hit(&world, round % 20, &buffer);
    REQUIRE(stores.foreign == 0, "%llu stores outside the own record, the first at offset %llu", (unsigned long long)stores.foreign,
            (unsigned long long)stores.first_foreign);
    REQUIRE(stores.own == 1000, "%llu stores to the own record for 1000 hits", (unsigned long long)stores.own);
    printf("hot hits: %llu stores to the own record, %llu elsewhere\n", (unsigned long long)stores.own, (unsigned long long)stores.foreign);
    points_listen(NULL, NULL);
    free(buffer.data);
    world_destroy(&world);
}

static void a_scan_with_values_leaves_no_trace_at_all(void)
{
    struct lec_config config = {.max_entries = 64, .max_value_bytes = 16384, .tti_ns = SECOND};
    struct world world;
    struct buffer buffer = {0};
    struct lec_info info;
    uint32_t found = 0;
    context_set("a scan with values leaves no trace at all");
    world_create(&world, &config, 65536);
    for (uint32_t id = 0; id < 20; id++) REQUIRE(set_id(&world, id, 1, id == 7 ? 12000 : 100 + id) == LEC_OK, "key %u", id);
    listen(&world);
    for (uint64_t cursor = 0; cursor != UINT64_MAX;)
        found += lec_scan_entry(&world.handle, &cursor, world.now, buffer_take, &buffer, &info) == LEC_OK;
    REQUIRE(found == 20, "%u entries of 20", found);
    REQUIRE(stores.foreign == 0 && stores.own == 0, "%llu stores", (unsigned long long)(stores.foreign + stores.own));
    points_listen(NULL, NULL);
    free(buffer.data);
    world_destroy(&world);
}

/* A buffer for one value; while it is asked for, the entry is deleted and its memory written over with others. */
struct reuser { struct buffer buffer; struct world *world; uint32_t next; };

static void *take_and_reuse(void *context, uint64_t bytes)
{
    struct reuser *reuser = context;
    if (bytes > 0 && reuser->next < 10000) {
        (void)delete_id(reuser->world, 0);
        for (uint32_t end = reuser->next + 300; reuser->next < end; reuser->next++) (void)set_id(reuser->world, 100 + reuser->next, 1, 1000);
    }
    return buffer_take(&reuser->buffer, bytes);
}

static void a_value_whose_memory_is_reused_while_it_is_scanned_is_thrown_away(void)
{
    struct lec_config config = {.max_entries = 64, .max_value_bytes = 4096};
    struct world world;
    struct lec_info info;
    uint32_t id, sequence;
    context_set("a value whose memory is reused while it is scanned is thrown away");
    for (uint32_t bytes = 500; bytes <= 3000; bytes += 500) {
        world_create(&world, &config, 16384);
        REQUIRE(set_id(&world, 0, 1, bytes) == LEC_OK, "set");
        struct reuser reuser = {.world = &world};
        for (uint64_t cursor = 0; cursor != UINT64_MAX;) {
            if (lec_scan_entry(&world.handle, &cursor, world.now, take_and_reuse, &reuser, &info) != LEC_OK) continue;
            memcpy(&id, info.key + 60, sizeof id);
            REQUIRE(value_sequence(reuser.buffer.data, reuser.buffer.bytes, id, &sequence), "key %u with another's value", id);
        }
        REQUIRE(reuser.next > 0, "nothing was reused");
        free(reuser.buffer.data);
        world_destroy(&world);
    }
}

static void the_first_hits_of_a_key_store_a_few_touches(void)
{
    struct lec_config config = {.max_entries = 64, .max_value_bytes = 4096};
    struct world world;
    struct buffer buffer = {0};
    context_set("the first hits of a key store a few touches");
    world_create(&world, &config, 65536);
    REQUIRE(set_id(&world, 1, 1, 100) == LEC_OK, "set");
    listen(&world);
    for (uint32_t round = 0; round < 100; round++) hit(&world, 1, &buffer);
    REQUIRE(stores.foreign > 0 && stores.foreign <= LEC_TOUCH_MAX, "%llu touches", (unsigned long long)stores.foreign);
    points_listen(NULL, NULL);
    free(buffer.data);
    world_destroy(&world);
}

static void a_miss_stores_nothing_at_all(void)
{
    struct lec_config config = {.max_entries = 64, .max_value_bytes = 4096};
    struct world world;
    struct lec_read read = {.wants_token = true};
    context_set("a miss stores nothing at all");
    world_create(&world, &config, 65536);
    listen(&world);
    for (uint32_t id = 0; id < 100; id++) REQUIRE(get_id(&world, id, NULL, &read) == LEC_ABSENT, "key %u", id);
    REQUIRE(stores.foreign + stores.own == 0, "%llu stores", (unsigned long long)(stores.foreign + stores.own));
    points_listen(NULL, NULL);
    world_destroy(&world);
}

static void idle_time_costs_one_word_per_key_and_granule(void)
{
    struct lec_config config = {.max_entries = 64, .max_value_bytes = 4096, .tti_ns = 160 * SECOND};
    struct world world;
    struct buffer buffer = {0};
    context_set("idle time costs one word per key and granule");
    world_create(&world, &config, 65536);
    for (uint32_t id = 0; id < 10; id++) REQUIRE(set_id(&world, id, 1, 100) == LEC_OK, "set");
    for (uint32_t round = 0; round < 10u * (LEC_TOUCH_MAX + 1); round++) hit(&world, round % 10, &buffer);
    for (uint32_t granule = 0; granule < 20; granule++) {
        world.now += SECOND + MILLISECOND;      /* min(1 s, tti / 16) */
        listen(&world);
        for (uint32_t round = 0; round < 1000; round++) {
            world.now += 10000;                 /* 10 ms in all */
            hit(&world, round % 10, &buffer);
        }
        REQUIRE(stores.foreign == 10, "%llu stores for 10 keys in one granule", (unsigned long long)stores.foreign);
    }
    points_listen(NULL, NULL);
    free(buffer.data);
    world_destroy(&world);
}

/* ---- bounded work ---- */

static uint64_t most_stores(struct world *world, uint32_t rounds, uint64_t bytes, struct random *random, uint64_t *mean)
{
    uint64_t most = 0, all = 0;
    for (uint32_t round = 0; round < rounds; round++) {
        uint32_t id = (uint32_t)random_below(random, 4u * world->config.max_entries);
        points_reset();
        enum lec_status status = set_id(world, id, round, bytes ? bytes : 1 + random_below(random, 4000));
        REQUIRE(status == LEC_OK, "set: %d", (int)status);
        if (points_stores() > most) most = points_stores();
        all += points_stores();
        if (round % 3 == 0) (void)get_id(world, id / 2, NULL, NULL);
    }
    *mean = all / rounds;
    return most;
}

#define MOST_STORES 2000u

/* The same load on segments 16 times apart in size: what one set stores at most must not grow with them. */
static void a_set_at_capacity_stores_a_bounded_number_of_words(void)
{
    static const uint32_t sizes[] = {256, 4096};
    uint64_t most[2], mean[2];
    struct random random = {7};
    context_set("a set at capacity stores a bounded number of words");
    for (unsigned index = 0; index < 2; index++) {
        struct lec_config config = {.max_entries = sizes[index], .max_value_bytes = 4096};
        struct world world;
        world_create(&world, &config, sizes[index] * 320u);
        points_watch(world.base, world.bytes);
        (void)most_stores(&world, 6 * sizes[index], 256, &random, &mean[index]);
        most[index] = most_stores(&world, 3 * sizes[index], 256, &random, &mean[index]);
        printf("set of 256 bytes into %u entries: at most %llu stores, %llu on average\n", sizes[index],
               (unsigned long long)most[index], (unsigned long long)mean[index]);
        world_destroy(&world);
    }
    REQUIRE(most[0] < MOST_STORES && most[1] < MOST_STORES, "a set stored %llu and %llu words", (unsigned long long)most[0], (unsigned long long)most[1]);
    REQUIRE(most[1] < 2 * most[0] + 200, "%llu stores with 4096 entries, %llu with 256", (unsigned long long)most[1], (unsigned long long)most[0]);
}

int main(void)
{
    a_hot_key_is_read_without_a_trace();
    a_scan_with_values_leaves_no_trace_at_all();
    a_value_whose_memory_is_reused_while_it_is_scanned_is_thrown_away();
    the_first_hits_of_a_key_store_a_few_touches();
    a_miss_stores_nothing_at_all();
    idle_time_costs_one_word_per_key_and_granule();
    a_set_at_capacity_stores_a_bounded_number_of_words();
    printf("test_readside: done\n");
    return 0;
}
