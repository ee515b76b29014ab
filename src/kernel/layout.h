/* What lies where in the segment: every struct that processes share, and the geometry derived from a configuration.
 *
 *   header page | mutex pages | processes | flights | tag generations | shared words | shard 0 | shard 1 | ...
 *   shard: state | buckets | nodes | sketch | key generations, fences | sample marks | samples | expiry tree | live bitmap |
 *          used bitmap | arena
 *
 * Offsets and indices only, never pointers. Nobody trusts a stored offset: whoever attaches validates the stored
 * configuration, derives the geometry again with lec_geometry_derive() and keeps that as a private copy.
 */
#ifndef LEC_LAYOUT_H
#define LEC_LAYOUT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "node.h"
#include "policy.h"
#include "space.h"

#define LEC_MAGIC UINT64_C(0x314845434143454c)   /* "LECACHE1", little-endian; stored last by the creator */
#define LEC_LAYOUT_VERSION 4u
#define LEC_PAGE 4096u
#define LEC_LINE 64u
#define LEC_MAX_SHARDS 4096u
#define LEC_MAX_KEY 1024u
#define LEC_MUTEX_STRIDE 64u

#define LEC_STAT_COUNT 16u          /* of enum lec_stat, with room; per process and per shard, totals are sums over both */
#define LEC_RESERVATIONS 8u         /* large values one process can be filling at a time */
#define LEC_COUNTERS 96u            /* named counters per process; the names are the manager's */
#define LEC_COUNTER_HITS 0u         /* ... but for these two, which sample marks take with them: look-ups that were answered, */
#define LEC_COUNTER_MISSES 1u       /* and those that were not. (The slab itself counts a missing key again when it is looked at again.) */
#define LEC_HISTOGRAMS 4u
#define LEC_HISTOGRAM_BUCKETS 32u   /* 31 counts and, last, the sum of what was observed, ns */
#define LEC_HISTOGRAM_FIRST_NS 250u /* bucket i counts what took at most this << i, the last count what took longer, too */
#define LEC_WORDS 64u               /* shared words: breaker, stream reader, ...; the last two are the kernel's: */
#define LEC_WORD_TOKEN 62u          /* the next flight's token */
#define LEC_WORD_BELL 63u           /* moves with every flight that advances or ends */
#define LEC_FLIGHT_SET 32u          /* the records of its shard that a key's flight may have; the least per shard */

/* What the user chose. Stored in the header; equal configurations mean an equal layout. */
struct lec_config {
    uint64_t memory_bytes;          /* the whole segment, tables included */
    uint64_t ttl_ns;                /* 0 = no expiry */
    uint64_t tti_ns;                /* 0 = off */
    uint32_t max_entries;
    uint32_t max_value_bytes;
};

/* Everything derived from the configuration. Never read from the segment. */
struct lec_geometry {
    uint64_t mutexes, processes, flights, tags, words, shards;  /* offsets of the regions from the segment's start, bytes */
    uint64_t shard_stride;                                      /* bytes from one shard to the next */
    uint64_t buckets, nodes, sketch, generations, marks, samples, expiry, live, used, arena; /* offsets within a shard, bytes */
    uint32_t shard_count;           /* power of two */
    uint32_t process_count, flight_count, tag_count;
    uint32_t node_count;            /* entries of the largest shard; shard i may hold lec_shard_entries() of them */
    uint32_t full_shards;           /* the first so many shards hold node_count entries, the others one fewer */
    uint32_t bucket_count, sketch_lines;
    uint32_t generation_count;      /* power of two; of generations, and as many fences */
    uint32_t sample_count, mark_count; /* events of one shard's ring of samples, and marks in it; both may be 0 */
    uint32_t units;                 /* 64-byte units of one arena */
    uint32_t expiry_leaves;         /* groups of LEC_EXPIRY_FAN nodes */
    uint32_t expiry_words;          /* all levels of the tree */
    uint32_t expiry_levels;
};

/* The first page. The prefix up to `nonce` is written once before the magic and never again. */
struct lec_header {
    _Atomic uint64_t magic;
    uint32_t layout_version;
    uint32_t mutex_size;            /* sizeof(pthread_mutex_t): another libc or word size is another layout */
    struct lec_config config;
    uint64_t segment_bytes;
    uint8_t boot_id[16];            /* of the boot that the monotonic clock and the process identities belong to */
    uint64_t created_wall_ns;       /* CLOCK_REALTIME */
    uint64_t created_ns;            /* CLOCK_MONOTONIC */
    uint64_t seed[2];               /* of the key hash; random */
    uint64_t nonce;                 /* random: tells two segments of one name apart */
    uint8_t pad[LEC_LINE * 3 - 136];
    /* The line that every operation reads: bits 0..31 clear epoch, bits 32..63 retired (0 = live). */
    _Alignas(LEC_LINE) _Atomic uint64_t state;
};
_Static_assert(sizeof(struct lec_config) == 32, "lec_config is part of the layout");
_Static_assert(offsetof(struct lec_header, state) == LEC_LINE * 3, "state has a line of its own");

enum lec_reservation_state { LEC_RESERVATION_FREE = 0, LEC_RESERVATION_CLAIMED, LEC_RESERVATION_HELD, LEC_RESERVATION_ABANDONED };

/* Blocks taken for a large value that is being filled outside the lock. Guard: the lock of `shard`,
 * but HELD -> ABANDONED, which the owner stores when it cannot have that lock. */
struct lec_reservation {
    _Atomic uint32_t state;
    uint32_t shard;
    uint32_t unit;                  /* first unit of the chain; it and shard are valid while HELD or ABANDONED */
    uint32_t unused;
};

/* One attached process. `owner` is claimed by compare-and-swap; a dead owner's record is adopted, never zeroed,
 * so that sums over the records never fall. Counters are stored by their owner only (record 0: by anyone, atomically). */
struct lec_process {
    _Atomic uint64_t owner;         /* pid << 40 | start time (clock ticks since boot); 0 = nobody's */
    uint64_t pad0[7];
    _Atomic uint64_t stats[LEC_STAT_COUNT];
    struct lec_reservation reservations[LEC_RESERVATIONS];
    _Atomic uint64_t counters[LEC_COUNTERS];
    _Atomic uint64_t histograms[LEC_HISTOGRAMS][LEC_HISTOGRAM_BUCKETS];
};
_Static_assert(sizeof(struct lec_process) % LEC_LINE == 0, "no two processes share a line");
_Static_assert(sizeof(struct lec_process) == 64 + 128 + 128 + 768 + 1024, "lec_process is part of the layout");

/* A running computation, see flight.h. Guard for stores: the lock of the shard whose partition it lies in. Everything
 * but `owner` and `wake` is valid while owner != 0. */
struct lec_flight {
    _Atomic uint64_t owner;         /* as lec_process.owner; 0 = free; stored last, cleared first */
    _Atomic uint64_t fencing_token; /* of LEC_WORD_TOKEN: unique in the segment, never 0 */
    _Atomic uint64_t key_hash;
    _Atomic uint64_t deadline_ns;   /* CLOCK_MONOTONIC; passed, the flight is anybody's */
    _Atomic uint64_t progress;      /* only grows while the flight runs; the meaning is the owner's */
    _Atomic uint32_t wake;          /* futex word: moves after every change that a waiter waits for */
    uint32_t pad;
    uint64_t reserved[2];
};
_Static_assert(sizeof(struct lec_flight) == LEC_LINE, "a flight is one cache line");

#define LEC_EXPIRY_FAN 16u

/* What one shard's lock guards. Readers outside the lock take `epoch`, `entries` and `payload_bytes` for statistics only. */
struct lec_shard {
    _Atomic uint32_t epoch;         /* the header's clear epoch that this shard's contents belong to */
    _Atomic uint32_t entries;       /* published entries */
    _Atomic uint64_t payload_bytes; /* keys and values of the published entries */
    uint64_t generation;            /* recoveries; only grows */
    uint64_t next_version;          /* for gets/cas; only grows */
    uint32_t free_nodes;            /* head of the list of free nodes, linked by lec_node.next */
    uint32_t reserved_chains;       /* reservations (any state but FREE) that point into this shard */
    uint64_t reaped_ns;             /* when dead owners' reservations were last looked for */
    _Atomic uint32_t reap_wanted;   /* an owner abandoned a reservation */
    _Atomic uint32_t window_share;  /* the policy's, of LEC_SHARE_ONE, for statistics */
    _Atomic uint64_t stats[LEC_STAT_COUNT]; /* of enum lec_stat, what happens under the lock; no derived data: only grows */
    _Alignas(LEC_LINE) struct lec_samples samples;
    _Alignas(LEC_LINE) struct lec_space space;
    _Alignas(LEC_LINE) struct lec_policy policy;
};

/* Every entry begins with this, in its first unit; key and value follow. Written before publication, constant
 * afterwards but for expires_at (under the lock). Read optimistically: always through lec_load*(). */
struct lec_entry {
    uint64_t hash;
    uint64_t expires_at;            /* ns, CLOCK_MONOTONIC; UINT64_MAX = never */
    uint64_t version;               /* unique per shard: what gets() returns */
    uint32_t extent_units;          /* units of this first extent */
    uint32_t next;                  /* unit of the next extent, LEC_NONE = last */
    uint32_t value_bytes;
    uint32_t node;                  /* its lec_node */
    uint32_t epoch;                 /* the shard's epoch when published */
    uint32_t tti_ms;                /* 0 = off */
    uint16_t key_bytes;
    uint16_t pad16;
    uint32_t pad32;
};
_Static_assert(sizeof(struct lec_entry) == 56, "lec_entry is part of the layout");

/* The start of every further extent; payload follows. */
struct lec_extent {
    uint32_t extent_units;
    uint32_t next;                  /* LEC_NONE = last */
};
_Static_assert(sizeof(struct lec_extent) == 8, "lec_extent is part of the layout");

enum lec_status;

/* Derives the geometry. Returns false when memory_bytes cannot hold the tables and four of the largest values;
 * *minimum_bytes (may be NULL) is then what would do. */
bool lec_geometry_derive(const struct lec_config *config, struct lec_geometry *geometry, uint64_t *minimum_bytes);

/* Entries that shard `index` may hold: they sum up to max_entries exactly. */
static inline uint32_t lec_shard_entries(const struct lec_geometry *geometry, uint32_t index)
{
    return geometry->node_count - (index >= geometry->full_shards);
}

#endif
