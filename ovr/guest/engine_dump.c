/*
 * Dump containers with podman, runc or crun, which start CRIU themselves.
 *
 * They find CRIU by PATH, where the agent has put wrapper.c before it. That gives CRIU the agent's
 * configuration file: the hook, and the parent image set that makes CRIU leave memory to the host.
 *
 * Memory must not be left out unless the hook is run. So the parent's inventory, without which CRIU
 * takes no page for one that the parent has, and fails (detect_pid_reuse() in criu/mem.c), has
 * another name (HOOK_HELD) until the hook renames it. Nor may an engine end the container if the
 * wrapper is not run: runc and crun name that parent to CRIU themselves. podman's checkpoint would
 * be a whole one then, in its own directory and archive.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "restore.h"

#define FIXED_ARGUMENTS 12

/* The images are in a directory of podman's. */
static bool podmans_images;

static bool find_criu(char path[PATH_MAX])
{
	char found[512];

	if (strchr(options.criu, '/'))
		return realpath(options.criu, path);
	errno = ENOENT;
	return engine_find_program(options.criu, found) && realpath(found, path);
}

static bool write_config(const struct directory *directory, const char *self)
{
	char path[320], text[1200];
	int fd = -1, size;
	bool done;

	snprintf(path, sizeof(path), "%s/" WRAPPER_DIRECTORY "/" WRAPPER_CONFIG, directory->path);
	/* The script twice: hook.c */
	size = snprintf(text, sizeof(text),
			"action-script \"%s\"\n"
			"action-script \"%s\"\n"
			"track-mem\n"
			"prev-images-dir \"%s/images\"\n",
			self, self, directory->path);
	fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	done = fd >= 0 && write(fd, text, (size_t)size) == size;
	close_fd(&fd);
	return done;
}

static bool prepare(struct directory *directory, bool podman)
{
	const char *self = criu_program();
	char criu[PATH_MAX], fifo[320];

	snprintf(fifo, sizeof(fifo), "%s/" ENGINE_FIFO, directory->path);
	if (!self || !find_criu(criu) || !directory_make_wrapper(directory, self, criu) ||
	    !write_config(directory, self))
		return false;
	if (!podman)
		return directory_make_dump(directory);
	return mkfifo(fifo, 0600) == 0 && archive_open(fifo);
}

static pid_t start(char *const argv[], const struct directory *directory, bool podman)
{
	char path[400], out[320], err[320];
	char *env[] = {path, "HOME=/root", "LC_ALL=C.UTF-8", NULL};
	const int flags = O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC;
	struct child_io io = {-1, -1, -1};
	pid_t pid;

	snprintf(path, sizeof(path), "PATH=%s/" WRAPPER_DIRECTORY ":%s", directory->path,
		 AGENT_DIRECTORIES);
	snprintf(out, sizeof(out), "%s/" ENGINE_OUT, directory->path);
	snprintf(err, sizeof(err), "%s/" ENGINE_ERR, directory->path);
	io.out = open(out, flags, 0600);
	io.err = open(err, flags, 0600);
	/* podman would wait for ever for its archive to be read. */
	pid = podman ? child_start_mortal(argv, env, io) : child_start(argv, env, io);
	close_fd(&io.out);
	close_fd(&io.err);
	return pid;
}

static pid_t checkpoint(const struct directory *directory, const struct message *message,
			const char *program, const char *name)
{
	char fifo[320], images[300];
	uint32_t extras = message->field[KEY_CRIU_OPTIONS].size;
	char **extra = message_strings(message, KEY_CRIU_OPTIONS);
	const char **argv = calloc(FIXED_ARGUMENTS + extras + 1, sizeof(*argv));
	const char *const podman[] = {program, "container", "checkpoint", "--compress",
				      "none",  "--export",  fifo};
	const char *const runtime[] = {program,         "checkpoint",  "--image-path",
				       images,          "--work-path", directory->path,
				       "--parent-path", "../images"};
	bool by_podman = engine_is_podman(program);
	size_t count = by_podman ? ARRAY_SIZE(podman) : ARRAY_SIZE(runtime);
	pid_t pid = -1;

	snprintf(fifo, sizeof(fifo), "%s/" ENGINE_FIFO, directory->path);
	snprintf(images, sizeof(images), "%s/dump", directory->path);
	if (extra && argv) {
		memcpy(argv, by_podman ? podman : runtime, count * sizeof(*argv));
		if (message_uint(message, KEY_LEAVE_RUNNING))
			argv[count++] = "--leave-running";
		memcpy(argv + count, extra, extras * sizeof(*argv));
		argv[count + extras] = name;
		pid = start((char *const *)argv, directory, by_podman);
	}
	free(argv);
	free(extra);
	return pid;
}

pid_t engine_start_dump(struct directory *directory, const struct message *message)
{
	char program[MAX_STRING], name[MAX_STRING];

	message_str(message, KEY_ENGINE, program);
	message_str(message, KEY_NAME, name);
	podmans_images = false;
	if (!prepare(directory, engine_is_podman(program)))
		return -1;
	return checkpoint(directory, message, program, name);
}

/* ------------------------------------------------------------------------ images */

static bool is_image(const char *name)
{
	size_t size = strlen(name);

	return size > 4 && !strcmp(name + size - 4, ".img");
}

static bool is_pages_image(const char *name)
{
	return !strncmp(name, PAGES, strlen(PAGES));
}

/* podman's CRIU works in ID/userdata, and writes its images to a directory in it. */
static bool open_podmans(struct directory *directory, pid_t criu)
{
	char path[64];
	int work;

	snprintf(path, sizeof(path), "/proc/%d/cwd", criu);
	work = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	directory->dump = work < 0 ? -1 :
				     openat(work, "checkpoint",
					    O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	close_fd(&work);
	podmans_images = directory->dump >= 0;
	return podmans_images;
}

bool engine_open_images(struct directory *directory, pid_t criu)
{
	char parent[300];

	if (directory->dump < 0 && !open_podmans(directory, criu))
		return false;
	/* CRIU has written none yet: those of a checkpoint that failed would be taken for ours. */
	directory_empty(directory->dump, ".", is_image);
	/* CRIU leaves a link that is there already, which may lead anywhere. */
	snprintf(parent, sizeof(parent), "%s/images", directory->path);
	unlinkat(directory->dump, "parent", 0);
	return symlinkat(parent, directory->dump, "parent") == 0;
}

void engine_strip_images(const struct directory *directory)
{
	if (!podmans_images)
		return;
	directory_empty(directory->dump, ".", is_pages_image);
	unlinkat(directory->dump, "parent", 0);
}

void engine_remove_images(const struct directory *directory)
{
	char link[64], path[PATH_MAX];
	ssize_t size;

	if (!podmans_images)
		return;
	podmans_images = false;
	directory_empty(directory->dump, ".", NULL);
	snprintf(link, sizeof(link), "/proc/self/fd/%d", directory->dump);
	size = readlink(link, path, sizeof(path) - 1);
	if (size > 0) {
		path[size] = 0;
		rmdir(path);
	}
}

/* Messages of cr_dump_finish() in criu/cr-dump.c */
static bool logged(const struct engine_criu *criu, const char *words)
{
	static char lines[LOG_LINES][LOG_WIDTH];

	return log_collect(criu->log, words, lines, 0) > 0;
}

bool engine_criu_gave_up(const struct engine_criu *criu)
{
	return criu->end < 0 || logged(criu, "Dumping FAILED");
}

bool engine_criu_succeeded(const struct engine_criu *criu)
{
	return logged(criu, "Dumping finished successfully");
}
