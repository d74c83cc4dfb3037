"""Ragged batches: each sequence of a PackedSequence, or of a padded batch with lengths, as if it ran alone."""

import functools

import pytest
import torch
from support import TOLERANCE, error, near
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence, unpack_sequence
from torch.utils.checkpoint import checkpoint

from bigru import BiGRU
from bigru.kernels.varlen import varlen_of

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),
]

LENGTHS = {
    "falling": [5, 3, 1],
    "unsorted": [2, 5, 1, 4],
    "equal": [3, 3, 3],
    "one step each": [1, 1],
    "one sequence": [4],
    "a full block": [2, 4, 4, 3, 4, 1, 4, 2],
    "a second block with a shorter longest": [1, 2, 4, 4, 4, 4, 4, 4, 4, 3, 2],
}
SMALL = 5
"""A hidden size whose W_hh is held on chip."""


def ragged(lengths, features=3, hidden=SMALL, layers=1, seed=0):
    """A sequence for each length, hx, and upstream gradients of each sequence's y and of h_n."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randn(length, features, generator=generator) for length in lengths]
    hx = torch.randn(2 * layers, len(lengths), hidden, generator=generator)
    dy = [torch.randn(length, 2 * hidden, generator=generator) for length in lengths]
    return sequences, hx, dy, torch.randn(hx.shape, generator=generator)


def together(gru, sequences, hx, dy, dh_n, enforce_sorted=False):
    """y and dx of each sequence one after the other, h_n, dhx and every parameter's gradient, all of one packed run."""
    parameter = next(gru.parameters())
    sequences, dy = ([x.to(parameter) for x in xs] for xs in (sequences, dy))
    x = pack_sequence(sequences, enforce_sorted)
    x = PackedSequence(x.data.requires_grad_(), *x[1:])
    hx = hx.to(parameter, copy=True).requires_grad_()
    gru.zero_grad()
    y, h_n = gru(x, hx)
    torch.autograd.backward((y.data, h_n), (pack_sequence(dy, enforce_sorted).data, dh_n.to(parameter)))
    dx = PackedSequence(x.data.grad, *x[1:])
    named = {"y": torch.cat(unpack_sequence(y)), "h_n": h_n, "dx": torch.cat(unpack_sequence(dx)), "dhx": hx.grad}
    return named | {name: p.grad for name, p in gru.named_parameters()}


def alone(gru, sequences, hx, dy, dh_n):
    """The same of the fp64 reference, one dense run a sequence."""
    exact = BiGRU(gru.input_size, gru.hidden_size, gru.num_layers, gru.bias, backend="reference", dtype=torch.float64)
    exact.load_state_dict(gru.state_dict())
    runs = []
    for b, x in enumerate(sequences):
        x = x.double().requires_grad_()
        h = hx[:, b].double().requires_grad_()
        y, h_n = exact(x, h)
        torch.autograd.backward((y, h_n), (dy[b].double(), dh_n[:, b].double()))
        runs.append((y, h_n, x.grad, h.grad))
    y, h_n, dx, dhx = zip(*runs, strict=True)
    named = {"y": torch.cat(y), "h_n": torch.stack(h_n, 1), "dx": torch.cat(dx), "dhx": torch.stack(dhx, 1)}
    return named | {name: p.grad for name, p in exact.named_parameters()}


def check(gru, inputs, tolerance, **options):
    near(together(gru, *inputs, **options), alone(gru, *inputs), tolerance)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_each_sequence_as_if_alone(lengths, backend, kernel_device):
    torch.manual_seed(1)
    check(BiGRU(3, SMALL, backend=backend, device=kernel_device), ragged(lengths), 1e-5)


# The second block has one step less: its state ends in the right buffer only if it starts in the other one.
@pytest.mark.parametrize("lengths", [[3, 1, 2], [1, *[2] * 16]], ids=["one block", "two blocks"])
def test_weights_read_in_blocks(lengths, streamed, triton_device):
    torch.manual_seed(1)
    gru = BiGRU(2, streamed, bias=len(lengths) > 3, backend="triton", device=triton_device)
    check(gru, ragged(lengths, 2, streamed), 1e-5)


@pytest.mark.parametrize(("dtype", "precision"), TOLERANCE, ids=lambda value: str(value).removeprefix("torch."))
def test_precisions_of_the_fused_kernel(dtype, precision, triton_device):
    torch.manual_seed(1)
    gru = BiGRU(3, 20, backend="triton", precision=precision, dtype=dtype, device=triton_device)
    sequences, hx, dy, dh_n = ragged([2, 4, 1], hidden=20)
    sequences, dy = ([x.to(dtype).float() for x in xs] for xs in (sequences, dy))
    check(gru, (sequences, hx.to(dtype).float(), dy, dh_n.to(dtype).float()), TOLERANCE[dtype, precision])


@pytest.mark.parametrize("lengths", [[5, 3, 3, 1], [3, 5, 1, 3]], ids=["sorted", "unsorted"])
def test_two_layers_without_bias(lengths, backend, kernel_device):
    torch.manual_seed(1)
    gru = BiGRU(3, SMALL, 2, False, backend=backend, device=kernel_device)
    check(gru, ragged(lengths, layers=2), 1e-5, enforce_sorted=lengths[0] == max(lengths))


def test_keeps_the_order_and_the_class_of_the_input(backend, kernel_device):
    gru = BiGRU(3, SMALL, backend=backend, device=kernel_device)
    x = pack_sequence([torch.randn(n, 3, device=kernel_device) for n in (2, 3, 1)], enforce_sorted=False)
    y, h_n = gru(x)
    assert isinstance(y, PackedSequence)
    for ours, theirs in zip(y[1:], x[1:], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(h_n[0, 0], unpack_sequence(y)[0][-1, :SMALL])
    assert torch.equal(h_n[1, 0], unpack_sequence(y)[0][0, SMALL:])


@pytest.mark.parametrize("small", [True, False])
def test_the_same_bits_from_run_to_run_and_nan_stays_in_its_sequence(small, streamed, triton_device):
    hidden = SMALL if small else streamed
    gru = BiGRU(3, hidden, backend="triton", device=triton_device)
    sequences, *rest = ragged([2, 1, 2], hidden=hidden)
    clean, again = (together(gru, sequences, *rest) for _ in range(2))
    for name, value in clean.items():
        assert torch.equal(value, again[name]), name
    sequences[2] = torch.full_like(sequences[2], float("nan"))
    dirty = together(gru, sequences, *rest)
    assert dirty["y"][3:].isnan().all()
    assert torch.equal(dirty["h_n"][:, :2], clean["h_n"][:, :2])
    assert torch.equal(dirty["dhx"][:, :2], clean["dhx"][:, :2])
    for name in ("y", "dx"):
        assert torch.equal(dirty[name][:3], clean[name][:3]), name


def test_double_backward_through_the_reference():
    gru = BiGRU(2, 2, backend="reference", dtype=torch.float64)
    x = pack_sequence([torch.randn(n, 2, dtype=torch.float64) for n in (1, 3)], enforce_sorted=False)
    data = x.data.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda data: gru(PackedSequence(data, *x[1:]))[0].data, (data,))


def test_dropout_between_layers_only_in_training(backend, kernel_device):
    gru = BiGRU(3, SMALL, 2, dropout=1.0, backend=backend, device=kernel_device)
    x, other = (pack_sequence([torch.randn(n, 3, device=kernel_device) for n in (3, 1)]) for _ in range(2))
    dropped = gru(x)[0].data
    # With everything dropped the second layer sees zeros, so its output forgets x.
    assert torch.equal(dropped, gru(other)[0].data)
    assert not torch.equal(dropped, gru.eval()(x)[0].data)


@pytest.mark.parametrize("backend", ["reference", "triton"], indirect=True)
def test_autocast(backend, kernel_device):
    gru = BiGRU(3, SMALL, 2, backend=backend, device=kernel_device)
    x = pack_sequence([torch.randn(n, 3, device=kernel_device) for n in (3, 1)])
    with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
        y, h_n = gru(x)
    assert y.data.dtype == h_n.dtype == torch.bfloat16
    assert error(y.data, gru(x)[0].data) < 2e-2
    y.data.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in gru.parameters())


def test_checkpointed(triton_device):
    gru = BiGRU(3, SMALL, backend="triton", device=triton_device)
    x, results = pack_sequence([torch.randn(n, 3, device=triton_device) for n in (3, 1)]), []
    for wrapped in (lambda run, data: run(data), functools.partial(checkpoint, use_reentrant=False)):
        gru.zero_grad()
        data = x.data.detach().clone().requires_grad_()
        wrapped(lambda data: gru(x._replace(data=data))[0].data, data).square().sum().backward()
        results.append([data.grad, *(p.grad for p in gru.parameters())])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("sequences", [True, False], ids=["PackedSequence", "lengths"])
def test_compiled_with_a_graph_break(sequences, triton_device):
    torch._dynamo.reset()
    gru = BiGRU(3, SMALL, backend="triton", device=triton_device)
    compiled = torch.compile(gru, backend="eager")
    x = torch.randn(3, 2, 3, device=triton_device)
    for lengths in ([3, 1], [2, 3]):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        given = ((packed,), {}) if sequences else ((x,), {"lengths": lengths})
        for ours, theirs in zip(*(run(*given[0], **given[1]) for run in (compiled, gru)), strict=True):
            assert torch.equal(*(y.data if sequences and isinstance(y, PackedSequence) else y for y in (ours, theirs)))


class TestErrors:
    def test_a_state_of_another_batch(self, backend, kernel_device):
        gru = BiGRU(3, 4, backend=backend, device=kernel_device)
        x = pack_sequence([torch.randn(n, 3, device=kernel_device) for n in (1, 2)], enforce_sorted=False)
        for batch in (1, 3):
            with pytest.raises(RuntimeError, match=rf"hx: expected shape \(2, 2, 4\).*got \(2, {batch}, 4\)"):
                gru(x, torch.randn(2, batch, 4, device=kernel_device))
        with pytest.raises(RuntimeError, match="hx: expected 3 dimensions"):
            gru(x, torch.randn(2, 4, device=kernel_device))

    @pytest.mark.parametrize("sizes", [[2, 2], [1, 2], [3, 0], []], ids=str)
    def test_batch_sizes_that_do_not_describe_the_rows(self, sizes, backend, kernel_device):
        x = PackedSequence(torch.randn(3, 3, device=kernel_device), torch.tensor(sizes, dtype=torch.int64))
        with pytest.raises(RuntimeError, match=r"input: expected batch_sizes .* 3 rows, got"):
            BiGRU(3, 4, backend=backend, device=kernel_device)(x)

    def test_data_of_another_rank(self, backend, kernel_device):
        x = pack_sequence([torch.randn(2, device=kernel_device)])
        with pytest.raises(RuntimeError, match=r"input: expected a PackedSequence of 2-D data, got shape \(2,\)"):
            BiGRU(2, 4, backend=backend, device=kernel_device)(x)

    @pytest.mark.parametrize(
        ("lengths", "raised", "message"),
        [
            ([4], RuntimeError, r"lengths: expected shape \(2,\), one for each sequence, got \(1,\)"),
            (torch.ones(2, 1, dtype=torch.int64), RuntimeError, r"lengths: .* got \(2, 1\)"),
            ([0, 4], RuntimeError, r"lengths: expected numbers from 1 to 4 .*, got \[0, 4\]"),
            ([1, 5], RuntimeError, r"lengths: expected numbers from 1 to 4 .*, got \[1, 5\]"),
            ([1.0, 2.0], TypeError, r"lengths: expected .* list of int, got \[1.0, 2.0\]"),
            (torch.ones(2), TypeError, "lengths: expected integers, got torch.float32"),
            (4, TypeError, r"lengths: expected .* list of int, got 4"),
            (torch.ones(2, dtype=torch.int64, device="meta"), RuntimeError, "CPU, got one on meta"),
        ],
    )
    def test_bad_lengths(self, lengths, raised, message):
        with pytest.raises(raised, match=message):
            BiGRU(3, 4)(torch.randn(4, 2, 3), lengths=lengths)

    def test_lengths_beside_one_sequence_or_a_packed_one(self):
        with pytest.raises(ValueError, match="lengths: expected 3-D input beside them, got 2-D"):
            BiGRU(3, 4)(torch.randn(4, 3), lengths=[4])
        with pytest.raises(TypeError, match="lengths: expected None beside a PackedSequence"):
            BiGRU(3, 4)(pack_sequence([torch.randn(2, 3)]), lengths=[2])


class TestLengths:
    @pytest.mark.parametrize(("batch_first", "given_state"), [(False, True), (True, False)])
    def test_as_packing_and_unpacking(self, batch_first, given_state, backend, kernel_device):
        torch.manual_seed(1)
        gru = BiGRU(3, SMALL, 2, batch_first=batch_first, backend=backend, device=kernel_device)
        lengths = torch.tensor([2, 4, 1])
        x = torch.randn((3, 6, 3) if batch_first else (6, 3, 3), device=kernel_device)
        hx = torch.randn(4, 3, SMALL, device=kernel_device) if given_state else None
        results = []
        for ours in (True, False):
            gru.zero_grad()
            leaf = x.clone().requires_grad_()
            if ours:
                y, h_n = gru(leaf, hx, lengths=lengths)
            else:
                packed = pack_padded_sequence(leaf, lengths, batch_first, enforce_sorted=False)
                packed, h_n = gru(packed, hx)
                y, _ = pad_packed_sequence(packed, batch_first, total_length=6)
            torch.autograd.backward((y, h_n), (torch.cos(x[..., :1] * y.detach()), h_n.detach() + 1))
            results.append([y, h_n, leaf.grad, *(p.grad for p in gru.parameters())])
        near(*results, 1e-6)

    def test_what_lies_past_an_end_is_not_read(self, backend, kernel_device):
        gru = BiGRU(3, SMALL, 2, backend=backend, device=kernel_device)
        x = torch.randn(4, 2, 3, device=kernel_device)
        x[1:, 1] = float("nan")
        x.requires_grad_()
        y, h_n = gru(x, lengths=[4, 1])
        assert y.isfinite().all()
        assert h_n.isfinite().all()
        assert not y[1:, 1].any()
        (y.square().sum() + h_n.sum()).backward()
        assert x.grad.isfinite().all()
        assert not x.grad[1:, 1].any()

    def test_full_lengths_change_nothing(self, backend, kernel_device):
        gru = BiGRU(3, SMALL, backend=backend, device=kernel_device)
        x = torch.randn(4, 3, 2, device=kernel_device).transpose(1, 2)
        near(gru(x, lengths=[4, 4]), gru(x), 1e-6)

    @pytest.mark.usefixtures("not_cudnn")
    def test_empty_batch(self, backend, kernel_device):
        gru = BiGRU(3, SMALL, backend=backend, device=kernel_device)
        y, h_n = gru(torch.randn(4, 0, 3, device=kernel_device), lengths=[])
        assert (y.shape, h_n.shape) == ((4, 0, 2 * SMALL), (2, 0, SMALL))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_table_of_the_kernels(lengths):
    falling = sorted(lengths, reverse=True)
    steps = pack_sequence([torch.arange(length)[:, None] for length in falling])
    table = varlen_of(steps).table.tolist()
    assert table[: len(lengths)] == falling
    # A step's first row is the longest sequence's.
    assert steps.data[table[len(lengths) :], 0].tolist() == list(range(falling[0]))


def test_default_device_is_not_taken(triton_device):
    """What the host computes stays on the host, as in nn.GRU."""
    gru = BiGRU(3, SMALL, backend="triton", device=triton_device)
    x = torch.randn(5, 2, 3, device=triton_device)
    packed = pack_padded_sequence(x, [5, 3])
    wanted = gru(packed)[1], gru(x, lengths=[5, 3])[1]
    with torch.device("meta"):
        assert torch.equal(gru(packed)[1], wanted[0])
        assert torch.equal(gru(x, lengths=[5, 3])[1], wanted[1])


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated", "ignore::torch.jit.TracerWarning")
def test_tracing_is_refused(triton_device):
    gru = BiGRU(3, SMALL, backend="triton", device=triton_device)
    packed = pack_padded_sequence(torch.randn(5, 2, 3, device=triton_device), [5, 3])
    with pytest.raises(RuntimeError, match="a PackedSequence cannot be traced"):
        torch.jit.trace(lambda data: gru(packed._replace(data=data))[1], packed.data)
    with pytest.raises(RuntimeError, match="trying to get value out of a tracing tensor"):
        make_fx(lambda data: gru(packed._replace(data=data))[1])(packed.data)
