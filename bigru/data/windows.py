"""Clips cut into windows: features, centring, splits, and batches gathered by index."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bigru.config import DataConfig
from bigru.data.cache import Part
from bigru.data.frames import (
    ASSUMED,
    SPLITS,
    counted,
    folder_hint,
    frame_features,
    leaks,
    load_frames,
    split_names,
    window_starts,
)
from bigru.data.hdf5 import DataError
from bigru.data.index import ClipIndex, Skipped, find_index, read_index, subtask_number
from bigru.files import printable
from bigru.layout import CENTRED_UNIT, JOINTS, JOINTS_PER_HAND, POSE_SIZE

__all__ = ["SPLITS", "Batch", "Dataset", "NoWindowsError", "Windows", "frame_features", "hands_origin", "load_dataset"]


PUBLISHED_WINDOW = 120
"""Frames, observed and predicted."""


class NoWindowsError(DataError):
    """A split without a single window; the message says where was looked and what was skipped."""


@dataclass(frozen=True, eq=False)
class Batch:
    """B windows: what the network reads and what it should answer."""

    x: Tensor
    """(B, observed, I) float32: the features of the observed frames."""
    target: Tensor
    """(B, predicted, 84) float32: the centred hands of the frames that follow."""
    present: Tensor
    """(B, predicted, 42) bool: whether a joint's hand was seen in that target frame."""
    fps: Tensor
    """(B,) float32: frames per second."""


@dataclass(frozen=True, eq=False)
class Windows:
    """The N windows of one split, as offsets into its clips' frames, which are stored once, end to end."""

    frames: Tensor
    """(F, I) float32: features of every frame, as `frame_features` gives them."""
    present: Tensor
    """(F, 2) bool: whether the left and the right hand were seen."""
    starts: Tensor
    """(N,) int64: first frame of each window."""
    fps: Tensor
    """(N,) float32: frames per second."""
    clip: Tensor
    """(N,) int64: the window's clip, an index into `stems`."""
    stems: tuple[str, ...]
    """Names of the clips used."""
    observed: int
    predicted: int
    centre: Literal["frame", "last"] = "frame"
    """Origin of the hands: each frame's own, or one for the whole window, from its last observed frame."""
    assumed_fps: tuple[bool, ...] = ()
    """Of each clip whether its frame rate is assumed and not measured; empty: none is."""

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def subtask(self) -> Tensor:
        """(N,) int64: each window's subtask, an index into `bigru.data.clips.SUBTASKS`, -1 for one not among them."""
        of_clip = torch.tensor([subtask_number(stem) for stem in self.stems], dtype=torch.int64)
        return of_clip.to(self.clip.device)[self.clip]

    @property
    def fps_is_assumed(self) -> Tensor:
        """(N,) bool: whether each window's frame rate is assumed and not measured."""
        of_clip = torch.tensor(self.assumed_fps or [False] * len(self.stems), dtype=torch.bool)
        return of_clip.to(self.clip.device)[self.clip]

    def batch(self, indices: Tensor) -> Batch:
        """Gathers the windows numbered `indices`, (B,) int64, on the device of `frames`."""
        indices = indices.to(self.starts.device)
        starts = self.starts[indices]  # (B,)
        steps = torch.arange(self.observed + self.predicted, device=starts.device)
        rows = starts[:, None] + steps  # (B, observed + predicted)
        past, future = rows[:, : self.observed], rows[:, self.observed :]
        x, target = self.frames[past], self.frames[:, :POSE_SIZE][future]
        if self.centre == "last":
            origin = hands_origin(x[:, -1, :POSE_SIZE], self.present[past[:, -1]])  # (B, 2)
            shift = origin.repeat(1, JOINTS)[:, None]
            # Both are copies of their own, made by the indices.
            x[..., :POSE_SIZE] -= shift
            target -= shift
        present = self.present[future].repeat_interleave(JOINTS_PER_HAND, dim=-1)
        return Batch(x, target, present, self.fps[indices])

    def batches(self, batch_size: int, order: Tensor | None = None) -> Iterator[Batch]:
        """Yields the windows in batches.

        Args:
            batch_size: B, windows per batch.
            order: (N,) int64, the order of the windows, or a choice of them; default: as stored.

        Raises:
            ValueError: `batch_size` is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        order = torch.arange(len(self)) if order is None else order
        # One transfer for the whole pass instead of one per batch.
        for indices in order.to(self.starts.device).split(batch_size):
            if len(indices):
                yield self.batch(indices)

    def to(self, device: torch.device | str) -> Windows:
        """Returns the same windows with every tensor on `device`; tensors already there are shared."""
        tensors = {name: getattr(self, name).to(device) for name in ("frames", "present", "starts", "fps", "clip")}
        return dataclasses.replace(self, **tensors)


@dataclass(frozen=True, eq=False)
class Dataset:
    """The three splits, and an account of what was read and what was left out."""

    train: Windows
    val: Windows
    test: Windows
    skipped: tuple[Skipped, ...]
    """Every row of the index that gave no clip, in the order met."""
    clips: dict[str, int]
    """Clips used per split; with `split="time"` one clip can count in all three."""
    listed: int
    """Rows of the index for the aerial camera."""
    other_cameras: int
    """Rows of the index for other cameras, which are not used."""
    root: Path
    index: Path
    cache: str = ""
    """Whether the file of frames was mapped or written, or why not, in words."""
    warnings: tuple[str, ...] = ()
    """Reasons to doubt the data, in words."""
    digest: str = ""
    """SHA-256, in hexadecimal, of the clips' names and rates and of every frame, by split. It does not depend on where
    the clips lie or when they were written: two datasets with one digest train alike under the same settings."""

    @property
    def windows(self) -> dict[str, int]:
        """Windows of each split."""
        return {split: len(getattr(self, split)) for split in SPLITS}

    def skip_counts(self) -> dict[str, int]:
        """Returns how many clips were skipped for each reason, the most frequent first."""
        return dict(Counter(skip.reason for skip in self.skipped).most_common())

    def describe(self) -> str:
        """Returns a few lines for the start of a run: clips and windows per split, what was skipped and why."""
        others = f" ({self.other_cameras:,} more of other cameras)" if self.other_cameras else ""
        lines = [f"{self.listed:,} clips listed in {printable(self.index)}{others}, read from {printable(self.root)}"]
        lines += [f"{split:<5} {self.clips[split]:>6,} clips {n:>7,} windows" for split, n in self.windows.items()]
        lines += [self.cache] * bool(self.cache)
        lines += _skip_lines(self.skipped, self.train.observed + self.train.predicted)
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])


def load_dataset(config: DataConfig, *, progress: bool | None = None) -> Dataset:
    """Reads every clip of the index once, or map what an earlier run read of them, and cut the splits into windows.

    The first read leaves a file of the frames in the data root, or in `config.cache`; one that does not fit the index,
    the clips' sizes and times and the settings, or is cut off, is made again. Where it cannot be written, `cache` of
    the result says so.

    Args:
        config: where the clips are and how they are cut; `data_root` must be set.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: `data_root` is None, or `split` is unknown.
        FileNotFoundError: there is no data root or no index.
        DataError: the index file cannot be used.
        ClipError: with `config.strict`, the first clip that cannot be used.
        NoWindowsError: a split has no window.
    """
    if config.split not in ("participant", "time"):
        raise ValueError(f"split: expected participant or time, got {config.split!r}")
    index = read_index(find_index(config))
    root = Path(config.data_root or "")
    frames, cache = load_frames(index, root, config, progress)
    parts = frames.parts
    dataset = Dataset(
        **{split: _windows(part, config) for split, part in parts.items()},
        skipped=frames.skipped,
        clips={split: len(part.clips) for split, part in parts.items()},
        listed=len(index.clips) + len(index.skipped),
        other_cameras=index.other_cameras,
        root=root,
        index=index.path,
        cache=cache,
        warnings=tuple(_warnings(parts)),
        digest=frames.digest,
    )
    _check_windows(dataset, config, index)
    return dataset


def hands_origin(hands: Tensor, present: Tensor) -> Tensor:
    """Returns the middle of the wrists that are seen, (B, 2), or of the image where neither is.

    Args:
        hands: (B, 84), x, y pairs of 42 joints in units of half the image, as `frame_features(clip, "last")` has them.
        present: (B, 2) bool: whether the left and the right hand are seen.
    """
    # Joint 0 of each hand.
    wrists = hands.unflatten(-1, (2, JOINTS_PER_HAND, 2))[:, :, 0]  # (B, 2 hands, 2)
    seen = present[..., None].to(hands.dtype)
    middle = (wrists * seen).sum(1) / seen.sum(1).clamp(min=1)
    return torch.where(present.any(1, keepdim=True), middle, 0.5 / CENTRED_UNIT)


def _windows(part: Part, config: DataConfig) -> Windows:
    """Cuts the clips of one split, whose frames are shared."""
    starts: list[int] = []
    clip: list[int] = []
    offset = 0
    for number, entry in enumerate(part.clips):
        first = window_starts(part.present[offset : offset + entry.frames], config)
        starts += (offset + first).tolist()
        clip += [number] * len(first)
        offset += entry.frames
    return Windows(
        frames=torch.from_numpy(part.frames),
        present=torch.from_numpy(part.present),
        starts=torch.tensor(starts, dtype=torch.int64),
        fps=torch.tensor([part.clips[number].fps for number in clip], dtype=torch.float32),
        clip=torch.tensor(clip, dtype=torch.int64),
        stems=tuple(entry.stem for entry in part.clips),
        observed=config.observed,
        predicted=config.predicted,
        centre=config.centre,
        assumed_fps=tuple(bool(entry.assumed) for entry in part.clips),
    )


def _warnings(parts: dict[str, Part]) -> Iterator[str]:
    """Yields what makes the frames that were read doubtful."""
    reasons: Counter[str] = Counter()
    seen = []
    for split, part in parts.items():
        if part.clips and not part.present.any():
            yield f"no hand is seen in any frame of {split}"
        start = 0
        for clip in part.clips:
            if part.present[start : start + clip.frames].any():
                seen.append((split, clip.stem, clip.digest))
            start += clip.frames
            reasons[clip.assumed] += 1
    del reasons[""]
    if reasons:
        yield f"{ASSUMED}: {counted(reasons)}"
    if same := leaks(seen):
        yield f"{len(same):,} clips lie in two splits, under two names; the first, {same[0].stem}: {same[0].detail}"


def _skip_lines(skipped: tuple[Skipped, ...], window: int) -> list[str]:
    """Says how many clips were skipped, by reason, with the first two of each."""
    if not skipped:
        return []
    lines = [f"skipped {len(skipped):,}:"]
    for reason, count in Counter(skip.reason for skip in skipped).most_common():
        if reason == "short" and window == PUBLISHED_WINDOW:
            # No fault: a first look must not find broken data.
            lines.append(f"  short: {count:,}, of fewer than {window} frames, as three of four published clips are")
            continue
        lines.append(f"  {reason}: {count:,}")
        first = [skip for skip in skipped if skip.reason == reason][:2]
        lines += [f"    {skip.stem}: {skip.detail}" for skip in first]
        if count > len(first):
            lines.append(f"    and {count - len(first):,} more")
    return lines


def _check_windows(dataset: Dataset, config: DataConfig, index: ClipIndex) -> None:
    """Raises NoWindowsError, naming every split that is empty, if one is."""
    empty = [split for split, windows in dataset.windows.items() if not windows]
    if not empty:
        return
    lines = [
        f"no window of {config.observed} + {config.predicted} frames in {', '.join(empty)} "
        f"(split by {config.split}: {split_names(config)}; stride {config.stride})",
        dataset.describe(),
    ]
    if hint := folder_hint(dataset.root, index, dataset.skipped):
        lines.append(hint)
    if len(empty) < len(SPLITS):
        if config.split == "participant":
            lines.append("hint: --split time cuts every clip into train, val and test")
        else:
            lines.append(f"hint: val and test need a clip of {3 * (config.observed + config.predicted)} frames or more")
    raise NoWindowsError("\n".join(lines))
