"""Containers that are to be dumped: their names, and what the guest's engine says of them."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from ovr.dump.container import Container, Running, to_dump
from ovr.errors import AgentUnreachable, CheckFailed, OvrError, UsageError
from ovr.guest.client.session import AgentInfo
from ovr.guest.dump_protocol import Found
from ovr.memory.addresses import Gva

HELLO = AgentInfo(
    protocol=9, agent="0", lab=False, kernel="6.12", criu="4.1", pid=2, page_size=4096, boot_id="",
    nonce=b"", force_write=True, secret_at=0, warm=0, warm_at=Gva(0),
    engines=("podman", "runc", "crun"),
)  # fmt: skip
ID = "ab" * 32
STATE = {"Status": "running", "Pid": 4711}


def wanted(**given: Any) -> tuple[int | Container, Path]:
    nothing = {
        "pid": None, "images": None, "container": None, "export": None, "runtime": None,
        "criu_options": (), "engine_options": (),
    }  # fmt: skip
    return to_dump(**nothing | given)


@pytest.mark.parametrize(
    ("given", "tree", "place"),
    [
        ({"pid": 5, "images": "d"}, 5, "d"),
        ({"container": "web", "export": "a.tar"}, Container("podman", "web"), "a.tar"),
        ({"container": "w.e_", "runtime": "runc", "images": "d"}, Container("runc", "w.e_"), "d"),
        (
            {"container": "web", "export": "a.tar", "criu_options": ["--file-locks"],
             "engine_options": ["--ignore-rootfs"]},
            Container("podman", "web", ("--file-locks", "--ignore-rootfs")), "a.tar",
        ),
        (
            {"container": "web", "runtime": "crun", "images": "d",
             "engine_options": ["--manage-cgroups-mode=ignore"]},
            Container("crun", "web", ("--manage-cgroups-mode=ignore",)), "d",
        ),
    ],
)  # fmt: skip
def test_what_is_dumped_and_where(given: dict[str, Any], tree: object, place: str) -> None:
    assert wanted(**given) == (tree, Path(place))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "either a process or a container"),
        ({"pid": 5, "container": "web"}, "either a process or a container"),
        ({"pid": 5}, "no place"),
        ({"pid": 5, "images": "d", "export": "a.tar"}, "--export needs a container"),
        ({"pid": 5, "images": "d", "runtime": "runc"}, "--runtime needs a container"),
        ({"pid": 5, "images": "d", "engine_options": ["--keep"]}, "-- needs a container"),
        ({"container": "web"}, "goes into an archive"),
        ({"container": "web", "images": "d"}, "goes into an archive"),
        ({"container": "web", "images": "d", "export": "a.tar"}, "goes into an archive"),
        ({"container": "web", "runtime": "runc", "export": "a.tar"}, "has no archives"),
        ({"container": "web", "runtime": "runc"}, "no place"),
        ({"container": "web", "runtime": "youki", "images": "d"}, "no container runtime"),
        ({"container": "web", "runtime": "podman", "images": "d"}, "no container runtime"),
    ],
)
def test_what_does_not_fit_together(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        wanted(**given)


@pytest.mark.parametrize("name", ["", "-a", "--all", "a/b", "..", "a\0b", "a b", "x" * 300, "é"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(UsageError, match="not the name or id"):
        wanted(container=name, export="a.tar")


@pytest.mark.parametrize(
    ("engine", "criu", "options"),
    [
        ("podman", ["--link-remap"], []),
        ("podman", [], ["--export=/x"]),
        ("podman", [], ["-e"]),
        ("podman", [], ["--all"]),
        ("podman", [], ["--leave-running"]),
        ("podman", [], ["--pre-checkpoint"]),
        ("podman", [], ["other"]),
        ("runc", [], ["--image-path=/x"]),
        ("runc", [], ["-image-path=/x"]),
        ("runc", [], ["--pre-dump"]),
        ("crun", [], ["--image=/x"]),
        ("crun", ["--shell-job"], []),
    ],
)
def test_options_of_the_engine_that_are_ours(
    engine: str, criu: list[str], options: list[str]
) -> None:
    place = {"export": "a.tar"} if engine == "podman" else {"runtime": engine, "images": "d"}
    with pytest.raises(UsageError, match="cannot be passed on"):
        wanted(container="web", criu_options=criu, engine_options=options, **place)


@dataclass
class Agent:
    found: Found
    hello: AgentInfo = HELLO

    def find(self, engine: str, name: str) -> Found:
        assert name == "web"
        return self.found


def find(engine: str, found: Found, hello: AgentInfo = HELLO) -> Running:
    return Container(engine, "web").find(Agent(found, hello))  # type: ignore[arg-type]


def told(data: object) -> Found:
    return Found(0, data if isinstance(data, bytes) else json.dumps(data).encode(), "")


def test_what_engines_say() -> None:
    assert find("podman", told({"id": ID, "state": STATE})) == Running(4711, ID)
    for engine in ("runc", "crun"):
        state = {"id": "web", "pid": 4711, "status": "running", "annotations": {"pid": "7"}}
        assert find(engine, told(state)) == Running(4711, "web")


def test_no_such_container() -> None:
    with pytest.raises(UsageError, match=r"no container web: Error: no such\?") as caught:
        find("podman", Found(125, b"", "Error: no such\x1b"))
    assert caught.value.code == "no-container"


@pytest.mark.parametrize("status", ["exited", "paused", "created", "running\x1b[2J"])
def test_it_does_not_run(status: str) -> None:
    with pytest.raises(UsageError, match="not running") as caught:
        find("podman", told({"id": ID, "state": STATE | {"Status": status}}))
    assert caught.value.code == "not-running"
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"{}", b"\xff", b"[" * 60000, b"null", b'{"id": 1, "state": {}}',
        {"id": ID, "state": []},
        {"id": ID, "state": STATE | {"Pid": "4711"}},
        {"id": ID, "state": STATE | {"Pid": True}},
        {"id": ID, "state": STATE | {"Pid": 1}},
        {"id": ID, "state": STATE | {"Pid": -5}},
        {"id": ID, "state": STATE | {"Pid": 1 << 40}},
        {"id": ["x"], "state": STATE},
        {"id": "--all", "state": STATE},
        {"id": "a/b", "state": STATE},
    ],
)  # fmt: skip
def test_answers_that_are_invalid(data: object) -> None:
    with pytest.raises(AgentUnreachable, match="in another way"):
        find("podman", told(data))


@pytest.mark.parametrize(
    ("changed", "code"),
    [({"engines": ()}, ""), ({"criu": None}, ""), ({"criu": "3.17.1"}, "engine-scripts")],
)
def test_guests_that_cannot(changed: dict[str, Any], code: str) -> None:
    with pytest.raises(CheckFailed) as caught:
        find("podman", told({"id": ID, "state": STATE}), replace(HELLO, **changed))
    error: OvrError = caught.value
    assert error.code == code
