"""The forecaster's training: one step, and a whole epoch at the full dataset's size."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from support import error
from torch import Tensor, nn

from benchmarks.cases import MODES, products
from benchmarks.gpu_record import RIVAL, Row, mode_of
from benchmarks.machine import Machine
from benchmarks.parts import Report
from benchmarks.rivals import BACKENDS, Entrant, Entry, compete
from bigru import HandForecaster
from bigru.layout import JOINTS_PER_HAND, POSE_SIZE
from bigru.model.metrics import masked_mse, summarise, window_errors
from bigru.training.step import TrainStep, make_optimizer, set_rate

LR, WEIGHT_DECAY, GRAD_CLIP, WARMUP_EPOCHS = 1e-3, 1e-5, 1.0, 5
"""bigru.train's."""
STRIDE = 15
"""Frames between two windows."""


def make_step(model: nn.Module, *, capturable: bool = False) -> TrainStep:
    """bigru.train's step; `capturable` as a CUDA graph needs it."""
    return TrainStep(model, make_optimizer(model, LR, WEIGHT_DECAY, capturable=capturable), GRAD_CLIP)


def make_model(path: str, row: Row, device: torch.device) -> HandForecaster:
    """The forecaster with a path as its encoder; the same weights for every path."""
    torch.manual_seed(0)
    sizes, precision = (row["input"], row["hidden"], row["layers"]), MODES[mode_of(row)].precision
    model = HandForecaster(*sizes, backend=BACKENDS.get(path, "auto"), precision=precision)
    if path == RIVAL:
        core = nn.GRU(*sizes, batch_first=True, bidirectional=True)
        core.load_state_dict(model.encoder.core.state_dict())
        model.encoder.core = core
    return model.to(device)


def outcome(model: nn.Module, batch: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Prediction and every gradient of a step, without dropout, which draws other numbers in another dtype."""
    model = copy.deepcopy(model).to(dtype)
    model.pose_head[1].p = 0.0
    prediction = model(batch.x.to(dtype))
    masked_mse(prediction, batch.target.to(dtype), batch.present).backward()
    return {"prediction": prediction.detach()} | {name: p.grad for name, p in model.named_parameters()}


def training_step(machine: Machine, parts: dict[str, list[Row]], report: Report, seconds: float, windows: int) -> None:
    """One step on one batch, again and again."""

    def entry(model: HandForecaster, data: Any, row: Row, device: torch.device) -> Entry:
        batch = data.batch(torch.arange(row["batch"], device=device) % windows)
        arguments = batch.x, batch.target, batch.present
        eager, graphed = make_step(copy.deepcopy(model)), make_step(copy.deepcopy(model), capturable=True)
        return Entry(functools.partial(eager, *arguments), functools.partial(graphed, *arguments))

    train(machine, parts, report, seconds, windows, entry)


def epoch(machine: Machine, parts: dict[str, list[Row]], report: Report, seconds: float, windows: int) -> None:
    """All train windows once: gathering the batches, the learning rate, the steps, and their metrics."""

    def entry(model: HandForecaster, data: Any, row: Row, device: torch.device) -> Entry:
        def eager() -> None:
            training = make_step(copy.deepcopy(model))

            def step(batch: Any) -> None:
                training(batch.x, batch.target, batch.present)

            one_epoch(training, step, data, row["batch"], windows, device)

        return Entry(eager, graphed=functools.partial(graphed_epoch, machine, model, data, row["batch"], windows))

    train(machine, parts, report, seconds, windows, entry)


def one_epoch(
    training: TrainStep, step: Callable[[Any], None], data: Any, size: int, windows: int, device: torch.device
) -> None:
    """bigru.train's epoch over device-resident windows; the GPU is waited for once, at its end."""
    rows, losses = [], []
    batches = torch.randperm(windows).to(device).split(size)
    steps = max(1, windows // size)
    for number, indices in enumerate(batches[:steps]):
        set_rate(training.optimizer, LR * (number + 1) / (WARMUP_EPOCHS * steps))
        batch = data.batch(indices)
        step(batch)
        rows.append(window_errors(training.prediction, batch.target, batch.present))
        losses.append(training.loss.clone())
    if not torch.stack(losses).isfinite().all():
        raise ArithmeticError("the loss left the finite numbers")
    summarise(torch.cat(rows))


def graphed_epoch(machine: Machine, model: HandForecaster, data: Any, size: int, windows: int) -> Callable[[], None]:
    """The same epoch with every step one replay of a CUDA graph; batches and metrics stay outside of it."""
    training = make_step(copy.deepcopy(model), capturable=True)
    device = machine.device
    static = data.batch(torch.arange(size, device=device) % windows)
    replay = machine.capture(lambda: training(static.x, static.target, static.present))

    def step(batch: Any) -> None:
        for name in ("x", "target", "present"):
            getattr(static, name).copy_(getattr(batch, name))
        replay()

    return lambda: one_epoch(training, step, data, size, windows, device)


def train(
    machine: Machine,
    parts: dict[str, list[Row]],
    report: Report,
    seconds: float,
    windows: int,
    entry: Callable[[HandForecaster, Any, Row, torch.device], Entry],
) -> None:
    """Has every path train on the same windows."""
    row = next(iter(parts.values()))[0]
    mode, device = MODES[mode_of(row)], machine.device
    data, note = make_windows(windows, row, device)
    batch = data.batch(torch.arange(row["batch"], device=device) % windows)
    for rows in parts.values():
        rows[0]["message"] = note
    with products(mode):
        wanted = outcome(make_model(RIVAL, row, device), batch, torch.float64)

        def enter(path: str) -> Entrant:
            model = make_model(path, row, device)

            def errors() -> dict[str, float]:
                actual = outcome(model, batch, mode.dtype)
                return {name: error(actual[name], tensor) for name, tensor in wanted.items()}

            return Entrant(errors, {row["work"]: entry(model, data, row, device)})

        compete(machine, parts, report, seconds, enter)


def make_windows(count: int, row: Row, device: torch.device) -> tuple[Any, str]:
    """So many windows of one generated recording, on the device, and a word on them for the rows."""
    steps = row["steps"]
    frames = (count - 1) * STRIDE + 2 * steps
    generator = torch.Generator().manual_seed(0)
    # A walk, so that a frame foretells the next as it does in a recording.
    features = torch.randn(frames, row["input"], generator=generator).cumsum(0).mul_(0.01).tanh_()
    present = torch.rand(frames, 2, generator=generator) < 0.95
    starts = torch.arange(count) * STRIDE
    note = f"{count:,} generated windows on the device, gathered by"
    try:
        from bigru.data.windows import Windows
    except ModuleNotFoundError as error:
        # Reading clips and settings needs libraries that gathering does not.
        return Gathering(
            features.to(device), present.to(device), starts.to(device), steps
        ), f"{note} the benchmark itself ({error})"
    windows = Windows(
        frames=features,
        present=present,
        starts=starts,
        fps=torch.full((count,), 59.0),
        clip=torch.zeros(count, dtype=torch.int64),
        stems=("generated",),
        observed=steps,
        predicted=steps,
    )
    return windows.to(device), f"{note} bigru.data.windows.Windows"


class Gathering:
    """`Windows.batch` where bigru.data cannot be imported."""

    def __init__(self, frames: Tensor, present: Tensor, starts: Tensor, steps: int) -> None:
        self._frames, self._present, self._starts, self._steps = frames, present, starts, steps

    def batch(self, indices: Tensor) -> SimpleNamespace:
        rows = self._starts[indices][:, None] + torch.arange(2 * self._steps, device=indices.device)
        past, future = rows[:, : self._steps], rows[:, self._steps :]
        present = self._present[future].repeat_interleave(JOINTS_PER_HAND, dim=-1)
        return SimpleNamespace(x=self._frames[past], target=self._frames[:, :POSE_SIZE][future], present=present)
