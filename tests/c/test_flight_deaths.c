/* Leaders that are killed before every store of join, takeover, renew, advance and end; leaders that are stopped there and
 * go on when another one leads; and waiters that are stopped at every access on their way to sleep.
 *
 * L is the leader: a process that does nothing, in whose name the children act. So the parent knows the tickets.
 */
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "hash.h"
#include "killpoints.h"
#include "support.h"

#define KEY_ID 7u
#define CROWD_ID 100u               /* keys that fill the set */
#define LEASE SECOND
#define PROGRESS 5u
#define CHILD_DONE 42
#define CHILD_LOST 43               /* a waiter went to sleep although what it waits for had happened */
#define CHILD_SECONDS 20u
#define SHORT_TIMEOUT (5 * MILLISECOND)
#define PROMPT (500 * MILLISECOND)

static const struct lec_config config = {.max_entries = 64, .max_value_bytes = 16384};
static struct world world;          /* the parent's, and by inheritance each child's */
static pid_t leader;
static struct lec_handle leaders;   /* L's view of the segment */

static uint64_t hash_of(uint32_t id)
{
    uint8_t key[LARGEST_KEY];
    uint32_t key_bytes = key_make(&world, key, id);
    return lec_hash(key, key_bytes, world.handle.seed);
}

static enum lec_status try_join(struct lec_handle *handle, uint32_t id, uint64_t timeout_ns, enum lec_role *role, struct lec_ticket *ticket)
{
    uint8_t key[LARGEST_KEY];
    return lec_flight_join(handle, key, key_make(&world, key, id), LEASE, world.now, timeout_ns, role, ticket);
}

static enum lec_role join(struct lec_handle *handle, uint32_t id, struct lec_ticket *ticket)
{
    enum lec_role role;
    enum lec_status status = try_join(handle, id, LOCK_TIMEOUT, &role, ticket);
    REQUIRE(status == LEC_OK, "join: %d", (int)status);
    return role;
}

static uint64_t fill_token(uint32_t id)
{
    struct lec_read read = {.wants_token = true};
    (void)get_id(&world, id, NULL, &read);
    return read.token;
}

static enum lec_status fill(uint32_t id, uint32_t sequence, uint64_t token) { return store_id(&world, id, sequence, 100, LEC_FILL, token, 0); }
static uint32_t records(void) { return world.handle.geometry.flight_count; }
static const struct lec_flight *record(uint32_t index) { return lec_flight_at(&world.handle, index); }

/* As it was when the call began. */
static const struct lec_flight *record_before(uint32_t index)
{
    return (const struct lec_flight *)(const void *)(world.image + ((const uint8_t *)record(index) - world.base));
}

/* ---- the stage ---- */

static struct lec_ticket ticket;            /* L's, of KEY_ID */
static uint64_t tokens_before[4096];        /* of record i's leader: its fill token */
static uint32_t ids[4096];                  /* and its key */

static void lead_for_leader(uint32_t id)
{
    struct lec_ticket got;
    if (join(&leaders, id, &got) != LEC_FLIGHT_LED) return;
    ids[got.index] = id;
    tokens_before[got.index] = fill_token(id);
    if (id == KEY_ID) ticket = got;
}

static void leader_start(void)
{
    leader = sleeping_child();
    memset(&leaders, 0, sizeof leaders);
    enum lec_status status = lec_attach(&leaders, world.base, world.bytes, test_boot_id, lec_process_identity(leader), false);
    REQUIRE(status == LEC_OK && leaders.identity != 0, "attach: %d", (int)status);
}

static void leader_kill(void)
{
    if (leader == 0) return;
    kill(leader, SIGKILL);
    waitpid(leader, NULL, 0);
    leader = 0;
}

static void stage_open(void)
{
    world_create(&world, &config, 0);
    points_watch(world.base, world.bytes);
    REQUIRE(records() <= 4096, "%u records", records());
    leader_start();
}

static void stage_close(void)
{
    leader_kill();
    world_destroy(&world);
}

static void nothing_flies(void) {}
static void one_flies(void) { lead_for_leader(KEY_ID); }
static void one_is_spent(void) { one_flies(); world.now += 2 * LEASE; }
static void one_is_orphaned(void) { one_flies(); leader_kill(); }

static void all_are_spent(void)
{
    for (uint32_t id = CROWD_ID; id < CROWD_ID + 40 * records(); id++) lead_for_leader(id);
    for (uint32_t index = 0; index < records(); index++) REQUIRE(record(index)->owner != 0, "record %u is free", index);
    world.now += 2 * LEASE;
}

/* ---- the calls: in the child's own name, or in L's ---- */

static void do_lead(void)
{
    struct lec_ticket got;
    enum lec_role role = join(&world.handle, KEY_ID, &got);
    REQUIRE(role == LEC_FLIGHT_LED, "role %d", (int)role);
}

static void do_take_over(void)
{
    struct lec_ticket got;
    enum lec_role role = join(&world.handle, KEY_ID, &got);
    REQUIRE(role == LEC_FLIGHT_TAKEN_OVER, "role %d", (int)role);
}

static void do_renew(void) { REQUIRE(lec_flight_renew(&leaders, ticket, 3 * LEASE, world.now, LOCK_TIMEOUT) == LEC_OK, "renew"); }
static void do_advance(void) { REQUIRE(lec_flight_advance(&leaders, ticket, PROGRESS, world.now, LOCK_TIMEOUT) == LEC_OK, "advance"); }
static void do_end(void) { REQUIRE(lec_flight_end(&leaders, ticket, world.now, LOCK_TIMEOUT) == LEC_OK, "end"); }
static void do_reap(void) { lec_reap(&world.handle, world.now, LOCK_TIMEOUT); }

struct call { const char *name; void (*prepare)(void); void (*run)(void); };
static const struct call calls[] = {
    {"lead", nothing_flies, do_lead},
    {"lead in a spent record", all_are_spent, do_lead},
    {"take over after the deadline", one_is_spent, do_take_over},
    {"take over from the dead", one_is_orphaned, do_take_over},
    {"renew", one_flies, do_renew},
    {"advance", one_flies, do_advance},
    {"end", one_flies, do_end},
    {"reap", one_is_orphaned, do_reap},
};

/* ---- killed ---- */

static bool child_is_killed(void (*run)(void), uint64_t at)
{
    int how;
    pid_t child = fork();
    if (child == 0) {
        alarm(CHILD_SECONDS);
        world_enter_child(&world);
        points_arm(POINTS_KILL, at, false);
        run();
        _exit(CHILD_DONE);
    }
    REQUIRE(waitpid(child, &how, 0) == child, "waitpid");
    bool is_killed = WIFSIGNALED(how) && WTERMSIG(how) == SIGKILL;
    REQUIRE(is_killed || (WIFEXITED(how) && WEXITSTATUS(how) == CHILD_DONE), "the child: wait status %#x", (unsigned)how);
    return is_killed;
}

/* Free, or the flight that was there, or all of the child's. */
static void look_at_record(uint32_t index)
{
    const struct lec_flight *before = record_before(index), *after = record(index);
    bool was_used = before->owner != 0;
    bool has_changed = after->owner != before->owner || after->fencing_token != before->fencing_token || after->progress != before->progress;
    /* Who reads the wake word as it is now is woken by nobody any more. */
    REQUIRE(!was_used || after->wake == before->wake || has_changed, "record %u: woken before there was anything to see", index);
    if (after->owner == 0) return;
    if (was_used && after->fencing_token == before->fencing_token) {
        REQUIRE(after->owner == before->owner && after->key_hash == before->key_hash, "record %u: two flights' fields", index);
        return;
    }
    REQUIRE(after->owner != before->owner && after->fencing_token != 0 && after->key_hash == hash_of(KEY_ID) && after->progress == 0 &&
            after->deadline_ns == world.now + LEASE, "record %u is neither free nor whole", index);
    REQUIRE(!was_used || fill_token(ids[index]) != tokens_before[index], "record %u: its former leader may still fill", index);
}

/* What the next ones find, long after all leases ended. */
static void look_at_flights(void)
{
    struct lec_ticket got;
    uint64_t begun = wall_clock_ns();
    world.now += 10 * LEASE;
    enum lec_role role = join(&world.handle, KEY_ID, &got);
    REQUIRE(wall_clock_ns() - begun < PROMPT, "the next join took %llu ms", (unsigned long long)((wall_clock_ns() - begun) / MILLISECOND));
    REQUIRE(role == LEC_FLIGHT_LED || role == LEC_FLIGHT_TAKEN_OVER, "role %d", (int)role);
    uint64_t token = fill_token(KEY_ID);
    REQUIRE(!ticket.token || role == LEC_FLIGHT_LED || fill(KEY_ID, 1, tokens_before[ticket.index]) == LEC_MISMATCH, "the former leader's fill");
    REQUIRE(fill(KEY_ID, 2, token) == LEC_OK, "the new leader's fill");
    REQUIRE(lec_flight_end(&world.handle, got, world.now, LOCK_TIMEOUT) == LEC_OK, "end");
    REQUIRE(lec_flight_state(&world.handle, got, world.now) == LEC_FLIGHT_OVER, "ended, and goes on");
    REQUIRE(world_check(&world) == 0, "the checker complains");
}

static uint64_t kill_everywhere(const struct call *call)
{
    memset(&ticket, 0, sizeof ticket);
    stage_open();
    call->prepare();
    world_save(&world);
    uint64_t begun = world.now;
    for (uint64_t at = 1;; at++) {
        context_set("%s: killed at point %llu", call->name, (unsigned long long)at);
        world_restore(&world);
        world.now = begun;
        bool is_killed = child_is_killed(call->run, at);
        for (uint32_t index = 0; index < records(); index++) look_at_record(index);     /* before the lock, and recovery */
        look_at_flights();
        if (is_killed) continue;
        stage_close();
        return at - 1;
    }
}

/* ---- stopped ---- */

static pid_t stopped_child(void (*run)(void), uint64_t at, bool with_loads, bool *is_done)
{
    int how;
    pid_t child = fork();
    if (child == 0) {
        alarm(CHILD_SECONDS);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        points_arm(POINTS_STOP, at, with_loads);
        run();
        _exit(CHILD_DONE);
    }
    REQUIRE(waitpid(child, &how, WUNTRACED) == child, "waitpid");
    *is_done = WIFEXITED(how);
    REQUIRE(*is_done ? WEXITSTATUS(how) == CHILD_DONE : WIFSTOPPED(how), "the child: wait status %#x", (unsigned)how);
    return child;
}

static int go_on(pid_t child)
{
    int how;
    kill(child, SIGCONT);
    REQUIRE(waitpid(child, &how, 0) == child && WIFEXITED(how), "the child went on: wait status %#x", (unsigned)how);
    return WEXITSTATUS(how);
}

static void do_lead_badly(void)
{
    (void)fill(KEY_ID, 1, tokens_before[ticket.index]);
    (void)lec_flight_advance(&leaders, ticket, PROGRESS, world.now, LOCK_TIMEOUT);
    (void)lec_flight_renew(&leaders, ticket, 100 * LEASE, world.now, LOCK_TIMEOUT);
    (void)lec_flight_end(&leaders, ticket, world.now, LOCK_TIMEOUT);
}

/* The parent leads in L's place; then L wakes. */
static void outlive(pid_t child, struct lec_ticket got)
{
    struct buffer buffer = {0};
    bool was_filled = get_id(&world, KEY_ID, NULL, NULL) == LEC_OK;
    uint64_t token = fill_token(KEY_ID);
    REQUIRE(go_on(child) == CHILD_DONE, "L went on badly");
    REQUIRE(lec_flight_state(&world.handle, got, world.now) == 0, "its former leader touched the flight");
    REQUIRE((get_id(&world, KEY_ID, NULL, NULL) == LEC_OK) == was_filled, "its former leader filled, late");
    REQUIRE(fill(KEY_ID, 2, token) == LEC_OK, "the new leader's fill");
    REQUIRE(get_id(&world, KEY_ID, &buffer, NULL) == LEC_OK && value_is(buffer.data, buffer.bytes, KEY_ID, 2), "the new leader's value");
    REQUIRE(lec_flight_end(&world.handle, got, world.now, LOCK_TIMEOUT) == LEC_OK, "end");
    free(buffer.data);
}

static void stop_leaders_everywhere(void)
{
    uint64_t stops = 0, locked_out = 0, begun;
    stage_open();
    one_flies();
    world_save(&world);
    begun = world.now;
    for (uint64_t at = 1;; at++, stops++) {
        enum lec_role role;
        struct lec_ticket got;
        bool is_done;
        context_set("leader stopped at point %llu", (unsigned long long)at);
        world_restore(&world);
        world.now = begun;
        pid_t child = stopped_child(do_lead_badly, at, false, &is_done);
        if (is_done) break;
        world.now += 200 * LEASE;               /* L may have renewed */
        enum lec_status status = try_join(&world.handle, KEY_ID, SHORT_TIMEOUT, &role, &got);
        if (status == LEC_OK) {
            REQUIRE(role == LEC_FLIGHT_TAKEN_OVER || role == LEC_FLIGHT_LED, "role %d", (int)role);
            outlive(child, got);
        } else {
            REQUIRE(status == LEC_BUSY && role == LEC_FLIGHT_NONE && got.token == 0, "status %d, role %d", (int)status, (int)role);
            REQUIRE(go_on(child) == CHILD_DONE, "L went on badly");
            locked_out++;
        }
        REQUIRE(world_check(&world) == 0, "the checker complains");
    }
    printf("test_flight_deaths: %llu stopped leaders, %llu of them holding the lock\n", (unsigned long long)stops, (unsigned long long)locked_out);
    REQUIRE(locked_out > 0 && locked_out < stops, "of both kinds");
    stage_close();
}

/* ---- on the way to sleep ---- */

#define WAITER_POINTS 20u           /* two rounds of a wait */

/* It would sleep on a word that nobody changes or wakes any more. */
static void look_before_sleep(const void *word)
{
    const struct lec_flight *flight = record(ticket.index);
    if (word != &flight->wake) return;
    if (flight->owner != leaders.identity || flight->fencing_token != ticket.token || flight->progress != 0) _exit(CHILD_LOST);
}

static void do_wait(void)
{
    int64_t state = lec_flight_wait(&world.handle, ticket, 0, world.now, 10 * SECOND);
    REQUIRE(state == LEC_FLIGHT_OVER || state == PROGRESS, "state %lld", (long long)state);
}

static void do_replace(void)
{
    struct lec_ticket got;
    world.now += 2 * LEASE;
    REQUIRE(join(&world.handle, KEY_ID, &got) == LEC_FLIGHT_TAKEN_OVER, "takeover");
    world.now -= 2 * LEASE;
}

static void stop_waiters_everywhere(const char *name, void (*change)(void))
{
    stage_open();
    one_flies();
    world_save(&world);
    points_on_sleep(look_before_sleep);
    for (uint64_t at = 1; at <= WAITER_POINTS; at++) {
        bool is_done;
        context_set("%s: waiter stopped at access %llu", name, (unsigned long long)at);
        world_restore(&world);
        pid_t child = stopped_child(do_wait, at, true, &is_done);
        REQUIRE(!is_done, "the waiter did not wait");
        change();
        int how = go_on(child);
        REQUIRE(how == CHILD_DONE, "%s", how == CHILD_LOST ? "it slept through the change" : "it went on badly");
    }
    points_on_sleep(NULL);
    stage_close();
}

int main(void)
{
    uint64_t begun = wall_clock_ns();
    for (unsigned index = 0; index < sizeof calls / sizeof *calls; index++) {
        uint64_t deaths = kill_everywhere(&calls[index]);
        printf("%-34s %6llu deaths\n", calls[index].name, (unsigned long long)deaths);
        REQUIRE(deaths > 0, "%s stores nothing", calls[index].name);
    }
    stop_leaders_everywhere();
    stop_waiters_everywhere("end", do_end);
    stop_waiters_everywhere("advance", do_advance);
    stop_waiters_everywhere("take over", do_replace);
    printf("test_flight_deaths: %.1f s\n", (double)(wall_clock_ns() - begun) / 1e9);
    return 0;
}
