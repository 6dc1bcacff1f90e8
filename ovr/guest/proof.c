/*
 * Mutual authentication of agent and host.
 *
 * Any user of the host can connect to the agent by AF_VSOCK, and a restore
 * creates processes with any privilege. So the host must know a secret in a
 * page of the agent. A host process that can read the page has the VM's RAM,
 * and gains nothing from a restore that it does not have already.
 *
 * Conversely, any user of the guest can serve a port that the agent does not
 * serve, and would be sent images. So the agent must know the secret too, and
 * the host accepts it only from a page that no user of the guest can create:
 * ovr/guest/client/secret_page.py checks the attributes that are set here.
 *
 * The secret itself is never sent: each side sends an HMAC over both nonces.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "agent.h"

#define PAGE 4096

/* Layout known to ovr/guest/client/secret_page.py. */
struct secret_page {
	char magic[SECRET_MAGIC_SIZE];
	uint64_t address, pid, start; /* the page's own address, and its process */
	uint8_t secret[SECRET_SIZE];
};

static struct secret_page *page;

/* Start time of this process in ticks since boot: unique for its pid. */
static uint64_t start_time(void)
{
	unsigned long long ticks = 0;
	char text[1024], *at;
	int fd = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
	ssize_t size = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);

	if (fd >= 0)
		close(fd);
	text[size > 0 ? size : 0] = 0;
	/* The last parenthesis ends the name. The start time is field 22: proc_pid_stat(5). */
	at = strrchr(text, ')');
	if (!at || sscanf(at + 1,
			  " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d"
			  " %*d %*d %*d %llu",
			  &ticks) != 1)
		return 0;
	return ticks;
}

bool proof_make(void)
{
	page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (page == MAP_FAILED)
		return false;
	/*
	 * Locked in RAM, not inherited by children, not in core dumps. No allocator
	 * and no library combines all of these, so no data that other users passed
	 * to a process of root is in such memory. The raw system call, since
	 * AddressSanitizer turns mlock() into a no-op.
	 */
	if (syscall(SYS_mlock, page, PAGE) < 0 || madvise(page, PAGE, MADV_DONTFORK) < 0 ||
	    madvise(page, PAGE, MADV_WIPEONFORK) < 0 || madvise(page, PAGE, MADV_DONTDUMP) < 0 ||
	    getrandom(page->secret, SECRET_SIZE, 0) != SECRET_SIZE)
		return false;
	memcpy(page->magic, SECRET_MAGIC, SECRET_MAGIC_SIZE);
	page->address = (uint64_t)(uintptr_t)page;
	page->pid = (uint64_t)getpid();
	page->start = start_time();
	return page->start;
}

uint64_t proof_address(void)
{
	return (uint64_t)(uintptr_t)page;
}

static void prove(const char *side, const struct nonces *nonces, uint8_t proof[SHA256_SIZE])
{
	uint8_t text[PROOF_SIDE_SIZE + sizeof(*nonces)] = {0};

	memcpy(text, side, strlen(side));
	memcpy(text + PROOF_SIDE_SIZE, nonces, sizeof(*nonces));
	hmac_sha256(page->secret, SECRET_SIZE, text, sizeof(text), proof);
}

bool proof_make_nonce(uint8_t nonce[NONCE_SIZE])
{
	return getrandom(nonce, NONCE_SIZE, 0) == NONCE_SIZE;
}

void proof_of_agent(const struct nonces *nonces, uint8_t proof[SHA256_SIZE])
{
	prove(PROOF_OF_AGENT, nonces, proof);
}

bool proof_of_host(const struct nonces *nonces, const struct mp_value *guess)
{
	uint8_t right[SHA256_SIZE], difference = 0;

	if (guess->size != SHA256_SIZE)
		return false;
	prove(PROOF_OF_HOST, nonces, right);
	/* In constant time. */
	for (int i = 0; i < SHA256_SIZE; i++)
		difference |= guess->data[i] ^ right[i];
	return !difference;
}
