"""The clip index and the HDF5 clips it names: found, checked, and read once each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from bigru.config import DataConfig

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
    r"(p\d{2})-(CAM_(?:AV|LL|LR|UL|UR))-([A-Z]+_[A-Z]{2})-([A-Z]+)-(\d+(?:\.\d+)?)_(\d+(?:\.\d+)?)\.mp4",
    re.ASCII,
)

HAND_DATASETS = ("left_landmarks", "right_landmarks")
GAZE_DATASET = "norm_gaze"
OBJECT_DATASET = "rec_bboxes"
SURROGATE_DATASET = "surrogate_hands"
FRAME_SHAPES: dict[str, tuple[int, ...]] = {
    "left_landmarks": (21, 3),
    "right_landmarks": (21, 3),
    GAZE_DATASET: (2,),
    OBJECT_DATASET: (30, 4),
    SURROGATE_DATASET: (2, 4),
}

# The longest published clip has 1,591 frames; 100,000 are 28 minutes at 59 fps. A file that declares more is
# damaged, and reading it would ask for gigabytes.
MAX_FRAMES = 100_000

# How many coordinates of a point or a box are image-normalised, 0 to 1 within the image: x and y of a landmark, whose
# z has a scale of its own, and all of a box. Gaze is left free: a line of sight meets the image's plane anywhere.
IMAGE_COORDINATES = {"left_landmarks": 2, "right_landmarks": 2, OBJECT_DATASET: 4, SURROGATE_DATASET: 4}

# A joint estimated outside the image lies a little outside 0 to 1 (-0.06 seen), pixels run to 1,728: 10 parts the two.
FARTHEST = 10.0

# Nobody films hands at fewer frames per second, or at more. Milliseconds taken for seconds give 0.02 or 0.06.
FRAME_RATES = (1.0, 1000.0)


class DataError(ValueError):
    """Clips, an index or a split that cannot be used; the message is meant for the person who named them."""


class ClipError(DataError):
    """A clip that cannot be used.

    Attributes:
        reason: a short fixed phrase to count by: `missing`, `short`, `unreadable`, `missing dataset`, `linked`,
            `wrong dtype`, `wrong shape`, `too long`, `frame counts differ`, `non-finite`, `out of range`,
            `bad timestamps`, `bad name`, `duplicate` or `no split`.
        detail: what was found, in words.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


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
            skipped.append(Skipped(row["filename"][:100].removesuffix(".mp4"), error.reason, error.detail))
            continue
        first_line[clip.stem] = line
        clips.append(clip)
    return ClipIndex(path, tuple(clips), tuple(skipped), other_cameras)


def _index_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Return (line number, column -> text) for every row of the index."""
    expected = f"expected tab-separated columns {' '.join(COLUMNS)}"
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
    if match is None:
        raise ClipError("bad name", f"{name[:100]!r} is not like p01-{CAMERA}-TASK_XY-SUBTASK-START_END.mp4")
    columns = tuple(row[column] for column in ("participant", "camera", "task", "subtask"))
    if match.groups()[:4] != columns:
        raise ClipError("bad name", f"its row says {' '.join(columns)[:100]!r}")
    return IndexedClip(name.removesuffix(".mp4"), int(match[1][1:]), match[4])


def find_clip(root: Path, clip: IndexedClip) -> Path:
    """Locate a clip's file: `{root}/{subtask}/{stem}.h5`, else `{root}/{stem}.h5`.

    Raises:
        ClipError: `missing`, or `unreadable` where the folder may not be looked into.
    """
    try:
        for path in (root / clip.subtask / f"{clip.stem}.h5", root / f"{clip.stem}.h5"):
            if path.is_file():
                return path
    except OSError as error:
        raise ClipError("unreadable", str(error)) from error
    raise ClipError("missing", f"no .h5 file in {root / clip.subtask} or {root}")


def read_clip(path: Path, config: DataConfig) -> Clip:
    """Read the datasets that `config` asks for from one HDF5 clip, once.

    Shapes and types are checked before anything is read, so a short clip costs no more than its opening. Links
    are not followed: a clip holds its own data or is not used.

    Args:
        path: the clip, named as in the index with `.h5` for `.mp4`.
        config: which modalities are on, and how many frames a window takes.

    Raises:
        ClipError: the clip cannot be used; its `reason` says why.
    """
    match = CLIP_NAME.fullmatch(f"{path.stem}.mp4")
    if match is None:
        raise ClipError("bad name", f"{path.name[:100]!r}")
    if not path.is_file():
        raise ClipError("missing", f"no file {path}")
    try:
        with h5py.File(path, "r") as file:
            return _read_open_clip(file, int(match[1][1:]), config)
    except ClipError:
        raise
    # What h5py raises for a damaged file depends on where the damage is.
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ClipError("unreadable", str(error).splitlines()[0] if str(error) else repr(error)) from error


def _read_open_clip(file: h5py.File, participant: int, config: DataConfig) -> Clip:
    names = [*HAND_DATASETS]
    names += [GAZE_DATASET] * config.gaze + [OBJECT_DATASET] * config.objects + [SURROGATE_DATASET] * config.surrogate
    datasets = {name: _checked_dataset(file, name) for name in names}
    lengths = {name: dataset.shape[0] for name, dataset in datasets.items()}
    frames = lengths[HAND_DATASETS[0]]
    if set(lengths.values()) != {frames}:
        raise ClipError("frame counts differ", ", ".join(f"{name} {length}" for name, length in lengths.items()))
    needed = config.observed + config.predicted
    if frames < needed:
        raise ClipError("short", f"{frames} frames, {needed} needed")
    hands = np.stack([_read_values(datasets[name]) for name in HAND_DATASETS], axis=1)
    return Clip(
        fps=_frame_rate(file, frames, participant),
        hands=hands,
        gaze=_read_values(datasets[GAZE_DATASET]) if config.gaze else None,
        objects=_read_values(datasets[OBJECT_DATASET]) if config.objects else None,
        surrogate=_read_values(datasets[SURROGATE_DATASET]) if config.surrogate else None,
    )


def _own_dataset(file: h5py.File, name: str) -> h5py.Dataset | None:
    """Return a dataset stored in the file itself, None if there is none of that name."""
    key = name.encode()
    # `name in file` and `file.get` would open the target of an external link; the link's own record does not.
    if not file.id.links.exists(key):
        return None
    if file.id.links.get_info(key).type != h5py.h5l.TYPE_HARD:
        raise ClipError("linked", f"{name} is a link, not a dataset of this file")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        return None
    if dataset.is_virtual or dataset.external:
        raise ClipError("linked", f"{name} keeps its values in another file")
    return dataset


def _checked_dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """Return a dataset whose type and shape, (F, *FRAME_SHAPES[name]), are as expected; nothing is read yet."""
    dataset = _own_dataset(file, name)
    if dataset is None:
        older = name in (OBJECT_DATASET, SURROGATE_DATASET) and file.id.links.exists(b"bboxes")
        raise ClipError("missing dataset", name + (" (the older layout, bboxes only)" if older else ""))
    # Whole numbers are pixels or something else, but no normalised coordinates.
    if dataset.dtype.kind != "f":
        raise ClipError("wrong dtype", f"{name} is {dataset.dtype}, expected a floating-point type, such as float32")
    expected = FRAME_SHAPES[name]
    if dataset.shape is None or len(dataset.shape) != 1 + len(expected) or dataset.shape[1:] != expected:
        raise ClipError("wrong shape", f"{name} is {dataset.shape}, expected (F, {', '.join(map(str, expected))})")
    if dataset.shape[0] > MAX_FRAMES:
        raise ClipError("too long", f"{name} declares {dataset.shape[0]:,} frames, at most {MAX_FRAMES:,} are read")
    return dataset


def _read_values(dataset: h5py.Dataset) -> np.ndarray:
    """Read a whole dataset as float32 and check its values."""
    name = dataset.name.lstrip("/")
    values = np.empty(dataset.shape, np.float32)
    dataset.read_direct(values)
    finite = np.isfinite(values)
    if not finite.all():
        frame = int(np.argwhere(~finite)[0, 0])
        raise ClipError("non-finite", f"{name} in frame {frame}")
    coordinates = values[..., : IMAGE_COORDINATES.get(name, 0)]
    far = np.abs(coordinates) > FARTHEST
    if far.any():
        first = tuple(np.argwhere(far)[0])
        expected = f"expected image-normalised values, -{FARTHEST:g} to {FARTHEST:g}"
        raise ClipError("out of range", f"{name} in frame {first[0]} holds {coordinates[first]:g}, {expected}")
    return values


def subtask_number(stem: str) -> int:
    """Return the place in SUBTASKS of the subtask that a clip is named after, -1 for another or for no such name."""
    match = CLIP_NAME.fullmatch(f"{stem}.mp4")
    return SUBTASKS.index(match[4]) if match is not None and match[4] in SUBTASKS else -1


def published_frame_rate(participant: int) -> float:
    """Return the dataset's documented frames per second: 23 for participants 1-28, 59 from 29 on."""
    return 23.0 if participant <= 28 else 59.0


def _frame_rate(file: h5py.File, frames: int, participant: int) -> float:
    """Return frames per second: from the median step of the timestamps, or as published where they tell no rate.

    Raises:
        ClipError: `bad timestamps`, they tell a rate that cannot be; or `frame counts differ`.
    """
    dataset = _own_dataset(file, "timestamps")
    if dataset is None or dataset.dtype.kind not in "fiu" or dataset.ndim != 1:
        return published_frame_rate(participant)
    if dataset.shape[0] != frames:
        raise ClipError("frame counts differ", f"timestamps {dataset.shape[0]}, {HAND_DATASETS[0]} {frames}")
    steps = np.diff(dataset[:].astype(np.float64))
    if not np.isfinite(steps).all() or steps.min() < 0 or np.median(steps) == 0:
        return published_frame_rate(participant)
    # Python's division, as NumPy's warns where the quotient overflows.
    fps = 1 / float(np.median(steps))
    slowest, fastest = FRAME_RATES
    if not slowest <= fps <= fastest:
        expected = f"expected seconds, {slowest:g} to {fastest:,g} frames each"
        raise ClipError("bad timestamps", f"they tell {fps:.3g} frames per second, {expected}")
    # float32 seconds resolve a step to about 1e-4 of its length: one decimal keeps clips of one rate together.
    return round(fps, 1)
