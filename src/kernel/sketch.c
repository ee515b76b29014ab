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

/* A key's counter in one of the four rows. */
struct counter { uint64_t *word; uint32_t shift; };

static inline struct counter counter_of(uint64_t *line, uint64_t hash, uint32_t row)
{
    uint32_t bits = (uint32_t)hash >> (row * 5u);
    return (struct counter){&line[row * 2u + (bits >> 4 & 1u)], (bits & 15u) * 4u};
}

static inline uint32_t counter_value(struct counter counter)
{
    return (uint32_t)(lec_load64(counter.word) >> counter.shift) & LEC_SKETCH_COUNTER_MAX;
}

/* Stores in any case: whether a counter is below its target is a coin toss, and a wrong guess costs more than a store. */
static inline void counter_raise(struct counter counter, uint32_t target)
{
    uint32_t value = counter_value(counter);
    uint64_t missing = target > value ? target - value : 0u;
    lec_put64(counter.word, lec_load64(counter.word) + (missing << counter.shift));
}

static inline uint32_t lesser(uint32_t one, uint32_t other)
{
    return one < other ? one : other;
}

uint32_t lec_sketch_estimate(const struct lec_sketch *sketch, uint64_t hash)
{
    uint64_t *line = line_of(sketch, hash);
    uint32_t first = lesser(counter_value(counter_of(line, hash, 0)), counter_value(counter_of(line, hash, 1)));
    uint32_t second = lesser(counter_value(counter_of(line, hash, 2)), counter_value(counter_of(line, hash, 3)));
    return lesser(first, second);
}

static void age(const struct lec_sketch *sketch, uint32_t added)
{
    struct lec_sketch_aging *aging = sketch->aging;
    aging->additions += added;
    /* Not before the last line has had its turn: the last ones would never be halved where the period is short. */
    if (aging->additions >= sketch->period && aging->cursor >= sketch->lines) {
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
void lec_sketch_add(const struct lec_sketch *sketch, uint64_t hash, uint32_t count)
{
    uint64_t *line = line_of(sketch, hash);
    uint32_t target = lesser(lec_sketch_estimate(sketch, hash) + count, LEC_SKETCH_COUNTER_MAX);
    counter_raise(counter_of(line, hash, 0), target);
    counter_raise(counter_of(line, hash, 1), target);
    counter_raise(counter_of(line, hash, 2), target);
    counter_raise(counter_of(line, hash, 3), target);
    age(sketch, count);
}
