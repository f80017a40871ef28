// SPDX-License-Identifier: GPL-2.0-only
/*
 * Two threads of one open file, the pad's writer, at random: whatever they do at once, there
 * is an order of their calls in which one thread alone gets the same answers and leaves the
 * same pad. Who ended before another began comes first.
 *
 * Sources that have to be waited for keep a call in its middle until the other thread is
 * finished or waits, for a turn above all.
 */
#include "common.h"

#include <pthread.h>

#define ROWS 12
#define PLANES 2
#define THREADS 2
/* of each thread in a round */
#define CALLS 4
#define ROUNDS 1500
#define MOST_ROWS 3

/* A row of the second is copied page by page. */
static const uint32_t row_bytes[PLANES] = { 64, 9000 };
#define TOKEN_BYTES (64 + 9000)
#define SOURCE_PAGES 8

/* What is in a row besides the byte that a call fills it with */
#define NOTHING 0
#define ANYTHING 0xff

enum what { STAGE, KEEP, COMMIT, TRUNCATE, APPEND, NR_WHATS };

/**
 * struct call - what is called, and what came of it
 * @row: to begin with, or the len
 * @byte: all of its source
 * @scrubs: TRUNCATE with ZERO
 * @hole: the last byte of its source is not there
 * @slow: its source has to be waited for
 * @begun, @ended: in the order of all calls
 */
struct call {
	enum what what;
	uint32_t plane, row, rows;
	uint8_t byte;
	bool scrubs, hole, slow;
	unsigned int begun, ended;
	int err;
};

struct model {
	uint32_t len;
	uint64_t generation;
	uint32_t staged[PLANES], whole[PLANES];
	uint8_t rows[PLANES][ROWS];
};

struct worker {
	pthread_t thread;
	pid_t tid;
	uint8_t *source;
	/* what the source is to be */
	uint8_t byte;
	struct call calls[CALLS];
};

FIXTURE(history) {
	int pad;
	int writer;
	int faults;
	const uint8_t *map;
	struct kvscratch_pad_info info;
	struct kvscratch_plane planes[PLANES];
	struct worker workers[THREADS];
	/* before they begin */
	struct worker first;
	pthread_barrier_t start;
	unsigned int finished;
	unsigned int clock;
	bool stop;
	bool nonblock;
};

static unsigned int random_state = 1;

static uint32_t below(uint32_t end)
{
	return rand_r(&random_state) % end;
}

static size_t source_bytes(const struct call *call)
{
	return (size_t)call->rows * (call->what == APPEND ? TOKEN_BYTES : row_bytes[call->plane]);
}

static struct call random_call(uint8_t byte)
{
	struct call call = {
		.what = below(3) ? below(NR_WHATS) : STAGE,
		.plane = below(PLANES),
		.row = below(6),
		.rows = 1 + below(MOST_ROWS),
		.byte = byte,
		.scrubs = below(2),
		.hole = !below(6),
		.slow = below(2),
	};

	/* most calls are to do something */
	if (call.what == TRUNCATE || call.what == APPEND)
		call.row = below(3);
	return call;
}

/* The model */

static void drop_staged(struct model *model)
{
	for (int i = 0; i < PLANES; i++)
		model->staged[i] = model->len;
}

static void fill_rows(struct model *model, int plane, uint32_t row, uint32_t rows, uint8_t byte)
{
	for (uint32_t i = row; i < row + rows; i++)
		model->rows[plane][i] = byte;
}

static uint32_t larger(uint32_t a, uint32_t b)
{
	return a > b ? a : b;
}

static uint32_t smaller(uint32_t a, uint32_t b)
{
	return a < b ? a : b;
}

static int model_stage(struct model *model, const struct call *call)
{
	const uint32_t end = call->row + call->rows;
	uint32_t *staged = &model->staged[call->plane], *whole = &model->whole[call->plane];

	if (call->row < model->len || call->row > *staged)
		return -EINVAL;
	if (call->what == KEEP) {
		if (end > *whole)
			return -EINVAL;
		*staged = larger(*staged, end);
		return 0;
	}
	if (end > ROWS)
		return -ENOSPC;
	fill_rows(model, call->plane, call->row, call->rows, call->hole ? ANYTHING : call->byte);
	*staged = call->hole ? call->row : larger(*staged, end);
	*whole = call->hole ? call->row : larger(*whole, end);
	return call->hole ? -EFAULT : 0;
}

static int model_commit(struct model *model, const struct call *call)
{
	if (call->row < model->len)
		return -EINVAL;
	for (int i = 0; i < PLANES; i++)
		if (call->row > model->staged[i])
			return -EINVAL;
	model->len = call->row;
	drop_staged(model);
	return 0;
}

static int model_truncate(struct model *model, const struct call *call)
{
	if (call->row > model->len)
		return -EINVAL;
	model->generation++;
	model->len = call->row;
	drop_staged(model);
	for (int i = 0; call->scrubs && i < PLANES; i++) {
		model->whole[i] = smaller(model->whole[i], model->len);
		fill_rows(model, i, model->len, ROWS - model->len, NOTHING);
	}
	return 0;
}

static int model_append(struct model *model, const struct call *call)
{
	const uint32_t len = model->len;

	if (call->rows > ROWS - len)
		return -ENOSPC;
	if (!call->hole)
		model->len += call->rows;
	drop_staged(model);
	for (int i = 0; i < PLANES; i++) {
		fill_rows(model, i, len, call->rows, call->hole ? ANYTHING : call->byte);
		model->whole[i] = call->hole ? smaller(model->whole[i], len) : model->len;
	}
	return call->hole ? -EFAULT : 0;
}

static int model_call(struct model *model, const struct call *call)
{
	switch (call->what) {
	case STAGE:
	case KEEP:
		return model_stage(model, call);
	case COMMIT:
		return model_commit(model, call);
	case TRUNCATE:
		return model_truncate(model, call);
	default:
		return model_append(model, call);
	}
}

/* The pad */

static unsigned int tick(FIXTURE_DATA(history) *self)
{
	return __atomic_fetch_add(&self->clock, 1, __ATOMIC_SEQ_CST);
}

/* Behind the pages of a source there is nothing. */
static const uint8_t *prepare_source(struct worker *worker, const struct call *call)
{
	const size_t room = SOURCE_PAGES * page_bytes();

	__atomic_store_n(&worker->byte, call->byte, __ATOMIC_SEQ_CST);
	if (!call->slow)
		memset(worker->source, call->byte, room);
	else if (madvise(worker->source, room, MADV_DONTNEED))
		abort();
	return worker->source + room + call->hole - source_bytes(call);
}

static void do_call(FIXTURE_DATA(history) *self, struct worker *worker, struct call *call)
{
	const uint8_t *source = prepare_source(worker, call);

	call->begun = tick(self);
	switch (call->what) {
	case STAGE:
		call->err = device_stage(self->writer, call->plane, call->row, source, call->rows);
		break;
	case KEEP:
		call->err = device_keep(self->writer, call->plane, call->row, call->rows);
		break;
	case COMMIT:
		call->err = device_commit(self->writer, call->row);
		break;
	case TRUNCATE:
		call->err = device_truncate(self->writer, call->row,
					    call->scrubs ? KVSCRATCH_TRUNCATE_ZERO : 0);
		break;
	default:
		call->err = device_append(self->writer, source, source_bytes(call));
	}
	call->ended = tick(self);
}

struct work {
	FIXTURE_DATA(history) *self;
	struct worker *worker;
};

static void *work(void *arg)
{
	FIXTURE_DATA(history) *self = ((struct work *)arg)->self;
	struct worker *worker = ((struct work *)arg)->worker;

	worker->tid = syscall(SYS_gettid);
	for (;;) {
		pthread_barrier_wait(&self->start);
		if (self->stop)
			return NULL;
		for (int i = 0; i < CALLS; i++)
			do_call(self, worker, &worker->calls[i]);
		__atomic_add_fetch(&self->finished, 1, __ATOMIC_SEQ_CST);
	}
}

/* Let a page of a source come, if somebody waits for one: what it is to be filled with. */
static void serve(FIXTURE_DATA(history) *self, struct worker *worker, uint64_t at)
{
	static uint8_t page[1 << 16];
	struct uffdio_copy copy = {
		.dst = at & ~(uint64_t)(page_bytes() - 1),
		.src = (uintptr_t)page,
		.len = page_bytes(),
	};

	memset(page, __atomic_load_n(&worker->byte, __ATOMIC_SEQ_CST), page_bytes());
	if (ioctl(self->faults, UFFDIO_COPY, &copy) && errno != EEXIST)
		abort();
}

/* Until both threads have made their calls; @wait: mostly for what the other one can do */
static void serve_calls(FIXTURE_DATA(history) *self, bool wait)
{
	while (__atomic_load_n(&self->finished, __ATOMIC_SEQ_CST) < THREADS) {
		struct uffd_msg msg;

		if (read(self->faults, &msg, sizeof(msg)) != sizeof(msg)) {
			sched_yield();
			continue;
		}
		for (int i = 0; i < THREADS; i++) {
			struct worker *worker = &self->workers[i];
			uint64_t at = msg.arg.pagefault.address - (uintptr_t)worker->source;

			if (at >= SOURCE_PAGES * page_bytes())
				continue;
			if (wait && below(4))
				await_sleep(self->workers[!i].tid);
			serve(self, worker, msg.arg.pagefault.address);
		}
	}
}

/* What the pad tells of itself; KEEP of nothing tells what is staged, and changes nothing. */
static bool pad_is(FIXTURE_DATA(history) *self, const struct model *model)
{
	struct kvscratch_pad_info info;

	if (device_pad_info(self->pad, &info) || info.len != model->len ||
	    info.generation != model->generation)
		return false;
	for (int plane = 0; plane < PLANES; plane++) {
		const uint8_t *at = self->map + self->planes[plane].offset;

		for (uint32_t row = 0; row < ROWS; row++, at += row_bytes[plane]) {
			if (model->rows[plane][row] == ANYTHING)
				continue;
			for (uint32_t i = 0; i < row_bytes[plane]; i++)
				if (at[i] != model->rows[plane][row])
					return false;
		}
	}
	return true;
}

/* The cursors of the planes, which are found by trying */
static void find_cursors(FIXTURE_DATA(history) *self, struct model *model)
{
	model->len = len_of(self->pad);
	for (int plane = 0; plane < PLANES; plane++) {
		uint32_t end = model->len;

		while (end < ROWS && !device_keep(self->writer, plane, end + 1, 0))
			end++;
		model->staged[plane] = end;
		for (end = ROWS; end > model->len; end--)
			if (!device_keep(self->writer, plane, model->len, end - model->len))
				break;
		model->whole[plane] = end;
	}
}

static bool overlap(const struct call *a, const struct call *b)
{
	return a->begun < b->ended && b->begun < a->ended;
}

/* EAGAIN needs O_NONBLOCK, and another call that has to drop the lock in its middle. */
static bool may_be_again(const FIXTURE_DATA(history) *self, const struct call *call,
			 const struct worker *other)
{
	for (int i = 0; self->nonblock && i < CALLS; i++)
		if (overlap(call, &other->calls[i]) &&
		    (other->calls[i].slow || other->calls[i].hole))
			return true;
	return false;
}

/* Whether the calls from @next on can follow @model, in any order that they may have had */
static bool has_order(FIXTURE_DATA(history) *self, const struct model *model, const int *next,
		      const struct model *cursors)
{
	if (next[0] == CALLS && next[1] == CALLS)
		return !memcmp(model->staged, cursors->staged, sizeof(model->staged)) &&
		       !memcmp(model->whole, cursors->whole, sizeof(model->whole)) &&
		       pad_is(self, model);
	for (int i = 0; i < THREADS; i++) {
		const struct worker *other = &self->workers[!i];
		const struct call *call = &self->workers[i].calls[next[i]];
		const int then[THREADS] = { next[0] + !i, next[1] + i };
		struct model after = *model;

		if (next[i] == CALLS ||
		    (next[!i] < CALLS && other->calls[next[!i]].ended < call->begun))
			continue;
		if (call->err == -EAGAIN ? !may_be_again(self, call, other) :
					   model_call(&after, call) != call->err)
			continue;
		if (has_order(self, &after, then, cursors))
			return true;
	}
	return false;
}

static void tell_calls(const FIXTURE_DATA(history) *self)
{
	static const char *const names[] = { "stage", "keep", "commit", "truncate", "append" };

	for (int i = 0; i < THREADS; i++) {
		for (int j = 0; j < CALLS; j++) {
			const struct call *call = &self->workers[i].calls[j];

			fprintf(stderr, "# thread %d, %u to %u: %s plane %u row %u rows %u byte %u"
				"%s%s%s: %d\n", i, call->begun, call->ended, names[call->what],
				call->plane, call->row, call->rows, call->byte,
				call->scrubs ? " zero" : "", call->hole ? " hole" : "",
				call->slow ? " slow" : "", call->err);
		}
	}
}

/* Pages, and one behind them that is not there */
static uint8_t *new_source(void)
{
	const size_t bytes = SOURCE_PAGES * page_bytes();
	uint8_t *source = mmap(NULL, bytes + page_bytes(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS,
			       -1, 0);

	if (source == MAP_FAILED || mprotect(source, bytes, PROT_READ | PROT_WRITE))
		abort();
	return source;
}

FIXTURE_SETUP(history) {
	struct kvscratch_plane planes[PLANES] = { 0 };

	for (int i = 0; i < PLANES; i++) {
		planes[i].dim = row_bytes[i];
		planes[i].dtype = KVSCRATCH_DTYPE_U8;
	}
	self->pad = device_create_planes(ROWS, planes, PLANES);
	ASSERT_LE(0, self->pad);
	self->writer = device_open_writer(self->pad, 0);
	ASSERT_LE(0, self->writer);
	ASSERT_EQ(0, device_pad_info(self->pad, &self->info));
	ASSERT_EQ(PLANES, device_planes(self->pad, 0, self->planes, PLANES));
	self->map = mmap(NULL, self->info.mapping_bytes, PROT_READ, MAP_SHARED, self->pad, 0);
	ASSERT_NE(MAP_FAILED, (void *)self->map);
	self->faults = -1;
	self->first.source = new_source();
	for (int i = 0; i < THREADS; i++)
		self->workers[i].source = new_source();
	pthread_barrier_init(&self->start, NULL, THREADS + 1);
}

FIXTURE_TEARDOWN(history) {
	munmap((void *)self->map, self->info.mapping_bytes);
	close(self->faults);
	close(self->writer);
	close(self->pad);
}

/* Both sources, whose pages the test itself gives */
static bool watch_sources(FIXTURE_DATA(history) *self)
{
	struct uffdio_api api = { .api = UFFD_API };

	self->faults = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (self->faults < 0)
		return false;
	if (ioctl(self->faults, UFFDIO_API, &api))
		abort();
	for (int i = 0; i < THREADS; i++) {
		struct uffdio_register range = {
			.range = {
				.start = (uintptr_t)self->workers[i].source,
				.len = SOURCE_PAGES * page_bytes(),
			},
			.mode = UFFDIO_REGISTER_MODE_MISSING,
		};

		if (ioctl(self->faults, UFFDIO_REGISTER, &range))
			abort();
	}
	return true;
}

/* The pad is empty, but for what one thread does to it first. */
static bool begin_round(FIXTURE_DATA(history) *self, struct model *model)
{
	static const struct call empty = { .what = TRUNCATE, .scrubs = true };
	struct call calls[4] = { empty };

	for (int i = 0; i < 4; i++) {
		if (i)
			calls[i] = random_call(1 + i);
		calls[i].slow = false;
		do_call(self, &self->first, &calls[i]);
		if (model_call(model, &calls[i]) != calls[i].err)
			return false;
	}
	return true;
}

static unsigned int count_overlaps(const FIXTURE_DATA(history) *self)
{
	unsigned int count = 0;

	for (int i = 0; i < CALLS; i++)
		for (int j = 0; j < CALLS; j++)
			count += overlap(&self->workers[0].calls[i], &self->workers[1].calls[j]);
	return count;
}

/* Some calls of the two threads, and what came of them */
static void run_round(struct __test_metadata *_metadata, FIXTURE_DATA(history) *self,
		      struct model *model, bool wait)
{
	const int first[THREADS] = { 0, 0 };
	struct model cursors;

	ASSERT_TRUE(begin_round(self, model));
	for (int i = 0; i < THREADS; i++)
		for (int j = 0; j < CALLS; j++)
			self->workers[i].calls[j] = random_call(10 + 10 * i + j);
	ASSERT_EQ(0, fcntl(self->writer, F_SETFL, self->nonblock ? O_NONBLOCK : 0));
	self->finished = 0;
	pthread_barrier_wait(&self->start);
	serve_calls(self, wait);
	ASSERT_EQ(0, fcntl(self->writer, F_SETFL, 0));
	cursors = *model;
	find_cursors(self, &cursors);
	ASSERT_TRUE(has_order(self, model, first, &cursors)) {
		tell_calls(self);
	}
	model->generation = generation_of(self->pad);
	model->len = cursors.len;
}

/* On one CPU, with @wait, whoever waits lets the other one on; on several they do meet. */
static void run_rounds(struct __test_metadata *_metadata, FIXTURE_DATA(history) *self, bool wait)
{
	unsigned int overlaps = 0, refused = 0;
	struct model model = { 0 };
	struct work works[THREADS];

	if (wait)
		keep_to_cpu(0);
	for (int i = 0; i < THREADS; i++) {
		works[i] = (struct work) { self, &self->workers[i] };
		ASSERT_EQ(0, pthread_create(&self->workers[i].thread, NULL, work, &works[i]));
	}
	for (int round = 0; round < ROUNDS; round++) {
		self->nonblock = round % 3 == 2;
		run_round(_metadata, self, &model, wait);
		overlaps += count_overlaps(self);
		for (int i = 0; i < THREADS; i++)
			for (int j = 0; j < CALLS; j++)
				refused += self->workers[i].calls[j].err == -EAGAIN;
	}
	self->stop = true;
	pthread_barrier_wait(&self->start);
	for (int i = 0; i < THREADS; i++)
		pthread_join(self->workers[i].thread, NULL);
	TH_LOG("%u pairs of calls at once, %u refused", overlaps, refused);
	/* one after the other they would show nothing */
	if (wait) {
		EXPECT_LT(ROUNDS / 4, overlaps);
		EXPECT_LT(0, refused);
	}
}

TEST_F_TIMEOUT(history, calls_have_an_order, TEST_SECONDS)
{
	if (!watch_sources(self))
		SKIP(return, "the kernel has no userfaultfd");
	run_rounds(_metadata, self, true);
}

TEST_F_TIMEOUT(history, calls_have_an_order_on_several_processors, TEST_SECONDS)
{
	if (!watch_sources(self))
		SKIP(return, "the kernel has no userfaultfd");
	run_rounds(_metadata, self, false);
}

TEST_HARNESS_MAIN
