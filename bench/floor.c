/* The copy floor: what a cache's get() cannot be faster than.
 *
 * Called from the same Python loop with the same key objects, it looks nothing up: it steps through the places of
 * those keys, prepared before the clock starts, and returns a fresh bytes object copied from there. What remains is
 * the call, the allocation, and the cache and TLB misses that the access pattern itself costs.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

struct floor_state {
    Py_buffer area;                 /* the values */
    Py_buffer places;               /* uint64_t offsets into the area, one a call, in the loop's order */
    Py_ssize_t value_bytes;
    size_t next, count;
    int ready;
};

static void release_buffers(struct floor_state *state) {
    if (state->ready) {
        PyBuffer_Release(&state->area);
        PyBuffer_Release(&state->places);
        state->ready = 0;
    }
}

static int places_are_inside(const struct floor_state *state) {
    const uint64_t *places = state->places.buf;
    for (size_t i = 0; i < state->count; i++)
        if (places[i] > (uint64_t)state->area.len || (uint64_t)state->area.len - places[i] < (uint64_t)state->value_bytes)
            return 0;
    return state->count > 0;
}

static PyObject *floor_setup(PyObject *module, PyObject *args) {
    struct floor_state *state = PyModule_GetState(module);
    release_buffers(state);
    if (!PyArg_ParseTuple(args, "y*y*n", &state->area, &state->places, &state->value_bytes))
        return NULL;
    state->ready = 1;
    state->next = 0;
    state->count = (size_t)state->places.len / sizeof(uint64_t);
    if (!places_are_inside(state)) {
        release_buffers(state);
        PyErr_SetString(PyExc_ValueError, "no places, or a place outside the area");
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *floor_copy(PyObject *module, PyObject *key) {
    struct floor_state *state = PyModule_GetState(module);
    (void)key;
    if (!state->ready)
        Py_RETURN_NONE;
    uint64_t place = ((const uint64_t *)state->places.buf)[state->next];
    if (++state->next == state->count)
        state->next = 0;
    return PyBytes_FromStringAndSize((const char *)state->area.buf + place, state->value_bytes);
}

static void floor_free(void *module) {
    release_buffers(PyModule_GetState((PyObject *)module));
}

static PyMethodDef floor_methods[] = {
    {"setup", floor_setup, METH_VARARGS, "setup(area, places, value_bytes)"},
    {"copy", floor_copy, METH_O, "copy(key) -> the next place's bytes"},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot floor_slots[] = {{0, NULL}};

static struct PyModuleDef floor_module = {
    PyModuleDef_HEAD_INIT, .m_name = "floor", .m_size = sizeof(struct floor_state),
    .m_methods = floor_methods, .m_slots = floor_slots, .m_free = floor_free,
};

PyMODINIT_FUNC PyInit_floor(void) { return PyModuleDef_Init(&floor_module); }
