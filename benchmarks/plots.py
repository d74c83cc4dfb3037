"""Draws the plots of the performance document, one function a figure, from records alone."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import matplotlib.dates
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bigru.kernels.record import CLOCKS, NN_GRU, Record, Row
from bigru.report.figures import BLUE, DPI, INK, VERMILION, WIDTH_IN, styled

MODES = ("forward", "training")
LOOKS = ((BLUE, "o"), (VERMILION, "s"), ("#009E73", "D"), ("#CC79A7", "^"), ("#E69F00", "v"), ("#56B4E9", "P"))
"""Colour and marker of the lines, told apart with any colour vision."""


@styled
def speed_up(record: Record) -> Figure | None:
    """Draws nn.GRU's time over ours against the batch size, forward and training, with quartiles.

    None where no batch was measured with layers of T=60, H=128 beside nn.GRU.
    """
    rows = [row for row in main_rows(record) if row.clock == ("wall" if record.kind == "cpu" else "gpu")]
    if not rows:
        return None
    names = list(dict.fromkeys(map(_name, rows)))
    figure, panels = _panels("Speed-up over nn.GRU against the batch size; above 1 BiGRU is faster", record)
    batches = sorted({row.batch for row in rows})
    for mode, axes in zip(MODES, panels, strict=True):
        for name, (color, marker) in zip(names, LOOKS, strict=False):
            own = sorted((row for row in rows if (_name(row), row.mode) == (name, mode)), key=lambda row: row.batch)
            x, y = [row.batch for row in own], [row.ratio for row in own]
            bars = [[row.ratio - row.low for row in own], [row.high - row.ratio for row in own]]
            axes.errorbar(x, y, bars, label=name, color=color, marker=marker, markersize=4, linewidth=1.3, capsize=2)
        axes.axhline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
        axes.set_xscale("log")
        axes.set_xticks(batches)
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlim(batches[0] / 1.4, batches[-1] * 1.4)
        _scale_ratios(axes, rows)
        axes.set_xlabel("batch size B")
        axes.set_title(mode, loc="left", fontweight="bold")
    panels[0].set_ylabel("times as fast as nn.GRU")
    panels[1].legend(loc="best", fontsize=7.5)
    return figure


@styled
def over_time(records: Sequence[Record]) -> Figure | None:
    """Draws the main workload's time by the date of the record; None for fewer than two records that measured it."""
    dated = sorted(records, key=lambda record: record.date)
    found: dict[tuple[str, str], list[tuple[datetime, Row]]] = {}
    for record in dated:
        for row in main_rows(record):
            if (row.clock, row.batch, row.precision) == ("gpu" if record.kind == "gpu" else "wall", 64, "fp32"):
                found.setdefault((row.mode, _name(row)), []).append((datetime.fromisoformat(record.date), row))
    dates = sorted({date for line in found.values() for date, _ in line})
    if len(dates) < 2:
        return None
    figure, panels = _panels(
        "Main workload (B=64, T=60, H=128, fp32) over time; nn.GRU in the same rounds dotted", records[-1]
    )
    names = list(dict.fromkeys(name for _, name in found))
    for mode, axes in zip(MODES, panels, strict=True):
        for name, (color, marker) in zip(names, LOOKS, strict=False):
            line = found.get((mode, name), [])
            look: dict[str, Any] = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.3}
            days = [matplotlib.dates.date2num(date) for date, _ in line]
            axes.plot(days, [row.ours_ms for _, row in line], label=name, **look)
            axes.plot(days, [row.rival_ms for _, row in line], **look | {"linestyle": ":"})
        axes.margins(x=0.15, y=0.1)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#E3E3E3", linewidth=0.5)
        axes.set_xticks([matplotlib.dates.date2num(date) for date in (dates[0], dates[-1])])
        axes.xaxis.set_major_formatter(matplotlib.dates.DateFormatter("%Y-%m-%d"))
        axes.set_title(mode, loc="left", fontweight="bold")
    panels[0].set_ylabel("ms")
    panels[1].legend(loc="best", fontsize=7.5)
    return figure


def main_rows(record: Record) -> list[Row]:
    """Returns what was measured with layers of the main size beside nn.GRU; of a CPU in fp32 alone."""
    main = "layer", "measured", NN_GRU, 60, 128
    rows = [row for row in record.rows if (row.group, row.status, row.rival, row.steps, row.hidden) == main]
    return [row for row in rows if row.precision == "fp32" or record.kind != "cpu"]


def column(row: Row) -> str:
    """Returns the clock of a row of a GPU, or the threads of a CPU."""
    return CLOCKS[row.clock] if row.threads is None else f"{row.threads} thread{'s' if row.threads > 1 else ''}"


def _name(row: Row) -> str:
    return f"{row.candidate}, {column(row) if row.threads else row.precision}"


def _scale_ratios(axes: Axes, rows: Sequence[Row]) -> None:
    """Sets a logarithmic axis, on which 2 and 1/2 are as far from 1, with plain numbers at its ticks."""
    low, high = min(row.low for row in rows), max(row.high for row in rows)
    axes.set_yscale("log")
    axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100])
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    # After the ticks, which widen it.
    axes.set_ylim(min(0.8, low / 1.15), max(1.25, high * 1.15))
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.5)
    axes.set_axisbelow(True)


def _panels(title: str, record: Record) -> tuple[Figure, list[Axes]]:
    """Returns two panels under a title, with machine, date, versions and command beneath them."""
    figure = Figure(figsize=(WIDTH_IN, 3.1), dpi=DPI)
    panels = [figure.add_axes((0.08 + 0.49 * column, 0.25, 0.41, 0.56)) for column in range(2)]
    figure.text(0.01, 0.985, title, va="top", fontsize=8.5, fontweight="bold")
    versions = ", ".join(f"{name} {value}" for name, value in record.versions.items() if value is not None)
    foot = textwrap.fill(f"{record.machine['name']}, {record.date[:10]}; {versions}; {record.command}", 150)
    figure.text(0.01, 0.015, foot, va="bottom", fontsize=6, color=INK)
    return figure, panels
