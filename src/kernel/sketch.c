#include "sketch.h"

#include "access.h"

#define HALVED_LINES_PER_CALL 4u
#define NIBBLES_HALVED 0x7777777777777777u

uint32_t lec_sketch_lines(uint32_t max_entries)
{
    return max_entries / 8u + 1u;
}

void lec_sketch_reset(const struct lec_sketch *sketch)
{
    for (size_t word = 0; word < (size_t)sketch->lines * LEC_SKETCH_WORDS_PER_LINE; word++)
        lec_put64(&sketch->words[word], 0);
    sketch->aging->additions = 0;
    sketch->aging->cursor = sketch->lines;
}

/* The upper half of the hash chooses the line, the lower one the counters: 5 bits for each row. */
static uint64_t *line_of(const struct lec_sketch *sketch, uint64_t hash)
{
    uint64_t line = ((hash >> 32) * sketch->lines) >> 32;
    return sketch->words + line * LEC_SKETCH_WORDS_PER_LINE;
}

void lec_sketch_warm(const struct lec_sketch *sketch, uint64_t hash)
{
    __builtin_prefetch(line_of(sketch, hash), 1);
}

/* A key's counter in one of the four rows; two rows have no word in common. */
struct counter { uint64_t *at, word; uint32_t shift; };

static inline struct counter counter_of(uint64_t *line, uint64_t hash, uint32_t row)
{
    uint32_t bits = (uint32_t)hash >> (row * 5u);
    uint64_t *at = &line[row * 2u + (bits >> 4 & 1u)];
    return (struct counter){at, lec_load64(at), (bits & 15u) * 4u};
}

static inline uint32_t counter_value(struct counter counter)
{
    return (uint32_t)(counter.word >> counter.shift) & LEC_SKETCH_COUNTER_MAX;
}

static inline uint32_t lesser(uint32_t one, uint32_t other)
{
    return one < other ? one : other;
}

/* Stores in any case, and compares without a branch (an overshoot's sign as a mask): whether a counter is below its target is
 * a coin toss, and a wrong guess costs more than a store. */
static inline void counter_raise(struct counter counter, uint32_t target)
{
    int64_t missing = (int64_t)target - counter_value(counter);
    lec_put64(counter.at, counter.word + ((uint64_t)(missing & ~(missing >> 63)) << counter.shift));
}

static inline uint32_t counters_least(const struct counter counters[4])
{
    return lesser(lesser(counter_value(counters[0]), counter_value(counters[1])), lesser(counter_value(counters[2]), counter_value(counters[3])));
}

static inline void counters_of(const struct lec_sketch *sketch, uint64_t hash, struct counter counters[4])
{
    uint64_t *line = line_of(sketch, hash);
#pragma GCC unroll 4
    for (uint32_t row = 0; row < 4; row++)
        counters[row] = counter_of(line, hash, row);
}

uint32_t lec_sketch_estimate(const struct lec_sketch *sketch, uint64_t hash)
{
    struct counter counters[4];
    counters_of(sketch, hash, counters);
    return counters_least(counters);
}

static void age(const struct lec_sketch *sketch, uint32_t added, uint32_t period)
{
    struct lec_sketch_aging *aging = sketch->aging;
    aging->additions += added;
    /* Not before the last line has had its turn: the last ones would never be halved where the period is short. */
    if (aging->additions >= period && aging->cursor >= sketch->lines) {
        aging->additions = 0;
        aging->cursor = 0;
    }
    for (uint32_t i = 0; i < HALVED_LINES_PER_CALL && aging->cursor < sketch->lines; i++, aging->cursor++) {
        uint64_t *line = sketch->words + (size_t)aging->cursor * LEC_SKETCH_WORDS_PER_LINE;
        for (uint32_t w = 0; w < LEC_SKETCH_WORDS_PER_LINE; w++)
            lec_put64(&line[w], line[w] >> 1 & NIBBLES_HALVED);
    }
}

/* Conservative update: only counters below the new estimate move, which keeps collisions from feeding each other. */
void lec_sketch_add(const struct lec_sketch *sketch, uint64_t hash, uint32_t count, uint32_t entries)
{
    struct counter counters[4];
    counters_of(sketch, hash, counters);
    uint32_t target = lesser(counters_least(counters) + count, LEC_SKETCH_COUNTER_MAX);
#pragma GCC unroll 4
    for (uint32_t row = 0; row < 4; row++)
        counter_raise(counters[row], target);
    age(sketch, count, entries * LEC_SKETCH_ADDITIONS_PER_ENTRY);
}
