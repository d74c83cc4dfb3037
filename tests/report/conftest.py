"""Fabricates run folders as the trainer writes them."""

import json

import numpy as np
import pytest

from bigru.config import TrainConfig

CONFIG = TrainConfig().as_dict()


def scores(mpjpe, ade, fde, joint_error, windows=123):
    named = {"mpjpe": mpjpe, "ade": ade, "fde": fde, "joint_error": joint_error}
    return named | {"joint_error_px": joint_error * 700, "windows": windows}


def series(joint_error):
    return {"joint_error": joint_error, "joint_error_px": [700 * error for error in joint_error]}


def fabricate_summary(stamp, epochs, predicted=60):
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
        "finished_before": [],
        "stopped_early": True,
        "test": scores(0.9124, 0.0361, 0.0419, 0.1006),
        "baselines": {
            "repeat last frame": scores(1.2345, 0.0402, 0.0611, 0.1406),
            "constant velocity": scores(2.3456, 0.0352, 0.1022, 0.2406),
        },
        "by_frame_rate": [
            {"fps": 23, "assumed": 0, **scores(1.1, 0.05, 0.06, 0.12, 61)},
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
            "why": "asked for by name",
        },
        "timing": {"epoch_s_median": 1.234, "train_windows_per_s_median": 1127.4, "total_s": 754.0},
        "command": "python -m bigru.train --optim.epochs 120",
    }


def fabricate_metrics(epochs, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for epoch in range(1, epochs + 1):
        level = 0.8 + 8 * np.exp(-epoch / 3)
        wobble = rng.lognormal(0, 0.12, size=2)
        row = {"epoch": epoch}
        for name, scale in (("mpjpe", 1.0), ("ade", 0.035), ("fde", 0.04), ("joint_error", 0.11), ("loss", 0.02)):
            row[f"tr_{name}"] = scale * level * wobble[0]
            row[f"va_{name}"] = 1.25 * scale * level * wobble[1]
        row["va_joint_error_px"] = 700 * row["va_joint_error"]
        rows.append(row | {"lr": 1e-3, "train_s": 1.0, "val_s": 0.2, "train_windows_per_s": 1391.0})
    return rows


def fabricate_samples(windows=3, observed=60, predicted=60):
    """Two hands that swing towards each other; the forecast drifts from the truth."""
    time = np.linspace(0, 2, observed + predicted)
    rng = np.random.default_rng(3)
    # Of no hand's looks, around the wrist.
    joints = rng.uniform(-0.2, 0.2, size=(2, 21, 2))
    joints[:, 0] = 0
    poses, drifts = [], []
    for window in range(windows):
        half_gap = 0.20 + 0.06 * np.sin(1.5 * time + window)
        midpoint = np.stack([half_gap, 0.10 * np.sin(time + window)], axis=-1)
        wrists = np.stack([-midpoint, midpoint], axis=1)
        poses.append((wrists[:, :, None] + joints).reshape(len(time), 84))
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
        "fps_assumed": np.zeros(windows, dtype=bool),
        "stem": np.array([f"p6{w}-CAM_AV-BIAH_RB-HSA-{7 * w}.123456789_{7 * w + 6}.98765" for w in range(windows)]),
    }


@pytest.fixture
def no_figures(blank_pictures, monkeypatch):
    """For what is asked of the document and of its files alone: not even figures are made."""
    names = "figures.learning_curves figures.forecasts breakdown_figures.horizon breakdown_figures.joints"
    for name in (*names.split(), "comparison_figures.comparison"):
        monkeypatch.setattr(f"bigru.report.{name}", lambda *_: None)


@pytest.fixture
def make_run(tmp_path):
    """Writes `<tmp_path>/runs/<stamp>`; keywords replace the metrics, entries of the summary, config or samples."""

    def make(stamp="20261123_224500", epochs=30, metrics=None, summary=None, config=None, samples=None, windows=1):
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
