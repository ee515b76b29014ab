/* What all processes count and share beside the entries: counters, histograms, words, tags, identities. Where the
 * segment was retired and has no successor, nothing is done and the answer is that of an empty one. */
#include "binding.h"

#define RECORD_PAIRS_MAX 16
#define MANAGER_WORDS LEC_WORD_TOKEN    /* those that may be stored to; the kernel's own follow */
_Static_assert(LEC_WORD_TOKEN + 2 == LEC_WORDS && LEC_WORD_BELL + 1 == LEC_WORDS, "the last two words are the kernel's");

/* ---- counters, histograms: in this process's record, one thread at a time (the GIL) or atomically ---- */

/* _count(index, amount=1) */
PyObject *slab_count(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    static const char *const names[] = {"amount"};
    uint32_t index;
    uint64_t amount = 1;
    bool is_gone;
    if (nargs < 1 || nargs > 2) return PyErr_Format(PyExc_TypeError, "_count() takes 1 or 2 arguments, not %zd", nargs);
    if (!index_parse(args[0], "index", LEC_COUNTERS, &index)) return NULL;
    if (nargs == 2 && !numbers_parse("_count", args + 1, 1, names, 1, &amount)) return NULL;
    MappingObject *mapping = slab_enter_live((SlabObject *)self, &is_gone);
    if (!mapping && !is_gone) return NULL;
    if (mapping) lec_count(&mapping->handle, index, amount);
    Py_XDECREF(mapping);
    Py_RETURN_NONE;
}

struct record {
    uint32_t counter;
    bool is_timed;
    uint32_t histogram;             /* valid if is_timed */
    uint64_t elapsed_ns;
    Py_ssize_t pairs;
    struct { uint32_t counter; uint64_t amount; } further[RECORD_PAIRS_MAX];
};

static bool record_parse(PyObject *const *args, Py_ssize_t nargs, struct record *record)
{
    static const char *const names[] = {"amount"};
    int64_t start_ns;
    int overflow;
    record->pairs = (nargs - 3) / 2;
    if (nargs < 3 || nargs % 2 == 0 || record->pairs > RECORD_PAIRS_MAX) {
        PyErr_Format(PyExc_TypeError, "_record() takes counter, histogram, start_ns and up to %d pairs, not %zd arguments", RECORD_PAIRS_MAX, nargs);
        return false;
    }
    if (!index_parse(args[0], "counter", LEC_COUNTERS, &record->counter)) return false;
    record->is_timed = PyLong_AsLongAndOverflow(args[1], &overflow) != -1 || overflow;
    if (PyErr_Occurred()) return false;
    if (record->is_timed && !index_parse(args[1], "histogram", LEC_HISTOGRAMS, &record->histogram)) return false;
    if (!int64_parse(args[2], "start_ns", &start_ns)) return false;
    uint64_t now_ns = record->is_timed ? clock_precise() : 0;
    record->elapsed_ns = start_ns > 0 && (uint64_t)start_ns < now_ns ? now_ns - (uint64_t)start_ns : 0;
    for (Py_ssize_t at = 0; at < record->pairs; at++) {
        if (!index_parse(args[3 + 2 * at], "index", LEC_COUNTERS, &record->further[at].counter)) return false;
        if (!numbers_parse("_record", &args[4 + 2 * at], 1, names, 1, &record->further[at].amount)) return false;
    }
    return true;
}

/* _record(counter, histogram, start_ns, *pairs), histogram -1 = none: all of one event in one call; it is on the path of every hit. */
PyObject *slab_record(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    struct record record;
    bool is_gone;
    if (!record_parse(args, nargs, &record)) return NULL;
    MappingObject *mapping = slab_enter_live((SlabObject *)self, &is_gone);
    if (!mapping && !is_gone) return NULL;
    if (mapping) {
        lec_count(&mapping->handle, record.counter, 1);
        if (record.is_timed) lec_observe(&mapping->handle, record.histogram, record.elapsed_ns);
        for (Py_ssize_t at = 0; at < record.pairs; at++) lec_count(&mapping->handle, record.further[at].counter, record.further[at].amount);
        Py_DECREF(mapping);
    }
    Py_RETURN_NONE;
}

/* _observe(histogram, elapsed_ns) */
PyObject *slab_observe(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    static const char *const names[] = {"histogram", "elapsed_ns"};
    uint64_t numbers[2];
    uint32_t histogram;
    bool is_gone;
    if (!numbers_parse("_observe", args, nargs, names, 2, numbers) || !index_parse(args[0], names[0], LEC_HISTOGRAMS, &histogram)) return NULL;
    MappingObject *mapping = slab_enter_live((SlabObject *)self, &is_gone);
    if (!mapping && !is_gone) return NULL;
    if (mapping) lec_observe(&mapping->handle, histogram, numbers[1]);
    Py_XDECREF(mapping);
    Py_RETURN_NONE;
}

static PyObject *tuple_of(const uint64_t *numbers, uint32_t count)
{
    PyObject *tuple = PyTuple_New(count);
    for (uint32_t at = 0; tuple && at < count; at++) {
        PyObject *number = PyLong_FromUnsignedLongLong(numbers[at]);
        if (number) PyTuple_SET_ITEM(tuple, at, number);
        else Py_CLEAR(tuple);
    }
    return tuple;
}

/* _counter_sums() -> one sum per counter */
PyObject *slab_counter_sums(PyObject *self, PyObject *unused)
{
    (void)unused;
    uint64_t sums[LEC_COUNTERS] = {0};
    bool is_gone;
    MappingObject *mapping = slab_enter_live((SlabObject *)self, &is_gone);
    if (!mapping && !is_gone) return NULL;
    if (mapping) lec_counter_sums(&mapping->handle, sums);
    Py_XDECREF(mapping);
    return tuple_of(sums, LEC_COUNTERS);
}

/* _histogram_sums() -> per histogram: 31 counts, not cumulative, and the sum in ns */
PyObject *slab_histogram_sums(PyObject *self, PyObject *unused)
{
    (void)unused;
    uint64_t sums[LEC_HISTOGRAMS][LEC_HISTOGRAM_BUCKETS] = {{0}};
    bool is_gone;
    MappingObject *mapping = slab_enter_live((SlabObject *)self, &is_gone);
    if (!mapping && !is_gone) return NULL;
    if (mapping) lec_histogram_sums(&mapping->handle, sums);
    Py_XDECREF(mapping);
    PyObject *all = PyTuple_New(LEC_HISTOGRAMS);
    for (uint32_t at = 0; all && at < LEC_HISTOGRAMS; at++) {
        PyObject *one = tuple_of(sums[at], LEC_HISTOGRAM_BUCKETS);
        if (one) PyTuple_SET_ITEM(all, at, one);
        else Py_CLEAR(all);
    }
    return all;
}

/* ---- words, tags ---- */

/* _word(index); the kernel's own may be looked at. */
PyObject *slab_word(PyObject *self, PyObject *index_object)
{
    uint32_t index;
    bool is_gone;
    if (!index_parse(index_object, "index", LEC_WORDS, &index)) return NULL;
    MappingObject *mapping = slab_enter_live((SlabObject *)self, &is_gone);
    if (!mapping && !is_gone) return NULL;
    uint64_t value = mapping ? atomic_load(lec_word(&mapping->handle, index)) : 0;
    Py_XDECREF(mapping);
    return PyLong_FromUnsignedLongLong(value);
}

/* What is done to a word, with the numbers that follow the index; whether it was stored. */
typedef bool (*word_fn)(_Atomic uint64_t *word, const uint64_t *numbers);

static bool word_set(_Atomic uint64_t *word, const uint64_t *numbers)
{
    atomic_store(word, numbers[0]);
    return true;
}

static bool word_exchange(_Atomic uint64_t *word, const uint64_t *numbers)
{
    uint64_t expected = numbers[0];
    return atomic_compare_exchange_strong(word, &expected, numbers[1]);
}

static bool word_raise(_Atomic uint64_t *word, const uint64_t *numbers)
{
    uint64_t present = atomic_load(word);
    while (present < numbers[0])
        if (atomic_compare_exchange_weak(word, &present, numbers[0])) return true;
    return false;
}

/* 1 = stored, 0 = not, -1 = exception */
static int word_change(PyObject *self, const char *function, PyObject *const *args, Py_ssize_t nargs, const char *const *names,
                       int count, word_fn change)
{
    uint64_t numbers[3];
    uint32_t index;
    bool is_gone;
    if (!numbers_parse(function, args, nargs, names, count, numbers) || !index_parse(args[0], names[0], MANAGER_WORDS, &index)) return -1;
    MappingObject *mapping = slab_enter_live((SlabObject *)self, &is_gone);
    if (!mapping) return is_gone ? 0 : -1;
    bool is_stored = change(lec_word(&mapping->handle, index), numbers + 1);
    Py_DECREF(mapping);
    return is_stored;
}

PyObject *slab_word_set(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    static const char *const names[] = {"index", "value"};
    if (word_change(self, "_word_set", args, nargs, names, 2, word_set) < 0) return NULL;
    Py_RETURN_NONE;
}

PyObject *slab_word_exchange(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    static const char *const names[] = {"index", "expected", "value"};
    int outcome = word_change(self, "_word_exchange", args, nargs, names, 3, word_exchange);
    return outcome < 0 ? NULL : PyBool_FromLong(outcome);
}

PyObject *slab_word_raise(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    static const char *const names[] = {"index", "value"};
    int outcome = word_change(self, "_word_raise", args, nargs, names, 2, word_raise);
    return outcome < 0 ? NULL : PyBool_FromLong(outcome);
}

/* _word_add(index, amount) -> the sum, modulo 2**64 */
PyObject *slab_word_add(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    static const char *const names[] = {"index", "amount"};
    uint64_t numbers[2], sum = 0;
    uint32_t index;
    bool is_gone;
    if (!numbers_parse("_word_add", args, nargs, names, 2, numbers) || !index_parse(args[0], names[0], MANAGER_WORDS, &index)) return NULL;
    MappingObject *mapping = slab_enter_live((SlabObject *)self, &is_gone);
    if (!mapping && !is_gone) return NULL;
    if (mapping) sum = atomic_fetch_add(lec_word(&mapping->handle, index), numbers[1]) + numbers[1];
    Py_XDECREF(mapping);
    return PyLong_FromUnsignedLongLong(sum);
}

/* _tag(tag_hash) */
PyObject *slab_tag(PyObject *self, PyObject *hash_object)
{
    static const char *const names[] = {"tag_hash"};
    uint64_t hash, value = 0;
    bool is_gone;
    if (!numbers_parse("_tag", &hash_object, 1, names, 1, &hash)) return NULL;
    MappingObject *mapping = slab_enter_live((SlabObject *)self, &is_gone);
    if (!mapping && !is_gone) return NULL;
    if (mapping) value = atomic_load(lec_tag(&mapping->handle, hash));
    Py_XDECREF(mapping);
    return PyLong_FromUnsignedLongLong(value);
}

/* _tags() -> (how many generations the table has, {index: generation} of those that are not 0) */
PyObject *slab_tags(PyObject *self, PyObject *unused)
{
    (void)unused;
    bool is_gone;
    MappingObject *mapping = slab_enter_live((SlabObject *)self, &is_gone);
    if (!mapping && !is_gone) return NULL;
    uint32_t count = mapping ? lec_tag_count(&mapping->handle) : 0;
    PyObject *raised = PyDict_New();
    for (uint32_t index = 0; raised && index < count; index++) {
        uint64_t generation = atomic_load(lec_tag(&mapping->handle, index));
        if (generation == 0) continue;
        PyObject *key = PyLong_FromUnsignedLong(index), *value = PyLong_FromUnsignedLongLong(generation);
        if (!key || !value || PyDict_SetItem(raised, key, value) != 0) Py_CLEAR(raised);
        Py_XDECREF(key);
        Py_XDECREF(value);
    }
    Py_XDECREF(mapping);
    return raised ? Py_BuildValue("(IN)", count, raised) : NULL;
}

/* _tag_raise(tag_hash, value) -> whether it was below */
PyObject *slab_tag_raise(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    static const char *const names[] = {"tag_hash", "value"};
    uint64_t numbers[2];
    bool is_gone;
    if (!numbers_parse("_tag_raise", args, nargs, names, 2, numbers)) return NULL;
    MappingObject *mapping = slab_enter_live((SlabObject *)self, &is_gone);
    if (!mapping && !is_gone) return NULL;
    bool is_raised = mapping && word_raise(lec_tag(&mapping->handle, numbers[0]), numbers + 1);
    Py_XDECREF(mapping);
    return PyBool_FromLong(is_raised);
}

/* ---- identities ---- */

PyObject *slab_identity(PyObject *self, PyObject *unused)
{
    (void)unused;
    bool is_gone;
    MappingObject *mapping = slab_enter_live((SlabObject *)self, &is_gone);
    if (!mapping && !is_gone) return NULL;
    uint64_t identity = mapping ? mapping->handle.identity : 0;
    Py_XDECREF(mapping);
    return PyLong_FromUnsignedLongLong(identity);
}

PyObject *slab_is_alive(PyObject *self, PyObject *identity_object)
{
    (void)self;
    static const char *const names[] = {"identity"};
    uint64_t identity;
    if (!numbers_parse("_is_alive", &identity_object, 1, names, 1, &identity)) return NULL;
    return PyBool_FromLong(lec_identity_is_alive(identity));
}
