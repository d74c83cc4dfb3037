"""Finished runs side by side: what `python -m bigru.compare RUN RUN ...` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bigru.command import ending
from bigru.config import OptionalPath, expand_home
from bigru.files import ESCAPE, write_atomically
from bigru.report import figures
from bigru.report.comparison import comparison
from bigru.report.comparison_figures import comparison as comparison_figure
from bigru.report.markdown import blocks
from bigru.report.record import RunError, read_run

DOCUMENT, PICTURE = "comparison.md", "comparison.png"


@dataclass(frozen=True)
class Arguments:
    """Compare finished runs: prints a table, and writes it with a plot to comparison.md and comparison.png."""

    runs: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN ...", help_behavior_hint="")]]
    """Folders of finished runs, two or more."""
    out: OptionalPath = None
    """Folder for the two files; default: the one that the first run is in."""

    def __post_init__(self) -> None:
        expand_home(self)


@ending("compare")
def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns its exit code: 0, or 2 where a run cannot be compared and nothing is written."""
    arguments = tyro.cli(Arguments, prog="python -m bigru.compare", args=argv)
    compare(arguments.runs, arguments.out)
    return 0


def compare(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Prints the table of runs and writes it, with a picture; returns the document's path.

    Raises:
        RunError: fewer than two runs, one of them twice, or one that is no finished run.
    """
    if len(runs) < 2:
        raise RunError(f"runs: expected two or more folders, got {len(runs)}")
    records = [read_run(run) for run in runs]
    if len({record.folder for record in records}) < len(records):
        raise RunError(f"runs: expected each run once, got {', '.join(map(str, runs))}")
    out = records[0].folder.parent if out is None else out
    text = comparison(records, PICTURE)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / PICTURE, figures.png(comparison_figure(records)))
    write_atomically(out / DOCUMENT, (blocks("# Comparison of runs", text) + "\n").encode(errors=ESCAPE))
    print(text, str(out / DOCUMENT), sep="\n\n")
    return out / DOCUMENT
