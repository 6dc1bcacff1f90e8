/*
 * Detect that the program that builds the tree has stalled.
 *
 * CRIU's run time depends on the tree and on the guest's load, so no fixed
 * deadline fits. A restore is aborted if for a whole period nothing changes in
 * the processes that take part in it: neither their number, nor that of their
 * threads, nor their page faults, nor their CPU time.
 */
#include <stdio.h>
#include <stdlib.h>

#include "processes.h"
#include "restore.h"

#define LOOKS 8 /* per period */

static struct {
	int64_t period_ms, look_at, stalled_at;
	uint64_t seen;
} watch;

static uint64_t activity(pid_t pid)
{
	/* minflt cminflt majflt cmajflt utime stime cutime cstime num_threads */
	unsigned long n[9] = {0};
	char text[512];
	const char *stat = process_stat(pid, text);
	uint64_t sum = 1;

	if (stat)
		sscanf(stat,
		       " %*c %*d %*d %*d %*d %*d %*u %lu %lu %lu %lu %lu %lu %lu %lu"
		       " %*d %*d %lu",
		       n, n + 1, n + 2, n + 3, n + 4, n + 5, n + 6, n + 7, n + 8);
	for (size_t i = 0; i < ARRAY_SIZE(n); i++)
		sum += n[i];
	return sum;
}

static uint64_t look(void)
{
	struct tree tree = restore_tree();
	struct table table = {0};
	uint64_t sum = 0;

	tree.engine = restore.engine ? restore.child : 0;
	if (table_read(&table))
		table_mark(&table, &tree);
	for (size_t i = 0; i < table.count; i++) {
		const struct process *process = &table.processes[i];

		if (process->member || process->pid == tree.criu || process->pid == tree.engine)
			sum += activity(process->pid);
	}
	free(table.processes);
	return sum;
}

void progress_begin(int64_t period_ms)
{
	watch.period_ms = period_ms;
	watch.look_at = now_ms();
	watch.stalled_at = now_ms() + period_ms;
	watch.seen = 0;
}

bool progress_stalled(void)
{
	uint64_t now;

	if (now_ms() < watch.look_at)
		return false;
	now = look();
	watch.look_at = now_ms() + watch.period_ms / LOOKS;
	if (now != watch.seen) {
		watch.seen = now;
		watch.stalled_at = now_ms() + watch.period_ms;
	}
	return now_ms() >= watch.stalled_at;
}

int64_t progress_look_at(void)
{
	return watch.look_at;
}
