"""The datasets of one HDF5 file: only its own, only of the shapes and sizes expected, only values that can be."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import h5py
import numpy as np

from bigru.command import CommandError
from bigru.layout import JOINTS_PER_HAND, MODALITY_SHAPES

HAND_DATASETS = ("left_landmarks", "right_landmarks")
GAZE_DATASET = "norm_gaze"
OBJECT_DATASET = "rec_bboxes"
SURROGATE_DATASET = "surrogate_hands"
MODALITIES = {"gaze": GAZE_DATASET, "objects": OBJECT_DATASET, "surrogate": SURROGATE_DATASET}
FRAME_SHAPES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(HAND_DATASETS, (JOINTS_PER_HAND, 3)),
    **{dataset: MODALITY_SHAPES[name] for name, dataset in MODALITIES.items()},
}

# The longest published clip has 1,591 frames; 100,000 are 28 minutes at 59 fps. A file that declares more is
# damaged, and reading it would ask for gigabytes.
MAX_FRAMES = 100_000

# A chunk is unpacked whole, however little of it is wanted, and may declare up to 4 GiB. h5py's own choice of chunks
# stays below 1 MiB.
MAX_CHUNK_BYTES = 64 * 2**20

# Filters that a chunk may have passed through, in order.
FILTERS: tuple[list[int], ...] = ([], [h5py.h5z.FILTER_DEFLATE], [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE])

# How many coordinates of a point or a box are image-normalised, 0 to 1 within the image: x and y of a landmark, whose
# z has a scale of its own, and all of a box. Gaze is left free: a line of sight meets the image's plane anywhere.
IMAGE_COORDINATES = {"left_landmarks": 2, "right_landmarks": 2, OBJECT_DATASET: 4, SURROGATE_DATASET: 4}

# A joint estimated outside the image lies a little outside 0 to 1 (-0.06 seen), pixels run to 1,728: 10 parts the two.
FARTHEST = 10.0


class DataError(CommandError, ValueError):
    """Clips, an index or a split that cannot be used; the message is meant for the person who named them."""


class ClipError(DataError):
    """A clip that cannot be used.

    Attributes:
        reason: a short fixed phrase to count by: `missing`, `short`, `unreadable`, `missing dataset`, `linked`,
            `wrong dtype`, `wrong shape`, `too long`, `packed`, `frame counts differ`, `non-finite`, `out of range`,
            `bad timestamps`, `bad name`, `duplicate` or `no split`.
        detail: what was found, in words.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@contextmanager
def h5py_errors() -> Iterator[None]:
    """Turns what h5py raises for a damaged file, which depends on where the damage is, into an `unreadable` clip."""
    try:
        yield
    except ClipError:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, zlib.error) as error:
        raise ClipError("unreadable", str(error).splitlines()[0] if str(error) else repr(error)) from error


@h5py_errors()
def own_dataset(file: h5py.File, name: str) -> h5py.Dataset | None:
    """Returns a dataset stored in the file itself, None if there is none of that name."""
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


@h5py_errors()
def lacking_datasets(file: h5py.File, names: Iterable[str]) -> list[str]:
    """Returns those of the names under which a file holds nothing, not even a link."""
    return [name for name in names if not file.id.links.exists(name.encode())]


def require_datasets(file: h5py.File, names: Sequence[str]) -> None:
    """Refuses a clip that lacks some of the named datasets, all of which the message names."""
    lacking = lacking_datasets(file, names)
    if lacking:
        older = not {OBJECT_DATASET, SURROGATE_DATASET}.isdisjoint(lacking) and not lacking_datasets(file, ["bboxes"])
        raise ClipError("missing dataset", ", ".join(lacking) + (" (the older layout, bboxes only)" if older else ""))


@h5py_errors()
def checked_dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """Returns a dataset whose type and shape, (F, *FRAME_SHAPES[name]), are as expected; nothing is read yet."""
    dataset = own_dataset(file, name)
    if dataset is None:
        raise ClipError("missing dataset", name)
    # Whole numbers are pixels or something else, but no normalised coordinates.
    if dataset.dtype.kind != "f":
        raise ClipError("wrong dtype", f"{name} is {dataset.dtype}, expected a floating-point type, such as float32")
    expected = FRAME_SHAPES[name]
    if dataset.shape is None or len(dataset.shape) != 1 + len(expected) or dataset.shape[1:] != expected:
        raise ClipError("wrong shape", f"{name} is {dataset.shape}, expected (F, {', '.join(map(str, expected))})")
    if dataset.shape[0] > MAX_FRAMES:
        raise ClipError("too long", f"{name} declares {dataset.shape[0]:,} frames, at most {MAX_FRAMES:,} are read")
    return dataset


def read_values(dataset: h5py.Dataset, nan_missing: bool = False) -> np.ndarray:
    """Reads a whole dataset as float32 and checks its values.

    Args:
        dataset: as `checked_dataset` gives it.
        nan_missing: take a hand, a gaze or a box with a NaN in it for missing, which is coded as zeros.

    Returns:
        (F, *FRAME_SHAPES[name]) finite values; a landmark's z that is not finite is 0, since nothing reads it.

    Raises:
        ClipError: `unreadable`, `wrong dtype`, `packed`, `non-finite` or `out of range`.
    """
    name = _name(dataset)
    values = read_array(dataset, np.dtype(np.float32))
    if name in HAND_DATASETS:
        values[..., 2] = np.nan_to_num(values[..., 2], nan=0, posinf=0, neginf=0)
    unknown = np.isnan(values)
    if nan_missing and unknown.any():
        # A hand is missing whole, boxes one by one.
        values[unknown.any(axis=(1, 2) if name in HAND_DATASETS else -1)] = 0
    finite = np.isfinite(values)
    if not finite.all():
        frame = int(np.argwhere(~finite)[0, 0])
        cure = "; zeros mean missing, and with --nan-missing NaN does too" if unknown[frame].any() else ""
        raise ClipError("non-finite", f"{name} in frame {frame}{cure}")
    coordinates = values[..., : IMAGE_COORDINATES.get(name, 0)]
    far = np.abs(coordinates) > FARTHEST
    if far.any():
        first = tuple(np.argwhere(far)[0])
        expected = f"expected image-normalised values, -{FARTHEST:g} to {FARTHEST:g}"
        raise ClipError("out of range", f"{name} in frame {first[0]} holds {coordinates[first]:g}, {expected}")
    return values


@h5py_errors()
def read_array(dataset: h5py.Dataset, dtype: np.dtype) -> np.ndarray:
    """Reads a whole dataset of numbers as `dtype`, whatever the values."""
    # Bits in another order than any machine's, which h5py calls by the nearest name.
    if not dataset.id.get_type().equal(h5py.h5t.py_create(dataset.dtype)):
        raise ClipError("wrong dtype", f"{_name(dataset)} is no common type of numbers, such as float32")
    if dataset.chunks is not None:
        _check_chunks(dataset)
    values = np.empty(dataset.shape, dtype)
    dataset.read_direct(values)
    return values


def _name(dataset: h5py.Dataset) -> str:
    return str(dataset.name).lstrip("/")


def _check_chunks(dataset: h5py.Dataset) -> None:
    """Unpacks every chunk of a dataset here, before libhdf5 does, which trusts their sizes.

    HDF5 2.0 reads a chunk that unpacks to 55 bytes of 56 as if it were whole, and unpacks any amount, which a bound on
    the stored size does not bound: deflate shrinks zeros a thousand times.
    """
    name = _name(dataset)
    chunk_bytes = math.prod(dataset.chunks) * dataset.dtype.itemsize
    if chunk_bytes > MAX_CHUNK_BYTES:
        raise ClipError("packed", f"{name} has chunks of {chunk_bytes:,} bytes, at most {MAX_CHUNK_BYTES:,} are read")
    pipeline = dataset.id.get_create_plist()
    filters = [pipeline.get_filter(number)[0] for number in range(pipeline.get_nfilters())]
    if filters not in FILTERS:
        raise ClipError("packed", f"{name} is packed by filters {filters}, expected gzip, shuffle and gzip, or none")
    chunks: list[h5py.h5d.StoreInfo] = []
    dataset.id.chunk_iter(chunks.append)
    if len(chunks) > MAX_FRAMES:
        raise ClipError("packed", f"{name} is in {len(chunks):,} chunks, at most {MAX_FRAMES:,} are read")
    for chunk in chunks:
        place, size = chunk.chunk_offset, chunk.size
        # What gzip cannot make smaller it makes larger by some bytes in a thousand.
        if size > chunk_bytes + chunk_bytes // 100 + 1024 or any(np.greater_equal(place, dataset.shape)):
            raise ClipError("unreadable", f"{name} has a chunk of {size:,} bytes at {place}")
        # gzip is the last filter; a bit says of each whether it was left out.
        if filters and not chunk.filter_mask >> len(filters) - 1 & 1:
            packed = dataset.id.read_direct_chunk(place)[1]
            size = len(zlib.decompressobj().decompress(packed, chunk_bytes + 1))
        if size != chunk_bytes:
            raise ClipError("unreadable", f"{name} has a chunk of {size:,} bytes, expected {chunk_bytes:,}")
