/* Connections from the host: AF_VSOCK and a virtio-serial port. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#include "agent.h"

#define RETRY_MS 1000

static int vsock_listener = -1;
static int port = -1, port_waiter = -1;
static int64_t retry_at;
static bool vsock_complained, port_complained;

static bool accept_host(int fd)
{
	struct sockaddr_vm peer = {0};
	socklen_t size = sizeof(peer);

	/* Accept the host only: neither other VMs nor processes of this guest. */
	return getpeername(fd, (struct sockaddr *)&peer, &size) == 0 &&
	       peer.svm_family == AF_VSOCK && peer.svm_cid == VMADDR_CID_HOST;
}

static void on_connection(int listener, short events, void *context)
{
	enum link link = context ? LINK_SERIAL : LINK_STREAM;
	int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

	(void)events;
	if (fd < 0)
		return;
	if ((listener == vsock_listener && !accept_host(fd)) || !session_start(fd, link))
		close(fd);
}

static bool listen_at(int fd, const struct sockaddr *address, socklen_t size)
{
	return fd >= 0 && bind(fd, address, size) == 0 && listen(fd, MAX_SESSIONS) == 0;
}

static void open_vsock(void)
{
	struct sockaddr_vm address = {
		.svm_family = AF_VSOCK,
		.svm_cid = VMADDR_CID_ANY,
		.svm_port = options.vsock_port,
	};
	int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	if (listen_at(fd, (struct sockaddr *)&address, sizeof(address))) {
		vsock_listener = fd;
		return;
	}
	if (!vsock_complained)
		complain("cannot listen on vsock port %u yet: %s", options.vsock_port,
			 strerror(errno));
	vsock_complained = true;
	if (fd >= 0)
		close(fd);
}

/* ------------------------------------------------------------------------ virtio-serial */

static bool port_has_name(const char *device)
{
	char path[320], name[128] = "";
	FILE *file;

	snprintf(path, sizeof(path), "/sys/class/virtio-ports/%s/name", device);
	file = fopen(path, "re");
	if (!file)
		return false;
	if (!fgets(name, sizeof(name), file))
		name[0] = 0;
	fclose(file);
	name[strcspn(name, "\n")] = 0;
	return !strcmp(name, options.serial);
}

static bool find_port(char path[320])
{
	DIR *ports = opendir("/sys/class/virtio-ports");
	struct dirent *entry;
	bool found = false;

	if (!ports)
		return false;
	while (!found && (entry = readdir(ports)))
		if (entry->d_name[0] != '.' && port_has_name(entry->d_name)) {
			snprintf(path, 320, "/dev/%s", entry->d_name);
			found = true;
		}
	closedir(ports);
	return found;
}

/*
 * A port without a host reports POLLHUP all the time. An edge-triggered epoll
 * instance reports it once, and then only changes.
 */
static int make_waiter(int fd)
{
	struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET};
	int waiter = epoll_create1(EPOLL_CLOEXEC);

	if (waiter >= 0 && epoll_ctl(waiter, EPOLL_CTL_ADD, fd, &event) < 0) {
		close(waiter);
		return -1;
	}
	return waiter;
}

static void open_port(void)
{
	char path[320];
	int fd = -1;

	if (find_port(path))
		fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0) {
		if (!port_complained)
			complain("cannot open serial port %s yet", options.serial);
		port_complained = true;
		return;
	}
	port_waiter = make_waiter(fd);
	if (port_waiter < 0 || !session_start(fd, LINK_PORT)) {
		close(fd);
		return;
	}
	port = fd;
}

void transport_port_lost(void)
{
	close(port_waiter);
	port = port_waiter = -1;
	retry_at = now_ms() + RETRY_MS;
}

int transport_port_waiter(void)
{
	return port_waiter;
}

bool transport_port_connected(int fd)
{
	struct pollfd poll_port = {.fd = fd};
	struct epoll_event event;

	epoll_wait(port_waiter, &event, 1, 0);
	return poll(&poll_port, 1, 0) == 0;
}

/* ------------------------------------------------------------------------ tests */

#ifdef OVR_LAB
static int open_unix(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
	unlink(path);
	return listen_at(fd, (struct sockaddr *)&address, sizeof(address)) ? fd : -1;
}

static void watch_unix(struct loop *loop)
{
	static int stream = -1, serial = -1;

	if (options.unix_path && stream < 0)
		stream = open_unix(options.unix_path);
	if (options.unix_serial && serial < 0)
		serial = open_unix(options.unix_serial);
	if (stream >= 0)
		loop_watch(loop, stream, POLLIN, on_connection, NULL);
	if (serial >= 0)
		loop_watch(loop, serial, POLLIN, on_connection, &serial);
}
#else
static void watch_unix(struct loop *loop)
{
	(void)loop;
}
#endif

void transport_watch(struct loop *loop)
{
	bool want_vsock = options.vsock_port && vsock_listener < 0;
	bool want_port = options.serial && port < 0;

	if ((want_vsock || want_port) && now_ms() >= retry_at) {
		if (want_vsock)
			open_vsock();
		if (want_port)
			open_port();
		if (want_port && port >= 0)
			/* Sessions are collected first: this one is watched in the next turn. */
			loop_wake_at(loop, now_ms());
		retry_at = now_ms() + RETRY_MS;
	}
	if ((options.vsock_port && vsock_listener < 0) || (options.serial && port < 0))
		loop_wake_at(loop, retry_at);
	if (vsock_listener >= 0)
		loop_watch(loop, vsock_listener, POLLIN, on_connection, NULL);
	watch_unix(loop);
}
