// SPDX-License-Identifier: GPL-2.0-only
/* A pad of two rows, from its making to its end, in what C and C++ have in common. */
#include <fcntl.h>
#include <libkvscratch.h>
#include <stdio.h>
#include <string.h>

static int fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, kvscratch_error());
	return 1;
}

int main(int argc, char **argv)
{
	static const float rows[2][3] = { { 1, 2, 3 }, { 4, 5, 6 } };
	struct kvscratch_tensor tensor;
	struct kvscratch *pad, *reader;

	if (argc == 2 && !strcmp(argv[1], "--version")) {
		puts(kvscratch_version());
		return 0;
	}
	if (kvscratch_new(&pad, 2, 3, KVSCRATCH_DTYPE_F32))
		return fail("new");
	if (kvscratch_attach(&reader, kvscratch_fd(pad), O_RDONLY))
		return fail("attach");
	if (kvscratch_append_rows(pad, rows, 2, 3))
		return fail("append");
	if (kvscratch_as_tensor(reader, &tensor))
		return fail("as_tensor");
	if (tensor.len != 2 || tensor.dim != 3 || memcmp(tensor.data, rows, sizeof(rows))) {
		fprintf(stderr, "expected the 2 rows that were appended, got %d\n", (int)tensor.len);
		return 1;
	}
	if (!kvscratch_append(pad, rows[0], 3)) {
		fprintf(stderr, "expected a full pad\n");
		return 1;
	}
	printf("%s pad: %s\n", kvscratch_backend_name(kvscratch_backend(pad)), kvscratch_error());
	kvscratch_close(reader);
	kvscratch_close(pad);
	return 0;
}
