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
from bigru.data.clips import Clip, open_clip, read_open_clip
from bigru.data.frames import (
    ASSUMED,
    IN_TWO_SPLITS,
    SPLITS,
    check_participant,
    content_digest,
    counted,
    folder_hint,
    leaks,
    split_frames,
    window_count,
    window_starts,
)
from bigru.data.hdf5 import (
    FRAME_SHAPES,
    MODALITIES,
    ClipError,
    checked_dataset,
    h5py_errors,
    lacking_datasets,
    own_dataset,
    read_values,
)
from bigru.data.index import ClipIndex, IndexedClip, Skipped, find_clip, find_index, read_index
from bigru.files import printable

MOST_LISTED = 50
"""Rates or datasets listed by name; a file may hold any number."""
MOST_SHOWN = 5
"""Clips shown of those that have one fault."""


@dataclass
class Tally:
    """The counts of one split's clips."""

    clips: int = 0
    windows: int = 0
    frames: int = 0
    participants: set[int] = field(default_factory=set)
    subtasks: set[str] = field(default_factory=set)
    rates: Counter[tuple[int, bool]] = field(default_factory=Counter)
    """Clips per frame rate, rounded to whole frames per second, and whether that is assumed."""
    missing: Counter[str] = field(default_factory=Counter)
    """Frames without the left hand, the right hand or gaze."""
    gaze_frames: int = 0
    """Frames of clips that hold gaze."""
    without: Counter[str] = field(default_factory=Counter)
    """Clips that do not hold gaze, objects or the surrogate."""

    def add(self, row: IndexedClip, clip: Clip, frames: slice, without: list[str], config: DataConfig) -> None:
        """Counts some frames of a clip."""
        present = clip.present[frames]
        self.clips += 1
        self.windows += len(window_starts(present, config))
        self.frames += len(present)
        self.participants.add(row.participant)
        self.subtasks.add(row.subtask)
        self.rates[round(clip.fps), bool(clip.assumed)] += 1
        self.missing["left"] += int((~present[:, 0]).sum())
        self.missing["right"] += int((~present[:, 1]).sum())
        if clip.gaze is not None:
            self.gaze_frames += len(present)
            self.missing["gaze"] += int((~np.any(clip.gaze[frames], axis=1)).sum())
        self.without.update(without)

    def column(self) -> dict[str, str]:
        """Returns name and value of everything counted, as it is shown."""
        rates = sorted(self.rates.items())
        shown = [f"{clips:,} at {rate}{' (assumed)' if assumed else ''}" for (rate, assumed), clips in rates]
        shown = shown[:MOST_LISTED] + ["..."] * (len(rates) > MOST_LISTED)
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
    """Clips that cannot be used, and as `in two splits` those whose content lies in an earlier split too."""
    assumed: Counter[str]
    """Clips per reason for which their frame rate is assumed."""

    @property
    def counts(self) -> Counter[str]:
        """Clips per reason in `skipped`."""
        return Counter(skip.reason for skip in self.skipped)

    def text(self) -> str:
        """Returns how many clips have each fault, the first of each, and a table of what is left."""
        index = self.index
        others = f" ({index.other_cameras:,} more of other cameras)" if index.other_cameras else ""
        lines = []
        for reason, count in self.counts.most_common():
            same = [skip for skip in self.skipped if skip.reason == reason]
            lines += [f"{skip.stem}: {reason}: {skip.detail}" for skip in same[:MOST_SHOWN]]
            lines += [f"and {count - MOST_SHOWN:,} more: {reason}"] * (count > MOST_SHOWN)
        listed = len(index.clips) + len(index.skipped)
        lines += [f"{listed:,} clips listed in {printable(index.path)}{others}, read from {printable(self.root)}"]
        leaks = self.counts[IN_TWO_SPLITS]
        lines += [f"skipped: {counted(self.counts - Counter({IN_TWO_SPLITS: leaks}))}"]
        lines += [f"{IN_TWO_SPLITS}, under two names: {leaks:,}"] * bool(leaks)
        lines += [f"{ASSUMED}: {counted(self.assumed)}"] * bool(self.assumed)
        if hint := folder_hint(self.root, index, self.skipped):
            lines.append(hint)
        columns = {split: tally.column() for split, tally in self.splits.items()}
        rows = [[name, *(column[name] for column in columns.values())] for name in columns["train"]]
        align = ["left", *["right"] * len(columns)]
        return "\n".join([*lines, "", tabulate(rows, ["", *columns], colalign=align, disable_numparse=True)])


def survey(config: DataConfig, *, progress: bool | None = None) -> Survey:
    """Reads every clip of a dataset as training with these settings would, and its gaze too.

    `strict` and the cache play no part. `progress` shows a bar; None: only on a terminal.

    Raises:
        ValueError: `data_root` is None.
        FileNotFoundError: there is no data root or no index.
        DataError: the index file cannot be used.
    """
    index = read_index(find_index(config))
    root = Path(config.data_root or "")
    skipped = list(index.skipped)
    contents: list[tuple[str, str, str]] = []
    assumed: Counter[str] = Counter()
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
            if clip.present[start:stop].any():
                contents.append((split, row.stem, content_digest(clip.hands[start:stop])))
        if clip.assumed:
            assumed[clip.assumed] += 1
    return Survey(root, index, splits, [*skipped, *leaks(contents)], assumed)


def _read_with_gaze(path: Path, config: DataConfig) -> tuple[Clip, list[str]]:
    """Returns the clip, with gaze wherever that can be read, and the modalities it has no dataset of."""
    needed = config.observed + config.predicted
    with open_clip(path) as file:
        lacking = lacking_datasets(file, MODALITIES.values())
        without = [name for name, dataset in MODALITIES.items() if dataset in lacking]
        if not config.gaze and "gaze" not in without:
            try:
                return read_open_clip(file, replace(config, gaze=True), needed), without
            except ClipError as error:
                # A fault of the gaze alone is no fault where gaze is not asked for; most faults are another one.
                if error.reason == "short":
                    raise
        return read_open_clip(file, config, needed), without


def describe(path: Path, observed: int, stride: int, nan_missing: bool = False) -> tuple[str, Clip | None]:
    """Returns what one clip holds, in words, and its hands, None where those cannot be used.

    `observed`, as many predicted, `stride` and `nan_missing` are as in `DataConfig`.

    Raises:
        ConfigError: `observed` or `stride` is below 1.
        ClipError: the file is missing or cannot be opened.
    """
    config = DataConfig(observed=observed, predicted=observed, stride=stride, nan_missing=nan_missing)
    with open_clip(path) as file:
        with h5py_errors():
            names = sorted(file)
        rows = [_dataset_row(file, name, nan_missing) for name in names[:MOST_LISTED]]
        heads, align = ["dataset", "shape", "type", "missing"], ["left", "left", "left", "right"]
        table = tabulate(rows, heads, colalign=align, disable_numparse=True)
        more = [f"and {len(names) - MOST_LISTED:,} more"] * (len(names) > MOST_LISTED)
        options = {dataset: f" (for --{name})" for name, dataset in MODALITIES.items()}
        lacks = [name + options.get(name, "") for name in (*FRAME_SHAPES, "timestamps") if name not in names]
        lines = [table, *more, f"lacks: {', '.join(lacks) or 'nothing'}"]
        try:
            clip = read_open_clip(file, config, needed=1)
        except ClipError as error:
            if error.reason == "short":
                # A clip without a frame: what training says of it.
                error = ClipError("short", f"0 frames, {2 * observed} needed")
            return "\n".join([printable(path.stem), *lines, f"cannot be used: {error}"]), None
    frames = len(clip.hands)
    windows = window_count(frames, config)
    both = _percent(int((~np.any(clip.present, axis=1)).sum()), frames)
    head = [
        printable(path.stem),
        f"{frames:,} frames at {clip.rate}, {clip.seconds[-1]:.2f} s; both hands missing in {both}",
        f"{windows:,} window{'' if windows == 1 else 's'} of {observed} + {observed} frames, one every {stride}"
        + ("" if windows else f" ({2 * observed} frames needed)"),
    ]
    if len(holes := clip.holes()):
        longest = np.diff(clip.seconds)[holes].max()
        head.append(
            f"{len(holes):,} of its steps in time longer than {clip.longest_step:g} s, the longest {longest:.2f} s; "
            "after --resample the hands are missing there"
        )
    return "\n".join([*head, *lines]), clip


def _dataset_row(file: h5py.File, name: str, nan_missing: bool) -> list[str]:
    """Returns name, shape, type and share of frames in which it is missing, or what is wrong with it."""
    # Names come from the file: no control characters onto a terminal.
    shown = printable(name)
    try:
        dataset = own_dataset(file, name)
        if dataset is None:
            return [shown, "-", "no dataset", ""]
        shape = "-" if dataset.shape is None else " x ".join(map(str, dataset.shape))
        row = [shown, shape, str(dataset.dtype)[:40]]
        if name not in FRAME_SHAPES:
            return [*row, ""]
        values = read_values(checked_dataset(file, name), nan_missing)
    except ClipError as error:
        return [shown, "-", str(error), ""]
    there = np.any(values, axis=tuple(range(1, values.ndim)))
    return [*row, _percent(int((~there).sum()), len(values))]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
