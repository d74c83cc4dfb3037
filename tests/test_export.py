"""The ONNX model against the module it was made of, in onnxruntime, over several batches and lengths."""

import sys

import numpy as np
import pytest
import torch
from support import error
from torch.nn.utils import parametrizations, prune

from bigru import BiGRU, HandForecaster, export_onnx

SIZES = [(1, 1), (2, 3), (5, 7), (3, 20)]  # B, T


@pytest.fixture
def session(tmp_path):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")

    def make(model, **options):
        path = tmp_path / "model.onnx"
        export_onnx(model, path, **options)
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    return make


def check(model, session, batch_first=True, tolerance=1e-6):
    """Every size that `SIZES` lists, through one session."""
    inputs = {value.name: value.shape for value in session.get_inputs()}
    for batch, steps in SIZES:
        x = torch.randn(batch, steps, inputs["input"][-1])
        x = x if batch_first else x.transpose(0, 1).contiguous()
        given = [x] + ([torch.randn(inputs["hx"][0], batch, inputs["hx"][2])] if "hx" in inputs else [])
        with torch.no_grad():
            expected = model(*given)
        expected = expected if isinstance(expected, tuple) else (expected,)
        actual = session.run(None, dict(zip(inputs, (tensor.numpy() for tensor in given), strict=True)))
        for value, wanted in zip(actual, expected, strict=True):
            assert value.dtype == np.float32
            assert error(torch.from_numpy(value), wanted) < tolerance


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
def test_bigru(layers, batch_first, bias, state, session):
    torch.manual_seed(0)
    gru = BiGRU(3, 5, layers, bias, batch_first)
    run = session(gru, state=state)
    assert [value.name for value in run.get_outputs()] == ["output", "h_n"]
    outer = ["batch", "time"] if batch_first else ["time", "batch"]
    assert run.get_inputs()[0].shape == [*outer, 3]
    assert run.get_outputs()[0].shape == [*outer, 10]
    check(gru, run, batch_first)


@pytest.mark.parametrize("options", [{}, {"residual": True, "input_size": 86}])
def test_forecaster(session, options):
    torch.manual_seed(0)
    model = HandForecaster(hidden_size=6, **options).eval()
    with torch.no_grad():
        for parameter in model.pose_head.parameters():
            parameter.uniform_(-1, 1)
    run = session(model)
    assert [(value.name, value.shape) for value in run.get_outputs()] == [("output", ["batch", "time", 84])]
    check(model, run)


def test_operators_are_onnxs_own_and_the_gru_one_a_layer(tmp_path):
    onnx = pytest.importorskip("onnx")
    export_onnx(HandForecaster(hidden_size=4), tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
    grus = [node for node in model.graph.node if node.op_type == "GRU"]
    assert len(grus) == 2
    for node in grus:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["direction"] == b"bidirectional"
        assert attributes["linear_before_reset"] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_become_float32(dtype, session):
    gru = BiGRU(3, 5, batch_first=True, dtype=dtype)
    run = session(gru)
    check(gru.float(), run)


def test_parametrized_weights_as_computed(session):
    gru = parametrizations.weight_norm(BiGRU(3, 5, batch_first=True), "weight_hh_l0")
    with torch.no_grad():
        gru.parametrizations.weight_hh_l0.original0.mul_(2)
    check(gru, session(gru))


def scaled_by_a_hook(module, name):
    """A user's own: the attribute is written before each call, and at no other time."""
    scaled = module._parameters.pop(name)
    module.register_parameter(f"{name}_stored", scaled)
    setattr(module, name, scaled.detach() * 2)
    module.register_forward_pre_hook(lambda module, _: setattr(module, name, getattr(module, f"{name}_stored") * 2))


HOOKS = {
    "pruning": lambda module, name: prune.l1_unstructured(module, name, 0.5),
    # The norms by hook, which torch deprecates and models in the wild hold.
    "weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": torch.nn.utils.spectral_norm,
    "a user's": scaled_by_a_hook,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("where", ["gru", "forecaster's gru", "forecaster's head"])
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS.keys())
def test_weights_that_a_pre_hook_writes_are_those_of_a_call(hook, where, session):
    # The attribute is written when the module is called: after loading it is stale until then.
    torch.manual_seed(0)
    model = BiGRU(3, 5, batch_first=True) if where == "gru" else HandForecaster(hidden_size=6)
    core = model if where == "gru" else model.encoder.core
    hooked, name = (model.pose_head[2], "weight") if where == "forecaster's head" else (core, "weight_hh_l0")
    hook(hooked, name)
    model.load_state_dict({key: torch.rand_like(value) - 0.5 for key, value in model.state_dict().items()})
    run = session(model)
    check(model.eval(), run, tolerance=1e-5)  # a loaded norm may be far from 1, and its weight large


def test_default_device_and_dtype_are_not_taken(session):
    gru = BiGRU(3, 5, 2, batch_first=True)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            run = session(gru)
    finally:
        torch.set_default_dtype(torch.float32)
    check(gru, run)


def test_dropout_is_left_out_and_a_norm_does_not_iterate(session):
    gru = BiGRU(3, 5, 2, batch_first=True, dropout=0.9)
    gru = parametrizations.spectral_norm(gru, "weight_hh_l0").train()
    before = {key: value.clone() for key, value in gru.state_dict().items()}
    run = session(gru)
    assert gru.training
    assert all(torch.equal(value, before[key]) for key, value in gru.state_dict().items())
    check(gru.eval(), run)


class Doubled(BiGRU):
    def forward(self, *args, **kwargs):
        y, h_n = super().forward(*args, **kwargs)
        return 2 * y, h_n


def with_a_forward_of_its_own(module):
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)
    return module


def changes_input(module, args):
    return (args[0] * 2,)


def changes_output(module, args, y):
    return y * 2


def of_the_forecaster(change):
    """Returns what makes a forecaster and changes it."""

    def make():
        model = HandForecaster(hidden_size=4)
        change(model.encoder, model.pose_head)
        return model

    return make


LEFT_OUT = {
    "model: expected the forward of BiGRU, got one of Doubled": lambda: Doubled(3, 4),
    "encoder: expected the forward of Encoder, got one": of_the_forecaster(
        lambda encoder, head: with_a_forward_of_its_own(encoder)
    ),
    "pose_head.1: expected no forward hooks, got changes_output": of_the_forecaster(
        lambda encoder, head: head[1].register_forward_hook(changes_output)
    ),
    "encoder.core: expected forward pre-hooks that leave the input alone, got changes_input": of_the_forecaster(
        lambda encoder, head: encoder.core.register_forward_pre_hook(changes_input)
    ),
    "pose_head.1: expected the forward of Dropout or Identity, got one of Tanh": of_the_forecaster(
        lambda encoder, head: head.__setitem__(1, torch.nn.Tanh())
    ),
    "pose_head: expected LayerNorm, Dropout and Linear, got 4 modules": of_the_forecaster(
        lambda encoder, head: head.append(torch.nn.Tanh())
    ),
}


@pytest.mark.parametrize("message", LEFT_OUT)
def test_what_the_graph_would_leave_out_is_refused_by_name(message, tmp_path):
    pytest.importorskip("onnx")
    with pytest.raises(TypeError, match=message):
        export_onnx(LEFT_OUT[message](), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_difference_found_in_onnxruntime_is_refused(session, tmp_path):
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, y: (y[0] * 2, y[1]) if isinstance(module, BiGRU) else None
    )
    try:
        with pytest.raises(RuntimeError, match=r"model: its output and the ONNX graph's differ by 0\.5"):
            session(BiGRU(3, 4))
    finally:
        handle.remove()
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="model: expected a BiGRU or a HandForecaster, got GRU"):
        export_onnx(torch.nn.GRU(3, 4, bidirectional=True), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="state: expected False"):
        export_onnx(HandForecaster(hidden_size=4), tmp_path / "model.onnx", state=True)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'bigru\[onnx\]'"):
        export_onnx(BiGRU(3, 4), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
