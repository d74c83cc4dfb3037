"""The C kernel against nn.GRU, in every instruction set that this machine has and in every way that it is called."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import error, near
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from bigru import BiGRU
from bigru.kernels import registry
from bigru.kernels.config import Call, Device
from bigru.kernels.cpu import INSTRUCTIONS, KERNEL, CpuKernel, extension
from bigru.kernels.varlen import varlen_of

ROOT = Path(__file__).parents[2]
HERE = [] if KERNEL.instructions == "none" else list(INSTRUCTIONS[INSTRUCTIONS.index(KERNEL.instructions) :])
built = pytest.mark.skipif(not HERE, reason="the C extension is not built")
every_set = pytest.mark.parametrize("instructions", HERE or ["none"])
CALL = Call(Device("cpu"), torch.float32, 5)
# Batches and hidden sizes on both sides of every tile and vector, T across a chunk of steps, rows across one of them.
SHAPES = [(1, 1, 1, 1), (70, 1, 3, 40), (6, 1, 4, 21), (3, 2, 5, 9), (4, 3, 2, 16), (2, 4, 7, 7), (5, 5, 1, 24)]
SHAPES += [(3, 9, 4, 33), (2, 70, 3, 12), (7, 57, 50, 131)]
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-14}


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def layer_inputs(shape, dtype, bias=True, seed=0):
    """x, h0 and the weights of one layer for shape (T, B, I, H)."""
    steps, batch, inputs, hidden = shape
    torch.manual_seed(seed)
    gru = nn.GRU(inputs, hidden, bias=bias, bidirectional=True, dtype=dtype)
    weights = [parameter.detach() for parameter in gru.parameters()]
    return [torch.randn(steps, batch, inputs, dtype=dtype), torch.randn(2, batch, hidden, dtype=dtype), *weights]


def aten(x, h0, *weights, varlen=None):
    options = len(weights) == 8, 1, 0.0, True, True
    if varlen is None:
        return torch._VF.gru(x, h0, list(weights), *options, False)
    return torch._VF.gru(x, varlen.batch_sizes, h0, list(weights), *options)


def with_gradients(layer, inputs, dtype=None):
    """Outputs and the gradients of all inputs, for upstream gradients that depend on the shapes alone."""
    leaves = [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in inputs]
    outputs = layer(*leaves)
    torch.manual_seed(1)
    upstream = [torch.randn(y.shape, dtype=torch.float64).to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, upstream)
    return [y.detach() for y in outputs] + [leaf.grad for leaf in leaves]


def layer_of(kernel, varlen=None):
    return lambda x, h0, *weights: kernel.layer(x, h0, weights, varlen)


@built
@every_set
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_layer_is_aten_s(instructions, dtype, bias, shape, poisoned):
    inputs = layer_inputs(shape, dtype, bias)
    actual = with_gradients(layer_of(CpuKernel(instructions)), inputs)
    near(actual, with_gradients(aten, inputs, torch.float64), TOLERANCES[dtype])


@built
@every_set
@pytest.mark.parametrize(
    "lengths", [[1], [5, 5, 5], [6, 4, 4, 1], [9, 7, 7, 7, 3, 2, 1], [6] + [4] * 40 + [1] * 40], ids=len
)
def test_sequences_of_different_lengths(instructions, lengths, poisoned):
    x, h0, *weights = layer_inputs((max(lengths), len(lengths), 3, 11), torch.float32)
    packed = pack_padded_sequence(x, lengths)
    varlen, inputs = varlen_of(packed), [packed.data, h0, *weights]
    actual = with_gradients(layer_of(CpuKernel(instructions), varlen), inputs)
    wanted = with_gradients(lambda *args: aten(*args, varlen=varlen), inputs, torch.float64)
    near(actual, wanted, TOLERANCES[torch.float32])


@built
@pytest.mark.parametrize("lengths", [None, [3, 2, 1]])
def test_gradcheck(lengths):
    x, *rest = layer_inputs((3, 3, 2, 5), torch.float64)
    varlen = None
    if lengths is not None:
        packed = pack_padded_sequence(x, lengths)
        x, varlen = packed.data, varlen_of(packed)
    leaves = [tensor.requires_grad_() for tensor in (x, *rest)]
    assert torch.autograd.gradcheck(layer_of(KERNEL, varlen), leaves)
    # A second derivative is ATen's, as it was before there was this kernel.
    assert torch.autograd.gradgradcheck(layer_of(KERNEL, varlen), leaves)


@built
@every_set
def test_no_less_accurate_than_aten(instructions):
    inputs = layer_inputs((60, 3, 84, 128), torch.float32)
    wanted = with_gradients(aten, inputs, torch.float64)
    ours, theirs = with_gradients(layer_of(CpuKernel(instructions)), inputs), with_gradients(aten, inputs)
    for i, (a, b, c) in enumerate(zip(ours, theirs, wanted, strict=True)):
        assert error(a, c) < min(1e-6, 2 * error(b, c)), i


@built
@every_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e30, -1e30, 1e-39, 100.0, -100.0, 17.0])
@pytest.mark.parametrize("where", [0, 1, 2, 3], ids=["x", "h0", "w_ih", "w_hh"])
def test_special_values_go_aten_s_way(instructions, dtype, value, where):
    inputs = layer_inputs((3, 2, 3, 5), dtype)
    inputs[where].view(-1)[1] = value
    saturated = abs(value) in (17.0, 100.0)
    if saturated:
        inputs[where].mul_(value)
    actual, wanted = (with_gradients(layer, inputs) for layer in (layer_of(CpuKernel(instructions)), aten))
    for i, (a, b) in enumerate(zip(actual, wanted, strict=True)):
        # A sum is as exact as the largest numbers in it: ATen's own gradients are 2.6e-5 off where 50 is the largest.
        largest = b.abs().max().item() if saturated else 0.0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=max(1e-5, 1e-6 * largest), equal_nan=True, msg=str(i))


@built
@every_set
# With enough work for more than one thread.
@pytest.mark.parametrize("shape", [(60, 1, 3, 64), (30, 11, 3, 64), (3, 130, 3, 64), (2, 9, 1, 150)], ids=str)
def test_the_same_bits_for_any_number_of_threads(instructions, shape, threads):
    inputs = layer_inputs(shape, torch.float32)

    def run(count):
        threads(count)
        return with_gradients(layer_of(CpuKernel(instructions)), inputs)

    for count in (2, 3, 8):
        assert all(torch.equal(a, b) for a, b in zip(run(1), run(count), strict=True)), count


@built
def test_a_sequence_s_bits_do_not_depend_on_the_batch():
    x, h0, *weights = layer_inputs((6, 9, 5, 37), torch.float32)
    y, _ = KERNEL.layer(x, h0, weights)
    for b in range(9):
        assert torch.equal(KERNEL.layer(x[:, b : b + 1], h0[:, b : b + 1], weights)[0], y[:, b : b + 1])


@built
def test_eight_python_threads(threads):
    threads(2)
    calls = [layer_inputs((60, 1 + 5 * i, 3, 64), torch.float32, seed=i) for i in range(8)]

    def run(inputs):
        return [KERNEL.layer(inputs[0], inputs[1], inputs[2:])[0] for _ in range(20)]

    alone = [run(inputs)[0] for inputs in calls]
    with ThreadPoolExecutor(8) as pool:
        for wanted, found in zip(alone, pool.map(run, calls), strict=True):
            assert all(torch.equal(wanted, y) for y in found)


@built
def test_a_forked_process_computes():
    script = """
import os, torch
from bigru.kernels.cpu import KERNEL
torch.set_num_threads(2)
torch.manual_seed(0)
x, h0 = torch.randn(60, 9, 3), torch.randn(2, 9, 64)
weights = [torch.randn(192, 3), torch.randn(192, 64), torch.randn(192), torch.randn(192)] * 2
y, _ = KERNEL.layer(x, h0, weights)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(KERNEL.layer(x, h0, weights)[0], y) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, cwd=ROOT)


@built
def test_views_and_strides():
    x, h0, *weights = layer_inputs((4, 3, 6, 5), torch.float32)
    wanted = with_gradients(layer_of(KERNEL), [x, h0, *weights])
    for view in (
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        lambda t: torch.stack([t, -t], -1)[..., 0],
    ):
        near(with_gradients(lambda x, h, *w: KERNEL.layer(view(x), view(h), w), [x, h0, *weights]), wanted, 1e-6)  # noqa: B023
    # Gradients of y that are expanded, and that follow a transposed y.
    losses = torch.sum, lambda y: y.transpose(0, 1).contiguous().square().sum(), lambda y: y[..., ::2].sum()
    for loss in losses:
        leaf = x.clone().requires_grad_()
        near(*(torch.autograd.grad(loss(run(leaf, h0, *weights)[0]), leaf) for run in (layer_of(KERNEL), aten)), 1e-6)


@built
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("hidden", "least"), [(5, 2), (128, 2), (256, 8), (512, 32)])
def test_auto_leaves_a_few_steps_to_aten(hidden, least, batch_first):
    gru = BiGRU(3, hidden, batch_first=batch_first)
    for steps, backend in [(least - 1, "torch"), (least, "cpu")]:
        shape = (40, steps, 3) if batch_first else (steps, 40, 3)
        assert gru.resolve_backend(torch.empty(shape)) == backend
        assert gru.resolve_backend(torch.empty(steps, 3)) == backend
        assert gru.resolve_backend(pack_sequence([torch.empty(steps, 3)])) == backend
    assert BiGRU(3, hidden, backend="cpu").resolve_backend(torch.empty(1, 40, 3)) == "cpu"


@built
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_auto_keeps_what_aten_can():
    gru, x = BiGRU(3, 5, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert gru.resolve_backend(x) == "cpu"
    (gradient,) = torch.autograd.grad(gru(x)[0].square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert torch.func.vmap(torch.func.grad(lambda x: gru(x)[0].sum()))(x[None]).shape == (1, *x.shape)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        assert gru.resolve_backend(dual) == "torch"
        assert forward_ad.unpack_dual(gru(dual)[0]).tangent is not None
    batched = torch.autograd.functional.jacobian(lambda x: gru(x)[1], x, vectorize=True)
    torch.testing.assert_close(batched, torch.autograd.functional.jacobian(lambda x: gru(x)[1], x))
    with torch.autocast("cpu", torch.bfloat16):
        assert gru.float().resolve_backend(x.float()) == "torch"


@built
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_and_exported():
    gru, x = BiGRU(3, 5, 2, batch_first=True), torch.randn(2, 4, 3)
    compiled = torch.compile(gru, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), gru(x))
    (wanted,), (actual,) = (torch.autograd.grad(run(x)[0].square().sum(), gru.weight_hh_l0) for run in (gru, compiled))
    assert error(actual, wanted) < 1e-6
    program = torch.export.export(gru, (x,))
    assert "bigru.gru_forward" in str(program.graph)
    torch.testing.assert_close(program.module()(x), gru(x))


def test_refusals():
    missing = CpuKernel("none")
    assert "C extension" in missing.refusal(CALL)
    assert registry.choose("auto", CALL, [missing])[:3] == ("torch", None, None)
    assert "on cuda" in CpuKernel("base").refusal(replace(CALL, device=Device("cuda", (9, 0))))
    assert "bfloat16" in CpuKernel("base").refusal(replace(CALL, dtype=torch.bfloat16))


@built
def test_weights_of_other_shapes_are_refused():
    gru = BiGRU(3, 5, backend="cpu")
    gru.weight_hh_l0 = nn.Parameter(torch.zeros(15, 4))
    with pytest.raises(RuntimeError, match="weight: expected shape"):
        gru(torch.zeros(2, 1, 3))


@pytest.mark.slow
def test_the_package_builds_without_a_compiler(tmp_path):
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"CC": "false"}, capture_output=True, timeout=120)
    assert not list(tmp_path.rglob("*.so"))
    assert list(tmp_path.rglob("gru.py"))


WITH_AVX2 = ["-mavx2", "-mfma"]
ASAN = ["gcc", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize("dtype", [[], ["-DDOUBLE"]], ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("compiler", "emulator"),
    [
        (ASAN, []),
        ([*ASAN, *WITH_AVX2], []),
        (["gcc", "-fsanitize=thread", *WITH_AVX2], []),
        (["clang"], []),
        (["clang", *WITH_AVX2], []),
        (["aarch64-linux-gnu-gcc", "-static"], ["qemu-aarch64"]),
    ],
    ids=["asan", "asan-avx2", "tsan-avx2", "clang", "clang-avx2", "aarch64"],
)
def test_the_c_file_alone(compiler, emulator, dtype, tmp_path):
    """Shapes on both sides of every tile beside loops in C: under sanitizers, with Clang, and for AArch64."""
    if WITH_AVX2[0] in compiler and "avx2" not in HERE:
        pytest.skip("this processor has no AVX2")
    for tool in (compiler[0], *emulator):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    flags = ["-std=gnu11", "-O1", "-ffp-contract=fast", "-Wno-psabi", "-pthread"]
    program, empty = tmp_path / "check", tmp_path / "empty.c"
    empty.write_text("int main(void) { return 0; }")
    if subprocess.run([*compiler, empty, "-o", program], capture_output=True).returncode:
        pytest.skip(f"{' '.join(compiler)} makes no program here")
    source = Path(__file__).with_name("cpu_recurrence_check.c")
    subprocess.run([*compiler, *flags, *dtype, source, "-o", program, "-lm"], check=True)
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    run = subprocess.run([*emulator, program], env=environment, timeout=300, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@built
def test_the_extension_counts_its_arguments():
    with pytest.raises(TypeError, match="expected 23 integers, got 1"):
        extension(KERNEL.instructions, torch.float32).forward(1)
