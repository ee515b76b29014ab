/* Arbitrary bytes in the segment: a libFuzzer program (clang -fsanitize=fuzzer,address,undefined).
 *
 * An input is a list of steps on a small valid segment: scribbles (raw, or aimed at one field of one record) and
 * calls of the kernel. The segment is allocated to the byte, every buffer too, so that AddressSanitizer sees any access
 * beyond; libFuzzer's -timeout sees endless loops. Only the mutexes' own bytes are spared.
 *
 * Beyond "no crash, no hang": what get() copies never exceeds the largest value; one lec_check() repairs whatever it
 * finds in the shards, so that a second one finds them sound; and then a value set is the value got, and a flight that is
 * led goes on until its end and no longer.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernel.h"
#include "miniature.h"

#define MAX_STEPS 48u
#define KEYS 24u
#define NOW UINT64_C(5000000000)

static const uint8_t boot_id[16] = "fuzz";
static const struct lec_config config = {.max_entries = 44, .max_value_bytes = 2000, .tti_ns = 2000000000, .memory_bytes = 100 * 1024};

/* ---- the segment ---- */

static struct {
    uint8_t *base, *pristine;
    struct lec_handle attached;     /* as after the first attach */
    struct lec_handle handle;       /* the one in use */
    uint64_t identity, now;
    uint32_t aimed;                 /* the key whose entry was scribbled on last */
} world;

#define expect(condition) do { if (!(condition)) { fprintf(stderr, "line %d: %s\n", __LINE__, #condition); abort(); } } while (0)

static uint32_t make_key(uint8_t *key, uint32_t id)
{
    uint32_t bytes = 5 + id % 7 * 20;
    memset(key, (int)('a' + id % 26), bytes);
    memcpy(key, &id, sizeof id);
    return bytes;
}

static enum lec_status store(uint32_t id, uint64_t bytes, enum lec_mode mode, uint64_t expected, uint64_t ttl_ns)
{
    uint8_t key[256];
    uint32_t key_bytes = make_key(key, id);
    uint8_t *exact_key = malloc(key_bytes), *value = malloc(bytes ? bytes : 1);
    memcpy(exact_key, key, key_bytes);
    memset(value, (int)(id + 1), bytes);
    struct lec_store what = {.key = exact_key, .value = value, .value_bytes = bytes, .key_bytes = key_bytes, .mode = mode,
                             .expected = expected, .ttl_ns = ttl_ns, .tti_ns = id % 3 ? 0 : config.tti_ns};
    enum lec_status status = lec_store(&world.handle, &what, world.now, 1000000000);
    free(exact_key);
    free(value);
    return status;
}

static void create_world(void)
{
    static const uint64_t random[3] = {11, 22, 33};
    world.now = NOW;
    world.identity = lec_process_identity(getpid());
    expect(posix_memalign((void **)&world.base, LEC_PAGE, config.memory_bytes) == 0);
    memset(world.base, 0, config.memory_bytes);
    expect(lec_create(world.base, config.memory_bytes, &config, boot_id, NOW, NOW, random) == LEC_OK);
    expect(lec_attach(&world.handle, world.base, config.memory_bytes, boot_id, world.identity, false) == LEC_OK);
    /* Small entries, every second of them taken away again: what is stored then lies in pieces. */
    for (uint32_t id = 100; id < 140; id++) (void)store(id, 80, LEC_SET, 0, 0);
    for (uint32_t id = 100; id < 140; id += 2) {
        uint8_t key[256];
        uint32_t key_bytes = make_key(key, id);
        (void)lec_delete(&world.handle, key, key_bytes, 0, NOW, 0);
    }
    for (uint32_t id = 0; id < KEYS; id++) (void)store(id, 800 - id * 22, LEC_SET, 0, id % 4 ? 0 : 4000000000);
    world.attached = world.handle;
    world.pristine = malloc(config.memory_bytes);
    memcpy(world.pristine, world.base, config.memory_bytes);
}

/* ---- the input ---- */

struct input { const uint8_t *data; size_t left; };

static uint64_t take(struct input *input, size_t bytes)
{
    uint64_t value = 0;
    if (bytes > input->left) bytes = input->left;
    memcpy(&value, input->data, bytes);
    input->data += bytes;
    input->left -= bytes;
    return value;
}

/* ---- scribbles ---- */

/* The mutexes are spared: what was written over them is put back. */
static void spare_mutexes(const struct lec_geometry *geometry)
{
    memcpy(world.base + geometry->mutexes, world.pristine + geometry->mutexes, geometry->processes - geometry->mutexes);
}

static void scribble(uint64_t offset, const void *bytes, uint64_t count)
{
    if (offset >= config.memory_bytes) return;
    if (count > config.memory_bytes - offset) count = config.memory_bytes - offset;
    memcpy(world.base + offset, bytes, count);
    spare_mutexes(&world.attached.geometry);
}

static void scribble_raw(struct input *input)
{
    uint64_t offset = take(input, 3) % config.memory_bytes, count = take(input, 1);
    if (count > input->left) count = input->left;
    scribble(offset, input->data, count);
    input->data += count;
    input->left -= count;
}

/* Where the entry begins that the index-th slot in use (and onwards) points to; the arena's start if there is none. */
static uint64_t entry_of(uint64_t shard, uint64_t index)
{
    const struct lec_geometry *geometry = &world.handle.geometry;
    const struct lec_bucket *buckets = (const struct lec_bucket *)(const void *)(world.base + shard + geometry->buckets);
    uint64_t slots = (uint64_t)geometry->bucket_count * LEC_SLOTS_PER_BUCKET;
    for (uint64_t at = index; at < index + slots; at++) {
        uint64_t word = buckets[at % slots / LEC_SLOTS_PER_BUCKET].slots[at % LEC_SLOTS_PER_BUCKET];
        if (word == 0 || (uint32_t)word - 1 >= geometry->units) continue;
        uint64_t entry = shard + geometry->arena + ((uint32_t)word - 1) * (uint64_t)LEC_UNIT;
        memcpy(&world.aimed, world.base + entry + sizeof(struct lec_entry), sizeof world.aimed);
        return entry;
    }
    return shard + geometry->arena;
}

/* Where the records of each kind begin, and how far apart they lie. */
static void region_of(uint64_t kind, uint64_t index, uint64_t *offset, uint64_t *stride, uint64_t *count)
{
    const struct lec_geometry *geometry = &world.handle.geometry;
    uint64_t shard = geometry->shards + geometry->shard_stride * (kind >> 4 & (geometry->shard_count - 1));
    struct { uint64_t offset, stride, count; } regions[] = {
        {0, sizeof(struct lec_header), 1},
        {geometry->processes, sizeof(struct lec_process), geometry->process_count},
        {geometry->flights, sizeof(struct lec_flight), geometry->flight_count},
        {shard, 256, sizeof(struct lec_shard) / 256 + 1},
        {shard + offsetof(struct lec_shard, space), sizeof(struct lec_bin), LEC_SPACE_BINS + 4},
        {shard + offsetof(struct lec_shard, policy), sizeof(struct lec_policy), 1},
        {shard + geometry->buckets, sizeof(struct lec_bucket), geometry->bucket_count},
        {entry_of(shard, index), sizeof(struct lec_entry), 1},
        {shard + geometry->nodes, sizeof(struct lec_node), geometry->node_count},
        {shard + geometry->sketch, 64, geometry->sketch_lines},
        {shard + geometry->generations, 4, geometry->generation_count},
        {shard + geometry->expiry, 8, geometry->expiry_words},
        {shard + geometry->live, 8, 2},
        {shard + geometry->used, 8, geometry->units / 64 + 1},
        {shard + geometry->marks, sizeof(struct lec_sample_mark), geometry->mark_count ? geometry->mark_count : 1},
        {shard + geometry->arena, LEC_UNIT, geometry->units},
    };
    *offset = regions[kind % 16].offset;
    *stride = regions[kind % 16].stride;
    *count = regions[kind % 16].count;
}

/* One word of one record becomes something likely to matter. */
static void scribble_field(struct input *input)
{
    uint64_t offset, stride, count, kind = take(input, 1), index = take(input, 2), field = take(input, 1), how = take(input, 1);
    region_of(kind, index, &offset, &stride, &count);
    offset += index % count * stride + field * 4 % stride;
    if (offset + 8 > config.memory_bytes) return;
    uint64_t word, other;
    memcpy(&word, world.base + offset, 8);
    memcpy(&other, world.base + (offset + stride + 8 <= config.memory_bytes ? offset + stride : offset), 8);
    switch (how % 11) {
    case 0: word = take(input, 8); break;
    case 1: word = take(input, 1); break;
    case 2: word ^= UINT64_C(1) << (how >> 2); break;
    case 3: word = UINT64_MAX; break;
    case 4: word = 0; break;
    case 5: word = other; break;
    case 6: word += take(input, 1); break;
    case 7: word -= take(input, 1); break;
    case 8: word = world.identity; break;
    case 9: word = (word & UINT64_C(0xffffffff00000000)) | (world.handle.geometry.units - 1 - take(input, 1) % 4); break;
    default: word = (word & UINT64_C(0xffffffff00000000)) | (uint32_t)take(input, 2); break;
    }
    scribble(offset, &word, how & 128 ? 4 : 8);
}

/* ---- calls ---- */

struct copy { uint8_t *data; uint64_t bytes; };

static void *give_buffer(void *context, uint64_t bytes)
{
    struct copy *copy = context;
    expect(bytes <= world.handle.config.max_value_bytes);
    free(copy->data);
    copy->data = malloc(bytes ? bytes : 1);
    copy->bytes = bytes;
    return copy->data;
}

static enum lec_status get(uint32_t id, bool copies, struct copy *copy, struct lec_read *read)
{
    uint8_t key[256];
    uint32_t key_bytes = make_key(key, id);
    uint8_t *exact_key = malloc(key_bytes);
    memcpy(exact_key, key, key_bytes);
    read->wants_token = true;
    lec_buffer_fn give = copies ? give_buffer : NULL;
    enum lec_status status;
    if (id % 2 == 0) {
        status = lec_get(&world.handle, exact_key, key_bytes, world.now, give, copy, read);
    } else {    /* as one of many keys */
        uint64_t hash = lec_hint_home(&world.handle, exact_key, key_bytes);
        lec_hint_entry(&world.handle, hash);
        status = lec_get_hashed(&world.handle, hash, exact_key, key_bytes, world.now, give, copy, read);
    }
    free(exact_key);
    return status;
}

static void visit(void *context, const struct lec_info *info)
{
    expect(info->key_bytes <= LEC_MAX_KEY);
    memcpy(context, info->key, info->key_bytes);
}

static void scan_all(struct input *input)
{
    uint8_t seen[LEC_MAX_KEY];
    uint64_t cursor = take(input, 1) == 255 ? take(input, 8) : 0;
    for (uint32_t round = 0; round < 1000 && cursor != UINT64_MAX; round++)
        if (lec_scan(&world.handle, &cursor, 8, world.now, visit, seen) != LEC_OK) break;
}

static uint64_t complaints;
static const char *complaint = "none";
static void complain(void *context, const char *message, uint64_t shard, uint64_t detail)
{
    (void)context, (void)detail;
    if (shard == UINT64_MAX) return;        /* what belongs to no shard is not repaired */
    complaints++;
    complaint = message;
}

static void check(void) { (void)lec_check(&world.handle, world.now, 1000000000, complain, NULL); }

/* Another process attaches to what is there; from then on its geometry counts. The mutexes it derives are not ours to
 * have scribbled on. */
static void attach(void)
{
    struct lec_handle handle;
    struct lec_config seen;
    memset(&handle, 0, sizeof handle);
    (void)lec_probe(world.base, config.memory_bytes, boot_id, &seen);
    if (lec_attach(&handle, world.base, config.memory_bytes, boot_id, world.identity, false) != LEC_OK) return;
    const struct lec_geometry *geometry = &handle.geometry;
    const uint8_t *mutex = world.pristine + world.attached.geometry.mutexes;
    for (uint32_t shard = 0; shard < geometry->shard_count; shard++)
        memcpy(world.base + geometry->mutexes + LEC_MUTEX_STRIDE * shard, mutex, LEC_MUTEX_STRIDE);
    world.handle = handle;
}

/* What is read of the ring fits into exactly its buffers, and any events can be replayed. */
static void replay_samples(uint32_t shard)
{
    const struct lec_geometry *geometry = &world.handle.geometry;
    struct lec_samples_copy copy = {.events = malloc(geometry->sample_count * 8 + 1), .marks = malloc(geometry->mark_count * sizeof *copy.marks + 1)};
    struct lec_miniature miniature;
    void *memory = aligned_alloc(LEC_LINE, lec_miniature_bytes(9));
    lec_miniature_create(&miniature, memory, (struct lec_miniature_size){9, 60}, shard, shard);
    if (!lec_samples_of(&world.handle, shard % 4, &copy)) copy.event_count = copy.mark_count = 0;
    expect(copy.event_count <= geometry->sample_count && copy.mark_count <= geometry->mark_count);
    for (uint32_t at = 0; at < copy.event_count; at++) (void)lec_miniature_replay(&miniature, copy.events[at], world.now + at);
    expect(miniature.entries <= 9 && miniature.units <= 60);
    free(copy.events);
    free(copy.marks);
    free(memory);
}

static void read_regions(struct input *input)
{
    struct lec_totals totals;
    uint64_t index = take(input, 4);
    lec_totals(&world.handle, &totals);
    replay_samples((uint32_t)index);
    uint64_t counters[LEC_COUNTERS], histograms[LEC_HISTOGRAMS][LEC_HISTOGRAM_BUCKETS];
    (void)lec_count(&world.handle, (uint32_t)index % 128, index);
    (void)lec_observe(&world.handle, (uint32_t)index % 8, index);
    lec_counter_sums(&world.handle, counters);
    lec_histogram_sums(&world.handle, histograms);
    if (lec_word(&world.handle, (uint32_t)index % 80)) atomic_fetch_add(lec_word(&world.handle, (uint32_t)index % 80), index);
    atomic_fetch_add(lec_tag(&world.handle, index), 1);
    if (lec_flight_at(&world.handle, (uint32_t)index)) atomic_store(&lec_flight_at(&world.handle, (uint32_t)index)->owner, index);
}

/* One call of a leader or a waiter, with the ticket of a join or one from nowhere. */
static void fly(struct input *input, const uint8_t *key, uint32_t key_bytes)
{
    uint64_t how = take(input, 1), number = take(input, 2);
    struct lec_ticket ticket = {number, (uint32_t)take(input, 2)};
    enum lec_role role = LEC_FLIGHT_NONE;
    if (how & 1) (void)lec_flight_join(&world.handle, key, key_bytes, number << 16, world.now, 1000000000, &role, &ticket);
    expect(role == LEC_FLIGHT_NONE || (ticket.index < world.handle.geometry.flight_count && ticket.token != 0));
    switch (how >> 1 & 7) {
    case 0: (void)lec_flight_renew(&world.handle, ticket, number << 24, world.now, 1000000000); break;
    case 1: (void)lec_flight_advance(&world.handle, ticket, number, world.now, 1000000000); break;
    case 2: (void)lec_flight_end(&world.handle, ticket, world.now, 1000000000); break;
    case 3: expect(lec_flight_state(&world.handle, ticket, world.now) >= LEC_FLIGHT_OVER); break;
    case 4: expect(lec_flight_wait(&world.handle, ticket, (int64_t)(number & 7), world.now, 1000) >= LEC_FLIGHT_OVER); break;
    case 5: (void)lec_bell_wait(&world.handle, number, 1000); break;
    default: break;
    }
}

static void call(struct input *input, uint64_t what)
{
    uint8_t key[256];
    uint32_t id = (uint32_t)(take(input, 1) % (KEYS + 8));
    if (id >= KEYS + 4) id = world.aimed;
    uint32_t key_bytes = make_key(key, id);
    struct copy copy = {0};
    struct lec_read read = {0};
    int64_t sum;
    switch (what % 16) {
    case 0: case 1: (void)get(id, true, &copy, &read); break;
    case 2: (void)get(id, false, &copy, &read); break;
    case 3: case 4: (void)store(id, take(input, 2) % 2100, LEC_SET, 0, 0); break;
    case 5: (void)store(id, take(input, 1), LEC_ADD, 0, 1000000); break;
    case 6: if (get(id, false, &copy, &read) == LEC_OK) (void)store(id, 77, LEC_CAS, read.version, 0); break;
    case 7: (void)get(id, false, &copy, &read); (void)store(id, 33, LEC_FILL, read.token, 0); break;
    case 8: (void)lec_delete(&world.handle, key, key_bytes, 0, world.now, 1000000000); break;
    case 9: (void)lec_incr(&world.handle, key, key_bytes, 5, &sum, world.now, 1000000000); break;
    case 10: (void)lec_touch(&world.handle, key, key_bytes, take(input, 8), world.now, 1000000000); break;
    case 11: scan_all(input); break;
    case 12: check(); break;
    case 13: attach(); break;
    case 14: read_regions(input); fly(input, key, key_bytes); lec_reap(&world.handle, world.now, 1000000000); break;
    default: if (id % 4 == 0) (void)lec_clear(&world.handle, world.now, 1000000000); else world.now += take(input, 4); break;
    }
    free(copy.data);
}

/* ---- the property ---- */

static void expect_flyable(void)
{
    uint8_t key[256];
    struct lec_ticket ticket;
    enum lec_role role;
    uint32_t key_bytes = make_key(key, 3);
    if (lec_flight_join(&world.handle, key, key_bytes, 1000000000, world.now, 1000000000, &role, &ticket) != LEC_OK) return;
    if (role != LEC_FLIGHT_LED && role != LEC_FLIGHT_TAKEN_OVER) return;
    expect(lec_flight_state(&world.handle, ticket, world.now) == 0);
    expect(lec_flight_advance(&world.handle, ticket, 7, world.now, 1000000000) == LEC_OK);
    expect(lec_flight_state(&world.handle, ticket, world.now) == 7);
    expect(lec_flight_end(&world.handle, ticket, world.now, 1000000000) == LEC_OK);
    expect(lec_flight_state(&world.handle, ticket, world.now) == LEC_FLIGHT_OVER);
}

static void expect_repairable(void)
{
    struct copy copy = {0};
    struct lec_read read = {0};
    check();
    complaints = 0;
    check();
    if (complaints > 0) fprintf(stderr, "not repaired: %s\n", complaint);
    expect(complaints == 0);
    expect_flyable();
    if (store(3, 50, LEC_SET, 0, 0) != LEC_OK) return;      /* retired, or all memory reserved */
    enum lec_status status = get(3, true, &copy, &read);
    expect(status == LEC_OK && copy.bytes == 50 && copy.data[0] == 4 && copy.data[49] == 4);
    free(copy.data);
}

/* The whole segment is the input, repeated; behind a valid header if the first byte says so. */
static void whole_segment(struct input *input)
{
    uint64_t from = take(input, 1) % 2 ? sizeof(struct lec_header) : 0, step = input->left;
    if (step == 0) return;
    for (uint64_t offset = from; offset < config.memory_bytes; offset += step)
        memcpy(world.base + offset, input->data, step < config.memory_bytes - offset ? step : config.memory_bytes - offset);
    spare_mutexes(&world.attached.geometry);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    if (!world.base) create_world();
    memcpy(world.base, world.pristine, config.memory_bytes);
    world.handle = world.attached;
    world.now = NOW;
    world.aimed = 0;
    uint64_t first = take(&input, 1);
    if (first % 8 == 7) {
        whole_segment(&input);
        attach();
    }
    for (uint32_t step = 0; step < MAX_STEPS && input.left > 0; step++) {
        uint64_t what = take(&input, 1);
        if (what < 40) scribble_raw(&input);
        else if (what < 140) scribble_field(&input);
        else call(&input, what);
    }
    expect_repairable();
    return 0;
}
