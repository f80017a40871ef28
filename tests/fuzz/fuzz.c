// SPDX-License-Identifier: GPL-2.0-only
/*
 * A fuzzer of /dev/kvscratch that is guided by KCOV. Runs as root inside a guest
 * whose module is built for KCOV, alone with it.
 *
 * usage: fuzz [--seed N] [--trace] --seconds N | --executions N CORPUS
 *
 * A program is a short sequence of calls, one a line: a name and its arguments
 * in hex, which mean something whatever they are. Programs that reach what none
 * before did are kept, cut down to what is needed for that, and written to
 * /out/corpus.txt.
 *
 * Apart from what the kernel itself notices, a model of every pad knows what a
 * program must leave behind. It follows the calls until the program forks; from
 * then on several processes run the rest over the same handles, and only what
 * holds for every interleaving is checked.
 *
 * The same seed gives the same programs, as far as what they reach is the same;
 * that of programs that fork depends on the scheduler.
 */
#include "../../kvscratch_layout.h"
#include "../user/ring.h"

#include <ctype.h>
#include <getopt.h>
#include <limits.h>
#include <linux/kcov.h>
#include <setjmp.h>
#include <stdarg.h>
#include <sys/epoll.h>
#include <sys/sendfile.h>
#include <time.h>

#define ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))

#define OUT "/out/corpus.txt"
#define KCOV "/sys/kernel/debug/kcov"
#define KCOV_ENTRIES (1u << 16)
/* More than the module's text has */
#define MODULE_BYTES (1u << 18)
/* The committed corpus reaches many more; one that only fails reaches fewer. */
#define LEAST_POINTS 400

#define PAGE 4096u
#define ARENA_BYTES (16 * PAGE)
#define IMAGE_BYTES (2 * PAGE)
#define VIEW_STRIDE (1u << 20)
/* What all pads of a program may take; one pad may take it all. */
#define LIMIT_BYTES (32 * PAGE)

#define NR_HANDLES 6
#define NR_VIEWS 3
#define NR_PADS 8
#define NR_PROCESSES 3
#define MAX_ARGS 14
#define MAX_CALLS 20
#define MAX_PROGRAMS 4096
/* Of one process: a fork repeats what follows it */
#define MAX_REPEATED_CALLS 40

/* What the fuzzer itself cannot do without, for all that a program did */
#define NEED(condition) do { \
	if (!(condition)) { \
		printf("# fuzz.c, line %d: %s is false: %s\n", \
		       __LINE__, #condition, strerror(errno)); \
		fflush(stdout); \
		abort(); \
	} \
} while (0)

/* Random numbers: splitmix64 */

static uint64_t random_state;

static uint64_t random_word(void)
{
	uint64_t word = random_state += 0x9e3779b97f4a7c15;

	word = (word ^ word >> 30) * 0xbf58476d1ce4e5b9;
	word = (word ^ word >> 27) * 0x94d049bb133111eb;
	return word ^ word >> 31;
}

static unsigned int below(unsigned int end)
{
	return random_word() % end;
}

static bool one_in(unsigned int n)
{
	return !below(n);
}

/* What went wrong first in a program */

static char complaint[512];

static __attribute__((format(printf, 1, 2))) void broken(const char *format, ...)
{
	va_list args;

	if (complaint[0])
		return;
	va_start(args, format);
	vsnprintf(complaint, sizeof(complaint), format, args);
	va_end(args);
}

/*
 * KCOV: each process of a program has a buffer of its own, which the first one
 * reads at the end. Entry 0 counts the others.
 */

static struct {
	int fd;
	unsigned long *area;
} tracers[NR_PROCESSES];

static unsigned long module_base;
static int nr_children;
static bool is_child;

static void open_tracers(void)
{
	FILE *modules = fopen("/proc/modules", "re");
	char name[64] = "";

	while (modules &&
	       fscanf(modules, "%63s %*u %*u %*s %*s %lx%*[^\n]", name, &module_base) == 2)
		if (!strcmp(name, "kvscratch"))
			break;
	NEED(!strcmp(name, "kvscratch"));
	fclose(modules);

	for (int i = 0; i < NR_PROCESSES; i++) {
		tracers[i].fd = open(KCOV, O_RDWR | O_CLOEXEC);
		NEED(tracers[i].fd >= 0);
		NEED(!ioctl(tracers[i].fd, KCOV_INIT_TRACE, KCOV_ENTRIES));
		tracers[i].area = mmap(NULL, KCOV_ENTRIES * sizeof(unsigned long),
				       PROT_READ | PROT_WRITE, MAP_SHARED, tracers[i].fd, 0);
		NEED(tracers[i].area != MAP_FAILED);
	}
}

static void trace_with(int tracer)
{
	NEED(!ioctl(tracers[tracer].fd, KCOV_ENABLE, KCOV_TRACE_PC));
}

/* What the checks do is not what the program reaches. */
static unsigned long stop_counting(void)
{
	return __atomic_load_n(&tracers[0].area[0], __ATOMIC_RELAXED);
}

static void go_on_counting(unsigned long count)
{
	__atomic_store_n(&tracers[0].area[0], count, __ATOMIC_RELAXED);
}

/* Points, and pairs of successive points, hashed */
struct features {
	uint64_t words[1024];
};

static void add_feature(struct features *features, uint64_t from, uint64_t to)
{
	uint64_t hash = (from * 0x9e3779b97f4a7c15 ^ to) * 0xbf58476d1ce4e5b9 >> 48;

	features->words[hash / 64] |= 1ull << hash % 64;
}

/* By whom a point was reached */
#define REACHED 1
#define REACHED_AT_FIRST 2
#define REACHED_AGAIN 4
static uint8_t points[MODULE_BYTES];

static void collect(struct features *seen, uint8_t by)
{
	memset(seen, 0, sizeof(*seen));
	for (int i = 0; i <= nr_children; i++) {
		const unsigned long *area = tracers[i].area;
		unsigned long before = 0;

		for (unsigned long n = 1; n <= area[0]; n++) {
			unsigned long point = area[n] - module_base;

			if (point >= MODULE_BYTES)
				continue;
			points[point] |= by;
			add_feature(seen, 0, point);
			/* in which order others get somewhere is chance */
			if (!i)
				add_feature(seen, before, point);
			before = point;
		}
	}
}

static unsigned int count_points(uint8_t by, uint8_t not_by)
{
	unsigned int count = 0;

	for (unsigned int i = 0; i < MODULE_BYTES; i++)
		count += (points[i] & by) && !(points[i] & not_by);
	return count;
}

/*
 * The model: what is known of each pad, and which open file each handle is. @shadow
 * holds rows as read() gives them: the committed ones, and those that a writer staged.
 */

/* as many as a request of the fuzzer can describe */
#define MODEL_PLANES 8

struct file;

struct plane {
	struct kvscratch_plane geometry;
	/* where a row of it begins in a token */
	uint32_t at;
	/* ends of what COMMIT may publish, and of what KEEP may stage */
	uint64_t staged, whole;
};

struct pad {
	struct kvscratch_pad_info info;
	struct plane planes[MODEL_PLANES];
	struct file *writer;
	/* rows below it may be shared with a pad that was forked, or is a fork */
	uint64_t floor;
	/* rows are there that the model cannot know */
	bool opaque;
	/* no byte beyond the committed rows may be set */
	bool zero_beyond;
	uint8_t shadow[LIMIT_BYTES];
};

/* An open file of a pad; copies of a handle share it */
struct file {
	unsigned int handles;
	struct pad *pad;
	bool writer;
	uint64_t seen;
};

static struct handle {
	int fd;
	/* NULL for what is no pad: the node, or nothing */
	struct file *file;
} handles[NR_HANDLES];

static struct file files[NR_HANDLES + 1];
static struct pad pads[NR_PADS];
static unsigned int nr_pads;
/* Nobody else has the handles: the model is exact. */
static bool alone;

static struct pad *pad_of(const struct handle *handle)
{
	return handle->file ? handle->file->pad : NULL;
}

static int access_of(int fd)
{
	return fcntl(fd, F_GETFL) & O_ACCMODE;
}

static bool readable(int fd)
{
	int mode = access_of(fd);

	/* there is a fourth one, that may do neither */
	return mode == O_RDONLY || mode == O_RDWR;
}

static bool writable(int fd)
{
	int mode = access_of(fd);

	return mode == O_WRONLY || mode == O_RDWR;
}

static struct file *new_file(struct pad *pad)
{
	for (size_t i = 0; i < ARRAY_LEN(files); i++)
		if (!files[i].handles) {
			files[i] = (struct file) { .handles = 1, .pad = pad };
			return &files[i];
		}
	abort();
}

static uint64_t state_of(const struct pad *pad)
{
	return pad->info.generation << 32 | pad->info.len;
}

static void drop_staged(struct pad *pad)
{
	for (uint32_t i = 0; i < pad->info.nr_planes; i++)
		pad->planes[i].staged = pad->info.len;
}

static void end_role(struct pad *pad)
{
	drop_staged(pad);
	pad->writer = NULL;
	pad->info.flags &= ~KVSCRATCH_PAD_WRITER;
}

static void start_role(struct pad *pad, struct file *file)
{
	drop_staged(pad);
	for (uint32_t i = 0; i < pad->info.nr_planes; i++)
		pad->planes[i].whole = pad->info.len;
	file->writer = true;
	pad->writer = file;
	pad->info.epoch++;
	pad->info.flags |= KVSCRATCH_PAD_WRITER;
}

/* What forbids a handle to change its pad, in the order of the uapi header; 0 when nothing does */
static int forbidden(const struct file *file, bool only_writer)
{
	const struct pad *pad = file->pad;

	if (pad->info.flags & KVSCRATCH_PAD_SEALED)
		return EROFS;
	if (file->writer)
		return pad->writer == file ? 0 : ESTALE;
	if (only_writer)
		return ENOLCK;
	return pad->writer ? EBUSY : 0;
}

static void expect_errno(const char *call, int expected, long result, int error)
{
	int got = result < 0 ? error : 0;

	if (alone && got != expected)
		broken("%s: errno %d instead of %d", call, got, expected);
}

static void check_info(const struct pad *pad, const struct kvscratch_pad_info *now)
{
	if (now->len > now->max_seq_len)
		broken("%llu rows of %llu", now->len, now->max_seq_len);
	if (now->generation < pad->info.generation || now->epoch < pad->info.epoch)
		broken("generation %llu after %llu, epoch %u after %u", now->generation,
		       pad->info.generation, now->epoch, pad->info.epoch);
	if (alone && (now->len != pad->info.len || now->generation != pad->info.generation ||
		      now->trunc_len != pad->info.trunc_len))
		broken("len %llu, generation %llu, trunc_len %llu instead of %llu, %llu, %llu",
		       now->len, now->generation, now->trunc_len, pad->info.len,
		       pad->info.generation, pad->info.trunc_len);
	if (alone && (now->epoch != pad->info.epoch || now->flags != pad->info.flags))
		broken("epoch %u, flags %#x instead of %u, %#x", now->epoch, now->flags,
		       pad->info.epoch, pad->info.flags);
	if (now->id != pad->info.id || now->max_seq_len != pad->info.max_seq_len ||
	    now->nr_planes != pad->info.nr_planes || now->row_bytes != pad->info.row_bytes ||
	    now->status_offset != pad->info.status_offset)
		broken("the geometry has changed");
}

/* After a call that may have changed the pad of a handle */
static void check_handle(const struct handle *handle)
{
	unsigned long count = stop_counting();
	struct kvscratch_pad_info info;

	if (handle->file && !is_child) {
		if (device_pad_info(handle->fd, &info))
			broken("a handle without INFO");
		else
			check_info(pad_of(handle), &info);
	}
	go_on_counting(count);
}

static void check_fdinfo(int fd, const struct kvscratch_pad_info *info)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	if ((uint64_t)number_in_file(path, "kvscratch-id") != info->id ||
	    (uint64_t)number_in_file(path, "kvscratch-len") != info->len ||
	    (uint64_t)number_in_file(path, "kvscratch-generation") != info->generation ||
	    number_in_file(path, "kvscratch-epoch") != info->epoch)
		broken("fdinfo is not what INFO says");
}

/* Compare @rows rows of one array of a view with what begins at @at of each token. */
static void check_array(const struct pad *pad, const uint8_t *rows_in_view, uint32_t row_bytes,
			uint32_t at, uint64_t rows)
{
	for (uint64_t row = 0; row < rows; row++)
		if (memcmp(rows_in_view + row * row_bytes,
			   pad->shadow + row * pad->info.row_bytes + at, row_bytes))
			broken("a view shows another row %llu", (unsigned long long)row);
}

static void check_rows(const struct pad *pad, int fd, const uint8_t *view, uint64_t rows)
{
	static uint8_t read_back[LIMIT_BYTES];
	size_t bytes = rows * pad->info.row_bytes;

	if (pread(fd, read_back, bytes, 0) != (ssize_t)bytes)
		broken("%zu bytes of committed rows cannot be read", bytes);
	else if (memcmp(read_back, pad->shadow, bytes))
		broken("committed rows have changed");
	for (uint32_t i = 0; i < pad->info.nr_planes; i++) {
		const struct plane *plane = &pad->planes[i];

		check_array(pad, view + plane->geometry.offset, plane->geometry.row_bytes, plane->at,
			    rows);
		check_array(pad, view + plane->geometry.scales_offset,
			    plane->geometry.scales_row_bytes,
			    plane->at + plane->geometry.row_bytes, rows);
	}
}

static void check_zero_beyond(const struct pad *pad, const uint8_t *view, uint64_t len)
{
	for (uint32_t i = 0; i < pad->info.nr_planes; i++) {
		const struct kvscratch_plane *plane = &pad->planes[i].geometry;
		uint64_t rows = pad->info.max_seq_len - len;

		if (!all_zero(view + plane->offset + len * plane->row_bytes,
			      rows * plane->row_bytes) ||
		    !all_zero(view + plane->scales_offset + len * plane->scales_row_bytes,
			      rows * plane->scales_row_bytes))
			broken("plane %u is not zero beyond its rows", i);
	}
}

/* Of a pad that nobody uses any more, through a handle that can read */
static void check_view(const struct pad *pad, int fd, const struct kvscratch_pad_info *info)
{
	const uint8_t *view = mmap(NULL, info->mapping_bytes, PROT_READ, MAP_SHARED, fd, 0);
	const struct kvscratch_status *status;
	uint64_t word;

	if (view == MAP_FAILED) {
		broken("cannot map a pad: %s", strerror(errno));
		return;
	}
	status = (const void *)(view + info->status_offset);
	word = kvscratch_word_load(&status->state);
	if (word != (info->generation << 32 | info->len) || status->generation != info->generation)
		broken("the status page says %#llx", (unsigned long long)word);
	word = kvscratch_word_load(&status->trunc);
	if (word != (info->generation << 32 | info->trunc_len))
		broken("the status page says trunc %#llx", (unsigned long long)word);
	word = kvscratch_word_load(&status->writer);
	if (word != ((uint64_t)info->epoch << 32 | info->flags))
		broken("the status page says writer %#llx", (unsigned long long)word);
	/* of those who came later only the beginning is known */
	if (!pad->opaque && info->generation == pad->info.generation)
		check_rows(pad, fd, view, pad->info.len);
	if (alone && pad->zero_beyond)
		check_zero_beyond(pad, view, info->len);
	munmap((void *)view, info->mapping_bytes);
}

static void check_quiet_handle(const struct handle *handle)
{
	struct kvscratch_pad_info info;

	if (!handle->file)
		return;
	if (device_pad_info(handle->fd, &info)) {
		broken("a handle without INFO at the end");
		return;
	}
	check_info(pad_of(handle), &info);
	check_fdinfo(handle->fd, &info);
	if (readable(handle->fd))
		check_view(pad_of(handle), handle->fd, &info);
}

static int max_total_fd;

static void limit_total(uint64_t bytes)
{
	char text[24];
	int length = snprintf(text, sizeof(text), "%llu", (unsigned long long)bytes);

	NEED(pwrite(max_total_fd, text, length, 0) == length);
}

/* With all handles released, the smallest pad fits into the smallest limit. */
static void check_nothing_is_left(void)
{
	int fd;

	limit_total(charged_bytes(1, 1));
	fd = new_pad(1, 1);
	limit_total(LIMIT_BYTES);
	if (fd < 0)
		broken("released pads still count: %s", strerror(-fd));
	else
		close(fd);
}

/* Memory that calls are given: an arena with nothing behind it, and a read-only page */

static uint8_t *arena, *arena_end, *read_only, *views, *plane_memory;

static void *map_at(void *at, size_t bytes, int prot)
{
	void *map = mmap(at, bytes, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE |
			 (at ? MAP_FIXED : 0), -1, 0);

	NEED(map != MAP_FAILED);
	return map;
}

static void map_memory(void)
{
	arena = map_at(NULL, ARENA_BYTES + PAGE, PROT_NONE);
	map_at(arena, ARENA_BYTES, PROT_READ | PROT_WRITE);
	arena_end = arena + ARENA_BYTES;
	read_only = map_at(NULL, IMAGE_BYTES, PROT_READ);
	plane_memory = map_at(NULL, 2 * PAGE, PROT_NONE);
	map_at(plane_memory, PAGE, PROT_READ | PROT_WRITE);
	/* views go here, so that one call takes all of them away */
	views = map_at(NULL, NR_VIEWS * VIEW_STRIDE, PROT_NONE);
}

static void *view_at(uint64_t slot)
{
	return views + slot % NR_VIEWS * VIEW_STRIDE;
}

enum place {
	IN_ARENA,
	UP_TO_A_HOLE,
	INTO_A_HOLE,
	NOWHERE,
	IN_THE_KERNEL,
	READ_ONLY,
	UNALIGNED,
	IN_A_VIEW,
	NR_PLACES
};

/* Put @bytes somewhere and say where. */
static void *put(uint64_t place, const void *bytes, size_t size)
{
	uint8_t *at = arena;

	if (size > ARENA_BYTES)
		size = ARENA_BYTES;
	switch (place % NR_PLACES) {
	case UP_TO_A_HOLE:
		at = arena_end - size;
		break;
	case INTO_A_HOLE:
		size -= !!size;
		at = arena_end - size;
		break;
	case NOWHERE:
		return NULL;
	case IN_THE_KERNEL:
		return (void *)-(uintptr_t)PAGE;
	case READ_ONLY:
		if (size > IMAGE_BYTES)
			size = IMAGE_BYTES;
		mprotect(read_only, IMAGE_BYTES, PROT_READ | PROT_WRITE);
		memcpy(read_only, bytes, size);
		mprotect(read_only, IMAGE_BYTES, PROT_READ);
		return read_only;
	case UNALIGNED:
		/* all of it: what lay there before is not what the model knows */
		if (size == ARENA_BYTES)
			size--;
		at = arena + 1;
		break;
	case IN_A_VIEW:
		return views;
	}
	memcpy(at, bytes, size);
	return at;
}

/* ioctl() with a struct of any size and a tail of any byte */
static int call_ioctl(const struct handle *handle, unsigned int cmd, const void *arg, size_t known,
		      uint64_t tail, uint64_t place)
{
	uint8_t image[IMAGE_BYTES];
	uint32_t size;

	memset(image, tail, sizeof(image));
	memcpy(image, arg, known);
	memcpy(&size, image, sizeof(size));
	if (size < sizeof(size))
		size = sizeof(size);
	if (size > sizeof(image))
		size = sizeof(image);
	/* what a view holds is not what the model believes */
	if (place % NR_PLACES == IN_A_VIEW)
		place = IN_THE_KERNEL;
	return ioctl(handle->fd, cmd, put(place, image, size));
}

/* The calls */

static struct handle *handle_at(uint64_t arg)
{
	return &handles[arg % NR_HANDLES];
}

static void release(struct handle *handle)
{
	struct file *file = handle->file;

	if (handle->fd >= 0)
		close(handle->fd);
	*handle = (struct handle) { .fd = -1 };
	if (file && !--file->handles && alone && file->pad->writer == file)
		end_role(file->pad);
}

static void do_node(const uint64_t *arg)
{
	struct handle *handle = handle_at(arg[0]);

	release(handle);
	handle->fd = open(KVSCRATCH_DEVICE,
			  (arg[1] & (O_ACCMODE | O_NONBLOCK | O_APPEND)) | O_CLOEXEC);
}

/* Planes in memory with nothing behind it, each beginning @stride after the one before */
static void *put_planes(const struct kvscratch_plane *planes, uint64_t stride)
{
	uint8_t *at;

	if (stride > PAGE / MODEL_PLANES)
		stride = PAGE / MODEL_PLANES;
	at = plane_memory + PAGE - MODEL_PLANES * stride;
	memset(plane_memory, 0, PAGE);
	for (int i = 0; i < MODEL_PLANES; i++)
		memcpy(at + i * stride, &planes[i],
		       stride < sizeof(*planes) ? stride : sizeof(*planes));
	return at;
}

/* What was asked for, and where the same arithmetic puts it */
static void check_new_pad(const struct pad *pad, const struct kvscratch_create *create,
			  const struct kvscratch_plane *wanted)
{
	struct kvscratch_plane planes[MODEL_PLANES];
	struct kvs_layout layout;

	memcpy(planes, wanted, sizeof(planes));
	if (create->nr_planes > MODEL_PLANES ||
	    !kvs_layout_init(&layout, planes, create->nr_planes, create->max_seq_len, PAGE)) {
		broken("a pad that cannot be");
		return;
	}
	if (pad->info.nr_planes != create->nr_planes ||
	    pad->info.max_seq_len != create->max_seq_len ||
	    pad->info.row_bytes != layout.row_bytes ||
	    pad->info.input_row_bytes != layout.input_row_bytes ||
	    pad->info.status_offset != layout.status_offset ||
	    memcmp(pad->info.tag, create->tag, sizeof(create->tag)))
		broken("a new pad is not what was asked for");
	for (uint32_t i = 0; i < create->nr_planes; i++)
		if (memcmp(&pad->planes[i].geometry, &planes[i], sizeof(planes[i])))
			broken("plane %u of a new pad is not what was asked for", i);
}

static void describe_planes(struct pad *pad, int fd)
{
	struct kvscratch_plane planes[MODEL_PLANES];
	uint32_t at = 0;

	if (device_planes(fd, 0, planes, MODEL_PLANES) != (int)pad->info.nr_planes) {
		broken("a new pad without PLANES");
		pad->info.nr_planes = 0;
	}
	for (uint32_t i = 0; i < pad->info.nr_planes; i++) {
		pad->planes[i] = (struct plane) { .geometry = planes[i], .at = at };
		at += planes[i].row_bytes + planes[i].scales_row_bytes;
	}
}

static void do_create(const uint64_t *arg)
{
	struct handle *handle = handle_at(arg[0]);
	struct kvscratch_plane planes[MODEL_PLANES] = { 0 };
	struct kvscratch_create create = {
		.size = arg[2],
		.flags = arg[3],
		.max_seq_len = arg[4],
		.nr_planes = arg[9],
		.plane_bytes = arg[10],
		.tag = { arg[11] },
	};
	unsigned long count;
	struct pad *pad;
	int fd;

	/* those after the first differ by what bits of one argument say */
	for (int i = 0; i < MODEL_PLANES; i++) {
		uint32_t step = i * (arg[11] >> 4 & 7);

		planes[i].dim = arg[5] + i * (arg[11] & 15);
		planes[i].dtype = step ? 1 + (arg[6] + step) % 10 : arg[6];
		planes[i].input_dtype = step ? 0 : arg[7];
		planes[i].frac_bits = step ? 0 : arg[8];
		memset(planes[i].label, arg[11] >> 8, i);
	}
	create.planes = (uintptr_t)put_planes(planes, create.plane_bytes);
	fd = call_ioctl(handle_at(arg[1]), KVSCRATCH_IOC_CREATE, &create, sizeof(create), arg[12],
			arg[13]);
	if (fd < 0)
		return;
	release(handle);
	handle->fd = fd;
	if (nr_pads == NR_PADS) {
		release(handle);
		return;
	}
	pad = &pads[nr_pads++];
	*pad = (struct pad) { .zero_beyond = true };
	count = stop_counting();
	if (device_pad_info(fd, &pad->info))
		broken("a new pad without INFO");
	describe_planes(pad, fd);
	go_on_counting(count);
	if (pad->info.len || pad->info.generation || pad->info.epoch || pad->info.flags)
		broken("a new pad has rows, a generation or a writer");
	check_new_pad(pad, &create, planes);
	handle->file = new_file(pad);
}

/* Of a FORK through a node that may make pads; what it takes of the limits decides the rest */
static int expected_branch(const struct handle *source, const struct kvscratch_fork *fork)
{
	const struct pad *pad = pad_of(source);

	if (!pad)
		return EBADF;
	if (!readable(source->fd) ||
	    (!writable(source->fd) && !(pad->info.flags & KVSCRATCH_PAD_SEALED)))
		return EACCES;
	if (fork->flags || fork->reserved || !fork->max_seq_len ||
	    fork->max_seq_len > KVSCRATCH_MAX_SEQ_LEN || fork->rows > fork->max_seq_len)
		return EINVAL;
	if (fork->generation != pad->info.generation)
		return ECANCELED;
	return fork->rows > pad->info.len ? EINVAL : 0;
}

/* The model of a fork, whose own rows are zero */
static void new_branch(struct pad *pad, struct pad *from, const struct kvscratch_fork *fork, int fd)
{
	struct kvscratch_plane planes[MODEL_PLANES] = { 0 };
	struct kvscratch_create create = {
		.max_seq_len = fork->max_seq_len,
		.nr_planes = from->info.nr_planes,
	};
	unsigned long count = stop_counting();

	*pad = (struct pad) {
		.floor = fork->rows,
		.opaque = from->opaque || !alone,
		.zero_beyond = true,
	};
	memcpy(pad->shadow, from->shadow, fork->rows * from->info.row_bytes);
	if (from->floor < fork->rows)
		from->floor = fork->rows;
	if (device_pad_info(fd, &pad->info))
		broken("a fork without INFO");
	describe_planes(pad, fd);
	go_on_counting(count);
	if (pad->info.len != fork->rows || pad->info.parent_rows != fork->rows ||
	    pad->info.parent_id != from->info.id)
		broken("a fork has other rows, or is of another pad");
	if (pad->info.generation || pad->info.epoch || pad->info.flags)
		broken("a fork has a generation or a writer");
	for (uint32_t i = 0; i < from->info.nr_planes; i++)
		planes[i] = from->planes[i].geometry;
	memcpy(create.tag, from->info.tag, sizeof(create.tag));
	check_new_pad(pad, &create, planes);
}

static void do_branch(const uint64_t *arg)
{
	struct handle *to = handle_at(arg[0]), *node = handle_at(arg[1]);
	struct handle *source = handle_at(arg[2]);
	struct kvscratch_fork fork = {
		.size = arg[3],
		.flags = arg[4],
		.source_fd = source->fd,
		.reserved = arg[5],
		.rows = arg[6],
		.generation = arg[7],
		.max_seq_len = arg[8],
	};
	bool plain = arg[3] == sizeof(fork) && arg[10] % NR_PLACES == IN_ARENA &&
		     !node->file && node->fd >= 0 && writable(node->fd);
	struct pad *from = pad_of(source);
	int fd = call_ioctl(node, KVSCRATCH_IOC_FORK, &fork, sizeof(fork), arg[9], arg[10]);
	int error = errno;

	if (plain && alone) {
		int expected = expected_branch(source, &fork);

		if (expected || (fd < 0 && error != EDQUOT && error != ENOMEM))
			expect_errno("FORK", expected, fd, error);
	}
	check_handle(source);
	if (fd < 0)
		return;
	if (!from) {
		broken("FORK of what is no pad");
		close(fd);
		return;
	}
	release(to);
	to->fd = fd;
	if (nr_pads == NR_PADS) {
		/* who has rows in common with one that is gone may drop them */
		if (from->floor < fork.rows)
			from->floor = fork.rows;
		release(to);
		return;
	}
	new_branch(&pads[nr_pads], from, &fork, fd);
	to->file = new_file(&pads[nr_pads++]);
}

static int expected_open(const struct handle *from, const struct kvscratch_open *open)
{
	const uint32_t both = KVSCRATCH_ACCESS_READ | KVSCRATCH_ACCESS_WRITE;
	const struct pad *pad = pad_of(from);

	if ((open->access & KVSCRATCH_ACCESS_READ && !readable(from->fd)) ||
	    (open->access & KVSCRATCH_ACCESS_WRITE && !writable(from->fd)))
		return EACCES;
	if (open->flags & ~3u || open->reserved || !open->access || open->access & ~both)
		return EINVAL;
	if (!open->flags)
		return 0;
	if (!(open->flags & KVSCRATCH_OPEN_WRITER) || open->access != KVSCRATCH_ACCESS_WRITE)
		return EINVAL;
	if (pad->info.flags & KVSCRATCH_PAD_SEALED)
		return EROFS;
	if (open->flags & KVSCRATCH_OPEN_TAKEOVER)
		return 0;
	/* also through a handle that was the writer: it asks for another one */
	return pad->writer ? EBUSY : 0;
}

static void do_open(const uint64_t *arg)
{
	struct handle *to = handle_at(arg[0]), *from = handle_at(arg[1]);
	struct kvscratch_open open = {
		.size = arg[2],
		.flags = arg[3],
		.access = arg[4],
		.reserved = arg[5],
	};
	bool plain = arg[2] == sizeof(open) && arg[7] % NR_PLACES == IN_ARENA;
	struct pad *pad = pad_of(from);
	int expected = pad && plain && alone ? expected_open(from, &open) : 0;
	int fd = call_ioctl(from, KVSCRATCH_IOC_OPEN, &open, sizeof(open), arg[6], arg[7]);

	if (pad && plain)
		expect_errno("OPEN", expected, fd, errno);
	if (fd < 0)
		return;
	if (!pad) {
		broken("OPEN of what is no pad");
		close(fd);
		return;
	}
	release(to);
	*to = (struct handle) { .fd = fd, .file = new_file(pad) };
	if (open.flags && alone)
		start_role(pad, to->file);
	check_handle(to);
}

static void do_info(const uint64_t *arg)
{
	struct kvscratch_pad_info info = { .size = arg[1], .flags = arg[2] };

	call_ioctl(handle_at(arg[0]), KVSCRATCH_IOC_INFO, &info, sizeof(info), arg[3], arg[4]);
}

static void do_planes(const uint64_t *arg)
{
	static struct kvscratch_plane planes[MODEL_PLANES];
	struct kvscratch_planes request = {
		.size = arg[1],
		.first = arg[2],
		.count = arg[3],
		.plane_bytes = arg[4],
		.planes = (uintptr_t)put_planes(planes, arg[4]),
	};

	call_ioctl(handle_at(arg[0]), KVSCRATCH_IOC_PLANES, &request, sizeof(request), arg[5],
		   arg[6]);
}

static int expected_truncate(const struct handle *handle, const struct kvscratch_truncate *truncate)
{
	const struct pad *pad = pad_of(handle);
	bool expects = truncate->flags & KVSCRATCH_TRUNCATE_EXPECT;
	int err;

	if (!writable(handle->fd))
		return EACCES;
	if (truncate->flags & ~3u ||
	    (!expects && (truncate->expected_generation || truncate->expected_len)))
		return EINVAL;
	err = forbidden(handle->file, false);
	if (err)
		return err;
	if (expects && (truncate->expected_generation != pad->info.generation ||
			truncate->expected_len != pad->info.len))
		return ECANCELED;
	return truncate->len > pad->info.len ? EINVAL : 0;
}

static void truncated(struct pad *pad, const struct kvscratch_truncate *truncate)
{
	if (truncate->flags & KVSCRATCH_TRUNCATE_ZERO)
		pad->zero_beyond = true;
	else if (truncate->len < pad->info.len)
		pad->zero_beyond = false;
	if (truncate->len < pad->floor)
		pad->floor = truncate->len;
	pad->info.len = truncate->len;
	pad->info.trunc_len = truncate->len;
	pad->info.generation++;
	drop_staged(pad);
	for (uint32_t i = 0; i < pad->info.nr_planes; i++)
		if (truncate->flags & KVSCRATCH_TRUNCATE_ZERO &&
		    pad->planes[i].whole > pad->info.len)
			pad->planes[i].whole = pad->info.len;
}

static void do_truncate(const uint64_t *arg)
{
	struct handle *handle = handle_at(arg[0]);
	struct kvscratch_truncate truncate = {
		.size = arg[1],
		.flags = arg[2],
		.len = arg[3],
		.expected_generation = arg[4],
		.expected_len = arg[5],
	};
	bool plain = arg[1] == sizeof(truncate) && arg[7] % NR_PLACES == IN_ARENA;
	struct pad *pad = pad_of(handle);
	int expected = pad && plain && alone ? expected_truncate(handle, &truncate) : 0;
	int err = call_ioctl(handle, KVSCRATCH_IOC_TRUNCATE, &truncate, sizeof(truncate), arg[6],
			     arg[7]);

	/* whether a fork is still there views decide as well */
	if (pad && !expected && err < 0 && errno == ETXTBSY && truncate.len < pad->floor)
		expected = ETXTBSY;
	if (pad && plain)
		expect_errno("TRUNCATE", expected, err, errno);
	if (!err && pad && alone)
		truncated(pad, &truncate);
	check_handle(handle);
}

/* Rows of a pad as they are now, for what the model cannot compute */
static void read_shadow(struct pad *pad, uint64_t from, uint64_t to)
{
	unsigned long count = stop_counting();
	size_t bytes = (to - from) * pad->info.row_bytes;
	uint64_t at = from * pad->info.row_bytes;
	bool done = false;

	for (int i = 0; i < NR_HANDLES && !done; i++)
		if (pad_of(&handles[i]) == pad && readable(handles[i].fd)) {
			if (pread(handles[i].fd, pad->shadow + at, bytes, at) != (ssize_t)bytes)
				broken("committed rows cannot be read");
			done = true;
		}
	if (!done)
		pad->opaque = true;
	go_on_counting(count);
}

static int expected_commit(const struct handle *handle, const struct kvscratch_commit *commit)
{
	const struct pad *pad = pad_of(handle);
	int err;

	if (commit->flags)
		return EINVAL;
	err = forbidden(handle->file, true);
	if (err)
		return err;
	if (commit->len < pad->info.len)
		return EINVAL;
	for (uint32_t i = 0; i < pad->info.nr_planes; i++)
		if (commit->len > pad->planes[i].staged)
			return EINVAL;
	return 0;
}

static bool converts(const struct plane *plane)
{
	return plane->geometry.input_dtype != plane->geometry.dtype;
}

static bool any_converts(const struct pad *pad)
{
	for (uint32_t i = 0; i < pad->info.nr_planes; i++)
		if (converts(&pad->planes[i]))
			return true;
	return false;
}

static void do_commit(const uint64_t *arg)
{
	struct handle *handle = handle_at(arg[0]);
	struct kvscratch_commit commit = { .size = arg[1], .flags = arg[2], .len = arg[3] };
	bool plain = arg[1] == sizeof(commit) && arg[5] % NR_PLACES == IN_ARENA;
	struct pad *pad = pad_of(handle);
	int expected = pad && plain && alone ? expected_commit(handle, &commit) : 0;
	int err = call_ioctl(handle, KVSCRATCH_IOC_COMMIT, &commit, sizeof(commit), arg[4], arg[5]);

	if (pad && plain)
		expect_errno("COMMIT", expected, err, errno);
	if (!err && pad && alone) {
		uint64_t len = pad->info.len;

		pad->info.len = commit.len;
		drop_staged(pad);
		if (any_converts(pad))
			read_shadow(pad, len, commit.len);
	}
	check_handle(handle);
}

/* Where the source does not matter; -1 when it will tell */
static int expected_stage(const struct handle *handle, const struct kvscratch_stage *stage)
{
	const struct pad *pad = pad_of(handle);
	bool keep = stage->flags & KVSCRATCH_STAGE_KEEP;
	const struct plane *plane;
	int err;

	if (stage->flags & ~KVSCRATCH_STAGE_KEEP || stage->reserved ||
	    stage->plane >= pad->info.nr_planes || (keep && stage->addr))
		return EINVAL;
	err = forbidden(handle->file, true);
	if (err)
		return err;
	plane = &pad->planes[stage->plane];
	if (stage->row < pad->info.len || stage->row > plane->staged)
		return EINVAL;
	if (stage->rows > pad->info.max_seq_len - stage->row)
		return ENOSPC;
	if (!keep)
		return -1;
	return stage->row + stage->rows > plane->whole ? EINVAL : 0;
}

/* Rows of one plane as they came, into the tokens of the model */
static void stage_shadow(struct pad *pad, const struct plane *plane, uint64_t row, uint64_t rows,
			 const uint8_t *from)
{
	uint32_t bytes = plane->geometry.row_bytes + plane->geometry.scales_row_bytes;

	for (; rows; rows--, row++, from += bytes)
		memcpy(pad->shadow + row * pad->info.row_bytes + plane->at, from, bytes);
}

static void staged(struct pad *pad, const struct kvscratch_stage *stage, bool copied)
{
	struct plane *plane = &pad->planes[stage->plane];
	uint64_t end = stage->row + stage->rows;

	pad->zero_beyond = false;
	if (!copied) {
		plane->staged = stage->row;
		plane->whole = stage->row;
		return;
	}
	if (end > plane->staged)
		plane->staged = end;
	if (end > plane->whole)
		plane->whole = end;
}

static void do_stage(const uint64_t *arg)
{
	static uint64_t pattern[ARENA_BYTES / sizeof(uint64_t)];
	struct handle *handle = handle_at(arg[0]);
	struct pad *pad = pad_of(handle);
	uint32_t nr = arg[3];
	uint32_t row_bytes = pad && nr < pad->info.nr_planes ?
			     pad->planes[nr].geometry.input_row_bytes : 1;
	size_t bytes = arg[5] > ARENA_BYTES / row_bytes ? ARENA_BYTES : arg[5] * row_bytes;
	enum place place = arg[8] % NR_PLACES;
	struct kvscratch_stage stage = {
		/* a longer one would have a tail of which nothing is known */
		.size = arg[1] < sizeof(stage) ? arg[1] : sizeof(stage),
		.flags = arg[2],
		.plane = nr,
		.row = arg[4],
		.rows = arg[5],
	};
	int expected, err;

	for (size_t i = 0; i < ARRAY_LEN(pattern) && i * sizeof(*pattern) < bytes; i++)
		pattern[i] = arg[6] + i * arg[7];
	if (!(stage.flags & KVSCRATCH_STAGE_KEEP))
		stage.addr = (uintptr_t)put(place, pattern, bytes);
	expected = pad && alone ? expected_stage(handle, &stage) : -1;
	err = ioctl(handle->fd, KVSCRATCH_IOC_STAGE, &stage) ? errno : 0;
	if (!pad || !alone) {
		check_handle(handle);
		return;
	}
	if (stage.size != sizeof(stage))
		expected = EINVAL;
	if (expected >= 0 && err != expected)
		broken("STAGE: errno %d instead of %d", err, expected);
	if (expected < 0 && err && err != EFAULT && err != EDOM)
		broken("STAGE: errno %d", err);
	if (stage.flags & KVSCRATCH_STAGE_KEEP ? !err : expected < 0 || !err)
		staged(pad, &stage, !err);
	if (!err && !(stage.flags & KVSCRATCH_STAGE_KEEP)) {
		if (place == IN_A_VIEW)
			pad->opaque = true;
		else if (!converts(&pad->planes[nr]))
			stage_shadow(pad, &pad->planes[nr], stage.row, stage.rows,
				     (void *)(uintptr_t)stage.addr);
	}
	check_handle(handle);
}

static void do_seal(const uint64_t *arg)
{
	struct handle *handle = handle_at(arg[0]);
	struct kvscratch_seal seal = { .size = arg[1], .flags = arg[2] };
	bool plain = arg[1] == sizeof(seal) && arg[4] % NR_PLACES == IN_ARENA;
	struct pad *pad = pad_of(handle);
	int expected = 0, err;

	if (pad && plain && alone) {
		expected = !writable(handle->fd) ? EACCES : seal.flags ? EINVAL :
			   forbidden(handle->file, false);
		/* once more is fine */
		if (expected == EROFS)
			expected = 0;
	}
	err = call_ioctl(handle, KVSCRATCH_IOC_SEAL, &seal, sizeof(seal), arg[3], arg[4]);
	if (pad && plain)
		expect_errno("SEAL", expected, err, errno);
	if (!err && pad && alone) {
		drop_staged(pad);
		pad->info.flags |= KVSCRATCH_PAD_SEALED;
	}
	check_handle(handle);
}

static void do_seen(const uint64_t *arg)
{
	struct handle *handle = handle_at(arg[0]);
	struct kvscratch_seen seen = {
		.size = arg[1],
		.flags = arg[2],
		.generation = arg[3],
		.len = arg[4],
	};

	if (!call_ioctl(handle, KVSCRATCH_IOC_SEEN, &seen, sizeof(seen), arg[5], arg[6]) &&
	    handle->file)
		handle->file->seen = seen.generation << 32 | seen.len;
}

static bool is_ours(unsigned int cmd)
{
	return cmd >= KVSCRATCH_IOC_CREATE && cmd <= KVSCRATCH_IOC_PLANES;
}

/* A number that is no ioctl of the module */
static void do_ioctl(const uint64_t *arg)
{
	unsigned int cmd = (arg[1] & ~0xff00u) | KVSCRATCH_IOC_MAGIC << 8;
	uint32_t size = arg[2];

	if (is_ours(cmd))
		return;
	if (!call_ioctl(handle_at(arg[0]), cmd, &size, sizeof(size), 0, arg[3]))
		broken("there is an ioctl %#x", cmd);
}

/* In a ring of its own: processes of a program must not share one. */
static ssize_t transfer_by_ring(bool write, int fd, void *at, size_t bytes)
{
	const struct io_uring_sqe request = {
		.opcode = write ? IORING_OP_WRITE : IORING_OP_READ,
		.fd = fd,
		.addr = (uintptr_t)at,
		.len = bytes,
		.off = -1,
	};
	struct ring ring;
	ssize_t done;

	NEED(!ring_open(&ring));
	done = ring_do(&ring, &request);
	ring_close(&ring);
	if (done >= 0)
		return done;
	errno = -done;
	return -1;
}

static ssize_t transfer(bool write, int fd, void *at, size_t bytes, const uint64_t *arg)
{
	uint64_t how = arg[0], flags = arg[1], offset = arg[2], pieces = arg[3] % 16 + 1;
	struct iovec iov[16];

	for (uint64_t i = 0; i < pieces; i++) {
		iov[i].iov_base = (uint8_t *)at + i * (bytes / pieces);
		iov[i].iov_len = i + 1 < pieces ? bytes / pieces : bytes - i * (bytes / pieces);
	}
	if (how % 8 == 7 && bytes <= INT_MAX)
		return transfer_by_ring(write, fd, at, bytes);
	switch (how % 4) {
	case 0:
		return write ? syscall(SYS_write, fd, at, bytes) : syscall(SYS_read, fd, at, bytes);
	case 1:
		return write ? writev(fd, iov, pieces) : readv(fd, iov, pieces);
	case 2:
		return write ? pwrite(fd, at, bytes, offset) : pread(fd, at, bytes, offset);
	default:
		return write ? pwritev2(fd, iov, pieces, offset, flags) :
			       preadv2(fd, iov, pieces, offset, flags);
	}
}

/* The model of a pad that took @bytes bytes; @from is NULL when nobody knows which */
static void appended(struct pad *pad, const void *from, size_t bytes)
{
	uint64_t rows = bytes / pad->info.input_row_bytes;
	uint64_t at = pad->info.len * pad->info.row_bytes;

	if (rows > pad->info.max_seq_len - pad->info.len) {
		broken("%llu rows after %llu of %llu", (unsigned long long)rows, pad->info.len,
		       pad->info.max_seq_len);
		return;
	}
	pad->info.len += rows;
	drop_staged(pad);
	for (uint32_t i = 0; i < pad->info.nr_planes; i++)
		pad->planes[i].whole = pad->info.len;
	if (from && !any_converts(pad))
		memcpy(pad->shadow + at, from, rows * pad->info.row_bytes);
	else
		read_shadow(pad, pad->info.len - rows, pad->info.len);
}

/* Whoever got as far as the copy has overwritten what lay there. */
static void append_failed(struct pad *pad, int err)
{
	if (err != EFAULT && err != EDOM)
		return;
	pad->zero_beyond = false;
	drop_staged(pad);
	for (uint32_t i = 0; i < pad->info.nr_planes; i++)
		if (pad->planes[i].whole > pad->info.len)
			pad->planes[i].whole = pad->info.len;
}

static void do_write(const uint64_t *arg)
{
	static uint64_t pattern[ARENA_BYTES / sizeof(uint64_t)];
	struct handle *handle = handle_at(arg[0]);
	const uint64_t how[] = { arg[1], arg[4], arg[5], arg[9] };
	struct pad *pad = pad_of(handle);
	size_t bytes = arg[2] * (pad ? pad->info.input_row_bytes : 1) + arg[3];
	enum place place = arg[8] % NR_PLACES;
	ssize_t written;
	void *from;
	int err;

	for (size_t i = 0; i < ARRAY_LEN(pattern) && i * sizeof(*pattern) < bytes; i++)
		pattern[i] = arg[6] + i * arg[7];
	from = put(place, pattern, bytes);
	written = transfer(true, handle->fd, from, bytes, how);
	err = errno;
	if (written >= 0 && (size_t)written != bytes)
		broken("a write of %zu bytes took %zd", bytes, written);
	if (pad && alone) {
		if (written > 0 && forbidden(handle->file, false))
			broken("a write that is forbidden took %zd", written);
		/* a pad may have been appended to itself */
		if (written > 0)
			appended(pad, place == IN_A_VIEW ? NULL : from, written);
		/* which the kernel refuses before it calls the module */
		else if (written < 0 && place != IN_THE_KERNEL)
			append_failed(pad, err);
	}
	check_handle(handle);
}

static void do_read(const uint64_t *arg)
{
	static const uint8_t zeros[ARENA_BYTES];
	const uint64_t how[] = { arg[1], arg[3], arg[4], arg[6] };
	const struct handle *handle = handle_at(arg[0]);
	const struct pad *pad = pad_of(handle);
	void *to = put(arg[5], zeros, arg[2]);
	ssize_t got = transfer(false, handle->fd, to, arg[2], how);

	if (got > (ssize_t)LIMIT_BYTES)
		broken("read more than there is");
	/* pread() */
	if (pad && alone && !pad->opaque && got > 0 && arg[1] % 4 == 2 &&
	    (arg[4] + got > pad->info.len * pad->info.row_bytes ||
	     memcmp(to, pad->shadow + arg[4], got)))
		broken("pread() gives %zd other bytes", got);
}

static void do_seek(const uint64_t *arg)
{
	lseek(handle_at(arg[0])->fd, arg[1], arg[2]);
}

static void check_poll(const struct handle *handle, int events)
{
	const struct file *file = handle->file;
	const struct pad *pad = file->pad;
	int expected = 0;

	if (state_of(pad) != file->seen)
		expected |= POLLIN;
	if (pad->info.flags & KVSCRATCH_PAD_SEALED)
		expected |= POLLRDHUP;
	/* it would neither wait nor be EBUSY */
	if (writable(handle->fd) && forbidden(file, false) != EBUSY)
		expected |= POLLOUT;
	events &= POLLIN | POLLOUT | POLLPRI | POLLRDHUP | POLLERR | POLLHUP;
	if (events != expected)
		broken("poll says %#x instead of %#x", events, expected);
}

static void do_poll(const uint64_t *arg)
{
	const struct handle *handle = handle_at(arg[0]);
	struct pollfd pollfd = { .fd = handle->fd, .events = arg[1] };
	struct epoll_event event = { .events = arg[1] };
	int epoll;

	if (arg[2] % 2 == 0) {
		pollfd.events |= POLLIN | POLLOUT | POLLPRI | POLLRDHUP;
		poll(&pollfd, 1, 0);
		if (handle->file && alone)
			check_poll(handle, pollfd.revents);
		return;
	}
	epoll = epoll_create1(EPOLL_CLOEXEC);
	epoll_ctl(epoll, EPOLL_CTL_ADD, pollfd.fd, &event);
	epoll_wait(epoll, &event, 1, 0);
	close(epoll);
}

static void do_mmap(const uint64_t *arg)
{
	const int allowed = MAP_TYPE | MAP_POPULATE | MAP_NORESERVE | MAP_LOCKED | MAP_NONBLOCK;
	int flags = arg[5] & allowed;
	/* what does not fit its place has to be refused anyway */
	bool fits = arg[3] <= VIEW_STRIDE;
	const struct pad *pad = pad_of(handle_at(arg[1]));
	/* what is left of the number in an offset of 64 bits */
	uint64_t page = arg[2] & UINT64_MAX / PAGE;
	uint64_t pages = arg[3] / PAGE + !!(arg[3] % PAGE);
	uint64_t nr_pages = pad ? pad->info.status_offset / PAGE + 1 : 0;
	void *view = (void *)syscall(SYS_mmap, fits ? view_at(arg[0]) : NULL, arg[3], arg[4],
				     flags | (fits ? MAP_FIXED : 0), handle_at(arg[1])->fd,
				     page * PAGE);

	if (view == MAP_FAILED) {
		/* it may have taken away what was there */
		if (fits && arg[3])
			map_at(view_at(arg[0]), arg[3], PROT_NONE);
		return;
	}
	if (arg[4] & (PROT_WRITE | PROT_EXEC) || (flags & MAP_TYPE) == MAP_PRIVATE)
		broken("mapped with prot %#llx, flags %#x", (unsigned long long)arg[4], flags);
	if (!fits || (pad && (page >= nr_pages || pages > nr_pages - page)))
		broken("mapped %llu bytes from page %llu on", (unsigned long long)arg[3],
		       (unsigned long long)page);
}

static sigjmp_buf no_memory;

static void on_no_memory(int signal)
{
	siglongjmp(no_memory, signal);
}

static void do_touch(const uint64_t *arg)
{
	volatile uint8_t *at = (uint8_t *)view_at(arg[0]) + arg[1] % VIEW_STRIDE;

	if (sigsetjmp(no_memory, 1))
		return;
	signal(SIGSEGV, on_no_memory);
	signal(SIGBUS, on_no_memory);
	if (arg[2] % 2)
		*at = 1;
	else
		(void)*at;
}

static void do_mprotect(const uint64_t *arg)
{
	mprotect(view_at(arg[0]), arg[1] % VIEW_STRIDE, arg[2]);
}

static void do_mremap(const uint64_t *arg)
{
	size_t from = arg[1] % VIEW_STRIDE, bytes = arg[2] % VIEW_STRIDE;
	uint8_t *old = view_at(arg[0]);
	uint8_t *moved = mremap(old, from, bytes, arg[3] % 8, view_at(arg[4]));

	if (moved == MAP_FAILED)
		return;
	if (moved < views || moved >= views + NR_VIEWS * VIEW_STRIDE)
		munmap(moved, bytes);
	/* nothing else may settle in a hole that it has left */
	bytes = moved == old ? (bytes + PAGE - 1) / PAGE * PAGE : 0;
	if (bytes < VIEW_STRIDE)
		map_at(old + bytes, VIEW_STRIDE - bytes, PROT_NONE);
}

static void do_munmap(const uint64_t *arg)
{
	size_t offset = arg[1] * PAGE % VIEW_STRIDE;
	size_t bytes = arg[2] % (VIEW_STRIDE - offset);
	uint8_t *at = (uint8_t *)view_at(arg[0]) + offset;

	if (bytes && !munmap(at, bytes))
		map_at(at, bytes, PROT_NONE);
}

static void do_madvise(const uint64_t *arg)
{
	/* beyond these are those that make memory bad */
	madvise(view_at(arg[0]), arg[1] % VIEW_STRIDE, arg[2] % 32);
}

static int pipe_ends[2] = { -1, -1 };

static void need_pipe(void)
{
	NEED(pipe_ends[0] >= 0 || !pipe2(pipe_ends, O_CLOEXEC | O_NONBLOCK));
}

/* The pipe keeps the pages when the view and the pad are gone. */
static void do_vmsplice(const uint64_t *arg)
{
	struct iovec iov = { view_at(arg[0]), arg[1] % VIEW_STRIDE };

	need_pipe();
	vmsplice(pipe_ends[1], &iov, 1, SPLICE_F_NONBLOCK);
}

static void do_splice(const uint64_t *arg)
{
	int fd = handle_at(arg[0])->fd;
	ssize_t moved;

	need_pipe();
	switch (arg[1] % 3) {
	case 0:
		moved = splice(fd, NULL, pipe_ends[1], NULL, arg[2], SPLICE_F_NONBLOCK);
		break;
	case 1:
		moved = splice(pipe_ends[0], NULL, fd, NULL, arg[2], SPLICE_F_NONBLOCK);
		break;
	default:
		moved = sendfile(pipe_ends[1], fd, NULL, arg[2]);
	}
	if (moved > 0)
		broken("a pad spliced %zd bytes", moved);
}

static void share_file(struct handle *to, const struct handle *from)
{
	to->file = to->fd < 0 ? NULL : from->file;
	if (to->file)
		to->file->handles++;
}

static void do_dup(const uint64_t *arg)
{
	struct handle *from = handle_at(arg[0]), *to = handle_at(arg[1]);

	if (from == to)
		return;
	release(to);
	to->fd = fcntl(from->fd, F_DUPFD_CLOEXEC, 0);
	share_file(to, from);
}

static void do_pass(const uint64_t *arg)
{
	struct handle *from = handle_at(arg[0]), *to = handle_at(arg[1]);
	const char *name = "pad";
	char text[16];
	int ends[2], fd;

	if (from == to || from->fd < 0)
		return;
	release(to);
	NEED(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
	if (kvscratch_send_handles(ends[0], &name, &from->fd, 1) ||
	    kvscratch_receive_handles(ends[1], text, sizeof(text), &fd, 1) != 1)
		broken("a handle was not passed");
	else
		to->fd = fd;
	share_file(to, from);
	close(ends[0]);
	close(ends[1]);
}

static void do_close(const uint64_t *arg)
{
	release(handle_at(arg[0]));
}

static void do_fdinfo(const uint64_t *arg)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", handle_at(arg[0])->fd);
	number_in_file(path, NULL);
}

static void do_setfl(const uint64_t *arg)
{
	fcntl(handle_at(arg[0])->fd, F_SETFL, arg[1]);
}

/* Programs */

static void do_fork(const uint64_t *arg);

/*
 * Each letter of @args says what values are likely, see sample(). @size is that of
 * the struct.
 */
static const struct call_type {
	const char *name;
	void (*run)(const uint64_t *arg);
	const char *args;
	unsigned int size;
} call_types[] = {
	{ "node", do_node, "Ha", 0 },
	{ "create", do_create, "hHz0nnttfPZv0q", sizeof(struct kvscratch_create) },
	{ "open", do_open, "hhz3300q", sizeof(struct kvscratch_open) },
	{ "info", do_info, "hz00q", sizeof(struct kvscratch_pad_info) },
	{ "truncate", do_truncate, "hz3nNN0q", sizeof(struct kvscratch_truncate) },
	{ "write", do_write, "hnn0fbvvqn", 0 },
	{ "stage", do_stage, "hz1nnnvvq", sizeof(struct kvscratch_stage) },
	{ "commit", do_commit, "hz0n0q", sizeof(struct kvscratch_commit) },
	{ "seal", do_seal, "hz00q", sizeof(struct kvscratch_seal) },
	{ "seen", do_seen, "hz0nn0q", sizeof(struct kvscratch_seen) },
	{ "planes", do_planes, "hznnZ0q", sizeof(struct kvscratch_planes) },
	{ "ioctl", do_ioctl, "hczq", 0 },
	{ "read", do_read, "hnbfbqn", 0 },
	{ "seek", do_seek, "hbn", 0 },
	{ "poll", do_poll, "hbn", 0 },
	{ "mmap", do_mmap, "nhnlpm", 0 },
	{ "touch", do_touch, "nbn", 0 },
	{ "mprotect", do_mprotect, "nlp", 0 },
	{ "mremap", do_mremap, "nllnn", 0 },
	{ "munmap", do_munmap, "nnl", 0 },
	{ "madvise", do_madvise, "nln", 0 },
	{ "vmsplice", do_vmsplice, "nl", 0 },
	{ "splice", do_splice, "hnb", 0 },
	{ "dup", do_dup, "hh", 0 },
	{ "pass", do_pass, "hh", 0 },
	{ "close", do_close, "h", 0 },
	{ "fdinfo", do_fdinfo, "h", 0 },
	{ "setfl", do_setfl, "hf", 0 },
	{ "fork", do_fork, "n", 0 },
	{ "branch", do_branch, "hHhz00nNn0q", sizeof(struct kvscratch_fork) },
};

struct call {
	const struct call_type *type;
	uint64_t arg[MAX_ARGS];
};

struct program {
	unsigned int nr_calls;
	struct call calls[MAX_CALLS];
};

static const struct program *running;
static unsigned int next_call, calls_left;

static void run_rest(void)
{
	while (next_call < running->nr_calls && calls_left) {
		const struct call *call = &running->calls[next_call++];

		calls_left--;
		call->type->run(call->arg);
	}
}

/* Two processes run the rest of the program at once, several times over. */
static void do_fork(const uint64_t *arg)
{
	unsigned int rest = next_call;
	struct child child;

	if (is_child || nr_children == NR_PROCESSES - 1)
		return;
	alone = false;
	nr_children++;
	tracers[nr_children].area[0] = 0;
	is_child = start_child(&child);
	if (is_child) {
		trace_with(nr_children);
		say(child.line);
	} else if (!hear(child.line)) {
		broken("a child did not start");
	}
	close(child.line);
	for (uint64_t i = 0; i <= arg[0] % 4; i++) {
		next_call = rest;
		run_rest();
	}
	if (is_child)
		_exit(complaint[0] ? 1 : 0);
}

static void run(const struct program *program, struct features *seen, uint8_t by)
{
	unsigned long count;
	int status;

	running = program;
	next_call = 0;
	calls_left = MAX_REPEATED_CALLS;
	complaint[0] = '\0';
	nr_children = 0;
	nr_pads = 0;
	alone = true;
	go_on_counting(0);

	run_rest();
	while (wait(&status) > 0)
		if (status)
			broken("a child ended with status %#x", status);
	count = stop_counting();
	for (int i = 0; i < NR_HANDLES; i++)
		check_quiet_handle(&handles[i]);
	go_on_counting(count);
	for (int i = 0; i < NR_HANDLES; i++)
		release(&handles[i]);
	map_at(views, NR_VIEWS * VIEW_STRIDE, PROT_NONE);
	if (pipe_ends[0] >= 0) {
		close(pipe_ends[0]);
		close(pipe_ends[1]);
		pipe_ends[0] = -1;
	}
	collect(seen, by);
	check_nothing_is_left();
}

/* As text */

static void print_program(FILE *file, const char *before, const struct program *program)
{
	for (unsigned int i = 0; i < program->nr_calls; i++) {
		const struct call *call = &program->calls[i];

		fprintf(file, "%s%s", before, call->type->name);
		for (unsigned int arg = 0; call->type->args[arg]; arg++)
			fprintf(file, " %llx", (unsigned long long)call->arg[arg]);
		fprintf(file, "\n");
	}
}

static bool parse_call(char *line, struct call *call)
{
	char *word = strtok(line, " \n"), *end;

	*call = (struct call) { 0 };
	for (unsigned int i = 0; i < ARRAY_LEN(call_types); i++)
		if (!strcmp(word, call_types[i].name))
			call->type = &call_types[i];
	if (!call->type)
		return false;
	for (unsigned int i = 0; call->type->args[i]; i++) {
		word = strtok(NULL, " \n");
		if (!word)
			return false;
		call->arg[i] = strtoull(word, &end, 16);
		if (*end)
			return false;
	}
	return !strtok(NULL, " \n");
}

static struct program *corpus[MAX_PROGRAMS];
static unsigned int nr_programs;

static void keep(const struct program *program)
{
	if (nr_programs == MAX_PROGRAMS)
		return;
	corpus[nr_programs] = malloc(sizeof(*program));
	NEED(corpus[nr_programs]);
	*corpus[nr_programs++] = *program;
}

static bool read_corpus(const char *path)
{
	FILE *file = fopen(path, "re");
	struct program program = { 0 };
	char line[512];

	if (!file) {
		perror(path);
		return false;
	}
	while (fgets(line, sizeof(line), file)) {
		if (line[0] == '#')
			continue;
		if (line[0] == '\n') {
			if (program.nr_calls)
				keep(&program);
			program.nr_calls = 0;
		} else if (program.nr_calls == MAX_CALLS ||
			   !parse_call(line, &program.calls[program.nr_calls++])) {
			printf("# %s: not a call: %s\n", path, line);
			return false;
		}
	}
	if (program.nr_calls)
		keep(&program);
	fclose(file);
	return nr_programs != 0;
}

static void write_corpus(void)
{
	FILE *file = fopen(OUT, "we");

	if (!file)
		return;
	for (unsigned int i = 0; i < nr_programs; i++) {
		fprintf(file, i ? "\n" : "");
		print_program(file, "", corpus[i]);
	}
	fclose(file);
}

/* New programs */

static const uint64_t interesting[] = {
	0, 1, 2, 3, 4, 7, 8, 31, 32, 33, 63, 64, 127, 128, 255, 256, 511, 512, 1024, 4095, 4096,
	4097, 8191, 8192, 16383, 16384, 16385, 65535, 65536, 1 << 20, 0x1000000, 0x1000001,
	0x7ffeffff, 0x7fffefff, 0x7ffff000, 0x7fffffff, 0x80000000, 0xfffff000, 0xffffffff,
	0x100000000, 0x100000001, 0xfffffffffffff, 0x10000000000000, 0x7fffffffffffffff,
	0x8000000000000000, -4096, -1,
	/* elements: f64, pairs of f32, fours of f16 and bf16; ones, large, small, not finite */
	0x3ff0000000000000, 0x3ff0000000000001, 0x47f0000000000000, 0x7fefffffffffffff,
	0x7ff0000000000000, 0x3f8000003f800000, 0x7f7fffff7f7fffff, 0x7f800000, 0x3c003c003c003c00,
	0x7bff7bff7bff7bff, 0x3f803f803f803f80, 0x7f7f7f7f7f7f7f7f, 0x0001000100010001,
};

static uint64_t any_of(const uint64_t *values, size_t count)
{
	return values[below(count)];
}

static uint64_t sample_size(unsigned int known)
{
	const uint64_t sizes[] = { known, known, known, known, known, known, known - 8, known - 1,
				   known + 1, known + 8, 0, 1, 4, 4095, 4096, 4097, below(160) };

	return any_of(sizes, ARRAY_LEN(sizes));
}

static uint64_t sample(char kind, unsigned int size)
{
	if (one_in(12))
		return any_of(interesting, ARRAY_LEN(interesting));
	switch (kind) {
	case 'h': /* a handle: few, so that they meet */
		return one_in(2) ? 0 : below(NR_HANDLES);
	case 'H': /* a handle of the node, mostly */
		return one_in(8) ? below(NR_HANDLES) : NR_HANDLES - 1;
	case 'a': /* an access mode */
		return one_in(3) ? below(4) : O_RDWR;
	case 'z':
		return sample_size(size);
	case '0': /* zero, or else EINVAL */
		return one_in(8) ? 1ull << below(32) : 0;
	case 'n': /* a small number */
		return one_in(3) ? below(2) : one_in(2) ? below(8) : 1u << below(9);
	case 'N': /* what is expected, if anything is */
		return one_in(2) ? 0 : below(8);
	case 'P': /* planes */
		return one_in(3) ? 1 : below(MODEL_PLANES + 3);
	case 'Z': /* the size of one */
		return one_in(4) ? sample_size(sizeof(struct kvscratch_plane)) :
		       sizeof(struct kvscratch_plane) + 8 * below(3);
	case '1': /* a flag */
	case '3': /* two of them */
		return one_in(8) ? 1ull << below(32) : below(kind == '1' ? 2 : 4);
	case 't': /* a dtype */
		return below(12);
	case 'f': /* flags, or fraction bits */
		return one_in(2) ? 0 : one_in(2) ? 1u << below(7) : below(64);
	case 'c': /* an ioctl number */
		return below(12) | (one_in(2) ? random_word() << 16 : 0);
	case 'q':
		return one_in(2) ? 0 : below(NR_PLACES);
	case 'l': /* a length: pages */
		return below(36) * PAGE + (one_in(4) ? below(3) - 1 : 0);
	case 'p':
		return one_in(3) ? below(16) : PROT_READ;
	case 'm':
		return one_in(3) ? random_word() : MAP_SHARED;
	case 'b': /* bytes */
		return one_in(2) ? below(300) : below(LIMIT_BYTES);
	default: /* elements */
		return one_in(2) ? random_word() : any_of(interesting, ARRAY_LEN(interesting));
	}
}

static struct call random_call(void)
{
	/* most calls are of no use on a handle without a pad */
	const unsigned int type = one_in(3) ? below(9) : below(ARRAY_LEN(call_types));
	/* the last one is as good as the first ones */
	struct call call = {
		.type = &call_types[one_in(12) ? ARRAY_LEN(call_types) - 1 : type],
	};

	for (unsigned int i = 0; call.type->args[i]; i++)
		call.arg[i] = sample(call.type->args[i], call.type->size);
	return call;
}

static void insert_call(struct program *program, unsigned int at)
{
	if (program->nr_calls == MAX_CALLS)
		return;
	memmove(&program->calls[at + 1], &program->calls[at],
		(program->nr_calls++ - at) * sizeof(program->calls[0]));
	program->calls[at] = random_call();
}

static void remove_call(struct program *program, unsigned int at)
{
	memmove(&program->calls[at], &program->calls[at + 1],
		(--program->nr_calls - at) * sizeof(program->calls[0]));
}

/* The beginning of @program and the end of @other */
static void splice_program(struct program *program, const struct program *other)
{
	unsigned int from = below(other->nr_calls + 1);

	program->nr_calls = below(program->nr_calls + 1);
	while (from < other->nr_calls && program->nr_calls < MAX_CALLS)
		program->calls[program->nr_calls++] = other->calls[from++];
}

static void mutate_argument(struct call *call)
{
	unsigned int i = below(strlen(call->type->args));

	switch (below(4)) {
	case 0:
		call->arg[i] ^= 1ull << below(64);
		break;
	case 1:
		call->arg[i] += below(3) - 1ull;
		break;
	default:
		call->arg[i] = sample(call->type->args[i], call->type->size);
	}
}

static void mutate(struct program *program)
{
	do {
		unsigned int at = below(program->nr_calls + 1);

		if (one_in(3) || at == program->nr_calls)
			insert_call(program, at);
		else if (one_in(6))
			remove_call(program, at);
		else
			mutate_argument(&program->calls[at]);
	} while (!one_in(3));
}

static struct program new_program(void)
{
	struct program program = { 0 };

	if (!one_in(20))
		program = *corpus[below(nr_programs)];
	if (one_in(6))
		splice_program(&program, corpus[below(nr_programs)]);
	mutate(&program);
	return program;
}

/* The fuzzer */

static uint64_t executions, max_executions = UINT64_MAX;
static double max_seconds = 1e9;
static bool tracing;

static double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec + now.tv_nsec / 1e9;
}

/* False when the program broke something, which is told. */
static bool execute(const struct program *program, struct features *seen, uint8_t by)
{
	executions++;
	if (tracing) {
		printf("# execution %llu\n", (unsigned long long)executions);
		print_program(stdout, "#   ", program);
		fflush(stdout);
	}
	run(program, seen, by);
	if (!complaint[0])
		return true;
	printf("# execution %llu: %s\n", (unsigned long long)executions, complaint);
	print_program(stdout, "#   ", program);
	return false;
}

static bool has_all(const struct features *seen, const struct features *wanted)
{
	for (unsigned int i = 0; i < ARRAY_LEN(seen->words); i++)
		if (wanted->words[i] & ~seen->words[i])
			return false;
	return true;
}

static bool forks(const struct program *program)
{
	for (unsigned int i = 0; i < program->nr_calls; i++)
		if (program->calls[i].type->run == do_fork)
			return true;
	return false;
}

/* Cut away what is not needed to reach @wanted. */
static bool minimise(struct program *program, const struct features *wanted)
{
	struct features seen;
	struct program shorter;

	for (unsigned int i = program->nr_calls; i--;) {
		shorter = *program;
		remove_call(&shorter, i);
		if (!execute(&shorter, &seen, REACHED))
			return false;
		if (has_all(&seen, wanted))
			*program = shorter;
	}
	return true;
}

static struct features known;

/* Run a program and keep it if it reached anything new. */
static bool try(struct program *program)
{
	struct features seen, fresh;
	bool any = false;

	if (!execute(program, &seen, REACHED))
		return false;
	for (unsigned int i = 0; i < ARRAY_LEN(seen.words); i++) {
		fresh.words[i] = seen.words[i] & ~known.words[i];
		any |= fresh.words[i] != 0;
		known.words[i] |= seen.words[i];
	}
	if (!any)
		return true;
	if (!minimise(program, &fresh))
		return false;
	keep(program);
	return true;
}

static bool fuzz(void)
{
	double start = seconds();
	uint64_t first = executions;

	while (executions - first < max_executions && seconds() - start < max_seconds) {
		struct program program = new_program();

		if (!try(&program))
			return false;
	}
	return true;
}

static bool replay(uint8_t by)
{
	struct features seen;

	for (unsigned int i = 0; i < nr_programs; i++) {
		/* where a program gets that forks is partly chance */
		uint8_t mark = by == REACHED_AT_FIRST && forks(corpus[i]) ? 0 : by;

		if (!execute(corpus[i], &seen, REACHED | mark))
			return false;
		for (unsigned int word = 0; word < ARRAY_LEN(seen.words); word++)
			known.words[word] |= seen.words[word];
	}
	return true;
}

/* TAP */

static int number;
static bool failed;

/* Like kselftest_harness.h: who reads the output knows what ran when it ends. */
static void begin(const char *name)
{
	printf("#  RUN           fuzz.%s ...\n", name);
	fflush(stdout);
}

static void result(bool good, const char *name)
{
	printf("%s %d fuzz.%s\n", good ? "ok" : "not ok", ++number, name);
	fflush(stdout);
	failed |= !good;
}

static void usage(void)
{
	fprintf(stderr, "usage: fuzz [--seed N] [--trace] --seconds N | --executions N CORPUS\n");
	exit(2);
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "seed", required_argument, NULL, 'r' },
		{ "seconds", required_argument, NULL, 's' },
		{ "executions", required_argument, NULL, 'e' },
		{ "trace", no_argument, NULL, 't' },
		{ 0 },
	};
	uint64_t seed = 1;
	double start;
	bool good;
	int option;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (option) {
		case 'r':
			seed = strtoull(optarg, NULL, 0);
			break;
		case 's':
			max_seconds = strtod(optarg, NULL);
			break;
		case 'e':
			max_executions = strtoull(optarg, NULL, 0);
			break;
		case 't':
			tracing = true;
			break;
		default:
			usage();
		}
	}
	if (optind + 1 != argc || (max_seconds == 1e9 && max_executions == UINT64_MAX))
		usage();
	random_state = seed;
	for (int i = 0; i < NR_HANDLES; i++)
		handles[i].fd = -1;
	map_memory();
	open_tracers();
	write_number(MAX_PER_PAD, LIMIT_BYTES);
	max_total_fd = open(MAX_TOTAL, O_WRONLY | O_CLOEXEC);
	limit_total(LIMIT_BYTES);
	trace_with(0);
	start = seconds();

	printf("TAP version 13\n1..4\n");
	begin("corpus_replays");
	good = read_corpus(argv[optind]) && replay(REACHED_AT_FIRST);
	result(good, "corpus_replays");
	begin("kcov_sees_the_module");
	printf("# %u points\n", count_points(REACHED, 0));
	result(count_points(REACHED, 0) >= LEAST_POINTS, "kcov_sees_the_module");
	begin("corpus_reaches_its_points_again");
	good = replay(REACHED_AGAIN) && !count_points(REACHED_AT_FIRST, REACHED_AGAIN);
	result(good, "corpus_reaches_its_points_again");
	begin("executions_break_nothing");
	good = nr_programs && fuzz();
	result(good, "executions_break_nothing");
	write_corpus();
	printf("# seed %llu: %llu executions, %.0f per second, %u programs, %u points\n",
	       (unsigned long long)seed, (unsigned long long)executions,
	       executions / (seconds() - start), nr_programs, count_points(REACHED, 0));
	return failed;
}
