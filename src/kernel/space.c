#include "space.h"

#include <string.h>

#include "access.h"
#include "node.h"

/* ---- the bitmap ---- */

static bool unit_is_used(const struct lec_space_view *view, uint32_t unit) { return view->used[unit / 64] >> (unit % 64) & 1; }

static uint64_t word_mask(uint32_t from, uint32_t count) { return (count >= 64 ? UINT64_MAX : (UINT64_C(1) << count) - 1) << from; }

/* Sets or clears the bits of a run; false when one of them was so already. */
static bool bits_flip(const struct lec_space_view *view, uint32_t unit, uint32_t units, bool to_used)
{
    bool was_clean = true;
    while (units > 0) {
        uint32_t from = unit % 64, count = units < 64 - from ? units : 64 - from;
        uint64_t mask = word_mask(from, count), word = view->used[unit / 64];
        if ((word & mask) != (to_used ? 0 : mask)) was_clean = false;
        view->used[unit / 64] = to_used ? word | mask : word & ~mask;
        unit += count;
        units -= count;
    }
    return was_clean;
}

/* First unit at or after `unit` whose bit equals `used`, or view->units. */
static uint32_t next_unit(const struct lec_space_view *view, uint32_t unit, bool used)
{
    while (unit < view->units) {
        uint64_t word = view->used[unit / 64];
        word = (used ? word : ~word) >> (unit % 64);
        if (word != 0) {
            unit += (uint32_t)__builtin_ctzll(word);
            return unit < view->units ? unit : view->units;
        }
        unit += 64 - unit % 64;
    }
    return view->units;
}

/* ---- bins ---- */

static uint32_t bin_of(uint32_t units)
{
    if (units < LEC_EXACT_BINS) return units - 1;
    uint32_t power = 31 - (uint32_t)__builtin_clz(units);
    return LEC_EXACT_BINS + (power - 6) * 4 + (units >> (power - 2) & 3);
}

/* First bin at or after `bin` that is not empty, or LEC_SPACE_BINS. */
static uint32_t bin_at_least(const struct lec_space *space, uint32_t bin)
{
    for (uint32_t word = bin / 64; word < sizeof space->occupied / 8; word++) {
        uint64_t bits = space->occupied[word];
        if (word == bin / 64) bits &= UINT64_MAX << (bin % 64);
        if (bits == 0) continue;
        uint32_t found = word * 64 + (uint32_t)__builtin_ctzll(bits);
        return found < LEC_SPACE_BINS ? found : LEC_SPACE_BINS;
    }
    return LEC_SPACE_BINS;
}

static uint32_t bin_largest(const struct lec_space *space)
{
    for (uint32_t word = sizeof space->occupied / 8; word-- > 0;)
        if (space->occupied[word] != 0) {
            uint32_t found = word * 64 + 63 - (uint32_t)__builtin_clzll(space->occupied[word]);
            return found < LEC_SPACE_BINS ? found : LEC_SPACE_BINS;
        }
    return LEC_SPACE_BINS;
}

static struct lec_run *run_at(const struct lec_space_view *view, uint32_t unit) { return (struct lec_run *)(void *)lec_space_at(view, unit); }

static uint32_t *run_footer(const struct lec_space_view *view, uint32_t last_unit)
{
    return (uint32_t *)(void *)(lec_space_at(view, last_unit) + LEC_UNIT - sizeof(uint32_t));
}

/* A free run that says so itself, lies in the arena and agrees with the bitmap at both ends. */
static bool run_is_sound(const struct lec_space_view *view, uint32_t unit)
{
    if (unit >= view->units) return false;
    uint32_t units = lec_load32(&run_at(view, unit)->units);
    if (!lec_space_holds(view, unit, units)) return false;
    return !unit_is_used(view, unit) && !unit_is_used(view, unit + units - 1) && lec_load32(run_footer(view, unit + units - 1)) == units;
}

/* Last in, last out: blocks just freed are reused last, so that a reader still copying them rarely loses its race. */
static enum lec_space_status bin_append(const struct lec_space_view *view, uint32_t unit, uint32_t units)
{
    struct lec_space *space = view->state;
    uint32_t bin = bin_of(units), tail = space->bins[bin].tail;
    bool empty = !(space->occupied[bin / 64] >> (bin % 64) & 1);
    if (!empty && !run_is_sound(view, tail)) return LEC_SPACE_DAMAGED;
    struct lec_run *run = run_at(view, unit);
    lec_put32(&run->prev, empty ? LEC_NONE : tail);
    lec_put32(&run->next, LEC_NONE);
    lec_put32(&run->units, units);
    lec_put32(run_footer(view, unit + units - 1), units);
    if (empty) space->bins[bin].head = unit;
    else lec_put32(&run_at(view, tail)->next, unit);
    space->bins[bin].tail = unit;
    space->occupied[bin / 64] |= UINT64_C(1) << (bin % 64);
    lec_put32(&space->free_units, space->free_units + units);
    space->free_runs++;
    return LEC_SPACE_OK;
}

/* Needs run_is_sound(unit). */
static enum lec_space_status bin_remove(const struct lec_space_view *view, uint32_t unit)
{
    struct lec_space *space = view->state;
    struct lec_run *run = run_at(view, unit);
    uint32_t units = lec_load32(&run->units), prev = lec_load32(&run->prev), next = lec_load32(&run->next);
    struct lec_bin *bin = &space->bins[bin_of(units)];
    bool first = prev == LEC_NONE, last = next == LEC_NONE;
    if (first ? bin->head != unit : !run_is_sound(view, prev) || lec_load32(&run_at(view, prev)->next) != unit) return LEC_SPACE_DAMAGED;
    if (last ? bin->tail != unit : !run_is_sound(view, next) || lec_load32(&run_at(view, next)->prev) != unit) return LEC_SPACE_DAMAGED;
    if (space->free_units < units || space->free_runs == 0) return LEC_SPACE_DAMAGED;
    if (first) bin->head = next;
    else lec_put32(&run_at(view, prev)->next, next);
    if (last) bin->tail = prev;
    else lec_put32(&run_at(view, next)->prev, prev);
    if (first && last) space->occupied[bin_of(units) / 64] &= ~(UINT64_C(1) << (bin_of(units) % 64));
    lec_put32(&space->free_units, space->free_units - units);
    space->free_runs--;
    return LEC_SPACE_OK;
}

/* ---- taking and giving ---- */

#define BIN_LOOKS 4u                /* runs of a log bin that are tried for a fit before a longer one is split */

/* The run to carve `wanted` units from: the best fit, or the longest where none is long enough; LEC_NONE: nothing is free. */
static uint32_t choose_run(const struct lec_space_view *view, uint32_t wanted)
{
    const struct lec_space *space = view->state;
    uint32_t bin = bin_of(wanted), longest = LEC_NONE, longest_units = 0;
    if (bin >= LEC_EXACT_BINS) {
        uint32_t unit = space->occupied[bin / 64] >> (bin % 64) & 1 ? space->bins[bin].head : LEC_NONE;
        for (uint32_t look = 0; look < BIN_LOOKS && run_is_sound(view, unit); look++) {
            uint32_t units = lec_load32(&run_at(view, unit)->units);
            if (units >= wanted) return unit;
            if (units > longest_units) longest = unit, longest_units = units;
            unit = lec_load32(&run_at(view, unit)->next);
        }
        bin++;
    }
    uint32_t found = bin_at_least(space, bin);
    if (found < LEC_SPACE_BINS) return space->bins[found].head;
    if (longest != LEC_NONE) return longest;
    found = bin_largest(space);
    return found < LEC_SPACE_BINS ? space->bins[found].head : LEC_NONE;
}

uint32_t lec_space_next(const struct lec_space_view *view, uint64_t wanted)
{
    uint32_t bin = wanted > 0 && wanted < LEC_EXACT_BINS ? bin_at_least(view->state, bin_of((uint32_t)wanted)) : LEC_SPACE_BINS;
    uint32_t unit = bin < LEC_SPACE_BINS ? view->state->bins[bin].head : LEC_NONE;
    return lec_space_holds(view, unit, (uint32_t)wanted) ? unit : LEC_NONE;
}

bool lec_space_has_run(const struct lec_space_view *view, uint32_t wanted)
{
    uint32_t chosen = wanted == 0 || wanted > view->units ? LEC_NONE : choose_run(view, wanted);
    return chosen != LEC_NONE && run_is_sound(view, chosen) && lec_load32(&run_at(view, chosen)->units) >= wanted;
}

enum lec_space_status lec_space_take(const struct lec_space_view *view, uint32_t wanted, uint32_t *unit, uint32_t *units)
{
    if (wanted == 0 || wanted > view->units) return LEC_SPACE_FULL;
    uint32_t chosen = choose_run(view, wanted);
    if (chosen == LEC_NONE) return view->state->free_units == 0 ? LEC_SPACE_FULL : LEC_SPACE_DAMAGED;
    if (!run_is_sound(view, chosen)) return LEC_SPACE_DAMAGED;
    uint32_t whole = lec_load32(&run_at(view, chosen)->units), taken = whole < wanted ? whole : wanted;
    if (bin_remove(view, chosen) != LEC_SPACE_OK) return LEC_SPACE_DAMAGED;
    if (!bits_flip(view, chosen, taken, true)) return LEC_SPACE_DAMAGED;
    if (whole > taken && bin_append(view, chosen + taken, whole - taken) != LEC_SPACE_OK) return LEC_SPACE_DAMAGED;
    *unit = chosen;
    *units = taken;
    return LEC_SPACE_OK;
}

enum lec_space_status lec_space_give(const struct lec_space_view *view, uint32_t unit, uint32_t units)
{
    if (!lec_space_holds(view, unit, units) || !bits_flip(view, unit, units, false)) return LEC_SPACE_DAMAGED;
    if (unit > 0 && !unit_is_used(view, unit - 1)) {
        uint32_t left = lec_load32(run_footer(view, unit - 1));
        if (left == 0 || left > unit || !run_is_sound(view, unit - left)) return LEC_SPACE_DAMAGED;
        if (bin_remove(view, unit - left) != LEC_SPACE_OK) return LEC_SPACE_DAMAGED;
        unit -= left;
        units += left;
    }
    if (unit + units < view->units && !unit_is_used(view, unit + units)) {
        if (!run_is_sound(view, unit + units)) return LEC_SPACE_DAMAGED;
        uint32_t right = lec_load32(&run_at(view, unit + units)->units);
        if (bin_remove(view, unit + units) != LEC_SPACE_OK) return LEC_SPACE_DAMAGED;
        units += right;
    }
    return bin_append(view, unit, units);
}

/* ---- recovery ---- */

void lec_space_unmark_all(const struct lec_space_view *view)
{
    for (uint32_t word = 0; word < (view->units + 63) / 64; word++) view->used[word] = 0;
}

bool lec_space_mark(const struct lec_space_view *view, uint32_t unit, uint32_t units)
{
    return lec_space_holds(view, unit, units) && bits_flip(view, unit, units, true);
}

static void bins_empty(struct lec_space *space)
{
    lec_put32(&space->free_units, 0);
    space->free_runs = 0;
    for (uint32_t word = 0; word < sizeof space->occupied / 8; word++) space->occupied[word] = 0;
    for (uint32_t bin = 0; bin < LEC_SPACE_BINS; bin++) space->bins[bin] = (struct lec_bin){LEC_NONE, LEC_NONE};
}

void lec_space_rebuild(const struct lec_space_view *view)
{
    bins_empty(view->state);
    for (uint32_t unit = next_unit(view, 0, false); unit < view->units;) {
        uint32_t end = next_unit(view, unit, true);
        (void)bin_append(view, unit, end - unit);   /* cannot fail: every tail was appended by this very loop */
        unit = next_unit(view, end, false);
    }
}

void lec_space_reset(const struct lec_space_view *view)
{
    lec_space_unmark_all(view);
    lec_space_rebuild(view);
}

/* ---- the checker ---- */

struct space_findings { lec_space_report_fn report; void *context; uint32_t count; };

static void space_find(struct space_findings *findings, const char *message, uint64_t detail)
{
    findings->count++;
    if (findings->report) findings->report(findings->context, message, detail);
}

static void check_bin(const struct lec_space_view *view, uint32_t bin, struct space_findings *findings, uint64_t *units, uint32_t *runs)
{
    const struct lec_bin *ends = &view->state->bins[bin];
    uint32_t unit = ends->head, prev = LEC_NONE;
    while (unit != LEC_NONE && *runs <= view->units) {
        if (!run_is_sound(view, unit)) { space_find(findings, "free run disagrees with the bitmap or its own end", unit); return; }
        const struct lec_run *run = run_at(view, unit);
        if (bin_of(run->units) != bin) space_find(findings, "free run hangs in the wrong bin", unit);
        if (run->prev != prev) space_find(findings, "free run's back link is wrong", unit);
        if (next_unit(view, unit, true) != unit + run->units) space_find(findings, "free run is not maximal or holds used units", unit);
        *units += run->units;
        *runs += 1;
        prev = unit;
        unit = run->next;
    }
    if (ends->tail != prev) space_find(findings, "bin's tail is not its last run", bin);
}

uint32_t lec_space_check(const struct lec_space_view *view, lec_space_report_fn report, void *context)
{
    struct space_findings findings = {report, context, 0};
    uint64_t units = 0, unused = 0;
    uint32_t runs = 0;
    for (uint32_t bin = 0; bin < LEC_SPACE_BINS; bin++) {
        bool occupied = view->state->occupied[bin / 64] >> (bin % 64) & 1;
        if (occupied != (view->state->bins[bin].head != LEC_NONE)) space_find(&findings, "bin's occupied bit is wrong", bin);
        if (occupied) check_bin(view, bin, &findings, &units, &runs);
    }
    for (uint32_t unit = next_unit(view, 0, false); unit < view->units;) {
        uint32_t end = next_unit(view, unit, true);
        unused += end - unit;
        unit = next_unit(view, end, false);
    }
    if (units != view->state->free_units) space_find(&findings, "free units differ from the sum over the bins", units);
    if (unused != view->state->free_units) space_find(&findings, "free units differ from the bitmap", unused);
    if (runs != view->state->free_runs) space_find(&findings, "free runs differ from the count over the bins", runs);
    return findings.count;
}
