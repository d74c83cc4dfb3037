"""Several runs side by side: one table, and what must be known to read it fairly."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bigru.report.fields import RunError
from bigru.report.markdown import blocks, code, plain, table
from bigru.report.record import MEASURES, RunRecord, Scores, read_run

# Settings that are named in columns of their own, or that change no figure.
NOT_COMPARED = {"gaze", "objects", "surrogate", "out", "index", "strict", "cache", "no_cache", "device"}


def runs_in(folder: Path) -> tuple[list[RunRecord], dict[str, str]]:
    """The finished runs of a folder in the order of their names, and the others' names with the reason."""
    records, left_out = [], {}
    for run in sorted(path.parent for path in folder.glob("*/config.json")):
        if not (run / "summary.json").is_file():
            left_out[run.name] = "not finished"
            continue
        try:
            records.append(read_run(run))
        except RunError as error:
            left_out[run.name] = str(error).removeprefix(f"{run.resolve()}/")
    return records, left_out


def names(records: Sequence[RunRecord]) -> list[str]:
    """What each run is called: its folder's name, after that of the folder it is in where two share one."""
    count = Counter(record.stamp for record in records)
    return [
        record.stamp if count[record.stamp] == 1 else f"{record.folder.parent.name}/{record.stamp}"
        for record in records
    ]


def inputs(record: RunRecord) -> str:
    """What the network is fed: `hands + gaze`."""
    return " + ".join(name for name, on in record.modalities.items() if on)


def comparison(records: Sequence[RunRecord], picture: str, left_out: dict[str, str] | None = None) -> str:
    """A table of runs, what makes it fair or not, and a picture; in Markdown.

    Arguments:
        records: the runs, in the order of the rows; at least one.
        picture: path of the picture, as seen from the document.
        left_out: runs that are not in the table, and why.
    """
    fair = same_test_windows(records)
    unfair = (
        "**These runs were not all scored on the same test windows:** the figures of the trivial forecasts differ from "
        "run to run. Compare a run with its own baselines, in its own section, not with another row."
    )
    rest = (
        [f"Left out: {', '.join(f'{plain(name)} ({plain(why)})' for name, why in left_out.items())}."]
        if left_out
        else []
    )
    return blocks(
        f"{len(records)} runs; their lowest figure of each error in bold. Lengths in centred units, or in pixels (px) "
        "of the 1728 x 972 image.",
        *([] if fair else [unfair]),
        _table(records, with_baselines=fair),
        f"![Comparison of runs]({picture})",
        *rest,
    )


def _table(records: Sequence[RunRecord], with_baselines: bool) -> str:
    settings = differing_settings(records)
    lowest = {
        attribute: min((f"{value:.{decimals}f}" for value in _finite(records, attribute)), key=float, default="")
        for attribute, _, decimals in MEASURES
    }
    rows = []
    for name, record, differing in zip(names(records), records, settings, strict=True):
        cells = []
        for attribute, _, decimals in MEASURES:
            value = f"{getattr(record.test, attribute):.{decimals}f}"
            cells.append(f"**{value}**" if value == lowest[attribute] else value)
        epochs = f"{record.best_epoch} of {len(record.metrics['epoch'])}"
        speed = f"{record.timing['epoch_s_median']:,.2f}"
        rows.append([code(name), inputs(record), differing, epochs, f"{record.test.windows:,}", *cells, speed])
    for name, scores in records[0].baselines.items() if with_baselines else ():
        rows.append([plain(name), "", "", "", f"{scores.windows:,}", *_cells(scores), ""])
    headers = ["run", "inputs", "settings that differ", "best epoch", "test windows"]
    headers += [*(label for _, label, _ in MEASURES), "s per epoch"]
    if not any(settings):
        headers, rows = [*headers[:2], *headers[3:]], [[*row[:2], *row[3:]] for row in rows]
    return table(headers, rows, left=len(headers) - len(MEASURES) - 3)


def _cells(scores: Scores) -> list[str]:
    return [f"{getattr(scores, attribute):.{decimals}f}" for attribute, _, decimals in MEASURES]


def _finite(records: Sequence[RunRecord], attribute: str) -> list[float]:
    return [value for record in records if math.isfinite(value := getattr(record.test, attribute))]


def differing_settings(records: Sequence[RunRecord]) -> list[str]:
    """Of each run the settings that are not the same in all runs that have them, as `name=value`; empty for none."""
    flat: list[dict[str, Any]] = [
        {name: value for group in record.config.values() for name, value in group.items() if name not in NOT_COMPARED}
        for record in records
    ]
    every = dict.fromkeys(name for settings in flat for name in settings)
    differing = [name for name in every if len({repr(settings[name]) for settings in flat if name in settings}) > 1]
    chosen = [" ".join(f"{name}={settings[name]}" for name in differing if name in settings) for settings in flat]
    return [code(text) if text else "" for text in chosen]


def same_test_windows(records: Sequence[RunRecord]) -> bool:
    """Whether all runs were scored alike on the same windows: then the trivial forecasts scored alike."""
    first = records[0].baselines
    return all(
        record.baselines.keys() == first.keys()
        and all(_alike(record.baselines[name], scores) for name, scores in first.items())
        for record in records
    )


def _alike(one: Scores, other: Scores) -> bool:
    # Sums on other hardware, or in another order, differ in the last digits.
    same = (
        np.isclose(getattr(one, attribute), getattr(other, attribute), rtol=1e-4, equal_nan=True)
        for attribute, _, _ in MEASURES
    )
    return one.windows == other.windows and all(same)
