"""Whole models through torch's own exporters: ONNX's GRU operator, and ATen operators for other converters."""

import pytest
import torch
from torch import nn

import bigru
from bigru import BiGRU

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SIZES = [(4, 2), (1, 1), (6, 5)]  # T, B
FREE = ({0: torch.export.Dim("time"), 1: torch.export.Dim("batch")},)


class Whole(nn.Module):
    """A model with a GRU inside."""

    def __init__(self, gru):
        super().__init__()
        self.gru, self.head = gru, nn.Linear(8, 2)

    def forward(self, x, lengths=None):
        y, h_n = self.gru(x) if lengths is None else self.gru(x, lengths=lengths)
        return self.head(y), h_n


def whole(backend, **options):
    torch.manual_seed(0)
    return Whole(BiGRU(3, 4, 2, backend=backend, **options)).eval()


def check(run, model, sizes=SIZES):
    model.gru.backend = "torch"
    for steps, batch in sizes:
        x = torch.randn(steps, batch, 3)
        with torch.no_grad():
            for ours, wanted in zip(run(x), model(x), strict=True):
                torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


@pytest.fixture
def in_onnxruntime(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")

    def load(program):
        program.save(tmp_path / "model.onnx")
        return onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])

    return load


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "bias", "exported"),
    [("triton", True, False), ("triton", True, True), ("torch", False, True), ("reference", False, False)],
)
def test_onnx_gets_its_own_operator(backend, bias, exported, in_onnxruntime, kernel_device):
    model, x = whole(backend, bias=bias).to(kernel_device), (torch.randn(4, 2, 3, device=kernel_device),)
    options = {"dynamo": True, "verbose": False}
    if exported:
        program = torch.onnx.export(torch.export.export(model, x, dynamic_shapes=FREE), **options)
    else:
        program = torch.onnx.export(model, x, dynamic_shapes=FREE, **options)
    # One a layer, or, of an exported program, one a direction.
    assert sum(node.op_type == "GRU" for node in program.model_proto.graph.node) == (4 if exported else 2)
    assert {opset.domain for opset in program.model_proto.opset_import} == {""}
    session = in_onnxruntime(program)
    name = session.get_inputs()[0].name
    check(lambda x: map(torch.from_numpy, session.run(None, {name: x.numpy()})), model.cpu())


@pytest.mark.slow
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_are_an_input_of_the_onnx_graph(batch_first, in_onnxruntime):
    model = whole("triton", batch_first=batch_first)
    x = torch.randn(4, 2, 3)
    given = x, torch.tensor([1, 2, 1, 2] if batch_first else [4, 2])
    free = *FREE, {0: FREE[0][0 if batch_first else 1]}
    program = torch.onnx.export(model, given, dynamo=True, dynamic_shapes=free, verbose=False)
    session = in_onnxruntime(program)
    model.gru.backend = "torch"
    for lengths in ([2, 4], [3, 1, 5]):
        lengths = torch.tensor(lengths)
        shape = (len(lengths), 6) if batch_first else (6, len(lengths))
        x = torch.randn(*shape, 3)
        actual = session.run(None, {"x": x.numpy(), "lengths": lengths.numpy()})
        with torch.no_grad():
            for ours, wanted in zip(actual, model(x, lengths=lengths), strict=True):
                torch.testing.assert_close(torch.from_numpy(ours), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_nn_gru_keeps_its_time(in_onnxruntime):
    model = Whole(nn.GRU(3, 4, 2, bidirectional=True)).eval()
    program = torch.onnx.export(model, (torch.randn(4, 2, 3),), dynamo=True, dynamic_shapes=FREE, verbose=False)
    session = in_onnxruntime(program)
    assert session.get_inputs()[0].shape[0] == "time"
    y, _ = session.run(None, {session.get_inputs()[0].name: torch.randn(6, 2, 3).numpy()})
    assert y.shape == (4, 3, 2)  # of 6 steps of 2 sequences


@pytest.mark.parametrize(("free", "bias"), [(True, True), (False, False)])
def test_a_program_becomes_aten_operators(free, bias):
    model = whole("torch", bias=bias)
    program = torch.export.export(model, (torch.randn(4, 2, 3),), dynamic_shapes=FREE if free else None)
    program = program.run_decompositions(bigru.decompositions())
    namespaces = {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")}
    assert namespaces == ({"aten", "higher_order"} if free else {"aten"})
    check(program.module(), model, SIZES if free else SIZES[:1])
