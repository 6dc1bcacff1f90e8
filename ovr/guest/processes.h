/* The guest's processes. */
#ifndef OVR_PROCESSES_H
#define OVR_PROCESSES_H

#include "agent.h"

struct process {
	pid_t pid, parent, tracer;
	char state;
	int threads;
	bool member;
};

struct table {
	struct process *processes;
	size_t count, room;
};

/* Read a /proc/PID/status. */
bool process_read(const char *path, struct process *process);
/* The process's /proc/PID/stat from the state on; NULL if it is gone. */
const char *process_stat(pid_t pid, char text[512]);
bool process_dead(const struct process *process);
bool process_alive(const struct process *process);

/* False if the table is incomplete: no memory, no /proc. Free `processes` in either case. */
bool table_read(struct table *table);
struct process *table_find(const struct table *table, pid_t pid);
/* Set `member` of all members of the tree. */
void table_mark(struct table *table, const struct tree *tree);

#endif
