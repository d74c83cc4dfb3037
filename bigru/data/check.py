"""A dataset or a clip looked through before anything is trained on it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import h5py
import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from bigru.config import DataConfig
from bigru.data.clips import (
    Clip,
    ClipError,
    ClipIndex,
    IndexedClip,
    Skipped,
    find_clip,
    find_index,
    open_clip,
    read_index,
    read_open_clip,
)
from bigru.data.frames import SPLITS, check_participant, split_frames, window_count
from bigru.data.hdf5 import FRAME_SHAPES, MODALITIES, checked_dataset, own_dataset, read_values

MOST_LISTED = 50
"""Rates or datasets listed by name; a file may hold any number."""


@dataclass
class Tally:
    """What the clips of one split amount to."""

    clips: int = 0
    windows: int = 0
    frames: int = 0
    participants: set[int] = field(default_factory=set)
    subtasks: set[str] = field(default_factory=set)
    rates: Counter[int] = field(default_factory=Counter)
    """Clips per frame rate, rounded to whole frames per second."""
    missing: Counter[str] = field(default_factory=Counter)
    """Frames without the left hand, the right hand or gaze."""
    gaze_frames: int = 0
    """Frames of clips that hold gaze."""
    without: Counter[str] = field(default_factory=Counter)
    """Clips that do not hold gaze, objects or the surrogate."""

    def add(self, row: IndexedClip, clip: Clip, frames: slice, without: list[str], config: DataConfig) -> None:
        """Count some frames of a clip."""
        present = clip.present[frames]
        self.clips += 1
        self.windows += window_count(len(present), config)
        self.frames += len(present)
        self.participants.add(row.participant)
        self.subtasks.add(row.subtask)
        self.rates[round(clip.fps)] += 1
        self.missing["left"] += int((~present[:, 0]).sum())
        self.missing["right"] += int((~present[:, 1]).sum())
        if clip.gaze is not None:
            self.gaze_frames += len(present)
            self.missing["gaze"] += int((~np.any(clip.gaze[frames], axis=1)).sum())
        self.without.update(without)

    def column(self) -> dict[str, str]:
        """Name and value of everything counted, as it is shown."""
        rates = sorted(self.rates.items())
        shown = [f"{clips:,} at {rate}" for rate, clips in rates[:MOST_LISTED]] + ["…"] * (len(rates) > MOST_LISTED)
        return {
            "clips": f"{self.clips:,}",
            "windows": f"{self.windows:,}",
            "participants": f"{len(self.participants)}",
            "subtasks": f"{len(self.subtasks)}",
            "frames": f"{self.frames:,}",
            "clips at frames per second": "\n".join(shown) or "-",
            "left hand missing": _percent(self.missing["left"], self.frames),
            "right hand missing": _percent(self.missing["right"], self.frames),
            "gaze missing": _percent(self.missing["gaze"], self.gaze_frames),
            **{f"clips without {name}": f"{self.without[name]:,}" for name in MODALITIES},
        }


@dataclass(frozen=True)
class Survey:
    """A dataset as training would find it."""

    root: Path
    index: ClipIndex
    splits: dict[str, Tally]
    skipped: list[Skipped]

    def text(self) -> str:
        """Every skipped clip with its reason, how many there are of each, and a table of what is left."""
        index = self.index
        others = f" ({index.other_cameras:,} more of other cameras)" if index.other_cameras else ""
        lines = [f"{skip.stem}: {skip.reason}: {skip.detail}" for skip in self.skipped]
        listed = len(index.clips) + len(index.skipped)
        lines += [f"{listed:,} clips listed in {index.path}{others}, read from {self.root}"]
        counts = Counter(skip.reason for skip in self.skipped).most_common()
        lines += [f"skipped: {', '.join(f'{count:,} {reason}' for reason, count in counts) or 'none'}"]
        columns = {split: tally.column() for split, tally in self.splits.items()}
        rows = [[name, *(column[name] for column in columns.values())] for name in columns["train"]]
        align = ["left", *["right"] * len(columns)]
        return "\n".join([*lines, "", tabulate(rows, ["", *columns], colalign=align, disable_numparse=True)])


def survey(config: DataConfig, *, progress: bool | None = None) -> Survey:
    """Read every clip of a dataset as training with these settings would, and its gaze too.

    Args:
        config: `data_root` must be set; `strict` and the cache play no part.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: `data_root` is None.
        FileNotFoundError: there is no data root or no index.
        DataError: the index file cannot be used.
    """
    index = read_index(find_index(config))
    root = Path(config.data_root or "")
    skipped = list(index.skipped)
    splits = {split: Tally() for split in SPLITS}
    for row in tqdm(index.clips, desc="checking", unit="clip", disable=None if progress is None else not progress):
        try:
            check_participant(row.participant, config)
            clip, without = _read_with_gaze(find_clip(root, row), config)
        except ClipError as error:
            skipped.append(Skipped(row.stem, error.reason, error.detail))
            continue
        for split, (start, stop) in split_frames(len(clip.hands), row.participant, config).items():
            splits[split].add(row, clip, slice(start, stop), without, config)
    return Survey(root, index, splits, skipped)


def _read_with_gaze(path: Path, config: DataConfig) -> tuple[Clip, list[str]]:
    """Return the clip, with gaze wherever that can be read, and the modalities it has no dataset of."""
    needed = config.observed + config.predicted
    with open_clip(path) as file:
        without = [name for name, dataset in MODALITIES.items() if not file.id.links.exists(dataset.encode())]
        if not config.gaze and "gaze" not in without:
            try:
                return read_open_clip(file, replace(config, gaze=True), needed), without
            except ClipError as error:
                # A fault of the gaze alone is no fault where gaze is not asked for; most faults are another one.
                if error.reason == "short":
                    raise
        return read_open_clip(file, config, needed), without


def describe(path: Path, observed: int, stride: int) -> tuple[str, Clip | None]:
    """Return what one clip holds, in words, and its hands, None where those cannot be used.

    Args:
        path: the clip, named as in an index.
        observed: frames observed per window, and as many predicted.
        stride: frames between the starts of two windows.

    Raises:
        ConfigError: `observed` or `stride` is below 1.
        ClipError: the file is missing, cannot be opened or bears another name.
    """
    config = DataConfig(observed=observed, predicted=observed, stride=stride)
    with open_clip(path) as file:
        names = sorted(file)
        table = tabulate(
            [_dataset_row(file, name) for name in names[:MOST_LISTED]],
            ["dataset", "shape", "type", "missing"],
            colalign=["left", "left", "left", "right"],
            disable_numparse=True,
        )
        more = [f"and {len(names) - MOST_LISTED:,} more"] * (len(names) > MOST_LISTED)
        options = {dataset: f" (for --{name})" for name, dataset in MODALITIES.items()}
        lacks = [name + options.get(name, "") for name in FRAME_SHAPES if name not in names]
        lines = [table, *more, f"lacks: {', '.join(lacks) or 'nothing'}"]
        try:
            clip = read_open_clip(file, config, needed=1)
        except ClipError as error:
            return "\n".join([path.stem, *lines, f"cannot be used: {error}"]), None
    frames = len(clip.hands)
    windows = window_count(frames, config)
    both = _percent(int((~np.any(clip.present, axis=1)).sum()), frames)
    head = [
        path.stem,
        f"{frames:,} frames at {clip.fps:g} per second, {clip.seconds[-1]:.2f} s; both hands missing in {both}",
        f"{windows:,} window{'' if windows == 1 else 's'} of {observed} + {observed} frames, one every {stride}"
        + ("" if windows else f" ({2 * observed} frames needed)"),
    ]
    return "\n".join([*head, *lines]), clip


def _dataset_row(file: h5py.File, name: str) -> list[str]:
    """Return name, shape, type and share of frames in which it is missing, or what is wrong with it."""
    # Names come from the file: no control characters onto a terminal.
    shown = name if name.isprintable() else ascii(name)
    try:
        dataset = own_dataset(file, name)
        if dataset is None:
            return [shown, "-", "no dataset", ""]
        shape = "-" if dataset.shape is None else " x ".join(map(str, dataset.shape))
        row = [shown, shape, str(dataset.dtype)[:40]]
        if name not in FRAME_SHAPES:
            return [*row, ""]
        values = read_values(checked_dataset(file, name))
    except ClipError as error:
        return [shown, "-", str(error), ""]
    there = np.any(values.reshape(len(values), -1), axis=1)
    return [*row, _percent(int((~there).sum()), len(values))]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
