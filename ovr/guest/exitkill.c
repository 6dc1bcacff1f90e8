/*
 * Make the kernel kill a held tree if CRIU dies.
 *
 * When a tracer dies the kernel detaches its tracees, which would run half
 * restored, unless they are traced with PTRACE_O_EXITKILL. CRIU does not use
 * that option, and only the tracer can set it. So attach to the stopped CRIU
 * and make it call ptrace(PTRACE_SETOPTIONS) for each task that it holds.
 * PTRACE_DETACH clears a task's options, so a released tree keeps no trace.
 *
 * If this process dies meanwhile CRIU is in its group stop again, which
 * PTRACE_SEIZE does not end.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent.h"

/* The option that CRIU sets, and the one to add. */
#define OPTIONS (PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL)
#define SYSCALL_STOP (SIGTRAP | 0x80)
#define MASK_SIZE 8 /* sizeof(sigset_t) in the kernel */

/* Wait for the task; true if it is in the expected stop. */
static bool stops(pid_t pid, int expected)
{
	int status;
	pid_t found;

	do
		found = waitpid(pid, &status, __WALL);
	while (found < 0 && errno == EINTR);
	return found == pid && WIFSTOPPED(status) &&
	       (status >> 8 == expected ||
		(status >> 16 == expected && expected == PTRACE_EVENT_STOP));
}

/* The address of a SYSCALL instruction in the process's code, or 0. */
static uint64_t find_syscall(pid_t pid)
{
	static unsigned char code[64 << 10];
	unsigned long start, end;
	char path[64], line[512], access[8];
	uint64_t found = 0;
	FILE *maps;
	ssize_t size;
	int mem;

	snprintf(path, sizeof(path), "/proc/%d/mem", pid);
	mem = open(path, O_RDONLY | O_CLOEXEC);
	snprintf(path, sizeof(path), "/proc/%d/maps", pid);
	maps = fopen(path, "re");
	while (maps && mem >= 0 && !found && fgets(line, sizeof(line), maps)) {
		if (sscanf(line, "%lx-%lx %7s", &start, &end, access) != 3 || access[2] != 'x')
			continue;
		for (unsigned long at = start; at < end && !found; at += sizeof(code)) {
			unsigned char *hit;

			size = pread(mem, code, end - at < sizeof(code) ? end - at : sizeof(code),
				     (off_t)at);
			hit = size > 0 ? memmem(code, (size_t)size, "\x0f\x05", 2) : NULL;
			found = hit ? at + (uint64_t)(hit - code) : 0;
		}
	}
	if (maps)
		fclose(maps);
	if (mem >= 0)
		close(mem);
	return found;
}

/* Make a traced task execute a system call. Returns its result, or -1. */
static long call_in(pid_t pid, struct user_regs_struct registers)
{
	registers.orig_rax =
		UINT64_MAX; /* no system call to restart: the stop was outside of one */
	if (ptrace(PTRACE_SETREGS, pid, 0, &registers) < 0 ||
	    ptrace(PTRACE_SYSCALL, pid, 0, 0) < 0 || !stops(pid, SYSCALL_STOP) ||
	    ptrace(PTRACE_SYSCALL, pid, 0, 0) < 0 || !stops(pid, SYSCALL_STOP) ||
	    ptrace(PTRACE_GETREGS, pid, 0, &registers) < 0)
		return -1;
	return (long)registers.rax;
}

static bool set_options(pid_t criu, const struct user_regs_struct *saved, const uint32_t *tasks,
			int count)
{
	struct user_regs_struct registers = *saved;

	registers.rip = find_syscall(criu);
	if (!registers.rip)
		return false;
	for (int i = 0; i < count; i++) {
		registers.rax = SYS_ptrace;
		registers.rdi = PTRACE_SETOPTIONS;
		registers.rsi = tasks[i];
		registers.rdx = 0;
		registers.r10 = OPTIONS;
		if (call_in(criu, registers))
			return false;
	}
	return true;
}

/*
 * Restore CRIU's registers and detach. This is done in a PTRACE_EVENT_STOP: on
 * resume from one the kernel restarts an interrupted system call, which it does
 * not do on resume from a system call stop.
 */
static bool put_back(pid_t criu, struct user_regs_struct *saved, uint64_t *mask)
{
	return ptrace(PTRACE_INTERRUPT, criu, 0, 0) == 0 && ptrace(PTRACE_CONT, criu, 0, 0) == 0 &&
	       stops(criu, PTRACE_EVENT_STOP) && ptrace(PTRACE_SETREGS, criu, 0, saved) == 0 &&
	       ptrace(PTRACE_SETSIGMASK, criu, MASK_SIZE, mask) == 0 &&
	       ptrace(PTRACE_DETACH, criu, 0, 0) == 0;
}

const char *exitkill_set(pid_t criu)
{
	static uint32_t tasks[MAX_TREE];
	struct user_regs_struct saved;
	uint64_t mask, all = UINT64_MAX;
	int count = tree_traced(criu, tasks);

	if (count < 0)
		return "the tree has too many threads";
	/* A stopped process enters another stop as soon as it is seized. */
	if (ptrace(PTRACE_SEIZE, criu, 0, PTRACE_O_TRACESYSGOOD) < 0 ||
	    !stops(criu, PTRACE_EVENT_STOP))
		return "cannot trace criu";
	if (ptrace(PTRACE_GETREGS, criu, 0, &saved) < 0 ||
	    ptrace(PTRACE_GETSIGMASK, criu, MASK_SIZE, &mask) < 0 ||
	    ptrace(PTRACE_SETSIGMASK, criu, MASK_SIZE, &all) < 0 ||
	    !set_options(criu, &saved, tasks, count))
		return "cannot set PTRACE_O_EXITKILL for criu's tasks";
	return put_back(criu, &saved, &mask) ? NULL : "cannot detach from criu";
}
