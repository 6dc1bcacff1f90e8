/* Shared by the parts of the program; see main.c. */
#include <linux/futex.h>
#include <sys/types.h>

#define THREADS 3

struct thread {
	int number;
	volatile int turn; /* main adds one to ask, the thread answers with `done` */
	volatile int done;
	volatile pid_t tid;
	struct robust_list_head robust[8]; /* one of them is used: addresses of its own */
	int tid_words[8];
	char stack[32768];
	char text[4096];
};

/* main.c */
extern const char *dir;
extern int number; /* of this process */
extern struct thread threads[THREADS];

void die(const char *what);
void check(long result, const char *what);

/* set.c: unusual values for what a container, a process and a thread have. */
extern int files[8], file_count; /* those whose flags are asked for */
extern int master, slave;        /* of a pseudoterminal */

void set_container(void);
void set_process(void);
void set_thread(struct thread *self);

/* ask.c: what the kernel says of them now. */
void ask_thread(struct thread *self);

/* Write what the kernel says of the process and its threads to DIR/answer.N. */
void answer(void);
/* Write this process's pid to DIR/pid.N. */
void tell_pid(void);
