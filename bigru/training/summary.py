"""The end of a run: scores on the test split, summary.json, and the run's document."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from bigru.arguments import command_line
from bigru.config import TrainConfig
from bigru.data.index import SUBTASKS
from bigru.data.synthetic import EMBEDDED
from bigru.environment import describe_environment
from bigru.files import printable, write_json
from bigru.model.metrics import (
    BASELINES,
    by_frame_rate,
    by_subtask,
    evaluate,
    mean_errors,
    score,
    score_joints,
    summarise,
    window_error_px,
)
from bigru.report.record import METRICS, NETWORK
from bigru.training.example_windows import write_example_windows
from bigru.training.run_dir import start_of
from bigru.training.trainer import Trainer

log = logging.getLogger("bigru.train")


def finish(folder: Path, trainer: Trainer, backend: str) -> None:
    """Scores the best weights and the baselines on the test split and writes samples.npz and summary.json."""
    config, model, dataset, progress = trainer.config, trainer.model, trainer.dataset, trainer.progress
    model.load_state_dict(progress.best_weights)
    model.eval()
    windows, size, mask = dataset.test, config.optim.batch_size, config.data.mask_missing
    rows = evaluate(model, windows.batches(size), mask)
    write_example_windows(folder / "samples.npz", model, windows, window_error_px(rows))
    forecasters: dict[str, Callable[[Tensor], Tensor]] = {NETWORK: model, **BASELINES}
    joints = {name: score_joints(predict, windows.batches(size), mask) for name, predict in forecasters.items()}
    epochs_s = [row["train_s"] + row["val_s"] for row in progress.history]
    summary = {
        "format": 2,
        "started": start_of(folder).strftime("%Y-%m-%d %H:%M:%S"),
        "total_params": count_parameters(model),
        "modules": [
            {"module": name, "params": own}
            for name, module in model.named_modules()
            if (own := sum(parameter.numel() for parameter in module.parameters(recurse=False)))
        ],
        "best_epoch": progress.best_epoch,
        "finished_before": progress.finished,
        "stopped_early": progress.epoch < config.optim.epochs,
        "test": summarise(rows).scores(),
        "baselines": {
            name: summarise(score(predict, windows.batches(size), mask)).scores() for name, predict in BASELINES.items()
        },
        "by_frame_rate": by_frame_rate(rows, windows.fps, windows.fps_is_assumed),
        "by_subtask": by_subtask(rows, windows.subtask, SUBTASKS),
        "horizon": {name: mean_errors(sums.sum(1)) for name, sums in joints.items()},
        "by_joint": mean_errors(joints[NETWORK].sum(0)),
        "modalities": {
            "hands": True,
            "gaze": config.data.gaze,
            "objects": config.data.objects,
            "surrogate": config.data.surrogate,
        },
        "data": {
            "source": describe_source(config),
            "split": config.data.split,
            "clips": dict(dataset.clips),
            "windows": progress.windows,
            "skipped": dict(dataset.skip_counts()),
            "departures": config.data.departures + ["displacements predicted"] * config.model.residual,
        },
        "environment": describe_environment(trainer.step.device, backend, config.run.precision),
        "timing": {
            "epoch_s_median": statistics.median(epochs_s),
            "train_windows_per_s_median": statistics.median(row["train_windows_per_s"] for row in progress.history),
            "total_s": progress.elapsed_s,
        },
        "command": command_line(config),
    }
    write_json(folder / "summary.json", summary)


def describe_source(config: TrainConfig) -> str:
    """Returns where the clips came from, for the document."""
    if config.data.data_root is None:
        return f"embedded synthetic dataset ({EMBEDDED['clips']} clips, seed {EMBEDDED['seed']})"
    return str(config.data.data_root)


def report(folder: Path, write_report: Callable[[Path], Path]) -> None:
    """Writes the document of a finished run and logs its test figures beside the baselines'."""
    document = write_report(folder)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    rows = {NETWORK: summary["test"], **summary["baselines"]}
    log.info(
        "%-20s %8s %8s %8s %12s %9s",
        f"test, {summary['test']['windows']} windows",
        "MPJPE",
        "ADE",
        "FDE",
        "joint error",
        "in px",
    )
    for name, scores in rows.items():
        numbers = [math.nan if scores[key] is None else scores[key] for key in (metric.name for metric in METRICS)]
        log.info("%-20s %8.3f %8.3f %8.3f %12.4f %9.1f", name, *numbers)
    log.info("%s", printable(document))


def count_parameters(model: nn.Module) -> int:
    """Returns the number of trainable numbers in a network."""
    return sum(parameter.numel() for parameter in model.parameters())
