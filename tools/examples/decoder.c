// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * Keep the cache of a decoder in one pad, K and V of each layer and the tokens: each layer
 * attends to what it has just staged, and a token is committed in all planes at once. Drafts
 * are staged like any other token; those that are not accepted are never committed.
 *
 *   cc -o decoder decoder.c $(pkg-config --cflags --libs libkvscratch)
 */
#include <err.h>
#include <inttypes.h>
#include <libkvscratch.h>
#include <stdio.h>

#define MAX_SEQ_LEN 16
#define DIM 4

enum { K0, V0, K1, V1, TOKENS, PLANES };

static const struct kvscratch_plane planes[PLANES] = {
	[K0] = { .dim = DIM, .dtype = KVSCRATCH_DTYPE_F32, .label = "k0" },
	[V0] = { .dim = DIM, .dtype = KVSCRATCH_DTYPE_F32, .label = "v0" },
	[K1] = { .dim = DIM, .dtype = KVSCRATCH_DTYPE_F32, .label = "k1" },
	[V1] = { .dim = DIM, .dtype = KVSCRATCH_DTYPE_F32, .label = "v1" },
	[TOKENS] = { .dim = 1, .dtype = KVSCRATCH_DTYPE_I32, .label = "tokens" },
};

static void check(int error)
{
	if (error)
		errx(1, "%s", kvscratch_error());
}

/* Of all planes at once, mapped by the first call */
static const struct kvscratch_view *view_of(struct kvscratch *pad)
{
	const struct kvscratch_view *view = kvscratch_view(pad);

	check(!view);
	return view;
}

/* The sum of a plane up to row @last, for want of a model */
static float attend(const struct kvscratch_view *view, uint32_t plane, uint64_t last)
{
	float sum = 0;

	for (uint64_t row = 0; row <= last; row++)
		sum += *(const float *)kvscratch_view_plane_row(view, plane, row);
	return sum;
}

static void stage_token(struct kvscratch *writer, const struct kvscratch_view *view, uint64_t row,
			int32_t token)
{
	float state = token;

	for (uint32_t plane = K0; plane <= V1; plane++) {
		const float elements[DIM] = { state, 1, 2, 3 };

		check(kvscratch_stage(writer, plane, row, elements, 1));
		state = attend(view, plane, row);
	}
	check(kvscratch_stage(writer, TOKENS, row, &token, 1));
}

int main(void)
{
	const int32_t drafts[] = { 4, 5, 60, 70 };
	struct kvscratch *pad, *writer;
	const struct kvscratch_view *view;

	check(kvscratch_new_planes(&pad, MAX_SEQ_LEN, planes, PLANES, "example", 7));
	view = view_of(pad);
	check(kvscratch_writer(&writer, pad));
	for (int32_t token = 1; token <= 3; token++) {
		stage_token(writer, view, token - 1, token);
		check(kvscratch_commit(writer, token));
	}
	for (uint64_t i = 0; i < 4; i++)
		stage_token(writer, view, 3 + i, drafts[i]);
	/* two of them were right */
	check(kvscratch_commit(writer, 5));
	check(kvscratch_seal(writer));
	kvscratch_close(writer);
	printf("%" PRId64 " tokens, v1 adds up to %g\n", kvscratch_len(pad), attend(view, V1, 4));
	kvscratch_close(pad);
	return 0;
}
