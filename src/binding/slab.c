/* SlabBase: what every operation does before and after its kernel call, and the type's table of methods. */
#include "binding.h"

#define NS_PER_SECOND INT64_C(1000000000)
#define LOCK_TIMEOUT_NS UINT64_C(1000000000)

MappingObject *slab_refuse_closed(const SlabObject *slab)
{
    PyErr_SetString(slab->state ? slab->state->closed_error : PyExc_RuntimeError, "the slab is closed");
    return NULL;
}

int slab_reattach(SlabObject *slab)
{
    PyObject *answer = PyObject_CallMethodNoArgs((PyObject *)slab, slab->state->name_reattach);
    if (!answer) return -1;
    int is_attached = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    return is_attached;
}

MappingObject *slab_enter_live(SlabObject *slab, bool *is_gone)
{
    *is_gone = false;
    for (int attempt = 0; attempt < BINDING_ATTEMPTS; attempt++) {
        MappingObject *mapping = slab_enter(slab);
        if (!mapping || atomic_load(&mapping->handle.header->state) >> 32 == 0) return mapping;
        Py_DECREF(mapping);
        int is_attached = slab_reattach(slab);
        if (is_attached < 0) return NULL;
        if (is_attached == 0) break;
    }
    *is_gone = true;
    return NULL;
}

static enum lec_status write_once(SlabObject *slab, MappingObject *mapping, write_fn write, void *context, bool is_long)
{
    uint64_t now_ns = slab_now(slab), timeout_ns = slab->lock_timeout_ns;
    if (!is_long) {
        enum lec_status status = write(&mapping->handle, context, now_ns, 0);
        if (status != LEC_WOULD_BLOCK) return status;
    }
    enum lec_status status;
    Py_BEGIN_ALLOW_THREADS
    status = write(&mapping->handle, context, now_ns, timeout_ns);
    Py_END_ALLOW_THREADS
    return status;
}

static void raise_busy(SlabObject *slab)
{
    PyErr_Format(slab->state->busy_error, "no lock within %llu ms: its holder is stopped; nothing was changed",
                 (unsigned long long)(slab->lock_timeout_ns / 1000000));
}

bool slab_try_write(SlabObject *slab, write_fn write, void *context, bool is_long, enum lec_status *status)
{
    for (int attempt = 0; attempt < BINDING_ATTEMPTS; attempt++) {
        MappingObject *mapping = slab_enter(slab);
        if (!mapping) return false;
        *status = write_once(slab, mapping, write, context, is_long);
        Py_DECREF(mapping);
        if (*status != LEC_RETIRED) return true;
        int is_attached = slab_reattach(slab);
        if (is_attached <= 0) return is_attached == 0;
    }
    return true;
}

bool slab_write(SlabObject *slab, write_fn write, void *context, bool is_long, enum lec_status *status)
{
    if (!slab_try_write(slab, write, context, is_long, status)) return false;
    if (*status != LEC_BUSY && *status != LEC_WOULD_BLOCK) return true;
    raise_busy(slab);
    return false;
}

/* ---- the object ---- */

static PyObject *slab_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    (void)args, (void)keywords;
    SlabObject *slab = (SlabObject *)type->tp_alloc(type, 0);
    if (slab) slab->lock_timeout_ns = LOCK_TIMEOUT_NS;
    return (PyObject *)slab;
}

/* Swaps the mapping in; the old one goes when the last operation under way on it has ended. */
static void slab_swap(SlabObject *slab, MappingObject *mapping)
{
    MappingObject *old;
#ifdef Py_GIL_DISABLED
    Py_BEGIN_CRITICAL_SECTION(slab);
#endif
    old = slab->mapping;
    slab->mapping = (MappingObject *)Py_XNewRef((PyObject *)mapping);
#ifdef Py_GIL_DISABLED
    Py_END_CRITICAL_SECTION();
#endif
    Py_XDECREF(old);
}

static PyObject *slab_bind(PyObject *self, PyTypeObject *type, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    SlabObject *slab = (SlabObject *)self;
    slab->state = PyType_GetModuleState(type);
    if (nargs != 1 || keywords || (args[0] != Py_None && !Py_IS_TYPE(args[0], slab->state->mapping_type))) {
        PyErr_SetString(PyExc_TypeError, "_bind() takes a Mapping or None");
        return NULL;
    }
    slab_swap(slab, args[0] == Py_None ? NULL : (MappingObject *)args[0]);
    Py_RETURN_NONE;
}

static int slab_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((SlabObject *)self)->mapping);
    return 0;
}

static int slab_clear_references(PyObject *self)
{
    Py_CLEAR(((SlabObject *)self)->mapping);
    return 0;
}

static void slab_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    slab_clear_references(self);
    type->tp_free(self);
    Py_DECREF(type);
}

/* Test hooks: the clock of this object runs ahead, and how long it waits for a lock. */
static PyObject *slab_advance_clock(PyObject *self, PyObject *seconds)
{
    double number = PyFloat_AsDouble(seconds);
    if (number == -1.0 && PyErr_Occurred()) return NULL;
    ((SlabObject *)self)->clock_offset_ns += (int64_t)(number * (double)NS_PER_SECOND);
    Py_RETURN_NONE;
}

static PyObject *slab_set_lock_timeout(PyObject *self, PyObject *seconds)
{
    double number = PyFloat_AsDouble(seconds);
    if (number == -1.0 && PyErr_Occurred()) return NULL;
    ((SlabObject *)self)->lock_timeout_ns = (uint64_t)(number * (double)NS_PER_SECOND);
    Py_RETURN_NONE;
}

static PyObject *slab_get_mapping(PyObject *self, void *unused)
{
    (void)unused;
    return (PyObject *)slab_enter((SlabObject *)self);
}

static PyObject *slab_get_closed(PyObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(!((SlabObject *)self)->mapping);
}

#define FAST(function) ((PyCFunction)(void (*)(void))(function))
#define FAST_KEYWORDS (METH_FASTCALL | METH_KEYWORDS)

PyMethodDef slab_methods[] = {
    {"get", FAST(slab_get), FAST_KEYWORDS, PyDoc_STR(
        "get($self, /, key, default=None)\n--\n\n"
        "Return the value of the key, or the default.\n\n"
        "Args:\n    key: 1 to 1024 bytes, bytes-like.\n    default: what a miss returns.\n\n"
        "Returns:\n    bytes, always a fresh copy; or the default. Never raises for contention.\n\n"
        "Raises:\n    TypeError: the key is not bytes-like.\n    ValueError: its length is not 1 to 1024.\n"
        "    SlabClosedError: the slab is closed.")},
    {"gets", slab_gets, METH_O, PyDoc_STR(
        "gets($self, key, /)\n--\n\nReturn (value, version) for cas(), or None. Raises as get() does.")},
    {"get_or_token", slab_get_or_token, METH_O, PyDoc_STR(
        "get_or_token($self, key, /)\n--\n\n"
        "Return (value or None, token).\n\nThe token is for fill(): it is good until the key is set, deleted or cleared. "
        "Raises as get() does.")},
    {"get_many", slab_get_many, METH_O, PyDoc_STR(
        "get_many($self, keys, /)\n--\n\n"
        "Return a dict of the hits among an iterable of keys, the keys as bytes. Raises as get() does.")},
    {"pop", FAST(slab_pop), FAST_KEYWORDS, PyDoc_STR(
        "pop($self, /, key, default=None)\n--\n\n"
        "Delete the key and return the value that was deleted, or the default. One caller gets each value.\n\n"
        "Raises as get() and delete() do.")},
    {"ttl", slab_ttl, METH_O, PyDoc_STR(
        "ttl($self, key, /)\n--\n\n"
        "Return the seconds the entry has left to live; None when it has no expiry, and when there is none.")},
    {"set", FAST(slab_set), FAST_KEYWORDS, PyDoc_STR(
        "set($self, /, key, value, *, ttl=DEFAULT, tti=DEFAULT)\n--\n\n"
        "Store a value.\n\n"
        "Args:\n    key: 1 to 1024 bytes, bytes-like.\n    value: bytes-like, up to max_value_bytes.\n"
        "    ttl: seconds to live, above 0; None = until evicted; DEFAULT = the slab's.\n"
        "    tti: seconds to live unread, likewise.\n\n"
        "Returns:\n    True when stored; False when it is too large or no memory could be had: the old value is gone then.\n\n"
        "Raises:\n    TypeError, ValueError: as the arguments say.\n"
        "    SlabBusyError: the holder of a lock is stopped; nothing was changed.\n    SlabClosedError: the slab is closed.")},
    {"add", FAST(slab_add), FAST_KEYWORDS, PyDoc_STR(
        "add($self, /, key, value, *, ttl=DEFAULT, tti=DEFAULT)\n--\n\n"
        "Store a value only if the key is absent; atomic across processes. Returns whether it was stored. Raises as set() does.\n\n"
        "Not a lock: entries may be evicted.")},
    {"cas", FAST(slab_cas), FAST_KEYWORDS, PyDoc_STR(
        "cas($self, /, key, value, version, *, ttl=DEFAULT, tti=DEFAULT)\n--\n\n"
        "Store a value only if the entry is still the one that gets() returned this version of; atomic across processes. "
        "Returns whether it was stored. Raises as set() does.")},
    {"fill", FAST(slab_fill), FAST_KEYWORDS, PyDoc_STR(
        "fill($self, /, key, value, token, *, ttl=DEFAULT, tti=DEFAULT)\n--\n\n"
        "Store a value that was computed after get_or_token() missed. Returns False, with nothing stored, if the key was set, "
        "deleted or cleared since the token was handed out. Raises as set() does.")},
    {"set_many", FAST(slab_set_many), FAST_KEYWORDS, PyDoc_STR(
        "set_many($self, /, mapping, *, ttl=DEFAULT, tti=DEFAULT)\n--\n\n"
        "Store each value of a mapping as set() does. Returns the list of the keys that were refused. Raises as set() does; "
        "what came before in the mapping is stored then.")},
    {"incr", FAST(slab_incr), FAST_KEYWORDS, PyDoc_STR(
        "incr($self, /, key, delta=1)\n--\n\n"
        "Add to a counter, atomically across processes, and return the sum. The value is ASCII decimal of signed 64 bits; "
        "the expiry stays.\n\n"
        "Raises:\n    KeyError: there is no such key.\n    ValueError: the value is no such number.\n"
        "    OverflowError: the sum, or delta, leaves signed 64 bits.\n    As set() otherwise.")},
    {"touch", FAST(slab_touch), FAST_KEYWORDS, PyDoc_STR(
        "touch($self, /, key, ttl=DEFAULT)\n--\n\n"
        "Give the entry a new life of ttl seconds from now (None = no expiry). Returns whether there is such an entry. "
        "Raises as set() does.")},
    {"delete", slab_delete, METH_O, PyDoc_STR(
        "delete($self, key, /)\n--\n\nDelete the key. Returns whether it was there. Raises as set() does.")},
    {"delete_many", slab_delete_many, METH_O, PyDoc_STR(
        "delete_many($self, keys, /)\n--\n\nDelete an iterable of keys. Returns how many were there. Raises as set() does.")},
    {"clear", slab_clear, METH_NOARGS, PyDoc_STR(
        "clear($self, /)\n--\n\nDelete everything: when it returns, every key misses in every process. Raises SlabClosedError.")},
    {"reap", slab_reap, METH_NOARGS, PyDoc_STR(
        "reap($self, /)\n--\n\n"
        "Free at once what dead processes had reserved for values they were filling; writers do the same in time. "
        "Raises SlabClosedError.")},
    {"check", slab_check, METH_NOARGS, PyDoc_STR(
        "check($self, /)\n--\n\n"
        "Return every broken invariant of the whole segment as a sentence; [] when it is sound. Raises SlabClosedError.")},
    {"_count", FAST(slab_count), METH_FASTCALL, NULL},
    {"_record", FAST(slab_record), METH_FASTCALL, NULL},
    {"_observe", FAST(slab_observe), METH_FASTCALL, NULL},
    {"_counter_sums", slab_counter_sums, METH_NOARGS, NULL},
    {"_histogram_sums", slab_histogram_sums, METH_NOARGS, NULL},
    {"_word", slab_word, METH_O, NULL},
    {"_word_set", FAST(slab_word_set), METH_FASTCALL, NULL},
    {"_word_exchange", FAST(slab_word_exchange), METH_FASTCALL, NULL},
    {"_word_raise", FAST(slab_word_raise), METH_FASTCALL, NULL},
    {"_tag", slab_tag, METH_O, NULL},
    {"_tags", slab_tags, METH_NOARGS, NULL},
    {"_word_add", FAST(slab_word_add), METH_FASTCALL, NULL},
    {"_tag_raise", FAST(slab_tag_raise), METH_FASTCALL, NULL},
    {"_fence", slab_fence, METH_O, NULL},
    {"_token", slab_token, METH_O, NULL},
    {"_fill_fenced", FAST(slab_fill_fenced), FAST_KEYWORDS, NULL},
    {"_identity", slab_identity, METH_NOARGS, NULL},
    {"_is_alive", slab_is_alive, METH_O, NULL},
    {"_flight_join", FAST(slab_flight_join), METH_FASTCALL, NULL},
    {"_flight_renew", FAST(slab_flight_renew), METH_FASTCALL, NULL},
    {"_flight_advance", FAST(slab_flight_advance), METH_FASTCALL, NULL},
    {"_flight_end", FAST(slab_flight_end), METH_FASTCALL, NULL},
    {"_flight_state", FAST(slab_flight_state), METH_FASTCALL, NULL},
    {"_flight_wait", FAST(slab_flight_wait), METH_FASTCALL, NULL},
    {"_bell", slab_bell, METH_NOARGS, NULL},
    {"_bell_wait", FAST(slab_bell_wait), METH_FASTCALL, NULL},
    {"_scan_step", FAST(slab_scan_step), METH_FASTCALL, NULL},
    {"_scan_entries", FAST(slab_scan_entries), METH_FASTCALL, NULL},
    {"_bind", FAST(slab_bind), METH_METHOD | METH_FASTCALL | METH_KEYWORDS, NULL},
    {"_advance_clock", slab_advance_clock, METH_O, NULL},
    {"_set_lock_timeout", slab_set_lock_timeout, METH_O, NULL},
    {0},
};

static PyGetSetDef slab_getset[] = {
    {"_mapping", slab_get_mapping, NULL, NULL, NULL},
    {"closed", slab_get_closed, NULL, PyDoc_STR("Whether close() was called."), NULL},
    {0},
};

static PyType_Slot slab_slots[] = {
    {Py_tp_new, slab_new},
    {Py_tp_dealloc, slab_dealloc},
    {Py_tp_traverse, slab_traverse},
    {Py_tp_clear, slab_clear_references},
    {Py_tp_methods, slab_methods},
    {Py_tp_getset, slab_getset},
    {Py_sq_contains, slab_contains},
    {Py_sq_length, slab_length},
    {Py_tp_doc, "The operations of a shared slab; SharedSlab adds its life."},
    {0, NULL},
};

PyType_Spec slab_spec = {
    .name = "llm_edge_cache._native.SlabBase",
    .basicsize = sizeof(SlabObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slab_slots,
};
