"""Runs: begun, gone on with, and scored and reported at their end.

A run is a folder, `{out}/{stamp}`, from which the document is made and at which an interrupted run goes on:
config.json, data.json (which data it was trained on), metrics.jsonl (a line an epoch), checkpoint.pt (after each epoch,
and where a signal stopped the run), weights.safetensors (the best so far), train.log, skipped.tsv, run.lock, which
keeps a second run out of the folder, diverged.npz with the batch where the loss broke, and, once it has finished,
samples.npz and summary.json.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigru.command import log_to, training_line
from bigru.config import ConfigError, DataConfig, TrainConfig, check_writable
from bigru.data.synthetic import EMBEDDED, ensure_synthetic
from bigru.data.windows import SPLITS, Dataset, NoWindowsError, load_dataset
from bigru.environment import device_name, pick_device, set_threads
from bigru.files import printable, remove_partials, write_json, write_lines
from bigru.kernels.choice import choice_of
from bigru.kernels.config import Call, describe
from bigru.kernels.proven import COMMAND, proofs
from bigru.kernels.record import RecordError
from bigru.kernels.registry import Choice
from bigru.model.forecaster import HandForecaster
from bigru.model.metrics import masked_mse
from bigru.model.weights import WEIGHTS, load_weights, save_weights
from bigru.proof.command import prove
from bigru.report.document import write_report
from bigru.training import run_dir, tensorboard
from bigru.training.checkpoint import Progress, load_checkpoint
from bigru.training.distributed import Team, current_team
from bigru.training.step import Loss
from bigru.training.summary import count_parameters, finish, report
from bigru.training.trainer import DivergedError, Trainer

log = logging.getLogger("bigru.train")


@dataclass(frozen=True)
class Parts:
    """The parts of a run that a test replaces by smaller ones, or by ones that fail."""

    load: Callable[[DataConfig], Dataset] = load_dataset
    loss: Loss = masked_mse
    write_report: Callable[[Path], Path] = write_report
    prove: Callable[..., object] = prove
    trainer: type[Trainer] = Trainer


def train(config: TrainConfig, parts: Parts = Parts()) -> Path:
    """Trains, scores and reports a new run; returns its folder.

    Raises:
        ConfigError, CheckpointError, NoWindowsError, OSError: for settings, weights or data that cannot be used.
        DivergedError: when the loss is no longer finite.
        Interrupted: after a signal in training; the step under way was finished, and a checkpoint written.
    """
    config = run_dir.with_absolute_data(config)
    return start(config, parts) if current_team().first else worker(config, None, parts)


def resume(folder: Path, changes: Mapping[str, Any] | None = None, parts: Parts = Parts()) -> Path:
    """Goes on with an interrupted run from its last whole checkpoint, to the bit on the CPU; returns its folder.

    Nothing that is in the folder is lost by it. A finished run's document is written again; with more `epochs` it is
    trained on, by the learning rates of so many.

    Args:
        folder: of the run, or a link to it; `latest`, where nothing has that name: the last run in the folder around,
            or in `runs`.
        changes: settings by name that take the place of the run's own: where its data are now, its device, epochs,
            and `tensorboard`.
        parts: for tests.

    Raises:
        ConfigError: for a folder that holds no run, is not named after its start, has lost its checkpoint or was
            trained on other data, and as `train` does.
    """
    folder = run_dir.find(folder)
    config = run_dir.read_config(folder)
    team = current_team()
    finished = (folder / run_dir.SUMMARY).is_file()
    if finished and "epochs" not in (changes or {}):
        if changes:
            raise ConfigError(
                f"resume: {printable(folder)} has finished, which {', '.join(changes)} cannot change; more --epochs "
                "train it on, and --weights begins a new run from its weights"
            )
        log.info("%s has finished; writing its document again", printable(folder))
        if team.first:
            report(folder, parts.write_report)
        return folder
    run_dir.check_resumable(folder)
    config = run_dir.with_absolute_data(run_dir.changed(config, changes or {}))
    return go_on(config, folder, parts, finished) if team.first else worker(config, folder, parts, finished)


def start(config: TrainConfig, parts: Parts) -> Path:
    """Carries out a new run, as its first process."""
    team = current_team()
    check_writable(config.run.out)
    trainer, choice = prepare(config, team, parts)
    load_state(trainer, None)
    folder = team.broadcast(run_dir.create(config, trainer.dataset))
    with run_dir.run_lock(folder):
        complete(trainer, choice, folder, parts)
    return folder


def go_on(config: TrainConfig, folder: Path, parts: Parts, finished: bool) -> Path:
    """Carries out the rest of a run, or more than it was to have, as its first process."""
    with run_dir.run_lock(folder):
        remove_partials(folder)
        trainer, choice = prepare(config, current_team(), parts)
        load_state(trainer, folder, finished)
        # Only now that the run is known to go on with them.
        run_dir.write_data(folder, trainer.dataset)
        write_json(folder / "config.json", config.as_dict())
        if finished:
            trainer.save(folder)
            (folder / run_dir.SUMMARY).unlink()
        complete(trainer, choice, folder, parts)
    return folder


def worker(config: TrainConfig, folder: Path | None, parts: Parts, finished: bool = False) -> Path:
    """Trains in a new run, or on in the given folder, as one of the processes beside the first; writes nothing."""
    team = current_team()
    trainer, _ = prepare(config, team, parts)
    # Dropout draws other numbers in every process.
    torch.manual_seed(config.run.seed + 100_003 * team.rank)
    load_state(trainer, folder, finished)
    if folder is None:
        folder = team.broadcast(None)
    trainer.fit(folder)
    return folder


def prepare(config: TrainConfig, team: Team, parts: Parts) -> tuple[Trainer, Choice]:
    """Returns what trains the network on the dataset, and the choice of a backend for the network's GRU."""
    if config.run.tensorboard:
        # Asked before the data are read.
        tensorboard.require(config.run.out)
    device = pick_device(team.device(config.run.device))
    set_threads(config.run.threads, device)
    optim = config.optim
    if optim.epochs < optim.warmup_epochs:
        few = f"{optim.epochs} are fewer than the {optim.warmup_epochs} of warmup_epochs"
        log.warning("epochs: %s: the learning rate ends below lr", few)
    if device.type == "cpu" and config.run.amp != "none":
        log.warning("amp: on a CPU %s gains nothing and takes many times as long as none", config.run.amp)
    # The first leaves what the others need not make again.
    dataset = team.first_then_others(lambda: load_data(config, device, parts.load))
    sample = next(iter(dataset.train.batches(config.optim.batch_size))).x
    team.first_then_others(lambda: prove_first(config, sample, parts.prove) if team.first else None)
    # Seeded here, so that reading the data cannot change the weights.
    torch.manual_seed(config.run.seed)
    model, choice = build_model(config, sample)
    return parts.trainer(config, model, dataset, team, parts.loss), choice


def prove_first(config: TrainConfig, sample: Tensor, prove: Callable[..., object]) -> None:
    """Proves the kernels for a run's own sizes, unless it trains on a CPU, or something is known of them."""
    run, hidden, (batch, steps, _) = config.run, config.model.hidden_size, sample.shape
    dtype = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[run.amp]
    if not run.prove or run.backend != "auto" or sample.device.type == "cpu":
        return
    found = proofs(here := describe(sample.device))
    if found is not None and found.of(Call(here, dtype, hidden, run.precision, False, steps, batch)) is not None:
        return
    log.info("no kernel is proven here for these sizes: `%s` comes first (--no-prove leaves it out)", COMMAND)
    precision = run.precision if run.amp == "none" else run.amp
    sizes = {"hidden": hidden, "batch": batch, "steps": steps, "precision": precision}
    try:
        prove(*(word for name, value in sizes.items() for word in (f"--{name}", str(value))))
    except (RuntimeError, OSError, RecordError) as error:
        log.warning("no proof, so that ATen's GRU serves: %s", error)


def load_data(config: TrainConfig, device: torch.device, load: Callable[[DataConfig], Dataset]) -> Dataset:
    """Returns the dataset named by the settings, or the small synthetic one, with its windows on the device."""
    data = config.data
    if data.data_root is None:
        if data.index is not None:
            raise ConfigError(f"index: {printable(data.index)} needs the folder of its clips, --data-root")
        log.info("no --data-root: a small synthetic dataset in %s serves", printable(config.run.out / "synthetic"))
    try:
        if data.data_root is None:
            data = replace(data, data_root=ensure_synthetic(config.run.out / "synthetic", **EMBEDDED))
        dataset = load(data)
    except NoWindowsError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return replace(dataset, **{split: getattr(dataset, split).to(device) for split in SPLITS})


def read_data_digest(config: TrainConfig, parts: Parts) -> str:
    """Returns the digest of the data that settings name; empty where a run with them would be refused."""
    try:
        return load_data(config, torch.device("cpu"), parts.load).digest
    except (ConfigError, NoWindowsError, OSError):
        return ""


def build_model(config: TrainConfig, sample: Tensor) -> tuple[HandForecaster, Choice]:
    """Returns the network on the device of a batch, and the choice of a backend for it."""
    try:
        run, sizes = config.run, asdict(config.model)
        model = HandForecaster(config.data.input_size, **sizes, backend=run.backend, precision=run.precision)
        model.to(sample.device)
        return model, choice_of(model.encoder.core, sample)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"backend: {config.run.backend} cannot run the network on {sample.device}: {error}"
        ) from error


def load_state(trainer: Trainer, folder: Path | None, finished: bool = False) -> None:
    """Restores the run's checkpoint if there is one; else loads the weights that the settings name, if any.

    The folder is None for a new run; one that has `finished` is to go on.
    """
    if folder is not None:
        run_dir.check_data(folder, trainer.dataset)
    if folder is None or not (folder / run_dir.CHECKPOINT).is_file():
        if trainer.config.run.weights is not None:
            load_weights(trainer.model, trainer.config.run.weights)
        return
    progress = load_checkpoint(folder / run_dir.CHECKPOINT, trainer.step, trainer.team.rank)
    if progress.windows != trainer.progress.windows:
        raise ConfigError(
            f"resume: {printable(folder)} began with other data: it had {progress.windows} windows, there are now "
            f"{trainer.progress.windows}"
        )
    run_dir.check_progress(folder, progress, trainer.config.optim.epochs)
    if progress.losses is not None and progress.rows is not None:
        steps = len(progress.losses)
        batch = len(progress.rows) // steps
        if (steps, batch) != (trainer.steps, trainer.batch):
            raise ConfigError(
                f"resume: {printable(folder)} stands in the middle of an epoch of {steps} batches of {batch}; by "
                f"its settings it has {trainer.steps} of {trainer.batch}"
            )
    if finished:
        if trainer.config.optim.epochs <= progress.epoch:
            raise ConfigError(
                f"epochs: expected more than the {progress.epoch} that {printable(folder)} has finished, got "
                f"{trainer.config.optim.epochs}"
            )
        progress.extend()
    trainer.progress = progress


def complete(trainer: Trainer, choice: Choice, folder: Path, parts: Parts) -> None:
    """Trains to the end, scores and reports, as the first process, which alone writes."""
    config, progress, dataset = trainer.config, trainer.progress, trainer.dataset
    try:
        if progress.best_weights:
            # A kill may have left those of an epoch that the checkpoint does not hold.
            save_weights(folder / WEIGHTS, progress.best_weights)
        if not (folder / run_dir.METRICS).is_file() or run_dir.count_epochs(folder) < progress.epoch:
            # Left out by a copy, say.
            run_dir.write_metrics(folder, progress.history)
        skipped = [(skip.stem, skip.reason, " ".join(skip.detail.split())) for skip in dataset.skipped]
        write_lines(folder / "skipped.tsv", map("\t".join, [("stem", "reason", "detail"), *skipped]))
        with log_to(run_dir.RunLog(folder / "train.log")):
            log.info("run %s%s", printable(folder), describe_progress(progress))
            log.info("%s", dataset.describe())
            how = f"backend {choice.backend} ({choice.why}), {describe_training(config, trainer.team.size)}"
            size = f"{count_parameters(trainer.model):,} parameters"
            log.info("%s, %s; %s", device_name(trainer.step.device), how, size)
            log.info("below: train/val, train in passing with dropout on and weights moving; px: joint error of val")
            with tensorboard.watched(folder, trainer) if config.run.tensorboard else nullcontext():
                trainer.fit(folder)
                finish(folder, trainer, choice)
            report(folder, parts.write_report)
    except DivergedError:
        # A resume would diverge again, so that none is advised.
        raise
    except BaseException:
        log.warning("go on with: %s", training_line("--resume", folder))
        raise


def describe_progress(progress: Progress) -> str:
    """Returns where a run goes on, for the first line of its log; empty for one that begins."""
    if progress.step:
        return f", going on after batch {progress.step} of epoch {progress.epoch + 1}"
    return f", going on after epoch {progress.epoch}" if progress.epoch else ""


def describe_training(config: TrainConfig, processes: int) -> str:
    """Returns the precision and other settings that change how it is trained, for the log."""
    run = config.run
    words: list[str] = [run.precision]
    if run.amp != "none":
        words.append(f"{run.amp} autocast")
    if run.graph:
        words.append("CUDA graph")
    if processes > 1:
        words.append(f"{processes} processes")
    return ", ".join(words)
