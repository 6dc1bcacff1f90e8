#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define PROTOCOL_TABLES
#include "impostor.h"

uint64_t start_of(pid_t pid)
{
	char path[64], text[1024] = "", *at;
	unsigned long long start = 0;
	FILE *file;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	file = fopen(path, "r");
	if (!file)
		return 0;
	if (!fgets(text, sizeof(text), file))
		text[0] = 0;
	fclose(file);
	at = strrchr(text, ')');
	/* The state is field 3; field 22 is meant. */
	for (int field = 2; at && field < 22; field++)
		at = strchr(at + 1, ' ');
	return at && sscanf(at, "%llu", &start) == 1 ? start : 0;
}

bool chmod_setuid(const char *path)
{
	return chmod(path, 04755) == 0;
}

const char *message_name(enum op op)
{
	return schemas[op].name;
}
