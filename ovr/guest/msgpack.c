#include "msgpack.h"

void put_be32(uint8_t *out, uint32_t number)
{
	for (int i = 0; i < 4; i++)
		out[i] = (uint8_t)(number >> (24 - 8 * i));
}

uint32_t get_be32(const uint8_t *in)
{
	return (uint32_t)in[0] << 24 | (uint32_t)in[1] << 16 | (uint32_t)in[2] << 8 | in[3];
}

static bool take_number(struct mp_reader *reader, unsigned width, uint64_t *number)
{
	if ((size_t)(reader->end - reader->at) < width)
		return false;
	*number = 0;
	while (width--)
		*number = *number << 8 | *reader->at++;
	return true;
}

static bool take_bytes(struct mp_reader *reader, struct mp_value *value, enum mp_type type,
		       uint64_t size)
{
	if (size > (uint64_t)(reader->end - reader->at))
		return false;
	value->type = type;
	value->data = reader->at;
	value->size = (uint32_t)size;
	reader->at += size;
	return true;
}

static bool take_count(struct mp_reader *reader, struct mp_value *value, enum mp_type type,
		       uint64_t count)
{
	/* Each element takes at least a byte: reject impossible counts at once. */
	if (count > (uint64_t)(reader->end - reader->at))
		return false;
	value->type = type;
	value->data = reader->at;
	value->size = (uint32_t)count;
	return true;
}

static bool take_long(struct mp_reader *reader, struct mp_value *value, uint8_t tag)
{
	uint64_t number;

	switch (tag) {
	case 0xc2:
	case 0xc3:
		value->type = MP_BOOL;
		value->number = tag & 1;
		return true;
	case 0xcc:
	case 0xcd:
	case 0xce:
	case 0xcf:
		value->type = MP_UINT;
		return take_number(reader, 1u << (tag - 0xcc), &value->number);
	case 0xc4:
	case 0xc5:
	case 0xc6:
		return take_number(reader, 1u << (tag - 0xc4), &number) &&
		       take_bytes(reader, value, MP_BIN, number);
	case 0xd9:
	case 0xda:
	case 0xdb:
		return take_number(reader, 1u << (tag - 0xd9), &number) &&
		       take_bytes(reader, value, MP_STR, number);
	case 0xdc:
	case 0xdd:
		return take_number(reader, 2u << (tag - 0xdc), &number) &&
		       take_count(reader, value, MP_ARRAY, number);
	case 0xde:
	case 0xdf:
		return take_number(reader, 2u << (tag - 0xde), &number) &&
		       take_count(reader, value, MP_MAP, number);
	default:
		return false;
	}
}

bool mp_read(struct mp_reader *reader, struct mp_value *value)
{
	uint8_t tag;

	if (reader->at == reader->end)
		return false;
	tag = *reader->at++;
	if (tag < 0x80) {
		value->type = MP_UINT;
		value->number = tag;
		return true;
	}
	if (tag < 0x90)
		return take_count(reader, value, MP_MAP, tag & 0x0f);
	if (tag < 0xa0)
		return take_count(reader, value, MP_ARRAY, tag & 0x0f);
	if (tag < 0xc0)
		return take_bytes(reader, value, MP_STR, tag & 0x1f);
	return take_long(reader, value, tag);
}

static size_t write_tagged(uint8_t *out, uint8_t tag, uint64_t number, unsigned width)
{
	out[0] = tag;
	for (unsigned i = 0; i < width; i++)
		out[1 + i] = (uint8_t)(number >> (8 * (width - 1 - i)));
	return 1 + width;
}

size_t mp_write_uint(uint8_t *out, uint64_t number)
{
	if (number < 0x80)
		return write_tagged(out, (uint8_t)number, 0, 0);
	if (number <= UINT32_MAX)
		return write_tagged(out, 0xce, number, 4);
	return write_tagged(out, 0xcf, number, 8);
}

size_t mp_write_bool(uint8_t *out, bool value)
{
	return write_tagged(out, value ? 0xc3 : 0xc2, 0, 0);
}

size_t mp_write_str_head(uint8_t *out, uint32_t size)
{
	return write_tagged(out, 0xdb, size, 4);
}

size_t mp_write_bin_head(uint8_t *out, uint32_t size)
{
	return write_tagged(out, 0xc6, size, 4);
}

size_t mp_write_array_head(uint8_t *out, uint32_t count)
{
	return write_tagged(out, 0xdd, count, 4);
}
