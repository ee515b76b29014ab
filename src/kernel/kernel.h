/* The shared slab's kernel: the whole public face.
 *
 * Plain C11 on a segment that the caller mapped; no allocation, no stdio, no mutable globals. Time, process identity
 * and randomness are arguments. `now_ns` is CLOCK_MONOTONIC (coarse is enough), one reading per operation.
 * Thread-safe, with one exception: lec_count_read(), lec_count() and lec_observe() on one handle need the caller's
 * serialisation (the GIL) unless the handle was attached with `concurrent`.
 */
#ifndef LEC_KERNEL_H
#define LEC_KERNEL_H

#include "layout.h"

enum lec_status {
    LEC_OK = 0,
    LEC_ABSENT,          /* no such entry */
    LEC_EXISTS,          /* add: there is a live entry */
    LEC_MISMATCH,        /* cas, fill, delete: the version or token is not current */
    LEC_REFUSED,         /* too large, or no memory to be had; the old value is gone */
    LEC_WOULD_BLOCK,     /* timeout_ns was 0 and the lock is taken; nothing changed */
    LEC_BUSY,            /* no lock within timeout_ns; nothing changed */
    LEC_RETIRED,         /* the segment was replaced or unlinked: attach again by name */
    LEC_NOT_A_NUMBER,    /* incr: the value is no ASCII decimal of signed 64 bits */
    LEC_OVERFLOW,        /* incr: the sum leaves signed 64 bits */
    LEC_NO_BUFFER,       /* the caller's buffer callback returned NULL */
    LEC_FOREIGN,         /* attach: no published segment of this layout, or its geometry does not fit */
    LEC_DAMAGED,         /* internal: a structure did not hold what it must; the shard is rebuilt */
};

enum lec_stat {
    LEC_STAT_HITS, LEC_STAT_MISSES, LEC_STAT_SETS, LEC_STAT_DELETES, LEC_STAT_REFUSALS, LEC_STAT_BUSY,
    LEC_STAT_EVICTIONS, LEC_STAT_EXPIRATIONS, LEC_STAT_ADMISSION_REJECTIONS, LEC_STAT_RECOVERIES,
    LEC_STAT_READ_RETRIES, LEC_STAT_READS_LOCKED, LEC_STAT_SHARDS_CLEARED,
};

/* One process's (private) view of a segment. Zero it before lec_attach(). */
struct lec_handle {
    uint8_t *base;
    uint64_t bytes;
    struct lec_header *header;
    struct lec_process *process;    /* this process's record */
    struct lec_config config;
    struct lec_geometry geometry;
    uint64_t seed[2];
    uint64_t identity;              /* as lec_process.owner */
    bool concurrent;                /* several threads may count at once: use atomic additions */
};

/* ---- life ---- */
/* Formats `bytes` of zeroed memory at `base` and publishes the magic last. */
enum lec_status lec_create(void *base, uint64_t bytes, const struct lec_config *config, const uint8_t boot_id[16],
                           uint64_t now_ns, uint64_t wall_ns, const uint64_t random[3]);
/* Reads only the frozen prefix: LEC_OK and the configuration, LEC_FOREIGN, or LEC_RETIRED. */
enum lec_status lec_probe(const void *base, uint64_t bytes, const uint8_t boot_id[16], struct lec_config *config);
/* Attaches: validates, claims (or adopts a dead process's) record. */
enum lec_status lec_attach(struct lec_handle *handle, void *base, uint64_t bytes, const uint8_t boot_id[16],
                           uint64_t identity, bool concurrent);
/* After fork: a new identity for the child, on the same mapping. */
void lec_reidentify(struct lec_handle *handle, uint64_t identity);
/* Gives the record back (its sums stay). The mapping is the caller's to unmap. */
void lec_detach(struct lec_handle *handle);
/* Marks the segment retired for every process (reason is nonzero). */
void lec_retire(struct lec_handle *handle, uint32_t reason);
/* pid << 40 | start time of /proc/PID/stat, 0 when there is no such process (or only its zombie). */
uint64_t lec_process_identity(int32_t pid);
/* Live attached processes (this one included). */
uint32_t lec_attached(struct lec_handle *handle);
/* Is the process that this identity names still running? False for 0 and for a zombie without running threads. */
bool lec_identity_is_alive(uint64_t identity);
/* Frees what dead processes had reserved, and their flights. Takes the locks concerned, each at most timeout_ns. */
void lec_reap(struct lec_handle *handle, uint64_t now_ns, uint64_t timeout_ns);

/* ---- reads: no lock (but for one bounded attempt after eight lost races) ---- */
/* Returns a buffer of `bytes` bytes, or NULL to give up; may be called again with another size in one operation, and is
 * called with 0 before the one attempt under the lock: whatever the callback let go of, it takes back now, not then. */
typedef void *(*lec_buffer_fn)(void *context, uint64_t bytes);

struct lec_read {
    bool wants_token;               /* in */
    uint64_t version;               /* of the entry, for cas; valid on LEC_OK */
    uint64_t expires_at;            /* ns; UINT64_MAX = never; valid on LEC_OK */
    uint64_t token;                 /* for fill; valid on LEC_OK and LEC_ABSENT if wanted */
};
/* buffer == NULL: only look (contains, ttl). Neither counts hit nor miss: the caller does, with lec_count_read(). */
enum lec_status lec_get(struct lec_handle *handle, const void *key, uint32_t key_bytes, uint64_t now_ns,
                        lec_buffer_fn buffer, void *context, struct lec_read *read);
/* For many keys at once: ask for the index lines of all, then for the entries of all, then read them. The first two are hints,
 * but for the hash, which lec_hint_home() returns and the others take. */
uint64_t lec_hint_home(const struct lec_handle *handle, const void *key, uint32_t key_bytes);
void lec_hint_entry(struct lec_handle *handle, uint64_t hash);
enum lec_status lec_get_hashed(struct lec_handle *handle, uint64_t hash, const void *key, uint32_t key_bytes, uint64_t now_ns,
                               lec_buffer_fn buffer, void *context, struct lec_read *read);
void lec_count_read(struct lec_handle *handle, uint32_t hits, uint32_t misses);

/* ---- writes: timeout_ns == 0 means trylock only ---- */
enum lec_mode { LEC_SET, LEC_ADD, LEC_CAS, LEC_FILL, LEC_FILL_FENCED };

struct lec_store {
    const void *key; const void *value;
    uint64_t value_bytes;
    uint32_t key_bytes;
    enum lec_mode mode;
    uint64_t expected;              /* CAS: version; FILL: token; FILL_FENCED: fence */
    uint64_t ttl_ns;                /* 0 = never expires */
    uint64_t tti_ns;                /* 0 = off */
};
/* LEC_OK, LEC_EXISTS (add), LEC_MISMATCH (cas, fill; cas of an absent key too), LEC_REFUSED, LEC_WOULD_BLOCK, LEC_BUSY, LEC_RETIRED. */
enum lec_status lec_store(struct lec_handle *handle, const struct lec_store *store, uint64_t now_ns, uint64_t timeout_ns);
/* For a fill after a long computation: moved by deletes of the key, clears, and takeovers of its flight, but not by sets. */
uint64_t lec_fence_now(struct lec_handle *handle, const void *key, uint32_t key_bytes);
/* The token that a read of the key would hand out now. */
uint64_t lec_token_now(struct lec_handle *handle, const void *key, uint32_t key_bytes);
/* Values longer than this are filled outside the lock; the caller may want to release its own locks (the GIL) first. */
#define LEC_INLINE_BYTES 8192u
/* How long the second critical section of such a store may wait for the lock when timeout_ns is 0. */
#define LEC_FILL_TIMEOUT_NS UINT64_C(1000000000)
/* expected_version 0 = whatever is there. LEC_OK, LEC_ABSENT, LEC_MISMATCH, ... */
enum lec_status lec_delete(struct lec_handle *handle, const void *key, uint32_t key_bytes, uint64_t expected_version,
                           uint64_t now_ns, uint64_t timeout_ns);
enum lec_status lec_incr(struct lec_handle *handle, const void *key, uint32_t key_bytes, int64_t delta, int64_t *result,
                         uint64_t now_ns, uint64_t timeout_ns);
/* ttl_ns 0 = never expires from now on. */
enum lec_status lec_touch(struct lec_handle *handle, const void *key, uint32_t key_bytes, uint64_t ttl_ns,
                          uint64_t now_ns, uint64_t timeout_ns);
/* After it returns all keys miss everywhere and the counts are 0. Shards whose lock cannot be had within timeout_ns
 * are swept by whoever has the lock next; their entries miss all the same. */
enum lec_status lec_clear(struct lec_handle *handle, uint64_t now_ns, uint64_t timeout_ns);

/* ---- looking in from outside ---- */
struct lec_info {
    uint8_t key[LEC_MAX_KEY];
    uint32_t key_bytes;
    uint32_t value_bytes;
    uint64_t expires_at;            /* ns; UINT64_MAX = never */
    uint64_t accessed_at;           /* ns; 0 = no TTI, not known */
    uint32_t tti_ms;                /* 0 = off */
    uint32_t frequency;             /* estimate of the sketch, 0..15, plus hits not yet examined */
};
typedef void (*lec_info_fn)(void *context, const struct lec_info *info);
/* Visits up to `buckets` buckets from *cursor on; *cursor = 0 starts, and is UINT64_MAX when all were seen. */
enum lec_status lec_scan(struct lec_handle *handle, uint64_t *cursor, uint32_t buckets, uint64_t now_ns,
                         lec_info_fn visit, void *context);
/* Looks at the one slot at *cursor, which counts slots here, and moves on: LEC_OK: *info, and its value is in the buffer;
 * LEC_ABSENT: nothing that lives; LEC_RETIRED; LEC_NO_BUFFER. Key and value belong together. Counts and touches nothing. */
enum lec_status lec_scan_entry(struct lec_handle *handle, uint64_t *cursor, uint64_t now_ns, lec_buffer_fn buffer, void *context,
                               struct lec_info *info);

/* What one process's record says. */
struct lec_process_totals {
    uint64_t owner;                 /* as lec_process.owner, 0 = nobody's; the sums are of all owners that the record had */
    uint64_t hits, misses;
};
/* False: no such record. */
bool lec_process_totals(struct lec_handle *handle, uint32_t index, struct lec_process_totals *totals);
/* Of lec_tag(): generations in the table. */
uint32_t lec_tag_count(const struct lec_handle *handle);

struct lec_totals {
    uint64_t entries, payload_bytes, used_bytes;
    uint64_t stats[LEC_STAT_COUNT];
    uint64_t created_wall_ns;
    uint32_t attached_processes;
    uint32_t window_ppm;            /* the admission window's share of the capacity, averaged over the shards */
};
/* Published entries, as lec_totals() has them. */
uint64_t lec_entries(struct lec_handle *handle);
void lec_totals(struct lec_handle *handle, struct lec_totals *totals);

typedef void (*lec_report_fn)(void *context, const char *message, uint64_t shard, uint64_t detail);
/* Every broken invariant of the whole segment, one report each; returns how many. LEC_BUSY shards are reported too. */
uint64_t lec_check(struct lec_handle *handle, uint64_t now_ns, uint64_t timeout_ns, lec_report_fn report, void *context);

/* ---- what was asked of the sampled keys, lately (samples.h) ---- */
/* Copies a shard's; copy->events and copy->marks have geometry.sample_count and geometry.mark_count places. No lock.
 * False: there is no such shard. */
bool lec_samples_of(struct lec_handle *handle, uint32_t shard, struct lec_samples_copy *copy);

/* A cache of another size to which samples are replayed, through the real policy (miniature.h). */
struct lec_replay {
    const void *events, *times;     /* words of 64 bits, at any address: events in order, and when they were, ns */
    uint64_t count;
    uint32_t entries, units;        /* what the cache may hold: 1 .. LEC_REPLAY_ENTRIES_MOST, 1 .. LEC_REPLAY_UNITS_MOST */
    uint64_t tti_ns;                /* 0 = off */
    uint64_t seed;                  /* of what the policy draws by lot */
};
#define LEC_REPLAY_ENTRIES_MOST (UINT32_MAX / 16u)
#define LEC_REPLAY_UNITS_MOST (UINT32_MAX / 4u)
enum lec_outcome { LEC_OUTCOME_NONE = 0, LEC_OUTCOME_HIT = 1, LEC_OUTCOME_MISS = 2 };
/* Bytes of memory that it needs, to be aligned to 64. */
uint64_t lec_replay_bytes(uint32_t entries);
/* outcomes[count]: what each event was to that cache. Any events are safe. */
void lec_replay(const struct lec_replay *replay, void *memory, uint8_t *outcomes);

/* ---- flights: one computation per key over all processes of the host (flight.h tells how) ---- */
enum lec_role {
    LEC_FLIGHT_LED,                 /* a free record was claimed: the caller computes */
    LEC_FLIGHT_TAKEN_OVER,          /* so it does, in the place of an owner that is dead or whose deadline has passed */
    LEC_FLIGHT_JOINED,              /* a flight of this key is running: the caller waits for that one */
    LEC_FLIGHT_NONE,                /* no record to be had: every caller for himself */
};
/* Names one flight, in the segment and for ever: no later flight has its token. */
struct lec_ticket { uint64_t token; uint32_t index; };
#define LEC_LEASE_MAX_NS UINT64_C(3600000000000)    /* longer leases are cut to this */
#define LEC_FLIGHT_OVER INT64_C(-1)

/* Who leads takes its fill token afterwards, looks the key up again, and only then computes: 1 A misses  2 the leader
 * fills and ends  3 A joins, and leads: the value is there. Fill tokens from before a takeover are void.
 * LEC_OK; with the role NONE and the ticket zeroed: LEC_WOULD_BLOCK, LEC_BUSY, LEC_RETIRED. */
enum lec_status lec_flight_join(struct lec_handle *handle, const void *key, uint32_t key_bytes, uint64_t lease_ns,
                                uint64_t now_ns, uint64_t timeout_ns, enum lec_role *role, struct lec_ticket *ticket);
/* The owner's: LEC_OK, LEC_MISMATCH (taken over, ended, or another process's), LEC_WOULD_BLOCK, LEC_BUSY, LEC_RETIRED. */
enum lec_status lec_flight_renew(struct lec_handle *handle, struct lec_ticket ticket, uint64_t lease_ns,
                                 uint64_t now_ns, uint64_t timeout_ns);
/* Progress, 0 to INT64_MAX, only grows: a lower one changes nothing. Wakes all waiters. */
enum lec_status lec_flight_advance(struct lec_handle *handle, struct lec_ticket ticket, uint64_t progress,
                                   uint64_t now_ns, uint64_t timeout_ns);
enum lec_status lec_flight_end(struct lec_handle *handle, struct lec_ticket ticket, uint64_t now_ns, uint64_t timeout_ns);
/* The progress while that flight runs, else LEC_FLIGHT_OVER. No lock. */
int64_t lec_flight_state(struct lec_handle *handle, struct lec_ticket ticket, uint64_t now_ns);
/* As lec_flight_state(), but sleeps while that is `progress`: at most timeout_ns, less when a signal comes. */
int64_t lec_flight_wait(struct lec_handle *handle, struct lec_ticket ticket, int64_t progress, uint64_t now_ns, uint64_t timeout_ns);
/* One word that moves with every advance and end, for who waits for many flights. Deaths and deadlines do not move it.
 * The wait ends when it is not `seen` any more, after timeout_ns, or early. */
uint64_t lec_bell(struct lec_handle *handle);
uint64_t lec_bell_wait(struct lec_handle *handle, uint64_t seen, uint64_t timeout_ns);

/* ---- regions of the manager: bounds are the kernel's business ---- */
/* In this process's record. False: no such counter or histogram. */
bool lec_count(struct lec_handle *handle, uint32_t counter, uint64_t amount);
bool lec_observe(struct lec_handle *handle, uint32_t histogram, uint64_t elapsed_ns);
/* Over all records, those of the dead included, so that no sum ever falls. */
void lec_counter_sums(struct lec_handle *handle, uint64_t sums[LEC_COUNTERS]);
void lec_histogram_sums(struct lec_handle *handle, uint64_t sums[LEC_HISTOGRAMS][LEC_HISTOGRAM_BUCKETS]);
/* NULL when the index is out of bounds. */
_Atomic uint64_t *lec_word(struct lec_handle *handle, uint32_t index);
_Atomic uint64_t *lec_tag(struct lec_handle *handle, uint64_t tag_hash);
struct lec_flight *lec_flight_at(struct lec_handle *handle, uint32_t index);

#endif
