/* set, add, cas, fill, delete, incr, touch, clear: everything that changes what a key maps to.
 *
 * Each is: lock, look, decide, make room, write, publish, unlock. A value longer than LEC_INLINE_BYTES is written
 * between two critical sections, into units that a reservation holds.
 */
#include "access.h"
#include "chain.h"
#include "expiry.h"
#include "hash.h"
#include "index.h"
#include "reserve.h"
#include "room.h"

#define EXPIRED_PER_STORE 2u        /* expired entries that one store clears away in passing */
#define REAP_INTERVAL_NS UINT64_C(1000000000)
#define DAMAGE_RETRIES 2u           /* an operation that met damage runs again on the rebuilt shard */

/* One write under way. */
struct write {
    struct lec_shard_view view;
    const struct lec_store *store;
    uint64_t hash;
    uint64_t expires_at;
    uint32_t tti_ms;
    uint32_t slot, node;            /* of the key's present entry, LEC_NONE when it has none */
    uint32_t unit, units;           /* taken for the new entry */
    const uint8_t *ahead;           /* where it will probably be put, as far as that is not yet asked for, */
    uint64_t ahead_lines;           /* and how many lines of that are left */
};

static uint64_t after(uint64_t now_ns, uint64_t duration_ns)
{
    return duration_ns == 0 || duration_ns >= LEC_NEVER - now_ns ? LEC_NEVER : now_ns + duration_ns;
}

static uint32_t milliseconds(uint64_t duration_ns)
{
    uint64_t rounded = (duration_ns + 999999) / 1000000;
    return rounded > UINT32_MAX ? UINT32_MAX : (uint32_t)rounded;
}

static void write_begin(struct write *write, struct lec_handle *handle, const struct lec_store *store, uint64_t now_ns)
{
    write->store = store;
    write->ahead_lines = 0;
    write->hash = lec_hash(store->key, store->key_bytes, handle->seed);
    write->expires_at = after(now_ns, store->ttl_ns);
    write->tti_ms = milliseconds(store->tti_ns);
    lec_shard_view(handle, lec_shard_of(handle, write->hash), now_ns, &write->view);
}

/* ---- tokens ---- */

static uint32_t *generation_of(const struct lec_shard_view *view, uint64_t hash)
{
    return &view->generations[(hash >> 16) & (view->handle->geometry.generation_count - 1)];
}

/* After the change is visible: a reader takes its token before it looks (lec_get()). 1 W bumps  2 R takes the token,
 * misses  3 W publishes  4 R's fill fits the token and replaces what was set later: so W bumps last. */
static void token_void(const struct lec_shard_view *view, uint64_t hash)
{
    uint32_t *generation = generation_of(view, hash);
    __atomic_store_n(generation, *generation + 1, __ATOMIC_RELEASE);
}

uint64_t lec_token(const struct lec_shard_view *view, uint64_t hash, uint32_t epoch)
{
    return (uint64_t)epoch << 32 | __atomic_load_n(generation_of(view, hash), __ATOMIC_ACQUIRE);
}

/* A computation of seconds cannot live by the generation: every set of every key that shares it would refuse its value.
 * What must refuse it is a delete (a fence is shared by few of those), a clear, and a takeover of its flight. */
static uint32_t *fence_of(const struct lec_shard_view *view, uint64_t hash) { return generation_of(view, hash) + view->handle->geometry.generation_count; }

uint64_t lec_fence(const struct lec_shard_view *view, uint64_t hash, uint32_t epoch)
{
    return (uint64_t)epoch << 32 | __atomic_load_n(fence_of(view, hash), __ATOMIC_ACQUIRE);
}

void lec_token_void_locked(const struct lec_shard_view *view, uint64_t hash)
{
    uint32_t *fence = fence_of(view, hash);
    token_void(view, hash);
    __atomic_store_n(fence, *fence + 1, __ATOMIC_RELEASE);
}

static uint64_t now_of(struct lec_handle *handle, const void *key, uint32_t key_bytes,
                       uint64_t (*number_of)(const struct lec_shard_view *, uint64_t, uint32_t))
{
    uint64_t hash = lec_hash(key, key_bytes, handle->seed);
    struct lec_shard_view view;
    lec_shard_view_tokens(handle, lec_shard_of(handle, hash), &view);
    return number_of(&view, hash, lec_epoch(handle));
}

uint64_t lec_fence_now(struct lec_handle *handle, const void *key, uint32_t key_bytes) { return now_of(handle, key, key_bytes, lec_fence); }
uint64_t lec_token_now(struct lec_handle *handle, const void *key, uint32_t key_bytes) { return now_of(handle, key, key_bytes, lec_token); }

/* ---- looking ---- */

static struct lec_entry *present(const struct write *write) { return lec_entry_at(&write->view.space, lec_slot_unit(lec_slot_load(&write->view, write->slot))); }

/* Finds the key's live entry; an expired one is dropped on the way. */
static enum lec_status look_locked(struct write *write)
{
    const struct lec_shard_view *view = &write->view;
    write->node = LEC_NONE;
    write->slot = lec_index_find_locked(view, write->hash, write->store->key, write->store->key_bytes);
    if (write->slot == LEC_NONE) return LEC_OK;
    write->node = lec_load32(&present(write)->node);
    if (write->node >= view->node_count || view->nodes[write->node].slot != write->slot) return LEC_DAMAGED;
    if (lec_expiry_deadline_locked(view, write->node) > view->now_ns) return LEC_OK;
    enum lec_status status = lec_drop_locked(view, write->node, LEC_LEAVES_EXPIRED);
    write->slot = write->node = LEC_NONE;
    return status;
}

/* May this write go on, given what is there? */
static enum lec_status decide_locked(const struct write *write)
{
    const struct lec_store *store = write->store;
    switch (store->mode) {
    case LEC_ADD: return write->slot == LEC_NONE ? LEC_OK : LEC_EXISTS;
    case LEC_CAS: return write->slot != LEC_NONE && lec_load64(&present(write)->version) == store->expected ? LEC_OK : LEC_MISMATCH;
    case LEC_FILL_FENCED: return lec_fence(&write->view, write->hash, lec_epoch(write->view.handle)) == store->expected ? LEC_OK : LEC_MISMATCH;
    case LEC_FILL: return lec_token(&write->view, write->hash, lec_epoch(write->view.handle)) == store->expected ? LEC_OK : LEC_MISMATCH;
    default: return LEC_OK;
    }
}

/* ---- writing ---- */

/* The header of the new entry but for its node, which only publication knows. */
static void header_write(const struct write *write)
{
    struct lec_entry *entry = lec_entry_at(&write->view.space, write->unit);
    lec_put64(&entry->hash, write->hash);
    lec_put64(&entry->expires_at, write->expires_at);
    lec_put32(&entry->value_bytes, (uint32_t)write->store->value_bytes);
    lec_put32(&entry->tti_ms, write->tti_ms);
    lec_put16(&entry->key_bytes, (uint16_t)write->store->key_bytes);
}

static bool payload_write(const struct write *write)
{
    const struct lec_store *store = write->store;
    return lec_chain_write(&write->view.space, write->unit, 0, store->key, store->key_bytes) &&
           lec_chain_write(&write->view.space, write->unit, store->key_bytes, store->value, store->value_bytes);
}

static void header_finish_locked(const struct write *write, uint32_t node)
{
    struct lec_entry *entry = lec_entry_at(&write->view.space, write->unit);
    struct lec_shard *shard = write->view.shard;
    lec_put64(&entry->version, shard->next_version++);
    lec_put32(&entry->node, node);
    lec_put32(&entry->epoch, atomic_load_explicit(&shard->epoch, memory_order_relaxed));
}

static void node_write_locked(const struct write *write, uint32_t id, uint32_t slot)
{
    struct lec_node *node = &write->view.nodes[id];
    node->tag = lec_hash_tag(write->hash);
    node->unit = write->unit;
    node->slot = slot;
    node->expires_at = write->expires_at;
    atomic_store_explicit(&node->accessed_at, write->tti_ms ? write->view.now_ns : 0, memory_order_relaxed);
    lec_expiry_note_locked(&write->view, id, lec_expiry_deadline_locked(&write->view, id));
}

static void counters_add(const struct lec_shard_view *view, uint32_t entries, uint64_t bytes_in, uint64_t bytes_out)
{
    struct lec_shard *shard = view->shard;
    atomic_store_explicit(&shard->entries, atomic_load_explicit(&shard->entries, memory_order_relaxed) + entries, memory_order_relaxed);
    atomic_store_explicit(&shard->payload_bytes, atomic_load_explicit(&shard->payload_bytes, memory_order_relaxed) + bytes_in - bytes_out, memory_order_relaxed);
}

/* The new entry takes the present one's slot and node. */
static enum lec_status replace_locked(struct write *write)
{
    const struct lec_shard_view *view = &write->view;
    uint32_t old_unit = lec_slot_unit(lec_slot_load(view, write->slot));
    /* 1 the key is found in a slot  2 to make room, somebody leaves whose scribbled node names that slot  3 it is empty. */
    if (old_unit >= view->space.units || view->nodes[write->node].unit != old_unit) return LEC_DAMAGED;
    const struct lec_entry *old = lec_entry_at(&view->space, old_unit);
    uint64_t old_bytes = (uint64_t)lec_load16(&old->key_bytes) + lec_load32(&old->value_bytes);
    header_finish_locked(write, write->node);
    /* Before publication, or a reader takes the new entry for idle since the old one's last access (0 without a tti). */
    if (write->tti_ms) atomic_store_explicit(&view->nodes[write->node].accessed_at, view->now_ns, memory_order_relaxed);
    lec_index_replace_locked(view, write->slot, lec_slot_word(lec_hash_tag(write->hash), write->unit));
    node_write_locked(write, write->node, write->slot);
    counters_add(view, 0, (uint64_t)write->store->key_bytes + write->store->value_bytes, old_bytes);
    enum lec_policy_status updated = lec_policy_update(&view->policy, write->node, write->units);
    return updated == LEC_POLICY_OK && lec_chain_give(&view->space, old_unit) == LEC_SPACE_OK ? LEC_OK : LEC_DAMAGED;
}

/* Where even moving residents leaves no slot, the home's first resident makes way. */
static enum lec_status slot_take_locked(const struct write *write, uint32_t *slot)
{
    const struct lec_shard_view *view = &write->view;
    *slot = lec_index_room_locked(view, write->hash);
    if (*slot != LEC_NONE) return LEC_OK;
    uint32_t first = lec_homes_of(write->hash, view->bucket_count).home * LEC_SLOTS_PER_BUCKET;
    uint32_t unit = lec_slot_unit(lec_slot_load(view, first));
    if (unit >= view->space.units) return LEC_DAMAGED;
    enum lec_status status = lec_drop_locked(view, lec_load32(&lec_entry_at(&view->space, unit)->node), LEC_LEAVES_EVICTED);
    *slot = first;
    return status;
}

static enum lec_status insert_locked(struct write *write)
{
    const struct lec_shard_view *view = &write->view;
    uint32_t node, slot;
    /* Nothing to evict, with no free node: the lists contradict each other. */
    if (lec_node_take_locked(view, &node) != LEC_OK || slot_take_locked(write, &slot) != LEC_OK) return LEC_DAMAGED;
    header_finish_locked(write, node);
    node_write_locked(write, node, slot);
    view->nodes[node].units_list = write->units;    /* list == FREE until the policy links it */
    lec_index_publish_locked(view, slot, lec_slot_word(lec_hash_tag(write->hash), write->unit));
    counters_add(view, 1, (uint64_t)write->store->key_bytes + write->store->value_bytes, 0);
    if (lec_samples_want_mark(&view->policy.samples)) lec_samples_mark_locked(view);
    if (lec_policy_insert(&view->policy, node) != LEC_POLICY_OK) return LEC_DAMAGED;
    atomic_store_explicit(&view->shard->window_share, lec_policy_window_share(&view->policy), memory_order_relaxed);
    return LEC_OK;
}

static LEC_STEP enum lec_status publish_locked(struct write *write)
{
    enum lec_status status = write->slot != LEC_NONE ? replace_locked(write) : insert_locked(write);
    if (status != LEC_OK) return status;
    token_void(&write->view, write->hash);
    lec_stat_add_locked(&write->view, LEC_STAT_SETS, 1);
    return LEC_OK;
}

/* It cannot be stored; what was there before is not the truth any more either. */
static LEC_ASIDE enum lec_status refuse_locked(struct write *write)
{
    lec_stat_add_locked(&write->view, LEC_STAT_REFUSALS, 1);
    enum lec_status status = write->slot == LEC_NONE ? LEC_OK : lec_drop_locked(&write->view, write->node, LEC_LEAVES_DELETED);
    token_void(&write->view, write->hash);
    return status == LEC_OK ? LEC_REFUSED : status;
}

/* ---- asking for memory ahead ---- */

/* The lines that depend on nothing but the key; they are on their way while the lock is taken. */
static void key_warm(const struct write *write)
{
    const struct lec_shard_view *view = &write->view;
    __builtin_prefetch(&view->buckets[lec_homes_of(write->hash, view->bucket_count).home], 1);
    __builtin_prefetch(generation_of(view, write->hash), 1);
    lec_policy_warm(&view->policy, lec_hash_tag(write->hash));
}

/* The units that it will fill, some lines at a time between the steps before: of prefetches in a row, what exceeds the
 * processor's queue is lost (on EPYC a quarter of 17 lines, none of them when there is work after every four). */
#define AHEAD_LINES 4u

static inline void ahead_some(struct write *write)
{
    if (write->ahead_lines >= AHEAD_LINES) {    /* the usual case, with nothing to count */
        for (uint32_t line = 0; line < AHEAD_LINES; line++) __builtin_prefetch(write->ahead + line * LEC_LINE, 1);
        write->ahead += AHEAD_LINES * LEC_LINE;
        write->ahead_lines -= AHEAD_LINES;
        return;
    }
    for (; write->ahead_lines > 0; write->ahead_lines--, write->ahead += LEC_LINE) __builtin_prefetch(write->ahead, 1);
}

static inline void ahead_begin_locked(struct write *write)
{
    uint64_t units = lec_chain_units((uint64_t)write->store->key_bytes + write->store->value_bytes);
    uint32_t unit = lec_space_next(&write->view.space, units);
    if (unit == LEC_NONE) return;
    write->ahead = lec_space_at(&write->view.space, unit);
    write->ahead_lines = units * LEC_UNIT / LEC_LINE;
    ahead_some(write);
}

/* ---- the two ways to store ---- */

static void housekeep_locked(const struct lec_shard_view *view)
{
    lec_reservations_reap_locked(view, view->now_ns - view->shard->reaped_ns > REAP_INTERVAL_NS);
}

static enum lec_status room_locked(struct write *write)
{
    const struct lec_shard_view *view = &write->view;
    uint64_t payload_bytes = (uint64_t)write->store->key_bytes + write->store->value_bytes;
    enum lec_status status = lec_room_take_locked(view, payload_bytes, write->node, &write->unit, &write->units);
    if (status != LEC_REFUSED || write->slot == LEC_NONE) return status;
    /* Large fills hold the rest, and only the value to be replaced is left to evict. A refusal would drop it as well. */
    status = lec_drop_locked(view, write->node, LEC_LEAVES_DELETED);
    write->slot = write->node = LEC_NONE;
    return status == LEC_OK ? lec_room_take_locked(view, payload_bytes, LEC_NONE, &write->unit, &write->units) : status;
}

/* Look, decide, make room; the header is written. */
static LEC_STEP enum lec_status prepare_locked(struct write *write)
{
    const struct lec_store *store = write->store;
    enum lec_status status = lec_room_expire_locked(&write->view, EXPIRED_PER_STORE);
    ahead_some(write);
    if (status == LEC_OK) status = look_locked(write);
    if (status == LEC_OK) status = decide_locked(write);
    if (status != LEC_OK) return status;
    ahead_some(write);
    if (store->value_bytes > write->view.handle->config.max_value_bytes) return refuse_locked(write);
    status = room_locked(write);
    if (status == LEC_REFUSED) return refuse_locked(write);
    ahead_some(write);
    if (status == LEC_OK) header_write(write);
    ahead_some(write);
    return status;
}

static enum lec_status store_inline_locked(struct write *write)
{
    enum lec_status status = prepare_locked(write);
    if (status != LEC_OK) return status;
    return payload_write(write) ? publish_locked(write) : LEC_DAMAGED;
}

/* Second critical section: what was decided before the value was filled is decided again. */
static enum lec_status store_filled_locked(struct write *write, struct lec_reservation *reservation)
{
    enum lec_status status = look_locked(write);
    if (status == LEC_OK) status = decide_locked(write);
    if (status == LEC_OK) {
        status = publish_locked(write);
        /* Killed here, the units are reached from the slot, and the dead owner's reservation is dropped. */
        lec_reservation_close_locked(&write->view, reservation);
        return status;
    }
    lec_reservation_close_locked(&write->view, reservation);
    return lec_chain_give(&write->view.space, write->unit) == LEC_SPACE_OK ? status : LEC_DAMAGED;
}

/* Leaves the critical section. Damage that the operation met is repaired first, and the caller may run it again. */
static enum lec_status leave(const struct lec_shard_view *view, enum lec_status status)
{
    if (status == LEC_DAMAGED) lec_shard_recover_locked(view);
    lec_shard_unlock(view);
    return status;
}

static LEC_ASIDE enum lec_status store_reserved(struct write *write, struct lec_reservation *reservation, uint64_t timeout_ns)
{
    bool written = payload_write(write);
    enum lec_status status = written ? lec_shard_lock(&write->view, timeout_ns ? timeout_ns : LEC_FILL_TIMEOUT_NS) : LEC_DAMAGED;
    if (status != LEC_OK) {
        lec_reservation_abandon(&write->view, reservation);
        return status;
    }
    return leave(&write->view, store_filled_locked(write, reservation));
}

static enum lec_status store_once(struct write *write, uint64_t timeout_ns)
{
    key_warm(write);
    enum lec_status status = lec_shard_lock(&write->view, timeout_ns);
    if (status != LEC_OK) return status;
    ahead_begin_locked(write);
    lec_room_warm_locked(&write->view);
    housekeep_locked(&write->view);
    if (write->store->value_bytes <= LEC_INLINE_BYTES) return leave(&write->view, store_inline_locked(write));
    status = prepare_locked(write);
    if (status != LEC_OK) return leave(&write->view, status);
    struct lec_reservation *reservation = lec_reservation_open_locked(&write->view, write->unit);
    if (!reservation) return leave(&write->view, payload_write(write) ? publish_locked(write) : LEC_DAMAGED);
    lec_shard_unlock(&write->view);
    return store_reserved(write, reservation, timeout_ns);
}

LEC_STEP enum lec_status lec_store(struct lec_handle *handle, const struct lec_store *store, uint64_t now_ns, uint64_t timeout_ns)
{
    struct write write;
    enum lec_status status = LEC_DAMAGED;
    write_begin(&write, handle, store, now_ns);
    for (uint32_t attempt = 0; attempt <= DAMAGE_RETRIES && status == LEC_DAMAGED; attempt++) status = store_once(&write, timeout_ns);
    return status == LEC_DAMAGED ? LEC_REFUSED : status;
}

/* ---- the other writes ---- */

/* Runs `change` on the locked shard with the key's present entry looked up. */
typedef enum lec_status (*change_fn)(struct write *write, void *context);

static enum lec_status change_once(struct write *write, uint64_t timeout_ns, change_fn change, void *context)
{
    enum lec_status status = lec_shard_lock(&write->view, timeout_ns);
    if (status != LEC_OK) return status;
    status = look_locked(write);
    return leave(&write->view, status == LEC_OK ? change(write, context) : status);
}

static enum lec_status change(struct lec_handle *handle, const struct lec_store *store, uint64_t now_ns, uint64_t timeout_ns,
                              change_fn step, void *context)
{
    struct write write;
    enum lec_status status = LEC_DAMAGED;
    write_begin(&write, handle, store, now_ns);
    for (uint32_t attempt = 0; attempt <= DAMAGE_RETRIES && status == LEC_DAMAGED; attempt++)
        status = change_once(&write, timeout_ns, step, context);
    return status == LEC_DAMAGED ? LEC_ABSENT : status;
}

static enum lec_status delete_locked(struct write *write, void *context)
{
    const uint64_t *expected_version = context;
    if (write->slot != LEC_NONE && *expected_version != 0 && lec_load64(&present(write)->version) != *expected_version) return LEC_MISMATCH;
    enum lec_status status = write->slot == LEC_NONE ? LEC_ABSENT : lec_drop_locked(&write->view, write->node, LEC_LEAVES_DELETED);
    lec_token_void_locked(&write->view, write->hash);   /* of an absent key too: a fill that began before must not bring it back */
    if (status == LEC_OK) lec_stat_add_locked(&write->view, LEC_STAT_DELETES, 1);
    return status;
}

enum lec_status lec_delete(struct lec_handle *handle, const void *key, uint32_t key_bytes, uint64_t expected_version,
                           uint64_t now_ns, uint64_t timeout_ns)
{
    struct lec_store what = {.key = key, .key_bytes = key_bytes};
    return change(handle, &what, now_ns, timeout_ns, delete_locked, &expected_version);
}

static enum lec_status touch_locked(struct write *write, void *context)
{
    (void)context;
    if (write->slot == LEC_NONE) return LEC_ABSENT;
    struct lec_entry *entry = present(write);
    struct lec_node *node = &write->view.nodes[write->node];
    if (lec_load32(&entry->tti_ms)) atomic_store_explicit(&node->accessed_at, write->view.now_ns, memory_order_relaxed);
    lec_put64(&entry->expires_at, write->expires_at);
    node->expires_at = write->expires_at;
    /* The whole deadline: 1 T reads the clock, waits for the lock  2 a reader stamps a later access  3 a sweep raises the
     * bound to that access's end of idle time  4 T puts its own, earlier access there, below the bound. */
    lec_expiry_note_locked(&write->view, write->node, lec_expiry_deadline_locked(&write->view, write->node));
    return LEC_OK;
}

enum lec_status lec_touch(struct lec_handle *handle, const void *key, uint32_t key_bytes, uint64_t ttl_ns,
                          uint64_t now_ns, uint64_t timeout_ns)
{
    struct lec_store what = {.key = key, .key_bytes = key_bytes, .ttl_ns = ttl_ns};
    return change(handle, &what, now_ns, timeout_ns, touch_locked, NULL);
}

/* ---- incr ---- */

#define DECIMAL_BYTES 20u           /* "-9223372036854775808" */

/* ASCII decimal, an optional minus, no blanks, no plus, signed 64 bits. */
static bool decimal_parse(const char *text, uint32_t bytes, int64_t *value)
{
    bool negative = bytes > 0 && text[0] == '-';
    uint32_t at = negative;
    if (at == bytes) return false;
    int64_t sum = 0;
    for (; at < bytes; at++) {
        if (text[at] < '0' || text[at] > '9') return false;
        int digit = text[at] - '0';
        if (__builtin_mul_overflow(sum, 10, &sum) || __builtin_sub_overflow(sum, digit, &sum)) return false;
    }
    return negative ? (*value = sum, true) : !__builtin_sub_overflow(0, sum, value);
}

static uint32_t decimal_write(int64_t value, char text[DECIMAL_BYTES])
{
    char digits[DECIMAL_BYTES];
    uint32_t count = 0, bytes = 0;
    uint64_t magnitude = value < 0 ? -(uint64_t)value : (uint64_t)value;
    do digits[count++] = (char)('0' + magnitude % 10);
    while ((magnitude /= 10) > 0);
    if (value < 0) text[bytes++] = '-';
    while (count > 0) text[bytes++] = digits[--count];
    return bytes;
}

struct increment { int64_t delta, result; struct lec_store store; char text[DECIMAL_BYTES]; };

static enum lec_status incr_locked(struct write *write, void *context)
{
    struct increment *increment = context;
    char text[DECIMAL_BYTES];
    int64_t value;
    if (write->slot == LEC_NONE) return LEC_ABSENT;
    const struct lec_entry *entry = present(write);
    uint32_t bytes = lec_load32(&entry->value_bytes), unit = lec_slot_unit(lec_slot_load(&write->view, write->slot));
    if (bytes > DECIMAL_BYTES || !lec_chain_read(&write->view.space, unit, write->store->key_bytes, text, bytes)) return LEC_NOT_A_NUMBER;
    if (!decimal_parse(text, bytes, &value)) return LEC_NOT_A_NUMBER;
    if (__builtin_add_overflow(value, increment->delta, &increment->result)) return LEC_OVERFLOW;
    increment->store = *write->store;
    increment->store.value = increment->text;
    increment->store.value_bytes = decimal_write(increment->result, increment->text);
    write->store = &increment->store;
    write->expires_at = lec_load64(&entry->expires_at);     /* the expiry is kept */
    write->tti_ms = lec_load32(&entry->tti_ms);
    return store_inline_locked(write);
}

enum lec_status lec_incr(struct lec_handle *handle, const void *key, uint32_t key_bytes, int64_t delta, int64_t *result,
                         uint64_t now_ns, uint64_t timeout_ns)
{
    struct increment increment = {.delta = delta};
    struct lec_store what = {.key = key, .key_bytes = key_bytes, .mode = LEC_SET};
    enum lec_status status = change(handle, &what, now_ns, timeout_ns, incr_locked, &increment);
    *result = increment.result;
    return status;
}

/* ---- clear ---- */

/* The epoch's one store makes every entry miss, everywhere and at once; then this call sweeps. */
enum lec_status lec_clear(struct lec_handle *handle, uint64_t now_ns, uint64_t timeout_ns)
{
    uint64_t state = atomic_load_explicit(&handle->header->state, memory_order_relaxed);
    uint64_t next;
    do {
        if (state >> 32 != 0) return LEC_RETIRED;
        next = (state & ~(uint64_t)UINT32_MAX) | (uint32_t)(state + 1);
    } while (!atomic_compare_exchange_weak(&handle->header->state, &state, next));
    for (uint32_t index = 0; index < handle->geometry.shard_count; index++) {
        struct lec_shard_view view;
        lec_shard_view(handle, index, now_ns, &view);
        if (lec_shard_lock(&view, timeout_ns ? timeout_ns : 1) == LEC_OK) lec_shard_unlock(&view);  /* taking the lock sweeps */
    }
    return LEC_OK;
}
