"""The windows that the run's document draws, with the network's forecasts of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bigru.data.windows import Windows
from bigru.files import write_npz
from bigru.layout import JOINTS, POSE_SIZE
from bigru.model.forecaster import HandForecaster
from bigru.report.record import Samples

SAMPLES = {"best": 0.0, "median": 0.5, "95th percentile": 0.95, "worst": 1.0}
"""Test windows to draw: what they are called, and the share of windows with less error."""


def write_example_windows(path: Path, model: HandForecaster, windows: Windows, error_px: Tensor) -> None:
    """Writes the windows that stand at `SAMPLES` in the order of their joint error, (N,) in pixels, to be drawn."""
    # Windows in which no joint was present sort last, and are no sample of anything.
    order = error_px.argsort()[: max(1, int(error_px.isfinite().sum()))]
    chosen = order[[round(share * (len(order) - 1)) for share in SAMPLES.values()]]
    write_npz(path, vars(example_windows(model, windows, chosen, error_px[chosen], list(SAMPLES))))


@torch.inference_mode()
def example_windows(
    model: HandForecaster, windows: Windows, chosen: Tensor, error_px: Tensor, labels: Sequence[str]
) -> Samples:
    """Returns the windows numbered `chosen`, (S,), with forecasts, and with errors and labels of as many."""
    was_training = model.training
    batch = windows.batch(chosen)
    # Not only for the picture's sake: dropout would draw random numbers that training is to draw.
    predicted = model.eval()(batch.x)
    model.train(was_training)
    chosen = chosen.to(windows.starts.device)
    observed = windows.starts[chosen][:, None] + torch.arange(batch.x.shape[1], device=windows.starts.device)
    return Samples(
        observed=batch.x[..., :POSE_SIZE].cpu().numpy(),
        predicted=predicted.cpu().numpy(),
        target=batch.target.cpu().numpy(),
        observed_present=windows.present[observed].cpu().numpy(),
        # A hand is present or missing whole: its wrist stands for it.
        target_present=batch.present[..., [0, JOINTS // 2]].cpu().numpy(),
        fps=batch.fps.cpu().numpy(),
        error_px=error_px.cpu().numpy(),
        stem=np.array([windows.stems[clip] for clip in windows.clip[chosen].tolist()]),
        label=np.array(labels),
        fps_assumed=windows.fps_is_assumed[chosen].cpu().numpy(),
    )
