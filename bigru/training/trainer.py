"""The training loop: epochs of steps over the windows, each with validation and a checkpoint at its end.

Several processes train as one would: each takes its share of every batch, and all know the same losses and errors. On a
GPU the frames stay there, windows are gathered and their errors kept there, and nothing waits for it before the epoch
ends.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bigru.command import CommandError
from bigru.config import ConfigError, OptimConfig, TrainConfig
from bigru.data.windows import Dataset, Windows
from bigru.files import write_npz
from bigru.layout import POSE_SIZE
from bigru.model.forecaster import HandForecaster
from bigru.model.metrics import ERRORS, Metrics, evaluate, masked_mse, summarise, window_errors
from bigru.model.weights import WEIGHTS, save_weights
from bigru.proof.timing import Work, capture_graph
from bigru.training.checkpoint import Progress, save_checkpoint
from bigru.training.distributed import Team
from bigru.training.run_dir import write_metrics
from bigru.training.signals import Interrupted, StopRequest, on_signals
from bigru.training.step import Capture, Loss, TrainStep, capture_training, get_random_state, make_optimizer, set_rate

log = logging.getLogger("bigru.train")

ADVICE = "a lower --lr or --grad-clip may help"
LEAST_SCALE = 2.0**-14
"""Of the loss under fp16, which begins at 2**16: below it no gradient was a number for thirty steps or more."""


class DivergedError(CommandError, RuntimeError):
    """Raised where the loss or the gradient is no longer a number."""

    code = 1


class Trainer:
    """Trains a network on its windows.

    Args:
        config: the run's settings.
        model: the network, on its device.
        dataset: its windows, on the same device.
        team: the processes that train it together.
        loss: to be minimised.

    Attributes:
        step: the training step, with model, optimiser and loss scaler.
        progress: how far the run has come; a checkpoint puts its own here.
        watch: called in the first process with each epoch's row and whether it is the best so far.

    Raises:
        ConfigError: for a CUDA graph without a GPU or with several processes, or a batch too small to share.
    """

    capture: Capture = staticmethod(capture_graph)

    def __init__(
        self, config: TrainConfig, model: HandForecaster, dataset: Dataset, team: Team, loss: Loss = masked_mse
    ) -> None:
        self.config, self.model, self.team, self.dataset = config, model, team, dataset
        self.train, self.val = dataset.train, dataset.val
        self.progress = Progress(windows=dataset.windows)
        self.stop = StopRequest()
        optim, run = config.optim, config.run
        # Fewer windows than a batch holds would leave nothing to train on.
        self.batch = min(optim.batch_size, len(self.train))
        self.steps = len(self.train) // self.batch
        device = next(model.parameters()).device
        if run.graph and device.type != "cuda":
            raise ConfigError(f"graph: expected a GPU to run the graph on, got {device}")
        if run.graph and team.size > 1:
            raise ConfigError(f"graph: expected one process, got {team.size}")
        if self.batch < team.size:
            raise ConfigError(
                f"batch_size: expected at least a window for each of {team.size} processes, got {self.batch}"
            )
        optimizer = make_optimizer(model, optim.lr, optim.weight_decay, capturable=run.graph)
        reduce = team.all_reduce_gradients if team.size > 1 else None
        self.step = TrainStep(model, optimizer, optim.grad_clip, amp=run.amp, reduce=reduce, loss=loss)
        self.share = team.share(self.batch)
        self.coordinates = self._count_coordinates() if team.size > 1 else None
        # Where a captured step finds its windows and leaves their errors.
        self.indices = torch.zeros(self.batch, dtype=torch.int64, device=device)
        self.errors = torch.empty(0)
        self.graph = run.graph
        self.replay: Work | None = None
        self.watch: Callable[[dict[str, Any], bool], None] = lambda row, best: None

    def fit(self, folder: Path) -> None:
        """Trains until the last epoch or until validation stalls, leaving a checkpoint after each epoch.

        SIGINT and SIGTERM end it after the step under way, with a checkpoint that goes on with the next one.

        Args:
            folder: of the run, in which the first process writes.

        Raises:
            DivergedError: the loss is not finite; its batch is left in the folder.
            Interrupted: by a signal, in whichever process.
        """
        with on_signals(self.stop.receive):
            optim = self.config.optim
            if self.graph:
                # Only now: a checkpoint brings the optimiser other tensors.
                self.replay = capture_training(self._learn, self.step, self.capture)
            while self.progress.epoch < optim.epochs and not self.progress.stalled(optim.patience):
                self.run_epoch(folder)
                # The epoch has left its checkpoint.
                if stopped := self.team.all_reduce_max(self.stop.signal):
                    raise Interrupted(stopped)
            if self.progress.epoch < optim.epochs:
                log.info("%s", early_stop_line(self.progress, optim))
        # One that came after it was asked for last.
        if self.stop.signal:
            raise Interrupted(self.stop.signal)

    def learn(self, indices: Tensor) -> None:
        """Takes one step on the windows with these numbers, (B,) int64: on this process's share of them.

        Leaves the windows' errors in `errors`, loss and gradient norm in `step`, all on the device.
        """
        if self.replay is None:
            self.indices = indices
            self._learn()
        else:
            self.indices.copy_(indices)
            self.replay()

    def _learn(self) -> None:
        indices = self.indices[self.share]
        batch = self.train.batch(indices)
        present = batch.present if self.config.data.mask_missing else None
        coordinates = None if self.coordinates is None else self.coordinates[self.indices].sum().clamp(min=1)
        prediction = self.step(batch.x, batch.target, present, coordinates)
        self.errors = window_errors(prediction, batch.target, present)

    def run_epoch(self, folder: Path) -> None:
        """Trains and validates for an epoch, and writes its metrics, weights and checkpoint."""
        progress, optim = self.progress, self.config.optim
        tr = self.train_epoch(folder)
        train_s = progress.epoch_s
        assert progress.norms is not None
        # Looked at before the next epoch's take their place; of steps taken, which fp16's overflown ones are not.
        grad_norm = float(progress.norms[progress.norms.isfinite()].mean())
        start = time.perf_counter()
        va = summarise(self.validate())
        val_s = time.perf_counter() - start
        if not math.isfinite(va.mpjpe):
            raise DivergedError(
                f"epoch {progress.epoch + 1}: the validation MPJPE is {va.mpjpe}; {ADVICE}; {self._last_good(folder)}"
            )
        best = progress.update(va.mpjpe, optim.min_delta)
        if best:
            progress.best_weights = {name: tensor.cpu().clone() for name, tensor in self.model.state_dict().items()}
        row: dict[str, Any] = {"epoch": progress.epoch}
        for name in ("mpjpe", "ade", "fde", "loss", "joint_error"):
            row |= {f"tr_{name}": getattr(tr, name), f"va_{name}": getattr(va, name)}
        rate = learning_rate(progress.epoch * self.steps - 1, self.steps, optim)
        row |= {"va_joint_error_px": va.joint_error_px, "lr": rate, "grad_norm": grad_norm}
        row |= {"train_s": train_s, "val_s": val_s, "train_windows_per_s": tr.windows / train_s}
        progress.history.append(row)
        progress.elapsed_s += train_s + val_s
        # First: what a kill keeps of the next two from being written, a resume writes from it.
        self.save(folder)
        if self.team.first:
            if best:
                save_weights(folder / WEIGHTS, progress.best_weights)
            write_metrics(folder, progress.history)
        log.info("%s", epoch_line(progress.history, optim.epochs, best))
        if self.team.first:
            self.watch(row, best)

    def train_epoch(self, folder: Path) -> Metrics:
        """Trains on the windows that the epoch has left, and returns the metrics of all of it.

        They are of the training passes themselves, with dropout on and weights that change.
        """
        progress, device = self.progress, self.step.device
        # The order depends on the seed and the epoch alone, so that a resumed run needs to remember nothing of it.
        shuffle = torch.Generator().manual_seed(self.config.run.seed * 100_003 + progress.epoch)
        # One transfer for the whole epoch instead of one a batch.
        order = torch.randperm(len(self.train), generator=shuffle).to(device)
        # Of the steps before, the first process has what all of them had together.
        begun = progress if self.team.first else Progress()
        rows = _resumed(begun.rows, (self.steps * self.batch, ERRORS), torch.float64, device)
        losses, norms = (_resumed(kept, (self.steps,), torch.float32, device) for kept in (begun.losses, begun.norms))
        self.model.train()
        started = time.perf_counter() - progress.epoch_s
        done = progress.epoch * self.steps
        bar = tqdm(
            range(progress.step, self.steps),
            f"epoch {progress.epoch + 1}/{self.config.optim.epochs}",
            # Of all epochs, so that the time left is the run's.
            initial=done + progress.step,
            total=self.config.optim.epochs * self.steps,
            leave=False,
            bar_format="{desc} {percentage:3.0f} %|{bar}| at most {remaining} left{postfix}",
            postfix=f"best {progress.best_mpjpe:.3f} of epoch {progress.best_epoch}" if progress.best_epoch else None,
            disable=None if self.team.first else True,
        )
        for number in bar:
            set_rate(self.step.optimizer, learning_rate(done + number, self.steps, self.config.optim))
            first = number * self.batch
            self.learn(order[first : first + self.batch])
            rows[first + self.share.start : first + self.share.stop] = self.errors
            losses[number] = self.step.loss
            # The same in every process.
            norms[number] = self.step.norm if self.team.first else 0.0
            stopped = self.team.all_reduce_max(self.stop.signal)
            if stopped or number + 1 == self.steps:
                progress.step = number + 1
                progress.rows, progress.losses, progress.norms = map(self.team.all_reduce_sum, (rows, losses, norms))
                # Looked at here only: a look at every batch would make the GPU wait each time.
                self._check_finite(order, folder)
                progress.epoch_s = time.perf_counter() - started
            if stopped:
                bar.close()
                self.save(folder)
                done_so_far = f"batch {progress.step} of {self.steps} of epoch {progress.epoch + 1}"
                name = signal.Signals(stopped).name
                log.warning("%s: stopped after %s, which the checkpoint holds", name, done_so_far)
                raise Interrupted(stopped)
        assert progress.rows is not None
        return summarise(progress.rows)

    def validate(self) -> Tensor:
        """Returns `window_errors` of all validation windows, (N, 7), each batch scored by one process."""
        size, mask = self.config.optim.batch_size, self.config.data.mask_missing
        if self.team.size == 1:
            return evaluate(self.model, self.val.batches(size), mask)
        rows = torch.zeros(len(self.val), ERRORS, dtype=torch.float64, device=self.step.device)
        # Whole batches, cut as one process cuts them: the same figures to the bit.
        if mine := torch.arange(len(self.val)).split(size)[self.team.rank :: self.team.size]:
            chosen = torch.cat(mine).to(rows.device)
            rows[chosen] = evaluate(self.model, self.val.batches(size, chosen), mask)
        return self.team.all_reduce_sum(rows)

    def save(self, folder: Path) -> None:
        """Writes the checkpoint, in the first process, of all of them."""
        random_states = self.team.all_gather(get_random_state(self.step.device))
        if self.team.first:
            save_checkpoint(folder / "checkpoint.pt", self.step, self.progress, random_states)

    def _check_finite(self, order: Tensor, folder: Path) -> None:
        """Raises DivergedError, and leaves the first batch at fault in the folder, unless all steps went well."""
        progress = self.progress
        assert progress.losses is not None
        assert progress.norms is not None
        wrong = ~progress.losses[: progress.step].isfinite()
        # With fp16 an overflown gradient is expected: its step is left out, and the loss scaled less. But not for ever.
        if not self.step.scaler.is_enabled() or self.step.scaler.get_scale() < LEAST_SCALE:
            wrong |= ~progress.norms[: progress.step].isfinite()
        if not wrong.any():
            return
        number = int(wrong.nonzero()[0])
        loss, norm = progress.losses[number].item(), progress.norms[number].item()
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        message = f"epoch {progress.epoch + 1}, batch {number + 1} of {self.steps}: {what}; {ADVICE}"
        if self.team.first:
            path = folder / "diverged.npz"
            write_batch(path, self.train, order[number * self.batch : (number + 1) * self.batch])
            message += f"; the batch is in {path}; {self._last_good(folder)}"
        raise DivergedError(message)

    def _last_good(self, folder: Path) -> str:
        if not self.progress.best_weights:
            return "no epoch was finished, so there are no good weights yet"
        return f"the best weights so far, of epoch {self.progress.best_epoch}, are in {folder / 'weights.safetensors'}"

    def _count_coordinates(self) -> Tensor:
        """Returns over how many coordinates of each training window the loss is taken, (N,) int64."""
        if not self.config.data.mask_missing:
            return torch.full((len(self.train),), self.train.predicted * POSE_SIZE, device=self.train.starts.device)
        return torch.cat([2 * batch.present.sum((1, 2)) for batch in self.train.batches(self.batch)])


def _resumed(kept: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a checkpoint's part of an epoch, to be filled further; zeros where it has none."""
    return torch.zeros(shape, dtype=dtype, device=device) if kept is None else kept.to(device, dtype)


def write_batch(path: Path, windows: Windows, indices: Tensor) -> None:
    """Writes the windows with these numbers, as the network gets them, and the names of their clips."""
    batch = windows.batch(indices)
    tensors = {"x": batch.x, "target": batch.target, "present": batch.present, "fps": batch.fps, "window": indices}
    stems = [windows.stems[clip] for clip in windows.clip[indices].tolist()]
    write_npz(path, {name: tensor.cpu().numpy() for name, tensor in tensors.items()} | {"stem": stems})


def learning_rate(step: int, steps_per_epoch: int, optim: OptimConfig) -> float:
    """Returns the rate of a step, from 0: a line up to lr over the warm-up epochs, then a cosine down to min_lr."""
    warmup, total = optim.warmup_epochs * steps_per_epoch, optim.epochs * steps_per_epoch
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    done = (step + 1 - warmup) / (total - warmup)
    return optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * done))


def epoch_line(history: Sequence[dict[str, Any]], epochs: int, best: bool) -> str:
    """Returns a line of at most 100 columns for the log: the last epoch's figures, train/val where there are two."""
    row = history[-1]
    seconds = [row["train_s"] + row["val_s"] for row in history]
    left = tqdm.format_interval(sum(seconds) / len(seconds) * (epochs - len(history)))
    return (
        f"epoch {row['epoch']:3d}/{epochs}  loss {row['tr_loss']:.5f}/{row['va_loss']:.5f}  "
        f"mpjpe {row['tr_mpjpe']:.3f}/{row['va_mpjpe']:.3f}  {row['va_joint_error_px']:.1f} px  "
        f"lr {row['lr']:.0e}  {seconds[-1]:.1f} s, {left} left{'  best' if best else ''}"
    )


def early_stop_line(progress: Progress, optim: OptimConfig) -> str:
    """Returns a line that says why a run stopped, and which epoch's weights it keeps: a small gain is one too."""
    return (
        f"stopped early after epoch {progress.epoch}: no gain of {optim.min_delta:g} in validation MPJPE since epoch "
        f"{progress.gain_epoch} ({progress.gain_mpjpe:.4f}); best is epoch {progress.best_epoch} "
        f"({progress.best_mpjpe:.4f})"
    )
