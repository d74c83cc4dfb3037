"""Forecasts while a person moves: replays a clip frame by frame and draws where both hands will be.

    python examples/realtime.py --weights runs/20261123_224500/weights.safetensors CLIP.h5
    python examples/realtime.py --save realtime.gif

Without a clip a synthetic one is replayed; without weights the network is untrained, which shows the speed but no
useful forecast. `--save` writes an animation instead of opening a window. In a robot's loop the frames come from a
camera and MediaPipe; only `frames()` changes.
"""

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.animation import PillowWriter
from numpy.typing import NDArray

from bigru import HandForecaster
from bigru.data.clips import read_clip
from bigru.data.synthetic import clip_arrays, plan_clips
from bigru.streaming import ForecastStream

AHEAD = (0, 14, 29, 59)
"""Which of the forecast's frames are drawn."""
FINGERS = [[0, *range(first, first + 4)] for first in (1, 5, 9, 13, 17)]
"""MediaPipe's joints of each finger, from the wrist."""


def frames(clip: Path | None, stream: ForecastStream) -> Iterator[NDArray[np.float32]]:
    """Yields (2, 21, 2) hands, as fractions of the image's width and height."""
    if clip is not None:
        yield from read_clip(clip, stream.config).hands[..., :2]
        return
    plan = max(plan_clips(5, seed=1), key=lambda planned: planned.frames)
    arrays = clip_arrays(plan, seed=1)
    yield from np.stack([arrays["left_landmarks"], arrays["right_landmarks"]], axis=1)[..., :2]


def strokes(hands: NDArray[np.float32]) -> NDArray[np.float32]:
    """Joins (2, 21, 2) joints to one line, (N, 2), broken by NaN between fingers."""
    gap = np.full((1, 2), np.nan, dtype=np.float32)
    return np.concatenate([part for hand in hands for finger in FINGERS for part in (hand[finger], gap)])


def main(argv: list[str] | None = None) -> list[float]:
    """Runs the example; returns the latencies in seconds."""
    parser = argparse.ArgumentParser(description="Forecast frame by frame and draw it.")
    parser.add_argument("clip", nargs="?", type=Path, help="an .h5 clip; default: a synthetic one")
    parser.add_argument("--weights", type=Path, help="a run's weights.safetensors; default: an untrained network")
    parser.add_argument("--save", type=Path, help="write a GIF here instead of opening a window")
    parser.add_argument("--frames", type=int, default=150, help="frames to replay (default: 150)")
    arguments = parser.parse_args(argv)
    # One window is too little work to share: other threads are left to the camera and the robot.
    torch.set_num_threads(1)
    stream = ForecastStream(HandForecaster()) if arguments.weights is None else ForecastStream.load(arguments.weights)

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
    axes.set(xlim=(0, 1), ylim=(1, 0), xlabel="x / image width", ylabel="y / image height")
    colours = pyplot.get_cmap("viridis")(np.linspace(0.2, 0.9, len(AHEAD)))
    (observed,) = axes.plot([], [], "k-", linewidth=2, label="observed now")
    forecasts = [
        axes.plot([], [], color=colour, linewidth=1, label=f"in {ahead + 1} frames")[0]
        for ahead, colour in zip(AHEAD, colours, strict=True)
    ]
    axes.legend(loc="upper right", fontsize=7)
    writer = PillowWriter(fps=25) if arguments.save else None
    latencies = []
    with writer.saving(figure, arguments.save, dpi=80) if writer else nullcontext():
        for number, hands in enumerate(frames(arguments.clip, stream)):
            if number == arguments.frames:
                break
            forecast = stream.push(hands)
            if forecast is None:
                continue
            latencies.append(forecast.latency_s)
            observed.set_data(*strokes(hands).T)
            # Relative to the wrists' midpoint, which is drawn where it was last seen.
            origin = hands[:, 0].mean(0) if stream.config.centre == "frame" else 0
            for line, ahead in zip(forecasts, AHEAD, strict=True):
                line.set_data(*strokes(forecast.positions[min(ahead, len(forecast.positions) - 1)] + origin).T)
            axes.set_title(f"frame {forecast.frame}, forecast in {1e3 * forecast.latency_s:.1f} ms", fontsize=9)
            if writer is None:
                pyplot.pause(0.001)
            else:
                writer.grab_frame()
    pyplot.close(figure)
    if latencies:
        median, slow = 1e3 * np.percentile(latencies, (50, 99))
        print(f"{len(latencies)} forecasts on one thread: median {median:.2f} ms, 99th percentile {slow:.2f} ms")
    return latencies


if __name__ == "__main__":
    main()
