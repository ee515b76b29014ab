/* Reservations: units taken for a large value that is being filled outside the lock.
 *
 * Nobody writes to a unit that is neither published under the lock nor in the writer's own live reservation, so a
 * reservation is a root of recovery while its owner lives: 1 W reserves units and is stopped in the middle of filling
 * them  2 another owner dies, the shard is rebuilt without regard to W  3 the units are given to another key  4 W goes
 * on: its late stores land in another key's value. lec_reservations_mark_locked() prevents step 3.
 */
#ifndef LEC_RESERVE_H
#define LEC_RESERVE_H

#include "shard.h"

#define LEC_MARKING_PASSES 2u

/* Records units (a chain whose header is complete) as this process's; NULL: all of its records are taken. */
LEC_INTERNAL struct lec_reservation *lec_reservation_open_locked(const struct lec_shard_view *view, uint32_t unit);
/* The units are published or were given back. */
LEC_INTERNAL void lec_reservation_close_locked(const struct lec_shard_view *view, struct lec_reservation *reservation);
/* Without the lock: whoever has it next gives the units back. */
LEC_INTERNAL void lec_reservation_abandon(const struct lec_shard_view *view, struct lec_reservation *reservation);
/* Gives back what dead owners or abandoned writers reserved here. Cheap when there is nothing. */
LEC_INTERNAL void lec_reservations_reap_locked(const struct lec_shard_view *view, bool look_for_dead_owners);
/* Marks the units of every reservation of this shard that may still be written to; drops the rest. Returns how many.
 * *is_spoiled: one of those dropped had a broken chain, part of which is marked: unmark all and begin again (once, as
 * what was marked whole now will be then). */
LEC_INTERNAL uint32_t lec_reservations_mark_locked(const struct lec_shard_view *view, bool *is_spoiled);
/* Marks the units of every reservation of this shard, whoever owns it, for the checker; changes none. Returns how many
 * are sound. */
LEC_INTERNAL uint32_t lec_reservations_verify_locked(const struct lec_shard_view *view);
/* Reservations of this shard, held or abandoned. */
LEC_INTERNAL uint32_t lec_reservations_count_locked(const struct lec_shard_view *view);

#endif
