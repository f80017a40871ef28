// SPDX-License-Identifier: GPL-2.0-only
/*
 * KUnit suite of the pad core, driven through iov_iter without any file.
 *
 * It uses what KUnit of Linux 6.1 has: tests run in a kernel thread without
 * user memory, so copies that fail half-way are tested from user space.
 */

#include <kunit/test.h>
#include <linux/module.h>
#include <linux/seq_file.h>
#include <linux/slab.h>

#include "../kvscratch.h"
#include "scale_golden.h"

static ssize_t append(struct kvs_pad *pad, const void *rows, size_t bytes)
{
	struct kvec vec = { .iov_base = (void *)rows, .iov_len = bytes };
	struct kvs_handle handle = { .pad = pad };
	struct iov_iter iter;

	iov_iter_kvec(&iter, ITER_SOURCE, &vec, 1, bytes);
	return kvs_pad_append(&handle, &iter, false);
}

static ssize_t read_at(struct kvs_pad *pad, u64 pos, void *to, size_t bytes)
{
	struct kvec vec = { .iov_base = to, .iov_len = bytes };
	struct iov_iter iter;

	iov_iter_kvec(&iter, ITER_DEST, &vec, 1, bytes);
	return kvs_pad_read(pad, pos, &iter);
}

static int truncate(struct kvs_pad *pad, u64 len, u32 flags)
{
	struct kvscratch_truncate truncate = { .len = len, .flags = flags };
	struct kvs_handle handle = { .pad = pad };

	return kvs_pad_truncate(&handle, &truncate, false);
}

/* Byte @at of an array, and how many follow it in its page */
static void *array_at(const struct kvs_array *array, u64 at, size_t *bytes)
{
	*bytes = min_t(size_t, *bytes, PAGE_SIZE - offset_in_page(at));
	return page_address(kvs_array_page(array, at >> PAGE_SHIFT)) + offset_in_page(at);
}

/* The beginning of one, up to the end of its first page */
static void *start_of(const struct kvs_array *array)
{
	size_t bytes = 1;

	return array_at(array, 0, &bytes);
}

static struct page *pad_page(const struct kvs_pad *pad, u64 index)
{
	bool is_piece;

	return kvs_pad_page(pad, index, &is_piece);
}

static void *data_of(const struct kvs_pad *pad)
{
	return start_of(&pad->planes[0].data);
}

/* Whether @bytes of an array are those expected, or with NULL zero */
static bool array_is(const struct kvs_array *array, u64 at, const void *expected, size_t bytes)
{
	while (bytes) {
		size_t piece = bytes;
		const void *got = array_at(array, at, &piece);

		if (expected ? memcmp(got, expected, piece) : !!memchr_inv(got, 0, piece))
			return false;
		if (expected)
			expected += piece;
		at += piece;
		bytes -= piece;
	}
	return true;
}

static struct kvscratch_pad_info info_of(struct kvs_pad *pad)
{
	struct kvscratch_pad_info info = {};

	kvs_pad_info(pad, &info);
	return info;
}

/* Every byte depends on the row and on its place, so that no mix-up is silent. */
static void fill_rows(u8 *to, u64 first_row, u64 rows, u32 row_bytes)
{
	u64 row;
	u32 i;

	for (row = first_row; row < first_row + rows; row++)
		for (i = 0; i < row_bytes; i++)
			*to++ = (u8)(row * 31 + i * 7 + (i >> 8) + 1);
}

static bool rows_are(const void *at, u64 first_row, u64 rows, u32 row_bytes)
{
	u8 *expected = kmalloc(row_bytes, GFP_KERNEL);
	bool same = !!expected;
	u64 i;

	for (i = 0; same && i < rows; i++) {
		fill_rows(expected, first_row + i, 1, row_bytes);
		same = !memcmp(at + i * row_bytes, expected, row_bytes);
	}
	kfree(expected);
	return same;
}

/* The pad of a test and the sum of the limits before it */
struct fixture {
	struct kvs_pad *pad;
	u64 reserved_before;
	u8 *rows;
};

#define FIXTURE_ROWS		10
#define FIXTURE_DIM		4
#define FIXTURE_ROW_BYTES	16

static struct kvs_pad *new_pad(u64 max_seq_len, u32 dim, u32 dtype)
{
	struct kvscratch_create create = { .max_seq_len = max_seq_len, .nr_planes = 1 };
	struct kvscratch_plane plane = { .dim = dim, .dtype = dtype };

	return kvs_pad_create(&create, &plane);
}

static bool init_layout(struct kvs_layout *layout, u64 max_seq_len, u32 dim, u32 dtype)
{
	struct kvscratch_plane plane = { .dim = dim, .dtype = dtype };

	return kvs_layout_init(layout, &plane, 1, max_seq_len, PAGE_SIZE);
}

static int kvs_test_init(struct kunit *test)
{
	struct fixture *f = kunit_kzalloc(test, sizeof(*f), GFP_KERNEL);

	KUNIT_ASSERT_NOT_NULL(test, f);
	f->reserved_before = kvs_reserved();
	f->rows = kunit_kzalloc(test, (FIXTURE_ROWS + 1) * FIXTURE_ROW_BYTES, GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, f->rows);
	fill_rows(f->rows, 0, FIXTURE_ROWS + 1, FIXTURE_ROW_BYTES);
	f->pad = new_pad(FIXTURE_ROWS, FIXTURE_DIM, KVSCRATCH_DTYPE_F32);
	KUNIT_ASSERT_FALSE(test, IS_ERR(f->pad));
	test->priv = f;
	return 0;
}

static void kvs_test_exit(struct kunit *test)
{
	struct fixture *f = test->priv;

	if (!f)
		return;
	kvs_pad_put(f->pad);
	KUNIT_EXPECT_EQ(test, kvs_reserved(), f->reserved_before);
}

/* The rows of the Scratchpad model, one test each */

static void model_new(struct kunit *test)
{
	struct fixture *f = test->priv;
	struct kvscratch_pad_info info = info_of(f->pad);

	KUNIT_EXPECT_EQ(test, info.len, 0);
	KUNIT_EXPECT_EQ(test, info.max_seq_len, FIXTURE_ROWS);
	KUNIT_EXPECT_EQ(test, info.row_bytes, FIXTURE_ROW_BYTES);
	KUNIT_EXPECT_EQ(test, info.input_row_bytes, FIXTURE_ROW_BYTES);
	KUNIT_EXPECT_EQ(test, info.generation, 0);
	KUNIT_EXPECT_EQ(test, info.status_offset, PAGE_SIZE);
	KUNIT_EXPECT_EQ(test, info.mapping_bytes, 2 * PAGE_SIZE);
	KUNIT_EXPECT_EQ(test, info.nr_planes, 1);
	KUNIT_EXPECT_EQ(test, info.flags, 0);
	KUNIT_EXPECT_EQ(test, info.epoch, 0);
	KUNIT_EXPECT_NULL(test, memchr_inv(data_of(f->pad), 0, PAGE_SIZE));
}

static void model_append(struct kunit *test)
{
	struct fixture *f = test->priv;

	KUNIT_EXPECT_EQ(test, append(f->pad, f->rows, FIXTURE_ROW_BYTES), FIXTURE_ROW_BYTES);
	KUNIT_EXPECT_EQ(test, info_of(f->pad).len, 1);
	KUNIT_EXPECT_TRUE(test, rows_are(data_of(f->pad), 0, 1, FIXTURE_ROW_BYTES));
}

static void model_append_tensor(struct kunit *test)
{
	struct fixture *f = test->priv;

	KUNIT_EXPECT_EQ(test, append(f->pad, f->rows, FIXTURE_ROW_BYTES), FIXTURE_ROW_BYTES);
	KUNIT_EXPECT_EQ(test, append(f->pad, f->rows + FIXTURE_ROW_BYTES, 3 * FIXTURE_ROW_BYTES),
			3 * FIXTURE_ROW_BYTES);
	KUNIT_EXPECT_EQ(test, info_of(f->pad).len, 4);
	KUNIT_EXPECT_TRUE(test, rows_are(data_of(f->pad), 0, 4, FIXTURE_ROW_BYTES));
}

/* What a view maps are these very pages, in this order, and nothing behind them. */
static void model_as_tensor(struct kunit *test)
{
	struct fixture *f = test->priv;

	KUNIT_EXPECT_PTR_EQ(test, page_address(pad_page(f->pad, 0)), data_of(f->pad));
	KUNIT_EXPECT_PTR_EQ(test, page_address(pad_page(f->pad, 1)), (void *)f->pad->status);
	KUNIT_EXPECT_PTR_EQ(test, pad_page(f->pad, 2), (struct page *)NULL);
	KUNIT_EXPECT_PTR_EQ(test, pad_page(f->pad, U64_MAX >> PAGE_SHIFT),
			    (struct page *)NULL);
}

static void model_status_page(struct kunit *test)
{
	struct fixture *f = test->priv;
	const struct kvscratch_status *status = f->pad->status;

	KUNIT_EXPECT_EQ(test, status->magic, KVSCRATCH_STATUS_MAGIC);
	KUNIT_EXPECT_EQ(test, status->version, KVSCRATCH_STATUS_VERSION);
	KUNIT_EXPECT_EQ(test, status->max_seq_len, FIXTURE_ROWS);
	KUNIT_EXPECT_EQ(test, status->nr_planes, 1);
	KUNIT_EXPECT_EQ(test, status->row_bytes, FIXTURE_ROW_BYTES);
	KUNIT_EXPECT_NULL(test, memchr_inv(&status->state, 0, PAGE_SIZE - 64));
}

static void model_status_words(struct kunit *test)
{
	struct fixture *f = test->priv;
	const struct kvscratch_status *status = f->pad->status;

	KUNIT_EXPECT_EQ(test, append(f->pad, f->rows, 5 * FIXTURE_ROW_BYTES),
			5 * FIXTURE_ROW_BYTES);
	KUNIT_EXPECT_EQ(test, status->state.word, kvs_state(0, 5));
	KUNIT_EXPECT_EQ(test, status->state.half[KVSCRATCH_WORD_LEN], 5);
	KUNIT_EXPECT_EQ(test, truncate(f->pad, 2, 0), 0);
	KUNIT_EXPECT_EQ(test, status->state.word, kvs_state(1, 2));
	KUNIT_EXPECT_EQ(test, status->state.half[KVSCRATCH_WORD_GENERATION], 1);
	KUNIT_EXPECT_EQ(test, status->trunc.word, kvs_state(1, 2));
	KUNIT_EXPECT_EQ(test, append(f->pad, f->rows, FIXTURE_ROW_BYTES), FIXTURE_ROW_BYTES);
	KUNIT_EXPECT_EQ(test, status->state.word, kvs_state(1, 3));
	KUNIT_EXPECT_EQ(test, status->trunc.word, kvs_state(1, 2));
	KUNIT_EXPECT_EQ(test, status->generation, 1);
	KUNIT_EXPECT_EQ(test, status->writer.word, 0);
	/* nothing else is on the page */
	KUNIT_EXPECT_NULL(test, memchr_inv(status + 1, 0, PAGE_SIZE - sizeof(*status)));
}

/* What the page says is not believed where it would lead out of the pad. */
static void a_len_on_the_page_is_clamped(struct kunit *test)
{
	struct fixture *f = test->priv;
	u8 row[FIXTURE_ROW_BYTES];

	append(f->pad, f->rows, 3 * FIXTURE_ROW_BYTES);
	f->pad->status->state.word = kvs_state(0, U32_MAX);
	KUNIT_EXPECT_EQ(test, info_of(f->pad).len, FIXTURE_ROWS);
	KUNIT_EXPECT_EQ(test, read_at(f->pad, (FIXTURE_ROWS - 1) * FIXTURE_ROW_BYTES, row,
				      sizeof(row)), FIXTURE_ROW_BYTES);
	KUNIT_EXPECT_EQ(test, read_at(f->pad, FIXTURE_ROWS * FIXTURE_ROW_BYTES, row, sizeof(row)),
			0);
	/* nor is it what counts: that is the pad's own */
	KUNIT_EXPECT_EQ(test, append(f->pad, f->rows, FIXTURE_ROW_BYTES), FIXTURE_ROW_BYTES);
	KUNIT_EXPECT_EQ(test, info_of(f->pad).len, 4);
}

static void model_get_token(struct kunit *test)
{
	struct fixture *f = test->priv;
	u8 row[FIXTURE_ROW_BYTES];
	u64 i;

	append(f->pad, f->rows, 3 * FIXTURE_ROW_BYTES);
	for (i = 0; i < 3; i++) {
		KUNIT_EXPECT_EQ(test, read_at(f->pad, i * FIXTURE_ROW_BYTES, row, sizeof(row)),
				FIXTURE_ROW_BYTES);
		KUNIT_EXPECT_TRUE(test, rows_are(row, i, 1, FIXTURE_ROW_BYTES));
	}
	KUNIT_EXPECT_EQ(test, read_at(f->pad, 3 * FIXTURE_ROW_BYTES, row, sizeof(row)), 0);
}

static void model_clear(struct kunit *test)
{
	struct fixture *f = test->priv;

	append(f->pad, f->rows, FIXTURE_ROWS * FIXTURE_ROW_BYTES);
	KUNIT_EXPECT_EQ(test, truncate(f->pad, 0, 0), 0);
	KUNIT_EXPECT_EQ(test, info_of(f->pad).len, 0);
	KUNIT_EXPECT_EQ(test, info_of(f->pad).max_seq_len, FIXTURE_ROWS);
	KUNIT_EXPECT_EQ(test, append(f->pad, f->rows + FIXTURE_ROW_BYTES, FIXTURE_ROW_BYTES),
			FIXTURE_ROW_BYTES);
	KUNIT_EXPECT_TRUE(test, rows_are(data_of(f->pad), 1, 1, FIXTURE_ROW_BYTES));
}

static void model_truncate(struct kunit *test)
{
	struct fixture *f = test->priv;

	append(f->pad, f->rows, 6 * FIXTURE_ROW_BYTES);
	KUNIT_EXPECT_EQ(test, truncate(f->pad, 7, 0), -EINVAL);
	KUNIT_EXPECT_EQ(test, info_of(f->pad).generation, 0);
	KUNIT_EXPECT_EQ(test, truncate(f->pad, BIT_ULL(32), 0), -EINVAL);
	KUNIT_EXPECT_EQ(test, truncate(f->pad, 4, 0), 0);
	KUNIT_EXPECT_EQ(test, info_of(f->pad).len, 4);
	KUNIT_EXPECT_EQ(test, info_of(f->pad).trunc_len, 4);
	KUNIT_EXPECT_EQ(test, info_of(f->pad).generation, 1);
	/* dropping nothing is a generation too */
	KUNIT_EXPECT_EQ(test, truncate(f->pad, 4, 0), 0);
	KUNIT_EXPECT_EQ(test, info_of(f->pad).generation, 2);
	KUNIT_EXPECT_TRUE(test, rows_are(data_of(f->pad), 0, 4, FIXTURE_ROW_BYTES));
}

static void model_clone_shares(struct kunit *test)
{
	struct fixture *f = test->priv;
	struct kvs_pad *clone = kvs_pad_get(f->pad);

	append(clone, f->rows, FIXTURE_ROW_BYTES);
	KUNIT_EXPECT_EQ(test, info_of(f->pad).len, 1);
	kvs_pad_put(clone);
	/* one reference is left: the pad is alive and charged */
	KUNIT_EXPECT_GT(test, kvs_reserved(), f->reserved_before);
	KUNIT_EXPECT_EQ(test, info_of(f->pad).len, 1);
}

static void model_display(struct kunit *test)
{
	struct fixture *f = test->priv;
	static char text[512];
	struct seq_file m = { .buf = text, .size = sizeof(text) };

	append(f->pad, f->rows, 3 * FIXTURE_ROW_BYTES);
	kvs_pad_show(f->pad, &m);
	KUNIT_EXPECT_NOT_NULL(test, strstr(text, "kvscratch-len:\t3\n"));
	KUNIT_EXPECT_NOT_NULL(test, strstr(text, "kvscratch-dtype:\tf32\n"));
	KUNIT_EXPECT_NOT_NULL(test, strstr(text, "kvscratch-generation:\t0\n"));
}

/* Failures */

struct snapshot {
	struct kvscratch_pad_info info;
	struct kvscratch_status status;
	u8 data[FIXTURE_ROWS * FIXTURE_ROW_BYTES];
};

static void take_snapshot(struct kvs_pad *pad, struct snapshot *snapshot)
{
	memset(snapshot, 0, sizeof(*snapshot));
	kvs_pad_info(pad, &snapshot->info);
	snapshot->status = *pad->status;
	memcpy(snapshot->data, data_of(pad), sizeof(snapshot->data));
}

static void failures_change_nothing(struct kunit *test)
{
	/* not a user address: the copy fails at once, also without an mm */
	struct iovec bad = { .iov_base = (void __user *)-4096L, .iov_len = FIXTURE_ROW_BYTES };
	struct fixture *f = test->priv;
	struct snapshot *snapshots = kunit_kzalloc(test, 2 * sizeof(*snapshots), GFP_KERNEL);
	struct kvs_handle handle = { .pad = f->pad };
	struct iov_iter iter;

	KUNIT_ASSERT_NOT_NULL(test, snapshots);
	append(f->pad, f->rows, 9 * FIXTURE_ROW_BYTES);
	take_snapshot(f->pad, &snapshots[0]);

	KUNIT_EXPECT_EQ(test, append(f->pad, f->rows, 0), 0);
	KUNIT_EXPECT_EQ(test, append(f->pad, f->rows, 1), -EINVAL);
	KUNIT_EXPECT_EQ(test, append(f->pad, f->rows, FIXTURE_ROW_BYTES - 1), -EINVAL);
	KUNIT_EXPECT_EQ(test, append(f->pad, f->rows, FIXTURE_ROW_BYTES + 1), -EINVAL);
	KUNIT_EXPECT_EQ(test, append(f->pad, f->rows, 2 * FIXTURE_ROW_BYTES), -ENOSPC);
	KUNIT_EXPECT_EQ(test, append(f->pad, f->rows, MAX_RW_COUNT), -EINVAL);
	KUNIT_EXPECT_EQ(test, append(f->pad, f->rows, MAX_RW_COUNT - FIXTURE_ROW_BYTES), -ENOSPC);
	iov_iter_init(&iter, ITER_SOURCE, &bad, 1, bad.iov_len);
	KUNIT_EXPECT_EQ(test, kvs_pad_append(&handle, &iter, false), -EFAULT);
	KUNIT_EXPECT_EQ(test, iov_iter_count(&iter), FIXTURE_ROW_BYTES);
	KUNIT_EXPECT_EQ(test, truncate(f->pad, 10, KVSCRATCH_TRUNCATE_ZERO), -EINVAL);

	take_snapshot(f->pad, &snapshots[1]);
	KUNIT_EXPECT_EQ(test, memcmp(&snapshots[0], &snapshots[1], sizeof(*snapshots)), 0);
	/* and the pad goes on working */
	KUNIT_EXPECT_EQ(test, append(f->pad, f->rows + 9 * FIXTURE_ROW_BYTES, FIXTURE_ROW_BYTES),
			FIXTURE_ROW_BYTES);
	KUNIT_EXPECT_TRUE(test, rows_are(data_of(f->pad), 0, 10, FIXTURE_ROW_BYTES));
	KUNIT_EXPECT_EQ(test, append(f->pad, f->rows, FIXTURE_ROW_BYTES), -ENOSPC);
}

static void nowait_does_not_wait(struct kunit *test)
{
	struct fixture *f = test->priv;
	struct kvec vec = { .iov_base = f->rows, .iov_len = FIXTURE_ROW_BYTES };
	struct kvs_handle handle = { .pad = f->pad };
	/* somebody's operation: only its address counts */
	struct kvs_op *turn = (void *)&vec;
	struct iov_iter iter;

	iov_iter_kvec(&iter, ITER_SOURCE, &vec, 1, FIXTURE_ROW_BYTES);
	mutex_lock(&f->pad->lock);
	f->pad->turn = turn;
	mutex_unlock(&f->pad->lock);
	KUNIT_EXPECT_EQ(test, kvs_pad_append(&handle, &iter, true), -EAGAIN);
	KUNIT_EXPECT_EQ(test, kvs_pad_seal(&handle, true), -EAGAIN);
	KUNIT_EXPECT_EQ(test, kvs_pad_take_role(&handle, false, true), -EAGAIN);
	/* readers are not concerned */
	KUNIT_EXPECT_EQ(test, info_of(f->pad).len, 0);
	KUNIT_EXPECT_EQ(test, read_at(f->pad, 0, f->rows, 1), 0);
	mutex_lock(&f->pad->lock);
	f->pad->turn = NULL;
	mutex_unlock(&f->pad->lock);
	KUNIT_EXPECT_EQ(test, kvs_pad_append(&handle, &iter, true), FIXTURE_ROW_BYTES);
}

static void zero_scrubs_dropped_rows(struct kunit *test)
{
	struct fixture *f = test->priv;
	const void *base = data_of(f->pad);

	append(f->pad, f->rows, 8 * FIXTURE_ROW_BYTES);
	/* dropped without ZERO: a later ZERO still knows how far rows reached */
	KUNIT_EXPECT_EQ(test, truncate(f->pad, 2, 0), 0);
	append(f->pad, f->rows + 2 * FIXTURE_ROW_BYTES, FIXTURE_ROW_BYTES);
	KUNIT_EXPECT_NOT_NULL(test, memchr_inv(base + 3 * FIXTURE_ROW_BYTES, 0,
					       PAGE_SIZE - 3 * FIXTURE_ROW_BYTES));
	KUNIT_EXPECT_EQ(test, truncate(f->pad, 3, KVSCRATCH_TRUNCATE_ZERO), 0);
	KUNIT_EXPECT_TRUE(test, rows_are(base, 0, 3, FIXTURE_ROW_BYTES));
	KUNIT_EXPECT_NULL(test, memchr_inv(base + 3 * FIXTURE_ROW_BYTES, 0,
					   PAGE_SIZE - 3 * FIXTURE_ROW_BYTES));
	KUNIT_EXPECT_EQ(test, truncate(f->pad, 0, KVSCRATCH_TRUNCATE_ZERO), 0);
	KUNIT_EXPECT_NULL(test, memchr_inv(base, 0, PAGE_SIZE));
}

static void generation_wraps_into_the_high_half(struct kunit *test)
{
	struct fixture *f = test->priv;

	append(f->pad, f->rows, 2 * FIXTURE_ROW_BYTES);
	mutex_lock(&f->pad->lock);
	f->pad->generation = U32_MAX - 1;
	mutex_unlock(&f->pad->lock);
	KUNIT_EXPECT_EQ(test, truncate(f->pad, 2, 0), 0);
	KUNIT_EXPECT_EQ(test, info_of(f->pad).generation, U32_MAX);
	KUNIT_EXPECT_EQ(test, truncate(f->pad, 1, 0), 0);
	KUNIT_EXPECT_EQ(test, info_of(f->pad).generation, BIT_ULL(32));
	KUNIT_EXPECT_EQ(test, f->pad->status->state.word, kvs_state(0, 1));
	KUNIT_EXPECT_EQ(test, f->pad->status->generation, BIT_ULL(32));
	KUNIT_EXPECT_EQ(test, info_of(f->pad).len, 1);
}

/* The role of the writer, and what it stages */

static int stage(struct kvs_handle *handle, u64 row, const void *rows, u64 nr_rows, u32 flags)
{
	struct kvscratch_stage stage = { .row = row, .rows = nr_rows, .flags = flags };
	struct kvec vec = {
		.iov_base = (void *)rows,
		.iov_len = nr_rows * FIXTURE_ROW_BYTES,
	};
	struct iov_iter iter;

	iov_iter_kvec(&iter, ITER_SOURCE, &vec, 1, vec.iov_len);
	return kvs_pad_stage(handle, &stage, &iter, false);
}

#define KEEP KVSCRATCH_STAGE_KEEP

static void only_the_writer_changes_the_pad(struct kunit *test)
{
	struct fixture *f = test->priv;
	struct kvs_handle writer = { .pad = f->pad }, other = writer, successor = writer;

	KUNIT_EXPECT_EQ(test, stage(&writer, 0, f->rows, 1, 0), -ENOLCK);
	KUNIT_EXPECT_EQ(test, kvs_pad_commit(&writer, 0, false), -ENOLCK);
	KUNIT_EXPECT_EQ(test, kvs_pad_take_role(&writer, false, false), 0);
	KUNIT_EXPECT_EQ(test, info_of(f->pad).flags, KVSCRATCH_PAD_WRITER);
	KUNIT_EXPECT_EQ(test, info_of(f->pad).epoch, 1);
	KUNIT_EXPECT_EQ(test, kvs_pad_take_role(&other, false, false), -EBUSY);
	KUNIT_EXPECT_EQ(test, append(f->pad, f->rows, FIXTURE_ROW_BYTES), -EBUSY);
	KUNIT_EXPECT_EQ(test, truncate(f->pad, 0, 0), -EBUSY);
	KUNIT_EXPECT_EQ(test, kvs_pad_seal(&other, false), -EBUSY);
	KUNIT_EXPECT_EQ(test, stage(&other, 0, f->rows, 1, 0), -ENOLCK);
	KUNIT_EXPECT_EQ(test, kvs_pad_take_role(&successor, true, false), 0);
	KUNIT_EXPECT_EQ(test, f->pad->status->writer.word, kvs_state(2, KVSCRATCH_PAD_WRITER));
	KUNIT_EXPECT_EQ(test, stage(&writer, 0, f->rows, 1, 0), -ESTALE);
	KUNIT_EXPECT_EQ(test, kvs_pad_commit(&writer, 0, false), -ESTALE);
	KUNIT_EXPECT_EQ(test, kvs_pad_seal(&writer, false), -ESTALE);
	/* the end of a handle that is the writer no more ends nothing */
	kvs_pad_end_role(&writer);
	KUNIT_EXPECT_EQ(test, append(f->pad, f->rows, FIXTURE_ROW_BYTES), -EBUSY);
	kvs_pad_end_role(&successor);
	KUNIT_EXPECT_EQ(test, info_of(f->pad).flags, 0);
	KUNIT_EXPECT_EQ(test, append(f->pad, f->rows, FIXTURE_ROW_BYTES), FIXTURE_ROW_BYTES);
}

static void staged_rows_are_committed(struct kunit *test)
{
	struct fixture *f = test->priv;
	struct kvs_handle writer = { .pad = f->pad };

	append(f->pad, f->rows, 2 * FIXTURE_ROW_BYTES);
	KUNIT_ASSERT_EQ(test, kvs_pad_take_role(&writer, false, false), 0);
	KUNIT_EXPECT_EQ(test, stage(&writer, 1, f->rows, 1, 0), -EINVAL);
	KUNIT_EXPECT_EQ(test, stage(&writer, 3, f->rows, 1, 0), -EINVAL);
	KUNIT_EXPECT_EQ(test, stage(&writer, 2, f->rows, 9, 0), -ENOSPC);
	KUNIT_EXPECT_EQ(test, stage(&writer, 2, f->rows + 2 * FIXTURE_ROW_BYTES, 4, 0), 0);
	/* there for whoever looks, and not committed */
	KUNIT_EXPECT_TRUE(test, rows_are(data_of(f->pad), 0, 6, FIXTURE_ROW_BYTES));
	KUNIT_EXPECT_EQ(test, info_of(f->pad).len, 2);
	KUNIT_EXPECT_EQ(test, kvs_pad_commit(&writer, 7, false), -EINVAL);
	KUNIT_EXPECT_EQ(test, kvs_pad_commit(&writer, 1, false), -EINVAL);
	KUNIT_EXPECT_EQ(test, kvs_pad_commit(&writer, BIT_ULL(32) + 3, false), -EINVAL);
	KUNIT_EXPECT_EQ(test, kvs_pad_commit(&writer, 4, false), 0);
	KUNIT_EXPECT_EQ(test, info_of(f->pad).len, 4);
	KUNIT_EXPECT_EQ(test, info_of(f->pad).generation, 0);
	/* what was staged beyond is dropped, but lies there */
	KUNIT_EXPECT_EQ(test, kvs_pad_commit(&writer, 5, false), -EINVAL);
	KUNIT_EXPECT_EQ(test, stage(&writer, 4, NULL, 3, KEEP), -EINVAL);
	KUNIT_EXPECT_EQ(test, stage(&writer, 4, NULL, 2, KEEP), 0);
	KUNIT_EXPECT_EQ(test, kvs_pad_commit(&writer, 6, false), 0);
	KUNIT_EXPECT_TRUE(test, rows_are(data_of(f->pad), 0, 6, FIXTURE_ROW_BYTES));
	kvs_pad_end_role(&writer);
}

/* What a failed copy, ZERO and a new role leave for KEEP */
static void whole_is_lowered(struct kunit *test)
{
	struct iovec bad = { .iov_base = (void __user *)-4096L, .iov_len = FIXTURE_ROW_BYTES };
	struct kvscratch_stage third = { .row = 2, .rows = 1 };
	struct fixture *f = test->priv;
	struct kvs_handle writer = { .pad = f->pad }, successor = writer, third_writer = writer;
	struct iov_iter iter;

	KUNIT_ASSERT_EQ(test, kvs_pad_take_role(&writer, false, false), 0);
	KUNIT_EXPECT_EQ(test, stage(&writer, 0, f->rows, 6, 0), 0);
	iov_iter_init(&iter, ITER_SOURCE, &bad, 1, bad.iov_len);
	KUNIT_EXPECT_EQ(test, kvs_pad_stage(&writer, &third, &iter, false), -EFAULT);
	KUNIT_EXPECT_EQ(test, kvs_pad_commit(&writer, 3, false), -EINVAL);
	KUNIT_EXPECT_EQ(test, stage(&writer, 2, NULL, 1, KEEP), -EINVAL);
	KUNIT_EXPECT_EQ(test, kvs_pad_commit(&writer, 2, false), 0);
	KUNIT_EXPECT_EQ(test, stage(&writer, 2, f->rows, 2, 0), 0);
	KUNIT_EXPECT_EQ(test, kvs_pad_commit(&writer, 2, false), 0);
	KUNIT_EXPECT_EQ(test, stage(&writer, 2, NULL, 2, KEEP), 0);
	KUNIT_EXPECT_EQ(test, kvs_pad_take_role(&successor, true, false), 0);
	KUNIT_EXPECT_EQ(test, stage(&successor, 2, NULL, 1, KEEP), -EINVAL);
	KUNIT_EXPECT_EQ(test, stage(&successor, 2, f->rows, 2, 0), 0);
	kvs_pad_end_role(&successor);
	KUNIT_EXPECT_EQ(test, truncate(f->pad, 1, KVSCRATCH_TRUNCATE_ZERO), 0);
	KUNIT_EXPECT_EQ(test, kvs_pad_take_role(&third_writer, false, false), 0);
	KUNIT_EXPECT_EQ(test, stage(&third_writer, 1, NULL, 1, KEEP), -EINVAL);
	KUNIT_EXPECT_NULL(test, memchr_inv(data_of(f->pad) + FIXTURE_ROW_BYTES, 0,
					   PAGE_SIZE - FIXTURE_ROW_BYTES));
	kvs_pad_end_role(&third_writer);
}

static void a_sealed_pad_is_final(struct kunit *test)
{
	struct kvscratch_truncate expected = { .flags = KVSCRATCH_TRUNCATE_EXPECT };
	struct fixture *f = test->priv;
	struct kvs_handle handle = { .pad = f->pad }, writer = handle;

	append(f->pad, f->rows, 2 * FIXTURE_ROW_BYTES);
	KUNIT_EXPECT_EQ(test, kvs_pad_truncate(&handle, &expected, false), -ECANCELED);
	KUNIT_EXPECT_EQ(test, info_of(f->pad).generation, 0);
	KUNIT_ASSERT_EQ(test, kvs_pad_take_role(&writer, false, false), 0);
	KUNIT_EXPECT_EQ(test, stage(&writer, 2, f->rows, 2, 0), 0);
	KUNIT_EXPECT_EQ(test, kvs_pad_seal(&writer, false), 0);
	KUNIT_EXPECT_EQ(test, kvs_pad_seal(&writer, false), 0);
	KUNIT_EXPECT_EQ(test, kvs_pad_seal(&handle, false), 0);
	KUNIT_EXPECT_EQ(test, kvs_pad_commit(&writer, 3, false), -EROFS);
	KUNIT_EXPECT_EQ(test, append(f->pad, f->rows, FIXTURE_ROW_BYTES), -EROFS);
	KUNIT_EXPECT_EQ(test, truncate(f->pad, 0, 0), -EROFS);
	KUNIT_EXPECT_EQ(test, kvs_pad_take_role(&handle, true, false), -EROFS);
	KUNIT_EXPECT_EQ(test, info_of(f->pad).len, 2);
	KUNIT_EXPECT_EQ(test, info_of(f->pad).flags, KVSCRATCH_PAD_SEALED | KVSCRATCH_PAD_WRITER);
	kvs_pad_end_role(&writer);
	KUNIT_EXPECT_EQ(test, f->pad->status->writer.word, kvs_state(1, KVSCRATCH_PAD_SEALED));
}

/* Geometries whose rows do and do not divide a page */

struct geometry {
	u64 max_seq_len;
	u32 dim;
	u32 dtype;
	u32 row_bytes;
};

static const struct geometry geometries[] = {
	{ 1, 1, KVSCRATCH_DTYPE_U8, 1 },
	{ 5, 1, KVSCRATCH_DTYPE_F64, 8 },
	{ 10, 4, KVSCRATCH_DTYPE_F32, 16 },
	{ 300, 34, KVSCRATCH_DTYPE_U8, 34 },
	{ 33, 17, KVSCRATCH_DTYPE_BF16, 34 },
	{ 64, 288, KVSCRATCH_DTYPE_F32, 1152 },
	{ 8, 512, KVSCRATCH_DTYPE_I64, 4096 },
	{ 7, 4097, KVSCRATCH_DTYPE_I8, 4097 },
	{ 3, 5000, KVSCRATCH_DTYPE_F16, 10000 },
	{ 2, 1 << 20, KVSCRATCH_DTYPE_I32, 1 << 22 },
};

static void geometry_desc(const struct geometry *g, char *desc)
{
	snprintf(desc, KUNIT_PARAM_DESC_SIZE, "%llu rows of %u bytes", g->max_seq_len,
		 g->row_bytes);
}

KUNIT_ARRAY_PARAM(geometry, geometries, geometry_desc);

static void every_boundary(struct kunit *test)
{
	const struct geometry *g = test->param_value;
	size_t capacity = g->max_seq_len * g->row_bytes;
	const struct kvs_array *data;
	struct kvs_pad *pad;
	u8 *rows, *back;
	u64 i;

	rows = kvmalloc(capacity + g->row_bytes, GFP_KERNEL);
	back = kvmalloc(capacity + 1, GFP_KERNEL);
	pad = new_pad(g->max_seq_len, g->dim, g->dtype);
	if (!rows || !back || IS_ERR(pad)) {
		KUNIT_FAIL(test, "out of memory");
		goto out;
	}
	data = &pad->planes[0].data;
	fill_rows(rows, 0, g->max_seq_len + 1, g->row_bytes);
	KUNIT_EXPECT_EQ(test, info_of(pad).row_bytes, g->row_bytes);

	/* one row at a time, to the last, and one too many */
	for (i = 0; i < g->max_seq_len; i++)
		KUNIT_ASSERT_EQ(test, append(pad, rows + i * g->row_bytes, g->row_bytes),
				g->row_bytes);
	KUNIT_EXPECT_EQ(test, append(pad, rows, g->row_bytes), -ENOSPC);
	KUNIT_EXPECT_EQ(test, info_of(pad).len, g->max_seq_len);
	KUNIT_EXPECT_TRUE(test, array_is(data, 0, rows, capacity));

	/* one batch that fills it, after one that is a row too long */
	KUNIT_EXPECT_EQ(test, truncate(pad, 0, KVSCRATCH_TRUNCATE_ZERO), 0);
	KUNIT_EXPECT_EQ(test, append(pad, rows, capacity + g->row_bytes), -ENOSPC);
	KUNIT_EXPECT_EQ(test, info_of(pad).len, 0);
	KUNIT_EXPECT_TRUE(test, array_is(data, 0, NULL, capacity));
	KUNIT_EXPECT_EQ(test, append(pad, rows, capacity), capacity);
	KUNIT_EXPECT_TRUE(test, array_is(data, 0, rows, capacity));

	/* the byte stream ends exactly with the last row */
	KUNIT_EXPECT_EQ(test, read_at(pad, 0, back, capacity + 1), capacity);
	KUNIT_EXPECT_EQ(test, memcmp(back, rows, capacity), 0);
	KUNIT_EXPECT_EQ(test, read_at(pad, capacity - 1, back, 2), 1);
	KUNIT_EXPECT_EQ(test, back[0], rows[capacity - 1]);
	KUNIT_EXPECT_EQ(test, read_at(pad, capacity, back, 1), 0);
	KUNIT_EXPECT_EQ(test, read_at(pad, U64_MAX, back, 1), 0);

	/* what is behind the data stays untouched */
	KUNIT_EXPECT_TRUE(test, array_is(data, capacity, NULL, PAGE_ALIGN(capacity) - capacity));
	KUNIT_EXPECT_EQ(test, pad->status->magic, KVSCRATCH_STATUS_MAGIC);
out:
	if (!IS_ERR_OR_NULL(pad))
		kvs_pad_put(pad);
	kvfree(back);
	kvfree(rows);
}

/* Arithmetic, far beyond what can be allocated */

static void layout_refuses(struct kunit *test)
{
	struct kvs_layout layout;

	KUNIT_EXPECT_FALSE(test, init_layout(&layout, 1, 0, KVSCRATCH_DTYPE_U8));
	KUNIT_EXPECT_FALSE(test, init_layout(&layout, 1, 1, 0));
	KUNIT_EXPECT_FALSE(test, init_layout(&layout, 1, 1, KVSCRATCH_DTYPE_MXINT8 + 1));
	KUNIT_EXPECT_FALSE(test, init_layout(&layout, 1, 1, U32_MAX));
	KUNIT_EXPECT_FALSE(test, init_layout(&layout, 1, KVSCRATCH_MAX_ROW_BYTES + 1,
					     KVSCRATCH_DTYPE_U8));
	/* dim * 8 is 2^32 and more: a 32-bit product would be 0 and 8 */
	KUNIT_EXPECT_FALSE(test, init_layout(&layout, 1, 1U << 29, KVSCRATCH_DTYPE_F64));
	KUNIT_EXPECT_FALSE(test, init_layout(&layout, 1, (1U << 29) + 1, KVSCRATCH_DTYPE_F64));
}

static void create_refuses(struct kunit *test)
{
	static const u64 capacities[] = { 0, BIT_ULL(32), BIT_ULL(60), U64_MAX };
	size_t i;

	for (i = 0; i < ARRAY_SIZE(capacities); i++)
		KUNIT_EXPECT_PTR_EQ(test, new_pad(capacities[i], 1, KVSCRATCH_DTYPE_U8),
				    (struct kvs_pad *)ERR_PTR(-EINVAL));
	KUNIT_EXPECT_PTR_EQ(test, new_pad(1, 0, KVSCRATCH_DTYPE_U8),
			    (struct kvs_pad *)ERR_PTR(-EINVAL));
}

static void layout_is_exact(struct kunit *test)
{
	static const u64 row_counts[] = {
		1, BIT_ULL(31) - 1, BIT_ULL(31), BIT_ULL(31) + 1, U32_MAX,
	};
	struct kvs_layout layout;
	size_t i;

	for (i = 0; i < ARRAY_SIZE(row_counts); i++) {
		u64 data = row_counts[i] * KVSCRATCH_MAX_ROW_BYTES;

		KUNIT_ASSERT_TRUE(test, init_layout(&layout, row_counts[i],
						    KVSCRATCH_MAX_ROW_BYTES / 8,
						    KVSCRATCH_DTYPE_F64));
		KUNIT_EXPECT_EQ(test, layout.status_offset, data);
		KUNIT_EXPECT_EQ(test, layout.row_bytes, KVSCRATCH_MAX_ROW_BYTES);
	}
	/* 2^32 and 2^32 + 1 bytes of data */
	KUNIT_ASSERT_TRUE(test, init_layout(&layout, BIT_ULL(31), 2, KVSCRATCH_DTYPE_U8));
	KUNIT_EXPECT_EQ(test, layout.status_offset, BIT_ULL(32));
	KUNIT_ASSERT_TRUE(test, init_layout(&layout, 641, 6700417, KVSCRATCH_DTYPE_U8));
	KUNIT_EXPECT_EQ(test, layout.status_offset, BIT_ULL(32) + KVSCRATCH_CHUNK_BYTES);
	/* up to half a chunk is packed by pages */
	KUNIT_ASSERT_TRUE(test, init_layout(&layout, KVSCRATCH_CHUNK_BYTES / 2, 1,
					    KVSCRATCH_DTYPE_U8));
	KUNIT_EXPECT_EQ(test, layout.status_offset, KVSCRATCH_CHUNK_BYTES / 2);
	KUNIT_ASSERT_TRUE(test, init_layout(&layout, KVSCRATCH_CHUNK_BYTES / 2 + 1, 1,
					    KVSCRATCH_DTYPE_U8));
	KUNIT_EXPECT_EQ(test, layout.status_offset, KVSCRATCH_CHUNK_BYTES);
}

/* Large arrays first, each on a chunk of its own, then the others by pages */
static void layout_of_many_planes(struct kunit *test)
{
	struct kvscratch_plane planes[] = {
		{ .dim = 100, .dtype = KVSCRATCH_DTYPE_U8 },
		{ .dim = 2100, .dtype = KVSCRATCH_DTYPE_U8 },
		{ .dim = 64, .dtype = KVSCRATCH_DTYPE_MXINT8, .input_dtype = KVSCRATCH_DTYPE_F32 },
		{ .dim = 1100, .dtype = KVSCRATCH_DTYPE_U8 },
	};
	u64 small = 4 * (u64)KVSCRATCH_CHUNK_BYTES - KVSCRATCH_CHUNK_BYTES;
	struct kvs_layout layout;

	KUNIT_ASSERT_TRUE(test, kvs_layout_init(&layout, planes, 4, 1000, PAGE_SIZE));
	KUNIT_EXPECT_EQ(test, planes[1].offset, 0);
	KUNIT_EXPECT_EQ(test, planes[3].offset, 2 * KVSCRATCH_CHUNK_BYTES);
	KUNIT_EXPECT_EQ(test, planes[0].offset, small);
	small += PAGE_ALIGN(100000);
	KUNIT_EXPECT_EQ(test, planes[2].offset, small);
	small += PAGE_ALIGN(64000);
	KUNIT_EXPECT_EQ(test, planes[2].scales_offset, small);
	KUNIT_EXPECT_EQ(test, layout.status_offset, small + PAGE_ALIGN(2000));
	KUNIT_EXPECT_EQ(test, layout.row_bytes, 100 + 2100 + 66 + 1100);
	KUNIT_EXPECT_EQ(test, layout.input_row_bytes, 100 + 2100 + 256 + 1100);
	planes[1].dim = KVSCRATCH_MAX_ROW_BYTES - 100 - 66 - 1100;
	KUNIT_EXPECT_FALSE(test, kvs_layout_init(&layout, planes, 4, 1000, PAGE_SIZE));
	planes[2].input_dtype = 0;
	KUNIT_EXPECT_TRUE(test, kvs_layout_init(&layout, planes, 4, 1000, PAGE_SIZE));
	planes[1].dim++;
	KUNIT_EXPECT_FALSE(test, kvs_layout_init(&layout, planes, 4, 1000, PAGE_SIZE));
}

#define CHUNK KVSCRATCH_CHUNK_BYTES

/* Each page of the mapping is that of the plane it lies in, and there is none between */
static void mapping_has_its_pages(struct kunit *test)
{
	struct kvscratch_plane planes[] = {
		{ .dim = 4 * PAGE_SIZE / 10, .dtype = KVSCRATCH_DTYPE_U8 },
		{ .dim = 16 * PAGE_SIZE / 10, .dtype = KVSCRATCH_DTYPE_U8 },
		{ .dim = 6 * PAGE_SIZE / 10, .dtype = KVSCRATCH_DTYPE_U8 },
		{ .dim = PAGE_SIZE + 8, .dtype = KVSCRATCH_DTYPE_U8 },
	};
	struct kvscratch_create create = {
		.max_seq_len = CHUNK / PAGE_SIZE,
		.nr_planes = ARRAY_SIZE(planes),
	};
	struct kvs_pad *pad = kvs_pad_create(&create, planes);
	u64 end, at;
	size_t i;

	KUNIT_ASSERT_FALSE(test, IS_ERR(pad));
	for (i = 0; i < ARRAY_SIZE(planes); i++) {
		const struct kvs_array *array = &pad->planes[i].data;

		end = array->bytes;
		for (at = 0; at < end; at += PAGE_SIZE)
			KUNIT_ASSERT_PTR_EQ(test, kvs_array_page(array, at >> PAGE_SHIFT),
					    pad_page(pad, (array->offset + at) >> PAGE_SHIFT));
	}
	/* the last one has a table of one page in its second chunk, and owns the rest of it */
	at = pad->planes[3].data.offset + CHUNK;
	KUNIT_EXPECT_NOT_NULL(test, pad_page(pad, at >> PAGE_SHIFT));
	for (end = at + CHUNK; (at += PAGE_SIZE) < end;)
		KUNIT_EXPECT_NULL(test, pad_page(pad, at >> PAGE_SHIFT));
	KUNIT_EXPECT_PTR_EQ(test, pad_page(pad, pad->layout.status_offset >> PAGE_SHIFT),
			    virt_to_page(pad->status));
	kvs_pad_put(pad);
}

static struct kvs_pad *fork_of(struct kvs_pad *source, u64 rows, u64 max_seq_len)
{
	const struct kvscratch_fork fork = { .rows = rows, .max_seq_len = max_seq_len };

	return kvs_pad_fork(source, &fork);
}

/* Which pages of @array are those of @of: all below @shared bytes, and no other */
static void expect_shared(struct kunit *test, const struct kvs_array *array,
			  const struct kvs_array *of, u64 shared)
{
	u64 at;

	for (at = 0; at < array->bytes; at += PAGE_SIZE) {
		const struct page *page = kvs_array_page(array, at >> PAGE_SHIFT);

		KUNIT_ASSERT_NOT_NULL(test, page);
		KUNIT_ASSERT_EQ(test, page == kvs_array_page(of, at >> PAGE_SHIFT),
				at + PAGE_SIZE <= shared);
	}
}

/* Of pages, tables and huge chunks alike; which of them must not be mapped as a whole */
static void forks_share_pages(struct kunit *test)
{
	struct kvscratch_plane planes[] = {
		{ .dim = PAGE_SIZE, .dtype = KVSCRATCH_DTYPE_U8 },
		{ .dim = 34, .dtype = KVSCRATCH_DTYPE_U8 },
	};
	const u64 chunk_rows = CHUNK / PAGE_SIZE, rows = chunk_rows + 300;
	struct kvscratch_create create = {
		.max_seq_len = 2 * chunk_rows,
		.nr_planes = ARRAY_SIZE(planes),
	};
	u64 before = kvs_reserved(), token_bytes = PAGE_SIZE + 34, row;
	struct kvs_pad *source = kvs_pad_create(&create, planes), *child, *grandchild;
	void *token = kunit_kzalloc(test, token_bytes, GFP_KERNEL);
	bool is_piece;

	KUNIT_ASSERT_FALSE(test, IS_ERR(source));
	for (row = 0; row < rows; row++) {
		fill_rows(token, row, 1, token_bytes);
		KUNIT_ASSERT_EQ(test, append(source, token, token_bytes), token_bytes);
	}
	child = fork_of(source, rows - 1, 2 * chunk_rows);
	KUNIT_ASSERT_FALSE(test, IS_ERR(child));
	grandchild = fork_of(child, rows - 100, rows);
	KUNIT_ASSERT_FALSE(test, IS_ERR(grandchild));
	expect_shared(test, &child->planes[0].data, &source->planes[0].data,
		      (rows - 1) * PAGE_SIZE);
	expect_shared(test, &child->planes[1].data, &source->planes[1].data, (rows - 1) * 34);
	expect_shared(test, &grandchild->planes[0].data, &source->planes[0].data,
		      (rows - 100) * PAGE_SIZE);
	expect_shared(test, &grandchild->planes[1].data, &child->planes[1].data,
		      (rows - 100) * 34);
	/* a chunk that is shared as a whole is mapped so */
	kvs_pad_page(child, chunk_rows - 1, &is_piece);
	KUNIT_EXPECT_FALSE(test, is_piece);
	kvs_pad_page(grandchild, chunk_rows + 199, &is_piece);
	KUNIT_EXPECT_EQ(test, is_piece, !!source->planes[0].data.chunks[1]->huge);
	kvs_pad_page(grandchild, chunk_rows + 200, &is_piece);
	KUNIT_EXPECT_FALSE(test, is_piece);
	kvs_pad_put(child);
	kvs_pad_put(source);
	for (row = 0; row < rows - 100; row++) {
		struct page *page = kvs_array_page(&grandchild->planes[0].data, row);

		KUNIT_ASSERT_TRUE(test, rows_are(page_address(page), row, 1, PAGE_SIZE));
	}
	kvs_pad_put(grandchild);
	KUNIT_EXPECT_EQ(test, kvs_reserved(), before);
}

/* What a page of a view was given, and how many references its head has then */
static vm_fault_t fault_at(struct kvs_pad *pad, u64 index, struct page **page)
{
	struct vm_area_struct *vma = kzalloc(sizeof(*vma), GFP_KERNEL);
	struct vm_fault vmf = { .vma = vma, .pgoff = index };
	vm_fault_t fault = VM_FAULT_OOM;

	if (vma) {
		vma->vm_private_data = pad;
		fault = kvs_fault(&vmf);
	}
	*page = vmf.page;
	kfree(vma);
	return fault;
}

/* Nobody can take so many in a guest: views refuse before a count overflows. */
static void faults_leave_room_for_references(struct kunit *test)
{
	struct kvscratch_plane planes[] = {
		{ .dim = PAGE_SIZE, .dtype = KVSCRATCH_DTYPE_U8 },
		{ .dim = 1, .dtype = KVSCRATCH_DTYPE_U8 },
	};
	struct kvscratch_create create = {
		.max_seq_len = CHUNK / PAGE_SIZE,
		.nr_planes = ARRAY_SIZE(planes),
	};
	struct kvs_pad *pad = kvs_pad_create(&create, planes);
	u64 indices[3];
	size_t i;

	KUNIT_ASSERT_FALSE(test, IS_ERR(pad));
	/* in the middle of a huge chunk, of a table, and the status page */
	indices[0] = (pad->planes[0].data.offset >> PAGE_SHIFT) + 77;
	indices[1] = pad->planes[1].data.offset >> PAGE_SHIFT;
	indices[2] = pad->layout.status_offset >> PAGE_SHIFT;
	for (i = 0; i < ARRAY_SIZE(indices); i++) {
		struct page *head = compound_head(pad_page(pad, indices[i]));
		int before = page_ref_count(head);
		struct page *page;

		page_ref_add(head, INT_MAX / 2 - before);
		KUNIT_EXPECT_EQ(test, fault_at(pad, indices[i], &page), 0);
		KUNIT_EXPECT_PTR_EQ(test, page, pad_page(pad, indices[i]));
		KUNIT_EXPECT_EQ(test, page_ref_count(head), INT_MAX / 2 + 1);
		KUNIT_EXPECT_EQ(test, fault_at(pad, indices[i], &page), VM_FAULT_SIGBUS);
		KUNIT_EXPECT_NULL(test, page);
		KUNIT_EXPECT_EQ(test, page_ref_count(head), INT_MAX / 2 + 1);
		page_ref_sub(head, INT_MAX / 2 + 1 - before);
	}
	/* where there is nothing there is no reference either */
	KUNIT_EXPECT_EQ(test, fault_at(pad, indices[2] + 1, &(struct page *){ NULL }),
			VM_FAULT_SIGBUS);
	kvs_pad_put(pad);
}

static void limits_do_not_overflow(struct kunit *test)
{
	static const u64 sizes[] = {
		1, BIT_ULL(31), BIT_ULL(32), BIT_ULL(32) + 1, BIT_ULL(63) - 1, BIT_ULL(63),
	};
	u64 before = kvs_reserved();
	size_t i;

	for (i = 0; i < ARRAY_SIZE(sizes); i++) {
		u64 size = sizes[i];

		KUNIT_EXPECT_EQ(test, kvs_reserve(size, size - 1, U64_MAX), -EDQUOT);
		KUNIT_EXPECT_EQ(test, kvs_reserve(size, U64_MAX, size - 1), -EDQUOT);
		KUNIT_EXPECT_EQ(test, kvs_reserve(size, size, before + size - 1), -EDQUOT);
		KUNIT_EXPECT_EQ(test, kvs_reserved(), before);
		KUNIT_EXPECT_EQ(test, kvs_reserve(size, size, before + size), 0);
		KUNIT_EXPECT_EQ(test, kvs_reserved(), before + size);
		KUNIT_EXPECT_EQ(test, kvs_reserve(1, U64_MAX, before + size), -EDQUOT);
		kvs_unreserve(size);
		KUNIT_EXPECT_EQ(test, kvs_reserved(), before);
	}
}

static void create_respects_the_total(struct kunit *test)
{
	u64 before = kvs_reserved();
	u64 rest = BIT_ULL(62);
	struct kvs_pad *pad;

	KUNIT_ASSERT_EQ(test, kvs_reserve(rest, U64_MAX, U64_MAX), 0);
	pad = new_pad(1, 1, KVSCRATCH_DTYPE_U8);
	kvs_unreserve(rest);
	KUNIT_EXPECT_PTR_EQ(test, pad, (struct kvs_pad *)ERR_PTR(-EDQUOT));
	KUNIT_EXPECT_EQ(test, kvs_reserved(), before);
	pad = new_pad(U32_MAX, KVSCRATCH_MAX_ROW_BYTES, KVSCRATCH_DTYPE_U8);
	KUNIT_EXPECT_PTR_EQ(test, pad, (struct kvs_pad *)ERR_PTR(-EDQUOT));
	KUNIT_EXPECT_EQ(test, kvs_reserved(), before);
}

static struct kunit_case kvs_pad_cases[] = {
	KUNIT_CASE(model_new),
	KUNIT_CASE(model_append),
	KUNIT_CASE(model_append_tensor),
	KUNIT_CASE(model_as_tensor),
	KUNIT_CASE(model_status_page),
	KUNIT_CASE(model_status_words),
	KUNIT_CASE(a_len_on_the_page_is_clamped),
	KUNIT_CASE(model_get_token),
	KUNIT_CASE(model_clear),
	KUNIT_CASE(model_truncate),
	KUNIT_CASE(model_clone_shares),
	KUNIT_CASE(model_display),
	KUNIT_CASE(failures_change_nothing),
	KUNIT_CASE(nowait_does_not_wait),
	KUNIT_CASE(zero_scrubs_dropped_rows),
	KUNIT_CASE(generation_wraps_into_the_high_half),
	KUNIT_CASE(only_the_writer_changes_the_pad),
	KUNIT_CASE(staged_rows_are_committed),
	KUNIT_CASE(whole_is_lowered),
	KUNIT_CASE(a_sealed_pad_is_final),
	{}
};

static struct kunit_suite kvs_pad_suite = {
	.name = "kvscratch_pad",
	.init = kvs_test_init,
	.exit = kvs_test_exit,
	.test_cases = kvs_pad_cases,
};

/* Scaled integers */

#define MX_ROWS		3
#define MX_DIM		64
#define MX_RECORD	(MX_DIM + MX_DIM / KVSCRATCH_MX_BLOCK)

static struct kvs_pad *new_scaled_pad(u64 max_seq_len, u32 dim, u32 dtype, u32 input_dtype,
				      u32 frac_bits)
{
	struct kvscratch_create create = { .max_seq_len = max_seq_len, .nr_planes = 1 };
	struct kvscratch_plane plane = {
		.dim = dim,
		.dtype = dtype,
		.input_dtype = input_dtype,
		.frac_bits = frac_bits,
	};

	return kvs_pad_create(&create, &plane);
}

/* Bits of f32: 1, -127/64, 2^-60, the largest below 2, the largest of all, a NaN */
#define F32_ONE		0x3f800000U
#define F32_MINUS	0xbffe0000U
#define F32_TINY	0x21800000U
#define F32_ALMOST_TWO	0x3fffffffU
#define F32_MAX		0x7f7fffffU
#define F32_NAN		0x7fc00000U

static void mxint8_is_stored_in_two_planes(struct kunit *test)
{
	static u32 rows[2][MX_DIM];
	static u8 record[2 * MX_RECORD];
	struct kvs_pad *pad;
	const s8 *elements;
	const u8 *scales;

	memset(rows, 0, sizeof(rows));
	rows[0][0] = F32_ONE;
	rows[0][1] = F32_MINUS;
	memset32(rows[0] + 32, F32_TINY, 32);
	rows[1][31] = F32_ALMOST_TWO;
	rows[1][32] = F32_MAX;
	pad = new_scaled_pad(MX_ROWS, MX_DIM, KVSCRATCH_DTYPE_MXINT8, KVSCRATCH_DTYPE_F32, 0);
	KUNIT_ASSERT_FALSE(test, IS_ERR(pad));
	elements = data_of(pad);
	scales = start_of(&pad->planes[0].scales);

	KUNIT_EXPECT_EQ(test, append(pad, rows, sizeof(rows)), sizeof(rows));
	KUNIT_EXPECT_EQ(test, info_of(pad).len, 2);
	KUNIT_EXPECT_EQ(test, elements[0], 64);
	KUNIT_EXPECT_EQ(test, elements[1], -127);
	KUNIT_EXPECT_EQ(test, elements[2], 0);
	KUNIT_EXPECT_EQ(test, scales[0], 127);
	KUNIT_EXPECT_EQ(test, elements[63], 64);
	KUNIT_EXPECT_EQ(test, scales[1], 127 - 60);
	/* both round to 128 */
	KUNIT_EXPECT_EQ(test, elements[MX_DIM + 31], 127);
	KUNIT_EXPECT_EQ(test, scales[2], 127);
	KUNIT_EXPECT_EQ(test, elements[MX_DIM + 32], 127);
	KUNIT_EXPECT_EQ(test, scales[3], 254);
	KUNIT_EXPECT_EQ(test, info_of(pad).saturated, 2);

	/* a record is the elements of a row and then its scales */
	KUNIT_EXPECT_EQ(test, read_at(pad, 0, record, sizeof(record)), sizeof(record));
	KUNIT_EXPECT_EQ(test, memcmp(record, elements, MX_DIM), 0);
	KUNIT_EXPECT_EQ(test, memcmp(record + MX_DIM, scales, 2), 0);
	KUNIT_EXPECT_EQ(test, memcmp(record + MX_RECORD, elements + MX_DIM, MX_DIM), 0);
	KUNIT_EXPECT_EQ(test, memcmp(record + MX_RECORD + MX_DIM, scales + 2, 2), 0);
	KUNIT_EXPECT_EQ(test, read_at(pad, MX_DIM + 1, record, 2), 2);
	KUNIT_EXPECT_EQ(test, record[0], scales[1]);
	KUNIT_EXPECT_EQ(test, record[1], elements[MX_DIM]);

	/* both planes are scrubbed */
	KUNIT_EXPECT_EQ(test, truncate(pad, 1, KVSCRATCH_TRUNCATE_ZERO), 0);
	KUNIT_EXPECT_NULL(test, memchr_inv(elements + MX_DIM, 0, MX_DIM));
	KUNIT_EXPECT_NULL(test, memchr_inv(scales + 2, 0, 2));
	KUNIT_EXPECT_EQ(test, scales[1], 127 - 60);
	kvs_pad_put(pad);
}

static void what_is_not_finite_is_refused(struct kunit *test)
{
	static u32 rows[MX_ROWS][MX_DIM];
	struct kvs_pad *pad;

	memset32(rows[0], F32_ONE, MX_ROWS * MX_DIM);
	rows[MX_ROWS - 1][MX_DIM - 1] = F32_NAN;
	pad = new_scaled_pad(MX_ROWS, MX_DIM, KVSCRATCH_DTYPE_MXINT8, KVSCRATCH_DTYPE_F32, 0);
	KUNIT_ASSERT_FALSE(test, IS_ERR(pad));
	KUNIT_EXPECT_EQ(test, append(pad, rows, sizeof(rows)), -EDOM);
	KUNIT_EXPECT_EQ(test, info_of(pad).len, 0);
	KUNIT_EXPECT_EQ(test, append(pad, rows, sizeof(rows) - sizeof(rows[0])),
			sizeof(rows) - sizeof(rows[0]));
	KUNIT_EXPECT_EQ(test, append(pad, rows, sizeof(rows[0]) - 4), -EINVAL);
	KUNIT_EXPECT_EQ(test, append(pad, rows, 2 * sizeof(rows[0])), -ENOSPC);
	kvs_pad_put(pad);
}

/* Far beyond what can be allocated, and the longest row */
static void layout_of_scales(struct kunit *test)
{
	struct kvscratch_plane plane = {
		.dim = 96,
		.dtype = KVSCRATCH_DTYPE_MXINT8,
		.input_dtype = KVSCRATCH_DTYPE_F32,
	};
	u64 data = ALIGN(U32_MAX * 96ULL, CHUNK), scales = ALIGN(U32_MAX * 3ULL, CHUNK);
	struct kvs_layout layout;

	KUNIT_ASSERT_TRUE(test, kvs_layout_init(&layout, &plane, 1, U32_MAX, PAGE_SIZE));
	KUNIT_EXPECT_EQ(test, plane.offset, 0);
	KUNIT_EXPECT_EQ(test, plane.scales_offset, data);
	KUNIT_EXPECT_EQ(test, layout.status_offset, data + scales);
	KUNIT_EXPECT_EQ(test, plane.input_row_bytes, 384);

	/* 33 bytes for each 32 elements */
	plane = (struct kvscratch_plane) {
		.dim = KVSCRATCH_MAX_ROW_BYTES / 33 * 32,
		.dtype = KVSCRATCH_DTYPE_MXINT8,
	};
	KUNIT_EXPECT_TRUE(test, kvs_layout_init(&layout, &plane, 1, 1, PAGE_SIZE));
	plane.dim += 32;
	KUNIT_EXPECT_FALSE(test, kvs_layout_init(&layout, &plane, 1, 1, PAGE_SIZE));
	plane.dim = 33;
	KUNIT_EXPECT_FALSE(test, kvs_layout_init(&layout, &plane, 1, 1, PAGE_SIZE));
}

static void fixed_point_is_clamped(struct kunit *test)
{
	/* 1.5, -1000, 2^-9 (a tie to even), -128 with f64's bits and 8 fraction bits in s16 */
	static const u64 row[4] = {
		0x3ff8000000000000ULL, 0xc08f400000000000ULL, 0x3f60000000000000ULL,
		0xc060000000000000ULL,
	};
	static const s16 expected[4] = { 384, S16_MIN, 0, S16_MIN };
	struct kvs_pad *pad;

	pad = new_scaled_pad(1, 4, KVSCRATCH_DTYPE_I16, KVSCRATCH_DTYPE_F64, 8);
	KUNIT_ASSERT_FALSE(test, IS_ERR(pad));
	KUNIT_EXPECT_EQ(test, append(pad, row, sizeof(row)), sizeof(row));
	KUNIT_EXPECT_EQ(test, memcmp(data_of(pad), expected, sizeof(expected)), 0);
	KUNIT_EXPECT_EQ(test, info_of(pad).saturated, 1);
	kvs_pad_put(pad);
}

/* The first @count elements of an input that repeats a pattern; little-endian as all of it */
static size_t fill_pattern(void *to, size_t count, u32 dtype, const u64 *pattern, size_t length)
{
	size_t size = dtype == KVSCRATCH_DTYPE_F64 ? 8 : dtype == KVSCRATCH_DTYPE_F32 ? 4 : 2;
	size_t i;

	for (i = 0; i < count; i++)
		memcpy(to + i * size, &pattern[i % length], size);
	return count * size;
}

static void expect_block(struct kunit *test, struct kvs_pad *pad,
			 const struct scale_golden_block *g, size_t i)
{
	const s8 *elements = data_of(pad);
	u8 scale = *(u8 *)start_of(&pad->planes[0].scales);
	size_t j;

	for (j = 0; j < KVSCRATCH_MX_BLOCK; j++)
		KUNIT_EXPECT_EQ_MSG(test, elements[j], g->elements[j % SCALE_GOLDEN_PATTERN],
				    "block %zu", i);
	KUNIT_EXPECT_EQ_MSG(test, scale, g->scale, "block %zu", i);
	KUNIT_EXPECT_EQ_MSG(test, info_of(pad).saturated, g->saturated, "block %zu", i);
}

static void golden_mxint8(struct kunit *test)
{
	u64 row[KVSCRATCH_MX_BLOCK];
	size_t i;

	for (i = 0; i < ARRAY_SIZE(scale_golden_blocks); i++) {
		const struct scale_golden_block *g = &scale_golden_blocks[i];
		size_t bytes = fill_pattern(row, KVSCRATCH_MX_BLOCK, g->dtype, g->in,
					    SCALE_GOLDEN_PATTERN);
		struct kvs_pad *pad = new_scaled_pad(1, KVSCRATCH_MX_BLOCK, KVSCRATCH_DTYPE_MXINT8,
						     g->dtype, 0);

		KUNIT_ASSERT_FALSE(test, IS_ERR(pad));
		KUNIT_EXPECT_EQ_MSG(test, append(pad, row, bytes),
				    g->saturated < 0 ? -EDOM : (ssize_t)bytes, "block %zu", i);
		if (g->saturated >= 0)
			expect_block(test, pad, g, i);
		kvs_pad_put(pad);
	}
}

static void golden_fixed(struct kunit *test)
{
	static const u32 stored[] = {
		[1] = KVSCRATCH_DTYPE_I8,
		[2] = KVSCRATCH_DTYPE_I16,
		[4] = KVSCRATCH_DTYPE_I32,
		[8] = KVSCRATCH_DTYPE_I64,
	};
	size_t i;

	for (i = 0; i < ARRAY_SIZE(scale_golden_fixed); i++) {
		const struct scale_golden_fixed *g = &scale_golden_fixed[i];
		struct kvs_pad *pad = new_scaled_pad(1, 1, stored[g->bytes], g->dtype,
						     g->frac_bits);
		u64 row;
		size_t bytes = fill_pattern(&row, 1, g->dtype, &g->in, 1);

		KUNIT_ASSERT_FALSE(test, IS_ERR(pad));
		KUNIT_EXPECT_EQ_MSG(test, append(pad, &row, bytes),
				    g->saturated < 0 ? -EDOM : (ssize_t)bytes, "element %zu", i);
		if (g->saturated >= 0) {
			KUNIT_EXPECT_EQ_MSG(test, memcmp(data_of(pad), &g->element, g->bytes), 0,
					    "element %zu", i);
			KUNIT_EXPECT_EQ_MSG(test, info_of(pad).saturated, g->saturated,
					    "element %zu", i);
		}
		kvs_pad_put(pad);
	}
}

static void records_are_taken_as_they_come(struct kunit *test)
{
	u8 records[MX_ROWS * MX_RECORD], back[sizeof(records)];
	struct kvs_pad *pad;

	fill_rows(records, 0, MX_ROWS, MX_RECORD);
	pad = new_scaled_pad(MX_ROWS, MX_DIM, KVSCRATCH_DTYPE_MXINT8, 0, 0);
	KUNIT_ASSERT_FALSE(test, IS_ERR(pad));
	KUNIT_EXPECT_EQ(test, append(pad, records, MX_RECORD), MX_RECORD);
	KUNIT_EXPECT_EQ(test, append(pad, records + MX_RECORD, 2 * MX_RECORD), 2 * MX_RECORD);
	KUNIT_EXPECT_EQ(test, read_at(pad, 0, back, sizeof(back)), sizeof(back));
	KUNIT_EXPECT_EQ(test, memcmp(back, records, sizeof(back)), 0);
	KUNIT_EXPECT_EQ(test, memcmp(data_of(pad) + MX_DIM, records + MX_RECORD, MX_DIM), 0);
	kvs_pad_put(pad);
}

static struct kunit_case kvs_scaled_cases[] = {
	KUNIT_CASE(mxint8_is_stored_in_two_planes),
	KUNIT_CASE(what_is_not_finite_is_refused),
	KUNIT_CASE(layout_of_scales),
	KUNIT_CASE(fixed_point_is_clamped),
	KUNIT_CASE(golden_mxint8),
	KUNIT_CASE(golden_fixed),
	KUNIT_CASE(records_are_taken_as_they_come),
	{}
};

static struct kunit_suite kvs_scaled_suite = {
	.name = "kvscratch_scaled",
	.test_cases = kvs_scaled_cases,
};

static struct kunit_case kvs_bounds_cases[] = {
	KUNIT_CASE_PARAM(every_boundary, geometry_gen_params),
	KUNIT_CASE(layout_refuses),
	KUNIT_CASE(layout_is_exact),
	KUNIT_CASE(layout_of_many_planes),
	KUNIT_CASE(create_refuses),
	KUNIT_CASE(mapping_has_its_pages),
	KUNIT_CASE(forks_share_pages),
	KUNIT_CASE(faults_leave_room_for_references),
	KUNIT_CASE(limits_do_not_overflow),
	KUNIT_CASE(create_respects_the_total),
	{}
};

static struct kunit_suite kvs_bounds_suite = {
	.name = "kvscratch_bounds",
	.test_cases = kvs_bounds_cases,
};

kunit_test_suites(&kvs_pad_suite, &kvs_bounds_suite, &kvs_scaled_suite);

MODULE_AUTHOR("The kvscratch authors");
MODULE_DESCRIPTION("KUnit suite of kvscratch");
MODULE_LICENSE("GPL");
MODULE_IMPORT_NS(KVS_KUNIT_NAMESPACE);
