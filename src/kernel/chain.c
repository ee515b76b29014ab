#include "chain.h"

#include "access.h"

/* A place in a chain: `left` payload bytes at `at`, then the extent at `next`. */
struct cursor { uint8_t *at; uint64_t left; uint32_t next; };

static struct lec_extent *extent_at(const struct lec_space_view *space, uint32_t unit) { return (struct lec_extent *)(void *)lec_space_at(space, unit); }

static bool cursor_first(const struct lec_space_view *space, uint32_t unit, struct cursor *cursor)
{
    if (unit >= space->units) return false;
    const struct lec_entry *entry = lec_entry_at(space, unit);
    uint32_t units = lec_load32(&entry->extent_units);
    if (!lec_space_holds(space, unit, units)) return false;
    *cursor = (struct cursor){lec_space_at(space, unit) + sizeof *entry, (uint64_t)units * LEC_UNIT - sizeof *entry, lec_load32(&entry->next)};
    return true;
}

static bool cursor_hop(const struct lec_space_view *space, struct cursor *cursor)
{
    uint32_t unit = cursor->next;
    if (unit >= space->units) return false;
    const struct lec_extent *extent = extent_at(space, unit);
    uint32_t units = lec_load32(&extent->extent_units);
    if (!lec_space_holds(space, unit, units)) return false;
    *cursor = (struct cursor){lec_space_at(space, unit) + sizeof *extent, (uint64_t)units * LEC_UNIT - sizeof *extent, lec_load32(&extent->next)};
    return true;
}

/* ---- taking ---- */

static uint32_t units_for(uint64_t bytes) { return (uint32_t)((bytes + LEC_UNIT - 1) / LEC_UNIT); }

/* Takes extents for the `left` bytes that the run at `unit` does not hold; adds to *units. */
static LEC_ASIDE enum lec_space_status take_rest(const struct lec_space_view *space, uint32_t unit, uint64_t left, uint32_t *units)
{
    uint32_t *link = &lec_entry_at(space, unit)->next, extent, taken;
    for (; left > 0; *units += taken) {
        enum lec_space_status status = lec_space_take(space, units_for(left + sizeof(struct lec_extent)), &extent, &taken);
        if (status == LEC_SPACE_FULL) return lec_chain_give(space, unit) == LEC_SPACE_OK ? LEC_SPACE_FULL : LEC_SPACE_DAMAGED;
        if (status != LEC_SPACE_OK) return status;
        lec_put32(&extent_at(space, extent)->extent_units, taken);
        lec_put32(&extent_at(space, extent)->next, LEC_NONE);
        lec_put32(link, extent);
        link = &extent_at(space, extent)->next;
        uint64_t holds = (uint64_t)taken * LEC_UNIT - sizeof(struct lec_extent);
        left -= left < holds ? left : holds;
    }
    return LEC_SPACE_OK;
}

enum lec_space_status lec_chain_take(const struct lec_space_view *space, uint64_t payload_bytes, uint32_t *unit, uint32_t *units)
{
    if (lec_chain_units(payload_bytes) > space->state->free_units) return LEC_SPACE_FULL;
    uint64_t bytes = sizeof(struct lec_entry) + payload_bytes;
    enum lec_space_status status = lec_space_take(space, units_for(bytes), unit, units);
    if (status != LEC_SPACE_OK) return status;
    /* Others may have freed these units: their unlinking happened before our stores because taking the lock ended
     * with a release fence, see lec_shard_lock(). */
    lec_put32(&lec_entry_at(space, *unit)->extent_units, *units);
    lec_put32(&lec_entry_at(space, *unit)->next, LEC_NONE);
    uint64_t held = (uint64_t)*units * LEC_UNIT;
    return held >= bytes ? LEC_SPACE_OK : take_rest(space, *unit, bytes - held, units);
}

/* ---- giving and marking ---- */

enum lec_space_status lec_chain_give(const struct lec_space_view *space, uint32_t unit)
{
    struct cursor cursor;
    if (!cursor_first(space, unit, &cursor)) return LEC_SPACE_DAMAGED;
    uint32_t units = lec_load32(&lec_entry_at(space, unit)->extent_units);
    for (;;) {
        /* Read the link before giving the extent back: the free run's own words then lie there. A loop in the chain
         * ends at its second extent: its bits are clear by then, and lec_space_give() reports damage. */
        uint32_t next = cursor.next;
        if (lec_space_give(space, unit, units) != LEC_SPACE_OK) return LEC_SPACE_DAMAGED;
        if (next == LEC_NONE) return LEC_SPACE_OK;
        if (!cursor_hop(space, &cursor)) return LEC_SPACE_DAMAGED;
        unit = next;
        units = lec_load32(&extent_at(space, unit)->extent_units);
    }
}

bool lec_chain_mark(const struct lec_space_view *space, uint32_t unit, uint64_t payload_bytes, uint32_t *units)
{
    struct cursor cursor;
    if (!cursor_first(space, unit, &cursor)) return false;
    uint32_t extent_units = lec_load32(&lec_entry_at(space, unit)->extent_units);
    uint64_t held = 0;
    for (*units = 0;;) {
        if (!lec_space_mark(space, unit, extent_units)) return false;
        held += cursor.left;
        *units += extent_units;
        if (cursor.next == LEC_NONE) break;
        if (held >= payload_bytes) return false;
        unit = cursor.next;
        if (!cursor_hop(space, &cursor)) return false;
        extent_units = lec_load32(&extent_at(space, unit)->extent_units);
    }
    return held >= payload_bytes && held - payload_bytes < LEC_UNIT;
}

/* ---- walking ---- */

/* Moves the cursor `skip` payload bytes on. */
static bool cursor_skip(const struct lec_space_view *space, struct cursor *cursor, uint64_t skip)
{
    while (skip >= cursor->left && skip > 0) {
        skip -= cursor->left;
        if (skip == 0 && cursor->next == LEC_NONE) { cursor->left = 0; return true; }
        if (!cursor_hop(space, cursor)) return false;
    }
    cursor->at += skip;
    cursor->left -= skip;
    return true;
}

static LEC_ASIDE bool write_scattered(const struct lec_space_view *space, struct cursor cursor, uint64_t from, const uint8_t *source, uint64_t count)
{
    if (!cursor_skip(space, &cursor, from)) return false;
    while (count > 0) {
        if (cursor.left == 0 && !cursor_hop(space, &cursor)) return false;
        uint64_t step = count < cursor.left ? count : cursor.left;
        lec_copy_in(cursor.at, source, step);
        source += step;
        count -= step;
        cursor.left -= step;
    }
    return true;
}

bool lec_chain_write(const struct lec_space_view *space, uint32_t unit, uint64_t from, const void *bytes, uint64_t count)
{
    struct cursor cursor;
    if (!cursor_first(space, unit, &cursor)) return false;
    if (from + count > cursor.left) return write_scattered(space, cursor, from, bytes, count);
    lec_copy_in(cursor.at + from, bytes, count);
    return true;
}

bool lec_chain_read(const struct lec_space_view *space, uint32_t unit, uint64_t from, void *bytes, uint64_t count)
{
    struct cursor cursor;
    uint8_t *target = bytes;
    if (!cursor_first(space, unit, &cursor) || !cursor_skip(space, &cursor, from)) return false;
    while (count > 0) {
        if (cursor.left == 0 && !cursor_hop(space, &cursor)) return false;
        uint64_t step = count < cursor.left ? count : cursor.left;
        lec_copy_out(target, cursor.at, step);
        target += step;
        count -= step;
        cursor.left -= step;
    }
    return true;
}

bool lec_chain_equals(const struct lec_space_view *space, uint32_t unit, const void *key, uint32_t key_bytes)
{
    struct cursor cursor;
    const uint8_t *expected = key;
    if (!cursor_first(space, unit, &cursor)) return false;
    while (key_bytes > 0) {
        if (cursor.left == 0 && !cursor_hop(space, &cursor)) return false;
        uint32_t step = key_bytes < cursor.left ? key_bytes : (uint32_t)cursor.left;
        if (!lec_equal(cursor.at, expected, step)) return false;
        expected += step;
        key_bytes -= step;
        cursor.left -= step;
    }
    return true;
}
