"""The ONNX model against the module it was made of, in onnxruntime, over several batches and lengths."""

import builtins

import numpy as np
import pytest
import torch
from support import error
from torch.nn.utils import parametrizations

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


def check(model, session, batch_first=True):
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
            assert error(torch.from_numpy(value), wanted) < 1e-6


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


def test_forecaster(session):
    torch.manual_seed(0)
    model = HandForecaster(hidden_size=6).eval()
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


def test_dropout_is_left_out_and_the_model_unchanged(session):
    gru = BiGRU(3, 5, 2, batch_first=True, dropout=0.9).train()
    run = session(gru)
    assert gru.training
    check(gru.eval(), run)


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


def test_what_cannot_be_exported(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="model: expected a BiGRU or a HandForecaster, got GRU"):
        export_onnx(torch.nn.GRU(3, 4, bidirectional=True), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="state: expected False"):
        export_onnx(HandForecaster(hidden_size=4), tmp_path / "model.onnx", state=True)
    genuine = builtins.__import__

    def without_onnx(name, *args, **kwargs):
        if name == "onnx":
            raise ModuleNotFoundError("No module named 'onnx'", name="onnx")
        return genuine(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_onnx)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'bigru\[onnx\]'"):
        export_onnx(BiGRU(3, 4), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
