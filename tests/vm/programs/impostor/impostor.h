/* Declarations that the impostor does not share with the agent. */
#ifndef IMPOSTOR_H
#define IMPOSTOR_H

#include "agent.h"

/* When a process was started, in ticks since the boot. */
uint64_t start_of(pid_t pid);
bool chmod_setuid(const char *path);
const char *message_name(enum op op);

#endif
