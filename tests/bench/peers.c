// SPDX-License-Identifier: GPL-2.0-only
/*
 * The ways to append a row: kvscratch, what one would use instead, and the
 * limit that nothing which copies in a system call can beat.
 */
#include "bench.h"

#include <lmdb.h>
#include <linux/fs.h>
#include <linux/io_uring.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>

static void must_write(ssize_t written, const struct batch *batch)
{
	if (written != (ssize_t)batch->bytes)
		die("a write of %zu bytes returned %zd: %s", batch->bytes, written,
		    strerror(errno));
}

/* The limit: one null system call, and one pass over the bytes */

static char *limit_memory;
static size_t limit_bytes;

static void append_call(const struct batch *batch)
{
	(void)batch;
	syscall(SYS_getppid);
}

static const char *setup_copy(const struct batch *batch)
{
	limit_bytes = batch->bytes;
	limit_memory = new_memory(limit_bytes);
	return NULL;
}

static void append_copy(const struct batch *batch)
{
	copy_bytes(limit_memory, batch->source, batch->bytes);
}

static void teardown_copy(void)
{
	munmap(limit_memory, limit_bytes);
}

const struct peer limit_call = { .name = "null system call", .append = append_call };

const struct peer limit_copy = {
	.name = "rep movsq",
	.setup = setup_copy,
	.append = append_copy,
	.teardown = teardown_copy,
};

/* kvscratch */

static int pad = -1;

static const char *setup_pad(const struct batch *batch)
{
	pad = new_pad(CAPACITY_ROWS, batch->row_bytes);
	return pad < 0 ? kvscratch_strerror(pad) : NULL;
}

static void append_pad(const struct batch *batch)
{
	must_write(write(pad, batch->source, batch->bytes), batch);
}

static void reset_pad(void)
{
	CHECK(!device_truncate(pad, 0, 0));
}

static void teardown_pad(void)
{
	CHECK(!close(pad));
}

/* A segment per row */
static struct iovec segments[CAPACITY_ROWS];

static const char *setup_segments(const struct batch *batch)
{
	for (unsigned int i = 0; i < batch->rows; i++) {
		segments[i].iov_base = (char *)batch->source + i * batch->row_bytes;
		segments[i].iov_len = batch->row_bytes;
	}
	return setup_pad(batch);
}

static void append_segments(const struct batch *batch)
{
	must_write(writev(pad, segments, batch->rows), batch);
}

/* io_uring: one request, submitted and waited for with one system call */

static struct {
	int fd;
	char *rings;
	struct io_uring_sqe *entries;
	size_t rings_bytes;
	size_t entries_bytes;
	struct io_uring_params params;
} ring;

static void *map_ring(size_t bytes, off_t offset)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring.fd,
			offset);

	CHECK(at != MAP_FAILED);
	return at;
}

static const char *setup_ring(const struct batch *batch)
{
	const char *reason;

	ring.params = (struct io_uring_params){ 0 };
	ring.fd = syscall(SYS_io_uring_setup, 4, &ring.params);
	if (ring.fd < 0)
		return "no io_uring";
	CHECK(ring.params.features & IORING_FEAT_SINGLE_MMAP);
	reason = setup_pad(batch);
	if (reason) {
		close(ring.fd);
		return reason;
	}
	ring.rings_bytes = ring.params.cq_off.cqes +
			   ring.params.cq_entries * sizeof(struct io_uring_cqe);
	ring.entries_bytes = ring.params.sq_entries * sizeof(struct io_uring_sqe);
	ring.rings = map_ring(ring.rings_bytes, IORING_OFF_SQ_RING);
	ring.entries = map_ring(ring.entries_bytes, IORING_OFF_SQES);
	return NULL;
}

static uint32_t *ring_word(uint32_t offset)
{
	return (uint32_t *)(ring.rings + offset);
}

static void append_ring(const struct batch *batch)
{
	uint32_t *tail = ring_word(ring.params.sq_off.tail);
	uint32_t *head = ring_word(ring.params.cq_off.head);
	const struct io_uring_cqe *done = (struct io_uring_cqe *)(ring.rings +
								  ring.params.cq_off.cqes);
	uint32_t slot = *tail & (ring.params.sq_entries - 1);

	ring.entries[slot] = (struct io_uring_sqe){
		.opcode = IORING_OP_WRITE,
		.fd = pad,
		.addr = (uintptr_t)batch->source,
		.len = batch->bytes,
	};
	ring_word(ring.params.sq_off.array)[slot] = slot;
	__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
	CHECK(syscall(SYS_io_uring_enter, ring.fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) == 1);
	CHECK(__atomic_load_n(ring_word(ring.params.cq_off.tail), __ATOMIC_ACQUIRE) == *head + 1);
	must_write(done[*head & (ring.params.cq_entries - 1)].res, batch);
	__atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
}

static void teardown_ring(void)
{
	munmap(ring.rings, ring.rings_bytes);
	munmap(ring.entries, ring.entries_bytes);
	close(ring.fd);
	teardown_pad();
}

/* memfd whose pages are all there: what is left is to copy into them */

static int memory_file = -1;
static off_t file_end;

/* What is left of a closed ring interrupts it. */
static void allocate_file(int fd, size_t bytes)
{
	while (fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, bytes))
		CHECK(errno == EINTR);
}

static int new_memory_file(size_t bytes)
{
	int fd = memfd_create("bench", MFD_CLOEXEC);

	CHECK(fd >= 0);
	allocate_file(fd, bytes);
	return fd;
}

static void append_warm(const struct batch *batch)
{
	must_write(pwrite(memory_file, batch->source, batch->bytes, file_end), batch);
	file_end += batch->bytes;
}

static void reset_warm(void)
{
	file_end = 0;
}

/* The second write to a page moves it to the list of active ones, which takes long. */
#define WARM_PASSES 4

static const char *setup_warm(const struct batch *batch)
{
	memory_file = new_memory_file(CAPACITY_ROWS * batch->row_bytes);
	for (unsigned int i = 0; i < WARM_PASSES * CAPACITY_ROWS / batch->rows; i++) {
		if (i % (CAPACITY_ROWS / batch->rows) == 0)
			reset_warm();
		append_warm(batch);
	}
	reset_warm();
	return NULL;
}

static void teardown_memory_file(void)
{
	CHECK(!close(memory_file));
}

/*
 * The best that a stock kernel offers: allocated beforehand, append-only, and
 * the producer has no more than a descriptor to append with.
 */
static int producer = -1;
static size_t producer_room;

static void set_append_only(bool on)
{
	int flags = on ? FS_APPEND_FL : 0;

	CHECK(!ioctl(memory_file, FS_IOC_SETFLAGS, &flags));
}

static const char *setup_append_only(const struct batch *batch)
{
	int flags = FS_APPEND_FL;
	char path[64];

	producer_room = CAPACITY_ROWS * batch->row_bytes;
	memory_file = new_memory_file(producer_room);
	if (ioctl(memory_file, FS_IOC_SETFLAGS, &flags)) {
		close(memory_file);
		return "needs CAP_LINUX_IMMUTABLE and a tmpfs with file flags";
	}
	snprintf(path, sizeof(path), "/proc/self/fd/%d", memory_file);
	producer = open(path, O_WRONLY | O_APPEND | O_CLOEXEC);
	CHECK(producer >= 0);
	return NULL;
}

static void append_to_producer(const struct batch *batch)
{
	must_write(write(producer, batch->source, batch->bytes), batch);
}

static void reset_append_only(void)
{
	set_append_only(false);
	CHECK(!ftruncate(memory_file, 0));
	allocate_file(memory_file, producer_room);
	set_append_only(true);
}

static void teardown_append_only(void)
{
	close(producer);
	teardown_memory_file();
}

/* A pipe and a socket pair: the reader's copy, which they need as well, is left out. */

static int queue_in = -1, queue_out = -1;
static size_t queued;
static char *drain_memory;

static const char *setup_pipe(const struct batch *batch)
{
	int ends[2];

	CHECK(!pipe2(ends, O_CLOEXEC | O_NONBLOCK));
	queue_out = ends[0];
	queue_in = ends[1];
	if (fcntl(queue_in, F_SETPIPE_SZ, batch->bytes) < 0) {
		close(queue_in);
		close(queue_out);
		return "the batch does not fit the pipe that this user may have";
	}
	drain_memory = new_memory(batch->bytes);
	queued = batch->bytes;
	return NULL;
}

static const char *setup_socketpair(const struct batch *batch)
{
	/* with what the kernel adds to each piece */
	int wanted = 2 * batch->bytes + 65536, got;
	socklen_t size = sizeof(got);
	int ends[2];

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends));
	queue_out = ends[0];
	queue_in = ends[1];
	if (setsockopt(queue_in, SOL_SOCKET, SO_SNDBUFFORCE, &wanted, sizeof(wanted)))
		setsockopt(queue_in, SOL_SOCKET, SO_SNDBUF, &wanted, sizeof(wanted));
	CHECK(!getsockopt(queue_in, SOL_SOCKET, SO_SNDBUF, &got, &size));
	if (got < wanted) {
		close(queue_in);
		close(queue_out);
		return "the batch does not fit the buffer that this user may have";
	}
	drain_memory = new_memory(batch->bytes);
	queued = batch->bytes;
	return NULL;
}

static void append_to_queue(const struct batch *batch)
{
	must_write(write(queue_in, batch->source, batch->bytes), batch);
}

static void drain_queue(void)
{
	for (size_t done = 0; done < queued;) {
		ssize_t got = read(queue_out, drain_memory, queued - done);

		CHECK(got > 0);
		done += got;
	}
}

static void teardown_queue(void)
{
	munmap(drain_memory, queued);
	close(queue_in);
	close(queue_out);
}

/* Shared memory that the producer maps writable, and a length beside it */

static struct {
	char *rows;
	size_t bytes;
	uint64_t len;
} mapped;

static const char *setup_mapped(const struct batch *batch)
{
	mapped.bytes = CAPACITY_ROWS * batch->row_bytes;
	memory_file = new_memory_file(mapped.bytes);
	CHECK(!ftruncate(memory_file, mapped.bytes));
	mapped.rows = mmap(NULL, mapped.bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
			   memory_file, 0);
	CHECK(mapped.rows != MAP_FAILED);
	mapped.len = 0;
	return NULL;
}

static void append_mapped(const struct batch *batch)
{
	copy_bytes(mapped.rows + mapped.len * batch->row_bytes, batch->source, batch->bytes);
	__atomic_store_n(&mapped.len, mapped.len + batch->rows, __ATOMIC_RELEASE);
}

static void reset_mapped(void)
{
	mapped.len = 0;
}

static void teardown_mapped(void)
{
	munmap(mapped.rows, mapped.bytes);
	teardown_memory_file();
}

/* The same with a system call that does nothing: what any append by write() costs at least */

static int null_device = -1;

static const char *setup_null(const struct batch *batch)
{
	null_device = open("/dev/null", O_WRONLY | O_CLOEXEC);
	CHECK(null_device >= 0);
	return setup_mapped(batch);
}

static void append_null(const struct batch *batch)
{
	must_write(write(null_device, batch->source, batch->bytes), batch);
	append_mapped(batch);
}

static void teardown_null(void)
{
	close(null_device);
	teardown_mapped();
}

/* LMDB on tmpfs: a transaction per batch, a record per row, nothing is synced. */

static struct {
	MDB_env *env;
	MDB_dbi dbi;
	uint32_t next;
	char path[64];
	char lock[64];
} lmdb;

static void lmdb_check(int err)
{
	if (err)
		die("LMDB: %s", mdb_strerror(err));
}

static const char *setup_lmdb(const struct batch *batch)
{
	MDB_txn *txn;

	snprintf(lmdb.path, sizeof(lmdb.path), "/dev/shm/kvscratch-bench-%d", getpid());
	snprintf(lmdb.lock, sizeof(lmdb.lock), "/dev/shm/kvscratch-bench-%d-lock", getpid());
	lmdb_check(mdb_env_create(&lmdb.env));
	lmdb_check(mdb_env_set_mapsize(lmdb.env, 4 * CAPACITY_ROWS * batch->row_bytes + 4 * MIB));
	lmdb_check(mdb_env_open(lmdb.env, lmdb.path, MDB_NOSUBDIR | MDB_NOSYNC, 0600));
	lmdb_check(mdb_txn_begin(lmdb.env, NULL, 0, &txn));
	lmdb_check(mdb_dbi_open(txn, NULL, MDB_INTEGERKEY, &lmdb.dbi));
	lmdb_check(mdb_txn_commit(txn));
	lmdb.next = 0;
	return NULL;
}

static void append_lmdb(const struct batch *batch)
{
	MDB_txn *txn;

	lmdb_check(mdb_txn_begin(lmdb.env, NULL, 0, &txn));
	for (unsigned int i = 0; i < batch->rows; i++) {
		MDB_val key = { .mv_size = sizeof(lmdb.next), .mv_data = &lmdb.next };
		MDB_val row = {
			.mv_size = batch->row_bytes,
			.mv_data = (char *)batch->source + i * batch->row_bytes,
		};

		lmdb_check(mdb_put(txn, lmdb.dbi, &key, &row, MDB_APPEND));
		lmdb.next++;
	}
	lmdb_check(mdb_txn_commit(txn));
}

static void reset_lmdb(void)
{
	MDB_txn *txn;

	lmdb_check(mdb_txn_begin(lmdb.env, NULL, 0, &txn));
	lmdb_check(mdb_drop(txn, lmdb.dbi, 0));
	lmdb_check(mdb_txn_commit(txn));
	lmdb.next = 0;
}

static void teardown_lmdb(void)
{
	mdb_env_close(lmdb.env);
	CHECK(!unlink(lmdb.path));
	CHECK(!unlink(lmdb.lock));
}

/*
 * The algorithm of the Scratchpad of the Rust crate cjc_runtime: each f64 is
 * stored by a call that checks bounds and, as storage is shared copy-on-write,
 * that nobody else holds it; whoever does costs a copy of all of it. A batch
 * goes through a temporary vector.
 */
struct storage {
	size_t holders;
	size_t count;
	double elements[];
};

static struct {
	struct storage *storage;
	struct storage *view;
	size_t len;
} model;

static struct storage *new_storage(size_t count)
{
	size_t bytes = sizeof(struct storage) + count * sizeof(double);
	struct storage *storage = malloc(bytes);

	CHECK(storage);
	/* its pages are there from now on, as those of a pad */
	for (size_t i = 0; i < count; i++)
		((volatile double *)storage->elements)[i] = 0;
	storage->holders = 1;
	storage->count = count;
	return storage;
}

static void drop_storage(struct storage *storage)
{
	if (storage && !--storage->holders)
		free(storage);
}

static void make_unique(void)
{
	struct storage *shared = model.storage;

	model.storage = malloc(sizeof(*shared) + shared->count * sizeof(double));
	CHECK(model.storage);
	copy_bytes(model.storage, shared, sizeof(*shared) + shared->count * sizeof(double));
	model.storage->holders = 1;
	drop_storage(shared);
}

static inline void set_element(size_t at, double value)
{
	if (at >= model.storage->count)
		die("element %zu is out of bounds", at);
	/* read each time: the compiler knows no more of it than Rust's does */
	if (*(volatile size_t *)&model.storage->holders > 1)
		make_unique();
	model.storage->elements[at] = value;
}

static void append_elements(const double *elements, size_t count)
{
	for (size_t i = 0; i < count; i++)
		set_element(model.len + i, elements[i]);
	model.len += count;
}

static const char *setup_model(const struct batch *batch)
{
	model.storage = new_storage(CAPACITY_ROWS * batch->row_bytes / sizeof(double));
	model.view = NULL;
	model.len = 0;
	return NULL;
}

static void append_model(const struct batch *batch)
{
	size_t count = batch->bytes / sizeof(double);
	double *vector;

	if (batch->rows == 1) {
		append_elements((const double *)batch->source, count);
		return;
	}
	vector = malloc(batch->bytes);
	CHECK(vector);
	copy_bytes(vector, batch->source, batch->bytes);
	append_elements(vector, count);
	free(vector);
}

static void reset_model(void)
{
	model.len = 0;
}

static void teardown_model(void)
{
	drop_storage(model.view);
	drop_storage(model.storage);
}

/* A reader takes a view after each append. */
static void take_view(void)
{
	drop_storage(model.view);
	model.view = model.storage;
	model.view->holders++;
}

static const char *setup_viewed_model(const struct batch *batch)
{
	setup_model(batch);
	take_view();
	return NULL;
}

static void reset_viewed_model(void)
{
	model.len = 0;
	take_view();
}

const struct peer append_peers[] = {
	{ .name = "kvscratch write", .needs_module = true, .setup = setup_pad,
	  .append = append_pad, .reset = reset_pad, .teardown = teardown_pad },
	{ .name = "kvscratch writev", .needs_module = true, .setup = setup_segments,
	  .append = append_segments, .reset = reset_pad, .teardown = teardown_pad },
	{ .name = "kvscratch io_uring", .needs_module = true, .setup = setup_ring,
	  .append = append_ring, .reset = reset_pad, .teardown = teardown_ring },
	{ .name = "memfd, warm", .setup = setup_warm,
	  .append = append_warm, .reset = reset_warm, .teardown = teardown_memory_file },
	{ .name = "memfd, append-only", .setup = setup_append_only,
	  .append = append_to_producer, .reset = reset_append_only,
	  .teardown = teardown_append_only },
	{ .name = "pipe", .is_queue = true, .setup = setup_pipe,
	  .append = append_to_queue, .reset = drain_queue, .teardown = teardown_queue },
	{ .name = "socketpair", .is_queue = true, .setup = setup_socketpair,
	  .append = append_to_queue, .reset = drain_queue, .teardown = teardown_queue },
	{ .name = "mapped memcpy", .setup = setup_mapped,
	  .append = append_mapped, .reset = reset_mapped, .teardown = teardown_mapped },
	{ .name = "/dev/null + memcpy", .setup = setup_null,
	  .append = append_null, .reset = reset_mapped, .teardown = teardown_null },
	{ .name = "LMDB", .setup = setup_lmdb,
	  .append = append_lmdb, .reset = reset_lmdb, .teardown = teardown_lmdb },
	{ .name = "Scratchpad", .setup = setup_model,
	  .append = append_model, .reset = reset_model, .teardown = teardown_model },
	{ .name = "Scratchpad, viewed", .is_queue = true, .copies_all = true,
	  .setup = setup_viewed_model, .append = append_model, .reset = reset_viewed_model,
	  .teardown = teardown_model },
};

const unsigned int nr_append_peers = ARRAY_SIZE(append_peers);

/* The way of an append, step by step: each does what the one before it does, and more. */

static const char *setup_null_only(const struct batch *batch)
{
	(void)batch;
	null_device = open("/dev/null", O_WRONLY | O_CLOEXEC);
	CHECK(null_device >= 0);
	return NULL;
}

static void write_null(const struct batch *batch)
{
	must_write(write(null_device, batch->source, batch->bytes), batch);
}

static void teardown_null_only(void)
{
	close(null_device);
}

static void append_no_rows(const struct batch *batch)
{
	CHECK(!write(pad, batch->source, 0));
}

static const char *setup_full_pad(const struct batch *batch)
{
	const char *reason = setup_pad(batch);

	for (unsigned int i = 0; !reason && i < CAPACITY_ROWS; i++)
		append_pad(batch);
	return reason;
}

static void append_refused(const struct batch *batch)
{
	CHECK(write(pad, batch->source, batch->bytes) < 0 && errno == ENOSPC);
}

const struct peer path_peers[] = {
	{ .name = "null system call", .append = append_call },
	{ .name = "write to /dev/null", .setup = setup_null_only,
	  .append = write_null, .teardown = teardown_null_only },
	{ .name = "append of no rows", .needs_module = true, .setup = setup_pad,
	  .append = append_no_rows, .teardown = teardown_pad },
	{ .name = "append to a full pad", .needs_module = true, .setup = setup_full_pad,
	  .append = append_refused, .teardown = teardown_pad },
	{ .name = "append of 1 byte", .needs_module = true, .setup = setup_pad,
	  .append = append_pad, .reset = reset_pad, .teardown = teardown_pad },
	{ .name = "append of a page", .needs_module = true, .setup = setup_pad,
	  .append = append_pad, .reset = reset_pad, .teardown = teardown_pad },
};

const unsigned int nr_path_peers = ARRAY_SIZE(path_peers);
