"""What the tests of the document share: its headings, and how its text and tables are read."""

import json
import re

from bigru.report import comparison, document
from bigru.report.record import read_run

STAMP, LATER = "20261123_224500", "20261124_101112"
PLOTS = ("learning_curves", "forecasts", "horizon", "joints")

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


def report(run):
    """Returns the document of a folder of runs, without drawing its pictures."""
    read_run(run)
    return document.text(*comparison.runs_in(run.parent), run.parent)


def headings(text):
    return [line for line in text.splitlines() if line.startswith("#")]


def tables(text):
    """The cells of each table, rules left out."""
    found = re.findall(r"(?:^\|.*\n)+", f"{text}\n", re.MULTILINE)
    # An escaped bar is text, not the end of a cell.
    cells = [[re.split(r"(?<!\\)\|", line[1:].rstrip("|")) for line in table.splitlines()] for table in found]
    return [[[cell.strip() for cell in line] for line in (lines[0], *lines[2:])] for lines in cells]


def table_under(text, heading):
    return tables(text[text.index(f"\n{heading}\n") :])[0]


def edit_summary(run, **changes):
    path = run / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
