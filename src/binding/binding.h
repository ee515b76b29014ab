/* The binding: parse, one kernel call, convert. The only C that includes Python.h.
 *
 *   SlabBase (one per SharedSlab object) --> Mapping (one per process and segment) --> SharedMemory (Python)
 *
 * Lifetimes: an operation holds a reference to its Mapping from before the kernel call until after it, also while the
 * GIL is released. Closing only drops references; whoever drops the last one detaches and unmaps. So no thread ever
 * finds its segment unmapped under its feet, and close() never waits.
 */
#ifndef LEC_BINDING_H
#define LEC_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "kernel.h"

/* Copies of at least this many bytes are done with the GIL released: below, the two switches cost more. */
#define BINDING_COPY_OUTSIDE_BYTES (256u * 1024u)
/* How often one operation follows a retired segment to its successor before it answers as if there were none. */
#define BINDING_ATTEMPTS 3
#define BINDING_BOOT_ID_BYTES 16
#define PLAIN_DEPTH_LIMIT 1000      /* of are_plain(): it recurses */

/* Module state. The first two are owned from module start, the next three from configure() on. */
struct binding_state {
    PyTypeObject *mapping_type;
    PyTypeObject *slab_type;
    PyObject *default_marker;       /* the object that stands for "the configured ttl" */
    PyObject *closed_error;
    PyObject *busy_error;
    PyObject *name_reattach;        /* interned method name */
};

/* One mapping of one segment in this process. */
typedef struct {
    PyObject_HEAD
    struct binding_state *state;    /* borrowed: the type keeps the module, the module keeps this */
    PyObject *owner;                /* the SharedMemory object; its close() is called at the end */
    Py_buffer buffer;               /* of owner.buf; buffer.obj is NULL when not held */
    bool is_attached;               /* the handle is valid */
    _Atomic uint64_t forks;         /* binding_forks when this process's identity was last established */
    struct lec_handle handle;
} MappingObject;

/* The C part of a SharedSlab. */
typedef struct {
    PyObject_HEAD
    MappingObject *mapping;         /* NULL before the first bind and after close() */
    struct binding_state *state;    /* borrowed from the first mapping; NULL before the first bind */
    uint64_t lock_timeout_ns;
    int64_t clock_offset_ns;        /* added to the clock; for tests of expiry */
} SlabObject;

/* Times a fork returned in this process or an ancestor: a mapping with an older count has its parent's identity. */
extern _Atomic uint64_t binding_forks;

/* A borrowed view of a bytes-like argument: bytes as they are, anything else through the buffer protocol. */
struct bytes_view {
    const char *bytes;
    Py_ssize_t count;
    Py_buffer buffer;               /* buffer.obj is NULL when not held */
};

/* ttl= and tti= as given: the configured one, or ns (0 = none). */
struct life {
    bool is_default;
    uint64_t ns;
};

/* ---- convert.c: all return false (or NULL) with an exception set ---- */
bool view_open_buffer(PyObject *object, const char *what, struct bytes_view *view);
static inline bool view_open(PyObject *object, const char *what, struct bytes_view *view)
{
    if (!PyBytes_CheckExact(object)) return view_open_buffer(object, what, view);
    view->buffer.obj = NULL;
    view->bytes = PyBytes_AS_STRING(object);
    view->count = PyBytes_GET_SIZE(object);
    return true;
}
static inline void view_close(struct bytes_view *view)
{
    if (view->buffer.obj) PyBuffer_Release(&view->buffer);
}
/* Closes the view: its length is none of a key. */
bool key_refuse(struct bytes_view *view);
static inline bool key_open(PyObject *object, struct bytes_view *view)
{
    if (!view_open(object, "key", view)) return false;
    return view->count >= 1 && view->count <= (Py_ssize_t)LEC_MAX_KEY ? true : key_refuse(view);
}
/* NULL means DEFAULT. */
bool life_parse(const struct binding_state *state, PyObject *value, const char *name, struct life *life);
/* A float of seconds, or None. */
PyObject *seconds_or_none(bool is_known, uint64_t ns);
/* A new reference to an iterable's keys as a tuple, which no other thread changes. */
PyObject *keys_fixed(PyObject *keys);
/* (memory_bytes, ttl_ns, tti_ns, max_entries, max_value_bytes) */
PyObject *config_tuple(const struct lec_config *config);
bool int64_parse(PyObject *value, const char *name, int64_t *number);
bool uint64_parse(PyObject *value, const char *name, uint64_t *number);
/* Exactly `count` ints of 0 to 2**64 - 1 into numbers[]; `function` takes the named arguments, positional only. */
bool numbers_parse(const char *function, PyObject *const *args, Py_ssize_t nargs, const char *const *names, int count, uint64_t *numbers);
/* An int below `limit`; else IndexError. */
bool index_parse(PyObject *value, const char *name, uint32_t limit, uint32_t *index);
/* Puts the `count` named arguments into values[]: the positional ones first, then those by keyword. What was not given
 * stays as it was. names[positional_max..] are keyword-only, the first `required` must be there. */
bool arguments_parse(const char *function, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords,
                     const char *const *names, int count, int positional_max, int required, PyObject **values);

/* ---- mapping.c ---- */
extern PyType_Spec mapping_spec;
PyObject *mapping_attach(struct binding_state *state, PyObject *owner, const uint8_t boot_id[BINDING_BOOT_ID_BYTES]);
/* After a fork: this process gets an identity of its own. */
void mapping_reidentify(MappingObject *mapping);

/* ---- slab.c ---- */
extern PyType_Spec slab_spec;
/* slab_enter() of a closed slab: NULL with SlabClosedError set. */
MappingObject *slab_refuse_closed(const SlabObject *slab);
/* A new reference to the mapping, identified as this process's; NULL with SlabClosedError set. */
static inline MappingObject *slab_enter(SlabObject *slab)
{
    MappingObject *mapping;
#ifdef Py_GIL_DISABLED
    Py_BEGIN_CRITICAL_SECTION(slab);
    mapping = (MappingObject *)Py_XNewRef(slab->mapping);
    Py_END_CRITICAL_SECTION();
#else
    mapping = (MappingObject *)Py_XNewRef(slab->mapping);
#endif
    if (!mapping) return slab_refuse_closed(slab);
    if (atomic_load_explicit(&mapping->forks, memory_order_relaxed) != atomic_load_explicit(&binding_forks, memory_order_relaxed))
        mapping_reidentify(mapping);
    return mapping;
}
/* The same of the live segment; NULL with *is_gone set when it was retired and there is no successor. */
MappingObject *slab_enter_live(SlabObject *slab, bool *is_gone);
static inline uint64_t slab_now(const SlabObject *slab)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return (uint64_t)(now.tv_sec * INT64_C(1000000000) + now.tv_nsec + slab->clock_offset_ns);
}
/* The clock that time.monotonic_ns() reads, without the offset of the tests. */
static inline uint64_t clock_precise(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}
/* The segment was retired: 1 = attached to the successor, 0 = there is none, -1 = exception. */
int slab_reattach(SlabObject *slab);
/* One attempt of a mutation; `context` is the operation's. */
typedef enum lec_status (*write_fn)(struct lec_handle *handle, void *context, uint64_t now_ns, uint64_t timeout_ns);
/* Runs a mutation: first without waiting, then with the GIL released (at once if is_long); follows a retired segment.
 * False with an exception set (closed), else *status is final; LEC_RETIRED then means: no successor. */
bool slab_try_write(SlabObject *slab, write_fn write, void *context, bool is_long, enum lec_status *status);
/* The same; where the lock is not to be had, False with SlabBusyError set. */
bool slab_write(SlabObject *slab, write_fn write, void *context, bool is_long, enum lec_status *status);

/* ---- methods, by file ---- */
extern PyMethodDef slab_methods[];
PyObject *slab_get(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords);
PyObject *slab_gets(PyObject *self, PyObject *key);
PyObject *slab_get_or_token(PyObject *self, PyObject *key);
PyObject *slab_get_many(PyObject *self, PyObject *keys);
PyObject *slab_pop(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords);
PyObject *slab_ttl(PyObject *self, PyObject *key);
PyObject *slab_scan_entries(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
int slab_contains(PyObject *self, PyObject *key);

PyObject *slab_set(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords);
PyObject *slab_add(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords);
PyObject *slab_cas(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords);
PyObject *slab_fill(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords);
PyObject *slab_fill_fenced(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords);
PyObject *slab_fence(PyObject *self, PyObject *key);
PyObject *slab_token(PyObject *self, PyObject *key);
PyObject *slab_set_many(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords);
PyObject *slab_incr(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords);
PyObject *slab_touch(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords);
PyObject *slab_delete(PyObject *self, PyObject *key);
PyObject *slab_delete_many(PyObject *self, PyObject *keys);
/* Deletes the entry if it is the one of this version (0: whatever is there). */
bool slab_delete_version(SlabObject *slab, const struct bytes_view *key, uint64_t version, enum lec_status *status);

Py_ssize_t slab_length(PyObject *self);
PyObject *slab_clear(PyObject *self, PyObject *unused);
PyObject *slab_reap(PyObject *self, PyObject *unused);
PyObject *slab_check(PyObject *self, PyObject *unused);
PyObject *slab_count(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *slab_record(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *slab_observe(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *slab_counter_sums(PyObject *self, PyObject *unused);
PyObject *slab_histogram_sums(PyObject *self, PyObject *unused);
PyObject *slab_word(PyObject *self, PyObject *index);
PyObject *slab_word_set(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *slab_word_exchange(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *slab_word_raise(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *slab_tag(PyObject *self, PyObject *hash);
PyObject *slab_tags(PyObject *self, PyObject *unused);
PyObject *slab_word_add(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *slab_tag_raise(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *slab_identity(PyObject *self, PyObject *unused);
PyObject *slab_is_alive(PyObject *self, PyObject *identity);

PyObject *slab_flight_join(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *slab_flight_renew(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *slab_flight_advance(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *slab_flight_end(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *slab_flight_state(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *slab_flight_wait(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *slab_bell(PyObject *self, PyObject *unused);
PyObject *slab_bell_wait(PyObject *self, PyObject *const *args, Py_ssize_t nargs);

PyObject *native_are_plain(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
PyObject *native_are_plain_dicts(PyObject *module, PyObject *const *args, Py_ssize_t nargs);

PyObject *slab_scan_step(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *mapping_totals(PyObject *self, PyObject *unused);
PyObject *mapping_processes(PyObject *self, PyObject *unused);
PyObject *mapping_samples(PyObject *self, PyObject *shard);
PyObject *native_replay(PyObject *module, PyObject *args);

#endif
