/* Flights: random calls of several processes' against a table; and threads, of which one at a time may lead a key.
 *
 *   FLIGHTS_STEPS=n (default 20000)   FLIGHTS_SECONDS=n (default 1)   FLIGHTS_SEED=n
 */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "support.h"

static const struct lec_config config = {.max_entries = 200, .max_value_bytes = 1000};
static struct random dice;
static struct world world;

static enum lec_role join_as(struct lec_handle *handle, uint32_t id, uint64_t lease_ns, struct lec_ticket *ticket)
{
    uint8_t key[LARGEST_KEY];
    enum lec_role role;
    enum lec_status status = lec_flight_join(handle, key, key_make(&world, key, id), lease_ns, world.now, LOCK_TIMEOUT, &role, ticket);
    REQUIRE(status == LEC_OK, "join: %d", (int)status);
    return role;
}

/* ---- against a table ---- */

#define ACTORS 3u
#define KEYS 6u
#define KEPT 6u                     /* tickets of the past that are tried again */

/* A process of which only the identity matters: the calls are made here, in its name. */
struct actor { pid_t pid; struct lec_handle handle; bool is_alive; };
struct held { struct lec_ticket ticket; uint32_t actor; uint64_t fill_token; bool was_replaced; };
/* What the table says of a key. */
struct expected {
    bool has_record;
    uint32_t actor;
    struct lec_ticket ticket;
    uint64_t deadline_ns, progress;
    struct held held[KEPT];
    uint32_t held_count;
};

static struct actor actors[ACTORS];
static struct expected table[KEYS];
static uint64_t last_token, bell;
static uint64_t led, taken_over, joined, refused_fills;

static void actor_start(struct actor *actor)
{
    memset(actor, 0, sizeof *actor);
    actor->pid = sleeping_child();
    actor->is_alive = true;
    enum lec_status status = lec_attach(&actor->handle, world.base, world.bytes, test_boot_id, lec_process_identity(actor->pid), false);
    REQUIRE(status == LEC_OK && actor->handle.identity != 0, "attach: %d", (int)status);
}

static void actor_kill(struct actor *actor)
{
    if (!actor->is_alive) return;
    kill(actor->pid, SIGKILL);
    siginfo_t how;
    waitid(P_PID, (id_t)actor->pid, &how, WEXITED | WNOWAIT);  /* a zombie is dead */
    actor->is_alive = false;
}

static void actor_replace(struct actor *actor)
{
    waitpid(actor->pid, NULL, 0);
    for (uint32_t key = 0; key < KEYS; key++) {                 /* the table names actors by their place */
        struct expected *expected = &table[key];
        if (expected->has_record && &actors[expected->actor] == actor) expected->actor = ACTORS;
        for (uint32_t at = 0; at < KEPT; at++)
            if (expected->held[at].actor == (uint32_t)(actor - actors)) expected->held[at].actor = ACTORS;
    }
    actor_start(actor);
}

static bool owner_lives(const struct expected *expected) { return expected->actor < ACTORS && actors[expected->actor].is_alive; }
static bool runs(const struct expected *expected) { return expected->has_record && owner_lives(expected) && expected->deadline_ns > world.now; }

static uint64_t fill_token_of(uint32_t key)
{
    struct lec_read read = {.wants_token = true};
    (void)get_id(&world, key, NULL, &read);
    return read.token;
}

static void step_join(uint32_t key, uint32_t by)
{
    struct expected *expected = &table[key];
    uint64_t lease = random_below(&dice, 100 * MILLISECOND);
    struct lec_ticket ticket;
    enum lec_role role = join_as(&actors[by].handle, key, lease, &ticket);
    if (runs(expected)) {
        REQUIRE(role == LEC_FLIGHT_JOINED, "role %d, another one leads", (int)role);
        REQUIRE(ticket.token == expected->ticket.token && ticket.index == expected->ticket.index, "another flight's ticket");
        joined++;
        return;
    }
    REQUIRE(role == (expected->has_record ? LEC_FLIGHT_TAKEN_OVER : LEC_FLIGHT_LED), "role %d", (int)role);
    REQUIRE(ticket.token > last_token, "token %llu after %llu", (unsigned long long)ticket.token, (unsigned long long)last_token);
    last_token = ticket.token;
    bell += expected->has_record;
    taken_over += expected->has_record;
    led += !expected->has_record;
    for (uint32_t at = 0; at < KEPT; at++) expected->held[at].was_replaced |= expected->has_record;
    expected->has_record = true;
    expected->actor = by;
    expected->ticket = ticket;
    expected->deadline_ns = world.now + lease;
    expected->progress = 0;
    expected->held[expected->held_count++ % KEPT] = (struct held){ticket, by, fill_token_of(key), false};
}

/* A ticket of now or of the past, in the hands of whoever held it, or of somebody else. */
static struct held some_ticket(uint32_t key, uint32_t by)
{
    struct held held = table[key].held[random_below(&dice, KEPT)];
    if (random_below(&dice, 8) == 0 || held.actor >= ACTORS || !actors[held.actor].is_alive) held.actor = by;
    return held;
}

static bool is_his(const struct expected *expected, const struct held *held)
{
    return expected->has_record && expected->actor == held->actor && held->ticket.token != 0 && expected->ticket.token == held->ticket.token;
}

static void step_own(uint32_t key, uint32_t by)
{
    struct expected *expected = &table[key];
    struct held held = some_ticket(key, by);
    struct lec_handle *handle = &actors[held.actor].handle;
    bool should = is_his(expected, &held);
    uint64_t number = random_below(&dice, 50 * MILLISECOND);
    enum lec_status status;
    switch (random_below(&dice, 3)) {
    case 0:
        status = lec_flight_renew(handle, held.ticket, number, world.now, LOCK_TIMEOUT);
        if (should) expected->deadline_ns = world.now + number;
        break;
    case 1:
        status = lec_flight_advance(handle, held.ticket, number, world.now, LOCK_TIMEOUT);
        bell += should && number > expected->progress;
        if (should && number > expected->progress) expected->progress = number;
        break;
    default:
        status = lec_flight_end(handle, held.ticket, world.now, LOCK_TIMEOUT);
        bell += should;
        if (should) expected->has_record = false;
        break;
    }
    REQUIRE(status == (should ? LEC_OK : LEC_MISMATCH), "status %d, should be %s", (int)status, should ? "his" : "refused");
}

/* A leader that somebody else replaced fills what it computed, late. */
static void step_late_fill(uint32_t key)
{
    struct held *held = &table[key].held[random_below(&dice, KEPT)];
    if (!held->was_replaced || held->ticket.token == 0) return;
    enum lec_status status = store_id(&world, key, 1, 100, LEC_FILL, held->fill_token, 0);
    REQUIRE(status == LEC_MISMATCH, "the fill of a leader that was replaced: %d", (int)status);
    refused_fills++;
}

static void step_reap(void)
{
    lec_reap(&world.handle, world.now, LOCK_TIMEOUT);
    for (uint32_t key = 0; key < KEYS; key++) {
        if (!table[key].has_record || owner_lives(&table[key])) continue;
        table[key].has_record = false;
        bell++;
        for (uint32_t at = 0; at < KEPT; at++) table[key].held[at].was_replaced = true;
    }
}

static void compare(void)
{
    for (uint32_t key = 0; key < KEYS; key++) {
        struct expected *expected = &table[key];
        int64_t state = lec_flight_state(&world.handle, expected->ticket, world.now);
        REQUIRE(state == (runs(expected) ? (int64_t)expected->progress : LEC_FLIGHT_OVER), "key %u: state %lld", key, (long long)state);
    }
    REQUIRE(lec_bell(&world.handle) == bell, "the bell is %llu, not %llu", (unsigned long long)lec_bell(&world.handle), (unsigned long long)bell);
    REQUIRE(world_check(&world) == 0, "the checker complains");
}

static void step(uint64_t number)
{
    uint32_t key = (uint32_t)random_below(&dice, KEYS), by = (uint32_t)random_below(&dice, ACTORS);
    if (!actors[by].is_alive) {
        if (random_below(&dice, 40) == 0) actor_replace(&actors[by]);
        return;
    }
    context_set("seed %llu, step %llu: key %u, actor %u", (unsigned long long)setting("FLIGHTS_SEED", 1), (unsigned long long)number, key, by);
    switch (random_below(&dice, 12)) {
    case 0: case 1: case 2: case 3: step_join(key, by); break;
    case 4: case 5: case 6: step_own(key, by); break;
    case 7: step_late_fill(key); break;
    case 8: if (random_below(&dice, 40) == 0) step_reap(); break;
    case 9: if (random_below(&dice, 40) == 0) actor_kill(&actors[by]); break;
    default: world.now += random_below(&dice, 20 * MILLISECOND); break;
    }
    compare();
}

static void agrees_with_the_table(void)
{
    uint64_t steps = setting("FLIGHTS_STEPS", 20000);
    world_create(&world, &config, 0);
    for (uint32_t at = 0; at < ACTORS; at++) actor_start(&actors[at]);
    bell = lec_bell(&world.handle);
    for (uint64_t number = 0; number < steps; number++) step(number);
    printf("test_flights: %llu led, %llu taken over, %llu joined, %llu late fills refused\n", (unsigned long long)led,
           (unsigned long long)taken_over, (unsigned long long)joined, (unsigned long long)refused_fills);
    REQUIRE(led > 0 && taken_over > 0 && joined > 0 && refused_fills > 0, "not everything happened");
    for (uint32_t at = 0; at < ACTORS; at++) {
        actor_kill(&actors[at]);
        waitpid(actors[at].pid, NULL, 0);
    }
    world_destroy(&world);
}

/* ---- a full set ---- */

static void spent_records_make_room(void)
{
    static uint64_t tokens[4000];
    struct lec_ticket ticket;
    uint32_t taken = 0;
    context_set("a full set");
    world_create(&world, &config, 0);
    for (uint32_t id = 0; id < 4000; id++) {
        enum lec_role role = join_as(&world.handle, id, SECOND, &ticket);
        REQUIRE(role == LEC_FLIGHT_LED || role == LEC_FLIGHT_NONE, "role %d", (int)role);
        tokens[id] = role == LEC_FLIGHT_LED ? fill_token_of(id) : 0;
        taken += role == LEC_FLIGHT_LED;
    }
    REQUIRE(taken == world.handle.geometry.flight_count, "%u of %u records were had", taken, world.handle.geometry.flight_count);
    world.now += 2 * SECOND;
    for (uint32_t id = 4000; id < 8000; id++) (void)join_as(&world.handle, id, SECOND, &ticket);
    for (uint32_t id = 0; id < 4000; id++)
        REQUIRE(!tokens[id] || store_id(&world, id, 1, 10, LEC_FILL, tokens[id], 0) == LEC_MISMATCH, "key %u: a late fill", id);
    REQUIRE(world_check(&world) == 0, "the checker complains");
    world_destroy(&world);
}

/* ---- what the checker finds ---- */

static uint64_t complaints_after(uint32_t index, void (*damage)(struct lec_flight *flight))
{
    damage(lec_flight_at(&world.handle, index));
    uint64_t complaints = lec_check(&world.handle, world.now, LOCK_TIMEOUT, NULL, NULL);
    REQUIRE(world_check(&world) == 0, "one check repairs everything");
    return complaints;
}

static void no_token(struct lec_flight *flight) { flight->fencing_token = 0; }
static void future_token(struct lec_flight *flight) { flight->fencing_token += 1000; }
static void foreign_key(struct lec_flight *flight) { flight->key_hash ^= UINT64_C(1) << 48 | 1; }
static void doubled(struct lec_flight *flight) { memcpy(flight + 1, flight, sizeof *flight); }

static void damage_is_found(void)
{
    static const struct lec_config sharded = {.max_entries = 40000, .max_value_bytes = 100};
    void (*damages[])(struct lec_flight *) = {no_token, future_token, foreign_key, doubled};
    struct lec_ticket ticket;
    world_create(&world, &sharded, UINT64_C(8) << 20);
    REQUIRE(world.handle.geometry.shard_count == 2, "%u shards", world.handle.geometry.shard_count);
    for (unsigned at = 0; at < sizeof damages / sizeof *damages; at++) {
        context_set("damage %u", at);
        REQUIRE(join_as(&world.handle, at, SECOND, &ticket) == LEC_FLIGHT_LED, "join");
        uint64_t complaints = complaints_after(ticket.index, damages[at]);
        REQUIRE(complaints == 1, "%llu complaints", (unsigned long long)complaints);
        bool is_kept = damages[at] == doubled;
        REQUIRE((lec_flight_state(&world.handle, ticket, world.now) == 0) == is_kept, "state %lld", (long long)lec_flight_state(&world.handle, ticket, world.now));
    }
    world_destroy(&world);
}

/* ---- threads ---- */

#define THREAD_KEYS 3u
#define LEADERS 4u
#define LATE (60 * SECOND)

static _Atomic bool stop;
static _Atomic uint32_t leaders[THREAD_KEYS];
static _Atomic uint64_t flown, waited, seen_progress;

/* Progress that tells whose it is. */
static uint64_t progress_of(uint64_t token, uint64_t number) { return (token & 0xffffffff) << 16 | number; }

static void look_at(struct lec_ticket ticket, int64_t state)
{
    REQUIRE(state <= 0 || (uint64_t)state >> 16 == (ticket.token & 0xffffffff), "progress %llx of another flight than %llx",
            (unsigned long long)state, (unsigned long long)ticket.token);
    atomic_fetch_add(&seen_progress, state > 0);
}

static void lead(uint32_t key, struct lec_ticket ticket, struct random *random)
{
    uint64_t parts = random_below(random, 4);
    REQUIRE(atomic_fetch_add(&leaders[key], 1) == 0, "two lead key %u", key);
    for (uint64_t part = 1; part <= parts; part++)
        REQUIRE(lec_flight_advance(&world.handle, ticket, progress_of(ticket.token, part), world.now, LOCK_TIMEOUT) == LEC_OK, "advance");
    REQUIRE(lec_flight_renew(&world.handle, ticket, LATE, world.now, LOCK_TIMEOUT) == LEC_OK, "renew");
    atomic_fetch_sub(&leaders[key], 1);
    REQUIRE(lec_flight_end(&world.handle, ticket, world.now, LOCK_TIMEOUT) == LEC_OK, "end");
    REQUIRE(lec_flight_state(&world.handle, ticket, world.now) == LEC_FLIGHT_OVER, "it goes on");
    atomic_fetch_add(&flown, 1);
}

static void follow(struct lec_ticket ticket, struct random *random)
{
    int64_t state = lec_flight_state(&world.handle, ticket, world.now);
    bool is_patient = random_below(random, 2);
    for (; is_patient && state != LEC_FLIGHT_OVER; look_at(ticket, state))
        state = lec_flight_wait(&world.handle, ticket, state, world.now, 10 * SECOND);
    look_at(ticket, state);
    atomic_fetch_add(&waited, is_patient);
}

static void *traveller(void *argument)
{
    struct random random = {setting("FLIGHTS_SEED", 1) + 1000 + (uintptr_t)argument};
    while (!atomic_load(&stop)) {
        uint32_t key = (uint32_t)random_below(&random, THREAD_KEYS);
        struct lec_ticket ticket;
        enum lec_role role = join_as(&world.handle, key, LATE, &ticket);
        REQUIRE(role == LEC_FLIGHT_LED || role == LEC_FLIGHT_JOINED, "role %d", (int)role);
        if (role == LEC_FLIGHT_LED) lead(key, ticket, &random);
        else follow(ticket, &random);
    }
    return NULL;
}

static void *listener(void *argument)
{
    uint64_t heard = lec_bell(&world.handle);
    (void)argument;
    while (!atomic_load(&stop)) {
        uint64_t now = lec_bell_wait(&world.handle, heard, 100 * MILLISECOND);
        REQUIRE(now >= heard, "the bell went back");
        heard = now;
    }
    return NULL;
}

static void *inspector(void *argument)
{
    (void)argument;
    while (!atomic_load(&stop)) {
        REQUIRE(world_check(&world) == 0, "the checker complains");
        lec_reap(&world.handle, world.now, LOCK_TIMEOUT);
        usleep(1000);
    }
    return NULL;
}

static void one_thread_leads_at_a_time(void)
{
    pthread_t threads[LEADERS + 2];
    context_set("threads");
    world_create(&world, &config, 0);
    world.handle.concurrent = true;
    for (uintptr_t at = 0; at < LEADERS; at++) REQUIRE(pthread_create(&threads[at], NULL, traveller, (void *)at) == 0, "thread");
    REQUIRE(pthread_create(&threads[LEADERS], NULL, listener, NULL) == 0, "thread");
    REQUIRE(pthread_create(&threads[LEADERS + 1], NULL, inspector, NULL) == 0, "thread");
    usleep((useconds_t)(setting("FLIGHTS_SECONDS", 1) * 1000000));
    atomic_store(&stop, true);
    for (unsigned at = 0; at < LEADERS + 2; at++) pthread_join(threads[at], NULL);
    REQUIRE(world_check(&world) == 0, "at the end");
    printf("test_flights: threads led %llu flights, waited for %llu, saw %llu advances\n", (unsigned long long)flown,
           (unsigned long long)waited, (unsigned long long)seen_progress);
    REQUIRE(flown > 0 && waited > 0, "not everybody had a turn");
    world_destroy(&world);
}

/* ---- counters and histograms ---- */

#define COUNTED 50000u

static void *counting(void *argument)
{
    (void)argument;
    for (uint32_t round = 0; round < COUNTED; round++)
        REQUIRE(lec_count(&world.handle, 95, 3) && lec_observe(&world.handle, 3, round), "count");
    return NULL;
}

static void counts_come_out_exactly(void)
{
    uint64_t counters[LEC_COUNTERS], histograms[LEC_HISTOGRAMS][LEC_HISTOGRAM_BUCKETS], observed = 0;
    pthread_t threads[4];
    context_set("counting");
    world_create(&world, &config, 0);
    world.handle.concurrent = true;
    for (unsigned at = 0; at < 4; at++) REQUIRE(pthread_create(&threads[at], NULL, counting, NULL) == 0, "thread");
    for (unsigned at = 0; at < 4; at++) pthread_join(threads[at], NULL);
    lec_counter_sums(&world.handle, counters);
    lec_histogram_sums(&world.handle, histograms);
    for (uint32_t at = 0; at < LEC_HISTOGRAM_BUCKETS - 1; at++) observed += histograms[3][at];
    REQUIRE(counters[95] == 12u * COUNTED && counters[94] == 0, "%llu counted", (unsigned long long)counters[95]);
    REQUIRE(observed == 4 * COUNTED, "%llu observed", (unsigned long long)observed);
    REQUIRE(histograms[3][LEC_HISTOGRAM_BUCKETS - 1] == 2ull * COUNTED * (COUNTED - 1), "the sum of what was observed");
    REQUIRE(!lec_count(&world.handle, LEC_COUNTERS, 1) && !lec_observe(&world.handle, LEC_HISTOGRAMS, 1), "bounds");
    world_destroy(&world);
}

int main(void)
{
    dice.state = setting("FLIGHTS_SEED", 1);
    agrees_with_the_table();
    spent_records_make_room();
    damage_is_found();
    counts_come_out_exactly();
    one_thread_leads_at_a_time();
    return 0;
}
