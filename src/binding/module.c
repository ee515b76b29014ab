/* The module: state, types, and the functions that make or judge a segment before there is a Mapping of it. */
#include "binding.h"

#include <pthread.h>
#include <string.h>

#if !defined(__linux__) || !(defined(__x86_64__) || defined(__aarch64__))
#error "llm_edge_cache's native part needs Linux on x86-64 or aarch64"
#endif

_Atomic uint64_t binding_forks;

/* Process-wide by nature: a fork copies the process, whatever interpreters and modules it holds. */
static void count_fork(void) { atomic_fetch_add(&binding_forks, 1); }
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;
static void watch_forks(void) { pthread_atfork(NULL, NULL, count_fork); }

static bool boot_id_parse(const char *bytes, Py_ssize_t count, uint8_t boot_id[BINDING_BOOT_ID_BYTES])
{
    if (count != BINDING_BOOT_ID_BYTES) {
        PyErr_Format(PyExc_ValueError, "boot_id must be %d bytes, not %zd", BINDING_BOOT_ID_BYTES, count);
        return false;
    }
    memcpy(boot_id, bytes, BINDING_BOOT_ID_BYTES);
    return true;
}

static PyObject *native_configure(PyObject *module, PyObject *args)
{
    struct binding_state *state = PyModule_GetState(module);
    PyObject *marker, *closed, *busy;
    if (!PyArg_ParseTuple(args, "OOO:configure", &marker, &closed, &busy)) return NULL;
    Py_XSETREF(state->default_marker, Py_NewRef(marker));
    Py_XSETREF(state->closed_error, Py_NewRef(closed));
    Py_XSETREF(state->busy_error, Py_NewRef(busy));
    Py_RETURN_NONE;
}

static PyObject *native_attach(PyObject *module, PyObject *args)
{
    PyObject *owner;
    const char *boot;
    Py_ssize_t boot_count;
    uint8_t boot_id[BINDING_BOOT_ID_BYTES];
    if (!PyArg_ParseTuple(args, "Oy#:attach", &owner, &boot, &boot_count)) return NULL;
    if (!boot_id_parse(boot, boot_count, boot_id)) return NULL;
    return mapping_attach(PyModule_GetState(module), owner, boot_id);
}

static PyObject *create_run(Py_buffer *buffer, const struct lec_config *config, const uint8_t boot_id[16],
                            uint64_t now_ns, uint64_t wall_ns, const uint64_t random[3])
{
    enum lec_status status;
    Py_BEGIN_ALLOW_THREADS
    status = lec_create(buffer->buf, (uint64_t)buffer->len, config, boot_id, now_ns, wall_ns, random);
    Py_END_ALLOW_THREADS
    if (status == LEC_OK) Py_RETURN_NONE;
    return PyErr_Format(PyExc_ValueError, "the segment cannot hold this configuration (status %d)", (int)status);
}

static PyObject *native_create(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer buffer;
    const char *boot, *entropy;
    Py_ssize_t boot_count, entropy_count;
    unsigned long long now_ns, wall_ns, memory_bytes, ttl_ns, tti_ns;
    struct lec_config config = {0};
    uint8_t boot_id[BINDING_BOOT_ID_BYTES];
    uint64_t random[3];
    if (!PyArg_ParseTuple(args, "w*(KKKII)y#KKy#:create", &buffer, &memory_bytes, &ttl_ns, &tti_ns, &config.max_entries,
                          &config.max_value_bytes, &boot, &boot_count, &now_ns, &wall_ns, &entropy, &entropy_count))
        return NULL;
    config.memory_bytes = memory_bytes, config.ttl_ns = ttl_ns, config.tti_ns = tti_ns;
    PyObject *result = NULL;
    if (entropy_count != (Py_ssize_t)sizeof random) {
        PyErr_SetString(PyExc_ValueError, "random must be 24 bytes");
    } else if (boot_id_parse(boot, boot_count, boot_id)) {
        memcpy(random, entropy, sizeof random);
        result = create_run(&buffer, &config, boot_id, now_ns, wall_ns, random);
    }
    PyBuffer_Release(&buffer);
    return result;
}

/* probe(buffer, boot_id) -> ("live" | "retired" | "foreign", layout version or 0, configuration if not foreign) */
static PyObject *native_probe(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer buffer;
    const char *boot;
    Py_ssize_t boot_count;
    uint8_t boot_id[BINDING_BOOT_ID_BYTES];
    if (!PyArg_ParseTuple(args, "y*y#:probe", &buffer, &boot, &boot_count)) return NULL;
    PyObject *result = NULL;
    if (boot_id_parse(boot, boot_count, boot_id)) {
        struct lec_config config = {0};
        enum lec_status status = lec_probe(buffer.buf, (uint64_t)buffer.len, boot_id, &config);
        const struct lec_header *header = buffer.buf;
        bool has_magic = (size_t)buffer.len >= LEC_PAGE && atomic_load(&header->magic) == LEC_MAGIC;
        result = Py_BuildValue("(sIN)", status == LEC_OK ? "live" : status == LEC_RETIRED ? "retired" : "foreign",
                               has_magic ? (unsigned)header->layout_version : 0u, config_tuple(&config));
    }
    PyBuffer_Release(&buffer);
    return result;
}

/* What a process that still maps a segment of garbage would look at: let it know that the name has a successor. */
static PyObject *native_condemn(PyObject *module, PyObject *object)
{
    (void)module;
    Py_buffer buffer;
    if (PyObject_GetBuffer(object, &buffer, PyBUF_SIMPLE | PyBUF_WRITABLE) != 0) return NULL;
    if ((size_t)buffer.len >= LEC_PAGE) {
        struct lec_header *header = buffer.buf;
        atomic_fetch_or(&header->state, UINT64_C(1) << 32);
    }
    PyBuffer_Release(&buffer);
    Py_RETURN_NONE;
}

/* minimum_bytes(config) -> what memory_bytes must at least be for this configuration; 0 = it is enough */
static PyObject *native_minimum_bytes(PyObject *module, PyObject *args)
{
    (void)module;
    unsigned long long memory_bytes, ttl_ns, tti_ns;
    struct lec_config config = {0};
    struct lec_geometry geometry;
    uint64_t minimum = 0;
    if (!PyArg_ParseTuple(args, "(KKKII):minimum_bytes", &memory_bytes, &ttl_ns, &tti_ns, &config.max_entries, &config.max_value_bytes))
        return NULL;
    config.memory_bytes = memory_bytes, config.ttl_ns = ttl_ns, config.tti_ns = tti_ns;
    return PyLong_FromUnsignedLongLong(lec_geometry_derive(&config, &geometry, &minimum) ? 0 : minimum);
}

static PyMethodDef native_methods[] = {
    {"configure", native_configure, METH_VARARGS, PyDoc_STR("configure(default_marker, closed_error, busy_error)")},
    {"attach", native_attach, METH_VARARGS, PyDoc_STR("attach(shared_memory, boot_id) -> Mapping")},
    {"create", native_create, METH_VARARGS, PyDoc_STR("create(buffer, config, boot_id, now_ns, wall_ns, random): format and publish")},
    {"probe", native_probe, METH_VARARGS, PyDoc_STR("probe(buffer, boot_id) -> (state, layout version, config)")},
    {"condemn", native_condemn, METH_O, PyDoc_STR("condemn(buffer): retire a segment that does not attach")},
    {"are_plain", (PyCFunction)(void (*)(void))native_are_plain, METH_FASTCALL, PyDoc_STR("are_plain(container, depth) -> is all of it a key's normal form?")},
    {"are_plain_dicts", (PyCFunction)(void (*)(void))native_are_plain_dicts, METH_FASTCALL, PyDoc_STR("are_plain_dicts(sequence, depth) -> the same of a list or tuple of dicts")},
    {"replay", native_replay, METH_VARARGS, PyDoc_STR("replay(events, times, entries, units, tti_ns, seed) -> what each sample was to such a cache")},
    {"minimum_bytes", native_minimum_bytes, METH_VARARGS, PyDoc_STR("minimum_bytes(config) -> needed, or 0 when it is enough")},
    {0},
};

static PyTypeObject *type_add(PyObject *module, PyType_Spec *spec)
{
    PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);
    if (type && PyModule_AddType(module, (PyTypeObject *)type) != 0) Py_CLEAR(type);
    return (PyTypeObject *)type;
}

static int native_exec(PyObject *module)
{
    struct binding_state *state = PyModule_GetState(module);
    pthread_once(&fork_once, watch_forks);
    state->default_marker = Py_NewRef(Py_None);
    state->closed_error = Py_NewRef(PyExc_RuntimeError);
    state->busy_error = Py_NewRef(PyExc_RuntimeError);
    state->name_reattach = PyUnicode_InternFromString("_reattach");
    state->mapping_type = type_add(module, &mapping_spec);
    state->slab_type = type_add(module, &slab_spec);
    if (!state->name_reattach || !state->mapping_type || !state->slab_type) return -1;
    if (PyModule_AddIntConstant(module, "LAYOUT_VERSION", LEC_LAYOUT_VERSION) != 0) return -1;
    if (PyModule_AddIntConstant(module, "MUTEX_BYTES", sizeof(pthread_mutex_t)) != 0) return -1;
    if (PyModule_AddIntConstant(module, "MAX_KEY_BYTES", LEC_MAX_KEY) != 0) return -1;
    if (PyModule_AddIntConstant(module, "FLIGHT_LED", LEC_FLIGHT_LED) != 0) return -1;
    if (PyModule_AddIntConstant(module, "FLIGHT_TAKEN_OVER", LEC_FLIGHT_TAKEN_OVER) != 0) return -1;
    if (PyModule_AddIntConstant(module, "FLIGHT_JOINED", LEC_FLIGHT_JOINED) != 0) return -1;
    return PyModule_AddIntConstant(module, "FLIGHT_NONE", LEC_FLIGHT_NONE);
}

static int native_traverse(PyObject *module, visitproc visit, void *arg)
{
    struct binding_state *state = PyModule_GetState(module);
    Py_VISIT(state->mapping_type);
    Py_VISIT(state->slab_type);
    Py_VISIT(state->default_marker);
    Py_VISIT(state->closed_error);
    Py_VISIT(state->busy_error);
    return 0;
}

static int native_clear(PyObject *module)
{
    struct binding_state *state = PyModule_GetState(module);
    Py_CLEAR(state->mapping_type);
    Py_CLEAR(state->slab_type);
    Py_CLEAR(state->default_marker);
    Py_CLEAR(state->closed_error);
    Py_CLEAR(state->busy_error);
    Py_CLEAR(state->name_reattach);
    return 0;
}

static void native_free(void *module) { native_clear(module); }

static PyModuleDef_Slot native_slots[] = {
    {Py_mod_exec, native_exec},
#if PY_VERSION_HEX >= 0x030D0000
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef native_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_native",
    .m_doc = PyDoc_STR("The shared slab's kernel, for slab.py and segment.py."),
    .m_size = sizeof(struct binding_state),
    .m_methods = native_methods,
    .m_slots = native_slots,
    .m_traverse = native_traverse,
    .m_clear = native_clear,
    .m_free = native_free,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&native_module); }
