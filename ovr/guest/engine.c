/*
 * Restore containers with podman, runc or crun, which start CRIU themselves.
 *
 * CRIU learns of the hook from its environment, which all of them pass on:
 * CRIU_CONFIG_FILE names a file that sets the action script. Nothing in /etc
 * changes, and other restores in this guest are not affected.
 *
 * If CRIU did not run the hook, an empty tree would be released. So one image
 * that CRIU requires has another name (HOOK_HELD) until the hook renames it.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "agent.h"

#define FIXED_ARGUMENTS 12

static const char *const programs[] = {"podman", "runc", "crun"};

bool engine_is_podman(const char *program)
{
	return !strcmp(program, "podman");
}

bool engine_known(const char *name)
{
	for (size_t i = 0; i < ARRAY_SIZE(programs); i++)
		if (!strcmp(programs[i], name))
			return true;
	return false;
}

/* Search the same directories as execvpe(). */
bool engine_find_program(const char *program, char path[512])
{
	const char *places = getenv("PATH"), *next;

	for (; places && *places; places = *next ? next + 1 : next) {
		next = places + strcspn(places, ":");
		snprintf(path, 512, "%.*s/%s", (int)(next - places), places, program);
		if (access(path, X_OK) == 0)
			return true;
	}
	return false;
}

static bool installed(const char *program)
{
	char path[512];

	return engine_find_program(program, path);
}

void engine_add_installed(struct writer *writer)
{
	uint32_t count = 0;

	for (size_t i = 0; i < ARRAY_SIZE(programs); i++)
		count += installed(programs[i]);
	message_add_list(writer, KEY_ENGINES, count);
	for (size_t i = 0; i < ARRAY_SIZE(programs); i++)
		if (installed(programs[i]))
			message_item_str(writer, programs[i]);
}

static bool write_config(const char *path)
{
	const char *self = criu_program();
	char text[300];
	int fd = -1, size;
	bool done;

	if (!self)
		return false;
	size = snprintf(text, sizeof(text), "action-script \"%s\"\n", self);
	fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
	done = fd >= 0 && write(fd, text, (size_t)size) == size;
	if (fd >= 0)
		close(fd);
	return done;
}

static pid_t start(char *const argv[], const struct directory *directory, const char *config)
{
	char socket[320], config_file[320], out[320], err[320];
	char *env[] = {AGENT_PATH, "HOME=/root", "LC_ALL=C.UTF-8", socket, config_file, NULL};
	struct child_io io = {-1, -1, -1};
	const int flags = O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC;
	pid_t pid;

	snprintf(socket, sizeof(socket), HOOK_SOCKET "=%s/hook", directory->path);
	snprintf(config_file, sizeof(config_file), "CRIU_CONFIG_FILE=%s", config);
	snprintf(out, sizeof(out), "%s/" ENGINE_OUT, directory->path);
	snprintf(err, sizeof(err), "%s/" ENGINE_ERR, directory->path);
	/* A container restored by a runtime inherits these descriptors for good: /dev/null. */
	io.out = engine_is_podman(argv[0]) ? open(out, flags, 0600) : -1;
	io.err = engine_is_podman(argv[0]) ? open(err, flags, 0600) : -1;
	pid = child_start(argv, env, io);
	if (io.out >= 0)
		close(io.out);
	if (io.err >= 0)
		close(io.err);
	return pid;
}

static int fixed_arguments(const char *argv[FIXED_ARGUMENTS], const char *program,
			   const char *images, const char *archive, const char *work,
			   const char *log)
{
	const char *const podman[] = {program, "container", "restore", "--import", archive};
	const char *const runtime[] = {
		program,        "--log", log,           "restore", "--detach",
		"--image-path", images,  "--work-path", work,
	};

	if (engine_is_podman(program)) {
		memcpy(argv, podman, sizeof(podman));
		return ARRAY_SIZE(podman);
	}
	memcpy(argv, runtime, sizeof(runtime));
	return ARRAY_SIZE(runtime);
}

static struct {
	char program[16], name[MAX_STRING];
	char **volumes; /* names, NULL-terminated */
} current;

/* The runtimes' last argument is the container's name. */
static void remember(const char *program, char *const extra[], uint32_t extras,
		     const struct message *begin)
{
	uint32_t count = begin->field[KEY_VOLUMES].size;
	char **names = message_strings(begin, KEY_VOLUMES);

	engine_forget_names();
	snprintf(current.program, sizeof(current.program), "%.15s", program);
	snprintf(current.name, sizeof(current.name), "%s", extras ? extra[extras - 1] : "");
	if (names && count)
		current.volumes = names;
	else
		free(names);
}

void engine_forget_names(void)
{
	free(current.volumes);
	memset(&current, 0, sizeof(current));
}

static pid_t remove_volumes(void)
{
	uint32_t count = 0;
	char **argv, *env[] = {AGENT_PATH, "HOME=/root", NULL};
	pid_t pid = 0;

	while (current.volumes && current.volumes[count])
		count++;
	argv = count ? calloc(count + 5, sizeof(*argv)) : NULL;
	if (argv) {
		argv[0] = current.program;
		argv[1] = "volume";
		argv[2] = "rm";
		argv[3] = "--";
		memcpy(argv + 4, current.volumes, count * sizeof(*argv));
		pid = child_start(argv, env, (struct child_io){-1, -1, -1});
	}
	free(argv);
	return pid > 0 ? pid : 0;
}

static pid_t remove_container(const struct engine_criu *criu)
{
	char id[sizeof(criu->container)], *env[] = {AGENT_PATH, "HOME=/root", NULL};
	char *podman[] = {current.program, "container", "rm", "--force", "--time", "0",
			  "--volumes",     id,          NULL};
	char *runtime[] = {current.program, "delete", "--force", current.name, NULL};
	bool by_podman = engine_is_podman(current.program);
	pid_t pid = 0;

	memcpy(id, criu->container, sizeof(id));
	if (by_podman ? id[0] : current.name[0])
		pid = child_start(by_podman ? podman : runtime, env, (struct child_io){-1, -1, -1});
	return pid > 0 ? pid : 0;
}

pid_t engine_start_removal(const char *container, int messages_fd)
{
	char id[CONTAINER_ID + 1], *env[] = {AGENT_PATH, "HOME=/root", "LC_ALL=C.UTF-8", NULL};
	char *argv[] = {"podman", "container", "rm", "--force", "--time", "0", id, NULL};

	snprintf(id, sizeof(id), "%s", container);
	return child_start(argv, env, (struct child_io){-1, -1, messages_fd});
}

pid_t engine_clean_up(int step, const struct engine_criu *criu)
{
	/* Before CRIU has run there is no container, or an older one of the same name. */
	if (criu->end < 0 || step > 1)
		return -1;
	return step == 0 ? remove_container(criu) : remove_volumes();
}

pid_t engine_start(const struct directory *directory, const struct message *begin)
{
	char program[MAX_STRING], archive[320], images[300], config[300], log[300];
	const char *fixed[FIXED_ARGUMENTS];
	char **extra = message_strings(begin, KEY_CRIU_OPTIONS);
	uint32_t extras = begin->field[KEY_CRIU_OPTIONS].size;
	char **argv = calloc(FIXED_ARGUMENTS + extras + 1, sizeof(*argv));
	pid_t pid = -1;
	int count;

	message_str(begin, KEY_ENGINE, program);
	snprintf(archive, sizeof(archive), "%s/images/" ENGINE_ARCHIVE, directory->path);
	snprintf(images, sizeof(images), "%s/images", directory->path);
	snprintf(config, sizeof(config), "%s/criu.conf", directory->path);
	snprintf(log, sizeof(log), "%s/" ENGINE_ERR, directory->path);
	if (extra && argv && write_config(config)) {
		count = fixed_arguments(fixed, program, images, archive, directory->path, log);
		memcpy(argv, fixed, (size_t)count * sizeof(*argv));
		memcpy(argv + count, extra, extras * sizeof(*argv));
		remember(program, extra, extras, begin);
		pid = start(argv, directory, config);
	}
	free(argv);
	free(extra);
	return pid;
}

/* ------------------------------------------------------------------------ the engine's CRIU */

/* podman runs CRIU with ID/userdata as its working directory. */
static void container_of(pid_t criu, char id[CONTAINER_ID + 1])
{
	char path[64], link[512], *end;
	ssize_t size;

	snprintf(path, sizeof(path), "/proc/%d/cwd", criu);
	size = readlink(path, link, sizeof(link) - 1);
	link[size > 0 ? size : 0] = 0;
	end = strrchr(link, '/');
	if (!end || strcmp(end, "/userdata") || end - link < CONTAINER_ID)
		return;
	if (strspn(end - CONTAINER_ID, "0123456789abcdef") == CONTAINER_ID)
		memcpy(id, end - CONTAINER_ID, CONTAINER_ID);
}

struct engine_criu engine_adopt(pid_t criu, const char *log)
{
	struct engine_criu found = {
		/* The agent is not its parent: only the pidfd reports its exit. */
		.end = (int)syscall(SYS_pidfd_open, criu, 0),
		.log = -1,
		.runtime = tree_parent(criu),
	};
	char path[64];

	/* The log is in the working directory, which podman removes after a failure. */
	snprintf(path, sizeof(path), "/proc/%d/cwd/%s", criu, log);
	found.log = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
	container_of(criu, found.container);
	return found;
}

bool engine_criu_ended(const struct engine_criu *criu)
{
	struct pollfd end = {.fd = criu->end, .events = POLLIN};

	return criu->end < 0 || poll(&end, 1, 0) == 1;
}

void engine_forget(struct engine_criu *criu)
{
	if (criu->end >= 0)
		close(criu->end);
	if (criu->log >= 0)
		close(criu->log);
	*criu = (struct engine_criu){.end = -1, .log = -1};
	engine_forget_names();
}

/* ------------------------------------------------------------------------ output */

/* The last line of the engine's output: podman prints the container's id. */
void engine_result(const struct directory *directory, char line[LOG_WIDTH])
{
	char path[300], lines[LOG_LINES][LOG_WIDTH];
	int count, fd;

	snprintf(path, sizeof(path), "%s/" ENGINE_OUT, directory->path);
	fd = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
	count = log_collect(fd, "", lines, 0);
	line[0] = 0;
	if (count)
		memcpy(line, lines[count - 1], LOG_WIDTH);
	if (fd >= 0)
		close(fd);
}

int engine_log_errors(const struct directory *directory, const struct engine_criu *criu,
		      char lines[LOG_LINES][LOG_WIDTH])
{
	int count = log_collect(criu->log, "Error (", lines, 0), fd;
	char path[300];

	snprintf(path, sizeof(path), "%s/" ENGINE_ERR, directory->path);
	fd = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
	count = log_collect(fd, "", lines, count);
	if (fd >= 0)
		close(fd);
	return count;
}
