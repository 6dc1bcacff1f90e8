"""The one source of the agent protocol: messages and limits.

`wire` encodes and decodes these dataclasses and makes `protocol.h` for the C side from them.

Frame
    a 32-bit big-endian length (1 … `MAX_FRAME`), then that many bytes: one msgpack map.
    Its key ``"op"`` is the message's name; the other keys are the fields of that message's
    dataclass below: `int` is an unsigned msgpack integer, `str`, `bytes` and `bool` are
    themselves, a tuple is an array of the first three. ``| None`` fields may be left out.
    Unknown, repeated and missing keys are errors: both sides have the same `VERSION`.

Session
    The host speaks first, with `Hello`; the agent answers with `Welcome`, which carries the
    same token. On vsock a session is a connection. On a serial port nothing marks the end of a
    killed peer's bytes, so the host begins with `SYNC_ZEROS` zero bytes (longer than any frame,
    so they end whatever a dead predecessor began and can be part of no frame), then `MAGIC`,
    then frames; the agent answers with `MAGIC`, the token of the `Hello`, then frames, and the
    host discards everything before that token, which no older session can have known.

Proof
    On many hosts anybody may open vsock connections. Before the first message of a restore the host
    says, with `Prove`, what lies in the agent's memory at the address that `Welcome` names. Only
    who can read the VM's RAM can know it, and who can do that owns the guest anyway. There is no
    answer.

Restore (one at a time, owned by one session)
    `Files`… `Begin` → `Stopped` | `Failed` | `Aborted`; then any number of `Touch` → `Touched`
    and `Map` → `Mapped`, one at a time; then `Go` → `Restored` | `Failed`, or `Abort` →
    `Aborted`. `Aborted` may come unasked. After `Begin` any frame, such as
    `Alive`, which has no answer, holds off the silence deadline.

Pool (at any time, for the next restore)
    `Warm` → `Warmed` when it is filled; `Pool` → `Warmed`.

Lab (agents built with ``OVR_LAB`` only; one job a session)
    `Run`, `Stdin`… (empty: end of file; the next one after `Taken`) → `Output`… `Exited`;
    `Spawn` → `Spawned`; `Put`, `Data`… (empty: end of file) → `Stored`; `Get` → `Data`… `End`.
    The host returns `Credit` for what it has read of `Output` and `Data`; the agent stops while
    `WINDOW` bytes are under way: less than fills the Unix socket behind a vhost-device-vsock,
    which (0.3) may lose its wake-up and stall the connection when it does fill.

Instead of an answer there may be `Error`. A session that broke the protocol gets one and is
closed; its restore, if it had one, is aborted.
"""

from typing import Any, ClassVar, dataclass_transform

__all__ = [
    "CHUNK",
    "ENGINE_ARCHIVE",
    "FRAME_COST",
    "HOOK_HELD",
    "MAGIC",
    "MAX_FILES",
    "MAX_FRAME",
    "MAX_IMAGE_BYTES",
    "MAX_LIST",
    "MAX_RANGES",
    "MAX_STRING",
    "PIECE",
    "SECRET_SIZE",
    "SYNC_ZEROS",
    "TOKEN_SIZE",
    "VERSION",
    "WINDOW",
    "Abort",
    "Aborted",
    "Alive",
    "Begin",
    "Credit",
    "Data",
    "End",
    "Error",
    "Exited",
    "Failed",
    "Files",
    "Get",
    "Go",
    "Hello",
    "Map",
    "Mapped",
    "Message",
    "Output",
    "Ping",
    "Pong",
    "Pool",
    "Prove",
    "Put",
    "Restored",
    "Run",
    "Spawn",
    "Spawned",
    "Stdin",
    "Stopped",
    "Stored",
    "Taken",
    "Touch",
    "Touched",
    "Warm",
    "Warmed",
    "Welcome",
]

VERSION = 3
MAGIC = b"OVRSYNC1"
TOKEN_SIZE = 16
SECRET_SIZE = 32

MAX_FRAME = 256 << 10
CHUNK = MAX_FRAME - (4 << 10)
"""Most bytes of bulk data in one frame: leaves room for the map around them."""
PIECE = 32 << 10
"""Most bytes of bulk data in one frame from the agent."""
WINDOW = 96 << 10
FRAME_COST = 1024
"""What a frame counts besides its bytes, in `WINDOW` and in `Credit`."""
MAX_STRING = 4096
MAX_LIST = 32768
MAX_RANGES = 8192
"""Most ranges in one `Touch` or `Map`: at 18 bytes each they fit a frame."""
MAX_FILES = 65536
MAX_IMAGE_BYTES = 1 << 30
SYNC_ZEROS = MAX_FRAME + 64
ENGINE_ARCHIVE = "checkpoint.tar"
"""The file in which podman gets everything."""
HOOK_HELD = "ovr-held-"
"""What a name begins with as long as CRIU has not run the hook: without it nothing is restored."""


@dataclass_transform(frozen_default=True)
class Message:
    """Any message; its fields are those of the class, as with a frozen dataclass.

    A dataclass compiles six functions for each class, which takes a tenth of the time in which a
    command loads.

    Attributes:
        op: its name on the wire.
        lab: whether only agents of lab VMs know it.
        field_names: in their order.
    """

    op: ClassVar[str] = ""
    lab: ClassVar[bool] = False
    field_names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        cls.op = cls.__name__.lower()
        cls.field_names = tuple(cls.__annotations__)

    def __init__(self, *values: Any, **named: Any) -> None:
        given = dict(zip(self.field_names, values, strict=False))
        both = given.keys() & named.keys()
        given |= named
        absent = [
            name for name in self.field_names if name not in given and not hasattr(self, name)
        ]
        if (
            both
            or absent
            or len(values) > len(self.field_names)
            or not given.keys() <= {*self.field_names}
        ):
            raise TypeError(f"{type(self).__name__}{self.field_names} from {values} and {named}")
        self.__dict__.update(given)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} is for good")

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.field_names)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash((self.op, self._values()))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.field_names)
        return f"{type(self).__name__}({fields})"


# Host to agent -----------------------------------------------------------------------------


class Hello(Message):
    """The first message of a session; `token` is 16 random bytes."""

    version: int
    token: bytes


class Prove(Message):
    """Shows that the host can read the VM's RAM: `SECRET_SIZE` bytes from there."""

    secret: bytes


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
        timeout_ms: abort when CRIU has not reached the hook after so long.
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
    timeout_ms: int
    log_level: int
    keep_log: bool
    warm_images: tuple[str, ...] = ()
    engine: str | None = None
    volumes: tuple[str, ...] = ()


class Touch(Message):
    """Allocate pages of a held task, or of a process that `Mapped` named.

    Attributes:
        pid: the process.
        keep: the pages may have content that must stay. Without it the first byte of each page
            may become 0, which takes fewer system calls.
        ranges: GVA and size in bytes of each range, one after the other; whole pages.
    """

    pid: int
    keep: bool
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
    """Start a CRIU with a pool of `size` bytes, in place of the one that is there; 0: end that."""

    size: int


class Pool(Message):
    """Asks for a `Warmed` that says what there is."""


class Go(Message):
    """Let the tree run."""


class Abort(Message):
    """Kill the tree."""


class Run(Message):
    """Run a command; `env` is a list of ``NAME=value`` that replaces the default environment."""

    lab = True
    argv: tuple[str, ...]
    env: tuple[str, ...] | None
    timeout_ms: int


class Stdin(Message):
    """Bytes for the running command's standard input; none: end of file."""

    lab = True
    data: bytes


class Credit(Message):
    """So many bytes of `Output` or `Data`, and `FRAME_COST` for each frame, have been read."""

    lab = True
    size: int


class Spawn(Message):
    """Start a detached process: own session, no standard input, output to a file or nowhere."""

    lab = True
    argv: tuple[str, ...]
    env: tuple[str, ...] | None
    output: str | None


class Put(Message):
    """Replace the file `path` by the `Data` that follow."""

    lab = True
    path: str
    mode: int


class Get(Message):
    """Send the file `path`."""

    lab = True
    path: str


# Both ways -----------------------------------------------------------------------------------


class Data(Message):
    """A piece of a file; empty from the host: end of file."""

    lab = True
    data: bytes


# Agent to host ---------------------------------------------------------------------------------


class Welcome(Message):
    """The answer to `Hello`: who is there.

    Attributes:
        force_write: the kernel lets the agent write to pages that their own task cannot write to.
        secret_at: the GVA, in the agent's process, of what `Prove` has to say.
        warm: the size of the pool that is ready, 0 if there is none.
        engines: the container engines that are installed.
    """

    version: int
    token: bytes
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
    engines: tuple[str, ...] = ()


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
    """The tree was killed; `gone`: and no task of it is left."""

    reason: str
    gone: bool


class Error(Message):
    """The request was refused."""

    text: str


class Output(Message):
    """A piece of the running command's output (`stream` 1) or error output (2)."""

    lab = True
    stream: int
    data: bytes


class Taken(Message):
    """The command has taken the last `Stdin`, or will take no more."""

    lab = True


class Exited(Message):
    """The command has ended: its exit status, or 128 plus the signal that killed it."""

    lab = True
    status: int
    timed_out: bool


class Spawned(Message):
    """The detached process runs."""

    lab = True
    pid: int


class Stored(Message):
    """All of a `Put` is in its file."""

    lab = True
    size: int


class End(Message):
    """All of a `Get` has been sent."""

    lab = True
    size: int
