"""The forecasting command: which window it takes, what it writes, and what it refuses."""

import csv
import io
import json
import math

import numpy as np
import pytest
import torch
from data.dataset import clip_arrays
from PIL import Image
from safetensors.torch import save_file

from bigru.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from bigru.data.synthetic import write_clip
from bigru.model import prediction as predict
from bigru.model.forecaster import HandForecaster
from bigru.model.prediction import COLUMNS, JOINT_NAMES, forecast
from bigru.predict import main
from bigru.report import animation, figures

T = 4
FPS = 23.0
IMAGE = np.array([1728, 972])


@pytest.fixture(autouse=True)
def blank_pictures(monkeypatch):
    """Drawing takes most of a forecast's time; the test of what is written undoes this."""
    monkeypatch.setattr(predict, "gif", lambda samples, row, centre: b"")
    monkeypatch.setattr(figures, "png", lambda figure: b"")


def write(folder, frames, number=0, **changes):
    """A clip of two hands anywhere in the image; the right one is not seen in its last frame."""
    arrays = clip_arrays(frames, seed=frames)
    arrays["right_landmarks"][-1] = 0
    arrays |= changes
    path = folder / f"p01-CAM_AV-BIAH_RB-BHO-{number}.25_3.5.h5"
    write_clip(path, {name: values for name, values in arrays.items() if values is not None})
    return path, arrays


def network(input_size=84, seed=0, **sizes):
    torch.manual_seed(seed)
    return HandForecaster(input_size, **({"hidden_size": 6} | sizes)).eval()


def weights(folder, model, name="weights.safetensors"):
    path = folder / name
    (save_file if name.endswith("safetensors") else torch.save)(model.state_dict(), path)
    return path


def run(path, *clips, out, extra=()):
    options = ["--weights", str(path), "--out", str(out), "--observed", str(T), "--device", "cpu"]
    return main([*options, *extra, *map(str, clips)])


def centred(arrays):
    """(F, 84), as the definition reads."""
    hands = np.stack([arrays["left_landmarks"], arrays["right_landmarks"]], axis=1)[..., :2]
    origin = (hands[:, 0, 0] + hands[:, 1, 0]) / 2
    return ((hands - origin[:, None, None]) / 0.5).reshape(len(hands), 84)


@pytest.mark.parametrize(("frames", "start", "known"), [(11, 3, 4), (8, 0, 4), (7, 3, 0), (4, 0, 0)])
def test_the_window_is_the_last_with_a_true_future_else_the_last(tmp_path, frames, start, known):
    clip, arrays = write(tmp_path, frames)
    model, expected = network(), centred(arrays)
    result = forecast(model, clip, DataConfig(observed=T, predicted=T))
    assert (result.start, result.stem, result.fps) == (start, clip.stem, FPS)
    np.testing.assert_allclose(result.observed, expected[start : start + T], atol=1e-6)
    answer = model(torch.from_numpy(expected[None, start : start + T]))[0].detach()
    np.testing.assert_allclose(result.predicted, answer, atol=1e-5)
    truth = np.full((T, 84), np.nan)
    truth[:known] = expected[start + T : start + T + known]
    if known:
        truth[known - 1, 42:] = np.nan
    np.testing.assert_allclose(result.target, truth, atol=1e-6)
    assert math.isnan(result.mean_error_px) == (known == 0)
    if known:
        distances = np.linalg.norm((result.predicted - truth).reshape(T, 42, 2) * [864, 486], axis=-1)
        assert result.mean_error_px == pytest.approx(np.nanmean(distances), rel=1e-5)


def test_a_chosen_start_with_half_a_future(tmp_path):
    clip, arrays = write(tmp_path, 9)
    result = forecast(network(), clip, DataConfig(observed=T, predicted=T), start=3)
    np.testing.assert_allclose(result.target[:1], centred(arrays)[7:8], atol=1e-6)
    assert np.isnan(result.target[2:]).all()
    wrists = arrays["left_landmarks"][6, 0, :2] + arrays["right_landmarks"][6, 0, :2]
    np.testing.assert_allclose(result.last_origin, wrists / 2, rtol=1e-6)


def test_centred_on_the_last_frame_the_hands_are_placed_in_the_image(tmp_path):
    clip, arrays = write(tmp_path, 8)
    model = network()
    config = DataConfig(observed=T, predicted=T, centre="last")
    result = forecast(model, clip, config)
    hands = np.stack([arrays["left_landmarks"], arrays["right_landmarks"]], axis=1)[..., :2]
    origin = hands[T - 1, :, 0].mean(axis=0)
    np.testing.assert_allclose(result.last_origin, origin, rtol=1e-5)
    x = ((hands[:T] - origin) / 0.5).reshape(1, T, 84)
    answer = model(torch.from_numpy(x))[0].detach().numpy().reshape(T, 2, 21, 2)
    np.testing.assert_allclose(result.in_image(result.predicted), answer / 2 + origin, atol=1e-5)
    np.testing.assert_allclose(result.in_image(result.target)[:-1], hands[T:-1], atol=1e-5)
    assert predict.as_csv(result).splitlines()[1].split(",")[6] == "image_corner"


def test_a_clip_is_resampled_as_the_run_was(tmp_path):
    clip, _ = write(tmp_path, 8)
    result = forecast(network(), clip, DataConfig(observed=T, predicted=T, resample=46.0))
    # Twice the 23 frames a second of the clip: 15 frames, of which the last 8 make a window and its future.
    assert (result.fps, result.start) == (46.0, 7)
    assert predict.as_csv(result).splitlines()[1].split(",")[:3] == ["11", f"{11 / 46:.4f}", f"{1 / 46:.4f}"]


def test_what_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    for drawing in (animation, figures):
        monkeypatch.setattr(drawing, "DPI", 30)
    clip, _ = write(tmp_path, 9)
    assert run(weights(tmp_path, network()), clip, out=tmp_path / "out", extra=["--start", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    rate = "at a frame rate that is assumed: no timestamps"
    assert printed[0].startswith(f"{clip.stem}: frames 2 to 5 observed, 4 predicted (0.17 s {rate}); mean error ")
    assert printed[0].endswith(" px over 3 true frames")
    files = {path.suffix[1:]: path for path in (tmp_path / "out").iterdir()}
    assert printed[1:] == [f"  {tmp_path / 'out' / clip.stem}.{kind}" for kind in ("npz", "csv", "png", "gif")]
    assert set(files) == {"npz", "csv", "png", "gif"}

    result = forecast(network(), clip, DataConfig(observed=T, predicted=T), start=2)
    with np.load(files["npz"], allow_pickle=False) as stored:
        archive = dict(stored)
    # Half the image to a centred unit.
    np.testing.assert_allclose(archive["predicted"].reshape(T, 84), result.predicted / 2)
    np.testing.assert_allclose(archive["true"].reshape(T, 84), result.target / 2)
    np.testing.assert_array_equal(archive["frame"], [6, 7, 8, 9])
    np.testing.assert_allclose(archive["time_s"], np.array([6, 7, 8, 9]) / FPS)
    np.testing.assert_allclose(archive["ahead_s"], np.array([1, 2, 3, 4]) / FPS)
    assert archive["origin"] == "wrists_midpoint_of_this_frame"

    rows = list(csv.DictReader(io.StringIO(files["csv"].read_text())))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == T * 42
    for place, row in enumerate(rows):
        t, number = divmod(place, 42)
        hand, joint = divmod(number, 21)
        assert (int(row["frame"]), row["hand"], int(row["joint"])) == (6 + t, ("left", "right")[hand], joint)
        assert row["joint_name"] == JOINT_NAMES[joint]
        ours = archive["predicted"][t, hand, joint]
        assert [float(row["x_norm"]), float(row["y_norm"])] == pytest.approx(ours, rel=1e-5)
        assert [float(row["x_px"]), float(row["y_px"])] == pytest.approx(ours * IMAGE, rel=1e-5)
        # Three true frames, the right hand missing in the last.
        if t == 3 or (t == 2 and hand == 1):
            assert row["true_x_norm"] == row["true_y_px"] == row["error_px"] == ""
        else:
            theirs = archive["true"][t, hand, joint]
            assert float(row["true_x_px"]) == pytest.approx(theirs[0] * 1728, rel=1e-5)
            assert float(row["error_px"]) == pytest.approx(np.hypot(*((ours - theirs) * IMAGE)), rel=1e-4)
    with Image.open(files["gif"]) as moving:
        assert moving.format == "GIF"
        assert moving.n_frames == 2 * T
        assert moving.info["loop"] == 0


def test_folders_of_clips_names_of_ones_own_and_a_run_folder(tmp_path, capsys):
    clips, run_folder, out = tmp_path / "clips", tmp_path / "run", tmp_path / "out"
    for number, name in enumerate(["deep/one.h5", "two.h5"]):
        (clips / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path, 8, number)[0].rename(clips / name)
    run_folder.mkdir()
    weights(run_folder, network())
    (run_folder / "config.json").write_text(json.dumps(TrainConfig(DataConfig(observed=T, predicted=T)).as_dict()))
    assert run(run_folder, clips, out=out) == 2
    assert capsys.readouterr().err.count("; predict takes --fps") == 2
    assert run(run_folder, clips, out=out, extra=["--fps", "30"]) == 0
    assert {path.name for path in out.glob("*.csv")} == {"one.csv", "two.csv"}
    row = next(csv.DictReader(io.StringIO((out / "one.csv").read_text())))
    assert (row["ahead_s"], row["fps"], row["fps_assumed"]) == (f"{1 / 30:.4f}", "30", "no timestamps")
    x = torch.randn(1, T, 84)
    assert torch.equal(HandForecaster.load(str(run_folder))(x), network()(x))


def test_a_folder_that_cannot_be_written_is_told_first(tmp_path, capsys):
    clip, _ = write(tmp_path, 8)
    (tmp_path / "file").touch()
    assert run(weights(tmp_path, network()), clip, out=tmp_path / "file" / "out") == 2
    expected = f"bigru.predict: out: expected a folder that can be written, got {tmp_path / 'file'}\n"
    assert capsys.readouterr() == ("", expected)


def test_no_two_joints_share_a_name():
    assert len(set(JOINT_NAMES)) == 21
    assert [JOINT_NAMES[n] for n in (0, 4, 8, 20)] == ["WRIST", "THUMB_TIP", "INDEX_FINGER_TIP", "PINKY_TIP"]


def test_the_true_future_is_drawn_where_there_is_one(tmp_path):
    def drawn_in(axes):
        lines = [line for line in axes.lines if len(line.get_xdata()) > 1]
        return sum(np.isfinite(np.asarray(line.get_ydata(), float)).any() for line in lines)

    drawn = []
    for frames in (9, 4):
        clip, _ = write(tmp_path, frames)
        result = forecast(network(), clip, DataConfig(observed=T, predicted=T), start=min(2, frames - T))
        figure = figures.forecasts(result.samples())
        drawn.append([drawn_in(axes) for axes in figure.axes])
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        assert ("true" in names) == (frames == 9)
    # Both predicted hands in every panel; the true ones while the clip lasts, the right one not in its last frame.
    assert drawn == [[2, 4, 4, 3, 2], [1, 2, 2, 2, 2]]


@pytest.mark.parametrize("name", ["weights.safetensors", "published.pt", "published.pth"])
def test_the_shapes_tell_the_network(tmp_path, name):
    clip, _ = write(tmp_path, 8)
    path = weights(tmp_path, network(84 + 2 + 8, hidden_size=5, num_layers=3), name)
    assert run(path, clip, out=tmp_path / "out") == 0
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_a_run_says_how_many_frames_it_observes(tmp_path):
    clip, _ = write(tmp_path, 12)
    config = TrainConfig(DataConfig(observed=5, predicted=5), ModelConfig(hidden_size=6), run=RunConfig(out=tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config.as_dict()))
    path = weights(tmp_path, network())
    arguments = ["--weights", str(path), "--device", "cpu", str(clip), "--out"]
    assert main([*arguments, str(tmp_path / "five")]) == 0
    assert main([*arguments, str(tmp_path / "three"), "--observed", "3"]) == 0
    for folder, frames in (("five", 5), ("three", 3)):
        with np.load(tmp_path / folder / f"{clip.stem}.npz") as stored:
            assert len(stored["predicted"]) == frames
    (tmp_path / "config.json").write_text("{")
    assert main([*arguments, str(tmp_path / "none")]) == 2


def test_clips_that_cannot_be_used_are_named_and_the_others_done(tmp_path, capsys):
    good, _ = write(tmp_path, 8)
    short, _ = write(tmp_path, 3, number=1)
    older, _ = write(tmp_path, 8, number=2, rec_bboxes=None, bboxes=np.zeros((8, 36, 4), np.float32))
    path = weights(tmp_path, network(84 + 120))
    assert run(path, good, short, older, tmp_path / "nowhere.h5", out=tmp_path / "out") == 1
    told, *errors = capsys.readouterr().err.splitlines()
    assert told.startswith("bigru.predict: no config.json beside the weights: the clips are read as published")
    assert errors[0] == f"bigru.predict: {short}: short: 3 frames, 4 needed"
    assert errors[1].startswith(f"bigru.predict: {older}: missing dataset: rec_bboxes (the older layout")
    assert errors[2].startswith(f"bigru.predict: {tmp_path / 'nowhere.h5'}: ")
    assert {file.name[: len(good.stem)] for file in (tmp_path / "out").iterdir()} == {good.stem}
    assert run(path, short, out=tmp_path / "none") == 2
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--start", "5"], "start: expected 0 to 4 in a clip of 8 frames of which 4 are observed, got 5"),
        (["--start", "-1"], "start: expected 0 to 4"),
        (["--observed", "0"], "observed: expected at least 1, got 0"),
        (["--device", "nonsense"], "device: 'nonsense' cannot be used"),
        (["--backend", "resident"], "backend: resident cannot run the network on cpu"),
    ],
)
def test_options_that_cannot_be_used(tmp_path, capsys, extra, message):
    clip, _ = write(tmp_path, 8)
    assert run(weights(tmp_path, network()), clip, out=tmp_path / "out", extra=extra) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_clips_without_names_of_their_own(tmp_path, capsys):
    path = weights(tmp_path, network())
    assert run(path, out=tmp_path) == 2
    assert capsys.readouterr().err == "bigru.predict: clips: expected at least one .h5 file, got none\n"
    (tmp_path / "empty").mkdir()
    assert run(path, tmp_path / "empty", out=tmp_path) == 2
    assert f"got none below {tmp_path / 'empty'}" in capsys.readouterr().err
    clip, _ = write(tmp_path, 8)
    assert run(path, clip, tmp_path / "other" / clip.name, out=tmp_path) == 2
    assert f"got twice: {clip.stem}" in capsys.readouterr().err


IH, HH = "encoder.core.weight_ih_l0", "encoder.core.weight_hh_l0"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"a": (2,)}, f"no forecaster's state dict: no {IH}, {HH}"),
        ({IH: (18,), HH: (18, 6)}, f"expected a dense floating-point matrix in {IH}"),
        ({IH: (18, 90), HH: (18, 6)}, "is for 90 features, expected 84 for hands"),
        ({IH: (1, 84), HH: (1, 1_000_000)}, f"expected 3000000 rows in {IH} and {HH}"),
        ({IH: (18, 84), HH: (18, 6)}, "does not fit the network: missing encoder.core.bias_hh_l0"),
    ],
)
def test_weights_that_are_none(tmp_path, capsys, shapes, message):
    clip, _ = write(tmp_path, 8)
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "odd.pt")
    assert run(tmp_path / "odd.pt", clip, out=tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_help_explains_each_option(capsys):
    with pytest.raises(SystemExit) as ending:
        main(["--help"])
    assert ending.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--weights", "--out", "--start", "--observed", "--device", "midpoint of the two wrists"):
        assert words in text
