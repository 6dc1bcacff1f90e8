/* Run CRIU and collect errors from its log. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent.h"

#define LOG_TAIL (64 << 10)
#define FIXED_ARGUMENTS 20
#define VERSION_MS 3000

/* The path of this program, which CRIU starts as its action script. */
static char program[256];
static struct stat program_file;

bool criu_know_program(void)
{
	ssize_t size = readlink("/proc/self/exe", program, sizeof(program) - 1);

	if (size <= 0)
		return false;
	program[size] = 0;
	return stat(program, &program_file) == 0;
}

/* After an upgrade the path may name another program, or none. */
const char *criu_program(void)
{
	struct stat named;

	if (stat(program, &named) < 0 || named.st_dev != program_file.st_dev ||
	    named.st_ino != program_file.st_ino) {
		errno = ESTALE;
		return NULL;
	}
	return program;
}

static const char *const restore_arguments[] = {"-d", NULL};
static const char *const dump_arguments[] = {"--track-mem", "--prev-images-dir", "../images", "-t",
					     NULL};

static int add_arguments(char **argv, int count, const char *const arguments[])
{
	for (int i = 0; arguments[i]; i++)
		argv[count++] = (char *)(uintptr_t)arguments[i];
	return count;
}

bool criu_command_make(struct criu_command *command, const struct directory *directory,
		       const struct message *begin)
{
	bool dump = begin->op == OP_DUMP;
	uint32_t extras = begin->field[KEY_CRIU_OPTIONS].size;
	const char *self = criu_program();
	const char *const fixed[] = {
		options.criu,
		dump ? "dump" : "restore",
		"--no-default-config",
		"-D",
		command->images,
		"-W",
		directory->path,
		"-o",
		"criu.log",
		command->level,
		"--action-script",
		self,
		NULL,
	};
	int count;

	command->strings = message_strings(begin, KEY_CRIU_OPTIONS);
	command->argv = calloc(FIXED_ARGUMENTS + extras + 1, sizeof(*command->argv));
	if (!command->strings || !command->argv || !self)
		return false;
	snprintf(command->images, sizeof(command->images), "%s/%s", directory->path,
		 dump ? "dump" : "images");
	snprintf(command->output, sizeof(command->output), "%s/criu.out", directory->path);
	snprintf(command->socket, sizeof(command->socket), HOOK_SOCKET "=%s/hook", directory->path);
	snprintf(command->level, sizeof(command->level), "-v%llu",
		 (unsigned long long)message_uint(begin, KEY_LOG_LEVEL));
	command->env[0] = command->socket;
	command->env[1] = AGENT_PATH;
	command->env[2] = NULL;
	count = add_arguments(command->argv, 0, fixed);
	count = add_arguments(command->argv, count, dump ? dump_arguments : restore_arguments);
	if (dump) {
		snprintf(command->pid, sizeof(command->pid), "%llu",
			 (unsigned long long)message_uint(begin, KEY_PID));
		command->argv[count++] = command->pid;
		/* A second time: hook.c */
		command->argv[count++] = (char *)(uintptr_t)"--action-script";
		command->argv[count++] = (char *)(uintptr_t)self;
		if (message_uint(begin, KEY_LEAVE_RUNNING))
			command->argv[count++] = (char *)(uintptr_t)"--leave-running";
	}
	memcpy(command->argv + count, command->strings, extras * sizeof(*command->argv));
	return true;
}

void criu_command_free(struct criu_command *command)
{
	free(command->argv);
	free(command->strings);
}

pid_t criu_start(const struct criu_command *command)
{
	struct child_io io = {-1, -1, -1};
	pid_t pid;

	io.out = io.err =
		open(command->output, O_WRONLY | O_CREAT | O_NOFOLLOW | O_APPEND | O_CLOEXEC, 0600);
	if (io.out < 0)
		return -1;
	pid = child_start(command->argv, command->env, io);
	close(io.out);
	return pid;
}

/* ------------------------------------------------------------------------ log */

static size_t read_tail(int fd, char text[LOG_TAIL + 1])
{
	ssize_t size = 0;
	off_t end;

	if (fd >= 0) {
		end = lseek(fd, 0, SEEK_END);
		size = pread(fd, text, LOG_TAIL, end > LOG_TAIL ? end - LOG_TAIL : 0);
	}
	text[size > 0 ? size : 0] = 0;
	return size > 0 ? (size_t)size : 0;
}

static void keep_line(char lines[LOG_LINES][LOG_WIDTH], int *count, const char *line)
{
	if (*count == LOG_LINES) {
		/* Keep the first line: it names the cause of the others. */
		memmove(lines[1], lines[2], (LOG_LINES - 2) * sizeof(*lines));
		--*count;
	}
	snprintf(lines[*count], LOG_WIDTH, "%.*s", LOG_WIDTH - 1, line);
	for (char *c = lines[*count]; *c; c++)
		if (*c < ' ' || *c > '~')
			*c = '?';
	++*count;
}

int log_collect(int fd, const char *word, char lines[LOG_LINES][LOG_WIDTH], int count)
{
	static char text[LOG_TAIL + 1];
	size_t size = read_tail(fd, text);
	char *rest = NULL, *line;

	/* A NUL would cut the text short. */
	for (size_t i = 0; i < size; i++)
		if (!text[i])
			text[i] = '?';
	for (line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest))
		if (strstr(line, word))
			keep_line(lines, &count, line);
	return count;
}

static int collect(const char *path, const char *word, char lines[LOG_LINES][LOG_WIDTH])
{
	int fd = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
	int count = log_collect(fd, word, lines, 0);

	if (fd >= 0)
		close(fd);
	return count;
}

int criu_log_errors(const struct directory *directory, char lines[LOG_LINES][LOG_WIDTH])
{
	char path[300];
	int count;

	snprintf(path, sizeof(path), "%s/criu.log", directory->path);
	count = collect(path, "Error (", lines);
	if (count)
		return count;
	/* CRIU failed before it opened its log: bad options, a missing library. */
	snprintf(path, sizeof(path), "%s/criu.out", directory->path);
	return collect(path, "", lines);
}

/* ------------------------------------------------------------------------ version */

static bool read_version(int fd, char version[64])
{
	int64_t deadline = now_ms() + VERSION_MS;
	struct pollfd output = {.fd = fd, .events = POLLIN};
	char text[512], *line;
	ssize_t size;
	size_t done = 0;

	while (done < sizeof(text) - 1 && now_ms() < deadline &&
	       poll(&output, 1, (int)(deadline - now_ms())) == 1 &&
	       (size = read(fd, text + done, sizeof(text) - 1 - done)) > 0)
		done += (size_t)size;
	text[done] = 0;
	line = strstr(text, "Version: ");
	if (!line)
		return false;
	snprintf(version, 64, "%.*s", (int)strcspn(line + 9, "\n"), line + 9);
	return true;
}

const char *criu_version(void)
{
	static char version[64];
	char *argv[] = {(char *)(uintptr_t)options.criu, "--version", NULL};
	char *env[] = {AGENT_PATH, NULL};
	int out[2];
	pid_t pid;

	if (version[0])
		return version;
	if (pipe2(out, O_CLOEXEC) < 0)
		return NULL;
	pid = child_start(argv, env, (struct child_io){-1, out[1], -1});
	if (pid > 0) {
		close(out[1]);
		out[1] = -1;
		/* A program that hangs is not waited for anywhere else. */
		if (!read_version(out[0], version))
			kill(pid, SIGKILL);
	}
	close(out[0]);
	if (out[1] >= 0)
		close(out[1]);
	return version[0] ? version : NULL;
}
