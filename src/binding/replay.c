/* Replaying samples to a cache of another size. The policy is compiled here a second time: shared with kernel.c, it would
 * have two callers there, and the compiler would not inline it into the calls that have to be fast. */
#define LEC_INTERNAL static __attribute__((unused))
#include "miniature.c"
#include "policy.c"
#include "samples.c"
#include "shadow.c"
#include "sketch.c"

#include "binding.h"

#include <stdlib.h>

#define ENTRIES_MOST (UINT32_MAX / 16u)
#define UNITS_MOST (UINT32_MAX / 4u)

struct replay {
    Py_buffer events, times;        /* of 64-bit words, as many of each */
    struct lec_miniature_size size;
    uint64_t tti_ns, seed;
};

static bool run(const struct replay *replay, uint8_t *outcomes)
{
    struct lec_miniature miniature;
    void *memory = NULL;
    if (posix_memalign(&memory, LEC_LINE, lec_miniature_bytes(replay->size.entries)) != 0) return false;
    lec_miniature_create(&miniature, memory, replay->size, replay->tti_ns, replay->seed);
    const uint8_t *events = replay->events.buf, *times = replay->times.buf;
    for (Py_ssize_t at = 0; at < replay->events.len / 8; at++) {
        uint64_t event, at_ns;
        memcpy(&event, events + at * 8, 8);
        memcpy(&at_ns, times + at * 8, 8);
        outcomes[at] = (uint8_t)lec_miniature_replay(&miniature, event, at_ns);
    }
    free(memory);
    return true;
}

static PyObject *outcomes_of(const struct replay *replay)
{
    bool is_done;
    PyObject *outcomes = PyBytes_FromStringAndSize(NULL, replay->events.len / 8);
    if (!outcomes) return NULL;
    uint8_t *into = (uint8_t *)PyBytes_AS_STRING(outcomes);
    Py_BEGIN_ALLOW_THREADS
    is_done = run(replay, into);
    Py_END_ALLOW_THREADS
    if (is_done) return outcomes;
    Py_DECREF(outcomes);
    return PyErr_NoMemory();
}

static bool is_legal(const struct replay *replay)
{
    if (replay->events.len % 8 != 0 || replay->events.len != replay->times.len)
        PyErr_SetString(PyExc_ValueError, "events and times must be as many words of 8 bytes");
    else if (replay->size.entries == 0 || replay->size.entries > ENTRIES_MOST || replay->size.units == 0 || replay->size.units > UNITS_MOST)
        PyErr_SetString(PyExc_ValueError, "no cache has so many entries or units");
    return !PyErr_Occurred();
}

/* replay(events, times, entries, units, tti_ns, seed) -> bytes: of each event enum lec_outcome */
PyObject *native_replay(PyObject *module, PyObject *args)
{
    (void)module;
    struct replay replay;
    unsigned long long tti_ns, seed;
    if (!PyArg_ParseTuple(args, "y*y*IIKK:replay", &replay.events, &replay.times, &replay.size.entries, &replay.size.units, &tti_ns, &seed))
        return NULL;
    replay.tti_ns = tti_ns, replay.seed = seed;
    PyObject *outcomes = is_legal(&replay) ? outcomes_of(&replay) : NULL;
    PyBuffer_Release(&replay.events);
    PyBuffer_Release(&replay.times);
    return outcomes;
}
