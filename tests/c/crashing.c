/* See crashing.h. */
#include "crashing.h"

#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define PROMPT_NS (500 * MILLISECOND)   /* the guarantee is 50 ms on an idle machine; a loaded one gets ten times that */
#define CHILD_SECONDS 20u               /* a child that takes longer hangs */
#define CHILD_DONE 42
#define REFILL_BYTES 700u
#define REFILL_FIRST_ID 1000u

/* ---- setting up ---- */

static uint64_t refill(struct world *world)
{
    struct lec_totals totals;
    uint64_t rounds = world->bytes / REFILL_BYTES + world->config.max_entries + 8;
    if (rounds > 2u * world->config.max_entries + 8) rounds = 2u * world->config.max_entries + 8;
    for (uint64_t round = 0; round < rounds; round++) {
        enum lec_status status = set_id(world, REFILL_FIRST_ID + (uint32_t)round, NEW_SEQUENCE, REFILL_BYTES);
        REQUIRE(status == LEC_OK, "refill %llu: %d", (unsigned long long)round, (int)status);
    }
    world_totals(world, &totals);
    return totals.entries;
}

static void take_token(struct play *play)
{
    struct lec_read read = {.wants_token = true};
    play->target_was_there = get_id(&play->world, play->stage.target, NULL, &read) == LEC_OK;
    play->token = read.token;
}

void play_open(struct play *play, const struct scenario *scenario)
{
    memset(play, 0, sizeof *play);
    play->scenario = scenario;
    context_set("%s: setting up", scenario->name);
    world_create(&play->world, &scenario->config, scenario->spare_bytes);
    play->entries_when_refilled = refill(&play->world);
    world_destroy(&play->world);
    world_create(&play->world, &scenario->config, scenario->spare_bytes);
    points_watch(play->world.base, play->world.bytes);
    scenario->prepare(&play->world, &play->stage);
    REQUIRE(play->stage.leave_unchecked || world_check(&play->world) == 0, "the stage is not sound");
    take_token(play);
    world_totals(&play->world, &play->before);
    world_save(&play->world);
}

void play_close(struct play *play) { world_destroy(&play->world); }

/* ---- dying ---- */

void work_scenario(struct play *play)
{
    enum lec_status status = play->scenario->act(&play->world, &play->stage);
    REQUIRE(status == LEC_OK, "the call says %d", (int)status);
}

uint64_t points_in(struct play *play, bool with_loads)
{
    struct lec_handle handle = play->world.handle;      /* the call may detach it */
    world_restore(&play->world);
    points_arm(POINTS_COUNT, 0, with_loads);
    work_scenario(play);
    play->world.handle = handle;
    return points_stores() + (with_loads ? points_loads() : 0);
}

void work_recover(struct play *play)
{
    enum lec_status status = delete_id(&play->world, ABSENT_ID);
    REQUIRE(status == LEC_ABSENT || status == LEC_RETIRED, "the survivor's write says %d", (int)status);
    lec_reap(&play->world.handle, play->world.now, LOCK_TIMEOUT);
}

bool child_dies(struct play *play, child_work work, uint64_t at, bool with_loads)
{
    pid_t child = fork();
    REQUIRE(child >= 0, "fork");
    if (child == 0) {
        alarm(CHILD_SECONDS);
        world_enter_child(&play->world);
        points_arm(POINTS_KILL, at, with_loads);
        work(play);
        _exit(CHILD_DONE);
    }
    int how;
    REQUIRE(waitpid(child, &how, 0) == child, "waitpid");
    if (WIFSIGNALED(how) && WTERMSIG(how) == SIGKILL) return true;
    REQUIRE(WIFEXITED(how) && WEXITSTATUS(how) == CHILD_DONE, "the child ended with wait status %#x%s", (unsigned)how,
            WIFSIGNALED(how) && WTERMSIG(how) == SIGALRM ? " (it hung)" : "");
    return false;
}

/* ---- looking ---- */

static bool counter_is(const struct buffer *buffer, const char *text)
{
    return buffer->bytes == strlen(text) && memcmp(buffer->data, text, buffer->bytes) == 0;
}

static bool holds_old(const struct play *play, uint32_t id, const struct buffer *buffer)
{
    if (id == play->stage.target && play->stage.target_is_counter) return counter_is(buffer, COUNTER_OLD);
    return buffer->bytes == play->stage.old_bytes[id] && value_is(buffer->data, buffer->bytes, id, OLD_SEQUENCE);
}

static bool holds_new(const struct play *play, uint32_t id, const struct buffer *buffer)
{
    if (play->stage.target_is_counter) return counter_is(buffer, COUNTER_NEW);
    return buffer->bytes == play->stage.new_bytes && value_is(buffer->data, buffer->bytes, id, NEW_SEQUENCE);
}

/* The outcome bit of the target. */
static unsigned look_at_target(struct play *play, struct buffer *buffer)
{
    uint32_t id = play->stage.target;
    enum lec_status status = get_id(&play->world, id, buffer, NULL);
    if (status == LEC_RETIRED) return MAY_RETIRE;
    if (status == LEC_ABSENT) return IS_MISSING;
    REQUIRE(status == LEC_OK, "get of the target says %d", (int)status);
    if (holds_new(play, id, buffer)) return IS_NEW;
    REQUIRE(id < MAX_IDS && holds_old(play, id, buffer), "the target holds neither value: %llu bytes", (unsigned long long)buffer->bytes);
    return IS_OLD;
}

/* True when the key is there, with exactly its bytes. */
static bool look_at_other(struct play *play, uint32_t id, unsigned legal, struct buffer *buffer)
{
    enum lec_status status = get_id(&play->world, id, buffer, NULL);
    bool is_expected = play->stage.old_bytes[id] != NO_VALUE && id >= play->stage.expires_below;
    if (status == LEC_OK) {
        REQUIRE(is_expected, "key %u came back from the dead", id);
        REQUIRE(holds_old(play, id, buffer), "key %u holds other bytes", id);
        return true;
    }
    REQUIRE(status == LEC_ABSENT || (status == LEC_RETIRED && legal & MAY_RETIRE), "get of key %u says %d", id, (int)status);
    REQUIRE(!is_expected || legal & (OTHERS_MAY_GO | ALL_OR_NONE | MAY_RETIRE), "key %u is gone", id);
    return false;
}

/* What the call did to the key is visible: then no fill that began before may undo it, though its author died. */
static void look_at_token(struct play *play, unsigned outcome, unsigned legal)
{
    bool was_removed = outcome == IS_MISSING && play->target_was_there && !(legal & OTHERS_MAY_GO);
    if (outcome != IS_NEW && !was_removed) return;
    enum lec_status status = store_id(&play->world, play->stage.target, OLD_SEQUENCE, 50, LEC_FILL, play->token, 0);
    REQUIRE(status == LEC_MISMATCH, "a fill from before the call says %d", (int)status);
}

static void look_at_values(struct play *play, unsigned legal)
{
    struct buffer buffer = {0};
    uint32_t there = 0, expected = 0;
    unsigned outcome = look_at_target(play, &buffer);
    REQUIRE(outcome & (legal | (legal & ALL_OR_NONE ? IS_MISSING : 0)), "outcome %#x of the target, legal are %#x", outcome, legal);
    for (uint32_t id = 0; id < play->stage.ids; id++) {
        if (id == play->stage.target) continue;
        expected += play->stage.old_bytes[id] != NO_VALUE;
        there += look_at_other(play, id, legal, &buffer);
    }
    REQUIRE(!(legal & ALL_OR_NONE) || there == 0 || there == expected, "%u of %u keys outlived clear()", there, expected);
    free(buffer.data);
    if (play->stage.target != ABSENT_ID) look_at_token(play, outcome, legal);
}

/* Totals over all processes, dead ones included, only grow. */
static void look_at_sums(struct play *play)
{
    struct lec_totals totals;
    world_totals(&play->world, &totals);
    for (unsigned stat = 0; stat < LEC_STAT_COUNT; stat++)
        REQUIRE(totals.stats[stat] >= play->before.stats[stat], "statistic %u fell from %llu to %llu", stat,
                (unsigned long long)play->before.stats[stat], (unsigned long long)totals.stats[stat]);
}

/* The checker gives the dead's reservations back before it looks: there must be none left after lec_reap(). */
static void look_at_structure(struct play *play)
{
    struct lec_totals before, after;
    world_totals(&play->world, &before);
    REQUIRE(world_check(&play->world) == 0, "the checker complains");
    world_totals(&play->world, &after);
    REQUIRE(before.used_bytes == after.used_bytes, "%llu bytes were in use, %llu after the check", (unsigned long long)before.used_bytes,
            (unsigned long long)after.used_bytes);
}

static void empty_it(struct play *play)
{
    struct lec_totals totals;
    for (uint32_t id = 0; id < play->stage.ids; id++) (void)delete_id(&play->world, id);
    world_totals(&play->world, &totals);
    REQUIRE(totals.entries == 0 && totals.payload_bytes == 0, "%llu entries of %llu bytes are left",
            (unsigned long long)totals.entries, (unsigned long long)totals.payload_bytes);
    REQUIRE(totals.used_bytes == 0, "%llu bytes leaked", (unsigned long long)totals.used_bytes);
}

static void refill_it(struct play *play)
{
    uint64_t entries = refill(&play->world);
    REQUIRE(entries == play->entries_when_refilled, "refilled with %llu entries, a fresh segment takes %llu",
            (unsigned long long)entries, (unsigned long long)play->entries_when_refilled);
    REQUIRE(world_check(&play->world) == 0, "after the refill");
}

void survivor_looks(struct play *play, unsigned legal, bool thorough)
{
    points_disarm();
    uint64_t begun = wall_clock_ns();
    enum lec_status status = delete_id(&play->world, ABSENT_ID);
    uint64_t took = wall_clock_ns() - begun;
    if (took > play->slowest_ns) play->slowest_ns = took;
    REQUIRE(took < PROMPT_NS, "the first operation took %llu ms", (unsigned long long)(took / MILLISECOND));
    REQUIRE(status == LEC_ABSENT || (status == LEC_RETIRED && legal & MAY_RETIRE), "the first operation says %d", (int)status);
    if (status == LEC_RETIRED) return;
    lec_reap(&play->world.handle, play->world.now, LOCK_TIMEOUT);
    look_at_structure(play);
    look_at_values(play, legal);
    look_at_sums(play);
    empty_it(play);
    if (thorough) refill_it(play);
}
