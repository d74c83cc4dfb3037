"""torch.jit.trace and the ONNX exporter that traces: batch, time and lengths stay free, as in nn.GRU."""

import io

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bigru import BiGRU

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore:`torch.jit.trace` is deprecated"),
    # Of checks that read sizes, here as in nn.GRU.
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    # Each of the exporter's, of nn.GRU's graphs as well.
    pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size other than 1:UserWarning"),
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning"),
]

LENGTHS = ([4, 2], [3, 4], [3, 3], [2, 5, 1], [5])
"""Traced with the first: another split, another split of as many rows, more and fewer sequences."""


class Whole(nn.Module):
    """Takes x and lengths, as the user of each form writes it."""

    def __init__(self, gru, form):
        super().__init__()
        self.gru, self.form = gru, form

    def forward(self, x, lengths):
        if self.form == "lengths":
            return self.gru(x, lengths=lengths)
        if self.form == "padded":
            y, h_n = self.gru(x)
            return y, h_n + 0 * lengths.sum()
        y, h_n = self.gru(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(y)[0], h_n


def through_jit(model, args):
    return torch.jit.trace(model, args, check_trace=False)


def through_onnx(model, args):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    axes = {"x": {0: "time", 1: "batch"}, "lengths": {0: "batch"}}
    torch.onnx.export(model, args, file, dynamo=False, input_names=list(axes), dynamic_axes=axes)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return lambda x, lengths: map(torch.from_numpy, session.run(None, {"x": x.numpy(), "lengths": lengths.numpy()}))


@pytest.mark.parametrize("tracer", [through_jit, through_onnx])
@pytest.mark.parametrize("form", ["padded", "packed", "lengths"])
@pytest.mark.parametrize("backend", ["nn.GRU", "auto", "torch", "reference", "triton"])
def test_no_size_and_no_length_is_frozen(backend, form, tracer, kernel_device):
    device = torch.device("cpu")
    if backend == "triton":
        pytest.importorskip("triton")
        if tracer is through_jit and form != "padded":
            pytest.skip("refused, which tests/kernels/test_varlen.py holds")
        device = kernel_device if tracer is through_jit else device
    if backend == "nn.GRU" and form == "lengths":
        pytest.skip("nn.GRU has none")
    torch.manual_seed(0)
    gru = nn.GRU(3, 4, 2, bidirectional=True) if backend == "nn.GRU" else BiGRU(3, 4, 2, backend=backend)
    model = Whole(gru.eval().to(device), form).eval()
    traced = tracer(model, (torch.randn(4, 2, 3, device=device), torch.tensor(LENGTHS[0])))
    if tracer is through_jit and backend != "triton":
        assert "bigru::" not in str(traced.inlined_graph)  # loads where there is no bigru
    if backend != "nn.GRU":
        gru.backend = "torch"  # the trace is made: this one is right by other tests, and quick
    for lengths in LENGTHS[-2:] if (backend, tracer) == ("triton", through_jit) else LENGTHS:
        args = torch.randn(max(lengths), len(lengths), 3, device=device), torch.tensor(lengths)
        with torch.no_grad():
            for ours, wanted in zip(traced(*args), model(*args), strict=True):
                torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


def test_a_bare_module_through_the_tracing_exporter():
    # It passes the defaults of all arguments by position.
    pytest.importorskip("onnx")
    file = io.BytesIO()
    torch.onnx.export(BiGRU(3, 4).eval(), (torch.randn(4, 2, 3),), file, dynamo=False)
    assert file.tell()


@pytest.mark.parametrize("tracer", [through_jit, through_onnx])
def test_the_reference_under_autocast_is_refused(tracer):
    model = Whole(BiGRU(3, 4, backend="reference"), "padded")
    with torch.autocast("cpu"), pytest.raises(RuntimeError, match="cannot be traced under autocast"):
        tracer(model, (torch.randn(4, 2, 3), torch.tensor(LENGTHS[0])))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_scripting_is_refused_and_says_what_to_do():
    model = nn.Sequential(BiGRU(3, 4))
    with pytest.raises(RuntimeError, match="to_gru"):
        torch.jit.script(model)
    assert type(model[0]) is BiGRU
    torch.jit.script(model[0].to_gru())


def test_a_trace_of_a_fused_kernel_passes_its_own_check(kernel_device):
    pytest.importorskip("triton")
    gru, x = BiGRU(3, 4, backend="triton", device=kernel_device), torch.randn(5, 2, 3, device=kernel_device)
    traced = torch.jit.trace(gru, (x,))  # which traces again, without gradients
    for ours, wanted in zip(traced(x), gru(x), strict=True):
        torch.testing.assert_close(ours, wanted)
