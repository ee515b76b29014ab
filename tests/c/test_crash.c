/* Kills a process before every single store to shared memory of every mutation, and looks at what the others find.
 *
 *   CRASH_MOST=n      at most so many deaths a scenario (default 2500, spread evenly: only clear(), which zeroes whole
 *                     tables, and readers, whose loads count too, have more points; 0 = all of them)
 *   CRASH_ONLY=text   only scenarios whose name has text
 */
#include <string.h>

#include "crashing.h"

#define REFILL_EVERY 16u            /* deaths between two complete refills: they take longest */

static uint64_t kill_at_every_point(struct play *play, uint64_t most, bool with_loads)
{
    const struct scenario *scenario = play->scenario;
    uint64_t deaths = 0, stride = most ? points_in(play, with_loads) / most + 1 : 1;
    for (uint64_t at = 1;; at += stride) {
        context_set("%s: killed at point %llu%s", scenario->name, (unsigned long long)at, with_loads ? " (loads, too)" : "");
        world_restore(&play->world);
        bool died = child_dies(play, work_scenario, at, with_loads);
        deaths += died;
        survivor_looks(play, died ? scenario->when_killed : scenario->when_done, !died || deaths % REFILL_EVERY == 1);
        if (!died) return deaths;
    }
}

static bool is_reader(const struct scenario *scenario)
{
    return !strcmp(scenario->name, "read") || !strcmp(scenario->name, "scan, totals, check");
}

int main(void)
{
    uint64_t most = setting("CRASH_MOST", 2500), all = 0, slowest = 0, begun = wall_clock_ns();
    const char *only = getenv("CRASH_ONLY");
    for (unsigned index = 0; index < scenario_count; index++) {
        struct play play;
        if (only && !strstr(scenarios[index].name, only)) continue;
        play_open(&play, &scenarios[index]);
        bool with_loads = is_reader(&scenarios[index]);
        uint64_t deaths = kill_at_every_point(&play, most, with_loads);
        printf("%-34s %6llu deaths, slowest first operation %5.1f ms\n", scenarios[index].name, (unsigned long long)deaths,
               (double)play.slowest_ns / 1e6);
        fflush(stdout);
        all += deaths;
        if (play.slowest_ns > slowest) slowest = play.slowest_ns;
        play_close(&play);
    }
    printf("test_crash: %llu deaths, slowest %.1f ms, %.1f s\n", (unsigned long long)all, (double)slowest / 1e6,
           (double)(wall_clock_ns() - begun) / 1e9);
    return 0;
}
