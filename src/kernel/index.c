#include "index.h"

#include "chain.h"

static struct lec_bucket *bucket_of(const struct lec_shard_view *view, uint32_t slot) { return &view->buckets[slot / LEC_SLOTS_PER_BUCKET]; }

static void slot_store(const struct lec_shard_view *view, uint32_t slot, uint64_t word)
{
    atomic_store_explicit(&bucket_of(view, slot)->slots[slot % LEC_SLOTS_PER_BUCKET], word, memory_order_release);
}

/* Only the lock's owner stores to control: a plain add in two steps is enough. */
static void control_add(struct lec_bucket *bucket, uint64_t difference)
{
    uint64_t control = atomic_load_explicit(&bucket->control, memory_order_relaxed);
    atomic_store_explicit(&bucket->control, control + difference, memory_order_release);
}

/* Tag and whole key decide, as they do for readers: what one finds the other must find. */
static bool entry_has_key(const struct lec_shard_view *view, uint32_t unit, const void *key, uint32_t key_bytes)
{
    if (unit >= view->space.units) return false;
    return lec_load16(&lec_entry_at(&view->space, unit)->key_bytes) == key_bytes && lec_chain_equals(&view->space, unit, key, key_bytes);
}

/* Bit per slot, without a branch for each: which one a key or a hole is in cannot be foreseen. */
static uint32_t slots_with_tag(const struct lec_bucket *bucket, uint32_t tag)
{
    uint32_t same = 0;
#pragma GCC unroll 6
    for (uint32_t position = 0; position < LEC_SLOTS_PER_BUCKET; position++)
        same |= (uint32_t)(lec_slot_tag(atomic_load_explicit(&bucket->slots[position], memory_order_relaxed)) == tag) << position;
    return same;
}

static uint32_t slots_free(const struct lec_bucket *bucket)
{
    uint32_t empty = 0;
#pragma GCC unroll 6
    for (uint32_t position = 0; position < LEC_SLOTS_PER_BUCKET; position++)
        empty |= (uint32_t)(atomic_load_explicit(&bucket->slots[position], memory_order_relaxed) == 0) << position;
    return empty;
}

static uint32_t find_in_bucket(const struct lec_shard_view *view, uint32_t bucket, uint64_t hash, const void *key, uint32_t key_bytes)
{
    const struct lec_bucket *in = &view->buckets[bucket];
    for (uint32_t same = slots_with_tag(in, lec_hash_tag(hash)); same != 0; same &= same - 1) {
        uint32_t position = (uint32_t)__builtin_ctz(same);
        uint64_t word = atomic_load_explicit(&in->slots[position], memory_order_relaxed);
        if (entry_has_key(view, lec_slot_unit(word), key, key_bytes)) return bucket * LEC_SLOTS_PER_BUCKET + position;
    }
    return LEC_NONE;
}

uint32_t lec_index_find_locked(const struct lec_shard_view *view, uint64_t hash, const void *key, uint32_t key_bytes)
{
    struct lec_homes homes = lec_homes_of(hash, view->bucket_count);
    uint32_t slot = find_in_bucket(view, homes.home, hash, key, key_bytes);
    if (slot != LEC_NONE) return slot;
    if (lec_overflow(atomic_load_explicit(&view->buckets[homes.home].control, memory_order_relaxed)) == 0) return LEC_NONE;
    return find_in_bucket(view, homes.alternate, hash, key, key_bytes);
}

/* ---- room for a newcomer ---- */

static uint32_t free_slot(const struct lec_shard_view *view, uint32_t bucket)
{
    uint32_t empty = slots_free(&view->buckets[bucket]);
    return empty ? bucket * LEC_SLOTS_PER_BUCKET + (uint32_t)__builtin_ctz(empty) : LEC_NONE;
}

static bool overflow_add(const struct lec_shard_view *view, uint32_t home)
{
    if (lec_overflow(atomic_load_explicit(&view->buckets[home].control, memory_order_relaxed)) == LEC_OVERFLOW_MAX) return false;
    control_add(&view->buckets[home], 1);
    return true;
}

static void overflow_drop(const struct lec_shard_view *view, uint32_t home)
{
    if (lec_overflow(atomic_load_explicit(&view->buckets[home].control, memory_order_relaxed)) > 0) control_add(&view->buckets[home], UINT64_MAX);
}

/* Moves a resident to the free slot `to` of its other bucket. For a moment it stands in both, with one word: readers
 * find either; recovery drops one. The reader that must not miss it:
 *   from home to alternate: 1 R scans the home's slots  2 W count + 1, publishes in the alternate, clears the home's
 *   slot, version + 1  3 R saw the cleared slot but an old count, and skips the alternate  -> its second look at the
 *   home's control differs (the count was stored before the slot it saw), it tries again.
 *   from alternate to home: 1 R scans the home (not there yet)  2 W publishes in the home, home's version + 1, clears
 *   the alternate  3 R finds the alternate cleared -> the home's version differs, it tries again. */
static bool move_resident(const struct lec_shard_view *view, uint32_t from, uint32_t to, uint32_t home, bool leaves_home)
{
    uint64_t word = lec_slot_load(view, from);
    uint32_t node = lec_load32(&lec_entry_at(&view->space, lec_slot_unit(word))->node);
    if (node >= view->node_count || view->nodes[node].slot != from) return false;
    if (leaves_home && !overflow_add(view, home)) return false;
    uint8_t touches = atomic_load_explicit(&bucket_of(view, from)->touches[from % LEC_SLOTS_PER_BUCKET], memory_order_relaxed);
    atomic_store_explicit(&bucket_of(view, to)->touches[to % LEC_SLOTS_PER_BUCKET], touches, memory_order_relaxed);
    slot_store(view, to, word);
    view->nodes[node].slot = to;
    if (!leaves_home) control_add(&view->buckets[home], LEC_VERSION_ONE);
    lec_index_replace_locked(view, from, 0);
    if (!leaves_home) overflow_drop(view, home);
    return true;
}

/* Frees one slot of the bucket by moving a resident to its other bucket. */
static LEC_ASIDE uint32_t make_slot(const struct lec_shard_view *view, uint32_t bucket)
{
    for (uint32_t slot = bucket * LEC_SLOTS_PER_BUCKET; slot < (bucket + 1) * LEC_SLOTS_PER_BUCKET; slot++) {
        uint32_t unit = lec_slot_unit(lec_slot_load(view, slot));
        if (unit >= view->space.units) continue;
        struct lec_homes homes = lec_homes_of(lec_load64(&lec_entry_at(&view->space, unit)->hash), view->bucket_count);
        if (homes.home != bucket && homes.alternate != bucket) continue;
        bool leaves_home = homes.home == bucket;
        uint32_t to = free_slot(view, leaves_home ? homes.alternate : homes.home);
        if (to != LEC_NONE && move_resident(view, slot, to, homes.home, leaves_home)) return slot;
    }
    return LEC_NONE;
}

uint32_t lec_index_room_locked(const struct lec_shard_view *view, uint64_t hash)
{
    struct lec_homes homes = lec_homes_of(hash, view->bucket_count);
    uint32_t slot = free_slot(view, homes.home);
    if (slot != LEC_NONE) return slot;
    slot = free_slot(view, homes.alternate);
    if (slot == LEC_NONE && (slot = make_slot(view, homes.home)) != LEC_NONE) return slot;
    if (slot == LEC_NONE) slot = make_slot(view, homes.alternate);
    /* The count is stored before the slot is published: a reader that must find the entry looks in both buckets. */
    if (slot != LEC_NONE && !overflow_add(view, homes.home)) return LEC_NONE;
    return slot;
}

/* ---- publishing and unlinking ---- */

void lec_index_publish_locked(const struct lec_shard_view *view, uint32_t slot, uint64_t word) { slot_store(view, slot, word); }

void lec_index_replace_locked(const struct lec_shard_view *view, uint32_t slot, uint64_t word)
{
    slot_store(view, slot, word);                           /* U1 */
    control_add(bucket_of(view, slot), LEC_VERSION_ONE);    /* U2 */
    lec_fence_release();                                    /* U3 */
}

void lec_index_unlink_locked(const struct lec_shard_view *view, uint32_t slot, uint64_t hash)
{
    uint32_t home = lec_homes_of(hash, view->bucket_count).home;
    lec_index_replace_locked(view, slot, 0);
    if (slot / LEC_SLOTS_PER_BUCKET != home) overflow_drop(view, home);
}

void lec_index_invalidate_readers_locked(const struct lec_shard_view *view)
{
    for (uint32_t bucket = 0; bucket < view->bucket_count; bucket++) control_add(&view->buckets[bucket], LEC_VERSION_ONE);
    lec_fence_release();
}

void lec_index_reset_locked(const struct lec_shard_view *view)
{
    for (uint32_t slot = 0; slot < view->bucket_count * LEC_SLOTS_PER_BUCKET; slot++) slot_store(view, slot, 0);
    for (uint32_t bucket = 0; bucket < view->bucket_count; bucket++) {
        uint64_t control = atomic_load_explicit(&view->buckets[bucket].control, memory_order_relaxed);
        atomic_store_explicit(&view->buckets[bucket].control, (control & ~LEC_OVERFLOW_MAX) + LEC_VERSION_ONE, memory_order_release);
    }
    lec_fence_release();
}
