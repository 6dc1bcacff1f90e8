"""Reasons why a tree cannot be moved, all told before anything is touched."""

from types import SimpleNamespace

import pytest

from ovr.dump.container import Container, Running
from ovr.errors import CheckFailed, KernelNotFound
from ovr.move import preflight
from ovr.move.preflight import check_move

ID = "0123456789abcdef" * 4
WEB = Container("podman", "web")
SOURCE, DESTINATION = SimpleNamespace(name="source"), SimpleNamespace(name="destination")


class Guests:
    """Both guests, without anything that is in the way."""

    def __init__(self, monkeypatch):
        self.criu = {"source": "4.1.1", "destination": "4.1.1"}
        self.tids = [[4242, 4243], [4250]]
        self.taken = {}
        self.engines, self.containers = ["podman"], []
        self.features = {"source": {1, 2, 300}, "destination": {1, 2, 300, 301}}
        tasks = [SimpleNamespace(tids=tids) for tids in self.tids]
        self.tree = [(tids[0], task) for tids, task in zip(self.tids, tasks, strict=True)]
        monkeypatch.setattr(preflight, "tree_of", lambda kernel, pid: self.tree)
        monkeypatch.setattr(preflight, "task_active_pid_ns", lambda task: None)
        monkeypatch.setattr(preflight, "_tids", lambda task, ns: task.tids)
        monkeypatch.setattr(preflight, "find_task", lambda kernel, tid: self.taken.get(tid))
        monkeypatch.setattr(preflight, "_features", lambda kernel: self.features[kernel.name])
        monkeypatch.setattr(preflight, "_name", lambda kernel, feature: f"feature{feature}")

    def check(self, container=None, **options):
        sides = [
            SimpleNamespace(
                agent=SimpleNamespace(
                    hello=SimpleNamespace(criu=self.criu[kernel.name], engines=self.engines),
                    find=lambda engine, name: SimpleNamespace(status=name not in self.containers),
                ),
                vm=SimpleNamespace(kernel=kernel),
            )
            for kernel in (SOURCE, DESTINATION)
        ]
        check_move(*sides, Running(4242, ID if container else None), container, **options)

    def problems(self, **options):
        """The texts and the cures of what is in the way."""
        with pytest.raises(CheckFailed) as caught:
            self.check(**options)
        assert caught.value.code == "preflight"
        return str(caught.value).split("; "), caught.value.hint.split("; ")


@pytest.fixture
def guests(monkeypatch):
    return Guests(monkeypatch)


def test_nothing_is_in_the_way(guests):
    guests.check()


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_side_without_criu(guests, side):
    guests.criu[side] = None
    [text], _ = guests.problems()
    assert side in text


@pytest.mark.parametrize(
    ("source", "destination", "good"),
    [
        ("4.1.1", "4.1", True),
        ("4.1.1", "4.2", True),
        ("4.1.1", "3.17.1", False),
        ("4.10", "4.9", False),
        ("4.9", "4.10", True),
    ],
)
def test_an_older_criu(guests, source, destination, good):
    guests.criu = {"source": source, "destination": destination}
    if good:
        guests.check()
    else:
        guests.problems()


def test_pids_that_are_taken(guests):
    guests.taken = {4243: SimpleNamespace(comm="sleep"), 4250: SimpleNamespace(comm="sh")}
    texts, cures = guests.problems()
    assert [text.split()[1] for text in texts] == ["4243", "4250"]
    assert len(cures) == 2  # one cure, which has a semicolon itself


def test_many_pids_that_are_taken(guests):
    """The message stays readable."""
    guests.tids[0][1:] = range(5000, 6000)
    guests.taken = {tid: SimpleNamespace(comm="sh") for tid in range(5000, 6000)}
    texts, _ = guests.problems()
    assert len(texts) == 9 and texts[-1].startswith("992 ")


def test_a_process_of_an_unexpected_type(guests):
    """A hostile kernel's types: an error of that kernel, wherever it is met."""

    class Strange:
        @property
        def comm(self):
            raise TypeError("a number in the place of an array")

    guests.taken = {4243: Strange()}
    with pytest.raises(KernelNotFound):
        guests.check()


def test_pids_of_a_namespace_of_its_own(guests):
    guests.taken = {4243: SimpleNamespace(comm="sleep")}
    guests.tree[0] = (1, guests.tree[0][1])
    guests.check()


def test_features_that_the_other_cpu_lacks(guests):
    guests.features["source"] |= set(range(400, 420))
    [text], _ = guests.problems()
    assert "feature400" in text and "12 more" in text
    guests.check(cpu=False)


def test_features_that_cannot_be_read(guests, monkeypatch):
    def unknown(kernel):
        raise KernelNotFound("no symbol boot_cpu_data", "")

    monkeypatch.setattr(preflight, "_features", unknown)
    guests.check()


def test_all_reasons_at_once(guests):
    guests.criu["destination"] = "3.17.1"
    guests.taken = {4250: SimpleNamespace(comm="sh")}
    guests.features["source"].add(400)
    texts, _ = guests.problems()
    assert len(texts) == 3


def test_a_container(guests):
    guests.check(WEB)


def test_a_destination_without_podman(guests):
    guests.engines = []
    [text], [cure] = guests.problems(container=WEB)
    assert text.startswith("in the destination: ")
    assert "podman" in cure


@pytest.mark.parametrize("there", ["web", ID])
def test_a_container_that_the_destination_has(guests, there):
    guests.containers = [there]
    [text], [cure] = guests.problems(container=WEB)
    assert there[:12] in text
    assert there in cure
