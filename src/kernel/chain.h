/* One entry's bytes in the arena: a header, then key and value, in one run of units where possible, else in several.
 *
 *     [ lec_entry | key | value ....... ]                                 the usual case
 *     [ lec_entry | key | val ] -> [ lec_extent | ue ....... ] -> ...     where no run was long enough
 *
 * Readers walk a chain without the lock: each hop is bounded by the arena and takes at least one byte of what is
 * wanted, so a walk through garbage ends, and the caller's validation rejects it.
 */
#ifndef LEC_CHAIN_H
#define LEC_CHAIN_H

#include "layout.h"

/* Units an entry of so many key and value bytes takes when it lies in one run. */
static inline uint64_t lec_chain_units(uint64_t payload_bytes) { return (sizeof(struct lec_entry) + payload_bytes + LEC_UNIT - 1) / LEC_UNIT; }

static inline struct lec_entry *lec_entry_at(const struct lec_space_view *space, uint32_t unit)
{
    return (struct lec_entry *)(void *)lec_space_at(space, unit);
}

/* Takes units for an entry and links the extents; the other fields of the header are the caller's to fill.
 * *units is what it occupies. LEC_SPACE_FULL: not enough was free, nothing is taken. */
LEC_INTERNAL enum lec_space_status lec_chain_take(const struct lec_space_view *space, uint64_t payload_bytes, uint32_t *unit, uint32_t *units);

/* Gives all extents back. The chain must be unlinked from the index, and nobody may find it any more (index.h). */
LEC_INTERNAL enum lec_space_status lec_chain_give(const struct lec_space_view *space, uint32_t unit);

/* Marks all extents as reached; false when the chain leaves the arena, meets something reached before, or does not
 * hold payload_bytes exactly as lec_chain_take() would have cut it. *units is what it occupies. */
LEC_INTERNAL bool lec_chain_mark(const struct lec_space_view *space, uint32_t unit, uint64_t payload_bytes, uint32_t *units);

/* Walks payload bytes [from, from + bytes). All bounded; false when the chain is not what it should be. */
LEC_INTERNAL bool lec_chain_write(const struct lec_space_view *space, uint32_t unit, uint64_t from, const void *bytes, uint64_t count);
LEC_INTERNAL bool lec_chain_read(const struct lec_space_view *space, uint32_t unit, uint64_t from, void *bytes, uint64_t count);
LEC_INTERNAL bool lec_chain_equals(const struct lec_space_view *space, uint32_t unit, const void *key, uint32_t key_bytes);

#endif
