"""Which page counts as the agent's, and which CRIU as its own, in a kernel made by hand."""

import struct
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from ovr.attempt.authentication import authenticate
from ovr.errors import AgentUntrusted, GuestFault
from ovr.guest import protocol
from ovr.guest.client.secret_page import NotTheAgent, read_secret
from ovr.guest.client.tracer import find_tracer
from ovr.kernel import Kernel
from ovr.memory.addresses import Gpa

from .kernel.test_containers import Maple
from .kernel.toy import ALL, DIRECT_MAP, ToyKernel
from .machine import Machine

PID, OTHER = 700, 701
PAGE = 0x7F00_0000_0000
FRAME, FRAMES = 0x38_0000, 0x39_0000
SET = 0x2000 | 0x2_0000 | 0x200_0000 | 0x400_0000  # locked, not copied, wiped on fork, not dumped
START = 12_345
SECRET = bytes(range(protocol.SECRET_SIZE))
EXCLUSIVE = 1 << 11 | 1 << 18  # and PG_swapbacked
ANON = 1


class Guest:
    """A kernel and an agent in it, whose page is as it should be but for what is given."""

    def __init__(self, directory, **wrong):
        said = {
            "cred": {}, "secure": 0, "flags": SET, "start": PAGE, "end": PAGE + 4096, "file": 0,
            "ops": 0, "magic": protocol.SECRET_MAGIC, "address": PAGE, "pid": PID, "ticks": START,
            "page": EXCLUSIVE, "mapping": ANON, "present": True, "auxv": None, "mm": True,
        }  # fmt: skip
        assert wrong.keys() <= said.keys()
        said |= wrong
        self.toy = ToyKernel(Machine.build(directory))
        self.agent = self.process(PID, "ovr-agent", **said["cred"])
        self.program = self.toy.allocate(8)
        self.toy.poke(self.agent + 176, "Q", START * 10_000_000 + 9_999_999)
        if said["mm"]:
            self.toy.poke(self.agent + 160, "Q", self.memory(said))
        self.kernel = Kernel.find(self.toy.machine.ram)

    def process(self, pid, comm, *, parent=0, **cred):
        task = self.toy.fork(pid, comm, parent=parent)
        self.toy.poke(task + 192, "Q", self.toy.cred(**cred))
        return task

    def memory(self, said):
        toy, machine = self.toy, self.toy.machine
        mm, vma = toy.allocate(128), toy.allocate(64)
        toy.poke(
            vma, "7Q", said["start"], said["end"], said["flags"], 0, said["file"], said["ops"], 0
        )
        writer = Maple(SimpleNamespace(poke=toy.poke), explicit=False)
        writer.free = toy.allocate(256 * 8)
        toy.poke(mm + 8, "Q", writer.build([(said["start"], said["end"] - 1, vma)]))
        toy.poke(mm + 16, "QQ", DIRECT_MAP + machine.root, self.executable())
        auxv = said["auxv"] or (3, 1, 23, said["secure"], 6, 4096, 0, 0)
        toy.poke(mm + 64, "8Q", *auxv)
        if said["present"]:
            machine.map(PAGE, FRAME)
        machine.map(DIRECT_MAP + (1 << 40) + FRAME // 4096 * 64 // 4096 * 4096, FRAMES)
        page = FRAMES + FRAME // 4096 * 64 % 4096
        machine.ram.write(Gpa(page), struct.pack("<QQQQ", said["page"], 0, 0, said["mapping"]))
        where = struct.pack("<QQQ", said["address"], said["pid"], said["ticks"])
        machine.ram.write(Gpa(FRAME), said["magic"] + where + SECRET)
        return mm

    def executable(self, inode=0):
        file = self.toy.allocate(8)
        self.toy.poke(file, "Q", inode or self.program)
        return file

    def child(self, task, parent):
        """Make a task the only child of another."""
        self.toy.poke(task + 232, "QQ", parent + 216, parent + 216)
        self.toy.poke(parent + 216, "QQ", task + 232, task + 232)


def test_the_agents_own_page(tmp_path):
    guest = Guest(tmp_path)
    found = read_secret(guest.kernel, PID, PAGE)
    assert (found.pid, found.task, found.program) == (PID, guest.agent, guest.program)
    assert found.secret == SECRET
    assert "secret" not in repr(found)


@pytest.mark.parametrize(
    ("wrong", "code", "words"),
    [
        ({"cred": {"ids": (1000,) * 4}}, "credentials", "runs as user 1000"),
        ({"cred": {"ids": (0, 0, 0, 1000)}}, "credentials", "runs as user 1000"),
        ({"cred": {"effective": ALL & ~(1 << 21)}}, "credentials", "lacks capabilities 0x200000"),
        ({"secure": 1}, "credentials", "a program that raises privileges"),
        ({"auxv": (3, 1, 6, 4096, 0, 0, 0, 0)}, "credentials", "raises privileges"),
        ({"auxv": (23, 0, 23, 1, 0, 0, 0, 0)}, "credentials", "raises privileges"),
        ({"flags": 0}, "secret", "no page with the agent's secret"),
        ({"flags": SET & ~0x2000}, "secret", "no page"),
        ({"flags": SET & ~0x2_0000}, "secret", "no page"),
        ({"flags": SET & ~0x200_0000}, "secret", "no page"),
        ({"flags": SET & ~0x400_0000}, "secret", "no page"),
        ({"flags": SET | 8}, "secret", "no page"),
        ({"start": PAGE - 4096}, "secret", "no page"),
        ({"end": PAGE + 8192}, "secret", "no page"),
        ({"file": 1}, "secret", "no page"),
        ({"ops": 1}, "secret", "no page"),
        ({"magic": b"ovr-agent secreT"}, "secret", "no page"),
        ({"address": PAGE + 4096}, "secret", "no page"),
        ({"pid": OTHER}, "secret", "no page"),
        ({"ticks": START + 1}, "secret", "no page"),
        ({"mm": False}, "process", f"no process {PID}"),
    ],
)  # fmt: skip
def test_pages_that_are_not(tmp_path, wrong, code, words):
    guest = Guest(tmp_path, **wrong)
    with pytest.raises(NotTheAgent, match=words) as caught:
        read_secret(guest.kernel, PID, PAGE)
    assert caught.value.code == code


@pytest.mark.parametrize("wrong", [{"present": False}, {"page": 0}, {"mapping": 0}, {"mapping": 3}])
def test_a_page_that_may_be_somebody_elses_at_this_moment(tmp_path, wrong):
    guest = Guest(tmp_path, **wrong)
    with pytest.raises(GuestFault, match="not mapped, or shared"):
        read_secret(guest.kernel, PID, PAGE)


@pytest.mark.parametrize(
    ("pid", "address", "code"),
    [
        (PID, PAGE + 8, "secret"), (PID, 0, "secret"), (PID, (1 << 64) - 4096, "secret"),
        (PID, 1 << 56, "secret"), (PID, PAGE + 4096, "secret"), (PID, DIRECT_MAP, "secret"),
        (OTHER, PAGE, "process"), (0, PAGE, "process"), ((1 << 64) - 1, PAGE, "process"),
        (1, PAGE, "process"),
    ],
)  # fmt: skip
def test_whatever_is_named(tmp_path, pid, address, code):
    guest = Guest(tmp_path)
    with pytest.raises(NotTheAgent) as caught:
        read_secret(guest.kernel, pid, address)
    assert caught.value.code == code


def test_a_thread_is_no_process(tmp_path):
    guest = Guest(tmp_path)
    thread = guest.toy.fork(OTHER, "thread", leader=guest.agent)
    guest.toy.poke(thread + 192, "Q", guest.toy.cred())
    guest.toy.poke(thread + 160, "Q", guest.toy.peek(guest.agent + 160))
    with pytest.raises(NotTheAgent, match=f"no process {OTHER}"):
        read_secret(guest.kernel, OTHER, PAGE)


class Session:
    """The host's end of a session with an agent that says where its page is."""

    address = "vsock:3:687"

    def __init__(self, pid=PID, address=PAGE):
        self.hello = SimpleNamespace(pid=pid, secret_at=address)
        self.proved = []

    def authenticate(self, secret):
        self.proved.append(secret)


class Holder:
    """Counts holds; does something to the guest before some of them."""

    def __init__(self, before=lambda count: None):
        self.count, self.before = 0, before

    @contextmanager
    def held(self):
        self.count += 1
        self.before(self.count)
        yield


def test_the_secret_is_proved_once_the_process_is_known(tmp_path):
    guest, session, holder = Guest(tmp_path), Session(), Holder()
    assert authenticate(guest.kernel, session, holder).pid == PID
    assert (session.proved, holder.count) == ([SECRET], 1)


def test_a_page_that_never_settles(tmp_path):
    guest, session, holder = Guest(tmp_path, page=0), Session(), Holder()
    with pytest.raises(AgentUntrusted, match="not root's: the agent's page at") as caught:
        authenticate(guest.kernel, session, holder)
    assert (caught.value.code, session.proved) == ("secret", [])
    assert holder.count > 10


def test_a_page_that_is_moved_is_looked_for_again(tmp_path):
    guest, session = Guest(tmp_path, page=0), Session()
    page = Gpa(FRAMES + FRAME // 4096 * 64 % 4096)

    def settle(count):
        if count == 3:
            guest.toy.machine.ram.write(page, struct.pack("<Q", EXCLUSIVE))

    holder = Holder(settle)
    authenticate(guest.kernel, session, holder)
    assert (session.proved, holder.count) == ([SECRET], 3)


@pytest.mark.parametrize(
    ("wrong", "named", "code"),
    [
        ({"cred": {"ids": (1000,) * 4}}, {}, "credentials"),
        ({"flags": 0x2000}, {}, "secret"),
        ({}, {"pid": OTHER}, "process"),
        ({}, {"address": PAGE + 4096}, "secret"),
    ],
)
def test_nothing_is_said_to_who_is_not_root(tmp_path, wrong, named, code):
    guest, session = Guest(tmp_path, **wrong), Session(**named)
    with pytest.raises(AgentUntrusted, match="the agent at vsock:3:687 is not root's: ") as caught:
        authenticate(guest.kernel, session, Holder())
    assert (caught.value.code, caught.value.exit_code) == (code, 3)
    assert caught.value.hint
    assert session.proved == []


# Its CRIU ------------------------------------------------------------------------------------


@pytest.fixture
def guest(tmp_path):
    return Guest(tmp_path)


def tracer(guest, pid=OTHER, *, engine=False):
    return find_tracer(guest.kernel, read_secret(guest.kernel, PID, PAGE), pid, engine=engine)


def hook(guest, criu, inode=0):
    task, mm = guest.process(900, "ovr-agent"), guest.toy.allocate(128)
    guest.toy.poke(mm + 24, "Q", guest.executable(inode))
    guest.toy.poke(task + 160, "Q", mm)
    guest.child(task, criu)


def test_a_criu_of_the_agents(guest):
    criu = guest.process(OTHER, "criu", parent=guest.agent)
    assert tracer(guest) == criu


def test_a_criu_of_an_engines(guest):
    criu = guest.process(OTHER, "criu")
    hook(guest, criu)
    assert tracer(guest, engine=True) == criu


@pytest.mark.parametrize(
    ("engine", "made", "why"),
    [
        (False, lambda g: None, "no such process"),
        (False, lambda g: g.process(OTHER, "criu"), "not started by the agent"),
        (True, lambda g: g.process(OTHER, "criu"), "does not run the agent's hook"),
        (True, lambda g: hook(g, g.process(OTHER, "criu"), g.toy.allocate(8)), "the agent's hook"),
        (False, lambda g: g.process(OTHER, "criu", parent=g.agent, ids=(7,) * 4), "as user 7"),
        (True, lambda g: hook(g, g.process(OTHER, "criu", effective=0)), "lacks capabilities"),
    ],
)  # fmt: skip
def test_another_criu(guest, engine, made, why):
    made(guest)
    with pytest.raises(AgentUntrusted, match=f"held by pid {OTHER}, .*{why}") as caught:
        tracer(guest, engine=engine)
    assert caught.value.code == "tracer"


def test_a_thread_of_the_agents_criu(guest):
    criu = guest.process(OTHER, "criu", parent=guest.agent)
    guest.toy.fork(702, "criu", parent=guest.agent, leader=criu)
    with pytest.raises(AgentUntrusted, match="no such process"):
        tracer(guest, 702)
