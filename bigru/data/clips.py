"""The clip index and the HDF5 clips it names: found, checked, and read once each."""

from __future__ import annotations

import re
from collections.abc import Iterator
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
    own_dataset,
    read_array,
    read_values,
    require_datasets,
)

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

    @property
    def present(self) -> np.ndarray:
        """(F, 2) bool: whether the left and the right hand were seen; a missing hand is all zeros."""
        return np.any(self.hands, axis=(2, 3))


def find_index(config: DataConfig) -> Path:
    """Locate the index file: `config.index`, else the usual name in the data root, else beside it.

    Raises:
        ValueError: `config.data_root` is None.
        FileNotFoundError: there is no data root or no index; the message names every place tried.
    """
    root = config.data_root
    if root is None:
        raise ValueError("data_root: expected a folder of clips, got None")
    if not root.is_dir():
        raise FileNotFoundError(f"data_root: {root} is not a folder")
    # Resolved first, because the parent of `.` is `.` again.
    places = [config.index] if config.index else [root / INDEX_NAME, root.resolve().parent / INDEX_NAME]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"no index of clips: looked for {' and '.join(map(str, places))}")


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
            fields = text.split("\t")
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


def read_clip(path: Path, config: DataConfig, needed: int | None = None) -> Clip:
    """Read the datasets that `config` asks for from one HDF5 clip, once, and resample them if it says so.

    Shapes and types are checked before anything is read, so a short clip costs no more than its opening. Links
    are not followed: a clip holds its own data or is not used.

    Args:
        path: the clip, named as in the index with `.h5` for `.mp4`.
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
    """Open a clip for reading; what h5py raises in the block becomes a ClipError.

    Raises:
        ClipError: `bad name`, `missing` or `unreadable`.
    """
    if CLIP_NAME.fullmatch(f"{path.stem}.mp4") is None:
        raise ClipError("bad name", f"{path.name[:100]!r} is not like p01-{CAMERA}-TASK_XY-SUBTASK-START_END.h5")
    if not path.is_file():
        raise ClipError("missing", f"no file {path}")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except ClipError:
        raise
    # What h5py raises for a damaged file depends on where the damage is.
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ClipError("unreadable", str(error).splitlines()[0] if str(error) else repr(error)) from error


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
    fps, seconds = _frame_times(file, frames)
    if config.resample is not None:
        length = resampled_length(seconds, config.resample)
        if length < needed:
            raise ClipError("short", f"{length} frames at {config.resample:g} per second, {needed} needed")
        if length > MAX_FRAMES:
            raise ClipError("too long", f"its timestamps span {length:,} frames at {config.resample:g} per second")
    clip = Clip(
        fps=fps,
        hands=np.stack([read_values(datasets[name]) for name in HAND_DATASETS], axis=1),
        gaze=read_values(datasets[GAZE_DATASET]) if config.gaze else None,
        objects=read_values(datasets[OBJECT_DATASET]) if config.objects else None,
        surrogate=read_values(datasets[SURROGATE_DATASET]) if config.surrogate else None,
        seconds=seconds,
    )
    return clip if config.resample is None else resampled(clip, config.resample)


def subtask_number(stem: str) -> int:
    """Return the place in SUBTASKS of the subtask that a clip is named after, -1 for another or for no such name."""
    match = CLIP_NAME.fullmatch(f"{stem}.mp4")
    return SUBTASKS.index(match[4]) if match is not None and match[4] in SUBTASKS else -1


def published_frame_rate(participant: int) -> float:
    """Return the dataset's documented frames per second: 23 for participants 1-28, 59 from 29 on."""
    return 23.0 if participant <= 28 else 59.0


def _frame_times(file: h5py.File, frames: int) -> tuple[float, np.ndarray]:
    """Return frames per second and each frame's time, (F,) seconds from 0.

    From the timestamps, the rate from their median step; evenly at the published rate where they tell none.

    Raises:
        ClipError: `bad timestamps`, they tell a rate that cannot be; or `frame counts differ`.
    """
    published = published_frame_rate(int(Path(file.filename).name[1:3]))
    evenly = published, np.arange(frames) / published
    dataset = own_dataset(file, "timestamps")
    if dataset is None or dataset.dtype.kind not in "fiu" or dataset.ndim != 1:
        return evenly
    if dataset.shape[0] != frames:
        raise ClipError("frame counts differ", f"timestamps {dataset.shape[0]}, {HAND_DATASETS[0]} {frames}")
    if frames < 2:
        return evenly
    seconds = read_array(dataset, np.dtype(np.float64))
    steps = np.diff(seconds)
    if not np.isfinite(steps).all() or steps.min() < 0 or np.median(steps) == 0:
        return evenly
    # Python's division, as NumPy's warns where the quotient overflows.
    fps = 1 / float(np.median(steps))
    slowest, fastest = FRAME_RATES
    if not slowest <= fps <= fastest:
        expected = f"expected seconds, {slowest:g} to {fastest:,g} frames each"
        raise ClipError("bad timestamps", f"they tell {fps:.3g} frames per second, {expected}")
    # float32 seconds resolve a step to about 1e-4 of its length: one decimal keeps clips of one rate together.
    return round(fps, 1), seconds - seconds[0]


def resampled_length(seconds: np.ndarray, rate: float) -> int:
    """Return how many frames `rate` per second gives from the first to the last of `seconds`, (F,) with F > 0."""
    # float32 timestamps end a little early as often as late.
    return int((seconds[-1] - seconds[0]) * rate + SNAP) + 1


def resampled(clip: Clip, rate: float) -> Clip:
    """Return the clip at `rate` frames per second, between its frames by linear interpolation on their times.

    A hand or a gaze that is missing in either of the two frames it would lie between is missing: nothing is blended
    with zeros. Boxes are those of the nearest frame, since nothing says that a box keeps its place in the list.
    """
    seconds, frames = clip.seconds, len(clip.seconds)
    times = np.arange(resampled_length(seconds, rate)) / rate
    after = np.searchsorted(seconds, times, side="right").clip(min(1, frames - 1), frames - 1)
    before = np.maximum(after - 1, 0)
    gap = seconds[after] - seconds[before]
    share = np.divide(times - seconds[before], gap, out=np.ones_like(times), where=gap > 0)
    share = np.where(share < SNAP, 0, np.where(share > 1 - SNAP, 1, share))
    nearest = np.where(share < 0.5, before, after)

    def between(values: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Interpolate (F, ...) where `seen`, (F, ...), says that there is something on both sides."""
        later = share.reshape(-1, *[1] * (values.ndim - 1))
        known = (seen[before] | (later == 1)) & (seen[after] | (later == 0))
        return np.where(known, values[before] * (1 - later) + values[after] * later, 0).astype(np.float32)

    return Clip(
        fps=rate,
        hands=between(clip.hands, clip.present[..., None, None]),
        gaze=None if clip.gaze is None else between(clip.gaze, np.any(clip.gaze, axis=(1,))[:, None]),
        objects=None if clip.objects is None else clip.objects[nearest],
        surrogate=None if clip.surrogate is None else clip.surrogate[nearest],
        seconds=times,
    )
