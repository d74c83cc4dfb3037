"""Runs that were killed, finished, moved, copied or damaged: what goes on, to the bit, and what is refused."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from training import runs

from bigru.data.windows import Windows
from bigru.report.document import write_report
from bigru.report.record import read_run
from bigru.training.trainer import Trainer, learning_rate


@pytest.mark.parametrize(("epoch", "batch"), [(3, 3), (3, 1), (1, 2)], ids=["mid-epoch", "between", "first epoch"])
def test_a_killed_run_goes_on_to_the_bit(config, whole, epoch, batch):
    folder = runs.killed_run(config, loss=runs.stop_in(epoch, batch))
    assert (folder / "checkpoint.pt").exists() == (epoch > 1)
    assert not (folder / "summary.json").exists()
    assert len(runs.rows(folder)) == epoch - 1
    torch.rand(17)
    assert runs.resume(folder) == folder
    runs.assert_same(folder, whole)
    ours, theirs = runs.summary_of(folder), runs.summary_of(whole)
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
    folder = runs.killed_run(config, trainer=KilledAfterCheckpoint)
    assert len(runs.rows(folder)) == 2
    runs.resume(folder)
    runs.assert_same(folder, whole)
    assert {file.name for file in folder.iterdir()} == {file.name for file in whole.iterdir()}


def test_no_resume_shortens_what_is_there(stopped, whole):
    """An older version wrote an epoch's row before its checkpoint: it stays until that epoch is trained again."""
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(runs.rows(whole)[2]) + "\n")
    with pytest.raises(KeyboardInterrupt):
        runs.resume(stopped, loss=runs.at_step(1, runs.killed))
    assert len(runs.rows(stopped)) == 3
    assert runs.timeless(runs.resume(stopped)) == runs.timeless(whole)


class KilledInTest(Windows):
    def batches(self, *_):
        raise KeyboardInterrupt


def test_a_kill_after_the_last_epoch(config, whole):
    def load(_):
        made = runs.dataset()
        return dataclasses.replace(made, test=KilledInTest(**vars(made.test)))

    folder = runs.killed_run(config, load=load)
    # A copy may be without it.
    (folder / "metrics.jsonl").unlink()
    # Weights of an epoch beyond the checkpoint, say.
    save_file({"other": torch.zeros(1)}, folder / "weights.safetensors")
    runs.resume(folder)
    runs.assert_same(folder, whole)
    assert runs.summary_of(folder)["test"] == runs.summary_of(whole)["test"]


def test_a_finished_run_is_only_reported_again(config, capsys, refused):
    folder = runs.train(config)
    before = runs.contents(folder)
    reported = []
    report = lambda run: reported.append(run) or run / "document"  # noqa: E731
    assert runs.main(["--resume", str(folder)], write_report=report, load=None) == 0
    assert reported == [folder]
    assert "has finished" in capsys.readouterr().err
    refused("has finished, which device cannot change", "--resume", str(folder), "--device", "cpu", load=None)
    refused("epochs: expected more than the 6 that", "--resume", str(folder), "--epochs", "6")
    assert reported == [folder]
    assert runs.contents(folder) == before


@pytest.mark.usefixtures("blank_pictures")
def test_a_finished_run_is_trained_on(config, capsys):
    # It would stop early after each epoch: patience begins anew.
    folder = runs.train(runs.change(config, "optim", patience=2, min_delta=100.0))
    first = runs.timeless(folder)
    assert len(first) == 3
    argv = ["--resume", str(folder), "--epochs", "9"]
    assert runs.main(argv, loss=runs.at_step(3, runs.killed)) == 130
    assert not (folder / "summary.json").exists()
    assert runs.main(argv[:2], write_report=write_report) == 0
    summary = runs.summary_of(folder)
    assert runs.timeless(folder)[:3] == first
    assert (len(runs.rows(folder)), summary["finished_before"]) == (5, [3])
    rate = learning_rate(4 * 5 - 1, 5, runs.change(config, "optim", epochs=9).optim)
    assert runs.rows(folder)[3]["lr"] == pytest.approx(rate)
    assert "after epoch 3, where it had finished by fewer epochs" in (config.run.out / "results_bigru.md").read_text()


def test_a_moved_run_goes_on_but_not_on_other_data(config, monkeypatch, tmp_path):
    folder = runs.killed_run(config, loss=runs.stop_in(2))
    moved = tmp_path / "elsewhere" / folder.name
    moved.parent.mkdir()
    folder.rename(moved)
    fewer = dataclasses.replace(runs.dataset(), train=runs.windows(6, 0))
    assert runs.main(["--resume", str(moved)], load=lambda config: fewer) == 2
    monkeypatch.chdir(moved)
    assert runs.main(["--resume", "."]) == 0
    assert (moved / "summary.json").is_file()
    assert not any(config.run.out.iterdir())


def digested(digest):
    return lambda config: dataclasses.replace(runs.dataset(), digest=digest, root=config.data_root)


def test_a_run_goes_on_with_data_of_the_same_content_only(config, tmp_path, refused):
    """As many windows as before, and other frames in them."""
    folder = runs.killed_run(config, loss=runs.stop_in(2), load=digested("a" * 64))
    recorded = json.loads((folder / "data.json").read_text())
    assert recorded["digest"] == "a" * 64
    refused("began with other data than", "--resume", str(folder), load=digested("b" * 64))
    # The same content elsewhere, which is found again by the next resume.
    other = tmp_path / "copied"
    argv = ["--resume", str(folder), "--data-root", str(other)]
    assert runs.main(argv, load=digested("a" * 64), loss=runs.killed) == 130
    assert json.loads((folder / "config.json").read_text())["data"]["data_root"] == str(other)
    # An older version recorded none.
    (folder / "data.json").unlink()
    assert runs.main(["--resume", str(folder)], load=digested("a" * 64)) == 0
    assert json.loads((folder / "data.json").read_text()) == recorded | {"root": str(other)}


def test_a_run_goes_on_with_more_epochs_elsewhere(stopped, refused):
    refused("epochs: expected at least 2", "--resume", str(stopped), "--epochs", "1")
    assert runs.main(["--resume", str(stopped), "--epochs", "7", "--device", "cpu"]) == 0
    assert len(runs.rows(stopped)) == 7
    assert json.loads((stopped / "config.json").read_text())["optim"]["epochs"] == 7


@pytest.mark.parametrize("gone", [["checkpoint.pt"], ["checkpoint.pt", "metrics.jsonl"], ["checkpoint.pt", "weights"]])
def test_a_run_without_its_checkpoint_is_left_as_it_is(stopped, refused, gone):
    for name in gone:
        (stopped / name.replace("weights", "weights.safetensors")).unlink()
    before = runs.contents(stopped)
    said = refused("but no checkpoint.pt, without which it cannot go on", "--resume", str(stopped))
    assert ("metrics.jsonl with 2 epochs" in said) == ("metrics.jsonl" not in gone)
    assert runs.contents(stopped) == before


def test_an_older_checkpoint_does_not_take_epochs_back(config, refused, tmp_path):
    folder = runs.killed_run(config, loss=runs.stop_in(2))
    older = shutil.copy(folder / "checkpoint.pt", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        runs.resume(folder, loss=runs.stop_in(3))
    shutil.copy(older, folder)
    before = runs.rows(folder)
    words = "holds 3 epochs in metrics.jsonl, but its checkpoint.pt is an older one, of epoch 1"
    refused(words, "--resume", str(folder))
    assert runs.rows(folder) == before


@pytest.mark.parametrize("typed", ["runs/latest", "latest", "link"])
def test_the_last_run_by_name_or_through_a_link(stopped, monkeypatch, tmp_path, typed):
    monkeypatch.chdir(tmp_path)
    (stopped.parent / "20200101_000000").mkdir()
    (stopped.parent / "20200101_000000" / "config.json").write_text("{}")
    if typed == "link":
        (tmp_path / "link").symlink_to(stopped)
    assert runs.main(["--resume", typed]) == 0
    assert (stopped / "summary.json").is_file()


def test_a_copy_goes_on_as_a_run_of_its_own(stopped):
    copy = shutil.copytree(stopped, stopped.with_name(f"{stopped.name}_copy"))
    assert runs.timeless(runs.resume(copy)) == runs.timeless(runs.resume(stopped))
    assert runs.summary_of(copy)["started"] == runs.summary_of(stopped)["started"]
    assert read_run(copy).stamp == copy.name != read_run(stopped).stamp


@pytest.mark.parametrize(
    "name",
    ["20261399_999999", "20261123_224560", "20261123_2245", "20261123_224500-2", "20261123_224500 copy", "best_run"],
)
def test_a_run_with_another_name_is_refused_before_any_work(stopped, refused, name):
    renamed = stopped.rename(stopped.with_name(name))
    words = f"a run's folder is named after its start, as 20250522_023917 or 20250522_023917_copy, got {name}\n"
    refused(words, "--resume", str(renamed), load=lambda config: pytest.fail("read the data"))


def test_a_folder_without_a_run_cannot_go_on(tmp_path, refused):
    folder = tmp_path / "20250522_023917"
    folder.mkdir()
    refused("holds no run", "--resume", str(folder))
    for content, words in (("{", "not JSON"), ('{"optim": {"speed": 3}}', "unknown setting optim.speed")):
        (folder / "config.json").write_text(content)
        refused(words, "--resume", str(folder))
