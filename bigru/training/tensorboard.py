"""Shows a run in TensorBoard while it trains: `--tensorboard`, and `tensorboard --logdir` at the runs' folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from bigru.config import ConfigError
from bigru.files import printable
from bigru.model.metrics import evaluate, window_error_px
from bigru.report import figures
from bigru.report.record import Samples, read_samples
from bigru.training.example_windows import example_windows
from bigru.training.trainer import Trainer

# Curve in TensorBoard, by the column of metrics.jsonl.
CURVES = {
    **{
        f"{split}_{name}": f"{name}/{long}"
        for name in ("loss", "mpjpe", "ade", "fde", "joint_error")
        for split, long in (("tr", "train"), ("va", "validation"))
    },
    "va_joint_error_px": "joint_error_px/validation",
    "lr": "training/learning_rate",
    "grad_norm": "training/gradient_norm",
    "train_windows_per_s": "training/windows_per_s",
    "train_s": "seconds_per_epoch/train",
    "val_s": "seconds_per_epoch/validation",
}


@contextmanager
def watched(folder: Path, trainer: Trainer) -> Iterator[None]:
    """Shows in TensorBoard what happens in the block, in a folder of its own in that of the run.

    That is each epoch's figures, three validation windows with every gain, and after the block the test windows that
    samples.npz holds. Epochs that are there from before, beyond those done, are no longer shown.
    """
    # Imported here: it takes a second, and is an extra.
    from torch.utils.tensorboard import SummaryWriter

    config, windows = trainer.config, trainer.val
    chosen = torch.linspace(0, len(windows) - 1, min(3, len(windows))).long()
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=trainer.progress.epoch + 1)

    def draw(name: str, samples: Samples, epoch: int) -> None:
        picture = figures.pixels(figures.forecasts(samples, config.data.centre))
        writer.add_image(name, picture, epoch, dataformats="HWC")

    def watch(row: dict[str, Any], best: bool) -> None:
        for column, curve in CURVES.items():
            writer.add_scalar(curve, row[column], row["epoch"])
        if best:
            rows = evaluate(trainer.model, windows.batches(len(chosen), chosen), config.data.mask_missing)
            samples = example_windows(trainer.model, windows, chosen, window_error_px(rows), [""] * len(chosen))
            draw("forecasts/validation", samples, row["epoch"])
        writer.flush()

    trainer.watch = watch
    with closing(writer):
        yield
        draw("forecasts/test", read_samples(folder / "samples.npz"), trainer.progress.epoch)


def require(out: Path) -> None:
    """Raises ConfigError unless TensorBoard is installed and can write into a folder of this path."""
    path = str(out.absolute())
    if path.encode(errors="ignore").decode() != path:
        raise ConfigError(f"tensorboard: expected a path in UTF-8, as it writes to no other, got {printable(out)}")
    try:
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "tensorboard: expected the package tensorboard, which is not installed here; it comes with "
            "pip install 'bigru[tensorboard]'"
        ) from error
