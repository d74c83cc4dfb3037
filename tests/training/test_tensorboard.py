"""TensorBoard's files: what a run writes into them, that it changes nothing else, and what is said without it."""

import builtins

import numpy as np
import pytest
from training.runs import assert_same, change, killed_run, make_up, options, resume, rows, train

from bigru.config import ConfigError
from bigru.training import tensorboard as board
from bigru.training.trainer import Trainer


@pytest.fixture
def config(tmp_path):
    return change(make_up(tmp_path), "optim", epochs=3)


def events(folder):
    """All that TensorBoard reads in a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    found.Reload()
    return found


@pytest.mark.slow
def test_a_watched_run_is_the_same_to_the_bit_and_shows_all(config):
    pytest.importorskip("tensorboard")
    plain = train(config)
    watched = train(change(config, "run", tensorboard=True))
    assert not (plain / "tensorboard").exists()
    assert_same(watched, plain)
    found, history = events(watched), rows(watched)
    assert sorted(found.Tags()["scalars"]) == sorted(board.CURVES.values())
    for column, curve in board.CURVES.items():
        scalars = found.Scalars(curve)
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        assert [scalar.value for scalar in scalars] == pytest.approx([row[column] for row in history], rel=1e-6)
    assert all(row["grad_norm"] > 0 for row in history)
    assert found.Tags()["images"] == ["forecasts/validation", "forecasts/test"]
    gains = [row["epoch"] for row in history if row["va_mpjpe"] == min(r["va_mpjpe"] for r in history[: row["epoch"]])]
    assert [image.step for image in found.Images("forecasts/validation")] == gains
    (picture,) = found.Images("forecasts/test")
    assert picture.width == 1296


@pytest.mark.slow
def test_a_resumed_run_goes_on_on_the_board(config):
    pytest.importorskip("tensorboard")

    class Killed(Trainer):
        def save(self, folder):
            # The board has not yet seen the second epoch's row; the checkpoint is of the first.
            if self.progress.epoch == 2:
                raise KeyboardInterrupt
            super().save(folder)

    folder = killed_run(config, trainer=Killed)
    # Asked for only now, it shows what comes.
    resume(folder, {"tensorboard": True})
    assert [scalar.step for scalar in events(folder).Scalars("mpjpe/validation")] == [2, 3]


def test_without_tensorboard_nothing_begins(config, monkeypatch, refused):
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "tensorboard":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'bigru\[tensorboard\]'"):
        board.require(config.run.out)
    words = "tensorboard: expected the package tensorboard, which is not installed"
    refused(words, *options(config), "--tensorboard")
    assert not config.run.out.exists()


def test_pictures_are_light_and_of_the_figures_size():
    from matplotlib.figure import Figure

    pixels = board.figures.pixels(Figure(figsize=(2, 1), dpi=50))
    assert pixels.shape == (50, 100, 3)
    assert pixels.dtype == np.uint8
    assert pixels.min() == 255
