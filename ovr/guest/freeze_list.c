/* The moves whose trees are frozen, found by the names of their cgroups (freeze.c). */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cgroup.h"
#include "freeze.h"

int freeze_open_found(int parent, const char *name)
{
	int fd = cgroup_open_child(parent, name);
	struct stat stat;

	if (fd < 0)
		return -1;
	if (fstat(fd, &stat) < 0 || stat.st_uid != geteuid() ||
	    unlinkat(parent, name, AT_REMOVEDIR) == 0 || !freeze_holds(fd))
		close_fd(&fd);
	return fd;
}

bool freeze_is_name(const char *name)
{
	const char *id = name + strlen(FREEZE_PREFIX), *kind = id + MOVE_ID;

	return !strncmp(name, FREEZE_PREFIX, strlen(FREEZE_PREFIX)) &&
	       strspn(id, "0123456789abcdef") == MOVE_ID &&
	       (!*kind || !strcmp(kind, FREEZE_PODMAN));
}

void moves_remove(struct moves *moves, const char *id)
{
	for (int i = 0; i < moves->count; i++)
		if (!strcmp(moves->ids[i], id)) {
			moves->count--;
			memmove(moves->ids[i], moves->ids[moves->count], sizeof(moves->ids[i]));
		}
}

void moves_add(struct moves *moves, const char *id)
{
	moves_remove(moves, id);
	if (moves->count == MAX_DOUBTS)
		moves->too_many = true;
	else
		snprintf(moves->ids[moves->count++], sizeof(moves->ids[0]), "%s", id);
}

static void list_found(int parent, const char *name, void *context)
{
	struct moves *moves = context;
	char id[MOVE_ID + 1];
	int fd;

	if (!freeze_is_name(name))
		return;
	fd = freeze_open_found(parent, name);
	if (fd < 0)
		return;
	close(fd);
	snprintf(id, sizeof(id), "%.*s", MOVE_ID, name + strlen(FREEZE_PREFIX));
	moves_add(moves, id);
}

struct problem freeze_list(struct moves *moves)
{
	*moves = (struct moves){.count = 0};
	if (!cgroup_find(FREEZE_PREFIX, list_found, moves))
		return (struct problem){CODE_CGROUP, "too many cgroups"};
	return (struct problem){CODE_CGROUP, moves->too_many ? "too many moves" : NULL};
}
