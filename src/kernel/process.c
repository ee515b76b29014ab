#include "process.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <unistd.h>

#define IDENTITY_START_BITS 40
#define STAT_FIELD_STATE 3u         /* fields of /proc/PID/stat, counted from 1; see proc(5) */
#define STAT_FIELD_THREADS 20u
#define STAT_FIELD_START 22u

/* Writes "/proc/<pid>/stat". */
static void stat_path(char path[32], int32_t pid)
{
    char digits[12];
    int count = 0;
    do digits[count++] = (char)('0' + pid % 10);
    while ((pid /= 10) > 0);
    char *at = path;
    for (const char *from = "/proc/"; *from; from++) *at++ = *from;
    while (count > 0) *at++ = digits[--count];
    for (const char *from = "/stat"; *from; from++) *at++ = *from;
    *at = 0;
}

static ssize_t stat_read(int32_t pid, char *text, size_t size)
{
    char path[32];
    stat_path(path, pid);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return -1;
    ssize_t count = read(file, text, size - 1);
    close(file);
    if (count >= 0) text[count] = 0;
    return count;
}

/* The text of field `wanted` (> 2). The command's name, field 2, may hold anything, so counting starts at the last ')'. */
static const char *stat_field(const char *text, uint32_t wanted)
{
    const char *at = NULL;
    for (const char *from = text; *from; from++)
        if (*from == ')') at = from;
    for (uint32_t field = 2; at && *at && field < wanted; at++)
        if (*at == ' ') field++;
    return at && *at ? at : NULL;
}

static uint64_t number_at(const char *text)
{
    uint64_t value = 0;
    for (; text && *text >= '0' && *text <= '9'; text++) value = value * 10 + (uint64_t)(*text - '0');
    return value;
}

/* *unknown: the process could not be looked at (no file descriptor left, a /proc mounted with hidepid), which proves
 * nothing about it. */
static uint64_t identity_of(int32_t pid, bool *unknown)
{
    char text[1024];
    *unknown = false;
    if (pid <= 0) return 0;
    *unknown = stat_read(pid, text, sizeof text) <= 0;
    if (*unknown) return 0;
    const char *state = stat_field(text, STAT_FIELD_STATE);
    /* A zombie whose other threads still run is not dead yet: they may be filling a reservation. */
    if (!state || ((*state == 'Z' || *state == 'X') && number_at(stat_field(text, STAT_FIELD_THREADS)) <= 1)) return 0;
    uint64_t start = number_at(stat_field(text, STAT_FIELD_START));
    return (uint64_t)pid << IDENTITY_START_BITS | (start & ((UINT64_C(1) << IDENTITY_START_BITS) - 1));
}

uint64_t lec_process_identity(int32_t pid)
{
    bool unknown;
    return identity_of(pid, &unknown);
}

/* Dead is a finding, never a guess: a live writer's reservation must not be swept because we ran out of files. */
bool lec_identity_is_alive(uint64_t identity)
{
    bool unknown;
    int32_t pid = lec_identity_pid(identity);
    if (identity == 0 || pid <= 0) return false;
    if (kill(pid, 0) != 0 && errno == ESRCH) return false;
    return identity_of(pid, &unknown) == identity || unknown;
}

struct lec_process *lec_process_at(const struct lec_handle *handle, uint32_t index)
{
    return (struct lec_process *)(void *)(handle->base + handle->geometry.processes) + index;
}

static bool has_reservations(const struct lec_process *process)
{
    for (uint32_t at = 0; at < LEC_RESERVATIONS; at++)
        if (atomic_load_explicit(&process->reservations[at].state, memory_order_relaxed) >= LEC_RESERVATION_HELD) return true;
    return false;
}

/* Its dead owner had not got as far as a reservation. */
static void drop_claims(struct lec_process *process)
{
    for (uint32_t at = 0; at < LEC_RESERVATIONS; at++)
        atomic_store_explicit(&process->reservations[at].state, LEC_RESERVATION_FREE, memory_order_relaxed);
}

enum claim { CLAIM_UNUSED, CLAIM_DEAD };

/* Records of the dead that still hold reservations are left alone until those are reaped: adopted, the reservation
 * of a writer that died between publishing and closing it would look like a live one's. */
static bool claim_one(struct lec_handle *handle, enum claim what)
{
    for (uint32_t index = 1; index < handle->geometry.process_count; index++) {
        struct lec_process *process = lec_process_at(handle, index);
        uint64_t owner = atomic_load_explicit(&process->owner, memory_order_relaxed);
        if (what == CLAIM_UNUSED ? owner != 0 : owner == 0 || lec_identity_is_alive(owner)) continue;
        if (has_reservations(process)) continue;
        if (!atomic_compare_exchange_strong(&process->owner, &owner, handle->identity)) continue;
        drop_claims(process);
        handle->process = process;
        return true;
    }
    return false;
}

void lec_process_claim(struct lec_handle *handle)
{
    /* Who could not learn its own identity (after fork, with no file descriptor left to read /proc with) shares record 0:
     * 1 W claims a record with owner 0, which stays nobody's  2 W reserves units and fills them  3 another process takes
     * the reservation for a dead owner's and gives the units to another key  4 W's late stores land in that one's value. */
    bool is_known = handle->identity != 0;
    /* Dead owners' records first: their number stays that of the processes alive at one time. */
    if (is_known && (claim_one(handle, CLAIM_DEAD) || claim_one(handle, CLAIM_UNUSED))) return;
    handle->process = lec_process_at(handle, 0);
    handle->concurrent = true;
}

uint32_t lec_attached(struct lec_handle *handle)
{
    /* This process counts once: it may share record 0, or have left a record behind when it called exec. */
    uint32_t alive = 1;
    for (uint32_t index = 1; index < handle->geometry.process_count; index++) {
        uint64_t owner = atomic_load_explicit(&lec_process_at(handle, index)->owner, memory_order_relaxed);
        alive += owner != handle->identity && lec_identity_is_alive(owner);
    }
    return alive;
}

void lec_count_read(struct lec_handle *handle, uint32_t hits, uint32_t misses)
{
    _Atomic uint64_t *stats = handle->process->stats;
    if (handle->concurrent) {
        if (hits) atomic_fetch_add_explicit(&stats[LEC_STAT_HITS], hits, memory_order_relaxed);
        if (misses) atomic_fetch_add_explicit(&stats[LEC_STAT_MISSES], misses, memory_order_relaxed);
        return;
    }
    /* One thread at a time stores here (the caller's promise): no locked instruction is needed. */
    if (hits) atomic_store_explicit(&stats[LEC_STAT_HITS], atomic_load_explicit(&stats[LEC_STAT_HITS], memory_order_relaxed) + hits, memory_order_relaxed);
    if (misses) atomic_store_explicit(&stats[LEC_STAT_MISSES], atomic_load_explicit(&stats[LEC_STAT_MISSES], memory_order_relaxed) + misses, memory_order_relaxed);
}
