"""The plots of the performance document, one function a figure, each from the records of one card."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any

import matplotlib.colors
import matplotlib.dates
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.measured import MAIN, MODES, OURS, PEER, GpuRecord, Shape, Timing
from bigru.report.figures import BLUE, DPI, FAINT, INK, VERMILION, WIDTH_IN, scale_values, styled

LOOKS = {
    PEER: (INK, "s"),
    "triton": (BLUE, "o"),
    "resident": (VERMILION, "^"),
    "cooperative": ("#009E73", "D"),
    "torch.compile": ("#CC79A7", "v"),
    "flashrnn": ("#E69F00", "P"),
}
"""Colour and marker of a path, told apart with any colour vision."""
OTHER = (FAINT, "x")
"""Those of a path that is not known here."""
FOLLOWED = (("layer", "forward"), ("layer", "forward+backward"), ("training step", "step"))
"""What is drawn over time."""
SWEPT = {"steps": "time steps T", "batch": "batch B", "hidden": "hidden size H"}
FLOOR: dict[str, Any] = {"marker": "_", "markersize": 7, "color": FAINT, "linewidth": 0.9, "linestyle": (0, (4, 2))}
FASTEST = 4.0
"""Where the colours of the heat map end, upwards and, inverted, downwards."""

LEFT_IN, RIGHT_IN, PANEL_IN, FOOT_IN = 0.55, 0.12, 1.35, 0.42


def versions(record: GpuRecord) -> str:
    """What the record was made with, in one line."""
    return ", ".join(f"{name} {version}" for name, version in record.versions.items())


@styled
def speed(record: GpuRecord, work: str) -> Figure | None:
    """A heat map of nn.GRU's GPU time over ours: shapes down, precisions and our paths across; None without rows."""
    rows = [row for row in record.select("layer", work) if row.path in OURS]
    if not any(np.isfinite(record.ratio(row, "gpu_ms")) for row in rows):
        return None
    shapes = sorted({row.work.shape for row in rows}, key=_size_order)
    present = {(row.work.mode, row.path) for row in rows}
    columns = [(mode, path) for mode in MODES for path in OURS if (mode, path) in present]
    height = 0.19 * len(shapes)
    figure, axes = _single_panel(height, above=0.92, left=1.75, right=0.75)
    colours, cells = _heat_colours(), {(row.work.shape, row.work.mode, row.path): row for row in rows}
    for i, shape in enumerate(shapes):
        for j, column in enumerate(columns):
            if (row := cells.get((shape, *column))) is not None:
                _draw_cell(axes, i, j, row, record.ratio(row, "gpu_ms"), colours)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(shapes) - 0.5, -0.5)
    axes.set_yticks(range(len(shapes)), [shape_name(shape) for shape in shapes])
    for label, shape in zip(axes.get_yticklabels(), shapes, strict=True):
        label.set_fontweight("bold" if shape.is_main else "normal")
    names = [path for _, path in columns]
    axes.set_xticks(range(len(columns)), names, fontsize=6.5, rotation=30, ha="left", rotation_mode="anchor")
    axes.tick_params(length=0, pad=2, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    _name_modes(axes, [mode for mode, _ in columns])
    title = f"{work}: nn.GRU's GPU time over BiGRU's, same precision; above 1 BiGRU is faster"
    _title(figure, title)
    _colour_bar(figure, axes, colours)
    _foot(figure, record)
    return figure


def _size_order(shape: Shape) -> tuple[int, ...]:
    return tuple(-1 if size is None else size for size in (shape.layers, shape.hidden, shape.batch, shape.steps))


def shape_name(shape: Shape) -> str:
    """The sizes by their letters; input and layers only where they are not the main workload's."""
    named = [("T", shape.steps), ("B", shape.batch), ("H", shape.hidden)]
    named += [
        (letter, size)
        for letter, size, main in (("I", shape.input, MAIN.input), ("L", shape.layers, MAIN.layers))
        if size != main
    ]
    return " ".join(f"{letter}={size}" for letter, size in named if size is not None)


def _heat_colours() -> ScalarMappable:
    # Red is slower and blue faster, also to those who do not tell red from green; on a scale where 2 and 1/2 are alike.
    end = math.log2(FASTEST)
    return ScalarMappable(matplotlib.colors.Normalize(-end, end), colormaps["RdBu"])


def _draw_cell(axes: Axes, i: int, j: int, row: Timing, ratio: float, colours: ScalarMappable) -> None:
    """The ratio on its colour, or the reason why there is none on grey."""
    face: str | np.ndarray = "#EFEFEF"
    reason = row.status if row.status != "measured" else "no peer"
    text, ink, size = reason.replace("out of ", "out of\n"), INK, 5.5
    if math.isfinite(ratio):
        face = colours.to_rgba(np.log2([ratio]))[0]
        luminance = float(np.dot(face[:3], (0.299, 0.587, 0.114)))
        text, ink, size = (
            f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.1f}",
            "white" if luminance < 0.5 else "black",
            7,
        )
    axes.fill_between([j - 0.5, j + 0.5], i - 0.5, i + 0.5, facecolor=face, edgecolor="white", linewidth=0.8)
    axes.text(j, i, text, ha="center", va="center", fontsize=size, color=ink, linespacing=0.9)


def _name_modes(axes: Axes, modes: Sequence[str]) -> None:
    """Precisions above the names of the paths, with a line between each two."""
    for mode in dict.fromkeys(modes):
        at = [j for j, other in enumerate(modes) if other == mode]
        axes.annotate(
            mode,
            (sum(at) / len(at), 1),
            (0, 30),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontweight="bold",
            fontsize=7.5,
        )
        if at[-1] + 1 < len(modes):
            axes.axvline(at[-1] + 0.5, color=INK, linewidth=0.8)


def _colour_bar(figure: Figure, axes: Axes, colours: ScalarMappable) -> None:
    box = axes.get_position()
    # As high as three rows at least, and no higher than reads well.
    height = min(box.height, 1.6 / figure.get_figheight())
    beside = figure.add_axes((box.x1 + 0.12 / WIDTH_IN, box.y1 - height, 0.10 / WIDTH_IN, height))
    bar = figure.colorbar(colours, cax=beside, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4"])
    bar.set_label("times as fast", fontsize=7)
    bar.outline.set_visible(False)


def per_step_us(ms: float, shape: Shape) -> float:
    """A time in milliseconds as microseconds for each time step of each layer."""
    return 1e3 * ms / (shape.steps * (shape.layers or 1)) if shape.steps else math.nan


@styled
def steps(record: GpuRecord, group: str, work: str) -> Figure | None:
    """Microseconds a time step and layer against T, B and H, with the floor; None where nothing was swept."""
    rows = record.select(group, work)
    title = f"{group}, {work}: GPU time of one time step of one layer, both directions"
    return _sweeps(
        record,
        rows,
        title,
        "µs per step",
        value=lambda row: per_step_us(row.gpu_ms, row.work.shape),
        floor=lambda row: per_step_us(row.floor_ms, row.work.shape),
    )


@styled
def memory(record: GpuRecord) -> Figure | None:
    """Peak memory of forward and backward against T, B and H; None where nothing was swept."""
    rows = record.select("layer", "forward+backward")
    return _sweeps(record, rows, "layer, forward+backward: peak memory", "MiB", lambda row: row.peak_mib)


Value = Callable[[Timing], float]


def _sweeps(
    record: GpuRecord, rows: Sequence[Timing], title: str, unit: str, value: Value, floor: Value | None = None
) -> Figure | None:
    """A row of panels a precision: one size varies in each, the others being the main workload's."""
    rows = [row for row in rows if math.isfinite(value(row))]
    modes = [mode for mode in MODES if any(len(_swept(rows, mode, name)) > 1 for name in SWEPT)]
    if not modes:
        return None
    figure, grid = _panel_grid(len(modes), len(SWEPT))
    floors = False
    for mode, line in zip(modes, grid, strict=True):
        for (name, label), axes in zip(SWEPT.items(), line, strict=True):
            sizes = _swept(rows, mode, name)
            in_panel = [row for of_size in sizes.values() for row in of_size]
            for path in _paths(in_panel):
                _draw_path(
                    axes,
                    path,
                    [(size, value(row)) for size, of_size in sizes.items() for row in of_size if row.path == path],
                )
            if floor is not None:
                lowest = [
                    (size, min(known))
                    for size, of_size in sizes.items()
                    if (known := [floor(row) for row in of_size if math.isfinite(floor(row))])
                ]
                if lowest:
                    floors = True
                    axes.plot(*zip(*lowest, strict=True), label="floor", zorder=1, **FLOOR)
            _scale_sizes(axes, list(sizes))
            _scale_measured(axes)
            axes.set_xlabel(label)
            axes.set_title(mode, loc="left", pad=3, fontweight="bold")
        line[0].set_ylabel(unit)
    _title(figure, title)
    _legend(figure, _paths(rows), floors)
    _foot(figure, record)
    return figure


def _draw_path(axes: Axes, path: str, points: Sequence[tuple[Any, float]]) -> None:
    colour, marker = LOOKS.get(path, OTHER)
    axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=3, linewidth=1.1, label=path)


def _swept(rows: Iterable[Timing], mode: str, name: str) -> dict[int, list[Timing]]:
    """The rows in which only this size differs from the main workload's, by that size, ascending.

    Input and layers are the main workload's where the group has that, else those that most of its rows have: the
    recurrence is timed as one layer, without input.
    """
    rows = [row for row in rows if row.work.mode == mode]
    outer = [(row.work.shape.input, row.work.shape.layers) for row in rows]
    chosen = (MAIN.input, MAIN.layers)
    if outer and chosen not in outer:
        chosen = max(outer, key=outer.count)
    others = [other for other in SWEPT if other != name]
    found: dict[int, list[Timing]] = {}
    for row in rows:
        shape = row.work.shape
        size = getattr(shape, name)
        alike = all(getattr(shape, other) == getattr(MAIN, other) for other in others)
        if size is not None and alike and (shape.input, shape.layers) == chosen:
            found.setdefault(size, []).append(row)
    return dict(sorted(found.items()))


def path_order(path: str) -> tuple[int, str]:
    """Sorts paths as in `LOOKS`, those that are not in it behind."""
    order = list(LOOKS)
    return order.index(path) if path in order else len(order), path


def _paths(rows: Iterable[Timing]) -> list[str]:
    return sorted({row.path for row in rows}, key=path_order)


def _scale_measured(axes: Axes) -> None:
    """A y axis for what was drawn, or words where nothing was."""
    if axes.lines:
        scale_values(axes, np.concatenate([np.asarray(drawn.get_ydata(), dtype=float) for drawn in axes.lines]))
    else:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=FAINT)


def _scale_sizes(axes: Axes, sizes: Sequence[int]) -> None:
    """A logarithmic axis whose ticks are the sizes measured, as many as have room."""
    if not sizes:
        axes.set_xticks([])
        return
    axes.set_xscale("log")
    axes.set_xlim(sizes[0] / 1.25, sizes[-1] * 1.25)
    ticks = _apart(sizes, np.log(sizes), 7)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))


@styled
def history(records: Sequence[GpuRecord]) -> Figure | None:
    """GPU time of the main workload against the record's date; None where fewer than two records measured it."""
    # By place in the row of panels, and there by date.
    rows: dict[tuple[str, str], list[tuple[datetime, Timing]]] = {followed: [] for followed in FOLLOWED}
    for record in sorted(records, key=lambda record: record.date):
        for followed, found in rows.items():
            found += [
                (record.date, row)
                for row in record.select(*followed)
                if row.work.shape.is_main and math.isfinite(row.gpu_ms)
            ]
    rows = {followed: found for followed, found in rows.items() if found}
    every = [dated for found in rows.values() for dated in found]
    dates = sorted({date for date, _ in every})
    if len(dates) < 2:
        return None
    modes = [mode for mode in MODES if any(row.work.mode == mode for _, row in every)]
    figure, grid = _panel_grid(len(modes), len(rows))
    for mode, line in zip(modes, grid, strict=True):
        for ((group, work), found), axes in zip(rows.items(), line, strict=True):
            here = [(date, row) for date, row in found if row.work.mode == mode]
            for path in _paths(row for _, row in here):
                _draw_path(axes, path, [(date, row.gpu_ms) for date, row in here if row.path == path])
            _scale_measured(axes)
            _scale_dates(axes, dates)
            axes.set_title(f"{mode}, {work if group == 'layer' else group}", loc="left", pad=3, fontweight="bold")
        line[0].set_ylabel("GPU time (ms)")
    _title(figure, "Main workload over time: GPU time against the date of the record")
    _legend(figure, _paths(row for _, row in every), floor=False)
    _foot(figure, max(records, key=lambda record: record.date), "newest record: ")
    return figure


def _apart(values: Sequence[Any], places: np.ndarray, most: int) -> list[Any]:
    """Those of ascending values whose labels have room along an axis: about so many, the first always."""
    gap = (places[-1] - places[0]) / most
    chosen = [0]
    for i in range(1, len(values)):
        if places[i] - places[chosen[-1]] >= gap:
            chosen.append(i)
    return [values[i] for i in chosen]


def _scale_dates(axes: Axes, dates: Sequence[datetime]) -> None:
    """An axis of dates with ticks at the records, with the time of day where they are of one day."""
    days = matplotlib.dates.date2num(dates)
    margin = 0.2 * (days[-1] - days[0])
    axes.set_xlim(days[0] - margin, days[-1] + margin)
    axes.set_xlabel("date of the record (UTC)")
    axes.xaxis.set_major_locator(FixedLocator(_apart(days, days, 2)))
    day = "%Y-%m-%d" if days[-1] - days[0] >= 1 else "%m-%d %H:%M"
    axes.xaxis.set_major_formatter(matplotlib.dates.DateFormatter(day))


def _panel_grid(lines: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    """Panels of one size, with room for a title and a legend above and the provenance below."""
    above, between = 0.62, 0.58
    height = above + lines * PANEL_IN + (lines - 1) * between + 0.36 + FOOT_IN
    gap = 0.48
    width = (WIDTH_IN - LEFT_IN - RIGHT_IN - gap * (columns - 1)) / columns
    figure = Figure(figsize=(WIDTH_IN, height), dpi=DPI)
    grid = []
    for line in range(lines):
        bottom = height - above - PANEL_IN - line * (PANEL_IN + between)
        boxes = [(LEFT_IN + column * (width + gap), bottom) for column in range(columns)]
        grid.append(
            [figure.add_axes((x / WIDTH_IN, y / height, width / WIDTH_IN, PANEL_IN / height)) for x, y in boxes]
        )
    return figure, grid


def _single_panel(panel: float, above: float, left: float, right: float) -> tuple[Figure, Axes]:
    height = above + panel + 0.12 + FOOT_IN
    figure = Figure(figsize=(WIDTH_IN, height), dpi=DPI)
    box = (left / WIDTH_IN, (0.12 + FOOT_IN) / height, (WIDTH_IN - left - right) / WIDTH_IN, panel / height)
    return figure, figure.add_axes(box)


def _title(figure: Figure, text: str) -> None:
    figure.text(0.08 / WIDTH_IN, 1 - 0.05 / figure.get_figheight(), text, va="top", fontsize=8.5, fontweight="bold")


def _legend(figure: Figure, paths: Sequence[str], floor: bool) -> None:
    looks = [(path, *LOOKS.get(path, OTHER)) for path in paths]
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=3, linewidth=1.1, label=path)
        for path, colour, marker in looks
    ]
    if floor:
        handles.append(Line2D([], [], label="floor", **FLOOR))
    at = (0.0, 1 - 0.20 / figure.get_figheight())
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=at, ncols=len(handles), fontsize=7.5)


def _foot(figure: Figure, record: GpuRecord, before: str = "") -> None:
    """Machine, date, versions and command, so that the picture says them where it stands alone."""
    text = textwrap.fill(f"{before}{record.card}, {record.date:%Y-%m-%d}; {versions(record)}; {record.command}", 150)
    figure.text(
        0.08 / WIDTH_IN, 0.06 / figure.get_figheight(), text, va="bottom", fontsize=6, color=INK, linespacing=1.3
    )
