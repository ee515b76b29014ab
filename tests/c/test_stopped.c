/* Writers that are stopped, not killed, at every point of their work.
 *
 *   1 A is stopped anywhere in the storing of a large value (mostly: filling it, outside the lock)
 *   2 B is killed in the middle of a set, holding the lock
 *   3 C recovers
 *   4 the parent stores until every unit has been handed out again, several times over
 *   5 A goes on
 * A's late stores must land in A's own units or nowhere. Where A was stopped holding the lock, nobody may get past it,
 * and nobody may wait for longer than he said.
 *
 * And readers: R is stopped at every access of a get, B is killed at every store of a delete of that key, others recover
 * and store until its memory has been handed out again; R goes on, and must return the value or nothing.
 *
 *   STOPPED_STRIDE=n   every n-th point (default 3)
 */
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "crashing.h"

#define A_ID 700u
#define B_ID 701u
#define LARGE_BYTES 12000u
#define FILL_ID 2000u
#define FILL_ROUNDS 150u
#define SHORT_TIMEOUT (5 * MILLISECOND)

static const struct lec_config config = {.max_entries = 64, .max_value_bytes = 16384};

static pid_t stopped_writer(struct world *world, uint64_t at, bool *done)
{
    pid_t child = fork();
    int how;
    if (child == 0) {
        alarm(30);
        world_enter_child(world);
        points_arm(POINTS_STOP, at, false);
        enum lec_status status = set_id(world, A_ID, NEW_SEQUENCE, LARGE_BYTES);
        REQUIRE(status == LEC_OK || status == LEC_BUSY || status == LEC_REFUSED, "A: %d", (int)status);
        _exit(42);
    }
    REQUIRE(waitpid(child, &how, WUNTRACED) == child, "waitpid");
    *done = WIFEXITED(how);
    REQUIRE(*done || WIFSTOPPED(how), "A: wait status %#x", (unsigned)how);
    return child;
}

static void killed_writer(struct world *world, uint64_t at)
{
    pid_t child = fork();
    int how;
    if (child == 0) {
        alarm(20);
        world_enter_child(world);
        points_arm(POINTS_KILL, at, false);
        (void)set_id(world, B_ID, NEW_SEQUENCE, 900);
        _exit(42);
    }
    REQUIRE(waitpid(child, &how, 0) == child && (WIFEXITED(how) || WTERMSIG(how) == SIGKILL), "B: wait status %#x", (unsigned)how);
}

static uint64_t fill_bytes(uint32_t id) { return 60 + mix64(id) % 3800; }

static void read_all(struct world *world, struct buffer *buffer)
{
    uint32_t sequence;
    for (uint32_t id = FILL_ID; id < FILL_ID + FILL_ROUNDS; id++) {
        enum lec_status status = get_id(world, id, buffer, NULL);
        if (status == LEC_ABSENT) continue;
        REQUIRE(status == LEC_OK, "get of %u: %d", id, (int)status);
        REQUIRE(buffer->bytes == fill_bytes(id) && value_sequence(buffer->data, buffer->bytes, id, &sequence), "wrong bytes in key %u", id);
    }
}

static void fill_slab(struct world *world)
{
    for (uint32_t id = FILL_ID; id < FILL_ID + FILL_ROUNDS; id++) {
        enum lec_status status = set_id(world, id, NEW_SEQUENCE, fill_bytes(id));
        REQUIRE(status == LEC_OK, "set of %u: %d", id, (int)status);
    }
}

static bool is_locked_out(struct world *world)
{
    uint8_t key[LARGEST_KEY];
    uint64_t begun = wall_clock_ns();
    enum lec_status status = lec_delete(&world->handle, key, key_make(world, key, ABSENT_ID), 0, world->now, SHORT_TIMEOUT);
    REQUIRE(wall_clock_ns() - begun < 100 * SHORT_TIMEOUT, "a timed lock did not keep its time");
    return status == LEC_BUSY;
}

/* Nobody can sweep, for the lock is held; yet all is gone at once. */
static void clear_all(struct world *world)
{
    struct lec_totals totals;
    REQUIRE(lec_clear(&world->handle, world->now, SHORT_TIMEOUT) == LEC_OK, "clear");
    for (uint32_t id = FILL_ID; id < FILL_ID + FILL_ROUNDS; id++)
        REQUIRE(get_id(world, id, NULL, NULL) == LEC_ABSENT, "key %u outlived clear()", id);
    world_totals(world, &totals);
    REQUIRE(totals.entries == 0 && totals.payload_bytes == 0, "%llu entries after clear", (unsigned long long)totals.entries);
}

static void go_on(pid_t child)
{
    int how;
    kill(child, SIGCONT);
    REQUIRE(waitpid(child, &how, 0) == child && WIFEXITED(how) && WEXITSTATUS(how) == 42, "A went on: wait status %#x", (unsigned)how);
}

/* Returns false when A came to the end without meeting the point. */
static bool stop_at(struct world *world, uint64_t at, uint64_t b_at, uint64_t *locked_out, struct buffer *buffer)
{
    bool done;
    world_restore(world);
    pid_t child = stopped_writer(world, at, &done);
    if (done) return false;
    if (is_locked_out(world)) {
        read_all(world, buffer);            /* readers never wait */
        if (++*locked_out % 2) clear_all(world);
        go_on(child);
    } else {
        killed_writer(world, b_at);
        REQUIRE(delete_id(world, ABSENT_ID) == LEC_ABSENT, "the recovering write");
        lec_reap(&world->handle, world->now, LOCK_TIMEOUT);
        REQUIRE(world_check(world) == 0, "after the recovery");
        fill_slab(world);
        read_all(world, buffer);
        go_on(child);
    }
    read_all(world, buffer);
    uint32_t sequence;
    enum lec_status status = get_id(world, A_ID, buffer, NULL);
    REQUIRE(status == LEC_ABSENT || (status == LEC_OK && value_sequence(buffer->data, buffer->bytes, A_ID, &sequence)), "A's own value");
    lec_reap(&world->handle, world->now, LOCK_TIMEOUT);
    REQUIRE(world_check(world) == 0, "after A went on");
    return true;
}

/* ---- stopped readers ---- */

#define READ_ID 800u
#define READ_BYTES 150u

static pid_t stopped_reader(struct world *world, uint64_t at, bool *done)
{
    pid_t child = fork();
    int how;
    if (child == 0) {
        struct buffer buffer = {0};
        alarm(30);
        world_enter_child(world);
        points_arm(POINTS_STOP, at, true);
        enum lec_status status = get_id(world, READ_ID, &buffer, NULL);
        REQUIRE(status == LEC_ABSENT || status == LEC_OK, "R: %d", (int)status);
        REQUIRE(status == LEC_ABSENT || (buffer.bytes == READ_BYTES && value_is(buffer.data, READ_BYTES, READ_ID, OLD_SEQUENCE)), "R: other bytes");
        _exit(42);
    }
    REQUIRE(waitpid(child, &how, WUNTRACED) == child, "waitpid");
    *done = WIFEXITED(how);
    REQUIRE(*done ? WEXITSTATUS(how) == 42 : WIFSTOPPED(how), "R: wait status %#x", (unsigned)how);
    return child;
}

static void killed_deleter(struct world *world, uint64_t at)
{
    pid_t child = fork();
    int how;
    if (child == 0) {
        alarm(20);
        world_enter_child(world);
        points_arm(POINTS_KILL, at, false);
        (void)delete_id(world, READ_ID);
        _exit(42);
    }
    REQUIRE(waitpid(child, &how, 0) == child && (WIFEXITED(how) || WTERMSIG(how) == SIGKILL), "B: wait status %#x", (unsigned)how);
}

static uint64_t points_of_delete(struct world *world)
{
    world_restore(world);
    points_arm(POINTS_COUNT, 0, false);
    REQUIRE(delete_id(world, READ_ID) == LEC_OK, "delete");
    return points_stores();
}

/* The freed units are the only ones that fit. Few sets, in other buckets mostly: R's bucket must not change by chance. */
static void reuse_memory(struct world *world)
{
    for (uint32_t id = FILL_ID; id < FILL_ID + 2; id++) REQUIRE(set_id(world, id, NEW_SEQUENCE, READ_BYTES) == LEC_OK, "set of %u", id);
}

static uint64_t stop_readers(struct world *world, uint64_t stride)
{
    uint64_t stops = 0, deaths = points_of_delete(world);
    for (uint64_t at = 1;; at += stride)
        for (uint64_t b_at = 1; b_at <= deaths; b_at++) {
            bool done;
            context_set("R stopped at access %llu, B killed at point %llu", (unsigned long long)at, (unsigned long long)b_at);
            world_restore(world);
            pid_t child = stopped_reader(world, at, &done);
            if (done) return stops;
            killed_deleter(world, b_at);
            reuse_memory(world);
            go_on(child);
            stops++;
        }
}

static void readers(uint64_t stride)
{
    static const struct lec_config small = {.max_entries = 400, .max_value_bytes = 512};
    struct world world;
    uint64_t begun = wall_clock_ns();
    world_create(&world, &small, 0);
    points_watch(world.base, world.bytes);
    for (uint32_t id = 0; id < 60; id++) REQUIRE(set_id(&world, id, OLD_SEQUENCE, READ_BYTES) == LEC_OK, "key %u", id);
    REQUIRE(set_id(&world, READ_ID, OLD_SEQUENCE, READ_BYTES) == LEC_OK, "set");
    world_save(&world);
    uint64_t stops = stop_readers(&world, stride);
    REQUIRE(stops > 0, "no reader was stopped");
    printf("test_stopped: %llu stopped readers, %.1f s\n", (unsigned long long)stops, (double)(wall_clock_ns() - begun) / 1e9);
    world_destroy(&world);
}

static void writers(uint64_t stride)
{
    struct world world;
    struct buffer buffer = {0};
    uint64_t stops = 0, locked_out = 0, begun = wall_clock_ns();
    world_create(&world, &config, 0);
    points_watch(world.base, world.bytes);
    fill_slab(&world);
    world_save(&world);
    for (uint64_t at = 1;; at += stride, stops++) {
        uint64_t b_at = 10 + mix64(at) % 150;
        context_set("A stopped at point %llu, B killed at point %llu", (unsigned long long)at, (unsigned long long)b_at);
        if (!stop_at(&world, at, b_at, &locked_out, &buffer)) break;
    }
    REQUIRE(locked_out > 0 && locked_out < stops, "%llu of %llu stops held the lock", (unsigned long long)locked_out, (unsigned long long)stops);
    printf("test_stopped: %llu stopped writers, %llu of them holding the lock, %.1f s\n", (unsigned long long)stops,
           (unsigned long long)locked_out, (double)(wall_clock_ns() - begun) / 1e9);
    free(buffer.data);
    world_destroy(&world);
}

int main(void)
{
    uint64_t stride = setting("STOPPED_STRIDE", 3);
    writers(stride);
    readers(stride);
    return 0;
}
