/* set and its relatives: gather what is to be stored, one kernel call, translate the status. */
#include "binding.h"

/* A store under way: the kernel's description, and what depends on the segment that it meets. */
struct store_call {
    struct lec_store store;
    struct life ttl, tti;
};

static enum lec_status store_write(struct lec_handle *handle, void *context, uint64_t now_ns, uint64_t timeout_ns)
{
    struct store_call *call = context;
    call->store.ttl_ns = call->ttl.is_default ? handle->config.ttl_ns : call->ttl.ns;
    call->store.tti_ns = call->tti.is_default ? handle->config.tti_ns : call->tti.ns;
    return lec_store(handle, &call->store, now_ns, timeout_ns);
}

/* 1 = stored, 0 = not, -1 = exception */
static int store_run(SlabObject *slab, struct store_call *call, const struct bytes_view *key, const struct bytes_view *value)
{
    enum lec_status status;
    call->store.key = key->bytes;
    call->store.key_bytes = (uint32_t)key->count;
    call->store.value = value->bytes;
    call->store.value_bytes = (uint64_t)value->count;
    if (!slab_write(slab, store_write, call, call->store.value_bytes > LEC_INLINE_BYTES, &status)) return -1;
    return status == LEC_OK;
}

static int store_objects(SlabObject *slab, struct store_call *call, PyObject *key_object, PyObject *value_object)
{
    struct bytes_view key, value;
    if (!key_open(key_object, &key)) return -1;
    int outcome = -1;
    if (view_open(value_object, "value", &value)) {
        outcome = store_run(slab, call, &key, &value);
        view_close(&value);
    }
    view_close(&key);
    return outcome;
}

static bool lives_parse(SlabObject *slab, PyObject *ttl, PyObject *tti, struct store_call *call)
{
    if (!slab->state) {
        PyErr_SetString(PyExc_RuntimeError, "the slab was never attached");
        return false;
    }
    return life_parse(slab->state, ttl, "ttl", &call->ttl) && life_parse(slab->state, tti, "tti", &call->tti);
}

/* A method of the form name(key, value, *, ttl, tti), or name(key, value, <expected>, *, ttl, tti). */
struct store_signature {
    const char *function;
    enum lec_mode mode;
    int positional;                 /* 2, or 3 with <expected> */
    const char *names[5];
};

static PyObject *store_method(PyObject *self, const struct store_signature *signature, PyObject *const *args, Py_ssize_t nargs,
                              PyObject *keywords)
{
    int positional = signature->positional;
    PyObject *given[5] = {NULL};
    struct store_call call;
    if (!arguments_parse(signature->function, args, nargs, keywords, signature->names, positional + 2, positional, positional, given))
        return NULL;
    if (!lives_parse((SlabObject *)self, given[positional], given[positional + 1], &call)) return NULL;
    call.store.mode = signature->mode;
    call.store.expected = 0;
    if (positional == 3 && !uint64_parse(given[2], signature->names[2], &call.store.expected)) return NULL;
    int outcome = store_objects((SlabObject *)self, &call, given[0], given[1]);
    return outcome < 0 ? NULL : PyBool_FromLong(outcome);
}

/* set(key, value), the usual call: there is nothing to parse. */
static PyObject *set_plain(SlabObject *slab, PyObject *key, PyObject *value)
{
    struct store_call call;
    call.store.mode = LEC_SET;
    call.store.expected = 0;
    call.ttl.is_default = call.tti.is_default = true;
    int outcome = store_objects(slab, &call, key, value);
    return outcome < 0 ? NULL : PyBool_FromLong(outcome);
}

PyObject *slab_set(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    if (nargs == 2 && !keywords && ((SlabObject *)self)->state) return set_plain((SlabObject *)self, args[0], args[1]);
    static const struct store_signature signature = {"set", LEC_SET, 2, {"key", "value", "ttl", "tti"}};
    return store_method(self, &signature, args, nargs, keywords);
}

PyObject *slab_add(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    static const struct store_signature signature = {"add", LEC_ADD, 2, {"key", "value", "ttl", "tti"}};
    return store_method(self, &signature, args, nargs, keywords);
}

PyObject *slab_cas(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    static const struct store_signature signature = {"cas", LEC_CAS, 3, {"key", "value", "version", "ttl", "tti"}};
    return store_method(self, &signature, args, nargs, keywords);
}

PyObject *slab_fill(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    static const struct store_signature signature = {"fill", LEC_FILL, 3, {"key", "value", "token", "ttl", "tti"}};
    return store_method(self, &signature, args, nargs, keywords);
}

PyObject *slab_fill_fenced(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    static const struct store_signature signature = {"_fill_fenced", LEC_FILL_FENCED, 3, {"key", "value", "fence", "ttl", "tti"}};
    return store_method(self, &signature, args, nargs, keywords);
}

static PyObject *key_number(PyObject *self, PyObject *key_object, uint64_t (*number_of)(struct lec_handle *, const void *, uint32_t))
{
    struct bytes_view key;
    bool is_gone;
    if (!key_open(key_object, &key)) return NULL;
    MappingObject *mapping = slab_enter_live((SlabObject *)self, &is_gone);
    uint64_t number = mapping ? number_of(&mapping->handle, key.bytes, (uint32_t)key.count) : 0;
    view_close(&key);
    if (!mapping && !is_gone) return NULL;
    Py_XDECREF(mapping);
    return PyLong_FromUnsignedLongLong(number);
}

/* _fence(key) and _token(key): for _fill_fenced() and fill(), of a key that need not be looked up. */
PyObject *slab_fence(PyObject *self, PyObject *key) { return key_number(self, key, lec_fence_now); }
PyObject *slab_token(PyObject *self, PyObject *key) { return key_number(self, key, lec_token_now); }

/* ---- many ---- */

/* Stores each pair of `items`, a list of ours; appends the keys that were refused. */
static bool set_items(SlabObject *slab, struct store_call *call, PyObject *items, PyObject *refused)
{
    for (Py_ssize_t at = 0; at < PyList_GET_SIZE(items); at++) {
        PyObject *pair = PyList_GET_ITEM(items, at);
        if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2) {
            PyErr_SetString(PyExc_TypeError, "the mapping's items() must be pairs");
            return false;
        }
        int outcome = store_objects(slab, call, PyTuple_GET_ITEM(pair, 0), PyTuple_GET_ITEM(pair, 1));
        if (outcome < 0 || (outcome == 0 && PyList_Append(refused, PyTuple_GET_ITEM(pair, 0)) != 0)) return false;
    }
    return true;
}

PyObject *slab_set_many(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    static const char *const names[] = {"mapping", "ttl", "tti"};
    PyObject *given[3] = {NULL};
    struct store_call call = {.store = {.mode = LEC_SET}};
    if (!arguments_parse("set_many", args, nargs, keywords, names, 3, 1, 1, given)) return NULL;
    if (!lives_parse((SlabObject *)self, given[1], given[2], &call)) return NULL;
    if (!PyDict_Check(given[0]) && !PyObject_HasAttrString(given[0], "items"))
        return PyErr_Format(PyExc_TypeError, "mapping must have items(), and %.100s has none", Py_TYPE(given[0])->tp_name);
    PyObject *items = PyMapping_Items(given[0]);
    if (!items) return NULL;
    PyObject *refused = PyList_New(0);
    if (refused && !set_items((SlabObject *)self, &call, items, refused)) Py_CLEAR(refused);
    Py_DECREF(items);
    return refused;
}

/* ---- delete ---- */

struct delete_call { const struct bytes_view *key; uint64_t expected_version; };

static enum lec_status delete_write(struct lec_handle *handle, void *context, uint64_t now_ns, uint64_t timeout_ns)
{
    const struct delete_call *call = context;
    return lec_delete(handle, call->key->bytes, (uint32_t)call->key->count, call->expected_version, now_ns, timeout_ns);
}

bool slab_delete_version(SlabObject *slab, const struct bytes_view *key, uint64_t version, enum lec_status *status)
{
    struct delete_call call = {.key = key, .expected_version = version};
    return slab_write(slab, delete_write, &call, false, status);
}

/* 1 = deleted, 0 = was not there, -1 = exception */
static int delete_key(SlabObject *slab, PyObject *key_object)
{
    struct bytes_view key;
    enum lec_status status;
    if (!key_open(key_object, &key)) return -1;
    bool is_done = slab_delete_version(slab, &key, 0, &status);
    view_close(&key);
    return is_done ? status == LEC_OK : -1;
}

PyObject *slab_delete(PyObject *self, PyObject *key)
{
    int outcome = delete_key((SlabObject *)self, key);
    return outcome < 0 ? NULL : PyBool_FromLong(outcome);
}

PyObject *slab_delete_many(PyObject *self, PyObject *keys)
{
    PyObject *fixed = keys_fixed(keys);
    if (!fixed) return NULL;
    Py_ssize_t deleted = 0;
    int outcome = 0;
    for (Py_ssize_t at = 0; at < PyTuple_GET_SIZE(fixed) && outcome >= 0; at++) {
        outcome = delete_key((SlabObject *)self, PyTuple_GET_ITEM(fixed, at));
        deleted += outcome > 0;
    }
    Py_DECREF(fixed);
    return outcome < 0 ? NULL : PyLong_FromSsize_t(deleted);
}

/* ---- incr, touch ---- */

struct incr_call { const struct bytes_view *key; int64_t delta, result; };

static enum lec_status incr_write(struct lec_handle *handle, void *context, uint64_t now_ns, uint64_t timeout_ns)
{
    struct incr_call *call = context;
    return lec_incr(handle, call->key->bytes, (uint32_t)call->key->count, call->delta, &call->result, now_ns, timeout_ns);
}

static PyObject *incr_answer(enum lec_status status, PyObject *key, const struct incr_call *call)
{
    switch (status) {
    case LEC_OK: return PyLong_FromLongLong(call->result);
    case LEC_NOT_A_NUMBER: return PyErr_Format(PyExc_ValueError, "the value of %R is no decimal number of signed 64 bits", key);
    case LEC_OVERFLOW:
        return PyErr_Format(PyExc_OverflowError, "adding %lld to the value of %R leaves signed 64 bits", (long long)call->delta, key);
    case LEC_REFUSED: return PyErr_Format(PyExc_MemoryError, "no memory in the slab for the sum of %R", key);
    default: PyErr_SetObject(PyExc_KeyError, key); return NULL;
    }
}

PyObject *slab_incr(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    static const char *const names[] = {"key", "delta"};
    PyObject *given[2] = {NULL};
    struct bytes_view key;
    struct incr_call call = {.key = &key, .delta = 1};
    enum lec_status status;
    if (!arguments_parse("incr", args, nargs, keywords, names, 2, 2, 1, given)) return NULL;
    if (given[1] && !int64_parse(given[1], "delta", &call.delta)) return NULL;
    if (!key_open(given[0], &key)) return NULL;
    bool is_done = slab_write((SlabObject *)self, incr_write, &call, false, &status);
    view_close(&key);
    return is_done ? incr_answer(status, given[0], &call) : NULL;
}

struct touch_call { const struct bytes_view *key; struct life ttl; };

static enum lec_status touch_write(struct lec_handle *handle, void *context, uint64_t now_ns, uint64_t timeout_ns)
{
    const struct touch_call *call = context;
    uint64_t ttl_ns = call->ttl.is_default ? handle->config.ttl_ns : call->ttl.ns;
    return lec_touch(handle, call->key->bytes, (uint32_t)call->key->count, ttl_ns, now_ns, timeout_ns);
}

PyObject *slab_touch(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    static const char *const names[] = {"key", "ttl"};
    PyObject *given[2] = {NULL};
    struct bytes_view key;
    struct store_call lives;
    enum lec_status status;
    if (!arguments_parse("touch", args, nargs, keywords, names, 2, 2, 1, given)) return NULL;
    if (!lives_parse((SlabObject *)self, given[1], NULL, &lives) || !key_open(given[0], &key)) return NULL;
    struct touch_call call = {.key = &key, .ttl = lives.ttl};
    bool is_done = slab_write((SlabObject *)self, touch_write, &call, false, &status);
    view_close(&key);
    return is_done ? PyBool_FromLong(status == LEC_OK) : NULL;
}
