"""A run's checkpoint: all that the next step depends on, written whole after each epoch."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigru.files import printable, write_atomically
from bigru.model.weights import CheckpointError, read_pickle
from bigru.training.step import TrainStep, get_random_state, set_random_state

FORMAT = 2


@dataclass
class Progress:
    """How far a run has come: all that the next epoch depends on beside model, optimiser and random state."""

    epoch: int = 0
    """Finished epochs."""
    best_epoch: int = 0
    best_mpjpe: float = float("inf")
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    """The state dict, on the CPU, of the epoch with the lowest validation MPJPE."""
    gain_epoch: int = 0
    """Last epoch whose gain in validation MPJPE counted towards going on."""
    gain_mpjpe: float = float("inf")
    elapsed_s: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    """The rows of metrics.jsonl."""
    windows: dict[str, int] = field(default_factory=dict)
    """Windows in each split: a run cannot go on with other data."""
    step: int = 0
    """Steps done of the epoch under way; 0 between two epochs, where the next four hold nothing either."""
    rows: Tensor | None = None
    """(windows, 7) fp64 of `window_errors`, in the epoch's order; zeros beyond `step`."""
    losses: Tensor | None = None
    """(steps,) fp32."""
    norms: Tensor | None = None
    """(steps,) fp32: the gradient's norm before clipping."""
    epoch_s: float = 0.0
    """Seconds that those steps took."""

    finished: list[int] = field(default_factory=list)
    """Epochs after which the run had finished before, and was asked for more."""

    def extend(self) -> None:
        """Goes on after the end: patience begins anew."""
        if self.epoch not in self.finished:
            self.finished.append(self.epoch)
        self.gain_epoch = self.epoch

    def update(self, mpjpe: float, min_delta: float) -> bool:
        """Counts an epoch with this validation MPJPE; returns whether it is the best so far."""
        self.epoch += 1
        self.step, self.rows, self.losses, self.norms, self.epoch_s = 0, None, None, None, 0.0
        if mpjpe < self.gain_mpjpe - min_delta:
            self.gain_mpjpe, self.gain_epoch = mpjpe, self.epoch
        if mpjpe >= self.best_mpjpe:
            return False
        self.best_mpjpe, self.best_epoch = mpjpe, self.epoch
        return True

    def stalled(self, patience: int) -> bool:
        """Returns whether the last `patience` epochs brought no gain that counts."""
        return self.epoch - self.gain_epoch >= patience


def save_checkpoint(path: Path, step: TrainStep, progress: Progress, random_states: Sequence[Tensor] = ()) -> None:
    """Writes all state of a run, atomically, from which `load_checkpoint` goes on to the bit.

    That is `step`'s model, optimiser and loss scaler, the progress, and the random states of the run's processes, by
    their numbers; default: of this one alone.
    """
    content = {
        "format": FORMAT,
        "model": step.model.state_dict(),
        "optimizer": step.optimizer.state_dict(),
        "scaler": step.scaler.state_dict(),
        "progress": {item.name: getattr(progress, item.name) for item in fields(progress)},
        "random_states": list(random_states) or [get_random_state(step.device)],
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path, step: TrainStep, rank: int = 0) -> Progress:
    """Restores model, optimiser, loss scaler and random state from a checkpoint, and returns the progress it holds.

    The step may be on another kind of device than it was saved on. A process whose number, `rank`, was not there then
    keeps its random state.

    Raises:
        CheckpointError: for a file that is no checkpoint of this network, or holds more than data.
    """
    content = read_pickle(path)
    try:
        if content["format"] != FORMAT:
            raise CheckpointError(f"{printable(path)}: expected checkpoint format {FORMAT}, got {content['format']!r}")
        progress = Progress(**content["progress"])
        step.model.load_state_dict(content["model"])
        # How AdamW is computed is this run's affair; the rate is set anew before every step.
        for saved, own in zip(content["optimizer"]["param_groups"], step.optimizer.param_groups, strict=True):
            saved |= {name: own[name] for name in ("lr", "fused", "foreach", "capturable")}
        step.optimizer.load_state_dict(content["optimizer"])
        if content["scaler"]:
            step.scaler.load_state_dict(content["scaler"])
        first, *others = content["random_states"]
        if rank <= len(others):
            set_random_state([first, *others][rank], step.device)
    except CheckpointError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{printable(path)}: not a checkpoint of this run: {error}") from error
    return progress
