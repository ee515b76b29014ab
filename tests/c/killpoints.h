/* Kill points without a macro in the kernel.
 *
 * The kernel is compiled with -fsanitize=thread, which makes the compiler announce every access to memory that is not
 * provably private to the function, and is linked against killpoints.c in the place of libtsan. So no store can be
 * forgotten, now or in a later change. Each announced store into the watched segment is one point, counted *before*
 * it is performed; at the armed point the process kills (or stops) itself. memcpy, memmove and memset become
 * announced word-wise copies, and each call of pthread_mutex_* has a point before and one after it: the Makefile
 * renames these calls in the kernel's object files to points_*.
 */
#ifndef LEC_TEST_KILLPOINTS_H
#define LEC_TEST_KILLPOINTS_H

#include <stdbool.h>
#include <stdint.h>

enum points_action { POINTS_COUNT, POINTS_KILL, POINTS_STOP };

/* Watches [base, base + bytes) and counts from 0 again. */
void points_watch(const void *base, uint64_t bytes);
/* Acts at point number `at` (1 = before the very first store). with_loads: loads are points, too. */
void points_arm(enum points_action action, uint64_t at, bool with_loads);
void points_disarm(void);
uint64_t points_stores(void);                   /* announced since points_watch() or points_reset() */
uint64_t points_loads(void);
void points_reset(void);

/* Called for each announced store into the segment, before it is performed. NULL = nobody. */
typedef void (*points_store_fn)(void *context, uint64_t offset, uint64_t bytes);
void points_listen(points_store_fn listener, void *context);

/* Called before the kernel goes to sleep on a futex word that is as it was seen: nothing but a wake-up (or the end of
 * its time) ends that sleep. NULL = nobody. */
typedef void (*points_sleep_fn)(const void *word);
void points_on_sleep(points_sleep_fn listener);

/* ---- for the test that looks for stores nobody announced ---- */
/* True when the store at `address` is covered by the last announcement. */
bool points_announced(const void *address);
/* Widest announcement of one store so far: more than 16 bytes cannot be one instruction. */
uint64_t points_widest(void);
/* Name of the libc function that the kernel is inside of right now, NULL = none. */
const char *points_libc_call(void);

#endif
