"""What the tests of the document share: its headings, and how its text and tables are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from bigru.report import comparison, document
from bigru.report.record import read_run

STAMP, LATER = "20261123_224500", "20261124_101112"
PLOTS = ("learning_curves", "forecasts", "horizon", "joints")
MakeRun = Callable[..., Path]

# Typed from the published document, the parts of which must not drift.
PUBLISHED_HEAD = """\
# BIGRU Performance

- **Total params:** 0.48 M

## Model parameter breakdown

| Module       |   Params (M) |
|:-------------|-------------:|
| encoder.core |        0.461 |
| pose_head.0  |        0.001 |
| pose_head.2  |        0.022 |
"""

HEAD_HEADINGS = ["# BIGRU Performance", "## Model parameter breakdown"]
RUN_HEADINGS = [
    "### Epoch-wise metrics",
    "### Test Results",
    "### Input Modalities Used",
    "## Learning curves",
    "## Beyond the published report",
    "### True per-joint error",
    "### Error against horizon",
    "### Error per joint",
    "### By frame rate",
    "### By subtask",
    "### Forecasts",
    "### Run details",
]


def report(run: Path) -> str:
    """Returns the document of a folder of runs, without drawing its pictures."""
    read_run(run)
    return document.text(*comparison.runs_in(run.parent), run.parent)


def headings(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("#")]


def table_under(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading, rule left out."""
    lines = text[text.index(f"\n{heading}\n") :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


def edit_summary(run: Path, **changes: object) -> None:
    path = run / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
