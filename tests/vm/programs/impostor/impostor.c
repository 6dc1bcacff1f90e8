/*
 * Poses as the agent, built with the agent's own proof and messages, so that it
 * plays the protocol as well as the agent does.
 *
 *   impostor KIND PORT	serves one host on a vsock port, as user 1000
 *   impostor hold	what KIND "environment" runs: set-user-id root, does nothing
 *
 * KIND says in whose memory the secret lies, which the host is told of:
 *
 *   user		a user's process, made just as the agent makes its page
 *   namespace		the same, as root with all capabilities of a user and pid namespace of its own
 *   container		root of the guest's with the capabilities of a container
 *   environment	a set-user-id program that a user has started
 *   heap		a daemon of root's that reads what users send, into its heap
 *   locked		the same, all of whose memory is locked
 *   agent:PID:ADDRESS	the real agent's
 *
 * It starts as root, to set all of this up; what a user would have to guess (the addresses in
 * another process) it is told. Prints what it was sent.
 */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/capability.h>
#include <linux/vm_sockets.h>

#include "impostor.h"

#define USER 1000
#define PAGE 4096
#define PADDING (3 * PAGE)

static struct {
	uint64_t pid, address;
} named;

static void fail(const char *what)
{
	fprintf(stderr, "impostor: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void check(bool good, const char *what)
{
	if (!good)
		fail(what);
}

static void become_user(void)
{
	check(setgroups(0, NULL) == 0 && setresgid(USER, USER, USER) == 0 &&
		      setresuid(USER, USER, USER) == 0,
	      "become a user");
}

/* ------------------------------------------------------------------------ where the secret is */

/* A page as the agent's, which differs only in where it is. */
static void fill_page(int mem, uint64_t pid, uint64_t start, uint64_t address)
{
	uint8_t page[PAGE];
	uint64_t where[3] = {address, pid, start};

	memcpy(page, (void *)(uintptr_t)proof_address(), PAGE);
	memcpy(page + SECRET_MAGIC_SIZE, where, sizeof(where));
	check(pwrite(mem, page, PAGE, (off_t)address) == PAGE, "write the page");
	named.pid = pid;
	named.address = address;
}

static void fill_page_of(pid_t pid, uint64_t address)
{
	char path[64];
	int mem;

	snprintf(path, sizeof(path), "/proc/%d/mem", pid);
	mem = open(path, O_RDWR);
	check(mem >= 0, "open its memory");
	fill_page(mem, (uint64_t)pid, start_of(pid), address);
	close(mem);
}

/* A user starts a set-user-id program, with an environment of his. */
static void in_environment(const char *self)
{
	static char variable[PADDING] = "page=";
	char *argv[] = {(char *)(uintptr_t)self, "hold", NULL}, *env[] = {variable, NULL};
	int out[2];
	uint64_t at;
	pid_t pid;

	memset(variable + 5, 'x', sizeof(variable) - 6);
	check(pipe(out) == 0 && chmod_setuid(self), "prepare");
	pid = fork();
	if (pid == 0) {
		become_user();
		dup2(out[1], 1);
		execve(self, argv, env);
		_exit(1);
	}
	check(read(out[0], &at, sizeof(at)) == sizeof(at), "hear of its environment");
	fill_page_of(pid, (at + PAGE) & ~(uint64_t)(PAGE - 1));
}

static int hold(void)
{
	uint64_t at = (uint64_t)(uintptr_t)getenv("page");

	check(setresuid(0, 0, 0) == 0 && write(1, &at, sizeof(at)) == sizeof(at), "say where");
	pause();
	return 0;
}

static void in_heap(bool locked)
{
	uint64_t address;
	uint8_t *heap = NULL;
	int out[2];
	pid_t pid;

	check(pipe(out) == 0, "make a pipe");
	pid = fork();
	if (pid == 0) {
		check(!locked || mlockall(MCL_CURRENT | MCL_FUTURE) == 0, "lock");
		heap = aligned_alloc(PAGE, 16 * PAGE);
		memset(heap, 1, 16 * PAGE);
		address = (uint64_t)(uintptr_t)heap + 4 * PAGE;
		check(write(out[1], &address, sizeof(address)) == sizeof(address), "say where");
		pause();
	}
	check(read(out[0], &address, sizeof(address)) == sizeof(address), "hear of its heap");
	fill_page_of(pid, address);
}

static void write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY);

	check(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text), path);
	close(fd);
}

/* Root of a user namespace, pid 1 of a pid namespace; the number outside is the one that counts. */
static void in_namespace(void)
{
	become_user();
	check(prctl(PR_SET_DUMPABLE, 1) == 0 && unshare(CLONE_NEWUSER | CLONE_NEWPID) == 0,
	      "make namespaces");
	write_file("/proc/self/setgroups", "deny");
	write_file("/proc/self/uid_map", "0 1000 1");
	write_file("/proc/self/gid_map", "0 1000 1");
	if (fork()) {
		wait(NULL);
		exit(0);
	}
	check(setresuid(0, 0, 0) == 0 && getpid() == 1, "be root inside");
}

/* Default capabilities of a container's root. */
static void as_container(void)
{
	static const int kept[] = {0, 1, 3, 4, 5, 6, 7, 8, 10, 18, 31};
	struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[2] = {{0}};

	for (size_t i = 0; i < sizeof(kept) / sizeof(kept[0]); i++)
		data[0].effective |= 1u << kept[i];
	data[0].permitted = data[0].effective;
	check(syscall(SYS_capset, &head, data) == 0, "drop capabilities");
}

static void own_page(void)
{
	char link[32] = "";

	/* In a pid namespace /proc is still that of the guest. */
	check(readlink("/proc/self", link, sizeof(link) - 1) > 0 && proof_make(), "make a page");
	named.pid = strtoull(link, NULL, 10);
	named.address = proof_address();
	((uint64_t *)(uintptr_t)named.address)[SECRET_MAGIC_SIZE / 8 + 1] = named.pid;
}

static void set_up(const char *kind, const char *self)
{
	char *rest;

	if (!strcmp(kind, "user"))
		become_user();
	else if (!strcmp(kind, "namespace"))
		in_namespace();
	else if (!strcmp(kind, "container"))
		as_container();
	own_page();
	if (!strcmp(kind, "environment")) {
		in_environment(self);
	} else if (!strcmp(kind, "heap") || !strcmp(kind, "locked")) {
		in_heap(!strcmp(kind, "locked"));
	} else if (!strncmp(kind, "agent:", 6)) {
		named.pid = strtoull(kind + 6, &rest, 10);
		named.address = strtoull(rest + 1, NULL, 10);
	}
}

/* ------------------------------------------------------------------------ the protocol */

static void all(int fd, void *data, size_t size)
{
	for (ssize_t got; size; size -= (size_t)got, data = (char *)data + got) {
		got = read(fd, data, size);
		if (got <= 0) {
			printf("the host hung up\n");
			exit(0);
		}
	}
}

static struct nonces nonces;

static void welcome(struct writer *writer, const struct message *hello)
{
	struct utsname name;
	char boot[64] = "";
	int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY);

	check(fd >= 0 && read(fd, boot, 36) == 36 && uname(&name) == 0, "say who we are");
	close(fd);
	memcpy(nonces.host, hello->field[KEY_TOKEN].data, TOKEN_SIZE);
	check(proof_make_nonce(nonces.agent), "make a nonce");
	message_add_uint(writer, KEY_VERSION, PROTOCOL_VERSION);
	message_add_bin(writer, KEY_TOKEN, nonces.host, TOKEN_SIZE);
	message_add_bin(writer, KEY_NONCE, nonces.agent, NONCE_SIZE);
	message_add_str(writer, KEY_AGENT, AGENT_VERSION);
	message_add_bool(writer, KEY_LAB_BUILD, false);
	message_add_str(writer, KEY_KERNEL, name.release);
	message_add_str(writer, KEY_CRIU, "4.1");
	message_add_uint(writer, KEY_PID, named.pid);
	message_add_uint(writer, KEY_PAGE_SIZE, PAGE);
	message_add_str(writer, KEY_BOOT_ID, boot);
	message_add_bool(writer, KEY_FORCE_WRITE, true);
	message_add_uint(writer, KEY_SECRET_AT, named.address);
	message_add_list(writer, KEY_ENGINES, 0);
	message_add_uint(writer, KEY_WARM, 0);
	message_add_uint(writer, KEY_WARM_AT, 0);
}

/* The agent's messages, as far as they are sent at once. */
static void answer(int host, const struct message *message)
{
	static uint8_t frame[4 + MAX_FRAME];
	struct writer writer;
	uint8_t proof[SHA256_SIZE];
	size_t size;

	if (message->op == OP_HELLO) {
		message_open(&writer, frame, sizeof(frame), OP_WELCOME);
		welcome(&writer, message);
	} else if (message->op == OP_PROVE) {
		message_open(&writer, frame, sizeof(frame), OP_PROVED);
		proof_of_agent(&nonces, proof);
		message_add_bin(&writer, KEY_PROOF, proof, sizeof(proof));
	} else if (message->op == OP_CONFIG) {
		message_open(&writer, frame, sizeof(frame), OP_CONFIGURED);
		message_add_list(&writer, KEY_NAMES, 0);
		message_add_list(&writer, KEY_DATA, 0);
	} else {
		return;
	}
	size = message_close(&writer);
	check(size && write(host, frame, size) == (ssize_t)size, "answer");
}

static void serve(int host)
{
	static uint8_t body[MAX_FRAME];
	struct message message;
	uint32_t size;

	for (;;) {
		all(host, &size, sizeof(size));
		size = __builtin_bswap32(size);
		check(size && size <= sizeof(body), "take a frame");
		all(host, body, size);
		check(!message_parse(&message, body, size), "understand it");
		printf("was sent %s\n", message_name(message.op));
		fflush(stdout);
		answer(host, &message);
	}
}

static int listen_at(unsigned port)
{
	struct sockaddr_vm address = {
		.svm_family = AF_VSOCK,
		.svm_cid = VMADDR_CID_ANY,
		.svm_port = port,
	};
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0);

	if (fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof(address)) == 0 &&
	    listen(fd, 1) == 0)
		return fd;
	close(fd);
	return -1;
}

int main(int argc, char **argv)
{
	int listener;

	if (argc == 2 && !strcmp(argv[1], "hold"))
		return hold();
	if (argc != 3)
		return 2;
	set_up(argv[1], argv[0]);
	if (getuid() == 0 && strcmp(argv[1], "container") && strcmp(argv[1], "namespace"))
		become_user();
	for (unsigned port = VSOCK_PORT; port <= VSOCK_PORT + 1; port++)
		printf("port %u: %s\n", port, listen_at(port) < 0 ? strerror(errno) : "bound");
	listener = listen_at((unsigned)atoi(argv[2]));
	check(listener >= 0, "listen");
	printf("listening as user %d\n", (int)getuid());
	fflush(stdout);
	serve(accept(listener, NULL, NULL));
}
