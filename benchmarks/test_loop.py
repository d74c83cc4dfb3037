"""An epoch of bigru.train: the loader alone, the step alone, and what the loop adds to the network's own share."""

import statistics
from pathlib import Path

import pytest
import torch

from benchmarks.timing import wall_ms
from benchmarks.workloads import MAIN
from bigru import HandForecaster
from bigru.config import TrainConfig
from bigru.data.windows import Dataset, Windows
from bigru.model.metrics import summarise
from bigru.training.distributed import Team
from bigru.training.step import TrainStep, make_optimizer
from bigru.training.trainer import Trainer

TRAIN, VAL = 4 * MAIN.batch, 2 * MAIN.batch
"""Windows: as many train to each val window as in the full dataset, 7,391 and 3,753, in a twenty-ninth of its size."""
ROUNDS, STRIDE = 9, 15


def make_windows(count, device):
    """Overlapping windows of one generated recording, on the device."""
    frames = (count - 1) * STRIDE + 2 * MAIN.steps
    generator = torch.Generator().manual_seed(0)
    # A walk, so that a frame foretells the next as it does in a recording.
    features = torch.randn(frames, MAIN.input, generator=generator).cumsum(0).mul_(0.01).tanh_()
    return Windows(
        frames=features,
        present=torch.rand(frames, 2, generator=generator) < 0.95,
        starts=torch.arange(count) * STRIDE,
        fps=torch.full((count,), 59.0),
        clip=torch.zeros(count, dtype=torch.int64),
        stems=("generated",),
        observed=MAIN.steps,
        predicted=MAIN.steps,
    ).to(device)


def make_step(model):
    return TrainStep(model, make_optimizer(model, 1e-3, 1e-5), 1.0)


def forecaster(device):
    torch.manual_seed(0)
    return HandForecaster(MAIN.input, MAIN.hidden, MAIN.layers).to(device)


@pytest.fixture
def windows(device):
    return make_windows(TRAIN, device)


def test_loader(benchmark, device, windows):
    """One batch gathered, of windows in random order."""
    indices = torch.randperm(TRAIN)[: MAIN.batch].to(device)
    assert windows.batch(indices).x.shape == (MAIN.batch, MAIN.steps, MAIN.input)
    benchmark.pedantic(lambda: wall_ms(lambda: windows.batch(indices)), rounds=100, warmup_rounds=3)


def test_step(benchmark, device, windows):
    """One step on one batch that is there: the network's own share of training."""
    step, batch = make_step(forecaster(device)), windows.batch(torch.arange(MAIN.batch, device=device))
    benchmark.pedantic(lambda: wall_ms(lambda: step(batch.x, batch.target, batch.present)), rounds=20, warmup_rounds=3)


def test_epoch(benchmark, device, windows, tmp_path, note):
    """A whole epoch and its validation, in turn with as many steps and forward passes of the network on one batch."""
    val = make_windows(VAL, device)
    dataset = Dataset(windows, val, val, (), {"train": 1, "val": 1, "test": 1}, 1, 0, Path(), Path())
    loop = Trainer(TrainConfig(), forecaster(device), dataset, Team())
    step, batch = make_step(forecaster(device)), windows.batch(torch.arange(MAIN.batch, device=device))
    own_s, epoch_s = [], []

    def network() -> None:
        step.model.train()
        for _ in range(TRAIN // MAIN.batch):
            step(batch.x, batch.target, batch.present)
        step.model.eval()
        with torch.inference_mode():
            for _ in range(VAL // MAIN.batch):
                step.model(batch.x)

    def epoch() -> None:
        tr, va = loop.train_epoch(tmp_path), summarise(loop.validate())
        assert (tr.windows, va.windows) == (TRAIN, VAL)
        loop.progress.update(va.mpjpe, 0.0)

    benchmark.pedantic(
        lambda: epoch_s.append(wall_ms(epoch) / 1e3),
        setup=lambda: own_s.append(wall_ms(network) / 1e3),
        rounds=ROUNDS,
        warmup_rounds=1,
    )
    low, added, high = statistics.quantiles(
        [100 * (whole / own - 1) for whole, own in zip(epoch_s[1:], own_s[1:], strict=True)], n=4
    )
    benchmark.extra_info.update(added_percent=added, own_s=own_s, epoch_s=epoch_s)
    note(
        f"epoch of {TRAIN} + {VAL} windows: {statistics.median(epoch_s):.2f} s, {added:+.1f} % "
        f"({low:+.1f} to {high:+.1f}) beside the network's own share"
    )
