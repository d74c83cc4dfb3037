"""The clips of a dataset, HDF5 files: checked, read, and brought to another frame rate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from bigru.config import DataConfig
from bigru.data.hdf5 import (
    HAND_DATASETS,
    MAX_FRAMES,
    MODALITIES,
    ClipError,
    checked_dataset,
    h5py_errors,
    own_dataset,
    read_array,
    read_values,
    require_datasets,
)
from bigru.data.index import CLIP_NAME

# Nobody films hands at fewer frames per second, or at more. Milliseconds taken for seconds give 0.02 or 0.06.
FRAME_RATES = (1.0, 1000.0)

# Part of a step between two frames within which a resampled frame is taken for one of the two: float32 timestamps
# tell no less, and a clip that has the wanted rate passes unchanged.
SNAP = 0.01

# Longest step between two frames that is bridged. A hand that moves 170 px to and fro once in 1.5 s is up to 15 px off
# the straight line within 0.2 s, and further within a longer step; a frame or two that a camera dropped take less.
LONGEST_STEP_S = 0.2
# A clip's own steps are no holes, however slow its camera.
LONGEST_STEP_FRAMES = 1.5


@dataclass(frozen=True)
class Clip:
    """The arrays of one clip, float32, F frames; a modality that is off is None."""

    fps: float
    """Frames per second."""
    hands: np.ndarray
    """(F, 2, 21, 3): left and right hand, MediaPipe joints, x/W, y/H and wrist-relative z."""
    gaze: np.ndarray | None
    """(F, 2): image-normalised; (0, 0) where missing."""
    objects: np.ndarray | None
    """(F, 30, 4): centre x, y, width, height, image-normalised; zero-padded."""
    surrogate: np.ndarray | None
    """(F, 2, 4): the robot surrogate's hands, coded like `objects`."""
    seconds: np.ndarray
    """(F,) float64: when each frame was taken, from 0, never falling."""
    assumed: str = ""
    """Why `fps` is the documented rate of the participant and not measured; empty where it is measured."""

    @property
    def present(self) -> np.ndarray:
        """(F, 2) bool: whether the left and the right hand were seen; a missing hand is all zeros."""
        seen: np.ndarray = np.any(self.hands, axis=(2, 3))
        return seen

    @property
    def rate(self) -> str:
        """The frame rate in words, and whether it is assumed."""
        return f"{self.fps:g} per second" + (f" (assumed: {self.assumed})" if self.assumed else "")

    @property
    def longest_step(self) -> float:
        """Seconds between two frames beyond which frames are lacking there."""
        return max(LONGEST_STEP_S, LONGEST_STEP_FRAMES / self.fps)

    def holes(self) -> np.ndarray:
        """Returns the numbers, (N,), of the frames after which frames are lacking."""
        return np.flatnonzero(np.diff(self.seconds) > self.longest_step)


def read_clip(path: Path, config: DataConfig, needed: int | None = None, fps: float | None = None) -> Clip:
    """Reads the datasets that `config` asks for from one HDF5 clip, once, and resample them if it says so.

    Shapes and types are checked before anything is read, so a short clip costs no more than its opening. Links
    are not followed: a clip holds its own data or is not used.

    Args:
        path: the clip; where its timestamps tell no frame rate and `fps` is None, its name must tell the participant,
            as in the index.
        config: which modalities are on, how many frames a window takes, and the frame rate to bring the clip to.
        needed: frames that the clip must have; default: those of one window, observed and predicted.
        fps: frames per second where the timestamps tell none.

    Raises:
        ClipError: the clip cannot be used; its `reason` says why.
    """
    needed = config.observed + config.predicted if needed is None else needed
    with open_clip(path) as file:
        return read_open_clip(file, config, needed, fps)


@contextmanager
def open_clip(path: Path) -> Iterator[h5py.File]:
    """Opens a clip for reading.

    Raises:
        ClipError: `missing` or `unreadable`.
    """
    if not path.is_file():
        raise ClipError("missing", "no such file")
    with h5py_errors():
        file = h5py.File(path, "r")
    with file:
        yield file


def read_open_clip(file: h5py.File, config: DataConfig, needed: int, fps: float | None = None) -> Clip:
    """Reads a clip as `read_clip` does, from a file that `open_clip` opened."""
    names = [*HAND_DATASETS, *(dataset for name, dataset in MODALITIES.items() if getattr(config, name))]
    require_datasets(file, names)
    datasets = {name: checked_dataset(file, name) for name in names}
    lengths = {name: dataset.shape[0] for name, dataset in datasets.items()}
    frames = lengths[HAND_DATASETS[0]]
    if set(lengths.values()) != {frames}:
        raise ClipError("frame counts differ", ", ".join(f"{name} {length}" for name, length in lengths.items()))
    # Before anything is read, where the clip's own frames are what counts.
    if frames < (needed if config.resample is None else 1):
        raise ClipError("short", f"{frames} frames, {max(1, needed)} needed")
    fps, seconds, assumed = _frame_times(file, frames, fps)
    if config.resample is not None:
        length = resampled_length(seconds, config.resample)
        if length < needed:
            raise ClipError("short", f"{length} frames at {config.resample:g} per second, {needed} needed")
        if length > MAX_FRAMES:
            raise ClipError("too long", f"its timestamps span {length:,} frames at {config.resample:g} per second")
    values = {name: read_values(dataset, config.nan_missing) for name, dataset in datasets.items()}
    hands = np.stack([values[name] for name in HAND_DATASETS], axis=1)
    others = {name: values.get(dataset) for name, dataset in MODALITIES.items()}
    clip = Clip(fps=fps, hands=hands, seconds=seconds, assumed=assumed, **others)
    return clip if config.resample is None else resampled(clip, config.resample)


def published_frame_rate(participant: int) -> float:
    """Returns the dataset's documented frames per second: 23 for participants 1-28, 59 from 29 on."""
    return 23.0 if participant <= 28 else 59.0


def _frame_times(file: h5py.File, frames: int, given: float | None) -> tuple[float, np.ndarray, str]:
    """Returns frames per second, each frame's time, (F,) seconds from 0, and why the rate is assumed, if it is.

    The rate is that of the timestamps' median step. Where they tell none it is the given or the published one.

    Raises:
        ClipError: `bad timestamps`, they tell a rate that cannot be, or none, and the clip's name tells no participant
            either; or `frame counts differ`.
    """
    dataset, numbers = own_dataset(file, "timestamps"), np.arange(frames)
    if dataset is None:
        why = "no timestamps"
    elif dataset.dtype.kind not in "fiu":
        why = "timestamps are no numbers"
    elif dataset.ndim != 1:
        why = f"timestamps of shape {dataset.shape}, expected (F,)"
    elif dataset.shape[0] != frames:
        raise ClipError("frame counts differ", f"timestamps {dataset.shape[0]}, {HAND_DATASETS[0]} {frames}")
    else:
        seconds = read_array(dataset, np.dtype(np.float64))
        steps = np.diff(seconds)
        if not np.isfinite(seconds).all() or not np.isfinite(steps).all():
            why = "timestamps are not finite"
        elif frames < 2:
            why = "a single frame"
        elif steps.min() < 0 or np.median(steps) == 0:
            why = "timestamps do not rise"
        elif np.median(steps) == 1 and np.array_equal(seconds, np.rint(seconds)):
            why, numbers = "timestamps are frame numbers", seconds
        else:
            # float32 seconds resolve a step to about 1e-4 of its length: one decimal keeps clips of one rate together.
            return round(_told_rate(steps), 1), seconds - seconds[0], ""
    if given is None:
        match = CLIP_NAME.fullmatch(f"{Path(file.filename).stem}.mp4")
        if match is None:
            cure = "whose rate is documented; predict takes --fps"
            raise ClipError("bad timestamps", f"{why}, and the clip's name tells no participant, {cure}")
        given = published_frame_rate(int(match[1][1:]))
    return given, (numbers - numbers[0]) / given, why


def _told_rate(steps: np.ndarray) -> float:
    """Returns the frames per second of the median step; raises ClipError where nobody films at such a rate."""
    # Python's division, as NumPy's warns where the quotient overflows.
    fps = 1 / float(np.median(steps))
    slowest, fastest = FRAME_RATES
    if not slowest <= fps <= fastest:
        expected = f"expected seconds, {slowest:g} to {fastest:,g} frames each"
        raise ClipError("bad timestamps", f"they tell {fps:.3g} frames per second, {expected}")
    return fps


def resampled_length(seconds: np.ndarray, rate: float) -> int:
    """Returns how many frames `rate` per second gives from the first to the last of `seconds`, (F,) with F > 0."""
    # float32 timestamps end a little early as often as late.
    return int((seconds[-1] - seconds[0]) * rate + SNAP) + 1


def resampled(clip: Clip, rate: float) -> Clip:
    """Returns the clip at `rate` frames per second, between its frames by linear interpolation on their times.

    A hand or a gaze that is missing in either of the two frames it would lie between is missing: nothing is blended
    with zeros. Boxes are those of the nearest frame, since nothing says that a box keeps its place in the list. Within
    a step longer than `clip.longest_step` everything is missing.
    """
    seconds, frames = clip.seconds, len(clip.seconds)
    times = np.arange(resampled_length(seconds, rate)) / rate
    after = np.searchsorted(seconds, times, side="right").clip(min(1, frames - 1), frames - 1)
    before = np.maximum(after - 1, 0)
    gap = seconds[after] - seconds[before]
    since = times - seconds[before]
    # Of a hole SNAP would be many steps.
    near = SNAP / clip.fps
    hole = (gap > clip.longest_step) & (since > near) & (gap - since > near)
    share = np.divide(since, gap, out=np.ones_like(times), where=gap > 0)
    share = np.where(share < SNAP, 0, np.where(share > 1 - SNAP, 1, share))
    nearest = np.where(share < 0.5, before, after)

    def per_frame(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return values.reshape(-1, *[1] * (len(shape) - 1))

    def between(values: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Interpolates (F, ...) where `seen`, (F, ...), says that there is something on both sides."""
        later = per_frame(share, values.shape)
        known = (seen[before] | (later == 1)) & (seen[after] | (later == 0)) & ~per_frame(hole, values.shape)
        return np.where(known, values[before] * (1 - later) + values[after] * later, 0).astype(np.float32)

    def nearby(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else np.where(per_frame(hole, values.shape), np.float32(0), values[nearest])

    return Clip(
        fps=rate,
        hands=between(clip.hands, clip.present[..., None, None]),
        gaze=None if clip.gaze is None else between(clip.gaze, np.any(clip.gaze, axis=(1,))[:, None]),
        objects=nearby(clip.objects),
        surrogate=nearby(clip.surrogate),
        seconds=times,
        assumed=clip.assumed,
    )
