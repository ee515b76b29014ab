#include "samples.h"

#include "access.h"

#define CODE_FRACTION_BITS 7u
#define MARKS_BESIDE 3u                 /* the one before the oldest event, one being written, one after a restart */
#define CODE_LARGEST (LEC_SAMPLE_FOREVER - 1u)
#define NS_PER_MS UINT64_C(1000000)
#define UNITS_LIMIT ((1u << 30) - 1u)       /* what a node can say */
#define NUMBER_LIMIT (UINT64_C(1) << 62)    /* no count that started at 0 gets there */

/* ---- numbers ---- */

/* As a small floating-point number: a 5-bit exponent and 7 bits behind the leading one; exponent 0 has no leading one. */
uint32_t lec_sample_code(uint64_t value)
{
    if (value >> CODE_FRACTION_BITS == 0) return (uint32_t)value;
    uint32_t shift = 63u - (uint32_t)__builtin_clzll(value) - CODE_FRACTION_BITS;
    uint64_t code = ((uint64_t)(shift + 1u) << CODE_FRACTION_BITS) + ((value >> shift) & ((1u << CODE_FRACTION_BITS) - 1u));
    return code < CODE_LARGEST ? (uint32_t)code : CODE_LARGEST;
}

uint64_t lec_sample_value(uint32_t code)
{
    uint32_t exponent = code >> CODE_FRACTION_BITS & 31u, fraction = code & ((1u << CODE_FRACTION_BITS) - 1u);
    return exponent == 0 ? fraction : (uint64_t)((1u << CODE_FRACTION_BITS) + fraction) << (exponent - 1u);
}

/* ---- room ---- */

uint32_t lec_sample_marks_for(uint32_t event_count)
{
    return event_count ? event_count / LEC_SAMPLES_PER_MARK + MARKS_BESIDE : 0u;
}

static uint64_t bytes_of(uint32_t event_count)
{
    return event_count * (uint64_t)sizeof(uint64_t) + lec_sample_marks_for(event_count) * (uint64_t)sizeof(struct lec_sample_mark);
}

uint32_t lec_samples_for(uint64_t bytes)
{
    uint64_t count = bytes / sizeof(uint64_t);
    if (count > LEC_SAMPLES_MOST) count = LEC_SAMPLES_MOST;
    while (count >= LEC_SAMPLES_LEAST && bytes_of((uint32_t)count) > bytes) count -= LEC_SAMPLES_LEAST / 4u;
    return count < LEC_SAMPLES_LEAST ? 0u : (uint32_t)count;
}

/* ---- writing ---- */

static uint64_t event_of(const struct lec_sample *sample)
{
    uint32_t left = sample->left_ns == UINT64_MAX ? LEC_SAMPLE_FOREVER : lec_sample_code(sample->left_ns / NS_PER_MS);
    uint32_t low = ((sample->hits - 1u) & 3u) << (2u * LEC_SAMPLE_CODE_BITS + 2u) | (uint32_t)sample->kind << (2u * LEC_SAMPLE_CODE_BITS);
    return (uint64_t)sample->hash << 32 | low | lec_sample_code(sample->units) << LEC_SAMPLE_CODE_BITS | left;
}

struct lec_sample lec_sample_of(uint64_t event)
{
    uint32_t mask = (1u << LEC_SAMPLE_CODE_BITS) - 1u, left = (uint32_t)event & mask;
    uint64_t units = lec_sample_value((uint32_t)event >> LEC_SAMPLE_CODE_BITS & mask), milliseconds = lec_sample_value(left);
    return (struct lec_sample){
        .hash = (uint32_t)(event >> 32), .hits = ((uint32_t)event >> (2u * LEC_SAMPLE_CODE_BITS + 2u) & 3u) + 1u,
        .units = (uint32_t)(units < UNITS_LIMIT ? units : UNITS_LIMIT),
        .kind = (enum lec_sample_kind)((uint32_t)event >> (2u * LEC_SAMPLE_CODE_BITS) & 3u),
        .left_ns = left == LEC_SAMPLE_FOREVER || milliseconds > UINT64_MAX / NS_PER_MS ? UINT64_MAX : milliseconds * NS_PER_MS};
}

/* Killed between the two stores, the event never was. */
void lec_samples_note(const struct lec_samples_view *view, const struct lec_sample *sample)
{
    if (view->event_count == 0) return;
    uint64_t number = lec_load64(&view->state->written);
    lec_put64(&view->events[number % view->event_count], event_of(sample));
    __atomic_store_n(&view->state->written, number + 1, __ATOMIC_RELEASE);
}

/* A mark counts once `marked` says so; killed before, its place holds one that no reader takes any more. */
void lec_samples_mark(const struct lec_samples_view *view, const struct lec_sample_mark *mark)
{
    if (view->event_count == 0) {
        view->state->mark_due = UINT64_MAX;     /* never asked for again */
        return;
    }
    uint64_t number = lec_load64(&view->state->marked);
    struct lec_sample_mark *place = &view->marks[number % view->mark_count];
    lec_put64(&place->number, lec_load64(&view->state->written));
    lec_put64(&place->at_ns, mark->at_ns);
    lec_put64(&place->threshold, mark->threshold);
    lec_put64(&place->hits, mark->hits);
    lec_put64(&place->misses, mark->misses);
    lec_put64(&place->counted_hits, mark->counted_hits);
    lec_put64(&place->counted_misses, mark->counted_misses);
    __atomic_store_n(&view->state->marked, number + 1, __ATOMIC_RELEASE);
    view->state->mark_due = lec_load64(&view->state->written) + LEC_SAMPLES_PER_MARK;
}

void lec_samples_restart(const struct lec_samples_view *view)
{
    lec_put64(&view->state->begun, lec_load64(&view->state->written));
    view->state->mark_due = 0;
}

bool lec_samples_are_sound(const struct lec_samples_view *view)
{
    const struct lec_samples *state = view->state;
    bool is_due_soon = view->event_count == 0 || state->mark_due <= state->written + LEC_SAMPLES_PER_MARK;
    return state->begun <= state->written && is_due_soon && state->written < NUMBER_LIMIT && state->marked < NUMBER_LIMIT;
}

void lec_samples_repair(const struct lec_samples_view *view)
{
    if (lec_samples_are_sound(view)) return;
    lec_put64(&view->state->written, lec_load64(&view->state->written) % NUMBER_LIMIT);
    lec_put64(&view->state->marked, lec_load64(&view->state->marked) % NUMBER_LIMIT);
    lec_samples_restart(view);
}

/* ---- reading ---- */

/* The oldest of so many numbers that is certainly whole: the next one may be half written over the one before it. */
static uint64_t oldest_of(uint64_t ever, uint32_t places)
{
    return ever >= places ? ever - places + 1u : 0u;
}

static uint64_t number_load(const uint64_t *number)
{
    return __atomic_load_n(number, __ATOMIC_ACQUIRE);
}

static void marks_copy(const struct lec_samples_view *view, struct lec_samples_copy *copy)
{
    uint64_t ever = number_load(&view->state->marked), first = oldest_of(ever, view->mark_count);
    for (uint64_t number = first; number < ever; number++) {
        const struct lec_sample_mark *from = &view->marks[number % view->mark_count];
        copy->marks[copy->mark_count++] = (struct lec_sample_mark){
            lec_load64(&from->number), lec_load64(&from->at_ns), lec_load64(&from->threshold), lec_load64(&from->hits),
            lec_load64(&from->misses), lec_load64(&from->counted_hits), lec_load64(&from->counted_misses)};
    }
    lec_fence_acquire();
    uint64_t whole = oldest_of(number_load(&view->state->marked), view->mark_count);
    uint32_t lost = whole <= first ? 0u : whole - first < copy->mark_count ? (uint32_t)(whole - first) : copy->mark_count;
    copy->mark_count -= lost;
    for (uint32_t at = 0; at < copy->mark_count; at++) copy->marks[at] = copy->marks[at + lost];
}

void lec_samples_read(const struct lec_samples_view *view, struct lec_samples_copy *copy)
{
    copy->event_count = copy->mark_count = 0;
    copy->first = copy->begun = 0;
    if (view->event_count == 0) return;
    marks_copy(view, copy);     /* first: an event without a mark does no harm, a mark of events to come would */
    uint64_t ever = number_load(&view->state->written), first = oldest_of(ever, view->event_count);
    for (uint64_t number = first; number < ever; number++)
        copy->events[copy->event_count++] = lec_load64(&view->events[number % view->event_count]);
    lec_fence_acquire();
    uint64_t whole = oldest_of(number_load(&view->state->written), view->event_count);
    uint32_t lost = whole <= first ? 0u : whole - first < copy->event_count ? (uint32_t)(whole - first) : copy->event_count;
    copy->event_count -= lost;
    for (uint32_t at = 0; at < copy->event_count; at++) copy->events[at] = copy->events[at + lost];
    copy->first = first + lost;
    copy->begun = lec_load64(&view->state->begun);
}
