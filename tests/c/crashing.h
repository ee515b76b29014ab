/* Children that die on purpose, and the look their parent takes at what they left. */
#ifndef LEC_TEST_CRASHING_H
#define LEC_TEST_CRASHING_H

#include "killpoints.h"
#include "scenarios.h"

/* A scenario set up: its segment is saved, world_restore() brings the start back. */
struct play {
    const struct scenario *scenario;
    struct world world;
    struct stage stage;
    struct lec_totals before;           /* statistics that must never shrink */
    uint64_t token;                     /* of the target, taken before the call */
    bool target_was_there;
    uint64_t entries_when_refilled;     /* how many keys of REFILL_BYTES a fresh segment of this configuration takes */
    uint64_t slowest_ns;                /* longest first operation after a death so far */
};

void play_open(struct play *play, const struct scenario *scenario);
void play_close(struct play *play);

/* Runs work() in a forked child that dies at point `at`. Returns false when the child came to the end instead. */
typedef void (*child_work)(struct play *play);
bool child_dies(struct play *play, child_work work, uint64_t at, bool with_loads);
uint64_t points_in(struct play *play, bool with_loads);     /* of the scenario's call */
void work_scenario(struct play *play);  /* the scenario's call */
void work_recover(struct play *play);   /* what makes a process recover: a write, and a reap */

/* The survivor's look: prompt, sound, right values, no unit lost. thorough: and the whole segment can be filled again. */
void survivor_looks(struct play *play, unsigned legal, bool thorough);

#endif
