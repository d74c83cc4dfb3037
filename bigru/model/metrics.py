"""Scores of forecasts: the published definitions, the true per-joint error, and the trivial baselines.

With d the difference of prediction and target, (B, T, 84) or per joint (B, T, 42, 2), in centred units:

    mpjpe         mean over frames of |d over all 84 coordinates|   (published; no per-joint error despite its name)
    ade, fde      mean over frames, last frame, of |mean over joints of d|   (published; of the joints' centroid)
    joint_error   mean over present joints of |d|   (what MPJPE means elsewhere)
    loss          mean over present joints' coordinates of d squared

The published ones take in missing hands, which are coded as zeros, so that they stay comparable with the published
figures; the other two leave them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bigru.layout import JOINTS, POSE_SIZE, UNIT_PX

# Windows whose errors a CPU computes at a time: their intermediate results stay in its cache.
_CACHED = 16
_COLUMNS = ("mpjpe", "ade", "fde", "joint_error", "joint_error_px", "squared_error", "joints")
ERRORS = len(_COLUMNS)
"""Columns of `window_errors`."""


class Scored(Protocol):
    """The part of a batch that is read here; see bigru.data.windows.Batch."""

    @property
    def x(self) -> Tensor:
        """Observed frames, (B, T, I)."""

    @property
    def target(self) -> Tensor:
        """The frames that followed, (B, T, 84)."""

    @property
    def present(self) -> Tensor:
        """Which joints of the target were seen, (B, T, 42) bool."""


@dataclass(frozen=True)
class Metrics:
    """The errors of a set of windows; centred units but where the name says pixels. NaN where no joint was present."""

    mpjpe: float
    ade: float
    fde: float
    joint_error: float
    joint_error_px: float
    loss: float
    windows: int

    def scores(self) -> dict[str, float]:
        """Returns all but the loss, by name."""
        return {name: value for name, value in asdict(self).items() if name != "loss"}


def masked_mse(
    prediction: Tensor, target: Tensor, present: Tensor | None = None, coordinates: Tensor | None = None
) -> Tensor:
    """Returns the squared error, averaged over the coordinates of present joints; 0 where none is present.

    Args:
        prediction: (B, T, 84) float.
        target: (B, T, 84) float.
        present: (B, T, 42) bool; every joint counts without it.
        coordinates: () how many coordinates to average over, at least 1, where these windows are a part of a batch;
            default: as many as are present here.

    Returns:
        () of prediction's dtype.
    """
    difference = prediction - target
    if present is not None:
        # Masked before it is squared: whatever stands in for a missing hand reaches neither the loss nor a gradient.
        mask = present.repeat_interleave(2, dim=-1)
        difference = torch.where(mask, difference, 0.0)
        if coordinates is None:
            coordinates = mask.sum().clamp(min=1)
    squared = difference.square()
    return squared.mean() if coordinates is None else squared.sum() / coordinates


def window_errors(prediction: Tensor, target: Tensor, present: Tensor | None = None) -> Tensor:
    """Returns each window's errors as a row of sums, from which `summarise` makes the metrics of any set of windows.

    Stays on the device, so that a batch costs no synchronisation; fp64, so that the figures of a set of windows do
    not depend on how it was cut into batches.

    Args:
        prediction: (B, T, 84) float.
        target: (B, T, 84) float.
        present: (B, T, 42) bool; every joint counts without it.

    Returns:
        (B, 7) fp64: mpjpe, ade, fde; over present joints the sums of error, error in pixels and squared error; the
        number of present joints.
    """
    if prediction.device.type == "cuda" or len(prediction) <= _CACHED:
        return _window_errors(prediction, target, present)
    parts = [tensor.split(_CACHED) for tensor in (prediction, target) + (() if present is None else (present,))]
    return torch.cat([_window_errors(*part) for part in zip(*parts, strict=True)])


def _window_errors(prediction: Tensor, target: Tensor, present: Tensor | None = None) -> Tensor:
    # One fp64 copy, changed in place: on a CPU, memory is what this takes its time for.
    difference = prediction.detach().to(torch.float64, copy=True).sub_(target)
    joints = difference.unflatten(-1, (JOINTS, 2))
    centroid = joints.mean(2).norm(dim=-1)
    columns = [difference.norm(dim=-1).mean(1), centroid.mean(1), centroid[:, -1]]
    if present is None:
        present = torch.ones(joints.shape[:-1], dtype=torch.bool, device=joints.device)
    else:
        joints.masked_fill_(~present[..., None], 0.0)
    error, squared = joints.norm(dim=-1).sum((1, 2)), joints.square().sum((1, 2, 3))
    for axis, scale in enumerate(UNIT_PX):
        joints[..., axis].mul_(scale)
    columns += [error, joints.norm(dim=-1).sum((1, 2)), squared, present.sum((1, 2)).double()]
    return torch.stack(columns, dim=1)


def summarise(rows: Tensor) -> Metrics:
    """Returns the metrics of the windows whose rows of `window_errors` these are, (N, 7), N > 0."""
    if len(rows) == 0:
        raise ValueError("rows: expected the errors of at least one window, got none")
    total = dict(zip(_COLUMNS, rows.sum(0).tolist(), strict=True))
    windows, joints = len(rows), total["joints"] or float("nan")
    published = {name: total[name] / windows for name in ("mpjpe", "ade", "fde")}
    of_joints = {name: total[name] / joints for name in ("joint_error", "joint_error_px")}
    # As masked_mse: nothing to learn from is no loss.
    loss = total["squared_error"] / (2 * joints) if total["joints"] else 0.0
    return Metrics(**published, **of_joints, loss=loss, windows=windows)


def window_error_px(rows: Tensor) -> Tensor:
    """Returns each window's own joint error in pixels, (N,) fp64; NaN where no joint was present."""
    return rows[:, _COLUMNS.index("joint_error_px")] / rows[:, _COLUMNS.index("joints")]


def by_frame_rate(rows: Tensor, fps: Tensor, assumed: Tensor) -> list[dict[str, Any]]:
    """Returns the scores of each frame rate's windows, slowest first, and how many of the windows it is assumed for.

    Args:
        rows: (N, 7) of `window_errors`.
        fps: (N,) frames per second, put together by whole ones, but never by 0: 22.998 and 23 are one rate, called 23.
            A rate that all windows of one have, as after resampling, is called what it is: 1.4 is not 1.
        assumed: (N,) bool: whether the window's frame rate is assumed and not measured.
    """
    fps = fps.to(rows.device)
    rates = torch.where(fps < 1, fps, fps.round())
    scores = []
    for rate in rates.unique().tolist():
        chosen = rates == rate
        own = fps[chosen].unique().tolist()
        # float32 holds 29.97 as 29.9699993.
        called = round(own[0], 4) if len(own) == 1 else rate
        count = int(assumed.to(rows.device)[chosen].sum())
        scores.append({"fps": called, "assumed": count, **summarise(rows[chosen]).scores()})
    return scores


def by_subtask(rows: Tensor, subtask: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the scores of each subtask's windows, in the order of `names`, those without a window left out.

    Args:
        rows: (N, 7) of `window_errors`.
        subtask: (N,) int64, index into `names`; -1 is none of them, and comes first, as `other`.
        names: what the subtasks are called.
    """
    numbers = subtask.to(rows.device)
    return [
        {"subtask": "other" if number < 0 else names[number], **summarise(rows[numbers == number]).scores()}
        for number in numbers.unique().tolist()
    ]


def joint_errors(prediction: Tensor, target: Tensor, present: Tensor | None = None) -> Tensor:
    """Returns the errors of each future frame and joint, summed over windows; arguments as of `window_errors`.

    Returns:
        (T, 42, 3) fp64: over the windows in which the joint was present the sums of its error, in centred units and in
        pixels, and their number.
    """
    difference = (prediction.detach().double() - target.double()).unflatten(-1, (JOINTS, 2))
    if present is None:
        present = torch.ones(difference.shape[:-1], dtype=torch.bool, device=difference.device)
    seen = torch.where(present[..., None], difference, 0.0)
    pixels = seen * seen.new_tensor(UNIT_PX)
    return torch.stack([seen.norm(dim=-1), pixels.norm(dim=-1), present.double()], dim=-1).sum(0)


@torch.inference_mode()
def score_joints(predict: Callable[[Tensor], Tensor], batches: Iterable[Scored], mask_missing: bool = True) -> Tensor:
    """Runs a forecaster as `score` does; returns the sum of `joint_errors` over all batches, (T, 42, 3)."""
    sums = [joint_errors(predict(batch.x), batch.target, batch.present if mask_missing else None) for batch in batches]
    return torch.stack(sums).sum(0)


def mean_errors(sums: Tensor) -> dict[str, list[float]]:
    """Returns the mean errors of sums like those of `joint_errors`, (K, 3); NaN where no joint was present."""
    return {"joint_error": (sums[:, 0] / sums[:, 2]).tolist(), "joint_error_px": (sums[:, 1] / sums[:, 2]).tolist()}


@torch.inference_mode()
def score(predict: Callable[[Tensor], Tensor], batches: Iterable[Scored], mask_missing: bool = True) -> Tensor:
    """Runs a forecaster over batches; returns the rows of `window_errors`, (N, 7), in the batches' order.

    Args:
        predict: (B, T, I) observed to (B, T, 84) forecast.
        batches: see `Scored`.
        mask_missing: leave missing hands out of the loss and the joint error.
    """
    return torch.cat(
        [window_errors(predict(batch.x), batch.target, batch.present if mask_missing else None) for batch in batches]
    )


def evaluate(model: nn.Module, batches: Iterable[Scored], mask_missing: bool = True) -> Tensor:
    """Scores a network with its dropout off, as `score` does; changes no weights, gradients or random state."""
    was_training = model.training
    model.eval()
    try:
        return score(model, batches, mask_missing)
    finally:
        model.train(was_training)


def repeat_last_frame(x: Tensor) -> Tensor:
    """Forecasts that nothing moves: (B, T, I) to (B, T, 84), each frame the last observed one."""
    return x[:, -1:, :POSE_SIZE].expand(-1, x.shape[1], -1)


def constant_velocity(x: Tensor) -> Tensor:
    """Forecasts that everything goes on as between the last two frames: frame k is last + k (last - previous)."""
    poses = x[..., :POSE_SIZE]
    last = poses[:, -1:]
    # With one observed frame there is no velocity to go on with.
    step = last - poses[:, -2:-1] if x.shape[1] > 1 else torch.zeros_like(last)
    ahead = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)
    return last + ahead[None, :, None] * step


BASELINES: dict[str, Callable[[Tensor], Tensor]] = {
    "repeat last frame": repeat_last_frame,
    "constant velocity": constant_velocity,
}
