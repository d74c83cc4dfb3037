"""Fabricates run folders as the trainer writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigru.config import TrainConfig

CONFIG: dict[str, dict[str, Any]] = TrainConfig().as_dict()


def scores(mpjpe: float, ade: float, fde: float, joint_error: float, windows: int = 123) -> dict[str, float]:
    named = {"mpjpe": mpjpe, "ade": ade, "fde": fde, "joint_error": joint_error}
    return named | {"joint_error_px": joint_error * 700, "windows": windows}


def series(joint_error: list[float]) -> dict[str, list[float]]:
    return {"joint_error": joint_error, "joint_error_px": [700 * error for error in joint_error]}


def fabricate_summary(stamp: str, epochs: int, predicted: int = 60) -> dict[str, Any]:
    ahead = np.arange(1, predicted + 1) / predicted
    day, time = stamp.split("_")
    started = f"{day[:4]}-{day[4:6]}-{day[6:]} {time[:2]}:{time[2:4]}:{time[4:]}"
    return {
        "format": 2,
        "started": started,
        "total_params": 482900,
        "modules": [
            {"module": "encoder.core", "params": 460800},
            {"module": "pose_head.0", "params": 512},
            {"module": "pose_head.2", "params": 21588},
        ],
        "best_epoch": max(1, epochs * 2 // 3),
        "stopped_early": True,
        "test": scores(0.9124, 0.0361, 0.0419, 0.1006),
        "baselines": {
            "repeat last frame": scores(1.2345, 0.0402, 0.0611, 0.1406),
            "constant velocity": scores(2.3456, 0.0352, 0.1022, 0.2406),
        },
        "by_frame_rate": [
            {"fps": 23, **scores(1.1, 0.05, 0.06, 0.12, 61)},
            {"fps": 59, "assumed": 7, **scores(0.7, 0.02, 0.03, 0.08, 62)},
        ],
        "by_subtask": [
            {"subtask": "BHO", **scores(1.0, 0.04, 0.05, 0.11, 100)},
            {"subtask": "THP", **scores(0.5, 0.01, 0.02, 0.06, 23)},
        ],
        "horizon": {
            "this network": series((0.05 + 0.05 * ahead).tolist()),
            "repeat last frame": series((0.01 + 0.2 * ahead).tolist()),
            "constant velocity": series((0.4 * ahead).tolist()),
        },
        "by_joint": series((0.05 + np.arange(42) / 420).tolist()),
        "modalities": {"hands": True, "gaze": False, "objects": False, "surrogate": False},
        "data": {
            "source": "embedded synthetic dataset (480 clips, seed 7)",
            "split": "participant",
            "clips": {"train": 300, "val": 90, "test": 90},
            "windows": {"train": 1391, "val": 153, "test": 123},
            "skipped": {"short": 300, "unreadable": 2},
        },
        "environment": {
            "device": "CPU (2 threads)",
            "backend": "torch",
            "precision": "fp32",
            "python": "3.11.7",
            "torch": "2.13.0+cpu",
            "triton": None,
            "numpy": "2.4.6",
            "bigru": "0.1.0",
            "platform": "Linux-6.1.0-x86_64-with-glibc2.36",
        },
        "timing": {"epoch_s_median": 1.234, "train_windows_per_s_median": 1127.4, "total_s": 754.0},
        "command": "python -m bigru.train --optim.epochs 120",
    }


def fabricate_metrics(epochs: int, seed: int = 0) -> list[dict[str, float]]:
    rng = np.random.default_rng(seed)
    rows = []
    for epoch in range(1, epochs + 1):
        level = 0.8 + 8 * np.exp(-epoch / 3)
        wobble = rng.lognormal(0, 0.12, size=2)
        row: dict[str, float] = {"epoch": epoch}
        for name, scale in (("mpjpe", 1.0), ("ade", 0.035), ("fde", 0.04), ("joint_error", 0.11), ("loss", 0.02)):
            row[f"tr_{name}"] = scale * level * wobble[0]
            row[f"va_{name}"] = 1.25 * scale * level * wobble[1]
        row["va_joint_error_px"] = 700 * row["va_joint_error"]
        rows.append(row | {"lr": 1e-3, "train_s": 1.0, "val_s": 0.2, "train_windows_per_s": 1391.0})
    return rows


def hand(size: float, curl: np.ndarray, mirror: float) -> np.ndarray:
    """A hand seen from above, fingers up the image, in half image heights from its wrist: (T, 21, 2)."""
    angles = np.radians([-50.0, -20.0, -3.0, 13.0, 30.0]) * mirror
    reaches = ([0.28, 0.55, 0.78, 0.98], *([0.9, 1.25, 1.48, 1.68 - 0.15 * abs(finger - 1)] for finger in range(4)))
    joints = np.zeros((len(curl), 21, 2))
    for finger, (angle, reach) in enumerate(zip(angles, reaches, strict=True)):
        for joint, length in enumerate(reach):
            bent = np.asarray(length * (1 - 0.12 * joint * curl * (finger > 0)))
            # Fingers fan out less than the bones of the palm.
            turn = angle * (1 - 0.12 * joint)
            joints[:, 1 + 4 * finger + joint] = size * bent[:, None] * np.array([np.sin(turn), -np.cos(turn)])
    return joints


def fabricate_samples(windows: int = 3, observed: int = 60, predicted: int = 60) -> dict[str, np.ndarray]:
    """Two hands that swing towards each other while the fingers bend; the forecast drifts from the truth."""
    time = np.linspace(0, 2, observed + predicted)
    rng = np.random.default_rng(3)
    poses, drifts = [], []
    for window in range(windows):
        half_gap = 0.20 + 0.06 * np.sin(1.5 * time + window)
        midpoint = np.stack([half_gap, 0.10 * np.sin(time + window)], axis=-1)
        curl = 0.5 + 0.4 * np.sin(2 * time + window)
        # x counts half image widths, y half image heights.
        left = hand(0.21, curl, 1.0) * [0.5625, 1] - midpoint[:, None]
        right = hand(0.21, curl, -1.0) * [0.5625, 1] + midpoint[:, None]
        poses.append(np.stack([left, right], axis=1).reshape(len(time), 84))
        steps = np.linspace(0, 1, predicted)[:, None, None] * rng.normal(0, 0.03 * (window + 1), size=(1, 2, 2))
        drifts.append(np.repeat(steps[:, :, None], 21, axis=2).reshape(predicted, 84))
    truth, drift = np.array(poses, dtype=np.float32), np.array(drifts, dtype=np.float32)
    distances = np.linalg.norm(drift.reshape(windows, predicted, 2, 21, 2) * [864, 486], axis=-1)
    target_present = np.ones((windows, predicted, 2), dtype=bool)
    target_present[-1, predicted // 2 :, 0] = False
    return {
        "observed": truth[:, :observed],
        "target": truth[:, observed:],
        "predicted": truth[:, observed:] + drift,
        "observed_present": np.ones((windows, observed, 2), dtype=bool),
        "target_present": target_present,
        "fps": np.resize([23.0, 59.0], windows),
        "error_px": np.array([distances[window][target_present[window]].mean() for window in range(windows)]),
        "label": np.resize(["best", "median", "worst"], windows),
        "stem": np.array([f"p6{w}-CAM_AV-BIAH_RB-HSA-{7 * w}.123456789_{7 * w + 6}.98765" for w in range(windows)]),
    }


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes `<tmp_path>/runs/<stamp>`; keywords replace the metrics, entries of the summary, config or samples."""

    def make(
        stamp: str = "20261123_224500",
        epochs: int = 30,
        metrics: list[dict[str, float]] | None = None,
        summary: dict[str, Any] | None = None,
        config: dict[str, dict[str, Any]] | None = None,
        samples: dict[str, np.ndarray] | None = None,
        windows: int = 1,
    ) -> Path:
        run = tmp_path / "runs" / stamp
        run.mkdir(parents=True)
        rows = fabricate_metrics(epochs) if metrics is None else metrics
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {group: values | (config or {}).get(group, {}) for group, values in CONFIG.items()}
        (run / "config.json").write_text(json.dumps(options))
        fabricated = fabricate_summary(stamp, len(rows), options["data"]["predicted"])
        (run / "summary.json").write_text(json.dumps(fabricated | (summary or {})))
        np.savez(run / "samples.npz", **(fabricate_samples(windows) | (samples or {})))
        return run

    return make
