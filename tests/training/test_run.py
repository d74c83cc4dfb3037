"""The training command on a handful of made-up windows: learning, stopping, going on, and what it leaves behind."""

import dataclasses
import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from training.runs import (
    COLUMNS,
    FRAMES,
    at_step,
    change,
    dataset,
    killed,
    main,
    make_up,
    only_run,
    options,
    resume,
    rows,
    same_weights,
    timeless,
    train,
    windows,
)

from bigru.config import OptimConfig
from bigru.data.synthetic import write_synthetic
from bigru.data.windows import NoWindowsError, Windows
from bigru.model.forecaster import HandForecaster
from bigru.model.metrics import BASELINES, evaluate, masked_mse, mean_errors, score, score_joints, summarise
from bigru.report.document import write_report
from bigru.report.record import read_run
from bigru.training.trainer import Trainer, learning_rate


@pytest.fixture
def config(tmp_path):
    return make_up(tmp_path)


def stop_in(epoch, batch=3):
    """Returns a loss that ends training at a batch of an epoch, as a kill would."""
    return at_step((epoch - 1) * 5 + batch, killed)


def killed_run(config, *others, **parts):
    """Trains until a part raises KeyboardInterrupt; returns the run's folder."""
    with pytest.raises(KeyboardInterrupt):
        train(config, **parts)
    return only_run(config, *others)


def test_a_run_leaves_a_whole_folder(config):
    folder = train(config)
    names = "config.json data.json metrics.jsonl train.log skipped.tsv checkpoint.pt weights.safetensors"
    assert {file.name for file in folder.iterdir()} == {*names.split(), "summary.json", "samples.npz", "run.lock"}
    assert json.loads((folder / "config.json").read_text()) == config.as_dict()
    assert (folder / "skipped.tsv").read_text().splitlines() == [
        "stem\treason\tdetail",
        "p01-x\tshort\t3 frames, 8 needed in all",
        "p02-y\tmissing\tno file",
    ]
    assert [row["epoch"] for row in rows(folder)] == [1, 2, 3, 4, 5, 6]
    assert all(set(row) == COLUMNS for row in rows(folder))
    assert rows(folder)[-1]["tr_loss"] < 0.9 * rows(folder)[0]["tr_loss"]
    text = (folder / "train.log").read_text()
    assert "epoch   6/6" in text
    assert "constant velocity" in text
    assert "CPU (" in text


def test_the_summary_is_what_the_best_weights_do(config):
    # So fast that validation gets worse again.
    config = change(config, "optim", lr=0.3, min_lr=0.3)
    folder = train(config)
    summary = json.loads((folder / "summary.json").read_text())
    model = HandForecaster(hidden_size=8)
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    data, history = dataset(), rows(folder)
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
    names = "device backend precision python torch triton numpy bigru platform"
    assert set(summary["environment"]) == set(names.split())
    assert (summary["format"], summary["stopped_early"]) == (2, False)
    assert list(summary["horizon"]) == ["this network", *BASELINES]
    joints = score_joints(model.eval(), data.test.batches(5))
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


def test_samples_are_best_median_bad_and_worst(config):
    folder = train(config)
    with np.load(folder / "samples.npz", allow_pickle=False) as stored:
        samples = dict(stored)
    model = HandForecaster(hidden_size=8)
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    test = dataset().test
    errors = [summarise(evaluate(model, [test.batch(torch.tensor([number]))])).joint_error_px for number in range(12)]
    order = np.argsort(errors)[[0, round(0.5 * 11), round(0.95 * 11), 11]]
    assert list(samples["label"]) == ["best", "median", "95th percentile", "worst"]
    assert samples["error_px"] == pytest.approx(np.array(errors)[order], rel=1e-6)
    batch = test.batch(torch.from_numpy(order))
    np.testing.assert_array_equal(samples["observed"], batch.x)
    np.testing.assert_array_equal(samples["target"], batch.target)
    np.testing.assert_allclose(samples["predicted"], model.eval()(batch.x).detach(), atol=1e-6)
    for place, number in enumerate(order):
        start = int(test.starts[number])
        np.testing.assert_array_equal(samples["observed_present"][place], test.present[start : start + FRAMES])
        np.testing.assert_array_equal(
            samples["target_present"][place], test.present[start + FRAMES : start + 2 * FRAMES]
        )
        assert samples["stem"][place] == test.stems[test.clip[number]]
        assert samples["fps"][place] == test.fps[number]


def test_two_runs_are_the_same_to_the_bit(config):
    one = train(config)
    torch.rand(17)
    other = train(config)
    assert one != other
    assert timeless(one) == timeless(other)
    assert same_weights(one, other)
    third = train(change(config, "run", seed=43))
    assert not same_weights(one, third)


@pytest.mark.parametrize(("epoch", "batch"), [(3, 3), (3, 1), (1, 2)], ids=["mid-epoch", "between", "first epoch"])
def test_a_killed_run_goes_on_to_the_bit(config, epoch, batch):
    whole = train(config)
    folder = killed_run(config, whole, loss=stop_in(epoch, batch))
    assert not (folder / "summary.json").exists()
    assert len(rows(folder)) == epoch - 1
    torch.rand(17)
    assert resume(folder) == folder
    assert timeless(folder) == timeless(whole)
    assert same_weights(folder, whole)
    ours, theirs = (json.loads((run / "summary.json").read_text()) for run in (folder, whole))
    for name in ("test", "baselines", "best_epoch", "by_frame_rate", "total_params", "command"):
        assert ours[name] == theirs[name], name


class KilledAfterCheckpoint(Trainer):
    """Is killed when the checkpoint of epoch 3 is there, and neither its row nor its weights."""

    def save(self, folder):
        super().save(folder)
        if self.progress.epoch == 3:
            (folder / ".weights.safetensors.0123abcd.partial").write_bytes(b"torn")
            raise KeyboardInterrupt


def test_a_kill_between_the_files_of_an_epoch(config):
    whole = train(config)
    folder = killed_run(config, whole, trainer=KilledAfterCheckpoint)
    assert len(rows(folder)) == 2
    resume(folder)
    assert timeless(folder) == timeless(whole)
    assert same_weights(folder, whole)
    assert {file.name for file in folder.iterdir()} == {file.name for file in whole.iterdir()}


def test_no_resume_shortens_what_is_there(config):
    """An older version wrote an epoch's row before its checkpoint: it stays until that epoch is trained again."""
    whole = train(config)
    folder = killed_run(config, whole, loss=stop_in(3))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(rows(whole)[2]) + "\n")
    with pytest.raises(KeyboardInterrupt):
        resume(folder, loss=at_step(1, killed))
    assert len(rows(folder)) == 3
    assert timeless(resume(folder)) == timeless(whole)


class KilledInTest(Windows):
    def batches(self, *_):
        raise KeyboardInterrupt


def test_a_kill_after_the_last_epoch(config):
    def load(_):
        made = dataset()
        return dataclasses.replace(made, test=KilledInTest(**vars(made.test)))

    whole = train(config)
    folder = killed_run(config, whole, load=load)
    # A copy may be without it.
    (folder / "metrics.jsonl").unlink()
    # Weights of an epoch beyond the checkpoint, say.
    save_file({"other": torch.zeros(1)}, folder / "weights.safetensors")
    resume(folder)
    assert timeless(folder) == timeless(whole)
    assert same_weights(folder, whole)
    assert (
        json.loads((folder / "summary.json").read_text())["test"]
        == json.loads((whole / "summary.json").read_text())["test"]
    )


def test_a_finished_run_is_only_reported_again(config, capsys):
    folder = train(config)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    reported = []
    report = lambda run: reported.append(run) or run / "document"  # noqa: E731
    assert main(["--resume", str(folder)], write_report=report, load=None) == 0
    assert reported == [folder]
    assert "has finished" in capsys.readouterr().err
    assert main(["--resume", str(folder), "--device", "cpu"], write_report=report, load=None) == 2
    assert "has finished, which device cannot change" in capsys.readouterr().err
    assert main(["--resume", str(folder), "--epochs", "6"], write_report=report) == 2
    assert "epochs: expected more than the 6 that" in capsys.readouterr().err
    after = {file: file.read_bytes() for file in folder.iterdir() if file.name != "run.lock"}
    assert after == {file: content for file, content in before.items() if file.name != "run.lock"}


def test_a_finished_run_is_trained_on(config, capsys):
    # It would stop early after each epoch: patience begins anew.
    folder = train(change(config, "optim", patience=2, min_delta=100.0))
    first = timeless(folder)
    assert len(first) == 3
    argv = ["--resume", str(folder), "--epochs", "9"]
    assert main(argv, loss=at_step(3, killed)) == 130
    assert not (folder / "summary.json").exists()
    assert main(argv[:2], write_report=write_report) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert timeless(folder)[:3] == first
    assert (len(rows(folder)), summary["finished_before"]) == (5, [3])
    assert rows(folder)[3]["lr"] == pytest.approx(learning_rate(4 * 5 - 1, 5, change(config, "optim", epochs=9).optim))
    assert "after epoch 3, where it had finished by fewer epochs" in (config.run.out / "results_bigru.md").read_text()


def test_a_moved_run_goes_on_but_not_on_other_data(config, monkeypatch, tmp_path):
    folder = killed_run(config, loss=stop_in(2))
    moved = tmp_path / "elsewhere" / folder.name
    moved.parent.mkdir()
    folder.rename(moved)
    fewer = dataclasses.replace(dataset(), train=windows(6, 0))
    assert main(["--resume", str(moved)], load=lambda config: fewer) == 2
    monkeypatch.chdir(moved)
    assert main(["--resume", "."]) == 0
    assert (moved / "summary.json").is_file()
    assert not any(config.run.out.iterdir())


@pytest.fixture
def stopped(config):
    """A run of six epochs that was killed in its third."""
    return killed_run(config, loss=stop_in(3))


def digested(digest):
    return lambda config: dataclasses.replace(dataset(), digest=digest, root=config.data_root)


def test_a_run_goes_on_with_data_of_the_same_content_only(config, tmp_path, capsys):
    """As many windows as before, and other frames in them."""
    folder = killed_run(config, loss=stop_in(2), load=digested("a" * 64))
    recorded = json.loads((folder / "data.json").read_text())
    assert recorded["digest"] == "a" * 64
    assert main(["--resume", str(folder)], load=digested("b" * 64)) == 2
    assert "began with other data than" in capsys.readouterr().err
    # The same content elsewhere, which is found again by the next resume.
    other = tmp_path / "copied"
    assert main(["--resume", str(folder), "--data-root", str(other)], load=digested("a" * 64), loss=killed) == 130
    assert json.loads((folder / "config.json").read_text())["data"]["data_root"] == str(other)
    # An older version recorded none.
    (folder / "data.json").unlink()
    assert main(["--resume", str(folder)], load=digested("a" * 64)) == 0
    assert json.loads((folder / "data.json").read_text()) == recorded | {"root": str(other)}


def test_a_relative_data_root_is_found_from_any_folder(config, monkeypatch, tmp_path):
    (tmp_path / "clips").mkdir()
    monkeypatch.chdir(tmp_path)
    folder = killed_run(change(config, "data", data_root=Path("clips")), loss=stop_in(2))
    assert json.loads((folder / "config.json").read_text())["data"]["data_root"] == str(tmp_path / "clips")


def test_a_run_goes_on_with_more_epochs_elsewhere(stopped, capsys):
    assert main(["--resume", str(stopped), "--epochs", "1"]) == 2
    assert "epochs: expected at least 2" in capsys.readouterr().err
    assert main(["--resume", str(stopped), "--epochs", "7", "--device", "cpu"]) == 0
    assert len(rows(stopped)) == 7
    assert json.loads((stopped / "config.json").read_text())["optim"]["epochs"] == 7


@pytest.mark.parametrize("gone", [["checkpoint.pt"], ["checkpoint.pt", "metrics.jsonl"], ["checkpoint.pt", "weights"]])
def test_a_run_without_its_checkpoint_is_left_as_it_is(stopped, capsys, gone):
    for name in gone:
        (stopped / name.replace("weights", "weights.safetensors")).unlink()
    before = {file: file.read_bytes() for file in stopped.iterdir()}
    assert main(["--resume", str(stopped)]) == 2
    error = capsys.readouterr().err
    assert "but no checkpoint.pt, without which it cannot go on" in error
    assert ("metrics.jsonl with 2 epochs" in error) == ("metrics.jsonl" not in gone)
    assert {file: file.read_bytes() for file in stopped.iterdir()} == before


def test_an_older_checkpoint_does_not_take_epochs_back(config, capsys, tmp_path):
    folder = killed_run(config, loss=stop_in(2))
    older = shutil.copy(folder / "checkpoint.pt", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        resume(folder, loss=stop_in(3))
    shutil.copy(older, folder)
    before = rows(folder)
    assert main(["--resume", str(folder)]) == 2
    assert (
        "holds 3 epochs in metrics.jsonl, but its checkpoint.pt is an older one, of epoch 1" in capsys.readouterr().err
    )
    assert rows(folder) == before


def test_a_run_that_never_finished_an_epoch_begins_again(config):
    whole = train(config)
    folder = killed_run(config, whole, loss=stop_in(1))
    assert not (folder / "checkpoint.pt").exists()
    assert timeless(resume(folder)) == timeless(whole)


@pytest.mark.parametrize("typed", ["runs/latest", "latest", "link"])
def test_the_last_run_by_name_or_through_a_link(stopped, monkeypatch, tmp_path, typed):
    monkeypatch.chdir(tmp_path)
    (stopped.parent / "20200101_000000").mkdir()
    (stopped.parent / "20200101_000000" / "config.json").write_text("{}")
    if typed == "link":
        (tmp_path / "link").symlink_to(stopped)
    assert main(["--resume", typed]) == 0
    assert (stopped / "summary.json").is_file()


def test_a_copy_goes_on_as_a_run_of_its_own(config):
    folder = killed_run(config, loss=stop_in(2))
    copy = shutil.copytree(folder, folder.with_name(f"{folder.name}_copy"))
    assert timeless(resume(copy)) == timeless(resume(folder))
    ours, theirs = (json.loads((run / "summary.json").read_text()) for run in (copy, folder))
    assert ours["started"] == theirs["started"]
    assert read_run(copy).stamp == copy.name != read_run(folder).stamp


@pytest.mark.parametrize(
    "name",
    ["20261399_999999", "20261123_224560", "20261123_2245", "20261123_224500-2", "20261123_224500 copy", "best_run"],
)
def test_a_run_with_another_name_is_refused_before_any_work(stopped, capsys, name):
    renamed = stopped.rename(stopped.with_name(name))
    assert main(["--resume", str(renamed)], load=lambda config: pytest.fail("read the data")) == 2
    error = capsys.readouterr().err
    assert f"a run's folder is named after its start, as 20250522_023917 or 20250522_023917_copy, got {name}\n" in error


def test_runs_of_one_second_get_folders_of_their_own(config):
    config = change(config, "optim", epochs=1)
    assert len({train(config) for _ in range(3)}) == 3


def test_training_stops_when_validation_stalls(config):
    config = change(config, "optim", epochs=50, patience=3, min_delta=0.05, lr=0.05)
    folder = train(config)
    history, summary = rows(folder), json.loads((folder / "summary.json").read_text())
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


def test_what_a_run_says_fits_a_terminal_and_its_log_tells_the_time_left(config, capsys):
    main(
        [*options(config), "--epochs", "2", "--warmup-epochs", "3", "--amp", "bf16", "--threads", "1"],
        write_report=write_report,
    )
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

    folder = train(config, trainer=Noted)
    assert used == [learning_rate(step, 5, config.optim) for step in range(30)]
    assert [row["lr"] for row in rows(folder)] == used[4::5]


def test_every_epoch_sees_other_windows_first_and_validation_sees_all(config):
    orders = []

    class Recorded(Windows):
        def batch(self, indices):
            orders.append((len(self), indices.tolist()))
            return super().batch(indices)

    def load(_):
        made = dataset()
        return dataclasses.replace(made, train=Recorded(**vars(made.train)), val=Recorded(**vars(made.val)))

    train(change(config, "optim", epochs=2), load=load)
    # The first batch is looked at before training, for the backend.
    seen = [indices for count, indices in orders if count == 21][1:]
    assert [len(indices) for indices in seen] == [4] * 10
    one, other = (list(itertools.chain(*seen[start : start + 5])) for start in (0, 5))
    assert one != other
    assert len(set(one)) == len(set(other)) == 20
    validation = [indices for count, indices in orders if count == 9]
    assert validation == [[0, 1, 2, 3], [4, 5, 6, 7], [8]] * 2


def test_fewer_windows_than_a_batch_holds(config):
    folder = train(change(config, "optim", batch_size=64))
    assert len(rows(folder)) == 6


def test_missing_hands_are_learnt_only_without_the_mask(config):
    seen = []

    def loss(*arguments):
        seen.append(arguments[2])
        return masked_mse(*arguments)

    train(change(config, "optim", epochs=1), loss=loss)
    assert all(mask.shape == (4, FRAMES, 42) and not mask.all() for mask in seen)
    seen.clear()
    train(change(change(config, "optim", epochs=1), "data", mask_missing=False), loss=loss)
    assert seen == [None] * 5


@pytest.mark.parametrize("mask", [True, False], ids=["masked", "unmasked"])
def test_missing_hands_are_scored_only_without_the_mask(config, mask):
    folder = train(change(change(config, "optim", epochs=1), "data", mask_missing=mask))
    model = HandForecaster(hidden_size=8)
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    data, (row,) = dataset(), rows(folder)
    summary = json.loads((folder / "summary.json").read_text())
    validation = {name: row[f"va_{name}"] for name in ("loss", "joint_error", "joint_error_px")}
    written = [(data.val, model.eval(), validation), (data.test, model, summary["test"])]
    written += [(data.test, BASELINES[name], scores) for name, scores in summary["baselines"].items()]
    for split, predict, scores in written:
        expected, other = (
            dataclasses.asdict(summarise(score(predict, split.batches(5), masked))) for masked in (mask, not mask)
        )
        assert scores == pytest.approx({name: expected[name] for name in scores}, rel=1e-5)
        assert scores["joint_error"] != pytest.approx(other["joint_error"], rel=1e-3)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_run_starts_from_given_weights(config, tmp_path, suffix):
    torch.manual_seed(5)
    model, path = HandForecaster(hidden_size=8), tmp_path / f"start.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(model.state_dict(), path)
    # A rate so small that the weights stay where they were.
    config = change(change(config, "run", weights=path), "optim", epochs=1, lr=1e-12, min_lr=0.0)
    trained = load_file(train(config) / "weights.safetensors")
    assert all(torch.allclose(trained[name], value, atol=1e-9) for name, value in model.state_dict().items())


def test_the_optimiser_is_the_published_one(config, tmp_path):
    folder = train(change(config, "optim", epochs=1, weight_decay=0.25))
    (group,) = torch.load(folder / "checkpoint.pt", weights_only=True)["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.25, (0.9, 0.999), 1e-8)
    # A gradient clipped to far below AdamW's eps moves nothing.
    torch.manual_seed(5)
    model, path = HandForecaster(hidden_size=8), tmp_path / "start.pt"
    torch.save(model.state_dict(), path)
    config = change(change(config, "run", weights=path), "optim", epochs=1, weight_decay=0.0, grad_clip=1e-14)
    trained = load_file(train(config) / "weights.safetensors")
    assert all(torch.allclose(trained[name], value, atol=1e-6) for name, value in model.state_dict().items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_on_a_gpu_learns_as_on_the_cpu(config):
    on_cpu = train(change(config, "model", dropout=0.0))
    on_gpu = train(change(change(config, "run", device="cuda"), "model", dropout=0.0))
    for row, expected in zip(timeless(on_gpu), timeless(on_cpu), strict=True):
        assert row == pytest.approx(expected, rel=1e-3)


def test_the_fused_kernels_train_as_aten_does(config, kernel_device):
    pytest.importorskip("triton")
    # Two steps of one batch each; dropout stays on, since both draw the same numbers.
    config = change(change(config, "optim", batch_size=12, epochs=2), "run", device=str(kernel_device))
    on_aten = train(change(config, "run", backend="torch"))
    on_kernels = train(change(config, "run", backend="triton"))
    assert len(rows(on_kernels)) == 2
    assert json.loads((on_kernels / "summary.json").read_text())["environment"]["backend"] == "triton"
    for row, expected in zip(rows(on_kernels), rows(on_aten), strict=True):
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
def test_the_users_errors_end_with_2_and_a_sentence(config, capsys, extra, message):
    assert main([*options(config), *extra]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    # Nothing is left of a run that did not begin.
    assert not config.run.out.exists()


@pytest.mark.parametrize("error", [NoWindowsError("no window"), FileNotFoundError("no index"), ValueError("line 3")])
def test_data_that_cannot_be_used_end_with_2(config, capsys, error):
    def broken(config):
        raise error

    assert main(options(config), load=broken) == 2
    assert f"bigru.train: {error}" in capsys.readouterr().err


def test_a_folder_without_a_run_cannot_go_on(tmp_path, capsys):
    assert main(["--resume", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert main(["--resume", str(tmp_path)]) == 2
    assert "named after its start" in capsys.readouterr().err
    folder = tmp_path / "20250522_023917"
    folder.mkdir()
    (folder / "config.json").write_text("{")
    assert main(["--resume", str(folder)]) == 2
    assert "not JSON" in capsys.readouterr().err
    (folder / "config.json").write_text('{"optim": {"speed": 3}}')
    assert main(["--resume", str(folder)]) == 2
    assert "unknown setting optim.speed" in capsys.readouterr().err


def test_an_interrupted_run_says_how_to_go_on(config, capsys):
    assert main(options(config), loss=stop_in(1)) == 130
    assert f"--resume {only_run(config)}" in capsys.readouterr().err


def test_log_handlers_are_not_left_behind(config):
    train(config)
    main(["--resume", "none"])
    assert logging.getLogger("bigru.train").handlers == []


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_the_command_from_end_to_end(tmp_path):
    """The real thing, in a process of its own: interrupted, resumed, and documented."""
    root = tmp_path / "clips"
    write_synthetic(root, 60, 1)
    command = [sys.executable, "-m", "bigru.train"]
    text = "--observed 8 --predicted 8 --hidden-size 8 --stride 12 --epochs 100000 --patience 100000"
    arguments = [*text.split(), "--data-root", str(root), "--out", str(tmp_path / "runs")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # Where the tests run in the background of a script, SIGINT is ignored, and a child would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True, env=environment)
    signal.signal(signal.SIGINT, before)
    try:
        for line in process.stderr:
            if line.startswith("epoch   2/"):
                break
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert "KeyboardInterrupt" not in rest
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"--resume {folder}" in rest
    done = len(rows(folder))
    enough = ["--resume", str(folder), "--epochs", str(done + 2)]
    result = subprocess.run([*command, *enough], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert len(rows(folder)) in (done + 1, done + 2)
    document = (tmp_path / "runs" / "results_bigru.md").read_text()
    assert "BIGRU" in document
    assert str(tmp_path / "runs" / "results_bigru.md") in result.stderr
