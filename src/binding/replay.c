/* Replaying samples to a cache of another size, in memory of its own. */
#include "binding.h"

#include <stdlib.h>

struct replay_call { Py_buffer events, times; struct lec_replay replay; };

static bool replay_run(const struct lec_replay *replay, uint8_t *outcomes)
{
    void *memory = NULL;
    if (posix_memalign(&memory, LEC_LINE, lec_replay_bytes(replay->entries)) != 0) return false;
    lec_replay(replay, memory, outcomes);
    free(memory);
    return true;
}

static PyObject *outcomes_of(const struct lec_replay *replay)
{
    bool is_done;
    PyObject *outcomes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)replay->count);
    if (!outcomes) return NULL;
    uint8_t *into = (uint8_t *)PyBytes_AS_STRING(outcomes);
    Py_BEGIN_ALLOW_THREADS
    is_done = replay_run(replay, into);
    Py_END_ALLOW_THREADS
    if (is_done) return outcomes;
    Py_DECREF(outcomes);
    return PyErr_NoMemory();
}

static bool is_legal(const struct replay_call *call)
{
    const struct lec_replay *replay = &call->replay;
    bool has_size = replay->entries > 0 && replay->entries <= LEC_REPLAY_ENTRIES_MOST && replay->units > 0 && replay->units <= LEC_REPLAY_UNITS_MOST;
    if (call->events.len % 8 != 0 || call->events.len != call->times.len)
        PyErr_SetString(PyExc_ValueError, "events and times must be as many words of 8 bytes");
    else if (!has_size)
        PyErr_SetString(PyExc_ValueError, "no cache has so many entries or units");
    return !PyErr_Occurred();
}

/* replay(events, times, entries, units, tti_ns, seed) -> bytes: of each event enum lec_outcome */
PyObject *native_replay(PyObject *module, PyObject *args)
{
    (void)module;
    struct replay_call call;
    unsigned long long tti_ns, seed;
    if (!PyArg_ParseTuple(args, "y*y*IIKK:replay", &call.events, &call.times, &call.replay.entries, &call.replay.units, &tti_ns, &seed))
        return NULL;
    call.replay.events = call.events.buf, call.replay.times = call.times.buf;
    call.replay.count = (uint64_t)call.events.len / 8;
    call.replay.tti_ns = tti_ns, call.replay.seed = seed;
    PyObject *outcomes = is_legal(&call) ? outcomes_of(&call.replay) : NULL;
    PyBuffer_Release(&call.events);
    PyBuffer_Release(&call.times);
    return outcomes;
}
