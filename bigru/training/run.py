"""Runs: begun, gone on with, and scored and reported at their end.

A run is a folder, `{out}/{stamp}`, from which the document is made and at which an interrupted run goes on:
config.json, metrics.jsonl (a line an epoch), checkpoint.pt (after each epoch, and where a signal stopped the run),
weights.safetensors (the best so far), train.log, skipped.tsv, run.lock, which keeps a second run out of the folder,
diverged.npz with the batch where the loss broke, and, once it has finished, samples.npz and summary.json.
"""

from __future__ import annotations

import json
import logging
import shlex
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from bigru.config import ConfigError, TrainConfig, from_mapping
from bigru.data.synthetic import EMBEDDED, ensure_synthetic
from bigru.data.windows import Dataset, NoWindowsError, Windows, load_dataset
from bigru.files import as_json, write_lines
from bigru.model.forecaster import HandForecaster
from bigru.model.weights import load_weights, save_weights
from bigru.training import tensorboard as board
from bigru.training.checkpoint import load_checkpoint
from bigru.training.distributed import current_team
from bigru.training.environment import device_name, pick_device
from bigru.training.run_dir import RunLog, check_writable, create_run_dir, log_to, run_lock, start_of
from bigru.training.summary import count_parameters, finish, report
from bigru.training.trainer import DivergedError, Trainer

log = logging.getLogger("bigru.train")

SPLITS = ("train", "val", "test")


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
            kept.enter_context(run_lock(folder))
        elif team.first:
            check_writable(config.run.out)
        # The first leaves what the others need not make again.
        dataset = team.first_then_others(lambda: load_data(config, device))
        # Seeded here, so that reading the data cannot change the weights.
        torch.manual_seed(config.run.seed)
        model, backend = build_model(config, device, dataset.train)
        trainer = Trainer(config, model, dataset, team)
        if not team.first:
            # Dropout draws other numbers in every process.
            torch.manual_seed(config.run.seed + 100_003 * team.rank)
        if folder is not None and (folder / "checkpoint.pt").is_file():
            go_on(folder, trainer)
        elif config.run.weights is not None:
            load_weights(model, config.run.weights)
        if folder is None:
            folder = team.broadcast(create_run_dir(config) if team.first else None)
            if team.first:
                kept.enter_context(run_lock(folder))
        if not team.first:
            trainer.fit(folder)
            return folder
        try:
            # What an epoch cut short may have left beyond the checkpoint goes.
            write_lines(folder / "metrics.jsonl", map(as_json, trainer.progress.history))
            skipped = [(skip.stem, skip.reason, " ".join(skip.detail.split())) for skip in dataset.skipped]
            write_lines(folder / "skipped.tsv", map("\t".join, [("stem", "reason", "detail"), *skipped]))
            with log_to(RunLog(folder / "train.log", encoding="utf-8")):
                log.info("run %s%s", folder, going_on(trainer))
                log.info("%s", dataset.describe())
                log.info(
                    "%s, backend %s, %s; %s parameters",
                    device_name(device),
                    backend,
                    describe_training(config, team.size),
                    f"{count_parameters(model):,}",
                )
                log.info("below: train/val; train is taken in passing, dropout on and weights moving")
                with board.watched(config, folder, trainer, dataset):
                    trainer.fit(folder)
                    finish(config, folder, model, dataset, trainer.progress, backend)
                report(folder)
        except DivergedError:
            # It would again.
            raise
        except BaseException:
            log.warning("go on with: python -m bigru.train --resume %s", shlex.quote(str(folder)))
            raise
    return folder


def going_on(trainer: Trainer) -> str:
    """Where a run goes on, for the first line of its log; empty for one that begins."""
    progress = trainer.progress
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


def go_on(folder: Path, trainer: Trainer) -> None:
    """Restores the last whole checkpoint and puts the files beside it back to where it stands."""
    progress = load_checkpoint(folder / "checkpoint.pt", trainer.step, trainer.team.rank)
    if progress.windows != trainer.progress.windows:
        raise ConfigError(
            f"resume: {folder} began with other data: it had {progress.windows} windows, there are now "
            f"{trainer.progress.windows}"
        )
    if progress.losses is not None and progress.rows is not None:
        steps = len(progress.losses)
        batch = len(progress.rows) // steps
        if (steps, batch) != (trainer.steps, trainer.batch):
            raise ConfigError(
                f"resume: {folder} stands in the middle of an epoch of {steps} batches of {batch}; by "
                f"its settings it has {trainer.steps} of {trainer.batch}"
            )
    trainer.progress = progress
    if trainer.team.first and progress.best_weights:
        save_weights(folder / "weights.safetensors", progress.best_weights)
