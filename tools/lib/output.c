// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "output.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/openat2.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* The limit of the size of files */

static void size_signal_set(sigset_t *set)
{
	sigemptyset(set);
	sigaddset(set, SIGXFSZ);
}

void hold_size_signal(struct size_signal *held)
{
	sigset_t set, pending;

	size_signal_set(&set);
	pthread_sigmask(SIG_BLOCK, &set, &held->mask);
	held->pending = sigismember(&held->mask, SIGXFSZ) && !sigpending(&pending) &&
			sigismember(&pending, SIGXFSZ);
}

void drop_size_signal(const struct size_signal *held, int err)
{
	const struct timespec now = { 0 };
	sigset_t set;

	size_signal_set(&set);
	/* one that was pending before is not ours to take */
	while (err == -EFBIG && !held->pending && sigtimedwait(&set, NULL, &now) < 0 &&
	       errno == EINTR)
		;
	pthread_sigmask(SIG_SETMASK, &held->mask, NULL);
}

/* Replacing a file */

const char *file_kind(mode_t mode)
{
	switch (mode & S_IFMT) {
	case S_IFREG:
		return "a regular file";
	case S_IFDIR:
		return "a directory";
	case S_IFLNK:
		return "a symbolic link";
	case S_IFIFO:
		return "a FIFO";
	case S_IFSOCK:
		return "a socket";
	case S_IFCHR:
		return "a character device";
	case S_IFBLK:
		return "a block device";
	default:
		return "something else";
	}
}

static int fail_output(struct output *output, int err, const char *format, ...)
	__attribute__((format(printf, 3, 4)));

static int fail_output(struct output *output, int err, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(output->words, sizeof(output->words), format, arguments);
	va_end(arguments);
	return err;
}

/* To where what is to be made goes: a link to nothing would be replaced itself. */
static int find_new(struct output *output, const char *path)
{
	struct stat link;

	if (!*path)
		return fail_output(output, -EINVAL, "expected the path of a file, got an empty one");
	if (!lstat(path, &link))
		return fail_output(output, -EINVAL,
				   "expected a regular file or none, got a link to nothing");
	output->is_new = true;
	output->path = strdup(path);
	return output->path ? 0 : fail_output(output, -ENOMEM, "out of memory");
}

static int find_old(struct output *output, const char *path, const struct stat *old)
{
	if (!S_ISREG(old->st_mode))
		return fail_output(output, -EINVAL, "expected a regular file or none, got %s",
				   file_kind(old->st_mode));
	output->path = realpath(path, NULL);
	/* of a descriptor, say, whose file has no name any more */
	return output->path ? 0 : fail_output(output, -errno, "cannot find the file: %m");
}

static int open_directory(struct output *output)
{
	char *slash = strrchr(output->path, '/');
	const char *directory = ".";

	output->name = output->path;
	if (slash) {
		output->name = slash + 1;
		directory = slash == output->path ? "/" : output->path;
		*slash = '\0';
	}
	output->directory = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (output->directory < 0)
		return fail_output(output, -errno, "cannot open the directory of the file: %m");
	return 0;
}

/* Where the file system and /proc allow it; else the descriptor is -1. */
static void create_nameless(struct output *output, mode_t mode)
{
	char path[32];

	output->fd = openat(output->directory, ".", O_WRONLY | O_TMPFILE | O_CLOEXEC, mode);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", output->fd);
	if (output->fd >= 0 && access(path, F_OK)) {
		close(output->fd);
		output->fd = -1;
	}
	output->nameless = output->fd >= 0;
}

static int name_temporary(struct output *output)
{
	uint32_t number;

	if (getrandom(&number, sizeof(number), 0) < 0)
		return fail_output(output, -errno, "cannot name a temporary file: %m");
	snprintf(output->temporary, sizeof(output->temporary), ".kvscratch-%08" PRIx32, number);
	return 0;
}

static int create_temporary(struct output *output, mode_t mode)
{
	do {
		int err = name_temporary(output);

		if (err)
			return err;
		output->fd = openat(output->directory, output->temporary,
				    O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
	} while (output->fd < 0 && errno == EEXIST);
	if (output->fd >= 0)
		return 0;
	output->temporary[0] = '\0';
	return fail_output(output, -errno, "cannot make a file in the directory: %m");
}

/* The owner before the mode, which is not to be another group's. */
static int keep_owner_and_mode(struct output *output, const struct stat *old)
{
	mode_t mode = old->st_mode & 0777;
	struct stat new;
	bool owned;

	if (fstat(output->fd, &new))
		return fail_output(output, -errno, "cannot look at the new file: %m");
	if (new.st_gid != old->st_gid && fchown(output->fd, -1, old->st_gid))
		mode &= ~070 | (mode & 07) << 3;
	/* who may not give files away has one of his own from now on */
	owned = new.st_uid == old->st_uid || !fchown(output->fd, old->st_uid, -1);
	(void)owned;
	if (fchmod(output->fd, mode))
		return fail_output(output, -errno, "cannot set the permissions of the file: %m");
	return 0;
}

/* /dev/stdout and the like: the file is wanted that the descriptor has, not its name. */
static bool is_descriptor(const char *path)
{
	struct open_how how = {
		.flags = O_PATH | O_CLOEXEC,
		.resolve = RESOLVE_NO_MAGICLINKS,
	};
	int fd = syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof(how));

	if (fd < 0)
		return errno == ELOOP;
	close(fd);
	return false;
}

bool output_in_place(const char *path)
{
	struct stat status;

	return !stat(path, &status) && (!S_ISREG(status.st_mode) || is_descriptor(path));
}

int output_open(struct output *output, const char *path)
{
	struct stat old;
	mode_t mode;
	int err;

	*output = (struct output){ .directory = -1, .fd = -1 };
	if (!stat(path, &old))
		err = find_old(output, path, &old);
	else if (errno == ENOENT)
		err = find_new(output, path);
	else
		err = fail_output(output, -errno, "cannot look at the file: %m");
	if (!err)
		err = open_directory(output);
	if (err)
		return err;
	/* the umask is for new files, and nobody else is to read what has not got its mode yet */
	mode = output->is_new ? 0666 : 0600;
	create_nameless(output, mode);
	if (output->fd < 0)
		err = create_temporary(output, mode);
	return err || output->is_new ? err : keep_owner_and_mode(output, &old);
}

int output_write(struct output *output, const void *bytes, uint64_t count, uint64_t offset)
{
	struct size_signal held;
	int err = 0;

	hold_size_signal(&held);
	while (!err && count) {
		ssize_t written = pwrite(output->fd, bytes, count, offset);

		if (written < 0 && errno == EINTR)
			continue;
		if (written < 0) {
			err = fail_output(output, -errno, "cannot write the file: %m");
			break;
		}
		bytes = (const char *)bytes + written;
		offset += written;
		count -= written;
	}
	drop_size_signal(&held, err);
	return err;
}

/* Give the file a name beside the old one. */
static int link_temporary(struct output *output)
{
	char path[32];
	int err;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", output->fd);
	do {
		err = name_temporary(output);
		if (!err && linkat(AT_FDCWD, path, output->directory, output->temporary,
				   AT_SYMLINK_FOLLOW))
			err = -errno;
	} while (err == -EEXIST);
	if (!err)
		return 0;
	output->temporary[0] = '\0';
	return fail_output(output, err, "cannot make a file in the directory: %s", strerror(-err));
}

static int rename_temporary(struct output *output)
{
	if (renameat(output->directory, output->temporary, output->directory, output->name))
		return fail_output(output, -errno, "cannot put the file in its place: %m");
	return 0;
}

/* A signal in between would leave the other name. */
static int put_in_place(struct output *output)
{
	sigset_t all, before;
	int err = 0;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	if (output->nameless)
		err = link_temporary(output);
	if (!err)
		err = rename_temporary(output);
	if (err && output->temporary[0])
		unlinkat(output->directory, output->temporary, 0);
	output->temporary[0] = '\0';
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return err;
}

int output_replace(struct output *output)
{
	int err;

	if (fsync(output->fd))
		return fail_output(output, -errno, "cannot bring the file to disk: %m");
	err = put_in_place(output);
	if (!err && fsync(output->directory))
		err = fail_output(output, -errno,
				  "cannot bring the directory of the file to disk: %m");
	return err;
}

void output_close(struct output *output)
{
	if (output->fd >= 0)
		close(output->fd);
	if (output->temporary[0])
		unlinkat(output->directory, output->temporary, 0);
	if (output->directory >= 0)
		close(output->directory);
	free(output->path);
}
