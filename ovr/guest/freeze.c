/*
 * Hold a tree so that nothing but a later decision lets it run: neither the death of its tracer nor
 * that of the agent.
 *
 * In each cgroup with tasks of the tree a child is made, frozen, and the tasks are moved into it.
 * Frozen tasks run no instruction, are not moved by others than root or the owner of their cgroup,
 * and can be killed. The parent is the cgroup that they were in before, and the name of the child
 * has the id of the move, and tells whether podman has to end the tree; which container that is,
 * the name of a cgroup above tells. There is no other record that could contradict them.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cgroup.h"
#include "freeze.h"

#define MAX_GROUPS 64
#define FREEZE_MS 1000 /* tasks in a ptrace stop are frozen at once */
#define BACK_MS 5000

static struct {
	char name[sizeof(FREEZE_PREFIX) + MOVE_ID + sizeof(FREEZE_PODMAN)];
	char container[CONTAINER_ID + 1]; /* empty: podman is not to end the tree */
	int count;
	struct group {
		int parent, fd;
	} groups[MAX_GROUPS];
} frozen;

static struct problem failure(const char *what)
{
	static char text[128];
	enum code code = code_of_errno(errno);

	snprintf(text, sizeof(text), "%s: %s", what, strerror(errno));
	return (struct problem){code == CODE_SYSTEM ? CODE_CGROUP : code, text};
}

static struct problem refusal(const char *text)
{
	return (struct problem){CODE_CGROUP, text};
}

static void set_name(const char *move, const char *kind)
{
	snprintf(frozen.name, sizeof(frozen.name), FREEZE_PREFIX "%s%s", move, kind);
}

void freeze_forget(void)
{
	for (int i = 0; i < frozen.count; i++) {
		close_fd(&frozen.groups[i].parent);
		close_fd(&frozen.groups[i].fd);
	}
	frozen.count = 0;
	frozen.container[0] = 0;
}

const char *freeze_container(void)
{
	return frozen.container;
}

/* ------------------------------------------------------------------------ freeze */

/* The paths of the parents, while the tree is moved. */
static char paths[MAX_GROUPS][CGROUP_PATH];

static int group_at(const char *path)
{
	for (int i = 0; i < frozen.count; i++)
		if (!strcmp(paths[i], path))
			return i;
	return -1;
}

static struct problem make_child(int parent)
{
	if (!cgroup_is_domain(parent))
		return refusal("its cgroup is threaded");
	/* An existing one is not the agent's. */
	if (mkdirat(parent, frozen.name, 0755) < 0)
		return failure("cannot make a cgroup");
	return (struct problem){.text = NULL};
}

static struct problem make_group(const char *path)
{
	struct group *group = &frozen.groups[frozen.count];
	struct problem problem;

	if (frozen.count == MAX_GROUPS)
		return refusal("its tasks are in too many cgroups");
	group->fd = -1;
	group->parent = cgroup_open(path);
	if (group->parent < 0)
		return failure("no cgroup of version 2");
	problem = make_child(group->parent);
	if (problem.text) {
		close_fd(&group->parent);
		return problem;
	}
	snprintf(paths[frozen.count++], CGROUP_PATH, "%s", path);
	group->fd = cgroup_open_child(group->parent, frozen.name);
	/* Before the first task: whatever is in it is frozen. */
	if (group->fd < 0 || !cgroup_write(group->fd, "cgroup.freeze", "1"))
		return failure("cannot freeze a cgroup");
	return (struct problem){.text = NULL};
}

static struct problem make_groups(const uint32_t *tasks, int count)
{
	struct problem problem = {.text = NULL};
	char path[CGROUP_PATH];

	for (int i = 0; i < count && !problem.text; i++) {
		if (!cgroup_path((pid_t)tasks[i], path))
			problem = refusal("a task has no cgroup of version 2");
		else if (group_at(path) < 0)
			problem = make_group(path);
	}
	return problem;
}

/* Whether all are of the container `id`; if that is NULL, of any one. */
static bool of_one_container(const char *id)
{
	char found[CONTAINER_ID + 1];

	for (int i = 0; i < frozen.count; i++) {
		if (!cgroup_container(frozen.groups[i].parent, found) || (id && strcmp(id, found)))
			return false;
		memcpy(frozen.container, found, sizeof(found));
		id = frozen.container;
	}
	return id;
}

static struct problem check_container(const char *id)
{
	if (of_one_container(id))
		return (struct problem){.text = NULL};
	return refusal("its cgroups are not those of one container of podman's");
}

/* Whether a task is in one of the new cgroups; else the number of the one that it belongs in. */
static bool is_inside(pid_t task, int *belongs)
{
	char path[CGROUP_PATH], *name;

	*belongs = -1;
	if (!cgroup_path(task, path))
		return false;
	*belongs = group_at(path);
	if (*belongs >= 0)
		return false;
	name = strrchr(path, '/');
	if (!name || strcmp(name + 1, frozen.name))
		return false;
	/* That of a child of the root is left empty. */
	name[name == path] = 0;
	return group_at(path) >= 0;
}

bool freeze_owns(pid_t task)
{
	int belongs;

	return frozen.count && is_inside(task, &belongs);
}

static bool move_in(const uint32_t *tasks, int count)
{
	char pid[16];
	int to;

	for (int i = 0; i < count; i++) {
		if (is_inside((pid_t)tasks[i], &to))
			continue; /* with another thread of its process */
		snprintf(pid, sizeof(pid), "%u", tasks[i]);
		if (to < 0 || !cgroup_write(frozen.groups[to].fd, "cgroup.procs", pid))
			return false;
	}
	for (int i = 0; i < count; i++)
		if (!is_inside((pid_t)tasks[i], &to)) {
			/* The agent and /proc differ on the root of the cgroups, or a task has died. */
			errno = ESRCH;
			return false;
		}
	return true;
}

static bool all_frozen(void)
{
	for (int i = 0; i < frozen.count; i++)
		if (!cgroup_has(frozen.groups[i].fd, "cgroup.events", "frozen 1"))
			return false;
	return true;
}

static bool await_frozen(void)
{
	int64_t deadline = now_ms() + FREEZE_MS;

	while (!all_frozen()) {
		if (now_ms() >= deadline)
			return false;
		sleep_ms(1);
	}
	return true;
}

struct problem freeze_tree(const char *move, pid_t criu, const char *container)
{
	static uint32_t tasks[MAX_TREE];
	int count = tree_traced(criu, tasks);
	struct problem problem;

	freeze_forget();
	set_name(move, container ? FREEZE_PODMAN : "");
	if (count <= 0)
		return refusal(count ? "the tree has too many threads" : "criu holds no tree");
	problem = make_groups(tasks, count);
	if (!problem.text && container)
		problem = check_container(container);
	if (!problem.text && !move_in(tasks, count))
		problem = failure("cannot move a task to another cgroup");
	if (!problem.text && !await_frozen())
		problem = refusal("a cgroup does not freeze");
	if (problem.text)
		freeze_undo();
	return problem;
}

/* ------------------------------------------------------------------------ decide */

static bool is_populated(const struct group *group)
{
	return cgroup_has(group->fd, "cgroup.events", "populated 1");
}

/* A task that is moved runs, unless it is traced. */
static bool move_back(const struct group *group)
{
	static pid_t processes[CGROUP_PROCESSES];
	int64_t deadline = now_ms() + BACK_MS;
	bool moved = true;
	char pid[16];

	while (moved && is_populated(group) && now_ms() < deadline) {
		int count = cgroup_processes(group->fd, processes);

		moved = false;
		for (int i = 0; i < count; i++) {
			snprintf(pid, sizeof(pid), "%d", processes[i]);
			moved |= cgroup_write(group->parent, "cgroup.procs", pid);
		}
	}
	return !is_populated(group);
}

bool freeze_undo(void)
{
	bool whole = true;

	/* That of the root task comes last: while it is frozen CRIU waits. */
	for (int i = frozen.count - 1; i >= 0; i--) {
		const struct group *group = &frozen.groups[i];

		if (group->fd >= 0 && !move_back(group)) {
			complain("tasks cannot be moved out of a cgroup %s", frozen.name);
			cgroup_write(group->fd, "cgroup.freeze", "0");
			whole = false;
		}
		unlinkat(group->parent, frozen.name, AT_REMOVEDIR);
	}
	freeze_forget();
	return whole;
}

static void kill_group(const struct group *group)
{
	static pid_t processes[CGROUP_PROCESSES];
	int count;

	/* Since Linux 5.14 */
	if (cgroup_write(group->fd, "cgroup.kill", "1"))
		return;
	count = cgroup_processes(group->fd, processes);
	for (int i = 0; i < count; i++)
		kill(processes[i], SIGKILL);
}

void freeze_kill(void)
{
	for (int i = 0; i < frozen.count; i++)
		kill_group(&frozen.groups[i]);
}

bool freeze_emptied(void)
{
	for (int i = frozen.count - 1; i >= 0; i--) {
		struct group *group = &frozen.groups[i];

		/* An engine may have removed it together with its container's. */
		if (unlinkat(group->parent, frozen.name, AT_REMOVEDIR) < 0 && errno == EBUSY)
			continue;
		close_fd(&group->parent);
		close_fd(&group->fd);
		*group = frozen.groups[--frozen.count];
	}
	return !frozen.count;
}

/* ------------------------------------------------------------------------ find again */

/* The first one tells of which kind they are. */
static void add_found(int parent, const char *name, void *context)
{
	const char **fault = context;
	int fd;

	if (!freeze_is_name(name))
		return;
	fd = freeze_open_found(parent, name);
	if (fd < 0)
		return;
	if (frozen.count == MAX_GROUPS || (frozen.count && strcmp(name, frozen.name))) {
		*fault = frozen.count == MAX_GROUPS ? "too many cgroups" : "cgroups of two kinds";
		close(fd);
		return;
	}
	parent = cgroup_open_child(parent, ".");
	snprintf(frozen.name, sizeof(frozen.name), "%s", name);
	frozen.groups[frozen.count++] = (struct group){parent, fd};
	if (parent < 0)
		*fault = "too many cgroups";
}

static struct problem find_groups(const char *prefix)
{
	const char *fault = NULL;

	if (!cgroup_find(prefix, add_found, &fault))
		fault = "too many cgroups";
	if (fault)
		return refusal(fault);
	if (!frozen.count)
		return (struct problem){CODE_DOUBT, "no such move is in doubt"};
	return (struct problem){.text = NULL};
}

struct problem freeze_find(const char *move)
{
	char prefix[sizeof(FREEZE_PREFIX) + MOVE_ID];
	struct problem problem;

	freeze_forget();
	snprintf(prefix, sizeof(prefix), FREEZE_PREFIX "%s", move);
	problem = find_groups(prefix);
	if (!problem.text && strcmp(frozen.name, prefix))
		problem = check_container(NULL);
	if (problem.text)
		freeze_forget();
	return problem;
}

pid_t freeze_tracer(void)
{
	static pid_t processes[CGROUP_PROCESSES];
	pid_t tracer = 0;

	for (int i = 0; i < frozen.count && !tracer; i++)
		if (cgroup_processes(frozen.groups[i].fd, processes))
			tracer = tree_tracer(processes[0]);
	return tracer;
}

/* ------------------------------------------------------------------------ in the hook */

int freeze_open(pid_t root)
{
	char path[CGROUP_PATH];

	return cgroup_path(root, path) ? cgroup_open(path) : -1;
}

bool freeze_holds(int group)
{
	return cgroup_has(group, "cgroup.freeze", "1");
}
