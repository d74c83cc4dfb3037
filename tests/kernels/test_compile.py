"""What nn.GRU cannot: one graph under torch.compile and torch.export, with batch and time free, training too."""

import copy
import functools
import shutil

import pytest
import torch
from support import error, same, trained
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from bigru import BiGRU

# B and T; a compiler takes sizes that are equal at first, features among them, for equal ever after.
SIZES = [(2, 3), (4, 5), (3, 4)]
# Of the compiler's own making.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]
COMPILER = "inductor" if shutil.which("g++") else "aot_eager"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=["triton", "torch"])
def gru(request, kernel_device):
    """On the fused kernels, and on ATen's GRU, for which under a compiler a loop in an operator stands."""
    if request.param == "triton":
        pytest.importorskip("triton")
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return BiGRU(6, 4, 2, batch_first=True, backend=request.param, device=kernel_device)


def aten(gru):
    """The same on ATen's GRU, uncompiled: right by other tests, and quick."""
    other = BiGRU(6, 4, 2, batch_first=True, backend="torch", device=gru.weight_hh_l0.device)
    other.load_state_dict(gru.state_dict())
    return other


# Most of the time is inductor's own, and it sees one operator whatever the backend: on a CPU one goes through it.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("gru", "compiler"),
    [("triton", COMPILER if torch.cuda.is_available() else "aot_eager"), ("torch", COMPILER)],
    indirect=["gru"],
)
def test_one_graph_serves_every_batch_and_length(gru, compiler, kernel_device):
    compiled, other = torch.compile(gru, fullgraph=True, dynamic=True, backend=compiler), aten(gru)
    counter = torch._dynamo.utils.counters["stats"]
    for batch, steps in SIZES:
        x = torch.randn(batch, steps, 6, device=kernel_device)
        assert same(trained(gru, x, run=compiled), trained(other, x), 1e-5)
    assert counter["unique_graphs"] == 1
    # Inference is one more, since it keeps nothing.
    with torch.no_grad():
        for batch, steps in SIZES:
            x = torch.randn(batch, steps, 6, device=kernel_device)
            assert same(compiled(x), other(x), 1e-5)
    assert counter["unique_graphs"] == 2


@pytest.mark.parametrize("gru", ["torch"], indirect=True)
def test_left_to_itself_it_compiles_again_once(gru, kernel_device):
    # For the first sizes as they are, then once for sizes that change.
    compiled = torch.compile(gru, fullgraph=True, backend="aot_eager")
    for batch, steps in SIZES:
        x, hx = torch.randn(batch, steps, 6, device=kernel_device), torch.randn(4, batch, 4, device=kernel_device)
        assert same(trained(gru, x, hx, compiled), trained(gru, x, hx), 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


LENGTHS_ARE_DATA = {
    "time": lambda gru, x, hx, n, mask: gru(x[:, : n.max().item()], hx),
    "batch": lambda gru, x, hx, n, mask: gru(x[mask]),
    "batch and state": lambda gru, x, hx, n, mask: gru(x[mask], hx[:, mask]),
}


@pytest.mark.slow
@pytest.mark.parametrize("run", LENGTHS_ARE_DATA.values(), ids=LENGTHS_ARE_DATA.keys())
@pytest.mark.parametrize("gru", ["torch"], indirect=True)
@torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True)
def test_a_size_may_be_data(run, gru, kernel_device):
    x, hx = torch.randn(3, 5, 6, device=kernel_device), torch.randn(4, 3, 4, device=kernel_device)
    mask = torch.tensor([True, False, True], device=kernel_device)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for n in (torch.tensor([2, 4]), torch.tensor([3, 1])):
        assert same(compiled(gru, x, hx, n, mask), run(gru, x, hx, n, mask), 1e-5)
    if run is LENGTHS_ARE_DATA["time"]:
        with pytest.raises(RuntimeError, match="at least one time step"):
            compiled(gru, x, hx, torch.tensor([0]), mask)


def test_export_leaves_batch_and_time_free(gru, kernel_device):
    gru.eval()
    free = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("time")},)
    program = torch.export.export(gru, (torch.randn(2, 3, 6, device=kernel_device),), dynamic_shapes=free)
    targets = {node.target for node in program.graph.nodes}
    assert torch.ops.bigru.gru_forward.default in targets
    with torch.no_grad():
        for batch, steps in SIZES:
            x = torch.randn(batch, steps, 6, device=kernel_device)
            assert same(program.module()(x), aten(gru)(x), 1e-5)


def test_autocast_means_the_same_when_compiled(gru, kernel_device):
    compiled = torch.compile(gru, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 6, device=kernel_device)
    with torch.no_grad(), torch.autocast(kernel_device.type, dtype=torch.bfloat16):
        (y, _), (expected, _) = compiled(x), gru(x)
    # cuDNN's GRU takes fp16 whatever dtype was asked for.
    assert y.dtype == expected.dtype or (gru.backend == "torch" and expected.dtype == torch.float16)
    assert error(y, expected) < 2e-2


@needs_gpu
class TestCudaGraphs:
    """A capture records what is launched, so nothing may wait for the GPU or be tuned while it lasts."""

    @pytest.fixture(params=[("triton", 32), ("triton", 160), ("resident", 32), ("cooperative", 160)], ids=str)
    def gru(self, request):
        # By name: "auto" takes ATen's GRU where nothing is proven.
        backend, hidden = request.param
        torch.manual_seed(0)
        return BiGRU(6, hidden, 2, batch_first=True, backend=backend, device="cuda")

    def test_forward(self, gru):
        x = torch.randn(3, 5, 6, device="cuda")
        with torch.no_grad():
            # It replaces the forward of the module that it is given.
            graphed = torch.cuda.make_graphed_callables(copy.deepcopy(gru).eval(), (x,))
            gru.eval()
            for _ in range(2):
                x = torch.randn_like(x)
                assert same(graphed(x), gru(x))

    def test_training_step(self, gru):
        optimizer = torch.optim.SGD(gru.parameters(), lr=0.1)
        x = torch.randn(3, 5, 6, device="cuda")

        def step():
            optimizer.zero_grad(set_to_none=True)
            gru(x)[0].square().sum().backward()
            optimizer.step()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        start = {name: value.clone() for name, value in gru.state_dict().items()}
        x.copy_(torch.randn_like(x))
        graph.replay()
        replayed = [parameter.clone() for parameter in gru.parameters()]
        gru.load_state_dict(start)
        step()
        assert same(replayed, gru.parameters())


@pytest.fixture
def hidden_launches(monkeypatch):
    """A launch on a GPU is invisible to what records operators; the interpreter's copies would not be."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    launch = interpreter.GridExecutor.__call__

    def hidden(self, *args, **kwargs):
        with _disable_current_modes():
            return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", hidden)


@pytest.mark.parametrize("gru", ["triton"], indirect=True)
@pytest.mark.usefixtures("hidden_launches")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("tracer", [lambda f, x: make_fx(f)(x), torch.jit.trace], ids=["make_fx", "jit.trace"])
def test_tracers_record_the_operators(tracer, gru, kernel_device):
    x, other = (torch.randn(2, 3, 6, device=kernel_device) for _ in range(2))
    with torch.no_grad():
        traced = tracer(gru, x)
        assert same(traced(other), gru(other))


@pytest.mark.parametrize("gru", ["triton"], indirect=True)
@pytest.mark.usefixtures("hidden_launches")
def test_selective_checkpointing(gru, kernel_device):
    x = torch.randn(2, 3, 6, device=kernel_device)
    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])

    def saved(x):
        return checkpoint(gru, x, use_reentrant=False, context_fn=contexts)

    assert same(trained(gru, x, run=saved), trained(gru, x))
