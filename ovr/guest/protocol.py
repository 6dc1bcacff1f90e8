"""Define the agent protocol: messages and limits.

`wire` encodes and decodes these classes and generates `protocol.h` for the C side from them.

Frame
    a 32-bit big-endian length (1 … `MAX_FRAME`), then that many bytes: one msgpack map.
    Its key ``"op"`` is the message's name; the other keys are the fields of that message's
    class below: `int` is an unsigned msgpack integer, `str`, `bytes` and `bool` are
    themselves, a tuple is an array of the first three. ``| None`` fields may be left out.
    Unknown, repeated and missing keys are errors: both sides have the same `VERSION`.

Session
    The host starts with `Hello`; the agent answers with `Welcome`, which has the same token. On
    vsock a session is a connection. On a serial port nothing marks the end of a killed peer's
    bytes, so the host begins with `SYNC_ZEROS` zero bytes, then `MAGIC`, then frames. The zeros are
    longer than any frame: they end a frame that a previous host left incomplete. The agent answers
    with `MAGIC`, the token of the `Hello`, then frames, and the host discards everything before
    that token, which is unknown to older sessions. The agent may be notified that a host has closed
    the port after it gets the next host's first bytes: so a session on a port ends two seconds
    after the notification, or with the next zeros; an authenticated one ends at once.

Authentication
    Any user of a host may open vsock connections to its guests, and any user of a guest may serve a
    port there that the agent does not serve. So before other requests, both sides authenticate each
    other: they prove that they know the secret in a page of the agent, whose address is in
    `Welcome`, with `Prove`, then `Proved`. Each sends an HMAC-SHA256, keyed with the secret, of
    `proof_text`: the side, and both nonces, which are the `Hello`'s token and the `Welcome`'s
    nonce. The secret itself is never sent. The host reads it from the VM's RAM, which only the
    owner of the guest can read, and only from a page that no user of the guest can have made
    (`client.secret_page`).

Restore (one restore or dump at a time, owned by one session)
    `Files`… `Begin` → `Stopped` | `Failed` | `Aborted`; then any number of `Touch` → `Touched`
    and `Map` → `Mapped`, one at a time; then `Go` → `Restored` | `Failed`, or `Abort` →
    `Aborted`. `Aborted` may come unrequested. After `Begin` any frame extends the silence deadline;
    `Alive` does only that, and has no answer.

Dump
    `dump_protocol`.

Move
    `move_protocol`.

Pool (at any time, for the next restore)
    `Warm` → `Warmed` when it is filled; `Pool` → `Warmed`.

Configuration (at any time)
    `Config` → `Configured`.

Lab (agents built with ``OVR_LAB`` only)
    Commands and files: `lab_protocol`.

Any answer may be an `Error` instead. A session that violates the protocol gets one and is closed;
its restore, if any, is aborted. The cause is a `Code` (`ovr.guest.codes`); the text is for people.
"""

from enum import IntEnum

from ovr.guest.message import Message

__all__ = [
    "CHUNK",
    "CONFIG_FILES",
    "ENGINE_ARCHIVE",
    "HOOK_HELD",
    "MAGIC",
    "MAX_CONFIG",
    "MAX_FILES",
    "MAX_FRAME",
    "MAX_IMAGE_BYTES",
    "MAX_LIST",
    "MAX_RANGES",
    "MAX_STRING",
    "NONCE_SIZE",
    "PROOF_OF_AGENT",
    "PROOF_OF_HOST",
    "PROOF_SIDE_SIZE",
    "PROOF_SIZE",
    "SECRET_MAGIC",
    "SECRET_SIZE",
    "SYNC_ZEROS",
    "TOKEN_SIZE",
    "VERSION",
    "VSOCK_PORT",
    "Abort",
    "Aborted",
    "Alive",
    "Begin",
    "Config",
    "Configured",
    "Error",
    "Failed",
    "Files",
    "Go",
    "Hello",
    "Map",
    "Mapped",
    "Ping",
    "Pong",
    "Pool",
    "Prove",
    "Proved",
    "Restored",
    "Stopped",
    "Touch",
    "Touched",
    "Touching",
    "Warm",
    "Warmed",
    "Welcome",
    "proof_text",
]

VERSION = 12
VSOCK_PORT = 687
"""The agent's vsock port. Below 1024: to bind it needs CAP_NET_BIND_SERVICE in the initial user
namespace (__vsock_bind_connectible in net/vmw_vsock/af_vsock.c). On a telephone's keys it reads
OVR."""
MAGIC = b"OVRSYNC1"
TOKEN_SIZE = 16
NONCE_SIZE = 16
SECRET_SIZE = 32
SECRET_MAGIC = b"ovr-agent secret"
"""First bytes of the page with the secret; `proof.c` defines the rest."""
PROOF_SIZE = 32
PROOF_SIDE_SIZE = 16
PROOF_OF_HOST = b"ovr host"
PROOF_OF_AGENT = b"ovr agent"

MAX_FRAME = 256 << 10
CHUNK = MAX_FRAME - (4 << 10)
"""Most bytes of bulk data in one frame, with space left for the rest of the map."""
MAX_STRING = 4096
MAX_LIST = 32768
MAX_RANGES = 8192
"""Most ranges in one `Touch` or `Map`: at 18 bytes each, and 9 for a portion, they fit a frame."""
MAX_FILES = 65536
CONFIG_FILES = 2
"""Number of configuration files that CRIU reads by default."""
MAX_CONFIG = 16 << 10
"""Most bytes sent of one of CRIU's configuration files."""
MAX_IMAGE_BYTES = 1 << 30
SYNC_ZEROS = MAX_FRAME + 64
ENGINE_ARCHIVE = "checkpoint.tar"
"""Name of the archive that podman restores."""
HOOK_HELD = "ovr-held-"
"""Prefix of an image's name until CRIU runs the hook; without the hook, CRIU cannot find it."""


def proof_text(side: bytes, token: bytes, nonce: bytes) -> bytes:
    """Return the text of which a side sends the HMAC.

    Args:
        side: `PROOF_OF_HOST` or `PROOF_OF_AGENT`.
        token: the `Hello`'s.
        nonce: the `Welcome`'s.
    """
    return side.ljust(PROOF_SIDE_SIZE, b"\0") + token + nonce


# Host to agent -----------------------------------------------------------------------------


class Hello(Message):
    """The first message of a session; `token`: `TOKEN_SIZE` random bytes, the host's nonce."""

    version: int
    token: bytes


class Prove(Message):
    """Prove that the host can read the VM's RAM: `PROOF_SIZE` bytes, for `PROOF_OF_HOST`."""

    proof: bytes


class Ping(Message):
    """Request a `Pong` with the same number."""

    number: int


class Alive(Message):
    """Extend the silence deadline; no answer."""


class Files(Message):
    """Image files: `data[i]` is appended to the file `names[i]`, created on first use."""

    names: tuple[str, ...]
    data: tuple[bytes, ...]


class Begin(Message):
    """Start CRIU on the files sent so far, directly or by a container engine.

    Attributes:
        criu_options: appended to the command line of CRIU or the engine.
        silence_ms: abort after this time without a frame from the host.
        stall_ms: abort after this time without progress of CRIU (`progress.c`).
        timeout_ms: abort if CRIU has not reached the hook after this time; none: no limit.
        log_level: CRIU's ``-v``.
        keep_log: leave the restore's directory (without the images) in the guest.
        volumes: volumes that podman creates; they are removed if the restore fails.
        engine: ``podman``, ``runc`` or ``crun``; none: CRIU without an engine. podman gets the file
            `ENGINE_ARCHIVE`. The name of one image that CRIU needs has the prefix `HOOK_HELD`.
        warm_images: to use the CRIU with the pool: pagemaps and pages images of the tasks that get
            memory from it. Empty: do not use the pool.
        move: the id of the move that ends here (`move_protocol`); none: it is no move.
    """

    criu_options: tuple[str, ...]
    silence_ms: int
    stall_ms: int
    log_level: int
    keep_log: bool
    warm_images: tuple[str, ...] = ()
    engine: str | None = None
    volumes: tuple[str, ...] = ()
    timeout_ms: int | None = None
    move: str | None = None


class Touching(IntEnum):
    """How pages are touched."""

    DISCARD = 0
    """Their first byte may become 0, which takes fewer system calls."""
    KEEP = 1
    """Written, with their content kept."""
    READ = 2
    """Only read."""


class Touch(Message):
    """Have pages mapped in held tasks, or in processes that `Mapped` named.

    Attributes:
        portions: three numbers each: the pid of a process, a `Touching`, the number of ranges.
        ranges: GVA and size in bytes of each range, portion after portion; whole pages.
    """

    portions: tuple[int, ...]
    ranges: tuple[int, ...]


class Map(Message):
    """Map all of a shared object of a held task in a new process, and allocate pages of it.

    The process lives in the cgroup of the task, which is charged for the pages, and ends with
    `Go`.

    Attributes:
        pid: the task.
        file: its link to the object below ``/proc/PID``: ``fd/N`` or ``map_files/START-END``.
        size: size of the object in bytes; whole pages.
        ranges: offset in the object and size in bytes of each range; whole pages.
    """

    pid: int
    file: str
    size: int
    ranges: tuple[int, ...]


class Warm(Message):
    """Start a CRIU with a pool, instead of an existing one.

    Attributes:
        size: size of the pool in bytes; 0: no pool.
        place: offset of its address modulo 1 GiB, in bytes; whole huge pages.
        keep: it outlives the session; otherwise it ends with it, unless a restore has taken it.
    """

    size: int
    place: int = 0
    keep: bool = True


class Pool(Message):
    """Request a `Warmed` that describes the present pool."""


class Config(Message):
    """Request a `Configured`."""


class Go(Message):
    """Commit: let a restored tree run, or let CRIU end a dump."""


class Abort(Message):
    """Kill a restored tree; let a dumped one run on."""


# Agent to host ---------------------------------------------------------------------------------


class Welcome(Message):
    """The answer to `Hello`: the agent and its guest.

    Attributes:
        nonce: `NONCE_SIZE` random bytes.
        force_write: the kernel lets the agent write to pages that their own task cannot write to.
        secret_at: the GVA, in the agent's process, of the page with the secret.
        warm: the size of the pool in bytes; 0 if there is none.
        warm_at: the GVA of the pool, in its process.
        engines: the installed container engines.
    """

    version: int
    token: bytes
    nonce: bytes
    agent: str
    lab_build: bool
    kernel: str
    criu: str | None
    pid: int
    page_size: int
    boot_id: str
    force_write: bool
    secret_at: int
    warm: int
    warm_at: int
    engines: tuple[str, ...] = ()


class Proved(Message):
    """The answer to `Prove`: proves that the agent has the secret, for `PROOF_OF_AGENT`."""

    proof: bytes


class Pong(Message):
    """The answer to `Ping`."""

    number: int


class Stopped(Message):
    """The skeleton is complete and stopped; or CRIU holds the tree that it has dumped.

    Attributes:
        root_pid: pid of the root task, in the agent's pid namespace as all ids here.
        criu_pid: pid of CRIU.
        tasks: ids of the held threads.
        warm: bytes of areas that use memory from the pool.
        note: reason why none or not all do.
    """

    root_pid: int
    criu_pid: int
    tasks: tuple[int, ...]
    warm: int
    note: str


class Warmed(Message):
    """The present pool.

    Attributes:
        size: its size in bytes; 0 if there is none.
        huge: bytes of it in huge pages.
        pid: the process that has it.
        address: its GVA in that process.
        note: the reason why there is none.
    """

    size: int
    huge: int
    pid: int
    address: int
    note: str


class Configured(Message):
    """CRIU's default configuration files that exist.

    A restore without an engine does not read them; one by an engine does.

    Attributes:
        names: their paths, in the order in which CRIU reads them.
        data: the first `MAX_CONFIG` bytes of each.
    """

    names: tuple[str, ...]
    data: tuple[bytes, ...]


class Touched(Message):
    """All pages of a `Touch` are allocated."""


class Mapped(Message):
    """The object is mapped at `address` in the process `pid`."""

    pid: int
    address: int


class Restored(Message):
    """CRIU has let the tree run and has ended; `container` is the engine's id of it."""

    pid: int
    container: str | None = None


class Failed(Message):
    """CRIU or the engine failed.

    Attributes:
        status: its exit status, or 128 plus the signal that killed it.
        log: the error lines of CRIU's log, oldest first, then the engine's output.
        undone: no task of a restore's tree is left; a dump's tree runs on, whole.
    """

    status: int
    log: tuple[str, ...]
    undone: bool


class Aborted(Message):
    """The restore or dump was aborted; `code` is a `Code`; `undone` as for `Failed`."""

    code: str
    reason: str
    undone: bool


class Error(Message):
    """The request was rejected; `code` is a `Code`."""

    code: str
    text: str
