/* Readers and writers on a simulated weakly ordered machine (weakmem.h): no reader may ever return bytes that are not
 * one whole value of its key, nor, after a value it has seen (or knows to be complete), an older one.
 *
 *   WEAKMEM_RUNS=n (default 10000)    WEAKMEM_SEED=n
 */
#include <string.h>

#include "support.h"
#include "weakmem.h"

#define KEYS 6u
#define OPERATIONS 4u
#define LARGE_BYTES 8500u

static struct world world;
static uint64_t seed, copied;
static uint32_t next_sequence, complete[KEYS], longest;

static uint64_t size_of(uint32_t id, uint32_t sequence)
{
    uint64_t dice = mix64(id * 1000003u + sequence);
    /* Some fill their last unit: links of free memory then lie on the value itself. */
    if (dice % 4 == 0) return (3 + dice / 4 % 5) * LEC_UNIT - sizeof(struct lec_entry) - 64;
    return 8 + dice % longest;
}

/* A key is written by one thread only, so that its sequence numbers are in order. */
static void writer(void *argument)
{
    struct random random = *(struct random *)argument;
    uint32_t parity = random.state & 1;
    for (uint32_t round = 0; round < OPERATIONS; round++) {
        uint32_t id = (uint32_t)random_below(&random, KEYS / 2) * 2 + parity, sequence = ++next_sequence;
        bool is_large = random_below(&random, 24) == 0;
        if (random_below(&random, 3) == 0) (void)delete_id(&world, id);
        else if (set_id(&world, id, sequence, is_large ? LARGE_BYTES : size_of(id, sequence)) != LEC_OK) continue;
        complete[id] = sequence;
    }
}

/* complete[] is read as the program that hands a number from one process to the other would: with its own ordering,
 * here simply by the order of the simulation. So only what this very thread has seen may bind it. */
static void reader(void *argument)
{
    struct random random = *(struct random *)argument;
    uint32_t seen[KEYS] = {0};
    struct buffer buffer = {0};
    for (uint32_t round = 0; round < 2 * OPERATIONS; round++) {
        uint32_t id = (uint32_t)random_below(&random, KEYS), sequence;
        enum lec_status status = get_id(&world, id, &buffer, NULL);
        if (status != LEC_OK) continue;
        copied++;
        REQUIRE(value_sequence(buffer.data, buffer.bytes, id, &sequence), "torn or foreign bytes under key %u", id);
        REQUIRE(sequence >= seen[id], "key %u went back from %u to %u", id, seen[id], sequence);
        seen[id] = sequence;
    }
    free(buffer.data);
}

static void run(uint64_t number)
{
    struct random randoms[WEAK_THREADS];
    struct weak_body bodies[WEAK_THREADS];
    context_set("seed %llu, run %llu", (unsigned long long)seed, (unsigned long long)number);
    world_restore(&world);
    next_sequence = 1;
    for (unsigned index = 0; index < WEAK_THREADS; index++) {
        randoms[index].state = mix64(seed + number * WEAK_THREADS + index) << 1 | (index & 1);
        bodies[index] = (struct weak_body){index < 2 ? writer : reader, &randoms[index]};
    }
    weak_run(bodies, WEAK_THREADS, mix64(seed ^ number << 20));
}

int main(void)
{
    struct lec_config config = {.max_entries = 40, .max_value_bytes = LARGE_BYTES};
    struct lec_totals totals;
    uint64_t runs = setting("WEAKMEM_RUNS", 10000), begun = wall_clock_ns();
    seed = setting("WEAKMEM_SEED", 1);
    longest = 400;
    context_set("setting up");
    world_create(&world, &config, 0);
    weak_watch(world.base, world.bytes);
    /* Full, so that what one thread frees is what the other fills next. */
    for (uint32_t id = 0; id < 5; id++) REQUIRE(set_id(&world, 1000 + id, 1, LARGE_BYTES - 500) == LEC_OK, "filling up");
    for (uint32_t id = 0; id < KEYS; id++) REQUIRE(set_id(&world, id, 1, size_of(id, 1)) == LEC_OK, "key %u", id);
    world_save(&world);
    for (uint64_t number = 0; number < runs; number++) run(number);
    world_totals(&world, &totals);
    printf("test_weakmem: seed %llu, %llu runs, %llu values copied, %llu stale loads, %.1f s\n", (unsigned long long)seed,
           (unsigned long long)runs, (unsigned long long)copied, (unsigned long long)weak_stale_loads(),
           (double)(wall_clock_ns() - begun) / 1e9);
    REQUIRE(copied > runs && weak_stale_loads() > runs, "nothing much happened");
    world_destroy(&world);
    return 0;
}
