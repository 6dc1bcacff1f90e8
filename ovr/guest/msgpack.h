/* Read and write single msgpack tokens: https://github.com/msgpack/msgpack/blob/master/spec.md */
#ifndef OVR_MSGPACK_H
#define OVR_MSGPACK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum mp_type { MP_UINT, MP_BOOL, MP_STR, MP_BIN, MP_ARRAY, MP_MAP };

struct mp_reader {
	const uint8_t *at, *end;
};

struct mp_value {
	enum mp_type type;
	uint64_t number;     /* MP_UINT, MP_BOOL */
	const uint8_t *data; /* MP_STR, MP_BIN: the bytes; MP_ARRAY, MP_MAP: the first element */
	uint32_t size;       /* bytes, elements, or pairs */
};

/* False at the end, for a truncated token, and for a type that no message uses. */
bool mp_read(struct mp_reader *reader, struct mp_value *value);

/* Each returns the number of bytes written, at most MP_HEAD_MAX. */
#define MP_HEAD_MAX 9
size_t mp_write_uint(uint8_t *out, uint64_t number);
size_t mp_write_bool(uint8_t *out, bool value);
size_t mp_write_str_head(uint8_t *out, uint32_t size);
size_t mp_write_bin_head(uint8_t *out, uint32_t size);
size_t mp_write_array_head(uint8_t *out, uint32_t count);

void put_be32(uint8_t *out, uint32_t number);
uint32_t get_be32(const uint8_t *in);

#endif
