/* What was asked of the sampled keys, lately: a ring of events in each shard, from which another process tells how a
 * cache of another size would have done.
 *
 * Sampled are the keys that the race of miniatures watches (shadow.h), so nothing is looked at for this alone: an event
 * is written where the policy has already found a sampled key's insert, hits or end. Nothing is ever read here by the
 * kernel itself, and any content is harmless: indices are taken modulo, an event is one word, and what a reader copies
 * without the lock it bounds and checks against `written` afterwards.
 *
 * Beside the ring, marks tell every LEC_SAMPLES_PER_MARK events when it was and what the host had looked up by then.
 * Guard: the shard's lock for stores, none for reading.
 */
#ifndef LEC_SAMPLES_H
#define LEC_SAMPLES_H

#include <stdbool.h>
#include <stdint.h>

#include "internal.h"

#define LEC_SAMPLES_MOST 32768u         /* events per shard: 256 KiB */
#define LEC_SAMPLES_LEAST 64u           /* less memory than for these, and there is no ring */
#define LEC_SAMPLES_PER_MARK 256u

/* What an event tells; bits 24..25 of it. That a value is replaced is none: to know whether its key is sampled would cost each
 * such set a fiftieth. It counts as a hit, and keeps its first deadline in the replay. */
enum lec_sample_kind {
    LEC_SAMPLE_INSERT = 0,              /* stored where there was nothing: a miss, but for writers that never look */
    LEC_SAMPLE_HIT = 1,                 /* asked for once or oftener since the last event */
    LEC_SAMPLE_GONE = 2,                /* deleted, or idle for too long; not: past its deadline */
    LEC_SAMPLE_NONE = 3,                /* no event; damage */
};

/* An event: bits 32..63 the key's sample hash, 26..27 hits less one, 24..25 kind, 12..23 units, 0..11 the time left in ms,
 * both as lec_sample_code(); the time is LEC_SAMPLE_FOREVER for a key that never expires. */
#define LEC_SAMPLE_CODE_BITS 12u
#define LEC_SAMPLE_FOREVER 0xfffu

struct lec_sample_mark {
    uint64_t number;                    /* of the next event then */
    uint64_t at_ns;                     /* CLOCK_MONOTONIC */
    uint64_t threshold;                 /* keys were sampled if their sample hash did not exceed this */
    uint64_t hits, misses;              /* the slab's, over all processes */
    uint64_t counted_hits, counted_misses; /* LEC_COUNTER_HITS and _MISSES, over all processes */
};

/* In the shard's state. */
struct lec_samples {
    uint64_t written;                   /* events ever; event n lies at n modulo their number */
    uint64_t begun;                     /* the first event since the shard was last empty */
    uint64_t marked;                    /* marks ever */
    uint64_t mark_due;                  /* as soon as so many events are written */
};

/* Process-private: where they lie, with trusted geometry. */
struct lec_samples_view {
    struct lec_samples *state;
    uint64_t *events;
    struct lec_sample_mark *marks;
    uint32_t event_count;               /* 0: there is no ring */
    uint32_t mark_count;                /* three at least, if there is a ring */
};

struct lec_sample { uint32_t hash, hits, units; enum lec_sample_kind kind; uint64_t left_ns; };

/* How many events fit into so many bytes, marks included; and how many marks go with them. */
LEC_INTERNAL uint32_t lec_samples_for(uint64_t bytes);
LEC_INTERNAL uint32_t lec_sample_marks_for(uint32_t event_count);

/* A number in 12 bits: exact below 128, else rounded down by less than 1/128. Never LEC_SAMPLE_FOREVER. */
LEC_INTERNAL uint32_t lec_sample_code(uint64_t value);
LEC_INTERNAL uint64_t lec_sample_value(uint32_t code);

/* Any word is an event. */
LEC_INTERNAL struct lec_sample lec_sample_of(uint64_t event);

LEC_INTERNAL void lec_samples_note(const struct lec_samples_view *view, const struct lec_sample *sample);
/* Is it time for the next mark? Then lec_samples_mark(), which fills in its number. */
static inline bool lec_samples_want_mark(const struct lec_samples_view *view) { return view->state->written >= view->state->mark_due; }
LEC_INTERNAL void lec_samples_mark(const struct lec_samples_view *view, const struct lec_sample_mark *mark);
/* The shard is empty: what was before tells nothing any more. */
LEC_INTERNAL void lec_samples_restart(const struct lec_samples_view *view);
/* Do the counts fit together? Repairing forgets what is in the ring. */
LEC_INTERNAL bool lec_samples_are_sound(const struct lec_samples_view *view);
LEC_INTERNAL void lec_samples_repair(const struct lec_samples_view *view);

/* Copies what is there: into events[event_count] and marks[mark_count], oldest first. No lock: what was overwritten meanwhile
 * is left out. `first` is the number of events[0]; what is before `begun` belongs to what the shard held before it was cleared. */
struct lec_samples_copy {
    uint64_t *events;
    struct lec_sample_mark *marks;
    uint32_t event_count, mark_count;
    uint32_t entries, units, threshold; /* what the shard may hold, and which keys are sampled now; lec_samples_of() */
    uint64_t first, begun;
};
LEC_INTERNAL void lec_samples_read(const struct lec_samples_view *view, struct lec_samples_copy *copy);

#endif
