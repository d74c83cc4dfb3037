"""An epoch of bigru.train beside the network's own share of it, and reading a dataset."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.conftest import DEVICE
from benchmarks.workloads import MAIN
from bigru import HandForecaster
from bigru.config import DataConfig, TrainConfig
from bigru.data.synthetic import write_synthetic
from bigru.data.windows import Dataset, Windows, load_dataset
from bigru.proof.timing import compare, wall_ms
from bigru.training.distributed import Team
from bigru.training.step import TrainStep, make_optimizer
from bigru.training.trainer import Trainer


def make_windows(count):
    """Overlapping windows of one generated recording."""
    frames, generator = 15 * count + 2 * MAIN.steps, torch.Generator().manual_seed(0)
    # A walk, so that a frame foretells the next as it does in a recording.
    features = torch.randn(frames, MAIN.input, generator=generator).cumsum(0).mul_(0.01).tanh_()
    present, starts = torch.rand(frames, 2, generator=generator) < 0.95, torch.arange(count) * 15
    rates, clip = torch.full((count,), 59.0), torch.zeros(count, dtype=torch.int64)
    return Windows(features, present, starts, rates, clip, ("generated",), MAIN.steps, MAIN.steps).to(DEVICE)


def test_epoch(benchmark, note, tmp_path):
    """A whole epoch and its validation, in turn with as many steps and forward passes of the network on one batch."""
    # As many to train to each to validate as in the full dataset, in a twenty-ninth of its size.
    train, val = make_windows(4 * MAIN.batch), make_windows(2 * MAIN.batch)
    dataset = Dataset(train, val, val, (), {"train": 1, "val": 1, "test": 1}, 1, 0, Path(), Path())
    models = [HandForecaster(MAIN.input, MAIN.hidden, MAIN.layers).to(DEVICE) for _ in range(2)]
    step = TrainStep(models[0], make_optimizer(models[0], 1e-3, 1e-5), 1.0)
    batch = train.batch(torch.arange(MAIN.batch, device=DEVICE))
    loop, own_ms, epoch_ms = Trainer(TrainConfig(), models[1], dataset, Team()), [], []

    def network():
        step.model.train()
        for _ in range(4):
            step(batch.x, batch.target, batch.present)
        step.model.eval()
        with torch.inference_mode():
            for _ in range(2):
                step.model(batch.x)

    def epoch():
        loop.train_epoch(tmp_path)
        loop.validate()
        loop.progress.update(0.0, 0.0)

    def time_network():
        own_ms.append(wall_ms(network))

    benchmark.pedantic(lambda: epoch_ms.append(wall_ms(epoch)), setup=time_network, rounds=7, warmup_rounds=1)
    found = compare(own_ms[1:], epoch_ms[1:])
    times = f"{found['ratio']:.3f} times ({found['low']:.3f}-{found['high']:.3f}) the network's own share"
    note(f"epoch of {len(train)} and {len(val)} windows: {found['rival_ms'] / 1e3:.2f} s, {times}")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A twentieth of the published number of clips, in the page cache once it has been written."""
    return write_synthetic(tmp_path_factory.mktemp("reading") / "clips", 500, 1)


@pytest.mark.parametrize("cached", [False, True], ids=["from clips", "from the file of frames"])
def test_reading(benchmark, root, cached):
    """What a run waits for, the first time and after it."""
    config = replace(DataConfig(data_root=root), no_cache=not cached)
    benchmark.pedantic(load_dataset, (config,), rounds=5, warmup_rounds=1)
