// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * kvscratch._kvscratch: libkvscratch as Python objects. The package around it has
 * what is easier said in Python, and the documentation.
 *
 * A Handle, which is a Pad or a Writer, owns a struct kvscratch. A call that releases the
 * GIL holds it (hold_pad()) while it runs, a View for as long as it lives. close() ends the
 * use of the object; the handle ends with the last holder. So no thread loses the handle
 * under its feet, and no array the memory that it shows.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <libkvscratch.h>
#include <limits.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* OSError of a pad that has no room for the rows */
static PyObject *full_error;
static PyTypeObject *handle_type;
static PyTypeObject *pad_type;
static PyTypeObject *writer_type;
static PyTypeObject *view_type;
/* How often this process was forked off, from its ancestor that loaded the module on */
static unsigned long forks;

/**
 * struct pad - a Handle
 * @handle: NULL after the end of the handle
 * @map: the mapped pad, once it was needed
 * @staged: of a Writer, for each plane: the end of its staged rows
 * @holders: calls and Views that use @handle
 * @closed: no further use; the last holder ends @handle
 * @forks: of this process, when the handle was made
 * @waiting: a thread is in kvscratch_wait()
 */
struct pad {
	PyObject_HEAD
	struct kvscratch *handle;
	const struct kvscratch_view *map;
	uint64_t *staged;
	Py_ssize_t holders;
	unsigned long forks;
	bool closed;
	bool waiting;
};

/**
 * struct view - a View: a [rows, columns] array in the memory of a pad
 * @pad: which it holds
 * @plane: of the pad
 * @data: the array
 * @state: of the pad, when the rows were counted
 * @shape: rows and columns
 * @strides: bytes per row and per element
 * @format: of an element, as the struct module has it
 */
struct view {
	PyObject_HEAD
	struct pad *pad;
	uint32_t plane;
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

static PyObject *raise_full_or_error(int err)
{
	/* of anything else it says that a disk is full */
	return err == -ENOSPC ? raise_os_error(full_error, err) : none_or_error(err);
}

/* Put in front of what was raised which plane it is about, "plane 3 (k1)" where it has a label. */
static void name_plane(uint32_t index, const char *label)
{
	PyObject *type, *value, *traceback;

	PyErr_Fetch(&type, &value, &traceback);
	if (type != PyExc_ValueError && type != PyExc_TypeError) {
		PyErr_Restore(type, value, traceback);
		return;
	}
	if (label && *label)
		PyErr_Format(type, "plane %u (%s): %S", (unsigned int)index, label, value);
	else
		PyErr_Format(type, "plane %u: %S", (unsigned int)index, value);
	Py_XDECREF(type);
	Py_XDECREF(value);
	Py_XDECREF(traceback);
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
	PyErr_SetString(PyExc_ValueError,
			pad->staged ? "the writer is closed" : "the scratchpad is closed");
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

static PyObject *pad_enter(PyObject *self, PyObject *unused)
{
	(void)unused;
	return Py_NewRef(self);
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
	PyMem_Free(pad->staged);
	free_object(self);
}

/* An object of class @type that takes over @handle */
static PyObject *wrap_handle(PyTypeObject *type, struct kvscratch *handle)
{
	struct pad *pad = (struct pad *)PyType_GenericAlloc(type, 0);

	if (!pad) {
		kvscratch_close(handle);
		return NULL;
	}
	pad->handle = handle;
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

/* A converter of PyArg_Parse: labels are bytes, whatever a program in C put there. */
static int parse_label(PyObject *object, void *label)
{
	PyObject *bytes;
	char *text;
	Py_ssize_t length;

	if (!PyUnicode_Check(object)) {
		PyErr_Format(PyExc_TypeError, "label: expected a str, got %R", Py_TYPE(object));
		return 0;
	}
	bytes = PyUnicode_AsEncodedString(object, "utf-8", "surrogateescape");
	if (!bytes)
		return 0;
	if (PyBytes_AsStringAndSize(bytes, &text, &length)) {
		Py_DECREF(bytes);
		return 0;
	}
	if (memchr(text, 0, length)) {
		PyErr_Format(PyExc_ValueError, "label: expected no NUL in it, got %R", object);
		length = -1;
	} else {
		/* the library says what is too long */
		memcpy(label, text, length < KVSCRATCH_LABEL_BYTES ? length : KVSCRATCH_LABEL_BYTES);
	}
	Py_DECREF(bytes);
	return length >= 0;
}

static PyObject *label_of(const struct kvscratch_plane *plane)
{
	return PyUnicode_DecodeUTF8(plane->label, strlen(plane->label), "surrogateescape");
}

/* What a plane is made of, as Python has it */
struct description {
	long long dim;
	const char *dtype;
	const char *input_dtype;
	long long frac_bits;
};

static bool describe_plane(struct kvscratch_plane *plane, const struct description *description)
{
	if (!in_range("dim", description->dim, KVSCRATCH_MAX_ROW_BYTES) ||
	    !in_range("frac_bits", description->frac_bits, KVSCRATCH_MAX_FRAC_BITS))
		return false;
	plane->dim = description->dim;
	plane->frac_bits = description->frac_bits;
	plane->dtype = dtype_by_name("dtype", description->dtype);
	if (!plane->dtype)
		return false;
	if (description->input_dtype) {
		plane->input_dtype = dtype_by_name("input_dtype", description->input_dtype);
		return plane->input_dtype;
	}
	return true;
}

static bool parse_plane(struct kvscratch_plane *plane, PyObject *tuple)
{
	struct description description = { .dtype = "f32" };

	if (!PyTuple_Check(tuple)) {
		PyErr_Format(PyExc_TypeError, "expected (label, dim, dtype, input_dtype, frac_bits), "
			     "got %R", tuple);
		return false;
	}
	return PyArg_ParseTuple(tuple, "O&O&|szO&:Plane", parse_label, plane->label, parse_number,
				&description.dim, &description.dtype, &description.input_dtype,
				parse_number, &description.frac_bits) &&
	       describe_plane(plane, &description);
}

static bool create_pad(struct kvscratch **handle, uint64_t max_seq_len,
		       const struct kvscratch_plane *planes, uint32_t nr_planes,
		       const Py_buffer *tag)
{
	int err;

	do {
		Py_BEGIN_ALLOW_THREADS
		err = kvscratch_new_planes(handle, max_seq_len, planes, nr_planes, tag->buf,
					   tag->len);
		Py_END_ALLOW_THREADS
	} while (again(err));
	if (err)
		raise_unless_raised(err);
	return !err;
}

static bool create_pad_of_planes(struct kvscratch **handle, uint64_t max_seq_len,
				 PyObject *sequence, const Py_buffer *tag)
{
	struct kvscratch_plane *planes;
	PyObject *tuple = PySequence_Tuple(sequence);
	Py_ssize_t count, parsed = 0;
	bool done = false;

	if (!tuple)
		return false;
	count = PyTuple_Size(tuple);
	/* of more the library says so before it looks at them */
	if (count > KVSCRATCH_MAX_PLANES)
		count = KVSCRATCH_MAX_PLANES + 1;
	planes = PyMem_Calloc(count + 1, sizeof(*planes));
	if (!planes)
		PyErr_NoMemory();
	while (planes && parsed < count && parse_plane(&planes[parsed],
						       PyTuple_GetItem(tuple, parsed)))
		parsed++;
	if (planes && parsed < count)
		name_plane(parsed, NULL);
	else if (planes)
		done = create_pad(handle, max_seq_len, planes, count, tag);
	PyMem_Free(planes);
	Py_DECREF(tuple);
	return done;
}

static PyObject *pad_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
	static char *names[] = { "max_seq_len", "dim", "dtype", "input_dtype", "frac_bits", "planes",
				 "tag", NULL };
	const long long no_dim = LLONG_MIN;
	struct description description = { .dim = no_dim };
	struct kvscratch_plane plane = { 0 };
	struct kvscratch *handle;
	PyObject *planes = NULL;
	Py_buffer tag = { 0 };
	long long max_seq_len;
	bool done = false;

	if (!PyArg_ParseTupleAndKeywords(args, keywords, "O&|O&s$zO&Oy*:Scratchpad", names,
					 parse_number, &max_seq_len, parse_number,
					 &description.dim, &description.dtype,
					 &description.input_dtype, parse_number,
					 &description.frac_bits, &planes, &tag))
		return NULL;
	if ((description.dim == no_dim) == !planes ||
	    (planes && (description.dtype || description.input_dtype || description.frac_bits))) {
		PyErr_SetString(PyExc_TypeError, "expected either planes or the dim, dtype, "
				"input_dtype and frac_bits of one");
	} else if (in_range("max_seq_len", max_seq_len, KVSCRATCH_MAX_SEQ_LEN)) {
		if (!description.dtype)
			description.dtype = "f32";
		if (planes)
			done = create_pad_of_planes(&handle, max_seq_len, planes, &tag);
		else
			done = describe_plane(&plane, &description) &&
			       create_pad(&handle, max_seq_len, &plane, 1, &tag);
	}
	if (tag.obj)
		PyBuffer_Release(&tag);
	return done ? wrap_handle(type, handle) : NULL;
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

static PyObject *pad_open(PyObject *self, PyObject *args, PyObject *keywords)
{
	static char *names[] = { "mode", NULL };
	struct pad *pad = (struct pad *)self;
	struct kvscratch *handle, *opened;
	const char *mode = "r";
	int access, err;

	if (!PyArg_ParseTupleAndKeywords(args, keywords, "|s:open", names, &mode))
		return NULL;
	access = access_by_mode(mode);
	handle = access < 0 ? NULL : open_handle(pad);
	if (!handle)
		return NULL;
	err = kvscratch_open(&opened, handle, access);
	return err ? raise_error(err) : wrap_handle(Py_TYPE(self), opened);
}

/* Forks */

/* A converter of PyArg_Parse: None leaves the number as it is. */
static int parse_number_or_none(PyObject *object, void *number)
{
	return object == Py_None || parse_number(object, number);
}

/* All rows that are committed: after a truncate in between, those that are now. */
static int fork_all(struct kvscratch **made, struct kvscratch *pad, long long max_seq_len)
{
	struct kvscratch_pad_info seen, info;
	int err = kvscratch_pad_info(pad, &info);

	while (!err) {
		seen = info;
		err = kvscratch_fork(made, pad, seen.len, max_seq_len);
		if (err != -ECANCELED && err != -EINVAL)
			break;
		/* a call that succeeds leaves the sentence of the one that failed */
		if (!kvscratch_pad_info(pad, &info) && info.generation != seen.generation)
			err = 0;
	}
	return err;
}

static PyObject *pad_fork(PyObject *self, PyObject *args, PyObject *keywords)
{
	static char *names[] = { "rows", "max_seq_len", NULL };
	const long long not_given = LLONG_MIN;
	long long rows = not_given, max_seq_len = not_given;
	struct pad *pad = (struct pad *)self;
	struct kvscratch *handle, *made;
	PyObject *result;
	int err;

	if (!PyArg_ParseTupleAndKeywords(args, keywords, "|O&O&:fork", names, parse_number_or_none,
					 &rows, parse_number_or_none, &max_seq_len) ||
	    (rows != not_given && !in_range("rows", rows, KVSCRATCH_MAX_SEQ_LEN)) ||
	    (max_seq_len != not_given &&
	     !in_range("max_seq_len", max_seq_len, KVSCRATCH_MAX_SEQ_LEN)))
		return NULL;
	handle = hold_pad(pad);
	if (!handle)
		return NULL;
	if (max_seq_len == not_given)
		max_seq_len = kvscratch_capacity(handle);
	do {
		Py_BEGIN_ALLOW_THREADS
		err = rows == not_given ? fork_all(&made, handle, max_seq_len) :
					  kvscratch_fork(&made, handle, rows, max_seq_len);
		Py_END_ALLOW_THREADS
	} while (again(err));
	result = err ? raise_unless_raised(err) : wrap_handle(Py_TYPE(self), made);
	drop_pad(pad);
	return result;
}

static PyObject *pad_snapshot(PyObject *self, PyObject *unused)
{
	struct pad *pad = (struct pad *)self;
	struct kvscratch *handle = hold_pad(pad), *made;
	PyObject *result;
	int err;

	(void)unused;
	if (!handle)
		return NULL;
	do {
		Py_BEGIN_ALLOW_THREADS
		err = kvscratch_snapshot(&made, handle);
		Py_END_ALLOW_THREADS
	} while (again(err));
	result = err ? raise_unless_raised(err) : wrap_handle(Py_TYPE(self), made);
	drop_pad(pad);
	return result;
}

/* Planes */

/* The index of what a label or an index names, -1 after an exception */
static int64_t find_plane(const struct kvscratch *handle, PyObject *name)
{
	const uint32_t count = kvscratch_nr_planes(handle);
	char label[KVSCRATCH_LABEL_BYTES + 1] = "";
	long long index;
	int found;

	if (!PyUnicode_Check(name)) {
		if (!parse_number(name, &index))
			return -1;
		if (index >= 0 && index < count)
			return index;
		PyErr_Format(PyExc_IndexError, "expected a plane below %u, got %lld",
			     (unsigned int)count, index);
		return -1;
	}
	if (!parse_label(name, label))
		return -1;
	found = kvscratch_find_plane(handle, label);
	if (found == -ENOENT)
		PyErr_SetString(PyExc_KeyError, kvscratch_error());
	else if (found == -ENOTUNIQ)
		PyErr_SetString(PyExc_ValueError, kvscratch_error());
	else if (found < 0)
		raise_error(found);
	return found < 0 ? -1 : found;
}

/* The same, where None is the plane of a pad that has but one */
static int64_t find_plane_or_only(struct kvscratch *handle, PyObject *name)
{
	struct kvscratch_info info;
	int err;

	if (name != Py_None)
		return find_plane(handle, name);
	err = kvscratch_nr_planes(handle) == 1 ? 0 : kvscratch_info(handle, &info);
	if (err)
		raise_error(err);
	return err ? -1 : 0;
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
 * struct rows - rows of a plane
 * @buffer: where they are
 * @count: rows
 */
struct rows {
	Py_buffer buffer;
	uint64_t count;
};

/* bf16, which NumPy lacks, and stored rows of mxint8, which are no plain array, come as bytes. */
static bool check_columns(const struct kvscratch_plane *plane, Py_ssize_t columns, bool bytes)
{
	const uint32_t expected = bytes ? plane->input_row_bytes : plane->dim;

	if (columns == expected)
		return true;
	PyErr_Format(PyExc_ValueError, "shape mismatch: expected %u %s, got %zd",
		     (unsigned int)expected, bytes ? "bytes" : "elements", columns);
	return false;
}

static bool check_rows(const struct kvscratch_plane *plane, struct rows *rows)
{
	const Py_buffer *buffer = &rows->buffer;
	uint32_t dtype = plane->input_dtype;
	struct element got = element_of(buffer), expected = element_of_dtype(dtype);
	bool bytes = got.kind && got.bytes == 1 &&
		     (dtype == KVSCRATCH_DTYPE_BF16 || dtype == KVSCRATCH_DTYPE_MXINT8);
	bool matches = got.kind == expected.kind && got.bytes == expected.bytes;

	/* the sign of bits that are no integer says nothing */
	if (dtype == KVSCRATCH_DTYPE_BF16 && got.kind == 'i' && got.bytes == expected.bytes)
		matches = true;
	if (!matches && !bytes)
		return raise_dtype_mismatch(dtype, got, buffer);
	if (buffer->ndim != 1 && buffer->ndim != 2) {
		PyErr_Format(PyExc_ValueError,
			     "shape mismatch: expected [%u] or [n, %u], got %d dimensions",
			     (unsigned int)plane->dim, (unsigned int)plane->dim, buffer->ndim);
		return false;
	}
	if (!PyBuffer_IsContiguous(buffer, 'C')) {
		PyErr_SetString(PyExc_ValueError,
				"expected a C-contiguous array, got one with gaps or in another order");
		return false;
	}
	rows->count = buffer->ndim == 2 ? buffer->shape[0] : 1;
	return check_columns(plane, buffer->shape[buffer->ndim - 1], bytes);
}

/* The rows of an array, to be released; of which plane they are stands in what is raised. */
static bool get_rows(struct rows *rows, PyObject *array, const struct kvscratch *handle,
		     uint32_t index)
{
	const struct kvscratch_plane *plane = kvscratch_plane(handle, index);
	bool good = false;

	if (!PyObject_CheckBuffer(array)) {
		PyErr_Format(PyExc_TypeError, "expected an array or another buffer, got %R",
			     Py_TYPE(array));
	} else if (!PyObject_GetBuffer(array, &rows->buffer, PyBUF_FULL_RO)) {
		good = check_rows(plane, rows);
		if (!good)
			PyBuffer_Release(&rows->buffer);
	}
	if (!good && kvscratch_nr_planes(handle) > 1)
		name_plane(index, plane->label);
	return good;
}

/* Rows of all planes, of each as many; NULL after an exception */
static struct rows *get_token_rows(PyObject *arrays, const struct kvscratch *handle)
{
	const uint32_t nr_planes = kvscratch_nr_planes(handle);
	struct rows *rows = PyMem_Calloc(nr_planes, sizeof(*rows));
	uint32_t i;

	if (!rows) {
		PyErr_NoMemory();
		return NULL;
	}
	for (i = 0; i < nr_planes; i++) {
		if (!get_rows(&rows[i], PyTuple_GetItem(arrays, i), handle, i))
			break;
		if (rows[i].count == rows[0].count)
			continue;
		PyErr_Format(PyExc_ValueError, "expected rows of as many tokens as plane 0 has, %llu, "
			     "got %llu", (unsigned long long)rows[0].count,
			     (unsigned long long)rows[i].count);
		name_plane(i, kvscratch_plane(handle, i)->label);
		PyBuffer_Release(&rows[i].buffer);
		break;
	}
	if (i == nr_planes)
		return rows;
	while (i--)
		PyBuffer_Release(&rows[i].buffer);
	PyMem_Free(rows);
	return NULL;
}

/* Token after token, a row of each plane in turn */
static void pack_tokens(char *to, const struct rows *rows, const struct kvscratch *handle)
{
	const uint32_t nr_planes = kvscratch_nr_planes(handle);

	for (uint64_t token = 0; token < rows[0].count; token++) {
		for (uint32_t i = 0; i < nr_planes; i++) {
			const size_t bytes = kvscratch_plane(handle, i)->input_row_bytes;

			memcpy(to, (const char *)rows[i].buffer.buf + token * bytes, bytes);
			to += bytes;
		}
	}
}

static int append_tokens(struct kvscratch *handle, const struct rows *rows)
{
	const uint64_t count = rows[0].count, token_bytes = kvscratch_input_row_bytes(handle);
	char *tokens = NULL;
	int err;

	/* of more the library says so before it looks at them */
	if (count <= KVSCRATCH_MAX_WRITE / token_bytes && count <= kvscratch_capacity(handle)) {
		tokens = malloc(count * token_bytes + 1);
		if (!tokens)
			return -ENOMEM;
		pack_tokens(tokens, rows, handle);
	}
	err = kvscratch_append_tokens(handle, tokens, count, token_bytes);
	free(tokens);
	return err;
}

/* Of a mapping the arrays in the order of the planes, each of which has to be in it */
static PyObject *arrays_of_mapping(PyObject *mapping, const struct kvscratch *handle)
{
	const uint32_t nr_planes = kvscratch_nr_planes(handle);
	PyObject *list = PyList_New(0), *tuple = NULL;

	for (uint32_t i = 0; list && i < nr_planes; i++) {
		PyObject *label = label_of(kvscratch_plane(handle, i));
		PyObject *array = label ? PyObject_GetItem(mapping, label) : NULL;

		if (!array || PyList_Append(list, array))
			Py_CLEAR(list);
		Py_XDECREF(array);
		Py_XDECREF(label);
	}
	if (list)
		tuple = PyList_AsTuple(list);
	Py_XDECREF(list);
	return tuple;
}

static PyObject *raise_no_arrays(PyObject *tokens, uint32_t nr_planes)
{
	PyErr_Format(PyExc_TypeError, nr_planes == 1 ?
		     "expected an array or another buffer, got %R" :
		     "expected a dict or a sequence with an array for each plane, got %R",
		     Py_TYPE(tokens));
	return NULL;
}

static PyObject *arrays_of_tokens(PyObject *tokens, const struct kvscratch *handle)
{
	const uint32_t nr_planes = kvscratch_nr_planes(handle);
	const bool mapping = PyDict_Check(tokens) || PyObject_HasAttrString(tokens, "keys");
	Py_ssize_t count;

	if (PyObject_CheckBuffer(tokens) || PyUnicode_Check(tokens) ||
	    !(mapping || PySequence_Check(tokens)))
		return raise_no_arrays(tokens, nr_planes);
	count = PyObject_Size(tokens);
	if (count == nr_planes)
		return mapping ? arrays_of_mapping(tokens, handle) : PySequence_Tuple(tokens);
	/* numbers, or a batch of arrays */
	if (count >= 0 && nr_planes == 1 && !mapping)
		return raise_no_arrays(tokens, nr_planes);
	if (count >= 0)
		PyErr_Format(PyExc_ValueError, "expected an array for each of %u planes, got %zd",
			     (unsigned int)nr_planes, count);
	return NULL;
}

/* What is refused as it stands leaves staged rows as they are; what fails later maybe not. */
static bool was_refused(int err)
{
	return err == -EINVAL || err == -ENOSPC || err == -E2BIG;
}

/* A call that changes the pad at once has returned @err: of a Writer it drops what is staged. */
static void note_change(struct pad *pad, int err)
{
	int64_t len = pad->staged && !was_refused(err) ? kvscratch_len(pad->handle) : -1;

	for (uint32_t i = 0; len >= 0 && i < kvscratch_nr_planes(pad->handle); i++)
		pad->staged[i] = len;
}

static PyObject *append_arrays(struct pad *pad, PyObject *arrays)
{
	struct kvscratch *handle = pad->handle;
	struct rows *rows = get_token_rows(arrays, handle);
	int err;

	if (!rows)
		return NULL;
	do {
		Py_BEGIN_ALLOW_THREADS
		err = append_tokens(handle, rows);
		Py_END_ALLOW_THREADS
	} while (again(err));
	note_change(pad, err);
	for (uint32_t i = 0; i < kvscratch_nr_planes(handle); i++)
		PyBuffer_Release(&rows[i].buffer);
	PyMem_Free(rows);
	return err == -ENOMEM ? PyErr_NoMemory() : raise_full_or_error(err);
}

static PyObject *append_array(struct pad *pad, PyObject *array)
{
	struct kvscratch *handle = pad->handle;
	struct rows rows;
	int err;

	if (!get_rows(&rows, array, handle, 0))
		return NULL;
	do {
		Py_BEGIN_ALLOW_THREADS
		err = kvscratch_append_tokens(handle, rows.buffer.buf, rows.count,
					      kvscratch_input_row_bytes(handle));
		Py_END_ALLOW_THREADS
	} while (again(err));
	note_change(pad, err);
	PyBuffer_Release(&rows.buffer);
	return raise_full_or_error(err);
}

static PyObject *pad_append(PyObject *self, PyObject *tokens)
{
	struct pad *pad = (struct pad *)self;
	struct kvscratch *handle = hold_writer(pad);
	PyObject *arrays, *result = NULL;

	if (!handle)
		return NULL;
	if (kvscratch_nr_planes(handle) == 1 && PyObject_CheckBuffer(tokens)) {
		result = append_array(pad, tokens);
	} else {
		arrays = arrays_of_tokens(tokens, handle);
		/* what is no tuple of as many arrays has lied about its size */
		if (arrays && PyTuple_Size(arrays) != kvscratch_nr_planes(handle))
			PyErr_SetString(PyExc_ValueError, "the size of the sequence changed");
		else if (arrays)
			result = append_arrays(pad, arrays);
		Py_XDECREF(arrays);
	}
	drop_pad(pad);
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
	note_change(pad, err);
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
	note_change(pad, err);
	result = none_or_error(err);
	drop_pad(pad);
	return result;
}

static PyObject *pad_seal(PyObject *self, PyObject *unused)
{
	struct pad *pad = (struct pad *)self;
	struct kvscratch *handle = hold_writer(pad);
	PyObject *result;
	int err;

	(void)unused;
	if (!handle)
		return NULL;
	do {
		Py_BEGIN_ALLOW_THREADS
		err = kvscratch_seal(handle);
		Py_END_ALLOW_THREADS
	} while (again(err));
	note_change(pad, err);
	result = none_or_error(err);
	drop_pad(pad);
	return result;
}

/* The only writer */

static PyObject *wrap_writer(struct kvscratch *handle)
{
	uint64_t *staged = PyMem_Calloc(kvscratch_nr_planes(handle), sizeof(*staged));
	struct pad *writer;

	if (!staged) {
		kvscratch_close(handle);
		return PyErr_NoMemory();
	}
	writer = (struct pad *)wrap_handle(writer_type, handle);
	if (!writer) {
		PyMem_Free(staged);
		return NULL;
	}
	writer->staged = staged;
	note_change(writer, 0);
	return (PyObject *)writer;
}

static PyObject *become_writer(PyObject *self, int (*open)(struct kvscratch **writer,
							   const struct kvscratch *pad))
{
	struct pad *pad = (struct pad *)self;
	struct kvscratch *handle = hold_writer(pad), *writer;
	PyObject *result;
	int err;

	if (!handle)
		return NULL;
	do {
		Py_BEGIN_ALLOW_THREADS
		err = open(&writer, handle);
		Py_END_ALLOW_THREADS
	} while (again(err));
	result = err ? raise_unless_raised(err) : wrap_writer(writer);
	drop_pad(pad);
	return result;
}

static PyObject *pad_writer(PyObject *self, PyObject *unused)
{
	(void)unused;
	return become_writer(self, kvscratch_writer);
}

static PyObject *pad_takeover(PyObject *self, PyObject *unused)
{
	(void)unused;
	return become_writer(self, kvscratch_takeover);
}

/* Where rows begin: at @argument, or behind what is staged of the plane */
static bool parse_row(const struct pad *writer, uint32_t plane, PyObject *argument,
		      long long *row)
{
	if (argument != Py_None)
		return parse_number(argument, row) && in_range("row", *row, KVSCRATCH_MAX_SEQ_LEN);
	*row = writer->staged[plane];
	return true;
}

static void rows_are_staged(struct pad *writer, uint32_t plane, uint64_t row, uint64_t rows,
			    int err)
{
	uint64_t *staged = &writer->staged[plane];

	if (!err && *staged < row + rows)
		*staged = row + rows;
	else if (err && !was_refused(err))
		*staged = row;
}

static PyObject *stage_rows(struct pad *writer, uint32_t plane, PyObject *array,
			    PyObject *row_argument)
{
	struct kvscratch *handle = writer->handle;
	struct rows rows;
	long long row;
	int err;

	if (!parse_row(writer, plane, row_argument, &row) ||
	    !get_rows(&rows, array, handle, plane))
		return NULL;
	do {
		Py_BEGIN_ALLOW_THREADS
		err = kvscratch_stage(handle, plane, row, rows.buffer.buf, rows.count);
		Py_END_ALLOW_THREADS
	} while (again(err));
	rows_are_staged(writer, plane, row, rows.count, err);
	PyBuffer_Release(&rows.buffer);
	return raise_full_or_error(err);
}

static PyObject *writer_stage(PyObject *self, PyObject *args, PyObject *keywords)
{
	static char *names[] = { "", "", "row", NULL };
	struct pad *writer = (struct pad *)self;
	PyObject *name, *array, *row = Py_None, *result = NULL;
	struct kvscratch *handle;
	int64_t plane;

	if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO|O:stage", names, &name, &array, &row))
		return NULL;
	handle = hold_writer(writer);
	if (!handle)
		return NULL;
	plane = find_plane(handle, name);
	if (plane >= 0)
		result = stage_rows(writer, plane, array, row);
	drop_pad(writer);
	return result;
}

static PyObject *keep_rows(struct pad *writer, uint32_t plane, uint64_t count,
			   PyObject *row_argument)
{
	struct kvscratch *handle = writer->handle;
	long long row;
	int err;

	if (!parse_row(writer, plane, row_argument, &row))
		return NULL;
	do {
		Py_BEGIN_ALLOW_THREADS
		err = kvscratch_keep(handle, plane, row, count);
		Py_END_ALLOW_THREADS
	} while (again(err));
	/* nothing is stored that could fail */
	if (!err)
		rows_are_staged(writer, plane, row, count, err);
	return raise_full_or_error(err);
}

static PyObject *writer_keep(PyObject *self, PyObject *args, PyObject *keywords)
{
	static char *names[] = { "", "n", "row", NULL };
	struct pad *writer = (struct pad *)self;
	PyObject *name, *row = Py_None, *result = NULL;
	struct kvscratch *handle;
	long long count;
	int64_t plane;

	if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO&|O:keep", names, &name, parse_number,
					 &count, &row) ||
	    !in_range("n", count, KVSCRATCH_MAX_SEQ_LEN))
		return NULL;
	handle = hold_writer(writer);
	if (!handle)
		return NULL;
	plane = find_plane(handle, name);
	if (plane >= 0)
		result = keep_rows(writer, plane, count, row);
	drop_pad(writer);
	return result;
}

/* The most that a plane has staged: a plane that was forgotten is an error, and no loss. */
static uint64_t most_staged(const struct pad *writer)
{
	uint64_t most = 0;

	for (uint32_t i = 0; i < kvscratch_nr_planes(writer->handle); i++)
		if (most < writer->staged[i])
			most = writer->staged[i];
	return most;
}

static PyObject *writer_commit(PyObject *self, PyObject *args, PyObject *keywords)
{
	static char *names[] = { "len", NULL };
	struct pad *writer = (struct pad *)self;
	PyObject *argument = Py_None, *result;
	struct kvscratch *handle;
	long long len;
	int err;

	if (!PyArg_ParseTupleAndKeywords(args, keywords, "|O:commit", names, &argument))
		return NULL;
	if (argument != Py_None && (!parse_number(argument, &len) ||
				    !in_range("len", len, KVSCRATCH_MAX_SEQ_LEN)))
		return NULL;
	handle = hold_writer(writer);
	if (!handle)
		return NULL;
	if (argument == Py_None)
		len = most_staged(writer);
	do {
		Py_BEGIN_ALLOW_THREADS
		err = kvscratch_commit(handle, len);
		Py_END_ALLOW_THREADS
	} while (again(err));
	for (uint32_t i = 0; !err && i < kvscratch_nr_planes(handle); i++)
		writer->staged[i] = len;
	result = none_or_error(err);
	drop_pad(writer);
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

/* A row of a plane: its elements and, of mxint8, its scales behind them */
static PyObject *copy_row(struct kvscratch *handle, uint32_t index, uint64_t row)
{
	const struct kvscratch_plane *plane = kvscratch_plane(handle, index);
	PyObject *copy = PyByteArray_FromStringAndSize(NULL,
						       plane->row_bytes + plane->scales_row_bytes);
	int err;

	if (!copy)
		return NULL;
	do {
		Py_BEGIN_ALLOW_THREADS
		err = kvscratch_copy_plane_rows(handle, index, row, 1, PyByteArray_AsString(copy));
		Py_END_ALLOW_THREADS
	} while (again(err));
	if (!err)
		return copy;
	Py_DECREF(copy);
	if (err != -EINVAL)
		return none_or_error(err);
	PyErr_SetString(PyExc_IndexError, kvscratch_error());
	return NULL;
}

static PyObject *pad_copy_row(PyObject *self, PyObject *args)
{
	struct pad *pad = (struct pad *)self;
	struct kvscratch *handle;
	PyObject *name, *copy = NULL, *result = NULL;
	int64_t plane;
	long long row;

	if (!PyArg_ParseTuple(args, "LO:_copy_row", &row, &name) ||
	    !in_range("row", row, KVSCRATCH_MAX_SEQ_LEN))
		return NULL;
	handle = hold_pad(pad);
	if (!handle)
		return NULL;
	plane = find_plane_or_only(handle, name);
	if (plane >= 0)
		copy = copy_row(handle, plane, row);
	if (copy) {
		const struct kvscratch_plane *its = kvscratch_plane(handle, plane);

		result = Py_BuildValue("(NsI)", copy, format_of_dtype(its->dtype),
				       (unsigned int)its->dim);
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
	if (!err || err == -ETIMEDOUT || err == -EINTR || err == -EROFS)
		result = PyBool_FromLong(err != -EROFS);
	else
		result = raise_error(err);
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

/* The rows of @tensor in an array of a plane of the mapped @pad */
static PyObject *new_view(struct pad *pad, uint32_t plane, const struct kvscratch_tensor *tensor,
			  const void *data, const char *format, Py_ssize_t columns,
			  Py_ssize_t element_bytes)
{
	struct view *view = (struct view *)PyType_GenericAlloc(view_type, 0);

	if (!view)
		return NULL;
	view->pad = (struct pad *)Py_NewRef((PyObject *)pad);
	pad->holders++;
	view->plane = plane;
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

/* Of a pad that is held */
static PyObject *view_plane(struct pad *pad, PyObject *name)
{
	struct kvscratch *handle = pad->handle;
	int64_t plane = find_plane_or_only(handle, name);
	struct kvscratch_tensor tensor;
	int err;

	if (plane < 0 || !map_pad(pad))
		return NULL;
	err = kvscratch_plane_tensor(handle, plane, &tensor);
	if (err)
		return raise_error(err);
	return new_view(pad, plane, &tensor, tensor.data, format_of_dtype(tensor.dtype), tensor.dim,
			kvscratch_dtype_size(tensor.dtype));
}

static PyObject *pad_view(PyObject *self, PyObject *args, PyObject *keywords)
{
	static char *names[] = { "plane", NULL };
	struct pad *pad = (struct pad *)self;
	PyObject *view, *plane = Py_None;

	if (!PyArg_ParseTupleAndKeywords(args, keywords, "|O:view", names, &plane))
		return NULL;
	if (!hold_pad(pad))
		return NULL;
	view = view_plane(pad, plane);
	drop_pad(pad);
	return view;
}

static PyObject *view_scales(PyObject *self, PyObject *unused)
{
	struct view *view = (struct view *)self;
	struct kvscratch_tensor tensor = { .len = view->shape[0], .state = view->state };
	const struct kvscratch_view *map = view->pad->map;
	const uint8_t *scales = kvscratch_view_plane_scales(map, view->plane);

	(void)unused;
	if (!scales || view->data == scales) {
		const struct kvscratch_plane *plane = kvscratch_view_plane(map, view->plane);

		PyErr_Format(PyExc_TypeError, "expected the view of an mxint8 pad, got %s",
			     scales ? "its scales" : kvscratch_dtype_name(plane->dtype));
		return NULL;
	}
	return new_view(view->pad, view->plane, &tensor, scales, "B",
			view->shape[1] / KVSCRATCH_MX_BLOCK, 1);
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

/* Of a pad that is held */
static PyObject *save_plane(struct kvscratch *handle, const char *path, PyObject *plane)
{
	int64_t index = find_plane(handle, plane);
	int err;

	if (index < 0)
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	err = kvscratch_save_plane(path, handle, index, hear_signals, NULL);
	Py_END_ALLOW_THREADS
	return none_or_error(err);
}

static PyObject *pad_save_plane(PyObject *self, PyObject *args)
{
	struct pad *pad = (struct pad *)self;
	PyObject *path, *plane, *result = NULL;

	if (!PyArg_ParseTuple(args, "O&O:_save_plane", PyUnicode_FSConverter, &path, &plane))
		return NULL;
	if (hold_pad(pad)) {
		result = save_plane(pad->handle, PyBytes_AsString(path), plane);
		drop_pad(pad);
	}
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
	PAD_BACKEND,
	PAD_MODE,
	PAD_STATE,
	PAD_GENERATION,
	PAD_SATURATED,
	PAD_SEALED,
	PAD_ID,
	PAD_PARENT_ID,
	PAD_PARENT_ROWS,
	PAD_SHARED_BYTES,
	PAD_TAG,
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

static PyObject *info_of(struct kvscratch *handle, enum pad_attribute attribute)
{
	struct kvscratch_pad_info info;
	int err = kvscratch_pad_info(handle, &info);

	if (err)
		return raise_error(err);
	switch (attribute) {
	case PAD_GENERATION:
		return PyLong_FromUnsignedLongLong(info.generation);
	case PAD_SATURATED:
		return PyLong_FromUnsignedLongLong(info.saturated);
	case PAD_SEALED:
		return PyBool_FromLong(info.flags & KVSCRATCH_PAD_SEALED);
	case PAD_ID:
		return PyLong_FromUnsignedLongLong(info.id);
	case PAD_PARENT_ID:
		return PyLong_FromUnsignedLongLong(info.parent_id);
	case PAD_PARENT_ROWS:
		return PyLong_FromUnsignedLongLong(info.parent_rows);
	case PAD_SHARED_BYTES:
		return PyLong_FromUnsignedLongLong(info.shared_bytes);
	default:
		return PyBytes_FromStringAndSize((const char *)info.tag, sizeof(info.tag));
	}
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
		return PyLong_FromUnsignedLongLong(kvscratch_capacity(handle));
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

/* What a pad of one plane is made of */
enum plane_attribute {
	PLANE_DIM,
	PLANE_DTYPE,
	PLANE_INPUT_DTYPE,
	PLANE_FRAC_BITS,
	PLANE_FORMAT,
};

static PyObject *pad_get_of_plane(PyObject *self, void *closure)
{
	struct kvscratch *handle = open_handle((struct pad *)self);
	const struct kvscratch_plane *plane;

	if (!handle || find_plane_or_only(handle, Py_None) < 0)
		return NULL;
	plane = kvscratch_plane(handle, 0);
	switch ((enum plane_attribute)(uintptr_t)closure) {
	case PLANE_DIM:
		return PyLong_FromUnsignedLong(plane->dim);
	case PLANE_DTYPE:
		return PyUnicode_FromString(kvscratch_dtype_name(plane->dtype));
	case PLANE_INPUT_DTYPE:
		return PyUnicode_FromString(kvscratch_dtype_name(plane->input_dtype));
	case PLANE_FRAC_BITS:
		return PyLong_FromUnsignedLong(plane->frac_bits);
	default:
		return PyUnicode_FromString(format_of_dtype(plane->dtype));
	}
}

/* (label, dim, dtype, input_dtype, frac_bits), where an input_dtype that is the dtype is None */
static PyObject *plane_tuple(const struct kvscratch_plane *plane)
{
	const char *input_dtype = plane->input_dtype == plane->dtype ? NULL :
				  kvscratch_dtype_name(plane->input_dtype);

	return Py_BuildValue("(NIszI)", label_of(plane), (unsigned int)plane->dim,
			     kvscratch_dtype_name(plane->dtype), input_dtype,
			     (unsigned int)plane->frac_bits);
}

static PyObject *pad_planes(PyObject *self, PyObject *unused)
{
	struct kvscratch *handle = open_handle((struct pad *)self);
	PyObject *list = handle ? PyList_New(0) : NULL;

	(void)unused;
	for (uint32_t i = 0; list && i < kvscratch_nr_planes(handle); i++) {
		PyObject *plane = plane_tuple(kvscratch_plane(handle, i));

		if (!plane || PyList_Append(list, plane))
			Py_CLEAR(list);
		Py_XDECREF(plane);
	}
	return list;
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

#define KEYWORDS(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef handle_methods[] = {
	{ "append", pad_append, METH_O,
	  "append($self, rows, /)\n--\n\n"
	  "Append a row, [dim], or rows, [n, dim]: all of them or none. Of a pad of planes whole\n"
	  "tokens: a dict with an array for each label, or a sequence with one for each plane.\n\n"
	  "An array is anything with a C-contiguous buffer of input_dtype elements: a NumPy array,\n"
	  "array.array, memoryview. bf16 comes as 2-byte integers or bytes; rows of mxint8\n"
	  "without an input_dtype as bytes, elements and then scales.\n\n"
	  "Raises TypeError for elements of another type; ValueError for another shape, for gaps\n"
	  "between elements, and for a NaN or an infinity that would become an integer; KeyError\n"
	  "for a plane without an array; Full when the rows do not fit. Nothing is appended then." },
	{ "truncate", KEYWORDS(pad_truncate), METH_VARARGS | METH_KEYWORDS,
	  "truncate($self, /, n, zero=False)\n--\n\n"
	  "Keep the first n rows and start a new generation; ValueError when there are fewer.\n"
	  "With zero the memory behind them is scrubbed." },
	{ "clear", KEYWORDS(pad_clear), METH_VARARGS | METH_KEYWORDS,
	  "clear($self, /, zero=False)\n--\n\nDrop all rows; the same as truncate(0, zero)." },
	{ "seal", pad_seal, METH_NOARGS,
	  "seal($self, /)\n--\n\n"
	  "Make the present rows final: what would change the pad is OSError EROFS from now on." },
	{ "fileno", pad_fileno, METH_NOARGS,
	  "fileno($self, /)\n--\n\nThe file descriptor of the handle, which stays the object's." },
	{ "close", pad_close, METH_NOARGS,
	  "close($self, /)\n--\n\n"
	  "End the use of this object. Descriptor and memory stay until the last view and array\n"
	  "of it is gone; the pad itself until the last handle of any process is. A writer's\n"
	  "role ends, and what it staged is dropped." },
	{ "__enter__", pad_enter, METH_NOARGS, NULL },
	{ "__exit__", pad_close, METH_VARARGS, NULL },
	{ 0 },
};

#define PAD_ATTRIBUTE(name, attribute, doc)	\
	{ name, pad_get, NULL, doc, (void *)(uintptr_t)(attribute) }

static PyGetSetDef handle_attributes[] = {
	PAD_ATTRIBUTE("capacity", PAD_CAPACITY, "max_seq_len: rows that fit"),
	PAD_ATTRIBUTE("backend", PAD_BACKEND, "\"kernel\" or \"memfd\""),
	PAD_ATTRIBUTE("mode", PAD_MODE, "What the handle allows: \"r\", \"w\" or \"rw\""),
	PAD_ATTRIBUTE("generation", PAD_GENERATION, "Truncates so far"),
	PAD_ATTRIBUTE("saturated", PAD_SATURATED, "Elements that were clamped so far"),
	PAD_ATTRIBUTE("sealed", PAD_SEALED, "Whether the rows are final"),
	PAD_ATTRIBUTE("tag", PAD_TAG, "64 bytes: what the pad was made with, and zeros"),
	{ "closed", pad_get_closed, NULL, "Whether close() was called", NULL },
	{ 0 },
};

static PyType_Slot handle_slots[] = {
	{ Py_tp_doc, "What pads and their writers have in common" },
	{ Py_tp_dealloc, pad_dealloc },
	{ Py_tp_methods, handle_methods },
	{ Py_tp_getset, handle_attributes },
	{ Py_sq_length, pad_length },
	{ 0 },
};

static PyType_Spec handle_spec = {
	.name = "kvscratch._kvscratch.Handle",
	.basicsize = sizeof(struct pad),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
	.slots = handle_slots,
};

static PyMethodDef pad_methods[] = {
	{ "view", KEYWORDS(pad_view), METH_VARARGS | METH_KEYWORDS,
	  "view($self, /, plane=None)\n--\n\n"
	  "The committed rows of this moment as a View, without a copy. plane is a label or an\n"
	  "index; a pad of one plane needs none." },
	{ "writer", pad_writer, METH_NOARGS,
	  "writer($self, /)\n--\n\n"
	  "Become the pad's only writer: a Writer, for as long as it is open. OSError\n"
	  "EBUSY while there is another one." },
	{ "takeover", pad_takeover, METH_NOARGS,
	  "takeover($self, /)\n--\n\n"
	  "The same, from whoever is: a writer that hangs. All that it calls later is OSError\n"
	  "ESTALE. Of a memfd it waits for a call that the other is in." },
	{ "fork", KEYWORDS(pad_fork), METH_VARARGS | METH_KEYWORDS,
	  "fork($self, /, rows=None, max_seq_len=None)\n--\n\n"
	  "A new pad that begins with the first rows of this one, all committed ones without rows,\n"
	  "and as many as fit this one without max_seq_len. It can be written, and this one goes on\n"
	  "as before: what is appended to either the other never sees. copy.copy(pad) is the same\n"
	  "as fork().\n\n"
	  "The rows stay in the same memory, also when one of the pads is gone; in a memfd they\n"
	  "are copied. OSError EBADF when this handle is for reading only and the pad not sealed;\n"
	  "ValueError for more rows than there are, or than max_seq_len. While rows are shared a\n"
	  "truncate() that would drop them is OSError ETXTBSY: see rewind()." },
	{ "snapshot", pad_snapshot, METH_NOARGS,
	  "snapshot($self, /)\n--\n\n"
	  "A sealed fork of all rows that are committed, without room for more: what it shows\n"
	  "never changes." },
	{ "open", KEYWORDS(pad_open), METH_VARARGS | METH_KEYWORDS,
	  "open($self, /, mode=\"r\")\n--\n\n"
	  "A handle of its own on the pad, for another thread, say, or another process: mode is\n"
	  "\"r\", \"rw\" or, but for a memfd, \"w\", and no more than this one allows." },
	{ "open_reader", pad_open_reader, METH_NOARGS,
	  "open_reader($self, /)\n--\n\nThe same as open(\"r\")." },
	{ "attach", KEYWORDS(pad_attach), METH_VARARGS | METH_KEYWORDS | METH_CLASS,
	  "attach($type, /, source, mode=\"r\")\n--\n\n"
	  "A handle of its own on an existing pad.\n\n"
	  "source is a descriptor or an object with fileno(), which stays the caller's; or the\n"
	  "name of a held pad, \"story/k0\", or \"story\" for the only pad of a holder. mode is \"r\",\n"
	  "\"rw\" or, but for a memfd, \"w\"; it cannot widen what the source allows." },
	{ "from_fd", pad_from_fd, METH_O | METH_CLASS,
	  "from_fd($type, fd, /)\n--\n\n"
	  "Use an inherited or received descriptor as it is. The object takes it over and closes\n"
	  "it; after an exception it is still the caller's." },
	{ "load", KEYWORDS(pad_load), METH_VARARGS | METH_KEYWORDS | METH_CLASS,
	  "load($type, /, path, name=None, max_seq_len=0)\n--\n\n"
	  "A new pad of rows that were saved; name says which, where a file has several.\n"
	  "max_seq_len is its capacity, 0 the one of the file, which is refused where it is far\n"
	  "beyond the size of the file. The pad takes what the one that was saved took: one that\n"
	  "converted its input does so again." },
	{ "_load_all", pad_load_all, METH_O | METH_CLASS, NULL },
	{ "_copy_row", pad_copy_row, METH_VARARGS, NULL },
	{ "_planes", pad_planes, METH_NOARGS, NULL },
	{ "_save_plane", pad_save_plane, METH_VARARGS, NULL },
	{ "_wait", pad_wait, METH_VARARGS, NULL },
	{ 0 },
};

#define PLANE_ATTRIBUTE(name, attribute, doc)	\
	{ name, pad_get_of_plane, NULL, doc, (void *)(uintptr_t)(attribute) }

static PyGetSetDef pad_attributes[] = {
	PAD_ATTRIBUTE("id", PAD_ID, "A number that no other pad of the backend has"),
	PAD_ATTRIBUTE("parent_id", PAD_PARENT_ID, "Of a fork the id of the pad it is of, else 0"),
	PAD_ATTRIBUTE("parent_rows", PAD_PARENT_ROWS, "Rows that a fork began with, else 0"),
	PAD_ATTRIBUTE("shared_bytes", PAD_SHARED_BYTES,
		      "Memory that a fork took over from that pad: none in a memfd, which is a copy"),
	PAD_ATTRIBUTE("state", PAD_STATE, "The low half of generation << 32 | len, for wait()"),
	PLANE_ATTRIBUTE("dim", PLANE_DIM, "Elements per row of a pad of one plane"),
	PLANE_ATTRIBUTE("dtype", PLANE_DTYPE, "What such a pad stores, \"f32\" and the like"),
	PLANE_ATTRIBUTE("input_dtype", PLANE_INPUT_DTYPE, "What append() of such a pad takes"),
	PLANE_ATTRIBUTE("frac_bits", PLANE_FRAC_BITS, "Fraction bits of an integer of such a pad"),
	PLANE_ATTRIBUTE("format", PLANE_FORMAT, "A stored element, as the struct module has it"),
	{ 0 },
};

static PyType_Slot pad_slots[] = {
	{ Py_tp_doc, "Scratchpad without what the package adds to it" },
	{ Py_tp_new, pad_new },
	{ Py_tp_methods, pad_methods },
	{ Py_tp_getset, pad_attributes },
	{ Py_tp_str, pad_str },
	{ 0 },
};

static PyType_Spec pad_spec = {
	.name = "kvscratch._kvscratch.Pad",
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
	.slots = pad_slots,
};

static PyMethodDef writer_methods[] = {
	{ "stage", KEYWORDS(writer_stage), METH_VARARGS | METH_KEYWORDS,
	  "stage($self, plane, rows, /, row=None)\n--\n\n"
	  "Put a row, [dim], or rows, [n, dim], of one plane in their place, of which plane is\n"
	  "the label or the index. They are in every view at once, and not committed.\n\n"
	  "row is where they begin: from the committed rows to what is staged of the plane, and\n"
	  "behind that without it. Raises what append() does; ValueError for a row that is\n"
	  "committed or leaves a gap. Rows from row on are not staged then." },
	{ "keep", KEYWORDS(writer_keep), METH_VARARGS | METH_KEYWORDS,
	  "keep($self, plane, /, n, row=None)\n--\n\n"
	  "Stage n rows as they lie there, without a copy: those that were stored as a whole since\n"
	  "this is the writer, and neither overwritten nor zeroed since; else ValueError." },
	{ "commit", KEYWORDS(writer_commit), METH_VARARGS | METH_KEYWORDS,
	  "commit($self, /, len=None)\n--\n\n"
	  "Commit rows below len, of all planes at once; without it all that are staged.\n\n"
	  "What is staged beyond is dropped: of k drafts of which a are accepted, commit\n"
	  "len(writer) + a. ValueError when a plane has staged fewer; all stay staged then." },
	{ 0 },
};

static PyType_Slot writer_slots[] = {
	{ Py_tp_doc,
	  "The only writer of a pad, from Scratchpad.writer() to close() or the end of a with.\n\n"
	  "It puts rows of single planes in their place and commits those of all at once:\n\n"
	  "    with pad.writer() as writer:\n"
	  "        writer.stage(\"k0\", k)\n"
	  "        writer.stage(\"v0\", v)\n"
	  "        writer.commit()\n\n"
	  "append(), truncate(), clear() and seal() are a pad's, and drop what is staged. Threads\n"
	  "may stage different planes at once; len() is the committed rows." },
	{ Py_tp_methods, writer_methods },
	{ 0 },
};

static PyType_Spec writer_spec = {
	.name = "kvscratch.Writer",
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
	.slots = writer_slots,
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
	int replace, err;

	(void)module;
	if (!PyArg_ParseTuple(args, "sO!p:holder_put", &name, &PyList_Type, &list, &replace))
		return NULL;
	count = parse_handles(list, &handles);
	if (count < 0)
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	err = replace ? kvscratch_holder_replace(name, handles.name, handles.fds, count) :
			kvscratch_holder_put(name, handles.name, handles.fds, count);
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

static bool add_type(PyObject *module, PyType_Spec *spec, PyTypeObject *base, PyTypeObject **type)
{
	*type = (PyTypeObject *)PyType_FromSpecWithBases(spec, (PyObject *)base);
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
	    add_type(module, &handle_spec, NULL, &handle_type) &&
	    add_type(module, &pad_spec, handle_type, &pad_type) &&
	    add_type(module, &writer_spec, handle_type, &writer_type) &&
	    add_type(module, &view_spec, NULL, &view_type))
		return module;
	Py_DECREF(module);
	return NULL;
}
