/* See weakmem.h. This file itself is compiled without -fsanitize=thread. */
#include "weakmem.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <ucontext.h>

#define MAX_WORDS 32768u            /* different words stored to in one run */
#define POOL_BYTES (UINT64_C(256) << 20)
#define STACK_BYTES (256u << 10)

/* How far a thread has seen: per touched word, the number of the oldest message that it may still read. */
struct view { uint32_t count, seen[]; };
struct message { uint64_t value; const struct view *view; struct message *older; uint32_t number; };

struct thread {
    ucontext_t context;
    uint8_t *stack;
    struct weak_body body;
    bool is_done;
    const pthread_mutex_t *waits_for;
    uint32_t current[MAX_WORDS];    /* its view */
    uint32_t acquirable[MAX_WORDS]; /* and what an acquire fence would add to it */
    const struct view *released;    /* at its last release fence */
    uintptr_t pending;              /* a plain store announced and not yet taken over */
    uint64_t pending_bytes;
};

static struct {
    uint8_t *base;
    uint64_t bytes;
    uint32_t *index_of;             /* per word of the segment: 1 + its number among the touched ones, 0 = untouched */
    uint64_t touched[MAX_WORDS];    /* the touched words */
    struct message *newest[MAX_WORDS];
    uint32_t words, clock;
    struct thread threads[WEAK_THREADS];
    unsigned count, running;
    ucontext_t scheduler;
    bool is_on;
    uint8_t *pool;
    uint64_t pool_used, random, stale_loads;
    uint32_t switch_odds, stale_odds;
    struct { const pthread_mutex_t *mutex; const struct view *view; bool is_held; } mutexes[8];
} state;

static void *take(uint64_t bytes)
{
    bytes = (bytes + 7) & ~UINT64_C(7);
    if (state.pool_used + bytes > POOL_BYTES) {
        fprintf(stderr, "weakmem: the pool is too small\n");
        abort();
    }
    state.pool_used += bytes;
    return state.pool + state.pool_used - bytes;
}

static uint32_t random_below(uint32_t limit)
{
    uint64_t x = state.random;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    state.random = x;
    return (uint32_t)((x >> 16) % limit);
}

static struct thread *me(void) { return &state.threads[state.running]; }

/* ---- views ---- */

static const struct view *snapshot(const uint32_t *seen)
{
    struct view *view = take(sizeof *view + state.words * sizeof *seen);
    view->count = state.words;
    memcpy(view->seen, seen, state.words * sizeof *seen);
    return view;
}

static void join(uint32_t *seen, const struct view *view)
{
    for (uint32_t word = 0; view && word < view->count; word++)
        if (view->seen[word] > seen[word]) seen[word] = view->seen[word];
}

static void see(uint32_t *seen, uint32_t word, uint32_t number) { if (number > seen[word]) seen[word] = number; }

/* ---- words and messages ---- */

static bool is_watched(uintptr_t address) { return state.is_on && address - (uintptr_t)state.base < state.bytes; }

static uint64_t word_value(uint64_t word)
{
    uint64_t value;
    memcpy(&value, state.base + word * 8, 8);
    return value;
}

/* The number of the word at this address among the touched; its history begins with what it holds now. */
static uint32_t touch_word(uintptr_t address)
{
    uint64_t word = (address - (uintptr_t)state.base) / 8;
    if (state.index_of[word]) return state.index_of[word] - 1;
    if (state.words == MAX_WORDS) {
        fprintf(stderr, "weakmem: too many words\n");
        abort();
    }
    struct message *first = take(sizeof *first);
    *first = (struct message){word_value(word), NULL, NULL, 0};
    state.touched[state.words] = word;
    state.newest[state.words] = first;
    for (unsigned thread = 0; thread < WEAK_THREADS; thread++)
        state.threads[thread].current[state.words] = state.threads[thread].acquirable[state.words] = 0;
    state.index_of[word] = ++state.words;
    return state.words - 1;
}

/* Real memory holds the newest value already. */
static void append(uint32_t word, const struct view *view)
{
    struct message *message = take(sizeof *message);
    *message = (struct message){word_value(state.touched[word]), view, state.newest[word], ++state.clock};
    state.newest[word] = message;
    see(me()->current, word, message->number);
    see(me()->acquirable, word, message->number);
}

/* A plain store announced at the last callback has been performed by now. */
static void settle(void)
{
    struct thread *thread = me();
    for (uintptr_t at = thread->pending & ~(uintptr_t)7; thread->pending_bytes && at < thread->pending + thread->pending_bytes; at += 8)
        append(touch_word(at), thread->released);
    thread->pending_bytes = 0;
}

/* ---- taking turns ---- */

static void yield(void) { swapcontext(&me()->context, &state.scheduler); }

static void pause_maybe(void)
{
    settle();
    if (random_below(state.switch_odds) == 0) yield();
}

static bool mutex_is_held(const pthread_mutex_t *mutex)
{
    for (unsigned index = 0; index < 8; index++)
        if (state.mutexes[index].mutex == mutex) return state.mutexes[index].is_held;
    return false;
}

static void body_start(void)
{
    me()->body.run(me()->body.argument);
    settle();
    me()->is_done = true;
    swapcontext(&me()->context, &state.scheduler);
}

static void thread_prepare(unsigned index, const struct weak_body *body)
{
    struct thread *thread = &state.threads[index];
    if (!thread->stack) thread->stack = malloc(STACK_BYTES);
    thread->body = *body;
    thread->is_done = false;
    thread->waits_for = NULL;
    thread->released = NULL;
    thread->pending_bytes = 0;
    getcontext(&thread->context);
    thread->context.uc_stack.ss_sp = thread->stack;
    thread->context.uc_stack.ss_size = STACK_BYTES;
    thread->context.uc_link = NULL;
    makecontext(&thread->context, body_start, 0);
}

static bool schedule_one(void)
{
    unsigned ready[WEAK_THREADS], count = 0, left = 0;
    for (unsigned index = 0; index < state.count; index++) {
        const struct thread *thread = &state.threads[index];
        left += !thread->is_done;
        if (!thread->is_done && !(thread->waits_for && mutex_is_held(thread->waits_for))) ready[count++] = index;
    }
    if (left == 0) return false;
    if (count == 0) {
        fprintf(stderr, "weakmem: deadlock\n");
        abort();
    }
    state.running = ready[random_below(count)];
    swapcontext(&state.scheduler, &me()->context);
    return true;
}

void weak_watch(void *base, uint64_t bytes)
{
    state.base = base;
    state.bytes = bytes;
    free(state.index_of);
    state.index_of = calloc(bytes / 8 + 1, sizeof *state.index_of);
    if (!state.pool) state.pool = malloc(POOL_BYTES);
}

void weak_run(const struct weak_body *bodies, unsigned count, uint64_t seed)
{
    static const uint32_t odds[] = {2, 4, 12, 40, 150};
    for (uint32_t word = 0; word < state.words; word++) state.index_of[state.touched[word]] = 0;
    state.words = state.clock = 0;
    state.pool_used = 0;
    state.random = seed * UINT64_C(0x9e3779b97f4a7c15) | 1;
    memset(state.mutexes, 0, sizeof state.mutexes);
    state.count = count;
    for (unsigned index = 0; index < count; index++) thread_prepare(index, &bodies[index]);
    for (unsigned skip = 0; skip < 20; skip++) (void)random_below(2);
    state.switch_odds = odds[random_below(5)];  /* both fine-grained and coarse turns */
    state.stale_odds = 1 + random_below(4);
    state.is_on = true;
    while (schedule_one()) {}
    state.is_on = false;
}

uint64_t weak_stale_loads(void) { return state.stale_loads; }

/* ---- atomic accesses ---- */

static bool acquires(int order) { return order != __ATOMIC_RELAXED && order != __ATOMIC_RELEASE; }
static bool releases(int order) { return order == __ATOMIC_RELEASE || order == __ATOMIC_ACQ_REL || order == __ATOMIC_SEQ_CST; }

static void observe(uint32_t word, const struct message *message, int order)
{
    struct thread *thread = me();
    see(thread->current, word, message->number);
    see(thread->acquirable, word, message->number);
    join(thread->acquirable, message->view);
    if (acquires(order)) join(thread->current, message->view);
}

/* Any message that is not older than what the thread has seen of this word. */
static const struct message *choose(uint32_t word)
{
    const struct message *message = state.newest[word];
    uint32_t oldest = me()->current[word];
    while (message->number > oldest && message->older && random_below(state.stale_odds + 1) != 0) message = message->older;
    if (message != state.newest[word]) state.stale_loads++;
    return message;
}

static uint64_t weak_load(uintptr_t address, int order)
{
    uint64_t number = (address - (uintptr_t)state.base) / 8, value;
    pause_maybe();
    if (!state.index_of[number]) {
        value = word_value(number);
    } else {
        const struct message *message = choose(state.index_of[number] - 1);
        observe(state.index_of[number] - 1, message, order);
        value = message->value;
    }
    return value >> (address % 8 * 8);
}

static const struct view *view_to_send(int order) { return releases(order) ? snapshot(me()->current) : me()->released; }

/* The two views together: a read-modify-write continues the release sequence of what it read. */
static const struct view *views_joined(const struct view *left, const struct view *right)
{
    static uint32_t seen[MAX_WORDS];
    if (!left || !right) return left ? left : right;
    memset(seen, 0, state.words * sizeof *seen);
    join(seen, left);
    join(seen, right);
    return snapshot(seen);
}

/* Before and after an access that modifies: between them, real memory is changed by one instruction. */
static uint32_t modify_begin(uintptr_t address, int order, bool reads)
{
    pause_maybe();
    uint32_t word = touch_word(address);
    if (reads) observe(word, state.newest[word], order);
    return word;
}

static void modify_end(uint32_t word, int order, bool reads)
{
    const struct view *read = reads ? state.newest[word]->view : NULL;
    append(word, views_joined(view_to_send(order), read));
}

#define MODIFY(bits, type, operation, builtin, reads) \
    type __tsan_atomic##bits##_##operation(volatile type *address, type operand, int order); \
    type __tsan_atomic##bits##_##operation(volatile type *address, type operand, int order) \
    { \
        if (!is_watched((uintptr_t)address)) return builtin(address, operand, __ATOMIC_SEQ_CST); \
        uint32_t word = modify_begin((uintptr_t)address, order, reads); \
        type before = builtin(address, operand, __ATOMIC_SEQ_CST); \
        modify_end(word, order, reads); \
        return before; \
    }

/* The compare and exchange reads the newest value: a failure, too. */
#define COMPARE(bits, type, kind) \
    int __tsan_atomic##bits##_compare_exchange_##kind(volatile type *address, type *expected, type desired, int order, int failure); \
    int __tsan_atomic##bits##_compare_exchange_##kind(volatile type *address, type *expected, type desired, int order, int failure) \
    { \
        (void)failure; \
        if (!is_watched((uintptr_t)address)) return __atomic_compare_exchange_n(address, expected, desired, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
        uint32_t word = modify_begin((uintptr_t)address, order, true); \
        int is_done = __atomic_compare_exchange_n(address, expected, desired, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
        if (is_done) modify_end(word, order, true); \
        return is_done; \
    }

#define ATOMICS(bits, type) \
    type __tsan_atomic##bits##_load(const volatile type *address, int order); \
    type __tsan_atomic##bits##_load(const volatile type *address, int order) \
    { return is_watched((uintptr_t)address) ? (type)weak_load((uintptr_t)address, order) : __atomic_load_n(address, __ATOMIC_SEQ_CST); } \
    void __tsan_atomic##bits##_store(volatile type *address, type value, int order); \
    void __tsan_atomic##bits##_store(volatile type *address, type value, int order) \
    { \
        bool watched = is_watched((uintptr_t)address); \
        uint32_t word = watched ? modify_begin((uintptr_t)address, order, false) : 0; \
        __atomic_store_n(address, value, __ATOMIC_SEQ_CST); \
        if (watched) modify_end(word, order, false); \
    } \
    MODIFY(bits, type, exchange, __atomic_exchange_n, true) \
    MODIFY(bits, type, fetch_add, __atomic_fetch_add, true) \
    MODIFY(bits, type, fetch_sub, __atomic_fetch_sub, true) \
    MODIFY(bits, type, fetch_and, __atomic_fetch_and, true) \
    MODIFY(bits, type, fetch_or, __atomic_fetch_or, true) \
    MODIFY(bits, type, fetch_xor, __atomic_fetch_xor, true) \
    COMPARE(bits, type, strong) \
    COMPARE(bits, type, weak)
ATOMICS(8, uint8_t)
ATOMICS(16, uint16_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)

void __tsan_atomic_thread_fence(int order);
void __tsan_atomic_thread_fence(int order)
{
    if (!state.is_on) return;
    settle();
    struct thread *thread = me();
    if (acquires(order))
        for (uint32_t word = 0; word < state.words; word++) see(thread->current, word, thread->acquirable[word]);
    if (releases(order)) thread->released = snapshot(thread->current);
}
void __tsan_atomic_signal_fence(int order);
void __tsan_atomic_signal_fence(int order) { (void)order; }

/* ---- plain accesses ---- */

static void plain_store(uintptr_t address, uint64_t bytes)
{
    if (!is_watched(address)) return;
    pause_maybe();
    for (uintptr_t at = address & ~(uintptr_t)7; at < address + bytes; at += 8) (void)touch_word(at);
    me()->pending = address;
    me()->pending_bytes = bytes;
}

static void plain_load(uintptr_t address) { if (is_watched(address)) pause_maybe(); }

void __tsan_init(void);
void __tsan_init(void) {}
void __tsan_func_entry(void *caller);
void __tsan_func_entry(void *caller) { (void)caller; }
void __tsan_func_exit(void);
void __tsan_func_exit(void) {}
#define PLAIN(name, size) \
    void __tsan_read##name(void *address); \
    void __tsan_read##name(void *address) { plain_load((uintptr_t)address); } \
    void __tsan_write##name(void *address); \
    void __tsan_write##name(void *address) { plain_store((uintptr_t)address, size); }
#define PLAIN_ALL(size) \
    PLAIN(size, size) \
    void __tsan_unaligned_read##size(void *address); \
    void __tsan_unaligned_read##size(void *address) { plain_load((uintptr_t)address); } \
    void __tsan_unaligned_write##size(void *address); \
    void __tsan_unaligned_write##size(void *address) { plain_store((uintptr_t)address, size); }
PLAIN_ALL(1)
PLAIN_ALL(2)
PLAIN_ALL(4)
PLAIN_ALL(8)
PLAIN_ALL(16)
void __tsan_read_range(void *address, size_t bytes);
void __tsan_read_range(void *address, size_t bytes) { (void)bytes; plain_load((uintptr_t)address); }
void __tsan_write_range(void *address, size_t bytes);
void __tsan_write_range(void *address, size_t bytes) { plain_store((uintptr_t)address, bytes); }

void *weak_memcpy(void *to, const void *from, size_t bytes);
void *weak_memcpy(void *to, const void *from, size_t bytes) { plain_store((uintptr_t)to, bytes); return memcpy(to, from, bytes); }
void *weak_memmove(void *to, const void *from, size_t bytes);
void *weak_memmove(void *to, const void *from, size_t bytes) { plain_store((uintptr_t)to, bytes); return memmove(to, from, bytes); }
void *weak_memset(void *to, int fill, size_t bytes);
void *weak_memset(void *to, int fill, size_t bytes) { plain_store((uintptr_t)to, bytes); return memset(to, fill, bytes); }

/* ---- mutexes: a view travels with them, nothing more ---- */

static unsigned mutex_slot(const pthread_mutex_t *mutex)
{
    for (unsigned index = 0; index < 8; index++) {
        if (!state.mutexes[index].mutex) state.mutexes[index].mutex = mutex;
        if (state.mutexes[index].mutex == mutex) return index;
    }
    abort();
}

static int mutex_take(const pthread_mutex_t *mutex, bool waits)
{
    if (!state.is_on) return 0;
    pause_maybe();
    unsigned slot = mutex_slot(mutex);
    while (state.mutexes[slot].is_held) {
        if (!waits) return EBUSY;
        me()->waits_for = mutex;
        yield();
        me()->waits_for = NULL;
    }
    state.mutexes[slot].is_held = true;
    join(me()->current, state.mutexes[slot].view);
    join(me()->acquirable, state.mutexes[slot].view);
    return 0;
}

int weak_pthread_mutex_trylock(pthread_mutex_t *mutex);
int weak_pthread_mutex_trylock(pthread_mutex_t *mutex) { return mutex_take(mutex, false); }
int weak_pthread_mutex_timedlock(pthread_mutex_t *mutex, const struct timespec *until);
int weak_pthread_mutex_timedlock(pthread_mutex_t *mutex, const struct timespec *until) { (void)until; return mutex_take(mutex, true); }
int weak_pthread_mutex_clocklock(pthread_mutex_t *mutex, clockid_t clock, const struct timespec *until);
int weak_pthread_mutex_clocklock(pthread_mutex_t *mutex, clockid_t clock, const struct timespec *until)
{
    (void)clock;
    return weak_pthread_mutex_timedlock(mutex, until);
}
int weak_pthread_mutex_unlock(pthread_mutex_t *mutex);
int weak_pthread_mutex_unlock(pthread_mutex_t *mutex)
{
    if (!state.is_on) return 0;
    pause_maybe();
    unsigned slot = mutex_slot(mutex);
    state.mutexes[slot].view = snapshot(me()->current);
    state.mutexes[slot].is_held = false;
    return 0;
}
