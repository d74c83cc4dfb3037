"""The performance document: what its first screen says of a record, and records of every broken kind."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

# The benchmarks are no part of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from report.documents import tables

from benchmarks import plots, report
from bigru.kernels.record import Check, Record, RecordError, Row, read_record, read_records
from bigru.report.__main__ import main as bigru_report


def row(mode="forward", batch=64, ours=40.0, theirs=50.0, **changes):
    """A row of the main workload; the ratio's quartiles lie 10 % around it."""
    ratio = theirs / ours
    figures = {"ours_ms": ours, "rival_ms": theirs, "ratio": ratio, "low": 0.9 * ratio, "high": 1.1 * ratio}
    about = {"candidate": "cpu", "rival": "nn.GRU", "threads": 1, "rounds": 9, "error": 1e-7} | figures
    return Row(**{"group": "layer", "mode": mode, "batch": batch, "steps": 60, "hidden": 128} | about | changes)


def record(rows, date="2026-12-01T10:20:30+00:00", **changes):
    about = {"command": "python -m benchmarks.cpu", "machine": {"name": "Test CPU", "cores": 2}}
    about |= {"kind": "cpu", "versions": {"torch": "9.9.9", "triton": None}, "date": date, "rows": rows}
    return Record(**about | changes)


def gpu_record(rows, **changes):
    return record(rows, kind="gpu", machine={"name": "Test Card", "capability": [9, 0]}, **changes)


@pytest.fixture
def write(tmp_path):
    """Writes records and the document of them; returns its text."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)

    def write(*records):
        for one in records:
            one.write(results)
        report.write_performance(results, tmp_path / "PERFORMANCE.md")
        return (tmp_path / "PERFORMANCE.md").read_text()

    write.results = results
    return write


def test_the_first_screen_says_where_and_by_how_much(write):
    rows = [
        row("forward", 1, 2.0, 6.0),
        row("training", 1, 6.0, 36.0),
        row("forward", 64, 67.4, 63.9),
        row("forward", 1, 1.5, 6.0, threads=2),
        row("forward", 1, 2.0, 1.5, rival="onnxruntime"),
    ]
    text = write(record(rows))
    first, no_gpu, answer = text.split("\n\n")[:3]
    assert (first, no_gpu) == ("# Performance", report.NO_GPU)
    assert answer == (
        "**On Test CPU, `BiGRU` (backend `cpu`) is 0.95 to 4.00 times as fast in forward and 6.00 times as fast in "
        "training beside `torch.nn.GRU`** from B=1 to B=64, slower by more than 5 % in 1 of 4 cases: two layers, both "
        "directions, T=60, I=84, H=128, fp32, equal weights and inputs, in turn in the same rounds."
    )
    what = "times as fast (ms against nn.GRU's)"
    assert tables(text)[0] == [
        ["", "B", f"1 thread: {what}", f"2 threads: {what}"],
        ["forward", "1", "**3.00** (2.00 against 6.00)", "**4.00** (1.50 against 6.00)"],
        ["forward", "64", "0.95 (67.4 against 63.9)", "-"],
        ["training", "1", "**6.00** (6.00 against 36.0)", "-"],
    ]
    assert "![Speed-up over nn.GRU against the batch size](docs/images/performance/test-cpu-speed-up.png)" in text
    assert (write.results.parents[1] / "docs/images/performance/test-cpu-speed-up.png").read_bytes()[:4] == b"\x89PNG"
    assert "<sub>Test CPU (cores 2), 2026-12-01; torch 9.9.9; medians" in text
    assert tables(text)[1][1][:3] == ["layer, forward", "cpu", "onnxruntime"]
    assert "- layer, forward, B=64 T=60 H=128 fp32, cpu beside nn.GRU, 1 thread: 0.95" in text


@pytest.mark.usefixtures("blank_pictures")
def test_no_heading_without_a_figure_and_few_rows_first(write):
    text = write(record([row(mode, batch) for mode in ("forward", "training") for batch in (1, 2, 8, 16, 64, 256)]))
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# Performance",
        "### Every other case",
        "## Records",
    ]
    assert [line[1] for line in tables(text)[0][1:]] == ["1", "16", "64", "256"] * 2


def test_without_any_record(write):
    text = write()
    assert text.startswith(f"# Performance\n\n{report.NO_GPU}\n\nNothing has been measured yet.\n\n<sub>")
    assert "##" not in text


@pytest.mark.usefixtures("blank_pictures")
def test_a_gpu_comes_first_by_its_own_time_with_checks_and_reasons(write):
    about = {"candidate": "triton", "threads": None}
    rows = [row(ours=1.0, theirs=2.0, **about, clock="gpu"), row(ours=2.0, theirs=1.0, **about)]
    refused = Row("layer", "forward", "resident", "nn.GRU", 64, 60, 512, status="refused", message="a | too wide")
    checks = [Check("planted defect", "triton", "passed", "noticed: y")]
    found = gpu_record([*rows, refused], checks=checks, profile={"triton": [("kernel | a", 3, 1.25)]}, complete=False)
    text = write(record([row()]), found)
    assert report.NO_GPU not in text
    assert "**On Test Card, `BiGRU` (backend `triton`) is 2.00 times as fast in forward" in text
    assert "The run ended before its last case." in text
    assert tables(text)[0][1] == ["forward", "64", "0.50 (2.00 against 1.00)", "**2.00** (1.00 against 2.00)"]
    assert [table[0][0] for table in tables(text)[1:3]] == ["check", "candidate"]
    assert "- **resident**, refused: a \\| too wide (1): layer forward B=64 T=60 H=512 fp32" in text
    assert "\n## On Test CPU\n" in text
    for table in tables(text):
        assert len({len(line) for line in table}) == 1


@pytest.mark.usefixtures("blank_pictures")
def test_records_by_date(write):
    old, new = record([row(ours=80.0)], "2026-11-01T00:00:00+00:00"), record([row()])
    text = write(old, new)
    assert tables(text)[1] == [
        ["main workload", "2026-11-01", "2026-12-01"],
        ["forward, 1 thread", "0.62 (80.0 against 50.0)", "**1.25** (40.0 against 50.0)"],
    ]
    uses = {line[0].split("]")[0].strip("["): line[-1] for line in tables(text)[-1][1:]}
    assert uses == {new.name: "shown", old.name: "over time"}
    forward, _ = plots.over_time([new, old]).axes
    assert [list(line.get_ydata()) for line in forward.lines] == [[80.0, 40.0], [50.0, 50.0]]
    # An incomplete record is shown only where there is no other.
    text = write(replace(record([row(ours=10.0)], "2026-12-05T00:00:00+00:00"), complete=False))
    assert "1.25 times as fast" in text
    # But one that fills the first table is shown.
    rows = [row(mode, batch, ours=10.0) for mode in ("forward", "training") for batch in (1, 8, 64, 256)]
    text = write(replace(record(rows, "2026-12-06T00:00:00+00:00"), complete=False))
    assert "5.00 times as fast in forward" in text


def test_the_plot_draws_the_ratios(write):
    rows = [row("forward", batch, 10.0, 10.0 * batch) for batch in (8, 1, 64)] + [row("training", 8, threads=2)]
    forward, training = plots.speed_up(record(rows)).axes
    drawn = [
        (axes.get_title(loc="left"), *container[0].get_data())
        for axes in (forward, training)
        for container in axes.containers
    ]
    assert [(title, list(x), list(y)) for title, x, y in drawn if len(x)] == [
        ("forward", [1, 8, 64], [1.0, 8.0, 64.0]),
        ("training", [8], [1.25]),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 1}, "no record of schema 2"),
        ({"rows": [{"group": "layer"}]}, "missing"),
        ({"rows": [asdict(row()) | {"ratio": None}]}, "ratio of a measured row should be more than 0, got None"),
        ({"rows": [asdict(row()) | {"mode": "sideways"}]}, "mode should be one of forward, training"),
        ({"rows": [asdict(row()) | {"batch": "64"}]}, "batch should be a whole number"),
        ({"date": "yesterday"}, "Invalid isoformat"),
        ({"machine": {}}, "name"),
        ({"colour": "red"}, "colour"),
    ],
)
@pytest.mark.usefixtures("blank_pictures")
def test_a_broken_record_is_named_beside_sound_ones(write, capsys, changes, message):
    write(record([row()]))
    broken = write.results / "broken.json"
    sound = json.loads(next(write.results.iterdir()).read_text())
    broken.write_text(json.dumps(sound | changes))
    with pytest.raises(RecordError, match=message):
        read_record(broken)
    out = write.results.parents[1] / "PERFORMANCE.md"
    assert bigru_report(["performance", "--results", str(write.results), "--out", str(out)]) == 1
    assert "broken.json: broken, left out: " in capsys.readouterr().err
    assert "| broken.json" in out.read_text()


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"{}"])
def test_broken_records_alone_write_nothing(write, capsys, content):
    (write.results / "a.json").write_bytes(content)
    out = write.results / "PERFORMANCE.md"
    assert report.main(["--results", str(write.results), "--out", str(out)]) == 2
    assert "a.json" in capsys.readouterr().err
    assert not out.exists()
    assert report.main(["--results", str(out)]) == 2


def test_a_record_comes_back_as_it_was_and_a_second_replaces_none(tmp_path):
    first = record([row()], checks=[Check("a", "b", "passed")])
    path = first.write(tmp_path)
    assert asdict(read_record(path)) == asdict(first)
    second = replace(first, date="2026-12-01T10:20:31+00:00").write(tmp_path)
    smoke = replace(first, kind="smoke", rows=[row(error=float("nan"))]).write(tmp_path)
    assert [path.name, second.name] == ["Test-CPU-2026-12-01-102030.json", "Test-CPU-2026-12-01-102031.json"]
    assert json.loads(smoke.read_text())["rows"][0]["error"] is None
    assert [one.date[17:19] for one in read_records(tmp_path)[0]] == ["30", "31"]


def test_the_documents_in_the_repository_are_their_records(tmp_path):
    root = Path(__file__).resolve().parents[1]
    records, broken = read_records(root / "benchmarks" / "results")
    assert broken == {}
    drawn = {path.relative_to(root) for path in (root / report.IMAGES).glob("*.png")}
    assert report.document(records, {}, "benchmarks/results", drawn) == (root / "PERFORMANCE.md").read_text()


def test_numbers_keep_their_digits():
    values = (0.0123456, 9.996, 12.345, 1234.6, None, float("nan"))
    assert [report.significant(value) for value in values] == ["0.0123", "10.0", "12.3", "1,235", "-", "-"]
