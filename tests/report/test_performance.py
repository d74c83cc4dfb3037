"""The performance document: like is compared with like, losses and gaps are named, and nothing is said unmeasured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.markdown import significant
from benchmarks.measured import read_results
from benchmarks.performance import write_performance
from bigru.report import RunError, figures
from bigru.report.__main__ import main

GPU_HEADINGS = [
    "### Main workload",
    "### Speed against nn.GRU",
    "### Time per step",
    "### Memory",
    "### Where nn.GRU wins",
    "### Training",
    "### Correctness",
    "### Checks",
    "### Rows without a figure",
    "### Over time",
]
UNDER = (
    "<sub>Test Card, 2026-12-01; bigru 0.1.0, python 3.12.1, torch 9.9.9, triton 8.8.8, numpy 2.4.6, cuda 77.7, "
    "cudnn 91002; precision as in the table; `python -m benchmarks.gpu --out DIR`</sub>"
)


@pytest.fixture(autouse=True)
def blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing pictures takes most of the time, and test_performance_figures.py looks at what is drawn."""
    monkeypatch.setattr(figures, "png", lambda figure: b"")


def store(folder: Path, name: str, record: object) -> None:
    (folder / name).write_text(json.dumps(record), encoding="utf-8")


def written(folder: Path) -> str:
    """The document of these records, as its file holds it."""
    out = folder.parents[1] / "PERFORMANCE.md"
    write_performance(folder, out)
    return out.read_text(encoding="utf-8")


def of_rows(folder: Path, fake: SimpleNamespace, rows: list[dict[str, Any]], **changes: Any) -> str:
    """The document of one GPU record with these timings."""
    store(folder, "test-card.json", fake.gpu_record(rows, **changes))
    return written(folder)


def below(text: str, heading: str) -> str:
    """What stands under a heading, to the next heading."""
    return re.split(r"^#+ ", text[text.index(f"\n{heading}\n") + len(heading) + 2 :], flags=re.MULTILINE)[0].strip()


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every table, the rule left out; an escaped bar is text."""
    found = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        found.append([rows[0], *rows[2:]])
    return found


def table_under(text: str, heading: str) -> list[list[str]]:
    return tables(below(text, heading))[0]


def test_numbers_have_three_digits() -> None:
    values = (0.0, 0.00012345, 0.9994, 0.9996, 9.994, 9.996, 12.345, 123.45, 12345.6, -1.234, float("nan"))
    assert [significant(value) for value in values] == [
        "0",
        "0.000123",
        "0.999",
        "1.00",
        "9.99",
        "10.0",
        "12.3",
        "123",
        "12,346",
        "-1.23",
        "-",
    ]


# What is compared with what.


def test_ratio_is_the_peers_time_over_ours(results: Path, fake: SimpleNamespace) -> None:
    rows = [
        fake.timing("resident", 0.5, eager_ms=4.0, graph_ms=0.8, error=2.5e-7, peak_mib=123.4),
        fake.timing("nn.GRU", 2.0, eager_ms=3.0, graph_ms=2.4, peak_mib=55.5),
    ]
    text = of_rows(results, fake, rows)
    assert table_under(text, "### Main workload") == [
        [
            "precision",
            "path",
            "GPU time, ms (ratio)",
            "eager wall, ms (ratio)",
            "graph replay, ms (ratio)",
            "GPU time, quartiles",
            "error",
            "peak MiB",
        ],
        ["fp32", "nn.GRU", "2.00", "3.00", "2.40", "1.98 to 2.02", "1.5e-07", "55.5"],
        ["fp32", "resident", "0.500 (4.00x)", "4.00 (0.750x)", "0.800 (3.00x)", "0.495 to 0.505", "2.5e-07", "123"],
    ]


def test_only_the_same_precision_is_compared(results: Path, fake: SimpleNamespace) -> None:
    modes = [("fp32", "fp32"), ("fp32", "tf32"), ("bf16", "-"), ("fp16", "-")]
    rows = []
    for i, (dtype, precision) in enumerate(modes):
        rows.append(fake.timing("nn.GRU", 8.0 * 3**i, dtype=dtype, precision=precision))
        rows.append(fake.timing("triton", 4.0, dtype=dtype, precision=precision))
    rows.append(fake.timing("resident", 4.0, dtype="fp16", precision="-"))
    cells = table_under(of_rows(results, fake, rows[::-1]), "### Main workload")
    assert [(row[0], row[1], row[2]) for row in cells[1:]] == [
        ("fp32", "nn.GRU", "8.00"),
        ("fp32", "triton", "4.00 (2.00x)"),
        ("tf32", "nn.GRU", "24.0"),
        ("tf32", "triton", "4.00 (6.00x)"),
        ("bf16", "nn.GRU", "72.0"),
        ("bf16", "triton", "4.00 (18.0x)"),
        ("fp16", "nn.GRU", "216"),
        ("fp16", "triton", "4.00 (54.0x)"),
        ("fp16", "resident", "4.00 (54.0x)"),
    ]


@pytest.mark.parametrize(
    "other",
    [
        {"precision": "tf32"},
        {"dtype": "bf16", "precision": "-"},
        {"work": "forward+backward"},
        {"steps": 61},
        {"batch": 65},
        {"hidden": 129},
        {"input": 85},
        {"layers": 1},
        {"group": "recurrence"},
    ],
    ids=str,
)
def test_a_peer_at_other_work_is_no_peer(results: Path, fake: SimpleNamespace, other: dict[str, Any]) -> None:
    text = of_rows(results, fake, [fake.timing("nn.GRU", 9.0, **other), fake.timing("triton", 1.0)])
    assert " 1.00 (no peer) " in text
    assert "9.00x" not in text
    assert below(text, "### Where nn.GRU wins") == "Not measured in this record."


def test_a_peer_of_another_record_is_no_peer(results: Path, fake: SimpleNamespace) -> None:
    store(results, "old.json", fake.gpu_record([fake.timing("nn.GRU", 9.0)], date="2026-11-01T00:00:00Z"))
    text = of_rows(results, fake, [fake.timing("triton", 1.0)])
    assert table_under(text, "### Main workload")[1][2] == "1.00 (no peer)"
    assert "9.00x" not in text


def test_a_peer_that_failed_is_no_peer(results: Path, fake: SimpleNamespace) -> None:
    rows = [fake.without_figures("failed", "no cuDNN here", path="nn.GRU"), fake.timing("triton", 1.0)]
    cells = table_under(of_rows(results, fake, rows), "### Main workload")
    assert [row[2] for row in cells[1:]] == ["failed: no cuDNN here", "1.00 (no peer)"]


def test_losses_are_listed_worst_first(results: Path, fake: SimpleNamespace) -> None:
    same = {"eager_ms": None, "graph_ms": None}
    rows = [
        fake.timing("nn.GRU", 0.949, hidden=16, **same),
        fake.timing("triton", 1.0, hidden=16, **same),
        fake.timing("resident", 0.5, hidden=16, **same),
        fake.timing("nn.GRU", 0.951, hidden=32, **same),
        fake.timing("triton", 1.0, hidden=32, **same),
        fake.timing("nn.GRU", 4.0, eager_ms=2.0, graph_ms=None),
        fake.timing("cooperative", 2.0, eager_ms=4.0),
        # A peer's own defeats are no losses of ours.
        fake.timing("torch.compile", 100.0, hidden=16, **same),
    ]
    text = of_rows(results, fake, rows)
    assert table_under(text, "### Where nn.GRU wins")[1:] == [
        ["layer, forward", "T=60 B=64 H=128", "fp32", "cooperative", "2.00x", "**0.500x**", "-", "cooperative 2.00x"],
        ["layer, forward", "T=60 B=64 H=16", "fp32", "triton", "**0.949x**", "-", "-", "resident 1.90x"],
    ]
    assert "2 of 4 compared" in text


def test_no_loss_is_said(results: Path, fake: SimpleNamespace) -> None:
    text = of_rows(results, fake, [fake.timing("nn.GRU", 2.0), fake.timing("triton", 1.0)])
    assert below(text, "### Where nn.GRU wins") == "Nowhere: no ratio is below 0.95 in 1 rows."


# Rows without figures.


@pytest.mark.parametrize("status", ["failed", "refused", "out of time"])
def test_a_row_without_figures_shows_its_reason(results: Path, fake: SimpleNamespace, status: str) -> None:
    # Figures that such a row may still hold are none.
    row = fake.timing("resident", 0.777, status=status, message="H | 128 *only*", peak_mib=77.7, error=7.7e-7)
    bare = {
        key: fake.timing("triton")[key]
        for key in ("group", "work", "path", "steps", "batch", "input", "hidden", "layers", "dtype", "precision")
    }
    rows = [fake.timing("nn.GRU", 2.0), row, bare | {"status": status, "message": None}]
    text = of_rows(results, fake, rows)
    cells = table_under(text, "### Main workload")
    assert cells[2] == ["fp32", "triton", status, "-", "-", "-", "-", "-"]
    assert cells[3] == ["fp32", "resident", rf"{status}: H \| 128 \*only\*", "-", "-", "-", "-", "-"]
    assert not re.search(r"0\.777|77\.7 \||7\.7e-07|2\.57", text)
    listed = below(text, "### Rows without a figure")
    assert (
        rf"- **resident**, {status}: H \| 128 \*only\* (1 of 3 rows): layer, forward, T=60 B=64 H=128 (fp32)" in listed
    )


def test_reasons_are_gathered(results: Path, fake: SimpleNamespace) -> None:
    rows = [
        fake.without_figures("refused", "too wide", path="resident", hidden=hidden, precision=precision)
        for hidden in (129, 256)
        for precision in ("fp32", "tf32")
    ]
    listed = below(of_rows(results, fake, rows), "### Rows without a figure").splitlines()
    assert listed[0] == (
        "- **resident**, refused: too wide (4 of 4 rows): layer, forward, T=60 B=64 H=129 (fp32, tf32); "
        "layer, forward, T=60 B=64 H=256 (fp32, tf32)"
    )


def test_a_measure_that_is_null_is_a_dash(results: Path, fake: SimpleNamespace) -> None:
    rows = [fake.timing("nn.GRU", 2.0, graph_ms=None), fake.timing("triton", 1.0, eager_ms=None)]
    cells = table_under(of_rows(results, fake, rows), "### Main workload")
    assert [row[2:5] for row in cells[1:]] == [["2.00", "2.50", "-"], ["1.00 (2.00x)", "-", "1.10 (no peer)"]]


# Time per step, and training.


def test_recurrence_beside_its_floor(results: Path, fake: SimpleNamespace) -> None:
    alone: dict[str, Any] = {"group": "recurrence", "input": None, "layers": 1}
    rows = [
        fake.timing("resident", 0.03, floor_ms=0.012, **alone),
        fake.timing("triton", 0.06, **alone),
        fake.timing("triton", 0.12, **alone | {"work": "backward"}),
        fake.without_figures("refused", "H", path="cooperative", **alone),
        fake.timing("triton", 9.0, **alone | {"layers": 2}),
        fake.timing("triton", 9.0, **alone | {"batch": 1}),
    ]
    assert table_under(of_rows(results, fake, rows), "### Time per step") == [
        ["work", "precision", "path", "GPU time, ms", "µs per step", "floor, µs per step", "times the floor", "error"],
        ["forward", "fp32", "triton", "0.0600", "1.00", "-", "-", "1.5e-07"],
        ["forward", "fp32", "resident", "0.0300", "0.500", "0.200", "2.50", "1.5e-07"],
        ["forward", "fp32", "cooperative", "refused: H", "-", "-", "-", "-"],
        ["backward", "fp32", "triton", "0.120", "2.00", "-", "-", "1.5e-07"],
    ]


def test_training_throughput(results: Path, fake: SimpleNamespace) -> None:
    step = {"group": "training step", "work": "step"}
    epoch = {"group": "epoch", "work": "epoch"}
    rows = [
        fake.timing("nn.GRU", 6.0, eager_ms=8.0, graph_ms=6.4, **step),
        fake.timing("resident", 2.0, eager_ms=4.0, graph_ms=2.0, **step),
        fake.timing("nn.GRU", None, eager_ms=7200.0, **epoch),
    ]
    of_steps, of_epochs = tables(below(of_rows(results, fake, rows), "### Training"))
    assert of_steps[0][6:8] == ["windows/s eager", "windows/s graph"]
    assert [row[2:8] for row in of_steps[1:]] == [
        ["nn.GRU", "6.00", "8.00", "6.40", "8,000", "10,000"],
        ["resident", "2.00 (3.00x)", "4.00 (2.00x)", "2.00 (3.20x)", "16,000", "32,000"],
    ]
    assert of_epochs[0][6] == "epochs/h eager"
    assert of_epochs[1][2:8] == ["nn.GRU", "-", "7,200", "-", "500", "-"]


# Several records.


def test_over_time_shows_a_regression(results: Path, fake: SimpleNamespace) -> None:
    for day, portable, resident in ((1, 1.0, 1.0), (2, 0.8, None), (3, 0.9, 1.04)):
        rows = [fake.timing("nn.GRU", 2.0), fake.timing("triton", portable), fake.timing("triton", 9.0, batch=1)]
        rows.append(
            fake.timing("resident", resident) if resident else fake.without_figures("failed", "wrong", path="resident")
        )
        store(results, f"{4 - day}.json", fake.gpu_record(rows, date=f"2026-12-0{day}T10:00:00+00:00"))
    text = written(results)
    assert table_under(text, "### Over time") == [
        ["work", "precision", "path", "2026-12-01", "2026-12-02", "2026-12-03", "change"],
        ["layer, forward", "fp32", "nn.GRU", "2.00", "2.00", "2.00", "+0.0 %"],
        ["layer, forward", "fp32", "triton", "1.00 (2.00x)", "0.800 (2.50x)", "0.900 (2.22x)", "**+12.5 %**"],
        ["layer, forward", "fp32", "resident", "1.00 (2.00x)", "failed", "1.04 (1.92x)", "+4.0 %"],
    ]
    assert table_under(text, "### Main workload")[2][2] == "0.900 (2.22x)"
    assert "docs/images/performance/test-card-history.png" in text
    assert [row[3] for row in table_under(text, "## Records")[1:]] == ["shown", "over time only", "over time only"]


@pytest.mark.parametrize(("lost", "shown"), [("failed", "failed"), (None, "-")])
def test_a_row_that_the_newest_record_lost_has_no_change(
    results: Path, fake: SimpleNamespace, lost: str | None, shown: str
) -> None:
    last = [fake.without_figures(lost, "wrong", path="triton")] if lost else []
    for day, rows in enumerate(([fake.timing("triton", 1.0)], [fake.timing("triton", 2.0)], last), start=1):
        store(results, f"{day}.json", fake.gpu_record(rows, date=f"2026-12-0{day}T10:00:00+00:00"))
    assert table_under(written(results), "### Over time")[1][3:] == ["1.00 (no peer)", "2.00 (no peer)", shown, "-"]


def test_records_of_one_day_are_told_apart(results: Path, fake: SimpleNamespace) -> None:
    for hour in (8, 17):
        store(results, f"{hour}.json", fake.gpu_record([fake.timing()], date=f"2026-12-01T{hour:02}:30:00+00:00"))
    assert table_under(written(results), "### Over time")[0][3:5] == ["2026-12-01 08:30", "2026-12-01 17:30"]


def test_cards_have_their_own_sections(results: Path, fake: SimpleNamespace) -> None:
    for card, time in (("Test Card B", 3.0), ("Test Card A", 5.0)):
        machine = fake.gpu_record([])["machine"] | {"card": card}
        store(results, f"{card[-1]}.json", fake.gpu_record([fake.timing("nn.GRU", time)], machine=machine))
    text = written(results)
    assert text.index("\n## Test Card A\n") < text.index("\n## Test Card B\n")
    assert table_under(text, "### Main workload")[1][2] == "5.00"
    assert "One record of this card so far" in below(text, "### Over time")
    assert "not measured yet" not in text.lower().split("## what the kernels compile to")[0]


def test_a_complete_record_goes_before_a_newer_incomplete_one(results: Path, fake: SimpleNamespace) -> None:
    store(results, "new.json", fake.gpu_record([fake.timing("nn.GRU", 7.0)], complete=False, date="2026-12-09T00:00Z"))
    alone = written(results)
    assert table_under(alone, "### Main workload")[1][2] == "7.00"
    assert "**Incomplete:**" in alone
    store(results, "old.json", fake.gpu_record([fake.timing("nn.GRU", 3.0)]))
    text = written(results)
    assert table_under(text, "### Main workload")[1][2] == "3.00"
    assert "**Incomplete:**" not in text
    assert ["GPU, Test Card, incomplete", "over time only"] in [row[1::2] for row in table_under(text, "## Records")]


# Correctness and checks.


def test_correctness_summary(results: Path, fake: SimpleNamespace) -> None:
    rows = [
        fake.correctness(),
        # No bias, so no gradient of one.
        fake.correctness(hidden=100, errors={"y": 1e-7, "db_hn": None, "dw_hh": 9e-6}, deterministic=False, bias=False),
        fake.correctness(steps=1, status="failed", message="dgi | off", errors={"y": 1e-7, "dgi": 3e-3}),
        fake.correctness(hidden=999, status="refused", message="H", errors={}, tolerance=None, deterministic=None),
        fake.correctness(precision="tf32", tolerance=2e-3),
        fake.correctness("resident", dtype="bf16", precision="-", tolerance=2e-2, status="refused", errors=None),
    ]
    text = of_rows(results, fake, [], correctness=rows)
    assert table_under(text, "### Correctness") == [
        [
            "kernel",
            "precision",
            "rows",
            "passed",
            "failed",
            "refused",
            "same bits again",
            "worst error",
            "tolerance",
            "of",
            "at",
        ],
        ["triton", "fp32", "4", "2", "1", "1", "2 of 3", "3.0e-03", "1.0e-05", "dgi", "T=1 B=3 H=128"],
        ["triton", "tf32", "1", "1", "0", "0", "1 of 1", "4.0e-07", "2.0e-03", "dgi", "T=7 B=3 H=128"],
        ["resident", "bf16", "1", "0", "0", "1", "0 of 0", "-", "-", "-", "-"],
    ]
    assert r"- portable, fp32, T=1 B=3 H=128, bias: dgi \| off" in text.splitlines()
    assert "Recorded as passed" not in text


@pytest.mark.parametrize("name", ["h_n", "db_hn"])
@pytest.mark.parametrize(("error", "shown"), [(2e-5, "2.0e-05"), (None, "nan"), (float("nan"), "nan")])
def test_a_pass_that_is_none_is_called_out(
    results: Path, fake: SimpleNamespace, error: float | None, shown: str, name: str
) -> None:
    text = of_rows(results, fake, [], correctness=[fake.correctness(errors={"y": 1e-7, name: error})])
    assert "**Recorded as passed with an error that is not within the tolerance**" in text
    assert f"- portable, fp32, T=7 B=3 H=128, bias: {shown} of 1.0e-05" in text.splitlines()
    assert table_under(text, "### Correctness")[1][7:10] == [shown, "1.0e-05", name]


def test_checks(results: Path, fake: SimpleNamespace) -> None:
    shape = {"steps": 5, "batch": 17, "hidden": 128, "dtype": "bfloat16", "precision": "-"}
    checks = [
        {"name": "graph capture", "kernel": "resident", "status": "passed", "message": None} | shape,
        {"name": "memcheck", "kernel": None, "status": "not available", "message": "no sanitizer"},
    ]
    assert table_under(of_rows(results, fake, [], checks=checks), "### Checks")[1:] == [
        ["graph capture", "resident", "bf16", "T=5 B=17 H=128", "passed", "-"],
        ["memcheck", "-", "all", "-", "not available", "no sanitizer"],
    ]


def test_what_there_was_no_time_for_is_said(results: Path, fake: SimpleNamespace) -> None:
    left = [fake.correctness("resident", status="out of time")] * 2
    left.append({"name": "racecheck", "kernel": "triton", "status": "out of time", "message": "late"})
    missing = {"copy_gb_s": "failed: OutOfMemoryError"}
    text = of_rows(results, fake, [], left_out=left, missing_facts=missing, correctness=[fake.correctness()])
    assert "**No time was left for** correctness of resident (2), racecheck of portable (1)." in text.splitlines()
    assert "- **Facts not measured:** copy_gb_s: failed: OutOfMemoryError" in text.splitlines()
    assert table_under(text, "### Correctness")[1][2] == "1"


# Where figures come from, and that there are none without a record.


def test_every_table_says_where_it_comes_from(results: Path, fake: SimpleNamespace) -> None:
    rows = [fake.timing("nn.GRU", 1.0), fake.timing("triton", 2.0), fake.timing(group="epoch", work="epoch")]
    rows += [fake.timing("triton", 2.0, work="forward+backward")]
    text = of_rows(results, fake, rows, correctness=[fake.correctness()])
    card = text[text.index("## Test Card") : text.index("## What the kernels compile to")]
    lines = card.splitlines()
    ends = [i for i, line in enumerate(lines) if line.startswith("|") and not lines[i + 1].startswith("|")]
    assert len(ends) == 5
    assert all(lines[i + 1 : i + 3] == ["", UNDER] for i in ends)
    for line in (
        "- **Compute capability:** 9.9",
        "- **Memory:** 11.5 GiB",
        "- **CPU:** Test CPU",
        "- **Facts:** copy_gb_s 1,234, launch_us 2.50, step_floor_us mufu 128 0.200",
        "- **Record:** 2026-12-01 10:20 UTC, `python -m benchmarks.gpu --out DIR`, 321 s",
    ):
        assert line in lines


def test_no_record_at_all(results: Path) -> None:
    out = results.parents[1] / "PERFORMANCE.md"
    paths, _ = write_performance(results, out)
    assert paths == [out]
    assert not (out.parent / "docs").exists()
    text = out.read_text(encoding="utf-8")
    for heading in GPU_HEADINGS:
        assert below(text, heading) == "Not measured yet."
    for heading in ("## On a GPU", "## What the kernels compile to", "## On a CPU"):
        assert below(text, heading).startswith("Not measured yet.")
    assert below(text, "## Records") == "None."
    assert "|" not in text
    # The description of the main workload and its like apart, there is no figure.
    assert not re.search(r"\d(\.\d+)?( ?ms|x\b| MiB)", text)


def test_sections_are_the_same_with_and_without_a_record(results: Path, fake: SimpleNamespace) -> None:
    text = of_rows(results, fake, [])
    assert [line for line in text.splitlines() if line.startswith("### ")] == GPU_HEADINGS
    for heading in GPU_HEADINGS[:-1]:
        assert below(text, heading).startswith("Not measured")
    assert "![" not in text


def test_trial_on_a_cpu_is_left_out_and_named(results: Path, fake: SimpleNamespace) -> None:
    rows = [fake.timing("nn.GRU", 2.0), fake.timing("triton", 1.0)]
    machine = fake.gpu_record([])["machine"] | {"card": None}
    text = of_rows(results, fake, rows, kind="cpu-smoke", machine=machine)
    assert below(text, "### Main workload") == "Not measured yet."
    assert "There are records, but" not in text
    ((_, *rest),) = table_under(text, "## Records")[1:]
    assert rest == ["-", "-", "left out: a trial of the GPU benchmarks on a CPU, which measures nothing"]


def test_compiled_sizes(results: Path, fake: SimpleNamespace) -> None:
    rows = [
        fake.compiled(),
        fake.compiled("backward", config={"block_batch": 16, "num_warps": 8}, spilled=24, problem="spills 24 bytes"),
        fake.compiled(hidden=256, registers=77),
        fake.compiled(hidden=256, registers=88, precision="tf32"),
        fake.compiled(storage="bf16", save=False, config={"block_batch": 4, "padded": 128}),
        fake.compiled(storage="bf16", packed=True, registers=66),
        fake.compiled(arch="sm_80", registers=200),
        fake.compiled(arch="sm_80", error="PTXASError", registers=0, problem="does not compile: PTXASError"),
    ]
    store(results, "resources-triton-8.8.8.json", fake.resources_record(rows))
    text = written(results)
    by_arch, main_rows, others = tables(below(text, "## What the kernels compile to"))
    assert by_arch[1:] == [["sm_90", "6", "123", "1", "1"], ["sm_80", "2", "200", "0", "1"]]
    assert main_rows[1:] == [
        ["forward", "fp32", "128", "8", "4", "123", "0", "45,678", "99,999", "321", "9", "none"],
        ["backward", "fp32", "128", "16", "8", "123", "24", "45,678", "99,999", "321", "9", "spills 24 bytes"],
        ["forward, inference", "bf16", "128", "4", "-", "123", "0", "45,678", "99,999", "321", "9", "none"],
        ["forward, packed", "bf16", "128", "8", "4", "66", "0", "45,678", "99,999", "321", "9", "none"],
    ]
    assert [row[2:6] for row in others[1:]] == [["256", "8", "4", "77"]]
    assert "triton 8.8.8, ptxas 77.7; precision as in the table" in text
    assert "`python -m bigru.kernels.resources --json benchmarks/results/resources-triton-8.8.8.json`" in text


def test_newest_of_the_other_records(results: Path, fake: SimpleNamespace) -> None:
    for triton in ("3.9.0", "3.10.0"):
        store(results, f"resources-triton-{triton}.json", fake.resources_record(triton=triton))
    store(results, "cpu-2026-12-01.json", fake.cpu_record())
    store(results, "cpu-2026-11-01.json", fake.cpu_record(datetime="2026-11-01T10:00:00"))
    text = written(results)
    assert "triton 3.10.0, ptxas" in text
    assert "triton 3.9.0, ptxas" not in text
    uses = {re.sub(r"\[(.*)\].*", r"\1", row[0]): row[3] for row in table_under(text, "## Records")[1:]}
    assert uses == {
        "resources-triton-3.10.0.json": "shown",
        "resources-triton-3.9.0.json": "left out: older",
        "cpu-2026-12-01.json": "shown",
        "cpu-2026-11-01.json": "left out: older",
    }


def test_cpu_figures(results: Path, fake: SimpleNamespace) -> None:
    store(results, "cpu-2026-12-01.json", fake.cpu_record())
    text = written(results)
    assert table_under(text, "## On a CPU")[1:] == [
        ["layer forward fp32 B=64 H=128", "40.0", "50.0", "1.26x", "1.20 to 1.30"]
    ]
    assert (
        "<sub>Test CPU, 1 of 2 cores used, 2026-12-01; python 3.12.1, torch 9.9.9, numpy 2.4.6; precision as in the "
        "table; `OMP_NUM_THREADS=1 python -m pytest benchmarks --benchmark-json benchmarks/results/cpu-2026-12-01.json`"
        "</sub>"
    ) in text
    assert below(text, "### Main workload") == "Not measured yet."


def test_pytest_benchmark_on_a_gpu_is_no_cpu_record(results: Path, fake: SimpleNamespace) -> None:
    store(results, "cpu.json", fake.cpu_record(card="Test Card"))
    text = written(results)
    assert below(text, "## On a CPU").startswith("Not measured yet.")
    assert "left out: pytest-benchmark's figures on Test Card" in text


# What is broken.


@pytest.mark.parametrize(
    ("record", "message"),
    [
        pytest.param([], "expected a JSON object, got list", id="no object"),
        pytest.param({"a": 1}, "neither schema", id="unknown"),
        pytest.param({"schema": 2}, "schema 2 is not known", id="schema"),
        pytest.param({"kind": "tpu"}, "kind should be 'gpu' or 'cpu-smoke', got 'tpu'", id="kind"),
        pytest.param({"date": "yesterday"}, "date should be a date as in ISO 8601", id="date"),
        pytest.param({"machine": {"card": None}}, "machine: card should be a string", id="no card"),
        pytest.param({"timings": [{"gpu_ms": -1.0}]}, r"timings\[0\]: gpu_ms should be more than 0", id="negative"),
        pytest.param({"timings": [{"eager_ms": "1"}]}, r"timings\[0\]: eager_ms should be a number", id="string"),
        pytest.param({"timings": [{"status": "ok"}]}, r"timings\[0\]: status should be 'measured' or", id="status"),
        pytest.param({"timings": [{"dtype": "int8"}]}, "dtype should be fp32, bf16 or fp16", id="dtype"),
        pytest.param({"timings": [{"precision": "-"}]}, "precision should be 'fp32' or 'tf32'", id="precision"),
        pytest.param({"timings": [{"batch": 1.5}]}, "batch should be a whole number", id="batch"),
        pytest.param({"timings": [{"quartiles": {"gpu_ms": [1]}}]}, "gpu_ms should be two numbers", id="quartiles"),
        pytest.param({"timings": [{}, {}]}, r"timings\[1\]: a second row of portable for the same work", id="twice"),
        pytest.param({"correctness": [{"errors": {"y": "0"}}]}, "errors: y should be a number", id="error"),
        pytest.param({"correctness": [{"status": "skipped"}]}, r"correctness\[0\]: status should be", id="correctness"),
    ],
)
def test_broken_records_are_named(results: Path, fake: SimpleNamespace, record: Any, message: str) -> None:
    if isinstance(record, dict) and "a" not in record:
        record = fake.gpu_record([]) | record
        record["timings"] = [fake.timing("triton", **row) for row in record["timings"]]
        record["correctness"] = [fake.correctness(**row) for row in record["correctness"]]
    store(results, "test-card.json", record)
    with pytest.raises(RunError, match=rf"test-card\.json: .*{message}"):
        read_results(results)
    store(results, "cpu-2026-12-01.json", fake.cpu_record())
    read = read_results(results)
    assert list(read.broken) == ["test-card.json"]
    assert (len(read.gpu), len(read.cpu)) == (0, 1)


def test_a_missing_entry_is_named(results: Path, fake: SimpleNamespace) -> None:
    record = fake.gpu_record([fake.timing()])
    del record["timings"][0]["graph_ms"]
    store(results, "test-card.json", record)
    with pytest.raises(RunError, match=r"timings\[0\]: graph_ms is missing"):
        read_results(results)


def test_broken_record_beside_sound_ones(
    results: Path, fake: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    (results / "test-card-2026-12-02.json").write_text('{"schema": 1, "ki')
    store(results, "cpu-2026-12-01.json", fake.cpu_record())
    out = results.parents[1] / "PERFORMANCE.md"
    assert main(["performance", "--results", str(results), "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(out)]
    assert re.fullmatch(
        r"benchmarks\.report: .*test-card-2026-12-02\.json: broken, left out: not valid JSON.*\n", printed.err
    )
    text = out.read_text(encoding="utf-8")
    assert "Not measured yet. There are records, but none can be used: see [Records](#records)." in text
    assert re.search(r"\| \[test-card-2026-12-02\.json\]\(.*\) .*\*\*broken\*\*, left out: not valid JSON", text)


def test_nothing_but_broken_records_leaves_the_document(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (results / "test-card.json").write_text("{")
    out = results.parents[1] / "PERFORMANCE.md"
    out.write_text("as it was")
    assert main(["performance", "--results", str(results), "--out", str(out)]) == 2
    assert out.read_text() == "as it was"
    assert "test-card.json: not valid JSON" in capsys.readouterr().err


# The command.


def test_command_and_a_run_of_that_name(
    results: Path, make_run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(results.parents[1])
    assert main(["performance"]) == 0
    assert capsys.readouterr().out == "PERFORMANCE.md\n"
    make_run().rename("performance")
    monkeypatch.setattr("bigru.report.document.figures.learning_curves", lambda record: None)
    monkeypatch.setattr("bigru.report.document.figures.forecasts", lambda samples, centre: None)
    for name in ("horizon", "joints"):
        monkeypatch.setattr(f"bigru.report.document.breakdown_figures.{name}", lambda record: None)
    assert main(["./performance"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("results_bigru.md")


def test_folder_of_records_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["performance", "--results", str(tmp_path / "nowhere"), "--out", str(tmp_path / "new.md")]) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
    assert not (tmp_path / "new.md").exists()


def test_document_does_not_depend_on_where_the_command_runs(
    results: Path, fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = of_rows(results, fake, [fake.timing("nn.GRU", 2.0), fake.timing("triton", 1.0)])
    monkeypatch.chdir(results)
    write_performance(Path(), Path("../../PERFORMANCE.md"))
    assert Path("../../PERFORMANCE.md").read_text(encoding="utf-8") == text
    assert str(results) not in text


def test_markdown_is_well_formed(results: Path, fake: SimpleNamespace) -> None:
    rows = [
        fake.timing(path, time, batch=batch, work=work)
        for path, time in (("nn.GRU", 1.0), ("triton", 2.0))
        for batch in (1, 64)
        for work in ("forward", "forward+backward")
    ]
    rows.append(fake.without_figures("failed", "a | b\n\nc", path="odd | path"))
    for day in (1, 2):
        machine = fake.gpu_record([])["machine"] | {"card": "Test | Card_*"}
        record = fake.gpu_record(rows, machine=machine, date=f"2026-12-0{day}T00:00Z", correctness=[fake.correctness()])
        store(results, f"card-{day}.json", record)
    store(results, "cpu-1.json", fake.cpu_record())
    store(results, "resources-triton-1.json", fake.resources_record())
    (results / "bad | name.json").write_text("{")
    text = written(results)
    assert text.endswith("|\n")
    assert "\n\n\n" not in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, rule, *body = block.splitlines()
        assert body, block
        assert re.fullmatch(r"\|(:?-+:?\|)+", rule), block
        # An escaped bar is text, not the end of a cell.
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in (head, rule, *body)}) == 1, block
    lines = ["", *text.split("\n"), ""]
    for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
        if line.startswith(("#", "![", "<sub>")):
            assert before == after == "", line
    for image in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (results.parents[1] / image).is_file()
