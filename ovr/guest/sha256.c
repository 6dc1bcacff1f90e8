/*
 * SHA-256 (FIPS 180-4) and HMAC (RFC 2104): the agent is linked with the C
 * library only, which has neither.
 */
#include <string.h>

#include "agent.h"

#define BLOCK 64

struct sha256 {
	uint32_t state[8];
	uint64_t size;        /* bytes so far */
	uint8_t block[BLOCK]; /* the last size % BLOCK of them */
};

static const uint32_t constants[64] = {
	0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4,
	0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe,
	0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f,
	0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7,
	0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc,
	0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
	0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116,
	0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
	0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
	0xc67178f2,
};

static uint32_t rotate(uint32_t word, int bits)
{
	return word >> bits | word << (32 - bits);
}

static void compress(struct sha256 *sha)
{
	uint32_t schedule[64], s[8];

	for (size_t i = 0; i < 16; i++)
		schedule[i] = (uint32_t)sha->block[4 * i] << 24 |
			      (uint32_t)sha->block[4 * i + 1] << 16 |
			      (uint32_t)sha->block[4 * i + 2] << 8 | sha->block[4 * i + 3];
	for (int i = 16; i < 64; i++) {
		uint32_t early = schedule[i - 15], late = schedule[i - 2];

		schedule[i] = schedule[i - 16] + schedule[i - 7] +
			      (rotate(early, 7) ^ rotate(early, 18) ^ early >> 3) +
			      (rotate(late, 17) ^ rotate(late, 19) ^ late >> 10);
	}
	memcpy(s, sha->state, sizeof(s));
	for (int i = 0; i < 64; i++) {
		uint32_t one = s[7] + constants[i] + schedule[i] +
			       ((s[4] & s[5]) ^ (~s[4] & s[6])) +
			       (rotate(s[4], 6) ^ rotate(s[4], 11) ^ rotate(s[4], 25));
		uint32_t two = (rotate(s[0], 2) ^ rotate(s[0], 13) ^ rotate(s[0], 22)) +
			       ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));

		memmove(s + 1, s, 7 * sizeof(*s));
		s[4] += one;
		s[0] = one + two;
	}
	for (int i = 0; i < 8; i++)
		sha->state[i] += s[i];
}

static struct sha256 start(void)
{
	return (struct sha256){
		.state = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c,
			  0x1f83d9ab, 0x5be0cd19},
	};
}

static void add(struct sha256 *sha, const uint8_t *data, size_t size)
{
	for (size_t i = 0; i < size; i++) {
		sha->block[sha->size++ % BLOCK] = data[i];
		if (sha->size % BLOCK == 0)
			compress(sha);
	}
}

static void finish(struct sha256 *sha, uint8_t digest[SHA256_SIZE])
{
	uint64_t bits = 8 * sha->size;
	uint8_t length[8];

	for (int i = 0; i < 8; i++)
		length[i] = (uint8_t)(bits >> (56 - 8 * i));
	add(sha, (const uint8_t[]){0x80}, 1);
	while (sha->size % BLOCK != BLOCK - sizeof(length))
		add(sha, (const uint8_t[]){0}, 1);
	add(sha, length, sizeof(length));
	for (int i = 0; i < SHA256_SIZE; i++)
		digest[i] = (uint8_t)(sha->state[i / 4] >> (24 - 8 * (i % 4)));
}

static void start_keyed(struct sha256 *sha, const uint8_t key[BLOCK], uint8_t pad)
{
	uint8_t padded[BLOCK];

	for (int i = 0; i < BLOCK; i++)
		padded[i] = key[i] ^ pad;
	*sha = start();
	add(sha, padded, sizeof(padded));
}

void hmac_sha256(const uint8_t *key, size_t key_size, const uint8_t *data, size_t size,
		 uint8_t mac[SHA256_SIZE])
{
	uint8_t block[BLOCK] = {0}, inner[SHA256_SIZE];
	struct sha256 sha = start();

	if (key_size <= BLOCK) {
		memcpy(block, key, key_size);
	} else {
		add(&sha, key, key_size);
		finish(&sha, block);
	}
	start_keyed(&sha, block, 0x36);
	add(&sha, data, size);
	finish(&sha, inner);
	start_keyed(&sha, block, 0x5c);
	add(&sha, inner, sizeof(inner));
	finish(&sha, mac);
}
