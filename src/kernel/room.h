/* Making room: the one place where entries leave the shard. Needs the lock. */
#ifndef LEC_ROOM_H
#define LEC_ROOM_H

#include "shard.h"

enum lec_leaving { LEC_LEAVES_DELETED, LEC_LEAVES_EXPIRED, LEC_LEAVES_EVICTED };

/* Unlinks the entry of a live node, gives its units and the node back. LEC_OK or LEC_DAMAGED. */
LEC_INTERNAL enum lec_status lec_drop_locked(const struct lec_shard_view *view, uint32_t node, enum lec_leaving how);

/* Takes units for an entry of so many key and value bytes, evicting what it must: expired entries first, then the
 * policy's victims, never `protect` (LEC_NONE: nobody). LEC_REFUSED: not even an empty shard could hold it now. */
LEC_INTERNAL enum lec_status lec_room_take_locked(const struct lec_shard_view *view, uint64_t payload_bytes, uint32_t protect,
                                     uint32_t *unit, uint32_t *units);

/* Where the shard is full: asks for the cache lines of the entries that are next to leave. */
LEC_INTERNAL void lec_room_warm_locked(const struct lec_shard_view *view);

/* Takes a free node, evicting one entry when max_entries are there. */
LEC_INTERNAL enum lec_status lec_node_take_locked(const struct lec_shard_view *view, uint32_t *node);
LEC_INTERNAL void lec_node_give_locked(const struct lec_shard_view *view, uint32_t node);

/* Drops up to `count` entries that have expired. */
LEC_INTERNAL enum lec_status lec_room_expire_locked(const struct lec_shard_view *view, uint32_t count);

#endif
