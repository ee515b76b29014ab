/* Mapping: this process's one view of one segment, shared by all its SharedSlab objects of that name. */
#include "binding.h"

#include <unistd.h>

#ifdef Py_GIL_DISABLED
#define BINDING_CONCURRENT true
#else
#define BINDING_CONCURRENT false
#endif

static bool owner_buffer(PyObject *owner, Py_buffer *buffer)
{
    PyObject *view = PyObject_GetAttrString(owner, "buf");
    if (!view) return false;
    int failed = PyObject_GetBuffer(view, buffer, PyBUF_SIMPLE | PyBUF_WRITABLE);
    Py_DECREF(view);
    return failed == 0;
}

PyObject *mapping_attach(struct binding_state *state, PyObject *owner, const uint8_t boot_id[BINDING_BOOT_ID_BYTES])
{
    MappingObject *mapping = (MappingObject *)state->mapping_type->tp_alloc(state->mapping_type, 0);
    if (!mapping) return NULL;
    mapping->state = state;
    if (!owner_buffer(owner, &mapping->buffer)) {
        Py_DECREF(mapping);
        return NULL;
    }
    mapping->owner = Py_NewRef(owner);
    atomic_store(&mapping->forks, atomic_load(&binding_forks));
    enum lec_status status = lec_attach(&mapping->handle, mapping->buffer.buf, (uint64_t)mapping->buffer.len, boot_id,
                                        lec_process_identity((int32_t)getpid()), BINDING_CONCURRENT);
    mapping->is_attached = status == LEC_OK;
    if (mapping->is_attached) return (PyObject *)mapping;
    Py_DECREF(mapping);
    PyErr_Format(PyExc_ValueError, "no live segment of this layout (status %d)", (int)status);
    return NULL;
}

void mapping_reidentify(MappingObject *mapping)
{
    uint64_t forks = atomic_load(&binding_forks);
#ifdef Py_GIL_DISABLED
    Py_BEGIN_CRITICAL_SECTION(mapping);
#endif
    if (atomic_load(&mapping->forks) != forks) {
        lec_reidentify(&mapping->handle, lec_process_identity((int32_t)getpid()));
        atomic_store(&mapping->forks, forks);
    }
#ifdef Py_GIL_DISABLED
    Py_END_CRITICAL_SECTION();
#endif
}

#if PY_VERSION_HEX < 0x030D0000
#define Py_IsFinalizing _Py_IsFinalizing
#endif

/* owner.close(): unmaps. What it raises can reach nobody. */
static void owner_close(PyObject *owner)
{
#if PY_VERSION_HEX >= 0x030C0000
    PyObject *raised = PyErr_GetRaisedException();
#else
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
#endif
    PyObject *result = PyObject_CallMethod(owner, "close", NULL);
    if (!result) PyErr_WriteUnraisable(owner);
    Py_XDECREF(result);
#if PY_VERSION_HEX >= 0x030C0000
    PyErr_SetRaisedException(raised);
#else
    PyErr_Restore(type, value, traceback);
#endif
}

static void mapping_dealloc(PyObject *self)
{
    MappingObject *mapping = (MappingObject *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    /* A forked child that never used the mapping must not give its parent's record back. */
    if (mapping->is_attached && atomic_load(&mapping->forks) == atomic_load(&binding_forks)) lec_detach(&mapping->handle);
    if (mapping->buffer.obj) PyBuffer_Release(&mapping->buffer);
    /* At the interpreter's end the modules whose functions close() would call may be gone; then the process's end
       unmaps, and the owner is not let go of either, since its finalizer does the same. */
    if (mapping->owner && !Py_IsFinalizing()) {
        owner_close(mapping->owner);
        Py_CLEAR(mapping->owner);
    }
    type->tp_free(self);
    Py_DECREF(type);
}

static int mapping_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((MappingObject *)self)->owner);
    return 0;
}

static PyObject *mapping_get_nonce(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(((MappingObject *)self)->handle.header->nonce);
}

static PyObject *mapping_get_retired(PyObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong((long)(atomic_load(&((MappingObject *)self)->handle.header->state) >> 32 != 0));
}

static PyObject *mapping_get_config(PyObject *self, void *unused)
{
    (void)unused;
    return config_tuple(&((MappingObject *)self)->handle.config);
}

/* How many live processes are attached; this one counts. */
static PyObject *mapping_attached(PyObject *self, PyObject *unused)
{
    (void)unused;
    mapping_reidentify((MappingObject *)self);
    return PyLong_FromUnsignedLong(lec_attached(&((MappingObject *)self)->handle));
}

static PyObject *mapping_retire(PyObject *self, PyObject *reason)
{
    uint64_t number;
    if (!uint64_parse(reason, "reason", &number)) return NULL;
    lec_retire(&((MappingObject *)self)->handle, (uint32_t)number);
    Py_RETURN_NONE;
}

static PyGetSetDef mapping_getset[] = {
    {"nonce", mapping_get_nonce, NULL, PyDoc_STR("Tells two segments of one name apart."), NULL},
    {"retired", mapping_get_retired, NULL, PyDoc_STR("Whether the segment was replaced or unlinked."), NULL},
    {"config", mapping_get_config, NULL, PyDoc_STR("(memory_bytes, ttl_ns, tti_ns, max_entries, max_value_bytes); ns 0 = off."), NULL},
    {0},
};

static PyMethodDef mapping_methods[] = {
    {"attached", mapping_attached, METH_NOARGS, PyDoc_STR("Live attached processes, this one included.")},
    {"retire", mapping_retire, METH_O, PyDoc_STR("Tell every process to attach again by name; reason is nonzero.")},
    {"totals", mapping_totals, METH_NOARGS, PyDoc_STR("A dict of the host-wide sums.")},
    {"samples", mapping_samples, METH_O, PyDoc_STR("samples(shard) -> (shards, entries, units, threshold, first, begun, marks, events) of this one; no lock.")},
    {"processes", mapping_processes, METH_NOARGS, PyDoc_STR("(pid, is alive, hits, misses) of each process record in use.")},
    {0},
};

static PyType_Slot mapping_slots[] = {
    {Py_tp_dealloc, mapping_dealloc},
    {Py_tp_traverse, mapping_traverse},
    {Py_tp_methods, mapping_methods},
    {Py_tp_getset, mapping_getset},
    {Py_tp_doc, "One mapping of one segment; made by attach()."},
    {0, NULL},
};

PyType_Spec mapping_spec = {
    .name = "llm_edge_cache._native.Mapping",
    .basicsize = sizeof(MappingObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = mapping_slots,
};
