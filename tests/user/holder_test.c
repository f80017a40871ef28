// SPDX-License-Identifier: GPL-2.0-only
/*
 * Held pads: who gets a handle, what outlives what, and that no client can keep others
 * waiting. Over both backends, of which these tests know nothing; KVSCRATCH_BACKEND says
 * which. $KVSCRATCHCTL is the program, otherwise it is found in PATH.
 */
#include "common.h"

#include <dirent.h>
#include <ftw.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "../../tools/lib/holder.h"

#define F32 KVSCRATCH_DTYPE_F32
#define U8 KVSCRATCH_DTYPE_U8

/* More than a holder looks after at a time */
#define SILENT_CLIENTS 200

/* Anybody but the user who runs this */
#define OTHER_USER 12345

#define EXPECT_ERROR(error, words, call) do { \
	EXPECT_EQ(-(error), (long)(call)); \
	EXPECT_STREQ(words, kvscratch_error()); \
} while (0)

static const float row[4] = { 1, 2, 3, 4 };

/* What the latest kvscratchctl had to say */
static char said[256];

/* The exit status of kvscratchctl */
static int ctl(const char *verb, ...)
{
	const char *program = getenv("KVSCRATCHCTL");
	const char *argv[16] = { "kvscratchctl", verb };
	va_list arguments;
	int errors = memfd_create("errors", MFD_CLOEXEC);
	int argc = 2, status;
	ssize_t bytes;
	pid_t pid;

	va_start(arguments, verb);
	while ((argv[argc] = va_arg(arguments, const char *)))
		argc++;
	va_end(arguments);
	pid = fork_child();
	if (!pid) {
		dup2(errors, STDERR_FILENO);
		execvp(program ? program : "kvscratchctl", (char **)argv);
		_exit(127);
	}
	status = wait_for(pid);
	bytes = pread(errors, said, sizeof(said) - 1, 0);
	said[bytes < 0 ? 0 : bytes] = '\0';
	close(errors);
	return status;
}

#define hold(...) ctl("hold", __VA_ARGS__, NULL)
#define hold_one(name) hold(name, "--write", "--max-seq-len", "400", "--dim", "4")

static int connect_to(const char *name)
{
	char path[108];

	if (kvscratch_holder_path(name, path, sizeof(path)))
		return -1;
	return kvscratch_connect(path);
}

static pid_t pid_of_peer(int sock)
{
	struct ucred peer;
	socklen_t size = sizeof(peer);

	return getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &peer, &size) ? -1 : peer.pid;
}

static pid_t pid_of(const char *name)
{
	int sock = connect_to(name);
	pid_t pid = pid_of_peer(sock);

	close(sock);
	return pid;
}

/* Returns once nobody listens any more: it is not our child. */
static void kill_holder(const char *name)
{
	pid_t pid = pid_of(name);
	int sock;

	if (pid <= 1)
		return;
	kill(pid, SIGKILL);
	while ((sock = connect_to(name)) >= 0) {
		close(sock);
		sched_yield();
	}
}

/* How many descriptors a process has open */
static int nr_files(pid_t pid)
{
	char path[64];
	int count = 0;
	DIR *directory;

	snprintf(path, sizeof(path), "/proc/%d/fd", pid);
	directory = opendir(path);
	if (!directory)
		return -1;
	while (readdir(directory))
		count++;
	closedir(directory);
	return count;
}

/* Of a holder "story", without those of clients that were served: they are gone for the next one. */
static int nr_files_idle(pid_t pid)
{
	kvscratch_holder_drop("story/none");
	return nr_files(pid);
}

static int remove_entry(const char *path, const struct stat *status, int type, struct FTW *where)
{
	(void)status;
	(void)type;
	(void)where;
	return remove(path);
}

FIXTURE(held) {
	char runtime[32];
	char sockets[64];
};

FIXTURE_SETUP(held)
{
	strcpy(self->runtime, "/tmp/holder-test-XXXXXX");
	ASSERT_NE(NULL, mkdtemp(self->runtime));
	snprintf(self->sockets, sizeof(self->sockets), "%s/kvscratch", self->runtime);
	setenv("XDG_RUNTIME_DIR", self->runtime, 1);
}

FIXTURE_TEARDOWN(held)
{
	DIR *directory;
	struct dirent *entry;

	setenv("XDG_RUNTIME_DIR", self->runtime, 1);
	directory = opendir(self->sockets);
	while (directory && (entry = readdir(directory)))
		if (holder_name_is_valid(entry->d_name))
			kill_holder(entry->d_name);
	if (directory)
		closedir(directory);
	nftw(self->runtime, remove_entry, 8, FTW_DEPTH | FTW_PHYS);
}

TEST_F_TIMEOUT(held, handles_are_those_of_one_pad, TEST_SECONDS)
{
	struct kvscratch *writer, *reader;

	ASSERT_EQ(0, hold_one("story"));
	ASSERT_EQ(0, kvscratch_attach_name(&writer, "story", O_RDWR)) TH_LOG("%s", kvscratch_error());
	ASSERT_EQ(0, kvscratch_attach_name(&reader, "story/pad", O_RDONLY));
	EXPECT_EQ(O_RDONLY, kvscratch_access(reader));
	EXPECT_EQ(0, kvscratch_append(writer, row, 4));
	EXPECT_EQ(1, kvscratch_len(reader));
	EXPECT_EQ(-EBADF, kvscratch_append(reader, row, 4));
	EXPECT_EQ(-EBADF, kvscratch_truncate(reader, 0, 0));
	EXPECT_EQ(1, kvscratch_len(writer));
	kvscratch_close(writer);
	kvscratch_close(reader);
}

TEST_F_TIMEOUT(held, handles_are_read_only_unless_write_is_allowed, TEST_SECONDS)
{
	struct kvscratch *pad;

	ASSERT_EQ(0, hold("story", "--max-seq-len", "4", "--dim", "4"));
	EXPECT_ERROR(EACCES, "story: handles are for reading only: the holder was started without "
		     "--write", kvscratch_attach_name(&pad, "story", O_RDWR));
	EXPECT_EQ(-EACCES, kvscratch_attach_name(&pad, "story", O_WRONLY));
	EXPECT_EQ(-EINVAL, kvscratch_attach_name(&pad, "story", 3));
	ASSERT_EQ(0, kvscratch_attach_name(&pad, "story", O_RDONLY));
	EXPECT_EQ(-EBADF, kvscratch_append(pad, row, 4));
	kvscratch_close(pad);
}

TEST_F_TIMEOUT(held, file_positions_are_not_shared, TEST_SECONDS)
{
	struct kvscratch *writer, *readers[2];
	float got[2][4] = { 0 };

	ASSERT_EQ(0, hold_one("story"));
	ASSERT_EQ(0, kvscratch_attach_name(&writer, "story", O_RDWR));
	EXPECT_EQ(0, kvscratch_append(writer, row, 4));
	for (int i = 0; i < 2; i++) {
		ASSERT_EQ(0, kvscratch_attach_name(&readers[i], "story", O_RDONLY));
		EXPECT_EQ(sizeof(row), read(kvscratch_fd(readers[i]), got[i], sizeof(row)));
		EXPECT_EQ(0, memcmp(row, got[i], sizeof(row)));
	}
	for (int i = 0; i < 2; i++)
		kvscratch_close(readers[i]);
	kvscratch_close(writer);
}

static const char *const names_of_three[] = { "k0", "v0", "tokens" };

/* Three pads, as a decoder has them; returns what kvscratch_holder_put() does. */
static int put_three(struct kvscratch **pads)
{
	int fds[3];

	for (int i = 0; i < 3; i++) {
		if (kvscratch_new(&pads[i], 4, 4, F32))
			abort();
		fds[i] = kvscratch_fd(pads[i]);
	}
	return kvscratch_holder_put("story", names_of_three, fds, 3);
}

static void close_three(struct kvscratch **pads)
{
	for (int i = 0; i < 3; i++)
		kvscratch_close(pads[i]);
}

TEST_F_TIMEOUT(held, pads_that_were_put_outlive_their_maker, TEST_SECONDS)
{
	struct kvscratch *pads[3], *held;
	char names[KVSCRATCH_MAX_NAMES_BYTES];
	int fds[3];

	ASSERT_EQ(0, hold("story", "--write"));
	EXPECT_EQ(0, kvscratch_holder_get("story", O_RDWR, names, sizeof(names), fds, 3));
	ASSERT_EQ(0, put_three(pads)) TH_LOG("%s", kvscratch_error());
	for (int i = 0; i < 3; i++)
		EXPECT_EQ(0, kvscratch_append_rows(pads[i], (float[2][4]){ { i }, { 7 } }, 2, 4));
	close_three(pads);

	EXPECT_EQ(-EMSGSIZE, kvscratch_holder_get("story", O_RDWR, names, sizeof(names), fds, 2));
	ASSERT_EQ(3, kvscratch_holder_get("story", O_RDWR, names, sizeof(names), fds, 3));
	EXPECT_EQ(0, memcmp(names, "k0\0v0\0tokens", sizeof("k0\0v0\0tokens")));
	for (int i = 0; i < 3; i++) {
		struct kvscratch_tensor tensor;

		ASSERT_EQ(0, kvscratch_from_fd(&held, fds[i]));
		ASSERT_EQ(0, kvscratch_as_tensor(held, &tensor));
		EXPECT_EQ(2, tensor.len);
		EXPECT_EQ((float)i, *(const float *)tensor.data);
		EXPECT_EQ(0, kvscratch_append(held, row, 4));
		kvscratch_close(held);
	}
	ASSERT_EQ(0, kvscratch_attach_name(&held, "story/v0", O_RDONLY));
	EXPECT_EQ(3, kvscratch_len(held));
	kvscratch_close(held);
}

TEST_F_TIMEOUT(held, a_put_is_all_or_nothing, TEST_SECONDS)
{
	struct kvscratch *pads[3], *again[3];
	char names[KVSCRATCH_MAX_NAMES_BYTES];
	int fds[4], null;

	ASSERT_EQ(0, hold("story", "--write"));
	ASSERT_EQ(0, put_three(pads));
	EXPECT_ERROR(EEXIST, "story: a pad \"k0\" is held already", put_three(again));
	close_three(again);
	fds[0] = fds[1] = kvscratch_fd(pads[0]);
	EXPECT_ERROR(EEXIST, "story: \"new\" was given twice",
		     kvscratch_holder_put("story", (const char *[]){ "new", "new" }, fds, 2));
	EXPECT_EQ(-EEXIST, kvscratch_holder_put("story", (const char *[]){ "new", "tokens" }, fds,
						2));
	null = fds[1] = open("/dev/null", O_RDWR | O_CLOEXEC);
	EXPECT_EQ(-ENOTTY, kvscratch_holder_put("story", (const char *[]){ "new", "null" }, fds,
						2));
	EXPECT_EQ(-EINVAL, kvscratch_holder_put("story", (const char *[]){ "new", "a/b" }, fds, 2));
	EXPECT_EQ(-EINVAL, kvscratch_holder_put("story", NULL, fds, 0));
	EXPECT_EQ(-EINVAL, kvscratch_holder_put("story", NULL, fds, KVSCRATCH_MAX_PASSED + 1));
	close(null);
	EXPECT_EQ(3, kvscratch_holder_get("story", O_RDONLY, names, sizeof(names), fds, 4));
	for (int i = 0; i < 3; i++)
		close(fds[i]);
	close_three(pads);
}

TEST_F_TIMEOUT(held, a_put_takes_a_holder_for_writing, TEST_SECONDS)
{
	struct kvscratch *pads[3];

	ASSERT_EQ(0, hold("story", "--max-seq-len", "4", "--dim", "4"));
	EXPECT_ERROR(EACCES, "story: the holder was started without --write", put_three(pads));
	close_three(pads);
}

TEST_F_TIMEOUT(held, a_handle_that_was_put_for_reading_stays_so, TEST_SECONDS)
{
	struct kvscratch *pad, *held;
	int reader;

	ASSERT_EQ(0, hold("story", "--write"));
	ASSERT_EQ(0, kvscratch_new(&pad, 4, 4, F32));
	reader = kvscratch_open_reader(pad);
	ASSERT_EQ(0, kvscratch_holder_put("story", (const char *[]){ "k0" }, &reader, 1));
	EXPECT_ERROR(EACCES, "story: k0: the handle that is held is for reading only",
		     kvscratch_attach_name(&held, "story", O_RDWR));
	EXPECT_EQ(0, kvscratch_attach_name(&held, "story", O_RDONLY));
	kvscratch_close(held);
	kvscratch_close(pad);
	close(reader);
}

/* A descriptor that a verb inherits */
#define INHERITED 100
#define ctl_inherited(verb, ...) ctl(verb, "--fd", "100", __VA_ARGS__, NULL)

TEST_F_TIMEOUT(held, descriptors_that_are_open_for_less, TEST_SECONDS)
{
	struct kvscratch *pad, *less;
	char file[64];

	snprintf(file, sizeof(file), "%s/rows", self->runtime);
	ASSERT_EQ(0, kvscratch_new(&pad, 4, 4, F32));
	ASSERT_EQ(0, kvscratch_append(pad, row, 4));
	ASSERT_EQ(0, kvscratch_attach(&less, kvscratch_fd(pad), O_RDONLY));
	ASSERT_EQ(INHERITED, dup2(kvscratch_fd(less), INHERITED));
	kvscratch_close(less);
	EXPECT_EQ(0, ctl_inherited("dump", "--format", "raw", "-o", file));
	EXPECT_EQ(2, ctl_inherited("append", file));
	EXPECT_STREQ("kvscratchctl append: descriptor 100: expected it open for write, got read "
		     "only\n", said);
	EXPECT_EQ(2, ctl_inherited("truncate", "--len", "0"));
	EXPECT_STREQ("kvscratchctl truncate: descriptor 100: expected it open for write, got read "
		     "only\n", said);
	EXPECT_EQ(1, kvscratch_len(pad));
	/* which there is not everywhere */
	if (!kvscratch_attach(&less, kvscratch_fd(pad), O_WRONLY)) {
		ASSERT_EQ(INHERITED, dup2(kvscratch_fd(less), INHERITED));
		kvscratch_close(less);
		EXPECT_EQ(0, ctl_inherited("append", file));
		EXPECT_EQ(2, kvscratch_len(pad));
		EXPECT_EQ(2, ctl_inherited("dump", "-o", file));
		EXPECT_STREQ("kvscratchctl dump: descriptor 100: expected it open for read, got "
			     "write only\n", said);
	}
	close(INHERITED);
	kvscratch_close(pad);
}

/* Marked by the rows that it has */
static struct kvscratch *pad_of_rows(unsigned int rows)
{
	struct kvscratch *pad;

	if (kvscratch_new(&pad, 64, 4, F32))
		abort();
	while (rows--)
		if (kvscratch_append(pad, row, 4))
			abort();
	return pad;
}

/* Returns what kvscratch_holder_replace() does: one pad of so many rows under each name. */
static int replace(const char *const *names, unsigned int count, unsigned int rows)
{
	struct kvscratch *pad = pad_of_rows(rows);
	int fds[KVSCRATCH_MAX_PASSED], err;

	for (unsigned int i = 0; i < count; i++)
		fds[i] = kvscratch_fd(pad);
	err = kvscratch_holder_replace("story", names, fds, count);
	kvscratch_close(pad);
	return err;
}

/* "k0=2 v0=2", of handles that it closes */
static const char *list_handles(const char *name, const int *fds, int count)
{
	static char text[256];
	size_t end = 0;

	text[0] = '\0';
	for (int i = 0; i < count; i++, name += strlen(name) + 1) {
		struct kvscratch *pad;

		if (kvscratch_from_fd(&pad, fds[i]))
			abort();
		end += snprintf(text + end, sizeof(text) - end, "%s%s=%d", i ? " " : "", name,
				(int)kvscratch_len(pad));
		kvscratch_close(pad);
	}
	return text;
}

static const char *list_held(void)
{
	char names[KVSCRATCH_MAX_NAMES_BYTES];
	int fds[8];
	int count = kvscratch_holder_get("story", O_RDONLY, names, sizeof(names), fds, 8);

	return count < 0 ? kvscratch_error() : list_handles(names, fds, count);
}

TEST_F_TIMEOUT(held, names_move_to_new_pads, TEST_SECONDS)
{
	struct kvscratch *pads[3], *old, *held;
	const struct kvscratch_view *view;
	pid_t pid;
	int files;

	ASSERT_EQ(0, hold("story", "--write"));
	ASSERT_EQ(0, put_three(pads));
	ASSERT_EQ(0, kvscratch_attach_name(&old, "story/k0", O_RDWR));
	view = kvscratch_view(old);
	ASSERT_NE(NULL, view);
	/* one that is not there yet comes along */
	ASSERT_EQ(0, replace((const char *[]){ "v1", "k0", "v0" }, 3, 2))
		TH_LOG("%s", kvscratch_error());
	EXPECT_STREQ("tokens=0 v1=2 k0=2 v0=2", list_held());
	ASSERT_EQ(0, kvscratch_attach_name(&held, "story/k0", O_RDWR));
	EXPECT_EQ(0, kvscratch_append(held, row, 4));
	/* who has the old one keeps it, and is alone with it */
	EXPECT_EQ(0, kvscratch_len(old));
	EXPECT_EQ(0, kvscratch_append(old, row, 4));
	EXPECT_EQ(0, memcmp(kvscratch_view_row(view, 0), row, sizeof(row)));
	EXPECT_EQ(1, kvscratch_len(pads[0]));
	EXPECT_EQ(3, kvscratch_len(held));
	kvscratch_close(held);
	kvscratch_close(old);
	close_three(pads);

	pid = pid_of("story");
	files = nr_files_idle(pid);
	for (unsigned int rows = 0; rows < 50; rows++)
		ASSERT_EQ(0, replace(names_of_three, 3, rows));
	EXPECT_STREQ("v1=3 k0=49 v0=49 tokens=49", list_held());
	EXPECT_GE(files + 1, nr_files_idle(pid));
}

TEST_F_TIMEOUT(held, a_replacement_takes_a_holder_for_writing, TEST_SECONDS)
{
	ASSERT_EQ(0, hold("story", "--max-seq-len", "4", "--dim", "4"));
	EXPECT_EQ(-EACCES, replace((const char *[]){ "pad" }, 1, 2));
	EXPECT_STREQ("story: the holder was started without --write", kvscratch_error());
	EXPECT_STREQ("pad=0", list_held());
}

/* Of its soft limit, which is as high as the hard one */
static void limit_files(pid_t pid, rlim_t files)
{
	struct rlimit limit;

	if (prlimit(pid, RLIMIT_NOFILE, NULL, &limit))
		abort();
	limit.rlim_cur = files < limit.rlim_max ? files : limit.rlim_max;
	if (prlimit(pid, RLIMIT_NOFILE, &limit, NULL))
		abort();
}

TEST_F_TIMEOUT(held, a_replacement_is_all_or_nothing, TEST_SECONDS)
{
	static const char before[] = "k0=0 v0=0 tokens=0";
	struct kvscratch *pads[3];
	int fds[2], err = 0;
	pid_t pid;

	ASSERT_EQ(0, hold("story", "--write"));
	ASSERT_EQ(0, put_three(pads));
	close_three(pads);
	EXPECT_EQ(-EEXIST, replace((const char *[]){ "k0", "v0", "k0" }, 3, 1));
	EXPECT_STREQ("story: \"k0\" was given twice", kvscratch_error());
	EXPECT_STREQ(before, list_held());
	EXPECT_EQ(-EEXIST, replace((const char *[]){ "new", "k0", "new" }, 3, 1));
	EXPECT_EQ(-EINVAL, replace((const char *[]){ "k0", "a/b" }, 2, 1));
	EXPECT_EQ(-EINVAL, kvscratch_holder_replace("story", NULL, fds, 0));

	pads[0] = pad_of_rows(1);
	fds[0] = kvscratch_fd(pads[0]);
	fds[1] = open("/dev/null", O_RDWR | O_CLOEXEC);
	EXPECT_EQ(-ENOTTY, kvscratch_holder_replace("story", (const char *[]){ "k0", "v0" }, fds,
						    2));
	EXPECT_STREQ(before, list_held());
	close(fds[1]);
	kvscratch_close(pads[0]);

	/* with one descriptor more each time it gets a step further */
	pid = pid_of("story");
	for (int more = 0; err || !more; more++) {
		/* of which two are . and .. */
		limit_files(pid, nr_files(pid) - 2 + more);
		err = replace((const char *[]){ "v0", "k0" }, 2, 5);
		limit_files(pid, RLIM_INFINITY);
		ASSERT_STREQ(err ? before : "tokens=0 v0=5 k0=5", list_held()) TH_LOG("%d more", more);
		ASSERT_GT(20, more);
		/* without one even the client cannot be served */
		if (err && err != -EMFILE)
			EXPECT_EQ(-EPROTO, err) TH_LOG("%d more: %s", more, kvscratch_error());
	}
	EXPECT_GT(err + 1, 0);
}

/* Names move from one pair of pads to the next while others ask for them all the time. */
TEST_F_TIMEOUT(held, a_reader_gets_the_old_pads_or_the_new_ones, TEST_SECONDS)
{
	static const char *const forwards[] = { "k0", "v0" };
	static const char *const backwards[] = { "v0", "k0" };
	unsigned int pairs = 0, turns = 0;
	int status = 0;
	pid_t pid;

	ASSERT_EQ(0, hold("story", "--write"));
	ASSERT_EQ(0, replace(forwards, 2, 0));
	pid = fork_child();
	if (!pid) {
		for (unsigned int rows = 1; rows < 60; rows++)
			CHILD_CHECK(!replace(rows % 2 ? backwards : forwards, 2, rows));
		_exit(0);
	}
	while (!waitpid(pid, &status, WNOHANG)) {
		char names[3] = "";
		int rows[2] = { -1, -1 };
		const char *list = list_held();

		ASSERT_EQ(4, sscanf(list, "%c0=%d %c0=%d", &names[0], &rows[0], &names[1], &rows[1]))
			TH_LOG("%s", list);
		ASSERT_EQ(rows[0], rows[1]) TH_LOG("%s", list);
		ASSERT_STREQ(rows[0] % 2 ? "vk" : "kv", names);
		turns += rows[0] != (int)pairs;
		pairs = rows[0];
	}
	EXPECT_EQ(0, status);
	EXPECT_STREQ("v0=59 k0=59", list_held());
	/* or it saw nothing */
	EXPECT_GT(turns, 2);
}

/* The longest names that so many pads can have: each 15 bytes, some 16, and a NUL */
static const char *const *full_names(void)
{
	static char text[KVSCRATCH_MAX_PASSED][KVSCRATCH_MAX_NAME + 1];
	static const char *names[KVSCRATCH_MAX_PASSED];
	const int longer = KVSCRATCH_MAX_NAMES_BYTES - KVSCRATCH_MAX_PASSED * 16;

	for (int i = 0; i < KVSCRATCH_MAX_PASSED; i++) {
		snprintf(text[i], sizeof(text[i]), "k%0*d", i < longer ? 15 : 14, i);
		names[i] = text[i];
	}
	return names;
}

TEST_F_TIMEOUT(held, a_full_holder, TEST_SECONDS)
{
	static char names[KVSCRATCH_MAX_NAMES_BYTES];
	static int fds[KVSCRATCH_MAX_PASSED];
	static const int accesses[] = { O_RDONLY, O_RDWR, O_WRONLY };
	const char *const *list = full_names();
	struct kvscratch *pad, *held;
	char first[KVSCRATCH_MAX_NAME + 8];
	pid_t pid;
	int files;

	ASSERT_EQ(0, hold("story", "--write"));
	ASSERT_EQ(0, kvscratch_new(&pad, 1, 1, U8));
	for (int i = 0; i < KVSCRATCH_MAX_PASSED; i++)
		fds[i] = kvscratch_fd(pad);
	ASSERT_EQ(0, kvscratch_holder_put("story", list, fds, KVSCRATCH_MAX_PASSED))
		TH_LOG("%s", kvscratch_error());
	EXPECT_EQ(-EMSGSIZE, kvscratch_holder_put("story", (const char *[]){ "more" }, fds, 1));
	EXPECT_EQ(-EMSGSIZE, kvscratch_holder_replace("story", (const char *[]){ "more", list[7] },
						      fds, 2));
	/* all names again take no room */
	ASSERT_EQ(0, kvscratch_holder_replace("story", list, fds, KVSCRATCH_MAX_PASSED))
		TH_LOG("%s", kvscratch_error());
	snprintf(first, sizeof(first), "story/%s", list[0]);
	pid = pid_of("story");
	files = nr_files_idle(pid);
	for (size_t i = 0; i < ARRAY_SIZE(accesses); i++) {
		/* there is no such handle in a memfd */
		bool refused = kvscratch_backend(pad) == KVSCRATCH_BACKEND_MEMFD &&
			       accesses[i] == O_WRONLY;
		const char *name = names;

		EXPECT_EQ(refused ? -EOPNOTSUPP : 0, kvscratch_attach_name(&held, first, accesses[i]));
		if (!refused)
			kvscratch_close(held);
		ASSERT_EQ(refused ? -EOPNOTSUPP : KVSCRATCH_MAX_PASSED,
			  kvscratch_holder_get("story", accesses[i], names, sizeof(names), fds,
					       KVSCRATCH_MAX_PASSED));
		for (int at = 0; !refused && at < KVSCRATCH_MAX_PASSED; at++) {
			ASSERT_STREQ(list[at], name);
			name += strlen(name) + 1;
			ASSERT_EQ(0, kvscratch_from_fd(&held, fds[at]));
			EXPECT_EQ(accesses[i], kvscratch_access(held));
			kvscratch_close(held);
		}
	}
	EXPECT_GE(files + 1, nr_files_idle(pid));
	EXPECT_EQ(0, kvscratch_holder_drop(first));
	EXPECT_EQ(-ENOKEY, kvscratch_attach_name(&held, first, O_RDONLY));
	kvscratch_close(pad);
}

/* A client of the holder, another process, that writes a row and waits to be taken over */
static void write_until_fenced(int line)
{
	struct kvscratch *pad, *writer;

	CHILD_CHECK(!kvscratch_attach_name(&pad, "story", O_RDWR));
	CHILD_CHECK(!kvscratch_writer(&writer, pad));
	CHILD_CHECK(!kvscratch_stage(writer, 0, 0, row, 1) && !kvscratch_commit(writer, 1));
	CHILD_CHECK(!kvscratch_stage(writer, 0, 1, row, 1));
	say(line);
	hear(line);
	CHILD_CHECK(kvscratch_commit(writer, 2) == -ESTALE);
	CHILD_CHECK(kvscratch_stage(writer, 0, 1, row, 1) == -ESTALE);
	CHILD_CHECK(kvscratch_append(pad, row, 4) == -EBUSY);
	CHILD_CHECK(kvscratch_writer(&writer, pad) == -EBUSY);
	CHILD_CHECK(kvscratch_len(pad) == 1);
	_exit(0);
}

TEST_F_TIMEOUT(held, writers_through_a_holder_are_fenced, TEST_SECONDS)
{
	struct kvscratch *pad, *writer, *reader;
	struct child child;

	ASSERT_EQ(0, hold_one("story"));
	if (start_child(&child))
		write_until_fenced(child.line);
	ASSERT_TRUE(hear(child.line));
	ASSERT_EQ(0, kvscratch_attach_name(&reader, "story", O_RDONLY));
	ASSERT_EQ(0, kvscratch_attach_name(&pad, "story", O_RDWR));
	EXPECT_EQ(-EBUSY, kvscratch_writer(&writer, pad));
	EXPECT_EQ(-EBUSY, kvscratch_append(pad, row, 4));
	EXPECT_EQ(-EBADF, kvscratch_takeover(&writer, reader));
	ASSERT_EQ(0, kvscratch_takeover(&writer, pad)) TH_LOG("%s", kvscratch_error());
	EXPECT_EQ(0, end_child(&child));
	EXPECT_EQ(1, kvscratch_len(reader));
	EXPECT_EQ(0, kvscratch_stage(writer, 0, 1, row, 1));
	EXPECT_EQ(0, kvscratch_commit(writer, 2));
	EXPECT_EQ(2, kvscratch_len(reader));
	kvscratch_close(writer);
	kvscratch_close(pad);
	kvscratch_close(reader);
}

TEST_F_TIMEOUT(held, a_name_alone_is_the_only_pad, TEST_SECONDS)
{
	struct kvscratch *pads[3], *held;

	ASSERT_EQ(0, hold("story", "--write"));
	EXPECT_ERROR(EINVAL, "story: expected a holder of one pad, or NAME/PAD, got one of 0 pads",
		     kvscratch_attach_name(&held, "story", O_RDONLY));
	ASSERT_EQ(0, put_three(pads));
	EXPECT_ERROR(EINVAL, "story: expected a holder of one pad, or NAME/PAD, got one of 3 pads",
		     kvscratch_attach_name(&held, "story", O_RDONLY));
	EXPECT_EQ(0, kvscratch_holder_drop("story/k0"));
	EXPECT_EQ(0, kvscratch_holder_drop("story/tokens"));
	EXPECT_ERROR(ENOKEY, "story: there is no pad \"k0\"",
		     kvscratch_attach_name(&held, "story/k0", O_RDONLY));
	ASSERT_EQ(0, kvscratch_attach_name(&held, "story", O_RDONLY));
	kvscratch_close(held);
	close_three(pads);
}

TEST_F_TIMEOUT(held, a_drop_ends_the_holder_and_no_view, TEST_SECONDS)
{
	struct kvscratch *pad, *other;
	const struct kvscratch_view *view;

	ASSERT_EQ(0, hold_one("story"));
	ASSERT_EQ(0, kvscratch_attach_name(&pad, "story", O_RDWR));
	ASSERT_EQ(0, kvscratch_append(pad, row, 4));
	view = kvscratch_view(pad);
	ASSERT_NE(NULL, view);
	EXPECT_EQ(0, kvscratch_holder_drop("story"));
	EXPECT_EQ(-ENOENT, kvscratch_attach_name(&other, "story", O_RDONLY));
	/* the name is free at once */
	EXPECT_EQ(0, hold_one("story"));
	ASSERT_EQ(0, kvscratch_attach_name(&other, "story", O_RDONLY));
	EXPECT_EQ(0, kvscratch_len(other));
	EXPECT_EQ(0, memcmp(view->data, row, sizeof(row)));
	EXPECT_EQ(0, kvscratch_append(pad, row, 4));
	EXPECT_EQ(2, kvscratch_len(pad));
	kvscratch_close(pad);
	kvscratch_close(other);
}

TEST_F_TIMEOUT(held, a_holder_that_is_killed_hurts_no_client, TEST_SECONDS)
{
	struct kvscratch *pad, *other;
	const struct kvscratch_view *view;

	ASSERT_EQ(0, hold_one("story"));
	ASSERT_EQ(0, kvscratch_attach_name(&pad, "story", O_RDWR));
	view = kvscratch_view(pad);
	ASSERT_NE(NULL, view);
	kill_holder("story");
	EXPECT_EQ(0, kvscratch_append(pad, row, 4));
	EXPECT_EQ(0, memcmp(view->data, row, sizeof(row)));
	EXPECT_EQ(-ENOENT, kvscratch_attach_name(&other, "story", O_RDONLY));
	/* its socket is still there, and replaced */
	EXPECT_EQ(0, hold_one("story"));
	EXPECT_EQ(0, kvscratch_attach_name(&other, "story", O_RDONLY));
	kvscratch_close(other);
	kvscratch_close(pad);
}

TEST_F_TIMEOUT(held, signals_end_a_holder_and_its_socket, TEST_SECONDS)
{
	char path[108];

	ASSERT_EQ(0, kvscratch_holder_path("story", path, sizeof(path)));
	ASSERT_EQ(0, hold_one("story"));
	kill(pid_of("story"), SIGTERM);
	while (!access(path, F_OK))
		sched_yield();
	EXPECT_EQ(0, hold_one("story"));
}

TEST_F_TIMEOUT(held, one_holder_per_name, TEST_SECONDS)
{
	int winners = 0;

	ASSERT_EQ(0, hold_one("story"));
	EXPECT_EQ(2, hold_one("story"));
	/* all of them find the socket of a dead one */
	for (int times = 0; times < 10; times++) {
		pid_t pids[6];

		kill_holder("story");
		for (int i = 0; i < 6; i++) {
			pids[i] = fork_child();
			if (!pids[i])
				_exit(hold_one("story"));
		}
		winners = 0;
		for (int i = 0; i < 6; i++)
			winners += !wait_for(pids[i]);
		ASSERT_EQ(1, winners);
	}
}

/* Whether somebody waits for a lock on the directory of all sockets */
static bool is_awaited(const char *directory)
{
	char line[256], inode[32];
	struct stat status;
	bool found = false;
	FILE *locks = fopen("/proc/locks", "re");

	if (!locks || stat(directory, &status))
		abort();
	snprintf(inode, sizeof(inode), ":%llu ", (unsigned long long)status.st_ino);
	while (fgets(line, sizeof(line), locks))
		found |= strstr(line, "-> FLOCK") && strstr(line, inode);
	fclose(locks);
	return found;
}

/* Or two of them could take each other for dead: one that is bound and does not listen yet. */
TEST_F_TIMEOUT(held, holders_begin_one_after_the_other, TEST_SECONDS)
{
	int directory, status;
	pid_t pid;

	ASSERT_EQ(0, mkdir(self->sockets, 0700));
	directory = open(self->sockets, O_RDONLY | O_CLOEXEC);
	ASSERT_EQ(0, flock(directory, LOCK_EX));
	pid = fork_child();
	if (!pid)
		_exit(hold_one("story"));
	while (!is_awaited(self->sockets)) {
		ASSERT_EQ(0, waitpid(pid, &status, WNOHANG)) TH_LOG("it did not wait");
		sched_yield();
	}
	/* the child has it open as well */
	EXPECT_EQ(0, flock(directory, LOCK_UN));
	EXPECT_EQ(0, wait_for(pid));
	close(directory);
}

TEST_F_TIMEOUT(held, names, TEST_SECONDS)
{
	char longest[KVSCRATCH_MAX_NAME + 2];
	struct kvscratch *pad;
	static const char *const wrong[] = {
		"", ".", "..", ".x", "../x", "a b", "a\nb", "a/", "/a", "a/b/c", "a/.b", "\xc3\xa4",
	};

	for (size_t i = 0; i < sizeof(wrong) / sizeof(*wrong); i++) {
		EXPECT_EQ(-EINVAL, kvscratch_attach_name(&pad, wrong[i], O_RDONLY))
			TH_LOG("\"%s\"", wrong[i]);
		EXPECT_EQ(-EINVAL, kvscratch_holder_drop(wrong[i]));
		EXPECT_EQ(1, hold_one(wrong[i]));
	}
	memset(longest, 'x', sizeof(longest));
	longest[KVSCRATCH_MAX_NAME + 1] = '\0';
	EXPECT_EQ(-EINVAL, kvscratch_attach_name(&pad, longest, O_RDONLY));
	longest[KVSCRATCH_MAX_NAME] = '\0';
	EXPECT_EQ(-ENOENT, kvscratch_attach_name(&pad, longest, O_RDONLY));
	EXPECT_EQ(-EINVAL, kvscratch_holder_get("a/b", O_RDONLY, NULL, 0, NULL, 0));
	EXPECT_EQ(-EINVAL, kvscratch_holder_put("a/b", (const char *[]){ "k0" }, &(int){ 0 }, 1));
	EXPECT_EQ(0, hold_one("a.b-c_D9"));
	ASSERT_EQ(0, kvscratch_attach_name(&pad, "a.b-c_D9", O_RDONLY));
	kvscratch_close(pad);
}

TEST_F_TIMEOUT(held, the_directory_is_ours_alone, TEST_SECONDS)
{
	char path[256];
	char deep[160] = "/";
	struct stat status;

	ASSERT_EQ(0, hold_one("story"));
	ASSERT_EQ(0, stat(self->sockets, &status));
	EXPECT_EQ(S_IFDIR | 0700, (int)status.st_mode);
	EXPECT_EQ(0, kvscratch_holder_drop("story"));

	EXPECT_EQ(0, chmod(self->sockets, 0755));
	EXPECT_EQ(2, hold_one("story"));
	EXPECT_EQ(0, rmdir(self->sockets));
	/* to one that would do */
	snprintf(path, sizeof(path), "%s/elsewhere", self->runtime);
	EXPECT_EQ(0, mkdir(path, 0700));
	EXPECT_EQ(0, symlink(path, self->sockets));
	EXPECT_EQ(2, hold_one("story"));
	EXPECT_EQ(0, unlink(self->sockets));

	EXPECT_EQ(-ENAMETOOLONG, kvscratch_holder_path("story", path, 20));
	memset(deep + 1, 'x', sizeof(deep) - 2);
	setenv("XDG_RUNTIME_DIR", deep, 1);
	EXPECT_EQ(2, hold_one("story"));
	setenv("XDG_RUNTIME_DIR", "relative", 1);
	EXPECT_EQ(-ENXIO, kvscratch_holder_path("story", path, sizeof(path)));
	EXPECT_EQ(2, hold_one("story"));
	unsetenv("XDG_RUNTIME_DIR");
	EXPECT_ERROR(ENXIO, "XDG_RUNTIME_DIR is not set: held pads have their sockets there",
		     kvscratch_holder_drop("story"));
	EXPECT_EQ(2, hold_one("story"));
}

TEST_F_TIMEOUT(held, many_clients_at_once, TEST_SECONDS)
{
	struct kvscratch *pad;
	pid_t pids[8];

	ASSERT_EQ(0, hold_one("story"));
	for (int i = 0; i < 8; i++) {
		pids[i] = fork_child();
		if (pids[i])
			continue;
		for (int times = 0; times < 50; times++) {
			CHILD_CHECK(!kvscratch_attach_name(&pad, "story", O_RDWR));
			CHILD_CHECK(!kvscratch_append(pad, row, 4));
			kvscratch_close(pad);
		}
		_exit(0);
	}
	for (int i = 0; i < 8; i++)
		EXPECT_EQ(0, wait_for(pids[i]));
	ASSERT_EQ(0, kvscratch_attach_name(&pad, "story", O_RDONLY));
	EXPECT_EQ(400, kvscratch_len(pad));
	kvscratch_close(pad);
}

/* Whether a client that is neither slow nor hostile is served */
static bool is_served(void)
{
	struct kvscratch *pad;
	int err = kvscratch_attach_name(&pad, "story", O_RDONLY);

	if (!err)
		kvscratch_close(pad);
	return !err;
}

/* Whether the other side closes the connection; what it says before that does not matter. */
static bool is_closed(int sock)
{
	char bytes[512];
	ssize_t got;

	do
		got = recv(sock, bytes, sizeof(bytes), 0);
	while (got > 0);
	return !got || errno == ECONNRESET;
}

TEST_F_TIMEOUT(held, clients_that_say_nothing, TEST_SECONDS)
{
	int socks[SILENT_CLIENTS];
	pid_t pid;
	int files;

	ASSERT_EQ(0, hold_one("story"));
	pid = pid_of("story");
	files = nr_files(pid);
	for (int i = 0; i < SILENT_CLIENTS; i++)
		socks[i] = connect_to("story");
	EXPECT_TRUE(is_served());
	/* the first ones had to go, the last one has until its time is over */
	EXPECT_TRUE(is_closed(socks[0]));
	EXPECT_GT(files + 100, nr_files(pid));
	EXPECT_TRUE(is_closed(socks[SILENT_CLIENTS - 1]));
	EXPECT_TRUE(is_served());
	for (int i = 0; i < SILENT_CLIENTS; i++)
		close(socks[i]);
}

static const struct holder_request drop_request = {
	.magic = HOLDER_MAGIC,
	.version = HOLDER_VERSION,
	.verb = HOLDER_DROP,
	.pad = "none",
};

TEST_F_TIMEOUT(held, a_client_that_speaks_slowly, TEST_SECONDS)
{
	const char *bytes = (const char *)&drop_request;
	struct holder_reply reply;
	int sock;

	ASSERT_EQ(0, hold_one("story"));
	sock = connect_to("story");
	for (size_t i = 0; i < sizeof(drop_request); i++) {
		EXPECT_EQ(1, send(sock, bytes + i, 1, MSG_NOSIGNAL));
		if (i % 16 == 0)
			EXPECT_TRUE(is_served());
	}
	EXPECT_EQ(sizeof(reply), recv(sock, &reply, sizeof(reply), MSG_WAITALL));
	EXPECT_EQ(-ENOKEY, reply.err);
	EXPECT_STREQ("there is no pad \"none\"", reply.words);
	EXPECT_TRUE(is_closed(sock));
	close(sock);
}

/* Send a request that is not quite right, and what is behind it; returns the socket. */
static int speak(const struct holder_request *request, const void *behind, size_t bytes)
{
	int sock = connect_to("story");

	send(sock, request, sizeof(*request), MSG_NOSIGNAL);
	if (bytes)
		send(sock, behind, bytes, MSG_NOSIGNAL);
	return sock;
}

TEST_F_TIMEOUT(held, garbage, TEST_SECONDS)
{
	struct holder_request request;
	struct holder_reply reply;
	char noise[4096];
	pid_t pid;
	int files, sock;

	ASSERT_EQ(0, hold_one("story"));
	pid = pid_of("story");
	EXPECT_TRUE(is_served());
	files = nr_files(pid);
	srand(1);
	for (int times = 0; times < 100; times++) {
		sock = connect_to("story");
		for (size_t i = 0; i < sizeof(noise); i++)
			noise[i] = rand();
		/* at first the right magic and a verb */
		if (times % 2) {
			memcpy(noise, &drop_request, 8);
			memset(noise + 8, 0, 4);
			noise[8] = times / 2 % 6;
			/* but not the end of it */
			memcpy(noise + offsetof(struct holder_request, pad), "none", 5);
		}
		send(sock, noise, 1 + rand() % sizeof(noise), MSG_NOSIGNAL);
		shutdown(sock, SHUT_WR);
		EXPECT_TRUE(is_closed(sock));
		close(sock);
	}

	request = drop_request;
	request.version = HOLDER_VERSION + 1;
	sock = speak(&request, NULL, 0);
	EXPECT_EQ(sizeof(reply), recv(sock, &reply, sizeof(reply), MSG_WAITALL));
	EXPECT_EQ(-EPROTO, reply.err);
	close(sock);

	request = drop_request;
	request.verb = 77;
	sock = speak(&request, NULL, 0);
	EXPECT_EQ(sizeof(reply), recv(sock, &reply, sizeof(reply), MSG_WAITALL));
	EXPECT_EQ(-EPROTO, reply.err);
	EXPECT_STREQ("expected a known request, got number 77", reply.words);
	close(sock);

	request = drop_request;
	request.verb = HOLDER_PUT;
	request.handles_bytes = UINT32_MAX;
	sock = speak(&request, NULL, 0);
	EXPECT_TRUE(is_closed(sock));
	close(sock);

	/* a length inside that is not the one outside, and no handles */
	request.handles_bytes = 8;
	sock = speak(&request, "\xff\xff\xff\x7fxxx\n", 8);
	EXPECT_EQ(sizeof(reply), recv(sock, &reply, sizeof(reply), MSG_WAITALL));
	EXPECT_EQ(-EPROTO, reply.err);
	close(sock);
	/* one that more would have to follow for, and does not */
	sock = speak(&request, "\x64\0\0\0xxx\n", 8);
	EXPECT_EQ(sizeof(reply), recv(sock, &reply, sizeof(reply), MSG_WAITALL));
	EXPECT_EQ(-EPROTO, reply.err);
	close(sock);
	sock = speak(&request, "\x04\0\0\0xxx\n", 8);
	EXPECT_EQ(sizeof(reply), recv(sock, &reply, sizeof(reply), MSG_WAITALL));
	EXPECT_EQ(-EPROTO, reply.err);
	close(sock);

	/* names that end the text of another */
	request = drop_request;
	memset(request.pad, 'x', sizeof(request.pad));
	sock = speak(&request, NULL, 0);
	EXPECT_EQ(sizeof(reply), recv(sock, &reply, sizeof(reply), MSG_WAITALL));
	EXPECT_EQ(-ENOKEY, reply.err);
	close(sock);

	EXPECT_TRUE(is_served());
	EXPECT_EQ(pid, pid_of("story"));
	EXPECT_GE(files + 2, nr_files(pid));
}

TEST_F_TIMEOUT(held, handles_that_nobody_asked_for_are_closed, TEST_SECONDS)
{
	static const char *const names[] = { "null" };
	struct holder_request request = drop_request;
	char byte;
	int ends[2];
	int sock;

	ASSERT_EQ(0, hold_one("story"));
	ASSERT_EQ(0, pipe2(ends, O_CLOEXEC));
	/* once instead of a request, once behind one that has none, once in a put that is refused */
	sock = connect_to("story");
	EXPECT_EQ(0, kvscratch_send_handles(sock, names, &ends[1], 1));
	shutdown(sock, SHUT_WR);
	EXPECT_TRUE(is_closed(sock));
	close(sock);
	sock = speak(&drop_request, NULL, 0);
	kvscratch_send_handles(sock, names, &ends[1], 1);
	EXPECT_TRUE(is_closed(sock));
	close(sock);
	request.verb = HOLDER_PUT;
	request.handles_bytes = 9;
	sock = speak(&request, NULL, 0);
	EXPECT_EQ(0, kvscratch_send_handles(sock, names, &ends[1], 1));
	EXPECT_TRUE(is_closed(sock));
	close(sock);
	close(ends[1]);
	/* ends only if nobody has the other end any more */
	EXPECT_EQ(0, read(ends[0], &byte, 1));
	close(ends[0]);
}

TEST_F_TIMEOUT(held, clients_of_another_version, TEST_SECONDS)
{
	struct holder_request request = drop_request;
	static const size_t lengths[] = {
		HOLDER_HEAD_BYTES, HOLDER_HEAD_BYTES + 1, sizeof(request) - 1, sizeof(request),
	};

	ASSERT_EQ(0, hold_one("story"));
	/* what it would do in this one */
	request.pad[0] = '\0';
	request.version = HOLDER_VERSION + 1;
	for (size_t i = 0; i < ARRAY_SIZE(lengths); i++) {
		struct holder_reply reply;
		int sock = connect_to("story");

		/* all that it has to say, and it waits for the reply */
		EXPECT_EQ((ssize_t)lengths[i], send(sock, &request, lengths[i], MSG_NOSIGNAL));
		EXPECT_EQ(sizeof(reply), recv(sock, &reply, sizeof(reply), MSG_WAITALL));
		EXPECT_EQ(HOLDER_MAGIC, reply.magic);
		EXPECT_EQ(HOLDER_VERSION, reply.version);
		EXPECT_EQ(-EPROTO, reply.err);
		EXPECT_EQ(0, reply.count);
		EXPECT_STREQ("expected a client of version 1, got one of 2", reply.words);
		EXPECT_TRUE(is_closed(sock));
		close(sock);
	}
	EXPECT_TRUE(is_served());
}

/* What replaces k0 and v0 by @pad, but for what is wrong with it; returns the socket. */
static int speak_of(const struct kvscratch *pad, unsigned int handles, size_t bytes)
{
	static const char text[] = "\x06\0\0\0k0\nv0\n";
	struct holder_request request = {
		.magic = HOLDER_MAGIC,
		.version = HOLDER_VERSION,
		.verb = HOLDER_REPLACE,
		.handles_bytes = sizeof(text) - 1,
	};
	char message[sizeof(request) + sizeof(text) - 1];
	union {
		struct cmsghdr head;
		char bytes[CMSG_SPACE(sizeof(int[3]))];
	} control = { 0 };
	struct iovec iov;
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
	int sock = connect_to("story");

	memcpy(message, &request, sizeof(request));
	memcpy(message + sizeof(request), text, sizeof(text) - 1);
	if (bytes > sizeof(message))
		bytes = sizeof(message);
	/* the handles ride on the first byte behind the request */
	if (bytes <= sizeof(request)) {
		send(sock, message, bytes, MSG_NOSIGNAL);
		return sock;
	}
	send(sock, message, sizeof(request), MSG_NOSIGNAL);
	iov = (struct iovec){ message + sizeof(request), bytes - sizeof(request) };
	if (handles) {
		msg.msg_control = &control;
		msg.msg_controllen = CMSG_SPACE(sizeof(int) * handles);
		control.head = (struct cmsghdr){
			.cmsg_level = SOL_SOCKET,
			.cmsg_type = SCM_RIGHTS,
			.cmsg_len = CMSG_LEN(sizeof(int) * handles),
		};
		for (unsigned int i = 0; i < handles; i++)
			memcpy(CMSG_DATA(&control.head) + i * sizeof(int),
			       &(int){ kvscratch_fd(pad) }, sizeof(int));
	}
	sendmsg(sock, &msg, MSG_NOSIGNAL);
	return sock;
}

TEST_F_TIMEOUT(held, clients_that_die_while_they_replace, TEST_SECONDS)
{
	struct kvscratch *pad = pad_of_rows(7);
	size_t whole = sizeof(struct holder_request) + 10;
	struct holder_reply reply;
	pid_t pid;
	int files;

	ASSERT_EQ(0, hold("story", "--write"));
	ASSERT_EQ(0, replace((const char *[]){ "k0", "v0" }, 2, 1));
	pid = pid_of("story");
	files = nr_files_idle(pid);
	for (size_t bytes = 0; bytes < whole; bytes++) {
		close(speak_of(pad, 2, bytes));
		ASSERT_STREQ("k0=1 v0=1", list_held()) TH_LOG("after %zu bytes", bytes);
	}
	/* other numbers of handles than it says */
	for (unsigned int handles = 0; handles < 4; handles++) {
		char words[128];
		int sock;

		if (handles == 2)
			continue;
		sock = speak_of(pad, handles, whole);
		EXPECT_EQ(sizeof(reply), recv(sock, &reply, sizeof(reply), MSG_WAITALL));
		EXPECT_EQ(-EPROTO, reply.err);
		snprintf(words, sizeof(words), "cannot receive handles: expected a name for each of "
			 "%u handles, got 2 names", handles);
		EXPECT_STREQ(words, reply.words);
		close(sock);
		ASSERT_STREQ("k0=1 v0=1", list_held());
	}
	EXPECT_GE(files + 1, nr_files_idle(pid));
	/* one that says all of it is heard, whether it lives to hear of it or not */
	close(speak_of(pad, 2, whole));
	EXPECT_STREQ("k0=7 v0=7", list_held());
	EXPECT_GE(files + 1, nr_files_idle(pid));
	kvscratch_close(pad);
}

/* Requests may come in pieces, and replies be read late. */
TEST_F_TIMEOUT(held, a_replacement_between_a_request_and_its_end, TEST_SECONDS)
{
	struct holder_request request = drop_request;
	static const char *const names[] = { "k0", "v0" };
	char text[KVSCRATCH_MAX_NAMES_BYTES];
	struct holder_reply reply;
	int fds[2], early, late;
	struct pollfd ready;

	ASSERT_EQ(0, hold("story", "--write"));
	ASSERT_EQ(0, replace(names, 2, 1));
	request.verb = HOLDER_GET_ALL;
	request.access = O_RDONLY;
	late = connect_to("story");
	EXPECT_EQ(20, send(late, &request, 20, MSG_NOSIGNAL));
	early = speak(&request, NULL, 0);
	ready = (struct pollfd){ .fd = early, .events = POLLIN };
	EXPECT_EQ(1, poll(&ready, 1, -1));
	EXPECT_EQ(0, replace(names, 2, 2));
	EXPECT_EQ(sizeof(request) - 20, send(late, (char *)&request + 20, sizeof(request) - 20,
					     MSG_NOSIGNAL));
	for (int i = 0; i < 2; i++) {
		int sock = i ? late : early;

		ASSERT_EQ(sizeof(reply), recv(sock, &reply, sizeof(reply), MSG_WAITALL));
		ASSERT_EQ(2, reply.count);
		ASSERT_EQ(2, kvscratch_receive_handles(sock, text, sizeof(text), fds, 2));
		EXPECT_STREQ(i ? "k0=2 v0=2" : "k0=1 v0=1", list_handles(text, fds, 2));
		close(sock);
	}
}

/* A socket of that name that is no holder's; what it says is @bytes of @reply. */
static pid_t start_impostor(const char *path, const void *reply, size_t bytes)
{
	int listener = kvscratch_listen(path);
	pid_t pid;

	if (listener < 0)
		abort();
	pid = fork_child();
	if (!pid) {
		char request[sizeof(struct holder_request)];
		int sock = accept(listener, NULL, NULL);

		recv(sock, request, sizeof(request), MSG_WAITALL);
		send(sock, reply, bytes, MSG_NOSIGNAL);
		/* until the client is gone */
		if (!bytes)
			recv(sock, request, 1, 0);
		_exit(0);
	}
	close(listener);
	return pid;
}

TEST_F_TIMEOUT(held, what_is_no_holder, TEST_SECONDS)
{
	struct holder_reply reply = { .magic = HOLDER_MAGIC, .version = HOLDER_VERSION };
	struct kvscratch *pad;
	char path[108];
	pid_t pid;

	ASSERT_EQ(0, mkdir(self->sockets, 0700));
	ASSERT_EQ(0, kvscratch_holder_path("story", path, sizeof(path)));

	pid = start_impostor(path, "nonsense, and a lot of it: ", 27);
	EXPECT_ERROR(EPROTO, "story: what listens there is no holder of pads",
		     kvscratch_attach_name(&pad, "story", O_RDONLY));
	EXPECT_EQ(0, wait_for(pid));
	unlink(path);

	for (size_t bytes = 1; bytes < sizeof(reply); bytes += 6) {
		pid = start_impostor(path, &reply, bytes);
		EXPECT_ERROR(EPROTO, "story: the holder ended the connection",
			     kvscratch_attach_name(&pad, "story", O_RDONLY));
		EXPECT_EQ(0, wait_for(pid));
		unlink(path);
	}

	reply.magic = 1;
	pid = start_impostor(path, &reply, sizeof(reply));
	EXPECT_ERROR(EPROTO, "story: what listens there is no holder of pads",
		     kvscratch_attach_name(&pad, "story", O_RDONLY));
	EXPECT_EQ(0, wait_for(pid));
	unlink(path);

	/* handles are announced, and do not come */
	reply.magic = HOLDER_MAGIC;
	reply.count = 1;
	pid = start_impostor(path, &reply, sizeof(reply));
	EXPECT_EQ(-EPROTO, kvscratch_attach_name(&pad, "story", O_RDONLY));
	EXPECT_EQ(0, wait_for(pid));
	unlink(path);

	pid = start_impostor(path, NULL, 0);
	EXPECT_ERROR(ETIMEDOUT, "story: the holder did not answer within 10 seconds",
		     kvscratch_attach_name(&pad, "story", O_RDONLY));
	EXPECT_EQ(0, wait_for(pid));
	unlink(path);
}

/* Whatever its replies are like */
TEST_F_TIMEOUT(held, holders_of_another_version, TEST_SECONDS)
{
	static const char words[] = "story: expected a holder of version 1, got one of 2";
	struct holder_reply reply = { .magic = HOLDER_MAGIC, .version = HOLDER_VERSION + 1 };
	char path[108], names[KVSCRATCH_MAX_NAMES_BYTES];
	struct kvscratch *pad;
	int fd;

	ASSERT_EQ(0, mkdir(self->sockets, 0700));
	ASSERT_EQ(0, kvscratch_holder_path("story", path, sizeof(path)));
	for (int i = 0; i < 5; i++) {
		pid_t pid = start_impostor(path, &reply, i % 2 ? HOLDER_HEAD_BYTES : sizeof(reply));

		if (i == 0)
			EXPECT_ERROR(EPROTO, words, kvscratch_attach_name(&pad, "story", O_RDONLY));
		if (i == 1)
			EXPECT_ERROR(EPROTO, words, kvscratch_holder_get("story", O_RDONLY, names,
									 sizeof(names), &fd, 1));
		if (i == 2)
			EXPECT_ERROR(EPROTO, words, kvscratch_holder_drop("story"));
		if (i == 3)
			EXPECT_ERROR(EPROTO, words, replace((const char *[]){ "k0" }, 1, 1));
		if (i == 4) {
			struct kvscratch *pads[3];

			EXPECT_ERROR(EPROTO, words, put_three(pads));
			close_three(pads);
		}
		EXPECT_EQ(0, wait_for(pid));
		unlink(path);
	}
}

/* As another user, whom neither the directory nor the socket keeps out */
static void become(uid_t user)
{
	CHILD_CHECK(!setresgid(user, user, user));
	CHILD_CHECK(!setresuid(user, user, user));
	/* or /proc/self is root's */
	prctl(PR_SET_DUMPABLE, 1);
}

static void open_to_all(const char *runtime, const char *sockets)
{
	char path[108];

	if (kvscratch_holder_path("story", path, sizeof(path)) || chmod(runtime, 0755) ||
	    chmod(sockets, 0755) || chmod(path, 0777))
		abort();
}

/* Neither side trusts the other: @holder is the user who holds. Exits. */
static void try_as_stranger(uid_t holder)
{
	struct holder_request request = drop_request;
	struct holder_reply reply;
	struct kvscratch *pad;
	char words[128];
	int sock;

	snprintf(words, sizeof(words), "story: expected a holder of user %u, got one of user %u",
		 geteuid(), holder);
	CHILD_CHECK(kvscratch_attach_name(&pad, "story", O_RDONLY) == -EACCES);
	CHILD_CHECK(!strcmp(words, kvscratch_error()));
	for (request.verb = HOLDER_GET; request.verb <= HOLDER_REPLACE; request.verb++) {
		request.pad[0] = '\0';
		sock = speak(&request, NULL, 0);
		CHILD_CHECK(recv(sock, &reply, sizeof(reply), MSG_WAITALL) == sizeof(reply));
		snprintf(words, sizeof(words), "expected a client of user %u", holder);
		CHILD_CHECK(reply.err == -EACCES && !reply.count && !strcmp(words, reply.words));
		CHILD_CHECK(is_closed(sock));
		close(sock);
	}
	_exit(0);
}

TEST_F_TIMEOUT(held, other_users_get_nothing, TEST_SECONDS)
{
	struct child child;

	if (geteuid())
		SKIP(return, "only root can be another user");
	ASSERT_EQ(0, hold_one("story"));
	if (start_child(&child)) {
		struct kvscratch *pad;

		become(OTHER_USER);
		CHILD_CHECK(kvscratch_attach_name(&pad, "story", O_RDONLY) == -EACCES);
		_exit(0);
	}
	EXPECT_EQ(0, end_child(&child));
	open_to_all(self->runtime, self->sockets);
	if (start_child(&child)) {
		become(OTHER_USER);
		try_as_stranger(0);
	}
	EXPECT_EQ(0, end_child(&child));
	EXPECT_TRUE(is_served());
}

TEST_F_TIMEOUT(held, root_gets_nothing_of_others, TEST_SECONDS)
{
	struct child child, root;

	if (geteuid())
		SKIP(return, "only root can be another user");
	ASSERT_EQ(0, chown(self->runtime, OTHER_USER, OTHER_USER));
	if (start_child(&child)) {
		become(OTHER_USER);
		/* the device may be root's alone */
		CHILD_CHECK(!setenv("KVSCRATCH_BACKEND", "memfd", 1));
		CHILD_CHECK(!hold_one("story"));
		CHILD_CHECK(is_served());
		_exit(0);
	}
	ASSERT_EQ(0, end_child(&child));
	if (start_child(&root))
		try_as_stranger(OTHER_USER);
	EXPECT_EQ(0, end_child(&root));
	/* nor may its directory be made by somebody else */
	EXPECT_EQ(2, hold_one("other"));
}

TEST_HARNESS_MAIN
