/* The index of one shard: buckets of one cache line, two choices per key, and the order of stores that lets readers
 * do without a lock.
 *
 * An entry is published by ONE release store of its slot, and unlinked by
 *     U1  store the slot (0, or the word of the entry that replaces it)
 *     U2  store control + LEC_VERSION_ONE
 *     U3  release fence
 *     U4  only now give its units back; whoever fills them again stores after U3 (same thread), or after taking the
 *         shard's lock, which ends with a release fence of its own (another thread)
 * A reader does
 *     R1  load control (acquire)      R2  load the slot (acquire)      R3  copy header, key, value (relaxed)
 *     R4  acquire fence               R5  load control again: equal to R1?
 * If R3 saw any store of U4, the fences pair (U3 or the lock's, R4): R5 sees U2 and the copy is thrown away. If R1
 * already saw U2, its acquire makes R2 see U1, so the old entry is not found. The version never goes back, is never
 * reset, and lies where no payload ever goes: nothing can imitate it. A writer that dies or stops between any two of
 * these stores leaves a bucket that readers can use.
 */
#ifndef LEC_INDEX_H
#define LEC_INDEX_H

#include "access.h"
#include "shard.h"

#define LEC_VERSION_ONE UINT64_C(256)       /* control: bits 8..63 version, bits 0..7 overflow count */
#define LEC_OVERFLOW_MAX UINT64_C(255)

static inline uint32_t lec_overflow(uint64_t control) { return (uint32_t)(control & 255); }

/* The two buckets a key may be in. Alternates of one home differ, so a full home does not fill one other bucket. */
struct lec_homes { uint32_t home, alternate; };

static inline struct lec_homes lec_homes_of(uint64_t hash, uint32_t bucket_count)
{
    uint32_t home = (uint32_t)(((hash >> 12 & UINT32_MAX) * bucket_count) >> 32);
    uint32_t other = (uint32_t)(((hash * UINT64_C(0x9e3779b97f4a7c15) >> 32) * bucket_count) >> 32);
    uint32_t beside = home + 1 < bucket_count ? home + 1 : 0;
    return (struct lec_homes){home, other != home ? other : beside};
}

static inline uint32_t lec_hash_tag(uint64_t hash) { return (uint32_t)(hash >> 32); }
static inline uint64_t lec_slot_word(uint32_t tag, uint32_t unit) { return (uint64_t)tag << 32 | (uint64_t)(unit + 1); }
static inline uint32_t lec_slot_tag(uint64_t word) { return (uint32_t)(word >> 32); }
static inline uint32_t lec_slot_unit(uint64_t word) { return (uint32_t)word - 1; }  /* LEC_NONE for an empty slot */

static inline uint64_t lec_slot_load(const struct lec_shard_view *view, uint32_t slot)
{
    return atomic_load_explicit(&view->buckets[slot / LEC_SLOTS_PER_BUCKET].slots[slot % LEC_SLOTS_PER_BUCKET], memory_order_relaxed);
}

/* All of these need the lock. A slot number is bucket * LEC_SLOTS_PER_BUCKET + position; LEC_NONE = not found. */

/* The slot of this very key. */
LEC_INTERNAL uint32_t lec_index_find_locked(const struct lec_shard_view *view, uint64_t hash, const void *key, uint32_t key_bytes);

/* A free slot for a key of this hash, moving residents to their other bucket if it must; LEC_NONE: both buckets and
 * all their residents' other buckets are full. The home's overflow count covers the slot already: publish next. */
LEC_INTERNAL uint32_t lec_index_room_locked(const struct lec_shard_view *view, uint64_t hash);

/* Publishes an entry in a free slot that lec_index_room_locked() returned. */
LEC_INTERNAL void lec_index_publish_locked(const struct lec_shard_view *view, uint32_t slot, uint64_t word);

/* U1 to U3: the slot holds `word` (0 = nothing) from now on and what it held may be reused. */
LEC_INTERNAL void lec_index_replace_locked(const struct lec_shard_view *view, uint32_t slot, uint64_t word);

/* lec_index_replace_locked(slot, 0), and the home's overflow count when the entry lived in its alternate. */
LEC_INTERNAL void lec_index_unlink_locked(const struct lec_shard_view *view, uint32_t slot, uint64_t hash);

/* U2 and U3 for every bucket: nobody holds a valid copy of anything afterwards. Recovery begins with this, because the
 * dead owner may have been killed between U1 and U2. */
LEC_INTERNAL void lec_index_invalidate_readers_locked(const struct lec_shard_view *view);

/* Empties every bucket, versions kept and advanced. */
LEC_INTERNAL void lec_index_reset_locked(const struct lec_shard_view *view);

#endif
