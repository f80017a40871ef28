// SPDX-License-Identifier: GPL-2.0-only
/*
 * PID 1 of the test guest.
 *
 * ttyS0 is the kernel's console, ttyS1 the program's terminal, ttyS2 takes the
 * verdict: one line "exit N" or "signal N", one "kernel TEXT" for each
 * suspicious line of the kernel log, one "aside TEXT" for what is worth telling,
 * and a last line "end". A guest that dies writes no "end".
 *
 * /modules names the modules to load, /command holds the NUL-separated program
 * and arguments, and /interactive is there if a person sits at ttyS1. With
 * /wants-out what is in /out at the end goes to ttyS3 as a cpio archive.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <regex.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/klog.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#define KMSG_RECORD_BYTES 8192
#define KMEMLEAK_MIN_AGE_SECONDS 5
#define KLOG_CONSOLE_LEVEL 8
#define MAX_MODULES 8

/*
 * What the kernel says when something is wrong with it. Lockdep, "sleeping
 * function" and kmemleak reports do not panic, so panic_on_warn misses them.
 */
#define SUSPICIOUS \
	"BUG[: ]|^WARNING: |UBSAN|KASAN|KCSAN|Oops|INFO: |general protection fault[,:]|" \
	"possible (circular|recursive)|inconsistent lock|lock held when returning|" \
	"suspicious RCU|leaked|cut here|pagealloc: "

/*
 * A program whose allocations are made to fail took a page fault, which is tried again.
 * Where no fault may be taken the test itself sees it.
 */
#define FAILED_FAULT "Huh VM_FAULT_OOM leaked out to the #PF handler"

static int verdict_fd = STDERR_FILENO;

static void verdict(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vdprintf(verdict_fd, format, args);
	va_end(args);
}

/* The guest has nowhere else to complain; without "end" the run has failed. */
static void die(const char *what)
{
	verdict("kernel init: %s: %s\n", what, strerror(errno));
	tcdrain(verdict_fd);
	reboot(RB_AUTOBOOT);
	_exit(1);
}

static void mount_at(const char *type, const char *path)
{
	mkdir(path, 0755);
	if (mount(type, path, type, 0, NULL) && errno != EBUSY)
		die(path);
}

static void mount_all(void)
{
	mount_at("proc", "/proc");
	mount_at("sysfs", "/sys");
	mount_at("devtmpfs", "/dev");
	mount_at("tmpfs", "/dev/shm");
	mount_at("tmpfs", "/tmp");
	mount_at("cgroup2", "/sys/fs/cgroup");
	/* not in every kernel */
	mkdir("/dev/pts", 0755);
	mount("devpts", "/dev/pts", "devpts", 0, NULL);
	mount("debugfs", "/sys/kernel/debug", "debugfs", 0, NULL);
	mount("tracefs", "/sys/kernel/tracing", "tracefs", 0, NULL);
}

static void write_to(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		die(path);
	close(fd);
}

static int open_serial(const char *path, bool raw)
{
	struct termios mode;
	int fd = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);

	if (fd < 0 || tcgetattr(fd, &mode))
		die(path);
	/* passes bytes through as they are */
	if (raw)
		cfmakeraw(&mode);
	cfsetspeed(&mode, B115200);
	if (tcsetattr(fd, TCSANOW, &mode))
		die(path);
	return fd;
}

static char *read_file(const char *path, size_t *bytes)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	struct stat st;
	char *text;

	if (fd < 0 || fstat(fd, &st))
		die(path);
	text = malloc(st.st_size + 1);
	if (!text || read(fd, text, st.st_size) != st.st_size)
		die(path);
	text[st.st_size] = '\0';
	*bytes = st.st_size;
	close(fd);
	return text;
}

#define KCSAN "/sys/kernel/debug/kcsan"

/*
 * Races of the boot are not ours. Nor is each one that is found later: a report
 * must not panic, so that judge_kernel_log() can tell.
 */
static void look_for_races(void)
{
	if (access(KCSAN, W_OK))
		return;
	write_to("/proc/sys/kernel/panic_on_warn", "0");
	write_to(KCSAN, "on");
}

static char *modules[MAX_MODULES];
static int nr_modules;

static void load_modules(void)
{
	size_t bytes;
	char *names = read_file("/modules", &bytes);

	for (char *name = strtok(names, "\n"); name; name = strtok(NULL, "\n")) {
		int fd = open(name, O_RDONLY | O_CLOEXEC);

		if (nr_modules == MAX_MODULES || fd < 0 || syscall(SYS_finit_module, fd, "", 0))
			die(name);
		close(fd);
		modules[nr_modules++] = name;
	}
}

static bool remove_module(const char *name)
{
	/*
	 * The kernel drops the last files of a dead process late when a ring
	 * or a socket's queue held them; what stays busy has leaked.
	 */
	for (int tries = 0; tries < 500; tries++) {
		/* a test may have removed it already */
		if (!syscall(SYS_delete_module, name, O_NONBLOCK) || errno == ENOENT)
			return true;
		if (errno != EAGAIN && errno != EBUSY)
			return false;
		usleep(10000);
	}
	return false;
}

static void unload_modules(void)
{
	while (nr_modules--) {
		char *name = basename(modules[nr_modules]);

		name[strcspn(name, ".")] = '\0';
		if (!remove_module(name))
			verdict("kernel module %s cannot be removed: %s\n", name, strerror(errno));
	}
}

static void run_command(int terminal, bool interactive)
{
	size_t bytes, argc = 0;
	char *command = read_file("/command", &bytes);
	char **argv = calloc(bytes + 1, sizeof(*argv));
	int input = terminal, status;

	if (!argv)
		die("calloc");
	for (char *word = command; word < command + bytes; word += strlen(word) + 1)
		argv[argc++] = word;
	if (interactive) {
		setpgid(0, 0);
		signal(SIGTTOU, SIG_IGN);
		tcsetpgrp(terminal, getpid());
		signal(SIGTTOU, SIG_DFL);
	} else {
		setsid();
		input = open("/dev/null", O_RDWR | O_CLOEXEC);
	}
	dup2(input, STDIN_FILENO);
	dup2(terminal, STDOUT_FILENO);
	dup2(terminal, STDERR_FILENO);
	setenv("PATH", "/bin", 1);
	setenv("HOME", "/tmp", 1);
	execvp(argv[0], argv);
	/* as a shell would say it */
	status = errno == ENOENT ? 127 : 126;
	dprintf(STDERR_FILENO, "%s: %s\n", argv[0], strerror(errno));
	_exit(status);
}

static void run_program(void)
{
	bool interactive = access("/interactive", F_OK) == 0;
	int terminal = open_serial("/dev/ttyS1", !interactive);
	pid_t program, pid;
	int status;

	/*
	 * The session is ours and not the program's: the kernel hangs a
	 * terminal up when its session's leader ends, and drops what is left
	 * to be sent.
	 */
	if (interactive) {
		setsid();
		ioctl(terminal, TIOCSCTTY, 0);
	}
	program = fork();
	if (program < 0)
		die("fork");
	if (!program)
		run_command(terminal, interactive);
	do
		pid = wait(&status);
	while (pid != program);
	/* what the program left behind would keep the module busy */
	kill(-1, SIGKILL);
	while (wait(NULL) > 0)
		;
	tcdrain(terminal);
	if (WIFEXITED(status))
		verdict("exit %d\n", WEXITSTATUS(status));
	else
		verdict("signal %d\n", WTERMSIG(status));
}

#define KMEMLEAK "/sys/kernel/debug/kmemleak"

/*
 * What was forgotten since the boot, whose own leaks (ACPI) are not ours: they
 * belong to the idle task. An object counts when it is some seconds old and did
 * not change between two scans.
 */
static void look_for_leaks(void)
{
	char line[256];
	FILE *leaks;

	if (access(KMEMLEAK, W_OK))
		return;
	write_to(KMEMLEAK, "scan");
	sleep(KMEMLEAK_MIN_AGE_SECONDS + 1);
	write_to(KMEMLEAK, "scan");
	leaks = fopen(KMEMLEAK, "r");
	if (!leaks)
		die(KMEMLEAK);
	while (fgets(line, sizeof(line), leaks))
		if (!strncmp(line, "  comm ", 7) && !strstr(line, "\"swapper/0\""))
			verdict("kernel memory leaked by%s", line + 6);
	fclose(leaks);
	/* the console keeps the traces */
	if (system("cat " KMEMLEAK " >/dev/ttyS0"))
		die(KMEMLEAK);
}

#define KCSAN_TITLE "BUG: KCSAN: "

/*
 * A report of KCSAN is a title, a trace of each of two accesses and a line of '='.
 * It counts when the module made one of them, or called the function that did.
 * Others are races of the kernel's own, which it has: they are told, and fail
 * nothing. Traces of those may show the module too, as what was interrupted or
 * woke somebody up. So is the word of a work item, which may be queued while it runs.
 *
 * Returns whether the line needs no other judgement.
 */
static bool judge_race(const char *line)
{
	static char title[256];
	static bool ours, of_work;
	static int frames;

	if (!strncmp(line, KCSAN_TITLE, strlen(KCSAN_TITLE))) {
		snprintf(title, sizeof(title), "%s", line);
		ours = false;
		of_work = false;
		return true;
	}
	if (line[0] == ' ')
		frames++;
	else
		frames = 0;
	if (frames && frames <= 2 && strstr(line, " [kvscratch"))
		ours = true;
	if (frames == 1 && strstr(line, " queue_work_on+"))
		of_work = true;
	if (title[0] && line[0] == '=') {
		verdict("%s %s\n", ours && !of_work ? "kernel" : "aside", title);
		title[0] = '\0';
	}
	return false;
}

/* From its beginning, also when somebody has cleared it */
static void judge_kernel_log(void)
{
	int fd = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	unsigned long long sequence;
	char record[KMSG_RECORD_BYTES + 1];
	bool first = true;
	regex_t suspicious;
	ssize_t bytes;

	if (fd < 0 || regcomp(&suspicious, SUSPICIOUS, REG_EXTENDED | REG_NOSUB))
		die("/dev/kmsg");
	while ((bytes = read(fd, record, KMSG_RECORD_BYTES)) > 0) {
		char *text;

		record[bytes] = '\0';
		if (first && (sscanf(record, "%*u,%llu", &sequence) != 1 || sequence))
			verdict("kernel log: its beginning was lost\n");
		first = false;
		text = strchr(record, ';');
		if (!text)
			continue;
		text++;
		text[strcspn(text, "\n")] = '\0';
		if (!strncmp(text, FAILED_FAULT, strlen(FAILED_FAULT)))
			verdict("aside %s\n", text);
		else if (!judge_race(text) && !regexec(&suspicious, text, 0, NULL, 0))
			verdict("kernel %s\n", text);
	}
	if (bytes < 0 && errno != EAGAIN)
		die("/dev/kmsg");
}

/* The counters of a module that was built to count its lines */
#define GCOV "/sys/kernel/debug/gcov"

static void send_out(void)
{
	if (access("/wants-out", F_OK))
		return;
	close(open_serial("/dev/ttyS3", true));
	if (!access(GCOV, F_OK) && system("find " GCOV " -name 'kvscratch*.gcda' -exec cp {} /out/ \\;"))
		die(GCOV);
	if (system("cd /out && find . | cpio -o -H newc >/dev/ttyS3"))
		die("/out");
}

int main(void)
{
	const struct rlimit files = { 8192, 8192 };

	mount_all();
	verdict_fd = open_serial("/dev/ttyS2", true);
	setrlimit(RLIMIT_NOFILE, &files);
	write_to("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
	if (system("/bin/busybox --install -s /bin"))
		die("busybox");
	/* the boot is of no interest on the console, everything later is */
	klogctl(KLOG_CONSOLE_LEVEL, NULL, 8);
	look_for_races();
	load_modules();
	run_program();
	unload_modules();
	look_for_leaks();
	judge_kernel_log();
	send_out();
	verdict("end\n");
	tcdrain(verdict_fd);
	reboot(RB_AUTOBOOT);
	return 1;
}
