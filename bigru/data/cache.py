"""One file of all frames of a dataset, mapped into memory instead of read.

    magic 16 | key 32 | length of the header 8 | length of the file 8 | SHA-256 of the header 32 | header, JSON |
    for each part: frames (F, I) float32, seen (F, 2) uint8, each from a multiple of 64 bytes on | key 32

The key is a digest of all that the frames depend on. The file takes its name only when it is whole and on the disk; one
that is of another key, another length or another make than expected is a CacheMiss, never half believed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigru.config import DataConfig
from bigru.data.clips import FRAME_RATES, IndexedClip, Skipped, clip_places
from bigru.data.hdf5 import MAX_FRAMES
from bigru.files import remove_partials, replacing

FORMAT = 1
"""Raised whenever the same clips and settings give other frames, or the file's layout changes."""
SETTINGS = ("observed", "predicted", "split", "gaze", "objects", "surrogate", "resample", "centre")
"""The settings that decide which frames are kept and what they hold."""
MAGIC = b"bigru frames\r\n\x1a\n"
PREFIX = struct.Struct("<16s32sQQ32s")
ALIGNMENT = 64
# 11,032 clips take 2 MB.
MAX_HEADER_BYTES = 64 * 2**20
# Parts of a write that was killed; a write takes seconds.
ABANDONED_S = 3600


class CacheMiss(Exception):
    """There is no cache that can be used; the message says why in a word or two."""


@dataclass(frozen=True, eq=False)
class Part:
    """The frames of one split's clips, end to end."""

    frames: np.ndarray
    """(F, I) float32: features of every frame."""
    present: np.ndarray
    """(F, 2) bool: whether the left and the right hand were seen."""
    stems: tuple[str, ...]
    fps: tuple[float, ...]
    """Frames per second, per clip."""
    lengths: tuple[int, ...]
    """Frames, per clip."""


@dataclass(frozen=True, eq=False)
class Frames:
    """All that is read of a dataset: the frames of each split, and what was left out."""

    parts: dict[str, Part]
    skipped: tuple[Skipped, ...]


def cache_path(root: Path, config: DataConfig) -> Path:
    """Return where the cache of a dataset read with these settings belongs."""
    names: list[Any] = [getattr(config, name) for name in SETTINGS]
    if config.cache is not None:
        # A folder of caches may hold those of many datasets.
        names += [str(root.resolve()), str(config.index)]
    return (config.cache or root) / f"bigru-{hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]}.cache"


def cache_key(index: Path, root: Path, clips: Iterable[IndexedClip], config: DataConfig) -> bytes:
    """Return the digest, 32 bytes, of all that a dataset's frames depend on: what the index says, each file's place,
    size and time of change, the settings, and how the frames are made."""
    settings = {name: getattr(config, name) for name in SETTINGS}
    digest = hashlib.sha256(json.dumps([FORMAT, sys.byteorder, settings]).encode())
    digest.update(hashlib.sha256(index.read_bytes()).digest())
    for clip in clips:
        digest.update(repr(_stamp(root, clip)).encode())
    return digest.digest()


def _stamp(root: Path, clip: IndexedClip) -> tuple[int, int, int] | None:
    """Return which of its places a clip's file is in, its size and its time of change; None without one."""
    for number, place in enumerate(clip_places(str(root), clip)):
        try:
            found = os.stat(place)  # noqa: PTH116, a Path for each of thousands takes longer than asking for it
        except OSError:
            continue
        if stat.S_ISREG(found.st_mode):
            return number, found.st_size, found.st_mtime_ns
    return None


def write_cache(path: Path, key: bytes, frames: Frames) -> None:
    """Write the file; it appears whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(path.parent, path.name, ABANDONED_S)
    described = {
        "parts": {
            split: {"stems": part.stems, "fps": part.fps, "lengths": part.lengths, "columns": part.frames.shape[1]}
            for split, part in frames.parts.items()
        },
        "skipped": [asdict(skip) for skip in frames.skipped],
    }
    header = json.dumps(described).encode()
    blocks = [block for part in frames.parts.values() for block in (part.frames, part.present.view(np.uint8))]
    end = PREFIX.size + len(header)
    for block in blocks:
        end = _aligned(end) + block.nbytes
    prefix = PREFIX.pack(MAGIC, key, len(header), end + len(key), hashlib.sha256(header).digest())
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(prefix + header)
        for block in blocks:
            file.write(bytes(_aligned(file.tell()) - file.tell()))
            file.write(np.ascontiguousarray(block).data)
        file.write(key)


def read_cache(path: Path, key: bytes, columns: int, splits: Iterable[str], stems: set[str]) -> Frames:
    """Map the file: its frames are read from the disk when they are first used, and shared by all who map it.

    Args:
        path: the file.
        key: as `cache_key` gives it for the dataset as it is now.
        columns: I, features per frame.
        splits: names of the parts expected, in order.
        stems: names of the clips that may occur.

    Raises:
        CacheMiss: there is no such file, or it is stale, or damaged.
        OSError: it cannot be read.
    """
    try:
        # Copy on write: tensors over it may be written to, and the file stays as it is.
        content = np.memmap(path, np.uint8, mode="c")
    except FileNotFoundError:
        raise CacheMiss("none yet") from None
    except ValueError:
        raise CacheMiss("damaged: empty") from None
    size = len(content)
    if size < PREFIX.size:
        raise CacheMiss("damaged: too short")
    magic, found, header_size, whole, digest = PREFIX.unpack(content[: PREFIX.size].tobytes())
    if magic != MAGIC:
        raise CacheMiss("damaged: not a file of frames")
    if found != key:
        raise CacheMiss("stale")
    if whole != size or header_size > min(size, MAX_HEADER_BYTES) or content[-len(key) :].tobytes() != key:
        raise CacheMiss("damaged: cut off")
    header = content[PREFIX.size : PREFIX.size + header_size].tobytes()
    if hashlib.sha256(header).digest() != digest:
        raise CacheMiss("damaged: header")
    try:
        described = json.loads(header)
        parts, end = {}, PREFIX.size + header_size
        for split in splits:
            parts[split], end = _map_part(content, end, described["parts"][split], columns, stems)
        skipped = tuple(_skip(**skip) for skip in described["skipped"])
    # What a header that was made to deceive may lead to; its digest proves only that it is whole.
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise CacheMiss(f"damaged: {type(error).__name__} in its header") from error
    if end + len(key) != size:
        raise CacheMiss("damaged: length")
    return Frames(parts, skipped)


def _map_part(
    content: np.ndarray, start: int, described: Mapping[str, Any], columns: int, stems: set[str]
) -> tuple[Part, int]:
    """Return one split's part, its arrays views of `content`, and where in the file it ends."""
    names, fps, lengths = (described[name] for name in ("stems", "fps", "lengths"))
    if described["columns"] != columns or not len(names) == len(fps) == len(lengths) or not stems.issuperset(names):
        raise ValueError("clips")
    if not all(type(length) is int and 0 < length <= MAX_FRAMES for length in lengths):
        raise ValueError("lengths")
    slowest, fastest = FRAME_RATES
    if not all(isinstance(rate, float) and slowest <= rate <= fastest for rate in fps):
        raise ValueError("fps")
    frames, start = _map(content, start, (sum(lengths), columns), np.dtype(np.float32))
    present, start = _map(content, start, (sum(lengths), 2), np.dtype(np.uint8))
    # Compared, not viewed: a bool that is neither 0 nor 1 has no defined behaviour.
    return Part(frames, present != 0, tuple(names), tuple(fps), tuple(lengths)), start


def _map(content: np.ndarray, start: int, shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, int]:
    start = _aligned(start)
    end = start + math.prod(shape) * dtype.itemsize
    if end > len(content):
        raise ValueError("length")
    return content[start:end].view(dtype).reshape(shape), end


def _skip(stem: str, reason: str, detail: str) -> Skipped:
    if not all(isinstance(text, str) for text in (stem, reason, detail)):
        raise TypeError("skipped")
    return Skipped(stem, reason, detail)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
