"""An epoch of bigru.train: the loader alone, the step alone, and what the loop adds to the network's own share."""

import statistics
import time
from pathlib import Path

import pytest
import torch

from benchmarks.cases import FEATURES, LAYERS, MAIN, STEPS
from benchmarks.forecaster import make_step, make_windows
from benchmarks.paired import NOTES
from benchmarks.timing import finished
from bigru import HandForecaster
from bigru.config import TrainConfig
from bigru.data.windows import Dataset
from bigru.model.metrics import summarise
from bigru.training.distributed import Team
from bigru.training.trainer import Trainer

TRAIN, VAL = 4 * MAIN.batch, 2 * MAIN.batch
"""Windows: as many train to each val window as in the full dataset, 7,391 and 3,753, in a twenty-ninth of its size."""
ROUNDS = 9


@pytest.fixture
def windows(device):
    row = {"input": FEATURES, "hidden": MAIN.hidden, "layers": LAYERS, "steps": STEPS}
    return make_windows(TRAIN, row, device)[0]


def forecaster(device):
    torch.manual_seed(0)
    return HandForecaster(FEATURES, MAIN.hidden, LAYERS).to(device)


def test_loader(benchmark, device, windows):
    """One batch gathered, of windows in random order."""
    indices = torch.randperm(TRAIN)[: MAIN.batch].to(device)
    assert windows.batch(indices).x.shape == (MAIN.batch, STEPS, FEATURES)
    benchmark.pedantic(finished(lambda: windows.batch(indices), device), rounds=100, warmup_rounds=3)


def test_step(benchmark, device, windows):
    """One step on one batch that is there: the network's own share of training."""
    step, batch = make_step(forecaster(device)), windows.batch(torch.arange(MAIN.batch, device=device))
    benchmark.pedantic(finished(lambda: step(batch.x, batch.target, batch.present), device), rounds=20, warmup_rounds=3)


def test_epoch(benchmark, device, windows, tmp_path):
    """A whole epoch and its validation, in turn with as many steps and forward passes of the network on one batch."""
    val = make_windows(VAL, {"input": FEATURES, "steps": STEPS}, device)[0]
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

    network, epoch = finished(network, device), finished(epoch, device)

    def timed(work, times):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)

    benchmark.pedantic(
        lambda: timed(epoch, epoch_s), setup=lambda: timed(network, own_s), rounds=ROUNDS, warmup_rounds=1
    )
    low, added, high = statistics.quantiles(
        [100 * (whole / own - 1) for whole, own in zip(epoch_s[1:], own_s[1:], strict=True)], n=4
    )
    benchmark.extra_info.update(added_percent=added, own_s=own_s, epoch_s=epoch_s)
    NOTES.append(
        f"epoch of {TRAIN} + {VAL} windows: {statistics.median(epoch_s):.2f} s, {added:+.1f} % "
        f"({low:+.1f} to {high:+.1f}) beside the network's own share"
    )
