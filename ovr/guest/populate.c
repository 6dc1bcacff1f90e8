/*
 * Allocate pages for the host to write to.
 *
 * Each request runs in a worker, a child of the agent, so that neither a slow
 * guest nor the OOM killer stops the loop. A worker that touches pages of held
 * tasks exits when it is done; the kernel charges the pages to the tasks. A
 * worker that maps a shared object joins the task's cgroup first, since shared
 * pages are charged to the process that touches them. It keeps the object
 * mapped, so that the host finds its pages by a page table, until the tree is
 * released or killed.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent.h"

#define PAGE 4096ull
#define MAX_MAPPERS 4096
#define MAPPER_DEATH_MS 5000
#define TMPFS_MAGIC 0x01021994
#define HUGETLBFS_MAGIC 0x958458f6
#define POPULATE_WRITE 23 /* MADV_POPULATE_WRITE, since v5.14 */

struct result {
	int32_t error; /* 0, or an errno */
	char step[60]; /* the failed step */
	uint64_t address;
};

static struct {
	struct session *session;
	enum op op;
	pid_t pid; /* 0: it has exited */
	int news;  /* pipe with the worker's result; -1: no request */
} current = {.news = -1};

static pid_t mappers[MAX_MAPPERS];
static size_t mapper_count;

/* ------------------------------------------------------------------------ in the worker */

static void fail(int out, const char *step)
{
	struct result result = {.error = errno};

	snprintf(result.step, sizeof(result.step), "%s", step);
	_exit(write(out, &result, sizeof(result)) == (ssize_t)sizeof(result) ? 1 : 2);
}

static void succeed(int out, uint64_t address)
{
	struct result result = {.address = address};

	if (write(out, &result, sizeof(result)) != (ssize_t)sizeof(result))
		_exit(2);
}

static void touch(const struct message *message, int out)
{
	uint32_t count;

	priority_real_time(0);
	errno = touch_portions(message_list(message, KEY_PORTIONS, &count),
			       message_list(message, KEY_RANGES, &count));
	if (errno)
		fail(out, "touch a page");
	succeed(out, 0);
}

/* The path of a process's memory cgroup in /sys/fs/cgroup. */
static bool memory_cgroup(const char *process, char path[4096])
{
	char name[64], line[4096];
	bool found = false;
	FILE *file;

	snprintf(name, sizeof(name), "/proc/%s/cgroup", process);
	file = fopen(name, "re");
	while (file && fgets(line, sizeof(line), file)) {
		char *controllers = strchr(line, ':'), *where;

		where = controllers ? strchr(controllers + 1, ':') : NULL;
		if (!where)
			continue;
		line[strcspn(line, "\n")] = 0;
		*where++ = 0;
		/* Version 2 names no controllers; a memory cgroup of version 1 has precedence. */
		if (!strcmp(controllers, ":") && !found)
			found = snprintf(path, 4096, "/sys/fs/cgroup%s", where) < 4096;
		else if (strstr(controllers, "memory"))
			found = snprintf(path, 4096, "/sys/fs/cgroup/memory%s", where) < 4096;
	}
	if (file)
		fclose(file);
	return found;
}

static void join_cgroup(pid_t pid, int out)
{
	static char theirs[4096], ours[4096], path[4200];
	char process[16];
	int fd;

	snprintf(process, sizeof(process), "%d", pid);
	if (!memory_cgroup(process, theirs) ||
	    (memory_cgroup("self", ours) && !strcmp(ours, theirs)))
		return;
	snprintf(path, sizeof(path), "%s/cgroup.procs", theirs);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, "0", 1) != 1)
		fail(out, "join the task's cgroup");
	close(fd);
}

/*
 * Open the object that the host names, if it is a memfd or shared memory. It is
 * checked with an O_PATH descriptor first, since opening a device or a pipe may
 * have an effect.
 */
static int open_object(const struct message *message, int out)
{
	char name[MAX_STRING], path[MAX_STRING + 64];
	struct statfs fs;
	struct stat info;
	unsigned long start, end;
	unsigned number;
	int look, fd, used = 0;

	message_str(message, KEY_FILE, name);
	if (!(sscanf(name, "fd/%u%n", &number, &used) == 1 && !name[used]) &&
	    !(sscanf(name, "map_files/%lx-%lx%n", &start, &end, &used) == 2 && !name[used])) {
		errno = EINVAL;
		fail(out, "open a file that is neither a descriptor nor a mapping");
	}
	snprintf(path, sizeof(path), "/proc/%d/%s", (int)message_uint(message, KEY_PID), name);
	look = open(path, O_PATH | O_CLOEXEC);
	if (look < 0 || fstat(look, &info) < 0 || fstatfs(look, &fs) < 0)
		fail(out, "open the object");
	if (!S_ISREG(info.st_mode) || (fs.f_type != TMPFS_MAGIC && fs.f_type != HUGETLBFS_MAGIC)) {
		errno = EINVAL;
		fail(out, "map a file that is not shared memory");
	}
	snprintf(path, sizeof(path), "/proc/self/fd/%d", look);
	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		fail(out, "open the object");
	return fd;
}

static void map(const struct message *message, int out)
{
	uint32_t count;
	struct mp_reader ranges = message_list(message, KEY_RANGES, &count);
	struct mp_value start, size;
	uint8_t *base;
	int fd;

	join_cgroup((pid_t)message_uint(message, KEY_PID), out);
	priority_real_time(0);
	fd = open_object(message, out);
	base = mmap(NULL, message_uint(message, KEY_SIZE), PROT_READ | PROT_WRITE, MAP_SHARED, fd,
		    0);
	if (base == MAP_FAILED)
		fail(out, "map the object");
	while (mp_read(&ranges, &start) && mp_read(&ranges, &size))
		while (madvise(base + start.number, size.number, POPULATE_WRITE) < 0)
			if (errno != EINTR && errno != EAGAIN)
				fail(out, "allocate pages of the object");
	succeed(out, (uint64_t)(uintptr_t)base);
	for (;;)
		pause();
}

static void work(const struct message *message, pid_t parent, int out)
{
	sigset_t none;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(2);
	/* Inherited descriptors would keep connections open. */
	if (dup2(out, 3) < 0 || syscall(SYS_close_range, 4, ~0u, 0) < 0)
		_exit(2);
	/* The memory is the task's, and the death of a worker costs only this restore. */
	oom_take_me_first();
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	if (message->op == OP_MAP)
		map(message, 3);
	else
		touch(message, 3);
	_exit(0);
}

/* ------------------------------------------------------------------------ in the agent */

/* Whether the portions cover all ranges. */
static bool portions_fit(const struct message *message, uint32_t ranges)
{
	uint32_t numbers, left = ranges;
	struct mp_reader portions = message_list(message, KEY_PORTIONS, &numbers);
	struct portion portion;

	for (; numbers >= 3; numbers -= 3) {
		if (!read_portion(&portions, &portion) || portion.how > TOUCH_READ ||
		    !portion.count || portion.count > left)
			return false;
		left -= (uint32_t)portion.count;
	}
	return !numbers && !left;
}

/* Check ranges before they are used as addresses: whole pages, no overflow. */
static const char *check(const struct message *message)
{
	uint32_t count;
	struct mp_reader ranges = message_list(message, KEY_RANGES, &count);
	uint64_t limit = message->op == OP_MAP ? message_uint(message, KEY_SIZE) : 1ull << 57;
	struct mp_value start, size;

	if (count % 2 || count > 2 * MAX_RANGES || !limit || limit > 1ull << 57 || limit % PAGE)
		return "bad ranges";
	if (message->op == OP_TOUCH && !portions_fit(message, count / 2))
		return "bad portions";
	while (mp_read(&ranges, &start) && mp_read(&ranges, &size))
		if ((start.number | size.number) % PAGE || !size.number || start.number > limit ||
		    size.number > limit - start.number)
			return "bad ranges";
	return NULL;
}

static struct problem failed(int error)
{
	return (struct problem){code_of_errno(error), strerror(error)};
}

struct problem populate_start(struct session *session, const struct message *message)
{
	struct problem problem = {CODE_PROTOCOL, check(message)};
	pid_t parent = getpid();
	int news[2];

	if (!problem.text && current.news >= 0)
		problem.text = "the previous request is still running";
	if (!problem.text && message->op == OP_MAP && mapper_count == MAX_MAPPERS)
		problem.text = "too many shared objects";
	if (problem.text)
		return problem;
	if (pipe2(news, O_CLOEXEC) < 0)
		return failed(errno);
	current.pid = fork();
	if (current.pid == 0)
		work(message, parent, news[1]);
	close(news[1]);
	if (current.pid < 0) {
		problem = failed(errno);
		close(news[0]);
		return problem;
	}
	current.news = news[0];
	current.session = session;
	current.op = message->op;
	if (message->op == OP_MAP)
		mappers[mapper_count++] = current.pid;
	return problem;
}

static void on_news(int fd, short events, void *context)
{
	struct session *session = current.session;
	struct result result = {0};
	struct writer writer;
	ssize_t size;

	(void)events, (void)context;
	if (fd != current.news)
		return;
	size = read(fd, &result, sizeof(result));
	if (size < 0 && errno == EINTR)
		return;
	close(current.news);
	current.news = -1;
	/* A worker that reports an error exits, and may be reaped already. */
	if (size == (ssize_t)sizeof(result) && result.error) {
		result.step[sizeof(result.step) - 1] = 0;
		session_refuse(session, code_of_errno(result.error), "cannot %s: %s", result.step,
			       strerror(result.error));
	} else if (size != (ssize_t)sizeof(result) || (current.op == OP_MAP && !current.pid)) {
		session_refuse(session, CODE_KILLED,
			       "the process that allocates memory was killed");
	} else {
		writer = session_writer(session, current.op == OP_MAP ? OP_MAPPED : OP_TOUCHED);
		if (current.op == OP_MAP) {
			message_add_uint(&writer, KEY_PID, (uint64_t)current.pid);
			message_add_uint(&writer, KEY_ADDRESS, result.address);
		}
		session_send(session, &writer);
	}
}

bool populate_owns(pid_t pid)
{
	for (size_t i = 0; i < mapper_count; i++)
		if (mappers[i] == pid)
			return true;
	return false;
}

bool populate_reaped(pid_t pid, int status)
{
	bool ours = pid == current.pid;

	(void)status;
	/* Its pid may be reused. */
	if (ours)
		current.pid = 0;
	for (size_t i = 0; i < mapper_count; i++)
		if (mappers[i] == pid) {
			mappers[i] = mappers[--mapper_count];
			return true;
		}
	return ours;
}

void populate_watch(struct loop *loop)
{
	if (current.news >= 0)
		loop_watch(loop, current.news, POLLIN, on_news, NULL);
}

void populate_end(void)
{
	int64_t deadline = now_ms() + MAPPER_DEATH_MS;

	if (current.news >= 0) {
		if (current.pid)
			kill(current.pid, SIGKILL);
		close(current.news);
		current.news = -1;
	}
	for (size_t i = 0; i < mapper_count; i++)
		kill(mappers[i], SIGKILL);
	/* The pages stay charged to the cgroup; no worker may be left in it. */
	for (reap_children(); mapper_count && now_ms() < deadline; reap_children())
		sleep_ms(1);
}

bool populate_can_force(void)
{
	char *page = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int mem = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
	bool can = page != MAP_FAILED && mem >= 0 &&
		   touch_forced(mem, (uint64_t)(uintptr_t)page, true);

	if (mem >= 0)
		close(mem);
	if (page != MAP_FAILED)
		munmap(page, PAGE);
	return can;
}
