"""The fused recurrence against the fp64 reference: every output, every gradient, odd shapes."""

import functools
import math

import pytest
import support
import torch

from bigru.kernels import reference, registry
from bigru.kernels.backends import PUBLIC
from bigru.kernels.config import Call, TritonConfig, describe
from bigru.kernels.recurrence import fused_gru_recurrence

pytest.importorskip("triton")

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = {  # T, B, H
    "all one": (1, 1, 1),
    "one step": (1, 3, 20),
    "odd everything": (5, 3, 7),
    "full block": (4, 8, 16),
    "batch one over a block": (3, 9, 16),
    "hidden one over a power of two": (3, 2, 17),
    "several batch blocks": (2, 25, 33),
    "even and odd number of steps": (4, 5, 64),
    "hidden 100 padded to 128": (2, 2, 100),
    "largest on chip": (2, 2, 128),
    "smallest streamed on a GPU": (2, 2, 129),
}
# In the interpreter the others are run in fp32 alone.
EVERY_MODE = ("full block", "hidden one over a power of two", "several batch blocks")
CASES = [(name, mode) for name in SHAPES for mode in support.MODES]
if not torch.cuda.is_available():
    CASES = [(name, mode) for name, mode in CASES if mode == "fp32" or name in EVERY_MODE]

STREAMED = TritonConfig(False, 16, 16, 4, False, "tf32x3")
# In the interpreter a small H is streamed: it takes a tenth of the time of the 129 from which a GPU streams.
FORMS = {  # shape and configuration
    "persistent": ((3, 3, 20), None),
    "streamed": ((2, 2, 129), None) if torch.cuda.is_available() else ((2, 2, 20), STREAMED),
}


def results_of(kernel, inputs, upstream, precision="fp32", config=None):
    """Outputs and gradients of one kernel by name; skips the test where the kernel cannot serve."""
    gi, _, _, h0 = inputs
    refusal = registry.get(kernel).refusal(Call(describe(gi.device), gi.dtype, h0.shape[2], precision))
    if refusal is not None:
        pytest.skip(refusal)
    if config is not None:
        return support.run_kernel(registry.get(kernel), inputs, upstream, precision, config)[0]
    # What is not `given` is not mended.
    run = functools.partial(fused_gru_recurrence, precision=precision, kernel=kernel, given=False)
    return support.named(support.outputs_and_gradients(run, inputs, upstream))


def check(inputs, upstream, precision, tolerance, kernel="triton", config=None):
    support.assert_near(results_of(kernel, inputs, upstream, precision, config), inputs, upstream, tolerance)


# Only these have an interpreter.
@pytest.fixture(params=PUBLIC if torch.cuda.is_available() else ["triton"])
def kernel(request):
    return request.param


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_matches_fp64_reference(name, mode, kernel, kernel_device):
    dtype, precision = support.MODES[mode]
    inputs, upstream = support.make_inputs(SHAPES[name], dtype, kernel_device)
    check(inputs, upstream, precision, support.TOLERANCE[dtype, precision], kernel)


def test_reference_alone_matches_autograd_free_equations():
    # The reference is what all else is held to, so it is held to scalar arithmetic written out once more.
    (gi, w_hh, b_hn, h0), _ = support.make_inputs((2, 1, 2), torch.float64, "cpu")
    y, h_n = reference.gru_recurrence(gi, w_hh, b_hn, h0)
    for d, order in enumerate(([0, 1], [1, 0])):
        h = [h0[d, 0, 0].item(), h0[d, 0, 1].item()]
        for t in order:
            row = gi[t, 0, d].tolist()
            side = [sum(w_hh[d, g, k].item() * h[k] for k in range(2)) for g in range(6)]
            new = []
            for j in range(2):
                r = 1 / (1 + math.exp(-(row[j] + side[j])))
                z = 1 / (1 + math.exp(-(row[2 + j] + side[2 + j])))
                q = side[4 + j] + b_hn[d, j].item()
                n = math.tanh(row[4 + j] + r * q)
                new.append((1 - z) * n + z * h[j])
            h = new
            assert y[t, 0, d].tolist() == pytest.approx(h, rel=1e-12)
        assert h_n[d, 0].tolist() == pytest.approx(h, rel=1e-12)


every_form = pytest.mark.parametrize(("shape", "config"), FORMS.values(), ids=FORMS.keys())


@pytest.mark.parametrize("mode", support.MODES)
@pytest.mark.parametrize(("batch", "more"), [(2, 0), (1, 1), (17, 1)])
def test_streamed_matches_fp64_reference(batch, more, mode, streamed, kernel, kernel_device):
    dtype, precision = support.MODES[mode]
    inputs, upstream = support.make_inputs((2, batch, streamed + more), dtype, kernel_device)
    check(inputs, upstream, precision, support.TOLERANCE[dtype, precision], kernel)


@pytest.mark.parametrize("small", [True, False])
def test_without_bias(small, streamed, kernel, kernel_device):
    inputs, upstream = support.make_inputs((2, 2, 7 if small else streamed), torch.float32, kernel_device, bias=False)
    check(inputs, upstream, "fp32", 1e-5, kernel)


def sizes_by_gate(w_hh):
    return w_hh * torch.tensor([1e-6, 3, 1], device=w_hh.device).repeat_interleave(w_hh.shape[2])[:, None]


def one_weight_of(size, w_hh):
    w_hh[0, 5, 3] = size
    return w_hh


# What is made of gi, w_hh, b_hn, h0 and the upstream gradients; each is a case that a plain fp16 or TF32 product would
# get wrong. Exponentials overflow at the ends of sigmoid and tanh.
UNUSUAL = {
    "saturated gates": lambda gi, w, b, h, up: (gi * 40, w, b, h, up),
    "tiny inputs and states": lambda gi, w, b, h, up: (gi * 1e-4, w, b * 1e-4, h * 1e-4, up),
    "large initial state": lambda gi, w, b, h, up: (gi, w * 1e-5, b, h * 1e5, up),
    "tiny gradients": lambda gi, w, b, h, up: (gi, w, b, h, [x * 1e-12 for x in up]),
    "huge gradients": lambda gi, w, b, h, up: (gi, w, b, h, [x * 1e12 for x in up]),
    "recurrent weights of zero": lambda gi, w, b, h, up: (gi, w * 0, b, h, up),
    "one recurrent weight above all others": lambda gi, w, b, h, up: (gi, one_weight_of(1e4, w), b, h, up),
    "recurrent weights of very different size": lambda gi, w, b, h, up: (gi, sizes_by_gate(w), b, h, up),
}


@every_form
@pytest.mark.parametrize("change", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_numbers_out_of_the_ordinary(shape, config, change, kernel, kernel_device):
    inputs, upstream = support.make_inputs(shape, torch.float32, kernel_device)
    *inputs, upstream = change(*inputs, upstream)
    check(inputs, upstream, "fp32", 1e-5, kernel, config)


@every_form
def test_gradients_of_one_row_dwarf_the_others(shape, config, kernel, kernel_device):
    inputs, upstream = support.make_inputs(shape, torch.float32, kernel_device)
    upstream[0][:, 0] *= 1e10
    actual = results_of(kernel, inputs, upstream, config=config)
    wanted = support.named(support.expected(inputs, upstream))
    for name in ("dgi", "dh0"):
        assert support.error(actual[name][:, 1:], wanted[name][:, 1:]) < 1e-5, name


@every_form
def test_the_same_bits_from_run_to_run_and_nan_stays_in_its_row(shape, config, kernel, kernel_device):
    inputs, upstream = support.make_inputs(shape, torch.float32, kernel_device)
    clean, again = (results_of(kernel, inputs, upstream, config=config) for _ in range(2))
    for name, value in clean.items():
        assert torch.equal(value, again[name]), name
    inputs[0][0, 0] = float("nan")
    dirty = results_of(kernel, inputs, upstream, config=config)
    assert dirty["y"][-1, 0, 0].isnan().all()
    for name in ("y", "h_n", "dgi", "dh0"):  # what has a batch axis, always the second
        assert torch.equal(dirty[name][:, 1:], clean[name][:, 1:]), name


@pytest.mark.parametrize(
    "config",
    [
        TritonConfig(True, 8, 32, 4, True, "tf32"),
        TritonConfig(True, 16, 32, 4, True, "tf32"),
        TritonConfig(True, 8, 32, 4, True, "tf32", batched=True),
        TritonConfig(True, 16, 32, 4, False, "tf32x3", batched=True),
        TritonConfig(True, 8, 32, 4, False, "tf32x3"),
        STREAMED,
        TritonConfig(False, 16, 32, 4, False, "tf32x3"),
    ],
    ids=["eight rows", "sixteen rows", "batched", "batched tf32x3", "tf32x3", "blocks of 16", "one block"],
)
def test_every_form_of_the_kernel_gives_the_same(config, kernel_device):
    inputs, upstream = support.make_inputs((3, 18, 20), torch.float32, kernel_device)
    check(inputs, upstream, "fp32", 1e-5, config=config)


def test_offsets_beyond_32_bits(kernel_device):
    # 2^31 elements lie between the two time steps; only the pages that the kernel touches become memory.
    from bigru.kernels.triton_kernel import gru_forward_kernel

    hidden, steps = 1, 2
    batch = 2**31 // 6 + 8
    gi = torch.empty(0, dtype=torch.bfloat16, device=kernel_device)
    if kernel_device.type == "cuda" and torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GB of GPU memory")
    torch.use_deterministic_algorithms(False)  # would fill, and so touch, every page
    gi = torch.empty(steps, batch, 2, 3 * hidden, dtype=torch.bfloat16, device=kernel_device)
    y = torch.empty(steps, batch, 2, hidden, dtype=torch.bfloat16, device=kernel_device)
    small, upstream = support.make_inputs((steps, 8, hidden), torch.bfloat16, kernel_device)
    gi[:, :8] = small[0]
    h0 = torch.empty(2, batch, hidden, dtype=torch.bfloat16, device=kernel_device)
    h0[:, :8] = small[3]
    h_n = torch.empty_like(h0)
    operands = gi, small[1], small[2], h0, y, h_n, gi, None, steps, batch
    constants = TritonConfig(True, 8, 16, 1, False, "tf32").constants()
    gru_forward_kernel[(1, 2)](*operands, H=hidden, HAS_BIAS=True, SAVE=False, ACCURATE=False, **constants)
    assert support.error(y[:, :8], support.expected(small, upstream)[0]) < support.TOLERANCE[torch.bfloat16, "fp32"]
