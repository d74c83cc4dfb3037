"""Forecasts of clips, as numbers and pictures: what `python -m bigru.predict` does.

Of each clip it writes the forecast as {clip}.npz and {clip}.csv, and draws it in {clip}.png and {clip}.gif, the true
future beside it where the clip holds one. What the network answers is centred: each frame's own midpoint of the two
wrists is subtracted, as it was from the frames it learnt from. So a forecast says where each joint will be as seen from
the midpoint of the wrists of that very frame, and not where that midpoint will be in the image. In a frame with a hand
missing its wrist counts as (0, 0), as it did in training. Only a run with `--centre last`, which has one origin for a
whole window, says where in the image the hands will be.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from bigru.config import ConfigError, DataConfig
from bigru.data.clips import read_clip
from bigru.data.windows import frame_features, hands_origin
from bigru.files import write_atomically
from bigru.layout import CENTRED_UNIT, IMAGE_PX, JOINTS_PER_HAND, ORIGINS, POSE_SIZE
from bigru.model.forecaster import HandForecaster
from bigru.report import figures
from bigru.report.animation import gif
from bigru.report.record import Samples

IMAGE = np.array(IMAGE_PX)
HANDS = ("left", "right")
# MediaPipe's names.
THUMB, FINGER = ("CMC", "MCP", "IP", "TIP"), ("MCP", "PIP", "DIP", "TIP")
FINGERS = {"THUMB": THUMB, "INDEX_FINGER": FINGER, "MIDDLE_FINGER": FINGER, "RING_FINGER": FINGER, "PINKY": FINGER}
JOINT_NAMES = ("WRIST", *(f"{finger}_{joint}" for finger, joints in FINGERS.items() for joint in joints))
COLUMNS = (
    *("frame", "time_s", "ahead_s", "hand", "joint", "joint_name", "origin", "x_norm", "y_norm", "x_px", "y_px"),
    *("true_x_norm", "true_y_norm", "true_x_px", "true_y_px", "error_px", "fps", "fps_assumed"),
)


@dataclass(frozen=True, eq=False)
class Forecast:
    """A window of one clip and what is to follow it; hands are 84-vectors in centred units."""

    stem: str
    fps: float
    """Frames per second."""
    start: int
    """First observed frame in the clip, as read."""
    centre: Literal["frame", "last"]
    """Origin of the hands: each frame's own midpoint of the wrists, or `last_origin` in every frame."""
    last_origin: np.ndarray  # (2,) image-normalised x, y: where in the image the last observed frame's origin lies
    observed: np.ndarray  # (T, 84)
    observed_present: np.ndarray  # (T, 2) bool: left, right
    predicted: np.ndarray  # (T, 84)
    target: np.ndarray  # (T, 84), NaN where a hand is missing or the clip has ended
    assumed: str = ""
    """Why the frame rate, and so every time, is assumed; empty where it is measured."""

    def in_image(self, poses: np.ndarray) -> np.ndarray:
        """84-vectors in centred units, (T, 84), as fractions of the image's width and height, (T, 2, 21, 2)."""
        joints = CENTRED_UNIT * poses.reshape(len(poses), 2, JOINTS_PER_HAND, 2)
        return joints + self.last_origin if self.centre == "last" else joints

    @property
    def error_px(self) -> np.ndarray:
        """(T, 42): distance of each joint from the true one in pixels, NaN where that is not known."""
        difference = self.in_image(self.predicted) - self.in_image(self.target)
        return np.linalg.norm(difference * IMAGE, axis=-1).reshape(-1, 2 * JOINTS_PER_HAND)

    @property
    def mean_error_px(self) -> float:
        """Over all joints whose true place is known; NaN if there is none."""
        known = self.error_px[np.isfinite(self.error_px)]
        return float(known.mean()) if known.size else math.nan

    def samples(self) -> Samples:
        """As the figures take it: one window, every predicted hand drawn."""
        return Samples(
            observed=self.observed[None],
            predicted=self.predicted[None],
            target=self.target[None],
            observed_present=self.observed_present[None],
            target_present=np.ones((1, len(self.predicted), 2), dtype=bool),
            fps=np.array([self.fps]),
            fps_assumed=np.array([bool(self.assumed)]),
            error_px=np.array([self.mean_error_px]),
            stem=np.array([self.stem]),
            label=np.array([""]),
        )


def forecast(
    model: HandForecaster, clip: Path, config: DataConfig, start: int | None = None, fps: float | None = None
) -> Forecast:
    """Forecasts as many frames of a clip as `config.observed` says are seen, from frame `start` on.

    Args:
        model: the network; what it is fed must be what `config` reads.
        clip: the .h5 file.
        config: which modalities are read, and T, the frames observed and predicted.
        start: first observed frame; default: the last one after which the clip holds T true frames too, else the one
            that ends with the clip.
        fps: frames per second of a clip whose timestamps tell none.

    Raises:
        ClipError: the clip cannot be read or is too short; the message gives both numbers.
        ConfigError: `start` is outside the clip.
    """
    length = config.observed
    content = read_clip(clip, config, length, fps)
    features, present = frame_features(content, config.centre), content.present
    frames = len(features)
    if start is None:
        start = frames - 2 * length if frames >= 2 * length else frames - length
    if not 0 <= start <= frames - length:
        raise ConfigError(
            f"start: expected 0 to {frames - length} in a clip of {frames} frames of which {length} are "
            f"observed, got {start}"
        )
    now = start + length
    if config.centre == "last":
        last = torch.from_numpy(features[now - 1 : now, :POSE_SIZE])
        origin = hands_origin(last, torch.from_numpy(present[now - 1 : now]))[0].numpy()
        features[:, :POSE_SIZE] -= np.tile(origin, 2 * JOINTS_PER_HAND)
        last_origin = CENTRED_UNIT * origin
    else:
        # As in training, a missing hand's wrist counts as 0.
        last_origin = content.hands[now - 1, :, 0, :2].mean(axis=0)
    device = next(model.parameters()).device
    with torch.inference_mode():
        predicted = model(torch.from_numpy(features[None, start:now]).to(device))[0].cpu().numpy()
    target = np.full_like(predicted, np.nan)
    future = features[now : now + length, :POSE_SIZE]
    seen = present[now : now + length].repeat(2 * JOINTS_PER_HAND, axis=1)
    target[: len(future)] = np.where(seen, future, np.nan)
    return Forecast(
        stem=clip.stem,
        fps=content.fps,
        start=start,
        centre=config.centre,
        last_origin=last_origin,
        observed=features[start:now, :POSE_SIZE],
        observed_present=present[start:now],
        predicted=predicted,
        target=target,
        assumed=content.assumed,
    )


def write(result: Forecast, out: Path) -> list[Path]:
    """Writes a forecast's numbers and pictures, each file whole or not at all; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    samples = result.samples()
    contents = {
        "npz": as_npz(result),
        "csv": as_csv(result).encode(),
        "png": figures.png(figures.forecasts(samples, result.centre)),
        "gif": gif(samples, 0, result.centre),
    }
    # Not with_suffix: the times in a clip's name have dots.
    paths = {kind: out / f"{result.stem}.{kind}" for kind in contents}
    for kind, path in paths.items():
        write_atomically(path, contents[kind])
    return list(paths.values())


def as_npz(result: Forecast) -> bytes:
    """The forecast as a NumPy archive.

    predicted, true, observed (T, 2, 21, 2): hand (left, right), joint, x and y as fractions of the image's width and
    height from `origin`, as in the table; true is NaN where it is not known. observed_present (T, 2). error_px
    (T, 2, 21). frame, time_s, ahead_s (T,) of the predicted frames. last_origin (2,): where in the image the midpoint
    of the wrists lies in the last observed frame. fps, fps_assumed (why the rate is assumed, empty where it is
    measured), start, image_px (2,), stem, origin.
    """
    frame, time_s, ahead_s = _times(result)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        predicted=result.in_image(result.predicted),
        true=result.in_image(result.target),
        observed=result.in_image(result.observed),
        observed_present=result.observed_present,
        error_px=result.error_px.reshape(-1, 2, JOINTS_PER_HAND),
        frame=frame,
        time_s=time_s,
        ahead_s=ahead_s,
        last_origin=result.last_origin,
        fps=result.fps,
        fps_assumed=result.assumed,
        start=result.start,
        image_px=IMAGE,
        stem=result.stem,
        origin=ORIGINS[result.centre],
    )
    return buffer.getvalue()


def as_csv(result: Forecast) -> str:
    """The forecast as a table, a row for each predicted frame, hand and joint; what is not known is empty.

    Columns: frame of the clip, from 0 (as resampled, of a run with --resample); time_s from the clip's start; ahead_s
    after the last observed frame; hand, joint (MediaPipe's number and name); origin, from which x and y count; _norm as
    fractions of the image's width and height, _px in pixels; true_ of the clip itself; error_px the distance of both;
    fps, by which the times are reckoned, and why that is assumed, empty where it is measured.
    """
    origin, rate = ORIGINS[result.centre], (f"{result.fps:g}", result.assumed)
    predicted, true, errors = result.in_image(result.predicted), result.in_image(result.target), result.error_px
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for t, (frame, time_s, ahead_s) in enumerate(zip(*_times(result), strict=True)):
        for number in range(2 * JOINTS_PER_HAND):
            hand, joint = divmod(number, JOINTS_PER_HAND)
            ours, theirs = predicted[t, hand, joint], true[t, hand, joint]
            numbers = (*ours, *ours * IMAGE, *theirs, *theirs * IMAGE, errors[t, number])
            cells = ["" if math.isnan(value) else f"{value:.6g}" for value in numbers]
            named = (HANDS[hand], joint, JOINT_NAMES[joint], origin)
            writer.writerow([frame, f"{time_s:.4f}", f"{ahead_s:.4f}", *named, *cells, *rate])
    return buffer.getvalue()


def _times(result: Forecast) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each predicted frame: its number in the clip, its time, and how far it is ahead of the last observed one."""
    ahead = np.arange(1, len(result.predicted) + 1)
    frame = result.start + len(result.observed) - 1 + ahead
    return frame, frame / result.fps, ahead / result.fps
