"""The loader alone: a dataset from its clips, from its file of frames, and an epoch of batches gathered from it."""

import dataclasses

import pytest
import torch

from bigru.config import DataConfig
from bigru.data.synthetic import write_synthetic
from bigru.data.windows import Dataset, load_dataset

CLIPS, SEED, BATCH = 500, 1, 64
MODALITIES = {"hands": {}, "all": {"gaze": True, "objects": True, "surrogate": True}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A twentieth of the published number of clips, in the page cache once it has been written."""
    return write_synthetic(tmp_path_factory.mktemp("loader") / "clips", CLIPS, SEED)


@pytest.fixture(params=MODALITIES)
def config(root, request):
    return DataConfig(data_root=root, **MODALITIES[request.param])


@pytest.fixture(autouse=True)
def described(benchmark, request, config):
    benchmark.group = "loader"
    benchmark.extra_info.update(clips=CLIPS, seed=SEED, features=config.input_size)


def require_same(one: Dataset, other: Dataset) -> None:
    """Fails unless both hold the same windows of the same frames."""
    for split in ("train", "val", "test"):
        for name in ("frames", "present", "starts", "fps", "clip"):
            assert torch.equal(getattr(getattr(one, split), name), getattr(getattr(other, split), name)), name


def test_load_from_clips(benchmark, config):
    without = dataclasses.replace(config, no_cache=True)
    benchmark.pedantic(load_dataset, (without,), rounds=3, warmup_rounds=1)


def test_load_from_cache(benchmark, config):
    """What a second run waits for: the clips' sizes and times, and the map; the frames follow as they are used."""
    load_dataset(config)
    mapped = load_dataset(config)
    assert mapped.cache.startswith("frames mapped from")
    require_same(mapped, load_dataset(dataclasses.replace(config, no_cache=True)))
    benchmark.pedantic(load_dataset, (config,), rounds=10, warmup_rounds=1)


@pytest.mark.parametrize("centre", ["frame", "last"])
def test_gather_an_epoch(benchmark, config, centre):
    """Every training window once, in an order drawn by chance, 64 at a time."""
    windows = load_dataset(dataclasses.replace(config, centre=centre)).train
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    first = next(windows.batches(BATCH, order))
    start = int(windows.starts[order[0]])
    expected = windows.frames[start : start + 120, :84] - (
        windows.frames[start + 59, :84] - first.x[0, -1, :84] if centre == "last" else 0
    )
    torch.testing.assert_close(torch.cat([first.x[0, :, :84], first.target[0]]), expected)
    benchmark.extra_info.update(windows=len(windows), batch=BATCH, centre=centre)

    def gather() -> None:
        for _ in windows.batches(BATCH, order):
            pass

    benchmark.pedantic(gather, rounds=10, warmup_rounds=1)
