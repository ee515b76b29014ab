/* A stand-in for libtsan: see killpoints.h. This file itself is compiled without -fsanitize=thread. */
#include "killpoints.h"

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static struct {
    uintptr_t base;
    uint64_t bytes;
    enum points_action action;
    bool with_loads;
    uint64_t at, points, stores, loads;
    uintptr_t announced;
    uint64_t announced_bytes, widest;
    points_store_fn listener;
    void *context;
    const char *libc_call;
    points_sleep_fn sleep_listener;
} state;

void points_watch(const void *base, uint64_t bytes)
{
    state.base = (uintptr_t)base;
    state.bytes = bytes;
    points_reset();
}

void points_arm(enum points_action action, uint64_t at, bool with_loads)
{
    points_reset();
    state.action = action;
    state.with_loads = with_loads;
    state.at = at;
}

void points_disarm(void) { state.action = POINTS_COUNT; }
uint64_t points_stores(void) { return state.stores; }
uint64_t points_loads(void) { return state.loads; }
void points_reset(void) { state.points = state.stores = state.loads = state.widest = 0; }
void points_listen(points_store_fn listener, void *context) { state.listener = listener; state.context = context; }
void points_on_sleep(points_sleep_fn listener) { state.sleep_listener = listener; }
uint64_t points_widest(void) { return state.widest; }
const char *points_libc_call(void) { return state.libc_call; }

bool points_announced(const void *address)
{
    return (uintptr_t)address - state.announced < state.announced_bytes;
}

static void act(void)
{
    if (state.action == POINTS_COUNT) return;
    int signal_number = state.action == POINTS_KILL ? SIGKILL : SIGSTOP;
    points_disarm();                            /* a stopped process goes on unharmed */
    kill(getpid(), signal_number);
}

static void pass_point(void)
{
    if (++state.points == state.at) act();
}

static bool is_watched(uintptr_t address)
{
    return address - state.base < state.bytes;
}

static void before_store(const volatile void *address, uint64_t bytes)
{
    state.announced = (uintptr_t)address;
    state.announced_bytes = bytes;
    if (!is_watched((uintptr_t)address)) return;
    state.stores++;
    if (bytes > state.widest) state.widest = bytes;
    if (state.listener) state.listener(state.context, (uintptr_t)address - state.base, bytes);
    pass_point();
}

static void before_load(const volatile void *address)
{
    if (!is_watched((uintptr_t)address)) return;
    state.loads++;
    if (state.with_loads) pass_point();
}

/* ---- plain accesses ---- */

void __tsan_init(void);
void __tsan_init(void) {}
void __tsan_func_entry(void *caller);
void __tsan_func_entry(void *caller) { (void)caller; }
void __tsan_func_exit(void);
void __tsan_func_exit(void) {}

#define PLAIN(name, bytes) \
    void __tsan_read##name(void *address); \
    void __tsan_read##name(void *address) { before_load(address); } \
    void __tsan_write##name(void *address); \
    void __tsan_write##name(void *address) { before_store(address, bytes); }
#define PLAIN_ALL(bytes) \
    PLAIN(bytes, bytes) \
    void __tsan_unaligned_read##bytes(void *address); \
    void __tsan_unaligned_read##bytes(void *address) { before_load(address); } \
    void __tsan_unaligned_write##bytes(void *address); \
    void __tsan_unaligned_write##bytes(void *address) { before_store(address, bytes); } \
    void __tsan_volatile_read##bytes(void *address); \
    void __tsan_volatile_read##bytes(void *address) { before_load(address); } \
    void __tsan_volatile_write##bytes(void *address); \
    void __tsan_volatile_write##bytes(void *address) { before_store(address, bytes); }
PLAIN_ALL(1)
PLAIN_ALL(2)
PLAIN_ALL(4)
PLAIN_ALL(8)
PLAIN_ALL(16)

void __tsan_read_range(void *address, size_t bytes);
void __tsan_read_range(void *address, size_t bytes) { (void)bytes; before_load(address); }
void __tsan_write_range(void *address, size_t bytes);
void __tsan_write_range(void *address, size_t bytes) { before_store(address, bytes); }

/* ---- atomics: the runtime performs them, always sequentially consistent ---- */

#define ATOMIC_MODIFY(bits, type, operation, builtin) \
    type __tsan_atomic##bits##_##operation(volatile type *address, type operand, int order); \
    type __tsan_atomic##bits##_##operation(volatile type *address, type operand, int order) \
    { (void)order; before_load(address); before_store(address, sizeof(type)); \
      return builtin(address, operand, __ATOMIC_SEQ_CST); }

#define ATOMIC_COMPARE(bits, type, kind) \
    int __tsan_atomic##bits##_compare_exchange_##kind(volatile type *address, type *expected, type desired, int order, \
                                                      int failure_order); \
    int __tsan_atomic##bits##_compare_exchange_##kind(volatile type *address, type *expected, type desired, int order, \
                                                      int failure_order) \
    { (void)order; (void)failure_order; before_load(address); before_store(address, sizeof(type)); \
      return __atomic_compare_exchange_n(address, expected, desired, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); }

#define ATOMIC_ALL(bits, type) \
    type __tsan_atomic##bits##_load(const volatile type *address, int order); \
    type __tsan_atomic##bits##_load(const volatile type *address, int order) \
    { (void)order; before_load(address); return __atomic_load_n(address, __ATOMIC_SEQ_CST); } \
    void __tsan_atomic##bits##_store(volatile type *address, type value, int order); \
    void __tsan_atomic##bits##_store(volatile type *address, type value, int order) \
    { (void)order; before_store(address, sizeof(type)); __atomic_store_n(address, value, __ATOMIC_SEQ_CST); } \
    ATOMIC_MODIFY(bits, type, exchange, __atomic_exchange_n) \
    ATOMIC_MODIFY(bits, type, fetch_add, __atomic_fetch_add) \
    ATOMIC_MODIFY(bits, type, fetch_sub, __atomic_fetch_sub) \
    ATOMIC_MODIFY(bits, type, fetch_and, __atomic_fetch_and) \
    ATOMIC_MODIFY(bits, type, fetch_or, __atomic_fetch_or) \
    ATOMIC_MODIFY(bits, type, fetch_xor, __atomic_fetch_xor) \
    ATOMIC_COMPARE(bits, type, strong) \
    ATOMIC_COMPARE(bits, type, weak)
ATOMIC_ALL(8, uint8_t)
ATOMIC_ALL(16, uint16_t)
ATOMIC_ALL(32, uint32_t)
ATOMIC_ALL(64, uint64_t)

void __tsan_atomic_thread_fence(int order);
void __tsan_atomic_thread_fence(int order) { (void)order; __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int order);
void __tsan_atomic_signal_fence(int order) { (void)order; __atomic_signal_fence(__ATOMIC_SEQ_CST); }

/* ---- libc's copies, which the compiler does not instrument: one point a word ---- */

typedef uint64_t __attribute__((may_alias, aligned(1))) loose_word;

static void store_words(uint8_t *to, const uint8_t *from, uint8_t fill, size_t bytes)
{
    for (size_t done = 0, step; done < bytes; done += step) {
        uint64_t word;
        step = bytes - done < sizeof word ? 1 : sizeof word;
        if (from) memcpy(&word, from + done, step);
        else memset(&word, fill, sizeof word);
        before_store(to + done, step);
        /* One instruction each: what the announcement promises. */
        if (step == sizeof word) *(volatile loose_word *)(to + done) = word;
        else *(volatile uint8_t *)(to + done) = (uint8_t)word;
    }
}

void *points_memcpy(void *to, const void *from, size_t bytes);
void *points_memcpy(void *to, const void *from, size_t bytes)
{
    if (!is_watched((uintptr_t)to)) return memcpy(to, from, bytes);
    store_words(to, from, 0, bytes);
    return to;
}

void *points_memmove(void *to, const void *from, size_t bytes);
void *points_memmove(void *to, const void *from, size_t bytes)
{
    if (!is_watched((uintptr_t)to)) return memmove(to, from, bytes);
    uint8_t copy[bytes + 1];
    memcpy(copy, from, bytes);
    store_words(to, copy, 0, bytes);
    return to;
}

void *points_memset(void *to, int fill, size_t bytes);
void *points_memset(void *to, int fill, size_t bytes)
{
    if (!is_watched((uintptr_t)to)) return memset(to, fill, bytes);
    store_words(to, NULL, (uint8_t)fill, bytes);
    return to;
}

/* ---- the mutex: a point before and after; within, libc and the operating system answer for their own steps ---- */

static void enter_libc(const char *name)
{
    state.stores++;
    pass_point();
    state.announced_bytes = 0;
    state.libc_call = name;
}

static int leave_libc(int result)
{
    state.libc_call = NULL;
    state.stores++;
    pass_point();
    return result;
}

#define WRAP_MUTEX(name) \
    int points_##name(pthread_mutex_t *mutex); \
    int points_##name(pthread_mutex_t *mutex) { enter_libc(#name); return leave_libc(name(mutex)); }
WRAP_MUTEX(pthread_mutex_lock)
WRAP_MUTEX(pthread_mutex_trylock)
WRAP_MUTEX(pthread_mutex_unlock)
WRAP_MUTEX(pthread_mutex_consistent)
WRAP_MUTEX(pthread_mutex_destroy)

int points_pthread_mutex_init(pthread_mutex_t *mutex, const pthread_mutexattr_t *attributes);
int points_pthread_mutex_init(pthread_mutex_t *mutex, const pthread_mutexattr_t *attributes)
{
    enter_libc("pthread_mutex_init");
    return leave_libc(pthread_mutex_init(mutex, attributes));
}

int points_pthread_mutex_timedlock(pthread_mutex_t *mutex, const struct timespec *until);
int points_pthread_mutex_timedlock(pthread_mutex_t *mutex, const struct timespec *until)
{
    enter_libc("pthread_mutex_timedlock");
    return leave_libc(pthread_mutex_timedlock(mutex, until));
}

int points_pthread_mutex_clocklock(pthread_mutex_t *mutex, clockid_t clock, const struct timespec *until);
int points_pthread_mutex_clocklock(pthread_mutex_t *mutex, clockid_t clock, const struct timespec *until)
{
    enter_libc("pthread_mutex_clocklock");
    return leave_libc(pthread_mutex_clocklock(mutex, clock, until));
}

/* ---- futexes: the kernel makes no other system call directly ---- */

long points_syscall(long number, ...);
long points_syscall(long number, ...)
{
    va_list arguments;
    va_start(arguments, number);
    uint32_t *word = va_arg(arguments, uint32_t *);
    int operation = va_arg(arguments, int);
    uint32_t value = va_arg(arguments, uint32_t);
    const struct timespec *span = va_arg(arguments, const struct timespec *);
    va_end(arguments);
    bool sleeps = number == SYS_futex && operation == FUTEX_WAIT && __atomic_load_n(word, __ATOMIC_SEQ_CST) == value;
    if (sleeps && state.sleep_listener) state.sleep_listener(word);
    return syscall(number, word, operation, value, span, NULL, 0);
}
