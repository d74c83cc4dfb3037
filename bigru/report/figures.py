"""Draws the pictures of a run, one function a figure; each returns a Figure and touches neither files nor pyplot."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from bigru.files import printable
from bigru.layout import JOINTS_PER_HAND, UNIT_PX
from bigru.report.record import PUBLISHED, RunRecord, Samples

P = ParamSpec("P")
F = TypeVar("F", bound=Figure | bytes | np.ndarray | None)

WIDTH_IN = 7.2
DPI = 180

# Okabe and Ito's palette: told apart with any colour vision, and in grey.
BLUE, VERMILION, INK, FAINT = "#0072B2", "#D55E00", "#444444", "#999999"

# MediaPipe's hand as one pen stroke: five fingers from the wrist (0), then the knuckles; -1 lifts the pen.
STROKE = np.array([*(j for tip in (4, 8, 12, 16, 20) for j in (0, *range(tip - 3, tip + 1), -1)), 5, 9, 13, 17])

HANDS = (("left", BLUE), ("right", VERMILION))
# True poses are drawn broad and pale under the predicted ones, so that both show where they agree.
OBSERVED: dict[str, Any] = {"linewidth": 0.9, "linestyle": (0, (2, 0.7)), "alpha": 1.0}
TRUE: dict[str, Any] = {"linewidth": 2.6, "alpha": 0.35}
PREDICTED: dict[str, Any] = {"linewidth": 0.9, "alpha": 1.0}
LOOKS = {"observed": OBSERVED, "true": TRUE, "predicted": PREDICTED}

STYLE = {
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.0,
    "axes.edgecolor": "#777777",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "savefig.facecolor": "white",
}


@contextmanager
def _house_style() -> Iterator[None]:
    # From matplotlib's own defaults, so that a user's matplotlibrc cannot change what a run looks like.
    with matplotlib.style.context(["default", STYLE]):
        yield


def styled(draw: Callable[P, F]) -> Callable[P, F]:
    """Returns a drawing function that draws in the style of all figures here."""

    @wraps(draw)
    def in_style(*args: P.args, **kwargs: P.kwargs) -> F:
        with _house_style():
            return draw(*args, **kwargs)

    return in_style


def png(figure: Figure) -> bytes:
    """Returns the figure as PNG, the same bytes each time under one version of matplotlib."""
    buffer = io.BytesIO()
    with _house_style():
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


@styled
def pixels(figure: Figure) -> np.ndarray:
    """Returns the figure as pixels: (height, width, 3) uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


@styled
def learning_curves(record: RunRecord) -> Figure:
    """Draws MPJPE, ADE and FDE (published definitions), the loss and the learning rate against the epoch."""
    panels: list[tuple[str, str, tuple[str, ...]]] = [
        (metric.curve, metric.unit, (f"tr_{metric.name}", f"va_{metric.name}")) for metric in PUBLISHED
    ]
    panels += [("Loss", "squared error", ("tr_loss", "va_loss")), ("Learning rate", "", ("lr",))]
    total = 0.45 + 2.3 * 2
    figure = Figure(figsize=(WIDTH_IN, total), dpi=DPI)
    for i, (title, unit, names) in enumerate(panels):
        top = total - 0.68 - 2.3 * (i // 3)
        axes = figure.add_axes((0.075 + 0.325 * (i % 3), (top - 1.5) / total, 0.25, 1.5 / total))
        scale = _draw_curves(axes, record, names)
        axes.set_title(title, loc="left", pad=14)
        axes.set_ylabel(f"{unit}{scale}".removeprefix(", "))
    handles = [
        Line2D([], [], color=BLUE, linewidth=1.3, label="train (dropout on, weights moving)"),
        Line2D([], [], color=VERMILION, linewidth=1.3, label="validation"),
        Line2D([], [], color=INK, linewidth=0.7, linestyle=(0, (4, 2)), label="best epoch"),
    ]
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.07, 1.0), ncols=3, borderaxespad=0.2)
    return figure


def _draw_curves(axes: Axes, record: RunRecord, names: Sequence[str]) -> str:
    epochs, curves = record.metrics["epoch"], [record.metrics[name] for name in names]
    for values, color in zip(curves, (BLUE, VERMILION) if len(names) > 1 else (INK,), strict=True):
        axes.plot(epochs, values, color=color, linewidth=1.3, marker="o", markersize=4, markevery=lone_points(values))
    axes.axvline(record.best_epoch, color=INK, linewidth=0.7, linestyle=(0, (4, 2)), zorder=1)
    # Above the frame, where no curve runs.
    best, above = record.best_epoch, axes.get_xaxis_transform()
    axes.text(best, 1.015, f"{best}", transform=above, ha="center", va="bottom", fontsize=7, color=INK)
    margin = max(0.5, 0.02 * len(epochs))
    axes.set_xlim(epochs[0] - margin, epochs[-1] + margin)
    count_along(axes, "epoch")
    return scale_values(axes, np.array(curves, dtype=float))


def lone_points(values: list[float]) -> list[int]:
    """Returns the indices of values between NaN, or of a single one, which a line would not show."""
    seen = np.concatenate([[False], np.isfinite(values), [False]])
    return np.flatnonzero(seen[1:-1] & ~seen[:-2] & ~seen[2:]).tolist()


def count_along(axes: Axes, label: str, most: int = 6) -> None:
    """Labels the x axis, which counts epochs or frames, and ticks it at whole numbers, `most` intervals of them."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=most, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def scale_values(axes: Axes, values: np.ndarray) -> str:
    """Sets a linear axis from 0, or a logarithmic one where huge first epochs would flatten all others.

    Returns:
        What the axis' label is to say of it: ", log scale" or nothing.
    """
    values = values[np.isfinite(values) & (values > 0)]
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.5)
    axes.set_axisbelow(True)
    if values.size == 0:
        axes.set_ylim(0, 1)
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", va="center", color=FAINT)
    elif values.max() / values.min() <= 10:
        axes.set_ylim(0, 1.06 * values.max())
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    else:
        axes.set_yscale("log")
        axes.set_ylim(values.min() / 1.2, values.max() * 1.2)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        return ", log scale"
    return ""


@styled
def forecasts(samples: Samples, centre: str = "frame") -> Figure:
    """Draws hand skeletons of the sample windows: last observed frame, then true and predicted at 25, 50, 75 and 100 %.

    A row is a window; its title's line ends with its error and with which hands are missing where: those are neither
    drawn nor counted. Axes are in pixels of the 1728 x 972 image from the midpoint of the wrists (of `centre` "frame",
    each frame's own, or "last", the last observed one's), y pointing down as in the image; limits are the same within a
    row. A target that is NaN is not known: the forecast is drawn alone.
    """
    frames = _horizon_frames(samples.predicted.shape[1])
    limits = [row_limits(samples, row, [-1], frames) for row in range(len(samples.stem))]
    left, gap, right = 0.50, 0.10, 0.06
    width = (WIDTH_IN - left - right - gap * len(frames)) / (len(frames) + 1)
    heights = [width * (bottom - top) / (x1 - x0) for x0, x1, top, bottom in limits]
    header, above, below = 0.24, 0.50, 0.20
    total = header + sum(heights) + (above + below) * len(heights) + 0.14
    figure = Figure(figsize=(WIDTH_IN, total), dpi=DPI)
    top = total - header
    for row, height in enumerate(heights):
        top -= above
        title = row_title(samples, row)
        figure.text(left / WIDTH_IN, (top + 0.24) / total, title, fontsize=8, va="bottom", fontweight="bold")
        said = _row_verdict(samples, row, frames)
        figure.text(1 - right / WIDTH_IN, (top + 0.24) / total, said, fontsize=7.5, va="bottom", ha="right")
        for column in range(len(frames) + 1):
            x = left + column * (width + gap)
            box = (x / WIDTH_IN, (top - height) / total, width / WIDTH_IN, height / total)
            axes = figure.add_axes(box)
            _draw_panel(axes, samples, row, frames[column - 1] if column else None)
            frame_panel(axes, limits[row], first=column == 0)
        top -= height + below
    figure.text(0.5, 0.03 / total, axes_text(centre), ha="center", va="bottom", fontsize=7.5, color=INK)
    known = bool(np.isfinite(samples.target).any())
    corner = ((left - 0.08) / WIDTH_IN, 1.0)
    figure.legend(handles=legend(known), loc="upper left", bbox_to_anchor=corner, ncols=5, borderaxespad=0.2)
    return figure


def legend(known: bool = True) -> list[Line2D]:
    """Returns the legend's lines: the hands' colours, and what lines say; without the true ones if not `known`."""
    looks = [Line2D([], [], color=INK, label=name, **look) for name, look in LOOKS.items() if known or name != "true"]
    return [Line2D([], [], color=color, linewidth=4, label=f"{name} hand") for name, color in HANDS] + looks


def axes_text(centre: str) -> str:
    """Returns the label of the axes of skeletons, by the centring of the hands."""
    when = ", as last observed" if centre == "last" else ""
    return f"x, y in px of the 1728 x 972 image, from the midpoint of the wrists{when}"


def _horizon_frames(predicted: int) -> list[int]:
    """Returns the frame indices at 25, 50, 75 and 100 % of the prediction; fewer of a prediction of fewer frames."""
    return sorted({math.ceil(predicted * quarter / 4) - 1 for quarter in (1, 2, 3, 4)})


def hand_px(frame: np.ndarray, hand: int) -> np.ndarray:
    """Returns the joints of one hand, 0 left or 1 right, of an 84-vector in centred units: (21, 2) in pixels."""
    return frame.reshape(2, JOINTS_PER_HAND, 2)[hand] * UNIT_PX


def frame_error_px(predicted: np.ndarray, target: np.ndarray, present: np.ndarray) -> float:
    """Returns the mean distance in pixels over the known joints of a frame's present hands; NaN for none."""
    hands = [hand for hand in (0, 1) if present[hand]]
    distances = [np.linalg.norm(hand_px(predicted, hand) - hand_px(target, hand), axis=-1) for hand in hands]
    known = [distance for distance in np.ravel(distances) if math.isfinite(distance)]
    return float(np.mean(known)) if known else math.nan


def clip_name(stem: str, longest: int) -> str:
    """Returns a clip's name as pictures show it: its times, of up to 18 digits, rounded; cut if it is still long."""
    name = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", printable(stem))
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def row_title(samples: Samples, row: int, longest: int = 53) -> str:
    """Returns a window's label, clip and frame rate."""
    label = str(samples.label[row])
    assumed = " (assumed)" if samples.fps_assumed[row] else ""
    name = clip_name(str(samples.stem[row]), longest - len(label) - len(assumed))
    return f"{label}: " * bool(label) + f"{name}   {samples.fps[row]:g} fps{assumed}"


def mean_error(samples: Samples, row: int) -> str:
    """Returns a window's error in words; empty where it is not known."""
    return "" if math.isnan(samples.error_px[row]) else f"mean error {samples.error_px[row]:.0f} px"


def _row_verdict(samples: Samples, row: int, frames: Sequence[int]) -> str:
    """Returns the error of a window, and which hand is missing in which of its panels."""
    said = [mean_error(samples, row)] * bool(mean_error(samples, row))
    for hand, (name, _) in enumerate(HANDS):
        there = samples.target_present[row, :, hand]
        lacking = ["last"] * (not samples.observed_present[row, -1, hand])
        lacking += [f"+{(frame + 1) / samples.fps[row]:.2f}" for frame in frames if not there[frame]]
        if lacking:
            said.append(f"{name} missing: {', '.join(lacking)}" + " s" * (lacking[-1] != "last"))
    return "; ".join(said)


def row_limits(
    samples: Samples, row: int, observed: Iterable[int], predicted: Iterable[int]
) -> tuple[float, float, float, float]:
    """Returns x0, x1, top, bottom in pixels that hold all hands of these frames, of readable proportions."""
    drawn = [(samples.observed[row, frame], samples.observed_present[row, frame]) for frame in observed]
    for frame in predicted:
        drawn += [
            (poses[row, frame], samples.target_present[row, frame]) for poses in (samples.predicted, samples.target)
        ]
    points = [hand_px(pose, hand) for pose, present in drawn for hand in (0, 1) if present[hand]]
    cloud = np.concatenate(points) if points else np.zeros((0, 2))
    cloud = cloud[np.isfinite(cloud).all(axis=1)]
    if len(cloud) == 0:
        return -100.0, 100.0, -70.0, 70.0
    low, high = cloud.min(axis=0), cloud.max(axis=0)
    centre, half = (low + high) / 2, np.maximum(0.54 * (high - low), 20.0)
    half_x = max(half[0], half[1] / 1.3)
    half_y = max(half[1], half_x * 0.4)
    return centre[0] - half_x, centre[0] + half_x, centre[1] - half_y, centre[1] + half_y


def _draw_panel(axes: Axes, samples: Samples, row: int, frame: int | None) -> None:
    """Draws the last observed frame (frame None), or true and predicted hands at a frame of the prediction."""
    if frame is None:
        present = samples.observed_present[row, -1]
        poses = [(samples.observed[row, -1], OBSERVED)]
        title = "last observed"
    else:
        present = samples.target_present[row, frame]
        predicted, target = samples.predicted[row, frame], samples.target[row, frame]
        poses = [(target, TRUE), (predicted, PREDICTED)]
        error_px = frame_error_px(predicted, target, present)
        title = f"+{(frame + 1) / samples.fps[row]:.2f} s" + ("" if math.isnan(error_px) else f"   {error_px:.0f} px")
    axes.set_title(title, fontsize=7.5, pad=3, loc="left")
    for pose, look in poses:
        for hand, (_, color) in enumerate(HANDS):
            if present[hand]:
                _draw_hand(axes, hand_px(pose, hand), color, **look)


def stroke(joints: np.ndarray) -> np.ndarray:
    """Returns the line that draws a hand of (21, 2) joints: (N, 2), NaN where the pen is lifted."""
    return np.where(STROKE[:, None] < 0, np.nan, joints[STROKE])


def _draw_hand(axes: Axes, joints: np.ndarray, color: str, linewidth: float, alpha: float, **look: Any) -> None:
    line = stroke(joints)
    axes.plot(*line.T, color=color, linewidth=linewidth, alpha=alpha, solid_joinstyle="round", **look)
    axes.plot(*joints[:1].T, color=color, alpha=alpha, marker="o", markersize=2 + linewidth)


def frame_panel(axes: Axes, limits: tuple[float, float, float, float], first: bool) -> None:
    x0, x1, top, bottom = limits
    axes.set_xlim(x0, x1)
    # Image rows are counted from the top.
    axes.set_ylim(bottom, top)
    axes.set_aspect("equal")
    axes.set_xticks(_inner_ticks(x0, x1, 3))
    axes.set_yticks(_inner_ticks(top, bottom, 4))
    axes.tick_params(length=2, pad=1.5, labelsize=6.5, labelleft=first)
    axes.grid(color="#ECECEC", linewidth=0.5)
    axes.set_axisbelow(True)


def _inner_ticks(low: float, high: float, count: int) -> list[float]:
    """Returns round values away from the ends, where the labels of neighbouring panels would run into each other."""
    margin = 0.1 * (high - low)
    low, high = low + margin, high - margin
    values = MaxNLocator(nbins=count, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [float(value) for value in values if low <= value <= high]
