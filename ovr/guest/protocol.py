"""The one source of the agent protocol: messages and limits.

`wire` encodes and decodes these classes and makes `protocol.h` for the C side from them.

Frame
    a 32-bit big-endian length (1 … `MAX_FRAME`), then that many bytes: one msgpack map.
    Its key ``"op"`` is the message's name; the other keys are the fields of that message's
    class below: `int` is an unsigned msgpack integer, `str`, `bytes` and `bool` are
    themselves, a tuple is an array of the first three. ``| None`` fields may be left out.
    Unknown, repeated and missing keys are errors: both sides have the same `VERSION`.

Session
    The host speaks first, with `Hello`; the agent answers with `Welcome`, which carries the
    same token. On vsock a session is a connection. On a serial port nothing marks the end of a
    killed peer's bytes, so the host begins with `SYNC_ZEROS` zero bytes (longer than any frame,
    so they end whatever a dead predecessor began and can be part of no frame), then `MAGIC`,
    then frames; the agent answers with `MAGIC`, the token of the `Hello`, then frames, and the
    host discards everything before that token, which no older session can have known. The news
    that a host has left a port may come after its successor's first bytes: so a session on a
    port ends two seconds after them, or with the next zeros; one with a proof ends at once.

Proof
    Any user of a host may open vsock connections to its guests, and any user of a guest may serve a
    port there that the agent does not serve. So before anything else of worth is sent, both sides
    prove that they know the secret in a page of the agent's, whose address `Welcome` has: `Prove`,
    then `Proved`. Each sends an HMAC-SHA256, keyed with the secret, of `proof_text`: who it is and
    both nonces, which are the `Hello`'s token and the `Welcome`'s nonce. The secret itself is never
    sent. The host reads it from the VM's RAM, which nobody else can who does not own the guest, and
    takes it only from a page that no user of the guest can have made (`client.secret_page`).

Restore (one at a time, owned by one session)
    `Files`… `Begin` → `Stopped` | `Failed` | `Aborted`; then any number of `Touch` → `Touched`
    and `Map` → `Mapped`, one at a time; then `Go` → `Restored` | `Failed`, or `Abort` →
    `Aborted`. `Aborted` may come unasked. After `Begin` any frame, such as
    `Alive`, which has no answer, holds off the silence deadline.

Pool (at any time, for the next restore)
    `Warm` → `Warmed` when it is filled; `Pool` → `Warmed`.

Configuration (at any time)
    `Config` → `Configured`.

Lab (agents built with ``OVR_LAB`` only)
    Commands and files: `lab_protocol`.

Instead of an answer there may be `Error`. A session that broke the protocol gets one and is
closed; its restore, if it had one, is aborted. What is the matter is a `Code` (`ovr.guest.codes`);
the text is for people.
"""

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
    "Warm",
    "Warmed",
    "Welcome",
    "proof_text",
]

VERSION = 7
VSOCK_PORT = 687
"""Where the agent listens. Below 1024: the guest's kernel gives such a port only to who has
CAP_NET_BIND_SERVICE in its initial user namespace (__vsock_bind_connectible in
net/vmw_vsock/af_vsock.c). On a telephone's keys it reads OVR."""
MAGIC = b"OVRSYNC1"
TOKEN_SIZE = 16
NONCE_SIZE = 16
SECRET_SIZE = 32
SECRET_MAGIC = b"ovr-agent secret"
"""What the page with the secret begins with; `proof.c` has the rest of it."""
PROOF_SIZE = 32
PROOF_SIDE_SIZE = 16
PROOF_OF_HOST = b"ovr host"
PROOF_OF_AGENT = b"ovr agent"

MAX_FRAME = 256 << 10
CHUNK = MAX_FRAME - (4 << 10)
"""Most bytes of bulk data in one frame: leaves room for the map around them."""
MAX_STRING = 4096
MAX_LIST = 32768
MAX_RANGES = 8192
"""Most ranges in one `Touch` or `Map`: at 18 bytes each, and 9 for a portion, they fit a frame."""
MAX_FILES = 65536
CONFIG_FILES = 2
"""How many configuration files CRIU reads by default."""
MAX_CONFIG = 16 << 10
"""Most bytes of one of CRIU's configuration files that are told of."""
MAX_IMAGE_BYTES = 1 << 30
SYNC_ZEROS = MAX_FRAME + 64
ENGINE_ARCHIVE = "checkpoint.tar"
"""The file in which podman gets everything."""
HOOK_HELD = "ovr-held-"
"""What a name begins with as long as CRIU has not run the hook: without it nothing is restored."""


def proof_text(side: bytes, token: bytes, nonce: bytes) -> bytes:
    """Return what a side authenticates.

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
    """Shows that the host can read the VM's RAM: `PROOF_SIZE` bytes, as of `PROOF_OF_HOST`."""

    proof: bytes


class Ping(Message):
    """Asks for a `Pong` with the same number."""

    number: int


class Alive(Message):
    """The host lives; no answer."""


class Files(Message):
    """Image files: `data[i]` is appended to the file `names[i]`, made at its first mention."""

    names: tuple[str, ...]
    data: tuple[bytes, ...]


class Begin(Message):
    """Start CRIU on the files sent so far, or have a container engine do so.

    Attributes:
        criu_options: put at the end of the command line of CRIU or the engine.
        silence_ms: abort when the host says nothing for so long.
        stall_ms: abort when CRIU makes no progress for so long (`progress.c`).
        timeout_ms: abort when CRIU has not reached the hook after so long; none: no limit.
        log_level: CRIU's ``-v``.
        keep_log: leave the restore's directory (without the images) in the guest.
        volumes: what podman makes volumes of; they are removed if the restore fails.
        engine: ``podman``, ``runc`` or ``crun``; none: CRIU alone. podman finds all in the file
            `ENGINE_ARCHIVE`. One image that CRIU needs comes as `HOOK_HELD` and its name.
        warm_images: to have CRIU that waits with a pool do it: the pagemaps of the tasks that get
            memory of it, and their pages images. None: leave the pool alone.
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


class Touch(Message):
    """Allocate pages of held tasks, or of processes that `Mapped` named.

    Attributes:
        portions: three numbers each: the pid of a process; 1 if the pages may have content that
            must stay, or 0, when the first byte of each page may become 0, which takes fewer
            system calls; how many of the ranges are meant.
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
        file: where it has the object, below ``/proc/PID``: ``fd/N`` or ``map_files/START-END``.
        size: of the object, in bytes; whole pages.
        ranges: offset in the object and size in bytes of each range; whole pages.
    """

    pid: int
    file: str
    size: int
    ranges: tuple[int, ...]


class Warm(Message):
    """Start a CRIU with a pool, instead of the one that is there.

    Attributes:
        size: of the pool, in bytes; 0: have none.
        place: how far behind a multiple of 1 GiB it begins in memory, in bytes; whole huge pages.
    """

    size: int
    place: int = 0


class Pool(Message):
    """Asks for a `Warmed` that says what there is."""


class Config(Message):
    """Asks for a `Configured`."""


class Go(Message):
    """Let the tree run."""


class Abort(Message):
    """Kill the tree."""


# Agent to host ---------------------------------------------------------------------------------


class Welcome(Message):
    """The answer to `Hello`: who is there.

    Attributes:
        nonce: `NONCE_SIZE` random bytes.
        force_write: the kernel lets the agent write to pages that their own task cannot write to.
        secret_at: the GVA, in the agent's process, of the page with the secret.
        warm: the size of the pool that is ready, 0 if there is none.
        warm_at: the GVA of the pool, in its process.
        engines: the container engines that are installed.
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
    """The answer to `Prove`: shows that the agent has the secret, as of `PROOF_OF_AGENT`."""

    proof: bytes


class Pong(Message):
    """The answer to `Ping`."""

    number: int


class Stopped(Message):
    """The skeleton stands: pids as the agent sees them, `tasks` are the held threads' ids.

    `warm`: how many bytes of areas were made from the pool; `note`: why none, or not all.
    """

    root_pid: int
    criu_pid: int
    tasks: tuple[int, ...]
    warm: int
    note: str


class Warmed(Message):
    """The pool.

    Attributes:
        size: in bytes; 0: there is none.
        huge: how many of them are in huge pages.
        pid: the process that has it.
        address: where it is in that process.
        note: why there is none.
    """

    size: int
    huge: int
    pid: int
    address: int
    note: str


class Configured(Message):
    """CRIU's default configuration files, as far as they are there.

    A restore by CRIU alone does not read them; one by an engine does.

    Attributes:
        names: their paths, in the order in which CRIU reads them.
        data: the first `MAX_CONFIG` bytes of each.
    """

    names: tuple[str, ...]
    data: tuple[bytes, ...]


class Touched(Message):
    """All pages of a `Touch` are there."""


class Mapped(Message):
    """The object is mapped at `address` in the process `pid`."""

    pid: int
    address: int


class Restored(Message):
    """CRIU has let the tree go and is gone; `container` is what the engine calls it."""

    pid: int
    container: str | None = None


class Failed(Message):
    """CRIU or the engine ended badly.

    Attributes:
        status: its exit status, or 128 plus the signal that killed it.
        log: the error lines of CRIU's log, oldest first, then what the engine said.
        gone: no task of the tree is left.
    """

    status: int
    log: tuple[str, ...]
    gone: bool


class Aborted(Message):
    """The tree was killed; `code`: a `Code`; `gone`: no task of it is left."""

    code: str
    reason: str
    gone: bool


class Error(Message):
    """The request was refused; `code`: a `Code`."""

    code: str
    text: str
