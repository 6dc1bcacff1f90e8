"""The report as a picture: well-formed, true to the numbers, harmless whatever the names."""

from xml.etree import ElementTree

import pytest

from ovr.attempt.stopwatch import Span, Stopwatch
from ovr.cli.picture import page, picture_file
from ovr.errors import UsageError
from ovr.restore.report import Report


@pytest.fixture
def report():
    return Report(
        pid=4242,
        tasks=1,
        states=("memory", "umask"),
        bytes_total=400 << 20,
        seconds={"plan": 0.5, "memory": 1.0, "total": 2.0},
        held={"count": 2, "seconds": 0.3, "longest": 0.2},
        reasons={"outside": 300 << 20, "cow": 100 << 20},
        spans=(Span("plan", 0.0, 0.25), Span("memory", 0.25, 1.25), Span("plan", 1.5, 1.75)),
        holds=(Span("held", 0.5, 0.6), Span("held", 0.8, 1.0)),
    )


def drawings(html):
    """The SVG elements, parsed as XML: what is not well-formed fails here."""
    parts = html.split("<svg")[1:]
    return [ElementTree.fromstring(f"<svg{part.split('</svg>')[0]}</svg>") for part in parts]


def test_bars_are_where_the_time_was(report):
    timeline, _ = drawings(page(report, {}))
    bars = [bar for bar in timeline.iter("rect") if bar.get("class") == "bar"]
    edges = [(float(bar.get("x")), float(bar.get("width"))) for bar in bars]
    scale = (860 - 90) / 2.0
    # Rows come in the order in which phases began: both of plan, then memory.
    wanted = [(90, 0.25), (90 + 1.5 * scale, 0.25), (90 + 0.25 * scale, 1.0)]
    assert edges == [
        (pytest.approx(x, abs=0.06), pytest.approx(w * scale, abs=0.06)) for x, w in wanted
    ]
    rows = [bar.get("y") for bar in bars]
    assert rows[0] == rows[1] != rows[2]
    held = [bar for bar in timeline.iter("rect") if bar.get("class") == "held"]
    assert len(held) == 2
    assert all(0 <= float(bar.get("x")) <= 860 for bar in (*bars, *held))
    assert [text.text for text in timeline.iter("text")][:2] == ["0 s", "0.5 s"]


def test_bytes_by_reason(report):
    html = page(report, {})
    _, bytes_bar = drawings(html)
    widths = [float(bar.get("width")) for bar in bytes_bar.iter("rect")]
    assert widths == [645.0, 215.0]
    assert "300.0 MiB" in html
    assert "75.00%" in html
    assert "written from outside" in html


def test_names_of_others_are_text_only(report):
    html = page(report, {"VM": "<script>alert(1)</script>\n\x1b[31m", "images": "a&b"})
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "\x1b" not in html
    assert "a&amp;b" in html


def test_a_report_of_nothing():
    html = page(Report(), {})
    assert len(drawings(html)) == 2


def test_the_file_comes_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.html"
    with picture_file(path):
        assert not path.exists()
    assert [*tmp_path.iterdir()] == []
    path.write_text("of an earlier restore")
    with pytest.raises(ZeroDivisionError), picture_file(path):
        raise ZeroDivisionError
    assert path.read_text() == "of an earlier restore"
    with picture_file(path) as picture:
        picture.write("new")
    assert path.read_text() == "new"
    assert [*tmp_path.iterdir()] == [path]


def test_no_place_for_the_file(tmp_path):
    wanted = "report .*nowhere.* cannot be made: No such file"
    with pytest.raises(UsageError, match=wanted), picture_file(tmp_path / "nowhere" / "a.html"):
        raise AssertionError("not reached")


def test_a_stopwatch_knows_when():
    watch = Stopwatch()
    with watch("plan"):
        pass
    with watch("memory"):
        pass
    with watch("plan"):
        pass
    assert [span.name for span in watch.spans] == ["plan", "memory", "plan"]
    assert all(a.end <= b.start for a, b in zip(watch.spans, watch.spans[1:], strict=False))
    assert list(watch.seconds) == ["plan", "memory"]
