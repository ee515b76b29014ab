/* The arena of one shard: runs of 64-byte units, handed out and taken back under the shard's lock.
 *
 * Free runs hang in segregated bins, oldest first: exact sizes below 64 units, four bins per power of two above.
 * A request gets the best-fitting run; where no run is long enough it gets the longest there is, and the caller
 * chains (chain.h). So no request fails while enough units are free, however they are scattered.
 *
 *     unit:   0   1   2   3   4   5   6   7   8
 *           [ entry     ][ free run      ][ entry ...        bitmap `used`: 1 1 1 0 0 0 0 1 1
 *                         ^head        ^units again in the last 4 bytes, for the right neighbour to coalesce
 *
 * All of this is derived data: recovery clears the bitmap, marks what published entries and live reservations
 * occupy, and builds the bins again. What is read back from shared memory is checked against the bitmap before it
 * is believed; a contradiction is LEC_SPACE_DAMAGED, and the shard is rebuilt.
 */
#ifndef LEC_SPACE_H
#define LEC_SPACE_H

#include <stdbool.h>
#include <stdint.h>

#include "internal.h"

#define LEC_UNIT 64u
#define LEC_EXACT_BINS 64u          /* runs of 1 .. 63 units: bin = units - 1 */
#define LEC_SPACE_BINS 160u         /* and 4 per power of two for 2**6 .. 2**29 */

enum lec_space_status { LEC_SPACE_OK = 0, LEC_SPACE_FULL, LEC_SPACE_DAMAGED };

struct lec_bin { uint32_t head, tail; };    /* units of the first and the last free run, LEC_NONE when empty */

struct lec_space {
    uint32_t free_units;            /* stored as a relaxed atomic: statistics read it without the lock */
    uint32_t free_runs;
    uint64_t occupied[(LEC_SPACE_BINS + 63) / 64];  /* bit set: the bin is not empty */
    struct lec_bin bins[LEC_SPACE_BINS];
};

/* Process-private: where the shard's space lies, and its trusted size. */
struct lec_space_view {
    struct lec_space *state;
    uint64_t *used;                 /* one bit per unit */
    uint8_t *arena;
    uint32_t units;
};

/* At the start of a free run; its length stands again in the last 4 bytes of its last unit. */
struct lec_run { uint32_t prev, next, units; };

/* Everything free, as one run. */
LEC_INTERNAL void lec_space_reset(const struct lec_space_view *view);
/* One run of at most `wanted` units: exactly `wanted` where some run is that long, else the longest. */
LEC_INTERNAL enum lec_space_status lec_space_take(const struct lec_space_view *view, uint32_t wanted, uint32_t *unit, uint32_t *units);
/* Would lec_space_take() find `wanted` units in one run? (A run that only just fits may be overlooked.) */
LEC_INTERNAL bool lec_space_has_run(const struct lec_space_view *view, uint32_t wanted);
/* Where a request of `wanted` units will probably be put; LEC_NONE: that cannot be told at a glance. */
LEC_INTERNAL uint32_t lec_space_next(const struct lec_space_view *view, uint64_t wanted);
LEC_INTERNAL enum lec_space_status lec_space_give(const struct lec_space_view *view, uint32_t unit, uint32_t units);

/* Recovery: clear the bitmap, mark each reached run (false: out of the arena or reached before), then rebuild the bins. */
LEC_INTERNAL void lec_space_unmark_all(const struct lec_space_view *view);
LEC_INTERNAL bool lec_space_mark(const struct lec_space_view *view, uint32_t unit, uint32_t units);
LEC_INTERNAL void lec_space_rebuild(const struct lec_space_view *view);

/* Broken invariants of bins, runs and bitmap against each other; 0 when sound. `report` may be NULL. */
typedef void (*lec_space_report_fn)(void *context, const char *message, uint64_t detail);
LEC_INTERNAL uint32_t lec_space_check(const struct lec_space_view *view, lec_space_report_fn report, void *context);

static inline bool lec_space_holds(const struct lec_space_view *view, uint32_t unit, uint32_t units)
{
    return units > 0 && unit < view->units && units <= view->units - unit;
}
static inline uint8_t *lec_space_at(const struct lec_space_view *view, uint32_t unit) { return view->arena + (uint64_t)unit * LEC_UNIT; }

#endif
