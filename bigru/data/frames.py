"""The frames of a dataset: what the network is fed of each, which split they fall to, read once and kept in a file."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from bigru.config import DataConfig
from bigru.data.cache import CacheMiss, Entry, Frames, Part, cache_key, cache_path, read_cache, write_cache
from bigru.data.clips import Clip, read_clip
from bigru.data.hdf5 import ClipError
from bigru.data.index import ClipIndex, Skipped, clips_below, find_clip
from bigru.files import printable
from bigru.layout import CENTRED_UNIT, JOINTS, JOINTS_PER_HAND

SPLITS = {"train": range(1, 49), "val": range(49, 60), "test": range(60, 71)}
"""The published split, by participant number."""

ASSUMED = "frame rates assumed, as documented for the participant"
IN_TWO_SPLITS = "in two splits"
HELD_OUT = 0.15
"""Share of a clip's frames that `split="time"` sets aside for val, and again for test."""


def load_frames(index: ClipIndex, root: Path, config: DataConfig, progress: bool | None) -> tuple[Frames, str]:
    """Returns the frames from the cache, or from the clips into the cache, and a line that says which.

    Raises:
        ClipError: with `config.strict`, the first clip that cannot be used.
    """
    if config.no_cache:
        return _read_frames(index, root, config, progress), ""
    path = cache_path(root, config)
    # Before the clips are read: one that changes meanwhile leaves a cache that is stale when it is next looked at.
    key = cache_key(index.path, root, index.clips, config)
    try:
        frames = read_cache(path, key, config.input_size, SPLITS)
        if not _can_be_read_now(frames, index, root, config):
            _refuse_skipped(frames.skipped, config)
            return frames, f"frames mapped from {printable(path)}"
        missed = "stale"
    except CacheMiss as miss:
        missed = str(miss)
    except OSError as error:
        missed = f"unreadable: {error.strerror}"
    frames = _read_frames(index, root, config, progress)
    if not any(part.clips for part in frames.parts.values()):
        return frames, ""
    try:
        write_cache(path, key, frames)
    except OSError as error:
        cure = "--cache DIR puts it elsewhere, --no-cache does without"
        return frames, f"no cache: {printable(path)}: {error.strerror}; {cure}"
    why = "" if missed == "none yet" else f" (the one there was {missed})"
    return frames, f"frames written to {printable(path)}, which the next run maps{why}"


def _can_be_read_now(frames: Frames, index: ClipIndex, root: Path, config: DataConfig) -> bool:
    """Tells whether a clip that could not be read can be now: a disk that failed or a permission that was lacking
    changes neither its size nor its time."""
    unreadable = {skip.stem for skip in frames.skipped if skip.reason == "unreadable"}
    for row in index.clips:
        if row.stem in unreadable:
            with suppress(ClipError):
                read_clip(find_clip(root, row), config)
                return True
    return False


def _read_frames(index: ClipIndex, root: Path, config: DataConfig, progress: bool | None) -> Frames:
    """Reads every clip once."""
    skipped = list(index.skipped)
    _refuse_skipped(skipped, config)
    parts = {split: _GrowingPart(config) for split in SPLITS}
    for row in tqdm(index.clips, desc="clips", unit="clip", disable=None if progress is None else not progress):
        try:
            check_participant(row.participant, config)
            clip = read_clip(find_clip(root, row), config)
        except ClipError as error:
            skipped.append(Skipped(row.stem, error.reason, error.detail))
            _refuse_skipped(skipped, config)
            continue
        features, present = frame_features(clip, config.centre), clip.present
        for split, (start, stop) in split_frames(len(features), row.participant, config).items():
            parts[split].add(clip, row.stem, features[start:stop], present[start:stop])
    return Frames({split: part.finish() for split, part in parts.items()}, tuple(skipped))


def _refuse_skipped(skipped: Sequence[Skipped], config: DataConfig) -> None:
    if config.strict and skipped:
        raise ClipError(skipped[0].reason, f"{skipped[0].stem}: {skipped[0].detail}")


def frame_features(clip: Clip, centre: Literal["frame", "last"] = "frame") -> np.ndarray:
    """Returns a clip's features, (F, I) float32: hands 84, then gaze 2, objects 120, surrogate 8 where read.

    Hands are the left 21, then the right 21 joints as x, y pairs, centred as in the published benchmark:
    (joint - (left wrist + right wrist) / 2) / 0.5. A missing hand's zeros take part in this like any other
    value, which is why the targets come with a mask. With `centre="last"` the origin is the image's corner until
    `Windows.batch` knows the window, and so its last observed frame.
    """
    frames = len(clip.hands)
    joints = clip.hands[..., :2].reshape(frames, JOINTS, 2)
    if centre == "frame":
        joints = joints - 0.5 * (joints[:, :1] + joints[:, JOINTS_PER_HAND : JOINTS_PER_HAND + 1])
    hands = joints / CENTRED_UNIT
    others = [values for values in (clip.gaze, clip.objects, clip.surrogate) if values is not None]
    return np.concatenate([values.reshape(frames, -1) for values in (hands, *others)], axis=1)


def window_count(frames: int, config: DataConfig) -> int:
    """Returns how many windows fit: floor((frames - observed - predicted) / stride) + 1, or 0."""
    return max(0, (frames - config.observed - config.predicted) // config.stride + 1)


def window_starts(present: np.ndarray, config: DataConfig) -> np.ndarray:
    """Returns the first frames, (N,) int64, of a clip's windows; after resampling without those in which no hand is
    seen, as in a hole of the timestamps.

    Args:
        present: (F, 2) bool: whether the left and the right hand were seen.
        config: how windows are cut.
    """
    starts = config.stride * np.arange(window_count(len(present), config))
    if config.resample is None:
        return starts
    seen = np.concatenate([[0], np.cumsum(present.any(axis=1))])
    return starts[seen[starts + config.observed + config.predicted] > seen[starts]]


def split_frames(frames: int, participant: int, config: DataConfig) -> dict[str, tuple[int, int]]:
    """Returns which frames [start, stop) of a clip belong to which split.

    By participant a clip goes whole into one split. By time a clip that holds three disjoint windows gives its
    last frames to val and then test, to each 15 % or one window if that is more, and the rest to train; a
    shorter one goes whole to train.
    """
    if config.split == "participant":
        return {split: (0, frames) for split, people in SPLITS.items() if participant in people}
    window = config.observed + config.predicted
    if frames < 3 * window:
        return {"train": (0, frames)}
    held = max(window, round(HELD_OUT * frames))
    return {"train": (0, frames - 2 * held), "val": (frames - 2 * held, frames - held), "test": (frames - held, frames)}


def check_participant(participant: int, config: DataConfig) -> None:
    if config.split == "participant" and not any(participant in people for people in SPLITS.values()):
        raise ClipError("no split", f"participant {participant} is in none of {split_names(config)}")


def split_names(config: DataConfig) -> str:
    if config.split == "time":
        return "train, val, test, in time order within each clip"
    return ", ".join(f"{split} {people[0]}-{people[-1]}" for split, people in SPLITS.items())


def content_digest(*arrays: np.ndarray) -> str:
    """Returns a digest of what arrays hold, 128 bits in hexadecimal."""
    digest = hashlib.sha256()
    for values in arrays:
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()[:32]


def counted(reasons: Counter[str]) -> str:
    """Returns how often each reason occurs, the most frequent first."""
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common()) or "none"


def folder_hint(root: Path, index: ClipIndex, skipped: Sequence[Skipped]) -> str:
    """Returns where the clips lie, in words, where none of them was found; else nothing."""
    if not index.clips or sum(skip.reason == "missing" for skip in skipped) < len(index.clips):
        return ""
    below = clips_below(root, index.clips)
    return "" if below is None else f"clips lie in {printable(below.name)}/: give {printable(below)} instead"


def leaks(clips: Iterable[tuple[str, str, str]]) -> list[Skipped]:
    """Finds clips that lie in two splits under two names.

    Args:
        clips: split, name and digest of the content of each clip in which a hand is seen.

    Returns:
        each clip of the content of one in an earlier split, which its `detail` names.
    """
    first: dict[str, tuple[str, str]] = {}
    found = []
    for split, stem, digest in clips:
        other_split, other = first.setdefault(digest, (split, stem))
        if other_split != split and other != stem:
            found.append(Skipped(stem, IN_TWO_SPLITS, f"in {split}, its hands are those of {other} in {other_split}"))
    return found


class _GrowingPart:
    """The frames of one split while its clips are being read, laid end to end."""

    def __init__(self, config: DataConfig) -> None:
        self.clips: list[Entry] = []
        self.used = 0
        self.frames = np.empty((0, config.input_size), np.float32)
        self.present = np.empty((0, 2), np.bool_)

    def add(self, clip: Clip, stem: str, features: np.ndarray, present: np.ndarray) -> None:
        end = self.used + len(features)
        if end > len(self.frames):
            # Grown in place and by a quarter: a list of clips joined at the end would take the memory twice.
            self._resize(end + end // 4)
        self.frames[self.used : end] = features
        self.present[self.used : end] = present
        self.used = end
        digest = content_digest(features, present)
        self.clips.append(Entry(stem, clip.fps, len(features), clip.assumed, digest))

    def _resize(self, rows: int) -> None:
        self.frames.resize((rows, self.frames.shape[1]), refcheck=False)
        self.present.resize((rows, 2), refcheck=False)

    def finish(self) -> Part:
        """Gives up the frames, without a copy."""
        self._resize(self.used)
        return Part(self.frames, self.present, tuple(self.clips))
