"""The end of a run: scores on the test split, summary.json, and the run's document."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from bigru.arguments import command_line
from bigru.config import TrainConfig
from bigru.data.index import SUBTASKS
from bigru.data.synthetic import EMBEDDED
from bigru.environment import describe_environment
from bigru.files import printable, write_json
from bigru.kernels.registry import Choice
from bigru.layout import MODALITY_SIZES
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
from bigru.report.breakdown import unbeaten
from bigru.report.record import FORMAT, NETWORK, Scores, read_run
from bigru.training.example_windows import write_example_windows
from bigru.training.run_dir import SUMMARY, start_of
from bigru.training.trainer import Trainer

log = logging.getLogger("bigru.train")


def finish(folder: Path, trainer: Trainer, choice: Choice) -> None:
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
        "format": FORMAT,
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
        "modalities": {"hands": True, **{name: getattr(config.data, name) for name in MODALITY_SIZES}},
        "data": {
            "source": describe_source(config),
            "split": config.data.split,
            "clips": dict(dataset.clips),
            "windows": progress.windows,
            "skipped": dict(dataset.skip_counts()),
            "departures": config.data.departures + ["displacements predicted"] * config.model.residual,
        },
        "environment": describe_environment(trainer.step.device, choice, config.run.precision),
        "timing": {
            "epoch_s_median": statistics.median(epochs_s),
            "train_windows_per_s_median": statistics.median(row["train_windows_per_s"] for row in progress.history),
            "total_s": progress.elapsed_s,
        },
        "command": command_line(config),
    }
    write_json(folder / SUMMARY, summary)


def describe_source(config: TrainConfig) -> str:
    """Returns where the clips came from, for the document."""
    if config.data.data_root is None:
        return f"embedded synthetic dataset ({EMBEDDED['clips']} clips, seed {EMBEDDED['seed']})"
    return str(config.data.data_root)


def report(folder: Path, write_report: Callable[[Path], Path]) -> None:
    """Writes the document of a finished run and logs its test figures beside the baselines'."""
    document = write_report(folder)
    record = read_run(folder)
    log.info("%s", score_table({NETWORK: record.test, **record.baselines}))
    if sentences := unbeaten(record.horizon):
        log.info("%s", sentences.replace(". ", ".\n"))
    log.info("%s", printable(document))


def score_table(rows: Mapping[str, Scores]) -> str:
    """Returns the test figures of forecasters or runs, by name, as lines for the console."""
    windows = " or ".join(f"{count}" for count in dict.fromkeys(scores.windows for scores in rows.values()))
    lines = [f"{f'test, {windows} windows':20} {'MPJPE':>8} {'ADE':>8} {'FDE':>8} {'joint error':>12} {'in px':>9}"]
    for name, scores in rows.items():
        errors = f"{scores.mpjpe:8.3f} {scores.ade:8.3f} {scores.fde:8.3f} {scores.joint_error:12.4f}"
        lines.append(f"{name:20} {errors} {scores.joint_error_px:9.1f}")
    return "\n".join(lines)


def count_parameters(model: nn.Module) -> int:
    """Returns the number of trainable numbers in a network."""
    return sum(parameter.numel() for parameter in model.parameters())
