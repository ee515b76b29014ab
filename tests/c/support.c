/* See support.h. */
#include "support.h"

#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

const uint8_t test_boot_id[16] = {0x5a, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0xa5};

static char context_line[256] = "start";

void context_set(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(context_line, sizeof context_line, format, arguments);
    va_end(arguments);
}

void fail_at(const char *file, int line, const char *condition, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fflush(stdout);
    fprintf(stderr, "FAILED %s:%d: %s\n  while: %s\n  ", file, line, condition, context_line);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    fflush(stderr);
    _exit(1);
}

/* ---- numbers ---- */

uint64_t mix64(uint64_t x)
{
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

uint64_t random_next(struct random *random)
{
    return mix64(random->state++);
}

uint64_t random_below(struct random *random, uint64_t limit)
{
    return random_next(random) % limit;
}

uint64_t wall_clock_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * SECOND + (uint64_t)time.tv_nsec;
}

uint64_t setting(const char *name, uint64_t otherwise)
{
    const char *text = getenv(name);
    return text && *text ? strtoull(text, NULL, 0) : otherwise;
}

/* ---- the segment ---- */

static uint64_t smallest_memory(const struct lec_config *config)
{
    struct lec_config tried = *config;
    struct lec_geometry geometry;
    uint64_t minimum = 0;
    tried.memory_bytes = LEC_PAGE;
    REQUIRE(!lec_geometry_derive(&tried, &geometry, &minimum), "one page cannot be enough");
    return minimum;
}

void world_create(struct world *world, const struct lec_config *config, uint64_t spare_bytes)
{
    static const uint64_t random[3] = {0x0123456789abcdef, 0xfedcba9876543210, 0x1122334455667788};
    memset(world, 0, sizeof *world);
    world->config = *config;
    if (!config->memory_bytes) world->config.memory_bytes = smallest_memory(config) + spare_bytes;
    world->config.memory_bytes = (world->config.memory_bytes + LEC_PAGE - 1) / LEC_PAGE * LEC_PAGE;
    world->bytes = world->config.memory_bytes;
    world->now = 1000 * SECOND;
    world->key_bytes_min = world->key_bytes_max = 64;
    world->base = mmap(NULL, world->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(world->base != MAP_FAILED, "mmap of %llu bytes", (unsigned long long)world->bytes);
    enum lec_status status = lec_create(world->base, world->bytes, &world->config, test_boot_id, world->now, 1, random);
    REQUIRE(status == LEC_OK, "lec_create of %llu bytes says %d", (unsigned long long)world->bytes, (int)status);
    status = lec_attach(&world->handle, world->base, world->bytes, test_boot_id, lec_process_identity(getpid()), false);
    REQUIRE(status == LEC_OK, "lec_attach says %d", (int)status);
}

void world_destroy(struct world *world)
{
    munmap(world->base, world->bytes);
    free(world->image);
    memset(world, 0, sizeof *world);
}

void world_save(struct world *world)
{
    if (!world->image) world->image = malloc(world->bytes);
    REQUIRE(world->image, "no memory");
    memcpy(world->image, world->base, world->bytes);
}

void world_restore(struct world *world)
{
    memcpy(world->base, world->image, world->bytes);
}

void world_enter_child(struct world *world)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);           /* a stopped child must not outlive a failing test */
    lec_reidentify(&world->handle, lec_process_identity(getpid()));
}

int sleeping_child(void)
{
    pid_t parent = getpid(), child = fork();
    REQUIRE(child >= 0, "fork");
    if (child != 0) return child;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    while (getppid() == parent) sleep(1);       /* it may have ended before prctl() */
    _exit(0);
}

static void report_to_stderr(void *context, const char *message, uint64_t shard, uint64_t detail)
{
    (void)context;
    fprintf(stderr, "  check: shard %llu: %s (%llu)\n", (unsigned long long)shard, message, (unsigned long long)detail);
}

uint64_t world_check(struct world *world)
{
    return lec_check(&world->handle, world->now, LOCK_TIMEOUT, report_to_stderr, NULL);
}

void world_totals(struct world *world, struct lec_totals *totals)
{
    lec_totals(&world->handle, totals);
}

uint64_t world_rebuilds(const struct world *world)
{
    uint64_t rebuilds = 0;
    for (uint32_t shard = 0; shard < world->handle.geometry.shard_count; shard++) {
        const uint8_t *at = world->base + world->handle.geometry.shards + world->handle.geometry.shard_stride * shard;
        rebuilds += ((const struct lec_shard *)(const void *)at)->generation;
    }
    return rebuilds;
}

/* ---- keys and values ---- */

uint32_t key_make(const struct world *world, uint8_t *key, uint32_t id)
{
    uint32_t range = world->key_bytes_max - world->key_bytes_min + 1;
    uint32_t bytes = world->key_bytes_min + (uint32_t)(mix64(id) % range);
    REQUIRE(bytes >= sizeof id && bytes <= LARGEST_KEY, "key of %u bytes", bytes);
    memset(key, 'k', bytes);
    memcpy(key + bytes - sizeof id, &id, sizeof id);
    return bytes;
}

static uint64_t value_word(uint64_t bytes, uint32_t id, uint32_t sequence, uint64_t index)
{
    uint64_t name = (uint64_t)sequence << 32 | id;
    return index == 0 ? name : mix64(mix64(name ^ bytes << 20) + index);
}

void value_fill(uint8_t *value, uint64_t bytes, uint32_t id, uint32_t sequence)
{
    for (uint64_t offset = 0; offset < bytes; offset += 8) {
        uint64_t word = value_word(bytes, id, sequence, offset / 8);
        memcpy(value + offset, &word, bytes - offset < 8 ? bytes - offset : 8);
    }
}

bool value_is(const uint8_t *value, uint64_t bytes, uint32_t id, uint32_t sequence)
{
    for (uint64_t offset = 0; offset < bytes; offset += 8) {
        uint64_t word = value_word(bytes, id, sequence, offset / 8);
        if (memcmp(value + offset, &word, bytes - offset < 8 ? bytes - offset : 8)) return false;
    }
    return true;
}

bool value_sequence(const uint8_t *value, uint64_t bytes, uint32_t id, uint32_t *sequence)
{
    uint64_t name;
    if (bytes < sizeof name) return false;
    memcpy(&name, value, sizeof name);
    *sequence = (uint32_t)(name >> 32);
    return (uint32_t)name == id && value_is(value, bytes, id, *sequence);
}

/* ---- operations ---- */

void *buffer_take(void *context, uint64_t bytes)
{
    struct buffer *buffer = context;
    if (bytes + 1 > buffer->capacity) {         /* never a NULL buffer for a value of no bytes */
        free(buffer->data);
        buffer->capacity = bytes + 1;
        buffer->data = malloc(buffer->capacity);
        REQUIRE(buffer->data, "asked for a buffer of %llu bytes", (unsigned long long)bytes);
    }
    buffer->bytes = bytes;
    return buffer->data;
}

enum lec_status get_id(struct world *world, uint32_t id, struct buffer *buffer, struct lec_read *read)
{
    uint8_t key[LARGEST_KEY];
    uint32_t key_bytes = key_make(world, key, id);
    struct lec_read ignored = {0};
    struct lec_read *result = read ? read : &ignored;
    lec_buffer_fn take = buffer ? buffer_take : NULL;
    if (id % 2 == 0) return lec_get(&world->handle, key, key_bytes, world->now, take, buffer, result);
    uint64_t hash = lec_hint_home(&world->handle, key, key_bytes);  /* as one of many keys */
    lec_hint_entry(&world->handle, hash);
    return lec_get_hashed(&world->handle, hash, key, key_bytes, world->now, take, buffer, result);
}

enum lec_status store_id(struct world *world, uint32_t id, uint32_t sequence, uint64_t bytes, enum lec_mode mode,
                         uint64_t expected, uint64_t ttl_ns)
{
    uint8_t key[LARGEST_KEY];
    uint8_t *value = malloc(bytes + 1);
    REQUIRE(value, "no memory");
    value_fill(value, bytes, id, sequence);
    struct lec_store store = {
        .key = key, .value = value, .value_bytes = bytes, .key_bytes = key_make(world, key, id),
        .mode = mode, .expected = expected, .ttl_ns = ttl_ns, .tti_ns = world->config.tti_ns,
    };
    enum lec_status status = lec_store(&world->handle, &store, world->now, LOCK_TIMEOUT);
    free(value);
    return status;
}

enum lec_status set_id(struct world *world, uint32_t id, uint32_t sequence, uint64_t bytes)
{
    return store_id(world, id, sequence, bytes, LEC_SET, 0, world->config.ttl_ns);
}

enum lec_status delete_id(struct world *world, uint32_t id)
{
    uint8_t key[LARGEST_KEY];
    uint32_t key_bytes = key_make(world, key, id);
    return lec_delete(&world->handle, key, key_bytes, 0, world->now, LOCK_TIMEOUT);
}
