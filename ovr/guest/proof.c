/*
 * Telling whom the VM belongs to from others on its host.
 *
 * AF_VSOCK asks nobody's leave: any user of the host can connect to us, and a
 * restore makes processes of any kind. So the host must say what lies in a
 * page of ours. Who can read that has the VM's RAM, and with it all that we
 * could give away.
 */
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>

#include "agent.h"

#define PAGE 4096

static uint8_t *secret;

bool proof_make(void)
{
	secret = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (secret == MAP_FAILED)
		return false;
	/* In RAM for good, and in no other process: the host looks for it in our page table. */
	return mlock(secret, PAGE) == 0 && madvise(secret, PAGE, MADV_DONTFORK) == 0 &&
	       madvise(secret, PAGE, MADV_DONTDUMP) == 0 &&
	       getrandom(secret, SECRET_SIZE, 0) == SECRET_SIZE;
}

uint64_t proof_address(void)
{
	return (uint64_t)(uintptr_t)secret;
}

bool proof_right(const struct mp_value *guess)
{
	uint8_t difference = 0;

	if (guess->size != SECRET_SIZE)
		return false;
	/* As long for a wrong first byte as for a wrong last one. */
	for (int i = 0; i < SECRET_SIZE; i++)
		difference |= guess->data[i] ^ secret[i];
	return !difference;
}
