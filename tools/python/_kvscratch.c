// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * kvscratch._kvscratch: libkvscratch as Python objects. The package around it has
 * what is easier said in Python, and the documentation.
 *
 * A Pad owns a struct kvscratch. A call that releases the GIL holds the pad
 * (hold_pad()) while it runs, a View for as long as it lives. Pad.close() ends the
 * use of the Pad; the handle ends with the last holder. So no thread loses the handle
 * under its feet, and no array the memory that it shows.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <libkvscratch.h>
#include <pthread.h>
#include <string.h>

/* OSError of a pad that has no room for the rows */
static PyObject *full_error;
static PyTypeObject *pad_type;
static PyTypeObject *view_type;
/* How often this process was forked off, from its ancestor that loaded the module on */
static unsigned long forks;

/**
 * struct pad - a Pad
 * @handle: NULL after the end of the handle
 * @map: the mapped pad, once it was needed
 * @info: of the time when the object was made
 * @holders: calls and Views that use @handle
 * @closed: no further use; the last holder ends @handle
 * @forks: of this process, when the handle was made
 * @waiting: a thread is in kvscratch_wait()
 */
struct pad {
	PyObject_HEAD
	struct kvscratch *handle;
	const struct kvscratch_view *map;
	struct kvscratch_info info;
	Py_ssize_t holders;
	unsigned long forks;
	bool closed;
	bool waiting;
};

/**
 * struct view - a View: a [rows, columns] array in the memory of a pad
 * @pad: which it holds
 * @data: the array
 * @state: of the pad, when the rows were counted
 * @shape: rows and columns
 * @strides: bytes per row and per element
 * @format: of an element, as the struct module has it
 */
struct view {
	PyObject_HEAD
	struct pad *pad;
	const void *data;
	uint64_t state;
	Py_ssize_t shape[2];
	Py_ssize_t strides[2];
	const char *format;
};

/* Errors */

static PyObject *raise_os_error(PyObject *type, int err)
{
	/* OSError picks its subclass by errno */
	PyObject *error = PyObject_CallFunction(type, "is", -err, kvscratch_error());

	if (error) {
		PyErr_SetObject((PyObject *)Py_TYPE(error), error);
		Py_DECREF(error);
	}
	return NULL;
}

/* Raise what a negative errno of the library means; its sentence belongs to this thread. */
static PyObject *raise_error(int err)
{
	switch (-err) {
	case EINVAL:
	case EDOM:
	case E2BIG:
	case EBADMSG:
		PyErr_SetString(PyExc_ValueError, kvscratch_error());
		return NULL;
	case ENOMEM:
		PyErr_SetString(PyExc_MemoryError, kvscratch_error());
		return NULL;
	case ENOKEY:
		PyErr_SetString(PyExc_KeyError, kvscratch_error());
		return NULL;
	}
	return raise_os_error(PyExc_OSError, err);
}
/* Raise @err, unless a signal handler of Python has raised something. */
static PyObject *raise_unless_raised(int err)
{
	return PyErr_Occurred() ? NULL : raise_error(err);
}

static PyObject *none_or_error(int err)
{
	if (!err)
		Py_RETURN_NONE;
	return raise_unless_raised(err);
}

/* Whether a call that a signal interrupted is to be made once more */
static bool again(int err)
{
	return err == -EINTR && !PyErr_CheckSignals();
}

/* Pads */

static void end_handle(struct pad *pad)
{
	struct kvscratch *handle = pad->handle;

	pad->handle = NULL;
	/* unmapping may take its time */
	Py_BEGIN_ALLOW_THREADS
	kvscratch_close(handle);
	Py_END_ALLOW_THREADS
}

static struct kvscratch *open_handle(struct pad *pad)
{
	if (!pad->closed)
		return pad->handle;
	PyErr_SetString(PyExc_ValueError, "the scratchpad is closed");
	return NULL;
}

static struct kvscratch *hold_pad(struct pad *pad)
{
	struct kvscratch *handle = open_handle(pad);

	if (handle)
		pad->holders++;
	return handle;
}

/* For writing: two processes with one open file would not exclude each other. */
static struct kvscratch *hold_writer(struct pad *pad)
{
	if (pad->forks == forks)
		return hold_pad(pad);
	PyErr_SetString(PyExc_RuntimeError,
			"expected a handle of this process, got one from before a fork: attach one");
	return NULL;
}

static void drop_pad(struct pad *pad)
{
	if (!--pad->holders && pad->closed)
		end_handle(pad);
}

static PyObject *pad_close(PyObject *self, PyObject *unused)
{
	struct pad *pad = (struct pad *)self;

	(void)unused;
	if (!pad->closed) {
		pad->closed = true;
		if (!pad->holders)
			end_handle(pad);
	}
	Py_RETURN_NONE;
}

static void free_object(PyObject *self)
{
	PyTypeObject *type = Py_TYPE(self);

	((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
	Py_DECREF(type);
}

static void pad_dealloc(PyObject *self)
{
	struct pad *pad = (struct pad *)self;

	if (pad->handle)
		end_handle(pad);
	free_object(self);
}

/* An object of class @type that takes over @handle */
static PyObject *wrap_handle(PyTypeObject *type, struct kvscratch *handle)
{
	struct kvscratch_info info;
	struct pad *pad;
	int err = kvscratch_info(handle, &info);

	if (err) {
		raise_error(err);
		kvscratch_close(handle);
		return NULL;
	}
	pad = (struct pad *)PyType_GenericAlloc(type, 0);
	if (!pad) {
		kvscratch_close(handle);
		return NULL;
	}
	pad->handle = handle;
	pad->info = info;
	pad->forks = forks;
	return (PyObject *)pad;
}

/* A converter of PyArg_Parse: what an integer is worth that C has no room for is a wrong value. */
static int parse_number(PyObject *object, void *number)
{
	PyObject *index = PyNumber_Index(object);
	int overflow;

	if (!index)
		return 0;
	*(long long *)number = PyLong_AsLongLongAndOverflow(index, &overflow);
	if (overflow)
		PyErr_Format(PyExc_ValueError, "expected an integer of 64 bits, got %S", index);
	Py_DECREF(index);
	return !overflow;
}

/* 0 after an exception */
static uint32_t dtype_by_name(const char *argument, const char *name)
{
	uint32_t dtype = kvscratch_dtype_by_name(name);

	if (!dtype)
		PyErr_Format(PyExc_ValueError,
			     "%s: expected f64, f32, f16, bf16, i64, i32, i16, i8, u8 or mxint8, got %s",
			     argument, name);
	return dtype;
}

static bool in_range(const char *argument, long long value, long long max)
{
	if (value >= 0 && value <= max)
		return true;
	PyErr_Format(PyExc_ValueError, "%s: expected 0 to %lld, got %lld", argument, max, value);
	return false;
}

static PyObject *pad_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
	static char *names[] = { "max_seq_len", "dim", "dtype", "input_dtype", "frac_bits", NULL };
	const char *dtype = "f32", *input_dtype = NULL;
	struct kvscratch_geometry geometry = { 0 };
	long long max_seq_len, dim, frac_bits = 0;
	struct kvscratch *handle;
	int err;

	if (!PyArg_ParseTupleAndKeywords(args, keywords, "O&O&|s$zO&:Scratchpad", names,
					 parse_number, &max_seq_len, parse_number, &dim, &dtype,
					 &input_dtype, parse_number, &frac_bits))
		return NULL;
	if (!in_range("max_seq_len", max_seq_len, KVSCRATCH_MAX_SEQ_LEN) ||
	    !in_range("dim", dim, KVSCRATCH_MAX_ROW_BYTES) ||
	    !in_range("frac_bits", frac_bits, KVSCRATCH_MAX_FRAC_BITS))
		return NULL;
	geometry.max_seq_len = max_seq_len;
	geometry.dim = dim;
	geometry.frac_bits = frac_bits;
	geometry.dtype = dtype_by_name("dtype", dtype);
	if (!geometry.dtype)
		return NULL;
	if (input_dtype) {
		geometry.input_dtype = dtype_by_name("input_dtype", input_dtype);
		if (!geometry.input_dtype)
			return NULL;
	}
	do {
		Py_BEGIN_ALLOW_THREADS
		err = kvscratch_new_geometry(&handle, &geometry);
		Py_END_ALLOW_THREADS
	} while (again(err));
	if (err)
		return none_or_error(err);
	return wrap_handle(type, handle);
}

/* -1 after an exception */
static int access_by_mode(const char *mode)
{
	if (!strcmp(mode, "r"))
		return O_RDONLY;
	if (!strcmp(mode, "w"))
		return O_WRONLY;
	if (!strcmp(mode, "rw"))
		return O_RDWR;
	PyErr_Format(PyExc_ValueError, "mode: expected r, w or rw, got %s", mode);
	return -1;
}

/* A converter of PyArg_Parse, for a descriptor or what has a fileno() */
static int parse_fd(PyObject *object, void *fd)
{
	*(int *)fd = PyObject_AsFileDescriptor(object);
	if (*(int *)fd >= 0)
		return 1;
	if (PyErr_ExceptionMatches(PyExc_OverflowError))
		PyErr_Format(PyExc_ValueError, "fd: expected 0 to %d, got %S", INT_MAX, object);
	return 0;
}

static int attach(struct kvscratch **handle, PyObject *source, int access)
{
	const char *name = NULL;
	int fd = -1, err;

	if (PyUnicode_Check(source) ? !PyArg_Parse(source, "s", &name) : !parse_fd(source, &fd))
		return -1;
	Py_BEGIN_ALLOW_THREADS
	if (name)
		err = kvscratch_attach_name(handle, name, access);
	else
		err = kvscratch_attach(handle, fd, access);
	Py_END_ALLOW_THREADS
	if (err)
		raise_error(err);
	return err;
}

static PyObject *pad_attach(PyObject *type, PyObject *args, PyObject *keywords)
{
	static char *names[] = { "source", "mode", NULL };
	struct kvscratch *handle;
	const char *mode = "r";
	PyObject *source;
	int access;

	if (!PyArg_ParseTupleAndKeywords(args, keywords, "O|s:attach", names, &source, &mode))
		return NULL;
	access = access_by_mode(mode);
	if (access < 0 || attach(&handle, source, access))
		return NULL;
	return wrap_handle((PyTypeObject *)type, handle);
}

static PyObject *pad_from_fd(PyObject *type, PyObject *argument)
{
	struct kvscratch *handle;
	long long fd;
	int err;

	if (!parse_number(argument, &fd))
		return NULL;
	if (!in_range("fd", fd, INT_MAX))
		return NULL;
	err = kvscratch_from_fd(&handle, fd);
	if (err)
		return raise_error(err);
	return wrap_handle((PyTypeObject *)type, handle);
}

static PyObject *pad_open_reader(PyObject *self, PyObject *unused)
{
	struct pad *pad = (struct pad *)self;
	struct kvscratch *handle = open_handle(pad);
	struct kvscratch *reader;
	int fd, err;

	(void)unused;
	if (!handle)
		return NULL;
	fd = kvscratch_open_reader(handle);
	if (fd < 0)
		return raise_error(fd);
	err = kvscratch_from_fd(&reader, fd);
	if (err) {
		raise_error(err);
		close(fd);
		return NULL;
	}
	return wrap_handle(Py_TYPE(self), reader);
}

/* Appending */

/* An element of a buffer: what kind of number, and its bytes */
struct element {
	char kind;	/* f, i or u; 0 for anything else */
	Py_ssize_t bytes;
};

static struct element element_of(const Py_buffer *buffer)
{
	const char *format = buffer->format ? buffer->format : "B";
	const char native = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? '<' : '>';
	struct element element = { .bytes = buffer->itemsize };

	if (*format == '@' || *format == '=' || *format == native)
		format++;
	if (!format[0] || format[1])
		return element;
	if (strchr("efd", *format))
		element.kind = 'f';
	else if (strchr("bhilqn", *format))
		element.kind = 'i';
	else if (strchr("BHILQN", *format))
		element.kind = 'u';
	return element;
}

/* What an array of a dtype has in it; bf16, which the struct module lacks, comes as u16 */
static struct element element_of_dtype(uint32_t dtype)
{
	struct element element = { .bytes = kvscratch_dtype_size(dtype) };

	switch (dtype) {
	case KVSCRATCH_DTYPE_F64:
	case KVSCRATCH_DTYPE_F32:
	case KVSCRATCH_DTYPE_F16:
		element.kind = 'f';
		break;
	case KVSCRATCH_DTYPE_BF16:
	case KVSCRATCH_DTYPE_U8:
		element.kind = 'u';
		break;
	default:
		element.kind = 'i';
	}
	return element;
}

static bool raise_dtype_mismatch(uint32_t dtype, struct element got, const Py_buffer *buffer)
{
	const char *how = "";

	if (dtype == KVSCRATCH_DTYPE_BF16)
		how = " as 2-byte integers or bytes";
	else if (dtype == KVSCRATCH_DTYPE_MXINT8)
		how = " as bytes, elements and then scales";
	if (got.kind)
		PyErr_Format(PyExc_TypeError, "dtype mismatch: expected %s%s, got %c%zd",
			     kvscratch_dtype_name(dtype), how, got.kind, 8 * got.bytes);
	else
		PyErr_Format(PyExc_TypeError,
			     "dtype mismatch: expected %s%s, got elements of format %s",
			     kvscratch_dtype_name(dtype), how, buffer->format);
	return false;
}

/**
 * struct rows - rows to be appended
 * @buffer: where they are
 * @batch: whether they are [n, elements] rather than [elements]
 * @count: rows
 * @elements: per row
 */
struct rows {
	Py_buffer buffer;
	bool batch;
	uint64_t count;
	uint32_t elements;
};

/* bf16, which NumPy lacks, and stored rows of mxint8, which are no plain array, come as bytes. */
static bool count_row_bytes(const struct pad *pad, struct rows *rows, Py_ssize_t bytes)
{
	if (bytes == pad->info.input_row_bytes) {
		rows->elements = pad->info.dim;
		return true;
	}
	PyErr_Format(PyExc_ValueError, "shape mismatch: expected %u bytes, got %zd",
		     (unsigned int)pad->info.input_row_bytes, bytes);
	return false;
}

static bool count_elements(const struct pad *pad, struct rows *rows, Py_ssize_t columns)
{
	if (columns <= UINT32_MAX) {
		rows->elements = columns;
		return true;
	}
	PyErr_Format(PyExc_ValueError, "shape mismatch: expected %u elements, got %zd",
		     (unsigned int)pad->info.dim, columns);
	return false;
}

static bool check_rows(const struct pad *pad, struct rows *rows)
{
	const Py_buffer *buffer = &rows->buffer;
	uint32_t dtype = pad->info.input_dtype;
	struct element got = element_of(buffer), expected = element_of_dtype(dtype);
	bool bytes = got.kind && got.bytes == 1 &&
		     (dtype == KVSCRATCH_DTYPE_BF16 || dtype == KVSCRATCH_DTYPE_MXINT8);
	bool matches = got.kind == expected.kind && got.bytes == expected.bytes;
	Py_ssize_t columns;

	/* the sign of bits that are no integer says nothing */
	if (dtype == KVSCRATCH_DTYPE_BF16 && got.kind == 'i' && got.bytes == expected.bytes)
		matches = true;
	if (!matches && !bytes)
		return raise_dtype_mismatch(dtype, got, buffer);
	if (buffer->ndim != 1 && buffer->ndim != 2) {
		PyErr_Format(PyExc_ValueError,
			     "shape mismatch: expected [%u] or [n, %u], got %d dimensions",
			     (unsigned int)pad->info.dim, (unsigned int)pad->info.dim, buffer->ndim);
		return false;
	}
	if (!PyBuffer_IsContiguous(buffer, 'C')) {
		PyErr_SetString(PyExc_ValueError,
				"expected a C-contiguous array, got one with gaps or in another order");
		return false;
	}
	rows->batch = buffer->ndim == 2;
	rows->count = rows->batch ? buffer->shape[0] : 1;
	columns = buffer->shape[buffer->ndim - 1];
	return bytes ? count_row_bytes(pad, rows, columns) : count_elements(pad, rows, columns);
}

static int append_rows(struct kvscratch *handle, const struct rows *rows)
{
	if (rows->batch)
		return kvscratch_append_rows(handle, rows->buffer.buf, rows->count, rows->elements);
	return kvscratch_append(handle, rows->buffer.buf, rows->elements);
}

static PyObject *pad_append(PyObject *self, PyObject *array)
{
	struct pad *pad = (struct pad *)self;
	PyObject *result = NULL;
	struct kvscratch *handle;
	struct rows rows;
	int err;

	if (!PyObject_CheckBuffer(array)) {
		PyErr_Format(PyExc_TypeError, "expected an array or another buffer, got %R",
			     Py_TYPE(array));
		return NULL;
	}
	if (PyObject_GetBuffer(array, &rows.buffer, PyBUF_FULL_RO))
		return NULL;
	handle = hold_writer(pad);
	if (!handle)
		goto release;
	if (check_rows(pad, &rows)) {
		do {
			Py_BEGIN_ALLOW_THREADS
			err = append_rows(handle, &rows);
			Py_END_ALLOW_THREADS
		} while (again(err));
		/* of anything else it says that a disk is full */
		result = err == -ENOSPC ? raise_os_error(full_error, err) : none_or_error(err);
	}
	drop_pad(pad);
release:
	PyBuffer_Release(&rows.buffer);
	return result;
}

static PyObject *pad_truncate(PyObject *self, PyObject *args, PyObject *keywords)
{
	static char *names[] = { "n", "zero", NULL };
	struct pad *pad = (struct pad *)self;
	struct kvscratch *handle;
	PyObject *result;
	long long len;
	int zero = 0, err;

	if (!PyArg_ParseTupleAndKeywords(args, keywords, "O&|p:truncate", names, parse_number,
					 &len, &zero))
		return NULL;
	if (!in_range("n", len, KVSCRATCH_MAX_SEQ_LEN))
		return NULL;
	handle = hold_writer(pad);
	if (!handle)
		return NULL;
	do {
		Py_BEGIN_ALLOW_THREADS
		err = kvscratch_truncate(handle, len, zero ? KVSCRATCH_TRUNCATE_ZERO : 0);
		Py_END_ALLOW_THREADS
	} while (again(err));
	result = none_or_error(err);
	drop_pad(pad);
	return result;
}

static PyObject *pad_clear(PyObject *self, PyObject *args, PyObject *keywords)
{
	static char *names[] = { "zero", NULL };
	struct pad *pad = (struct pad *)self;
	struct kvscratch *handle;
	PyObject *result;
	int zero = 0, err;

	if (!PyArg_ParseTupleAndKeywords(args, keywords, "|p:clear", names, &zero))
		return NULL;
	handle = hold_writer(pad);
	if (!handle)
		return NULL;
	do {
		Py_BEGIN_ALLOW_THREADS
		err = kvscratch_clear(handle, zero ? KVSCRATCH_TRUNCATE_ZERO : 0);
		Py_END_ALLOW_THREADS
	} while (again(err));
	result = none_or_error(err);
	drop_pad(pad);
	return result;
}

/* Reading */

static Py_ssize_t pad_length(PyObject *self)
{
	struct kvscratch *handle = open_handle((struct pad *)self);
	int64_t len;

	if (!handle)
		return -1;
	len = kvscratch_len(handle);
	if (len < 0)
		raise_error(len);
	return len < 0 ? -1 : len;
}

static PyObject *pad_str(PyObject *self)
{
	struct kvscratch *handle = open_handle((struct pad *)self);
	char text[64];
	int length;

	if (!handle)
		return NULL;
	length = kvscratch_display(handle, text, sizeof(text));
	return length < 0 ? raise_error(length) : PyUnicode_FromString(text);
}

static PyObject *pad_copy_rows(PyObject *self, PyObject *args)
{
	struct pad *pad = (struct pad *)self;
	PyObject *copy, *result = NULL;
	struct kvscratch *handle;
	long long first, count;
	int err;

	if (!PyArg_ParseTuple(args, "LL:_copy_rows", &first, &count))
		return NULL;
	if (!in_range("first", first, KVSCRATCH_MAX_SEQ_LEN) ||
	    !in_range("count", count, pad->info.max_seq_len))
		return NULL;
	handle = hold_pad(pad);
	if (!handle)
		return NULL;
	copy = PyByteArray_FromStringAndSize(NULL, count * pad->info.row_bytes);
	if (copy) {
		do {
			Py_BEGIN_ALLOW_THREADS
			err = kvscratch_copy_rows(handle, first, count, PyByteArray_AsString(copy));
			Py_END_ALLOW_THREADS
		} while (again(err));
		if (!err)
			result = Py_NewRef(copy);
		else if (err == -EINVAL)
			PyErr_SetString(PyExc_IndexError, kvscratch_error());
		else
			none_or_error(err);
		Py_DECREF(copy);
	}
	drop_pad(pad);
	return result;
}

static PyObject *pad_wait(PyObject *self, PyObject *args)
{
	struct pad *pad = (struct pad *)self;
	struct kvscratch *handle;
	unsigned long long state;
	PyObject *result;
	int timeout_ms, err;

	if (!PyArg_ParseTuple(args, "Ki:_wait", &state, &timeout_ms))
		return NULL;
	if (pad->waiting) {
		PyErr_SetString(PyExc_RuntimeError,
				"another thread waits with this object: open_reader() makes one for each");
		return NULL;
	}
	handle = hold_pad(pad);
	if (!handle)
		return NULL;
	pad->waiting = true;
	Py_BEGIN_ALLOW_THREADS
	err = kvscratch_wait(handle, state, timeout_ms);
	Py_END_ALLOW_THREADS
	pad->waiting = false;
	/* the caller looks at state and time anyway, and the interpreter at signals */
	if (err == -ETIMEDOUT || err == -EINTR)
		err = 0;
	result = none_or_error(err);
	drop_pad(pad);
	return result;
}

/* Map a pad that is held; the first time takes its time. */
static bool map_pad(struct pad *pad)
{
	struct kvscratch *handle = pad->handle;
	const struct kvscratch_view *map;
	int err;

	if (pad->map)
		return true;
	do {
		Py_BEGIN_ALLOW_THREADS
		map = kvscratch_view(handle);
		err = map ? 0 : -errno;
		Py_END_ALLOW_THREADS
	} while (again(err));
	if (err)
		none_or_error(err);
	pad->map = map;
	return map;
}

/* Views */

/* The rows of @tensor in an array of the mapped @pad */
static PyObject *new_view(struct pad *pad, const struct kvscratch_tensor *tensor,
			  const void *data, const char *format, Py_ssize_t columns,
			  Py_ssize_t element_bytes)
{
	struct view *view = (struct view *)PyType_GenericAlloc(view_type, 0);

	if (!view)
		return NULL;
	view->pad = (struct pad *)Py_NewRef((PyObject *)pad);
	pad->holders++;
	view->data = data;
	view->state = tensor->state;
	view->shape[0] = tensor->len;
	view->shape[1] = columns;
	view->strides[0] = columns * element_bytes;
	view->strides[1] = element_bytes;
	view->format = format;
	return (PyObject *)view;
}

static void view_dealloc(PyObject *self)
{
	struct view *view = (struct view *)self;

	if (view->pad) {
		drop_pad(view->pad);
		Py_DECREF((PyObject *)view->pad);
	}
	free_object(self);
}

static const char *format_of_dtype(uint32_t dtype)
{
	static const char *const formats[] = {
		[KVSCRATCH_DTYPE_F64] = "d",
		[KVSCRATCH_DTYPE_F32] = "f",
		[KVSCRATCH_DTYPE_F16] = "e",
		[KVSCRATCH_DTYPE_BF16] = "H",
		[KVSCRATCH_DTYPE_I64] = "q",
		[KVSCRATCH_DTYPE_I32] = "i",
		[KVSCRATCH_DTYPE_I16] = "h",
		[KVSCRATCH_DTYPE_I8] = "b",
		[KVSCRATCH_DTYPE_U8] = "B",
		[KVSCRATCH_DTYPE_MXINT8] = "b",
	};

	return formats[dtype];
}

static PyObject *pad_view(PyObject *self, PyObject *unused)
{
	struct pad *pad = (struct pad *)self;
	struct kvscratch *handle = hold_pad(pad);
	struct kvscratch_tensor tensor;
	PyObject *view = NULL;
	int err;

	(void)unused;
	if (!handle)
		return NULL;
	if (map_pad(pad)) {
		err = kvscratch_as_tensor(handle, &tensor);
		if (err)
			raise_error(err);
		else
			view = new_view(pad, &tensor, tensor.data, format_of_dtype(tensor.dtype),
					tensor.dim, kvscratch_dtype_size(tensor.dtype));
	}
	drop_pad(pad);
	return view;
}

static PyObject *view_scales(PyObject *self, PyObject *unused)
{
	struct view *view = (struct view *)self;
	struct kvscratch_tensor tensor = { .len = view->shape[0], .state = view->state };
	const struct kvscratch_view *map = view->pad->map;
	const uint8_t *scales = kvscratch_view_scales(map);

	(void)unused;
	if (!scales || view->data == scales) {
		PyErr_Format(PyExc_TypeError, "expected the view of an mxint8 pad, got %s",
			     scales ? "its scales" : kvscratch_dtype_name(map->info.dtype));
		return NULL;
	}
	return new_view(view->pad, &tensor, scales, "B", view->shape[1] / KVSCRATCH_MX_BLOCK, 1);
}

static int view_getbuffer(PyObject *self, Py_buffer *buffer, int flags)
{
	struct view *view = (struct view *)self;

	buffer->obj = NULL;
	if (flags & PyBUF_WRITABLE) {
		PyErr_SetString(PyExc_BufferError, "a view is read-only");
		return -1;
	}
	if ((flags & PyBUF_F_CONTIGUOUS) == PyBUF_F_CONTIGUOUS) {
		PyErr_SetString(PyExc_BufferError, "a view is C-contiguous");
		return -1;
	}
	*buffer = (Py_buffer){
		.obj = Py_NewRef(self),
		.buf = (void *)view->data,
		.len = view->shape[0] * view->strides[0],
		.itemsize = view->strides[1],
		.readonly = 1,
		.ndim = flags & PyBUF_ND ? 2 : 1,
		.format = flags & PyBUF_FORMAT ? (char *)view->format : NULL,
		.shape = flags & PyBUF_ND ? view->shape : NULL,
		.strides = (flags & PyBUF_STRIDES) == PyBUF_STRIDES ? view->strides : NULL,
	};
	return 0;
}

static Py_ssize_t view_length(PyObject *self)
{
	return ((struct view *)self)->shape[0];
}

static PyObject *view_valid_rows(PyObject *self, PyObject *unused)
{
	struct view *view = (struct view *)self;

	(void)unused;
	return PyLong_FromUnsignedLong(kvscratch_view_valid_rows(view->pad->map, view->state));
}

/* Files */

/* A kvscratch_progress */
static int hear_signals(void *context, uint64_t done, uint64_t total)
{
	PyGILState_STATE gil = PyGILState_Ensure();
	int err = PyErr_CheckSignals();

	(void)context;
	(void)done;
	(void)total;
	PyGILState_Release(gil);
	return err;
}

static struct pad *pad_of_entry(PyObject *list, Py_ssize_t i)
{
	return (struct pad *)PyTuple_GetItem(PyList_GetItem(list, i), 1);
}

/* @list has (name, Pad) entries, and @pads as many. */
static PyObject *save_pads(const char *path, PyObject *list, struct kvscratch_named_pad *pads,
			   Py_ssize_t count)
{
	PyObject *result = NULL;
	Py_ssize_t held;
	int err;

	for (held = 0; held < count; held++) {
		struct pad *pad;

		if (!PyArg_ParseTuple(PyList_GetItem(list, held), "sO!", &pads[held].name, pad_type,
				      &pad))
			break;
		pads[held].pad = hold_pad(pad);
		if (!pads[held].pad)
			break;
	}
	if (held == count) {
		Py_BEGIN_ALLOW_THREADS
		err = kvscratch_save(path, pads, count, hear_signals, NULL);
		Py_END_ALLOW_THREADS
		result = none_or_error(err);
	}
	while (held--)
		drop_pad(pad_of_entry(list, held));
	return result;
}

static PyObject *module_save(PyObject *module, PyObject *args)
{
	struct kvscratch_named_pad *pads;
	PyObject *path, *list, *result = NULL;
	Py_ssize_t count;

	(void)module;
	if (!PyArg_ParseTuple(args, "O&O!:save", PyUnicode_FSConverter, &path, &PyList_Type, &list))
		return NULL;
	count = PyList_Size(list);
	pads = PyMem_Calloc(count + 1, sizeof(*pads));
	if (pads)
		result = save_pads(PyBytes_AsString(path), list, pads, count);
	else
		PyErr_NoMemory();
	PyMem_Free(pads);
	Py_DECREF(path);
	return result;
}

static PyObject *load_pad(PyTypeObject *type, const struct kvscratch_file *file, const char *name,
			  uint64_t max_seq_len)
{
	struct kvscratch *handle;
	int err;

	Py_BEGIN_ALLOW_THREADS
	err = kvscratch_load(&handle, file, name, max_seq_len, hear_signals, NULL);
	Py_END_ALLOW_THREADS
	return err ? raise_unless_raised(err) : wrap_handle(type, handle);
}

/* A list of (name, pad) */
static PyObject *load_all(PyTypeObject *type, const struct kvscratch_file *file)
{
	const struct kvscratch_saved_pad *saved;
	PyObject *list = PyList_New(0);
	unsigned int count;

	saved = kvscratch_file_pads(file, &count);
	for (unsigned int i = 0; list && i < count; i++) {
		/* .npy has no names */
		const char *name = count == 1 ? NULL : saved[i].name;
		PyObject *pad = load_pad(type, file, name, 0);
		PyObject *entry = pad ? Py_BuildValue("(sN)", saved[i].name, pad) : NULL;

		if (!entry || PyList_Append(list, entry))
			Py_CLEAR(list);
		Py_XDECREF(entry);
	}
	return list;
}

static struct kvscratch_file *open_file(const char *path)
{
	struct kvscratch_file *file;
	int err;

	Py_BEGIN_ALLOW_THREADS
	err = kvscratch_open_file(&file, path);
	Py_END_ALLOW_THREADS
	if (!err)
		return file;
	raise_error(err);
	return NULL;
}

static PyObject *pad_load(PyObject *type, PyObject *args, PyObject *keywords)
{
	static char *names[] = { "path", "name", "max_seq_len", NULL };
	long long max_seq_len = 0;
	struct kvscratch_file *file;
	PyObject *path, *pad = NULL;
	const char *name = NULL;

	if (!PyArg_ParseTupleAndKeywords(args, keywords, "O&|zO&:load", names,
					 PyUnicode_FSConverter, &path, &name, parse_number,
					 &max_seq_len))
		return NULL;
	if (in_range("max_seq_len", max_seq_len, KVSCRATCH_MAX_SEQ_LEN)) {
		file = open_file(PyBytes_AsString(path));
		if (file)
			pad = load_pad((PyTypeObject *)type, file, name, max_seq_len);
		kvscratch_close_file(file);
	}
	Py_DECREF(path);
	return pad;
}

static PyObject *pad_load_all(PyObject *type, PyObject *argument)
{
	struct kvscratch_file *file;
	PyObject *path, *list = NULL;

	if (!PyUnicode_FSConverter(argument, &path))
		return NULL;
	file = open_file(PyBytes_AsString(path));
	if (file)
		list = load_all((PyTypeObject *)type, file);
	kvscratch_close_file(file);
	Py_DECREF(path);
	return list;
}

/* Attributes */

enum pad_attribute {
	PAD_CAPACITY,
	PAD_DIM,
	PAD_DTYPE,
	PAD_INPUT_DTYPE,
	PAD_FRAC_BITS,
	PAD_FORMAT,
	PAD_BACKEND,
	PAD_MODE,
	PAD_GENERATION,
	PAD_SATURATED,
	PAD_STATE,
};

static PyObject *mode_of(const struct kvscratch *handle)
{
	switch (kvscratch_access(handle)) {
	case O_RDONLY:
		return PyUnicode_FromString("r");
	case O_WRONLY:
		return PyUnicode_FromString("w");
	default:
		return PyUnicode_FromString("rw");
	}
}

static PyObject *state_of(struct pad *pad)
{
	PyObject *state = NULL;

	hold_pad(pad);
	if (map_pad(pad))
		state = PyLong_FromUnsignedLongLong(kvscratch_view_state(pad->map));
	drop_pad(pad);
	return state;
}

/* What changes with time */
static PyObject *info_of(struct kvscratch *handle, enum pad_attribute attribute)
{
	struct kvscratch_info info;
	int err = kvscratch_info(handle, &info);

	if (err)
		return raise_error(err);
	return PyLong_FromUnsignedLongLong(attribute == PAD_GENERATION ? info.generation :
					   info.saturated);
}

static PyObject *pad_get(PyObject *self, void *closure)
{
	struct pad *pad = (struct pad *)self;
	enum pad_attribute attribute = (enum pad_attribute)(uintptr_t)closure;
	struct kvscratch *handle = open_handle(pad);

	if (!handle)
		return NULL;
	switch (attribute) {
	case PAD_CAPACITY:
		return PyLong_FromUnsignedLongLong(pad->info.max_seq_len);
	case PAD_DIM:
		return PyLong_FromUnsignedLong(pad->info.dim);
	case PAD_DTYPE:
		return PyUnicode_FromString(kvscratch_dtype_name(pad->info.dtype));
	case PAD_INPUT_DTYPE:
		return PyUnicode_FromString(kvscratch_dtype_name(pad->info.input_dtype));
	case PAD_FRAC_BITS:
		return PyLong_FromUnsignedLong(pad->info.frac_bits);
	case PAD_FORMAT:
		return PyUnicode_FromString(format_of_dtype(pad->info.dtype));
	case PAD_BACKEND:
		return PyUnicode_FromString(kvscratch_backend_name(kvscratch_backend(handle)));
	case PAD_MODE:
		return mode_of(handle);
	case PAD_STATE:
		return state_of(pad);
	default:
		return info_of(handle, attribute);
	}
}

static PyObject *pad_get_closed(PyObject *self, void *closure)
{
	(void)closure;
	return PyBool_FromLong(((struct pad *)self)->closed);
}

static PyObject *pad_fileno(PyObject *self, PyObject *unused)
{
	struct kvscratch *handle = open_handle((struct pad *)self);

	(void)unused;
	return handle ? PyLong_FromLong(kvscratch_fd(handle)) : NULL;
}

static PyObject *view_get_state(PyObject *self, void *closure)
{
	(void)closure;
	return PyLong_FromUnsignedLongLong(((struct view *)self)->state);
}

static PyObject *view_get_generation(PyObject *self, void *closure)
{
	(void)closure;
	return PyLong_FromUnsignedLong(kvscratch_state_generation(((struct view *)self)->state));
}

static PyObject *view_get_shape(PyObject *self, void *closure)
{
	struct view *view = (struct view *)self;

	(void)closure;
	return Py_BuildValue("(nn)", view->shape[0], view->shape[1]);
}

/* Types */

static PyMethodDef pad_methods[] = {
	{ "append", pad_append, METH_O,
	  "append($self, array, /)\n--\n\n"
	  "Append a row, [dim], or rows, [n, dim]: all of them or none.\n\n"
	  "array is anything with a C-contiguous buffer of input_dtype elements: a NumPy array,\n"
	  "array.array, memoryview. bf16 comes as 2-byte integers or bytes; rows of an mxint8\n"
	  "pad without an input_dtype as bytes, elements and then scales.\n\n"
	  "Raises TypeError for elements of another type; ValueError for another shape, for gaps\n"
	  "between elements, and for a NaN or an infinity that would become an integer; Full\n"
	  "when the rows do not fit. Nothing is appended then." },
	{ "truncate", (PyCFunction)(void (*)(void))pad_truncate, METH_VARARGS | METH_KEYWORDS,
	  "truncate($self, /, n, zero=False)\n--\n\n"
	  "Keep the first n rows and start a new generation; ValueError when there are fewer.\n"
	  "With zero the memory behind them is scrubbed." },
	{ "clear", (PyCFunction)(void (*)(void))pad_clear, METH_VARARGS | METH_KEYWORDS,
	  "clear($self, /, zero=False)\n--\n\nDrop all rows; the same as truncate(0, zero)." },
	{ "view", pad_view, METH_NOARGS,
	  "view($self, /)\n--\n\nThe committed rows of this moment as a View, without a copy." },
	{ "open_reader", pad_open_reader, METH_NOARGS,
	  "open_reader($self, /)\n--\n\nA read-only handle of its own on the pad." },
	{ "fileno", pad_fileno, METH_NOARGS,
	  "fileno($self, /)\n--\n\nThe file descriptor of the handle, which stays the object's." },
	{ "close", pad_close, METH_NOARGS,
	  "close($self, /)\n--\n\n"
	  "End the use of this object. Descriptor and memory stay until the last view and array\n"
	  "of it is gone; the pad itself until the last handle of any process is." },
	{ "attach", (PyCFunction)(void (*)(void))pad_attach, METH_VARARGS | METH_KEYWORDS | METH_CLASS,
	  "attach($type, /, source, mode=\"r\")\n--\n\n"
	  "A handle of its own on an existing pad.\n\n"
	  "source is a descriptor or an object with fileno(), which stays the caller's; or the\n"
	  "name of a held pad, \"story/k0\", or \"story\" for the only pad of a holder. mode is \"r\",\n"
	  "\"rw\" or, but for a memfd, \"w\"; it cannot widen what the source allows." },
	{ "from_fd", pad_from_fd, METH_O | METH_CLASS,
	  "from_fd($type, fd, /)\n--\n\n"
	  "Use an inherited or received descriptor as it is. The object takes it over and closes\n"
	  "it; after an exception it is still the caller's." },
	{ "load", (PyCFunction)(void (*)(void))pad_load, METH_VARARGS | METH_KEYWORDS | METH_CLASS,
	  "load($type, /, path, name=None, max_seq_len=0)\n--\n\n"
	  "A new pad of rows that were saved; name says which, where a file has several.\n"
	  "max_seq_len is its capacity, 0 the one of the file, which is refused where it is far\n"
	  "beyond the size of the file. The pad takes what the one that was saved took: one that\n"
	  "converted its input does so again." },
	{ "_load_all", pad_load_all, METH_O | METH_CLASS, NULL },
	{ "_copy_rows", pad_copy_rows, METH_VARARGS, NULL },
	{ "_wait", pad_wait, METH_VARARGS, NULL },
	{ 0 },
};

#define PAD_ATTRIBUTE(name, attribute, doc)	\
	{ name, pad_get, NULL, doc, (void *)(uintptr_t)(attribute) }

static PyGetSetDef pad_attributes[] = {
	PAD_ATTRIBUTE("capacity", PAD_CAPACITY, "max_seq_len: rows that fit"),
	PAD_ATTRIBUTE("dim", PAD_DIM, "Elements per row"),
	PAD_ATTRIBUTE("dtype", PAD_DTYPE, "What is stored, \"f32\" and the like"),
	PAD_ATTRIBUTE("input_dtype", PAD_INPUT_DTYPE, "What append() takes"),
	PAD_ATTRIBUTE("frac_bits", PAD_FRAC_BITS, "Fraction bits of an integer"),
	PAD_ATTRIBUTE("format", PAD_FORMAT, "A stored element, as the struct module has it"),
	PAD_ATTRIBUTE("backend", PAD_BACKEND, "\"kernel\" or \"memfd\""),
	PAD_ATTRIBUTE("mode", PAD_MODE, "What the handle allows: \"r\", \"w\" or \"rw\""),
	PAD_ATTRIBUTE("generation", PAD_GENERATION, "Truncates so far"),
	PAD_ATTRIBUTE("saturated", PAD_SATURATED, "Elements that were clamped so far"),
	PAD_ATTRIBUTE("state", PAD_STATE, "The low half of generation << 32 | len, for wait()"),
	{ "closed", pad_get_closed, NULL, "Whether close() was called", NULL },
	{ 0 },
};

static PyType_Slot pad_slots[] = {
	{ Py_tp_doc, "Scratchpad without what the package adds to it" },
	{ Py_tp_new, pad_new },
	{ Py_tp_dealloc, pad_dealloc },
	{ Py_tp_methods, pad_methods },
	{ Py_tp_getset, pad_attributes },
	{ Py_tp_str, pad_str },
	{ Py_sq_length, pad_length },
	{ 0 },
};

static PyType_Spec pad_spec = {
	.name = "kvscratch._kvscratch.Pad",
	.basicsize = sizeof(struct pad),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
	.slots = pad_slots,
};

static PyMethodDef view_methods[] = {
	{ "valid_rows", view_valid_rows, METH_NOARGS,
	  "valid_rows($self, /)\n--\n\n"
	  "n: rows below n, as they were read since the view was made, are what was committed.\n"
	  "That is len(view) unless a truncate came in between." },
	{ "scales", view_scales, METH_NOARGS,
	  "scales($self, /)\n--\n\n"
	  "The [len, dim / 32] scale bytes of the same rows of an mxint8 pad, as a View." },
	{ 0 },
};

static PyGetSetDef view_attributes[] = {
	{ "state", view_get_state, NULL, "generation << 32 | len, for Scratchpad.wait()", NULL },
	{ "generation", view_get_generation, NULL,
	  "The low 32 bits of the pad's generation when the view was made", NULL },
	{ "shape", view_get_shape, NULL, "(len, columns)", NULL },
	{ 0 },
};

static PyType_Slot view_slots[] = {
	{ Py_tp_doc,
	  "The committed rows of one moment, as a read-only buffer over the pad's own memory.\n\n"
	  "They do not change until a truncate; valid_rows() tells, after they were read, which\n"
	  "of them were still there. The memory stays mapped as long as a view or an array of\n"
	  "it lives, also when the Scratchpad is closed." },
	{ Py_tp_dealloc, view_dealloc },
	{ Py_tp_methods, view_methods },
	{ Py_tp_getset, view_attributes },
	{ Py_sq_length, view_length },
	{ Py_bf_getbuffer, view_getbuffer },
	{ 0 },
};

static PyType_Spec view_spec = {
	.name = "kvscratch.View",
	.basicsize = sizeof(struct view),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
	.slots = view_slots,
};

/* The module */

static PyObject *module_promises(PyObject *module, PyObject *argument)
{
	const struct kvscratch_promise *promises;
	enum kvscratch_backend backend = 0;
	PyObject *list, *name;

	(void)module;
	for (int i = KVSCRATCH_BACKEND_KERNEL; i <= KVSCRATCH_BACKEND_MEMFD; i++) {
		name = PyUnicode_FromString(kvscratch_backend_name(i));
		if (!name)
			return NULL;
		if (PyObject_RichCompareBool(name, argument, Py_EQ) > 0)
			backend = i;
		Py_DECREF(name);
	}
	if (!backend) {
		PyErr_Format(PyExc_ValueError, "backend: expected kernel or memfd, got %R", argument);
		return NULL;
	}
	promises = kvscratch_promises(backend);
	list = PyList_New(0);
	for (int i = 0; list && promises[i].name; i++) {
		PyObject *entry = Py_BuildValue("(ssOz)", promises[i].name, promises[i].text,
						promises[i].holds ? Py_True : Py_False,
						promises[i].reason);

		if (!entry || PyList_Append(list, entry))
			Py_CLEAR(list);
		Py_XDECREF(entry);
	}
	return list;
}

static PyObject *module_default_backend(PyObject *module, PyObject *unused)
{
	int backend = kvscratch_default_backend();

	(void)module;
	(void)unused;
	if (backend < 0)
		return raise_error(backend);
	return PyUnicode_FromString(kvscratch_backend_name(backend));
}

/**
 * struct handles - handles and their names
 * @names: each ended by NUL
 * @name: where each of them begins; used for those that are given away
 * @fds: the descriptors
 */
struct handles {
	char names[KVSCRATCH_MAX_NAMES_BYTES];
	const char *name[KVSCRATCH_MAX_PASSED];
	int fds[KVSCRATCH_MAX_PASSED];
};

/* Of a list of (name, descriptor), to which the names belong; -1 after an exception */
static Py_ssize_t parse_handles(PyObject *list, struct handles *handles)
{
	Py_ssize_t count = PyList_Size(list);

	if (count < 1 || count > KVSCRATCH_MAX_PASSED) {
		PyErr_Format(PyExc_ValueError, "expected 1 to %d handles, got %zd",
			     KVSCRATCH_MAX_PASSED, count);
		return -1;
	}
	for (Py_ssize_t i = 0; i < count; i++)
		if (!PyArg_ParseTuple(PyList_GetItem(list, i), "sO&", &handles->name[i], parse_fd,
				      &handles->fds[i]))
			return -1;
	return count;
}

/* The list takes over the descriptors; NULL after an error, when @count is a negative errno. */
static PyObject *list_handles(const struct handles *handles, int count)
{
	/* cppcheck-suppress ctuuninitvar */
	const char *name = handles->names;	/* the library filled it */
	PyObject *list;

	if (count < 0)
		return raise_error(count);
	list = PyList_New(0);
	for (int i = 0; list && i < count; i++, name += strlen(name) + 1) {
		PyObject *entry = Py_BuildValue("(si)", name, handles->fds[i]);

		if (!entry || PyList_Append(list, entry))
			Py_CLEAR(list);
		Py_XDECREF(entry);
	}
	if (!list)
		while (count--)
			close(handles->fds[count]);
	return list;
}

static PyObject *module_send_handles(PyObject *module, PyObject *args)
{
	struct handles handles;
	Py_ssize_t count;
	PyObject *list;
	int sock, err;

	(void)module;
	if (!PyArg_ParseTuple(args, "O&O!:send_handles", parse_fd, &sock, &PyList_Type, &list))
		return NULL;
	count = parse_handles(list, &handles);
	if (count < 0)
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	err = kvscratch_send_handles(sock, handles.name, handles.fds, count);
	Py_END_ALLOW_THREADS
	return err ? raise_error(err) : none_or_error(0);
}

static PyObject *module_receive_handles(PyObject *module, PyObject *args)
{
	struct handles handles;
	int sock, count;

	(void)module;
	if (!PyArg_ParseTuple(args, "i:receive_handles", &sock))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	count = kvscratch_receive_handles(sock, handles.names, sizeof(handles.names), handles.fds,
					  KVSCRATCH_MAX_PASSED);
	Py_END_ALLOW_THREADS
	return list_handles(&handles, count);
}

static PyObject *module_holder_get(PyObject *module, PyObject *args)
{
	struct handles handles;
	const char *name, *mode;
	int access, count;

	(void)module;
	if (!PyArg_ParseTuple(args, "ss:holder_get", &name, &mode))
		return NULL;
	access = access_by_mode(mode);
	if (access < 0)
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	count = kvscratch_holder_get(name, access, handles.names, sizeof(handles.names),
				     handles.fds, KVSCRATCH_MAX_PASSED);
	Py_END_ALLOW_THREADS
	return list_handles(&handles, count);
}

static PyObject *module_holder_put(PyObject *module, PyObject *args)
{
	struct handles handles;
	const char *name;
	Py_ssize_t count;
	PyObject *list;
	int err;

	(void)module;
	if (!PyArg_ParseTuple(args, "sO!:holder_put", &name, &PyList_Type, &list))
		return NULL;
	count = parse_handles(list, &handles);
	if (count < 0)
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	err = kvscratch_holder_put(name, handles.name, handles.fds, count);
	Py_END_ALLOW_THREADS
	return err ? raise_error(err) : none_or_error(0);
}

static PyObject *module_holder_drop(PyObject *module, PyObject *args)
{
	const char *name;
	int err;

	(void)module;
	if (!PyArg_ParseTuple(args, "s:holder_drop", &name))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	err = kvscratch_holder_drop(name);
	Py_END_ALLOW_THREADS
	return err ? raise_error(err) : none_or_error(0);
}

static PyObject *module_version(PyObject *module, PyObject *unused)
{
	(void)module;
	(void)unused;
	return PyUnicode_FromString(kvscratch_version());
}

static PyMethodDef module_functions[] = {
	{ "promises", module_promises, METH_O, NULL },
	{ "default_backend", module_default_backend, METH_NOARGS,
	  "default_backend()\n--\n\n"
	  "\"kernel\" or \"memfd\": where pads live that are made from now on." },
	{ "send_handles", module_send_handles, METH_VARARGS, NULL },
	{ "receive_handles", module_receive_handles, METH_VARARGS, NULL },
	{ "holder_get", module_holder_get, METH_VARARGS, NULL },
	{ "holder_put", module_holder_put, METH_VARARGS, NULL },
	{ "holder_drop", module_holder_drop, METH_VARARGS,
	  "holder_drop(name, /)\n--\n\n"
	  "Let a holder forget the pad \"story/k0\", or with \"story\" forget all and end." },
	{ "save", module_save, METH_VARARGS, NULL },
	{ "version", module_version, METH_NOARGS, NULL },
	{ 0 },
};

static struct PyModuleDef module_definition = {
	PyModuleDef_HEAD_INIT,
	.m_name = "kvscratch._kvscratch",
	.m_size = -1,
	.m_methods = module_functions,
};

static bool add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **type)
{
	*type = (PyTypeObject *)PyType_FromSpec(spec);
	return *type && !PyModule_AddType(module, *type);
}

static void count_fork(void)
{
	forks++;
}

PyMODINIT_FUNC PyInit__kvscratch(void)
{
	PyObject *module = PyModule_Create(&module_definition);

	if (!module)
		return NULL;
	if (pthread_atfork(NULL, NULL, count_fork)) {
		Py_DECREF(module);
		return PyErr_NoMemory();
	}
	full_error = PyErr_NewExceptionWithDoc("kvscratch.Full",
					       "The rows do not fit; none was appended.",
					       PyExc_OSError, NULL);
	if (full_error && !PyModule_AddObjectRef(module, "Full", full_error) &&
	    add_type(module, &pad_spec, &pad_type) && add_type(module, &view_spec, &view_type))
		return module;
	Py_DECREF(module);
	return NULL;
}
