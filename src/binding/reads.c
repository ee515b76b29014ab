/* get and its relatives. No lock; a hit is one kernel call that copies into a fresh bytes object. */
#include "binding.h"

#define NS_PER_SECOND 1e9
#define POP_ATTEMPTS 1000   /* each lost one is another caller's success, so this is for show */

/* Where the kernel puts a value. */
struct sink {
    PyObject *bytes;            /* owned; NULL until the kernel asks */
    PyThreadState *thread;      /* set while the GIL is released for a long copy */
};

static inline void sink_regain(struct sink *sink)
{
    if (!sink->thread) return;
    PyEval_RestoreThread(sink->thread);
    sink->thread = NULL;
}

/* lec_buffer_fn. The kernel may ask again with another size after a lost race. */
static void *sink_buffer(void *context, uint64_t bytes)
{
    struct sink *sink = context;
    sink_regain(sink);
    Py_CLEAR(sink->bytes);
    sink->bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)bytes);
    if (!sink->bytes) return NULL;
    char *to = PyBytes_AS_STRING(sink->bytes);
    if (bytes >= BINDING_COPY_OUTSIDE_BYTES) sink->thread = PyEval_SaveThread();
    return to;
}

/* One kernel read, with the key's hash where it is known (else NULL). 1 = hit (sink->bytes is the value), 0 = miss,
 * -1 = exception, 2 = retired. The caller counts. */
static inline int read_once(MappingObject *mapping, const struct bytes_view *key, const uint64_t *hash, uint64_t now_ns,
                            struct sink *sink, struct lec_read *read)
{
    struct lec_handle *handle = &mapping->handle;
    uint32_t key_bytes = (uint32_t)key->count;
    *sink = (struct sink){NULL, NULL};
    enum lec_status status = hash ? lec_get_hashed(handle, *hash, key->bytes, key_bytes, now_ns, sink_buffer, sink, read)
                                  : lec_get(handle, key->bytes, key_bytes, now_ns, sink_buffer, sink, read);
    sink_regain(sink);
    if (status == LEC_OK) return 1;
    Py_CLEAR(sink->bytes);
    if (status == LEC_RETIRED) return 2;
    return status == LEC_NO_BUFFER ? -1 : 0;
}

/* As read_once and counted, following a retired segment to its successor; without one it is a miss. */
static int read_value(SlabObject *slab, const struct bytes_view *key, struct sink *sink, struct lec_read *read)
{
    for (int attempt = 0; attempt < BINDING_ATTEMPTS; attempt++) {
        MappingObject *mapping = slab_enter(slab);
        if (!mapping) return -1;
        int outcome = read_once(mapping, key, NULL, slab_now(slab), sink, read);
        lec_count_read(&mapping->handle, outcome == 1, outcome == 0);
        Py_DECREF(mapping);
        if (outcome != 2) return outcome;
        int is_attached = slab_reattach(slab);
        if (is_attached <= 0) return is_attached;
    }
    return 0;
}

static PyObject *get_key(SlabObject *slab, PyObject *key_object, PyObject *fallback)
{
    struct bytes_view key;
    struct sink sink;
    struct lec_read read = {0};
    if (!key_open(key_object, &key)) return NULL;
    int outcome = read_value(slab, &key, &sink, &read);
    view_close(&key);
    if (outcome == 1) return sink.bytes;
    return outcome < 0 ? NULL : Py_NewRef(fallback);
}

PyObject *slab_get(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    if (nargs == 1 && !keywords) return get_key((SlabObject *)self, args[0], Py_None);
    static const char *const names[] = {"key", "default"};
    PyObject *given[] = {NULL, NULL};
    if (!arguments_parse("get", args, nargs, keywords, names, 2, 2, 1, given)) return NULL;
    return get_key((SlabObject *)self, given[0], given[1] ? given[1] : Py_None);
}

PyObject *slab_gets(PyObject *self, PyObject *key_object)
{
    struct bytes_view key;
    struct sink sink;
    struct lec_read read = {0};
    if (!key_open(key_object, &key)) return NULL;
    int outcome = read_value((SlabObject *)self, &key, &sink, &read);
    view_close(&key);
    if (outcome == 1) return Py_BuildValue("(NK)", sink.bytes, (unsigned long long)read.version);
    if (outcome == 0) Py_RETURN_NONE;
    return NULL;
}

PyObject *slab_get_or_token(PyObject *self, PyObject *key_object)
{
    struct bytes_view key;
    struct sink sink;
    struct lec_read read = {.wants_token = true};
    if (!key_open(key_object, &key)) return NULL;
    int outcome = read_value((SlabObject *)self, &key, &sink, &read);
    view_close(&key);
    if (outcome < 0) return NULL;
    return Py_BuildValue("(NK)", outcome == 1 ? sink.bytes : Py_NewRef(Py_None), (unsigned long long)read.token);
}

/* ---- many ---- */

static int many_put(PyObject *found, PyObject *key_object, const struct bytes_view *key, PyObject *value)
{
    if (PyBytes_CheckExact(key_object)) return PyDict_SetItem(found, key_object, value);
    PyObject *copy = PyBytes_FromStringAndSize(key->bytes, key->count);
    int failed = copy ? PyDict_SetItem(found, copy, value) : -1;
    Py_XDECREF(copy);
    return failed;
}

/* As read_once for one of many keys; a hit is put into `found`. */
static int many_one(MappingObject *mapping, PyObject *key_object, const uint64_t *hash, uint64_t now_ns, PyObject *found)
{
    struct bytes_view key;
    struct sink sink;
    struct lec_read read = {0};
    if (!key_open(key_object, &key)) return -1;
    int outcome = read_once(mapping, &key, hash, now_ns, &sink, &read);
    if (outcome == 1 && many_put(found, key_object, &key, sink.bytes) != 0) outcome = -1;
    Py_XDECREF(sink.bytes);
    view_close(&key);
    return outcome;
}

#define HINTED_KEYS 8               /* whose cache misses are waited for together */

/* Asks for the lines that the next keys will touch; returns how many keys' hashes are known. Other than bytes objects are simply
 * not hinted. */
static int many_hint(MappingObject *mapping, PyObject *keys, Py_ssize_t at, uint64_t hashes[HINTED_KEYS])
{
    int count = 0;
    for (; count < HINTED_KEYS && at + count < PyTuple_GET_SIZE(keys); count++) {
        PyObject *key = PyTuple_GET_ITEM(keys, at + count);
        if (!PyBytes_CheckExact(key)) break;
        hashes[count] = lec_hint_home(&mapping->handle, PyBytes_AS_STRING(key), (uint32_t)PyBytes_GET_SIZE(key));
    }
    for (int hinted = 0; hinted < count; hinted++) lec_hint_entry(&mapping->handle, hashes[hinted]);
    return count;
}

/* Reads keys[at..] on one mapping: how far it came; stops at a retired segment (*outcome 2) or an exception (-1). */
static Py_ssize_t many_some(SlabObject *slab, PyObject *keys, Py_ssize_t at, PyObject *found, int *outcome)
{
    MappingObject *mapping = slab_enter(slab);
    *outcome = mapping ? 0 : -1;
    if (!mapping) return at;
    uint64_t now_ns = slab_now(slab);
    uint32_t counts[2] = {0, 0};    /* misses, hits */
    uint64_t hashes[HINTED_KEYS];
    int hashed = 0;
    for (Py_ssize_t first = at; at < PyTuple_GET_SIZE(keys); at++) {
        int number = (int)((at - first) % HINTED_KEYS);
        if (number == 0) hashed = many_hint(mapping, keys, at, hashes);
        *outcome = many_one(mapping, PyTuple_GET_ITEM(keys, at), number < hashed ? &hashes[number] : NULL, now_ns, found);
        if (*outcome < 0 || *outcome == 2) break;
        counts[*outcome]++;
    }
    lec_count_read(&mapping->handle, counts[1], counts[0]);
    Py_DECREF(mapping);
    return at;
}

static bool many_all(SlabObject *slab, PyObject *keys, PyObject *found)
{
    Py_ssize_t at = 0;
    for (int attempt = 0; attempt < BINDING_ATTEMPTS; attempt++) {
        int outcome;
        at = many_some(slab, keys, at, found, &outcome);
        if (outcome < 0) return false;
        if (outcome != 2) return true;
        int is_attached = slab_reattach(slab);
        if (is_attached <= 0) return is_attached == 0;
    }
    return true;
}

/* An empty dict with room for so many: growing it by steps is half of what filling it costs. */
static PyObject *dict_with_room(Py_ssize_t count)
{
#if PY_VERSION_HEX < 0x030E0000
    return _PyDict_NewPresized(count);      /* private; in the public headers of 3.10 to 3.13 */
#else
    (void)count;
    return PyDict_New();
#endif
}

PyObject *slab_get_many(PyObject *self, PyObject *keys)
{
    PyObject *fixed = keys_fixed(keys);
    if (!fixed) return NULL;
    PyObject *found = dict_with_room(PyTuple_GET_SIZE(fixed));
    if (found && !many_all((SlabObject *)self, fixed, found)) Py_CLEAR(found);
    Py_DECREF(fixed);
    return found;
}

/* ---- read and delete ---- */

/* 1 = popped, 0 = there was nothing, -1 = exception, 2 = another one changed the entry in between: once more. */
static int pop_once(SlabObject *slab, const struct bytes_view *key, PyObject **value)
{
    struct sink sink;
    struct lec_read read = {0};
    enum lec_status status;
    int outcome = read_value(slab, key, &sink, &read);
    if (outcome != 1) return outcome;
    if (slab_delete_version(slab, key, read.version, &status)) {
        *value = sink.bytes;
        if (status == LEC_OK) return 1;
        outcome = status == LEC_MISMATCH || status == LEC_ABSENT ? 2 : 0;
    } else {
        outcome = -1;
    }
    Py_DECREF(sink.bytes);
    return outcome;
}

static PyObject *pop_key(SlabObject *slab, const struct bytes_view *key, PyObject *fallback)
{
    PyObject *value = NULL;
    for (int attempt = 0; attempt < POP_ATTEMPTS; attempt++) {
        int outcome = pop_once(slab, key, &value);
        if (outcome < 0) return NULL;
        if (outcome == 1) return value;
        if (outcome == 0) return Py_NewRef(fallback);
    }
    PyErr_SetString(slab->state->busy_error, "the entry kept changing; nothing was deleted");
    return NULL;
}

PyObject *slab_pop(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    static const char *const names[] = {"key", "default"};
    PyObject *given[] = {NULL, NULL};
    struct bytes_view key;
    if (!arguments_parse("pop", args, nargs, keywords, names, 2, 2, 1, given) || !key_open(given[0], &key)) return NULL;
    PyObject *value = pop_key((SlabObject *)self, &key, given[1] ? given[1] : Py_None);
    view_close(&key);
    return value;
}

/* ---- all entries, with their values ---- */

#define SCAN_SLOTS_MAX 65536u       /* looked at in one call, so that an empty slab does not hold the GIL for long */

/* (key, value, ttl left, tti); takes the value. */
static PyObject *entry_row(const struct lec_info *info, PyObject *value, uint64_t now_ns)
{
    uint64_t left = info->expires_at > now_ns ? info->expires_at - now_ns : 0;
    return Py_BuildValue("(y#NNN)", info->key, (Py_ssize_t)info->key_bytes, value, seconds_or_none(info->expires_at != UINT64_MAX, left),
                         seconds_or_none(info->tti_ms != 0, info->tti_ms * UINT64_C(1000000)));
}

/* The entry at the cursor, if one is there. False: an exception. *is_gone: the segment was retired. */
static bool entry_take(MappingObject *mapping, uint64_t *cursor, uint64_t now_ns, PyObject *rows, uint64_t *bytes, bool *is_gone)
{
    struct sink sink = {NULL, NULL};
    struct lec_info info;
    enum lec_status status = lec_scan_entry(&mapping->handle, cursor, now_ns, sink_buffer, &sink, &info);
    sink_regain(&sink);
    *is_gone = status == LEC_RETIRED;
    if (status != LEC_OK) {
        Py_CLEAR(sink.bytes);
        return status != LEC_NO_BUFFER;
    }
    *bytes += info.key_bytes + (uint64_t)PyBytes_GET_SIZE(sink.bytes);
    PyObject *row = entry_row(&info, sink.bytes, now_ns);
    int failed = row ? PyList_Append(rows, row) : -1;
    Py_XDECREF(row);
    return failed == 0;
}

static bool entries_take(SlabObject *slab, MappingObject *mapping, uint64_t *cursor, uint64_t limit, PyObject *rows)
{
    uint64_t bytes = 0, now_ns = slab_now(slab);
    bool is_gone = false;
    for (uint32_t slots = 0; slots < SCAN_SLOTS_MAX && bytes < limit && *cursor != UINT64_MAX && !is_gone; slots++)
        if (!entry_take(mapping, cursor, now_ns, rows, &bytes, &is_gone)) return false;
    if (is_gone) *cursor = UINT64_MAX;
    return true;
}

/* _scan_entries(cursor, limit) -> (next cursor, [(key, value, ttl_left, tti), ...]), at least `limit` bytes of them if there
 * are; leaves no trace in the slab. The cursor is not _scan_step()'s. */
PyObject *slab_scan_entries(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    static const char *const names[] = {"cursor", "limit"};
    uint64_t numbers[2];
    bool is_gone;
    if (!numbers_parse("_scan_entries", args, nargs, names, 2, numbers)) return NULL;
    MappingObject *mapping = slab_enter_live((SlabObject *)self, &is_gone);
    if (!mapping) return is_gone ? Py_BuildValue("(K[])", (unsigned long long)UINT64_MAX) : NULL;
    PyObject *rows = PyList_New(0);
    if (rows && !entries_take((SlabObject *)self, mapping, &numbers[0], numbers[1], rows)) Py_CLEAR(rows);
    Py_DECREF(mapping);
    return rows ? Py_BuildValue("(KN)", (unsigned long long)numbers[0], rows) : NULL;
}

/* ---- only looking ---- */

/* 1 = there, 0 = not, -1 = exception; counts neither hit nor miss. */
static int look(SlabObject *slab, PyObject *key_object, struct lec_read *read, uint64_t *now_ns)
{
    struct bytes_view key;
    enum lec_status status = LEC_RETIRED;
    if (!key_open(key_object, &key)) return -1;
    int is_attached = 1;
    for (int attempt = 0; attempt < BINDING_ATTEMPTS && status == LEC_RETIRED && is_attached > 0; attempt++) {
        MappingObject *mapping = slab_enter(slab);
        *now_ns = slab_now(slab);
        if (mapping) status = lec_get(&mapping->handle, key.bytes, (uint32_t)key.count, *now_ns, NULL, NULL, read);
        is_attached = !mapping ? -1 : status == LEC_RETIRED ? slab_reattach(slab) : 1;
        Py_XDECREF(mapping);
    }
    view_close(&key);
    return is_attached < 0 ? -1 : status == LEC_OK;
}

int slab_contains(PyObject *self, PyObject *key)
{
    struct lec_read read = {0};
    uint64_t now_ns;
    return look((SlabObject *)self, key, &read, &now_ns);
}

PyObject *slab_ttl(PyObject *self, PyObject *key)
{
    struct lec_read read = {0};
    uint64_t now_ns;
    int outcome = look((SlabObject *)self, key, &read, &now_ns);
    if (outcome < 0) return NULL;
    if (outcome == 0 || read.expires_at == UINT64_MAX) Py_RETURN_NONE;
    return PyFloat_FromDouble((double)(read.expires_at - now_ns) / NS_PER_SECOND);
}
