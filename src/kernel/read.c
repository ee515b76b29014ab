/* get and scan: no lock, no store that another process would notice (but a touch that is not saturated yet).
 * The protocol R1 to R5 and why it is sound stand in index.h. */
#include "access.h"
#include "chain.h"
#include "expiry.h"
#include "hash.h"
#include "index.h"

#define READ_TRIES 8u               /* lost races before the one attempt under the lock */
#define UNSURE_BYTES 4096u          /* longer values are validated once before a buffer of their size is asked for */
#define PREFETCH_LINES 12u          /* of an entry, asked for together with its first */
#define STAMP_GRANULE_NS UINT64_C(1000000000)
#define CHANGED LEC_MISMATCH        /* within this file: the bucket changed while we looked; try again */

/* One read under way. */
struct reading {
    struct lec_handle *handle;
    const void *key;
    uint32_t key_bytes;
    uint64_t hash, now_ns;
    uint32_t epoch, bucket_count, node_count;
    struct lec_bucket *buckets;
    struct lec_node *nodes;
    struct lec_space_view space;
    lec_buffer_fn buffer;
    void *context;
    struct lec_read *result;
};

static inline void reading_begin(struct reading *reading, struct lec_handle *handle, uint32_t shard)
{
    const struct lec_geometry *geometry = &handle->geometry;
    uint8_t *base = handle->base + geometry->shards + geometry->shard_stride * shard;
    reading->handle = handle;
    reading->bucket_count = geometry->bucket_count;
    reading->node_count = geometry->node_count;
    reading->buckets = (struct lec_bucket *)(void *)(base + geometry->buckets);
    reading->nodes = (struct lec_node *)(void *)(base + geometry->nodes);
    reading->space = (struct lec_space_view){NULL, NULL, base + geometry->arena, geometry->units};
}

static inline uint64_t control_load(const struct lec_bucket *bucket) { return atomic_load_explicit(&bucket->control, memory_order_acquire); }

/* R4 and R5: is what was copied since R1 what it seemed to be? */
static inline bool still_valid(const struct lec_bucket *bucket, uint64_t control)
{
    lec_fence_acquire();
    return atomic_load_explicit(&bucket->control, memory_order_relaxed) == control;
}

/* ---- one entry, optimistically ---- */

/* The header's fields that a read needs, each bounded before anything is derived from it. */
struct seen { uint64_t expires_at, version; uint32_t unit, value_bytes, node, tti_ms, key_bytes; bool in_one_run; };

static inline bool header_read(const struct reading *reading, uint32_t unit, struct seen *seen)
{
    if (unit >= reading->space.units) return false;
    const struct lec_entry *entry = lec_entry_at(&reading->space, unit);
    uint32_t units = lec_load32(&entry->extent_units);
    seen->unit = unit;
    seen->key_bytes = lec_load16(&entry->key_bytes);
    seen->value_bytes = lec_load32(&entry->value_bytes);
    seen->expires_at = lec_load64(&entry->expires_at);
    seen->version = lec_load64(&entry->version);
    seen->node = lec_load32(&entry->node);
    seen->tti_ms = lec_load32(&entry->tti_ms);
    if (lec_load32(&entry->epoch) != reading->epoch || seen->value_bytes > reading->handle->config.max_value_bytes) return false;
    uint64_t bytes = sizeof *entry + (uint64_t)seen->key_bytes + seen->value_bytes;
    seen->in_one_run = lec_space_holds(&reading->space, unit, units) && bytes <= (uint64_t)units * LEC_UNIT;
    return seen->node < reading->node_count;
}

static inline uint8_t *payload_at(const struct reading *reading, const struct seen *seen)
{
    return lec_space_at(&reading->space, seen->unit) + sizeof(struct lec_entry);
}

static inline bool key_matches(const struct reading *reading, const struct seen *seen)
{
    if (seen->key_bytes != reading->key_bytes) return false;
    if (seen->in_one_run) return lec_equal(payload_at(reading, seen), reading->key, reading->key_bytes);
    return lec_chain_equals(&reading->space, seen->unit, reading->key, reading->key_bytes);
}

/* Expired by age or by idleness? */
static inline bool is_spent(const struct reading *reading, const struct seen *seen)
{
    if (seen->expires_at <= reading->now_ns) return true;
    if (seen->tti_ms == 0) return false;
    uint64_t accessed_at = atomic_load_explicit(&reading->nodes[seen->node].accessed_at, memory_order_relaxed);
    return accessed_at + seen->tti_ms * UINT64_C(1000000) <= reading->now_ns;
}

static inline bool value_copy(const struct reading *reading, const struct seen *seen, void *to)
{
    if (!seen->in_one_run) return lec_chain_read(&reading->space, seen->unit, seen->key_bytes, to, seen->value_bytes);
    lec_copy_out(to, payload_at(reading, seen) + seen->key_bytes, seen->value_bytes);
    return true;
}

/* ---- what a hit leaves behind ---- */

static inline void touch(struct lec_bucket *bucket, uint32_t position)
{
    uint8_t touches = atomic_load_explicit(&bucket->touches[position], memory_order_relaxed);
    if (touches < LEC_TOUCH_MAX) atomic_store_explicit(&bucket->touches[position], (uint8_t)(touches + 1), memory_order_relaxed);
}

/* Only for entries with an idle limit, and only once per granule. The node may be another entry's by now: a compare
 * and exchange from the value just seen keeps an old reading of the clock from replacing a newer one. */
static void stamp(const struct reading *reading, const struct seen *seen)
{
    _Atomic uint64_t *accessed_at = &reading->nodes[seen->node].accessed_at;
    uint64_t granule = seen->tti_ms * UINT64_C(1000000) / 16, before = atomic_load_explicit(accessed_at, memory_order_relaxed);
    if (granule > STAMP_GRANULE_NS) granule = STAMP_GRANULE_NS;
    if (before == 0 || reading->now_ns <= before || reading->now_ns - before < granule) return;
    atomic_compare_exchange_strong_explicit(accessed_at, &before, reading->now_ns, memory_order_relaxed, memory_order_relaxed);
}

/* ---- one bucket, one try ---- */

/* LEC_OK: copied and validated. LEC_ABSENT: an expired entry. CHANGED. LEC_NO_BUFFER. */
static inline enum lec_status take(const struct reading *reading, struct lec_bucket *bucket, uint32_t position, uint64_t control, const struct seen *seen)
{
    if (is_spent(reading, seen)) return still_valid(bucket, control) ? LEC_ABSENT : CHANGED;
    if (reading->buffer) {
        if (seen->value_bytes > UNSURE_BYTES && !still_valid(bucket, control)) return CHANGED;
        void *to = reading->buffer(reading->context, seen->value_bytes);
        if (!to) return LEC_NO_BUFFER;
        if (!value_copy(reading, seen, to)) return CHANGED;
    }
    if (!still_valid(bucket, control)) return CHANGED;
    if (reading->buffer) touch(bucket, position);
    if (reading->buffer && seen->tti_ms) stamp(reading, seen);
    reading->result->version = seen->version;
    reading->result->expires_at = seen->expires_at;
    return LEC_OK;
}

/* The value's first lines, while the header's is still on its way. Any address may be prefetched. */
static inline void prefetch_entry(const struct reading *reading, uint32_t unit)
{
    for (uint32_t line = 0; line < PREFETCH_LINES; line++) __builtin_prefetch(lec_space_at(&reading->space, unit) + line * LEC_UNIT);
}

/* LEC_ABSENT: no slot of this bucket holds the key (to be validated by the caller). */
static inline enum lec_status search(const struct reading *reading, struct lec_bucket *bucket, uint64_t control, bool *expired)
{
    for (uint32_t position = 0; position < LEC_SLOTS_PER_BUCKET; position++) {
        uint64_t word = atomic_load_explicit(&bucket->slots[position], memory_order_acquire);
        if (lec_slot_tag(word) != lec_hash_tag(reading->hash) || word == 0) continue;
        prefetch_entry(reading, lec_slot_unit(word));
        struct seen seen;
        if (!header_read(reading, lec_slot_unit(word), &seen) || !key_matches(reading, &seen)) continue;
        enum lec_status status = take(reading, bucket, position, control, &seen);
        *expired = status == LEC_ABSENT;
        return status;
    }
    return LEC_ABSENT;
}

static enum lec_status try_read(const struct reading *reading)
{
    struct lec_homes homes = lec_homes_of(reading->hash, reading->bucket_count);
    struct lec_bucket *home = &reading->buckets[homes.home];
    uint64_t control = control_load(home);
    bool expired = false;
    enum lec_status status = search(reading, home, control, &expired);
    if (status != LEC_ABSENT || expired) return status;
    if (lec_overflow(control) > 0) {
        struct lec_bucket *alternate = &reading->buckets[homes.alternate];
        uint64_t second = control_load(alternate);
        status = search(reading, alternate, second, &expired);
        if (status != LEC_ABSENT || expired) return status;
        if (!still_valid(alternate, second)) return CHANGED;
    }
    /* Not there; unless it moved between the buckets or was replaced while we looked (index.c, move_resident()). */
    return still_valid(home, control) ? LEC_ABSENT : CHANGED;
}

/* Nobody changes the shard now. A stopped owner must not stop readers too, so this is a trylock, and then a miss. */
static LEC_ASIDE enum lec_status read_locked(const struct reading *reading)
{
    struct lec_shard_view view;
    lec_shard_view(reading->handle, lec_shard_of(reading->handle, reading->hash), reading->now_ns, &view);
    /* The caller may have let go of its own lock (the GIL) to copy into the last buffer. It takes it back now: waiting for
     * it with the shard locked would hold up every writer. */
    if (reading->buffer) (void)reading->buffer(reading->context, 0);
    if (lec_shard_lock(&view, 0) != LEC_OK) return LEC_ABSENT;
    lec_stat_add(reading->handle, LEC_STAT_READS_LOCKED, 1);
    enum lec_status status = try_read(reading);
    lec_shard_unlock(&view);
    return status == CHANGED ? LEC_ABSENT : status;
}

static inline enum lec_status get(struct lec_handle *handle, uint64_t hash, const void *key, uint32_t key_bytes, uint64_t now_ns,
                                  lec_buffer_fn buffer, void *context, struct lec_read *read)
{
    uint64_t state = atomic_load_explicit(&handle->header->state, memory_order_acquire);
    if (state >> 32 != 0) return LEC_RETIRED;
    struct reading reading;         /* field by field: zeroing it first costs 3 ns of a get's 60 */
    reading.hash = hash;
    reading.key = key;
    reading.key_bytes = key_bytes;
    reading.now_ns = now_ns;
    reading.epoch = (uint32_t)state;
    reading.buffer = buffer;
    reading.context = context;
    reading.result = read;
    uint32_t shard = lec_shard_of(handle, reading.hash);
    reading_begin(&reading, handle, shard);
    if (read->wants_token) {
        /* Before the first look: a set or delete that this read does not see bumps the generation after it. */
        struct lec_shard_view view;
        lec_shard_view_tokens(handle, shard, &view);
        read->token = lec_token(&view, reading.hash, reading.epoch);
    }
    for (uint32_t attempt = 0; attempt < READ_TRIES; attempt++) {
        enum lec_status status = try_read(&reading);
        if (status != CHANGED) return status;
        lec_stat_add(handle, LEC_STAT_READ_RETRIES, 1);
    }
    return read_locked(&reading);
}

LEC_STEP enum lec_status lec_get(struct lec_handle *handle, const void *key, uint32_t key_bytes, uint64_t now_ns,
                                 lec_buffer_fn buffer, void *context, struct lec_read *read)
{
    return get(handle, lec_hash(key, key_bytes, handle->seed), key, key_bytes, now_ns, buffer, context, read);
}

LEC_STEP enum lec_status lec_get_hashed(struct lec_handle *handle, uint64_t hash, const void *key, uint32_t key_bytes, uint64_t now_ns,
                                        lec_buffer_fn buffer, void *context, struct lec_read *read)
{
    return get(handle, hash, key, key_bytes, now_ns, buffer, context, read);
}

/* ---- many keys at once ---- */

uint64_t lec_hint_home(const struct lec_handle *handle, const void *key, uint32_t key_bytes)
{
    uint64_t hash = lec_hash(key, key_bytes, handle->seed);
    const struct lec_geometry *geometry = &handle->geometry;
    const uint8_t *base = handle->base + geometry->shards + geometry->shard_stride * lec_shard_of(handle, hash);
    __builtin_prefetch(base + geometry->buckets + sizeof(struct lec_bucket) * lec_homes_of(hash, geometry->bucket_count).home);
    return hash;
}

void lec_hint_entry(struct lec_handle *handle, uint64_t hash)
{
    struct reading reading;
    reading_begin(&reading, handle, lec_shard_of(handle, hash));
    const struct lec_bucket *bucket = &reading.buckets[lec_homes_of(hash, reading.bucket_count).home];
    for (uint32_t position = 0; position < LEC_SLOTS_PER_BUCKET; position++) {
        uint64_t word = atomic_load_explicit(&bucket->slots[position], memory_order_relaxed);
        if (word == 0 || lec_slot_tag(word) != lec_hash_tag(hash)) continue;
        prefetch_entry(&reading, lec_slot_unit(word));
        return;
    }
}

/* ---- scan ---- */

/* One try at a slot: LEC_OK, LEC_ABSENT, CHANGED, or LEC_NO_BUFFER. With a buffer its value comes along, of the same moment
 * as its key: both were copied between the same R1 and R5. */
static enum lec_status slot_try(const struct reading *reading, const struct lec_shard_view *view, uint32_t slot, struct lec_info *info)
{
    struct lec_bucket *bucket = &reading->buckets[slot / LEC_SLOTS_PER_BUCKET];
    struct seen seen;
    uint64_t control = control_load(bucket);
    uint64_t word = atomic_load_explicit(&bucket->slots[slot % LEC_SLOTS_PER_BUCKET], memory_order_acquire);
    if (word == 0) return LEC_ABSENT;
    bool readable = header_read(reading, lec_slot_unit(word), &seen) && seen.key_bytes <= LEC_MAX_KEY &&
                    lec_chain_read(&reading->space, seen.unit, 0, info->key, seen.key_bytes);
    bool over = readable && is_spent(reading, &seen);
    if (!still_valid(bucket, control)) return CHANGED;
    if (!readable || over) return LEC_ABSENT;
    if (reading->buffer) {
        void *to = reading->buffer(reading->context, seen.value_bytes);
        if (!to) return LEC_NO_BUFFER;
        if (!value_copy(reading, &seen, to) || !still_valid(bucket, control)) return CHANGED;
    }
    info->key_bytes = seen.key_bytes;
    info->value_bytes = seen.value_bytes;
    info->expires_at = seen.expires_at;
    info->tti_ms = seen.tti_ms;
    info->accessed_at = seen.tti_ms ? atomic_load_explicit(&reading->nodes[seen.node].accessed_at, memory_order_relaxed) : 0;
    info->frequency = lec_policy_frequency(&view->policy, lec_slot_tag(word)) +
                      atomic_load_explicit(&bucket->touches[slot % LEC_SLOTS_PER_BUCKET], memory_order_relaxed);
    return LEC_OK;
}

static enum lec_status slot_read(const struct reading *reading, const struct lec_shard_view *view, uint32_t slot, struct lec_info *info)
{
    for (uint32_t attempt = 0; attempt < READ_TRIES; attempt++) {
        enum lec_status status = slot_try(reading, view, slot, info);
        if (status != CHANGED) return status;
    }
    return CHANGED;
}

static void scan_bucket(struct lec_handle *handle, uint32_t shard, uint32_t bucket, uint64_t now_ns, lec_info_fn visit, void *context)
{
    struct reading reading = {.now_ns = now_ns, .epoch = lec_epoch(handle)};
    struct lec_shard_view view;
    struct lec_info info;
    reading_begin(&reading, handle, shard);
    lec_shard_view(handle, shard, now_ns, &view);
    for (uint32_t slot = bucket * LEC_SLOTS_PER_BUCKET; slot < (bucket + 1) * LEC_SLOTS_PER_BUCKET; slot++)
        if (slot_read(&reading, &view, slot, &info) == LEC_OK) visit(context, &info);
}

enum lec_status lec_scan(struct lec_handle *handle, uint64_t *cursor, uint32_t buckets, uint64_t now_ns,
                         lec_info_fn visit, void *context)
{
    uint64_t all = (uint64_t)handle->geometry.shard_count * handle->geometry.bucket_count;
    if (lec_is_retired(handle)) return LEC_RETIRED;
    for (; buckets > 0 && *cursor < all; buckets--, *cursor += 1)
        scan_bucket(handle, (uint32_t)(*cursor / handle->geometry.bucket_count), (uint32_t)(*cursor % handle->geometry.bucket_count), now_ns, visit, context);
    if (*cursor >= all) *cursor = UINT64_MAX;
    return LEC_OK;
}

/* As read_locked(): other slots of the bucket kept changing while this one's value was copied. */
static enum lec_status slot_read_locked(const struct reading *reading, const struct lec_shard_view *view, uint32_t slot, struct lec_info *info)
{
    (void)reading->buffer(reading->context, 0);
    if (lec_shard_lock(view, 0) != LEC_OK) return LEC_ABSENT;
    enum lec_status status = slot_try(reading, view, slot, info);
    lec_shard_unlock(view);
    return status == CHANGED ? LEC_ABSENT : status;
}

enum lec_status lec_scan_entry(struct lec_handle *handle, uint64_t *cursor, uint64_t now_ns, lec_buffer_fn buffer, void *context,
                               struct lec_info *info)
{
    uint64_t of_shard = (uint64_t)handle->geometry.bucket_count * LEC_SLOTS_PER_BUCKET;
    uint64_t all = of_shard * handle->geometry.shard_count, at = *cursor;
    if (lec_is_retired(handle)) return LEC_RETIRED;
    *cursor = at + 1 < all ? at + 1 : UINT64_MAX;
    if (at >= all) return LEC_ABSENT;
    struct reading reading = {.now_ns = now_ns, .epoch = lec_epoch(handle), .buffer = buffer, .context = context};
    struct lec_shard_view view;
    uint32_t shard = (uint32_t)(at / of_shard), slot = (uint32_t)(at % of_shard);
    reading_begin(&reading, handle, shard);
    lec_shard_view(handle, shard, now_ns, &view);
    enum lec_status status = slot_read(&reading, &view, slot, info);
    return status == CHANGED ? slot_read_locked(&reading, &view, slot, info) : status;
}
