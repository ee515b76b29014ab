#include "reserve.h"

#include "access.h"
#include "chain.h"
#include "process.h"

static uint32_t state_of(const struct lec_reservation *reservation) { return atomic_load_explicit(&reservation->state, memory_order_acquire); }

static void state_set(struct lec_reservation *reservation, uint32_t state) { atomic_store_explicit(&reservation->state, state, memory_order_release); }

struct lec_reservation *lec_reservation_open_locked(const struct lec_shard_view *view, uint32_t unit)
{
    struct lec_process *process = view->handle->process;
    if (process == lec_process_at(view->handle, 0)) return NULL;    /* the shared record has no single owner to look after */
    for (uint32_t at = 0; at < LEC_RESERVATIONS; at++) {
        struct lec_reservation *reservation = &process->reservations[at];
        uint32_t free_state = LEC_RESERVATION_FREE;
        /* Threads of this process on other shards look for a record too, under other locks: claim by exchange. A
         * claimed record is nobody's root, whatever its shard says: it is ignored until it is held. */
        if (state_of(reservation) != LEC_RESERVATION_FREE) continue;
        if (!atomic_compare_exchange_strong(&reservation->state, &free_state, LEC_RESERVATION_CLAIMED)) continue;
        lec_put32(&reservation->shard, view->index);
        lec_put32(&reservation->unit, unit);
        view->shard->reserved_chains++;
        state_set(reservation, LEC_RESERVATION_HELD);
        return reservation;
    }
    return NULL;
}

void lec_reservation_close_locked(const struct lec_shard_view *view, struct lec_reservation *reservation)
{
    if (view->shard->reserved_chains > 0) view->shard->reserved_chains--;
    state_set(reservation, LEC_RESERVATION_FREE);
}

void lec_reservation_abandon(const struct lec_shard_view *view, struct lec_reservation *reservation)
{
    state_set(reservation, LEC_RESERVATION_ABANDONED);
    atomic_store_explicit(&view->shard->reap_wanted, 1, memory_order_release);
}

/* Calls `each` for every reservation of this shard that is not free. */
typedef void (*reservation_fn)(const struct lec_shard_view *view, struct lec_reservation *reservation, bool owner_lives, void *context);

static LEC_ASIDE void for_each(const struct lec_shard_view *view, reservation_fn each, void *context)
{
    for (uint32_t index = 1; index < view->handle->geometry.process_count; index++) {
        struct lec_process *process = lec_process_at(view->handle, index);
        for (uint32_t at = 0; at < LEC_RESERVATIONS; at++) {
            struct lec_reservation *reservation = &process->reservations[at];
            uint32_t state = state_of(reservation);
            if (state != LEC_RESERVATION_HELD && state != LEC_RESERVATION_ABANDONED) continue;
            if (lec_load32(&reservation->shard) != view->index) continue;
            each(view, reservation, lec_identity_is_alive(atomic_load_explicit(&process->owner, memory_order_relaxed)), context);
        }
    }
}

static void reap_one(const struct lec_shard_view *view, struct lec_reservation *reservation, bool owner_lives, void *context)
{
    bool *damaged = context;
    if (owner_lives && state_of(reservation) == LEC_RESERVATION_HELD) return;
    uint32_t unit = lec_load32(&reservation->unit);
    lec_reservation_close_locked(view, reservation);
    if (lec_chain_give(&view->space, unit) != LEC_SPACE_OK) *damaged = true;
}

void lec_reservations_reap_locked(const struct lec_shard_view *view, bool look_for_dead_owners)
{
    struct lec_shard *shard = view->shard;
    bool damaged = false;
    if (shard->reserved_chains == 0) return;
    if (!look_for_dead_owners && atomic_load_explicit(&shard->reap_wanted, memory_order_acquire) == 0) return;
    atomic_store_explicit(&shard->reap_wanted, 0, memory_order_relaxed);
    shard->reaped_ns = view->now_ns;
    for_each(view, reap_one, &damaged);
    if (damaged) lec_shard_recover_locked(view);
}

struct marking { uint32_t count; bool is_spoiled; };

static void mark_one(const struct lec_shard_view *view, struct lec_reservation *reservation, bool owner_lives, void *context)
{
    struct marking *marking = context;
    uint32_t units, unit = lec_load32(&reservation->unit);
    const struct lec_space_view *space = &view->space;
    bool held = owner_lives && state_of(reservation) == LEC_RESERVATION_HELD && unit < space->units;
    /* Already reached from a slot: published, and its owner died before closing the record. */
    if (held) held = !(space->used[unit / 64] >> (unit % 64) & 1);
    if (held) {
        const struct lec_entry *entry = lec_entry_at(space, unit);
        uint64_t payload_bytes = (uint64_t)lec_load16(&entry->key_bytes) + lec_load32(&entry->value_bytes);
        held = lec_chain_mark(space, unit, payload_bytes, &units);
        marking->is_spoiled |= !held;
    }
    if (held) marking->count++;
    else lec_reservation_close_locked(view, reservation);
}

/* Alive or dead: an owner may die, or abandon it, at any moment of the check. */
static void verify_one(const struct lec_shard_view *view, struct lec_reservation *reservation, bool owner_lives, void *context)
{
    uint32_t *sound = context, units, unit = lec_load32(&reservation->unit);
    (void)owner_lives;
    if (unit >= view->space.units) return;
    const struct lec_entry *entry = lec_entry_at(&view->space, unit);
    uint64_t payload_bytes = (uint64_t)lec_load16(&entry->key_bytes) + lec_load32(&entry->value_bytes);
    *sound += lec_chain_mark(&view->space, unit, payload_bytes, &units);
}

uint32_t lec_reservations_verify_locked(const struct lec_shard_view *view)
{
    uint32_t sound = 0;
    for_each(view, verify_one, &sound);
    return sound;
}

uint32_t lec_reservations_mark_locked(const struct lec_shard_view *view, bool *is_spoiled)
{
    struct marking marking = {0, false};
    for_each(view, mark_one, &marking);
    *is_spoiled = marking.is_spoiled;
    return marking.count;
}

static void count_one(const struct lec_shard_view *view, struct lec_reservation *reservation, bool owner_lives, void *context)
{
    (void)view; (void)reservation; (void)owner_lives;
    *(uint32_t *)context += 1;
}

uint32_t lec_reservations_count_locked(const struct lec_shard_view *view)
{
    uint32_t count = 0;
    for_each(view, count_one, &count);
    return count;
}
