"""The training command on a handful of made-up windows: learning, stopping, going on, and what it leaves behind."""

import dataclasses
import itertools
import json
import logging
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from training import runs

from bigru.config import OptimConfig
from bigru.data.windows import NoWindowsError, Windows
from bigru.model.forecaster import HandForecaster
from bigru.model.metrics import BASELINES, evaluate, masked_mse, mean_errors, score, score_joints, summarise
from bigru.report.document import write_report
from bigru.training.run import prove_first
from bigru.training.trainer import Trainer, learning_rate


def test_a_run_leaves_a_whole_folder(whole):
    names = "config.json data.json metrics.jsonl train.log skipped.tsv checkpoint.pt weights.safetensors"
    assert {file.name for file in whole.iterdir()} == {*names.split(), "summary.json", "samples.npz", "run.lock"}
    assert json.loads((whole / "config.json").read_text()) == runs.make_up(whole.parents[1]).as_dict()
    assert (whole / "skipped.tsv").read_text().splitlines() == [
        "stem\treason\tdetail",
        "p01-x\tshort\t3 frames, 8 needed in all",
        "p02-y\tmissing\tno file",
    ]
    assert [row["epoch"] for row in runs.rows(whole)] == [1, 2, 3, 4, 5, 6]
    assert all(set(row) == runs.COLUMNS for row in runs.rows(whole))
    assert runs.rows(whole)[-1]["tr_loss"] < 0.9 * runs.rows(whole)[0]["tr_loss"]
    text = (whole / "train.log").read_text()
    assert all(words in text for words in ("epoch   6/6", "constant velocity", "CPU ("))


def test_the_summary_is_what_the_best_weights_do(config):
    # So fast that validation gets worse again.
    config = runs.change(config, "optim", lr=0.3, min_lr=0.3)
    folder = runs.train(config)
    summary, model, data, history = runs.summary_of(folder), runs.network_of(folder), runs.dataset(), runs.rows(folder)
    assert summary["test"] == pytest.approx(summarise(evaluate(model, data.test.batches(5))).scores(), rel=1e-6)
    assert summary["test"]["windows"] == 12
    best = min(history, key=lambda row: row["va_mpjpe"])
    assert summary["best_epoch"] == best["epoch"] < 6
    assert summarise(evaluate(model, data.val.batches(5))).mpjpe == pytest.approx(best["va_mpjpe"], rel=1e-6)
    assert summary["total_params"] == sum(module["params"] for module in summary["modules"])
    assert [module["module"] for module in summary["modules"]] == ["encoder.core", "pose_head.0", "pose_head.2"]
    assert list(summary["baselines"]) == ["repeat last frame", "constant velocity"]
    assert [(entry["fps"], entry["windows"]) for entry in summary["by_frame_rate"]] == [(23, 6), (59, 6)]
    assert summary["data"] == {
        "source": str(config.data.data_root),
        "split": "participant",
        "clips": {"train": 7, "val": 3, "test": 4},
        "windows": {"train": 21, "val": 9, "test": 12},
        "skipped": {"short": 1, "missing": 1},
        "departures": [],
    }
    assert summary["modalities"] == {"hands": True, "gaze": False, "objects": False, "surrogate": False}
    names = "device backend why precision python torch triton numpy bigru platform"
    assert set(summary["environment"]) == set(names.split())
    assert (summary["format"], summary["stopped_early"]) == (2, False)
    assert list(summary["horizon"]) == ["this network", *BASELINES]
    joints = score_joints(model, data.test.batches(5))
    assert summary["by_joint"] == {
        name: pytest.approx(values, rel=1e-5) for name, values in mean_errors(joints.sum(0)).items()
    }
    for name, predict in {"this network": model, **BASELINES}.items():
        expected = mean_errors(score_joints(predict, data.test.batches(5)).sum(1))
        assert summary["horizon"][name] == {name: pytest.approx(values, rel=1e-5) for name, values in expected.items()}
    assert [(entry["subtask"], entry["windows"]) for entry in summary["by_subtask"]] == [("other", 12)]
    assert summary["started"] == time.strftime("%Y-%m-%d %H:%M:%S", time.strptime(folder.name, "%Y%m%d_%H%M%S"))
    assert summary["command"].startswith("python -m bigru.train --data-root")
    assert summary["timing"]["total_s"] == pytest.approx(sum(row["train_s"] + row["val_s"] for row in history))


def test_samples_are_best_median_bad_and_worst(whole):
    with np.load(whole / "samples.npz", allow_pickle=False) as stored:
        samples = dict(stored)
    model, test = runs.network_of(whole), runs.dataset().test
    errors = [summarise(evaluate(model, [test.batch(torch.tensor([number]))])).joint_error_px for number in range(12)]
    order = np.argsort(errors)[[0, round(0.5 * 11), round(0.95 * 11), 11]]
    assert list(samples["label"]) == ["best", "median", "95th percentile", "worst"]
    assert samples["error_px"] == pytest.approx(np.array(errors)[order], rel=1e-6)
    batch = test.batch(torch.from_numpy(order))
    np.testing.assert_array_equal(samples["observed"], batch.x)
    np.testing.assert_array_equal(samples["target"], batch.target)
    np.testing.assert_allclose(samples["predicted"], model(batch.x).detach(), atol=1e-6)
    for place, number in enumerate(order):
        start = int(test.starts[number])
        np.testing.assert_array_equal(samples["observed_present"][place], test.present[start : start + runs.FRAMES])
        np.testing.assert_array_equal(
            samples["target_present"][place], test.present[start + runs.FRAMES : start + 2 * runs.FRAMES]
        )
        assert samples["stem"][place] == test.stems[test.clip[number]]
        assert samples["fps"][place] == test.fps[number]


def test_two_runs_are_the_same_to_the_bit(config, whole):
    torch.rand(17)
    runs.assert_same(runs.train(config), whole)
    assert not runs.same_weights(runs.train(runs.change(config, "run", seed=43)), whole)


def test_a_relative_data_root_is_found_from_any_folder(config, monkeypatch, tmp_path):
    (tmp_path / "clips").mkdir()
    monkeypatch.chdir(tmp_path)
    folder = runs.killed_run(runs.change(config, "data", data_root=Path("clips")), loss=runs.stop_in(2))
    assert json.loads((folder / "config.json").read_text())["data"]["data_root"] == str(tmp_path / "clips")


def test_runs_of_one_second_get_folders_of_their_own_and_leave_no_log_handlers(config):
    config = runs.change(config, "optim", epochs=1)
    assert len({runs.train(config) for _ in range(3)}) == 3
    runs.main(["--resume", "none"])
    assert logging.getLogger("bigru.train").handlers == []


def test_training_stops_when_validation_stalls(config):
    config = runs.change(config, "optim", epochs=50, patience=3, min_delta=0.05, lr=0.05)
    folder = runs.train(config)
    history, summary = runs.rows(folder), runs.summary_of(folder)
    assert summary["stopped_early"]
    assert len(history) < 50
    (line,) = [line for line in (folder / "train.log").read_text().splitlines() if line.startswith("stopped early")]
    gain, gain_epoch = float("inf"), 0
    for row in history:
        assert row["epoch"] - gain_epoch <= 3
        if row["va_mpjpe"] < gain - 0.05:
            gain, gain_epoch = row["va_mpjpe"], row["epoch"]
    assert history[-1]["epoch"] - gain_epoch == 3
    best = min(history, key=lambda row: row["va_mpjpe"])
    assert line == (
        f"stopped early after epoch {len(history)}: no gain of 0.05 in validation MPJPE since epoch {gain_epoch} "
        f"({gain:.4f}); best is epoch {best['epoch']} ({best['va_mpjpe']:.4f})"
    )


@pytest.mark.usefixtures("blank_pictures")
def test_what_a_run_says_fits_a_terminal_and_its_log_tells_the_time_left(config, capsys):
    more = "--epochs 2 --warmup-epochs 3 --amp bf16 --threads 1"
    runs.main([*runs.options(config), *more.split()], write_report=write_report)
    lines = capsys.readouterr().err.splitlines()
    assert max(len(line) for line in lines if line.startswith("epoch ")) <= 100
    assert re.search(r"s, 00:00 left", next(line for line in lines if line.startswith("epoch   2/2")))
    assert "epochs: 2 are fewer than the 3 of warmup_epochs: the learning rate ends below lr" in lines
    assert any(line.startswith("amp: on a CPU bf16 gains nothing") for line in lines)
    # Two epochs beat nothing.
    assert any('"repeat last frame" is at least as good as this network at frame' in line for line in lines[-3:])


def test_learning_rate_literally():
    optim = OptimConfig(epochs=7, lr=1e-3, min_lr=1e-5, warmup_epochs=2)
    rates = [learning_rate(step, 2, optim) for step in range(14)]
    assert rates[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    # Ten steps of cosine: its middle is halfway between the two rates, its end the lower one.
    assert rates[8] == pytest.approx(0.000505)
    assert rates[4] == pytest.approx(0.00097577, rel=1e-4)
    assert rates[13] == pytest.approx(1e-5)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[3:]))
    # The published protocol: 115 epochs of cosine.
    assert learning_rate(0, 115, OptimConfig()) == pytest.approx(1e-3 / 575)
    assert learning_rate(574, 115, OptimConfig()) == pytest.approx(1e-3)
    assert learning_rate(120 * 115 - 1, 115, OptimConfig()) == pytest.approx(1e-5)
    assert learning_rate(0, 4, OptimConfig(warmup_epochs=0, epochs=1)) == pytest.approx(1e-3 - 0.1464466 * 0.99e-3)


def test_the_rate_of_each_step_reaches_the_optimiser(config):
    used = []

    class Noted(Trainer):
        def learn(self, indices):
            used.append(self.step.optimizer.param_groups[0]["lr"])
            super().learn(indices)

    folder = runs.train(config, trainer=Noted)
    assert used == [learning_rate(step, 5, config.optim) for step in range(30)]
    assert [row["lr"] for row in runs.rows(folder)] == used[4::5]


def test_every_epoch_sees_other_windows_first_and_validation_sees_all(config):
    orders = []

    class Recorded(Windows):
        def batch(self, indices):
            orders.append((len(self), indices.tolist()))
            return super().batch(indices)

    def load(_):
        made = runs.dataset()
        return dataclasses.replace(made, train=Recorded(**vars(made.train)), val=Recorded(**vars(made.val)))

    runs.train(runs.change(config, "optim", epochs=2), load=load)
    # The first batch is looked at before training, for the backend.
    seen = [indices for count, indices in orders if count == 21][1:]
    assert [len(indices) for indices in seen] == [4] * 10
    one, other = (list(itertools.chain(*seen[start : start + 5])) for start in (0, 5))
    assert one != other
    assert len(set(one)) == len(set(other)) == 20
    validation = [indices for count, indices in orders if count == 9]
    assert validation == [[0, 1, 2, 3], [4, 5, 6, 7], [8]] * 2


def test_the_optimiser_is_the_published_one_also_with_fewer_windows_than_a_batch_holds(config):
    folder = runs.train(runs.change(config, "optim", batch_size=64, epochs=2, weight_decay=0.25))
    assert len(runs.rows(folder)) == 2
    (group,) = runs.checkpoint_of(folder)["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.25, (0.9, 0.999), 1e-8)


@pytest.mark.parametrize("mask", [True, False], ids=["masked", "unmasked"])
def test_missing_hands_are_learnt_and_scored_only_without_the_mask(config, mask):
    seen = []

    def loss(*arguments):
        seen.append(arguments[2])
        return masked_mse(*arguments)

    folder = runs.train(runs.change(runs.change(config, "optim", epochs=1), "data", mask_missing=mask), loss=loss)
    assert len(seen) == 5
    if mask:
        assert all(given.shape == (4, runs.FRAMES, 42) and not given.all() for given in seen)
    else:
        assert seen == [None] * 5
    model, data, (row,), summary = runs.network_of(folder), runs.dataset(), runs.rows(folder), runs.summary_of(folder)
    validation = {name: row[f"va_{name}"] for name in ("loss", "joint_error", "joint_error_px")}
    written = [(data.val, model, validation), (data.test, model, summary["test"])]
    written += [(data.test, BASELINES[name], scores) for name, scores in summary["baselines"].items()]
    for split, predict, scores in written:
        expected, other = (
            dataclasses.asdict(summarise(score(predict, split.batches(5), masked))) for masked in (mask, not mask)
        )
        assert scores == pytest.approx({name: expected[name] for name in scores}, rel=1e-5)
        assert scores["joint_error"] != pytest.approx(other["joint_error"], rel=1e-3)


@pytest.mark.parametrize(
    ("suffix", "optim", "moved"),
    [
        # A rate so small that the weights stay where they were.
        ("safetensors", {"lr": 1e-12, "min_lr": 0.0}, 1e-9),
        # A gradient clipped to far below AdamW's eps moves nothing.
        ("pt", {"weight_decay": 0.0, "grad_clip": 1e-14}, 1e-6),
    ],
)
def test_a_run_starts_from_given_weights(config, tmp_path, suffix, optim, moved):
    torch.manual_seed(5)
    model, path = HandForecaster(hidden_size=8), tmp_path / f"start.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(model.state_dict(), path)
    config = runs.change(runs.change(config, "run", weights=path), "optim", epochs=1, **optim)
    trained = load_file(runs.train(config) / "weights.safetensors")
    assert all(torch.allclose(trained[name], value, atol=moved) for name, value in model.state_dict().items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_on_a_gpu_learns_as_on_the_cpu(config):
    on_cpu = runs.train(runs.change(config, "model", dropout=0.0))
    on_gpu = runs.train(runs.change(runs.change(config, "run", device="cuda"), "model", dropout=0.0))
    for row, expected in zip(runs.timeless(on_gpu), runs.timeless(on_cpu), strict=True):
        assert row == pytest.approx(expected, rel=1e-3)


def test_the_fused_kernels_train_as_aten_does(config, kernel_device):
    pytest.importorskip("triton")
    # Two steps; dropout stays on, since both draw the same numbers.
    config = runs.change(runs.change(config, "optim", batch_size=6, epochs=1), "run", device=str(kernel_device))
    few = dict(zip(("train", "val", "test"), map(runs.windows, (4, 2, 2), (0, 1, 2)), strict=True))

    def load(config):
        return dataclasses.replace(runs.dataset(), **few)

    on_aten = runs.train(runs.change(config, "run", backend="torch"), load=load)
    on_kernels = runs.train(runs.change(config, "run", backend="triton"), load=load)
    assert runs.summary_of(on_kernels)["environment"]["backend"] == "triton"
    for row, expected in zip(runs.rows(on_kernels), runs.rows(on_aten), strict=True):
        for name in ("tr_loss", "va_loss", "va_mpjpe"):
            assert row[name] == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--weights", "none.pt"], "none.pt is not a file"),
        (["--config", "none.yaml"], "none.yaml cannot be read"),
        (["--device", "nonsense"], "device: 'nonsense' cannot be used"),
        (["--device", "meta"], "device: expected auto, cpu or cuda, got 'meta'"),
    ],
)
def test_the_users_errors_end_with_2_and_a_sentence(config, refused, extra, message):
    refused(message, *runs.options(config), *extra)
    # Nothing is left of a run that did not begin.
    assert not config.run.out.exists()


@pytest.mark.parametrize("error", [NoWindowsError("no window"), FileNotFoundError("no index"), ValueError("line 3")])
def test_data_that_cannot_be_used_end_with_2(config, refused, error):
    def broken(config):
        raise error

    refused(f"bigru.train: {error}", *runs.options(config), load=broken)


@pytest.mark.parametrize(
    ("changes", "device", "asked"),
    [
        ({}, "meta", "--hidden 128 --batch 4 --steps 60 --precision fp32"),
        ({"amp": "bf16"}, "meta", "--hidden 128 --batch 4 --steps 60 --precision bf16"),
        ({"prove": False}, "meta", None),
        ({"backend": "triton"}, "meta", None),
        ({}, "cpu", None),
    ],
)
@pytest.mark.parametrize("fails", [False, True])
def test_a_gpu_without_a_proof_gets_one_first(config, changes, device, asked, fails, caplog):
    calls = []

    def prove(*arguments):
        calls.append(" ".join(arguments))
        if fails:
            raise RuntimeError("exit code 1")

    caplog.set_level(logging.INFO)
    config = runs.change(runs.change(config, "model", hidden_size=128), "run", **changes)
    prove_first(config, torch.empty(4, 60, 84, device=device), prove)
    assert calls == [asked] * (asked is not None)
    assert ("python -m bigru.prove` comes first (--no-prove leaves it out)" in caplog.text) == (asked is not None)
    assert ("ATen's GRU serves: exit code 1" in caplog.text) == (fails and asked is not None)
