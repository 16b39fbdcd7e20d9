/* Sparse calls with nothing left to decide, carried out without Python: what the operator's body asks first.
 *
 * A `Call` holds what one layer's call looks like and launches. Whoever knows that it may be made again arms it under the
 * number of the layer; `attend` has the arguments of the operator, makes an armed call's launches, and hands everything else
 * to the Python body, with the same arguments and the same errors. A call that does not fit is disarmed by that. Tensors are
 * read through torch's C interface for compiled models; memory is allocated and kernels are launched without the GIL. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include "cuda.h"

enum { DIMS = 4, MOVING = 3, ROOM_DIMS = 4, MOST_MADE = 12, MOST_PARAMS = 256, BLOB = 16384, ALIGN = 128 };

/* ---- what is called: functions of torch and of the driver, and objects of torch, all given by `setup` ---- */

static struct {
  int32_t (*data_ptr)(void *, void **);
  int32_t (*dim)(void *, int64_t *);
  int32_t (*sizes)(void *, int64_t **);
  int32_t (*strides)(void *, int64_t **);
  int32_t (*dtype)(void *, int32_t *);
  int32_t (*device_type)(void *, int32_t *);
  int32_t (*device_index)(void *, int32_t *);
  int32_t (*empty)(int64_t, const int64_t *, const int64_t *, int32_t, int32_t, int32_t, void **);
  int32_t (*release)(void *);
  CUresult (*launch)(const CUlaunchConfig *, CUfunction, void **, void **);
  CUresult (*move)(CUtensorMap *, void *);
  CUresult (*error)(CUresult, const char **);
  CUresult (*context)(CUcontext *);
} api;

static struct {
  PyObject *tensor, *empty_like, *device, *stream, *modes, *grad, *compiler;
} py;

static PyObject *body, *s_cdata, *s_compiling;
static int32_t number_dtype, number_device; /* of a layer's number */

/* ---- one call ---- */

typedef struct {
  int64_t function, grid[3], threads, shared, pdl, cooperative, ctas, first, count;
} Launch;

typedef struct {
  int64_t place, source, offset, is_map;
} Slot;

typedef struct {
  int64_t dtype, dims, sizes[ROOM_DIMS], strides[ROOM_DIMS];
} Made;

typedef struct {
  int64_t dtype, device_type, device_index, current, sizes[DIMS], strides[MOVING][DIMS];
} Form;

typedef struct {
  PyObject_HEAD
  Form form;
  Launch *launches;
  int64_t *params;
  Slot *slots;
  Made *made;
  char *blob;
  Py_ssize_t n_launches, n_params, n_slots, n_made, n_blob;
  PyObject *scale, *quiet, *index, *keep;
  int64_t count;
} Call;

static Call **table;
static int64_t table_size;

static bool copied(void **to, Py_ssize_t *count, const Py_buffer *from, size_t size) {
  *count = from->len / (Py_ssize_t)size;
  if (from->len % (Py_ssize_t)size) {
    PyErr_Format(PyExc_ValueError, "%zd bytes are no array of %zu bytes each", from->len, size);
    return false;
  }
  *to = PyMem_Malloc(from->len ? from->len : 1);
  if (!*to) {
    PyErr_NoMemory();
    return false;
  }
  memcpy(*to, from->buf, from->len);
  return true;
}

/* Whether no number leads out of an array. */
static bool fits(const Call *call) {
  if (call->n_made > MOST_MADE || call->n_blob > BLOB) return false;
  for (Py_ssize_t i = 0; i < call->n_made; i++)
    if (call->made[i].dims < 1 || call->made[i].dims > ROOM_DIMS) return false;
  for (Py_ssize_t i = 0; i < call->n_launches; i++) {
    const Launch *one = call->launches + i;
    if (one->first < 0 || one->count < 0 || one->count > MOST_PARAMS || one->first + one->count > call->n_params) return false;
    if (one->ctas < 1 || one->ctas > 8) return false;
  }
  for (Py_ssize_t i = 0; i < call->n_params; i++)
    if (call->params[i] < 0 || call->params[i] + 8 > call->n_blob) return false;
  for (Py_ssize_t i = 0; i < call->n_slots; i++) {
    const Slot *slot = call->slots + i;
    int64_t size = slot->is_map ? (int64_t)sizeof(CUtensorMap) : 8;
    if (slot->place < 0 || slot->place + size > call->n_blob || (slot->is_map && slot->place % ALIGN)) return false;
    if (slot->source < 1 || slot->source > MOVING + 1 + call->n_made) return false;
  }
  return true;
}

static PyObject *call_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  Py_buffer form, launches, params, slots, made, blob;
  PyObject *scale, *quiet;
  if (!PyArg_ParseTuple(args, "y*y*y*y*y*y*OO!", &form, &launches, &params, &slots, &made, &blob, &scale, &PyTuple_Type, &quiet))
    return NULL;
  Call *call = (Call *)type->tp_alloc(type, 0);
  bool good = call != NULL;
  if (good && form.len != sizeof(Form)) {
    PyErr_Format(PyExc_ValueError, "the form of the tensors must have %zu bytes, got %zd", sizeof(Form), form.len);
    good = false;
  }
  if (good) {
    memcpy(&call->form, form.buf, sizeof(Form));
    good = copied((void **)&call->launches, &call->n_launches, &launches, sizeof(Launch)) &&
           copied((void **)&call->params, &call->n_params, &params, sizeof(int64_t)) &&
           copied((void **)&call->slots, &call->n_slots, &slots, sizeof(Slot)) &&
           copied((void **)&call->made, &call->n_made, &made, sizeof(Made)) &&
           copied((void **)&call->blob, &call->n_blob, &blob, 1);
  }
  if (good && !fits(call)) {
    PyErr_SetString(PyExc_ValueError, "a launch does not fit: too long, or a place outside of its arguments");
    good = false;
  }
  if (good) {
    call->scale = Py_NewRef(scale);
    call->quiet = Py_NewRef(quiet);
    call->index = PyLong_FromLongLong(call->form.current);
    good = call->index != NULL;
  }
  PyBuffer_Release(&form), PyBuffer_Release(&launches), PyBuffer_Release(&params);
  PyBuffer_Release(&slots), PyBuffer_Release(&made), PyBuffer_Release(&blob);
  if (!good) Py_CLEAR(call);
  return (PyObject *)call;
}

static void call_dealloc(PyObject *self) {
  Call *call = (Call *)self;
  PyMem_Free(call->launches), PyMem_Free(call->params), PyMem_Free(call->slots);
  PyMem_Free(call->made), PyMem_Free(call->blob);
  Py_XDECREF(call->scale), Py_XDECREF(call->quiet), Py_XDECREF(call->index), Py_XDECREF(call->keep);
  Py_TYPE(self)->tp_free(self);
}

static PyTypeObject CallType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "dit_accel_again.Call",
    .tp_basicsize = sizeof(Call),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "Call(form, launches, params, slots, made, blob, scale, quiet): a call that can be made again",
    .tp_new = call_new,
    .tp_dealloc = call_dealloc,
};

/* ---- tensors ---- */

/* A tensor of torch is one pointer; a handle is the place of such a pointer. */
static bool tensor_at(PyObject *x, void **impl) {
  if ((PyObject *)Py_TYPE(x) != py.tensor) return false;
  PyObject *number = PyObject_GetAttr(x, s_cdata);
  if (!number) {
    PyErr_Clear();
    return false;
  }
  *impl = PyLong_AsVoidPtr(number);
  Py_DECREF(number);
  if (!*impl) PyErr_Clear();
  return *impl != NULL;
}

static bool like_before(void *impl, const Form *form, int which, uint64_t *address) {
  void *x = &impl, *at;
  int64_t dims, *sizes, *strides;
  int32_t dtype, type, index;
  if (api.dim(x, &dims) || dims != DIMS || api.dtype(x, &dtype) || dtype != form->dtype) return false;
  if (api.sizes(x, &sizes) || memcmp(sizes, form->sizes, sizeof form->sizes)) return false;
  if (api.strides(x, &strides) || memcmp(strides, form->strides[which], sizeof form->strides[which])) return false;
  if (api.device_type(x, &type) || type != form->device_type) return false;
  if (api.device_index(x, &index) || index != form->device_index) return false;
  if (api.data_ptr(x, &at)) return false;
  *address = (uint64_t)at;
  return at != NULL && *address % 16 == 0;
}

/* The number inside of a layer's tensor, -1 if it is none. */
static int64_t number_in(PyObject *layer) {
  void *impl, *x = &impl, *at;
  int64_t dims;
  int32_t type, dtype;
  if (!tensor_at(layer, &impl) || api.dim(x, &dims) || dims) return -1;
  if (api.device_type(x, &type) || api.dtype(x, &dtype) || api.data_ptr(x, &at) || !at) return -1;
  return type == number_device && dtype == number_dtype ? *(int64_t *)at : -1;
}

static bool says(PyObject *function, PyObject *arg, long long *value) {
  PyObject *answer = arg ? PyObject_CallOneArg(function, arg) : PyObject_CallNoArgs(function);
  if (!answer) return false;
  *value = PyLong_AsLongLong(answer); /* a bool is an int */
  Py_DECREF(answer);
  return *value != -1 || !PyErr_Occurred();
}

/* Whether somebody writes down what is computed, or waits for launches. */
static bool watched(const Call *call) {
  long long modes, grad;
  if (!says(py.modes, NULL, &modes) || modes || !says(py.grad, NULL, &grad) || grad) return true;
  PyObject *compiling = PyDict_GetItemWithError(py.compiler, s_compiling);
  if (compiling != Py_False) return true;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(call->quiet); i++) {
    PyObject *list = PyTuple_GET_ITEM(call->quiet, i);
    if (!PyList_CheckExact(list) || PyList_GET_SIZE(list)) return true;
  }
  return false;
}

static bool same_scale(PyObject *one, PyObject *other) {
  if (one == other) return true;
  return PyFloat_CheckExact(one) && PyFloat_CheckExact(other) && PyFloat_AS_DOUBLE(one) == PyFloat_AS_DOUBLE(other);
}

/* ---- launching ---- */

static CUresult start(const Launch *one, char *blob, const int64_t *places, CUstream stream) {
  void *params[MOST_PARAMS];
  CUlaunchAttribute attrs[4];
  CUlaunchConfig config;
  if (one->grid[0] * one->grid[1] * one->grid[2] <= 0) return CUDA_SUCCESS;
  for (int64_t i = 0; i < one->count; i++) params[i] = blob + places[one->first + i];
  memset(&config, 0, sizeof config);
  memset(attrs, 0, sizeof attrs);
  config.gridDimX = (unsigned)(one->grid[0] * one->ctas);
  config.gridDimY = (unsigned)one->grid[1];
  config.gridDimZ = (unsigned)one->grid[2];
  config.blockDimX = (unsigned)one->threads;
  config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = (unsigned)one->shared;
  config.hStream = stream;
  config.attrs = attrs;
  CUlaunchAttribute *attr = attrs;
  if (one->pdl) {
    attr->id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attr++->value.programmaticStreamSerializationAllowed = 1;
  }
  if (one->cooperative) {
    attr->id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
    attr++->value.cooperative = 1;
  }
  if (one->ctas != 1) {
    attr->id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attr->value.clusterDim.x = (unsigned)one->ctas;
    attr->value.clusterDim.y = attr->value.clusterDim.z = 1;
    attr++;
    attr->id = CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE;
    attr++->value.clusterSchedulingPolicyPreference = CU_CLUSTER_SCHEDULING_POLICY_SPREAD;
  }
  config.numAttrs = (unsigned)(attr - attrs);
  return api.launch(&config, (CUfunction)one->function, params, NULL);
}

/* Put the addresses of this call into a copy of the arguments. */
static bool filled(const Call *call, char *blob, const uint64_t *sources) {
  memcpy(blob, call->blob, call->n_blob);
  for (Py_ssize_t i = 0; i < call->n_slots; i++) {
    const Slot *slot = call->slots + i;
    uint64_t address = sources[slot->source] + (uint64_t)slot->offset;
    if (!slot->is_map)
      memcpy(blob + slot->place, &address, sizeof address);
    else if (api.move((CUtensorMap *)(blob + slot->place), (void *)address))
      return false;
  }
  return true;
}

typedef enum { DONE, OTHER_WAY, FAILED } Outcome;

/* Launch what has all its addresses but those in the copy of the arguments. */
static Outcome launched(const Call *call, const uint64_t *sources, CUresult *failed) {
  _Alignas(ALIGN) char blob[BLOB];
  CUcontext context = NULL; /* a thread that has never used CUDA has none, and Triton's launcher gives it one */
  if (api.context(&context) || !context || !filled(call, blob, sources)) return OTHER_WAY;
  for (Py_ssize_t i = 0; i < call->n_launches; i++) {
    *failed = start(call->launches + i, blob, call->params, (CUstream)sources[0]);
    if (*failed) return FAILED;
  }
  return DONE;
}

/* Allocate what is for this call only, launch, and free it. Needs no GIL. */
static Outcome allocated(const Call *call, uint64_t *sources, CUresult *failed) {
  void *rooms[MOST_MADE], *at;
  Py_ssize_t n = 0;
  Outcome outcome = DONE;
  while (outcome == DONE && n < call->n_made) {
    const Made *made = call->made + n;
    if (api.empty(made->dims, made->sizes, made->strides, (int32_t)made->dtype, (int32_t)call->form.device_type,
                  (int32_t)call->form.device_index, &rooms[n])) {
      outcome = OTHER_WAY;
      break;
    }
    if (api.data_ptr(rooms[n], &at) || (uint64_t)at % 16) outcome = OTHER_WAY;
    sources[2 + MOVING + n++] = (uint64_t)at;
  }
  if (outcome == DONE) outcome = launched(call, sources, failed);
  while (n) api.release(rooms[--n]);
  return outcome;
}

/* The result, NULL without an error if the call must go the other way: then nothing has happened. */
static PyObject *made_again(const Call *call, PyObject *query, uint64_t *sources) {
  void *impl, *x = &impl, *at = NULL;
  CUresult failed = CUDA_SUCCESS;
  Outcome outcome = OTHER_WAY;
  PyObject *out = PyObject_CallOneArg(py.empty_like, query);
  if (!out) return NULL;
  if (tensor_at(out, &impl) && !api.data_ptr(x, &at) && at && (uint64_t)at % 16 == 0) {
    sources[1 + MOVING] = (uint64_t)at;
    Py_BEGIN_ALLOW_THREADS
    outcome = allocated(call, sources, &failed);
    Py_END_ALLOW_THREADS
  }
  if (outcome == DONE) return out;
  Py_DECREF(out);
  if (outcome == FAILED) {
    const char *text = NULL;
    api.error(failed, &text);
    PyErr_Format(PyExc_RuntimeError, "Triton Error [CUDA]: %s", text ? text : "unknown");
  }
  return NULL;
}

static PyObject *again(Call *call, PyObject *const *args) {
  uint64_t sources[2 + MOVING + MOST_MADE];
  long long value;
  if (!same_scale(args[5], call->scale)) return NULL;
  for (int i = 0; i < MOVING; i++) {
    void *impl;
    if (!tensor_at(args[i], &impl) || !like_before(impl, &call->form, i, sources + 1 + i)) return NULL;
  }
  if (watched(call)) return NULL;
  if (!says(py.device, NULL, &value) || value != call->form.current) return NULL;
  if (!says(py.stream, call->index, &value)) return NULL;
  sources[0] = (uint64_t)value;
  PyObject *out = made_again(call, args[0], sources);
  if (out) call->count++;
  return out;
}

/* ---- what Python calls ---- */

static PyObject *attend(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
  bool plain = (!names || !PyTuple_GET_SIZE(names)) && (count == 8 || (count == 9 && args[8] == Py_False));
  if (plain && args[4] == Py_None && args[6] == Py_False) {
    int64_t number = number_in(args[3]);
    Call *call = number >= 0 && number < table_size ? table[number] : NULL;
    if (call) {
      Py_INCREF(call);
      PyObject *out = again(call, args);
      if (!out && number < table_size && table[number] == call) {
        table[number] = NULL; /* asked once more it would be in vain */
        Py_DECREF(call);
      }
      Py_DECREF(call);
      if (out || PyErr_Occurred()) return out;
    }
  }
  if (!body) {
    PyErr_SetString(PyExc_RuntimeError, "the operator has no body in Python");
    return NULL;
  }
  return PyObject_Vectorcall(body, args, count, names);
}

static PyObject *set_body(PyObject *self, PyObject *function) {
  Py_XSETREF(body, Py_NewRef(function));
  Py_RETURN_NONE;
}

static PyObject *arm(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  if (count != 3 || !Py_IS_TYPE(args[1], &CallType)) {
    PyErr_SetString(PyExc_TypeError, "arm(number, call, keep)");
    return NULL;
  }
  int64_t number = PyLong_AsLongLong(args[0]);
  if (number < 0 || number > (int64_t)1 << 30) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "the number of a layer must be one of a handle");
    return NULL;
  }
  if (number >= table_size) {
    int64_t size = 2 * number + 64;
    Call **larger = PyMem_Realloc(table, size * sizeof *table);
    if (!larger) return PyErr_NoMemory();
    memset(larger + table_size, 0, (size - table_size) * sizeof *table);
    table = larger, table_size = size;
  }
  Call *call = (Call *)Py_NewRef(args[1]), *before = table[number];
  Py_XSETREF(call->keep, Py_NewRef(args[2]));
  table[number] = call;
  Py_XDECREF(before);
  Py_RETURN_NONE;
}

static PyObject *disarm(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  if (count != 2 || !Py_IS_TYPE(args[1], &CallType)) {
    PyErr_SetString(PyExc_TypeError, "disarm(number, call)");
    return NULL;
  }
  int64_t number = PyLong_AsLongLong(args[0]);
  if (number == -1 && PyErr_Occurred()) return NULL;
  Call *call = (Call *)args[1];
  if (number >= 0 && number < table_size && table[number] == call) {
    table[number] = NULL;
    Py_DECREF(call);
  }
  int64_t made = call->count;
  call->count = 0;
  Py_CLEAR(call->keep);
  return PyLong_FromLongLong(made);
}

/* Sizes, strides, address, dtype, kind of device and its index of a tensor, as they are read here. */
static PyObject *describe(PyObject *self, PyObject *x) {
  void *impl, *handle = &impl, *at;
  int64_t dims, *sizes, *strides;
  int32_t dtype, type, index;
  if (!tensor_at(x, &impl)) {
    PyErr_SetString(PyExc_TypeError, "describe(tensor)");
    return NULL;
  }
  if (api.dim(handle, &dims) || api.sizes(handle, &sizes) || api.strides(handle, &strides) || api.data_ptr(handle, &at) ||
      api.dtype(handle, &dtype) || api.device_type(handle, &type) || api.device_index(handle, &index)) {
    PyErr_SetString(PyExc_RuntimeError, "torch does not describe the tensor");
    return NULL;
  }
  PyObject *shape = PyTuple_New(dims), *steps = PyTuple_New(dims);
  for (int64_t i = 0; shape && steps && i < dims; i++) {
    PyTuple_SET_ITEM(shape, i, PyLong_FromLongLong(sizes[i]));
    PyTuple_SET_ITEM(steps, i, PyLong_FromLongLong(strides[i]));
  }
  return Py_BuildValue("NNKiii", shape, steps, (unsigned long long)at, dtype, type, index);
}

static PyObject *setup(PyObject *self, PyObject *args) {
  unsigned long long at[13];
  PyObject *given[7], *number;
  void *impl, *x = &impl;
  if (!PyArg_ParseTuple(args, "(KKKKKKKKKKKKK)(OOOOOOO)O", at, at + 1, at + 2, at + 3, at + 4, at + 5, at + 6, at + 7, at + 8,
                        at + 9, at + 10, at + 11, at + 12, given, given + 1, given + 2, given + 3, given + 4, given + 5,
                        given + 6, &number))
    return NULL;
  _Static_assert(sizeof at == sizeof api && sizeof(void *) == 8, "pointers of 64 bits");
  memcpy(&api, at, sizeof at);
  PyObject **to[] = {&py.tensor, &py.empty_like, &py.device, &py.stream, &py.modes, &py.grad, &py.compiler};
  for (int i = 0; i < 7; i++) Py_XSETREF(*to[i], Py_NewRef(given[i]));
  if (!PyDict_Check(py.compiler) || !tensor_at(number, &impl) || api.dtype(x, &number_dtype) ||
      api.device_type(x, &number_device)) {
    PyErr_SetString(PyExc_TypeError, "setup(functions, objects, the number of a layer)");
    return NULL;
  }
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"attend", (PyCFunction)(void (*)(void))attend, METH_FASTCALL | METH_KEYWORDS, "The operator's body."},
    {"set_body", set_body, METH_O, "Say who gets the calls that are not made here."},
    {"arm", (PyCFunction)(void (*)(void))arm, METH_FASTCALL, "Make a layer's calls without Python; keep what they use."},
    {"disarm", (PyCFunction)(void (*)(void))disarm, METH_FASTCALL, "Undo arm; how often the call was made."},
    {"describe", describe, METH_O, "What a tensor looks like from here."},
    {"setup", setup, METH_VARARGS, "Say which functions and objects are called."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "dit_accel_again", NULL, -1, methods};

PyMODINIT_FUNC PyInit_dit_accel_again(void) {
  s_cdata = PyUnicode_InternFromString("_cdata");
  s_compiling = PyUnicode_InternFromString("_is_compiling_flag");
  if (!s_cdata || !s_compiling || PyType_Ready(&CallType) < 0) return NULL;
  PyObject *made = PyModule_Create(&module);
  if (made && PyModule_AddObjectRef(made, "Call", (PyObject *)&CallType) < 0) Py_CLEAR(made);
  return made;
}
