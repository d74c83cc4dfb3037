"""The windows that the run's document draws, with the network's forecasts of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bigru.data.windows import Windows
from bigru.files import write_npz
from bigru.layout import JOINTS, POSE_SIZE
from bigru.model.forecaster import HandForecaster

SAMPLES = {"best": 0.0, "median": 0.5, "95th percentile": 0.95, "worst": 1.0}
"""Test windows to draw: what they are called, and the share of windows with less error."""


def write_example_windows(path: Path, model: HandForecaster, windows: Windows, error_px: Tensor) -> None:
    """Writes the windows that stand at `SAMPLES` in the order of their joint error, (N,) in pixels, to be drawn."""
    # Windows in which no joint was present sort last, and are no sample of anything.
    order = error_px.argsort()[: max(1, int(error_px.isfinite().sum()))]
    chosen = order[[round(share * (len(order) - 1)) for share in SAMPLES.values()]]
    tensors = example_arrays(model, windows, chosen, error_px[chosen])
    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    write_npz(path, arrays | {"stem": example_stems(windows, chosen), "label": list(SAMPLES)})


@torch.inference_mode()
def example_arrays(model: HandForecaster, windows: Windows, chosen: Tensor, error_px: Tensor) -> dict[str, Tensor]:
    """Returns the arrays of `bigru.report.record.Samples` for the windows numbered `chosen`, (S,)."""
    was_training = model.training
    batch = windows.batch(chosen)
    # Not only for the picture's sake: dropout would draw random numbers that training is to draw.
    predicted = model.eval()(batch.x)
    model.train(was_training)
    chosen = chosen.to(windows.starts.device)
    observed = windows.starts[chosen][:, None] + torch.arange(batch.x.shape[1], device=windows.starts.device)
    return {
        "observed": batch.x[..., :POSE_SIZE],
        "predicted": predicted,
        "target": batch.target,
        "observed_present": windows.present[observed],
        # A hand is present or missing whole: its wrist stands for it.
        "target_present": batch.present[..., [0, JOINTS // 2]],
        "fps": batch.fps,
        "fps_assumed": windows.fps_is_assumed[chosen],
        "error_px": error_px,
    }


def example_stems(windows: Windows, chosen: Tensor) -> list[str]:
    """Returns the names of the clips that windows are from."""
    return [windows.stems[clip] for clip in windows.clip[chosen.to(windows.clip.device)].tolist()]
