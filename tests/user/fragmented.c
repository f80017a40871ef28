// SPDX-License-Identifier: GPL-2.0-only
/*
 * Run a program while every second page of memory is in use, so that no chunk of a pad is a
 * huge page. usage: fragmented PROGRAM [ARGUMENT]...
 *
 * What is in use are pages of pipes, which do not move, and what there still is in one piece
 * are pages of hugetlbfs. Blocks of a few pages stay free: the kernel needs them for its own.
 * Exits with the program's status; with 1 if a chunk is huge before it, or all are after it.
 * The program finds KVSCRATCH_FRAGMENTED in its environment.
 */
#include "common.h"

#include <sys/resource.h>

#define PIPES 4000
#define HUGE_ORDER 9
#define RUN_PAGES 64
/* Free at the beginning of a run; of the others every second one */
#define FREE_PAGES 16
#define LEFT_BYTES (6 * MIB)

#define CHUNKS 4
#define ROUNDS 20
/* More than there can be */
#define HUGE_PAGES 10000

#define NEED(condition) do { \
	if (!(condition)) { \
		fprintf(stderr, "fragmented.c, line %d: %s is false: %s\n", __LINE__, #condition, \
			strerror(errno)); \
		exit(1); \
	} \
} while (0)

/* Pages that are kept, and those that are let go */
struct pipes {
	int ends[PIPES][2];
	unsigned int count;
};

static struct pipes kept, let_go;

/* One page more */
static void take_page(struct pipes *pipes)
{
	static char page[1 << 16];
	const ssize_t bytes = page_bytes();

	if (pipes->count && write(pipes->ends[pipes->count - 1][1], page, bytes) == bytes)
		return;
	NEED(pipes->count < PIPES);
	NEED(!pipe2(pipes->ends[pipes->count], O_CLOEXEC | O_NONBLOCK));
	fcntl(pipes->ends[pipes->count++][1], F_SETPIPE_SZ, 1 << 20);
	NEED(write(pipes->ends[pipes->count - 1][1], page, bytes) == bytes);
}

static void let_pages_go(void)
{
	while (let_go.count) {
		let_go.count--;
		close(let_go.ends[let_go.count][0]);
		close(let_go.ends[let_go.count][1]);
	}
}

/* Free blocks of this order and above, in all zones */
static unsigned long free_blocks(int order)
{
	FILE *file = fopen("/proc/buddyinfo", "re");
	unsigned long sum = 0;
	char line[512];

	NEED(file);
	while (fgets(line, sizeof(line), file)) {
		char *at = strstr(line, "zone");
		int column = 0;

		for (at = strtok(at, " \n"); at; at = strtok(NULL, " \n"), column++)
			/* "zone" and its name come first */
			if (column >= 2 + order)
				sum += strtoul(at, NULL, 10);
	}
	fclose(file);
	return sum;
}

static uint64_t free_bytes(void)
{
	return number_in_file("/proc/meminfo", "MemFree") * 1024ull;
}

/* Use all that is free in large blocks, and let the pages go that are to be free. */
static void fragment(void)
{
	/* no zone keeps what another one has not */
	write_file("/proc/sys/vm/lowmem_reserve_ratio", "1000000 1000000 1000000");
	while (free_blocks(HUGE_ORDER) && free_bytes() > LEFT_BYTES) {
		for (int i = 0; i < 4 * RUN_PAGES; i++)
			take_page(i % RUN_PAGES < FREE_PAGES || i % 2 ? &let_go : &kept);
	}
	let_pages_go();
}

/* How many chunks of a pad are huge: one that is not has an array of pointers instead */
static unsigned int huge_chunks(void)
{
	const uint64_t rows = CHUNKS * KVSCRATCH_CHUNK_BYTES / page_bytes();
	const uint64_t pointers = KVSCRATCH_CHUNK_BYTES / page_bytes() * 8;
	const uint64_t least = charged_bytes(rows, page_bytes());
	struct kvscratch_pad_info info;
	int fd = new_pad(rows, page_bytes());

	NEED(fd >= 0);
	NEED(!device_pad_info(fd, &info));
	NEED(info.allocated_bytes >= least);
	close(fd);
	return CHUNKS - (info.allocated_bytes - least) / pointers;
}

int main(int argc, char **argv)
{
	const struct rlimit descriptors = { 4 * PIPES, 4 * PIPES };
	unsigned int huge = CHUNKS;
	int status;

	if (argc < 2) {
		fprintf(stderr, "usage: fragmented PROGRAM [ARGUMENT]...\n");
		return 2;
	}
	NEED(!setrlimit(RLIMIT_NOFILE, &descriptors));
	fragment();
	/* what is left, or can be put together again, is taken as it is */
	for (int round = 0; huge && round < ROUNDS; round++) {
		write_number("/proc/sys/vm/nr_hugepages", HUGE_PAGES * (round + 1));
		huge = huge_chunks();
	}
	printf("# %u of %u chunks huge, %llu MiB free, %llu blocks of order %d\n", huge, CHUNKS,
	       (unsigned long long)(free_bytes() / MIB),
	       (unsigned long long)free_blocks(HUGE_ORDER), HUGE_ORDER);
	fflush(stdout);
	if (huge)
		return 1;
	if (!fork()) {
		setenv("KVSCRATCH_FRAGMENTED", "yes", 1);
		execvp(argv[1], argv + 1);
		perror(argv[1]);
		_exit(127);
	}
	NEED(wait(&status) > 0);
	huge = huge_chunks();
	/* some of what the program gave back may be in one piece */
	printf("# %u of %u chunks huge after it\n", huge, CHUNKS);
	return huge == CHUNKS ? 1 : WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
