/* Cgroups of version 2, as descriptors of their directories. */
#ifndef OVR_CGROUP_H
#define OVR_CGROUP_H

#include "agent.h"

#define CGROUP_PATH 4096 /* PATH_MAX: no longer ones in /proc/PID/cgroup */
#define CGROUP_DEPTH 64  /* of a cgroup that is used, or found */

/* The path of a thread's cgroup below the root; "/" is the root's. */
bool cgroup_path(pid_t thread, char path[CGROUP_PATH]);
/* A descriptor, or -1 and errno. No component of the path may be a symbolic link. */
int cgroup_open(const char *path);
int cgroup_open_child(int parent, const char *name);
/* The id of podman's container that it is of: below libpod-ID or, with systemd, libpod-ID.scope. */
bool cgroup_container(int group, char id[CONTAINER_ID + 1]);
/* False and errno on failure. */
bool cgroup_write(int group, const char *file, const char *text);
/* Whether the file has this line; false if there is no such file. */
bool cgroup_has(int group, const char *file, const char *line);
/* Whether processes may be in its children beside its own: it has no threaded children. */
bool cgroup_is_domain(int group);

/* The processes of a cgroup, in part if there are many. */
#define CGROUP_PROCESSES 4096
int cgroup_processes(int group, pid_t processes[CGROUP_PROCESSES]);

/*
 * Call `found` with each cgroup whose name begins so, and its parent. It closes neither, and may
 * remove the cgroup. False if there are too many cgroups to look at.
 */
bool cgroup_find(const char *prefix, void (*found)(int parent, const char *name, void *context),
		 void *context);

#endif
