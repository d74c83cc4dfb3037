"""Draws the pictures of a run, one function a figure; each returns a Figure and touches neither files nor pyplot."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

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

WRISTS = [0, len(STROKE) + 1]
"""Indices of the wrists in `pose_stroke` of two hands."""

# True poses are drawn broad and pale under the predicted ones, so that both show where they agree.
OBSERVED: dict[str, Any] = {"color": INK, "linewidth": 0.9, "alpha": 1.0}
TRUE: dict[str, Any] = {"color": BLUE, "linewidth": 1.9, "alpha": 0.5}
PREDICTED: dict[str, Any] = {"color": VERMILION, "linewidth": 0.8, "alpha": 1.0}
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
    """Draws MPJPE, ADE and FDE (published definitions) of train and validation against the epoch."""
    figure = Figure(figsize=(WIDTH_IN, 2.75), dpi=DPI)
    for i, metric in enumerate(PUBLISHED):
        axes = figure.add_axes((0.075 + 0.325 * i, 0.155, 0.25, 0.60))
        _draw_curves(axes, record, metric.name)
        axes.set_title(metric.curve, loc="left", pad=14)
        axes.set_ylabel(metric.unit)
    handles = [
        Line2D([], [], color=BLUE, linewidth=1.3, label="train (dropout on, weights moving)"),
        Line2D([], [], color=VERMILION, linewidth=1.3, label="validation"),
        Line2D([], [], color=INK, linewidth=0.7, linestyle=(0, (4, 2)), label="best epoch"),
    ]
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.07, 1.0), ncols=3, borderaxespad=0.2)
    return figure


def _draw_curves(axes: Axes, record: RunRecord, metric: str) -> None:
    epochs = record.metrics["epoch"]
    train, validation = record.metrics[f"tr_{metric}"], record.metrics[f"va_{metric}"]
    for values, color in ((train, BLUE), (validation, VERMILION)):
        axes.plot(epochs, values, color=color, linewidth=1.3, marker="o", markersize=4, markevery=lone_points(values))
    axes.axvline(record.best_epoch, color=INK, linewidth=0.7, linestyle=(0, (4, 2)), zorder=1)
    # Above the frame, where no curve runs.
    axes.text(
        record.best_epoch,
        1.015,
        f"{record.best_epoch}",
        transform=axes.get_xaxis_transform(),
        ha="center",
        va="bottom",
        fontsize=7,
        color=INK,
    )
    margin = max(0.5, 0.02 * len(epochs))
    axes.set_xlim(epochs[0] - margin, epochs[-1] + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")
    scale_values(axes, np.array([*train, *validation], dtype=float))


def lone_points(values: list[float]) -> list[int]:
    """Returns the indices of values between NaN, or of a single one, which a line would not show."""
    seen = np.concatenate([[False], np.isfinite(values), [False]])
    return np.flatnonzero(seen[1:-1] & ~seen[:-2] & ~seen[2:]).tolist()


def scale_values(axes: Axes, values: np.ndarray) -> None:
    """Sets a linear axis from 0, or a logarithmic one where huge first epochs would flatten all others."""
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
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


@styled
def forecasts(samples: Samples, centre: str = "frame") -> Figure:
    """Draws hand skeletons of the sample windows: last observed frame, then true and predicted at 25, 50, 75 and 100 %.

    A row is a window, in pixels of the 1728 x 972 image from the midpoint of the wrists (of `centre` "frame", each
    frame's own, or "last", the last observed one's), y pointing down as in the image; limits are the same within a row.
    Missing hands are not drawn and not counted in the error. A target that is NaN is not known: the forecast is drawn
    alone.
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
        for column in range(len(frames) + 1):
            x = left + column * (width + gap)
            box = (x / WIDTH_IN, (top - height) / total, width / WIDTH_IN, height / total)
            axes = figure.add_axes(box)
            _draw_panel(axes, samples, row, frames[column - 1] if column else None)
            frame_panel(axes, limits[row], first=column == 0)
        top -= height + below
    figure.text(0.5, 0.03 / total, axes_text(centre), ha="center", va="bottom", fontsize=7.5, color=INK)
    known = bool(np.isfinite(samples.target).any())
    figure.legend(
        handles=[Line2D([], [], label=name, **look) for name, look in LOOKS.items() if known or name != "true"],
        loc="upper left",
        bbox_to_anchor=((left - 0.08) / WIDTH_IN, 1.0),
        ncols=3,
        borderaxespad=0.2,
    )
    return figure


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


def row_title(samples: Samples, row: int, longest: int = 58) -> str:
    """Returns a window's label, clip, frame rate and error; the clip's name is cut: its times go to 18 digits."""
    stem, error_px, label = printable(str(samples.stem[row])), samples.error_px[row], str(samples.label[row])
    assumed = " (assumed)" if samples.fps_assumed is not None and samples.fps_assumed[row] else ""
    longest -= len(label) + len(assumed)
    name = stem if len(stem) <= longest else f"{stem[: longest - 1]}…"
    name = f"{label}: {name}" if label else name
    error = "" if math.isnan(error_px) else f", mean error {error_px:.0f} px"
    return f"{name}   {samples.fps[row]:g} fps{assumed}{error}"


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
    centre, half = (low + high) / 2, np.maximum(0.56 * (high - low), 20.0)
    half_x = max(half[0], half[1] / 1.3)
    half_y = max(half[1], half_x * 0.7)
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
        for hand in (0, 1):
            if present[hand]:
                _draw_hand(axes, hand_px(pose, hand), **look)
    for hand, (name, x) in enumerate((("left", 0.02), ("right", 0.98))):
        if not present[hand]:
            axes.text(x, 0.03, f"{name} missing", transform=axes.transAxes, ha=name, fontsize=6.5, color=FAINT)


def stroke(joints: np.ndarray) -> np.ndarray:
    """Returns the line that draws a hand of (21, 2) joints: (N, 2), NaN where the pen is lifted."""
    return np.where(STROKE[:, None] < 0, np.nan, joints[STROKE])


def pose_stroke(pose: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Returns the line that draws the present hands of an 84-vector in centred units: (N, 2) in pixels.

    A missing hand is NaN, which draws nothing and keeps the wrists at `WRISTS`.
    """
    lift = np.full((1, 2), np.nan)
    strokes = (np.where(present[hand], stroke(hand_px(pose, hand)), np.nan) for hand in (0, 1))
    return np.concatenate([part for line in strokes for part in (line, lift)])


def _draw_hand(axes: Axes, joints: np.ndarray, color: str, linewidth: float, alpha: float) -> None:
    line = stroke(joints)
    axes.plot(line[:, 0], line[:, 1], color=color, linewidth=linewidth, alpha=alpha, solid_joinstyle="round")
    axes.plot(joints[:1, 0], joints[:1, 1], color=color, alpha=alpha, marker="o", markersize=2 + linewidth)


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
