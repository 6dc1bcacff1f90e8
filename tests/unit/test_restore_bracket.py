"""The tree is killed whatever interrupts a restore from its first byte on, before all else ends."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest

from ovr.attempt import attempt as attempt_module
from ovr.errors import UsageError
from ovr.plan import NO_POOL
from ovr.restore import restore, skeleton, story

ABORTED = ["reverted", "heartbeat ended", "killed", "sources closed"]


class Link:
    """An agent that has built the tree; Ctrl-C comes at some moment."""

    def __init__(self, when, events):
        self.hello = SimpleNamespace(force_write=True, warm=0)
        self.when = when
        self.events = events

    def criu_config(self):
        return {}

    def begin(self, files, **options):
        if self.when == "in begin":
            raise KeyboardInterrupt
        return self

    @property
    def warm(self):
        raise KeyboardInterrupt

    root_pid = criu_pid = tasks = note = warm

    @contextmanager
    def keep_alive(self):
        yield
        self.events.append("heartbeat ended")
        if self.when == "when the heartbeat ends":
            raise KeyboardInterrupt

    def abort(self):
        self.events.append("killed")


@pytest.fixture
def events():
    return []


@pytest.fixture
def vm():
    return SimpleNamespace(
        ram=SimpleNamespace(slots=()), kernel=None, qmp=None, balloon=None,
        check_same_boot=lambda: None,
        address=SimpleNamespace(agent="unix:/nowhere", spec="lab:none"),
    )  # fmt: skip


@pytest.fixture
def interrupted(monkeypatch, events, vm):
    """A restore of nothing in which Ctrl-C comes."""

    def revert(cause):
        events.append("reverted")
        assert isinstance(cause, KeyboardInterrupt)
        if link.when == "while it is reverted":
            raise KeyboardInterrupt

    @contextmanager
    def sources():
        try:
            yield SimpleNamespace(read_ahead=lambda sources: None)
        finally:
            events.append("sources closed")

    def run(when):
        nonlocal link
        link = Link(when, events)
        with pytest.raises(KeyboardInterrupt):
            restore(vm, checkpoint)

    link = None
    plan = SimpleNamespace(tasks=[], shared=[], states=(), not_dumped={}, sources=tuple)
    checkpoint = SimpleNamespace(
        images=None, check=lambda hello: None, files=lambda inside: {}, options=(), engine=None,
        volumes=(), container=None,
    )  # fmt: skip
    hold = SimpleNamespace(spans=(), held=nullcontext)
    inside = SimpleNamespace(images={}, memory=NO_POOL)
    agent = SimpleNamespace(connect=lambda address: nullcontext(link))
    for module, name, stand_in in (
        (attempt_module, "locked", lambda slots: nullcontext()),
        (attempt_module, "blockers", lambda *arguments: ()),
        (attempt_module, "check_same_guest", lambda *arguments: None),
        (attempt_module, "authenticate", lambda *arguments: None),
        (attempt_module, "Agent", agent),
        (attempt_module, "Holder", lambda *arguments, **options: nullcontext(hold)),
        (attempt_module, "Recording", lambda *arguments: SimpleNamespace(revert=revert)),
        (skeleton, "build_inside", lambda *arguments: inside),
        (story, "make_plan", lambda *arguments, **options: plan),
        (story, "refuse_taken_pids", lambda *arguments: None),
        (story, "Sources", sources),
    ):
        monkeypatch.setattr(module, name, stand_in)
    return run


def test_in_begin(interrupted, events):
    interrupted("in begin")
    assert events == [one for one in ABORTED if one != "heartbeat ended"]


@pytest.mark.parametrize(
    "when", ["right after it", "while it is reverted", "when the heartbeat ends"]
)
def test_after_begin(interrupted, events, when):
    interrupted(when)
    assert events == ABORTED


@pytest.mark.parametrize("wrong", [{"outside": ("nothing",)}, {"verify": "some"}])
def test_wrong_words_are_refused_before_the_vm_is_touched(wrong):
    with pytest.raises(UsageError):
        restore(None, None, **wrong)
