/* Flights: who computes a missing key, and waiting for who does. What cannot be had (no segment, no lock in time) is
 * an answer here, not an exception: the caller computes for himself. */
#include "binding.h"

#define SLICE_NS UINT64_C(100000000)    /* how long one wait goes without a look at signals and at close() */
#define GONE_NS UINT64_C(20000000)      /* a loop around _bell_wait() must not spin where there is no segment */

static uint64_t least(uint64_t left, uint64_t right) { return left < right ? left : right; }

/* index, token and what follows them; a ticket of another segment fits no flight. */
static bool ticket_parse(const char *function, PyObject *const *args, Py_ssize_t nargs, const char *const *names, int count,
                         struct lec_ticket *ticket, uint64_t *numbers)
{
    if (!numbers_parse(function, args, nargs, names, count, numbers)) return false;
    *ticket = (struct lec_ticket){numbers[1], numbers[0] < UINT32_MAX ? (uint32_t)numbers[0] : UINT32_MAX};
    return true;
}

static bool progress_is_legal(uint64_t progress)
{
    if (progress > INT64_MAX) PyErr_SetString(PyExc_ValueError, "progress must be 0 to 2**63 - 1");
    return progress <= INT64_MAX;
}

/* ---- join ---- */

struct join_call { const struct bytes_view *key; uint64_t lease_ns; enum lec_role role; struct lec_ticket ticket; };

static enum lec_status join_write(struct lec_handle *handle, void *context, uint64_t now_ns, uint64_t timeout_ns)
{
    struct join_call *call = context;
    return lec_flight_join(handle, call->key->bytes, (uint32_t)call->key->count, call->lease_ns, now_ns, timeout_ns, &call->role, &call->ticket);
}

/* _flight_join(key, lease_ns) -> (role, index, token) */
PyObject *slab_flight_join(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    static const char *const names[] = {"lease_ns"};
    struct bytes_view key;
    struct join_call call = {.key = &key};
    enum lec_status status;
    if (nargs != 2) return PyErr_Format(PyExc_TypeError, "_flight_join() takes 2 arguments, not %zd", nargs);
    if (!numbers_parse("_flight_join", args + 1, 1, names, 1, &call.lease_ns) || !key_open(args[0], &key)) return NULL;
    bool is_done = slab_try_write((SlabObject *)self, join_write, &call, false, &status);
    view_close(&key);
    if (!is_done) return NULL;
    return Py_BuildValue("(iIK)", (int)call.role, call.ticket.index, (unsigned long long)call.ticket.token);
}

/* ---- the leader's ---- */

struct own_call { struct lec_ticket ticket; uint64_t number; };

static enum lec_status renew_write(struct lec_handle *handle, void *context, uint64_t now_ns, uint64_t timeout_ns)
{
    const struct own_call *call = context;
    return lec_flight_renew(handle, call->ticket, call->number, now_ns, timeout_ns);
}

static enum lec_status advance_write(struct lec_handle *handle, void *context, uint64_t now_ns, uint64_t timeout_ns)
{
    const struct own_call *call = context;
    return lec_flight_advance(handle, call->ticket, call->number, now_ns, timeout_ns);
}

static enum lec_status end_write(struct lec_handle *handle, void *context, uint64_t now_ns, uint64_t timeout_ns)
{
    const struct own_call *call = context;
    return lec_flight_end(handle, call->ticket, now_ns, timeout_ns);
}

static PyObject *own_answer(PyObject *self, write_fn write, struct own_call *call)
{
    enum lec_status status;
    if (!slab_try_write((SlabObject *)self, write, call, false, &status)) return NULL;
    return PyBool_FromLong(status == LEC_OK);
}

/* _flight_renew(index, token, lease_ns) -> whether it is still the caller's; as the two below: False, too, without the lock */
PyObject *slab_flight_renew(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    static const char *const names[] = {"index", "token", "lease_ns"};
    struct own_call call;
    uint64_t numbers[3];
    if (!ticket_parse("_flight_renew", args, nargs, names, 3, &call.ticket, numbers)) return NULL;
    call.number = numbers[2];
    return own_answer(self, renew_write, &call);
}

/* _flight_advance(index, token, progress) */
PyObject *slab_flight_advance(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    static const char *const names[] = {"index", "token", "progress"};
    struct own_call call;
    uint64_t numbers[3];
    if (!ticket_parse("_flight_advance", args, nargs, names, 3, &call.ticket, numbers) || !progress_is_legal(numbers[2])) return NULL;
    call.number = numbers[2];
    return own_answer(self, advance_write, &call);
}

/* _flight_end(index, token) */
PyObject *slab_flight_end(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    static const char *const names[] = {"index", "token"};
    struct own_call call = {.number = 0};
    uint64_t numbers[2];
    if (!ticket_parse("_flight_end", args, nargs, names, 2, &call.ticket, numbers)) return NULL;
    return own_answer(self, end_write, &call);
}

/* ---- the waiters' ---- */

/* One look or sleep at the ticket's flight. False with an exception set. */
static bool wait_once(SlabObject *slab, struct lec_ticket ticket, int64_t progress, uint64_t timeout_ns, int64_t *state)
{
    bool is_gone;
    MappingObject *mapping = slab_enter_live(slab, &is_gone);
    *state = LEC_FLIGHT_OVER;
    if (!mapping) return is_gone;
    uint64_t now_ns = slab_now(slab);
    Py_BEGIN_ALLOW_THREADS
    *state = lec_flight_wait(&mapping->handle, ticket, progress, now_ns, timeout_ns);
    Py_END_ALLOW_THREADS
    Py_DECREF(mapping);
    return true;
}

/* _flight_state(index, token) -> progress, or -1 when that flight is no more */
PyObject *slab_flight_state(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    static const char *const names[] = {"index", "token"};
    struct lec_ticket ticket;
    uint64_t numbers[2];
    bool is_gone;
    if (!ticket_parse("_flight_state", args, nargs, names, 2, &ticket, numbers)) return NULL;
    MappingObject *mapping = slab_enter_live((SlabObject *)self, &is_gone);
    if (!mapping && !is_gone) return NULL;
    int64_t state = mapping ? lec_flight_state(&mapping->handle, ticket, slab_now((SlabObject *)self)) : LEC_FLIGHT_OVER;
    Py_XDECREF(mapping);
    return PyLong_FromLongLong(state);
}

/* _flight_wait(index, token, progress, timeout_ns) -> as _flight_state(), once that is not `progress` or time is up */
PyObject *slab_flight_wait(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    static const char *const names[] = {"index", "token", "progress", "timeout_ns"};
    struct lec_ticket ticket;
    uint64_t numbers[4], begun = clock_precise(), waited = 0;
    int64_t state;
    if (!ticket_parse("_flight_wait", args, nargs, names, 4, &ticket, numbers) || !progress_is_legal(numbers[2])) return NULL;
    for (;;) {
        uint64_t left = numbers[3] > waited ? numbers[3] - waited : 0;
        if (!wait_once((SlabObject *)self, ticket, (int64_t)numbers[2], least(left, SLICE_NS), &state)) return NULL;
        waited = clock_precise() - begun;
        if (state != (int64_t)numbers[2] || waited >= numbers[3]) return PyLong_FromLongLong(state);
        if (PyErr_CheckSignals() != 0) return NULL;
    }
}

PyObject *slab_bell(PyObject *self, PyObject *unused)
{
    (void)unused;
    bool is_gone;
    MappingObject *mapping = slab_enter_live((SlabObject *)self, &is_gone);
    if (!mapping && !is_gone) return NULL;
    uint64_t bell = mapping ? lec_bell(&mapping->handle) : 0;
    Py_XDECREF(mapping);
    return PyLong_FromUnsignedLongLong(bell);
}

static void sleep_without_segment(uint64_t for_ns)
{
    struct timespec span = {0, (long)least(for_ns, GONE_NS)};
    Py_BEGIN_ALLOW_THREADS
    nanosleep(&span, NULL);
    Py_END_ALLOW_THREADS
}

/* False with an exception set. *is_gone: there is no segment, and the bell is 0. */
static bool bell_once(SlabObject *slab, uint64_t seen, uint64_t timeout_ns, uint64_t *bell, bool *is_gone)
{
    MappingObject *mapping = slab_enter_live(slab, is_gone);
    *bell = 0;
    if (!mapping && *is_gone) sleep_without_segment(timeout_ns);
    if (!mapping) return *is_gone;
    Py_BEGIN_ALLOW_THREADS
    *bell = lec_bell_wait(&mapping->handle, seen, timeout_ns);
    Py_END_ALLOW_THREADS
    Py_DECREF(mapping);
    return true;
}

/* _bell_wait(seen, timeout_ns) -> the bell, once it is not `seen` or time is up */
PyObject *slab_bell_wait(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    static const char *const names[] = {"seen", "timeout_ns"};
    uint64_t numbers[2], begun = clock_precise(), waited = 0, bell;
    bool is_gone;
    if (!numbers_parse("_bell_wait", args, nargs, names, 2, numbers)) return NULL;
    for (;;) {
        uint64_t left = numbers[1] > waited ? numbers[1] - waited : 0;
        if (!bell_once((SlabObject *)self, numbers[0], least(left, SLICE_NS), &bell, &is_gone)) return NULL;
        waited = clock_precise() - begun;
        if (is_gone || bell != numbers[0] || waited >= numbers[1]) return PyLong_FromUnsignedLongLong(bell);
        if (PyErr_CheckSignals() != 0) return NULL;
    }
}
