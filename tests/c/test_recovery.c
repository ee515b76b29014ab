/* Kills the process that recovers, too: one child dies in a mutation, the next at every store of the recovery, the
 * next at a random one, and the parent must find everything as if only the first had died.
 *
 *   RECOVERY_STRIDE=n      every n-th point of the recovery (default 15, and 1 for the scenario "overwrite, larger")
 *   RECOVERY_FIRST=n       n different points at which the first child dies, spread evenly (default 3)
 *   RECOVERY_SEED=n        of the third child's points
 */
#include <string.h>

#include "crashing.h"

/* The state that the first death leaves. Restoring it brings the abandoned lock back with it. */
static bool first_death(struct play *play, uint64_t at)
{
    world_restore(&play->world);
    if (!child_dies(play, work_scenario, at, false)) return false;
    world_save(&play->world);
    return true;
}

static uint64_t kill_recoverers(struct play *play, uint64_t first, uint64_t stride, struct random *random)
{
    uint64_t deaths = 0;
    for (uint64_t second = 1;; second += stride) {
        uint64_t third = 1 + random_below(random, second + 8);
        context_set("%s: killed at point %llu; recoverers at %llu and %llu", play->scenario->name,
                    (unsigned long long)first, (unsigned long long)second, (unsigned long long)third);
        world_restore(&play->world);
        if (!child_dies(play, work_recover, second, false)) return deaths;
        deaths++;
        if (second % 3 == 0) deaths += child_dies(play, work_recover, third, false);
        survivor_looks(play, play->scenario->when_killed, deaths % 16 == 1);
    }
}

static uint64_t recover_from(const struct scenario *scenario, uint64_t first_points, uint64_t stride, struct random *random)
{
    uint64_t deaths = 0;
    struct play play;
    play_open(&play, scenario);
    uint8_t *start = play.world.image;
    uint64_t points = points_in(&play, false);
    for (uint64_t number = 1; number <= first_points; number++) {
        uint64_t first = points * number / (first_points + 1) + 1;
        play.world.image = start;
        world_restore(&play.world);
        play.world.image = NULL;
        world_save(&play.world);
        if (first_death(&play, first)) deaths += 1 + kill_recoverers(&play, first, stride, random);
        free(play.world.image);
    }
    play.world.image = start;
    printf("%-34s %6llu deaths, slowest first operation %5.1f ms\n", scenario->name, (unsigned long long)deaths,
           (double)play.slowest_ns / 1e6);
    fflush(stdout);
    play_close(&play);
    return deaths;
}

int main(void)
{
    struct random random = {setting("RECOVERY_SEED", 20)};
    uint64_t stride = setting("RECOVERY_STRIDE", 15), first_points = setting("RECOVERY_FIRST", 3), all = 0;
    uint64_t begun = wall_clock_ns();
    const char *only = getenv("CRASH_ONLY");
    printf("test_recovery: seed %llu\n", (unsigned long long)random.state);
    for (unsigned index = 0; index < scenario_count; index++) {
        if (only && !strstr(scenarios[index].name, only)) continue;
        bool is_full = !strcmp(scenarios[index].name, "overwrite, larger");
        all += recover_from(&scenarios[index], first_points, is_full ? 1 : stride, &random);
    }
    printf("test_recovery: %llu deaths, %.1f s\n", (unsigned long long)all, (double)(wall_clock_ns() - begun) / 1e9);
    return 0;
}
