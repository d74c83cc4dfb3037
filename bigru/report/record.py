"""Reads a run folder (config.json, metrics.jsonl, summary.json, samples.npz) and checks all of it."""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigru.report.fields import Fields, RunError, parse_object, read_object

FORMATS = (1, 2)
"""The values of `format` in summary.json that are understood; 1 lacks horizon, by_joint and by_subtask."""

PUBLISHED_COLUMNS = ("tr_mpjpe", "va_mpjpe", "tr_ade", "va_ade", "tr_fde", "va_fde")
"""The metric columns of the published document, in its order."""

NETWORK = "this network"
"""The run's own forecaster, among the baselines."""

EPOCH_COLUMNS = (*PUBLISHED_COLUMNS, "va_joint_error", "va_joint_error_px")
"""What every line of metrics.jsonl must hold beside its `epoch`; further entries are the trainer's own."""

# (attribute of Scores, name in the document, decimals)
MEASURES = (
    ("mpjpe", "MPJPE (published)", 3),
    ("ade", "ADE", 3),
    ("fde", "FDE", 3),
    ("joint_error", "per-joint error", 3),
    ("joint_error_px", "per-joint error (px)", 1),
)

MODALITIES = ("hands", "gaze", "objects", "surrogate")
SPLITS = ("train", "val", "test")
ENVIRONMENT = ("device", "backend", "precision", "python", "torch", "triton", "numpy", "bigru", "platform")
TIMING = ("epoch_s_median", "train_windows_per_s_median", "total_s")


@dataclass(frozen=True)
class Scores:
    """Errors over a set of windows, in centred units (half the image in each axis) unless the name says pixels."""

    mpjpe: float
    """The published definition: L2 norm over the 84-vector of a frame, averaged."""
    ade: float
    fde: float
    joint_error: float
    """The true one: distance per joint, then the mean."""
    joint_error_px: float
    windows: int


@dataclass(frozen=True)
class Series:
    """Per-joint errors one after another: of each future frame, or of each joint; NaN where nothing was scored."""

    joint_error: tuple[float, ...]
    joint_error_px: tuple[float, ...]


@dataclass(frozen=True)
class Samples:
    """A few test windows to draw; coordinates are x, y pairs of 21 left joints, then 21 right ones, centred."""

    observed: np.ndarray  # (S, To, 84)
    predicted: np.ndarray  # (S, Tp, 84)
    target: np.ndarray  # (S, Tp, 84)
    observed_present: np.ndarray  # (S, To, 2) bool: left hand, right hand
    target_present: np.ndarray  # (S, Tp, 2) bool
    fps: np.ndarray  # (S,)
    error_px: np.ndarray  # (S,) true per-joint error of the whole window
    stem: np.ndarray  # (S,) str
    label: np.ndarray  # (S,) str: which of all test windows it is, "best", say; empty where that was not recorded


@dataclass(frozen=True)
class RunRecord:
    """Everything the report says about one finished run."""

    folder: Path
    config: dict[str, dict[str, Any]]
    metrics: dict[str, list[float]]
    """Column -> one value an epoch: `epoch`, then `EPOCH_COLUMNS`."""
    torn_line: int | None
    """Number of the unfinished last line of metrics.jsonl, which is left out."""
    stamp: str
    """The folder's name, by which the document knows the run: a copy of a run is a run of its own."""
    started: str
    total_params: int
    modules: tuple[tuple[str, int], ...]
    best_epoch: int
    stopped_early: bool
    test: Scores
    baselines: dict[str, Scores]
    by_frame_rate: tuple[tuple[float, Scores], ...]
    by_subtask: tuple[tuple[str, Scores], ...]
    """Empty where the run did not record it, as the next two are."""
    horizon: dict[str, Series]
    """Forecaster -> its errors at each future frame: `NETWORK`, and the baselines by name."""
    by_joint: Series | None
    """The errors of the 21 left joints, then the 21 right ones."""
    modalities: dict[str, bool]
    source: str
    split: str
    clips: dict[str, int]
    windows: dict[str, int]
    skipped: dict[str, int]
    environment: dict[str, str]
    timing: dict[str, float]
    command: str
    samples: Samples


def read_run(run: Path) -> RunRecord:
    """Reads and checks a finished run folder.

    Arguments:
        run: the folder that the trainer wrote, `<out>/<stamp>`.

    Returns:
        what the folder says, with every number in the unit that the trainer wrote.

    Raises:
        RunError: not a run folder, one whose name the document cannot use, an unfinished run (the message says how to
            resume it), an unknown format, or an entry that is missing, mistyped or torn; the message names the file,
            and the line in metrics.jsonl.
    """
    folder = run.resolve()
    if not folder.is_dir():
        raise RunError(f"{run} is not a folder")
    for name in ("config.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise RunError(f"{run} is not a run folder: it holds no {name}")
    # The name becomes part of file names and of an HTML comment.
    if not re.fullmatch(r"\w+", folder.name, re.ASCII):
        raise RunError(f"{run}: a run folder's name should be letters, digits and underscores, got {folder.name!r}")
    for name in ("summary.json", "samples.npz"):
        if not (folder / name).is_file():
            raise RunError(
                f"{run} holds no {name}: the run is not finished. Resume it with: python -m bigru.train --resume {run}"
            )
    config = _read_config(folder / "config.json")
    metrics, torn_line = _read_metrics(folder / "metrics.jsonl")
    summary = Fields(str(folder / "summary.json"), read_object(folder / "summary.json"))
    record = _from_summary(summary, folder, config, metrics, torn_line, read_samples(folder / "samples.npz"))
    if not 1 <= record.best_epoch <= len(metrics["epoch"]):
        raise RunError(
            f"{summary.where}: best_epoch is {record.best_epoch}, but metrics.jsonl holds epochs 1 to "
            f"{len(metrics['epoch'])}"
        )
    return record


def _read_config(path: Path) -> dict[str, dict[str, Any]]:
    fields = Fields(str(path), read_object(path))
    for group in ("data", "model", "optim", "run"):
        fields.inside(group)
    fields.inside("optim").count("batch_size")
    fields.inside("data").count("predicted")
    fields.inside("data").flag("mask_missing")
    return dict(fields.values)


def _read_metrics(path: Path) -> tuple[dict[str, list[float]], int | None]:
    """The epochs as columns, and the number of a last line torn by a kill (it has no line end), or None."""
    # Broken bytes become broken JSON here, and so are reported with their line.
    *lines, tail = path.read_text(encoding="utf-8", errors="replace").split("\n")
    torn_line = None
    if tail:
        try:
            json.loads(tail)
            lines.append(tail)
        except ValueError:
            torn_line = len(lines) + 1
    if not lines:
        raise RunError(f"{path}: no complete epoch")
    columns: dict[str, list[float]] = {name: [] for name in ("epoch", *EPOCH_COLUMNS)}
    for number, line in enumerate(lines, start=1):
        fields = Fields(f"{path}:{number}", parse_object(f"{path}:{number}", line))
        if (epoch := fields.count("epoch")) != number:
            raise RunError(f"{path}:{number}: expected epoch {number}, got epoch {epoch}")
        columns["epoch"].append(epoch)
        for name in EPOCH_COLUMNS:
            columns[name].append(fields.number(name))
    return columns, torn_line


def _read_scores(fields: Fields) -> Scores:
    return Scores(
        mpjpe=fields.number("mpjpe"),
        ade=fields.number("ade"),
        fde=fields.number("fde"),
        joint_error=fields.number("joint_error"),
        joint_error_px=fields.number("joint_error_px"),
        windows=fields.count("windows"),
    )


def _read_frame_rate(fields: Fields) -> tuple[float, Scores]:
    if not (fps := fields.number("fps")) > 0:
        raise RunError(f"{fields.where}: fps should be more than 0, got {fps!r}")
    return fps, _read_scores(fields)


def _read_series(fields: Fields, length: int) -> Series:
    series = Series(fields.numbers("joint_error"), fields.numbers("joint_error_px"))
    for name, values in (("joint_error", series.joint_error), ("joint_error_px", series.joint_error_px)):
        if len(values) != length:
            raise RunError(f"{fields.where}: {name} should hold {length} numbers, got {len(values)}")
    return series


def _from_summary(
    summary: Fields,
    folder: Path,
    config: dict[str, dict[str, Any]],
    metrics: dict[str, list[float]],
    torn_line: int | None,
    samples: Samples,
) -> RunRecord:
    if (version := summary.count("format")) not in FORMATS:
        raise RunError(
            f"{summary.where}: format {version} is not known; this version of the report reads "
            f"{' and '.join(map(str, FORMATS))}"
        )
    baselines, data = summary.inside("baselines"), summary.inside("data")
    modalities, timing = summary.inside("modalities"), summary.inside("timing")
    horizon = summary.inside("horizon") if version > 1 else Fields(summary.where, {})
    environment, clips, windows = summary.inside("environment"), data.inside("clips"), data.inside("windows")
    return RunRecord(
        folder=folder,
        config=config,
        metrics=metrics,
        torn_line=torn_line,
        stamp=folder.name,
        started=summary.text("started"),
        total_params=summary.count("total_params"),
        modules=tuple((entry.text("module"), entry.count("params")) for entry in summary.objects("modules")),
        best_epoch=summary.count("best_epoch"),
        stopped_early=summary.flag("stopped_early"),
        test=_read_scores(summary.inside("test")),
        baselines={name: _read_scores(baselines.inside(name)) for name in baselines.values},
        by_frame_rate=tuple(_read_frame_rate(entry) for entry in summary.objects("by_frame_rate")),
        by_subtask=tuple(
            (entry.text("subtask"), _read_scores(entry))
            for entry in (summary.objects("by_subtask") if version > 1 else ())
        ),
        horizon={name: _read_series(horizon.inside(name), config["data"]["predicted"]) for name in horizon.values},
        by_joint=_read_series(summary.inside("by_joint"), 42) if version > 1 else None,
        modalities={name: modalities.flag(name) for name in MODALITIES},
        source=data.text("source"),
        split=data.text("split"),
        clips={name: clips.count(name) for name in SPLITS},
        windows={name: windows.count(name) for name in SPLITS},
        skipped=data.counts("skipped"),
        environment={name: environment.text_or_none(name) for name in ENVIRONMENT},
        timing={name: timing.number(name) for name in TIMING},
        command=summary.text("command"),
        samples=samples,
    )


def read_samples(path: Path) -> Samples:
    """Reads samples.npz; raises RunError, naming the array that is missing or of the wrong shape or type."""
    try:
        # Opened here: np.load leaves a file that is no archive open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"{path}: not a readable NumPy archive: {error}") from error
    # Runs of format 1 have none.
    arrays.setdefault("label", np.full(len(arrays.get("stem", ())), ""))
    if missing := sorted(Samples.__dataclass_fields__.keys() - arrays.keys()):
        raise RunError(f"{path}: {', '.join(missing)} missing")
    for name in ("observed", "predicted"):
        if arrays[name].ndim != 3 or arrays[name].size == 0:
            raise RunError(f"{path}: {name} should be (windows, frames, 84), none of them 0, got {arrays[name].shape}")
    count, observed, _ = arrays["observed"].shape
    predicted = arrays["predicted"].shape[1]
    # Shape, and kinds of dtype in NumPy's letters.
    expected = {
        "observed": ((count, observed, 84), "f"),
        "predicted": ((count, predicted, 84), "f"),
        "target": ((count, predicted, 84), "f"),
        "observed_present": ((count, observed, 2), "b"),
        "target_present": ((count, predicted, 2), "b"),
        "fps": ((count,), "fiu"),
        "error_px": ((count,), "fiu"),
        "stem": ((count,), "U"),
        "label": ((count,), "U"),
    }
    for name, (shape, kinds) in expected.items():
        if arrays[name].shape != shape or arrays[name].dtype.kind not in kinds:
            raise RunError(
                f"{path}: {name} should be {shape} of kind {' or '.join(kinds)}, got {arrays[name].shape} of "
                f"{arrays[name].dtype}"
            )
    if not (arrays["fps"] > 0).all():
        raise RunError(f"{path}: fps should be more than 0, got {arrays['fps']}")
    return Samples(**{name: arrays[name] for name in expected})
