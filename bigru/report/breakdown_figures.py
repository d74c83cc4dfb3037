"""Draws where the error of a run lies: by how far ahead it looks, and joint by joint on two hands."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bigru.report.breakdown import beaten_from
from bigru.report.figures import BLUE, DPI, INK, VERMILION, WIDTH_IN, count_along, scale_values, stroke, styled
from bigru.report.record import NETWORK, RunRecord

# A baseline beyond these gets no colour of its own, but its name stands at its line.
BASELINE_LOOKS = ((BLUE, "solid"), (INK, (0, (4, 2))), ("#009E73", (0, (1, 1))))

# Light to dark, so that the numbers on it can be read and the order shows in grey.
HEAT = LinearSegmentedColormap.from_list("heat", ["#FFF7E0", "#FDC57B", "#E8703A", "#A82A12"])

NAME_HEIGHT = 0.075
"""Least distance of two names in `name_line_ends`, as a fraction of the axes' height."""

FINGERS = ("thumb", "index", "middle", "ring", "little")


@styled
def horizon(record: RunRecord) -> Figure:
    """Draws the per-joint error in pixels at each future frame, the network beside the baselines."""
    figure = Figure(figsize=(WIDTH_IN, 2.9), dpi=DPI)
    axes = figure.add_axes((0.075, 0.15, 0.73, 0.78))
    frames = np.arange(1, record.config["data"]["predicted"] + 1)
    baselines = [name for name in record.horizon if name != NETWORK]
    looks = {NETWORK: (VERMILION, "solid")} | {
        name: BASELINE_LOOKS[min(i, len(BASELINE_LOOKS) - 1)] for i, name in enumerate(baselines)
    }
    lines = record.horizon
    for name, values in lines.items():
        color, style = looks[name]
        # One frame is no line.
        marker = "o" if len(frames) == 1 else None
        axes.plot(
            frames, values, color=color, linestyle=style, linewidth=2.0 if name == NETWORK else 1.3, marker=marker
        )
    scale = scale_values(axes, np.concatenate([*lines.values(), np.empty(0)]))
    axes.set_xlim(1 if len(frames) > 1 else 0, max(2, len(frames)))
    ahead = ", ".join(f"{len(frames) / fps:.2f} s at {fps:g} fps" for fps, _ in record.by_frame_rate[:3])
    count_along(axes, f"future frame ({len(frames)} = {ahead})" if ahead else "future frame", most=7)
    axes.set_ylabel(f"per-joint error (px){scale}")
    still = lines.get("repeat last frame")
    if still is not None and (first := beaten_from(lines[NETWORK], still)):
        axes.axvline(first, color=INK, linewidth=0.7, linestyle=(0, (1, 2)), zorder=1)
        said = f'"repeat last frame" is beaten from frame {first} on'
        axes.set_title(said, loc="left", fontsize=8, color=INK)
    name_line_ends(axes, lines, {name: color for name, (color, _) in looks.items()})
    return figure


def name_line_ends(axes: Axes, lines: dict[str, np.ndarray], colors: dict[str, str]) -> None:
    """Writes each line's name and last value to the right of the axes, moved apart where they would overlap."""
    last = {name: values[np.isfinite(values)][-1] for name, values in lines.items() if np.isfinite(values).any()}
    to_axes = axes.transData + axes.transAxes.inverted()
    places = {name: float(to_axes.transform((0, value))[1]) for name, value in last.items()}
    order = sorted(places, key=places.__getitem__)
    # Up from the lowest, then down from the top, by what a line of 8 points takes of the axes.
    for lower, upper in pairwise(order):
        places[upper] = max(places[upper], places[lower] + NAME_HEIGHT)
    if order:
        places[order[-1]] = min(places[order[-1]], 1.0)
    for upper, lower in pairwise(reversed(order)):
        places[lower] = min(places[lower], places[upper] - NAME_HEIGHT)
    for name in order:
        said = f"{name}  {last[name]:.0f}"
        axes.text(1.015, places[name], said, transform=axes.transAxes, va="center", fontsize=8, color=colors[name])


@styled
def joints(record: RunRecord) -> Figure:
    """Draws the mean error in pixels of each joint, as its colour and a number, on a left and a right hand."""
    figure = Figure(figsize=(WIDTH_IN, 3.6), dpi=DPI)
    errors = record.by_joint
    finite = errors[np.isfinite(errors)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    norm = Normalize(low, high if high > low else low + 1)
    for hand, name in enumerate(("left", "right")):
        axes = figure.add_axes((0.01 + 0.435 * hand, 0.0, 0.43, 0.93))
        _draw_hand(axes, errors[21 * hand : 21 * hand + 21], norm, mirror=-1 if hand == 0 else 1)
        seen = errors[21 * hand : 21 * hand + 21]
        seen = seen[np.isfinite(seen)]
        said = f"mean {seen.mean():.0f} px" if seen.size else "never seen"
        axes.set_title(f"{name} hand, {said}", pad=4)
    bar = figure.colorbar(ScalarMappable(norm, HEAT), cax=figure.add_axes((0.905, 0.12, 0.018, 0.70)))
    bar.set_label("mean error (px)")
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    return figure


def open_hand() -> np.ndarray:
    """Returns a right hand from its back, fingers up, thumb to the left, wrist at (0, 0): (21, 2), y upwards."""
    # Direction of each finger in degrees from straight up, then how far its four joints are from the wrist.
    fingers = (
        (-48, (0.55, 0.98, 1.38, 1.74)),
        (-17, (1.45, 1.93, 2.30, 2.64)),
        (-2, (1.45, 1.99, 2.41, 2.78)),
        (13, (1.38, 1.88, 2.27, 2.62)),
        (29, (1.27, 1.65, 1.97, 2.27)),
    )
    joints = [(0.0, 0.0)]
    for angle, reaches in fingers:
        turn = math.radians(angle)
        joints += [(reach * math.sin(turn), reach * math.cos(turn)) for reach in reaches]
    return np.array(joints)


def _draw_hand(axes: Axes, errors: np.ndarray, norm: Normalize, mirror: int) -> None:
    hand = open_hand() * [mirror, 1]
    line = stroke(hand)
    axes.plot(line[:, 0], line[:, 1], color="#C9C9C9", linewidth=2.5, zorder=1, solid_joinstyle="round")
    colors = [HEAT(norm(error)) if math.isfinite(error) else (1, 1, 1, 1) for error in errors]
    axes.scatter(hand[:, 0], hand[:, 1], s=270, c=colors, edgecolors="#777777", linewidths=0.6, zorder=2)
    for (x, y), error in zip(hand, errors, strict=True):
        dark = math.isfinite(error) and norm(error) > 0.62
        text = f"{error:.0f}" if math.isfinite(error) else "-"
        axes.text(
            x, y, text, ha="center", va="center_baseline", fontsize=7, color="white" if dark else "black", zorder=3
        )
    for finger, name in enumerate(FINGERS):
        tip = hand[4 + 4 * finger]
        # On along the finger; above the thumb's tip, which points aside.
        x, y = tip * (1 + 0.28 / np.hypot(*tip)) if finger else (tip[0], tip[1] + 0.26)
        axes.text(x, y, name, ha="center", va="center", fontsize=7, color=INK)
    axes.text(0, -0.30, "wrist", ha="center", va="center", fontsize=7, color=INK)
    axes.set_xlim(-1.75, 1.75)
    axes.set_ylim(-0.45, 3.15)
    axes.set_aspect("equal")
    axes.set_axis_off()
