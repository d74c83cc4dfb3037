"""Draws one clip: its hands as skeletons and as lines over time."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bigru.layout import IMAGE_PX
from bigru.report.figures import DPI, FAINT, HANDS, INK, WIDTH_IN, clip_name, stroke, styled

SNAPSHOTS = 5
PANEL_ASPECT = 1.3


@styled
def draw_clip(
    name: str, fps: float, seconds: np.ndarray, hands: np.ndarray, present: np.ndarray, rate: str | None = None
) -> Figure:
    """Draws a clip's hands over time: skeletons at five moments, the wrists' x and y, and when each hand was seen.

    Args:
        name: the clip's.
        fps: frames per second.
        seconds: (F,) time of each frame, F > 0.
        hands: (F, 2, 21, 3) left and right hand's joints, x and y as parts of the image.
        present: (F, 2) bool: whether the hand was seen; one that was not is not drawn.
        rate: `fps` in words, such as "23 per second (assumed: no timestamps)".
    """
    joints_px = np.where(present[..., None, None], hands[..., :2] * IMAGE_PX, np.nan)  # (F, 2, 21, 2)
    figure = Figure(figsize=(WIDTH_IN, 4.5), dpi=DPI)
    rows = figure.add_gridspec(
        4, 1, height_ratios=[1.2, 1, 1, 0.34], left=0.085, right=0.985, top=0.865, bottom=0.1, hspace=0.32
    )
    shots = rows[0].subgridspec(1, SNAPSHOTS, wspace=0.08)
    limits = _limits(joints_px)
    for column, moment in enumerate(np.linspace(seconds[0], seconds[-1], SNAPSHOTS)):
        frame = int(np.abs(seconds - moment).argmin())
        axes = figure.add_subplot(shots[column])
        _draw_snapshot(axes, joints_px[frame], limits, first=column == 0)
        axes.set_title(f"{seconds[frame]:.2f} s", fontsize=7.5, pad=2, loc="left")
    # A single frame still gets an axis to stand on.
    span = (seconds[0], seconds[-1] if len(seconds) > 1 else seconds[0] + 1 / fps)
    for row, (axis, label) in enumerate((("x", "wrist x (px)"), ("y", "wrist y (px)"))):
        axes = figure.add_subplot(rows[1 + row])
        for hand, (_, colour) in enumerate(HANDS):
            # A dot shows where a single frame stands between missing ones.
            axes.plot(seconds, joints_px[:, hand, 0, row], color=colour, linewidth=1.1, marker=".", markersize=2.0)
        axes.set_ylabel(label)
        axes.set_xlim(span)
        axes.tick_params(labelbottom=False)
        axes.grid(color="#ECECEC", linewidth=0.5)
        if axis == "y":
            # Image rows are counted from the top.
            axes.invert_yaxis()
    _draw_presence(figure.add_subplot(rows[3]), seconds, present, fps, span)
    figure.text(0.085, 0.985, clip_name(name, 78), fontsize=8, fontweight="bold", va="top")
    caption = f"{len(seconds):,} frames at {rate or f'{fps:g} per second'}; px of the 1728 x 972 image, y pointing down"
    figure.text(0.085, 0.945, caption, fontsize=7.5, color=INK, va="top")
    handles = [Line2D([], [], color=colour, label=f"{hand} hand") for hand, colour in HANDS]
    corner: dict[str, Any] = {"loc": "upper right", "bbox_to_anchor": (0.99, 0.965), "borderaxespad": 0}
    figure.legend(handles=handles, ncols=2, fontsize=7.5, **corner)
    return figure


def _limits(joints_px: np.ndarray) -> tuple[float, float, float, float]:
    """Returns x0, x1, top, bottom in pixels that hold all hands, but for the few frames in which one lies far off."""
    points = joints_px.reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    if len(points) == 0:
        return 0.0, IMAGE_PX[0], 0.0, IMAGE_PX[1]
    low, high = np.quantile(points, [0.005, 0.995], axis=0)
    middle, half = (low + high) / 2, np.maximum(0.58 * (high - low), 40.0)
    # As wide to their height as the panels are.
    half = np.maximum(half, half[::-1] * [PANEL_ASPECT, 1 / PANEL_ASPECT])
    (x0, top), (x1, bottom) = middle - half, middle + half
    return x0, x1, top, bottom


def _draw_snapshot(axes: Axes, joints_px: np.ndarray, limits: tuple[float, float, float, float], first: bool) -> None:
    """Draws both hands, (2, 21, 2) in pixels, NaN where not seen."""
    for hand, (name, colour) in enumerate(HANDS):
        if np.isnan(joints_px[hand]).any():
            x = 0.03 if hand == 0 else 0.97
            axes.text(x, 0.03, f"{name} missing", transform=axes.transAxes, ha=name, fontsize=6.5, color=FAINT)
            continue
        axes.plot(*stroke(joints_px[hand]).T, color=colour, linewidth=0.9, solid_joinstyle="round")
    x0, x1, top, bottom = limits
    axes.set_xlim(x0, x1)
    axes.set_ylim(bottom, top)
    axes.set_aspect("equal", anchor="S")
    axes.locator_params(nbins=3)
    axes.tick_params(length=2, pad=1.5, labelsize=6.5, labelleft=first)


def _draw_presence(axes: Axes, seconds: np.ndarray, present: np.ndarray, fps: float, span: tuple[float, float]) -> None:
    """Draws a bar for each hand where it was seen, and writes the share of frames in which it was."""
    labels = []
    for hand, (name, colour) in enumerate(HANDS):
        seen = present[:, hand]
        axes.broken_barh([(time, 1 / fps) for time in seconds[seen]], (0.6 - hand, 0.7), color=colour, linewidth=0)
        labels.append(f"{name} {100 * seen.mean():.0f} %")
    axes.set_xlim(span)
    axes.set_ylim(-0.5, 1.4)
    axes.set_yticks([0.95, -0.05], labels, fontsize=6.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("time (s)   bars and percent: frames in which the hand is seen")
