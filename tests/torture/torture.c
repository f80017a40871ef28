// SPDX-License-Identifier: GPL-2.0-only
/*
 * Producers and consumers that are killed at random moments, in the manner of
 * ztest. usage: torture [KILLS [SEED]]
 *
 * One process, the director, starts writers, readers and strays on one pad after
 * the other, kills them, and checks what is left against notes that each of them
 * keeps in shared memory. All that is chosen follows from the seed; what the
 * scheduler makes of it does not. Nothing waits for time to pass: a hang ends
 * with the guest. Prints TAP; the first thing that is wrong ends the run.
 */
#include "../user/cgroup.h"
#include "../user/common.h"
#include "../user/ring.h"
#include "rows.h"

#include <stdarg.h>

#define DEFAULT_KILLS 10000
#define DEFAULT_SEED 1

#define WRITERS 4
#define READERS 2
#define FIRST_READER WRITERS
#define STRAY (FIRST_READER + READERS)
#define ACTORS (STRAY + 1)

/* Writers that append to a pad between two checks of it */
#define MAX_PAST 32

/* of the pads below */
#define MAX_ROWS 1024

#define STRAY_PAGES 512
/* what the kernel may keep of its own, far less than all pads of a run */
#define CGROUP_SLACK_BYTES (4ll << 20)

enum check {
	NO_ROW_IS_TORN,
	NO_ROW_IS_OF_ANOTHER_GENERATION,
	BATCHES_ARE_WHOLE,
	NO_COMMITTED_ROW_IS_LOST,
	A_FAULTING_WRITE_LEAVES_NOTHING,
	ROWS_SURVIVE_TRUNCATES,
	ZERO_MEANS_ZERO,
	MEMORY_COMES_BACK,
	NO_CALL_FAILS,
	EVERY_CALL_MET_A_KILL,
	NR_CHECKS
};

static const char *const check_names[NR_CHECKS] = {
	[NO_ROW_IS_TORN] = "no_row_is_torn",
	[NO_ROW_IS_OF_ANOTHER_GENERATION] = "no_row_is_of_another_generation",
	[BATCHES_ARE_WHOLE] = "batches_are_whole",
	[NO_COMMITTED_ROW_IS_LOST] = "no_committed_row_is_lost",
	[A_FAULTING_WRITE_LEAVES_NOTHING] = "a_faulting_write_leaves_nothing",
	[ROWS_SURVIVE_TRUNCATES] = "rows_survive_truncates",
	[ZERO_MEANS_ZERO] = "zero_means_zero",
	[MEMORY_COMES_BACK] = "memory_comes_back",
	[NO_CALL_FAILS] = "no_call_fails",
	[EVERY_CALL_MET_A_KILL] = "every_call_met_a_kill",
};

/* Where a process can be when it is killed */
enum place {
	OUTSIDE,
	IN_WRITE,
	IN_WRITEV,
	IN_URING,
	IN_FAULTING_WRITE,
	IN_STAGE,
	IN_FAULTING_STAGE,
	IN_COMMIT,
	IN_TAKEOVER,
	IN_TRUNCATE,
	IN_CREATE,
	IN_FORK,
	IN_OPEN,
	IN_PASS,
	IN_MMAP,
	IN_READ,
	IN_FAULTING_READ,
	IN_POLL,
	NR_PLACES
};

static const char *const place_names[NR_PLACES] = {
	[OUTSIDE] = "between calls",
	[IN_WRITE] = "write",
	[IN_WRITEV] = "writev",
	[IN_URING] = "io_uring",
	[IN_FAULTING_WRITE] = "a write that faults",
	[IN_STAGE] = "STAGE",
	[IN_FAULTING_STAGE] = "a STAGE that faults",
	[IN_COMMIT] = "COMMIT",
	[IN_TAKEOVER] = "TAKEOVER",
	[IN_TRUNCATE] = "TRUNCATE",
	[IN_CREATE] = "CREATE",
	[IN_FORK] = "FORK",
	[IN_OPEN] = "OPEN",
	[IN_PASS] = "passing a handle",
	[IN_MMAP] = "mmap",
	[IN_READ] = "read",
	[IN_FAULTING_READ] = "a read that faults",
	[IN_POLL] = "poll",
};

enum count {
	APPENDS,
	ROWS_APPENDED,
	ROWS_VERIFIED,
	STAGES,
	COMMITS,
	TAKEOVERS,
	TRUNCATES,
	ZERO_TRUNCATES,
	ZERO_CHECKS,
	CREATES,
	FORKS,
	OPENS,
	PASSES,
	MAPS,
	READS,
	POLLS,
	NR_COUNTS
};

#define NO_EPOCH UINT32_MAX

/**
 * struct notes - what an actor writes down, in shared memory
 *
 * Only the actor writes here while it lives, and the director reads; afterwards
 * they are the director's.
 *
 * @inside: where it is, one of &enum place
 * @writer: its number, the one in its rows
 * @started: batches that it began to append
 * @done: batches that write() reported as appended
 * @epoch: truncates of the whole pad when it last appended; NO_EPOCH during one
 * @first_safe: its first batch of that epoch: from there on nothing may be lost
 * @truncates_started: never reset
 * @truncates_done: never reset
 * @min_kept: the fewest rows that its truncates left
 * @steps: things that it did, of whatever kind
 * @seen_generation: of the last state that a reader went through
 * @seen_len: of that as well
 * @counts: by &enum count, never reset
 */
struct notes {
	uint32_t inside;
	uint32_t writer;
	uint32_t started;
	uint32_t done;
	uint32_t epoch;
	uint32_t first_safe;
	uint32_t truncates_started;
	uint32_t truncates_done;
	uint32_t min_kept;
	uint32_t steps;
	uint32_t seen_generation;
	uint32_t seen_len;
	unsigned long counts[NR_COUNTS];
};

static struct shared {
	struct notes notes[ACTORS + 1];
	/* the check that failed first, plus 1 */
	uint32_t failed;
} *shared;

/* The director takes its notes as well. */
#define DIRECTOR ACTORS
static struct notes *me;

#define LOAD(variable) __atomic_load_n(&(variable), __ATOMIC_ACQUIRE)
#define STORE(variable, value) __atomic_store_n(&(variable), value, __ATOMIC_RELEASE)

static const struct shape shapes[] = {
	{ KVSCRATCH_DTYPE_U8, 0, 64, 8, MAX_ROWS, 32, 1 },
	/* rows across pages */
	{ KVSCRATCH_DTYPE_U8, 0, 200, 25, 512, 32, 1 },
	{ KVSCRATCH_DTYPE_U8, 0, 4104, 513, 128, 16, 1 },
	/* batches of far more than what is copied in one go, in huge pages */
	{ KVSCRATCH_DTYPE_U8, 0, 65536, 8192, 96, 40, 1 },
	/* tokens of several planes, in small pages and in huge ones */
	{ KVSCRATCH_DTYPE_U8, 0, 192, 24, 512, 16, 8 },
	{ KVSCRATCH_DTYPE_U8, 0, 65536, 8192, 96, 8, 4 },
	/* converted */
	{ KVSCRATCH_DTYPE_I64, KVSCRATCH_DTYPE_F64, 100, 100, 256, 24, 1 },
	{ KVSCRATCH_DTYPE_MXINT8, KVSCRATCH_DTYPE_F32, 256, 32, 256, 24, 1 },
};

/**
 * struct pad - the pad that all is about, as a process sees it
 * @shape: its rows
 * @cut: truncates keep multiples of this many rows: there, and nowhere else, a
 *	batch may end early
 * @lone: one writer at a time: generations and zeros are exact
 * @fenced: who writes takes the role of the writer, whoever has it
 * @role: the handle that got it, or -1
 * @fd: a handle, or -1
 * @access: its access mode
 * @view: a view
 * @words: room for one row
 */
struct pad {
	const struct shape *shape;
	uint32_t cut;
	bool lone;
	bool fenced;
	int role;
	int fd;
	int access;
	struct kvscratch_view view;
	struct kvscratch_plane planes[MAX_PLANES];
	uint64_t *words;
};

/* Chance */

static uint64_t random_state;

static uint32_t below(uint32_t bound)
{
	uint64_t z = random_state += 0x9e3779b97f4a7c15;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	z = (z ^ z >> 27) * 0x94d049bb133111eb;
	return (uint32_t)((z ^ z >> 31) >> 32) % bound;
}

static bool one_in(uint32_t n)
{
	return !below(n);
}

/* What goes wrong */

static void finish(void) __attribute__((noreturn));

static void complain(enum check check, const char *format, ...)
	__attribute__((noreturn, format(printf, 2, 3)));

static void complain(enum check check, const char *format, ...)
{
	uint32_t nothing = 0;
	char text[256];
	va_list args;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	__atomic_compare_exchange_n(&shared->failed, &nothing, check + 1, false, __ATOMIC_ACQ_REL,
				    __ATOMIC_ACQUIRE);
	fprintf(stderr, "# %s: actor %d: %s\n", check_names[check], (int)(me - shared->notes),
		text);
	if (me != &shared->notes[DIRECTOR])
		_exit(1);
	finish();
}

#define MUST(call) do { \
	long must_result = (call); \
	if (must_result < 0) \
		complain(NO_CALL_FAILS, "line %d: %s: %ld, errno %d", __LINE__, #call, \
			 must_result, errno); \
} while (0)

static void enter(enum place place)
{
	STORE(me->inside, place);
}

static void leave(enum count count)
{
	STORE(me->inside, OUTSIDE);
	me->counts[count]++;
}

/* Another processor, emulated or not, or another task of this one goes on. */
static void step_aside(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#endif
	sched_yield();
}

/* Scans of rows */

/**
 * struct scan - rows in the order in which they lie
 * @pad: whose rows
 * @first: where it began
 * @row: the next row, or the one that is wrong
 * @generation: rows cannot be younger
 * @kept: from here on they cannot be older either
 * @id: of the previous row
 * @why: what is wrong, or NULL
 * @check: which check that breaks
 */
struct scan {
	const struct pad *pad;
	uint32_t first;
	uint32_t row;
	uint32_t generation;
	uint32_t kept;
	struct row_id id;
	const char *why;
	enum check check;
};

static bool scan_fails(struct scan *scan, enum check check, const char *why)
{
	scan->check = check;
	scan->why = why;
	return false;
}

static bool batch_is_open(const struct scan *scan)
{
	return scan->row > scan->first && scan->row % scan->pad->cut &&
	       scan->id.index + 1 < scan->id.count;
}

static bool row_follows(const struct row_id *id, const struct row_id *previous)
{
	return id->writer == previous->writer && id->batch == previous->batch &&
	       id->count == previous->count && id->index == previous->index + 1;
}

/* False when @words are not a row that can be there. */
static bool scan_row(struct scan *scan, const uint64_t *words)
{
	struct row_id id = row_id(words);

	if (!row_is_whole(words, scan->pad->shape->words))
		return scan_fails(scan, NO_ROW_IS_TORN, "checksum");
	if ((int32_t)(id.generation - scan->generation) > 0)
		return scan_fails(scan, NO_ROW_IS_OF_ANOTHER_GENERATION, "too young");
	if (scan->row >= scan->kept && id.generation != scan->generation)
		return scan_fails(scan, NO_ROW_IS_OF_ANOTHER_GENERATION, "too old");
	if (!id.index) {
		if (batch_is_open(scan))
			return scan_fails(scan, BATCHES_ARE_WHOLE, "the one before has no end");
	} else if (scan->row == scan->first) {
		if (!scan->first)
			return scan_fails(scan, BATCHES_ARE_WHOLE, "no beginning");
	} else if (!row_follows(&id, &scan->id)) {
		return scan_fails(scan, BATCHES_ARE_WHOLE, "rows do not belong together");
	}
	scan->id = id;
	scan->row++;
	me->counts[ROWS_VERIFIED]++;
	return true;
}

/* Nothing follows. */
static bool scan_end(struct scan *scan)
{
	if (!batch_is_open(scan))
		return true;
	scan->row--;
	return scan_fails(scan, BATCHES_ARE_WHOLE, "the last one has no end");
}

static void complain_about(const struct scan *scan)
{
	complain(scan->check,
		 "%s: row %u of %s %ux%u, generation %u, follows writer %u batch %u row %u of %u",
		 scan->why, scan->row, kvscratch_dtype_name(scan->pad->shape->dtype),
		 scan->pad->shape->rows, scan->pad->shape->dim, scan->generation,
		 scan->id.writer, scan->id.batch, scan->id.index, scan->id.count);
}

static const uint64_t *view_row(const struct pad *pad, uint32_t row)
{
	const struct shape *shape = pad->shape;
	const uint8_t *data = pad->view.data;
	size_t words = shape->words / shape->planes;

	if (shape->planes == 1)
		return decode_row(shape, data + row * pad->planes[0].row_bytes,
				  data + pad->planes[0].scales_offset +
				  row * pad->planes[0].scales_row_bytes, pad->words);
	/* one checksum over what lies in all planes */
	for (uint32_t i = 0; i < shape->planes; i++)
		memcpy(pad->words + i * words,
		       data + pad->planes[i].offset + row * pad->planes[i].row_bytes,
		       pad->planes[i].row_bytes);
	return pad->words;
}

/* A scan of all rows of @state, at its beginning */
static struct scan scan_of(const struct pad *pad, uint64_t state)
{
	uint64_t trunc = kvscratch_word_load(&pad->view.status->trunc);
	struct scan scan = {
		.pad = pad,
		.generation = kvscratch_state_generation(state),
		.kept = UINT32_MAX,
	};

	/* otherwise an append that overlaps a truncate knows an older generation */
	if (pad->lone && kvscratch_state_generation(trunc) == scan.generation)
		scan.kept = kvscratch_state_len(trunc);
	if (kvscratch_state_len(state) > pad->shape->rows)
		complain(NO_ROW_IS_TORN, "%u rows of %u", kvscratch_state_len(state),
			 pad->shape->rows);
	return scan;
}

/* As the status page's protocol has it: what is not believed may be anything. */
static void scan_view(const struct pad *pad)
{
	uint64_t state = kvscratch_view_state(&pad->view);
	uint32_t len = kvscratch_state_len(state);
	struct scan scan = scan_of(pad, state);
	uint32_t valid;

	while (scan.row < len && scan_row(&scan, view_row(pad, scan.row)))
		;
	if (!scan.why)
		scan_end(&scan);
	valid = kvscratch_view_valid_rows(&pad->view, state);
	if (scan.why && scan.row < valid)
		complain_about(&scan);
	if (valid == len) {
		STORE(me->seen_len, len);
		STORE(me->seen_generation, kvscratch_state_generation(state));
	}
}

static void check_array_zero_from(const struct pad *pad, uint64_t offset, uint32_t row_bytes,
				  uint32_t row)
{
	const uint8_t *at = (const uint8_t *)pad->view.data + offset;
	size_t end = (size_t)pad->shape->rows * row_bytes;

	for (size_t i = (size_t)row * row_bytes; i < end; i += sizeof(uint64_t)) {
		uint64_t word = 0;

		memcpy(&word, at + i, end - i < sizeof(word) ? end - i : sizeof(word));
		if (word)
			complain(ZERO_MEANS_ZERO, "%s %ux%u, byte %zu, from row %u",
				 kvscratch_dtype_name(pad->shape->dtype), pad->shape->rows,
				 pad->shape->dim, offset + i, row);
	}
}

/* All bytes of rows @row and up are zero. */
static void check_zero_from(const struct pad *pad, uint32_t row)
{
	for (uint32_t i = 0; i < pad->shape->planes; i++) {
		const struct kvscratch_plane *plane = &pad->planes[i];

		check_array_zero_from(pad, plane->offset, plane->row_bytes, row);
		check_array_zero_from(pad, plane->scales_offset, plane->scales_row_bytes, row);
	}
	me->counts[ZERO_CHECKS]++;
}

/* Handles */

static void map_pad(struct pad *pad)
{
	struct kvscratch_pad_info info;
	void *data;

	MUST(device_pad_info(pad->fd, &info));
	MUST(device_planes(pad->fd, 0, pad->planes, MAX_PLANES));
	enter(IN_MMAP);
	data = mmap(NULL, info.mapping_bytes, PROT_READ, MAP_SHARED, pad->fd, 0);
	MUST(data == MAP_FAILED ? -errno : 0);
	/* behind a plane there may be a hole: then it ends there, and pages come by fault */
	if (one_in(2))
		madvise(data, info.mapping_bytes, MADV_POPULATE_READ);
	pad->view.data = data;
	pad->view.mapped_bytes = info.mapping_bytes;
	pad->view.status = (void *)((uint8_t *)data + info.status_offset);
	leave(MAPS);
}

static void open_anew(struct pad *pad)
{
	int fd;

	enter(IN_OPEN);
	fd = device_reopen(pad->fd, pad->access);
	MUST(fd);
	leave(OPENS);
	close(pad->fd);
	pad->fd = fd;
}

static int receive_handle(int line)
{
	char text[16];
	int fd;

	MUST(kvscratch_receive_handles(line, text, sizeof(text), &fd, 1));
	return fd;
}

static void send_handle(int line, int fd)
{
	const char *name = "handle";

	MUST(kvscratch_send_handles(line, &name, &fd, 1));
}

/* For a while the pad is held by what lies in a socket's queue. */
static void pass_to_myself(struct pad *pad)
{
	int ends[2];

	MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
	enter(IN_PASS);
	send_handle(ends[0], pad->fd);
	close(pad->fd);
	close(ends[0]);
	pad->fd = receive_handle(ends[1]);
	leave(PASSES);
	close(ends[1]);
}

static void change_handle(struct pad *pad)
{
	switch (below(3)) {
	case 0:
		open_anew(pad);
		break;
	case 1:
		pass_to_myself(pad);
		break;
	default:
		device_unmap(&pad->view);
		map_pad(pad);
	}
}

/* Writers */

struct writer {
	struct pad *pad;
	uint8_t *source;
	struct ring ring;
};

/* Truncates of the pad so far, or NO_EPOCH while one may be under way */
static uint32_t current_epoch(void)
{
	uint32_t started = 0, done = 0;

	for (int i = 0; i <= ACTORS; i++) {
		done += LOAD(shared->notes[i].truncates_done);
		started += LOAD(shared->notes[i].truncates_started);
	}
	return started == done ? started : NO_EPOCH;
}

static uint8_t *map_memory(size_t bytes)
{
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			    -1, 0);

	if (memory == MAP_FAILED)
		complain(NO_CALL_FAILS, "mmap of %zu bytes: errno %d", bytes, errno);
	return memory;
}

static void give_up_role(struct pad *pad)
{
	if (pad->role >= 0)
		close(pad->role);
	pad->role = -1;
}

/* Take the role from whoever has it. */
static void take_role(struct pad *pad)
{
	give_up_role(pad);
	enter(IN_TAKEOVER);
	pad->role = device_open_writer(pad->fd, KVSCRATCH_OPEN_TAKEOVER);
	leave(TAKEOVERS);
	MUST(pad->role);
}

/* As whoever is allowed to: the director has no role, and nobody has when it truncates. */
static int truncate_as_allowed(struct pad *pad, uint32_t kept, uint32_t flags)
{
	for (;;) {
		int err = device_truncate(pad->role >= 0 ? pad->role : pad->fd, kept, flags);

		if (err == -ETXTBSY) {
			/* a stray has a fork, for a while */
			step_aside();
		} else if (pad->fenced && (err == -ESTALE || err == -EBUSY)) {
			take_role(pad);
			enter(IN_TRUNCATE);
		} else {
			return err;
		}
	}
}

static void truncate_pad(struct pad *pad, uint32_t kept, bool zero)
{
	int err;

	if (kept < me->min_kept)
		STORE(me->min_kept, kept);
	STORE(me->truncates_started, me->truncates_started + 1);
	enter(IN_TRUNCATE);
	err = truncate_as_allowed(pad, kept, zero ? KVSCRATCH_TRUNCATE_ZERO : 0);
	leave(zero ? ZERO_TRUNCATES : TRUNCATES);
	STORE(me->truncates_done, me->truncates_done + 1);
	/* another one may have been faster */
	if (err && (err != -EINVAL || pad->lone))
		complain(NO_CALL_FAILS, "truncate to %u: %d", kept, err);
}

static void truncate_somewhere(struct pad *pad)
{
	uint32_t len = kvscratch_state_len(kvscratch_view_state(&pad->view));
	uint32_t kept = one_in(2) ? 0 : pad->cut * below(len / pad->cut + 1);
	bool zero = one_in(2);

	truncate_pad(pad, kept, zero);
	if (zero && pad->lone && one_in(4))
		check_zero_from(pad, kept);
}

/* The rows of the next batch, somewhere in the source; returns where */
static uint8_t *make_batch(struct writer *writer, uint32_t count)
{
	const struct shape *shape = writer->pad->shape;
	uint8_t *rows = writer->source + below(page_bytes() / 8) * 8;
	struct row_id id = {
		.writer = me->writer,
		.batch = me->done + 1,
		.count = count,
		.generation = kvscratch_state_generation(kvscratch_view_state(&writer->pad->view)),
	};

	for (id.index = 0; id.index < count; id.index++) {
		make_row(writer->pad->words, shape->words, &id);
		encode_row(shape, writer->pad->words, rows + id.index * input_row_bytes(shape));
	}
	return rows;
}

/* What the director will expect of the batch that comes next */
static void note_start(void)
{
	uint32_t epoch = current_epoch();

	if (epoch != me->epoch) {
		STORE(me->first_safe, me->done + 1);
		STORE(me->epoch, epoch);
	}
	STORE(me->started, me->done + 1);
}

/* The handle to write() with */
static int writer_fd(struct pad *pad)
{
	if (pad->fenced && pad->role < 0)
		take_role(pad);
	return pad->fenced ? pad->role : pad->fd;
}

static ssize_t append_in_pieces(int fd, uint8_t *rows, size_t bytes)
{
	struct iovec iov[4];
	int count = 0;

	while (bytes) {
		size_t piece = count == ARRAY_SIZE(iov) - 1 ? bytes : 1 + below(bytes);

		iov[count++] = (struct iovec) { rows, piece };
		rows += piece;
		bytes -= piece;
	}
	return writev(fd, iov, count);
}

static ssize_t append_by_ring(struct writer *writer, uint8_t *rows, size_t bytes)
{
	const struct io_uring_sqe sqe = {
		.opcode = IORING_OP_WRITE,
		.fd = writer_fd(writer->pad),
		.addr = (uintptr_t)rows,
		.len = bytes,
	};
	int result = ring_do(&writer->ring, &sqe);

	if (result >= 0)
		return result;
	errno = -result;
	return -1;
}

/* The rows of each plane: one call where they follow each other, else one a row */
static int stage_batch(struct writer *writer, const uint8_t *rows, uint32_t count, uint32_t len,
		       bool faults)
{
	const struct pad *pad = writer->pad;
	size_t token = input_row_bytes(pad->shape), bytes = token / pad->shape->planes;
	/* any order: what counts is that all of them are there */
	uint32_t first = below(pad->shape->planes);
	int err = 0;

	for (uint32_t i = 0; !err && i < pad->shape->planes; i++) {
		uint32_t plane = (first + i) % pad->shape->planes;
		const uint8_t *from = rows + plane * bytes;

		enter(faults ? IN_FAULTING_STAGE : IN_STAGE);
		if (pad->shape->planes == 1)
			err = device_stage(pad->role, plane, len, from, count);
		for (uint32_t row = 0; !err && pad->shape->planes > 1 && row < count; row++)
			err = device_stage(pad->role, plane, len + row, from + row * token, 1);
		leave(STAGES);
	}
	return err;
}

/* Drop what is staged, and stage it again as it lies there */
static int abort_and_keep(struct pad *pad, uint32_t count, uint32_t len)
{
	int err = device_commit(pad->role, len);

	for (uint32_t plane = 0; !err && plane < pad->shape->planes; plane++)
		err = device_keep(pad->role, plane, len, count);
	return err;
}

/* Whoever is taken over takes over again, and begins anew; what write() would return */
static ssize_t append_as_the_writer(struct writer *writer, const uint8_t *rows, size_t bytes,
				    bool faults)
{
	struct pad *pad = writer->pad;
	uint32_t count = bytes / input_row_bytes(pad->shape);
	int err;

	if (pad->role < 0)
		take_role(pad);
	for (;;) {
		uint32_t len = kvscratch_state_len(kvscratch_view_state(&pad->view));

		err = stage_batch(writer, rows, count, len, faults);
		if (!err && one_in(4))
			err = abort_and_keep(pad, count, len);
		if (!err) {
			enter(IN_COMMIT);
			err = device_commit(pad->role, len + count);
			leave(COMMITS);
		}
		/* also what is EINVAL to somebody whose len is another's */
		if (err != -ESTALE && err != -EINVAL)
			break;
		take_role(pad);
	}
	errno = -err;
	return err ? -1 : (ssize_t)bytes;
}

/* In one of the ways that there are; @place is IN_FAULTING_WRITE or OUTSIDE */
static ssize_t append(struct writer *writer, uint8_t *rows, size_t bytes, enum place place)
{
	uint32_t way = writer->ring.fd < 0 ? below(2) : below(3);

	if (writer->pad->fenced && one_in(2))
		return append_as_the_writer(writer, rows, bytes, place);
	enter(place ? place : IN_WRITE + way);
	switch (way) {
	case 0:
		return write(writer_fd(writer->pad), rows, bytes);
	case 1:
		return append_in_pieces(writer_fd(writer->pad), rows, bytes);
	default:
		return append_by_ring(writer, rows, bytes);
	}
}

static uint32_t batch_rows(const struct shape *shape)
{
	/* most are small */
	return 1 + below(one_in(3) ? shape->max_batch : 4);
}

/* Nothing was appended: another one has the role. */
static bool was_taken_over(struct pad *pad, ssize_t appended)
{
	if (appended >= 0 || errno != ESTALE || !pad->fenced)
		return false;
	take_role(pad);
	return true;
}

static void append_batch(struct writer *writer)
{
	uint32_t count = batch_rows(writer->pad->shape);
	size_t bytes = count * input_row_bytes(writer->pad->shape);
	uint8_t *rows = make_batch(writer, count);
	ssize_t appended;

	note_start();
	do
		appended = append(writer, rows, bytes, OUTSIDE);
	while (was_taken_over(writer->pad, appended));
	if (appended == (ssize_t)bytes) {
		STORE(me->done, me->done + 1);
		leave(APPENDS);
		me->counts[ROWS_APPENDED] += count;
		return;
	}
	if (appended >= 0 || errno != ENOSPC)
		complain(NO_CALL_FAILS, "append of %zu bytes: %zd, errno %d", bytes, appended,
			 errno);
	STORE(me->inside, OUTSIDE);
	truncate_somewhere(writer->pad);
}

/* Append a batch of which one page does not come, and say so on @line before. */
static void append_and_get_stuck(struct writer *writer, int line)
{
	const struct shape *shape = writer->pad->shape;
	uint32_t count = 1 + below(shape->max_batch);
	size_t bytes = count * input_row_bytes(shape);
	size_t page = page_bytes();
	uint8_t *rows, *first, *hole;
	ssize_t appended;

	truncate_pad(writer->pad, 0, one_in(2));
	rows = make_batch(writer, count);
	first = (uint8_t *)((uintptr_t)rows & ~(page - 1));
	hole = first + page * below((rows + bytes - 1 - first) / page + 1);
	MUST(madvise(hole, page, MADV_DONTNEED));
	send_handle(line, stop_at(hole, page));
	for (;;) {
		note_start();
		appended = append(writer, rows, bytes, IN_FAULTING_WRITE);
		/* before it came to the page that does not come; and another will not either */
		if (was_taken_over(writer->pad, appended))
			continue;
		if (appended >= 0 || errno != ENOSPC)
			break;
		/* others have filled the pad again, and the source was not looked at */
		STORE(me->inside, OUTSIDE);
		truncate_pad(writer->pad, 0, false);
	}
	complain(A_FAULTING_WRITE_LEAVES_NOTHING, "it returned %zd, errno %d", appended, errno);
}

static void act_as_writer(struct pad *pad, int line, bool gets_stuck)
{
	size_t batch_bytes = pad->shape->max_batch * input_row_bytes(pad->shape);
	uint32_t batches = below(4);
	struct writer writer = { .pad = pad, .ring.fd = -1 };

	writer.source = map_memory(batch_bytes + 2 * page_bytes());
	if (one_in(3))
		MUST(ring_open(&writer.ring));
	while (!gets_stuck || batches--) {
		STORE(me->steps, me->steps + 1);
		switch (below(12)) {
		case 0:
			change_handle(pad);
			break;
		case 1:
			truncate_somewhere(pad);
			break;
		default:
			append_batch(&writer);
		}
	}
	append_and_get_stuck(&writer, line);
}

/* Readers */

/* Rows from a random one on, by pread() or read() */
static void read_rows(struct pad *pad, uint8_t *buffer)
{
	uint32_t len = kvscratch_state_len(kvscratch_view_state(&pad->view));
	uint32_t first = one_in(2) ? 0 : below(len + 1);
	size_t row_bytes = stored_row_bytes(pad->shape);
	size_t data_bytes = row_bytes - mx_scale_bytes(pad->shape);
	off_t at = first * row_bytes;
	struct scan scan = { .pad = pad, .first = first, .row = first, .kept = UINT32_MAX };
	size_t bytes = (1 + below(pad->shape->rows)) * row_bytes;
	ssize_t got = 0;

	/* to look at them takes so much longer that no kill would come in between */
	for (uint32_t times = 1 + below(8); times; times--) {
		enter(IN_READ);
		if (one_in(2)) {
			got = pread(pad->fd, buffer, bytes, at);
		} else {
			MUST(lseek(pad->fd, at, SEEK_SET));
			got = read(pad->fd, buffer, bytes);
		}
		leave(READS);
		MUST(got);
	}
	scan.generation = kvscratch_state_generation(kvscratch_view_state(&pad->view));
	/* a truncate may have ended it anywhere */
	for (size_t rows = got / row_bytes; rows; rows--, buffer += row_bytes) {
		const uint64_t *words = decode_row(pad->shape, buffer, buffer + data_bytes,
						   pad->words);

		if (!scan_row(&scan, words))
			complain_about(&scan);
	}
}

/* Acknowledge what was gone through, and sleep until there is anything else. */
static void wait_for_news(struct pad *pad)
{
	struct pollfd news = { .fd = pad->fd, .events = POLLIN };

	if (me->seen_len == UINT32_MAX)
		return;
	MUST(device_seen(pad->fd, (uint64_t)me->seen_generation << 32 | me->seen_len));
	enter(IN_POLL);
	MUST(poll(&news, 1, -1));
	leave(POLLS);
	if (news.revents & (POLLERR | POLLHUP | POLLNVAL))
		complain(NO_CALL_FAILS, "poll: %#x", news.revents);
}

static void act_as_reader(struct pad *pad)
{
	uint8_t *buffer = map_memory(pad->shape->rows * stored_row_bytes(pad->shape));

	if (one_in(2)) {
		/* the view needs no handle */
		close(pad->fd);
		pad->fd = -1;
	}
	for (;;) {
		STORE(me->steps, me->steps + 1);
		scan_view(pad);
		if (pad->fd < 0) {
			step_aside();
			continue;
		}
		switch (below(8)) {
		case 0:
			change_handle(pad);
			break;
		case 1:
		case 2:
		case 3:
			read_rows(pad, buffer);
			break;
		default:
			wait_for_news(pad);
		}
	}
}

/* Read into a page that does not come, as soon as there is something to read. */
static void read_and_get_stuck(struct pad *pad, int line)
{
	size_t bytes = pad->shape->rows * stored_row_bytes(pad->shape);
	uint8_t *buffer = map_memory(bytes);

	send_handle(line, stop_at(buffer, page_bytes()));
	enter(IN_FAULTING_READ);
	while (!pread(pad->fd, buffer, bytes, 0))
		step_aside();
	complain(NO_CALL_FAILS, "a read that faults ended, errno %d", errno);
}

/* Strays: what else happens to a device */

/* A pad of its own, which is zero */
static void make_another(void)
{
	uint32_t rows = 1 + below(STRAY_PAGES);
	struct kvscratch_view view;
	uint32_t row;
	int fd;

	enter(IN_CREATE);
	fd = device_create(rows, page_bytes(), KVSCRATCH_DTYPE_U8);
	MUST(fd);
	leave(CREATES);
	enter(IN_MMAP);
	MUST(device_map(fd, &view));
	leave(MAPS);
	close(fd);
	row = below(rows);
	if (!all_zero((const uint8_t *)view.data + row * page_bytes(), page_bytes()))
		complain(ZERO_MEANS_ZERO, "row %u of %u of a new pad", row, rows);
	device_unmap(&view);
}

/* Rows below @len of a fork, of which @state was that of the pad */
static void scan_branch(const struct pad *branch, struct scan scan, uint32_t len)
{
	if (kvscratch_state_len(kvscratch_view_state(&branch->view)) != len)
		complain(NO_COMMITTED_ROW_IS_LOST, "a fork of %u rows has others", len);
	while (scan.row < len)
		if (!scan_row(&scan, view_row(branch, scan.row)))
			complain_about(&scan);
}

/* A fork of the pad as it is now, forks of that, and only the last one stays: all are right. */
static void branch_off(const struct pad *pad)
{
	struct pad branch = *pad;
	struct kvscratch_pad_info info;
	uint32_t len, links = 1 + below(3);
	struct scan scan;

	MUST(device_pad_info(pad->fd, &info));
	scan = scan_of(pad, (uint64_t)(uint32_t)info.generation << 32 | info.len);
	/* batches may end early there, as at a truncate: a fork may be of any row */
	branch.cut = 1;
	scan.pad = &branch;
	len = info.len;
	for (uint32_t link = 0; link < links; link++) {
		int from = link ? branch.fd : pad->fd;

		enter(IN_FORK);
		branch.fd = device_fork(from, len, link ? 0 : info.generation,
					len + 1 + below(pad->shape->rows));
		leave(FORKS);
		if (link)
			close(from);
		/* truncated meanwhile */
		if (!link && branch.fd == -ECANCELED)
			return;
		MUST(branch.fd);
		map_pad(&branch);
		scan_branch(&branch, scan, len);
		device_unmap(&branch.view);
		len = below(len + 1);
	}
	close(branch.fd);
}

static void act_as_stray(struct pad *pad)
{
	for (;;) {
		STORE(me->steps, me->steps + 1);
		switch (below(3)) {
		case 0:
			make_another();
			break;
		case 1:
			branch_off(pad);
			break;
		default:
			change_handle(pad);
		}
	}
}

/* The director */

enum role {
	WRITER,
	STUCK_WRITER,
	READER,
	STUCK_READER,
	STRAY_ONE,
};

static int access_of(enum role role)
{
	return role == READER || role == STUCK_READER ? O_RDONLY : O_RDWR;
}

static struct child children[ACTORS];	/* pid 0: there is none */
static uint32_t serial;
static unsigned long kills_wanted, kills;
static unsigned long kills_in[NR_PLACES];
static unsigned long pads;
static uint64_t seed;
static long long refcnt_before;
static char cgroup[64];
static long long cgroup_before;
static uint64_t limits_before[2];

/**
 * struct past - what is known of a writer that was killed since the last check
 * @writer: its number
 * @started: batches it began
 * @done: batches it knew to be appended
 * @first_safe: from this batch on none may be lost; above @started when all may
 * @epoch: truncates of the pad when it last appended
 * @next: what the scan expects next, or more
 * @stuck: it was killed in a write that faulted
 */
struct past {
	uint32_t writer;
	uint32_t started;
	uint32_t done;
	uint32_t first_safe;
	uint32_t epoch;
	uint32_t next;
	bool stuck;
};

/**
 * struct ledger - what the pad has to hold
 * @past: writers since the last check
 * @nr_past: how many
 * @len: rows at the last check
 * @checks: their checksums
 */
static struct ledger {
	struct past past[MAX_PAST];
	uint32_t nr_past;
	uint32_t len;
	uint64_t checks[MAX_ROWS];
} ledger;

/* So many more until there was one in each place: one in 200 finds a read by itself. */
#define MORE_KILLS 2000

static bool every_place_was_met(void)
{
	for (int place = 0; place < NR_PLACES; place++)
		if (!kills_in[place])
			return false;
	return true;
}

static bool is_running(uint32_t actor)
{
	return children[actor].pid;
}

static void check_children(void)
{
	siginfo_t info = { 0 };

	if (!LOAD(shared->failed) &&
	    (waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) || !info.si_pid))
		return;
	if (!LOAD(shared->failed))
		complain(NO_CALL_FAILS, "a child ended by itself: code %d, status %d",
			 info.si_code, info.si_status);
	finish();
}

#define AWAIT(condition) do { \
	while (!(condition)) { \
		check_children(); \
		step_aside(); \
	} \
} while (0)

/* A handle of one's own instead of the director's */
static void equip(struct pad *pad, int line, int access, bool passed)
{
	pad->access = access;
	if (passed) {
		close(pad->fd);
		pad->fd = receive_handle(line);
	} else {
		open_anew(pad);
	}
	/* a fork has copied the director's view: as good as another */
	if (one_in(2)) {
		device_unmap(&pad->view);
		map_pad(pad);
	}
}

static void act(struct pad *pad, enum role role, int line, bool passed)
{
	equip(pad, line, access_of(role), passed);
	switch (role) {
	case WRITER:
	case STUCK_WRITER:
		act_as_writer(pad, line, role == STUCK_WRITER);
		break;
	case READER:
		act_as_reader(pad);
		break;
	case STUCK_READER:
		read_and_get_stuck(pad, line);
		break;
	case STRAY_ONE:
		act_as_stray(pad);
		break;
	}
}

static void start(struct pad *pad, uint32_t actor, enum role role)
{
	struct notes *notes = &shared->notes[actor];
	bool passed = one_in(2);
	struct child child;
	int handle;

	notes->inside = OUTSIDE;
	notes->writer = ++serial;
	notes->started = 0;
	notes->done = 0;
	notes->epoch = NO_EPOCH;
	notes->first_safe = 1;
	notes->seen_generation = 0;
	notes->seen_len = UINT32_MAX;
	if (start_child(&child)) {
		me = notes;
		random_state ^= (uint64_t)serial << 32;
		act(pad, role, child.line, passed);
		_exit(1);
	}
	children[actor] = child;
	if (passed) {
		handle = device_reopen(pad->fd, access_of(role));
		MUST(handle);
		send_handle(child.line, handle);
		close(handle);
	}
}

/*
 * The writer is dead, and its truncate, if any, over: what it was to scrub the next one
 * with ZERO has to.
 */
static void note_past(struct notes *notes)
{
	STORE(notes->truncates_done, notes->truncates_started);
	if (ledger.nr_past == MAX_PAST)
		complain(NO_CALL_FAILS, "too many writers between two checks");
	ledger.past[ledger.nr_past++] = (struct past) {
		.writer = notes->writer,
		.started = notes->started,
		.done = notes->done,
		.first_safe = notes->first_safe,
		.epoch = notes->epoch,
		.stuck = notes->inside == IN_FAULTING_WRITE || notes->inside == IN_FAULTING_STAGE,
	};
}

static void kill_actor(uint32_t actor)
{
	struct notes *notes = &shared->notes[actor];
	struct child *child = &children[actor];
	int status;

	kill(child->pid, SIGKILL);
	status = end_child(child);
	child->pid = 0;
	if (status != 128 + SIGKILL)
		complain(NO_CALL_FAILS, "actor %u ended with %d", actor, status);
	kills++;
	kills_in[notes->inside]++;
	if (actor < WRITERS)
		note_past(notes);
}

/* After some steps, at any moment; where no kill has been yet at once */
static void kill_some_time(uint32_t actor)
{
	struct notes *notes = &shared->notes[actor];
	uint32_t steps = LOAD(notes->steps);
	uint32_t more = below(6);
	uint32_t looks = below(4);

	/* a reader may sleep until somebody else goes on */
	if (actor < WRITERS || actor == STRAY)
		AWAIT(LOAD(notes->steps) - steps >= more);
	if (!every_place_was_met())
		looks += 16;
	while (looks-- && kills_in[LOAD(notes->inside)])
		step_aside();
	kill_actor(actor);
}

/* One of the actors from @first that is running, or UINT32_MAX */
static uint32_t any_running(uint32_t first, uint32_t count)
{
	uint32_t skip = below(count);

	for (uint32_t i = 0; i < count; i++) {
		uint32_t actor = first + (i + skip) % count;

		if (is_running(actor))
			return actor;
	}
	return UINT32_MAX;
}

static uint32_t free_writer(void)
{
	uint32_t actor = 0;

	while (is_running(actor))
		actor++;
	return actor;
}

static void kill_writers(void)
{
	uint32_t actor;

	while ((actor = any_running(0, WRITERS)) != UINT32_MAX)
		kill_some_time(actor);
}

/* While a writer is stuck no state of the pad changes. */
static void nothing_shows_of(struct pad *pad, const struct notes *stuck)
{
	uint64_t state = kvscratch_view_state(&pad->view);
	struct scan scan = scan_of(pad, state);

	while (scan.row < kvscratch_state_len(state)) {
		if (!scan_row(&scan, view_row(pad, scan.row)))
			complain_about(&scan);
		if (scan.id.writer == stuck->writer && scan.id.batch > stuck->done)
			complain(A_FAULTING_WRITE_LEAVES_NOTHING, "row %u shows before the end",
				 scan.row - 1);
	}
	if (!scan_end(&scan))
		complain_about(&scan);
}

/* Wait for the fault; the peer of @line may die instead. */
static void await_fault(int faults)
{
	struct pollfd fault = { .fd = faults, .events = POLLIN };

	/* poll() of it reports an error otherwise */
	MUST(fcntl(faults, F_SETFL, O_NONBLOCK));
	AWAIT(poll(&fault, 1, 0) == 1 && await_stop(faults));
}

static void kill_in_faulting_write(struct pad *pad)
{
	uint32_t victim, other, before;
	int faults;

	if (pad->lone)
		kill_writers();
	victim = free_writer();
	other = any_running(0, WRITERS);
	start(pad, victim, STUCK_WRITER);
	faults = receive_handle(children[victim].line);
	await_fault(faults);
	/* in a fenced pad others go on: what shows of it the next check tells */
	if (!pad->fenced)
		nothing_shows_of(pad, &shared->notes[victim]);
	if (other == UINT32_MAX) {
		other = free_writer();
		start(pad, other, WRITER);
	}
	before = LOAD(shared->notes[other].done);
	/* who takes over does not wait for the one that is stuck, dead or alive */
	if (pad->fenced)
		AWAIT(LOAD(shared->notes[other].done) != before);
	before = LOAD(shared->notes[other].done);
	kill_actor(victim);
	close(faults);
	/* nobody else holds it up */
	AWAIT(LOAD(shared->notes[other].done) != before);
}

/* A reader that is stuck holds nobody up. */
static void kill_in_faulting_read(struct pad *pad)
{
	uint32_t victim = FIRST_READER + below(READERS);
	uint32_t writer = any_running(0, WRITERS);
	uint32_t before;
	int faults;

	if (is_running(victim))
		kill_some_time(victim);
	start(pad, victim, STUCK_READER);
	faults = receive_handle(children[victim].line);
	await_fault(faults);
	before = LOAD(shared->notes[writer].done);
	AWAIT(LOAD(shared->notes[writer].done) != before);
	kill_actor(victim);
	close(faults);
	start(pad, victim, READER);
}

/* Rows that the last check saw and no truncate took */
static uint32_t surviving_rows(void)
{
	uint32_t rows = ledger.len;

	for (int i = 0; i <= ACTORS; i++)
		if (shared->notes[i].min_kept < rows)
			rows = shared->notes[i].min_kept;
	return rows;
}

static struct past *past_writer(uint32_t writer)
{
	for (uint32_t i = 0; i < ledger.nr_past; i++)
		if (ledger.past[i].writer == writer)
			return &ledger.past[i];
	return NULL;
}

/* The batch that begins at @row must be the next of its writer. */
static void check_batch(const struct row_id *id, uint32_t row, uint64_t check)
{
	struct past *past = past_writer(id->writer);

	if (!past) {
		/* a truncate that was noted, but came too late or not at all, spared it */
		if (row >= ledger.len || check != ledger.checks[row])
			complain(NO_COMMITTED_ROW_IS_LOST,
				 "row %u is of writer %u, who is long gone", row, id->writer);
		return;
	}
	if (past->stuck && id->batch > past->done)
		complain(A_FAULTING_WRITE_LEAVES_NOTHING, "row %u is of it", row);
	if (id->batch > past->started || id->batch < past->next)
		complain(NO_COMMITTED_ROW_IS_LOST,
			 "row %u is of batch %u of writer %u, of %u to %u of whom it may be", row,
			 id->batch, id->writer, past->next, past->started);
	if (id->batch > past->next && id->batch > past->first_safe)
		complain(NO_COMMITTED_ROW_IS_LOST, "row %u: batch %u of writer %u follows %u", row,
			 id->batch, id->writer, past->next - 1);
	past->next = id->batch + 1;
}

static void check_past(const struct past *past)
{
	if (past->first_safe <= past->done && past->next <= past->done)
		complain(NO_COMMITTED_ROW_IS_LOST,
			 "writer %u was told of batches to %u, there are those before %u (%u on)",
			 past->writer, past->done, past->next, past->first_safe);
}

/* No writer lives: every row is accounted for. */
static void check_pad(struct pad *pad)
{
	uint64_t state = kvscratch_view_state(&pad->view);
	uint32_t len = kvscratch_state_len(state);
	struct scan scan = scan_of(pad, state);
	uint32_t surviving = surviving_rows();
	uint32_t epoch = current_epoch();

	for (uint32_t i = 0; i < ledger.nr_past; i++) {
		/* a truncate began after its last append did: all may be gone */
		if (ledger.past[i].epoch != epoch)
			ledger.past[i].first_safe = UINT32_MAX;
		ledger.past[i].next = 1;
	}
	if (len < surviving)
		complain(NO_COMMITTED_ROW_IS_LOST, "%u rows, there were %u", len, surviving);
	while (scan.row < len) {
		const uint64_t *words = view_row(pad, scan.row);

		if (!scan_row(&scan, words))
			complain_about(&scan);
		if (scan.row <= surviving) {
			if (words[ROW_CHECK] != ledger.checks[scan.row - 1])
				complain(ROWS_SURVIVE_TRUNCATES, "row %u of %u", scan.row - 1,
					 surviving);
		} else if (!scan.id.index) {
			check_batch(&scan.id, scan.row - 1, words[ROW_CHECK]);
		}
		ledger.checks[scan.row - 1] = words[ROW_CHECK];
	}
	if (!scan_end(&scan))
		complain_about(&scan);
	for (uint32_t i = 0; i < ledger.nr_past; i++)
		check_past(&ledger.past[i]);
	ledger.len = len;
	ledger.nr_past = 0;
	for (int i = 0; i <= ACTORS; i++)
		shared->notes[i].min_kept = UINT32_MAX;
}

/* Wake-ups are not lost: each reader comes to see what there is. */
static void await_readers(struct pad *pad)
{
	uint64_t state = kvscratch_view_state(&pad->view);

	for (uint32_t i = FIRST_READER; i < FIRST_READER + READERS; i++)
		if (is_running(i))
			AWAIT(LOAD(shared->notes[i].seen_generation) ==
			      kvscratch_state_generation(state) &&
			      LOAD(shared->notes[i].seen_len) == kvscratch_state_len(state));
}

static void replace(struct pad *pad, uint32_t actor, enum role role)
{
	if (is_running(actor))
		kill_some_time(actor);
	start(pad, actor, role);
}

/* Some writers, until the last is killed; then look */
static void run_phase(struct pad *pad)
{
	uint32_t writers = pad->lone ? 1 : 1 + below(WRITERS - 1);

	for (uint32_t i = 0; i < writers; i++)
		start(pad, i, WRITER);
	for (uint32_t more = below(6); more; more--) {
		switch (below(9)) {
		case 0:
		case 1:
		case 2:
			kill_in_faulting_write(pad);
			break;
		case 3:
			kill_in_faulting_read(pad);
			break;
		case 4:
			replace(pad, FIRST_READER + below(READERS), READER);
			break;
		case 5:
			replace(pad, STRAY, STRAY_ONE);
			break;
		default:
			replace(pad, any_running(0, WRITERS), WRITER);
		}
	}
	kill_writers();
	check_pad(pad);
	await_readers(pad);
	if (one_in(2)) {
		uint32_t kept = pad->cut * below(ledger.len / pad->cut + 1);

		truncate_pad(pad, kept, true);
		/* it had to take one where what the dead left goes late */
		give_up_role(pad);
		check_zero_from(pad, kept);
		check_pad(pad);
		await_readers(pad);
	}
	if (one_in(4))
		change_handle(pad);
}

static void make_pad(struct pad *pad)
{
	const struct shape *shape = &shapes[below(ARRAY_SIZE(shapes))];
	struct kvscratch_plane planes[MAX_PLANES];

	*pad = (struct pad) {
		.shape = shape,
		.cut = shape->rows / (1 + below(4)) - below(3),
		.lone = one_in(2),
		.fenced = one_in(2),
		.role = -1,
		.access = O_RDWR,
		.words = calloc(shape->words, sizeof(uint64_t)),
	};
	for (uint32_t i = 0; i < shape->planes; i++)
		planes[i] = (struct kvscratch_plane) {
			.dim = shape->dim / shape->planes,
			.dtype = shape->dtype,
			.input_dtype = shape->input_dtype,
		};
	enter(IN_CREATE);
	pad->fd = device_create_planes(shape->rows, planes, shape->planes);
	MUST(pad->fd);
	leave(CREATES);
	map_pad(pad);
	ledger.len = 0;
	for (int i = 0; i <= ACTORS; i++)
		shared->notes[i].min_kept = UINT32_MAX;
	pads++;
}

/*
 * A dead process has closed its files, but what a ring or a socket's queue held
 * the kernel drops late: look again, so often and no more.
 */
static void check_memory(void)
{
	long long refcnt = -1;
	int err = -1;

	for (int i = 0; i < 100000; i++) {
		refcnt = number_in_file(REFCNT, NULL);
		err = refcnt == refcnt_before ? nothing_accounted() : -1;
		if (!err)
			break;
		step_aside();
	}
	set_limits(limits_before[0], limits_before[1]);
	if (err)
		complain(MEMORY_COMES_BACK, "refcnt is %lld, was %lld; a pad of one page: %d",
			 refcnt, refcnt_before, err);
}

static void end_pad(struct pad *pad)
{
	uint32_t reader = any_running(FIRST_READER, READERS);
	uint32_t steps;

	for (uint32_t i = 0; i < ACTORS; i++)
		if (i != reader && is_running(i))
			kill_some_time(i);
	device_unmap(&pad->view);
	close(pad->fd);
	free(pad->words);
	/* the last to hold the pad; one with a handle sleeps in poll() */
	if (reader != UINT32_MAX) {
		steps = LOAD(shared->notes[reader].steps);
		AWAIT(LOAD(shared->notes[reader].inside) == IN_POLL ||
		      LOAD(shared->notes[reader].steps) - steps > 2);
		kill_actor(reader);
	}
	check_memory();
}

static long long cgroup_bytes(void)
{
	return cgroup_number(cgroup, "memory.current", NULL);
}

static void check_cgroup(void)
{
	if (!charge_falls_below(cgroup, cgroup_before + CGROUP_SLACK_BYTES))
		complain(MEMORY_COMES_BACK, "%lld bytes are charged, %lld were", cgroup_bytes(),
			 cgroup_before);
}

static void torture(void)
{
	struct pad pad;

	while (kills < kills_wanted ||
	       (!every_place_was_met() && kills < kills_wanted + MORE_KILLS)) {
		make_pad(&pad);
		for (uint32_t i = 0; i < READERS; i++)
			if (!i || one_in(2))
				start(&pad, FIRST_READER + i, READER);
		if (one_in(2))
			start(&pad, STRAY, STRAY_ONE);
		for (uint32_t phases = 1 + below(5); phases; phases--)
			run_phase(&pad);
		end_pad(&pad);
		if (pads == 1)
			cgroup_before = cgroup_bytes();
		check_cgroup();
	}
	if (!every_place_was_met())
		complain(EVERY_CALL_MET_A_KILL, "not after %lu kills", kills);
}

static unsigned long total(enum count count)
{
	unsigned long sum = 0;

	for (int i = 0; i <= ACTORS; i++)
		sum += shared->notes[i].counts[count];
	return sum;
}

/* Print the verdict; whoever is left dies with us. */
static void finish(void)
{
	uint32_t failed = LOAD(shared->failed);

	for (uint32_t i = 0; i < ACTORS; i++)
		if (is_running(i))
			kill(children[i].pid, SIGKILL);
	for (int place = 0; place < NR_PLACES; place++)
		ksft_print_msg("%lu killed in: %s\n", kills_in[place], place_names[place]);
	ksft_print_msg("torture: seed %llu: %lu kills, %lu of them in a write that faults; "
		       "%lu pads, %lu appends of %lu rows, %lu rows verified, %lu stages, %lu commits, %lu takeovers, "
		       "%lu truncates, %lu with ZERO, "
		       "%lu times all found zero, %lu pads created, %lu forked, %lu opened, %lu passed, "
		       "%lu mapped, %lu reads, %lu polls; %lld KiB charged, %lld after the first pad\n",
		       (unsigned long long)seed, kills,
		       kills_in[IN_FAULTING_WRITE], pads, total(APPENDS), total(ROWS_APPENDED),
		       total(ROWS_VERIFIED), total(STAGES), total(COMMITS), total(TAKEOVERS),
		       total(TRUNCATES) + total(ZERO_TRUNCATES),
		       total(ZERO_TRUNCATES), total(ZERO_CHECKS), total(CREATES), total(FORKS), total(OPENS),
		       total(PASSES), total(MAPS), total(READS), total(POLLS), cgroup_bytes() >> 10,
		       cgroup_before >> 10);
	for (uint32_t check = 0; check < NR_CHECKS; check++)
		ksft_test_result(check + 1 != failed, "%s\n", check_names[check]);
	exit(failed ? 1 : 0);
}

int main(int argc, char **argv)
{
	kills_wanted = argc > 1 ? strtoul(argv[1], NULL, 10) : DEFAULT_KILLS;
	seed = argc > 2 ? strtoull(argv[2], NULL, 10) : DEFAULT_SEED;
	if (argc > 3 || !kills_wanted) {
		fprintf(stderr, "usage: %s [KILLS [SEED]]\n", argv[0]);
		return 2;
	}
	random_state = seed;
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
		      -1, 0);
	if (shared == MAP_FAILED)
		abort();
	me = &shared->notes[DIRECTOR];
	setvbuf(stdout, NULL, _IOLBF, 0);
	ksft_print_header();
	ksft_set_plan(NR_CHECKS);
	make_cgroup(cgroup, sizeof(cgroup), "torture");
	join_cgroup(cgroup);
	refcnt_before = number_in_file(REFCNT, NULL);
	limits_before[0] = number_in_file(MAX_PER_PAD, NULL);
	limits_before[1] = number_in_file(MAX_TOTAL, NULL);
	torture();
	finish();
}
