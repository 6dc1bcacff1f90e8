"""``ovr dump`` where a script calls ``criu dump``: its command line, the files that it leaves."""

import json
import struct
from pathlib import Path

import pytest

from ovr import cli
from ovr.dump import report
from ovr.dump.report import DumpReport
from ovr.errors import CriuFailed, LabError, OvrError
from ovr.guest.client.failures import criu_lacked
from ovr.images.framing import encode, image_bytes
from ovr.images.stats import (
    DumpStatsEntry,
    StatsEntry,
    decode_dump_stats,
    dump_stats,
    restore_stats,
    stats_image,
)
from ovr.lab import demo
from tests.unit.test_criu_options import DUMPED, asked, run_dump

__all__ = ["asked"]


def test_a_command_line_of_criu_dump(asked, capsys):
    calls, _ = asked
    words = "-W work -o dump.log -v4 -R -j --tcp-established -x --external mnt[]:m"
    words += " --ext-unix-sk=7 --manage-cgroups=soft --no-tcp-close --ghost-limit 10M"
    words += " --log-pid --no-default-config -l --timeout 9 --pidfile nothing -d"
    assert run_dump(*words.split()) == 0
    _, (images, options) = calls
    assert images == Path("images")
    assert options == {
        "pid": 4711, "container": None, "export": None, "runtime": None, "engine_options": [],
        "agent": None, "leave_running": True, "pre_copies": 0, "verify": "sample",
        "log_level": 4, "timeout": 9.0,
        "criu_options": [
            "--shell-job", "--tcp-established", "--ext-unix-sk", "--external=mnt[]:m",
            "--ext-unix-sk=7", "--manage-cgroups=soft", "--no-tcp-close", "--ghost-limit=10M",
            "--file-locks",
        ],
    }  # fmt: skip
    assert "dumped pid 4711" in capsys.readouterr().out
    assert {path.name for path in Path("work").iterdir()} == {"dump.log", "stats-dump"}
    assert list(Path("images").iterdir()) == []
    log = Path("work/dump.log").read_text().splitlines()
    assert "Dumping finished successfully" in log[-1]


def test_the_current_directory_has_images_log_and_statistics(asked):
    calls, _ = asked
    assert cli.main(["dump", "--vm", "qmp:/x", "--tree=4711", "-o", "dump.log"]) == 0
    assert calls[1][0] == Path()
    assert {path.name for path in Path().iterdir()} == {"images", "work", "dump.log", "stats-dump"}


def test_stats_dump_is_a_service_image(asked):
    assert run_dump() == 0
    data = Path("images/stats-dump").read_bytes()
    assert struct.unpack_from("<II", data) == (0x55105940, 0x57093306)
    assert decode_dump_stats(data) == DUMPED.stats


def test_display_stats_of_a_dump(asked, capsys):
    assert run_dump("--display-stats", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["schema"] == "ovr.dump/1"
    assert "Frozen time: 500000 us\n" in captured.err
    assert "Memory pages written: 12345 (0x3039)\n" in captured.err
    assert "IRMAP" not in captured.err


def test_the_report_of_a_dump_is_drawn(asked):
    assert run_dump("--report", "dump.html") == 0
    html = Path("dump.html").read_text()
    assert "pid 4711: 48.2 MiB dumped in 1.50 s" in html
    assert "read from outside" in html


def test_a_dump_that_fails(asked, capsys):
    _, vm = asked
    vm.error = CriuFailed("criu in the guest failed (1): no", "look there")
    vm.error.unread_config = {"/etc/criu/default.conf": "tcp-established\naction-script x\n"}
    assert run_dump("-o", "dump.log") == 1
    lines = Path("images/dump.log").read_text()
    assert "Dumping FAILED." in lines
    assert "give ovr dump: --tcp-established" in lines
    assert "ovr cannot honour --action-script=x" in lines
    assert not Path("images/stats-dump").exists()
    assert capsys.readouterr().err.count("criu in the guest failed") == 1


@pytest.mark.parametrize("text", ["x", "0", "4194304", "-1", "", "²"])
def test_what_is_no_pid(asked, capsys, text):
    calls, _ = asked
    assert run_dump(f"--tree={text}") == 2
    assert f"{text!r} is not a pid" in capsys.readouterr().err
    assert calls == []


def of_criu(**fields):
    stats = DumpStatsEntry(
        freezing_time=7, frozen_time=900, memdump_time=100, memwrite_time=50, pages_scanned=5000,
        pages_skipped_parent=4000, pages_written=2, pages_lazy=0, page_pipes=1, shpages_written=3,
        **fields,
    )  # fmt: skip
    return image_bytes("stats-dump", [encode(StatsEntry(dump=stats))])


def test_what_was_read_outside_is_added_to_criu_s_statistics():
    stats = dump_stats(of_criu(irmap_resolve=9), written=3002, skipped=1000, memory=0.5)
    assert (stats.pages_written, stats.pages_skipped_parent) == (3002, 1000)
    assert (stats.memdump_time, stats.memwrite_time) == (500_100, 500_050)
    assert (stats.freezing_time, stats.frozen_time, stats.irmap_resolve) == (7, 900, 9)
    assert (stats.pages_scanned, stats.page_pipes, stats.shpages_written) == (5000, 1, 3)
    assert decode_dump_stats(stats_image(stats)) == stats


def test_a_criu_without_statistics():
    stats = dump_stats(b"", written=3, skipped=0, memory=1e9)
    assert (stats.pages_written, stats.frozen_time) == (3, 0)
    assert stats.memdump_time == 0xFFFFFFFF
    assert decode_dump_stats(stats_image(stats)) == stats


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense",
        of_criu()[:-1],
        image_bytes("stats-dump", []),
        stats_image(restore_stats(pages=1, forking=0, total=0)),
    ],
)
def test_statistics_of_a_guest_that_are_invalid(data):
    with pytest.raises(OvrError):
        dump_stats(data, written=1, skipped=0, memory=0)


def test_invalid_statistics_do_not_fail_a_dump(caplog):
    """The tree has ended by then."""
    stats = report._stats(b"nonsense", 10 * 4096, 3 * 4096, 0.5)
    assert (stats.pages_written, stats.pages_skipped_parent, stats.memdump_time) == (7, 3, 500_000)
    [record] = caplog.records
    assert "the statistics of the guest's CRIU are invalid: stats-dump" in record.getMessage()


def test_a_failure_of_criu_names_files_that_it_has_not_read():
    files = {"/etc/criu/default.conf": "shell-job"}
    with pytest.raises(CriuFailed) as caught, criu_lacked(files):
        raise CriuFailed("no")
    assert caught.value.unread_config == files


@pytest.mark.parametrize(("inside", "enough"), [(262, True), (263, False)])
def test_a_demo_whose_memory_was_not_read_outside(inside, enough):
    pages = 1 << 18
    dumped = DumpReport(bytes_total=pages << 12, bytes_outside=pages - inside << 12)
    if enough:
        demo._check_outside(dumped)
    else:
        with pytest.raises(LabError, match=r"only 99\.9\d+% of the page bytes"):
            demo._check_outside(dumped)


def test_a_container_goes_into_an_archive(asked, monkeypatch, capsys):
    """The statistics are in it, and not beside it."""
    calls, _ = asked
    words = "dump --vm qmp:/x --container web --export web.tar.zst -R --tcp-established -- --keep"
    monkeypatch.setattr(DUMPED, "container", "ab" * 32)
    assert cli.main(words.split()) == 0
    _, (images, options) = calls
    wanted = {
        "pid": None, "container": "web", "export": Path("web.tar.zst"), "runtime": None,
        "engine_options": ["--keep"], "criu_options": ["--tcp-established"], "leave_running": True,
    }  # fmt: skip
    assert images is None
    assert options.items() >= wanted.items()
    assert {path.name for path in Path().iterdir()} == {"images", "work"}
    assert "dumped container abababababab, pid 4711" in capsys.readouterr().out


def test_an_archive_on_stdout_is_alone_there(asked, monkeypatch, capsys):
    calls, _ = asked
    monkeypatch.setattr(DUMPED, "container", "ab" * 32)
    words = "dump --vm qmp:/x --container web --export - --display-stats"
    assert cli.main(words.split()) == 0
    assert calls[1][1]["export"] == Path("-")
    out, err = capsys.readouterr()
    assert not out
    assert "dumped container abababababab" in err
    assert "Displaying dump stats" in err


def test_a_container_of_a_runtime_goes_into_a_directory(asked):
    calls, _ = asked
    words = "dump --vm qmp:/x --container web --runtime crun -D images -W work"
    assert cli.main(words.split()) == 0
    assert calls[1][0] == Path("images")
    assert calls[1][1]["runtime"] == "crun"
    assert {path.name for path in Path("work").iterdir()} == {"stats-dump"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "either a process or a container"),
        ("-t 5 --container web", "either a process or a container"),
        ("--container web", "goes into an archive"),
        ("--container web -D images --export a.tar", "goes into an archive"),
        ("--container=-a --export a.tar", "not the name or id"),
        ("--container web --export a.tar --link-remap", "--link-remap cannot be passed on"),
        ("--container web --export - --json", "standard output cannot get"),
        ("--container web --export a.tar -- --all", "--all cannot be passed on"),
        ("-t 5 -D images -- --keep", "-- needs a container"),
    ],
)
def test_nothing_is_attached_to_for_a_wrong_command_line(asked, capsys, words, message):
    calls, _ = asked
    assert cli.main(["dump", "--vm", "qmp:/x", *words.split()]) == 2
    assert message in capsys.readouterr().err
    assert not calls
