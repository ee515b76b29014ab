/* What the kernel's test programs share: a segment to play in, keys and values that prove themselves, and REQUIRE. */
#ifndef LEC_TEST_SUPPORT_H
#define LEC_TEST_SUPPORT_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "kernel.h"

#define SECOND UINT64_C(1000000000)
#define MILLISECOND UINT64_C(1000000)
#define LOCK_TIMEOUT (2 * SECOND)   /* far above what any healthy holder takes, far below the watchdog */
#define LARGEST_KEY LEC_MAX_KEY

/* Ends the program at the first broken expectation; the context line says how to come back to it. */
#define REQUIRE(condition, ...) \
    do { if (!(condition)) fail_at(__FILE__, __LINE__, #condition, __VA_ARGS__); } while (0)
_Noreturn void fail_at(const char *file, int line, const char *condition, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
/* What the program is doing right now; printed when it fails. */
void context_set(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* ---- numbers ---- */
uint64_t mix64(uint64_t x);                     /* splitmix64's finaliser: a bijection that looks random */
struct random { uint64_t state; };
uint64_t random_next(struct random *random);
uint64_t random_below(struct random *random, uint64_t limit);
uint64_t wall_clock_ns(void);                   /* CLOCK_MONOTONIC, for measuring; the kernel is given world.now */
uint64_t setting(const char *name, uint64_t otherwise); /* a number from the environment */

/* ---- a segment with one attached process ---- */
struct world {
    uint8_t *base;
    uint64_t bytes;
    uint8_t *image;                             /* what world_restore() brings back; NULL until world_save() */
    struct lec_config config;
    struct lec_handle handle;
    uint64_t now;                               /* the injected clock, ns */
    uint32_t key_bytes_min, key_bytes_max;      /* lengths of the keys that key_make() makes */
};
extern const uint8_t test_boot_id[16];
/* memory_bytes 0: the smallest that holds the tables, plus spare_bytes. */
void world_create(struct world *world, const struct lec_config *config, uint64_t spare_bytes);
void world_destroy(struct world *world);
void world_save(struct world *world);
void world_restore(struct world *world);
/* After fork(), in the child. */
void world_enter_child(struct world *world);
/* A process that only exists, until it is killed or this one ends. Returns its pid. */
int sleeping_child(void);
/* Runs the kernel's own checker; every complaint goes to stderr. Returns how many there were. */
uint64_t world_check(struct world *world);
void world_totals(struct world *world, struct lec_totals *totals);
/* How often shards were rebuilt: after a death, or because an operation met damage. */
uint64_t world_rebuilds(const struct world *world);

/* ---- keys and values ---- */
/* Keys share all but their last four bytes: a compare that stops early takes one for another. Returns the length. */
uint32_t key_make(const struct world *world, uint8_t *key, uint32_t id);
/* A value is a function of key, sequence number and size; one of 8 bytes and more names its key and sequence in front. */
void value_fill(uint8_t *value, uint64_t bytes, uint32_t id, uint32_t sequence);
bool value_is(const uint8_t *value, uint64_t bytes, uint32_t id, uint32_t sequence);
/* True when all of the value belongs to one set of this key, whose sequence number is returned. Needs 8 bytes. */
bool value_sequence(const uint8_t *value, uint64_t bytes, uint32_t id, uint32_t *sequence);

/* ---- operations by key number ---- */
struct buffer { uint8_t *data; uint64_t capacity, bytes; };
void *buffer_take(void *context, uint64_t bytes);   /* a lec_buffer_fn */
enum lec_status get_id(struct world *world, uint32_t id, struct buffer *buffer, struct lec_read *read);
enum lec_status set_id(struct world *world, uint32_t id, uint32_t sequence, uint64_t bytes);
enum lec_status store_id(struct world *world, uint32_t id, uint32_t sequence, uint64_t bytes, enum lec_mode mode,
                         uint64_t expected, uint64_t ttl_ns);
enum lec_status delete_id(struct world *world, uint32_t id);

#endif
