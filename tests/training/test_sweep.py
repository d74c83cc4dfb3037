"""The sweep of modalities: five runs and one document, none of them trained twice."""

import json
import shutil
from pathlib import Path

import pytest
from training.runs import change

from bigru.config import ConfigError, DataConfig, RunConfig, TrainConfig
from bigru.data.synthetic import write_synthetic
from bigru.data.windows import NoWindowsError
from bigru.files import write_json
from bigru.report import figures
from bigru.train import main
from bigru.training import sweep
from bigru.training.run import Parts
from bigru.training.sweep import MODALITIES, find_run, sweep_modalities
from bigru.training.trainer import DivergedError, Trainer

SIZES = [84, 86, 204, 92, 214]


class Runs:
    """Stands for training and resuming: leaves what a run leaves, and fails as it is told."""

    def __init__(self, finished):
        self.began, self.resumed, self.failures, self.digest = [], [], {}, "a"
        self.finished = finished

    def finish(self, folder):
        for name in ("metrics.jsonl", "samples.npz", "summary.json"):
            shutil.copy(self.finished / name, folder)

    def train(self, config, parts):
        folder = config.run.out / f"20261123_22450{len(self.began)}"
        folder.mkdir(parents=True)
        self.began.append(config.data.input_size)
        write_json(folder / "config.json", config.as_dict())
        write_json(folder / "data.json", {"digest": self.digest})
        if error := self.failures.get(config.data.input_size):
            raise error
        self.finish(folder)
        return folder

    def resume(self, folder, *, parts):
        self.resumed.append(folder.name)
        self.finish(folder)
        return folder


@pytest.fixture
def config(tmp_path):
    return TrainConfig(DataConfig(data_root=tmp_path / "clips"), run=RunConfig(out=tmp_path / "runs"))


@pytest.fixture
def trainer(whole, monkeypatch):
    runs = Runs(whole)
    monkeypatch.setattr(sweep, "train", runs.train)
    monkeypatch.setattr(sweep, "resume", runs.resume)
    monkeypatch.setattr(sweep, "read_data_digest", lambda config, parts: runs.digest)
    return runs


def test_five_runs_none_of_them_twice_and_others_with_other_settings(config, trainer):
    assert sweep_modalities(config, Parts()) == config.run.out / "sweep_modalities"
    assert trainer.began == SIZES
    assert trainer.resumed == []
    sweep_modalities(config, Parts())
    assert trainer.began == SIZES
    # Reported again only.
    assert trainer.resumed == [f"20261123_22450{number}" for number in range(5)]
    sweep_modalities(change(config, "optim", epochs=3), Parts())
    assert trainer.began == SIZES * 2
    # Wherever the folder of the runs is.
    moved = config.run.out.with_name("elsewhere")
    config.run.out.rename(moved)
    sweep_modalities(change(config, "run", out=moved), Parts())
    assert trainer.began == SIZES * 2


def test_an_interrupted_sweep_goes_on(config, trainer):
    trainer.failures[204] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        sweep_modalities(config, Parts())
    assert trainer.began == SIZES[:3]
    sweep_modalities(config, Parts())
    assert trainer.began == SIZES
    assert trainer.resumed[2] == "20261123_224502"


@pytest.mark.parametrize("error", [DivergedError("the loss is nan"), NoWindowsError("no window")])
def test_a_run_that_fails_does_not_keep_the_others(config, error, trainer):
    trainer.failures[86] = error
    with pytest.raises(type(error), match=f"sweep: 1 of 5 runs failed: hands \\+ gaze: {error}"):
        sweep_modalities(config, Parts())
    assert trainer.began == SIZES


def test_runs_on_other_data_are_other_runs(config, trainer, monkeypatch, tmp_path):
    """Two folders with the same relative data root, and one folder of runs."""
    config = change(config, "data", data_root=Path("clips"))
    for name, digest, began in (("one", "a", 5), ("other", "b", 10), ("moved", "a", 10)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        trainer.digest = digest
        sweep_modalities(config, Parts())
        assert len(trainer.began) == began, name


def test_a_run_without_its_checkpoint_is_left_alone(config, trainer):
    trainer.failures[84] = DivergedError("the loss is nan")
    with pytest.raises(DivergedError):
        sweep_modalities(config, Parts())
    folder = config.run.out / "sweep_modalities" / "20261123_224500"
    (folder / "metrics.jsonl").write_text("{}\n")
    trainer.failures.clear()
    sweep_modalities(config, Parts())
    assert trainer.began == [*SIZES, 84]
    assert (folder / "metrics.jsonl").read_text() == "{}\n"


@pytest.mark.usefixtures("trainer")
def test_the_finished_run_of_several_is_found(config):
    out = config.run.out
    for name in ("20261123_000001", "20261123_000002", "20261123_000003"):
        (out / name).mkdir(parents=True)
        write_json(out / name / "config.json", config.as_dict())
    assert find_run(out, config, Parts()) == out / "20261123_000003"
    write_json(out / "20261123_000002" / "summary.json", {})
    assert find_run(out, config, Parts()) == out / "20261123_000002"
    for name, content in (("20261123_000002", "{"), ("20261123_000003", '{"data": {"speed": 3}}')):
        (out / name / "config.json").write_text(content)
    assert find_run(out, config, Parts()) == out / "20261123_000001"
    assert find_run(out / "nowhere", config, Parts()) is None


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("data", {"gaze": True, "surrogate": True}, "sweep: expected no gaze, surrogate beside it"),
        ("run", {"weights": Path("w.pt")}, "sweep: expected no weights, .* only, got w.pt"),
    ],
)
def test_what_only_one_run_could_have_is_refused(config, section, values, message):
    with pytest.raises(ConfigError, match=message):
        sweep_modalities(change(config, section, **values), Parts())
    assert not config.run.out.exists()


@pytest.mark.slow
def test_the_command_from_end_to_end(tmp_path, monkeypatch, capsys):
    """The real thing but for the pictures: interrupted in the third run, given again, one document of five."""
    monkeypatch.setattr(figures, "png", lambda figure: b"")
    root = tmp_path / "clips"
    write_synthetic(root, 40, 1)
    text = "--sweep modalities --observed 8 --predicted 8 --hidden-size 4 --stride 60 --epochs 1 --device cpu"
    command = [*text.split(), "--data-root", str(root), "--out", str(tmp_path / "runs")]
    begun = []

    class Noted(Trainer):
        def fit(self, folder):
            begun.append(self.config.data.input_size)
            if len(begun) == 3:
                raise KeyboardInterrupt
            super().fit(folder)

    assert main(command, Parts(trainer=Noted)) == 130
    printed, error = capsys.readouterr()
    assert printed.splitlines()[-1] == "run 3 of 5: hands + objects"
    assert "the same command goes on with the sweep" in error
    assert main(command, Parts(trainer=Noted)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in printed[6:11]] == list(MODALITIES)
    assert printed[11].endswith("results_bigru.md")
    # Neither of the first two is trained again.
    assert begun == [*SIZES[:3], *SIZES[2:]]
    folder = tmp_path / "runs" / "sweep_modalities"
    runs = sorted(path.parent for path in folder.glob("*/summary.json"))
    assert len(runs) == len(MODALITIES)
    document = (folder / "results_bigru.md").read_text()
    assert document.count("## Run at ") == 5
    table = document[document.index("## All runs in this folder") :]
    inputs = [line.split("|")[2].strip() for line in table.splitlines() if line.startswith("| `")]
    assert inputs == [*list(MODALITIES)[:4], "hands + gaze + objects + surrogate"]
    gaze = [json.loads((run / "config.json").read_text())["data"]["gaze"] for run in runs]
    assert gaze == [False, True, False, False, True]
