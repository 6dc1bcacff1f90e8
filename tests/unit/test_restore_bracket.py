"""Whatever interrupts a restore from its first byte on, the agent is told to kill the tree."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest

import ovr.restore.story as module
from ovr.restore import restore


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
    plan = SimpleNamespace(inside_images=dict, tasks=[], shared=[], states=(), not_dumped={})
    checkpoint = SimpleNamespace(
        images=None, check=lambda hello: None, files=lambda inside: {}, options=(), engine=None,
        volumes=(), container=None,
    )  # fmt: skip
    for name, stand_in in {
        "claimed": lambda slots: nullcontext(),
        "make_plan": lambda *arguments, **options: plan,
        "_refuse": lambda *arguments: None,
        "_same_guest": lambda *arguments: None,
        "prove": lambda *arguments: None,
        "Agent": SimpleNamespace(connect=lambda address: nullcontext(link)),
        "Holder": lambda *arguments, **options: nullcontext(SimpleNamespace(spans=())),
    }.items():
        monkeypatch.setattr(module, name, stand_in)
    vm = SimpleNamespace(
        ram=SimpleNamespace(slots=()), kernel=None, qmp=None, check_same_boot=None,
        address=SimpleNamespace(agent="unix:/nowhere", spec="lab:none"),
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        restore(vm, checkpoint)
    assert link.aborted == 1
