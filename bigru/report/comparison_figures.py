"""Draws several runs in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bigru.files import printable
from bigru.report.comparison import differing_settings, inputs, names, same_test_windows
from bigru.report.figures import DPI, INK, WIDTH_IN, count_along, lone_points, scale_values, styled
from bigru.report.record import NETWORK, RunRecord

# Okabe and Ito's palette without its yellow, which is lost on white; then the same colours, broken.
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("solid", (0, (4, 1.5)))
MOST = len(COLORS) * len(STYLES)
LEGEND_ROW_IN = 0.17


@styled
def comparison(records: Sequence[RunRecord]) -> Figure:
    """Draws validation error against the epoch and test error against the horizon, a line a run, in pixels.

    Of more runs than can be told apart, the ones with the least test error are drawn. Baselines stand beside them where
    all runs share their test windows.
    """
    looks: list[dict[str, Any]] = [{"color": color, "linestyle": style} for style in STYLES for color in COLORS]
    order = np.argsort([record.test.joint_error_px for record in records], kind="stable")[:MOST]
    drawn = [records[i] for i in sorted(order)]
    recorded = drawn[0].horizon if same_test_windows(records) else {}
    baselines = {name: errors for name, errors in recorded.items() if name != NETWORK}
    below = 0.45 + LEGEND_ROW_IN * (len(drawn) + len(baselines))
    total = 2.45 + below
    figure = Figure(figsize=(WIDTH_IN, total), dpi=DPI)
    epochs, frames = (figure.add_axes((left, below / total, 0.41, 2.15 / total)) for left in (0.075, 0.58))
    handles = []
    for name, settings, record, look in zip(names(drawn), differing_settings(drawn), drawn, looks, strict=False):
        _draw(epochs, record.metrics["epoch"], record.metrics["va_joint_error_px"], **look)
        values = record.horizon[NETWORK]
        _draw(frames, range(1, len(values) + 1), values, **look)
        words = f"{name}   {inputs(record)}   {settings.strip('` ')}"
        handles.append(Line2D([], [], linewidth=1.5, label=_shortened(words), **look))
    for (name, errors), style in zip(baselines.items(), ((0, (1, 1)), (0, (3, 1, 1, 1)), (0, (5, 3))), strict=False):
        look = {"color": INK, "linestyle": style}
        _draw(frames, range(1, len(errors) + 1), errors, **look)
        handles.append(Line2D([], [], linewidth=1.5, label=name, **look))
    for axes, x, title in ((epochs, "epoch", "validation"), (frames, "future frame", "test")):
        axes.set_title(title, loc="left")
        count_along(axes, x)
        scale = scale_values(axes, np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines]))
        axes.set_ylabel(f"per-joint error (px){scale}")
    figure.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0.06, 0.0), fontsize=7.5, handlelength=2.6, labelspacing=0.35
    )
    return figure


def _draw(axes: Axes, x: Sequence[float], values: Sequence[float] | np.ndarray, **look: Any) -> None:
    axes.plot(x, values, linewidth=1.5, marker="o", markersize=3, markevery=lone_points(list(values)), **look)


def _shortened(text: str, longest: int = 105) -> str:
    text = printable(text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
