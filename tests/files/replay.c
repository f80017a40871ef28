// SPDX-License-Identifier: GPL-2.0-only
/*
 * The fuzz targets without a fuzzer: every seed, every beginning of it, and it with
 * each bit turned over. usage: replay SEEDS; prints TAP
 */
#define _GNU_SOURCE
#include "targets.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_SEED_BYTES 4096

static const struct {
	const char *name;
	bool (*run)(const uint8_t *bytes, size_t size);
} targets[] = {
	{ "npy", fuzz_npy },
	{ "safetensors", fuzz_safetensors },
	{ "files", fuzz_files },
};

static unsigned int nr_tests;

static size_t read_seed(const char *path, uint8_t *bytes)
{
	FILE *seed = fopen(path, "re");
	size_t size = seed ? fread(bytes, 1, MAX_SEED_BYTES, seed) : 0;

	if (!seed || ferror(seed) || !feof(seed)) {
		printf("Bail out! %s: expected a file of less than %d bytes\n", path,
		       MAX_SEED_BYTES);
		exit(1);
	}
	fclose(seed);
	return size;
}

static void replay(size_t target, const char *directory, const char *name)
{
	uint8_t bytes[MAX_SEED_BYTES];
	char path[PATH_MAX + NAME_MAX + 2];
	bool accepted;
	size_t size;

	snprintf(path, sizeof(path), "%s/%s", directory, name);
	size = read_seed(path, bytes);
	accepted = targets[target].run(bytes, size);
	for (size_t i = 0; i < size; i++)
		targets[target].run(bytes, i);
	for (size_t bit = 0; bit < 8 * size; bit++) {
		bytes[bit / 8] ^= 1 << bit % 8;
		targets[target].run(bytes, size);
		bytes[bit / 8] ^= 1 << bit % 8;
	}
	/* a seed that is refused leads nowhere */
	printf("%s %u - %s: %s\n", accepted ? "ok" : "not ok", ++nr_tests, targets[target].name,
	       name);
	fflush(stdout);
}

static int is_visible(const struct dirent *entry)
{
	return entry->d_name[0] != '.';
}

int main(int argc, char **argv)
{
	if (argc != 2) {
		fprintf(stderr, "usage: replay SEEDS\n");
		return 2;
	}
	printf("TAP version 13\n");
	for (size_t i = 0; i < sizeof(targets) / sizeof(targets[0]); i++) {
		char directory[PATH_MAX];
		struct dirent **seeds;
		int count;

		snprintf(directory, sizeof(directory), "%s/%s", argv[1], targets[i].name);
		count = scandir(directory, &seeds, is_visible, alphasort);
		if (count <= 0) {
			printf("Bail out! %s: expected seeds, got %s\n", directory,
			       count ? strerror(errno) : "none");
			return 1;
		}
		for (int j = 0; j < count; j++) {
			replay(i, directory, seeds[j]->d_name);
			free(seeds[j]);
		}
		free(seeds);
	}
	printf("1..%u\n", nr_tests);
	return 0;
}
