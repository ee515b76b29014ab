#include "shadow.h"

#include <stddef.h>
#include <string.h>

/* Before anything is known: between what loops want (little) and what conversations want (much). */
#define SHARE_FIRST (LEC_SHARE_ONE / 10u * 3u)
#define PROTECTED_TENTHS 8u             /* of the main space */
#define LIVE_MOST 224u                  /* sampled entries: more than that, and fewer keys are sampled ... */
#define LIVE_LEAST 96u                  /* ... fewer than that, and more are */
#define ROOM_SMOOTHING 128u             /* accesses over which the room follows the number of live keys */
#define EXAMINED_PER_EVICTION 32u
#define EVICTIONS_PER_ACCESS 2u         /* one more than comes in: follows a shrinking room */
#define SCORE_ONE 256u
#define ROOM_ONE 1024u
#define JUDGEMENTS_PER_TURNOVER 4u
#define SCORE_MEMORY 128u               /* judgements over which scores decay: some 32 turnovers of the cache */
#define NOISE 2u                        /* standard deviations by which a racer may lag and still have a say */
#define HANDICAP 64u                    /* disputed accesses that a decision takes for granted */
#define DOUBT 8u                        /* the same, when racers are weighed against the best */
#define WEIGHT_ONE 256u
#define TOUCHES_MOST 3u

/* Dense where the optimum is sharp: with little window every percent counts. */
static const uint32_t shares[LEC_SHADOW_RACERS] = {
    LEC_SHARE_ONE / 100u,       LEC_SHARE_ONE / 100u * 5u,  LEC_SHARE_ONE / 100u * 10u, LEC_SHARE_ONE / 100u * 20u,
    LEC_SHARE_ONE / 100u * 40u, LEC_SHARE_ONE / 100u * 60u, LEC_SHARE_ONE / 100u * 80u, LEC_SHARE_ONE / 100u * 95u,
};

/* One racer at work on one access. */
struct race {
    struct lec_shadow *shadow;
    uint32_t number;                    /* which racer */
    uint32_t room, window, main, protected; /* entries */
    uint32_t steps_left;
};

/* ---- keys ---------------------------------------------------------------------------------------------------- */

static uint32_t key_list(const struct lec_shadow_key *key, uint32_t racer)
{
    return key->racers >> (racer * 4u) & 3u;
}

static uint32_t key_touches(const struct lec_shadow_key *key, uint32_t racer)
{
    return key->racers >> (racer * 4u + 2u) & 3u;
}

static void key_set(struct lec_shadow_key *key, uint32_t racer, uint32_t list, uint32_t touches)
{
    uint32_t capped = touches < TOUCHES_MOST ? touches : TOUCHES_MOST;
    key->racers = (key->racers & ~(15u << (racer * 4u))) | (list | capped << 2) << (racer * 4u);
}

static uint32_t holders(const struct lec_shadow_key *key)
{
    uint32_t count = 0;
    for (uint32_t racer = 0; racer < LEC_SHADOW_RACERS; racer++)
        count += key_list(key, racer) != LEC_LIST_FREE;
    return count;
}

/* Independent of the bits that place a key in a sketch. */
uint32_t lec_shadow_sample_hash(const struct lec_shadow *shadow, uint32_t tag)
{
    return (uint32_t)(lec_sketch_hash(shadow->seed, tag) * 0xd6e8feb86659fd93u >> 32);
}

static bool is_sampled(const struct lec_shadow *shadow, uint32_t tag)
{
    return lec_shadow_sample_hash(shadow, tag) <= shadow->threshold;
}

static struct lec_shadow_key *set_of(struct lec_shadow *shadow, uint32_t tag)
{
    return &shadow->keys[lec_shadow_sample_hash(shadow, tag) % LEC_SHADOW_SETS * LEC_SHADOW_WAYS];
}

static LEC_ASIDE struct lec_shadow_key *key_find(struct lec_shadow *shadow, uint32_t tag)
{
    struct lec_shadow_key *set = set_of(shadow, tag);
    for (uint32_t way = 0; way < LEC_SHADOW_WAYS; way++)
        if (set[way].tag == tag && (set[way].racers || set[way].node != LEC_NONE))
            return &set[way];
    return NULL;
}

static void key_drop(struct lec_shadow *shadow, struct lec_shadow_key *key)
{
    if (key->node != LEC_NONE)
        lec_shadow_gone(shadow, key);
    key->racers = 0;
}

/* Takes a free record of the set, else the one that is least missed: not live, then held by the fewest racers. */
static LEC_ASIDE struct lec_shadow_key *key_claim(struct lec_shadow *shadow, uint32_t tag)
{
    struct lec_shadow_key *set = set_of(shadow, tag), *least = set;
    uint32_t fewest = UINT32_MAX;
    for (uint32_t way = 0; way < LEC_SHADOW_WAYS && fewest; way++) {
        uint32_t missed = holders(&set[way]) + (set[way].node != LEC_NONE ? LEC_SHADOW_RACERS : 0u);
        if (missed < fewest) {
            fewest = missed;
            least = &set[way];
        }
    }
    key_drop(shadow, least);
    *least = (struct lec_shadow_key){tag, LEC_NONE, 0, 0};
    return least;
}

/* ---- rings --------------------------------------------------------------------------------------------------- */

static struct lec_shadow_ring *ring_of(const struct race *race, uint32_t list)
{
    return &race->shadow->racers[race->number].rings[list - 1u];
}

static uint32_t ring_count(const struct race *race, uint32_t list)
{
    uint32_t count = ring_of(race, list)->count;
    return count < LEC_SHADOW_RING ? count : LEC_SHADOW_RING;
}

static void ring_push(const struct race *race, uint32_t list, uint32_t index)
{
    struct lec_shadow_ring *ring = ring_of(race, list);
    uint32_t count = ring_count(race, list);
    ring->items[ring->head % LEC_SHADOW_RING] = (uint16_t)index;
    ring->head = (uint16_t)((ring->head + 1u) % LEC_SHADOW_RING);
    ring->count = (uint16_t)(count < LEC_SHADOW_RING ? count + 1u : count);
}

/* Takes the oldest item, LEC_NONE if there is none. */
static uint32_t ring_pop(const struct race *race, uint32_t list)
{
    struct lec_shadow_ring *ring = ring_of(race, list);
    for (uint32_t count = ring_count(race, list); count; count--) {
        uint32_t index = ring->items[(ring->head - count) % LEC_SHADOW_RING] % LEC_SHADOW_KEYS;
        ring->count = (uint16_t)(count - 1u);
        if (key_list(&race->shadow->keys[index], race->number) == list)
            return index;
    }
    return LEC_NONE;
}

/* Drops stale items. Needed when many keys were dropped at once: the main space of a racer with a small window turns
 * over so slowly that they would take its room for long, and it would lose races that it ought to win. */
static void ring_compact(const struct race *race, uint32_t list)
{
    struct lec_shadow_ring old = *ring_of(race, list);
    uint32_t count = ring_count(race, list);
    ring_of(race, list)->count = 0;
    for (; count; count--) {
        uint32_t index = old.items[(old.head - count) % LEC_SHADOW_RING] % LEC_SHADOW_KEYS;
        if (key_list(&race->shadow->keys[index], race->number) == list)
            ring_push(race, list, index);
    }
}

static void compact_rings(struct lec_shadow *shadow)
{
    struct race race = {.shadow = shadow};
    for (race.number = 0; race.number < LEC_SHADOW_RACERS; race.number++)
        for (uint32_t list = LEC_LIST_WINDOW; list <= LEC_LIST_PROTECTED; list++)
            ring_compact(&race, list);
}

/* ---- one racer: the real policy in small --------------------------------------------------------------------- */

static void move(const struct race *race, uint32_t list, uint32_t index, uint32_t touches)
{
    key_set(&race->shadow->keys[index], race->number, list, touches);
    ring_push(race, list, index);
}

static uint32_t main_count(const struct race *race)
{
    return ring_count(race, LEC_LIST_PROBATION) + ring_count(race, LEC_LIST_PROTECTED);
}

/* Takes the oldest untouched key; touched ones move on to the list `onward`. */
static uint32_t take_untouched(struct race *race, uint32_t list, uint32_t onward)
{
    uint32_t index = ring_pop(race, list);
    while (index != LEC_NONE && race->steps_left && key_touches(&race->shadow->keys[index], race->number)) {
        race->steps_left--;
        move(race, onward, index, 0);
        index = ring_pop(race, list);
    }
    return index;
}

static void demote_surplus(struct race *race)
{
    while (ring_count(race, LEC_LIST_PROTECTED) > race->protected && race->steps_left) {
        uint32_t index = take_untouched(race, LEC_LIST_PROTECTED, LEC_LIST_PROTECTED);
        if (index == LEC_NONE)
            return;
        race->steps_left--;
        move(race, LEC_LIST_PROBATION, index, 0);
    }
}

/* Takes the next victim of the main space; *list says from where. */
static uint32_t take_main(struct race *race, uint32_t *list)
{
    *list = LEC_LIST_PROBATION;
    uint32_t index = take_untouched(race, LEC_LIST_PROBATION, LEC_LIST_PROTECTED);
    demote_surplus(race);
    if (index == LEC_NONE) {
        *list = LEC_LIST_PROTECTED;
        index = take_untouched(race, LEC_LIST_PROTECTED, LEC_LIST_PROTECTED);
    }
    return index;
}

static uint32_t frequency(const struct lec_shadow *shadow, const struct lec_sketch *sketch, uint32_t index)
{
    return lec_sketch_estimate(sketch, lec_sketch_hash(shadow->seed, shadow->keys[index].tag));
}

static struct lec_sketch shadow_sketch_of(struct lec_shadow *shadow)
{
    return (struct lec_sketch){shadow->words, &shadow->aging, LEC_SHADOW_LINES};
}

static bool wins(const struct race *race, uint32_t candidate, uint32_t victim)
{
    struct lec_sketch sketch = shadow_sketch_of(race->shadow);
    return frequency(race->shadow, &sketch, candidate) > frequency(race->shadow, &sketch, victim);
}

/* The loser of a contest; the winner starts over in the main space. */
static uint32_t race_contest(struct race *race, uint32_t candidate)
{
    uint32_t list, victim = take_main(race, &list);
    if (victim == LEC_NONE)
        return candidate;
    if (wins(race, candidate, victim)) {
        move(race, LEC_LIST_PROBATION, candidate, 0);
        return victim;
    }
    move(race, list, victim, 0);
    return candidate;
}

static void race_evict_one(struct race *race)
{
    uint32_t list, index = LEC_NONE;
    race->steps_left = EXAMINED_PER_EVICTION;
    if (ring_count(race, LEC_LIST_WINDOW) >= race->window)
        index = take_untouched(race, LEC_LIST_WINDOW, LEC_LIST_WINDOW);
    index = index != LEC_NONE ? race_contest(race, index) : take_main(race, &list);
    if (index == LEC_NONE)
        index = take_untouched(race, LEC_LIST_WINDOW, LEC_LIST_WINDOW);
    if (index != LEC_NONE)
        key_set(&race->shadow->keys[index], race->number, LEC_LIST_FREE, 0);
}

/* While the main space has room, the window's surplus moves there without a contest. */
static void spill(struct race *race)
{
    for (uint32_t i = 0; i < EVICTIONS_PER_ACCESS; i++) {
        uint32_t count = ring_count(race, LEC_LIST_WINDOW);
        if (count <= race->window || count <= 1u || main_count(race) >= race->main)
            return;
        uint32_t index = ring_pop(race, LEC_LIST_WINDOW);
        if (index == LEC_NONE)
            return;
        move(race, LEC_LIST_PROBATION, index, key_touches(&race->shadow->keys[index], race->number));
    }
}

static void insert(struct race *race, uint32_t index, uint32_t touches)
{
    for (uint32_t i = 0; i < EVICTIONS_PER_ACCESS; i++)
        if (ring_count(race, LEC_LIST_WINDOW) + main_count(race) >= race->room)
            race_evict_one(race);
    move(race, LEC_LIST_WINDOW, index, touches);
    spill(race);
}

/* A hit moves nothing, but brings no room either: where all is hits, nobody else would notice a shrunken room. */
static void hold(struct race *race, uint32_t index, uint32_t touches)
{
    struct lec_shadow_key *key = &race->shadow->keys[index];
    key_set(key, race->number, key_list(key, race->number), key_touches(key, race->number) + touches);
    if (ring_count(race, LEC_LIST_WINDOW) + main_count(race) > race->room)
        race_evict_one(race);
}

static uint32_t room_part(uint32_t room, uint32_t share)
{
    uint32_t size = (uint32_t)((uint64_t)room * share / LEC_SHARE_ONE);
    return size ? size : 1u;
}

static struct race race_of(struct lec_shadow *shadow, uint32_t number, uint32_t room)
{
    uint32_t rest = room_part(room, LEC_SHARE_ONE - shares[number]);
    return (struct race){shadow, number, room, room_part(room, shares[number]), rest, rest * PROTECTED_TENTHS / 10u + 1u, 0};
}

/* ---- judging ------------------------------------------------------------------------------------------------- */

static uint32_t square_root(uint32_t x)
{
    uint32_t root = 0;
    for (uint32_t bit = 1u << 15; bit; bit >>= 1)
        if ((root + bit) * (root + bit) <= x)
            root += bit;
    return root;
}

static uint32_t best_racer(const struct lec_shadow *shadow)
{
    uint32_t best = 0;
    for (uint32_t racer = 1; racer < LEC_SHADOW_RACERS; racer++)
        best = shadow->racers[racer].score > shadow->racers[best].score ? racer : best;
    return best;
}

static uint32_t worst_racer(const struct lec_shadow *shadow)
{
    uint32_t worst = 0;
    for (uint32_t racer = 1; racer < LEC_SHADOW_RACERS; racer++)
        worst = shadow->racers[racer].score < shadow->racers[worst].score ? racer : worst;
    return worst;
}

/* Accesses that were a hit to just one of two racers, in 1/256. */
static uint32_t disputes(const struct lec_shadow *shadow, uint32_t one, uint32_t other)
{
    return shadow->racers[one].beats[other] + shadow->racers[other].beats[one];
}

static uint32_t chance_margin(uint32_t disputed)
{
    return square_root(disputed) * square_root(SCORE_ONE) * NOISE;
}

/* The mean share of the racers in the lead. Two racers that differ on n accesses differ in hits by chance with a
 * standard deviation of at most sqrt(n), so who lags by less than the margin may as well be the best; the closer to
 * the lead, the more it weighs. Where all are alike, the share stays what it is. */
static uint32_t favoured_share(const struct lec_shadow *shadow)
{
    uint64_t weights = 0, sum = 0;
    uint32_t best = best_racer(shadow);
    for (uint32_t racer = 0; racer < LEC_SHADOW_RACERS; racer++) {
        uint64_t lag = shadow->racers[best].score - shadow->racers[racer].score;
        uint64_t margin = chance_margin(disputes(shadow, best, racer) + DOUBT * SCORE_ONE);
        uint64_t weight = lag < margin ? (margin - lag) * WEIGHT_ONE / margin : 0u;
        weights += weight * weight;
        sum += weight * weight * shares[racer];
    }
    return weights ? (uint32_t)(sum / weights) : shadow->share;
}

/* Has the race told anything yet? Early hits come in clumps, so some disputes are taken for granted as a handicap: a
 * hasty excursion throws away a main space that takes long to grow again. */
static bool is_decided(const struct lec_shadow *shadow)
{
    uint32_t best = best_racer(shadow), worst = worst_racer(shadow);
    uint32_t margin = chance_margin(disputes(shadow, best, worst) + HANDICAP * SCORE_ONE);
    return shadow->racers[best].score - shadow->racers[worst].score >= margin;
}

static void fade(uint32_t *count)
{
    *count -= *count / SCORE_MEMORY;
}

static void judge(struct lec_shadow *shadow)
{
    if (is_decided(shadow))
        shadow->share = (shadow->share % LEC_SHARE_ONE + favoured_share(shadow)) / 2u;
    for (uint32_t racer = 0; racer < LEC_SHADOW_RACERS; racer++) {
        fade(&shadow->racers[racer].score);
        for (uint32_t other = 0; other < LEC_SHADOW_RACERS; other++)
            fade(&shadow->racers[racer].beats[other]);
    }
    shadow->accesses = 0;
}

/* ---- accesses ------------------------------------------------------------------------------------------------ */

/* The racers get the room that the sampled keys have in the real cache, not capacity / k: if the sample happens to
 * hold more popular keys than its share, so does that part of the cache. Smoothed, because a room that wavers costs
 * the racers with a large main space more than the others. */
static uint32_t follow_room(struct lec_shadow *shadow)
{
    uint32_t live = shadow->live % LEC_SHADOW_RING * ROOM_ONE, room = shadow->room % (LEC_SHADOW_RING * ROOM_ONE);
    shadow->room = !shadow->is_full ? live
                 : live > room ? room + (live - room) / ROOM_SMOOTHING : room - (room - live) / ROOM_SMOOTHING;
    room = (shadow->room + ROOM_ONE / 2u) / ROOM_ONE;
    return room < 2u ? 2u : room;
}

static void score_hit(struct lec_shadow_racer *racer, const struct lec_shadow_key *key)
{
    racer->score += SCORE_ONE;
    for (uint32_t other = 0; other < LEC_SHADOW_RACERS; other++)
        if (key_list(key, other) == LEC_LIST_FREE)
            racer->beats[other] += SCORE_ONE;
}

/* Only what the racers disagree on tells them apart. */
static void settle_scores(struct lec_shadow *shadow, const struct lec_shadow_key *key)
{
    uint32_t hits = holders(key);
    if (hits == 0 || hits == LEC_SHADOW_RACERS)
        return;
    for (uint32_t racer = 0; racer < LEC_SHADOW_RACERS; racer++)
        if (key_list(key, racer) != LEC_LIST_FREE)
            score_hit(&shadow->racers[racer], key);
}

static LEC_ASIDE void access_key(struct lec_shadow *shadow, struct lec_shadow_key *key, uint32_t count)
{
    uint32_t index = (uint32_t)(key - shadow->keys), room = follow_room(shadow);
    struct lec_sketch sketch = shadow_sketch_of(shadow);
    lec_sketch_add(&sketch, lec_sketch_hash(shadow->seed, key->tag), count, shadow->live % LEC_SHADOW_KEYS + 1u);
    settle_scores(shadow, key);
    for (uint32_t number = 0; number < LEC_SHADOW_RACERS; number++) {
        uint32_t list = key_list(key, number);
        struct race race = race_of(shadow, number, room);
        if (list == LEC_LIST_FREE)
            insert(&race, index, count - 1u);
        else
            hold(&race, index, count);
    }
    if (++shadow->accesses > room / JUDGEMENTS_PER_TURNOVER)
        judge(shadow);
}

/* ---- sampling ------------------------------------------------------------------------------------------------ */

static void sample_fewer(struct lec_shadow *shadow)
{
    shadow->threshold = shadow->threshold / 4u * 3u;
    shadow->room = shadow->room / 4u * 3u;
    uint32_t live = 0;
    for (uint32_t i = 0; i < LEC_SHADOW_KEYS; i++) {
        if (!is_sampled(shadow, shadow->keys[i].tag))
            key_drop(shadow, &shadow->keys[i]);
        live += shadow->keys[i].node != LEC_NONE;
    }
    shadow->live = live;
    shadow->counted = 0;
    shadow->cursor = 0;     /* a new round: the old one has counted keys that are gone */
    compact_rings(shadow);
}

static void sample_more(struct lec_shadow *shadow)
{
    uint32_t step = shadow->threshold / 3u + 1u;
    shadow->threshold = shadow->threshold < UINT32_MAX - step ? shadow->threshold + step : UINT32_MAX;
}

/* Once per round of polling. A count that is far off was damaged; small differences come from what happened meanwhile. */
static LEC_ASIDE void finish_round(struct lec_shadow *shadow)
{
    uint32_t off = shadow->counted > shadow->live ? shadow->counted - shadow->live : shadow->live - shadow->counted;
    if (off > LIVE_MOST / 4u)
        shadow->live = shadow->counted;
    if (shadow->live < LIVE_LEAST)
        sample_more(shadow);
    shadow->counted = 0;
}

/* A bit for each live key of the set; adds their number to *count. */
static uint32_t live_ways(const struct lec_shadow_key *set, uint32_t *count)
{
    uint32_t live = 0;
#pragma GCC unroll 8
    for (uint32_t way = 0; way < LEC_SHADOW_WAYS; way++) {
        uint32_t is_live = set[way].node != LEC_NONE;
        live |= is_live << way;
        *count += is_live;
    }
    return live;
}

struct lec_shadow_key *lec_shadow_next(struct lec_shadow *shadow, uint32_t *looks, uint32_t *live)
{
    uint32_t cursor = shadow->cursor % LEC_SHADOW_KEYS, left_of_set = LEC_SHADOW_WAYS - cursor % LEC_SHADOW_WAYS;
    if (*looks < left_of_set) {
        shadow->cursor = cursor + *looks;
        return NULL;
    }
    *looks -= left_of_set;
    struct lec_shadow_key *set = &shadow->keys[cursor / LEC_SHADOW_WAYS * LEC_SHADOW_WAYS];
    *live = live_ways(set, &shadow->counted);
    shadow->cursor = (cursor + left_of_set) % LEC_SHADOW_KEYS;
    if (shadow->cursor == 0)
        finish_round(shadow);
    return set;
}

void lec_shadow_hit(struct lec_shadow *shadow, struct lec_shadow_key *key, uint32_t count)
{
    access_key(shadow, key, count);
}

uint32_t lec_shadow_touched(struct lec_shadow *shadow, uint32_t tag, uint32_t count)
{
    struct lec_shadow_key *key = is_sampled(shadow, tag) ? key_find(shadow, tag) : NULL;
    if (!key)
        return 0;
    uint32_t hits = count > key->polled ? count - key->polled : 0u;
    key->polled = 0;
    if (hits)
        access_key(shadow, key, hits);
    return hits;
}

void lec_shadow_gone(struct lec_shadow *shadow, struct lec_shadow_key *key)
{
    key->node = LEC_NONE;
    if (shadow->live)
        shadow->live--;
}

bool lec_shadow_insert(struct lec_shadow *shadow, uint32_t tag, uint32_t node)
{
    if (!is_sampled(shadow, tag))
        return false;
    struct lec_shadow_key *key = key_find(shadow, tag);
    if (!key)
        key = key_claim(shadow, tag);
    shadow->live += key->node == LEC_NONE;
    key->node = node;
    key->polled = 0;
    access_key(shadow, key, 1);
    if (shadow->live > LIVE_MOST)
        sample_fewer(shadow);
    return true;
}

void lec_shadow_evict(struct lec_shadow *shadow, uint32_t tag)
{
    struct lec_shadow_key *key = is_sampled(shadow, tag) ? key_find(shadow, tag) : NULL;
    if (!key)
        return;
    shadow->is_full = true;
    if (key->node != LEC_NONE)
        lec_shadow_gone(shadow, key);
}

bool lec_shadow_remove(struct lec_shadow *shadow, uint32_t tag)
{
    struct lec_shadow_key *key = is_sampled(shadow, tag) ? key_find(shadow, tag) : NULL;
    if (key)
        key_drop(shadow, key);
    return key != NULL;
}

void lec_shadow_reset(struct lec_shadow *shadow, uint64_t seed)
{
    memset(shadow, 0, sizeof *shadow);
    shadow->seed = seed;
    shadow->share = SHARE_FIRST;
    shadow->threshold = UINT32_MAX;
    shadow->aging.cursor = LEC_SHADOW_LINES;
    for (uint32_t i = 0; i < LEC_SHADOW_KEYS; i++)
        shadow->keys[i].node = LEC_NONE;
}
