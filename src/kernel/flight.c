/* Flights, as flight.h tells. */
#include "flight.h"

#include <errno.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "hash.h"
#include "process.h"

#define WATCH_NS UINT64_C(20000000)     /* a waiter looks at least this often whether the owner lives */

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the bell's low half is its futex word");

/* ---- places ---- */

static uint32_t partition_size(const struct lec_handle *handle) { return handle->geometry.flight_count / handle->geometry.shard_count; }

/* The LEC_FLIGHT_SET records that a key's flight may have. */
static uint32_t flight_set_of(const struct lec_handle *handle, uint64_t hash)
{
    uint32_t sets = partition_size(handle) / LEC_FLIGHT_SET;
    return lec_shard_of(handle, hash) * partition_size(handle) + (uint32_t)(hash >> 48) % sets * LEC_FLIGHT_SET;
}

static uint32_t flight_index(struct lec_handle *handle, const struct lec_flight *flight) { return (uint32_t)(flight - lec_flight_at(handle, 0)); }

/* ---- looking, with the lock or without ---- */

/* A record as it was at one moment. */
struct flight_seen { uint64_t token, owner, key_hash, deadline_ns, progress; };

/* False: it is free, or changed hands while we looked. The order of the loads is what flight.h says. */
static bool flight_look(const struct lec_flight *flight, struct flight_seen *seen)
{
    seen->token = atomic_load_explicit(&flight->fencing_token, memory_order_acquire);
    seen->owner = atomic_load_explicit(&flight->owner, memory_order_acquire);
    seen->key_hash = atomic_load_explicit(&flight->key_hash, memory_order_acquire);
    seen->deadline_ns = atomic_load_explicit(&flight->deadline_ns, memory_order_acquire);
    seen->progress = atomic_load_explicit(&flight->progress, memory_order_acquire);
    return seen->owner != 0 && seen->token != 0 && atomic_load_explicit(&flight->fencing_token, memory_order_relaxed) == seen->token;
}

/* A deadline that no lease reaches was scribbled: it must not keep a key's callers waiting. Twice the longest lease,
 * for the clock may have been read well before the lock was had. */
static bool is_in_time(const struct flight_seen *seen, uint64_t now_ns)
{
    return seen->deadline_ns > now_ns && seen->deadline_ns - now_ns <= 2 * LEC_LEASE_MAX_NS;
}

static bool is_running(const struct lec_handle *handle, const struct flight_seen *seen, uint64_t now_ns)
{
    return is_in_time(seen, now_ns) && (seen->owner == handle->identity || lec_identity_is_alive(seen->owner));
}

/* ---- storing ---- */

/* F4, after the change that is to be noticed. 1 L bumps the word  2 W reads the word, and the flight as it still is
 * 3 L stores the change  4 W sleeps on the bumped word: so the change comes first. */
static void ring(struct lec_handle *handle, struct lec_flight *flight)
{
    atomic_fetch_add_explicit(&flight->wake, 1, memory_order_release);
    atomic_fetch_add_explicit(lec_word(handle, LEC_WORD_BELL), 1, memory_order_release);
}

static _Atomic uint32_t *bell_futex(struct lec_handle *handle) { return (_Atomic uint32_t *)(void *)lec_word(handle, LEC_WORD_BELL); }

static void wake_all(_Atomic uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0); }

/* F5. Without the lock: who wakes may want it. */
static void wake_waiters(struct lec_handle *handle, struct lec_flight *flight)
{
    wake_all(&flight->wake);
    wake_all(bell_futex(handle));
}

static void free_locked(struct lec_handle *handle, struct lec_flight *flight)
{
    atomic_store_explicit(&flight->owner, 0, memory_order_release);     /* F3 */
    ring(handle, flight);
}

/* Takes a flight from an owner that did not end it. 1 L leads, holds a fill token, is stopped  2 its deadline passes, B
 * takes over, computes, fills  3 L wakes and fills the older value: refused, for its token is of the generation before. */
static void revoke_locked(const struct lec_shard_view *view, struct lec_flight *flight)
{
    lec_token_void_locked(view, atomic_load_explicit(&flight->key_hash, memory_order_relaxed));
    free_locked(view->handle, flight);
}

static uint64_t lease_end(uint64_t now_ns, uint64_t lease_ns) { return now_ns + (lease_ns < LEC_LEASE_MAX_NS ? lease_ns : LEC_LEASE_MAX_NS); }

/* F1, F2 on a free record. */
static void claim_locked(const struct lec_shard_view *view, struct lec_flight *flight, uint64_t hash, uint64_t lease_ns, struct lec_ticket *ticket)
{
    _Atomic uint64_t *next_token = lec_word(view->handle, LEC_WORD_TOKEN);
    do ticket->token = atomic_fetch_add_explicit(next_token, 1, memory_order_relaxed);
    while (ticket->token == 0);
    ticket->index = flight_index(view->handle, flight);
    /* Release: who sees this token sees that the flight before is over (F3). */
    atomic_store_explicit(&flight->fencing_token, ticket->token, memory_order_release);
    /* Release: who sees one of these sees the token, and that its flight is another one. */
    atomic_store_explicit(&flight->key_hash, hash, memory_order_release);
    atomic_store_explicit(&flight->deadline_ns, lease_end(view->now_ns, lease_ns), memory_order_release);
    atomic_store_explicit(&flight->progress, 0, memory_order_release);
    atomic_store_explicit(&flight->owner, view->handle->identity, memory_order_release);    /* F2 */
}

/* ---- join ---- */

/* A set as it concerns one key. */
struct choice {
    struct lec_flight *own;         /* the key's record, running or not */
    struct lec_flight *vacant;      /* a free one */
    struct lec_flight *spent;       /* another key's, past its deadline */
    struct flight_seen seen;               /* of own */
};

static void choose(struct lec_handle *handle, uint64_t hash, uint64_t now_ns, struct choice *choice)
{
    struct lec_flight *set = lec_flight_at(handle, flight_set_of(handle, hash));
    *choice = (struct choice){0};
    for (uint32_t at = 0; at < LEC_FLIGHT_SET && !choice->own; at++) {
        struct flight_seen seen;
        if (!flight_look(&set[at], &seen)) {
            if (!choice->vacant) choice->vacant = &set[at];
        } else if (seen.key_hash == hash) {
            choice->own = &set[at];
            choice->seen = seen;
        } else if (!choice->spent && !is_in_time(&seen, now_ns)) {
            choice->spent = &set[at];
        }
    }
}

static bool has_joined(struct lec_handle *handle, const struct choice *choice, uint64_t now_ns, struct lec_ticket *ticket)
{
    if (!choice->own || !is_running(handle, &choice->seen, now_ns)) return false;
    *ticket = (struct lec_ticket){choice->seen.token, flight_index(handle, choice->own)};
    return true;
}

/* *revoked: whose waiters are to be woken once the lock is free; or NULL. */
static enum lec_role join_locked(const struct lec_shard_view *view, uint64_t hash, uint64_t lease_ns, struct lec_ticket *ticket,
                                 struct lec_flight **revoked)
{
    struct choice choice;
    choose(view->handle, hash, view->now_ns, &choice);
    if (has_joined(view->handle, &choice, view->now_ns, ticket)) return LEC_FLIGHT_JOINED;
    struct lec_flight *flight = choice.own ? choice.own : choice.vacant ? choice.vacant : choice.spent;
    if (!flight) return LEC_FLIGHT_NONE;
    if (flight != choice.vacant) {
        *revoked = flight;
        revoke_locked(view, flight);
    }
    claim_locked(view, flight, hash, lease_ns, ticket);
    return choice.own ? LEC_FLIGHT_TAKEN_OVER : LEC_FLIGHT_LED;
}

enum lec_status lec_flight_join(struct lec_handle *handle, const void *key, uint32_t key_bytes, uint64_t lease_ns,
                                uint64_t now_ns, uint64_t timeout_ns, enum lec_role *role, struct lec_ticket *ticket)
{
    uint64_t hash = lec_hash(key, key_bytes, handle->seed);
    struct lec_flight *revoked = NULL;
    struct lec_shard_view view;
    struct choice choice;
    *role = LEC_FLIGHT_NONE;
    *ticket = (struct lec_ticket){0, 0};
    if (lec_is_retired(handle)) return LEC_RETIRED;
    /* The many that come after the first need no lock, nor its holder's patience while they look into /proc. */
    choose(handle, hash, now_ns, &choice);
    if (has_joined(handle, &choice, now_ns, ticket)) {
        *role = LEC_FLIGHT_JOINED;
        return LEC_OK;
    }
    if (handle->identity == 0) return LEC_OK;   /* not known: nobody could tell whether the owner lives */
    lec_shard_view(handle, lec_shard_of(handle, hash), now_ns, &view);
    enum lec_status status = lec_shard_lock(&view, timeout_ns);
    if (status != LEC_OK) return status;
    *role = join_locked(&view, hash, lease_ns, ticket, &revoked);
    lec_shard_unlock(&view);
    if (revoked) wake_waiters(handle, revoked);
    return LEC_OK;
}

/* ---- renew, advance, end: the owner's ---- */

/* LEC_OK: locked, and the flight is this process's. A former owner's token is another one; a forked child has its
 * parent's tokens, but not its identity. */
static enum lec_status lock_own(struct lec_handle *handle, struct lec_ticket ticket, uint64_t now_ns, uint64_t timeout_ns,
                                struct lec_shard_view *view, struct lec_flight **flight)
{
    *flight = lec_flight_at(handle, ticket.index);
    if (!*flight || ticket.token == 0 || handle->identity == 0) return lec_is_retired(handle) ? LEC_RETIRED : LEC_MISMATCH;
    lec_shard_view(handle, ticket.index / partition_size(handle), now_ns, view);
    enum lec_status status = lec_shard_lock(view, timeout_ns);
    if (status != LEC_OK) return status;
    if (atomic_load_explicit(&(*flight)->owner, memory_order_relaxed) == handle->identity &&
        atomic_load_explicit(&(*flight)->fencing_token, memory_order_relaxed) == ticket.token)
        return LEC_OK;
    lec_shard_unlock(view);
    return LEC_MISMATCH;
}

enum lec_status lec_flight_renew(struct lec_handle *handle, struct lec_ticket ticket, uint64_t lease_ns, uint64_t now_ns, uint64_t timeout_ns)
{
    struct lec_shard_view view;
    struct lec_flight *flight;
    enum lec_status status = lock_own(handle, ticket, now_ns, timeout_ns, &view, &flight);
    if (status != LEC_OK) return status;
    atomic_store_explicit(&flight->deadline_ns, lease_end(now_ns, lease_ns), memory_order_release);
    lec_shard_unlock(&view);
    return LEC_OK;
}

enum lec_status lec_flight_advance(struct lec_handle *handle, struct lec_ticket ticket, uint64_t progress, uint64_t now_ns, uint64_t timeout_ns)
{
    struct lec_shard_view view;
    struct lec_flight *flight;
    enum lec_status status = lock_own(handle, ticket, now_ns, timeout_ns, &view, &flight);
    if (status != LEC_OK) return status;
    bool is_more = progress <= INT64_MAX && progress > atomic_load_explicit(&flight->progress, memory_order_relaxed);
    if (is_more) {
        atomic_store_explicit(&flight->progress, progress, memory_order_release);
        ring(handle, flight);
    }
    lec_shard_unlock(&view);
    if (is_more) wake_waiters(handle, flight);
    return LEC_OK;
}

enum lec_status lec_flight_end(struct lec_handle *handle, struct lec_ticket ticket, uint64_t now_ns, uint64_t timeout_ns)
{
    struct lec_shard_view view;
    struct lec_flight *flight;
    enum lec_status status = lock_own(handle, ticket, now_ns, timeout_ns, &view, &flight);
    if (status != LEC_OK) return status;
    free_locked(handle, flight);
    lec_shard_unlock(&view);
    wake_waiters(handle, flight);
    return LEC_OK;
}

/* ---- waiting ---- */

int64_t lec_flight_state(struct lec_handle *handle, struct lec_ticket ticket, uint64_t now_ns)
{
    struct lec_flight *flight = lec_flight_at(handle, ticket.index);
    struct flight_seen seen;
    if (!flight || lec_is_retired(handle) || !flight_look(flight, &seen)) return LEC_FLIGHT_OVER;
    if (seen.token != ticket.token || !is_running(handle, &seen, now_ns)) return LEC_FLIGHT_OVER;
    return (int64_t)(seen.progress & INT64_MAX);
}

static uint64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t least(uint64_t left, uint64_t right) { return left < right ? left : right; }

/* Sleeps while the word is as it was seen. False: a signal came. */
static bool sleep_on(const _Atomic uint32_t *word, uint32_t seen, uint64_t for_ns)
{
    struct timespec span = {(time_t)(for_ns / 1000000000u), (long)(for_ns % 1000000000u)};
    return syscall(SYS_futex, word, FUTEX_WAIT, seen, &span, NULL, 0) == 0 || errno != EINTR;
}

int64_t lec_flight_wait(struct lec_handle *handle, struct lec_ticket ticket, int64_t progress, uint64_t now_ns, uint64_t timeout_ns)
{
    const struct lec_flight *flight = lec_flight_at(handle, ticket.index);
    uint64_t begun = clock_ns(), waited = 0;
    bool is_undisturbed = true;
    if (!flight) return LEC_FLIGHT_OVER;
    for (;;) {
        /* Before the look: what changes after it moves the word away from this value, and sleep_on() returns at once. */
        uint32_t seen = atomic_load_explicit(&flight->wake, memory_order_acquire);
        int64_t state = lec_flight_state(handle, ticket, now_ns + waited);
        if (state != progress || waited >= timeout_ns || !is_undisturbed) return state;
        is_undisturbed = sleep_on(&flight->wake, seen, least(WATCH_NS, timeout_ns - waited));
        waited = clock_ns() - begun;
    }
}

uint64_t lec_bell(struct lec_handle *handle) { return atomic_load_explicit(lec_word(handle, LEC_WORD_BELL), memory_order_acquire); }

uint64_t lec_bell_wait(struct lec_handle *handle, uint64_t seen, uint64_t timeout_ns)
{
    if (lec_bell(handle) == seen) (void)sleep_on(bell_futex(handle), (uint32_t)seen, timeout_ns);
    return lec_bell(handle);
}

/* ---- the dead ---- */

static void flight_reap(struct lec_handle *handle, uint32_t index, uint64_t dead_owner, uint64_t now_ns, uint64_t timeout_ns)
{
    struct lec_flight *flight = lec_flight_at(handle, index);
    struct lec_shard_view view;
    lec_shard_view(handle, index / partition_size(handle), now_ns, &view);
    if (lec_shard_lock(&view, timeout_ns) != LEC_OK) return;
    /* 1 we find the owner dead  2 B takes the flight over  3 we have the lock: the flight is B's. */
    bool is_his = atomic_load_explicit(&flight->owner, memory_order_relaxed) == dead_owner;
    if (is_his) revoke_locked(&view, flight);
    lec_shard_unlock(&view);
    if (is_his) wake_waiters(handle, flight);
}

void lec_flights_reap(struct lec_handle *handle, uint64_t now_ns, uint64_t timeout_ns)
{
    uint64_t living = handle->identity;     /* looked up last: one process mostly owns many */
    for (uint32_t index = 0; index < handle->geometry.flight_count; index++) {
        uint64_t owner = atomic_load_explicit(&lec_flight_at(handle, index)->owner, memory_order_relaxed);
        if (owner == 0 || owner == living) continue;
        if (lec_identity_is_alive(owner)) living = owner;
        else flight_reap(handle, index, owner, now_ns, timeout_ns);
    }
}

/* ---- checking ---- */

static bool has_earlier_record(struct lec_handle *handle, uint32_t index, uint64_t hash)
{
    for (uint32_t at = index / LEC_FLIGHT_SET * LEC_FLIGHT_SET; at < index; at++) {
        const struct lec_flight *flight = lec_flight_at(handle, at);
        if (atomic_load_explicit(&flight->owner, memory_order_relaxed) != 0 && atomic_load_explicit(&flight->key_hash, memory_order_relaxed) == hash) return true;
    }
    return false;
}

/* NULL: it is sound. */
static const char *complaint_about(struct lec_handle *handle, uint32_t index)
{
    struct lec_flight *flight = lec_flight_at(handle, index);
    uint64_t token = atomic_load_explicit(&flight->fencing_token, memory_order_relaxed);
    uint64_t hash = atomic_load_explicit(&flight->key_hash, memory_order_relaxed);
    if (token == 0 || token >= atomic_load_explicit(lec_word(handle, LEC_WORD_TOKEN), memory_order_relaxed)) return "flight's token was never handed out";
    if (flight_set_of(handle, hash) != index / LEC_FLIGHT_SET * LEC_FLIGHT_SET) return "flight of a key that belongs elsewhere";
    return has_earlier_record(handle, index, hash) ? "second flight of one key" : NULL;
}

void lec_flights_check_locked(const struct lec_shard_view *view, lec_flights_report *report, void *context)
{
    struct lec_handle *handle = view->handle;
    uint32_t first = view->index * partition_size(handle);
    for (uint32_t index = first; index < first + partition_size(handle); index++) {
        struct lec_flight *flight = lec_flight_at(handle, index);
        if (atomic_load_explicit(&flight->owner, memory_order_relaxed) == 0) continue;
        const char *complaint = complaint_about(handle, index);
        if (!complaint) continue;
        report(context, complaint, index);
        revoke_locked(view, flight);
        wake_waiters(handle, flight);
    }
}
