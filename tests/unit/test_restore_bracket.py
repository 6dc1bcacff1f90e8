"""Whatever interrupts a restore from its first byte on, the agent is told to kill the tree."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest

from ovr.attempt import attempt as attempt_module
from ovr.plan import NO_POOL
from ovr.restore import restore, skeleton, story


class Link:
    """An agent that has built the tree; Ctrl-C comes at the first look at its answer, or before."""

    def __init__(self, when):
        self.hello = SimpleNamespace(force_write=True, warm=0)
        self.when = when
        self.aborted = 0

    def criu_config(self):
        return {}

    def begin(self, files, **options):
        if self.when == "in begin":
            raise KeyboardInterrupt
        return self

    @property
    def warm(self):
        raise KeyboardInterrupt

    root_pid = tasks = note = warm

    @contextmanager
    def keep_alive(self):
        yield

    def abort(self):
        self.aborted += 1


@pytest.mark.parametrize("when", ["in begin", "right after it"])
def test_an_interrupt_around_begin(monkeypatch, when):
    link = Link(when)
    plan = SimpleNamespace(tasks=[], shared=[], states=(), not_dumped={}, sources=tuple)
    checkpoint = SimpleNamespace(
        images=None, check=lambda hello: None, files=lambda inside: {}, options=(), engine=None,
        volumes=(), container=None,
    )  # fmt: skip
    hold = SimpleNamespace(spans=(), held=nullcontext)
    inside = SimpleNamespace(images={}, memory=NO_POOL)
    for module, name, stand_in in (
        (attempt_module, "locked", lambda slots: nullcontext()),
        (attempt_module, "blockers", lambda *arguments: ()),
        (attempt_module, "check_same_guest", lambda *arguments: None),
        (attempt_module, "authenticate", lambda *arguments: None),
        (attempt_module, "Agent", SimpleNamespace(connect=lambda address: nullcontext(link))),
        (attempt_module, "Holder", lambda *arguments, **options: nullcontext(hold)),
        (skeleton, "build_inside", lambda *arguments: inside),
        (story, "make_plan", lambda *arguments, **options: plan),
        (story, "refuse_taken_pids", lambda *arguments: None),
    ):
        monkeypatch.setattr(module, name, stand_in)
    vm = SimpleNamespace(
        ram=SimpleNamespace(slots=()), kernel=None, qmp=None, balloon=None,
        check_same_boot=lambda: None,
        address=SimpleNamespace(agent="unix:/nowhere", spec="lab:none"),
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        restore(vm, checkpoint)
    assert link.aborted == 1
