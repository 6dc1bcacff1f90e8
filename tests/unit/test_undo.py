"""The journal: every write is in it, and what may outlive the tree is taken back."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from ovr._fastcopy import RUN
from ovr.attempt.journal import FieldWrite, Journal
from ovr.attempt.undo import Recording
from ovr.errors import AgentUnreachable, AttemptFailed, VmUnreachable
from ovr.memory.addresses import Gpa
from ovr.state import KINDS
from ovr.state.scope import IPC, UTS
from tests.unit.state_kernel import MiniKernel
from tests.unit.test_state_kinds import IPC as LIMITS
from tests.unit.test_state_kinds import VALUES, target_for

BY_NAME = {kind.name: kind for kind in KINDS}


class Holder:
    held_now = False

    @contextmanager
    def held(self):
        self.held_now = True
        yield
        self.held_now = False


class Gone(Holder):
    @contextmanager
    def held(self):
        raise VmUnreachable("QEMU has ended")
        yield


@pytest.fixture(params=[True, False], ids=["new", "old"])
def mini(request):
    return MiniKernel(new=request.param)


@pytest.fixture
def kernel(mini):
    mini.memory.translate = lambda gva: Gpa(gva - mini.memory.base)
    return SimpleNamespace(space=mini.memory)


def binding_of(target, label="it"):
    return SimpleNamespace(label=label, find=lambda guest: guest(target))


def lasting(kind, users):
    """The kind, its objects used by others as `users` says."""
    scope = SimpleNamespace(users=users)
    return SimpleNamespace(name=kind.name, write=kind.write, read=kind.read, scope=scope)


def tree():
    """A tree that is there: what a binding finds in it is what it found before."""
    return lambda target: target


def tree_gone():
    raise AttemptFailed("the root is not there")


def nobody(kernel):
    return iter(())


@pytest.mark.parametrize("name", VALUES)
def test_every_write_is_recorded(mini, kernel, name):
    sort, values = VALUES[name]
    target = target_for(mini, sort)
    for value in values:
        journal, before = Journal(), bytes(mini.memory.data)
        mini.memory.writes.clear()
        with Recording(journal, kernel, tree, Holder()).of(
            BY_NAME[name], binding_of(target), target
        ):
            BY_NAME[name].write(target, value)
        after = bytearray(before)
        for write in journal.fields:
            at = write.gva - mini.memory.base
            assert (write.of, write.state, write.gpa) == ("it", name, at)
            assert after[at : at + len(write.old)] == write.old
            after[at : at + len(write.new)] = write.new
        assert after == mini.memory.data
        unchanged = sum(before[gva - mini.memory.base :].startswith(data)
                        for gva, data in mini.memory.writes)  # fmt: skip
        assert journal.unchanged == unchanged
        assert mini.memory.recorder is None


def test_fields_have_the_kernels_names(mini, kernel):
    journal = Journal()
    recording = Recording(journal, kernel, tree, Holder())
    uts, ipc = mini.make("struct uts_namespace"), mini.make("struct ipc_namespace")
    for name, target, value in (("nodename", uts, "host"), ("ipc_limits", ipc, LIMITS)):
        with recording.of(BY_NAME[name], binding_of(target), target):
            BY_NAME[name].write(target, value)
    named = {write.field: write.as_json() for write in journal.fields}
    assert named["new_utsname.nodename"]["new"] == "host"
    assert named["ipc_namespace.msg_ctlmax"]["new"] == 5
    assert bytes.fromhex(named["ipc_namespace.sem_ctls"]["new"]) == bytes(
        np.array([1, 2, 3, 4], "<i4")
    )


def test_kinds_whose_objects_may_outlive_the_tree():
    assert {kind.name for kind in KINDS if kind.scope.users} == {
        "nodename", "domainname", "ipc_limits"
    }  # fmt: skip
    assert UTS.users
    assert IPC.users


OLD = {**dict.fromkeys(LIMITS, 100), "sem_ctls": (7, 7, 7, 4), "shm_rmid_forced": 0}


@pytest.fixture
def target(mini):
    """A namespace with other limits than those that will be written."""
    target = mini.make("struct ipc_namespace")
    BY_NAME["ipc_limits"].write(target, OLD)
    return target


def write(recording, target, users=nobody, binding=None):
    kind = lasting(BY_NAME["ipc_limits"], users)
    with recording.of(kind, binding or binding_of(target), target):
        kind.write(target, LIMITS)


def abort(recording, error=KeyboardInterrupt):
    with pytest.raises(error) as caught, recording.reverted_on(BaseException):
        raise error("why")
    return caught.value


def limits(target):
    return BY_NAME["ipc_limits"].read(target)


def outcomes(recording):
    return {undo.outcome for undo in recording.journal.undone}


def test_taken_back(target, kernel, mini):
    holder = Holder()
    recording = Recording(Journal(), kernel, tree, holder)
    write(recording, target)
    original, held = mini.memory.write, []
    mini.memory.write = lambda gva, data: (held.append(holder.held_now), original(gva, data))
    error = abort(recording, AttemptFailed)
    assert limits(target) == OLD
    assert outcomes(recording) == {"undone"}
    assert {(undo["state"], undo["outcome"]) for undo in error.undone} == {("ipc_limits", "undone")}
    assert held
    assert all(held)
    # Once only: what is done afterwards is somebody else's.
    BY_NAME["ipc_limits"].write(target, LIMITS)
    abort(recording)
    assert limits(target) == LIMITS


def test_an_error_that_does_not_say_that_the_tree_is_dead(target, kernel):
    recording = Recording(Journal(), kernel, tree, Holder())
    write(recording, target)
    with pytest.raises(AgentUnreachable), recording.reverted_on(AttemptFailed):
        raise AgentUnreachable("the tree may run")
    assert limits(target) == LIMITS


def test_what_somebody_else_has_written_since_stays(target, kernel):
    recording = Recording(Journal(), kernel, tree, Holder())
    write(recording, target)
    target.msg_ctlmax = 4711
    abort(recording)
    assert limits(target) == {**OLD, "msg_ctlmax": 4711}
    [left] = [undo for undo in recording.journal.undone if undo.outcome == "changed"]
    assert left.as_json()["field"] == "ipc_namespace.msg_ctlmax"
    assert left.as_json()["reason"]


def test_interrupted_in_the_middle_of_a_write(target, mini, kernel):
    recording = Recording(Journal(), kernel, tree, Holder())
    original = mini.memory.write

    def interrupted(gva, data):
        if gva > target.address_ + 4:  # in the middle of the first array
            raise KeyboardInterrupt
        original(gva, data)

    mini.memory.write = interrupted
    with pytest.raises(KeyboardInterrupt):
        write(recording, target)
    mini.memory.write = original
    assert limits(target)["sem_ctls"] == (1, 2, 7, 4)
    abort(recording)
    assert limits(target) == OLD


def test_the_tree_is_gone_and_another_uses_it(target, mini, kernel):
    other = mini.make("struct ipc_namespace")
    recording = Recording(Journal(), kernel, tree_gone, Holder())
    write(recording, target, lambda kernel: iter([other, target]))
    abort(recording)
    assert limits(target) == OLD
    assert outcomes(recording) == {"undone"}


def test_the_tree_is_gone_and_nobody_uses_it(target, kernel):
    recording = Recording(Journal(), kernel, tree_gone, Holder())
    write(recording, target)
    abort(recording)
    assert limits(target) == LIMITS  # whoever that is now
    assert outcomes(recording) == {"gone"}


def test_the_tree_has_another_object_now(target, kernel, mini):
    another = mini.make("struct ipc_namespace")
    recording = Recording(Journal(), kernel, lambda: lambda found: another, Holder())
    write(recording, target)
    BY_NAME["ipc_limits"].write(another, LIMITS)
    abort(recording)
    assert limits(another) == LIMITS
    assert outcomes(recording) == {"gone"}


def test_what_cannot_be_taken_back_is_said(target, kernel, caplog):
    recording = Recording(Journal(), kernel, tree, Gone())
    write(recording, target)
    abort(recording)
    assert outcomes(recording) == {"failed"}
    assert "QEMU has ended" in caplog.text


def test_one_that_fails_does_not_keep_the_others(mini, kernel):
    """The second cannot be looked for: what should be a struct is a number."""
    first, second = (mini.make("struct ipc_namespace") for _ in range(2))
    recording = Recording(Journal(), kernel, tree, Holder())
    for target in (first, second):
        BY_NAME["ipc_limits"].write(target, OLD)
    write(recording, first)
    lost = SimpleNamespace(label="it", find=lambda guest: tree_gone())
    write(recording, second, lambda kernel: (1).nsproxy, lost)
    abort(recording)
    assert limits(first) == OLD
    assert limits(second) == LIMITS
    assert outcomes(recording) == {"failed", "undone"}
    assert "types are invalid" in recording.journal.undone[0].reason


def test_memory_is_kept_in_sums():
    journal = Journal()
    runs = np.zeros(2, RUN)
    runs["gva"], runs["size"] = [0x3000, 0x9000], [0x2000, 0x1000]
    for part in (runs[:1], runs[1:], runs[:0]):
        journal.add_memory("pid 7", part)
    journal.add_memory("shared memory 3", runs)
    assert journal.as_json()["memory"] == [
        {"target": "pid 7", "bytes": 0x3000, "runs": 2, "start": 0x3000, "end": 0xA000},
        {"target": "shared memory 3", "bytes": 0x3000, "runs": 2, "start": 0x3000, "end": 0xA000},
    ]


def test_a_line_of_the_log():
    write = FieldWrite(
        "pid 7", "umask", "fs_struct.umask", 0xFFFF, Gpa(0xFF), b"\0" * 4, b"\x5f\0\0\0"
    )
    assert str(write) == ("pid 7: umask: fs_struct.umask at 0xffff (GPA 0xff): 0x0 -> 0x5f")
