"""Encode and decode messages, and generate the C header with the same schema."""

import types
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgpack

from ovr.guest import dump_protocol, lab_protocol, move_protocol, protocol
from ovr.guest.codes import Code
from ovr.guest.message import Message
from ovr.guest.protocol import Touching

__all__ = ["ProtocolError", "decode", "encode", "header"]


class ProtocolError(Exception):
    """Not a message of this protocol, or one that cannot be sent."""


_KINDS: dict[Any, str] = {
    int: "UINT",
    str: "STR",
    bytes: "BIN",
    bool: "BOOL",
    tuple[int, ...]: "UINTS",
    tuple[str, ...]: "STRS",
    tuple[bytes, ...]: "BINS",
}


@dataclass(frozen=True)
class _Field:
    name: str
    kind: str
    optional: bool

    def check(self, value: Any) -> Any:
        """Return the value in the type of the message's field."""
        if self.kind in ("UINTS", "STRS", "BINS"):
            if not isinstance(value, list | tuple) or len(value) > protocol.MAX_LIST:
                raise ProtocolError(f"field {self.name} is not an array, or too long")
            return tuple(_check_scalar(self.name, self.kind[:-1], item) for item in value)
        return _check_scalar(self.name, self.kind, value)


def _check_scalar(name: str, kind: str, value: Any) -> Any:
    wanted = {"UINT": int, "STR": str, "BIN": bytes, "BOOL": bool}[kind]
    good = type(value) is wanted
    if good and kind == "UINT":
        good = 0 <= value < 1 << 64
    if good and kind == "STR":
        # The agent has C strings, which end at a NUL. msgpack cannot encode lone surrogates.
        size = len(value.encode(errors="replace"))
        good = size < protocol.MAX_STRING and "\0" not in value and _is_utf8(value)
    if not good:
        raise ProtocolError(f"field {name} is not a {kind.lower()}, or too long")
    return value


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _schema(message: type[Message]) -> tuple[_Field, ...]:
    hints = get_type_hints(message)
    result = []
    for name in message.field_names:
        hint = hints[name]
        optional = get_origin(hint) in (Union, types.UnionType)
        if optional:
            (hint,) = (arm for arm in get_args(hint) if arm is not types.NoneType)
        result.append(_Field(name, _KINDS[hint], optional))
    return tuple(result)


_MESSAGES: dict[str, type[Message]] = {
    cls.op: cls
    for module in (protocol, dump_protocol, move_protocol, lab_protocol)
    for cls in vars(module).values()
    if isinstance(cls, type) and issubclass(cls, Message) and cls.op
}
_SCHEMAS: dict[str, tuple[_Field, ...]] = {op: _schema(cls) for op, cls in _MESSAGES.items()}


def encode(message: Message) -> bytes:
    """Return the whole frame, length included.

    Raises:
        ProtocolError: a field is too long, or the frame too big.
    """
    body: dict[str, Any] = {"op": message.op}
    for field in _SCHEMAS[message.op]:
        value = getattr(message, field.name)
        if value is not None or not field.optional:
            body[field.name] = field.check(value)
    packed: bytes = msgpack.packb(body)
    if len(packed) > protocol.MAX_FRAME:
        raise ProtocolError(f"message {message.op} of {len(packed)} bytes is too big")
    return len(packed).to_bytes(4, "big") + packed


def decode(body: bytes) -> Message:
    """Return the message in a frame's body (the bytes after the length).

    Raises:
        ProtocolError: it is not a message of this protocol.
    """
    try:
        found = msgpack.unpackb(body, strict_map_key=True, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError("not msgpack") from error
    if not isinstance(found, dict):
        raise ProtocolError("not a map")
    op = found.pop("op", None)
    if not isinstance(op, str) or op not in _MESSAGES:
        raise ProtocolError("not a message of this protocol")
    values = {}
    for field in _SCHEMAS[op]:
        if field.name in found:
            values[field.name] = field.check(found.pop(field.name))
        elif field.optional:
            values[field.name] = None
        else:
            raise ProtocolError(f"message {op} without {field.name}")
    if found:
        raise ProtocolError(f"message {op} with unknown fields")
    return _MESSAGES[op](**values)


def _without_repeats(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("repeated key")
    return found


# The same for C ----------------------------------------------------------------------------------


def header() -> str:
    """Return `protocol.h`: limits, message and field numbers, and the table of messages."""
    names = sorted({field.name for schema in _SCHEMAS.values() for field in schema})
    if len(names) > 64:
        raise AssertionError("the C side has a bit for each field in 64 bits")
    limits = {
        "PROTOCOL_VERSION": protocol.VERSION,
        "TOKEN_SIZE": protocol.TOKEN_SIZE,
        "NONCE_SIZE": protocol.NONCE_SIZE,
        "SECRET_SIZE": protocol.SECRET_SIZE,
        "SECRET_MAGIC_SIZE": len(protocol.SECRET_MAGIC),
        "SHA256_SIZE": protocol.PROOF_SIZE,
        "PROOF_SIDE_SIZE": protocol.PROOF_SIDE_SIZE,
        "VSOCK_PORT": protocol.VSOCK_PORT,
        "MAX_FRAME": protocol.MAX_FRAME,
        "CHUNK": protocol.CHUNK,
        "PIECE": lab_protocol.PIECE,
        "WINDOW": lab_protocol.WINDOW,
        "FRAME_COST": lab_protocol.FRAME_COST,
        "MAX_STRING": protocol.MAX_STRING,
        "MAX_LIST": protocol.MAX_LIST,
        "MAX_RANGES": protocol.MAX_RANGES,
        "MAX_FILES": protocol.MAX_FILES,
        "MAX_CONFIG": protocol.MAX_CONFIG,
        "CONFIG_FILES": protocol.CONFIG_FILES,
        "MAX_IMAGE_BYTES": protocol.MAX_IMAGE_BYTES,
        "SYNC_ZEROS": protocol.SYNC_ZEROS,
        "MOVE_ID": move_protocol.MOVE_ID,
        "MOVES_KEPT": move_protocol.MOVES_KEPT,
    }
    lines = ["/* Made from the protocol modules in ovr/guest: change those. */"]
    lines += ["#ifndef OVR_PROTOCOL_H", "#define OVR_PROTOCOL_H", ""]
    lines += [f'#define MAGIC "{protocol.MAGIC.decode()}"']
    lines += [f"#define MAGIC_SIZE {len(protocol.MAGIC)}"]
    lines += [f'#define SECRET_MAGIC "{protocol.SECRET_MAGIC.decode()}"']
    lines += [f'#define PROOF_OF_HOST "{protocol.PROOF_OF_HOST.decode()}"']
    lines += [f'#define PROOF_OF_AGENT "{protocol.PROOF_OF_AGENT.decode()}"']
    lines += [f'#define ENGINE_ARCHIVE "{protocol.ENGINE_ARCHIVE}"']
    lines += [f'#define PAGES "{dump_protocol.PAGES}"']
    lines += [f'#define HOOK_HELD "{protocol.HOOK_HELD}"']
    lines += [f"#define {name} {value}" for name, value in limits.items()]
    lines += ["", "enum touching {", *(f"\tTOUCH_{how.name} = {how}," for how in Touching), "};"]
    lines += ["", "enum kind { KIND_UINT, KIND_STR, KIND_BIN, KIND_BOOL,"]
    lines += ["\t    KIND_UINTS, KIND_STRS, KIND_BINS };", "", "enum key {"]
    lines += [f"\tKEY_{name.upper()}," for name in names]
    lines += ["\tKEY_COUNT", "};", "", "enum op {"]
    lines += [f"\tOP_{op.upper()}," for op in _MESSAGES]
    lines += ["\tOP_COUNT", "};", "", "enum code {"]
    lines += [f"\tCODE_{code.name}," for code in Code]
    lines += ["\tCODE_COUNT", "};", "", "#ifdef PROTOCOL_TABLES"]
    lines += ["static const char *const code_names[CODE_COUNT] = {"]
    lines += [f'\t[CODE_{code.name}] = "{code}",' for code in Code]
    lines += ["};", ""]
    lines += ["static const char *const key_names[KEY_COUNT] = {"]
    lines += [f'\t[KEY_{name.upper()}] = "{name}",' for name in names]
    lines += ["};", ""]
    lines += ["struct field { enum key key; enum kind kind; int optional; };"]
    lines += ["struct schema { const char *name; int count; struct field fields[16]; };", ""]
    lines += ["static const struct schema schemas[OP_COUNT] = {"]
    for op, schema in _SCHEMAS.items():
        cells = ", ".join(
            f"{{KEY_{field.name.upper()}, KIND_{field.kind}, {int(field.optional)}}}"
            for field in schema
        )
        lines += [f'\t[OP_{op.upper()}] = {{"{op}", {len(schema)}, {{{cells or "{0}"}}}}},']
    lines += ["};", "#endif", "", "#endif", ""]
    return "\n".join(lines)
