/*
 * Cgroups of version 2, as descriptors of their directories.
 *
 * A user of the guest may own a part of the hierarchy, and controls its names, depth and width. A
 * cgroup cannot be renamed, nor removed while a process is in it.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "cgroup.h"

#define CGROUP2_SUPER_MAGIC 0x63677270 /* include/uapi/linux/magic.h */
#define DIRECTORY (O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)
#define MOST_CGROUPS 65536
#define V2 "0::" /* begins its line of /proc/PID/cgroup */
#define PODMAN_GROUP "libpod-"

/* The second is where systemd has it if the controllers are of version 1. */
static const char *const roots[] = {"/sys/fs/cgroup", "/sys/fs/cgroup/unified"};

static int open_root(void)
{
	struct statfs type;

	for (size_t i = 0; i < ARRAY_SIZE(roots); i++) {
		int fd = open(roots[i], DIRECTORY);

		if (fd >= 0 && fstatfs(fd, &type) == 0 && type.f_type == CGROUP2_SUPER_MAGIC)
			return fd;
		close_fd(&fd);
	}
	errno = ENODEV;
	return -1;
}

/* Read a file up to its end, or as much as fits; a NUL follows. Returns its size, -1 on failure. */
static ssize_t read_text(int fd, char *text, size_t room)
{
	ssize_t size = -1;
	size_t done = 0;

	text[0] = 0;
	while (fd >= 0 && done < room - 1 && (size = read(fd, text + done, room - 1 - done)) > 0)
		done += (size_t)size;
	text[done] = 0;
	return size < 0 ? -1 : (ssize_t)done;
}

bool cgroup_path(pid_t thread, char path[CGROUP_PATH])
{
	static char text[16 * CGROUP_PATH];
	char name[64], *line, *rest = NULL;
	ssize_t size;
	int fd;

	snprintf(name, sizeof(name), "/proc/%d/cgroup", thread);
	fd = open(name, O_RDONLY | O_CLOEXEC);
	size = read_text(fd, text, sizeof(text));
	close_fd(&fd);
	if (size <= 0 || size == sizeof(text) - 1)
		return false;
	/* The kernel lets no name have a newline: cgroup_mkdir() in kernel/cgroup/cgroup.c. */
	for (line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest))
		if (!strncmp(line, V2, strlen(V2)))
			return snprintf(path, CGROUP_PATH, "%s", line + strlen(V2)) < CGROUP_PATH;
	return false;
}

bool cgroup_container(int group, char id[CONTAINER_ID + 1])
{
	char link[64], path[2 * CGROUP_PATH], *name, *rest = NULL;
	ssize_t size;

	snprintf(link, sizeof(link), "/proc/self/fd/%d", group);
	size = readlink(link, path, sizeof(path) - 1);
	path[size > 0 ? size : 0] = 0;
	/* The first one: what is below it may be a container's in the container. */
	for (name = strtok_r(path, "/", &rest); name; name = strtok_r(NULL, "/", &rest)) {
		if (strncmp(name, PODMAN_GROUP, strlen(PODMAN_GROUP)))
			continue;
		name += strlen(PODMAN_GROUP);
		if (strspn(name, "0123456789abcdef") != CONTAINER_ID ||
		    (name[CONTAINER_ID] && strcmp(name + CONTAINER_ID, ".scope")))
			continue;
		snprintf(id, CONTAINER_ID + 1, "%.*s", CONTAINER_ID, name);
		return true;
	}
	return false;
}

int cgroup_open_child(int parent, const char *name)
{
	return openat(parent, name, DIRECTORY);
}

int cgroup_open(const char *path)
{
	char copy[CGROUP_PATH], *name, *rest = NULL;
	int fd = open_root(), child, depth = 0;

	snprintf(copy, sizeof(copy), "%s", path);
	for (name = strtok_r(copy, "/", &rest); name && fd >= 0;
	     name = strtok_r(NULL, "/", &rest)) {
		/* The path of a cgroup outside of the agent's cgroup namespace begins with "/..". */
		if (name[0] == '.' || ++depth > CGROUP_DEPTH) {
			close_fd(&fd);
			errno = name[0] == '.' ? EXDEV : ENAMETOOLONG;
			return -1;
		}
		child = cgroup_open_child(fd, name);
		close(fd);
		fd = child;
	}
	return fd;
}

bool cgroup_write(int group, const char *file, const char *text)
{
	int fd = openat(group, file, O_WRONLY | O_NOFOLLOW | O_CLOEXEC), error;
	bool done = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);

	error = errno;
	close_fd(&fd);
	errno = error;
	return done;
}

/* 1 if it has the line, 0 if not, -1 if it cannot be read. */
static int look_for(int group, const char *file, const char *wanted)
{
	int fd = openat(group, file, O_RDONLY | O_NOFOLLOW | O_CLOEXEC), found = 0;
	char text[512], *line, *rest = NULL;

	if (read_text(fd, text, sizeof(text)) < 0)
		found = -1;
	close_fd(&fd);
	for (line = strtok_r(text, "\n", &rest); line && !found; line = strtok_r(NULL, "\n", &rest))
		found = !strcmp(line, wanted);
	return found;
}

bool cgroup_has(int group, const char *file, const char *line)
{
	return look_for(group, file, line) > 0;
}

bool cgroup_is_domain(int group)
{
	/* The root has no such file, and is always one; its threaded children have one. */
	return look_for(group, "cgroup.type", "domain") != 0;
}

int cgroup_processes(int group, pid_t processes[CGROUP_PROCESSES])
{
	static char text[8 * CGROUP_PROCESSES]; /* PID_MAX_LIMIT has seven digits */
	int fd = openat(group, "cgroup.procs", O_RDONLY | O_NOFOLLOW | O_CLOEXEC), count = 0;
	char *at = text, *end;

	read_text(fd, text, sizeof(text));
	close_fd(&fd);
	/* A number that is cut off has no newline. */
	for (; count < CGROUP_PROCESSES && (end = strchr(at, '\n')); at = end + 1)
		processes[count++] = (pid_t)strtol(at, NULL, 10);
	return count;
}

/* ------------------------------------------------------------------------ all cgroups */

/* Directories from the root to the present one. */
struct walk {
	struct level {
		int fd; /* the stream's */
		DIR *entries;
	} levels[CGROUP_DEPTH + 1];
	int depth, looked_at;
};

/* Descend into a directory, if it could be opened. */
static void enter(struct walk *walk, int fd)
{
	DIR *entries = fd < 0 ? NULL : fdopendir(fd);

	if (!entries) {
		close_fd(&fd);
		return;
	}
	walk->levels[walk->depth++] = (struct level){fd, entries};
	walk->looked_at++;
}

static void leave(struct walk *walk)
{
	closedir(walk->levels[--walk->depth].entries);
}

bool cgroup_find(const char *prefix, void (*found)(int parent, const char *name, void *context),
		 void *context)
{
	struct walk walk = {.depth = 0};

	enter(&walk, open_root());
	while (walk.depth && walk.looked_at <= MOST_CGROUPS) {
		const struct level *level = &walk.levels[walk.depth - 1];
		struct dirent *entry = readdir(level->entries);

		if (!entry)
			leave(&walk);
		else if (entry->d_type != DT_DIR || entry->d_name[0] == '.')
			continue;
		else if (!strncmp(entry->d_name, prefix, strlen(prefix)))
			found(level->fd, entry->d_name, context);
		else if (walk.depth <= CGROUP_DEPTH)
			enter(&walk, cgroup_open_child(level->fd, entry->d_name));
	}
	while (walk.depth)
		leave(&walk);
	return walk.looked_at <= MOST_CGROUPS;
}
