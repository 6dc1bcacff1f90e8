"""``ovr restore`` and ``ovr dump`` where a script calls CRIU: options and files."""

import json
import logging
import re
import struct
from pathlib import Path

import pytest

from ovr import cli
from ovr.cli import dump, restore
from ovr.cli.criu_options import TABLES, Fate
from ovr.dump.report import DumpReport
from ovr.errors import CriuFailed
from ovr.images.framing import decode, frames
from ovr.images.stats import (
    DumpStatsEntry,
    StatsEntry,
    restore_stats,
    stats_image,
)
from ovr.restore.report import Report
from tests.documents import ROOT

REPORT = Report(
    pid=4711, tasks=2, bytes_total=12345 * 4096, bytes_outside=12000 * 4096,
    seconds={"skeleton": 0.25, "total": 1.5}, held={"count": 3, "seconds": 0.02, "longest": 0.01},
)  # fmt: skip
DUMPED = DumpReport(
    pid=4711, tasks=2, bytes_total=12345 * 4096, bytes_outside=12000 * 4096,
    bytes_inside=345 * 4096, frozen=0.5,
    seconds={"memory": 0.25, "total": 1.5}, held={"count": 3, "seconds": 0.02, "longest": 0.01},
    stats=DumpStatsEntry(
        freezing_time=1, frozen_time=500_000, memdump_time=260_000, memwrite_time=250_000,
        pages_scanned=20_000, pages_skipped_parent=0, pages_written=12_345, pages_lazy=0,
    ),
)  # fmt: skip


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The arguments of the calls of `attach`, `restore` and `dump`, which need no VM here."""
    calls = []

    class Vm:
        error = None

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def restore(self, images, **options):
            calls.append((images, options))
            logging.getLogger("ovr.restore").info("in the middle")
            if Vm.error:
                raise Vm.error
            return REPORT

        def dump(self, pid, images, **options):
            calls.append((images, {"pid": pid, **options}))
            logging.getLogger("ovr.dump").info("in the middle")
            if Vm.error:
                raise Vm.error
            return DUMPED

    def attach(spec, **options):
        calls.append((spec, options))
        return Vm()

    monkeypatch.setattr(restore, "attach", attach)
    monkeypatch.setattr(dump, "attach", attach)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OVR_VM", raising=False)
    Path("images").mkdir()
    Path("work").mkdir()
    return calls, Vm


def run(*words):
    return cli.main(["restore", "--vm", "qmp:/x", "-D", "images", *words])


def run_dump(*words):
    return cli.main(["dump", "--vm", "qmp:/x", "-t", "4711", "-D", "images", *words])


RUNS = {"restore": run, "dump": run_dump}


def test_a_command_line_of_criu(asked, capsys):
    calls, _ = asked
    words = "-d -t 99 -W work -o restore.log -v4 --pidfile pid -j --tcp-established -x"
    words += " --external mnt[]:m --ext-unix-sk=7 --manage-cgroups=soft --no-tcp-close -r /srv"
    words += " --log-pid --no-default-config -l --timeout 9 -R --track-mem"
    assert run(*words.split()) == 0
    _, (images, options) = calls
    assert images == Path("images")
    assert options["criu_options"] == [
        "--shell-job", "--tcp-established", "--ext-unix-sk", "--external=mnt[]:m",
        "--ext-unix-sk=7", "--manage-cgroups=soft", "--no-tcp-close", "--root=/srv",
        "--file-locks",
    ]  # fmt: skip
    assert "restored pid 4711" in capsys.readouterr().out


def test_the_files(asked):
    assert run("-W", "work", "-o", "restore.log", "-v4", "--pidfile", "pid") == 0
    assert {path.name for path in Path("work").iterdir()} == {"restore.log", "pid", "stats-restore"}
    assert list(Path("images").iterdir()) == []
    assert Path("work/pid").read_text() == "4711"
    lines = Path("work/restore.log").read_text().splitlines()
    assert all(re.match(r"\(\d{2,}\.\d{6}\) ", line) for line in lines)
    assert lines[0].endswith("restore: in the middle")
    assert "Restore finished successfully. Tasks resumed." in lines[-1]


def test_without_work_dir_the_images_have_it(asked):
    assert run("--pidfile", "pid") == 0
    assert {path.name for path in Path("images").iterdir()} == {"pid", "stats-restore"}


def test_stats_restore_is_a_service_image(asked):
    run("-W", "work")
    data = Path("work/stats-restore").read_bytes()
    assert struct.unpack_from("<II", data) == (0x55105940, 0x57093306)
    [frame] = frames(data, "stats-restore")
    stats = decode(StatsEntry, frame.payload, "stats-restore").restore
    assert (stats.pages_restored, stats.forking_time, stats.restore_time) == (
        12345,
        250000,
        1500000,
    )
    assert stats.HasField("pages_compared")
    assert stats.HasField("pages_skipped_cow")
    # The same, field by field, as protobuf encodes it: varints after one-byte tags.
    assert frame.payload[:6] == bytes([0x12, len(frame.payload) - 2, 0x08, 0, 0x10, 0])


def test_times_that_do_not_fit():
    image = stats_image(restore_stats(pages=1, forking=0, total=1e9))
    [frame] = frames(image, "stats-restore")
    assert decode(StatsEntry, frame.payload, "x").restore.restore_time == 0xFFFFFFFF


def test_display_stats(asked, capsys):
    run("--display-stats")
    out = capsys.readouterr().out
    assert (
        "Pages restored: 12345 (0x3039)\nRestore time: 1500000 us\nForking time: 250000 us" in out
    )
    run("--display-stats", "--json")
    captured = capsys.readouterr()
    assert json.loads(captured.out)["pid"] == 4711
    assert "Pages restored" in captured.err


def test_a_failure_is_in_the_log_and_leaves_no_pidfile(asked, capsys):
    _, vm = asked
    vm.error = CriuFailed("criu in the guest failed (1): no", "look there")
    vm.error.add_note("(00.1) Error (criu/x.c:1): no\n(00.2) Error: done")
    assert run("-W", "work", "-o", "log", "--pidfile", "pid") == 1
    errors = [line for line in Path("work/log").read_text().splitlines() if "Error" in line]
    assert "Error (ovr/cli/criu_files.py:" in errors[0]
    assert "guest: (00.1) Error (criu/x.c:1): no" in errors[0]
    assert any("criu in the guest failed (1): no (look there)" in line for line in errors)
    assert not Path("work/pid").exists()
    assert not Path("work/stats-restore").exists()
    assert capsys.readouterr().err.count("criu in the guest failed") == 1


def test_a_pidfile_that_exists(asked, capsys):
    calls, _ = asked
    Path("work/pid").write_text("1")
    assert run("-W", "work", "--pidfile", "pid") == 2
    assert "File exists" in capsys.readouterr().err
    assert Path("work/pid").read_text() == "1"
    assert calls == []


def test_stats_that_cannot_be_written_are_no_failure(asked, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ovr.cli.criu_files.write_image", full)
    assert run() == 0
    assert "Warn  (ovr/cli/criu_files.py:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "level"),
    [
        ((), 2), (("-v",), 3), (("-vv",), 4), (("-v", "-v"), 4), (("-vvvv",), 4),
        (("-v0",), 0), (("-v1",), 1), (("-v4",), 4), (("-v", "9"), 4), (("--verbosity=3",), 3),
    ],
)  # fmt: skip
def test_levels(asked, monkeypatch, words, level):
    seen = []
    monkeypatch.setattr("ovr.cli.log_to_stderr", seen.append)
    assert run(*words) == 0
    assert seen == [level]


def test_a_work_dir_that_is_not_there(asked, capsys):
    assert run("-W", "nowhere") == 2
    assert "nowhere is not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("-vx",), ("--no-such-option",)])
def test_nonsense(asked, words):
    with pytest.raises(SystemExit) as caught:
        run(*words)
    assert caught.value.code == 2


def of(fate):
    return [
        pytest.param(command, name, option, id=f"{command} {name}")
        for command, table in TABLES.items()
        for option in table
        if option.fate is fate
        for name in option.names
    ]


@pytest.mark.parametrize(("command", "name", "option"), of(Fate.REFUSED))
def test_refusals_say_why(asked, capsys, command, name, option):
    calls, _ = asked
    with pytest.raises(SystemExit) as caught:
        RUNS[command](name, *(["1"] if option.value else []))
    assert caught.value.code == 2
    assert f"{name} of criu cannot be honoured: {option.why}" in capsys.readouterr().err
    assert calls == []


@pytest.mark.parametrize(("command", "name", "option"), of(Fate.IGNORED))
def test_what_changes_nothing_is_taken(asked, command, name, option):
    calls, _ = asked
    assert RUNS[command](name, *(["1"] if option.value else [])) == 0
    assert calls[1][1]["criu_options"] == []


@pytest.mark.parametrize(("command", "name", "option"), of(Fate.PASSED))
def test_what_goes_to_criu_goes_under_its_long_name(asked, command, name, option):
    calls, _ = asked
    assert RUNS[command](name, *(["1"] if option.value else [])) == 0
    passed = option.long + ("=1" if option.value else "")
    assert calls[1][1]["criu_options"] == [passed]


@pytest.mark.parametrize(("command", "name", "option"), of(Fate.PASSED))
def test_an_option_whose_value_may_lack(asked, command, name, option):
    calls, _ = asked
    if option.value == "?":
        assert RUNS[command](name) == 0
        assert calls[1][1]["criu_options"] == [option.long]


@pytest.mark.parametrize("command", TABLES)
def test_no_option_is_in_the_table_twice(command):
    names = [name for option in TABLES[command] for name in option.names]
    assert len(names) == len(set(names))


def test_both_commands_have_the_same_options():
    """CRIU has one parser for all of its commands."""
    shapes = [{(o.names, o.value) for o in table} for table in TABLES.values()]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("words", [("--no-such", "1"), ("--no-such=1",), ("-Z", "1"), ("-Z1",)])
def test_an_unknown_option_is_named(asked, capsys, words):
    """Not its value, and before anything is done."""
    calls, _ = asked
    with pytest.raises(SystemExit) as caught:
        run(*words)
    assert caught.value.code == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert error.endswith(f"not an option of ovr or criu (3.17 to 4.2): {words[0]}")
    assert calls == []


def test_a_stray_word_is_named(asked, capsys):
    calls, _ = asked
    assert run("stray") == 2
    assert "'stray' is not an option" in capsys.readouterr().err
    assert calls == []


def markdown(command):
    """Return a table of docs/criu-scripts.md."""
    rows = [f"| option | effect in `ovr {command}` |", "|---|---|"]
    groups = {}
    for option in TABLES[command]:
        groups.setdefault((option.fate, option.why), []).append(
            "`" + "`, `".join(option.names) + "`"
        )
    for (fate, why), names in groups.items():
        what = why if fate is Fate.OURS else f"{fate.value}: {why}"
        rows.append(f"| {', '.join(names)} | {what} |")
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize("command", TABLES)
def test_the_document_has_the_table(command):
    text = (ROOT / "docs" / "criu-scripts.md").read_text()
    assert markdown(command) in text


def test_vm_and_agent_from_the_environment(asked, monkeypatch):
    calls, _ = asked
    monkeypatch.setenv("OVR_VM", "libvirt:web")
    monkeypatch.setenv("OVR_AGENT", "vsock:9")
    assert cli.main(["restore", "-D", "images"]) == 0
    assert (calls[0][0], calls[1][1]["agent"]) == ("libvirt:web", "vsock:9")
    assert cli.main(["restore", "-D", "images", "--vm", "qmp:/y", "--agent", "vsock:3"]) == 0
    assert (calls[2][0], calls[3][1]["agent"]) == ("qmp:/y", "vsock:3")
    monkeypatch.delenv("OVR_VM")
    with pytest.raises(SystemExit):
        cli.main(["restore", "-D", "images"])


@pytest.mark.parametrize("command", TABLES)
def test_the_help_names_every_option_that_is_passed(capsys, command):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    table = TABLES[command]
    listed = [option.long for option in table if option.fate in (Fate.PASSED, Fate.IGNORED)]
    assert [name for name in listed if name not in text] == []
