"""Runs that were killed, finished, moved, copied or damaged: what goes on, to the bit, and what is refused."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from training.runs import (
    assert_same,
    at_step,
    change,
    contents,
    dataset,
    killed,
    killed_run,
    main,
    resume,
    rows,
    stop_in,
    summary_of,
    timeless,
    train,
    windows,
)

from bigru.data.windows import Windows
from bigru.report.document import write_report
from bigru.report.record import read_run
from bigru.training.trainer import Trainer, learning_rate


@pytest.mark.parametrize(("epoch", "batch"), [(3, 3), (3, 1), (1, 2)], ids=["mid-epoch", "between", "first epoch"])
def test_a_killed_run_goes_on_to_the_bit(config, whole, epoch, batch):
    folder = killed_run(config, loss=stop_in(epoch, batch))
    assert (folder / "checkpoint.pt").exists() == (epoch > 1)
    assert not (folder / "summary.json").exists()
    assert len(rows(folder)) == epoch - 1
    torch.rand(17)
    assert resume(folder) == folder
    assert_same(folder, whole)
    ours, theirs = summary_of(folder), summary_of(whole)
    for name in ("test", "baselines", "best_epoch", "by_frame_rate", "total_params"):
        assert ours[name] == theirs[name], name
    assert ours["command"] == theirs["command"].replace(str(whole.parents[1]), str(folder.parents[1]))


class KilledAfterCheckpoint(Trainer):
    """Is killed when the checkpoint of epoch 3 is there, and neither its row nor its weights."""

    def save(self, folder):
        super().save(folder)
        if self.progress.epoch == 3:
            (folder / ".weights.safetensors.0123abcd.partial").write_bytes(b"torn")
            raise KeyboardInterrupt


def test_a_kill_between_the_files_of_an_epoch(config, whole):
    folder = killed_run(config, trainer=KilledAfterCheckpoint)
    assert len(rows(folder)) == 2
    resume(folder)
    assert_same(folder, whole)
    assert {file.name for file in folder.iterdir()} == {file.name for file in whole.iterdir()}


def test_no_resume_shortens_what_is_there(stopped, whole):
    """An older version wrote an epoch's row before its checkpoint: it stays until that epoch is trained again."""
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(rows(whole)[2]) + "\n")
    with pytest.raises(KeyboardInterrupt):
        resume(stopped, loss=at_step(1, killed))
    assert len(rows(stopped)) == 3
    assert timeless(resume(stopped)) == timeless(whole)


class KilledInTest(Windows):
    def batches(self, *_):
        raise KeyboardInterrupt


def test_a_kill_after_the_last_epoch(config, whole):
    def load(_):
        made = dataset()
        return dataclasses.replace(made, test=KilledInTest(**vars(made.test)))

    folder = killed_run(config, load=load)
    # A copy may be without it.
    (folder / "metrics.jsonl").unlink()
    # Weights of an epoch beyond the checkpoint, say.
    save_file({"other": torch.zeros(1)}, folder / "weights.safetensors")
    resume(folder)
    assert_same(folder, whole)
    assert summary_of(folder)["test"] == summary_of(whole)["test"]


def test_a_finished_run_is_only_reported_again(config, capsys):
    folder = train(config)
    before = contents(folder)
    reported = []
    report = lambda run: reported.append(run) or run / "document"  # noqa: E731
    assert main(["--resume", str(folder)], write_report=report, load=None) == 0
    assert reported == [folder]
    assert "has finished" in capsys.readouterr().err
    assert main(["--resume", str(folder), "--device", "cpu"], write_report=report, load=None) == 2
    assert "has finished, which device cannot change" in capsys.readouterr().err
    assert main(["--resume", str(folder), "--epochs", "6"], write_report=report) == 2
    assert "epochs: expected more than the 6 that" in capsys.readouterr().err
    assert contents(folder) == before


@pytest.mark.usefixtures("blank_pictures")
def test_a_finished_run_is_trained_on(config, capsys):
    # It would stop early after each epoch: patience begins anew.
    folder = train(change(config, "optim", patience=2, min_delta=100.0))
    first = timeless(folder)
    assert len(first) == 3
    argv = ["--resume", str(folder), "--epochs", "9"]
    assert main(argv, loss=at_step(3, killed)) == 130
    assert not (folder / "summary.json").exists()
    assert main(argv[:2], write_report=write_report) == 0
    summary = summary_of(folder)
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
    before = contents(stopped)
    assert main(["--resume", str(stopped)]) == 2
    error = capsys.readouterr().err
    assert "but no checkpoint.pt, without which it cannot go on" in error
    assert ("metrics.jsonl with 2 epochs" in error) == ("metrics.jsonl" not in gone)
    assert contents(stopped) == before


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


@pytest.mark.parametrize("typed", ["runs/latest", "latest", "link"])
def test_the_last_run_by_name_or_through_a_link(stopped, monkeypatch, tmp_path, typed):
    monkeypatch.chdir(tmp_path)
    (stopped.parent / "20200101_000000").mkdir()
    (stopped.parent / "20200101_000000" / "config.json").write_text("{}")
    if typed == "link":
        (tmp_path / "link").symlink_to(stopped)
    assert main(["--resume", typed]) == 0
    assert (stopped / "summary.json").is_file()


def test_a_copy_goes_on_as_a_run_of_its_own(stopped):
    copy = shutil.copytree(stopped, stopped.with_name(f"{stopped.name}_copy"))
    assert timeless(resume(copy)) == timeless(resume(stopped))
    assert summary_of(copy)["started"] == summary_of(stopped)["started"]
    assert read_run(copy).stamp == copy.name != read_run(stopped).stamp


@pytest.mark.parametrize(
    "name",
    ["20261399_999999", "20261123_224560", "20261123_2245", "20261123_224500-2", "20261123_224500 copy", "best_run"],
)
def test_a_run_with_another_name_is_refused_before_any_work(stopped, capsys, name):
    renamed = stopped.rename(stopped.with_name(name))
    assert main(["--resume", str(renamed)], load=lambda config: pytest.fail("read the data")) == 2
    error = capsys.readouterr().err
    assert f"a run's folder is named after its start, as 20250522_023917 or 20250522_023917_copy, got {name}\n" in error


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
