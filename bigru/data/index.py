"""The index of a dataset: which clips there are, what they are named, and where their files lie."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bigru.config import DataConfig
from bigru.data.hdf5 import ClipError, DataError
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
    """Reads a tab-separated index: participant camera task subtask start_time end_time filename.

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
            skipped.append(Skipped(printable(name), error.reason, error.detail))
            continue
        first_line[clip.stem] = line
        clips.append(clip)
    return ClipIndex(path, tuple(clips), tuple(skipped), other_cameras)


def _index_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Returns (line number, column -> text) for every row of the index."""

    def unusable(what: str, line: int | None = None) -> DataError:
        where = printable(path) + (f", line {line}" if line else "")
        return DataError(f"index {where}: {what}; expected tab-separated columns {' '.join(COLUMNS)}")

    size = path.stat().st_size
    if size > MAX_INDEX_BYTES:
        raise unusable(f"{size:,} bytes, at most {MAX_INDEX_BYTES:,} are read")
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
                raise unusable("not text in UTF-8", line)
            fields = [_unquoted(field) for field in text.split("\t")]
            if not header:
                if missing := [name for name in COLUMNS if name not in fields]:
                    raise unusable(f"no column {', '.join(missing)}", line)
                if repeated := [name for name in COLUMNS if fields.count(name) > 1]:
                    raise unusable(f"repeated column {', '.join(repeated)}", line)
                header = fields
            elif text.strip():
                if len(fields) != len(header):
                    raise unusable(f"{len(fields)} columns, not {len(header)}", line)
                rows.append((line, dict(zip(header, fields, strict=True))))
    if not header:
        raise unusable("the file is empty", 1)
    if not rows:
        raise unusable("no row after the header", 2)
    return rows


def _unquoted(field: str) -> str:
    return field[1:-1] if len(field) > 1 and field[0] == field[-1] == '"' else field


def _indexed_clip(row: dict[str, str]) -> IndexedClip:
    """Checks a row's file name, which becomes part of a path, against the pattern and the row's own columns."""
    name = row["filename"]
    match = CLIP_NAME.fullmatch(name)
    if match is None or len(name) > LONGEST_NAME:
        raise ClipError("bad name", f"{name[:100]!r} is not like p01-{CAMERA}-TASK_XY-SUBTASK-START_END.mp4")
    columns = tuple(row[column] for column in ("participant", "camera", "task", "subtask"))
    if match.groups()[:4] != columns:
        raise ClipError("bad name", f"its row says {' '.join(columns)[:100]!r}")
    return IndexedClip(name.removesuffix(".mp4"), int(match[1][1:]), match[4])


def clip_places(root: str, clip: IndexedClip) -> tuple[str, str]:
    """Returns the paths at which a clip's file may be, the likelier first."""
    return f"{root}/{clip.subtask}/{clip.stem}.h5", f"{root}/{clip.stem}.h5"


def find_clip(root: Path, clip: IndexedClip) -> Path:
    """Locates a clip's file: `{root}/{subtask}/{stem}.h5`, else `{root}/{stem}.h5`.

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
    raise ClipError("missing", f"no .h5 file in {printable(root / clip.subtask)} or {printable(root)}")


def clips_below(root: Path, clips: Sequence[IndexedClip]) -> Path | None:
    """Finds the folder in `root` that holds clips, where `root` is one folder too high; None for none."""
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    # Some clips may be missing there too.
    for clip, folder in itertools.product(clips[:2000], folders):
        if any(Path(place).is_file() for place in clip_places(str(folder), clip)):
            return folder
    return None


def subtask_number(stem: str) -> int:
    """Returns the place in SUBTASKS of the subtask that a clip is named after, -1 for another or for no such name."""
    match = CLIP_NAME.fullmatch(f"{stem}.mp4")
    return SUBTASKS.index(match[4]) if match is not None and match[4] in SUBTASKS else -1
