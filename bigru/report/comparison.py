"""Sets runs side by side: one table, and what must be known to read it fairly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bigru.report.markdown import blocks, code, plain, table
from bigru.report.record import METRICS, RunError, RunRecord, Scores, cells, read_run

# Settings that are named in columns of their own, or that change no figure.
NOT_COMPARED = {"gaze", "objects", "surrogate", "out", "index", "strict", "cache", "no_cache", "device", "threads"}
NOT_FINISHED = "not finished"


def runs_in(folder: Path) -> tuple[list[RunRecord], dict[str, str]]:
    """Returns the finished runs of a folder in the order of their names, and why others were left out, by name."""
    records, left_out = [], {}
    for run in sorted(path.parent for path in folder.glob("*/config.json")):
        if not (run / "summary.json").is_file():
            left_out[run.name] = NOT_FINISHED
            continue
        try:
            records.append(read_run(run))
        except RunError as error:
            left_out[run.name] = str(error).removeprefix(f"{run.resolve()}/")
    return records, left_out


def names(records: Sequence[RunRecord]) -> list[str]:
    """Returns each run's name: its folder's, after that of the folder it is in where two share one."""
    count = Counter(record.stamp for record in records)
    return [
        record.stamp if count[record.stamp] == 1 else f"{record.folder.parent.name}/{record.stamp}"
        for record in records
    ]


def inputs(record: RunRecord) -> str:
    """Returns the network's inputs, such as `hands + gaze`."""
    return " + ".join(name for name, on in record.modalities.items() if on)


def comparison(records: Sequence[RunRecord], picture: str) -> str:
    """Returns a table of runs, what makes it fair or not, and a picture; in Markdown.

    Args:
        records: the runs, in the order of the rows; at least one.
        picture: path of the picture, as seen from the document.
    """
    fair = same_test_windows(records)
    unfair = (
        "**These runs were not all scored on the same test windows, in the same coordinates:** the figures of the "
        "trivial forecasts differ from run to run. Compare a run with its own baselines, in its own section, not with "
        "another row."
    )
    return blocks(
        f"{len(records)} runs{'; their lowest figure of each error in bold' if fair else ''}. Lengths in centred "
        "units, or in pixels (px) of the 1728 x 972 image.",
        *([] if fair else [unfair]),
        _table(records, fair),
        f"![Comparison of runs]({picture})",
    )


def _table(records: Sequence[RunRecord], fair: bool) -> str:
    settings = differing_settings(records)
    figures = [cells(record.test) for record in records]
    lowest = [_lowest(column) for column in zip(*figures, strict=True)]
    rows = []
    for name, record, differing, values in zip(names(records), records, settings, figures, strict=True):
        shown = [
            f"**{value}**" if value == least and fair else value for value, least in zip(values, lowest, strict=True)
        ]
        epochs = f"{record.best_epoch} of {len(record.metrics['epoch'])}"
        speed = f"{record.timing['epoch_s_median']:,.2f}"
        rows.append([code(name), inputs(record), differing, epochs, f"{record.test.windows:,}", *shown, speed])
    for name, scores in records[0].baselines.items() if fair else ():
        rows.append([plain(name), "", "", "", f"{scores.windows:,}", *cells(scores), ""])
    headers = ["run", "inputs", "settings that differ", "best epoch", "test windows"]
    headers += [*(metric.label for metric in METRICS), "s per epoch"]
    if not any(settings):
        headers, rows = [*headers[:2], *headers[3:]], [[*row[:2], *row[3:]] for row in rows]
    return table(headers, rows, left=len(headers) - len(METRICS) - 3)


def _lowest(figures: Sequence[str]) -> str:
    """Returns the least of figures as printed; empty where none is finite."""
    return min((f for f in figures if f not in ("nan", "inf")), key=lambda f: float(f.replace(",", "")), default="")


def differing_settings(records: Sequence[RunRecord]) -> list[str]:
    """Returns each run's settings that are not the same in all runs that have them, as `name=value` in code."""
    flat: list[dict[str, Any]] = [
        {name: value for group in record.config.values() for name, value in group.items() if name not in NOT_COMPARED}
        for record in records
    ]
    every = dict.fromkeys(name for settings in flat for name in settings)
    differing = [name for name in every if len({repr(settings[name]) for settings in flat if name in settings}) > 1]
    chosen = [" ".join(f"{name}={settings[name]}" for name in differing if name in settings) for settings in flat]
    return [code(text) if text else "" for text in chosen]


def same_test_windows(records: Sequence[RunRecord]) -> bool:
    """Returns whether all runs were scored on the same windows: then the trivial forecasts scored alike."""
    first = records[0].baselines
    return all(
        record.baselines.keys() == first.keys()
        and all(_alike(record.baselines[name], scores) for name, scores in first.items())
        for record in records
    )


def _alike(one: Scores, other: Scores) -> bool:
    # Sums on other hardware, or in another order, differ in the last digits.
    same = (np.isclose(metric.of(one), metric.of(other), rtol=1e-4, equal_nan=True) for metric in METRICS)
    return one.windows == other.windows and all(same)
