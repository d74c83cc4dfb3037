"""What nn.GRU cannot: one graph under torch.compile and torch.export, with batch and time free, training too."""

import shutil

import pytest
import torch
from support import error

from bigru import BiGRU

pytest.importorskip("triton")

# B and T; a compiler takes sizes that are equal at first, features among them, for equal ever after.
SIZES = [(2, 3), (5, 4), (3, 7), (2, 5)]


@pytest.fixture
def gru(kernel_device):
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return BiGRU(6, 4, 2, batch_first=True, backend="triton", device=kernel_device)


def trained(module, gru, x):
    """Outputs, and the gradients of the input and of every parameter."""
    gru.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y, h_n = module(x)
    torch.autograd.backward((y, h_n), (torch.cos(y.detach()), torch.sin(h_n.detach())))
    return [y, h_n, x.grad, *(parameter.grad for parameter in gru.parameters())]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of the compiler's own making
@pytest.mark.parametrize(
    "compiler",
    [
        "aot_eager",
        pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")),
    ],
)
def test_one_graph_serves_every_batch_and_length(gru, compiler, kernel_device):
    compiled = torch.compile(gru, fullgraph=True, dynamic=True, backend=compiler)
    counter = torch._dynamo.utils.counters["stats"]
    for batch, steps in SIZES:
        x = torch.randn(batch, steps, 6, device=kernel_device)
        for ours, theirs in zip(trained(compiled, gru, x), trained(gru, gru, x), strict=True):
            assert error(ours, theirs) < 1e-6
    assert counter["unique_graphs"] == 1


def test_export_leaves_batch_and_time_free(gru, kernel_device):
    gru.eval()
    free = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("time")},)
    program = torch.export.export(gru, (torch.randn(2, 3, 6, device=kernel_device),), dynamic_shapes=free)
    targets = {node.target for node in program.graph.nodes}
    assert torch.ops.bigru.gru_forward.default in targets
    with torch.no_grad():
        for batch, steps in SIZES:
            x = torch.randn(batch, steps, 6, device=kernel_device)
            for ours, theirs in zip(program.module()(x), gru(x), strict=True):
                assert error(ours, theirs) < 1e-6
