"""The training command: `python -m bigru.train` trains the forecaster, scores it and writes results_bigru.md.

A run is a folder, `{out}/{stamp}`, from which the document is made and at which an interrupted run goes on:
config.json, metrics.jsonl (a line an epoch), checkpoint.pt (after each epoch, and where a signal stopped the run),
weights.safetensors (the best so far), train.log, skipped.tsv, run.lock, which keeps a second run out of the folder,
diverged.npz with the batch where the loss broke, and, once it has finished, samples.npz and summary.json.

`torchrun --nproc-per-node N -m bigru.train ...` trains in N processes: the batch is the same, divided among them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bigru import board
from bigru.config import ConfigError, TrainConfig, command_line, from_mapping, parse_arguments
from bigru.data.clips import SUBTASKS
from bigru.data.synthetic import EMBEDDED, ensure_synthetic
from bigru.data.windows import Dataset, NoWindowsError, Windows, load_dataset
from bigru.distributed import LostProcessError, current_team, is_first, joined
from bigru.environment import describe_environment, device_name, pick_device
from bigru.files import as_json, write_json, write_lines
from bigru.folder import RunLog, check_writable, only_user, start_folder, start_of
from bigru.loop import DivergedError, Loop
from bigru.model.checkpoint import CheckpointError, Progress, load_checkpoint, load_weights, save_weights
from bigru.model.forecaster import HandForecaster
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
from bigru.report.document import write_report
from bigru.report.fields import RunError
from bigru.report.record import NETWORK
from bigru.samples import write_samples
from bigru.signals import interrupt, on_signals
from bigru.sweep import sweep_modalities

log = logging.getLogger("bigru.train")

SCORES = ("mpjpe", "ade", "fde", "joint_error", "joint_error_px")
SPLITS = ("train", "val", "test")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    0; 1: diverged, or left alone by another process; 2: the user's to mend; 130 and 143: after SIGINT and SIGTERM.
    """
    first = is_first()
    with ExitStack() as stack:
        if not first:
            # Of several processes the first speaks for all.
            nobody = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nobody))
            stack.enter_context(redirect_stderr(nobody))
        stack.enter_context(log_to(logging.StreamHandler()))
        stack.enter_context(on_signals(interrupt))
        try:
            arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
            with joined():
                if arguments.resume is not None:
                    resume(arguments.resume)
                elif arguments.sweep == "modalities":
                    sweep_modalities(arguments.settings, train, resume)
                else:
                    train(arguments.settings)
            return 0
        except (DivergedError, LostProcessError) as error:
            code, message = 1, str(error)
        except (ConfigError, CheckpointError, NoWindowsError, RunError, OSError) as error:
            code, message = 2, str(error)
        except KeyboardInterrupt as error:
            code, message = 128 + getattr(error, "signal", signal.SIGINT), "interrupted"
    if first:
        print(f"bigru.train: {message}", file=sys.stderr)
    return code


def train(config: TrainConfig) -> Path:
    """Trains, scores and reports a new run; returns its folder.

    Raises:
        ConfigError, CheckpointError, NoWindowsError, OSError: for settings, weights or data that cannot be used.
        DivergedError: when the loss is no longer finite.
        Interrupted: after SIGINT or SIGTERM in training; the step under way was finished, and a checkpoint written.
    """
    return carry_out(config, None)


def resume(folder: Path) -> Path:
    """Goes on with an interrupted run from its last whole checkpoint, to the bit on the CPU; returns its folder.

    Raises:
        ConfigError: for a folder that holds no run or is not named after its start, and as `train` does.
    """
    if not folder.name:
        folder = folder.resolve()
    settings = folder / "config.json"
    if not settings.is_file():
        raise ConfigError(f"resume: {folder} holds no run (no config.json in it)")
    if (folder / "summary.json").is_file():
        log.info("%s has finished; writing its document again", folder)
        if current_team().first:
            report(folder)
        return folder
    # Asked now, not after the last epoch.
    start_of(folder)
    try:
        content = json.loads(settings.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"resume: {settings} is not JSON: {error}") from error
    config = from_mapping(content, str(settings))
    # The folder may have moved since.
    return carry_out(replace(config, run=replace(config.run, out=folder.parent)), folder)


def carry_out(config: TrainConfig, folder: Path | None) -> Path:
    """The whole of a run: data, network, epochs, test, document; in a new folder, or on in the given one.

    Of several processes the first alone writes; the others leave after the last epoch.
    """
    team = current_team()
    if config.run.tensorboard:
        # Asked now, not after the data are read.
        board.require()
    device = pick_device(team.device(config.run.device))
    with ExitStack() as kept:
        if team.first and folder is not None:
            kept.enter_context(only_user(folder))
        elif team.first:
            check_writable(config.run.out)
        # The first leaves what the others need not make again.
        dataset = team.in_turn(lambda: load_data(config, device))
        # Seeded here, so that reading the data cannot change the weights.
        torch.manual_seed(config.run.seed)
        model, backend = build_model(config, device, dataset.train)
        loop = Loop(config, model, dataset, team)
        if not team.first:
            # Dropout draws other numbers in every process.
            torch.manual_seed(config.run.seed + 100_003 * team.rank)
        if folder is not None and (folder / "checkpoint.pt").is_file():
            go_on(folder, loop)
        elif config.run.weights is not None:
            load_weights(model, config.run.weights)
        if folder is None:
            folder = team.tell(start_folder(config) if team.first else None)
            if team.first:
                kept.enter_context(only_user(folder))
        if not team.first:
            loop.fit(folder)
            return folder
        try:
            # What an epoch cut short may have left beyond the checkpoint goes.
            write_lines(folder / "metrics.jsonl", map(as_json, loop.progress.history))
            skipped = [(skip.stem, skip.reason, " ".join(skip.detail.split())) for skip in dataset.skipped]
            write_lines(folder / "skipped.tsv", map("\t".join, [("stem", "reason", "detail"), *skipped]))
            with log_to(RunLog(folder / "train.log", encoding="utf-8")):
                log.info("run %s%s", folder, going_on(loop))
                log.info("%s", dataset.describe())
                log.info(
                    "%s, backend %s, %s; %s parameters",
                    device_name(device),
                    backend,
                    describe_training(config, team.size),
                    f"{count_parameters(model):,}",
                )
                log.info("below: train/val; train is taken in passing, dropout on and weights moving")
                with board.watched(config, folder, loop, dataset):
                    loop.fit(folder)
                    finish(config, folder, model, dataset, loop.progress, backend)
                report(folder)
        except DivergedError:
            # It would again.
            raise
        except BaseException:
            log.warning("go on with: python -m bigru.train --resume %s", shlex.quote(str(folder)))
            raise
    return folder


def going_on(loop: Loop) -> str:
    """Where a run goes on, for the first line of its log; empty for one that begins."""
    progress = loop.progress
    inside = f"batch {progress.step} of epoch {progress.epoch + 1}" if progress.step else ""
    after = inside or (f"epoch {progress.epoch}" if progress.epoch else "")
    return f", going on after {after}" if after else ""


def describe_training(config: TrainConfig, processes: int) -> str:
    """Precision and what else says how it is trained."""
    run = config.run
    words: list[str] = [run.precision]
    if run.amp != "none":
        words.append(f"{run.amp} autocast")
    if run.graph:
        words.append("CUDA graph")
    if processes > 1:
        words.append(f"{processes} processes")
    return ", ".join(words)


def load_data(config: TrainConfig, device: torch.device) -> Dataset:
    """The dataset named by the settings, or the small synthetic one, with its windows on the device."""
    data = config.data
    if data.data_root is None:
        if data.index is not None:
            raise ConfigError(f"index: {data.index} needs the folder of its clips, --data-root")
        log.info("no --data-root: a small synthetic dataset in %s serves", config.run.out / "synthetic")
    try:
        if data.data_root is None:
            data = replace(data, data_root=ensure_synthetic(config.run.out / "synthetic", **EMBEDDED))
        dataset = load_dataset(data)
    except NoWindowsError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return replace(dataset, **{split: getattr(dataset, split).to(device) for split in SPLITS})


def build_model(config: TrainConfig, device: torch.device, train: Windows) -> tuple[HandForecaster, str]:
    """The network on the device, and the name of what will run its GRU."""
    try:
        model = HandForecaster(
            config.data.input_size,
            config.model.hidden_size,
            config.model.num_layers,
            config.model.dropout,
            backend=config.run.backend,
            precision=config.run.precision,
        )
        model.to(device)
        sample = next(iter(train.batches(min(config.optim.batch_size, len(train))))).x
        return model, model.encoder.core.resolve_backend(sample)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"backend: {config.run.backend} cannot run the network on {device}: {error}") from error


def go_on(folder: Path, loop: Loop) -> None:
    """Restores the last whole checkpoint and puts the files beside it back to where it stands."""
    progress = load_checkpoint(folder / "checkpoint.pt", loop.step, loop.team.rank)
    if progress.windows != loop.progress.windows:
        raise ConfigError(
            f"resume: {folder} began with other data: it had {progress.windows} windows, there are now "
            f"{loop.progress.windows}"
        )
    if progress.losses is not None and progress.rows is not None:
        steps = len(progress.losses)
        batch = len(progress.rows) // steps
        if (steps, batch) != (loop.steps, loop.batch):
            raise ConfigError(
                f"resume: {folder} stands in the middle of an epoch of {steps} batches of {batch}; by "
                f"its settings it has {loop.steps} of {loop.batch}"
            )
    loop.progress = progress
    if loop.team.first and progress.best_weights:
        save_weights(folder / "weights.safetensors", progress.best_weights)


def finish(
    config: TrainConfig, folder: Path, model: HandForecaster, dataset: Dataset, progress: Progress, backend: str
) -> None:
    """Scores the best weights and the baselines on the test split and writes samples.npz and summary.json."""
    model.load_state_dict(progress.best_weights)
    model.eval()
    windows, size, mask = dataset.test, config.optim.batch_size, config.data.mask_missing
    rows = evaluate(model, windows.batches(size), mask)
    write_samples(folder / "samples.npz", model, windows, window_error_px(rows))
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
        "stopped_early": progress.epoch < config.optim.epochs,
        "test": summarise(rows).scores(),
        "baselines": {
            name: summarise(score(predict, windows.batches(size), mask)).scores() for name, predict in BASELINES.items()
        },
        "by_frame_rate": by_frame_rate(rows, windows.fps),
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
            "departures": config.data.departures,
        },
        "environment": describe_environment(next(model.parameters()).device, backend, config.run.precision),
        "timing": {
            "epoch_s_median": statistics.median(epochs_s),
            "train_windows_per_s_median": statistics.median(row["train_windows_per_s"] for row in progress.history),
            "total_s": progress.elapsed_s,
        },
        "command": command_line(config),
    }
    write_json(folder / "summary.json", summary)


def describe_source(config: TrainConfig) -> str:
    """Where the clips came from, for the document."""
    if config.data.data_root is None:
        return f"embedded synthetic dataset ({EMBEDDED['clips']} clips, seed {EMBEDDED['seed']})"
    return str(config.data.data_root)


def report(folder: Path) -> None:
    """Writes the document of a finished run and shows its test figures beside the baselines'."""
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
        numbers = [math.nan if scores[key] is None else scores[key] for key in SCORES]
        log.info("%-20s %8.3f %8.3f %8.3f %12.4f %9.1f", name, *numbers)
    log.info("%s", document)


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers in a network."""
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def log_to(handler: logging.Handler) -> Iterator[None]:
    """Sends the log's lines to a handler too, for as long as the block runs."""
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
        handler.close()


if __name__ == "__main__":
    sys.exit(main())
