"""Shows a run in TensorBoard while it trains: `--tensorboard`, and `tensorboard --logdir` at the runs' folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bigru.config import ConfigError
from bigru.files import printable
from bigru.model.metrics import evaluate, window_error_px
from bigru.report import figures
from bigru.report.record import Samples, read_samples
from bigru.training.example_windows import example_arrays, example_stems
from bigru.training.trainer import Trainer

if TYPE_CHECKING:
    # matplotlib is imported by bigru.report first, which sees to MPLBACKEND.
    from matplotlib.figure import Figure

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


class Board:
    """Writes a run's curves and pictures where TensorBoard finds them.

    Args:
        folder: for the files, made if need be; epochs after `epoch` that are in them already are no longer shown.
        epoch: epochs done so far.

    Raises:
        ConfigError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path, epoch: int) -> None:
        require(folder)
        # Imported here: it takes a second, and is an extra.
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=epoch + 1)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Shows an epoch: its row of metrics.jsonl."""
        for column, curve in CURVES.items():
            self.writer.add_scalar(curve, row[column], row["epoch"])
        self.writer.flush()

    def picture(self, name: str, figure: Figure, epoch: int) -> None:
        """Shows a picture, as of an epoch."""
        self.writer.add_image(name, figures.pixels(figure), epoch, dataformats="HWC")
        self.writer.flush()


@contextmanager
def watched(folder: Path, trainer: Trainer) -> Iterator[None]:
    """Shows in TensorBoard what happens in the block.

    That is each epoch's figures, three validation windows with every gain, and after the block the test windows that
    samples.npz holds.
    """
    config, windows = trainer.config, trainer.val
    board, centre = Board(folder / "tensorboard", trainer.progress.epoch), config.data.centre
    chosen = torch.linspace(0, len(windows) - 1, min(3, len(windows))).long()

    def watch(row: dict[str, Any], best: bool) -> None:
        board.epoch(row)
        if best:
            rows = evaluate(trainer.model, windows.batches(len(chosen), chosen), config.data.mask_missing)
            arrays = example_arrays(trainer.model, windows, chosen, window_error_px(rows))
            stems = example_stems(windows, chosen)
            samples = Samples(
                **{name: tensor.cpu().numpy() for name, tensor in arrays.items()},
                stem=np.array(stems),
                label=np.full(len(stems), ""),
            )
            board.picture("forecasts/validation", figures.forecasts(samples, centre), row["epoch"])

    trainer.watch = watch
    with closing(board.writer):
        yield
        samples = read_samples(folder / "samples.npz")
        board.picture("forecasts/test", figures.forecasts(samples, centre), trainer.progress.epoch)


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
