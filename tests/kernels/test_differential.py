"""Random configurations of `BiGRU` against nn.GRU in fp64: forward, h_n and every gradient that is asked for."""

from types import SimpleNamespace

import pytest
import torch
from support import TOLERANCE, error
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from bigru import BiGRU
from bigru.kernels.cpu import KERNEL

pytest.importorskip("hypothesis")  # not on every GPU machine

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")

# Sums in another order: ATen's own error in fp64 beside the reference's.
TOLERANCES = {dtype: TOLERANCE.get((dtype, "fp32"), 1e-12) for dtype in (torch.float64, torch.float32, torch.bfloat16)}


@st.composite
def configurations(draw, dtypes, largest):
    """One module, one input, and what of both wants gradients."""
    c = SimpleNamespace(steps=draw(st.integers(1, largest)), batch=draw(st.none() | st.integers(0, largest)))
    c.inputs, c.hidden, c.layers = (draw(st.integers(1, most)) for most in (9, 19, 3))
    c.bias, c.batch_first, c.state = (draw(st.booleans()) for _ in range(3))
    c.lengths = None  # of a PackedSequence
    if draw(st.booleans()):
        c.batch = draw(st.integers(1, largest))
        c.lengths = tuple(draw(st.lists(st.integers(1, c.steps), min_size=c.batch, max_size=c.batch)))
    c.dtype = draw(st.sampled_from(dtypes))
    every = (1 << 2 + c.layers * (8 if c.bias else 4)) - 1
    # Bit i: whether leaf i, of input, state and the parameters in order, requires a gradient.
    c.wanted = draw(st.just(every) | st.integers(0, every))
    c.layout = draw(st.sampled_from(["contiguous", "transposed", "expanded", "strided"]))
    c.seed = draw(st.integers(0, 2**16))
    return c


def laid_out(x, layout):
    """The same numbers, or fewer different ones, in another memory layout."""
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return x[..., :1].expand_as(x)
    if layout == "strided":
        return torch.stack([x, -x], -1)[..., 0]
    return x


def run(gru, x, hx, c, dtype, device):
    """Outputs and asked-for gradients by name, for upstream gradients that depend on nothing but the configuration."""
    x, hx = x.detach().to(device, dtype), None if hx is None else hx.detach().to(device, dtype)
    leaves = {"input": x, "hx": hx} | dict(gru.named_parameters())
    for i, leaf in enumerate(leaves.values()):
        if leaf is not None:
            leaf.requires_grad_(bool(c.wanted >> i & 1))
    call = laid_out(x, c.layout)
    if c.lengths is not None:
        call = pack_padded_sequence(call, c.lengths, batch_first=c.batch_first, enforce_sorted=False)
    y, h_n = gru(call, hx)
    y = y.data if isinstance(y, PackedSequence) else y
    torch.manual_seed(c.seed + 1)
    upstream = [torch.randn(tensor.shape, dtype=torch.float64) for tensor in (y, h_n)]
    if y.requires_grad:
        torch.autograd.backward([y, h_n], [g.to(device, dtype) for g in upstream])
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf is not None}
    assert all((gradients[name] is not None) == leaves[name].requires_grad for name in gradients)
    return {"y": y, "h_n": h_n} | {name: gradient for name, gradient in gradients.items() if gradient is not None}


def distance(actual, expected):
    """Norm of the difference over the expected norm, or over that of ones: random sizes make sums that cancel."""
    return error(actual, expected) * min(1.0, (expected.norm() / max(1, expected.numel()) ** 0.5).item() or 1.0)


def check(c, backend, device):
    torch.manual_seed(c.seed)
    arguments = c.inputs, c.hidden, c.layers, c.bias, c.batch_first
    ours = BiGRU(*arguments, backend=backend, dtype=c.dtype, device=device)
    theirs = nn.GRU(*arguments, bidirectional=True, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    batch = () if c.batch is None else (c.batch,)
    outer = (*batch, c.steps) if c.batch_first else (c.steps, *batch)
    x = torch.randn(*outer, c.inputs).to(c.dtype)
    hx = torch.randn(2 * c.layers, *batch, c.hidden).to(c.dtype) if c.state else None
    actual, expected = run(ours, x, hx, c, c.dtype, device), run(theirs, x, hx, c, torch.float64, "cpu")
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == c.dtype, name
        assert distance(value, expected[name]) < TOLERANCES[c.dtype], name


# The same examples every time.
REPEATABLE = settings(derandomize=True, deadline=None, database=None)
WIDE = [torch.float64, torch.float32]


@settings(REPEATABLE, max_examples=60)
@given(configurations([*WIDE, torch.bfloat16], 6))
def test_torch(configuration):
    check(configuration, "torch", "cpu")


@settings(REPEATABLE, max_examples=60)
@given(configurations(WIDE, 5))
def test_reference(configuration):
    check(configuration, "reference", "cpu")


@pytest.mark.skipif(KERNEL.instructions == "none", reason="the C extension is not built")
@settings(REPEATABLE, max_examples=60)
@given(configurations(WIDE, 12))
def test_cpu(configuration):
    check(configuration, "cpu", "cpu")


# The interpreter is too slow to look for a smaller failure.
@pytest.mark.slow
@settings(REPEATABLE, max_examples=12, phases=[Phase.explicit, Phase.generate])
@given(configurations([torch.float32, torch.bfloat16], 3))
def test_triton(triton_device, configuration):
    check(configuration, "triton", triton_device)
