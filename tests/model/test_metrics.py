"""Metrics against plain loops over windows, frames and joints."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from bigru.model import metrics
from bigru.model.forecaster import HandForecaster


@dataclass
class Batch:
    x: torch.Tensor
    target: torch.Tensor
    present: torch.Tensor


def windows(count=7, frames=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(count, frames, 84, generator=generator) for _ in range(3)]
    hands = torch.rand(count, frames, 2, generator=generator) < 0.7
    return (*draw, hands.repeat_interleave(21, dim=-1))


def batches(x, target, present, size):
    return [Batch(*parts) for parts in zip(*(tensor.split(size) for tensor in (x, target, present)), strict=True)]


def naive(prediction, target, present):
    """Every metric as its definition reads."""
    prediction, target, present = (tensor.double().numpy() for tensor in (prediction, target, present))
    mpjpe, ade, fde, error, error_px, squared = [], [], [], [], [], []
    for window in range(len(target)):
        centroids = []
        for frame in range(target.shape[1]):
            p, t = prediction[window, frame], target[window, frame]
            mpjpe.append(math.sqrt(sum((p[i] - t[i]) ** 2 for i in range(84))))
            dx = sum(p[2 * j] for j in range(42)) / 42 - sum(t[2 * j] for j in range(42)) / 42
            dy = sum(p[2 * j + 1] for j in range(42)) / 42 - sum(t[2 * j + 1] for j in range(42)) / 42
            centroids.append(math.hypot(dx, dy))
            for joint in range(42):
                if present[window, frame, joint]:
                    x, y = p[2 * joint] - t[2 * joint], p[2 * joint + 1] - t[2 * joint + 1]
                    error.append(math.hypot(x, y))
                    error_px.append(math.hypot(x * 864, y * 486))
                    squared += [x * x, y * y]
        ade.append(np.mean(centroids))
        fde.append(centroids[-1])
    names = ("mpjpe", "ade", "fde", "joint_error", "joint_error_px", "loss")
    return {
        name: float(np.mean(values))
        for name, values in zip(names, (mpjpe, ade, fde, error, error_px, squared), strict=True)
    }


@pytest.mark.parametrize("masked", [True, False])
def test_metrics_are_their_definitions(masked):
    _, prediction, target, present = windows()
    rows = metrics.window_errors(prediction, target, present if masked else None)
    expected = naive(prediction, target, present if masked else torch.ones_like(present))
    found = metrics.summarise(rows)
    assert found.windows == 7
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-9), name
    loss = metrics.masked_mse(prediction, target, present if masked else None)
    assert float(loss) == pytest.approx(expected["loss"], rel=1e-5)
    for window, error_px in enumerate(metrics.window_error_px(rows).tolist()):
        one = slice(window, window + 1)
        alone = naive(prediction[one], target[one], present[one] if masked else torch.ones_like(present[one]))
        assert error_px == pytest.approx(alone["joint_error_px"], rel=1e-9)


def test_the_batch_size_does_not_matter():
    x, prediction, target, present = windows(13)
    lookup = {tuple(row): answer for row, answer in zip(x[:, 0, :3].tolist(), prediction, strict=True)}

    def predict(batch):
        return torch.stack([lookup[tuple(row)] for row in batch[:, 0, :3].tolist()])

    figures = [metrics.summarise(metrics.score(predict, batches(x, target, present, size))) for size in (1, 2, 5, 13)]
    assert figures[0].mpjpe == pytest.approx(naive(prediction, target, present)["mpjpe"], rel=1e-9)
    assert all(other == figures[0] for other in figures[1:])


@pytest.mark.parametrize("masked", [True, False])
def test_errors_of_frames_and_joints(masked):
    x, prediction, target, present = windows(7, 5)
    seen = present if masked else torch.ones_like(present)
    sums = metrics.score_joints(lambda batch: prediction[lookup(x, batch)], batches(x, target, present, 3), masked)
    assert sums.shape == (5, 42, 3)
    difference = (prediction - target).double().numpy().reshape(7, 5, 42, 2)
    errors = {
        "joint_error": np.hypot(difference[..., 0], difference[..., 1]),
        "joint_error_px": np.hypot(difference[..., 0] * 864, difference[..., 1] * 486),
    }
    horizon, by_joint = metrics.mean_errors(sums.sum(1)), metrics.mean_errors(sums.sum(0))
    for name, error in errors.items():
        expected = np.where(seen, error, np.nan)
        assert horizon[name] == pytest.approx(np.nanmean(expected, axis=(0, 2)), rel=1e-6)
        assert by_joint[name] == pytest.approx(np.nanmean(expected, axis=(0, 1)), rel=1e-6)
    nobody = metrics.mean_errors(metrics.joint_errors(prediction, target, torch.zeros_like(present)).sum(0))
    assert all(math.isnan(error) for errors in nobody.values() for error in errors)


def lookup(x, batch):
    """Which windows a batch is of."""
    return [next(i for i in range(len(x)) if torch.equal(x[i], window)) for window in batch]


def test_subtasks_are_scored_apart():
    _, prediction, target, present = windows(7)
    rows = metrics.window_errors(prediction, target, present)
    subtask = torch.tensor([2, 0, 2, -1, 0, 2, -1])
    scored = metrics.by_subtask(rows, subtask, ("A", "B", "C"))
    assert [(entry["subtask"], entry["windows"]) for entry in scored] == [("other", 2), ("A", 2), ("C", 3)]
    for entry, chosen in zip(scored, ([3, 6], [1, 4], [0, 2, 5]), strict=True):
        assert entry["joint_error_px"] == metrics.summarise(rows[chosen]).joint_error_px


def test_nobody_there():
    _, prediction, target, present = windows(2)
    prediction.requires_grad_()
    nobody = torch.zeros_like(present)
    loss = metrics.masked_mse(prediction, target, nobody)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))
    found = metrics.summarise(metrics.window_errors(prediction, target, nobody))
    assert math.isnan(found.joint_error)
    assert found.loss == 0
    assert found.mpjpe > 0


def test_what_stands_in_for_a_missing_hand_reaches_neither_loss_nor_gradient():
    _, prediction, target, present = windows()
    prediction.requires_grad_()
    coordinates = present.repeat_interleave(2, dim=-1)
    metrics.masked_mse(prediction, torch.where(coordinates, target, float("nan")), present).backward()
    expected = torch.where(coordinates, 2 * (prediction.detach() - target), 0.0) / coordinates.sum()
    torch.testing.assert_close(prediction.grad, expected)


def test_repeat_last_frame():
    x, *_ = windows()
    wide = torch.cat([x, torch.randn(7, 5, 2)], dim=-1)
    for answer in (metrics.repeat_last_frame(x), metrics.repeat_last_frame(wide)):
        assert answer.shape == (7, 5, 84)
        assert all(torch.equal(answer[:, frame], x[:, -1]) for frame in range(5))


def test_constant_velocity_goes_on_a_straight_line():
    frames = torch.arange(12.0)[None, :, None]
    line = torch.randn(3, 1, 84) + frames * torch.randn(3, 1, 84)
    torch.testing.assert_close(metrics.constant_velocity(line[:, :6]), line[:, 6:], atol=1e-4, rtol=1e-4)
    # One frame has no velocity.
    assert torch.equal(metrics.constant_velocity(line[:, :1]), line[:, :1])


def test_baselines_score_by_their_names():
    x, _, target, present = windows()
    for name, predict in metrics.BASELINES.items():
        found = metrics.summarise(metrics.score(predict, batches(x, target, present, 3)))
        velocity = 0 if name == "repeat last frame" else x[:, -1:] - x[:, -2:-1]
        answer = x[:, -1:] + torch.arange(1, 6)[:, None] * velocity
        assert found.mpjpe == pytest.approx(naive(answer, target, present)["mpjpe"], rel=1e-6)


def test_frame_rates_are_told_apart():
    _, prediction, target, present = windows()
    fps = torch.tensor([23, 59, 22.998, 59, 59.01, 59, 23])
    slow, fast = metrics.by_frame_rate(metrics.window_errors(prediction, target, present), fps, fps > 30)
    chosen = fps < 30
    assert [(rate["fps"], rate["windows"], rate["assumed"]) for rate in (slow, fast)] == [(23, 3, 0), (59, 4, 4)]
    expected = naive(prediction[chosen], target[chosen], present[chosen])
    assert slow["joint_error_px"] == pytest.approx(expected["joint_error_px"], rel=1e-9)
    assert "loss" not in slow


@pytest.mark.parametrize(
    ("fps", "expected"),
    [([1.25, 0.25, 1.0, 0.25], [(0.25, 2), (1, 2)]), ([29.97] * 4, [(29.97, 4)]), ([1.4] * 4, [(1.4, 4)])],
    ids=["none is rounded to 0", "resampled", "resampled slowly"],
)
def test_frame_rates_are_called_what_they_are(fps, expected):
    _, prediction, target, present = windows(4)
    errors = metrics.window_errors(prediction, target, present)
    rates = metrics.by_frame_rate(errors, torch.tensor(fps), torch.zeros(4) > 0)
    assert [(rate["fps"], rate["windows"]) for rate in rates] == expected


def test_evaluation_changes_nothing():
    torch.manual_seed(0)
    x, _, target, present = windows()
    model = HandForecaster(hidden_size=8)
    optimizer = torch.optim.AdamW(model.parameters())
    metrics.masked_mse(model(x), target, present).backward()
    optimizer.step()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
    random = torch.get_rng_state()
    rows = [metrics.evaluate(model, batches(x, target, present, 3)) for _ in range(2)]
    # Dropout was off.
    assert torch.equal(*rows)
    assert model.training
    metrics.evaluate(model.eval(), batches(x, target, present, 3))
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(parameter.grad, old) for parameter, old in zip(model.parameters(), gradients, strict=True))
    now = [value for state in optimizer.state.values() for value in state.values()]
    assert all(torch.equal(new, old) for new, old in zip(now, moments, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    # And the network can go on learning.
    metrics.masked_mse(model.train()(x), target, present).backward()


def test_no_windows():
    with pytest.raises(ValueError, match="at least one window"):
        metrics.summarise(torch.empty(0, 7))
