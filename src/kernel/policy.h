/* Which entry leaves when room is needed: W-TinyLFU with lazy promotion and a window that adapts.
 *
 *     insert -> [ window ] -- contest by frequency --> [ probation ] -- touched --> [ protected ]
 *                   |  tail loses: evicted                 | tail: evicted  <-- untouched --'
 *
 * A hit never comes here: the reader bumps the touch byte in the bucket line it reads anyway. The policy learns of
 * hits when it examines an entry at the tail of a list (as CLOCK and S3-FIFO do): it takes the touches, adds them to
 * the sketch and moves the entry on.
 *
 * Guard: every function needs the shard's lock unless it says otherwise. Everything behind `view->state` and `view->sketch` and the links of
 * the nodes is derived data: every index read from there is bounded before use, every loop has a fixed bound, and
 * damage is answered with LEC_POLICY_DAMAGED, after which the caller rebuilds.
 */
#ifndef LEC_POLICY_H
#define LEC_POLICY_H

#include <stdint.h>

#include "node.h"
#include "samples.h"
#include "shadow.h"
#include "sketch.h"

enum lec_policy_status { LEC_POLICY_OK = 0, LEC_POLICY_EMPTY = 1, LEC_POLICY_DAMAGED = 2 };

struct lec_policy_list {
    uint32_t head, tail;            /* node ids, LEC_NONE when empty; entries come in at the head */
    uint32_t entries, units;
};

/* One shard's policy state in shared memory. The caller lays it out, 64-byte aligned, and never looks inside. */
struct lec_policy {
    struct lec_policy_list lists[4];/* by enum lec_list; [LEC_LIST_FREE] is unused */
    uint64_t random;                /* xorshift state, never 0 */
    struct lec_sketch_aging aging;
    uint32_t large_losses;          /* of larger candidates since an entry of the main space was last found touched, up to a bound */
    uint32_t is_memory_short;       /* the last hunt for a victim was for memory, not for a node */
    struct lec_shadow shadow;       /* finds the window's share */
};

/* Process-private: pointers into the segment and trusted geometry. */
struct lec_policy_view {
    struct lec_policy *state;
    struct lec_node *nodes;         /* max_entries of them */
    struct lec_bucket *buckets;     /* bucket_count of them; only touch bytes are used */
    uint64_t *sketch;               /* lec_policy_sketch_lines(max_entries) lines of 64 bytes, 64-byte aligned */
    uint64_t seed;                  /* keys the sketch */
    uint32_t max_entries;           /* 1 .. UINT32_MAX / 16 */
    uint32_t bucket_count;
    uint32_t total_units;           /* at least 1 */
    uint64_t now_ns;                /* of the operation under way; for the time that samples have left */
    struct lec_samples_view samples; /* told of what happens to sampled keys; may have no ring */
};

/* Called once per broken invariant; `id` is the node concerned or LEC_NONE. */
typedef void lec_policy_report(void *context, const char *invariant, uint32_t id);

LEC_INTERNAL uint32_t lec_policy_sketch_lines(uint32_t max_entries);

/* Empty lists, zeroed sketch. Does not touch the nodes. */
LEC_INTERNAL void lec_policy_reset(const struct lec_policy_view *view);

/* Links a new entry into the window. Before: tag, slot and units are set, list == FREE. Clears the slot's touches. */
LEC_INTERNAL enum lec_policy_status lec_policy_insert(const struct lec_policy_view *view, uint32_t id);

/* The value was replaced: an access, and maybe another size (in units). */
LEC_INTERNAL enum lec_policy_status lec_policy_update(const struct lec_policy_view *view, uint32_t id, uint32_t new_units);

/* Deleted or expired. After: list == FREE, out of every list. */
LEC_INTERNAL enum lec_policy_status lec_policy_remove(const struct lec_policy_view *view, uint32_t id);

/* Chooses the entry to evict next to make room for a newcomer, and does the promotions that are due. Never
 * protect_id (LEC_NONE: nobody is protected). LEC_POLICY_EMPTY: there is nobody else. Nothing is unlinked. */
LEC_INTERNAL enum lec_policy_status lec_policy_victim(const struct lec_policy_view *view, uint32_t protect_id, uint32_t *victim);

/* Unlinks a victim; as lec_policy_remove, but the key is remembered. */
LEC_INTERNAL enum lec_policy_status lec_policy_evict(const struct lec_policy_view *view, uint32_t id);

/* Recovery. `live` has bit id set for every live node (tag, slot and units are right; links and list may be anything);
 * `scratch` is overwritten; both have lec_policy_bitmap_words(max_entries) words. Keeps the order of what is soundly
 * reached, appends the rest, marks all others FREE, recomputes every counter. Always succeeds; may be repeated. */
LEC_INTERNAL void lec_policy_rebuild(const struct lec_policy_view *view, const uint64_t *live, uint64_t *scratch);
LEC_INTERNAL uint32_t lec_policy_bitmap_words(uint32_t max_entries);

/* Asks for the cache line that counting this key will touch. No lock needed. */
LEC_INTERNAL void lec_policy_warm(const struct lec_policy_view *view, uint32_t tag);

/* Who is likely to leave next: the ends of window and probation, LEC_NONE where there is none. Not validated. */
#define LEC_POLICY_TAILS 2u
LEC_INTERNAL void lec_policy_tails(const struct lec_policy_view *view, uint32_t tails[LEC_POLICY_TAILS]);

/* How often the key was asked for lately, 0..15. No lock needed. */
LEC_INTERNAL uint32_t lec_policy_frequency(const struct lec_policy_view *view, uint32_t tag);

/* Number of broken invariants; each is reported. `report` may be NULL. Linear in max_entries. */
LEC_INTERNAL uint32_t lec_policy_check(const struct lec_policy_view *view, lec_policy_report *report, void *context);

/* The admission window's share of the capacity, of LEC_SHARE_ONE. */
LEC_INTERNAL uint32_t lec_policy_window_share(const struct lec_policy_view *view);

#endif
