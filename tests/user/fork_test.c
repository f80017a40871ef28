// SPDX-License-Identifier: GPL-2.0-only
/*
 * FORK: pads that share rows. Every pad here has a model beside it: the seed of each token
 * that was ever appended to it, or to what it was forked from.
 */
#include "meters.h"
#include "module.h"

#include <sys/utsname.h>

/* Rows that divide no page, those that do, less than a page in all, and two arrays in one plane */
static const struct kvscratch_plane planes[] = {
	{ .dim = 1152, .dtype = KVSCRATCH_DTYPE_U8, .label = "k0" },
	{ .dim = 34, .dtype = KVSCRATCH_DTYPE_U8, .label = "v0" },
	{ .dim = 1024, .dtype = KVSCRATCH_DTYPE_U8, .label = "k1" },
	{ .dim = 64, .dtype = KVSCRATCH_DTYPE_MXINT8, .label = "v1" },
	{ .dim = 1, .dtype = KVSCRATCH_DTYPE_I32, .label = "tokens" },
};
#define NR_PLANES ARRAY_SIZE(planes)
#define TOKEN_BYTES (1152 + 34 + 1024 + (64 + 2) + 4)

/* Chunks of the first plane, which has the widest rows, are full after so many. */
#define CHUNK_ROWS (KVSCRATCH_CHUNK_BYTES / 1152)
#define MOST_ROWS (3 * CHUNK_ROWS)

/**
 * struct branch - a pad and what it should have
 * @fd: a handle for read and write
 * @len: its rows
 * @seeds: of each
 */
struct branch {
	int fd;
	uint32_t len;
	uint32_t seeds[MOST_ROWS];
};

static uint32_t last_seed;

static bool new_branch(struct branch *branch, uint64_t max_seq_len)
{
	*branch = (struct branch){ .fd = device_create_planes(max_seq_len, planes, NR_PLANES) };
	return branch->fd >= 0;
}

/* Of the first @rows of @from */
static bool fork_branch(struct branch *branch, const struct branch *from, uint32_t rows,
			uint64_t max_seq_len)
{
	memcpy(branch->seeds, from->seeds, rows * sizeof(*branch->seeds));
	branch->len = rows;
	branch->fd = device_fork(from->fd, rows, generation_of(from->fd), max_seq_len);
	return branch->fd >= 0;
}

static bool append_to(struct branch *branch, uint32_t rows)
{
	static uint8_t tokens[64 * TOKEN_BYTES];

	while (rows) {
		uint32_t piece = rows < 64 ? rows : 64;

		for (uint32_t i = 0; i < piece; i++) {
			branch->seeds[branch->len + i] = ++last_seed;
			fill_row(tokens + i * TOKEN_BYTES, TOKEN_BYTES, last_seed);
		}
		if (device_append(branch->fd, tokens, piece * TOKEN_BYTES))
			return false;
		branch->len += piece;
		rows -= piece;
	}
	return true;
}

static bool truncate_to(struct branch *branch, uint32_t len, uint32_t flags)
{
	if (device_truncate(branch->fd, len, flags))
		return false;
	branch->len = len;
	return true;
}

/* Both ends of a row are enough: none is longer than a page, and what is shared is pages. */
#define END_BYTES 24

/* Compare @bytes bytes with those of token @seed from @from on. */
static bool bytes_are(const uint8_t *at, size_t bytes, uint32_t seed, size_t from)
{
	for (size_t i = 0; i < bytes; i++) {
		if (i == END_BYTES && bytes > 2 * END_BYTES)
			i = bytes - END_BYTES;
		if (at[i] != row_byte(seed, from + i))
			return false;
	}
	return true;
}

/* Whether rows from @first on are the model's, as read() gives them; says where not */
static bool reads_right(const struct branch *branch, uint32_t first)
{
	static const uint16_t parts[] = { 1152, 34, 1024, 64 + 2, 4 };
	uint8_t token[TOKEN_BYTES];

	if (len_of(branch->fd) != branch->len)
		return false;
	for (uint32_t row = first; row < branch->len; row++) {
		size_t at = 0;

		if (pread64(branch->fd, token, sizeof(token), (uint64_t)row * sizeof(token)) !=
		    sizeof(token))
			return false;
		for (size_t i = 0; i < NR_PLANES; at += parts[i++]) {
			if (bytes_are(token + at, parts[i], branch->seeds[row], at))
				continue;
			printf("# row %u of %u is not the model's\n", row, branch->len);
			return false;
		}
	}
	return true;
}

/**
 * struct full_view - a mapping of everything
 * @at: where
 * @bytes: how long
 * @planes: where planes lie in it
 * @max_seq_len: capacity
 */
struct full_view {
	uint8_t *at;
	size_t bytes;
	struct kvscratch_plane planes[NR_PLANES];
	uint64_t max_seq_len;
};

static bool map_all(const struct branch *branch, struct full_view *view)
{
	struct kvscratch_pad_info info;

	if (device_pad_info(branch->fd, &info) ||
	    device_planes(branch->fd, 0, view->planes, NR_PLANES) != NR_PLANES)
		return false;
	view->bytes = info.mapping_bytes;
	view->max_seq_len = info.max_seq_len;
	view->at = mmap(NULL, view->bytes, PROT_READ, MAP_SHARED, branch->fd, 0);
	return view->at != MAP_FAILED;
}

static void unmap_all(struct full_view *view)
{
	munmap(view->at, view->bytes);
}

/* Whether a view has the model's rows from @first on, and behind them only zeros */
static bool shows_right(const struct full_view *view, const struct branch *branch,
			uint32_t first, bool zeros_behind)
{
	size_t from = 0;

	for (size_t i = 0; i < NR_PLANES; i++) {
		const struct kvscratch_plane *plane = &view->planes[i];
		const uint8_t *data = view->at + plane->offset;
		const uint8_t *scales = view->at + plane->scales_offset;

		for (uint64_t row = first; row < branch->len; row++) {
			if (!bytes_are(data + row * plane->row_bytes, plane->row_bytes,
				       branch->seeds[row], from) ||
			    !bytes_are(scales + row * plane->scales_row_bytes,
				       plane->scales_row_bytes, branch->seeds[row],
				       from + plane->row_bytes)) {
				printf("# plane %zu, row %u: not the model's\n", i, (uint32_t)row);
				return false;
			}
		}
		if (zeros_behind &&
		    (!all_zero(data + (uint64_t)branch->len * plane->row_bytes,
			       (view->max_seq_len - branch->len) * plane->row_bytes) ||
		     !all_zero(scales + (uint64_t)branch->len * plane->scales_row_bytes,
			       (view->max_seq_len - branch->len) * plane->scales_row_bytes))) {
			printf("# plane %zu: not zero behind row %u\n", i, branch->len);
			return false;
		}
		from += plane->row_bytes + plane->scales_row_bytes;
	}
	return true;
}

static bool is_right(const struct branch *branch, bool zeros_behind)
{
	struct full_view view;
	bool right;

	if (!reads_right(branch, 0) || !map_all(branch, &view))
		return false;
	right = shows_right(&view, branch, 0, zeros_behind);
	unmap_all(&view);
	return right;
}

static uint64_t bytes_total(void)
{
	return number_in_file(BYTES_TOTAL, NULL);
}

/* What every test leaves behind is nothing. */
FIXTURE(fork) {
	struct branch *source;
	struct branch *child;
	struct branch *other;
};

FIXTURE_SETUP(fork) {
	ASSERT_EQ(0, bytes_total());
	self->source = malloc(3 * sizeof(*self->source));
	ASSERT_NE(NULL, self->source);
	self->child = self->source + 1;
	self->other = self->source + 2;
}

FIXTURE_TEARDOWN(fork) {
	free(self->source);
	EXPECT_EQ(0, bytes_total());
}

TEST_F_TIMEOUT(fork, has_the_first_rows, TEST_SECONDS)
{
	/* pages, chunks, and the last row of several arrays end there */
	const uint32_t points[] = {
		0, 1, 4, 32, 100, CHUNK_ROWS, CHUNK_ROWS + 1, 2048, 2 * CHUNK_ROWS + 777,
	};
	const uint32_t rooms[] = { 0, 1, CHUNK_ROWS };
	struct kvscratch_pad_info info, of_source;

	ASSERT_TRUE(new_branch(self->source, MOST_ROWS));
	ASSERT_TRUE(append_to(self->source, 2 * CHUNK_ROWS + 777));
	ASSERT_EQ(0, device_pad_info(self->source->fd, &of_source));
	for (size_t i = 0; i < ARRAY_SIZE(points) * ARRAY_SIZE(rooms); i++) {
		uint32_t rows = points[i / ARRAY_SIZE(rooms)], room = rooms[i % ARRAY_SIZE(rooms)];

		if (rows + room == 0 || rows + room > MOST_ROWS)
			continue;
		ASSERT_TRUE(fork_branch(self->child, self->source, rows, rows + room))
			TH_LOG("%u rows, room for %u: errno %d", rows, room, -self->child->fd);
		EXPECT_TRUE(is_right(self->child, true))
			TH_LOG("%u rows, room for %u", rows, room);
		ASSERT_EQ(0, device_pad_info(self->child->fd, &info));
		EXPECT_EQ(rows, info.len);
		EXPECT_EQ(0, info.generation);
		EXPECT_EQ(rows + room, info.max_seq_len);
		EXPECT_EQ(of_source.id, info.parent_id);
		EXPECT_EQ(rows, info.parent_rows);
		/* both go on, where the other does not see it */
		ASSERT_TRUE(append_to(self->child, room));
		EXPECT_ERRNO(ENOSPC, write(self->child->fd, self->source->seeds, TOKEN_BYTES));
		EXPECT_TRUE(is_right(self->child, true))
			TH_LOG("%u rows, and %u appended", rows, room);
		close(self->child->fd);
	}
	EXPECT_TRUE(is_right(self->source, true));
	close(self->source->fd);
}

TEST_F_TIMEOUT(fork, carries_planes_and_tag, TEST_SECONDS)
{
	struct kvscratch_plane of_source[NR_PLANES], of_child[NR_PLANES];
	uint8_t tag[KVSCRATCH_TAG_BYTES];
	struct kvscratch_pad_info info;
	int node = device_open(O_RDWR);
	int source, child;

	ASSERT_LE(0, node);
	fill_row(tag, sizeof(tag), 7);
	source = device_create_tagged(node, 100, planes, NR_PLANES, tag);
	ASSERT_LE(0, source);
	child = device_fork_on(node, source, 0, 0, 100);
	ASSERT_LE(0, child);
	ASSERT_EQ(0, device_pad_info(child, &info));
	EXPECT_EQ(0, memcmp(tag, info.tag, sizeof(tag)));
	ASSERT_EQ(NR_PLANES, device_planes(source, 0, of_source, NR_PLANES));
	ASSERT_EQ(NR_PLANES, device_planes(child, 0, of_child, NR_PLANES));
	/* the same capacity: the same layout */
	EXPECT_EQ(0, memcmp(of_source, of_child, sizeof(of_source)));
	EXPECT_EQ(O_RDWR, fcntl(child, F_GETFL) & O_ACCMODE);
	EXPECT_EQ(FD_CLOEXEC, fcntl(child, F_GETFD));
	close(child);
	close(source);
	close(node);
}

/* Own memory of a branch: the pages that its boundary copies, tables, and its own rows */
TEST_F_TIMEOUT(fork, shares_memory, TEST_SECONDS)
{
	const uint32_t rows = 2 * CHUNK_ROWS + 777;
	struct kvscratch_pad_info info;
	uint64_t whole, shared = 0;

	ASSERT_TRUE(new_branch(self->source, MOST_ROWS));
	ASSERT_TRUE(append_to(self->source, rows));
	whole = bytes_total();
	ASSERT_TRUE(fork_branch(self->child, self->source, rows, rows));
	ASSERT_EQ(0, device_pad_info(self->child->fd, &info));
	EXPECT_EQ(whole + info.allocated_bytes, bytes_total());
	/* six arrays of at most three chunks: a page each, their table, and what a pad has */
	EXPECT_GE(8 * page_bytes() + 6 * (page_bytes() + 3 * 8 + 512 * 8 + 3 * 32),
		  info.allocated_bytes);
	for (size_t i = 0; i < NR_PLANES; i++) {
		shared += (uint64_t)rows * (planes[i].dim * (i == 4 ? 4 : 1)) / page_bytes();
		if (planes[i].dtype == KVSCRATCH_DTYPE_MXINT8)
			shared += (uint64_t)rows * 2 / page_bytes();
	}
	EXPECT_EQ(shared * page_bytes(), info.shared_bytes);
	/* what is shared lives on, and is counted, when its first owner is gone */
	close(self->source->fd);
	EXPECT_LE(info.shared_bytes + info.allocated_bytes, bytes_total());
	EXPECT_GE(whole + info.allocated_bytes, bytes_total());
	EXPECT_TRUE(is_right(self->child, true));
	close(self->child->fd);
}

TEST_F_TIMEOUT(fork, chain_in_one_chunk, TEST_SECONDS)
{
	/* no two models at a time fit on a stack */
	struct branch *chain[100];
	uint64_t before;
	size_t i;

	ASSERT_TRUE(new_branch(self->source, CHUNK_ROWS));
	ASSERT_TRUE(append_to(self->source, 20));
	before = bytes_total();
	for (i = 0; i < ARRAY_SIZE(chain); i++) {
		const struct branch *from = i ? chain[i - 1] : self->source;

		chain[i] = malloc(sizeof(*chain[i]));
		ASSERT_NE(NULL, chain[i]);
		ASSERT_TRUE(fork_branch(chain[i], from, from->len - i % 3, CHUNK_ROWS / 4));
		ASSERT_TRUE(append_to(chain[i], 1 + i % 5));
	}
	for (i = 0; i < ARRAY_SIZE(chain); i++) {
		EXPECT_TRUE(is_right(chain[i], true))
			TH_LOG("link %zu", i);
	}
	/* the middle goes first, then both ends of what is left */
	close(chain[50]->fd);
	for (i = 0; i < 50; i++) {
		close(chain[i]->fd);
		if (i == 49)
			break;
		EXPECT_TRUE(is_right(chain[99 - i], true))
			TH_LOG("link %zu", 99 - i);
		close(chain[99 - i]->fd);
	}
	EXPECT_EQ(before, bytes_total());
	for (i = 0; i < ARRAY_SIZE(chain); i++)
		free(chain[i]);
	EXPECT_TRUE(is_right(self->source, true));
	close(self->source->fd);
}

/* Every order in which a source, a fork, its fork and their views can go */
TEST_F_TIMEOUT(fork, every_order_of_death, TEST_SECONDS)
{
	struct branch *branches = self->source;

	for (int order = 0; order < 6; order++) {
		int first = order / 2, second = (first + 1 + order % 2) % 3, i;
		struct full_view views[3];

		ASSERT_TRUE(new_branch(&branches[0], MOST_ROWS));
		ASSERT_TRUE(append_to(&branches[0], 2 * CHUNK_ROWS + 500));
		ASSERT_TRUE(fork_branch(&branches[1], &branches[0], 2 * CHUNK_ROWS + 300,
					MOST_ROWS));
		ASSERT_TRUE(append_to(&branches[1], 100));
		ASSERT_TRUE(fork_branch(&branches[2], &branches[1], 2 * CHUNK_ROWS + 350,
					MOST_ROWS));
		ASSERT_TRUE(append_to(&branches[2], 10));
		for (i = 0; i < 3; i++) {
			ASSERT_TRUE(map_all(&branches[i], &views[i]));
			EXPECT_TRUE(shows_right(&views[i], &branches[i], 0, true));
			/* the view alone keeps it now */
			close(branches[i].fd);
		}
		unmap_all(&views[first]);
		EXPECT_TRUE(shows_right(&views[second], &branches[second], 0, true));
		EXPECT_TRUE(shows_right(&views[3 - first - second],
					&branches[3 - first - second], 0, true));
		unmap_all(&views[second]);
		EXPECT_TRUE(shows_right(&views[3 - first - second],
					&branches[3 - first - second], 0, true));
		unmap_all(&views[3 - first - second]);
		EXPECT_EQ(0, bytes_total())
			TH_LOG("order %d", order);
	}
}

/*
 * A table of the fork has pages of the source's huge page: whatever maps it maps no other
 * page of that.
 */
TEST_F_TIMEOUT(fork, never_shows_later_rows_of_the_source, TEST_SECONDS)
{
	const uint32_t rows = CHUNK_ROWS + 900;
	struct full_view view;
	int status;
	pid_t pid;

	ASSERT_TRUE(new_branch(self->source, MOST_ROWS));
	ASSERT_TRUE(append_to(self->source, rows));
	ASSERT_TRUE(fork_branch(self->child, self->source, rows - 100, MOST_ROWS));
	ASSERT_TRUE(map_all(self->child, &view));
	/* all rows that there will ever be, in the same chunks */
	ASSERT_TRUE(append_to(self->source, MOST_ROWS - rows));
	EXPECT_TRUE(shows_right(&view, self->child, 0, true));
	ASSERT_EQ(0, madvise(view.at, view.bytes, MADV_DONTNEED));
	EXPECT_TRUE(shows_right(&view, self->child, 0, true));
	/* from behind: the first page that is touched is none of the source's */
	ASSERT_EQ(0, madvise(view.at, view.bytes, MADV_DONTNEED));
	for (size_t at = view.planes[0].offset + (MOST_ROWS - 1) * 1152ul;
	     at > view.planes[0].offset + page_bytes(); at -= page_bytes())
		(void)*(volatile uint8_t *)(view.at + at);
	EXPECT_TRUE(shows_right(&view, self->child, 0, true));
	ASSERT_EQ(0, mprotect(view.at + KVSCRATCH_CHUNK_BYTES / 2, page_bytes(), PROT_NONE));
	ASSERT_EQ(0, mprotect(view.at + KVSCRATCH_CHUNK_BYTES / 2, page_bytes(), PROT_READ));
	EXPECT_TRUE(shows_right(&view, self->child, 0, true));
	pid = fork_child();
	if (!pid)
		_exit(!shows_right(&view, self->child, 0, true));
	status = wait_for(pid);
	EXPECT_EQ(0, status);
	ASSERT_TRUE(append_to(self->child, 200));
	EXPECT_TRUE(shows_right(&view, self->child, 0, true));
	unmap_all(&view);
	EXPECT_TRUE(is_right(self->source, true));
	close(self->child->fd);
	close(self->source->fd);
}

TEST_F_TIMEOUT(fork, keeps_shared_rows_from_truncates, TEST_SECONDS)
{
	ASSERT_TRUE(new_branch(self->source, MOST_ROWS));
	ASSERT_TRUE(append_to(self->source, 1000));
	ASSERT_TRUE(fork_branch(self->child, self->source, 600, MOST_ROWS));
	/* above what is shared */
	EXPECT_TRUE(truncate_to(self->source, 900, 0));
	EXPECT_TRUE(truncate_to(self->source, 600, KVSCRATCH_TRUNCATE_ZERO));
	/* and below: of either, and nothing is done */
	EXPECT_EQ(-ETXTBSY, device_truncate(self->source->fd, 599, 0));
	EXPECT_EQ(-ETXTBSY, device_truncate(self->source->fd, 0, KVSCRATCH_TRUNCATE_ZERO));
	EXPECT_EQ(-ETXTBSY, device_truncate(self->child->fd, 0, 0));
	EXPECT_EQ(2, generation_of(self->source->fd));
	EXPECT_EQ(0, generation_of(self->child->fd));
	EXPECT_TRUE(is_right(self->source, true));
	EXPECT_TRUE(is_right(self->child, true));
	/* whoever is left has it alone */
	close(self->source->fd);
	EXPECT_TRUE(truncate_to(self->child, 300, 0));
	ASSERT_TRUE(append_to(self->child, 500));
	EXPECT_TRUE(is_right(self->child, true));
	EXPECT_TRUE(truncate_to(self->child, 10, KVSCRATCH_TRUNCATE_ZERO));
	EXPECT_TRUE(is_right(self->child, true));
	close(self->child->fd);
}

/*
 * To how many rows a pad can be truncated that has a fork of its first 100. The first chunk
 * of the plane of 1024 bytes has the most rows of those that are shared; where no chunk is a
 * huge page it is single pages that are.
 */
static uint32_t rows_kept_for_a_hundred(void)
{
	return is_fragmented() ? 100 : KVSCRATCH_CHUNK_BYTES / 1024;
}

/* What a fork in a later chunk does not need may go, also when the floor was higher once. */
TEST_F_TIMEOUT(fork, lets_truncates_down_to_the_next_chunk, TEST_SECONDS)
{
	ASSERT_TRUE(new_branch(self->source, MOST_ROWS));
	ASSERT_TRUE(append_to(self->source, MOST_ROWS));
	ASSERT_TRUE(fork_branch(self->child, self->source, 100, 100));
	ASSERT_TRUE(fork_branch(self->other, self->source, MOST_ROWS, MOST_ROWS));
	EXPECT_EQ(-ETXTBSY, device_truncate(self->source->fd, MOST_ROWS - 1, 0));
	close(self->other->fd);
	EXPECT_TRUE(truncate_to(self->source, rows_kept_for_a_hundred(), 0));
	EXPECT_EQ(-ETXTBSY, device_truncate(self->source->fd, rows_kept_for_a_hundred() - 1, 0));
	EXPECT_TRUE(is_right(self->source, false));
	EXPECT_TRUE(is_right(self->child, true));
	close(self->child->fd);
	EXPECT_TRUE(truncate_to(self->source, 99, 0));
	ASSERT_TRUE(append_to(self->source, 300));
	EXPECT_TRUE(is_right(self->source, false));
	close(self->source->fd);
}

TEST_F_TIMEOUT(fork, of_a_fork_that_is_gone, TEST_SECONDS)
{
	ASSERT_TRUE(new_branch(self->source, MOST_ROWS));
	ASSERT_TRUE(append_to(self->source, 500));
	ASSERT_TRUE(fork_branch(self->child, self->source, 400, MOST_ROWS));
	ASSERT_TRUE(fork_branch(self->other, self->child, 300, MOST_ROWS));
	close(self->child->fd);
	/* the grandchild has pages that are the source's */
	EXPECT_EQ(-ETXTBSY, device_truncate(self->source->fd, 0, 0));
	EXPECT_EQ(-ETXTBSY, device_truncate(self->other->fd, 0, 0));
	ASSERT_TRUE(append_to(self->source, 500));
	ASSERT_TRUE(append_to(self->other, 500));
	EXPECT_TRUE(is_right(self->source, true));
	EXPECT_TRUE(is_right(self->other, true));
	close(self->other->fd);
	EXPECT_TRUE(truncate_to(self->source, 0, KVSCRATCH_TRUNCATE_ZERO));
	EXPECT_TRUE(is_right(self->source, true));
	close(self->source->fd);
}

/* Where each page is a piece of a huge one it is that one that tells. */
TEST_F_TIMEOUT(fork, of_huge_pages_alone, TEST_SECONDS)
{
	static const uint8_t row[1024] = { 1 };
	int fd = new_pad(4 * MIB / sizeof(row), sizeof(row));
	int forked;

	ASSERT_LE(0, fd);
	for (int i = 0; i < 300; i++)
		ASSERT_EQ(0, device_append(fd, row, sizeof(row)));
	forked = device_fork(fd, 300, 0, 4 * MIB / sizeof(row));
	ASSERT_LE(0, forked);
	EXPECT_EQ(-ETXTBSY, device_truncate(fd, 299, 0));
	EXPECT_EQ(-ETXTBSY, device_truncate(forked, 299, 0));
	close(fd);
	EXPECT_EQ(0, device_truncate(forked, 299, 0));
	close(forked);
}

static bool kernel_is_from(unsigned int major, unsigned int minor)
{
	unsigned int got_major = 0, got_minor = 0;
	struct utsname name;

	if (uname(&name) || sscanf(name.release, "%u.%u", &got_major, &got_minor) != 2)
		abort();
	return got_major > major || (got_major == major && got_minor >= minor);
}

/* From Linux 6.15 on a fault maps all pages of the chunk in which the shared rows end. */
TEST_F_TIMEOUT(fork, is_mapped_by_few_faults, TEST_SECONDS)
{
	static const uint8_t row[1024] = { 1 };
	const size_t bytes = 2 * MIB;
	const long most = kernel_is_from(6, 15) && !is_fragmented() ? 4 : bytes / page_bytes() + 4;
	long faults;
	uint8_t *view;
	int fd, forked;

	fd = new_pad(bytes / sizeof(row), sizeof(row));
	ASSERT_LE(0, fd);
	for (int i = 0; i < 1800; i++)
		ASSERT_EQ(0, device_append(fd, row, sizeof(row)));
	forked = device_fork(fd, 1797, 0, bytes / sizeof(row));
	ASSERT_LE(0, forked);
	view = mmap(NULL, bytes, PROT_READ, MAP_SHARED, forked, 0);
	ASSERT_NE(MAP_FAILED, view);
	/* whoever begins at the end, and where somebody else dropped a part */
	faults = page_faults();
	for (size_t at = 1700 * sizeof(row); at; at -= sizeof(row))
		EXPECT_EQ(1, view[at]);
	EXPECT_GE(most, page_faults() - faults);
	ASSERT_EQ(0, madvise(view + 64 * page_bytes(), 64 * page_bytes(), MADV_DONTNEED));
	faults = page_faults();
	for (size_t at = 0; at < 1797 * sizeof(row); at += sizeof(row))
		EXPECT_EQ(1, view[at]);
	EXPECT_GE(most, page_faults() - faults);
	EXPECT_TRUE(all_zero(view + 1797 * sizeof(row), bytes - 1797 * sizeof(row)));
	munmap(view, bytes);
	close(forked);
	close(fd);
}

/* Where no page is a piece of a larger one it is each page that tells. */
TEST_F_TIMEOUT(fork, of_single_pages, TEST_SECONDS)
{
	ASSERT_TRUE(new_branch(self->source, 400));
	ASSERT_TRUE(append_to(self->source, 300));
	ASSERT_TRUE(fork_branch(self->child, self->source, 200, 400));
	ASSERT_TRUE(fork_branch(self->other, self->child, 100, 400));
	EXPECT_EQ(-ETXTBSY, device_truncate(self->source->fd, 190, 0));
	EXPECT_EQ(-ETXTBSY, device_truncate(self->child->fd, 190, 0));
	EXPECT_TRUE(truncate_to(self->source, 200, 0));
	close(self->child->fd);
	/* 100 rows are left, and in a page that is shared as a whole there are no others */
	EXPECT_TRUE(truncate_to(self->source, 100, KVSCRATCH_TRUNCATE_ZERO));
	EXPECT_EQ(-ETXTBSY, device_truncate(self->source->fd, 90, 0));
	EXPECT_EQ(-ETXTBSY, device_truncate(self->other->fd, 90, 0));
	ASSERT_TRUE(append_to(self->source, 200));
	ASSERT_TRUE(append_to(self->other, 300));
	EXPECT_TRUE(is_right(self->source, true));
	EXPECT_TRUE(is_right(self->other, true));
	close(self->source->fd);
	EXPECT_TRUE(truncate_to(self->other, 0, KVSCRATCH_TRUNCATE_ZERO));
	EXPECT_TRUE(is_right(self->other, true));
	close(self->other->fd);
}

TEST_F_TIMEOUT(fork, is_refused_in_words, TEST_SECONDS)
{
	int node = device_open(O_RDWR), read_only = device_open(O_RDONLY);
	int reader, writer, path, other;

	ASSERT_LE(0, node);
	ASSERT_LE(0, read_only);
	ASSERT_TRUE(new_branch(self->source, 100));
	ASSERT_TRUE(append_to(self->source, 50));
	ASSERT_EQ(0, device_truncate(self->source->fd, 40, 0));
	reader = device_open_reader(self->source->fd);
	writer = device_reopen(self->source->fd, O_WRONLY);
	path = open("/proc/self", O_PATH | O_CLOEXEC);
	other = open("/dev/null", O_RDWR | O_CLOEXEC);
	ASSERT_LE(0, reader);
	ASSERT_LE(0, writer);
	ASSERT_LE(0, path);
	ASSERT_LE(0, other);
	EXPECT_EQ(-EACCES, device_fork_on(read_only, self->source->fd, 40, 1, 100));
	EXPECT_EQ(-ENOTTY, device_fork_on(self->source->fd, self->source->fd, 40, 1, 100));
	EXPECT_EQ(-EBADF, device_fork_on(node, -1, 40, 1, 100));
	EXPECT_EQ(-EBADF, device_fork_on(node, path, 40, 1, 100));
	EXPECT_EQ(-EBADF, device_fork_on(node, other, 40, 1, 100));
	EXPECT_EQ(-EBADF, device_fork_on(node, node, 40, 1, 100));
	EXPECT_EQ(-EACCES, device_fork_on(node, reader, 40, 1, 100));
	/* who cannot read a pad cannot read a fork of it either */
	EXPECT_EQ(-EACCES, device_fork_on(node, writer, 40, 1, 100));
	EXPECT_EQ(-EINVAL, device_fork_on(node, self->source->fd, 0, 1, 0));
	EXPECT_EQ(-EINVAL, device_fork_on(node, self->source->fd, 0, 1,
					  KVSCRATCH_MAX_SEQ_LEN + 1ull));
	EXPECT_EQ(-EINVAL, device_fork_on(node, self->source->fd, 40, 1, 39));
	EXPECT_EQ(-EINVAL, device_fork_on(node, self->source->fd, 41, 1, 100));
	EXPECT_EQ(-EINVAL, device_fork_on(node, self->source->fd, UINT64_MAX, 1, 100));
	EXPECT_EQ(-ECANCELED, device_fork_on(node, self->source->fd, 40, 0, 100));
	EXPECT_EQ(-ECANCELED, device_fork_on(node, self->source->fd, 40, 1 + (1ull << 32), 100));
	/* what was refused holds no floor up */
	EXPECT_EQ(0, device_truncate(self->source->fd, 0, 0));
	/* sealed, whoever can read it may */
	ASSERT_EQ(0, device_seal(self->source->fd));
	self->child->fd = device_fork_on(node, reader, 0, 2, 100);
	EXPECT_LE(0, self->child->fd);
	EXPECT_EQ(-EACCES, device_fork_on(node, writer, 0, 2, 100));
	close(self->child->fd);
	close(writer);
	close(reader);
	close(path);
	close(other);
	close(read_only);
	close(node);
	close(self->source->fd);
}

TEST_F_TIMEOUT(fork, is_within_limits, TEST_SECONDS)
{
	struct kvscratch_pad_info info;
	const uint64_t per_pad = number_in_file(MAX_PER_PAD, NULL);
	const uint64_t total = number_in_file(MAX_TOTAL, NULL);

	if (is_fragmented())
		SKIP(return, "a second fork may find huge pages that the first one did not");
	ASSERT_TRUE(new_branch(self->source, MOST_ROWS));
	ASSERT_TRUE(append_to(self->source, MOST_ROWS / 2));
	ASSERT_TRUE(fork_branch(self->child, self->source, MOST_ROWS / 2, MOST_ROWS));
	ASSERT_EQ(0, device_pad_info(self->child->fd, &info));
	close(self->child->fd);
	/* a fork's own bytes alone count */
	set_limits(info.allocated_bytes - 1, total);
	EXPECT_EQ(-EDQUOT, device_fork(self->source->fd, MOST_ROWS / 2, 0, MOST_ROWS));
	set_limits(per_pad, bytes_total() + info.allocated_bytes - 1);
	EXPECT_EQ(-EDQUOT, device_fork(self->source->fd, MOST_ROWS / 2, 0, MOST_ROWS));
	set_limits(info.allocated_bytes, bytes_total() + info.allocated_bytes);
	EXPECT_TRUE(fork_branch(self->child, self->source, MOST_ROWS / 2, MOST_ROWS));
	close(self->child->fd);
	/* far more than there can be is told before anything is done */
	set_limits(per_pad, total);
	EXPECT_EQ(-EDQUOT, device_fork(self->source->fd, 1, 0, KVSCRATCH_MAX_SEQ_LEN));
	close(self->source->fd);
}

/* What is staged lies in the page that a fork copies. */
TEST_F_TIMEOUT(fork, shows_no_staged_row, TEST_SECONDS)
{
	uint8_t rows[8 * 1152];
	int writer;

	memset(rows, 0xa5, sizeof(rows));
	ASSERT_TRUE(new_branch(self->source, MOST_ROWS));
	ASSERT_TRUE(append_to(self->source, 701));
	writer = device_open_writer(self->source->fd, 0);
	ASSERT_LE(0, writer);
	for (uint32_t plane = 0; plane < NR_PLANES; plane++)
		ASSERT_EQ(0, device_stage(writer, plane, 701, rows, 8));
	ASSERT_TRUE(fork_branch(self->child, self->source, 701, MOST_ROWS));
	EXPECT_TRUE(is_right(self->child, true));
	ASSERT_EQ(0, device_commit(writer, 709));
	EXPECT_TRUE(is_right(self->child, true));
	EXPECT_EQ(709, len_of(self->source->fd));
	close(writer);
	close(self->child->fd);
	close(self->source->fd);
}

TEST_F_TIMEOUT(fork, beside_a_stalled_writer, TEST_SECONDS)
{
	uint8_t *rows = mmap(NULL, page_bytes(), PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct child stalled;

	ASSERT_NE(MAP_FAILED, (void *)rows);
	ASSERT_TRUE(new_branch(self->source, MOST_ROWS));
	ASSERT_TRUE(append_to(self->source, 700));
	if (start_child(&stalled)) {
		int writer = device_open_writer(self->source->fd, 0);

		CHILD_CHECK(writer >= 0);
		/* it has the turn from then on, and never goes on */
		CHILD_CHECK(stop_at(rows, page_bytes()) >= 0);
		CHILD_CHECK(say(stalled.line));
		device_stage(writer, 0, 700, rows, 1);
		_exit(0);
	}
	ASSERT_TRUE(hear(stalled.line));
	ASSERT_NE(0, await_sleep(stalled.pid));
	ASSERT_TRUE(fork_branch(self->child, self->source, 700, MOST_ROWS));
	ASSERT_TRUE(append_to(self->child, 100));
	EXPECT_TRUE(is_right(self->child, true));
	kill(stalled.pid, SIGKILL);
	end_child(&stalled);
	EXPECT_TRUE(reads_right(self->source, 0));
	close(self->child->fd);
	close(self->source->fd);
	munmap(rows, page_bytes());
}

/*
 * A process forks what another one appends to and truncates: it gets exactly the rows that it
 * saw, or ECANCELED.
 */
TEST_F_TIMEOUT(fork, beside_appends_and_truncates, TEST_SECONDS)
{
	const uint32_t rounds = rounds_or(200);
	uint32_t got = 0, canceled = 0;
	struct child writer;
	uint8_t token[TOKEN_BYTES];

	ASSERT_TRUE(new_branch(self->source, MOST_ROWS));
	if (start_child(&writer)) {
		CHILD_CHECK(say(writer.line));
		/* the seed is the generation and the row: who reads knows both */
		for (uint32_t generation = 0;;) {
			uint32_t rows = 1 + generation % 97;

			for (uint32_t row = 0; row < rows; row++) {
				fill_row(token, sizeof(token), generation * 131 + row);
				CHILD_CHECK(!device_append(self->source->fd, token, sizeof(token)));
			}
			/* not while a fork has them */
			while (device_truncate(self->source->fd, 0, 0))
				sched_yield();
			generation = generation_of(self->source->fd);
		}
	}
	ASSERT_TRUE(hear(writer.line));
	for (uint32_t round = 0; round < rounds; round++) {
		struct kvscratch_pad_info info;
		int fd;

		ASSERT_EQ(0, device_pad_info(self->source->fd, &info));
		fd = device_fork(self->source->fd, info.len, info.generation, MOST_ROWS);
		if (fd == -ECANCELED) {
			canceled++;
			continue;
		}
		ASSERT_LE(0, fd);
		got++;
		ASSERT_EQ(info.len, len_of(fd));
		for (uint64_t row = 0; row < info.len; row++) {
			ASSERT_EQ(TOKEN_BYTES, pread64(fd, token, sizeof(token), row * TOKEN_BYTES));
			ASSERT_TRUE(row_is(token, sizeof(token), info.generation * 131 + row))
				TH_LOG("row %u of %u, generation %u", (uint32_t)row,
				       (uint32_t)info.len, (uint32_t)info.generation);
		}
		close(fd);
	}
	EXPECT_LT(0, got);
	printf("# %u forks, %u canceled\n", got, canceled);
	kill(writer.pid, SIGKILL);
	end_child(&writer);
	close(self->source->fd);
}

#define MANY_PLANES 256
#define SMALL_DIM 60

/* Of a writer that replaces three rows, as soon as it may once @patience is over */
static void replace_rows(int fd, uint8_t *token, size_t bytes, const uint32_t *patience, int line)
{
	CHILD_CHECK(say(line));
	for (;;) {
		uint64_t generation = generation_of(fd);

		for (uint32_t row = 0; row < 3; row++) {
			fill_row(token, bytes, generation * 3 + row);
			CHILD_CHECK(!device_append(fd, token, bytes));
		}
		for (uint32_t i = 0; i < __atomic_load_n(patience, __ATOMIC_RELAXED); i++)
			sched_yield();
		while (device_truncate(fd, 0, 0) == -ETXTBSY)
			sched_yield();
	}
}

/*
 * A fork counts and copies the boundary of each plane after it let go of the lock of its
 * source, whose writer may not touch it until then. Many planes take their time.
 */
TEST_F_TIMEOUT(fork, has_what_it_was_promised, TEST_SECONDS)
{
	static struct kvscratch_plane many[MANY_PLANES];
	const size_t bytes = MANY_PLANES * SMALL_DIM;
	uint8_t *token = malloc(bytes);
	/* of the writer: about as long as a fork takes */
	uint32_t *patience = mmap(NULL, page_bytes(), PROT_READ | PROT_WRITE,
				  MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct child writer;
	uint32_t got = 0;
	int fd;

	ASSERT_NE(NULL, token);
	ASSERT_NE(MAP_FAILED, (void *)patience);
	*patience = 16;
	for (size_t i = 0; i < MANY_PLANES; i++)
		many[i] = (struct kvscratch_plane){ .dim = SMALL_DIM, .dtype = KVSCRATCH_DTYPE_U8 };
	fd = device_create_planes(8, many, MANY_PLANES);
	ASSERT_LE(0, fd);
	if (start_child(&writer))
		replace_rows(fd, token, bytes, patience, writer.line);
	ASSERT_TRUE(hear(writer.line));
	while (got < 40) {
		struct kvscratch_pad_info info;
		int forked;

		ASSERT_EQ(0, device_pad_info(fd, &info));
		forked = device_fork(fd, info.len, info.generation, 8);
		ASSERT_TRUE(forked >= 0 || forked == -ECANCELED);
		__atomic_store_n(patience, forked < 0 ? *patience * 2 : *patience * 3 / 4 + 1,
				 __ATOMIC_RELAXED);
		if (forked < 0)
			continue;
		got++;
		for (uint64_t row = 0; row < info.len; row++) {
			ASSERT_EQ((ssize_t)bytes, pread64(forked, token, bytes, row * bytes));
			ASSERT_TRUE(row_is(token, bytes, info.generation * 3 + row));
		}
		close(forked);
	}
	kill(writer.pid, SIGKILL);
	end_child(&writer);
	munmap(patience, page_bytes());
	free(token);
	close(fd);
}

/* Killed at any moment it leaves nothing: neither memory nor a floor. */
TEST_F_TIMEOUT(fork, killed_leaves_nothing, TEST_SECONDS)
{
	uint64_t before;

	ASSERT_TRUE(new_branch(self->source, MOST_ROWS));
	ASSERT_TRUE(append_to(self->source, CHUNK_ROWS + 500));
	before = bytes_total();
	for (int round = 0; round < 20; round++) {
		struct child child;

		if (start_child(&child)) {
			CHILD_CHECK(say(child.line));
			for (;;)
				close(device_fork(self->source->fd, self->source->len, 0,
						  MOST_ROWS));
		}
		ASSERT_TRUE(hear(child.line));
		for (int i = 0; i < round; i++)
			sched_yield();
		kill(child.pid, SIGKILL);
		EXPECT_EQ(128 + SIGKILL, end_child(&child));
		EXPECT_EQ(before, bytes_total());
	}
	EXPECT_TRUE(truncate_to(self->source, 0, 0));
	close(self->source->fd);
}

/* Counts its forks of @rows rows, of which it keeps the last. */
static void fork_for_ever(int fd, uint32_t rows, uint32_t *forks)
{
	int last = -1;

	for (;;) {
		int next = device_fork(fd, rows, generation_of(fd), rows);

		/* the other one truncates now and then */
		if (next < 0)
			continue;
		close(last);
		last = next;
		__atomic_fetch_add(forks, 1, __ATOMIC_RELAXED);
	}
}

/*
 * A fork of a few rows lives; those of many rows are killed at any moment. While one is there
 * its rows are kept, and once it is dead no more than those that the living one needs.
 */
TEST_F_TIMEOUT(fork, lets_truncates_once_it_is_killed, TEST_SECONDS)
{
	const uint32_t rounds = rounds_or(20);
	uint32_t *forks = mmap(NULL, page_bytes(), PROT_READ | PROT_WRITE,
			       MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	const uint32_t edge = rows_kept_for_a_hundred();

	ASSERT_NE(MAP_FAILED, (void *)forks);
	ASSERT_TRUE(new_branch(self->source, MOST_ROWS));
	ASSERT_TRUE(append_to(self->source, MOST_ROWS));
	ASSERT_TRUE(fork_branch(self->child, self->source, 100, 100));
	for (uint32_t round = 0; round < rounds; round++) {
		struct child child;
		int err;

		__atomic_store_n(forks, 0, __ATOMIC_RELAXED);
		if (start_child(&child))
			fork_for_ever(self->source->fd, MOST_ROWS, forks);
		while (__atomic_load_n(forks, __ATOMIC_RELAXED) <= round % 3)
			sched_yield();
		/* it has a fork, or is between two: rows that somebody has do not go */
		err = device_truncate(self->source->fd, MOST_ROWS - 1, 0);
		EXPECT_TRUE(!err || err == -ETXTBSY);
		kill(child.pid, SIGKILL);
		EXPECT_EQ(128 + SIGKILL, end_child(&child));
		self->source->len -= !err;
		EXPECT_TRUE(truncate_to(self->source, edge, round % 2 ? KVSCRATCH_TRUNCATE_ZERO : 0));
		EXPECT_EQ(-ETXTBSY, device_truncate(self->source->fd, edge - 1, 0));
		ASSERT_TRUE(append_to(self->source, MOST_ROWS - edge));
	}
	EXPECT_TRUE(is_right(self->source, false));
	EXPECT_TRUE(is_right(self->child, true));
	close(self->child->fd);
	EXPECT_TRUE(truncate_to(self->source, 0, 0));
	close(self->source->fd);
	munmap(forks, page_bytes());
}

/* A fork of as many planes as there can be holds the lock in pieces: who may not wait, need not. */
TEST_F_TIMEOUT(fork, holds_up_no_nowait_write, TEST_SECONDS)
{
	static struct kvscratch_plane most[KVSCRATCH_MAX_PLANES];
	static uint8_t token[KVSCRATCH_MAX_PLANES];
	const struct iovec iov = { token, sizeof(token) };
	uint32_t *forks = mmap(NULL, page_bytes(), PROT_READ | PROT_WRITE,
			       MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct child child;
	int fd, writer;

	ASSERT_NE(MAP_FAILED, (void *)forks);
	for (size_t i = 0; i < KVSCRATCH_MAX_PLANES; i++)
		most[i] = (struct kvscratch_plane){ .dim = 1, .dtype = KVSCRATCH_DTYPE_U8 };
	fd = device_create_planes(4000, most, KVSCRATCH_MAX_PLANES);
	ASSERT_LE(0, fd);
	ASSERT_EQ(0, device_append(fd, token, sizeof(token)));
	if (start_child(&child))
		fork_for_ever(fd, 1, forks);
	/* a STAGE of one byte most of the time: a write holds the lock as long as a fork */
	writer = device_open_writer(fd, KVSCRATCH_OPEN_WRITER);
	ASSERT_LE(0, writer);
	ASSERT_EQ(0, fcntl(writer, F_SETFL, O_NONBLOCK));
	for (uint32_t i = 0, len = 1; __atomic_load_n(forks, __ATOMIC_RELAXED) < 5; i++) {
		ASSERT_EQ(0, device_stage(writer, 0, len, token, 1));
		if (i % 4096)
			continue;
		ASSERT_EQ((ssize_t)sizeof(token), pwritev2(writer, &iov, 1, -1, RWF_NOWAIT));
		len++;
	}
	kill(child.pid, SIGKILL);
	EXPECT_EQ(128 + SIGKILL, end_child(&child));
	close(writer);
	close(fd);
	munmap(forks, page_bytes());
}

TEST_HARNESS_MAIN
