/* The kernel's real code on a simulated weakly ordered machine.
 *
 * x86 hides the loss of most fences. Here the kernel, compiled as for the kill points, runs in coroutines, and every
 * atomic access to the segment is performed by this runtime: a load may return any value that C11 allows it to, not
 * only the newest one. The semantics is the usual one of views (Kang et al., "A Promising Semantics for Relaxed-Memory Concurrency",
 * POPL 2017, without promises):
 *
 *   - a store appends a message (value, view) to the history of its word;
 *   - a thread's view says how old a message it may still read, word by word;
 *   - a release store's message carries the thread's view; a relaxed one carries the view at its last release fence;
 *   - an acquire load joins the message's view to the thread's; a relaxed load keeps it aside until an acquire fence;
 *   - an exchange reads the newest message; a mutex hands the view of the last unlock to the next lock.
 *
 * Left out: loads that see stores later in program order (load buffering), and stores ordered before older ones of
 * other threads. Plain accesses read the newest value; they are races under ThreadSanitizer if that is not the only
 * one they may read.
 */
#ifndef LEC_TEST_WEAKMEM_H
#define LEC_TEST_WEAKMEM_H

#include <stdint.h>

#define WEAK_THREADS 4u

/* Simulates accesses to [base, base + bytes). */
void weak_watch(void *base, uint64_t bytes);

/* Runs the bodies in turns until all have returned. The same seed makes the same run. */
struct weak_body { void (*run)(void *argument); void *argument; };
void weak_run(const struct weak_body *bodies, unsigned count, uint64_t seed);

/* Loads so far that returned something older than the newest value. */
uint64_t weak_stale_loads(void);

#endif
