"""nn.GRU to BiGRU and back: the same parameters, hooks, modes, and who is left alone."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import bigru
from bigru import BiGRU, HandForecaster


def make(**options):
    torch.manual_seed(0)
    return nn.GRU(3, 4, **({"num_layers": 2, "batch_first": True, "bidirectional": True} | options))


def same_parameters(a, b):
    return all(x is y for x, y in zip(a.parameters(), b.parameters(), strict=True))


class TestOneModule:
    @pytest.mark.parametrize(
        ("option", "value"),
        [
            *(("bias", True), ("bias", False), ("dropout", 0.5), ("batch_first", False), ("num_layers", 1)),
            *(("dtype", torch.float64), ("device", "meta")),
        ],
    )
    def test_there_and_back(self, option, value):
        gru = make(**{option: value}).eval()
        gru.weight_hh_l0.requires_grad_(False)
        state = torch.random.get_rng_state()
        ours = BiGRU.from_gru(gru, backend="reference", precision="tf32")
        back = ours.to_gru()
        assert torch.equal(torch.random.get_rng_state(), state)
        assert (type(ours), type(back)) == (BiGRU, nn.GRU)
        assert (ours.backend, ours.precision, ours.training) == ("reference", "tf32", False)
        assert same_parameters(gru, ours)
        assert same_parameters(gru, back)
        assert repr(back) == repr(gru)
        assert vars(back).keys() == vars(gru).keys()
        if gru.weight_hh_l0.is_meta:
            return
        x = torch.randn(2, 5, 3, dtype=gru.weight_hh_l0.dtype)
        torch.testing.assert_close(ours(x), gru(x))
        assert torch.equal(back(x)[0], gru(x)[0])

    def test_the_original_is_left_alone(self):
        gru = make()
        ours = BiGRU.from_gru(gru)
        ours.double()
        ours.weight_ih_l0 = nn.Parameter(torch.zeros(12, 3, dtype=torch.float64))
        ours.register_forward_hook(lambda *_: None)
        assert gru.weight_ih_l0 is not ours.weight_ih_l0
        assert not gru._forward_hooks
        assert copy.deepcopy(gru)(torch.zeros(1, 2, 3).to(gru.weight_ih_l0))[0].shape == (1, 2, 8)

    def test_what_is_no_bidirectional_gru(self):
        class Mine(nn.GRU):
            pass

        for module, error, message in [
            (Mine(3, 4, bidirectional=True), TypeError, "got Mine"),
            (nn.LSTM(3, 4, bidirectional=True), TypeError, "got LSTM"),
            (nn.GRU(3, 4), ValueError, "bidirectional=True"),
            (nn.GRU(3, 4, 1, True, False, 0.0, True, 2), ValueError, "proj_size"),
        ]:
            with pytest.raises(error, match=message):
                BiGRU.from_gru(module)
        with pytest.raises(ValueError, match="backend: expected one of"):
            BiGRU.from_gru(make(), backend="fast")
        parametrized = parametrizations.weight_norm(BiGRU(3, 4), "weight_hh_l0")
        with pytest.raises(TypeError, match="a subclass"):
            parametrized.to_gru()

    @pytest.mark.parametrize("make_one", [make, lambda: BiGRU(3, 4, 2, batch_first=True)], ids=["nn.GRU", "BiGRU"])
    def test_a_compiled_call_stays_behind_and_a_forward_of_an_instance_is_refused(self, make_one):
        module = make_one()
        convert = BiGRU.from_gru if isinstance(module, nn.GRU) else BiGRU.to_gru
        module._compiled_call_impl = lambda *_: pytest.fail("another module's code")  # as module.compile() leaves
        assert convert(module)(torch.randn(2, 5, 3))[0].shape == (2, 5, 8)
        assert module._compiled_call_impl is not None
        module.forward = functools.partial(module.forward, hx=None)  # as accelerate's hooks do
        with pytest.raises(TypeError, match="without a forward of its own"):
            convert(module)


class TestModel:
    def test_replaces_in_place(self):
        shared = make()
        model = nn.ModuleDict({"a": shared, "b": nn.Sequential(make(dropout=0.1), nn.Linear(8, 2)), "again": shared})
        model.update({"one": nn.GRU(3, 4), "lstm": nn.LSTM(3, 4, bidirectional=True)})
        model.b.eval()
        before, ids = copy.deepcopy(model), {name: id(p) for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        assert bigru.replace_gru(model, backend="reference", precision="tf32") == ["a", "b.0"]
        assert model.a is shared is model["again"]
        assert [type(model[name]) for name in ("a", "again", "one", "lstm")] == [BiGRU, BiGRU, nn.GRU, nn.LSTM]
        assert (model.b[0].backend, model.b[0].precision, model.b[0].dropout) == ("reference", "tf32", 0.1)
        assert (model.a.training, model.b[0].training) == (True, False)
        assert {name: id(p) for name, p in model.named_parameters()} == ids
        x = torch.randn(2, 5, 3)
        torch.testing.assert_close(model.a(x), before.a(x))
        model.a(x)[0].sum().backward()
        optimizer.step()
        assert not torch.equal(model.a.weight_hh_l0, before.a.weight_hh_l0)
        assert bigru.replace_gru(model) == []

    def test_hooks_and_pruning_go_on_and_a_compiled_call_does_not(self):
        gru, x, calls = prune.random_unstructured(make(), "weight_hh_l0", 0.5), torch.randn(2, 5, 3), []
        gru.register_forward_hook(lambda module, *_: calls.append(type(module)))
        expected = gru(x)[0]
        gru._compiled_call_impl = lambda *_: pytest.fail("nn.GRU's code")  # as gru.compile() leaves it
        assert bigru.replace_gru(gru, backend="reference") == [""]
        torch.testing.assert_close(gru(x)[0], expected)
        assert gru(x, lengths=[5, 2])[0].shape == (2, 5, 8)
        assert calls == [nn.GRU, BiGRU, BiGRU]

    def test_subclasses_are_left_and_wrapped_and_parametrized_ones_named(self):
        class Mine(nn.GRU):
            pass

        model = nn.ModuleDict({"mine": Mine(3, 4, bidirectional=True), "wrapped": make(), "plain": make()})
        model.wrapped.forward = functools.partial(model.wrapped.forward, hx=None)
        with pytest.warns(UserWarning, match="wrapped has a forward of its own and was left"):
            assert bigru.replace_gru(model) == ["plain"]
        del model["wrapped"]
        model["normed"] = parametrizations.weight_norm(make(), "weight_hh_l0")
        with pytest.warns(UserWarning, match="normed is parametrized and was left"):
            assert bigru.replace_gru(model) == []
        parametrize.remove_parametrizations(model["normed"], "weight_hh_l0")
        assert bigru.replace_gru(model) == ["normed"]

    def test_a_forecaster_has_nothing_to_replace_and_bad_options_change_nothing(self):
        assert bigru.replace_gru(HandForecaster(hidden_size=4)) == []
        gru = make()
        with pytest.raises(ValueError, match="precision: expected one of"):
            bigru.replace_gru(gru, precision="fast")
        assert type(gru) is nn.GRU
