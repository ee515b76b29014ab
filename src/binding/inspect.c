/* Looking at the whole slab: totals, scan, check; and clear and reap, which work on the whole of it too. */
#include "binding.h"

#include <string.h>

#define REPORTS_MAX 1000u           /* a segment of garbage has more broken invariants than anybody reads */
#define REPORT_TEXT 160u

/* ---- totals ---- */

static int totals_put(PyObject *into, const char *name, uint64_t value)
{
    PyObject *number = PyLong_FromUnsignedLongLong(value);
    int failed = number ? PyDict_SetItemString(into, name, number) : -1;
    Py_XDECREF(number);
    return failed;
}

PyObject *mapping_totals(PyObject *self, PyObject *unused)
{
    (void)unused;
    static const char *const names[] = {
        [LEC_STAT_HITS] = "hits", [LEC_STAT_MISSES] = "misses", [LEC_STAT_SETS] = "sets", [LEC_STAT_DELETES] = "deletes",
        [LEC_STAT_REFUSALS] = "refusals", [LEC_STAT_BUSY] = "busy", [LEC_STAT_EVICTIONS] = "evictions",
        [LEC_STAT_EXPIRATIONS] = "expirations", [LEC_STAT_ADMISSION_REJECTIONS] = "admission_rejections",
        [LEC_STAT_RECOVERIES] = "recoveries", [LEC_STAT_READ_RETRIES] = "read_retries",
        [LEC_STAT_READS_LOCKED] = "reads_locked", [LEC_STAT_SHARDS_CLEARED] = "shards_cleared",
    };
    struct lec_totals totals = {0};
    lec_totals(&((MappingObject *)self)->handle, &totals);
    PyObject *result = PyDict_New();
    if (!result) return NULL;
    int failed = totals_put(result, "entries", totals.entries) | totals_put(result, "payload_bytes", totals.payload_bytes)
        | totals_put(result, "used_bytes", totals.used_bytes) | totals_put(result, "created_wall_ns", totals.created_wall_ns)
        | totals_put(result, "attached_processes", totals.attached_processes) | totals_put(result, "window_ppm", totals.window_ppm);
    for (size_t at = 0; at < sizeof names / sizeof *names; at++) failed |= totals_put(result, names[at], totals.stats[at]);
    if (failed) Py_CLEAR(result);
    return result;
}

/* processes() -> [(pid, is alive, hits, misses), ...] of the records that were ever used; pid 0: who had no record. */
PyObject *mapping_processes(PyObject *self, PyObject *unused)
{
    (void)unused;
    struct lec_handle *handle = &((MappingObject *)self)->handle;
    struct lec_process_totals totals;
    PyObject *list = PyList_New(0);
    for (uint32_t index = 0; list && lec_process_totals(handle, index, &totals); index++) {
        if (totals.owner == 0 && totals.hits == 0 && totals.misses == 0) continue;
        PyObject *row = Py_BuildValue("(KNKK)", (unsigned long long)(totals.owner >> 40), PyBool_FromLong(lec_identity_is_alive(totals.owner)),
                                      (unsigned long long)totals.hits, (unsigned long long)totals.misses);
        if (!row || PyList_Append(list, row) != 0) Py_CLEAR(list);
        Py_XDECREF(row);
    }
    return list;
}

/* samples(shard) -> (number of shards, entries and units of this one, threshold, number of its first event, number of the first since
 * it was last empty, marks, events). Marks and events as in samples.h, words of 64 bits. */
PyObject *mapping_samples(PyObject *self, PyObject *shard)
{
    struct lec_handle *handle = &((MappingObject *)self)->handle;
    const struct lec_geometry *geometry = &handle->geometry;
    uint32_t index;
    if (!index_parse(shard, "shard", geometry->shard_count, &index)) return NULL;
    struct lec_samples_copy copy = {0};
    PyObject *marks = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(geometry->mark_count * sizeof *copy.marks));
    PyObject *events = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(geometry->sample_count * sizeof *copy.events));
    if (marks && events) {
        copy.marks = (struct lec_sample_mark *)(void *)PyBytes_AS_STRING(marks);
        copy.events = (uint64_t *)(void *)PyBytes_AS_STRING(events);
        lec_samples_of(handle, index, &copy);
        /* _PyBytes_Resize() clears the pointer when it fails. */
        (void)(_PyBytes_Resize(&marks, (Py_ssize_t)(copy.mark_count * sizeof *copy.marks)) == 0 &&
               _PyBytes_Resize(&events, (Py_ssize_t)(copy.event_count * sizeof *copy.events)) == 0);
    }
    PyObject *result = marks && events ? Py_BuildValue("(IIIIKKOO)", geometry->shard_count, copy.entries, copy.units, copy.threshold,
                                                       (unsigned long long)copy.first, (unsigned long long)copy.begun, marks, events) : NULL;
    Py_XDECREF(marks);
    Py_XDECREF(events);
    return result;
}

Py_ssize_t slab_length(PyObject *self)
{
    bool is_gone;
    MappingObject *mapping = slab_enter_live((SlabObject *)self, &is_gone);
    if (!mapping) return is_gone ? 0 : -1;
    uint64_t entries = lec_entries(&mapping->handle);
    Py_DECREF(mapping);
    return (Py_ssize_t)entries;
}

/* ---- clear, reap ---- */

static enum lec_status clear_write(struct lec_handle *handle, void *context, uint64_t now_ns, uint64_t timeout_ns)
{
    (void)context;
    return lec_clear(handle, now_ns, timeout_ns);
}

PyObject *slab_clear(PyObject *self, PyObject *unused)
{
    (void)unused;
    enum lec_status status;
    if (!slab_write((SlabObject *)self, clear_write, NULL, true, &status)) return NULL;
    Py_RETURN_NONE;
}

static enum lec_status reap_write(struct lec_handle *handle, void *context, uint64_t now_ns, uint64_t timeout_ns)
{
    (void)context;
    lec_reap(handle, now_ns, timeout_ns);
    return LEC_OK;
}

PyObject *slab_reap(PyObject *self, PyObject *unused)
{
    (void)unused;
    enum lec_status status;
    if (!slab_write((SlabObject *)self, reap_write, NULL, true, &status)) return NULL;
    Py_RETURN_NONE;
}

/* ---- check ---- */

struct report { char text[REPORT_TEXT]; uint64_t shard, detail; };

struct reports { struct report *items; uint64_t count; };

/* lec_report_fn; runs without the GIL. */
static void report_take(void *context, const char *message, uint64_t shard, uint64_t detail)
{
    struct reports *reports = context;
    if (reports->count >= REPORTS_MAX) return;
    struct report *report = &reports->items[reports->count++];
    strncpy(report->text, message, REPORT_TEXT - 1);
    report->text[REPORT_TEXT - 1] = 0;
    report->shard = shard;
    report->detail = detail;
}

static PyObject *reports_list(const struct reports *reports)
{
    PyObject *list = PyList_New(0);
    for (uint64_t at = 0; list && at < reports->count; at++) {
        const struct report *report = &reports->items[at];
        PyObject *line = PyUnicode_FromFormat("shard %llu: %s (%llu)", (unsigned long long)report->shard, report->text,
                                              (unsigned long long)report->detail);
        if (!line || PyList_Append(list, line) != 0) Py_CLEAR(list);
        Py_XDECREF(line);
    }
    return list;
}

PyObject *slab_check(PyObject *self, PyObject *unused)
{
    (void)unused;
    SlabObject *slab = (SlabObject *)self;
    bool is_gone;
    MappingObject *mapping = slab_enter_live(slab, &is_gone);
    if (!mapping) return is_gone ? PyList_New(0) : NULL;
    struct reports reports = {.items = PyMem_Calloc(REPORTS_MAX, sizeof *reports.items)};
    PyObject *list = NULL;
    if (reports.items) {
        uint64_t now_ns = slab_now(slab), timeout_ns = slab->lock_timeout_ns;
        Py_BEGIN_ALLOW_THREADS
        lec_check(&mapping->handle, now_ns, timeout_ns, report_take, &reports);
        Py_END_ALLOW_THREADS
        list = reports_list(&reports);
    } else {
        PyErr_NoMemory();
    }
    PyMem_Free(reports.items);
    Py_DECREF(mapping);
    return list;
}

/* ---- scan ---- */

struct scan { PyObject *list; const struct bytes_view *prefix; uint64_t now_ns; };

/* lec_info_fn. After a failure the list is NULL and the exception set. */
static void scan_take(void *context, const struct lec_info *info)
{
    struct scan *scan = context;
    const struct bytes_view *prefix = scan->prefix;
    if (!scan->list || (Py_ssize_t)info->key_bytes < prefix->count) return;
    if (memcmp(info->key, prefix->bytes, (size_t)prefix->count) != 0) return;
    uint64_t now = scan->now_ns;
    uint64_t left = info->expires_at > now ? info->expires_at - now : 0;
    uint64_t idle = info->accessed_at < now ? now - info->accessed_at : 0;
    PyObject *row = Py_BuildValue("(y#INNI)", info->key, (Py_ssize_t)info->key_bytes, info->value_bytes,
                                  seconds_or_none(info->expires_at != UINT64_MAX, left),
                                  seconds_or_none(info->accessed_at != 0, idle), info->frequency);
    if (!row || PyList_Append(scan->list, row) != 0) Py_CLEAR(scan->list);
    Py_XDECREF(row);
}

static PyObject *scan_rows(SlabObject *slab, uint64_t cursor, uint32_t buckets, const struct bytes_view *prefix)
{
    bool is_gone;
    MappingObject *mapping = slab_enter_live(slab, &is_gone);
    if (!mapping) return is_gone ? Py_BuildValue("(K[])", (unsigned long long)UINT64_MAX) : NULL;
    struct scan scan = {.list = PyList_New(0), .prefix = prefix, .now_ns = slab_now(slab)};
    if (scan.list && lec_scan(&mapping->handle, &cursor, buckets, scan.now_ns, scan_take, &scan) != LEC_OK) cursor = UINT64_MAX;
    Py_DECREF(mapping);
    return scan.list ? Py_BuildValue("(KN)", (unsigned long long)cursor, scan.list) : NULL;
}

/* _scan_step(cursor, buckets, prefix) -> (next cursor, [(key, size, ttl_left, idle, frequency), ...]) */
PyObject *slab_scan_step(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t cursor, buckets;
    struct bytes_view prefix;
    if (nargs != 3) {
        PyErr_SetString(PyExc_TypeError, "_scan_step() takes 3 arguments");
        return NULL;
    }
    if (!uint64_parse(args[0], "cursor", &cursor) || !uint64_parse(args[1], "buckets", &buckets)) return NULL;
    if (!view_open(args[2], "prefix", &prefix)) return NULL;
    PyObject *result = scan_rows((SlabObject *)self, cursor, (uint32_t)buckets, &prefix);
    view_close(&prefix);
    return result;
}
