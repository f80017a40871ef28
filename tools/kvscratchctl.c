// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvscratchctl: drive a pad from the shell.
 *
 * The shell holds the handle (exec 3<>/dev/kvscratch), each verb works on the
 * descriptor that it inherits. watch can also take its handle from a socket.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "cli.h"
#include "device.h"
#include "npy.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define DEFAULT_FD 3

enum exit_code {
	EXIT_DONE = 0,
	EXIT_INPUT = 1,
	EXIT_SYSTEM = 2,
};

static int fail_handle(int fd, const char *what, int err)
{
	return fail(EXIT_SYSTEM, "descriptor %d: cannot %s: %s", fd, what, kvscratch_strerror(err));
}

/* Whether the handle is open for what a verb does with it; @access is O_RDONLY or O_WRONLY. */
static int check_access(int fd, int access)
{
	int flags = fcntl(fd, F_GETFL);

	if (flags < 0)
		return fail(EXIT_SYSTEM, "expected a handle as descriptor %d, got none", fd);
	if ((flags & O_ACCMODE) != O_RDWR && (flags & O_ACCMODE) != access)
		return fail(EXIT_SYSTEM, "descriptor %d: expected it open for %s, got %s only", fd,
			    access == O_RDONLY ? "read" : "write",
			    access == O_RDONLY ? "write" : "read");
	return 0;
}

/* Nothing that was printed counts until it is out. */
static int finish_output(void)
{
	if (fflush(stdout) || ferror(stdout))
		return fail(EXIT_SYSTEM, "cannot write the output: %s", strerror(errno));
	return 0;
}

/* Options: one set for all verbs, each verb takes some of them */

enum option_id {
	OPT_HELP = 1,
	OPT_FD,
	OPT_MAX_SEQ_LEN,
	OPT_DIM,
	OPT_DTYPE,
	OPT_INPUT,
	OPT_FRAC_BITS,
	OPT_LEN,
	OPT_ZERO,
	OPT_SRC_FD,
	OPT_JSON,
	OPT_FORMAT,
	OPT_OUTPUT,
	OPT_SOCKET,
	OPT_PAD,
	OPT_ROWS,
	OPT_UNTIL,
	OPT_TIMEOUT,
};

enum format { FORMAT_AUTO, FORMAT_TEXT, FORMAT_RAW, FORMAT_NPY };

struct arguments {
	uint32_t given;		/* bit per option */
	int fd;
	uint64_t max_seq_len;
	uint64_t dim;
	uint32_t dtype;
	uint32_t input_dtype;
	uint64_t frac_bits;
	uint64_t len;
	uint64_t src_fd;
	enum format format;
	const char *output;
	const char *socket;
	const char *pad;
	uint64_t until;
	uint64_t timeout;
	const char *file;
};

static bool given(const struct arguments *args, enum option_id id)
{
	return args->given >> id & 1;
}

static int parse_dtype(const char *name, const char *text, uint32_t *dtype)
{
	*dtype = kvscratch_dtype_by_name(text);
	if (*dtype)
		return 0;
	return fail(EXIT_INPUT,
		    "--%s: expected f64 f32 f16 bf16 i64 i32 i16 i8 u8 or mxint8, got \"%s\"",
		    name, text);
}

static int parse_format(const char *text, enum format *format)
{
	static const char *const names[] = {
		[FORMAT_TEXT] = "text",
		[FORMAT_RAW] = "raw",
		[FORMAT_NPY] = "npy",
	};

	for (size_t i = 0; i < ARRAY_SIZE(names); i++) {
		if (names[i] && !strcmp(text, names[i])) {
			*format = i;
			return 0;
		}
	}
	return fail(EXIT_INPUT, "--format: expected text, raw or npy, got \"%s\"", text);
}

static int parse_option(struct arguments *args, int option, const char *text)
{
	uint64_t value;
	int err;

	switch (option) {
	case OPT_FD:
		err = parse_integer(EXIT_INPUT, "fd", text, 0, INT_MAX, &value);
		args->fd = value;
		return err;
	case OPT_MAX_SEQ_LEN:
		return parse_integer(EXIT_INPUT, "max-seq-len", text, 1, KVSCRATCH_MAX_SEQ_LEN,
				     &args->max_seq_len);
	case OPT_DIM:
		return parse_integer(EXIT_INPUT, "dim", text, 1, KVSCRATCH_MAX_ROW_BYTES,
				     &args->dim);
	case OPT_DTYPE:
		return parse_dtype("dtype", text, &args->dtype);
	case OPT_INPUT:
		return parse_dtype("input", text, &args->input_dtype);
	case OPT_FRAC_BITS:
		return parse_integer(EXIT_INPUT, "frac-bits", text, 0, KVSCRATCH_MAX_FRAC_BITS,
				     &args->frac_bits);
	case OPT_LEN:
		return parse_integer(EXIT_INPUT, "len", text, 0, KVSCRATCH_MAX_SEQ_LEN, &args->len);
	case OPT_SRC_FD:
		return parse_integer(EXIT_INPUT, "src-fd", text, 0, INT_MAX, &args->src_fd);
	case OPT_FORMAT:
		return parse_format(text, &args->format);
	case OPT_OUTPUT:
		args->output = text;
		return 0;
	case OPT_SOCKET:
		args->socket = text;
		return 0;
	case OPT_PAD:
		args->pad = text;
		return 0;
	case OPT_UNTIL:
		return parse_integer(EXIT_INPUT, "until", text, 0, KVSCRATCH_MAX_SEQ_LEN,
				     &args->until);
	case OPT_TIMEOUT:
		return parse_integer(EXIT_INPUT, "timeout", text, 0, INT_MAX / 1000, &args->timeout);
	default:
		return 0;
	}
}

/* create, truncate, clear, attach */

static bool is_float(uint32_t dtype)
{
	return dtype == KVSCRATCH_DTYPE_F64 || dtype == KVSCRATCH_DTYPE_F32 ||
	       dtype == KVSCRATCH_DTYPE_F16 || dtype == KVSCRATCH_DTYPE_BF16;
}

static bool may_have_frac_bits(uint32_t dtype)
{
	return dtype == KVSCRATCH_DTYPE_I64 || dtype == KVSCRATCH_DTYPE_I32 ||
	       dtype == KVSCRATCH_DTYPE_I16 || dtype == KVSCRATCH_DTYPE_I8;
}

static int check_conversion(const struct arguments *args)
{
	const char *stored = kvscratch_dtype_name(args->dtype);
	bool mx = args->dtype == KVSCRATCH_DTYPE_MXINT8;

	if (args->input_dtype && args->input_dtype != args->dtype &&
	    !(is_float(args->input_dtype) && (mx || may_have_frac_bits(args->dtype))))
		return fail(EXIT_INPUT, "--input: expected %s%s for --dtype %s, got %s", stored,
			    mx || may_have_frac_bits(args->dtype) ? " f64 f32 f16 or bf16" : "",
			    stored, kvscratch_dtype_name(args->input_dtype));
	if (args->frac_bits && !may_have_frac_bits(args->dtype))
		return fail(EXIT_INPUT, "--frac-bits: expected --dtype i64 i32 i16 or i8, got %s",
			    stored);
	if (mx && args->dim % KVSCRATCH_MX_BLOCK)
		return fail(EXIT_INPUT, "--dim: expected a multiple of %d for mxint8, got %" PRIu64,
			    KVSCRATCH_MX_BLOCK, args->dim);
	return 0;
}

/* Of a row as stored or as appended, whichever is longer */
static uint64_t longest_row(const struct arguments *args)
{
	uint64_t stored = args->dim * kvscratch_dtype_size(args->dtype);
	uint64_t input = args->dim * kvscratch_dtype_size(args->input_dtype);

	if (args->dtype == KVSCRATCH_DTYPE_MXINT8)
		stored += args->dim / KVSCRATCH_MX_BLOCK;
	return stored > input ? stored : input;
}

static int run_create(const struct arguments *args)
{
	int err;

	if (!given(args, OPT_MAX_SEQ_LEN) || !given(args, OPT_DIM))
		return fail(EXIT_INPUT, "expected --max-seq-len and --dim");
	err = check_conversion(args);
	if (err)
		return err;
	if (longest_row(args) > KVSCRATCH_MAX_ROW_BYTES)
		return fail(EXIT_INPUT, "--dim: expected rows of at most %u bytes, got %" PRIu64,
			    KVSCRATCH_MAX_ROW_BYTES, longest_row(args));
	err = check_access(args->fd, O_WRONLY);
	if (err)
		return err;
	err = device_create_scaled(args->fd, args->max_seq_len, args->dim, args->dtype,
				      args->input_dtype, args->frac_bits);
	if (err)
		return fail(EXIT_SYSTEM, "descriptor %d: cannot create a pad of [%" PRIu64 ", %"
			    PRIu64 "] %s: %s", args->fd, args->max_seq_len, args->dim,
			    kvscratch_dtype_name(args->dtype), kvscratch_strerror(err));
	return 0;
}

static int truncate_to(const struct arguments *args, uint64_t len)
{
	struct kvscratch_info info;
	int err = check_access(args->fd, O_WRONLY);

	if (err)
		return err;
	err = device_info(args->fd, &info);
	if (!err)
		err = device_truncate(args->fd, len,
					 given(args, OPT_ZERO) ? KVSCRATCH_TRUNCATE_ZERO : 0);
	if (err == -EINVAL)
		return fail(EXIT_INPUT,
			    "--len: expected at most %" PRIu64 ", the committed rows, got %" PRIu64,
			    (uint64_t)info.len, len);
	return err ? fail_handle(args->fd, "truncate", err) : 0;
}

static int run_truncate(const struct arguments *args)
{
	if (!given(args, OPT_LEN))
		return fail(EXIT_INPUT, "expected --len");
	return truncate_to(args, args->len);
}

static int run_clear(const struct arguments *args)
{
	return truncate_to(args, 0);
}

static int run_attach(const struct arguments *args)
{
	int src_fd = args->src_fd;
	int err;

	if (!given(args, OPT_SRC_FD))
		return fail(EXIT_INPUT, "expected --src-fd");
	if (fcntl(args->fd, F_GETFL) < 0)
		return fail(EXIT_SYSTEM, "expected a handle as descriptor %d, got none", args->fd);
	err = device_attach(args->fd, src_fd);
	switch (-err) {
	case 0:
		return 0;
	case EBADF:
		return fail(EXIT_SYSTEM, "--src-fd: expected a handle as descriptor %d, got none",
			    src_fd);
	case EINVAL:
		return fail(EXIT_SYSTEM, "--src-fd: expected a handle of " KVSCRATCH_DEVICE
			    " as descriptor %d, got something else", src_fd);
	case EBADFD:
		return fail(EXIT_SYSTEM, "--src-fd: expected a pad behind descriptor %d, got an "
			    "unbound handle", src_fd);
	case EACCES:
		return fail(EXIT_SYSTEM, "descriptor %d: expected it open for no more than "
			    "descriptor %d is, got more", args->fd, src_fd);
	default:
		return fail_handle(args->fd, "attach", err);
	}
}

/* info */

static void print_display_line(uint64_t len, const struct kvscratch_info *info)
{
	printf("Scratchpad(len=%" PRIu64 ", capacity=%" PRIu64 ", dim=%" PRIu32 ")\n", len,
	       (uint64_t)info->max_seq_len, (uint32_t)info->dim);
}

static void print_json(const struct kvscratch_info *info)
{
	printf("{\"len\": %" PRIu64 ", \"max_seq_len\": %" PRIu64 ", \"dim\": %" PRIu32
	       ", \"dtype\": \"%s\", \"row_bytes\": %" PRIu32 ", \"generation\": %" PRIu64
	       ", \"trunc_len\": %" PRIu64 ", \"data_bytes\": %" PRIu64
	       ", \"status_offset\": %" PRIu64 ", \"input_dtype\": \"%s\""
	       ", \"input_row_bytes\": %" PRIu32 ", \"frac_bits\": %" PRIu32
	       ", \"saturated\": %" PRIu64 "}\n",
	       (uint64_t)info->len, (uint64_t)info->max_seq_len, (uint32_t)info->dim,
	       kvscratch_dtype_name(info->dtype), (uint32_t)info->row_bytes,
	       (uint64_t)info->generation, (uint64_t)info->trunc_len, (uint64_t)info->data_bytes,
	       (uint64_t)info->status_offset, kvscratch_dtype_name(info->input_dtype),
	       (uint32_t)info->input_row_bytes, (uint32_t)info->frac_bits,
	       (uint64_t)info->saturated);
}

/* What makes a pad of scaled integers one */
static void print_format(const struct kvscratch_info *info)
{
	if (info->dtype != KVSCRATCH_DTYPE_MXINT8 && info->dtype == info->input_dtype &&
	    !info->frac_bits)
		return;
	printf("%s", kvscratch_dtype_name(info->dtype));
	if (info->dtype != KVSCRATCH_DTYPE_MXINT8)
		printf(" with %" PRIu32 " fraction bits", (uint32_t)info->frac_bits);
	if (info->dtype != info->input_dtype)
		printf(", from %s, %" PRIu64 " saturated", kvscratch_dtype_name(info->input_dtype),
		       (uint64_t)info->saturated);
	putchar('\n');
}

static int run_info(const struct arguments *args)
{
	struct kvscratch_info info;
	int err = device_info(args->fd, &info);

	if (err)
		return fail_handle(args->fd, "describe the pad", err);
	if (given(args, OPT_JSON)) {
		print_json(&info);
	} else {
		print_display_line(info.len, &info);
		print_format(&info);
	}
	return finish_output();
}

/* append */

/**
 * struct input - what is to be appended, all of it in memory
 * @name: where it came from
 * @bytes: all of it, header included
 * @size: how much that is
 * @offset: where the rows begin
 */
struct input {
	const char *name;
	char *bytes;
	size_t size;
	size_t offset;
};

/* A .npy header is at most 64 KiB long in version 1 and hardly ever longer. */
#define HEADER_ROOM (1 << 20)

/* More room, up to @limit bytes */
static int grow_input(struct input *input, size_t *room, uint64_t limit)
{
	uint64_t more = *room ? 2 * (uint64_t)*room : 65536;
	char *bytes;

	if (more > limit)
		more = limit;
	bytes = more > SIZE_MAX ? NULL : realloc(input->bytes, more);
	if (!bytes)
		return fail(EXIT_SYSTEM, "%s: out of memory for %" PRIu64 " bytes", input->name,
			    more);
	input->bytes = bytes;
	*room = more;
	return 0;
}

/* Read to the end, but not more than @limit bytes: an input may have no end. */
static int read_input(struct input *input, int fd, uint64_t limit)
{
	size_t room = 0;

	for (;;) {
		ssize_t got;

		if (input->size == limit)
			return fail(EXIT_INPUT, "%s: expected less than %" PRIu64
				    " bytes for what is left of the pad, got more", input->name,
				    limit);
		if (input->size == room && grow_input(input, &room, limit))
			return EXIT_SYSTEM;
		got = read(fd, input->bytes + input->size, room - input->size);
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return fail(EXIT_INPUT, "%s: cannot read: %s", input->name,
				    strerror(errno));
		if (!got)
			return 0;
		input->size += got;
	}
}

static bool is_dash(const char *file)
{
	return !file || !strcmp(file, "-");
}

static int open_input(struct input *input, const char *file, uint64_t limit)
{
	int fd = STDIN_FILENO;
	int err;

	*input = (struct input){ .name = "stdin" };
	if (!is_dash(file)) {
		input->name = file;
		fd = open(file, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			return fail(EXIT_INPUT, "%s: cannot open: %s", file, strerror(errno));
	}
	err = read_input(input, fd, limit);
	if (fd != STDIN_FILENO)
		close(fd);
	return err;
}

static bool looks_like_npy(const struct input *input)
{
	return input->size >= NPY_MAGIC_BYTES && !memcmp(input->bytes, NPY_MAGIC, NPY_MAGIC_BYTES);
}

static int fail_shape(const struct input *input, uint64_t expected, uint64_t got)
{
	return fail(EXIT_INPUT, "%s: shape mismatch: expected %" PRIu64 " elements, got %" PRIu64,
		    input->name, expected, got);
}

static int check_npy_shape(const struct input *input, const struct kvscratch_info *info,
			   const struct npy_array *array, uint64_t *rows)
{
	uint64_t dim = array->ndim ? array->shape[array->ndim - 1] : 0;

	if (array->ndim != 1 && array->ndim != 2)
		return fail(EXIT_INPUT, "%s: expected an array of [rows, %" PRIu32
			    "], got %u dimensions", input->name, (uint32_t)info->dim, array->ndim);
	if (dim != info->dim)
		return fail_shape(input, info->dim, dim);
	*rows = array->ndim == 2 ? array->shape[0] : 1;
	if (array->fortran_order && *rows > 1 && dim > 1)
		return fail(EXIT_INPUT, "%s: expected rows in C order, got Fortran order",
			    input->name);
	return 0;
}

static int check_npy(struct input *input, const struct kvscratch_info *info)
{
	struct npy_array array;
	const char *error = npy_parse_header(input->bytes, input->size, &array);
	uint64_t rows = 0, bytes;
	int err;

	if (error)
		return fail(EXIT_INPUT, "%s: %s", input->name, error);
	if (array.dtype != info->input_dtype)
		return fail(EXIT_INPUT, "%s: dtype mismatch: expected %s, got \"%s\"%s%s",
			    input->name, kvscratch_dtype_name(info->input_dtype), array.descr,
			    array.dtype ? " = " : "",
			    array.dtype ? kvscratch_dtype_name(array.dtype) : "");
	err = check_npy_shape(input, info, &array, &rows);
	if (err)
		return err;
	input->offset = array.data_offset;
	bytes = input->size - input->offset;
	if (bytes % info->input_row_bytes || bytes / info->input_row_bytes != rows)
		return fail(EXIT_INPUT, "%s: expected %" PRIu64 " rows of %" PRIu32
			    " bytes behind the header, got %" PRIu64 " bytes", input->name, rows,
			    (uint32_t)info->input_row_bytes, bytes);
	return 0;
}

static int check_raw(const struct input *input, const struct kvscratch_info *info)
{
	uint32_t rest = input->size % info->input_row_bytes;
	uint32_t element = info->input_row_bytes / info->dim;

	if (!rest)
		return 0;
	/* stored MXINT8 rows have scales besides elements */
	if (!(rest % element) && info->input_dtype != KVSCRATCH_DTYPE_MXINT8)
		return fail_shape(input, info->dim, rest / element);
	return fail(EXIT_INPUT, "%s: expected rows of %" PRIu32 " bytes, got %zu rows and %" PRIu32
		    " bytes", input->name, (uint32_t)info->input_row_bytes,
		    input->size / info->input_row_bytes, rest);
}

/* In the words of the model */
static int fail_room(const struct kvscratch_info *info, uint64_t rows)
{
	if (info->len == info->max_seq_len && rows == 1)
		return fail(EXIT_INPUT, "Scratchpad full: %" PRIu64 " / %" PRIu64 " tokens",
			    (uint64_t)info->len, (uint64_t)info->max_seq_len);
	return fail(EXIT_INPUT, "Scratchpad overflow: %" PRIu64 " + %" PRIu64 " > %" PRIu64 " max",
		    (uint64_t)info->len, rows, (uint64_t)info->max_seq_len);
}

/* One write where the kernel takes that many bytes; else as few as can be. */
static int append_input(const struct arguments *args, const struct input *input,
			struct kvscratch_info *info)
{
	const uint64_t most = KVSCRATCH_MAX_WRITE / info->input_row_bytes;
	const uint64_t rows = (input->size - input->offset) / info->input_row_bytes;
	const char *at = input->bytes + input->offset;
	uint64_t done = 0;

	if (rows > info->max_seq_len - info->len)
		return fail_room(info, rows);
	while (done < rows) {
		uint64_t batch = rows - done < most ? rows - done : most;
		int err = device_append(args->fd, at, batch * info->input_row_bytes);

		if (err && done)
			return fail(EXIT_SYSTEM, "appended %" PRIu64 " of %" PRIu64 " rows, then: %s",
				    done, rows, kvscratch_strerror(err));
		if (err)
			return fail_handle(args->fd, "append", err);
		at += batch * info->input_row_bytes;
		done += batch;
	}
	return 0;
}

static int run_append(const struct arguments *args)
{
	struct kvscratch_info info;
	struct input input;
	int err;

	if (args->format == FORMAT_TEXT)
		return fail(EXIT_INPUT, "--format: expected raw or npy, got \"text\"");
	if (args->fd == STDIN_FILENO && is_dash(args->file))
		return fail(EXIT_INPUT, "--fd: expected another descriptor than that of the input");
	err = check_access(args->fd, O_WRONLY);
	if (err)
		return err;
	err = device_info(args->fd, &info);
	if (err)
		return fail_handle(args->fd, "describe the pad", err);
	err = open_input(&input, args->file,
			 (info.max_seq_len - info.len) * info.input_row_bytes + HEADER_ROOM);
	if (!err) {
		if (args->format == FORMAT_NPY ||
		    (args->format == FORMAT_AUTO && looks_like_npy(&input)))
			err = check_npy(&input, &info);
		else
			err = check_raw(&input, &info);
	}
	if (!err)
		err = append_input(args, &input, &info);
	free(input.bytes);
	return err;
}

/* Elements as text, with as many digits as tell two values apart */

static double half_value(uint16_t bits)
{
	int exponent = bits >> 10 & 0x1f;
	double fraction = bits & 0x3ff;
	double value;

	if (exponent == 0x1f)
		value = fraction ? __builtin_nan("") : __builtin_inf();
	else if (exponent)
		value = __builtin_ldexp(fraction + 1024, exponent - 25);
	else
		value = __builtin_ldexp(fraction, -24);
	return bits & 0x8000 ? -value : value;
}

static double bfloat_value(uint16_t bits)
{
	uint32_t wide = (uint32_t)bits << 16;
	float value;

	memcpy(&value, &wide, sizeof(value));
	return (double)value;
}

#define LOAD(type, at) ({ type _value; memcpy(&_value, at, sizeof(_value)); _value; })

static void print_element(uint32_t dtype, const char *at)
{
	switch (dtype) {
	case KVSCRATCH_DTYPE_F64:
		printf("%.17g", LOAD(double, at));
		break;
	case KVSCRATCH_DTYPE_F32:
		printf("%.9g", (double)LOAD(float, at));
		break;
	case KVSCRATCH_DTYPE_F16:
		printf("%.5g", half_value(LOAD(uint16_t, at)));
		break;
	case KVSCRATCH_DTYPE_BF16:
		printf("%.4g", bfloat_value(LOAD(uint16_t, at)));
		break;
	case KVSCRATCH_DTYPE_I64:
		printf("%" PRId64, LOAD(int64_t, at));
		break;
	case KVSCRATCH_DTYPE_I32:
		printf("%" PRId32, LOAD(int32_t, at));
		break;
	case KVSCRATCH_DTYPE_I16:
		printf("%d", LOAD(int16_t, at));
		break;
	case KVSCRATCH_DTYPE_I8:
		printf("%d", LOAD(int8_t, at));
		break;
	default:
		printf("%u", LOAD(uint8_t, at));
		break;
	}
}

/**
 * struct rows - stored rows, wherever they lie
 * @data: the elements
 * @scales: of MXINT8, otherwise NULL
 */
struct rows {
	const char *data;
	const uint8_t *scales;
};

static uint32_t data_row_bytes(const struct kvscratch_info *info)
{
	return info->planes[0].row_bytes;
}

static uint32_t scales_per_row(const struct kvscratch_info *info)
{
	return info->nr_planes > 1 ? info->planes[1].row_bytes : 0;
}

static int64_t integer_at(uint32_t dtype, const char *at)
{
	switch (dtype) {
	case KVSCRATCH_DTYPE_I64:
		return LOAD(int64_t, at);
	case KVSCRATCH_DTYPE_I32:
		return LOAD(int32_t, at);
	case KVSCRATCH_DTYPE_I16:
		return LOAD(int16_t, at);
	default:
		return LOAD(int8_t, at);
	}
}

/* The scale byte of E8M0 that makes its block NaN */
#define MX_NAN_SCALE 255

/* What an integer stands for; a double holds all of it but the end of a long i64. */
static double scaled_value(const struct kvscratch_info *info, const struct rows *rows, size_t i)
{
	const char *at = rows->data + i * kvscratch_dtype_size(info->dtype);

	if (rows->scales && rows->scales[i / KVSCRATCH_MX_BLOCK] == MX_NAN_SCALE)
		return __builtin_nan("");
	if (rows->scales)
		return __builtin_ldexp(integer_at(info->dtype, at),
				       rows->scales[i / KVSCRATCH_MX_BLOCK] - 127 - 6);
	return __builtin_ldexp((double)integer_at(info->dtype, at), -(int)info->frac_bits);
}

static void print_row(const struct kvscratch_info *info, const struct rows *rows, uint32_t row)
{
	uint32_t size = data_row_bytes(info) / info->dim;

	for (uint32_t i = 0; i < info->dim; i++) {
		size_t element = (size_t)row * info->dim + i;

		if (i)
			putchar(' ');
		if (rows->scales || info->frac_bits)
			printf("%.17g", scaled_value(info, rows, element));
		else
			print_element(info->dtype, rows->data + element * size);
	}
	putchar('\n');
}

/* dump */

/* Elements of *len rows and behind them their scales; 0 bytes make a pointer, too. */
static int copy_rows_at(const struct kvscratch_view *view, uint64_t state, char **copy)
{
	const struct kvscratch_info *info = &view->info;
	size_t data_bytes = (size_t)kvscratch_state_len(state) * data_row_bytes(info);
	size_t scale_bytes = (size_t)kvscratch_state_len(state) * scales_per_row(info);
	char *bytes = realloc(*copy, data_bytes + scale_bytes + 1);

	if (!bytes)
		return fail(EXIT_SYSTEM, "out of memory for %zu bytes", data_bytes + scale_bytes);
	*copy = bytes;
	memcpy(bytes, view->data, data_bytes);
	if (scale_bytes)
		memcpy(bytes + data_bytes, kvscratch_view_scales(view), scale_bytes);
	return 0;
}

/* A copy of all committed rows that no truncate came in between; *len says how many. */
static int copy_rows(const struct kvscratch_view *view, char **copy, uint32_t *len)
{
	uint64_t state;

	*copy = NULL;
	do {
		int err;

		state = kvscratch_view_state(view);
		*len = kvscratch_state_len(state);
		err = copy_rows_at(view, state, copy);
		if (err) {
			free(*copy);
			return err;
		}
	} while (kvscratch_view_valid_rows(view, state) != *len);
	return 0;
}

/* .npy has no scales: MXINT8 becomes f32, which holds what was converted, fractions f64. */
static uint32_t npy_dtype(const struct kvscratch_info *info)
{
	if (info->dtype == KVSCRATCH_DTYPE_MXINT8)
		return KVSCRATCH_DTYPE_F32;
	return info->frac_bits ? KVSCRATCH_DTYPE_F64 : info->dtype;
}

static void write_npy(const struct kvscratch_info *info, const struct rows *rows, uint32_t len)
{
	char header[NPY_HEADER_BYTES];
	size_t header_bytes = npy_write_header(header, len, info->dim, npy_dtype(info));
	size_t count = (size_t)len * info->dim;

	fwrite(header, 1, header_bytes, stdout);
	if (npy_dtype(info) == info->dtype) {
		fwrite(rows->data, info->row_bytes, len, stdout);
		return;
	}
	for (size_t i = 0; i < count; i++) {
		double wide = scaled_value(info, rows, i);
		float narrow = (float)wide;

		if (npy_dtype(info) == KVSCRATCH_DTYPE_F64)
			fwrite(&wide, sizeof(wide), 1, stdout);
		else
			fwrite(&narrow, sizeof(narrow), 1, stdout);
	}
}

/* As read() gives them: each row's elements, then its scales */
static void write_raw(const struct kvscratch_info *info, const struct rows *rows, uint32_t len)
{
	for (size_t row = 0; row < len; row++) {
		fwrite(rows->data + row * data_row_bytes(info), 1, data_row_bytes(info), stdout);
		if (rows->scales)
			fwrite(rows->scales + row * scales_per_row(info), 1, scales_per_row(info),
			       stdout);
	}
}

static int write_dump(const struct arguments *args, const struct kvscratch_info *info,
		      const char *copy, uint32_t len)
{
	struct rows rows = { .data = copy };

	if (scales_per_row(info))
		rows.scales = (const uint8_t *)copy + (size_t)len * data_row_bytes(info);
	switch (args->format) {
	case FORMAT_NPY:
		write_npy(info, &rows, len);
		break;
	case FORMAT_RAW:
		write_raw(info, &rows, len);
		break;
	default:
		for (uint32_t row = 0; row < len; row++)
			print_row(info, &rows, row);
	}
	return finish_output();
}

static int check_dump(const struct arguments *args, const struct kvscratch_info *info)
{
	char header[NPY_HEADER_BYTES];

	if (args->format == FORMAT_NPY && !npy_write_header(header, 0, info->dim, npy_dtype(info)))
		return fail(EXIT_INPUT, "--format: .npy has no type for %s; expected text or raw",
			    kvscratch_dtype_name(info->dtype));
	return 0;
}

static int run_dump(const struct arguments *args)
{
	struct kvscratch_view view;
	uint32_t len;
	char *rows;
	int err = check_access(args->fd, O_RDONLY);

	if (err)
		return err;
	err = device_map(args->fd, &view);
	if (err)
		return fail_handle(args->fd, "map the pad", err);
	err = check_dump(args, &view.info);
	if (!err)
		err = copy_rows(&view, &rows, &len);
	if (err)
		goto out;
	/* Only now: an error before this leaves the file as it was. */
	if (!is_dash(args->output) && !freopen(args->output, "w", stdout))
		err = fail(EXIT_SYSTEM, "%s: cannot open: %s", args->output, strerror(errno));
	if (!err)
		err = write_dump(args, &view.info, rows, len);
	free(rows);
out:
	device_unmap(&view);
	return err;
}

/* watch */

/**
 * struct watch - a view that is followed
 * @args: what was asked for
 * @fd: a handle of our own, whose position says what was seen
 * @sock: whose end ends the watch, or -1
 * @view: the mapped pad
 * @row: room for one row
 * @generation: of the last look
 * @seen: rows printed
 * @reached: whether as many rows were seen as --until asks for
 */
struct watch {
	const struct arguments *args;
	int fd;
	int sock;
	struct kvscratch_view view;
	char *row;
	uint32_t generation;
	uint32_t seen;
	bool reached;
};

/* How often a socket that is not there yet is tried */
#define RETRY_MS 20

static int64_t milliseconds_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* The other side may just be starting. */
static int connect_in_time(const struct arguments *args)
{
	int64_t end = milliseconds_now() + (int64_t)args->timeout * 1000;
	int sock;

	for (;;) {
		sock = kvscratch_connect(args->socket);
		if (sock != -ENOENT && sock != -ECONNREFUSED)
			return sock;
		if (milliseconds_now() >= end)
			return sock;
		poll(NULL, 0, RETRY_MS);
	}
}

/* Keep the handle of the name that was asked for, by default the last one. */
static int choose_handle(const struct arguments *args, const char *names, const int *fds, int count)
{
	const char *name = names;
	int chosen = -1;

	for (int i = 0; i < count; i++) {
		if (args->pad ? !strcmp(args->pad, name) : i == count - 1)
			chosen = i;
		name += strlen(name) + 1;
	}
	for (int i = 0; i < count; i++)
		if (i != chosen)
			close(fds[i]);
	return chosen < 0 ? -1 : fds[chosen];
}

static int receive_handle(struct watch *watch)
{
	static char names[KVSCRATCH_MAX_PASSED * 16];
	static int fds[KVSCRATCH_MAX_PASSED];
	int count;

	watch->sock = connect_in_time(watch->args);
	if (watch->sock < 0)
		return fail(EXIT_SYSTEM, "%s: cannot connect: %s", watch->args->socket,
			    strerror(-watch->sock));
	count = kvscratch_receive_handles(watch->sock, names, sizeof(names), fds, ARRAY_SIZE(fds));
	if (count < 0)
		return fail(EXIT_SYSTEM, "%s: no handles came: %s", watch->args->socket,
			    strerror(-count));
	watch->fd = choose_handle(watch->args, names, fds, count);
	if (watch->fd < 0)
		return fail(EXIT_INPUT, "--pad: expected one of the %d pads served, got \"%s\"",
			    count, watch->args->pad);
	return 0;
}

/* The inherited handle shares its position with the shell: take one of our own. */
static int open_reader(struct watch *watch)
{
	int err;

	watch->fd = device_open(O_RDONLY);
	if (watch->fd < 0)
		return fail(EXIT_SYSTEM, KVSCRATCH_DEVICE ": cannot open: %s",
			    kvscratch_strerror(watch->fd));
	err = check_access(watch->args->fd, O_RDONLY);
	if (err)
		return err;
	err = device_attach(watch->fd, watch->args->fd);
	return err ? fail_handle(watch->args->fd, "attach to the pad", err) : 0;
}

static int open_watch(struct watch *watch)
{
	int err;

	err = watch->args->socket ? receive_handle(watch) : open_reader(watch);
	if (err)
		return err;
	err = device_map(watch->fd, &watch->view);
	if (err)
		return fail(EXIT_SYSTEM, "cannot map the pad: %s", kvscratch_strerror(err));
	if (given(watch->args, OPT_UNTIL) && watch->args->until > watch->view.info.max_seq_len)
		return fail(EXIT_INPUT, "--until: expected at most %" PRIu64
			    ", the rows that fit, got %" PRIu64,
			    (uint64_t)watch->view.info.max_seq_len, watch->args->until);
	watch->row = malloc(watch->view.info.row_bytes);
	return watch->row ? 0 : fail(EXIT_SYSTEM, "out of memory");
}

static void close_watch(struct watch *watch)
{
	free(watch->row);
	if (watch->view.data)
		device_unmap(&watch->view);
	if (watch->fd >= 0)
		close(watch->fd);
	if (watch->sock >= 0)
		close(watch->sock);
}

static void report_len(const struct watch *watch, uint32_t len)
{
	if (given(watch->args, OPT_JSON))
		printf("{\"len\": %" PRIu32 ", \"generation\": %" PRIu32 "}\n", len,
		       watch->generation);
	else
		print_display_line(len, &watch->view.info);
}

/* Returns true when all rows of @state were still there when they were copied. */
static bool report_rows(struct watch *watch, uint64_t state)
{
	const struct kvscratch_info *info = &watch->view.info;

	while (watch->seen < kvscratch_state_len(state)) {
		struct rows copy = { .data = watch->row };

		memcpy(watch->row, (const char *)watch->view.data +
		       (size_t)watch->seen * data_row_bytes(info), data_row_bytes(info));
		if (scales_per_row(info)) {
			copy.scales = (const uint8_t *)watch->row + data_row_bytes(info);
			memcpy(watch->row + data_row_bytes(info),
			       kvscratch_view_scales(&watch->view) +
			       (size_t)watch->seen * scales_per_row(info), scales_per_row(info));
		}
		if (kvscratch_view_valid_rows(&watch->view, state) <= watch->seen)
			return false;
		printf("%" PRIu32 ": ", watch->seen);
		print_row(info, &copy, 0);
		watch->seen++;
	}
	return true;
}

/* After a truncate: the rows that are the same as when they were seen */
static void forget_dropped_rows(struct watch *watch, uint64_t state)
{
	uint64_t before = (uint64_t)watch->generation << 32 | watch->seen;

	watch->seen = kvscratch_view_valid_rows(&watch->view, before);
	if (watch->seen > kvscratch_state_len(state))
		watch->seen = kvscratch_state_len(state);
	watch->generation = kvscratch_state_generation(state);
	if (!given(watch->args, OPT_JSON))
		printf("truncated, generation %" PRIu32 ", rows below %" PRIu32 " kept\n",
		       watch->generation, watch->seen);
}

/* Print what changed since the last look, the first time in any case. */
static void look(struct watch *watch, bool first)
{
	uint64_t state;
	bool changed;

	for (;;) {
		/* Acknowledge, then look, then sleep: see <linux/kvscratch.h>. */
		lseek(watch->fd, (off_t)watch->seen * watch->view.info.row_bytes, SEEK_SET);
		state = kvscratch_view_state(&watch->view);
		changed = first || kvscratch_state_len(state) > watch->seen;
		if (first)
			watch->generation = kvscratch_state_generation(state);
		first = false;
		if (kvscratch_state_generation(state) != watch->generation) {
			forget_dropped_rows(watch, state);
			changed = true;
		}
		if (!changed)
			return;
		if (given(watch->args, OPT_ROWS) && !report_rows(watch, state))
			continue;
		watch->seen = kvscratch_state_len(state);
		report_len(watch, watch->seen);
		/* it was printed: whatever comes next, that was it */
		watch->reached = given(watch->args, OPT_UNTIL) && watch->seen >= watch->args->until;
		if (watch->reached)
			return;
	}
}

static int follow(struct watch *watch)
{
	struct pollfd polled[] = {
		{ .fd = watch->fd, .events = POLLIN | POLLPRI },
		{ .fd = watch->sock, .events = POLLIN },
	};
	bool first = true;
	bool ended = false;

	for (;;) {
		int err;

		look(watch, first);
		first = false;
		err = finish_output();
		if (err)
			return err;
		if (watch->reached)
			return 0;
		/* what came before the other side hung up was seen by this look */
		if (ended && given(watch->args, OPT_UNTIL))
			return fail(EXIT_SYSTEM, "--until: expected %" PRIu64
				    " rows, got %" PRIu32 " when the server ended",
				    watch->args->until, watch->seen);
		if (ended)
			return 0;
		if (poll(polled, ARRAY_SIZE(polled), -1) < 0 && errno != EINTR)
			return fail(EXIT_SYSTEM, "cannot wait: %s", strerror(errno));
		ended = polled[1].revents;
	}
}

static int run_watch(const struct arguments *args)
{
	struct watch watch = { .args = args, .fd = -1, .sock = -1 };
	int err;

	if ((given(args, OPT_PAD) || given(args, OPT_TIMEOUT)) && !given(args, OPT_SOCKET))
		return fail(EXIT_INPUT, "--%s: expected --socket with it",
			    given(args, OPT_PAD) ? "pad" : "timeout");
	if (given(args, OPT_ROWS) && given(args, OPT_JSON))
		return fail(EXIT_INPUT, "expected either --rows or --json, got both");
	err = open_watch(&watch);
	if (!err)
		err = follow(&watch);
	close_watch(&watch);
	return err;
}

/* Verbs */

#define OPTION(name, argument, id) { name, argument, NULL, id }
#define HELP OPTION("help", no_argument, OPT_HELP)
#define END { 0 }

/**
 * struct verb - what the tool can do
 * @name: how it is called
 * @summary: one line for the list
 * @help: the rest of its help
 * @run: does it, returns an exit code
 * @takes_file: whether it may have an argument that is no option
 * @short_options: those of its options that have one letter, for getopt()
 * @options: those that it takes
 */
struct verb {
	const char *name;
	const char *summary;
	const char *help;
	int (*run)(const struct arguments *args);
	bool takes_file;
	const char *short_options;
	struct option options[9];
};

static const struct verb verbs[] = {
	{
		.name = "create",
		.summary = "bind the handle to a new pad",
		.help =
"Usage: kvscratchctl [--fd N] create --max-seq-len N --dim N [--dtype TYPE]\n"
"                    [--input TYPE] [--frac-bits N]\n"
"Bind the handle to a new, zero-filled pad. All its memory is taken here.\n"
"\n"
"  --max-seq-len N  rows (tokens) that fit\n"
"  --dim N          elements per row; a multiple of 32 for mxint8\n"
"  --dtype TYPE     f64 f32 f16 bf16 i64 i32 i16 i8 u8 mxint8 (f32)\n"
"  --input TYPE     f64 f32 f16 or bf16: what append takes, for the kernel to\n"
"                   convert to mxint8, i64, i32, i16 or i8 (as stored)\n"
"  --frac-bits N    fraction bits of an integer: i stands for i * 2^-N (0)\n",
		.run = run_create,
		.options = {
			OPTION("max-seq-len", required_argument, OPT_MAX_SEQ_LEN),
			OPTION("dim", required_argument, OPT_DIM),
			OPTION("dtype", required_argument, OPT_DTYPE),
			OPTION("input", required_argument, OPT_INPUT),
			OPTION("frac-bits", required_argument, OPT_FRAC_BITS),
			HELP, END
		},
	}, {
		.name = "info",
		.summary = "describe the pad",
		.help =
"Usage: kvscratchctl [--fd N] info [--json]\n"
"Print one line: Scratchpad(len=3, capacity=10, dim=4)\n"
"and for scaled integers a second one: mxint8, from f32, 0 saturated\n"
"\n"
"  --json  more of it, as one JSON object\n",
		.run = run_info,
		.options = { OPTION("json", no_argument, OPT_JSON), HELP, END },
	}, {
		.name = "append",
		.summary = "append rows from a file or stdin",
		.help =
"Usage: kvscratchctl [--fd N] append [--format FORMAT] [FILE]\n"
"Append whole rows from FILE or, without one or with -, from stdin. All of the\n"
"input is read into memory and checked before the first row is appended; up to\n"
"2 GiB go in as one batch that other processes see at once.\n"
"\n"
"  --format FORMAT  raw (elements in this machine's byte order) or npy;\n"
"                   otherwise npy if the input begins as such a file does\n",
		.run = run_append,
		.takes_file = true,
		.options = { OPTION("format", required_argument, OPT_FORMAT), HELP, END },
	}, {
		.name = "dump",
		.summary = "write the rows to a file or stdout",
		.help =
"Usage: kvscratchctl [--fd N] dump [--format FORMAT] [--output FILE]\n"
"Write all committed rows, as they are at one moment; they are copied first.\n"
"Scaled integers are scaled back in text, and in npy as f32 (mxint8) or f64 (of\n"
"long i64 the last bits are lost). What is to be appended to such a pad again is\n"
"raw.\n"
"\n"
"  --format FORMAT    text (a row per line), raw or npy (text)\n"
"  -o, --output FILE  instead of stdout\n",
		.run = run_dump,
		.short_options = "o:",
		.options = {
			OPTION("format", required_argument, OPT_FORMAT),
			OPTION("output", required_argument, OPT_OUTPUT),
			HELP, END
		},
	}, {
		.name = "truncate",
		.summary = "drop the last rows",
		.help =
"Usage: kvscratchctl [--fd N] truncate --len N [--zero]\n"
"Keep the first N rows. Readers learn of it through a new generation.\n"
"\n"
"  --len N  rows to keep\n"
"  --zero   overwrite with zeros all that was ever written beyond\n",
		.run = run_truncate,
		.options = {
			OPTION("len", required_argument, OPT_LEN),
			OPTION("zero", no_argument, OPT_ZERO),
			HELP, END
		},
	}, {
		.name = "clear",
		.summary = "drop all rows",
		.help =
"Usage: kvscratchctl [--fd N] clear [--zero]\n"
"The same as truncate --len 0.\n"
"\n"
"  --zero  overwrite with zeros all that was ever written\n",
		.run = run_clear,
		.options = { OPTION("zero", no_argument, OPT_ZERO), HELP, END },
	}, {
		.name = "attach",
		.summary = "bind the handle to the pad of another",
		.help =
"Usage: kvscratchctl [--fd N] attach --src-fd N\n"
"Bind the handle to the pad of the handle --src-fd. It gets a file position of\n"
"its own and must not be open for more than that one is.\n",
		.run = run_attach,
		.options = { OPTION("src-fd", required_argument, OPT_SRC_FD), HELP, END },
	}, {
		.name = "watch",
		.summary = "follow the length of the pad",
		.help =
"Usage: kvscratchctl [--fd N] watch [OPTION]...\n"
"Map the pad and print a line whenever rows were appended or dropped. Reads the\n"
"status page and sleeps in poll(). Ends when interrupted. Opens the device for a\n"
"handle of its own.\n"
"\n"
"  --socket PATH  take the handle from a server on this Unix socket, as\n"
"                 kvdecode --serve is one, and end when it hangs up\n"
"  --pad NAME     which of the pads served (the last one)\n"
"  --timeout S    how long to wait for the socket to exist (10)\n"
"  --rows         print each row before the line with the length\n"
"  --until LEN    end when there are LEN rows\n"
"  --json         a JSON object per line\n",
		.run = run_watch,
		.options = {
			OPTION("socket", required_argument, OPT_SOCKET),
			OPTION("pad", required_argument, OPT_PAD),
			OPTION("timeout", required_argument, OPT_TIMEOUT),
			OPTION("rows", no_argument, OPT_ROWS),
			OPTION("until", required_argument, OPT_UNTIL),
			OPTION("json", no_argument, OPT_JSON),
			HELP, END
		},
	},
};

static const struct option global_options[] = {
	OPTION("fd", required_argument, OPT_FD), HELP, END
};

static const char help_head[] =
"Usage: kvscratchctl [--fd N] VERB [OPTION]...\n"
"Work on the kvscratch pad whose handle is the inherited descriptor N (3):\n"
"\n"
"  exec 3<>/dev/kvscratch\n"
"  kvscratchctl create --max-seq-len 512 --dim 64 --dtype f32\n"
"\n";

static const char help_tail[] =
"\n"
"Each verb has --help.\n"
"\n"
"Exit status: 0 done; 1 wrong options or input, the pad is as it was; 2 refused\n"
"by the system: no device, no pad, no permission, no memory, no output.\n";

static int print_help(void)
{
	fputs(help_head, stdout);
	for (size_t i = 0; i < ARRAY_SIZE(verbs); i++)
		printf("  %-9s %s\n", verbs[i].name, verbs[i].summary);
	fputs(help_tail, stdout);
	return finish_output();
}

/* Returns 0, an exit code, or -1 when only help was asked for. */
static int parse_options(struct arguments *args, int argc, char **argv, const char *short_options,
			 const struct option *options)
{
	int option;

	while ((option = getopt_long(argc, argv, short_options, options, NULL)) != -1) {
		int err;

		if (option == '?' || option == ':')
			return fail_option(EXIT_INPUT, option, argv);
		if (option == 'o')
			option = OPT_OUTPUT;
		if (option == OPT_HELP)
			return -1;
		err = parse_option(args, option, optarg);
		if (err)
			return err;
		args->given |= 1u << option;
	}
	return 0;
}

static int run_verb(const struct verb *verb, struct arguments *args, int argc, char **argv)
{
	static char name[32];
	char short_options[8];
	int err;

	snprintf(name, sizeof(name), "kvscratchctl %s", verb->name);
	cli_name = name;
	snprintf(short_options, sizeof(short_options), ":%s",
		 verb->short_options ? verb->short_options : "");
	/* 0: getopt() starts over, behind the verb */
	optind = 0;
	err = parse_options(args, argc, argv, short_options, verb->options);
	if (err < 0) {
		fputs(verb->help, stdout);
		return finish_output();
	}
	if (err)
		return err;
	if (argc - optind > verb->takes_file)
		return fail(EXIT_INPUT, "unexpected argument \"%s\"",
			    argv[optind + verb->takes_file]);
	args->file = argv[optind];
	return verb->run(args);
}

int main(int argc, char **argv)
{
	struct arguments args = {
		.fd = DEFAULT_FD,
		.dtype = KVSCRATCH_DTYPE_F32,
		.timeout = 10,
	};
	int err;

	cli_name = "kvscratchctl";
	/* we say it ourselves, in one line */
	opterr = 0;
	err = open_standard_descriptors();
	if (err)
		return fail(EXIT_SYSTEM, "/dev/null: cannot open: %s", strerror(-err));
	err = parse_options(&args, argc, argv, "+:", global_options);
	if (err)
		return err < 0 ? print_help() : err;
	if (optind == argc)
		return fail(EXIT_INPUT, "expected a verb, see kvscratchctl --help");
	for (size_t i = 0; i < ARRAY_SIZE(verbs); i++)
		if (!strcmp(argv[optind], verbs[i].name))
			return run_verb(&verbs[i], &args, argc - optind, argv + optind);
	return fail(EXIT_INPUT, "expected a verb, got \"%s\", see kvscratchctl --help",
		    argv[optind]);
}
