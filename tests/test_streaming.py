"""A stream's forecasts against those of the forecasting command for the same windows."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from bigru.config import DataConfig, ModelConfig, TrainConfig
from bigru.data.clips import read_clip
from bigru.data.synthetic import clip_arrays, plan_clips, write_clip
from bigru.model.forecaster import HandForecaster
from bigru.model.prediction import forecast
from bigru.model.weights import save_weights
from bigru.predict import main
from bigru.streaming import ForecastStream

LENGTH = 7
EVERYTHING = {"gaze": True, "objects": True, "surrogate": True}


def build(**changes):
    config = DataConfig(observed=LENGTH, predicted=LENGTH, **changes)
    torch.manual_seed(0)
    return HandForecaster(config.input_size, hidden_size=8, num_layers=2), config


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A synthetic clip in which a hand is missing for a while."""
    plan = dataclasses.replace(plan_clips(5, seed=3)[0], frames=3 * LENGTH)
    arrays = clip_arrays(plan, seed=3)
    arrays["left_landmarks"][4:9] = 0
    path = tmp_path_factory.mktemp("clips") / f"{plan.stem}.h5"
    write_clip(path, arrays)
    return path


@pytest.mark.parametrize("centre", ["frame", "last"])
@pytest.mark.parametrize("modalities", [{}, EVERYTHING], ids=["hands", "everything"])
def test_each_frame_gives_the_forecast_of_its_window(clip, centre, modalities):
    model, config = build(centre=centre, **modalities)
    stream, content = ForecastStream(model, config), read_clip(clip, config)
    for number in range(len(content.hands)):
        others = {name: getattr(content, name)[number] for name in modalities}
        ours = stream.push(content.hands[number], **others)
        if number < LENGTH - 1:
            assert ours is None
            continue
        expected = forecast(model, clip, config, start=number - LENGTH + 1)
        assert ours.frame == number
        assert ours.latency_s > 0
        np.testing.assert_allclose(ours.positions, expected.in_image(expected.predicted), rtol=0, atol=1e-6)


def test_reset_forgets_the_frames(clip):
    model, config = build()
    hands = read_clip(clip, config).hands
    stream, fresh = ForecastStream(model, config), ForecastStream(model, config)
    for frame in hands[:10]:
        stream.push(frame)
    stream.reset()
    ours = [stream.push(frame) for frame in hands[10 : 10 + LENGTH]]
    theirs = [fresh.push(frame) for frame in hands[10 : 10 + LENGTH]]
    assert ours[:-1] == theirs[:-1] == [None] * (LENGTH - 1)
    np.testing.assert_array_equal(ours[-1].positions, theirs[-1].positions)


def test_dropout_is_off():
    model, config = build()
    model.train()
    stream = ForecastStream(model, config)
    results = [stream.push(np.full((2, 21, 2), 0.5)) for _ in range(LENGTH + 1)]
    np.testing.assert_array_equal(results[-1].positions, results[-2].positions)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hands": np.zeros((21, 2))}, r"hands: expected shape \(2, 21, 2\), got \(21, 2\)"),
        ({"hands": np.full((2, 21, 2), np.nan)}, "hands: expected finite numbers"),
        ({"hands": np.zeros((2, 21, 2)), "gaze": np.zeros(2)}, "gaze: the network reads none"),
    ],
    ids=["shape", "nan", "modality"],
)
def test_a_wrong_frame_is_refused_and_not_counted(given, message):
    stream = ForecastStream(*build())
    with pytest.raises(ValueError, match=message):
        stream.push(**given)
    assert stream.frames == 0


def test_a_missing_modality_is_refused():
    stream = ForecastStream(*build(gaze=True))
    with pytest.raises(ValueError, match="gaze: the network reads one, got NoneType"):
        stream.push(np.zeros((2, 21, 2)))


def test_settings_of_another_network_are_refused():
    model, _ = build()
    with pytest.raises(ValueError, match="expected modalities of 84 features, got 86"):
        ForecastStream(model, DataConfig(gaze=True))


def test_the_command_replays_a_clip_and_prints_its_latency(tmp_path, clip, capsys):
    model, config = build()
    weights = tmp_path / "weights.safetensors"
    save_weights(weights, model.state_dict())
    run = TrainConfig(data=config, model=ModelConfig(hidden_size=8))
    (tmp_path / "config.json").write_text(json.dumps(run.as_dict()))
    loaded = ForecastStream.load(weights)
    ours = [loaded.push(hands) for hands in read_clip(clip, config).hands[:LENGTH]]
    assert main(["--weights", str(weights), "--out", str(tmp_path), "--stream", str(clip)]) == 0
    words = r"15 forecasts of 7 frames on \d+ threads? of the CPU, latency median [\d.]+ ms, 99th"
    assert re.search(words, capsys.readouterr().out)
    with np.load(tmp_path / f"{clip.stem}.stream.npz") as written:
        assert written["frame"].tolist() == list(range(LENGTH - 1, 3 * LENGTH))
        assert (written["latency_s"] > 0).all()
        np.testing.assert_allclose(written["predicted"][0], ours[-1].positions, rtol=0, atol=1e-6)
        expected = forecast(model.eval(), clip, config, start=5)
        np.testing.assert_allclose(written["predicted"][5], expected.in_image(expected.predicted), rtol=0, atol=1e-6)
