/* Flights: of all callers on the host that miss one key, one computes and the others wait for it.
 *
 * A flight is a record in the segment: whose it is, of which key, until when. It is data, not a lock: no kernel lock is
 * held while a flight runs, only inside of each call, so that a leader may be killed or stopped anywhere and costs the
 * others nothing but the time in which they notice.
 *
 *   F1 store the new token, then key, deadline and progress 0     (each a release store)
 *   F2 store the owner                                (release) = the flight runs
 *   ...renew: store the deadline; advance: store the progress
 *   F3 store owner 0                                  (release) = the flight is over
 *   F4 wake word + 1, bell + 1                        (release)
 *   F5 unlock, FUTEX_WAKE of both
 *
 * F1 to F4 happen under the lock of the key's shard, so there is never a second record of one key. A death between any
 * two stores leaves a free record or a whole one: the owner is stored last and cleared first. Before F3 of a flight that
 * is taken from its owner (dead, or past its deadline) the key's generation is bumped, which refuses that owner's fill().
 *
 * Waiters look without the lock. They load the token first and last, and each field in between with acquire: whatever
 * belongs to a later flight was stored after that one's token (F1), so the second look at the token shows it.
 *
 * | interleaving | what prevents harm |
 * | 1 A and B miss  2 both join | the second one to have the lock finds the first one's record |
 * | 1 L leads and is stopped  2 its deadline passes, B takes over and fills  3 L wakes and fills | the generation |
 * | 1 L, stopped, wakes after B took over  2 L advances or ends "its" flight | the token is compared under the lock |
 * | 1 W reads "runs"  2 L does F3 to F5: nobody to wake  3 W goes to sleep | W read the wake word before it looked: the
 *   futex compares it as part of going to sleep, and F4 has changed it |
 * | 1 L is killed between F3 and F5 | W looks again at least every 20 ms |
 */
#ifndef LEC_FLIGHT_H
#define LEC_FLIGHT_H

#include "shard.h"

/* Frees the flights of dead owners and wakes their waiters. Takes the locks concerned, each at most timeout_ns. */
LEC_INTERNAL void lec_flights_reap(struct lec_handle *handle, uint64_t now_ns, uint64_t timeout_ns);

/* Called once per broken invariant; `index` is the record's. */
typedef void lec_flights_report(void *context, const char *invariant, uint32_t index);
/* Checks the records of one shard, and frees those that are none. Needs the lock. */
LEC_INTERNAL void lec_flights_check_locked(const struct lec_shard_view *view, lec_flights_report *report, void *context);

#endif
