"""The document of a run against the published one, literally, and what it says beyond that."""

import ast
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from report.documents import (
    HEAD_HEADINGS,
    LATER,
    PUBLISHED_HEAD,
    RUN_HEADINGS,
    STAMP,
    edit_summary,
    headings,
    report,
    table_under,
    tables,
)

import bigru.report
from bigru.report.__main__ import main

PUBLISHED_RUN_OPENING = """\
## Run at 2025-05-22 02:39:17

- **Train batch size:** 64

### Epoch-wise metrics

|   epoch |   tr_mpjpe |   va_mpjpe |   tr_ade |   va_ade |   tr_fde |   va_fde |
|--------:|-----------:|-----------:|---------:|---------:|---------:|---------:|
|       1 |      2.200 |      9.329 |    0.052 |    0.380 |    0.059 |    0.349 |
|       2 |      3.297 |      4.596 |    0.110 |    0.274 |    0.116 |    0.266 |

### Test Results

- **MPJPE**: 1.145
- **ADE**:   0.051
- **FDE**:   0.058

### Input Modalities Used

- **Hands**: True
- **Gaze**: False
- **Object BBoxes**: False
- **Surrogate BBoxes**: False

## Learning curves

![Performance curves](plots/20250522_023917_bigru_learning_curves.png)
"""


def metric_row(epoch, *values):
    names = ("tr_mpjpe", "va_mpjpe", "tr_ade", "va_ade", "tr_fde", "va_fde", "va_joint_error", "va_joint_error_px")
    return {
        "epoch": epoch,
        "tr_loss": 0.1,
        "va_loss": 0.1,
        "lr": 1e-3,
        **dict(zip(names, (*values, 0.2, 140.0), strict=True)),
    }


def test_published_document_is_reproduced(make_run):
    rows = [
        metric_row(1, 2.2, 9.329, 0.052, 0.38, 0.059, 0.349),
        metric_row(2, 3.297, 4.596, 0.11, 0.274, 0.116, 0.266),
    ]
    test = {"mpjpe": 1.145, "ade": 0.051, "fde": 0.058, "joint_error": 0.1, "joint_error_px": 70.0, "windows": 47}
    text = report(make_run("20250522_023917", metrics=rows, summary={"test": test}))
    assert text.startswith(f"{PUBLISHED_HEAD}\n<!-- run 20250522_023917 -->\n\n{PUBLISHED_RUN_OPENING}\n")
    assert headings(text) == [*HEAD_HEADINGS, "## Run at 2025-05-22 02:39:17", *RUN_HEADINGS]
    assert text.endswith("\n<!-- end of run 20250522_023917 -->\n")


def test_every_epoch_has_its_row_with_three_decimals(make_run):
    run = make_run(epochs=37)
    header, *rows = table_under(report(run), "### Epoch-wise metrics")
    stored = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert header == ["epoch", "tr_mpjpe", "va_mpjpe", "tr_ade", "va_ade", "tr_fde", "va_fde"]
    assert rows == [[str(row["epoch"]), *(f"{row[name]:.3f}" for name in header[1:])] for row in stored]


def test_markdown_is_well_formed(make_run):
    make_run()
    # Names with what Markdown reads as markup.
    run = make_run(LATER, summary={"total_params": 9_000_000})
    edit_summary(run, baselines={"odd | *name*": json.loads((run / "summary.json").read_text())["test"]})
    text = report(run)
    assert r"| odd \| \*name\* |" in text
    lines = ["", *text.split("\n")]
    assert "----" not in [line.strip() for line in lines]
    assert "\n\n\n" not in text
    kinds = {"heading": r"#", "table": r"\|", "list": r"- ", "rule": r"---$", "image": r"!\[", "comment": r"<!--"}
    for before, line, after in zip(lines, lines[1:], [*lines[2:], ""], strict=False):
        kind = next((kind for kind, pattern in kinds.items() if re.match(pattern, line)), None)
        for neighbour in (before, after):
            together = kind in ("table", "list") and re.match(kinds[kind], neighbour)
            assert kind is None or neighbour == "" or together, f"{line!r} touches {neighbour!r}"
    for table in tables(text):
        assert len({len(row) for row in table}) == 1, table


def test_tables_of_errors(make_run):
    text = report(make_run())
    measures = ["MPJPE (published)", "ADE", "FDE", "per-joint error", "per-joint error (px)"]
    assert table_under(text, "### True per-joint error") == [
        ["Forecast", *measures],
        ["this network", "0.912", "0.036", "0.042", "0.101", "70.4"],
        ["repeat last frame", "1.234", "0.040", "0.061", "0.141", "98.4"],
        ["constant velocity", "2.346", "0.035", "0.102", "0.241", "168.4"],
    ]
    assert table_under(text, "### By frame rate") == [
        ["fps", "horizon (s)", "windows", *measures],
        ["23", "2.61", "61", "1.100", "0.050", "0.060", "0.120", "84.0"],
        ["59", "1.02", "62", "0.700", "0.020", "0.030", "0.080", "56.0"],
    ]
    assert "Windows whose frame rate is assumed, as documented for the participant" in text
    assert "clips' timestamps tell none: 7 at 59 fps." in text
    assert table_under(text, "### By subtask") == [
        ["subtask", "windows", *measures],
        ["BHO", "100", "1.000", "0.040", "0.050", "0.110", "77.0"],
        ["THP", "23", "0.500", "0.010", "0.020", "0.060", "42.0"],
    ]
    assert table_under(text, "### Error against horizon") == [
        ["Forecast", "frame 1", "frame 15", "frame 30", "frame 45", "frame 60"],
        ["this network", "35.6", "43.8", "52.5", "61.3", "70.0"],
        ["repeat last frame", "9.3", "42.0", "77.0", "112.0", "147.0"],
        ["constant velocity", "4.7", "70.0", "140.0", "210.0", "280.0"],
    ]
    assert "frame 60 is 2.61 s ahead at 23 fps, 1.02 s ahead at 59 fps." in text
    # 0.05 + 0.05 x = 0.01 + 0.2 x at x = 4/15, frame 16; and 0.4 x at 1/7, between frames 8 and 9.
    as_good = "is at least as good as this network at frames"
    assert f'"repeat last frame" {as_good} 1 to 1' in text
    assert f'"constant velocity" {as_good} 1 to 8 and is beaten from frame 9 on.' in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, 'beats "still" on every measure.', id="better"),
        pytest.param({"ade": 0.9}, 'loses to "still" on ADE (0.900 against 0.500).', id="worse on one"),
        pytest.param(
            {"ade": 0.9, "joint_error_px": 600.0},
            'loses to "still" on ADE (0.900 against 0.500) and per-joint error (px) (600.0 against 500.0).',
            id="worse on two",
        ),
        pytest.param({"fde": 0.50049}, 'is level with "still" on FDE (0.500 against 0.500).', id="level as printed"),
        pytest.param({"fde": math.nan}, 'cannot be compared with "still" on FDE (nan against 0.500).', id="nan"),
    ],
)
def test_verdict_is_honest(make_run, changes, expected):
    measures = ("mpjpe", "ade", "fde", "joint_error")
    still = dict.fromkeys(measures, 0.5) | {"joint_error_px": 500.0, "windows": 9}
    test = dict.fromkeys(measures, 0.25) | {"joint_error_px": 250.0, "windows": 9} | changes
    text = report(make_run(summary={"test": test, "baselines": {"still": still}}))
    assert f"\n\nThis network {expected}\n\n" in text


def test_protocol_names_what_is_on(make_run):
    changes = {"mask_missing": False, "split": "time", "stride": 5, "resample": 23.0, "centre": "last"}
    text = report(make_run(config={"data": changes, "model": {"residual": True}}, epochs=2))
    expected = """
## Beyond the published report

**Protocol:** as published, but for:

- each clip split in time order, not by participant
- windows of 60 observed and 60 predicted frames, 5 apart
- clips resampled to 23.0 frames per second
- hands centred on the last observed frame, not on each frame's own wrists
- displacements from the last observed frame predicted, not the hands

### True per-joint error
"""
    assert expected in text
    text = report(make_run(LATER, epochs=2))
    assert "but for:\n\n- missing hands left out of the loss and of the per-joint error\n\n###" in text
    text = report(make_run("20261125_000000", config={"data": {"mask_missing": False}}, epochs=2))
    assert "\n\n**Protocol:** as published.\n\n" in text


def test_details(make_run):
    run = make_run(epochs=30, config={"optim": {"batch_size": 32}, "data": {"mask_missing": False}})
    text = report(run)
    best = json.loads((run / "metrics.jsonl").read_text().splitlines()[19])
    for line in (
        "- **Train batch size:** 32",
        "- **Epochs run:** 30, stopped early: no gain of 0.001 in validation MPJPE in 20 epochs; the best epoch is "
        "that of the least MPJPE, however small its gain",
        f"- **Best epoch:** 20, validation MPJPE (published) {best['va_mpjpe']:.3f}, true per-joint error "
        f"{best['va_joint_error']:.3f} ({best['va_joint_error_px']:.1f} px)",
        "- **Versions:** bigru 0.1.0, python 3.11.7, torch 2.13.0+cpu, triton none, numpy 2.4.6",
        "- **Windows:** train 1,391, val 153, test 123",
        "- **Clips skipped:** short 300, unreadable 2",
        "- **Time per epoch:** 1.23 s (median)",
        "- **Training speed:** 1,127 windows/s (median)",
        "- **Options, model:** `hidden_size=128 num_layers=2 dropout=0.2 residual=False`",
        "- **Run again with:** `python -m bigru.train --optim.epochs 120`",
        f"- **Report again with:** `python -m bigru.report {STAMP}`, in this document's folder",
    ):
        assert line in text.splitlines(), line
    assert "joints of missing hands count with the zeros" in text


def test_nan_metrics_are_printed(make_run):
    rows = [metric_row(1, *[math.nan] * 6), metric_row(2, 1.0, math.nan, 1.0, math.nan, 1.0, math.inf)]
    rows[1]["va_fde"] = None
    text = report(make_run(metrics=rows))
    assert table_under(text, "### Epoch-wise metrics")[1:] == [
        ["1", *["nan"] * 6],
        ["2", "1.000", "nan", "1.000", "nan", "1.000", "nan"],
    ]


@pytest.mark.slow
def test_commands_need_no_notebooks_backend_and_do_not_import_tensorboard():
    commands = "bigru.train, bigru.predict, bigru.compare, bigru.data.__main__, bigru.report.__main__"
    done = subprocess.run(
        [sys.executable, "-c", f"import {commands}, bigru.report.clip, sys; print('tensorboard' in sys.modules)"],
        env=os.environ | {"MPLBACKEND": "module://no_such_package.backend_inline"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


def test_an_install_without_the_benchmarks_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "benchmarks.report", None)
    assert main(["performance"]) == 2
    message = "bigru.report: the installed package lacks the benchmarks: run this in a checkout\n"
    assert capsys.readouterr() == ("", message)


def test_the_document_is_made_without_the_rest_of_the_package():
    own = ("bigru.report", "bigru.files", "bigru.layout", "bigru.command")
    allowed = {*sys.stdlib_module_names, "numpy", "matplotlib", "tabulate"}
    for path in Path(bigru.report.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert "matplotlib.pyplot" not in names, path.name
            # The commands read settings too.
            if path.name not in ("__main__.py", "compare.py"):
                assert all(name.startswith(own) or name.split(".")[0] in allowed for name in names), (path.name, names)
