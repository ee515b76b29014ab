/* Flights on a simulated weakly ordered machine (weakmem.h): four threads fly two keys in the one record that is left, and
 * look at each other's flights without the lock. In every second run some have a clock that is ahead: they take flights, and
 * the record, over; in the others one thread at a time leads a key.
 * What is seen must be of one flight: a ticket is of the key that was asked for, and progress is of the ticket's flight.
 *
 *   WEAKMEM_RUNS=n (default 4000)    WEAKMEM_SEED=n
 */
#include <string.h>

#include "support.h"
#include "weakmem.h"

#define KEYS 2u
#define FLIGHTS 4u                  /* per thread and run */
#define SEEN_MAX 64u
#define LEASE (60 * SECOND)

static struct world world;
static uint64_t seed, first_token, joins, takeovers, advances;
static uint64_t leading[KEYS];     /* the token of who leads the key, 0 = nobody */

/* By token, counted from first_token: private to the test, so it is not subject to the simulation. */
static uint32_t key_of[SEEN_MAX];
/* Joined tickets, to be compared when all leaders have said what they led. */
static struct { uint64_t token; uint32_t key; } seen[SEEN_MAX];
static uint32_t seen_count;
static bool clocks_agree;           /* in this run */

static enum lec_role join(uint32_t id, uint64_t now_ns, struct lec_ticket *ticket)
{
    uint8_t key[LARGEST_KEY];
    enum lec_role role;
    enum lec_status status = lec_flight_join(&world.handle, key, key_make(&world, key, id), LEASE, now_ns, LOCK_TIMEOUT, &role, ticket);
    REQUIRE(status == LEC_OK, "join: %d", (int)status);
    return role;
}

static uint64_t progress_of(uint64_t token, uint64_t part) { return (token - first_token + 1) << 8 | part; }

/* Until it is over, or somebody else's. */
static void lead(uint32_t key, struct lec_ticket ticket)
{
    REQUIRE(ticket.token - first_token < SEEN_MAX, "token %llu", (unsigned long long)ticket.token);
    key_of[ticket.token - first_token] = key;
    leading[key] = ticket.token;
    for (uint64_t part = 1; part <= 2; part++)
        (void)lec_flight_advance(&world.handle, ticket, progress_of(ticket.token, part), world.now, LOCK_TIMEOUT);
    if (leading[key] == ticket.token) leading[key] = 0;
    (void)lec_flight_end(&world.handle, ticket, world.now, LOCK_TIMEOUT);
    REQUIRE(lec_flight_state(&world.handle, ticket, world.now) == LEC_FLIGHT_OVER, "its own end goes unseen");
}

static void note(uint32_t key, struct lec_ticket ticket)
{
    REQUIRE(ticket.token >= first_token && seen_count < SEEN_MAX, "token %llu", (unsigned long long)ticket.token);
    seen[seen_count].token = ticket.token;
    seen[seen_count++].key = key;
    joins++;
}

static void look(struct lec_ticket ticket)
{
    int64_t before = 0;
    for (uint32_t round = 0; round < 4; round++) {
        int64_t state = lec_flight_state(&world.handle, ticket, world.now);
        if (state == LEC_FLIGHT_OVER) return;
        REQUIRE(state == 0 || (uint64_t)state >> 8 == ticket.token - first_token + 1, "progress %llx under ticket %llu",
                (unsigned long long)state, (unsigned long long)(ticket.token - first_token));
        REQUIRE(state >= before, "progress fell");
        before = state;
        advances += state > 0;
    }
}

static void traveller(void *argument)
{
    struct random random = *(struct random *)argument;
    for (uint32_t round = 0; round < FLIGHTS; round++) {
        uint32_t key = (uint32_t)random_below(&random, KEYS);
        bool is_ahead = !clocks_agree && random_below(&random, 4) == 0;
        struct lec_ticket ticket;
        switch (join(key, world.now + (is_ahead ? 2 * LEASE : 0), &ticket)) {
        case LEC_FLIGHT_LED:
            REQUIRE(leading[key] == 0 || !clocks_agree, "two lead key %u", key);
            lead(key, ticket);
            break;
        case LEC_FLIGHT_TAKEN_OVER:
            takeovers++;
            lead(key, ticket);
            break;
        case LEC_FLIGHT_JOINED:
            note(key, ticket);
            look(ticket);
            break;
        case LEC_FLIGHT_NONE: break;
        }
    }
}

/* Of all records but one. */
static void take_records(void)
{
    struct lec_ticket ticket, last = {0, 0};
    for (uint32_t id = 1000; join(id, world.now + 10 * LEASE, &ticket) == LEC_FLIGHT_LED; id++) last = ticket;
    REQUIRE(lec_flight_end(&world.handle, last, world.now, LOCK_TIMEOUT) == LEC_OK, "the last one");
}

static void run(uint64_t number)
{
    struct random randoms[WEAK_THREADS];
    struct weak_body bodies[WEAK_THREADS];
    context_set("seed %llu, run %llu", (unsigned long long)seed, (unsigned long long)number);
    world_restore(&world);
    seen_count = 0;
    clocks_agree = number % 2;
    memset(key_of, 0xff, sizeof key_of);
    memset(leading, 0, sizeof leading);
    for (unsigned index = 0; index < WEAK_THREADS; index++) {
        randoms[index].state = mix64(seed + number * WEAK_THREADS + index);
        bodies[index] = (struct weak_body){traveller, &randoms[index]};
    }
    weak_run(bodies, WEAK_THREADS, mix64(seed ^ number << 20));
    for (uint32_t at = 0; at < seen_count; at++)
        REQUIRE(key_of[seen[at].token - first_token] == seen[at].key, "joined key %u with the ticket of another", seen[at].key);
}

int main(void)
{
    struct lec_config config = {.max_entries = 16, .max_value_bytes = 100};
    uint64_t runs = setting("WEAKMEM_RUNS", 4000), begun = wall_clock_ns();
    seed = setting("WEAKMEM_SEED", 1);
    world_create(&world, &config, 0);
    weak_watch(world.base, world.bytes);
    take_records();
    first_token = *lec_word(&world.handle, LEC_WORD_TOKEN);
    world_save(&world);
    for (uint64_t number = 0; number < runs; number++) run(number);
    printf("test_weakflights: seed %llu, %llu runs, %llu joined, %llu taken over, %llu advances seen, %llu stale loads, %.1f s\n", (unsigned long long)seed,
           (unsigned long long)runs, (unsigned long long)joins, (unsigned long long)takeovers, (unsigned long long)advances, (unsigned long long)weak_stale_loads(),
           (double)(wall_clock_ns() - begun) / 1e9);
    REQUIRE(joins > runs / 2 && takeovers > 0 && advances > 0 && weak_stale_loads() > runs, "nothing much happened");
    world_destroy(&world);
    return 0;
}
