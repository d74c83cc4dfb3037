"""`BiGRU` against torch.nn.GRU: parameters, results, gradients, behaviour, errors."""

import inspect
import math
from contextlib import nullcontext

import pytest
import torch
from support import TOLERANCE, Recorder, error, near
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from bigru import BiGRU
from bigru.kernels.cpu import KERNEL

# cuDNN says so, of nn.GRU as of us, where parameters were copied or replaced and not laid out anew.
pytestmark = pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")

SIZES = {  # T, B, I, H, layers, bias
    "all one": (1, 1, 1, 1, 1, True),
    "two layers": (5, 3, 4, 7, 2, True),
    "three layers without bias": (3, 2, 6, 5, 3, False),
    "batch of nine": (2, 9, 3, 17, 1, True),
}


def pair(*args, backend="auto", precision="fp32", dtype=torch.float32, device="cpu", **options):
    """BiGRU of `dtype`, and nn.GRU in fp64 with the same weights."""
    gru = BiGRU(*args, backend=backend, precision=precision, device=device, dtype=dtype, **options)
    theirs = nn.GRU(*args, **options, bidirectional=True, dtype=torch.float64)
    theirs.load_state_dict(gru.state_dict())
    return gru, theirs


def results(gru, x, hx, dy, dh_n, **options):
    """y, h_n and the gradients of x, hx and every parameter."""
    reference = next(gru.parameters())
    x, hx, dy, dh_n = (None if a is None else a.to(reference) for a in (x, hx, dy, dh_n))
    leaves = [a.detach().requires_grad_() for a in (x, hx) if a is not None]
    gru.zero_grad()
    y, h_n = gru(*leaves, **options)
    torch.autograd.backward([y, h_n], [dy, dh_n])
    named = {"y": y, "h_n": h_n, "dx": leaves[0].grad}
    if hx is not None:
        named["dhx"] = leaves[1].grad
    return named | {name: p.grad for name, p in gru.named_parameters()}


def check(gru, theirs, x, hx, tolerance):
    dy = torch.randn(*x.shape[:-1], 2 * gru.hidden_size)
    batch = () if x.dim() == 2 else (x.shape[0 if gru.batch_first else 1],)
    dh_n = torch.randn(2 * gru.num_layers, *batch, gru.hidden_size)
    actual, expected = results(gru, x, hx, dy, dh_n), results(theirs, x, hx, dy, dh_n)
    near(actual, expected, tolerance)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_matches_nn_gru(size, backend, kernel_device):
    steps, batch, inputs, hidden, layers, bias = size
    torch.manual_seed(1)
    gru, theirs = pair(inputs, hidden, layers, bias, backend=backend, device=kernel_device)
    check(gru, theirs, torch.randn(steps, batch, inputs), torch.randn(2 * layers, batch, hidden), 1e-5)


@pytest.mark.parametrize(("dtype", "precision"), TOLERANCE, ids=lambda value: str(value).removeprefix("torch."))
def test_precisions_of_the_fused_kernel(dtype, precision, triton_device):
    torch.manual_seed(1)
    gru, theirs = pair(6, 20, 2, backend="triton", precision=precision, dtype=dtype, device=triton_device)
    x, hx = torch.randn(4, 3, 6).to(dtype), torch.randn(4, 3, 20).to(dtype)
    check(gru, theirs, x, hx, TOLERANCE[dtype, precision])


# The others have no interpreter.
SCALED = {"triton": 8, "resident": 8, "cooperative": 130} if torch.cuda.is_available() else {"triton": 8}
every_scaled = pytest.mark.parametrize(("backend", "hidden"), SCALED.items(), ids=SCALED.keys())


@every_scaled
@pytest.mark.parametrize(("size", "lengths"), [(1e6, [60, 41, 50]), (1e8, None)], ids=["ragged", "whole"])
def test_a_large_initial_state_may_be_forgotten(backend, hidden, size, lengths, triton_device):
    torch.manual_seed(1)
    gru, theirs = pair(3, hidden, backend=backend, device=triton_device)
    with torch.no_grad():
        for module in (gru, theirs):
            for weight in (module.weight_hh_l0, module.weight_hh_l0_reverse):
                weight[:, 0] = 0
                weight[hidden : 2 * hidden, 0] = -0.2  # z = 0 where unit 0 is large
    x, usual = torch.randn(60, 3, 3), torch.rand(2, 3, hidden)
    dy, dh_n, hx = torch.randn(60, 3, 2 * hidden), torch.randn_like(usual), usual.clone()
    hx[:, 1, 0] = size
    actual = results(gru, x, hx, dy, dh_n, lengths=lengths)
    expected = results(BiGRU.from_gru(theirs, backend="torch"), x, hx, dy, dh_n, lengths=lengths)
    assert expected["h_n"].abs().max() < 1
    for name, value in actual.items():
        assert error(value, expected[name]) < (1e-6 if name in ("y", "h_n") else 1e-5), name
    beside = gru(x.to(triton_device), usual.to(triton_device), lengths=lengths)
    for name, value in zip(("y", "h_n"), beside, strict=True):
        assert torch.equal(actual[name][:, ::2], value[:, ::2]), name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@every_scaled
@pytest.mark.parametrize("weight", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("gate", range(3), ids="rzn")
@pytest.mark.parametrize("given_state", [False, True])
def test_an_infinite_weight_spoils_what_it_spoils_in_nn_gru(
    backend, hidden, weight, gate, given_state, triton_device
):  # fmt: skip
    torch.manual_seed(1)
    gru, theirs = pair(3, hidden, backend=backend, device=triton_device)
    with torch.no_grad():
        for module in (gru, theirs):
            module.weight_hh_l0[gate * hidden, 1] = weight
    x, hx = torch.rand(2, 2, 3), torch.rand(2, 2, hidden)
    upstream = torch.randn(2, 2, 2 * hidden), torch.randn(2, 2, hidden)
    actual, expected = (results(module, x, hx if given_state else None, *upstream) for module in (gru, theirs))
    assert expected["y"].isfinite().all() == (given_state and not math.isnan(weight))
    for name, value in actual.items():
        finite = expected[name].isfinite()
        assert torch.equal(value.isfinite().cpu(), finite), name
        assert error(value.cpu()[finite], expected[name][finite]) < 1e-5, name


def test_a_kernel_is_told_whether_there_is_an_initial_state(triton_device):
    gru, _ = pair(3, 4, backend="triton", device=triton_device)
    x = torch.rand(2, 1, 3, device=triton_device)
    with Recorder() as recorder:
        gru(x)
        gru(x, torch.rand(2, 1, 4, device=triton_device))
    forward = torch.ops.bigru.gru_forward.default
    assert [args[7:] for function, args in recorder.calls if function is forward] == [(False,), ()]  # the default


# Any two of the three in every way.
@pytest.mark.parametrize(
    ("batch_first", "given_state", "batched"),
    [(False, False, False), (False, True, True), (True, False, True), (True, True, False)],
)
def test_layouts(batch_first, given_state, batched, backend, kernel_device):
    torch.manual_seed(1)
    gru, theirs = pair(3, 4, 2, backend=backend, batch_first=batch_first, device=kernel_device)
    x = torch.randn(2, 3, 3) if batched else torch.randn(3, 3)
    batch = x.shape[0 if batch_first else 1]
    hx = (torch.randn(4, batch, 4) if batched else torch.randn(4, 4)) if given_state else None
    check(gru, theirs, x, hx, 1e-5)


def test_views_and_strides(backend, kernel_device):
    torch.manual_seed(1)
    gru, theirs = pair(3, 4, backend=backend, device=kernel_device)
    check(gru, theirs, torch.randn(3, 2, 5).permute(2, 1, 0), torch.randn(2, 1, 4).expand(2, 2, 4), 1e-5)


@pytest.mark.usefixtures("not_cudnn")
def test_empty_batch_has_zero_gradients(backend, kernel_device):
    gru, _ = pair(3, 4, 2, backend=backend, device=kernel_device)
    y, h_n = gru(torch.randn(5, 0, 3, device=kernel_device))
    assert (y.shape, h_n.shape) == ((5, 0, 8), (4, 0, 4))
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in gru.parameters())


def test_same_seed_same_weights():
    torch.manual_seed(3)
    ours = BiGRU(5, 6, 2)
    torch.manual_seed(3)
    theirs = nn.GRU(5, 6, 2, bidirectional=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_is_no_nn_gru():
    # Any nn.GRU, subclasses too, breaks torch.compile(fullgraph=True).
    assert not isinstance(BiGRU(2, 3), nn.GRU)
    assert isinstance(BiGRU(2, 3), nn.RNNBase)


def test_signature():
    names = "input_size hidden_size num_layers bias batch_first dropout bidirectional proj_size backend precision"
    assert list(inspect.signature(BiGRU.__init__).parameters)[1:] == [*names.split(), "device", "dtype"]


def test_dropout_between_layers_only_in_training(backend, kernel_device):
    gru = BiGRU(3, 4, 2, dropout=1.0, backend=backend, device=kernel_device)
    x = torch.randn(5, 2, 3, device=kernel_device)
    gru.eval()
    kept, _ = gru(x)
    gru.train()
    dropped, _ = gru(x)
    # With everything dropped the second layer sees zeros, so its output forgets x.
    assert torch.equal(dropped, gru(torch.randn_like(x))[0])
    assert dropped.any()  # the last layer's own output is never dropped
    assert not torch.equal(kept, dropped)


class TestBackends:
    def test_auto_takes_aten_where_no_kernel_serves_on_a_cpu(self):
        x = torch.randn(2, 2, 3, dtype=torch.bfloat16)
        gru = BiGRU(3, 4, dtype=x.dtype)
        assert gru.resolve_backend(x) == gru.resolve_backend(pack_sequence([x[:, 0]])) == "torch"
        theirs = nn.GRU(3, 4, bidirectional=True, dtype=x.dtype)
        theirs.load_state_dict(gru.state_dict())
        assert torch.equal(gru(x)[0], theirs(x)[0])

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_auto_takes_aten_where_nothing_is_proven_on_a_gpu(self):
        gru = BiGRU(3, 4, device="cuda")
        assert gru.resolve_backend(torch.randn(2, 2, 3, device="cuda")) == "torch"
        assert gru.double().resolve_backend(torch.randn(2, 2, 3, device="cuda").double()) == "torch"

    def test_refusals_name_the_reason(self, triton_device):
        gru = BiGRU(3, 4, backend="triton", dtype=torch.float64, device=triton_device)
        with pytest.raises(RuntimeError, match=r"'triton' cannot serve this call.*float64"):
            gru(torch.randn(2, 2, 3, dtype=torch.float64, device=triton_device))

    @pytest.mark.parametrize("backend", ["resident", "cooperative"])
    def test_kernels_without_an_interpreter_are_refused_on_a_cpu(self, backend):
        pytest.importorskip("triton")
        with pytest.raises(RuntimeError, match=f"'{backend}' cannot serve this call: the input is on cpu"):
            BiGRU(3, 4, backend=backend)(torch.randn(2, 2, 3))
        with pytest.raises(RuntimeError, match=f"'{backend}' cannot serve this call: the input is on cpu"):
            BiGRU(3, 4, backend=backend).resolve_backend(pack_sequence([torch.randn(2, 3)]))


FLOAT, BFLOAT = torch.float32, torch.bfloat16


class TestAutocast:
    """Everything in autocast's dtype, as nn.GRU on a GPU has it (on a CPU it does not)."""

    @pytest.mark.parametrize("dtypes", [[FLOAT], [BFLOAT], [FLOAT, BFLOAT], [BFLOAT, FLOAT]], ids=str)
    @pytest.mark.parametrize("backend", ["triton", "reference"], indirect=True)
    def test_takes_its_dtype_and_returns_gradients_in_each_ones_own(self, backend, dtypes, kernel_device):
        torch.manual_seed(0)
        gru, exact = BiGRU(3, 4, 2, backend=backend, device=kernel_device), BiGRU(3, 4, 2, backend="reference").double()
        exact.load_state_dict(gru.state_dict())
        given = zip((torch.randn(3, 2, 3), torch.randn(4, 2, 4)), dtypes, strict=False)
        leaves = [x.to(kernel_device, dtype).requires_grad_() for x, dtype in given]
        wide = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
        with torch.autocast(kernel_device.type, dtype=BFLOAT):
            outputs = gru(*leaves)
        assert {output.dtype for output in outputs} == {BFLOAT}
        results = []
        for module, inputs, (y, h_n) in ((gru, leaves, outputs), (exact, wide, exact(*wide))):
            inputs = [*inputs, *module.parameters()]
            gradients = torch.autograd.grad(y.double().square().sum() + h_n.double().sum(), inputs)
            assert [gradient.dtype for gradient in gradients] == [leaf.dtype for leaf in inputs]
            results.append([y, h_n, *gradients])
        near(*results, 2e-2)

    @pytest.mark.parametrize("backend", ["triton", "cpu"], indirect=True)
    def test_a_backward_pass_inside_it_keeps_the_forward_ones_dtype(self, backend, kernel_device):
        if backend == "cpu" and KERNEL.instructions == "none":
            pytest.skip("the C extension is not built")
        device = torch.device("cpu") if backend == "cpu" else kernel_device
        gru = BiGRU(3, 4, 2, backend=backend, device=device)
        x = torch.randn(3, 2, 3, device=device, requires_grad=True)
        y = gru(x)[0]
        wanted = torch.autograd.grad(y.sum(), (x, *gru.parameters()), retain_graph=True)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            gradients = torch.autograd.grad(y.sum(), (x, *gru.parameters()))
        assert all(map(torch.equal, gradients, wanted))


class TestFusedLayer:
    """One autograd node in eager mode, operators under a compiler: the same numbers."""

    @pytest.mark.parametrize(
        ("asked", "bias"),
        [("all", True), ("all", False), ("input", True), ("state", False), ("weights", False), ("one bias", True)],
    )
    def test_eager_and_spelled_out_agree(self, bias, asked, triton_device):
        results = []
        for mode in (nullcontext(), Recorder()):
            torch.manual_seed(0)
            gru = BiGRU(3, 4, 2, bias, backend="triton", batch_first=True, device=triton_device)
            x = torch.randn(2, 3, 3).to(triton_device)
            hx = torch.randn(4, 2, 4).to(triton_device)
            leaves = {"input": x, "state": hx} | dict(gru.named_parameters())
            for name, leaf in leaves.items():
                wanted = {
                    "all": True,
                    "weights": name.startswith(("weight", "bias")),
                    "one bias": name == "bias_hh_l1_reverse",
                }
                leaf.requires_grad_(wanted.get(asked, name == asked))
            with mode:
                y, h_n = gru(x, hx)
            torch.autograd.backward((y, h_n), (y.detach() + 1, h_n.detach() - 1))
            results.append([y, h_n, *(leaf.grad for leaf in leaves.values())])
        near(*results, 1e-6)

    def test_keeps_nothing_where_no_gradient_is_wanted(self, triton_device):
        gru = BiGRU(3, 4, backend="triton", device=triton_device)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            with torch.no_grad():
                gru(torch.randn(2, 2, 3, device=triton_device))
            gru.requires_grad_(False)(torch.randn(2, 2, 3, device=triton_device))
            assert kept == []
            gru.requires_grad_(True)(torch.randn(2, 2, 3, device=triton_device))
        assert len(kept) == 4  # y, gates, x and what was gathered


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_numbers_with_their_sign_elsewhere(backend, triton_device):
    """A view like x.conj().imag says by a bit that its numbers are those in memory, negated."""
    if backend == "cpu" and KERNEL.instructions == "none":
        pytest.skip("the C extension is not built")

    def negated(*size):
        return torch._neg_view(torch.randn(*size, device=device))

    device = torch.device("cpu") if backend == "cpu" else triton_device
    gru = BiGRU(3, 4, backend=backend, device=device)
    views = negated(3, 2, 3), negated(2, 2, 4), negated(3, 2, 8), negated(2, 2, 4)
    results = []
    for x, hx, *upstream in (views, [view.resolve_neg() for view in views]):
        y, h_n = gru(x, hx)
        results.append([y, h_n, *torch.autograd.grad((y, h_n), [*gru.parameters()], upstream)])
    near(*results, 1e-6)
