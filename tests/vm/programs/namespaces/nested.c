/*
 * nested: a family in namespaces of which each member has made its own mount namespace again, and
 * with "net" a network namespace, with a tmpfs and a socket under the same names; and grandchildren
 * that share theirs.
 */
#include "../pool/check.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define MEMBERS 3
#define NOTE "/tmp/mine"
#define PORT 7000

static struct pages common, own;
static int self; /* 0: root, 1 …: its children, 101 …: theirs */
static int udp = -1;

static void serve(unsigned round, unsigned phase);

static struct sockaddr_in address(void)
{
	return (struct sockaddr_in){
		.sin_family = AF_INET,
		.sin_port = htons(PORT),
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK),
	};
}

static void open_socket(void)
{
	struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
	struct sockaddr_in here = address();

	if (udp >= 0)
		close(udp);
	udp = check(socket(AF_INET, SOCK_DGRAM, 0), "socket");
	check(ioctl(udp, SIOCSIFFLAGS, &request), "bring the loopback up");
	check(bind(udp, (struct sockaddr *)&here, sizeof(here)), "bind");
}

static void write_note(void)
{
	int fd = check(open(NOTE, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600), NOTE);

	check(dprintf(fd, "of %d\n", self), "write a note");
	close(fd);
}

static void make_own_namespaces(void)
{
	check(unshare(CLONE_NEWNS | (has_argument("net") ? CLONE_NEWNET : 0)), "unshare");
	check(mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m"), "mount a tmpfs");
	write_note();
	if (has_argument("net"))
		open_socket();
}

static void make_memory(void)
{
	pages_new(&own, "own", 16 * MIB);
	pages_write_every(&own, self % 3, 2, self, FIRST);
	pages_target(&own);
	pages_write(&common, 10 * (self % 100), 10, self, FIRST);
}

static void begin_grandchild(int number)
{
	self = number;
	make_memory();
}

static void begin(int number)
{
	self = number;
	make_own_namespaces();
	make_memory();
	start_child(100 + number, begin_grandchild, serve);
}

void set_up(void)
{
	pages_new(&common, "common", 2 * MIB);
	pages_write(&common, 0, common.count, 0, FIRST);
	make_memory();
	write_note();
	if (has_argument("net"))
		open_socket();
	for (int number = 1; number <= MEMBERS; number++)
		start_child(number, begin, serve);
}

static void check_note(void)
{
	char text[32] = "", wanted[32];
	int fd = open(NOTE, O_RDONLY | O_CLOEXEC);

	if (!expect(fd >= 0 && read(fd, text, sizeof(text) - 1) > 0, "%d: no " NOTE, self))
		return;
	close(fd);
	snprintf(wanted, sizeof(wanted), "of %d\n", self % 100);
	expect(!strcmp(text, wanted), "%d: " NOTE " is %s", self, text);
}

/* Other sockets on that port are in other network namespaces. */
static void check_socket(void)
{
	struct sockaddr_in here = address();
	int sent = self, got = -1;

	expect(sendto(udp, &sent, sizeof(sent), 0, (struct sockaddr *)&here, sizeof(here)) ==
		       sizeof(sent),
	       "%d: sendto: %s", self, strerror(errno));
	expect(recv(udp, &got, sizeof(got), MSG_DONTWAIT) == sizeof(got) && got == self,
	       "%d: heard %d", self, got);
}

static void check_all(void)
{
	pages_check(&common);
	pages_check(&own);
	check_note();
	if (udp >= 0)
		check_socket();
}

static void serve(unsigned round, unsigned phase)
{
	check_all();
	if (all_right()) {
		pages_renew(&own, self, round);
		pages_write(&common, (200 + 16 * self + round) % common.count, 1, self,
			    generation_of(round));
		check_all();
	}
	ask_children(round, phase);
}

void answer(unsigned round)
{
	serve(round, 0);
}
