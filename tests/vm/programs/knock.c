/*
 * Knocks at the agent from within the guest: over the loopback, and at the
 * guest's own CID. Prints, for each, how many bytes were answered to a hello
 * (standard input); and what a listener of our own got, which shows that there
 * is a way.
 */
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#define OWN_PORT 5555

static int vsock(unsigned cid, unsigned port, bool serve)
{
	struct sockaddr_vm address = {
		.svm_family = AF_VSOCK,
		.svm_cid = cid,
		.svm_port = port,
	};
	struct timeval patience = {.tv_sec = 10};
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0);

	if (fd < 0)
		return -1;
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	if (serve ? bind(fd, (struct sockaddr *)&address, sizeof(address)) || listen(fd, 4) :
		    connect(fd, (struct sockaddr *)&address, sizeof(address)))
		return -1;
	return fd;
}

static void knock(const char *name, unsigned cid, unsigned port, const char *hello, size_t size)
{
	int fd = vsock(cid, port, false);
	char answer[4096];
	ssize_t got = -1;

	if (fd >= 0 && send(fd, hello, size, MSG_NOSIGNAL) > 0)
		got = recv(fd, answer, sizeof(answer), 0);
	printf("%s %u: %zd\n", name, port, got < 0 ? 0 : got);
	close(fd);
}

int main(int argc, char **argv)
{
	static char hello[4096];
	size_t size = fread(hello, 1, sizeof(hello), stdin);
	unsigned own = 0, port = argc > 1 ? (unsigned)atoi(argv[1]) : 687;
	int device = open("/dev/vsock", O_RDONLY);
	int listener = vsock(VMADDR_CID_ANY, OWN_PORT, true);
	pid_t child;

	if (device < 0 || ioctl(device, IOCTL_VM_SOCKETS_GET_LOCAL_CID, &own) || listener < 0)
		return 1;
	child = fork();
	if (child == 0) {
		for (;;) {
			int fd = accept(listener, NULL, NULL);

			if (fd >= 0 && write(fd, "welcome", 7) == 7)
				usleep(100000);
			close(fd);
		}
	}
	close(listener);
	for (int i = 0; i < 2; i++) {
		knock("loopback", VMADDR_CID_LOCAL, i ? port : OWN_PORT, hello, size);
		knock("own", own, i ? port : OWN_PORT, hello, size);
	}
	fflush(stdout);
	return kill(child, SIGKILL) ? 1 : 0;
}
