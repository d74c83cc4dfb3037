"""The training loop: epochs of steps over the windows, validation after each, a checkpoint behind it."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from bigru.config import OptimConfig, TrainConfig
from bigru.data.windows import Dataset, Windows
from bigru.model.checkpoint import Progress, append_line, as_json, save_checkpoint, save_weights
from bigru.model.metrics import Metrics, evaluate, masked_mse, summarise, window_errors

log = logging.getLogger("bigru.train")

ADVICE = "a lower --lr or --grad-clip may help"


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


def fit(config: TrainConfig, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, dataset: Dataset,
        progress: Progress) -> None:
    """Trains until the last epoch or until validation stalls, leaving a checkpoint after each epoch."""
    optim, mask = config.optim, config.data.mask_missing
    while progress.epoch < optim.epochs and not progress.stalled(optim.patience):
        start = time.perf_counter()
        tr = train_epoch(config, model, optimizer, dataset.train, progress.epoch)
        train_s = time.perf_counter() - start
        va = summarise(evaluate(model, dataset.val.batches(optim.batch_size), mask))
        val_s = time.perf_counter() - start - train_s
        if not math.isfinite(va.mpjpe):
            raise DivergedError(f"epoch {progress.epoch + 1}: the validation MPJPE is {va.mpjpe}; {ADVICE}")
        best = progress.update(va.mpjpe, optim.min_delta)
        if best:
            progress.best_weights = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
            save_weights(folder / "weights.safetensors", progress.best_weights)
        row: dict[str, Any] = {"epoch": progress.epoch}
        for name in ("mpjpe", "ade", "fde", "loss", "joint_error"):
            row |= {f"tr_{name}": getattr(tr, name), f"va_{name}": getattr(va, name)}
        row |= {"va_joint_error_px": va.joint_error_px, "lr": optimizer.param_groups[0]["lr"], "train_s": train_s,
                "val_s": val_s, "train_windows_per_s": tr.windows / train_s}
        progress.history.append(row)
        progress.elapsed_s += train_s + val_s
        append_line(folder / "metrics.jsonl", as_json(row))
        save_checkpoint(folder / "checkpoint.pt", model, optimizer, progress)
        log.info("%s", epoch_line(row, optim.epochs, best))


def train_epoch(config: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer, windows: Windows,
                epochs_done: int) -> Metrics:
    """One pass over the training windows; its metrics are of the passes themselves, dropout on, weights moving."""
    optim, mask = config.optim, config.data.mask_missing
    # The order depends on the seed and the epoch alone, so that a resumed run needs to remember nothing of it.
    shuffle = torch.Generator().manual_seed(config.run.seed * 100_003 + epochs_done)
    order = torch.randperm(len(windows), generator=shuffle)
    # Fewer windows than a batch holds would leave nothing to train on.
    drop_last = len(windows) >= optim.batch_size
    steps = len(windows) // optim.batch_size if drop_last else 1
    rows, losses = [], []
    model.train()
    batches = windows.batches(optim.batch_size, order=order, drop_last=drop_last)
    bar = tqdm(batches, f"epoch {epochs_done + 1}", total=steps, disable=None, leave=False, unit="batch")
    for step, batch in enumerate(bar, start=epochs_done * steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, optim)
        present = batch.present if mask else None
        prediction = model(batch.x)
        loss = masked_mse(prediction, batch.target, present)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        optimizer.step()
        rows.append(window_errors(prediction, batch.target, present))
        losses.append(loss.detach())
    # Looked at once an epoch: a look at every batch would make the GPU wait each time.
    finite = torch.stack(losses).isfinite().tolist()
    if not all(finite):
        batch_number = finite.index(False) + 1
        raise DivergedError(f"epoch {epochs_done + 1}, batch {batch_number} of {steps}: the loss is "
                            f"{losses[batch_number - 1].item()}; {ADVICE}")
    return summarise(torch.cat(rows))


def learning_rate(step: int, steps_per_epoch: int, optim: OptimConfig) -> float:
    """The rate of a step, from 0: a line up to lr over the warm-up epochs, then a cosine down to min_lr."""
    warmup, total = optim.warmup_epochs * steps_per_epoch, optim.epochs * steps_per_epoch
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    done = (step + 1 - warmup) / (total - warmup)
    return optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * done))


def epoch_line(row: dict[str, Any], epochs: int, best: bool) -> str:
    """One line of the log: an epoch's figures, train/val where there are two, and a star on the best so far."""
    return (f"epoch {row['epoch']:3d}/{epochs}  loss {row['tr_loss']:.5f}/{row['va_loss']:.5f}  "
            f"mpjpe {row['tr_mpjpe']:.3f}/{row['va_mpjpe']:.3f}  val joint error {row['va_joint_error_px']:.1f} px  "
            f"lr {row['lr']:.1e}  {row['train_s']:.2f}+{row['val_s']:.2f} s  "
            f"{row['train_windows_per_s']:.0f} windows/s{'  * best' if best else ''}")
