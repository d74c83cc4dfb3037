"""Settings from YAML, ours and the reference trainer's, from the command line, and out as JSON."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

from bigru.arguments import Arguments, command_line, parse_arguments, read_yaml
from bigru.config import ConfigError, DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, from_mapping

REFERENCE = """
defaults: &defaults
  epochs: 100
  batch_size: 32
  dropout: 0.3
  grad_clip: 0.5
  optim: AdamW
  wd: 2e-5
  loss:
    pose: 1.0
    intent: 0
  scheduler:
    name: cosine
    warmup_epochs: 7
    min_lr: 1e-6
  early_stopping:
    patience: 11
    min_delta: 2e-3
  seed: 7
  class_weights: false
  data:
    csv_path: data/index.csv
    h5_dir: data/clips
    obs_len: 30
    pred_len: 30
    stride: 5
    include_gaze: true
    include_obj_bbox: true
    include_surrogate_bbox: false
    obj_box_dim: 120
    sur_box_dim: 8

bilstm:
  <<: *defaults
  arch: bilstm
  lr: 5e-4

bigru:
  <<: *defaults
  arch: bigru
  lr: 2e-3
"""


def write(tmp_path, text):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return path


def test_the_defaults_are_the_published_protocol():
    assert parse_arguments([]).settings == TrainConfig()
    assert TrainConfig().optim == OptimConfig(64, 120, 1e-3, 1e-5, 1.0, 5, 1e-5, 20, 0.001)
    assert TrainConfig().model == ModelConfig(128, 2, 0.2)
    data = TrainConfig().data
    assert (data.observed, data.predicted, data.stride, data.input_size) == (60, 60, 15, 84)


def test_reference_yaml(tmp_path):
    assert read_yaml(write(tmp_path, REFERENCE)) == TrainConfig(
        DataConfig(Path("data/clips"), Path("data/index.csv"), 30, 30, 5, gaze=True, objects=True),
        ModelConfig(dropout=0.3),
        OptimConfig(32, 100, 2e-3, 2e-5, 0.5, 7, 1e-6, 11, 2e-3),
        RunConfig(seed=7),
    )


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("lr: 5e-4\nobserved: 10\npredicted: '10'\nout: x\nhidden_size: 16.0\ngaze: true", id="flat"),
        pytest.param(
            "{optim: {lr: 5e-4}, data: {observed: 10, predicted: 10, gaze: true}, run: {out: x}, "
            "model: {hidden_size: 16}}",
            id="in sections",
        ),
        pytest.param(
            "bigru: {lr: 0.0005, data: {obs_len: 10, predicted: 10, include_gaze: yes}, out: x, hidden_size: 16}",
            id="mixed",
        ),
    ],
)
def test_our_names(tmp_path, text):
    config = read_yaml(write(tmp_path, text))
    assert config == TrainConfig(
        DataConfig(observed=10, predicted=10, gaze=True),
        ModelConfig(16),
        OptimConfig(lr=5e-4),
        RunConfig(out=Path("x")),
    )
    assert type(config.model.hidden_size) is int


def test_an_empty_file_changes_nothing(tmp_path):
    assert read_yaml(write(tmp_path, "# nothing\n")) == TrainConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", r"settings\.yaml: unknown setting learning_rat"),
        ("epoch: 1", r"unknown setting epoch; did you mean epochs"),
        ("data: {obs_length: 3}", r"unknown setting data\.obs_length; did you mean data\.obs_len"),
        ("data: {lr: 1}", r"unknown setting data\.lr"),
        ("model: {gru: {hidden_size: 3}}", r"unknown setting model\.gru"),
        ("1: 2", "unknown setting 1"),
        ("arch: bilstm", "arch: expected 'bigru', the only choice there is, got 'bilstm'"),
        ("optim: sgd", "optim: expected 'adamw'"),
        ("scheduler: {name: step}", r"scheduler\.name: expected 'cosine'"),
        ("data: {obj_box_dim: 60}", r"data\.obj_box_dim: expected 120"),
        ("class_weights: true", "class_weights: expected False"),
        ("loss: {pose: 1, intent: 0.5}", r"loss\.intent: the forecaster has the pose loss only; expected 0, got 0\.5"),
        ("loss: {pose: 2}", r"loss\.pose: expected 1\.0"),
        ("wd: 1e-5\nweight_decay: 1e-5", "weight_decay is given twice"),
        ("epochs: 2.5", "epochs: expected a whole number, got 2.5"),
        ("epochs: true", "epochs: expected a whole number, got True"),
        ("epochs: [3]", "epochs: expected a whole number"),
        ("epochs: .inf", "epochs: expected a whole number, got inf"),
        ("lr: fast", "lr: expected a number, got 'fast'"),
        ("lr: null", "lr: expected a number, got None"),
        ("gaze: 1", "gaze: expected true or false, got 1"),
        ("split: random", "split: expected one of 'participant', 'time', got 'random'"),
        ("data_root: 3", "data_root: expected a path, got 3"),
        ("device: 3", "device: expected text, got 3"),
        ("lr: -1", r"settings\.yaml: lr: expected a finite number above 0, got -1\.0"),
        ("[1, 2]", "expected a mapping of settings, got list"),
        ("bigru: 3", "expected a mapping of settings, got 3"),
        (
            "bigru: {lr: 1e-3}\nepochs: 3\nbilstm: {lr: 1}",
            r"settings\.yaml: epochs beside bigru: settings belong in it",
        ),
        ("speed: 3\n7: x\nbigru: {lr: 1e-3}", "speed, 7 beside bigru"),
        ("optim: {lr: 1e-3}\nbigru: {epochs: 3}", "optim beside bigru"),
        ("scheduler: {min_lr: 0}\nbigru: {epochs: 3}", "scheduler beside bigru"),
        pytest.param("lr: " + "[" * 1200, "is not YAML", id="deep"),
        ("learning_rate: 1", "unknown setting learning_rate; did you mean lr?"),
        ("data: {fps: 23}", r"unknown setting data\.fps; did you mean resample?"),
        ("optim: {lr: 1}\nrun: {seed: 1}\noptim: {epochs: 3}", r"yaml, line 3: optim is given twice, first in line 1"),
        ("optim:\n  lr: 1\n  lr: 2", r"yaml, line 3: optim\.lr is given twice, first in line 2"),
        ("bigru: {a: &x {lr: 1, lr: 2}, optim: *x}", r"yaml, line 1: bigru\.a\.lr is given twice, first in line 1"),
        ("optim:\n  lr: !!float 1,5", r"yaml, line 2: optim\.lr: '1,5' is no float; in quotes it is text"),
        ("epochs: 3\nseed: !!int 1e3", r"yaml, line 2: seed: '1e3' is no int"),
        ("out: 2025-02-30", r"yaml, line 1: out: '2025-02-30' is no timestamp; in quotes it is text"),
        ("out: 2025-02-28", r"out: expected a path, got datetime\.date\(2025, 2, 28\); in quotes it is text"),
        pytest.param("epochs: " + "1" * 5000, r"yaml, line 1: epochs: '1{20,40}\.\.\.1+' is no int", id="5000 digits"),
        pytest.param(
            "epochs: '" + "1" * 5000 + "'", r"epochs: expected a whole number, got '1+\.\.\.1+'$", id="as text"
        ),
        ("epochs: !!int ''", "epochs: '' is no int"),
        ("gaze: !!bool maybe", "gaze: 'maybe' is no bool"),
        ("out: !!timestamp now", "out: 'now' is no timestamp"),
        ("[epochs]: 3", "is not YAML"),
        ("a: [", "is not YAML"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_a_bad_file_is_named_with_its_key(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_yaml(write(tmp_path, text))


def test_a_key_may_stand_beside_a_merged_one(tmp_path):
    text = "a: &a {lr: 1e-3, wd: 1}\nb: &b {<<: *a, wd: 0}\nbigru: {optim: {<<: *a, <<: *b, lr: 2e-3}}"
    assert read_yaml(write(tmp_path, text.replace("wd", "weight_decay"))).optim.lr == 2e-3


def test_aliases_that_grow_without_end_are_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 8)}]" for n in range(30)]
    with pytest.raises(ConfigError, match=r"epochs: expected a whole number, got \[\[") as caught:
        read_yaml(write(tmp_path, "\n  ".join(["other:", *lines]) + "\nbigru: {epochs: *a30}"))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["data_root", "index", "cache", "out", "weights"])
def test_home_folder_in_every_path(tmp_path, monkeypatch, name):
    """On the command line, where a shell leaves --out=~/x as it is, and in YAML alike."""
    monkeypatch.setenv("HOME", str(tmp_path))
    flag = f"--{name.replace('_', '-')}"
    given = parse_arguments([f"{flag}=~/x y"]).settings
    section = given.run if name in ("out", "weights") else given.data
    assert getattr(section, name) == tmp_path / "x y"
    assert read_yaml(write(tmp_path, f"{name}: ~/x y")) == given
    assert from_mapping({name: "~no-such-user/x"}, "x") == parse_arguments([flag, "~no-such-user/x"]).settings


def test_home_folder_of_the_files_that_the_command_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "epochs: 7")
    assert parse_arguments(["--config=~/settings.yaml"]).settings.optim.epochs == 7
    assert parse_arguments(["--resume=~/run"]).resume == tmp_path / "run"


def test_an_ignored_loss_is_said(tmp_path, caplog):
    read_yaml(write(tmp_path, "loss: {pose: 1.0, intent: 0.0}"))
    assert "loss.intent is ignored" in caplog.text


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read: No such file or directory$"):
        parse_arguments(["--config", str(tmp_path / "none.yaml")])
    (tmp_path / "settings.yaml").write_text("lr: 1", encoding="utf-16")
    with pytest.raises(ConfigError, match=r"settings\.yaml cannot be read: it is not UTF-8"):
        read_yaml(tmp_path / "settings.yaml")


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (DataConfig, {"observed": 0, "predicted": 0}, "observed: expected at least 1, got 0"),
        (DataConfig, {"observed": 10}, "predicted: expected 10 as in observed .* got 60; set both"),
        (DataConfig, {"predicted": -1}, "predicted: expected at least 1, got -1"),
        (DataConfig, {"resample": 1001}, "resample: expected 1 to 1000"),
        (DataConfig, {"stride": 0}, "stride: expected at least 1"),
        (DataConfig, {"resample": 0.5}, "resample: expected 1 to 1000 frames per second, got 0.5"),
        (DataConfig, {"resample": float("nan")}, "resample: expected 1 to 1000"),
        (DataConfig, {"centre": "middle"}, "centre: expected frame or last, got 'middle'"),
        (ModelConfig, {"hidden_size": 0}, "hidden_size: expected at least 1"),
        (ModelConfig, {"num_layers": 0}, "num_layers: expected at least 1"),
        (ModelConfig, {"dropout": 1.0}, "dropout: expected at least 0 and less than 1"),
        (OptimConfig, {"batch_size": 0}, "batch_size: expected at least 1"),
        (OptimConfig, {"epochs": 0}, "epochs: expected at least 1"),
        (OptimConfig, {"patience": 0}, "patience: expected at least 1"),
        (OptimConfig, {"lr": 0.0}, "lr: expected a finite number above 0"),
        (OptimConfig, {"lr": float("nan")}, "lr: expected a finite number above 0"),
        (OptimConfig, {"grad_clip": float("inf")}, "grad_clip: expected a finite number above 0"),
        (OptimConfig, {"weight_decay": -1e-5}, "weight_decay: expected at least 0"),
        (OptimConfig, {"min_delta": float("nan")}, "min_delta: expected at least 0"),
        (OptimConfig, {"min_lr": 0.1}, r"min_lr: expected at most lr \(0\.001\), got 0\.1"),
        (RunConfig, {"seed": -1}, "seed: expected 0 to"),
    ],
)
def test_values_are_checked(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        kind(**settings)


def test_options_override_the_file(tmp_path):
    path = write(tmp_path, REFERENCE)
    settings = parse_arguments(["--config", str(path), "--lr", "3e-3", "--no-gaze", "--out", "there"]).settings
    base = read_yaml(path)
    assert settings == TrainConfig(
        dataclasses.replace(base.data, gaze=False),
        base.model,
        dataclasses.replace(base.optim, lr=3e-3),
        RunConfig(seed=7, out=Path("there")),
    )


def test_every_setting_is_an_option_with_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    assert stop.value.code == 0
    # Older tyros draw boxes around the words.
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for kind in (DataConfig, ModelConfig, OptimConfig, RunConfig):
        for item in dataclasses.fields(kind):
            assert re.search(f"--{item.name.replace('_', '-')}[ ,]", text), item.name
    assert "--no-no-cache" not in text
    assert "{None}" not in text
    assert "(default: None)" not in text
    for words in ("of all processes together. (default: 64)", "--config", "--resume", "(default: runs)"):
        assert words in text


@pytest.mark.parametrize(
    "argv",
    [["--learning-rate", "1"], ["--epochs", "many"], ["--epochs", "0"], ["--split", "random"], ["--optim.lr", "1"]],
)
def test_a_bad_option_ends_with_2(argv, capsys):
    with pytest.raises((SystemExit, ConfigError)) as stop:
        parse_arguments(argv)
    assert isinstance(stop.value, ConfigError) or stop.value.code == 2


def test_little_stands_beside_resume():
    assert parse_arguments(["--resume", "runs/x"]) == Arguments(resume=Path("runs/x"))
    argv = ["--resume", "runs/x", "--data-root", "~/clips", "--epochs", "9", "--device", "cpu", "--no-tensorboard"]
    changes = {"data_root": Path("~/clips").expanduser(), "epochs": 9, "device": "cpu", "tensorboard": False}
    assert parse_arguments(argv) == Arguments(resume=Path("runs/x"), changes=changes)
    for others in (["--lr", "3"], ["--config", "x.yaml"], ["--gaze"]):
        with pytest.raises(ConfigError, match="--resume: a run goes on with the settings it began with"):
            parse_arguments(["--resume", "runs/x", *others])


def test_json_and_command_line_bring_the_settings_back():
    config = TrainConfig(
        DataConfig(
            *(Path("a b"), Path("i.csv"), 10, 10, 5, "time", True, True, True),
            *(False, True, True, 29.97, "last", Path("caches"), True),
        ),
        ModelConfig(16, 1, 0.0, True),
        OptimConfig(8, 3, 1e-4, 0.0, 2.0, 0, 1e-6, 5, 0.0),
        RunConfig(Path("out"), 1, "cpu", 3, "torch", "tf32", Path("w.pt"), "bf16", True, False, True),
    )
    defaults = TrainConfig().as_dict()
    for section, settings in config.as_dict().items():
        assert all(value != defaults[section][name] for name, value in settings.items())
    assert from_mapping(json.loads(json.dumps(config.as_dict())), "config.json") == config
    words = shlex.split(command_line(config))
    assert words[:3] == ["python", "-m", "bigru.train"]
    assert parse_arguments(words[3:]).settings == config
    assert command_line(TrainConfig()) == "python -m bigru.train"


def test_what_departs_from_the_protocol_is_named():
    assert DataConfig(gaze=True, strict=True, no_cache=True).departures == []
    assert DataConfig(nan_missing=True).departures == ["NaN read as missing"]
    assert DataConfig(resample=30.0, centre="last").departures == [
        "centred on the last observed frame",
        "resampled to 30 frames per second",
    ]
