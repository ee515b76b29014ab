/* Python arguments to C values. Nothing here keeps anything of what it looks at, but for the views, which are closed
 * by their opener. */
#include "binding.h"

#include <math.h>

#define NS_PER_SECOND 1e9
#define LIFE_MAX_NS (UINT64_C(1) << 61)     /* 73 years: longer lives are as good as this one and cannot overflow a sum */

bool view_open_buffer(PyObject *object, const char *what, struct bytes_view *view)
{
    view->buffer.obj = NULL;
    if (!PyObject_CheckBuffer(object)) {
        PyErr_Format(PyExc_TypeError, "%s must be bytes-like, not %.100s", what, Py_TYPE(object)->tp_name);
        return false;
    }
    if (PyObject_GetBuffer(object, &view->buffer, PyBUF_SIMPLE) != 0) return false;
    view->bytes = view->buffer.buf;
    view->count = view->buffer.len;
    return true;
}

bool key_refuse(struct bytes_view *view)
{
    PyErr_Format(PyExc_ValueError, "key must be 1 to %d bytes long, not %zd", (int)LEC_MAX_KEY, view->count);
    view_close(view);
    return false;
}

static bool life_refuse(PyObject *value, const char *name)
{
    PyErr_Format(PyExc_ValueError, "%s must be a finite number of seconds above 0, or None, not %R", name, value);
    return false;
}

bool life_parse(const struct binding_state *state, PyObject *value, const char *name, struct life *life)
{
    life->is_default = !value || value == state->default_marker;
    life->ns = 0;
    if (life->is_default || value == Py_None) return true;
    double seconds = PyFloat_AsDouble(value);
    if (seconds == -1.0 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_OverflowError)) return life_refuse(value, name);
        if (PyErr_ExceptionMatches(PyExc_TypeError))
            PyErr_Format(PyExc_TypeError, "%s must be a number of seconds or None, not %.100s", name, Py_TYPE(value)->tp_name);
        return false;
    }
    if (!isfinite(seconds) || seconds <= 0) return life_refuse(value, name);
    double ns = ceil(seconds * NS_PER_SECOND);
    life->ns = ns < (double)LIFE_MAX_NS ? (uint64_t)ns : LIFE_MAX_NS;
    return true;
}

PyObject *config_tuple(const struct lec_config *config)
{
    return Py_BuildValue("(KKKII)", (unsigned long long)config->memory_bytes, (unsigned long long)config->ttl_ns,
                         (unsigned long long)config->tti_ns, config->max_entries, config->max_value_bytes);
}

bool int64_parse(PyObject *value, const char *name, int64_t *number)
{
    if (!PyLong_Check(value)) {
        PyErr_Format(PyExc_TypeError, "%s must be an int, not %.100s", name, Py_TYPE(value)->tp_name);
        return false;
    }
    int overflow;
    *number = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow) PyErr_Format(PyExc_OverflowError, "%s must fit into signed 64 bits, not %R", name, value);
    return !overflow && !(*number == -1 && PyErr_Occurred());
}

static bool unsigned_parse(PyObject *value, const char *name, const char *rule, uint64_t *number)
{
    if (!PyLong_Check(value)) {
        PyErr_Format(PyExc_TypeError, "%s must be an int, not %.100s", name, Py_TYPE(value)->tp_name);
        return false;
    }
    *number = PyLong_AsUnsignedLongLong(value);
    if (*number != UINT64_MAX || !PyErr_Occurred()) return true;
    if (PyErr_ExceptionMatches(PyExc_OverflowError)) PyErr_Format(PyExc_ValueError, "%s must be %s, not %R", name, rule, value);
    return false;
}

bool uint64_parse(PyObject *value, const char *name, uint64_t *number)
{
    return unsigned_parse(value, name, "one that this slab handed out", number);
}

bool numbers_parse(const char *function, PyObject *const *args, Py_ssize_t nargs, const char *const *names, int count, uint64_t *numbers)
{
    if (nargs != count) {
        PyErr_Format(PyExc_TypeError, "%s() takes %d arguments more, up to %s (%zd given)", function, count, names[count - 1], nargs);
        return false;
    }
    for (int at = 0; at < count; at++)
        if (!unsigned_parse(args[at], names[at], "0 to 2**64 - 1", &numbers[at])) return false;
    return true;
}

bool index_parse(PyObject *value, const char *name, uint32_t limit, uint32_t *index)
{
    int overflow;
    long number = PyLong_AsLongAndOverflow(value, &overflow);
    if (number == -1 && PyErr_Occurred()) return false;
    *index = (uint32_t)number;
    if (!overflow && number >= 0 && number < (long)limit) return true;
    PyErr_Format(PyExc_IndexError, "%s must be 0 to %u, not %R", name, limit - 1, value);
    return false;
}

static bool keyword_place(const char *function, PyObject *keyword, PyObject *value, const char *const *names, int count,
                          PyObject **values)
{
    for (int at = 0; at < count; at++) {
        if (PyUnicode_CompareWithASCIIString(keyword, names[at]) != 0) continue;
        if (values[at]) PyErr_Format(PyExc_TypeError, "%s() got multiple values for argument '%s'", function, names[at]);
        else values[at] = value;
        return !PyErr_Occurred();
    }
    PyErr_Format(PyExc_TypeError, "%s() got an unexpected keyword argument '%U'", function, keyword);
    return false;
}

bool arguments_parse(const char *function, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords,
                     const char *const *names, int count, int positional_max, int required, PyObject **values)
{
    if (nargs > positional_max) {
        PyErr_Format(PyExc_TypeError, "%s() takes at most %d positional arguments (%zd given)", function, positional_max, nargs);
        return false;
    }
    for (Py_ssize_t at = 0; at < nargs; at++) values[at] = args[at];
    if (!keywords && nargs >= required) return true;    /* the usual call */
    Py_ssize_t keyword_count = keywords ? PyTuple_GET_SIZE(keywords) : 0;
    for (Py_ssize_t at = 0; at < keyword_count; at++)
        if (!keyword_place(function, PyTuple_GET_ITEM(keywords, at), args[nargs + at], names, count, values)) return false;
    for (int at = 0; at < required; at++) {
        if (values[at]) continue;
        PyErr_Format(PyExc_TypeError, "%s() missing required argument '%s'", function, names[at]);
        return false;
    }
    return true;
}

PyObject *keys_fixed(PyObject *keys)
{
    if (PyTuple_CheckExact(keys)) return Py_NewRef(keys);
    if (PyObject_CheckBuffer(keys) || PyUnicode_Check(keys)) {
        PyErr_Format(PyExc_TypeError, "keys must be an iterable of bytes-like keys, not %.100s", Py_TYPE(keys)->tp_name);
        return NULL;
    }
    return PySequence_Tuple(keys);
}

PyObject *seconds_or_none(bool is_known, uint64_t ns)
{
    if (!is_known) Py_RETURN_NONE;
    return PyFloat_FromDouble((double)ns / NS_PER_SECOND);
}
