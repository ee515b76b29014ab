/* The life of a segment: its geometry, its creation, attaching to it, retiring it. */
#include <string.h>
#include <time.h>

#include "chain.h"
#include "expiry.h"
#include "flight.h"
#include "process.h"
#include "reserve.h"
#include "shard.h"

#define ENTRIES_PER_SHARD 16384u    /* shards are halved down to this: small enough to be rebuilt in milliseconds */
#define VALUES_PER_SHARD 4u         /* of the largest size, that a shard must have room for */
#define SLOT_LOAD_PERCENT 62u       /* of the index's slots in use when a shard is full: beyond, full homes get frequent */
#define SAMPLES_DIVISOR 100u        /* that part of the memory, at most, for the rings of samples */
#define MIB (UINT64_C(1) << 20)

/* How many of what a segment of this size gets for the processes and the manager. */
struct scale { uint64_t from_bytes; uint32_t processes, flights, tags; };
static const struct scale scales[] = {{1024 * MIB, 1024, 16384, 65536}, {64 * MIB, 256, 4096, 4096}, {4 * MIB, 64, 512, 1024}, {0, 16, 32, 256}};

static uint64_t round_up(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }

static uint32_t power_of_two_below(uint64_t value)
{
    return value <= 1 ? 1 : UINT32_C(1) << (63 - __builtin_clzll(value > UINT32_C(1) << 31 ? UINT32_C(1) << 31 : value));
}

static void lay_out_fixed(const struct lec_config *config, struct lec_geometry *geometry)
{
    const struct scale *scale = scales;
    while (config->memory_bytes < scale->from_bytes) scale++;
    geometry->process_count = scale->processes;
    /* Both are powers of two: each shard has its own partition, of whole sets. */
    uint32_t least = LEC_FLIGHT_SET * geometry->shard_count;
    geometry->flight_count = scale->flights > least ? scale->flights : least;
    geometry->tag_count = scale->tags;
    geometry->mutexes = LEC_PAGE;
    geometry->processes = geometry->mutexes + round_up((uint64_t)LEC_MUTEX_STRIDE * geometry->shard_count, LEC_PAGE);
    geometry->flights = geometry->processes + sizeof(struct lec_process) * geometry->process_count;
    geometry->tags = geometry->flights + sizeof(struct lec_flight) * geometry->flight_count;
    geometry->words = geometry->tags + sizeof(uint64_t) * geometry->tag_count;
    geometry->shards = round_up(geometry->words + sizeof(uint64_t) * LEC_WORDS, LEC_PAGE);
}

/* Everything of a shard but its bitmap and arena; returns where those begin. */
static uint64_t lay_out_tables(const struct lec_config *config, struct lec_geometry *geometry)
{
    uint32_t nodes = (config->max_entries + geometry->shard_count - 1) / geometry->shard_count;
    geometry->node_count = nodes;
    geometry->full_shards = config->max_entries - (nodes - 1) * geometry->shard_count;
    geometry->bucket_count = (uint32_t)((uint64_t)nodes * 100 / (LEC_SLOTS_PER_BUCKET * SLOT_LOAD_PERCENT)) + 2;
    geometry->sketch_lines = lec_policy_sketch_lines(nodes);
    geometry->generation_count = power_of_two_below((uint64_t)nodes * 2);
    geometry->expiry_words = lec_expiry_words(nodes, &geometry->expiry_leaves, &geometry->expiry_levels);
    geometry->sample_count = lec_samples_for(config->memory_bytes / SAMPLES_DIVISOR / geometry->shard_count);
    geometry->mark_count = lec_sample_marks_for(geometry->sample_count);
    geometry->buckets = round_up(sizeof(struct lec_shard), LEC_LINE);
    geometry->nodes = geometry->buckets + sizeof(struct lec_bucket) * (uint64_t)geometry->bucket_count;
    geometry->sketch = round_up(geometry->nodes + sizeof(struct lec_node) * (uint64_t)nodes, LEC_LINE);
    geometry->generations = geometry->sketch + (uint64_t)LEC_LINE * geometry->sketch_lines;
    geometry->marks = round_up(geometry->generations + 2 * sizeof(uint32_t) * (uint64_t)geometry->generation_count, LEC_LINE);
    geometry->samples = geometry->marks + sizeof(struct lec_sample_mark) * (uint64_t)geometry->mark_count;
    geometry->expiry = round_up(geometry->samples + sizeof(uint64_t) * (uint64_t)geometry->sample_count, LEC_LINE);
    geometry->live = geometry->expiry + sizeof(uint64_t) * (uint64_t)geometry->expiry_words;
    geometry->used = geometry->live + 2 * sizeof(uint64_t) * (((uint64_t)nodes + 63) / 64);
    return geometry->used;
}

/* Bitmap and arena share what is left of a shard. */
static void lay_out_arena(struct lec_geometry *geometry)
{
    uint64_t left = geometry->shard_stride > geometry->used + 2 * LEC_LINE ? geometry->shard_stride - geometry->used - 2 * LEC_LINE : 0;
    uint64_t units = left * 8 / (LEC_UNIT * 8 + 1);
    if (units > (UINT32_C(1) << 30) - 1) units = (UINT32_C(1) << 30) - 1;
    geometry->units = (uint32_t)units;
    geometry->arena = round_up(geometry->used + (units + 63) / 64 * sizeof(uint64_t), LEC_LINE);
}

static uint64_t units_wanted(const struct lec_config *config)
{
    return VALUES_PER_SHARD * lec_chain_units((uint64_t)LEC_MAX_KEY + config->max_value_bytes);
}

static bool lay_out(const struct lec_config *config, struct lec_geometry *geometry)
{
    lay_out_fixed(config, geometry);
    lay_out_tables(config, geometry);
    if (config->memory_bytes <= geometry->shards) return false;
    geometry->shard_stride = (config->memory_bytes - geometry->shards) / geometry->shard_count / LEC_LINE * LEC_LINE;
    lay_out_arena(geometry);
    return geometry->units >= units_wanted(config) && geometry->arena + (uint64_t)geometry->units * LEC_UNIT <= geometry->shard_stride;
}

/* The least that would do. More memory may mean more processes and flights (scales[]), hence more memory. */
static uint64_t minimum_of(struct lec_config config, struct lec_geometry *geometry)
{
    for (;;) {
        lay_out_fixed(&config, geometry);
        uint64_t needed = round_up(geometry->shards + lay_out_tables(&config, geometry) + units_wanted(&config) * (LEC_UNIT + 1) + 4 * LEC_LINE, LEC_PAGE);
        if (needed <= config.memory_bytes) return needed;
        config.memory_bytes = needed;
    }
}

bool lec_geometry_derive(const struct lec_config *config, struct lec_geometry *geometry, uint64_t *minimum_bytes)
{
    memset(geometry, 0, sizeof *geometry);
    geometry->shard_count = power_of_two_below(config->max_entries / ENTRIES_PER_SHARD);
    if (geometry->shard_count > LEC_MAX_SHARDS) geometry->shard_count = LEC_MAX_SHARDS;
    if (minimum_bytes) *minimum_bytes = 0;
    if (config->max_entries == 0 || config->max_entries > UINT32_MAX / 16) return false;
    for (; geometry->shard_count > 0; geometry->shard_count /= 2)
        if (lay_out(config, geometry)) return true;
    geometry->shard_count = 1;
    if (minimum_bytes) *minimum_bytes = minimum_of(*config, geometry);
    return false;
}

/* ---- create, probe, attach ---- */

static void handle_map(struct lec_handle *handle, void *base, uint64_t bytes, const struct lec_config *config)
{
    handle->base = base;
    handle->bytes = bytes;
    handle->header = base;
    handle->config = *config;
}

enum lec_status lec_create(void *base, uint64_t bytes, const struct lec_config *config, const uint8_t boot_id[16],
                           uint64_t now_ns, uint64_t wall_ns, const uint64_t random[3])
{
    struct lec_handle handle = {0};
    handle_map(&handle, base, bytes, config);
    if (config->memory_bytes > bytes || !lec_geometry_derive(config, &handle.geometry, NULL)) return LEC_FOREIGN;
    struct lec_header *header = handle.header;
    header->layout_version = LEC_LAYOUT_VERSION;
    header->mutex_size = sizeof(pthread_mutex_t);
    header->config = *config;
    header->segment_bytes = bytes;
    memcpy(header->boot_id, boot_id, 16);
    header->created_wall_ns = wall_ns;
    header->created_ns = now_ns;
    memcpy(header->seed, random, sizeof header->seed);
    header->nonce = random[2];
    memcpy(handle.seed, random, sizeof handle.seed);
    /* Tokens of another segment under the same name do not fit this one's flights. */
    atomic_store_explicit(lec_word(&handle, LEC_WORD_TOKEN), (random[2] >> 2) + 1, memory_order_relaxed);
    handle.process = lec_process_at(&handle, 0);
    for (uint32_t index = 0; index < handle.geometry.shard_count; index++) lec_shard_create(&handle, index, random + 1);
    atomic_store_explicit(&header->magic, LEC_MAGIC, memory_order_release);
    return LEC_OK;
}

/* Attachers see all of a segment or no segment: the magic is stored last, and whatever it promises is checked again. */
enum lec_status lec_probe(const void *base, uint64_t bytes, const uint8_t boot_id[16], struct lec_config *config)
{
    const struct lec_header *header = base;
    struct lec_geometry geometry;
    if (bytes < LEC_PAGE || atomic_load_explicit(&header->magic, memory_order_acquire) != LEC_MAGIC) return LEC_FOREIGN;
    if (header->layout_version != LEC_LAYOUT_VERSION || header->mutex_size != sizeof(pthread_mutex_t)) return LEC_FOREIGN;
    if (memcmp(header->boot_id, boot_id, 16) != 0 || header->segment_bytes != bytes) return LEC_FOREIGN;
    *config = header->config;
    if (config->memory_bytes > bytes || !lec_geometry_derive(config, &geometry, NULL)) return LEC_FOREIGN;
    return atomic_load_explicit(&header->state, memory_order_acquire) >> 32 != 0 ? LEC_RETIRED : LEC_OK;
}

enum lec_status lec_attach(struct lec_handle *handle, void *base, uint64_t bytes, const uint8_t boot_id[16],
                           uint64_t identity, bool concurrent)
{
    struct lec_config config;
    enum lec_status status = lec_probe(base, bytes, boot_id, &config);
    if (status != LEC_OK) return status;
    handle_map(handle, base, bytes, &config);
    if (!lec_geometry_derive(&config, &handle->geometry, NULL)) return LEC_FOREIGN;
    memcpy(handle->seed, handle->header->seed, sizeof handle->seed);
    lec_reidentify(handle, identity);
    handle->concurrent |= concurrent;
    return LEC_OK;
}

void lec_reidentify(struct lec_handle *handle, uint64_t identity)
{
    handle->identity = identity;
    lec_process_claim(handle);
}

void lec_detach(struct lec_handle *handle)
{
    uint64_t owner = handle->identity;
    if (handle->process && handle->process != lec_process_at(handle, 0)) atomic_compare_exchange_strong(&handle->process->owner, &owner, 0);
    handle->process = NULL;
}

void lec_retire(struct lec_handle *handle, uint32_t reason)
{
    uint64_t state = atomic_load_explicit(&handle->header->state, memory_order_relaxed);
    while (state >> 32 == 0 && !atomic_compare_exchange_weak(&handle->header->state, &state, state | (uint64_t)reason << 32)) {}
}

/* ---- the dead ---- */

static void reap_process(struct lec_handle *handle, struct lec_process *process, uint64_t now_ns, uint64_t timeout_ns)
{
    for (uint32_t at = 0; at < LEC_RESERVATIONS; at++) {
        struct lec_reservation *reservation = &process->reservations[at];
        uint32_t shard = __atomic_load_n(&reservation->shard, __ATOMIC_RELAXED);
        if (atomic_load_explicit(&reservation->state, memory_order_acquire) < LEC_RESERVATION_HELD || shard >= handle->geometry.shard_count) continue;
        struct lec_shard_view view;
        lec_shard_view(handle, shard, now_ns, &view);
        if (lec_shard_lock(&view, timeout_ns) != LEC_OK) continue;
        lec_reservations_reap_locked(&view, true);
        lec_shard_unlock(&view);
    }
}

/* A shard whose owner died is rebuilt by whoever takes its lock next: that may as well be now. */
static void recover_abandoned(struct lec_handle *handle, uint64_t now_ns)
{
    for (uint32_t index = 0; index < handle->geometry.shard_count; index++) {
        struct lec_shard_view view;
        lec_shard_view(handle, index, now_ns, &view);
        if (lec_shard_lock(&view, 0) == LEC_OK) lec_shard_unlock(&view);
    }
}

void lec_reap(struct lec_handle *handle, uint64_t now_ns, uint64_t timeout_ns)
{
    for (uint32_t index = 1; index < handle->geometry.process_count; index++) {
        struct lec_process *process = lec_process_at(handle, index);
        uint64_t owner = atomic_load_explicit(&process->owner, memory_order_relaxed);
        if (owner != 0 && !lec_identity_is_alive(owner)) reap_process(handle, process, now_ns, timeout_ns);
    }
    lec_flights_reap(handle, now_ns, timeout_ns);
    recover_abandoned(handle, now_ns);
}
