/* One scenario per mutation: the segment it starts from, the call, and what a death inside the call may leave behind. */
#ifndef LEC_TEST_SCENARIOS_H
#define LEC_TEST_SCENARIOS_H

#include "support.h"

#define MAX_IDS 512u
#define ABSENT_ID 100000u           /* a key that no scenario ever stores */
#define OLD_SEQUENCE 1u
#define NEW_SEQUENCE 2u
#define COUNTER_OLD "41"            /* of the incr scenario */
#define COUNTER_NEW "1041"

/* What the key being written may be afterwards, and what may have happened to the others. */
enum outcome {
    IS_OLD = 1, IS_NEW = 2, IS_MISSING = 4,     /* the target */
    OTHERS_MAY_GO = 8,                          /* any other key may have been evicted */
    ALL_OR_NONE = 16,                           /* clear: either every key is there or none is */
    MAY_RETIRE = 32,                            /* the segment may be retired */
};

/* What the segment holds when the call begins. A size of NO_VALUE: the key is absent. */
#define NO_VALUE UINT64_MAX
struct stage {
    uint64_t old_bytes[MAX_IDS];    /* sizes of the values of sequence OLD_SEQUENCE */
    uint32_t ids;                   /* keys 0 .. ids - 1 are in use */
    uint32_t target;                /* the key that the call writes, or ABSENT_ID */
    uint64_t new_bytes;             /* size of the value of sequence NEW_SEQUENCE */
    uint64_t expected;              /* version or token for the call */
    bool target_is_counter;
    uint64_t expires_below;         /* ids below this one are expired when the call begins */
    bool leave_unchecked;           /* what the checker would tidy away (a dead writer's units) is part of the stage */
};

struct scenario {
    const char *name;
    struct lec_config config;
    uint64_t spare_bytes;           /* beyond the smallest segment of this configuration */
    void (*prepare)(struct world *world, struct stage *stage);
    enum lec_status (*act)(struct world *world, const struct stage *stage);
    unsigned when_killed;           /* legal outcomes of a death at any point */
    unsigned when_done;             /* legal outcomes of the whole call */
};

extern const struct scenario scenarios[];
extern const unsigned scenario_count;

#endif
