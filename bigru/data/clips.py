"""The clip index and the HDF5 clips it names: found, checked, and read once each."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from bigru.config import DataConfig
from bigru.data.hdf5 import (
    GAZE_DATASET,
    HAND_DATASETS,
    MAX_FRAMES,
    OBJECT_DATASET,
    SURROGATE_DATASET,
    ClipError,
    DataError,
    checked_dataset,
    h5py_errors,
    own_dataset,
    read_array,
    read_values,
    require_datasets,
)
from bigru.files import printable

INDEX_NAME = "subtasks_byTask_time.csv"
COLUMNS = ("participant", "camera", "task", "subtask", "start_time", "end_time", "filename")
CAMERA = "CAM_AV"
SUBTASKS = (
    *("BHO", "BPC", "CG", "CS", "FO", "HBNS", "HBPP", "HBPS", "HCP", "HCS", "HEC", "HGOT"),
    *("HHO", "HNS", "HPCS", "HPH", "HPP", "HPS", "HPT", "HSA", "RBNS", "RBPP", "RBPS", "RCG"),
    *("RCS", "REC", "RHO", "RNS", "RPCS", "RPH", "RPP", "RPS", "RPT", "RSA", "STP", "THP"),
)
"""The published subtasks, in alphabetical order: one map of classes for all splits."""

# ASCII digits only: \d alone would let other scripts' digits through.
CLIP_NAME = re.compile(
    r"(p\d{2})-(CAM_(?:AV|LL|LR|UL|UR))-([A-Z]+_[A-Z]{2})-([A-Z]+)-(\d+(?:\.\d+)?)_(\d+(?:\.\d+)?)\.mp4", re.ASCII
)

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

# What file systems take.
LONGEST_NAME = 255

# 45 times the published index.
MAX_INDEX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Skipped:
    """A clip left out, why (`reason`, as in ClipError), and what was found (`detail`)."""

    stem: str
    reason: str
    detail: str


@dataclass(frozen=True)
class IndexedClip:
    """One usable row of the index."""

    stem: str
    participant: int
    subtask: str


@dataclass(frozen=True)
class ClipIndex:
    """The rows of an index file, in its order."""

    path: Path
    clips: tuple[IndexedClip, ...]
    skipped: tuple[Skipped, ...]
    """Rows with a name that does not follow the pattern, or that repeat an earlier row."""
    other_cameras: int
    """Rows of cameras other than the aerial one, which are not wanted here."""


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


def find_index(config: DataConfig) -> Path:
    """Locates the index file: `config.index`, else the usual name in the data root, else beside it.

    Raises:
        ValueError: `config.data_root` is None.
        FileNotFoundError: there is no data root or no index; the message names every place tried.
    """
    root = config.data_root
    if root is None:
        raise ValueError("data_root: expected a folder of clips, got None")
    if not root.is_dir():
        wrong = "is not a folder" if root.exists() else "does not exist"
        raise FileNotFoundError(f"data_root: the folder of clips {printable(root)} {wrong}")
    # A link lies in one folder and leads to another; the parent of `.` is `.` again.
    beside = [Path(os.path.abspath(root)).parent, root.resolve().parent]  # noqa: PTH100, which keeps links and drops dots
    usual = [folder / INDEX_NAME for folder in dict.fromkeys([root, *beside])]
    places = [config.index] if config.index else usual
    for place in places:
        if place.is_file():
            return place
    looked = f"no index of clips: looked for {' and '.join(map(printable, places))}"
    if config.index is not None:
        looked += ", as index says (in a reference configuration: csv_path)"
        there = [printable(place) for place in usual if place.is_file()]
        looked += f"; {there[0]} is there, and is read where none is named" if there else ""
    raise FileNotFoundError(looked)


def read_index(path: Path) -> ClipIndex:
    """Read a tab-separated index: participant camera task subtask start_time end_time filename.

    Rows of other cameras are counted, rows with an unusable name and repeated rows are skipped with a reason.

    Raises:
        DataError: the file is empty, not text, lacks a column or has it twice, or has a row of the wrong width; the
            message names the file, the line and what was expected.
    """
    clips: list[IndexedClip] = []
    skipped: list[Skipped] = []
    first_line: dict[str, int] = {}
    other_cameras = 0
    for line, row in _index_rows(path):
        if row["camera"] != CAMERA:
            other_cameras += 1
            continue
        try:
            clip = _indexed_clip(row)
            if clip.stem in first_line:
                raise ClipError("duplicate", f"line {line} repeats line {first_line[clip.stem]}")
        except ClipError as error:
            name = row["filename"][:100].removesuffix(".mp4")
            # From the file, and shown: no control characters onto a terminal.
            skipped.append(Skipped(name if name.isprintable() else ascii(name), error.reason, error.detail))
            continue
        first_line[clip.stem] = line
        clips.append(clip)
    return ClipIndex(path, tuple(clips), tuple(skipped), other_cameras)


def _index_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Return (line number, column -> text) for every row of the index."""
    expected = f"expected tab-separated columns {' '.join(COLUMNS)}"
    size = path.stat().st_size
    if size > MAX_INDEX_BYTES:
        raise DataError(f"index {path}: {size:,} bytes, at most {MAX_INDEX_BYTES:,} are read; {expected}")
    header: list[str] = []
    rows = []
    # Bytes, decoded line by line, so that the message can name the line that is not text.
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                text = "\0"
            if "\0" in text:
                raise DataError(f"index {path}, line {line}: not text; {expected}")
            fields = [_unquoted(field) for field in text.split("\t")]
            if not header:
                missing = [name for name in COLUMNS if name not in fields]
                if missing:
                    raise DataError(f"index {path}, line {line}: no column {', '.join(missing)}; {expected}")
                repeated = [name for name in COLUMNS if fields.count(name) > 1]
                if repeated:
                    raise DataError(f"index {path}, line {line}: repeated column {', '.join(repeated)}; {expected}")
                header = fields
            elif text.strip():
                if len(fields) != len(header):
                    raise DataError(f"index {path}, line {line}: {len(fields)} columns, not {len(header)}; {expected}")
                rows.append((line, dict(zip(header, fields, strict=True))))
    if not header:
        raise DataError(f"index {path}, line 1: the file is empty; {expected}")
    if not rows:
        raise DataError(f"index {path}, line 2: no row after the header; {expected}")
    return rows


def _unquoted(field: str) -> str:
    return field[1:-1] if len(field) > 1 and field[0] == field[-1] == '"' else field


def _indexed_clip(row: dict[str, str]) -> IndexedClip:
    """Check a row's file name, which becomes part of a path, against the pattern and the row's own columns."""
    name = row["filename"]
    match = CLIP_NAME.fullmatch(name)
    if match is None or len(name) > LONGEST_NAME:
        raise ClipError("bad name", f"{name[:100]!r} is not like p01-{CAMERA}-TASK_XY-SUBTASK-START_END.mp4")
    columns = tuple(row[column] for column in ("participant", "camera", "task", "subtask"))
    if match.groups()[:4] != columns:
        raise ClipError("bad name", f"its row says {' '.join(columns)[:100]!r}")
    return IndexedClip(name.removesuffix(".mp4"), int(match[1][1:]), match[4])


def clip_places(root: str, clip: IndexedClip) -> tuple[str, str]:
    """Return the paths at which a clip's file may be, the likelier first."""
    return f"{root}/{clip.subtask}/{clip.stem}.h5", f"{root}/{clip.stem}.h5"


def find_clip(root: Path, clip: IndexedClip) -> Path:
    """Locate a clip's file: `{root}/{subtask}/{stem}.h5`, else `{root}/{stem}.h5`.

    Raises:
        ClipError: `missing`, or `unreadable` where the folder may not be looked into.
    """
    try:
        for place in clip_places(str(root), clip):
            path = Path(place)
            if path.is_file():
                return path
    except OSError as error:
        raise ClipError("unreadable", str(error)) from error
    raise ClipError("missing", f"no .h5 file in {root / clip.subtask} or {root}")


def clips_below(root: Path, clips: Sequence[IndexedClip]) -> Path | None:
    """Finds the folder in `root` that holds clips, where `root` is one folder too high; None for none."""
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    # Some clips may be missing there too.
    for clip, folder in itertools.product(clips[:2000], folders):
        if any(Path(place).is_file() for place in clip_places(str(folder), clip)):
            return folder
    return None


def read_clip(path: Path, config: DataConfig, needed: int | None = None) -> Clip:
    """Read the datasets that `config` asks for from one HDF5 clip, once, and resample them if it says so.

    Shapes and types are checked before anything is read, so a short clip costs no more than its opening. Links
    are not followed: a clip holds its own data or is not used.

    Args:
        path: the clip; where its timestamps tell no frame rate, its name must tell the participant, as in the index.
        config: which modalities are on, how many frames a window takes, and the frame rate to bring the clip to.
        needed: frames that the clip must have; default: those of one window, observed and predicted.

    Raises:
        ClipError: the clip cannot be used; its `reason` says why.
    """
    needed = config.observed + config.predicted if needed is None else needed
    with open_clip(path) as file:
        return read_open_clip(file, config, needed)


@contextmanager
def open_clip(path: Path) -> Iterator[h5py.File]:
    """Opens a clip for reading.

    Raises:
        ClipError: `missing` or `unreadable`.
    """
    if not path.is_file():
        raise ClipError("missing", f"no file {printable(path)}")
    with h5py_errors():
        file = h5py.File(path, "r")
    with file:
        yield file


def read_open_clip(file: h5py.File, config: DataConfig, needed: int) -> Clip:
    """As `read_clip`, from a file that `open_clip` opened."""
    names = [*HAND_DATASETS]
    names += [GAZE_DATASET] * config.gaze + [OBJECT_DATASET] * config.objects + [SURROGATE_DATASET] * config.surrogate
    require_datasets(file, names)
    datasets = {name: checked_dataset(file, name) for name in names}
    lengths = {name: dataset.shape[0] for name, dataset in datasets.items()}
    frames = lengths[HAND_DATASETS[0]]
    if set(lengths.values()) != {frames}:
        raise ClipError("frame counts differ", ", ".join(f"{name} {length}" for name, length in lengths.items()))
    # Before anything is read, where the clip's own frames are what counts.
    if frames < (needed if config.resample is None else 1):
        raise ClipError("short", f"{frames} frames, {max(1, needed)} needed")
    fps, seconds, assumed = _frame_times(file, frames)
    if config.resample is not None:
        length = resampled_length(seconds, config.resample)
        if length < needed:
            raise ClipError("short", f"{length} frames at {config.resample:g} per second, {needed} needed")
        if length > MAX_FRAMES:
            raise ClipError("too long", f"its timestamps span {length:,} frames at {config.resample:g} per second")
    values = {name: read_values(dataset, config.nan_missing) for name, dataset in datasets.items()}
    clip = Clip(
        fps=fps,
        hands=np.stack([values[name] for name in HAND_DATASETS], axis=1),
        gaze=values.get(GAZE_DATASET),
        objects=values.get(OBJECT_DATASET),
        surrogate=values.get(SURROGATE_DATASET),
        seconds=seconds,
        assumed=assumed,
    )
    return clip if config.resample is None else resampled(clip, config.resample)


def subtask_number(stem: str) -> int:
    """Return the place in SUBTASKS of the subtask that a clip is named after, -1 for another or for no such name."""
    match = CLIP_NAME.fullmatch(f"{stem}.mp4")
    return SUBTASKS.index(match[4]) if match is not None and match[4] in SUBTASKS else -1


def published_frame_rate(participant: int) -> float:
    """Return the dataset's documented frames per second: 23 for participants 1-28, 59 from 29 on."""
    return 23.0 if participant <= 28 else 59.0


def _frame_times(file: h5py.File, frames: int) -> tuple[float, np.ndarray, str]:
    """Returns frames per second, each frame's time, (F,) seconds from 0, and why the rate is assumed, if it is.

    The rate is that of the timestamps' median step. Where they tell none it is the published one.

    Raises:
        ClipError: `bad timestamps`, they tell a rate that cannot be, or none, and the clip's name tells no participant
            either; or `frame counts differ`.
    """
    dataset = own_dataset(file, "timestamps")
    if dataset is None:
        return _assumed_times(file, np.arange(frames), "no timestamps")
    if dataset.dtype.kind not in "fiu":
        return _assumed_times(file, np.arange(frames), "timestamps are no numbers")
    if dataset.ndim != 1:
        return _assumed_times(file, np.arange(frames), f"timestamps of shape {dataset.shape}, expected (F,)")
    if dataset.shape[0] != frames:
        raise ClipError("frame counts differ", f"timestamps {dataset.shape[0]}, {HAND_DATASETS[0]} {frames}")
    seconds = read_array(dataset, np.dtype(np.float64))
    steps = np.diff(seconds)
    if not np.isfinite(seconds).all() or not np.isfinite(steps).all():
        return _assumed_times(file, np.arange(frames), "timestamps are not finite")
    if frames < 2:
        return _assumed_times(file, np.arange(frames), "a single frame")
    if steps.min() < 0 or np.median(steps) == 0:
        return _assumed_times(file, np.arange(frames), "timestamps do not rise")
    if np.median(steps) == 1 and np.array_equal(seconds, np.rint(seconds)):
        return _assumed_times(file, seconds, "timestamps are frame numbers")
    # Python's division, as NumPy's warns where the quotient overflows.
    fps = 1 / float(np.median(steps))
    slowest, fastest = FRAME_RATES
    if not slowest <= fps <= fastest:
        expected = f"expected seconds, {slowest:g} to {fastest:,g} frames each"
        raise ClipError("bad timestamps", f"they tell {fps:.3g} frames per second, {expected}")
    # float32 seconds resolve a step to about 1e-4 of its length: one decimal keeps clips of one rate together.
    return round(fps, 1), seconds - seconds[0], ""


def _assumed_times(file: h5py.File, numbers: np.ndarray, why: str) -> tuple[float, np.ndarray, str]:
    """Returns the published frame rate, the times of the frames so numbered, and why the rate is assumed."""
    match = CLIP_NAME.fullmatch(f"{Path(file.filename).stem}.mp4")
    if match is None:
        raise ClipError("bad timestamps", f"{why}, and the clip's name tells no participant, whose rate is documented")
    fps = published_frame_rate(int(match[1][1:]))
    return fps, (numbers - numbers[0]) / fps, why


def resampled_length(seconds: np.ndarray, rate: float) -> int:
    """Return how many frames `rate` per second gives from the first to the last of `seconds`, (F,) with F > 0."""
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
