"""The training step: eager, mixed precision, and as a graph holds it, whose capture must leave no trace."""

import copy
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("bigru.training", exc_type=ModuleNotFoundError)  # not on every GPU machine

from training import runs

from bigru.config import ConfigError, RunConfig
from bigru.model.forecaster import HandForecaster
from bigru.model.metrics import masked_mse
from bigru.training import step as steps
from bigru.training.distributed import Team
from bigru.training.run import prepare
from bigru.training.trainer import Trainer


def make_step(amp="none", dropout=0.0, **options):
    torch.manual_seed(0)
    model = HandForecaster(hidden_size=8, dropout=dropout)
    return steps.TrainStep(model, steps.make_optimizer(model, 1e-2, 1e-5), 1.0, amp=amp, **options)


def batch():
    return runs.dataset().train.batch(torch.arange(6))


def test_a_step_is_forward_loss_backward_clipping_adamw():
    ours, data = make_step(), batch()
    model = copy.deepcopy(ours.model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=1e-5)
    for _ in range(3):
        prediction = ours(data.x, data.target, data.present)
        expected = model(data.x)
        loss = masked_mse(expected, data.target, data.present)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert torch.equal(prediction, expected)
        assert torch.equal(ours.prediction, expected)
        assert torch.equal(ours.loss, loss)
        assert torch.equal(ours.norm, norm)
    for one, other in zip(ours.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not any(kept.requires_grad for kept in (ours.prediction, ours.loss, ours.norm))


def test_shares_of_a_batch_add_up_to_it():
    """What two processes would sum: the gradients of unequal shares, each over the whole batch's coordinates."""
    data, kept = batch(), []

    def reduce(gradients):
        kept.append([gradient.clone() for gradient in gradients])

    whole = make_step(reduce=reduce)
    whole(data.x, data.target, data.present)
    loss = torch.zeros(())
    for share in (slice(0, 2), slice(2, 6)):
        step = make_step(reduce=reduce)
        step(data.x[share], data.target[share], data.present[share], 2 * data.present.sum())
        loss += step.loss
    assert loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    for expected, *shares in zip(*kept, strict=True):
        torch.testing.assert_close(sum(shares), expected, rtol=1e-5, atol=1e-8)


def test_what_reduces_gradients_does_so_before_they_are_clipped():
    step, data = make_step(reduce=lambda gradients: [gradient.zero_() for gradient in gradients]), batch()
    step(data.x, data.target, data.present)
    assert step.norm == 0


def test_set_rate_of_a_number_and_of_a_tensor():
    step = make_step()
    rate = torch.tensor(0.5)
    steps.set_rate(step.optimizer, 0.25)
    assert step.optimizer.param_groups[0]["lr"] == 0.25
    step.optimizer.param_groups[0]["lr"] = rate
    steps.set_rate(step.optimizer, 0.125)
    # In place: a captured step reads this very tensor.
    assert step.optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.125


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_learns_in_fp32_weights(amp):
    mixed, plain, data = make_step(amp), make_step(), batch()
    kinds = []
    mixed.model.pose_head[2].register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    for _ in range(20):
        mixed(data.x, data.target, data.present)
        plain(data.x, data.target, data.present)
    assert set(kinds) == {steps.AMP_DTYPES[amp]}
    assert all(parameter.dtype == torch.float32 for parameter in mixed.model.parameters())
    assert mixed.prediction.dtype == mixed.loss.dtype == torch.float32
    assert mixed.loss.item() == pytest.approx(plain.loss.item(), rel=0.05)
    assert mixed.scaler.is_enabled() == (amp == "fp16")


def test_an_overflown_fp16_gradient_costs_a_step_and_no_run(config):
    """The loss scale of the first steps is far too large; the weights must not notice."""

    class Overscaled(Trainer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)

    config = runs.change(runs.change(config, "run", amp="fp16"), "optim", epochs=1)
    folder = runs.train(config, trainer=Overscaled)
    saved = runs.checkpoint_of(folder)
    assert saved["scaler"]["scale"] < 2.0**40
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_mixed_run_goes_on_to_the_bit(config, amp, tmp_path):
    config = runs.change(config, "run", amp=amp)
    whole = runs.train(runs.change(config, "run", out=tmp_path / "whole"))
    assert runs.rows(whole)[-1]["tr_loss"] < 0.9 * runs.rows(whole)[0]["tr_loss"]
    folder = runs.killed_run(config, loss=runs.at_step(8, runs.killed))
    runs.assert_same(runs.resume(folder), whole)
    assert f"fp32, {amp} autocast" in (folder / "train.log").read_text()


def warmed_up(work, device):
    """What `capture` does, on a CPU, where a replay is the work itself."""
    for _ in range(3):
        work()
    return work


@pytest.mark.parametrize("begun", [False, True], ids=["new", "resumed"])
def test_a_capture_leaves_no_trace(begun):
    step, data = make_step(dropout=0.3), batch()
    if begun:
        step(data.x, data.target, data.present)
    untouched = make_step(dropout=0.3)
    if begun:
        untouched(data.x, data.target, data.present)
    held = [parameter.data_ptr() for parameter in step.model.parameters()]
    torch.manual_seed(5)
    replay = steps.capture_training(lambda: step(data.x, data.target, data.present), step, warmed_up)
    assert torch.rand(1) == (torch.manual_seed(5), torch.rand(1))[1]
    # A graph holds addresses.
    assert held == [parameter.data_ptr() for parameter in step.model.parameters()]
    torch.manual_seed(6)
    replay()
    torch.manual_seed(6)
    untouched(data.x, data.target, data.present)
    for one, other in zip(step.model.parameters(), untouched.model.parameters(), strict=True):
        assert torch.equal(one, other)
        for name, tensor in untouched.optimizer.state[other].items():
            assert torch.equal(step.optimizer.state[one][name], tensor), name


def test_a_graphed_run_is_the_eager_one(config, whole):
    """The loop around a captured step, with a capture that a CPU can do."""

    class Graphed(Trainer):
        capture = staticmethod(warmed_up)

        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.graph = True

    runs.assert_same(runs.train(config, trainer=Graphed), whole)


def test_a_graph_needs_a_gpu(config, refused):
    with pytest.raises(ConfigError, match="graph: expected a GPU to run the graph on, got cpu"):
        runs.train(runs.change(config, "run", graph=True))
    with pytest.raises(ConfigError, match="graph: expected amp none or bf16 with it, got fp16"):
        RunConfig(graph=True, amp="fp16")
    refused("graph: expected a GPU", *runs.options(config), "--graph")
    assert not config.run.out.exists()


def test_the_random_state_comes_back():
    state = steps.get_random_state(torch.device("cpu"))
    drawn = torch.rand(3)
    # One saved on a GPU's machine is longer.
    steps.set_random_state(torch.cat([state, torch.zeros(16, dtype=torch.uint8)]), torch.device("cpu"))
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_graph_on_a_gpu_trains_as_without(config, amp, backend):
    config = runs.change(runs.change(config, "run", device="cuda", amp=amp), "model", dropout=0.0, backend=backend)
    eager, graphed = runs.train(config), runs.train(runs.change(config, "run", graph=True))
    for row, expected in zip(runs.timeless(graphed), runs.timeless(eager), strict=True):
        assert row == pytest.approx(expected, rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_step_does_not_wait_for_the_gpu(config, backend):
    config = runs.change(runs.change(config, "run", device="cuda"), "model", backend=backend)
    device = torch.device("cuda")
    trainer, _ = prepare(config, Team(), runs.PARTS)
    indices = torch.arange(4, device=device)
    trainer.learn(indices)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a mode that is new to torch
            torch.cuda.set_sync_debug_mode("error")
        trainer.learn(indices)
    finally:
        torch.cuda.set_sync_debug_mode("default")
