"""What the tests of the training command share: a handful of made-up windows, and what a run left behind."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bigru import train as command
from bigru.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from bigru.data.index import Skipped
from bigru.data.windows import Dataset, Windows
from bigru.model.forecaster import HandForecaster
from bigru.model.metrics import masked_mse
from bigru.training import run
from bigru.training.run import Parts

FRAMES = 4
TIMES = ("train_s", "val_s", "train_windows_per_s")
SCORED = ["mpjpe", "ade", "fde", "loss", "joint_error"]
COLUMNS = {"epoch", *(f"{split}_{name}" for split in ("tr", "va") for name in SCORED), "va_joint_error_px"}
COLUMNS |= {"lr", "grad_norm", *TIMES}


def windows(clips, seed):
    """Clips of 12 frames of hands that swing, every fifth frame without its left hand."""
    generator = torch.Generator().manual_seed(seed)
    swing = torch.sin(torch.arange(12.0)[:, None] / 3 + torch.rand(clips, 1, 1, generator=generator) * 6)
    frames = (torch.randn(clips, 1, 84, generator=generator) + swing).reshape(-1, 84)
    present = torch.ones(len(frames), 2, dtype=torch.bool)
    present[::5, 0] = False
    starts = torch.arange(clips)[:, None] * 12 + torch.tensor([0, 2, 4])
    clip = torch.arange(clips).repeat_interleave(3)
    fps = torch.where(clip % 2 == 0, 23.0, 59.0)
    stems = tuple(f"clip-{number}" for number in range(clips))
    return Windows(frames, present, starts.flatten(), fps, clip, stems, FRAMES, FRAMES)


def dataset():
    skipped = (Skipped("p01-x", "short", "3 frames,\n8 needed\tin all"), Skipped("p02-y", "missing", "no file"))
    return Dataset(
        windows(7, 0),
        windows(3, 1),
        windows(4, 2),
        skipped,
        {"train": 7, "val": 3, "test": 4},
        16,
        0,
        Path("clips"),
        Path("index.csv"),
    )


PARTS = Parts(load=lambda config: dataset(), write_report=lambda folder: folder.parent / "results_bigru.md")
"""Of a run whose data and document are made up."""


def train(config, **parts):
    return run.train(config, dataclasses.replace(PARTS, **parts))


def resume(folder, changes=None, **parts):
    return run.resume(folder, changes, dataclasses.replace(PARTS, **parts))


def main(argv, **parts):
    return command.main(argv, dataclasses.replace(PARTS, **parts))


def at_step(number, act):
    """Returns a loss that has something done in the middle of a step, counted from 1 over all epochs of five."""
    calls = itertools.count(1)

    def loss(*arguments):
        if next(calls) == number:
            act()
        return masked_mse(*arguments)

    return loss


def killed(*_):
    raise KeyboardInterrupt


def stop_in(epoch, batch=3):
    """Returns a loss that ends training at a batch of an epoch, as a kill would."""
    return at_step((epoch - 1) * 5 + batch, killed)


def killed_run(config, **parts):
    """Trains until a part raises KeyboardInterrupt; returns the run's folder."""
    with pytest.raises(KeyboardInterrupt):
        train(config, **parts)
    return only_run(config)


def make_up(root):
    """Settings of a run of six epochs over five batches of four."""
    return TrainConfig(
        DataConfig(data_root=root, observed=FRAMES, predicted=FRAMES),
        ModelConfig(hidden_size=8),
        OptimConfig(batch_size=4, epochs=6, lr=1e-2, warmup_epochs=2),
        RunConfig(out=root / "runs", device="cpu"),
    )


def only_run(config):
    (folder,) = config.run.out.iterdir()
    return folder


def options(config):
    text = f"--data-root {config.data.data_root} --observed 4 --predicted 4 --hidden-size 8 --epochs 1 --batch-size 4"
    return [*text.split(), "--out", str(config.run.out), "--device", "cpu"]


def change(config, section, **values):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows(folder)]


def same_weights(one, other):
    one, other = load_file(one / "weights.safetensors"), load_file(other / "weights.safetensors")
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_same(one, other):
    """Asserts that two runs have the same figures and weights, to the bit."""
    assert timeless(one) == timeless(other)
    assert same_weights(one, other)


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def checkpoint_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def network_of(folder):
    """The network with the best weights of a run."""
    model = HandForecaster(hidden_size=8)
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    return model.eval()


def contents(folder):
    """What the files of a folder hold, but for the lock."""
    return {file: file.read_bytes() for file in folder.iterdir() if file.name != "run.lock"}
