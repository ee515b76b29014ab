/* Whether JSON values are in the normal form of a key already (llm_edge_cache/canonical.py says what that is). The one
 * thing here that is not about the slab: it walks every request, and in Python took longer than encoding what it walks.
 *
 * Nothing that it calls can run Python code, so with the GIL no other thread changes what is being walked. Without it
 * each container is held; a nested hold may let the outer one go for a while, hence the references and the sizes read
 * anew. */
#include "binding.h"

#include <math.h>

#ifdef Py_GIL_DISABLED
#define HOLD(container) Py_BEGIN_CRITICAL_SECTION(container)
#define LET_GO() Py_END_CRITICAL_SECTION()
#else
#define HOLD(container)
#define LET_GO()
#endif

static bool are_plain(PyObject *container, long depth);

/* `depth` containers may follow, this one included. What the encoder refuses by itself is not looked for. */
static inline bool is_plain(PyObject *item, long depth)
{
    if (PyUnicode_CheckExact(item) || PyLong_CheckExact(item) || item == Py_None || PyBool_Check(item)) return true;
    if (!PyFloat_CheckExact(item)) return depth > 0 && are_plain(item, depth - 1);
    double number = PyFloat_AS_DOUBLE(item);
    return isfinite(number) && number != floor(number);     /* an integral one is written as the integer it is */
}

static bool is_plain_dict(PyObject *dict, long depth)
{
    PyObject *key, *value;
    Py_ssize_t place = 0;
    bool is_so = true;
    HOLD(dict);
    while (is_so && PyDict_Next(dict, &place, &key, &value)) {
        Py_INCREF(value);
        is_so = is_plain(value, depth);
        Py_DECREF(value);
    }
    LET_GO();
    return is_so;
}

static bool is_plain_list(PyObject *list, long depth)
{
    bool is_so = true;
    HOLD(list);
    for (Py_ssize_t at = 0; is_so && at < PyList_GET_SIZE(list); at++) {
        PyObject *item = Py_NewRef(PyList_GET_ITEM(list, at));
        is_so = is_plain(item, depth);
        Py_DECREF(item);
    }
    LET_GO();
    return is_so;
}

static bool are_plain(PyObject *container, long depth)
{
    if (PyDict_CheckExact(container)) return is_plain_dict(container, depth);
    if (PyList_CheckExact(container)) return is_plain_list(container, depth);
    if (!PyTuple_CheckExact(container)) return false;
    for (Py_ssize_t at = 0; at < PyTuple_GET_SIZE(container); at++)
        if (!is_plain(PyTuple_GET_ITEM(container, at), depth)) return false;
    return true;
}

static bool are_dicts(PyObject *sequence)
{
    if (!PyList_CheckExact(sequence) && !PyTuple_CheckExact(sequence)) return false;
    bool is_so = true;
    HOLD(sequence);
    for (Py_ssize_t at = 0; is_so && at < PySequence_Fast_GET_SIZE(sequence); at++)
        is_so = PyDict_CheckExact(PySequence_Fast_GET_ITEM(sequence, at));
    LET_GO();
    return is_so;
}

static bool depth_parse(const char *function, PyObject *const *args, Py_ssize_t nargs, uint32_t *depth)
{
    if (nargs == 2) return index_parse(args[1], "depth", PLAIN_DEPTH_LIMIT, depth);
    PyErr_Format(PyExc_TypeError, "%s() takes 2 arguments, not %zd", function, nargs);
    return false;
}

/* are_plain(container, depth) -> are all items of a dict, list or tuple in normal form? `depth` more containers may follow. */
PyObject *native_are_plain(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    uint32_t depth;
    if (!depth_parse("are_plain", args, nargs, &depth)) return NULL;
    return PyBool_FromLong(are_plain(args[0], (long)depth));
}

/* are_plain_dicts(sequence, depth) -> the same of a list or tuple of nothing but dicts */
PyObject *native_are_plain_dicts(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    uint32_t depth;
    if (!depth_parse("are_plain_dicts", args, nargs, &depth)) return NULL;
    return PyBool_FromLong(are_dicts(args[0]) && are_plain(args[0], (long)depth));
}
