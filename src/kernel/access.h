/* How shared memory that readers look at without a lock is loaded, stored and copied.
 *
 * A reader copies first and validates afterwards, so it may load words that a writer is storing. Every such access
 * goes through this file: words as relaxed atomics, ranges through lec_copy_in(), lec_copy_out() and lec_equal().
 */
#ifndef LEC_ACCESS_H
#define LEC_ACCESS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define LEC_WORDWISE_COPY 1
#endif
#endif
#if defined(__SANITIZE_THREAD__) && !defined(LEC_WORDWISE_COPY)
#define LEC_WORDWISE_COPY 1
#endif

static inline uint16_t lec_load16(const uint16_t *word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }
static inline uint32_t lec_load32(const uint32_t *word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }
static inline uint64_t lec_load64(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }
static inline void lec_put16(uint16_t *word, uint16_t value) { __atomic_store_n(word, value, __ATOMIC_RELAXED); }
static inline void lec_put32(uint32_t *word, uint32_t value) { __atomic_store_n(word, value, __ATOMIC_RELAXED); }
static inline void lec_put64(uint64_t *word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELAXED); }

/* The release fence between unlinking an entry and reusing its memory, see index.h. GCC's TSan does not model
 * fences and says so with a warning; nothing is lost, for all that races under it is atomic anyway. */
static inline void lec_fence_release(void)
{
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wtsan"
#endif
    atomic_thread_fence(memory_order_release);
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
}

static inline void lec_fence_acquire(void)
{
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wtsan"
#endif
    atomic_thread_fence(memory_order_acquire);
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
}

#ifdef LEC_WORDWISE_COPY
/* For TSan, model checking and the kill-point build: every access is an atomic of its own. */
static inline void lec_copy_out(void *private_to, const void *shared_from, size_t bytes)
{
    uint8_t *to = private_to;
    const uint8_t *from = shared_from;
    for (; bytes >= 8 && ((uintptr_t)from & 7) == 0; bytes -= 8, to += 8, from += 8) {
        uint64_t word = __atomic_load_n((const uint64_t *)(const void *)from, __ATOMIC_RELAXED);
        memcpy(to, &word, 8);
    }
    for (; bytes > 0; bytes--) *to++ = __atomic_load_n(from++, __ATOMIC_RELAXED);
}

static inline void lec_copy_in(void *shared_to, const void *private_from, size_t bytes)
{
    uint8_t *to = shared_to;
    const uint8_t *from = private_from;
    for (; bytes >= 8 && ((uintptr_t)to & 7) == 0; bytes -= 8, to += 8, from += 8) {
        uint64_t word;
        memcpy(&word, from, 8);
        __atomic_store_n((uint64_t *)(void *)to, word, __ATOMIC_RELAXED);
    }
    for (; bytes > 0; bytes--) __atomic_store_n(to++, *from++, __ATOMIC_RELAXED);
}

static inline bool lec_equal(const void *shared, const void *private_bytes, size_t bytes)
{
    const uint8_t *left = shared, *right = private_bytes;
    for (; bytes > 0; bytes--)
        if (__atomic_load_n(left++, __ATOMIC_RELAXED) != *right++) return false;
    return true;
}
#else
/* Wide copies. Sound although they race: memcpy writes each destination byte from a load of the source byte and the
 * compiler cannot look back at the source afterwards (the caller's acquire fence stands between this copy and the
 * check of the version, and a copy that the check rejects is thrown away unseen). */
static inline void lec_copy_out(void *private_to, const void *shared_from, size_t bytes) { memcpy(private_to, shared_from, bytes); }
static inline void lec_copy_in(void *shared_to, const void *private_from, size_t bytes) { memcpy(shared_to, private_from, bytes); }
static inline bool lec_equal(const void *shared, const void *private_bytes, size_t bytes) { return memcmp(shared, private_bytes, bytes) == 0; }
#endif

#endif
