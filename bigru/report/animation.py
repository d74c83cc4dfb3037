"""Draws a window as a moving picture: the observed frames, then the forecast beside the true ones."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure

from bigru.report import figures
from bigru.report.record import Samples

DPI = 140
FASTEST_FPS = 25
"""Most pictures a second: browsers slow down a GIF whose pictures stay less than 20 ms."""


@figures.styled
def gif(samples: Samples, row: int, centre: str = "frame", dpi: int = DPI) -> bytes:
    """Returns one sample window as a GIF, in real time, that repeats for ever; axes as in `figures.forecasts`.

    Where a second has more frames than 25, only every second, third, ... of them is shown.
    """
    fps = float(samples.fps[row])
    observed, predicted = samples.observed.shape[1], samples.predicted.shape[1]
    step = max(1, math.ceil(fps / FASTEST_FPS))
    x0, x1, top, bottom = figures.row_limits(samples, row, range(observed), range(predicted))
    left, width, below, above = 0.55, 4.75, 0.45, 0.55
    height = width * (bottom - top) / (x1 - x0)
    total = below + height + above
    figure = Figure(figsize=(left + width + 0.1, total), dpi=dpi)
    across = left + width + 0.1
    axes = figure.add_axes((left / across, below / total, width / across, height / total))
    figures.frame_panel(axes, (x0, x1, top, bottom), first=True)
    axes.set_xlabel(figures.axes_text(centre), fontsize=8)
    title = ", ".join(filter(None, (figures.row_title(samples, row, 44), figures.mean_error(samples, row))))
    figure.text(left / across, 1 - 0.08 / total, title, fontsize=8, va="top", fontweight="bold")
    lines = {
        (name, hand): axes.plot([], [], color=color, marker="o", markersize=3, markevery=[0], **look)[0]
        for name, look in figures.LOOKS.items()
        for hand, (_, color) in enumerate(figures.HANDS)
    }
    axes.legend(
        handles=figures.legend()[2:], loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.1, fontsize=8
    )
    writer = PillowWriter(fps=max(1, round(fps / step)))
    # A folder of its own: the writer wants a path.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "forecast.gif"
        with writer.saving(figure, path, dpi):
            # Ending with the last frame, whatever the step; held for half a second, before all begins again.
            numbers = list(range(observed + predicted - 1, -1, -step))[::-1]
            for number in numbers + numbers[-1:] * round(fps / step / 2):
                poses, title = _moment(samples, row, number - observed)
                for drawn, line in lines.items():
                    line.set_data(poses.get(drawn, np.empty((0, 2))).T)
                axes.set_title(title, fontsize=8, pad=3, loc="left")
                writer.grab_frame()
        return path.read_bytes()


def _moment(samples: Samples, row: int, ahead: int) -> tuple[dict[tuple[str, int], np.ndarray], str]:
    """Returns the strokes by name and hand, and the title, of the frame that is `ahead` of the first predicted one."""
    seconds = f"{(ahead + 1) / samples.fps[row]:+.2f} s"
    if ahead < 0:
        pose, present = samples.observed[row, ahead], samples.observed_present[row, ahead]
        return _strokes({"observed": pose}, present), f"{seconds}   observed"
    present = samples.target_present[row, ahead]
    predicted, target = samples.predicted[row, ahead], samples.target[row, ahead]
    error_px = figures.frame_error_px(predicted, target, present)
    title = f"{seconds}   forecast" + ("" if math.isnan(error_px) else f", error {error_px:.0f} px")
    return _strokes({"true": target, "predicted": predicted}, present), title


def _strokes(poses: dict[str, np.ndarray], present: np.ndarray) -> dict[tuple[str, int], np.ndarray]:
    hands = [hand for hand in (0, 1) if present[hand]]
    return {(name, hand): figures.stroke(figures.hand_px(pose, hand)) for name, pose in poses.items() for hand in hands}
