"""What the tests of the training command share: a handful of made-up windows, and what a run left behind."""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import bigru.training.run as training
from bigru.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from bigru.data.clips import Skipped
from bigru.data.windows import Dataset, Windows

FRAMES = 4
TIMES = ("train_s", "val_s", "train_windows_per_s")
COLUMNS = {
    "epoch",
    "tr_mpjpe",
    "va_mpjpe",
    "tr_ade",
    "va_ade",
    "tr_fde",
    "va_fde",
    "tr_loss",
    "va_loss",
    "tr_joint_error",
    "va_joint_error",
    "va_joint_error_px",
    "lr",
    "grad_norm",
    *TIMES,
}


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


def make_up(root, monkeypatch):
    """A run of six epochs over five batches of four, its data and its document made up."""
    monkeypatch.setattr(training, "load_dataset", lambda config: dataset())
    monkeypatch.setattr("bigru.training.summary.write_report", lambda folder: folder.parent / "results_bigru.md")
    return TrainConfig(
        DataConfig(data_root=root, observed=FRAMES, predicted=FRAMES),
        ModelConfig(hidden_size=8),
        OptimConfig(batch_size=4, epochs=6, lr=1e-2, warmup_epochs=2),
        RunConfig(out=root / "runs", device="cpu"),
    )


def options(config):
    return [
        "--data-root",
        str(config.data.data_root),
        "--observed",
        "4",
        "--predicted",
        "4",
        "--hidden-size",
        "8",
        "--epochs",
        "1",
        "--batch-size",
        "4",
        "--out",
        str(config.run.out),
        "--device",
        "cpu",
    ]


def change(config, section, **values):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows(folder)]


def same_weights(one, other):
    one, other = load_file(one / "weights.safetensors"), load_file(other / "weights.safetensors")
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
