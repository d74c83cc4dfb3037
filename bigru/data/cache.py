"""One file of all frames of a dataset, mapped into memory instead of read.

It holds the frames (F, I) float32 as .npy, after them which hands are seen (F, 2) bool as .npy, and JSON to the end:
the clips, and a key, a digest of all that the frames depend on. The file takes its name only when it is whole and on
the disk. One of another key, length or layout than expected is a CacheMiss and is not used at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bigru.config import DataConfig
from bigru.data.index import IndexedClip, Skipped, clip_places
from bigru.files import remove_partials, replacing

FORMAT = 3
"""Raised whenever the same clips and settings give other frames, or the file's layout changes."""
SETTINGS = ("observed", "predicted", "split", "gaze", "objects", "surrogate", "resample", "centre", "nan_missing")
"""The settings that decide which frames are kept and what they hold."""
# Parts of a write that was killed; a write takes seconds.
ABANDONED_S = 3600


class CacheMiss(Exception):
    """There is no cache that can be used; the message says why in a word or two."""


class Entry(NamedTuple):
    """A clip in a split, whose frames lie behind those of the clip before it."""

    stem: str
    fps: float
    """Frames per second."""
    frames: int
    assumed: str
    """Why the rate is assumed; empty where it is measured."""
    digest: str
    """Of what its frames hold; equal for two clips of the same content."""


@dataclass(frozen=True, eq=False)
class Part:
    """The frames of one split's clips, end to end."""

    frames: np.ndarray
    """(F, I) float32: features of every frame."""
    present: np.ndarray
    """(F, 2) bool: whether the left and the right hand were seen."""
    clips: tuple[Entry, ...]


@dataclass(frozen=True, eq=False)
class Frames:
    """All that is read of a dataset: the frames of each split, and the clips that were left out."""

    parts: dict[str, Part]
    skipped: tuple[Skipped, ...]

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of every split's clips, their rates and frames, wherever they were read from."""
        return hashlib.sha256(json.dumps({name: part.clips for name, part in self.parts.items()}).encode()).hexdigest()


def cache_path(root: Path, config: DataConfig) -> Path:
    """Returns where the cache of a dataset read with these settings belongs."""
    names: list[Any] = [getattr(config, name) for name in SETTINGS]
    if config.cache is not None:
        # A folder of caches may hold those of many datasets.
        names += [str(root.resolve()), str(config.index)]
    return (config.cache or root) / f"bigru-{hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]}.cache"


def cache_key(index: Path, root: Path, clips: Iterable[IndexedClip], config: DataConfig) -> str:
    """Returns a digest of all that a dataset's frames depend on: the index's content, the place, size and time of
    change of each file, the settings, and how the frames are made."""
    settings = {name: getattr(config, name) for name in SETTINGS}
    digest = hashlib.sha256(json.dumps([FORMAT, sys.byteorder, settings]).encode())
    digest.update(hashlib.sha256(index.read_bytes()).digest())
    for clip in clips:
        digest.update(repr(_stamp(root, clip)).encode())
    return digest.hexdigest()


def _stamp(root: Path, clip: IndexedClip) -> tuple[int, int, int] | None:
    """Returns which of its places a clip's file is in, its size and its time of change; None without one."""
    for number, place in enumerate(clip_places(str(root), clip)):
        try:
            found = os.stat(place)  # noqa: PTH116, a Path for each of thousands takes longer than asking for it
        except OSError:
            continue
        if stat.S_ISREG(found.st_mode):
            return number, found.st_size, found.st_mtime_ns
    return None


def write_cache(path: Path, key: str, frames: Frames) -> None:
    """Writes the file; it appears whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(path.parent, path.name, ABANDONED_S)
    described = {
        "key": key,
        "clips": {split: part.clips for split, part in frames.parts.items()},
        "skipped": [astuple(skip) for skip in frames.skipped],
    }
    parts = frames.parts.values()
    shape = sum(len(part.frames) for part in parts), next(iter(parts)).frames.shape[1]
    about = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": shape}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, about)
        for part in parts:
            file.write(np.ascontiguousarray(part.frames).data)
        np.save(file, np.concatenate([part.present for part in parts]))
        file.write(json.dumps(described).encode())


def read_cache(path: Path, key: str, columns: int, splits: Iterable[str]) -> Frames:
    """Maps the file: its frames are read from the disk when they are first used, and shared by all who map it.

    Args:
        path: the file.
        key: as `cache_key` gives it for the dataset as it is now.
        columns: I, features per frame.
        splits: names of the parts expected, in order.

    Raises:
        CacheMiss: there is no such file, or it is stale, or damaged.
        OSError: it cannot be read.
    """
    try:
        # Copy on write: tensors over it may be written to, and the file stays as it is.
        frames = np.load(path, mmap_mode="c")
        with path.open("rb") as file:
            file.seek(frames.offset + frames.nbytes)
            present, described = np.load(file), json.load(file)
        if described["key"] != key:
            raise CacheMiss("stale")
        clips = {split: tuple(Entry(*entry) for entry in described["clips"][split]) for split in splits}
        skipped = tuple(Skipped(*skip) for skip in described["skipped"])
        ends = np.cumsum([0] + [sum(clip.frames for clip in part) for part in clips.values()])
        if (frames.shape, present.shape) != ((ends[-1], columns), (ends[-1], 2)):
            raise CacheMiss("damaged: not of the length of its clips")
    except FileNotFoundError:
        raise CacheMiss("none yet") from None
    except (CacheMiss, OSError):
        raise
    # Of a foreign file, or an older version's: nearly anything.
    except Exception as error:
        raise CacheMiss(f"damaged: {type(error).__name__}") from error
    parts = {
        split: Part(frames[first:end], present[first:end], part)
        for (split, part), first, end in zip(clips.items(), ends, ends[1:], strict=False)
    }
    return Frames(parts, skipped)
