"""The pictures: at the promised places, of a sensible size, and drawing what the run says, edge cases included."""

import functools
import io
import math
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bigru.report import animation, breakdown_figures, figures, write_report
from bigru.report.animation import gif
from bigru.report.breakdown import beaten_from, unbeaten
from bigru.report.record import NETWORK, Samples, read_run


@pytest.fixture
def make_run(make_run):
    """As in conftest.py with three sample windows."""
    return functools.partial(make_run, windows=3)


@pytest.fixture
def coarse(monkeypatch):
    """Draws few pixels, where only that it can be drawn is asked."""
    monkeypatch.setattr(figures, "DPI", 20)


def png_size(content):
    """Width and height in pixels, every chunk's checksum verified."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds = 8, []
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        (checksum,) = struct.unpack(">I", content[at + 8 + length : at + 12 + length])
        assert zlib.crc32(content[at + 4 : at + 8 + length]) == checksum
        kinds.append(content[at + 4 : at + 8])
        at += 12 + length
    assert kinds[0] == b"IHDR"
    assert kinds[-1] == b"IEND"
    return struct.unpack(">II", content[16:24])


def hand_strokes(axes):
    """The skeletons drawn in a panel, wrist dots left out, as (points, 2) in pixels."""
    return [line.get_xydata() for line in axes.lines if len(line.get_xdata()) > 1]


@pytest.mark.slow
def test_pictures_of_a_report_and_the_same_bytes_again(make_run, monkeypatch):
    run = make_run()
    document = write_report(run)
    text, tallest = document.read_text(), {"forecasts": 1600, "horizon": 700, "joints": 800, "learning_curves": 950}
    pictures = [f"plots/{run.name}_bigru_{name}.png" for name in tallest]
    for picture, most in zip(pictures, tallest.values(), strict=True):
        assert f"]({picture})" in text
        width, height = png_size((run.parent / picture).read_bytes())
        assert width == round(figures.WIDTH_IN * figures.DPI)
        assert 400 < height < most
    # The lock apart, which starts with a dot.
    files = sorted(path for path in run.parent.rglob("[!.]*") if path.is_file() and run not in path.parents)
    assert files == [*(run.parent / picture for picture in pictures), document]
    first = [path.read_bytes() for path in files]
    # However the folder is spelt, and wherever the command runs.
    monkeypatch.chdir(run)
    assert write_report(Path()).resolve() == document.resolve()
    assert [path.read_bytes() for path in files] == first
    assert files == sorted(path for path in run.parent.rglob("[!.]*") if path.is_file() and run not in path.parents)


def test_curves_are_the_metrics(make_run):
    record = read_run(make_run(epochs=12))
    panels = figures.learning_curves(record).axes
    names = [axes.get_title(loc="left").split()[0].lower() for axes in panels]
    assert names == ["mpjpe", "ade", "fde", "loss", "learning"]
    assert record.metrics["lr"] == panels[4].lines[0].get_ydata().tolist() == [1e-3] * 12
    for axes, metric in zip(panels[:4], ("mpjpe", "ade", "fde", "loss"), strict=True):
        train, validation, best = axes.lines
        np.testing.assert_array_equal(train.get_ydata(), record.metrics[f"tr_{metric}"])
        np.testing.assert_array_equal(validation.get_ydata(), record.metrics[f"va_{metric}"])
        np.testing.assert_array_equal(train.get_xdata(), np.arange(1, 13))
        assert best.get_xdata()[0] == record.best_epoch == 8
        unit, *scale = axes.get_ylabel().split(", ")
        assert (axes.get_xlabel(), unit) == ("epoch", "squared error" if metric == "loss" else "centred units")
        assert scale == ["log scale"] * (axes.get_yscale() == "log")


@pytest.mark.parametrize(("highest", "scale"), [(9.0, "linear"), (11.0, "log")])
def test_curves_turn_logarithmic_when_they_span_a_decade(make_run, highest, scale):
    record = read_run(make_run(epochs=4))
    for metric in ("mpjpe", "ade", "fde"):
        record.metrics[f"tr_{metric}"] = [highest, 1.0, 1.0, math.nan]
        record.metrics[f"va_{metric}"] = [1.0, 1.0, 1.0, 1.0]
    for axes in figures.learning_curves(record).axes[:3]:
        low, high = axes.get_ylim()
        assert axes.get_yscale() == scale
        assert low < 1.0 < highest < high


@pytest.mark.parametrize("value", [1.0, 0.0, math.nan, math.inf])
@pytest.mark.parametrize("epochs", [1, 2])
def test_curves_of_very_short_runs(make_run, coarse, epochs, value):
    record = read_run(make_run(epochs=epochs))
    for name in record.metrics:
        if name != "epoch":
            record.metrics[name] = [value] * epochs
    figure = figures.learning_curves(record)
    png_size(figures.png(figure))
    for axes in figure.axes:
        assert axes.lines[0].get_markevery() == ([0] if epochs == 1 and math.isfinite(value) else [])
        assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_points_between_nan_are_marked(make_run):
    record = read_run(make_run(epochs=6))
    record.metrics["va_ade"] = [1.0, math.nan, 1.0, math.nan, 1.0, 1.0]
    train, validation, _ = figures.learning_curves(record).axes[1].lines
    assert (train.get_markevery(), validation.get_markevery()) == ([], [0, 2])


def test_forecast_panels_show_the_promised_frames_in_image_orientation(make_run):
    samples = read_run(make_run()).samples
    panels = np.array(figures.forecasts(samples).axes).reshape(3, 5)
    half_image = [864, 486]
    for row in range(2):
        fps = samples.fps[row]
        observed, *horizons = panels[row]
        for hand, stroke in enumerate(hand_strokes(observed)):
            np.testing.assert_allclose(stroke[0], samples.observed[row, -1].reshape(2, 21, 2)[hand, 0] * half_image)
        for axes, frame in zip(horizons, (14, 29, 44, 59), strict=True):
            true, predicted = (
                poses[row, frame].reshape(2, 21, 2) * half_image for poses in (samples.target, samples.predicted)
            )
            drawn = hand_strokes(axes)
            for stroke, joints in zip(drawn, (*true, *predicted), strict=True):
                np.testing.assert_allclose(stroke[[0, 1, 4, 10, -1]], joints[[0, 1, 4, 8, 17]])
            error_px = np.linalg.norm(true - predicted, axis=-1).mean()
            assert axes.get_title(loc="left").split() == [f"+{(frame + 1) / fps:.2f}", "s", f"{error_px:.0f}", "px"]

    for row in panels:
        assert len({(*axes.get_xlim(), *axes.get_ylim()) for axes in row}) == 1
        bottom, top = row[0].get_ylim()
        assert top < bottom
        for axes in row:
            assert axes.get_aspect() == 1.0
            points = np.concatenate([np.zeros((0, 2)), *hand_strokes(axes)])
            points = points[np.isfinite(points).all(axis=1)]
            low, high = points.min(axis=0), points.max(axis=0)
            assert row[0].get_xlim()[0] < low[0] < high[0] < row[0].get_xlim()[1]
            assert top < low[1] < high[1] < bottom


def test_missing_hands_are_not_drawn_nor_counted(make_run):
    # The third window loses its left hand halfway; what is stored for it is far away.
    run = make_run()
    with np.load(run / "samples.npz") as stored:
        arrays = dict(stored)
    lost = ~arrays["target_present"]
    for name in ("predicted", "target"):
        arrays[name].reshape(3, 60, 2, 42)[lost] = 50.0 if name == "target" else -50.0
    np.savez(run / "samples.npz", **arrays)
    figure = figures.forecasts(read_run(run).samples)
    panels = np.array(figure.axes).reshape(3, 5)
    assert [len(hand_strokes(axes)) for axes in panels[2]] == [2, 4, 4, 2, 2]
    assert figure.texts[5].get_text().endswith("px; left missing: +1.96, +2.61 s")
    assert float(panels[2, 4].get_title(loc="left").split()[2]) < 200
    assert panels[2, 0].get_xlim()[1] < 1000


def test_forecasts_with_no_hand_at_all(make_run, coarse):
    nothing = {"observed_present": np.zeros((3, 60, 2), bool), "target_present": np.zeros((3, 60, 2), bool)}
    figure = figures.forecasts(read_run(make_run(samples=nothing)).samples)
    png_size(figures.png(figure))
    for axes in figure.axes:
        assert hand_strokes(axes) == []
        assert "px" not in axes.get_title(loc="left")


def test_forecasts_with_nan_and_one_frame(make_run, coarse):
    samples = {
        "observed": np.full((1, 1, 84), np.nan, np.float32),
        "predicted": np.full((1, 1, 84), np.nan, np.float32),
        "target": np.zeros((1, 1, 84), np.float32),
        "observed_present": np.ones((1, 1, 2), bool),
        "target_present": np.ones((1, 1, 2), bool),
        "fps": np.array([23]),
        "error_px": np.array([np.nan]),
        "stem": np.array(["x" * 300]),
        "label": np.array([""]),
        "fps_assumed": np.zeros(1, bool),
    }
    figure = figures.forecasts(read_run(make_run(samples=samples)).samples)
    assert len(figure.axes) == 2
    png_size(figures.png(figure))


def test_horizon_draws_each_forecaster(make_run):
    record = read_run(make_run())
    (axes,) = breakdown_figures.horizon(record).axes
    *lines, beaten = axes.lines
    # As the document says: 0.05 + 0.05 x = 0.01 + 0.2 x in frame 16.
    assert (beaten.get_xdata()[0], axes.get_title(loc="left")) == (17, '"repeat last frame" is beaten from frame 17 on')
    for line, errors in zip(lines, record.horizon.values(), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), errors)
        np.testing.assert_array_equal(line.get_xdata(), np.arange(1, 61))
    # The last values, lowest first.
    names = [text.get_text() for text in axes.texts]
    assert names == ["this network  70", "repeat last frame  147", "constant velocity  280"]
    assert axes.get_xlabel() == "future frame (60 = 2.61 s at 23 fps, 1.02 s at 59 fps)"
    assert axes.get_ylabel() == "per-joint error (px), log scale"


def test_names_at_the_lines_ends_do_not_overlap(make_run):
    record = read_run(make_run())
    level = np.full(60, 70.0)
    (axes,) = breakdown_figures.horizon(replace(record, horizon=dict.fromkeys(record.horizon, level))).axes
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert len(heights) == 3
    assert min(np.diff(heights)) > 0.07


@pytest.mark.parametrize("value", [math.nan, 0.0])
def test_breakdown_of_nothing(make_run, coarse, value):
    record = read_run(make_run(config={"data": {"observed": 1, "predicted": 1}}))
    alone = {name: np.array([value]) for name in record.horizon}
    png_size(figures.png(breakdown_figures.horizon(replace(record, horizon=alone))))
    figure = breakdown_figures.joints(replace(record, by_joint=np.full(42, value)))
    png_size(figures.png(figure))
    assert ("never seen" in figure.axes[0].get_title()) == math.isnan(value)


def test_joints_are_drawn_on_their_own_hand(make_run):
    record = read_run(make_run())
    left, right, _ = breakdown_figures.joints(record).axes
    errors = record.by_joint
    for axes, own, name in ((left, errors[:21], "left"), (right, errors[21:], "right")):
        assert axes.get_title() == f"{name} hand, mean {own.mean():.0f} px"
        assert [text.get_text() for text in axes.texts[:21]] == [f"{error:.0f}" for error in own]
        # The thumb is on the inner side of a hand seen from its back.
        thumb, little = axes.texts[4].get_position()[0], axes.texts[20].get_position()[0]
        assert (thumb > little) == (name == "left")
        tips = dict(zip(breakdown_figures.FINGERS, (4, 8, 12, 16, 20), strict=True))
        for text in axes.texts[21:26]:
            tip = np.array(axes.texts[tips[text.get_text()]].get_position())
            assert np.linalg.norm(tip - text.get_position()) < 0.4


def test_windows_say_which_they_are(make_run):
    samples = read_run(make_run()).samples
    titles = [figures.row_title(samples, row) for row in range(3)]
    assert [title.split(":")[0] for title in titles] == ["best", "median", "worst"]
    assert not figures.row_title(replace(samples, label=np.full(3, "")), 0).startswith(":")
    assert (
        figures.clip_name("p63-CAM_AV-BIAH_BV-RPP-50.841946499133776_54.5", 50) == "p63-CAM_AV-BIAH_BV-RPP-50.84_54.5"
    )
    assert figures.clip_name("x" * 60, 50) == "x" * 49 + "…"
    assumed = replace(samples, fps_assumed=np.array([True, False, False]))
    assert ["fps (assumed)" in figures.row_title(assumed, row) for row in range(3)] == [True, False, False]


def few_frames(make_run, **changes):
    """One window of three frames observed and three to come."""
    whole = read_run(make_run()).samples
    names = ("observed", "predicted", "target", "observed_present", "target_present")
    about = {"fps": [23.0], "error_px": [9.0], "stem": ["x" * 90], "label": ["best"], "fps_assumed": [False]}
    parts = {name: getattr(whole, name)[:1, :3] for name in names}
    return Samples(**parts | {name: np.array(value) for name, value in about.items()} | changes)


@pytest.mark.parametrize(("fps", "expected"), [(23.0, 6), (59.0, 2)])
def test_a_gif_shows_every_frame_or_every_third(make_run, fps, expected):
    with Image.open(io.BytesIO(gif(few_frames(make_run, fps=np.array([fps])), 0, dpi=30))) as picture:
        assert picture.n_frames == expected
        assert picture.info["loop"] == 0
        durations = []
        for frame in range(picture.n_frames):
            picture.seek(frame)
            durations.append(picture.info["duration"])
        # In real time, but for the centiseconds of a GIF; the last one is held half a second longer.
        assert durations[0] == pytest.approx(1000 / fps * (6 / expected), abs=10)
        assert 500 < durations[-1] < 700


@pytest.mark.parametrize("seen", [(True, False), (False, True), (False, False)])
def test_a_gif_of_a_window_with_a_hand_missing(make_run, seen):
    present = np.tile(seen, (1, 3, 1))
    # At 59 frames per second every third is drawn.
    samples = few_frames(make_run, observed_present=present, target_present=present, fps=np.array([59.0]))
    with Image.open(io.BytesIO(gif(samples, 0, dpi=30))) as picture:
        assert picture.format == "GIF"
    poses, _ = animation._moment(samples, 0, -3)
    assert {hand for _, hand in poses} == {hand for hand in (0, 1) if seen[hand]}
    for (name, hand), drawn in poses.items():
        wrist = samples.observed[0, 0].reshape(2, 21, 2)[hand, 0]
        assert name == "observed"
        np.testing.assert_allclose(drawn[0], wrist * [864, 486])


def test_a_users_style_changes_nothing(make_run):
    import matplotlib

    record = read_run(make_run(epochs=3))
    plain = figures.png(figures.learning_curves(record))
    with matplotlib.rc_context({"lines.linestyle": ":", "axes.facecolor": "black", "font.size": 30, "savefig.dpi": 30}):
        styled = figures.png(figures.learning_curves(record))
    assert styled == plain
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    ("ours", "first", "said"),
    [
        ([2, 2, 0, 0], 3, "at frames 1 to 2 and is beaten from frame 3 on."),
        ([2, 0, 2, 0], None, "at frames 1 and 3 and is beaten at the others."),
        ([0, 0, 0, 2], None, "at frame 4 and is beaten at the others."),
        ([1, 2, 1, 2], None, "at frames 1 to 4."),
        ([0, 0, 0, 0], 1, ""),
        ([2, 2, 2, 0, 2, 0, 2], None, "at frames 1 to 3, 5 and 7 and is beaten at the others."),
    ],
)
def test_frames_that_a_baseline_wins(ours, first, said):
    horizon = {NETWORK: np.array(ours), "repeat last frame": np.ones(len(ours))}
    assert beaten_from(*horizon.values()) == first
    assert unbeaten(horizon).endswith(said)
