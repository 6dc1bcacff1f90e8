/*
 * The surroundings of a process as it sees them: ids and their maps, capabilities, limits, names, mounts,
 * interfaces, clocks. In namespaces of its own ("own-uts" and so on) all of that comes with it.
 */
#include "check.h"

#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#define TEXT 16384
#define LINES 128
#define AN_HOUR 3600

static char noted[TEXT], seen[TEXT];
static struct timespec clocks[2]; /* CLOCK_MONOTONIC, CLOCK_BOOTTIME */

static size_t read_text(const char *path, char *text, size_t size)
{
	FILE *file = fopen(path, "re");
	size_t got = file ? fread(text, 1, size - 1, file) : 0;

	text[got] = 0;
	if (file)
		fclose(file);
	return got;
}

static void add(char *text, const char *line)
{
	size_t used = strlen(text), more = strlen(line);

	if (used + more + 2 > TEXT)
		die("too much to see");
	memcpy(text + used, line, more);
	memcpy(text + used + more, "\n", 2);
}

static void add_file(char *text, const char *path)
{
	char content[4096];

	add(text, path);
	read_text(path, content, sizeof(content));
	add(text, content);
}

static void add_credentials(char *text)
{
	static const char *const fields[] = {
		"Uid:", "Gid:", "Groups:", "Cap", "NoNewPrivs:", "Umask:"};
	char content[4096], *rest = content, *line;

	read_text("/proc/self/status", content, sizeof(content));
	while ((line = strsep(&rest, "\n")))
		for (size_t i = 0; i < sizeof(fields) / sizeof(fields[0]); i++)
			if (!strncmp(line, fields[i], strlen(fields[i])))
				add(text, line);
}

static void add_names(char *text)
{
	struct utsname names;

	check(uname(&names), "uname");
	add(text, names.nodename);
	add(text, names.domainname);
}

static void add_interfaces(char *text)
{
	struct if_nameindex *all = if_nameindex();
	int fd = check(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), "socket");
	char line[IFNAMSIZ + 16];

	for (struct if_nameindex *one = all; one && one->if_index; one++) {
		struct ifreq request = {0};

		memcpy(request.ifr_name, one->if_name, strnlen(one->if_name, IFNAMSIZ - 1));
		check(ioctl(fd, SIOCGIFFLAGS, &request), "SIOCGIFFLAGS");
		snprintf(line, sizeof(line), "%s %#x", request.ifr_name,
			 (unsigned short)request.ifr_flags & (IFF_UP | IFF_LOOPBACK));
		add(text, line);
	}
	if (all)
		if_freenameindex(all);
	close(fd);
}

static int in_order(const void *one, const void *other)
{
	return strcmp(*(char *const *)one, *(char *const *)other);
}

/* All mounts and their options, without numbers, which are new in each namespace. */
static void add_mounts(char *text)
{
	char content[8192], *rest = content, *line, *lines[LINES];
	char root[256], place[256], how[256], type[64];
	size_t count = 0;

	read_text("/proc/self/mountinfo", content, sizeof(content));
	while ((line = strsep(&rest, "\n")) && count < LINES) {
		char *fields = strstr(line, " - ");

		if (fields &&
		    sscanf(line, "%*d %*d %*s %255s %255s %255s", root, place, how) == 3 &&
		    sscanf(fields, " - %63s", type) == 1 &&
		    asprintf(&lines[count], "%s %s %s %s", place, root, how, type) > 0)
			count++;
	}
	qsort(lines, count, sizeof(*lines), in_order);
	for (size_t i = 0; i < count; i++) {
		add(text, lines[i]);
		free(lines[i]);
	}
}

static void look(char *text)
{
	static const char *const files[] = {
		"/proc/self/uid_map", "/proc/self/gid_map",       "/proc/self/setgroups",
		"/proc/self/limits",  "/proc/self/oom_score_adj",
	};

	text[0] = 0;
	for (size_t i = 0; i < sizeof(files) / sizeof(files[0]); i++)
		add_file(text, files[i]);
	add_credentials(text);
	if (has_argument("own-uts"))
		add_names(text);
	if (has_argument("own-net"))
		add_interfaces(text);
	if (has_argument("own-mount"))
		add_mounts(text);
}

static void read_clocks(struct timespec found[2])
{
	check(clock_gettime(CLOCK_MONOTONIC, &found[0]), "CLOCK_MONOTONIC");
	check(clock_gettime(CLOCK_BOOTTIME, &found[1]), "CLOCK_BOOTTIME");
}

void surroundings_note(void)
{
	look(noted);
	read_clocks(clocks);
}

static void check_text(void)
{
	char *ours = noted, *theirs = seen;

	look(seen);
	for (;;) {
		size_t our_size = strcspn(ours, "\n"), their_size = strcspn(theirs, "\n");
		bool same = our_size == their_size && !memcmp(ours, theirs, our_size);

		if (!expect(same, "was %.*s, is %.*s", (int)our_size, ours, (int)their_size,
			    theirs) ||
		    !ours[our_size])
			return;
		ours += our_size + 1;
		theirs += their_size + 1;
	}
}

void surroundings_check(void)
{
	struct timespec now[2];

	check_text();
	if (!has_argument("own-time"))
		return;
	read_clocks(now);
	for (int i = 0; i < 2; i++) {
		long passed = now[i].tv_sec - clocks[i].tv_sec;

		expect(passed >= 0 && passed < AN_HOUR, "clock %d has moved by %ld s", i, passed);
	}
	memcpy(clocks, now, sizeof(now));
}
