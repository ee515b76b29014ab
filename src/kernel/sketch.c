#include "sketch.h"

#include "access.h"

#define ROWS 4u
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

static uint32_t word_of(uint64_t hash, uint32_t row)
{
    return row * 2u + (uint32_t)(hash >> (row * 5u + 4u) & 1u);
}

static uint32_t shift_of(uint64_t hash, uint32_t row)
{
    return (uint32_t)(hash >> (row * 5u) & 15u) * 4u;
}

uint32_t lec_sketch_estimate(const struct lec_sketch *sketch, uint64_t hash)
{
    const uint64_t *line = line_of(sketch, hash);
    uint32_t least = LEC_SKETCH_COUNTER_MAX;
    for (uint32_t row = 0; row < ROWS; row++) {
        uint32_t counter = (uint32_t)(lec_load64(&line[word_of(hash, row)]) >> shift_of(hash, row) & 15u);
        least = counter < least ? counter : least;
    }
    return least;
}

static void age(const struct lec_sketch *sketch, uint32_t added)
{
    struct lec_sketch_aging *aging = sketch->aging;
    aging->additions += added;
    if (aging->additions >= sketch->period) {
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
    uint32_t target = lec_sketch_estimate(sketch, hash) + count;
    target = target < LEC_SKETCH_COUNTER_MAX ? target : LEC_SKETCH_COUNTER_MAX;
    for (uint32_t row = 0; row < ROWS; row++) {
        uint64_t *word = &line[word_of(hash, row)];
        uint32_t shift = shift_of(hash, row);
        if ((*word >> shift & 15u) < target)
            lec_put64(word, (*word & ~(15ull << shift)) | (uint64_t)target << shift);
    }
    age(sketch, count);
}
