"""The cooperative kernels: what they serve and with which parameters, the order of their exchange, and on a GPU the
recurrence itself, also when a program is missing."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support import NAMES, TOLERANCE, error, expected, make_inputs

pytest.importorskip("triton")

from bigru.kernels import cooperative
from bigru.kernels.cooperative import CooperativeConfig, choose_cooperative, refusal
from bigru.kernels.launch import A100, B200, H100

DEVICES = {"A100": A100, "H100": H100, "B200": B200}
MODES = {
    "fp32": (torch.float32, "fp32"),
    "tf32": (torch.float32, "tf32"),
    "bf16": (torch.bfloat16, "fp32"),
    "fp16": (torch.float16, "fp32"),
}
HIDDEN = (129, 160, 192, 255, 256, 257, 384, 512, 640, 768, 900, 1024, 1056)
NARROW = ("tf32", "bf16", "fp16")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the programs wait for one another")


@pytest.fixture(autouse=True)
def of_triton_3_6(request, monkeypatch):
    """What the choices below are for, unless a kernel is to run or to be compiled here."""
    if request.node.get_closest_marker("here") is None:
        monkeypatch.setattr(cooperative, "NEWER_TRITON", False)


class TestRefusal:
    def test_sizes_that_one_multiprocessor_holds(self):
        reason = refusal(128, torch.float32, "fp32", H100)
        assert reason == "hidden_size is 128, and the cooperative kernels serve 129 and more"

    def test_sizes_that_no_gpu_holds(self):
        reason = refusal(4096, torch.bfloat16, "fp32", H100)
        assert "hidden_size is 4096" in reason
        assert "the 132 processors at once, 227 KiB each" in reason

    @pytest.mark.parametrize(
        ("hidden", "mode", "served"),
        [
            (512, "fp32", {"A100", "H100", "B200"}),
            (768, "fp32", {"A100", "H100", "B200"}),
            (1024, "fp32", {"H100", "B200"}),
            (1152, "fp32", {"H100", "B200"}),
            (1153, "fp32", set()),
            *((1024, mode, {"A100", "H100", "B200"}) for mode in NARROW),
            *((2048, mode, {"H100", "B200"}) for mode in NARROW),
            *((2300, mode, set()) for mode in NARROW),
        ],
    )
    def test_what_fits(self, hidden, mode, served):
        assert {name for name, device in DEVICES.items() if refusal(hidden, *MODES[mode], device) is None} == served

    @pytest.mark.parametrize(
        ("hidden", "mode", "served"),
        [(640, "fp32", True), (641, "fp32", False), (640, "tf32", True), (641, "tf32", False), (1024, "bf16", True)],
    )
    def test_what_compiles_without_a_spill_under_a_newer_triton(self, hidden, mode, served, monkeypatch):
        monkeypatch.setattr(cooperative, "NEWER_TRITON", True)
        reason = refusal(hidden, *MODES[mode], H100)
        assert reason is None if served else "under triton" in reason

    def test_a_slice_of_a_gpu(self):
        assert refusal(512, torch.float32, "fp32", replace(H100, processors=16)) is None
        assert refusal(512, torch.float32, "fp32", replace(H100, processors=15)) is not None

    def test_choosing_what_is_refused_raises_the_reason(self):
        with pytest.raises(ValueError, match="hidden_size is 128"):
            choose_cooperative(128, torch.float32, "fp32", 64, H100)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
class TestEveryChoice:
    def choices(self, device, mode):
        for hidden in HIDDEN:
            if refusal(hidden, *MODES[mode], device) is None:
                for batch in (1, 16, 17, 64, 100, 1000):
                    yield hidden, batch, choose_cooperative(hidden, *MODES[mode], batch, device)

    def test_fits_the_gpu_at_once(self, device, mode):
        """One program a processor: what a cooperative launch needs so as not to be refused."""
        for _, batch, config in self.choices(device, mode):
            for _, _, grid in config.launches(batch):
                assert grid[0] * grid[1] * grid[2] <= device.processors
            # The weights alone; `resources` compares what the kernels compile to.
            weights = 3 * config.units * config.padded * (4 if config.split else 2)
            assert weights + 8192 <= device.shared_memory

    def test_owns_every_unit_once(self, device, mode):
        for hidden, _, config in self.choices(device, mode):
            assert (config.programs - 1) * config.units < hidden <= config.programs * config.units
            assert config.padded % config.chunk == 0
            assert config.programs * config.units <= config.padded < hidden + config.chunk

    def test_serves_every_row_and_direction_once(self, device, mode):
        for _, batch, config in self.choices(device, mode):
            served = [
                (d, row)
                for first_b, first_d, (_, blocks, directions) in config.launches(batch)
                for d in range(first_d, first_d + directions)
                for row in range(first_b, min(batch, first_b + blocks * config.rows))
            ]
            assert sorted(served) == [(d, row) for d in range(2) for row in range(batch)]

    def test_split_is_for_fp32_alone(self, device, mode):
        assert all(config.split == (mode == "fp32") for _, _, config in self.choices(device, mode))


class TestChoice:
    def test_a_batch_that_fits_takes_one_launch(self):
        for hidden in (192, 256, 384, 512):
            assert len(list(choose_cooperative(hidden, torch.float32, "fp32", 64, H100).launches(64))) == 1

    def test_a_small_batch_takes_the_narrowest_slices(self):
        config = choose_cooperative(512, torch.float32, "fp32", 16, H100)
        assert (config.units, config.rows, config.programs, config.blocks) == (16, 16, 32, 2)

    def test_wider_slices_where_more_would_not_fit(self):
        config = choose_cooperative(512, torch.float32, "fp32", 64, H100)
        assert (config.units, config.rows, config.programs, config.blocks) == (32, 16, 16, 4)

    def test_one_direction_at_a_time_where_two_do_not_fit(self):
        config = choose_cooperative(1024, torch.bfloat16, "fp32", 16, replace(H100, processors=32))
        assert (config.units, config.directions) == (32, 1)
        assert [(b, d) for b, d, _ in config.launches(33)] == [(0, 0), (0, 1), (16, 0), (16, 1), (32, 0), (32, 1)]

    def test_chunks_pad_as_little_as_can_be(self):
        for hidden, padded in ((192, 256), (384, 384), (512, 512), (640, 640), (768, 768)):
            assert choose_cooperative(hidden, torch.bfloat16, "fp32", 1, H100).padded == padded

    def test_an_empty_batch_takes_no_launch(self):
        assert list(choose_cooperative(256, torch.float32, "fp32", 0, H100).launches(0)) == []


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bigru.kernels import cooperative as c
import torch
from bigru.kernels.launch import H100
config = c.choose_cooperative(160, torch.float32, "fp32", 1, H100)
kernel = getattr(c, sys.argv[1])
values = dict(
    H=160, S=config.units, N=config.rows, CHUNK=config.chunk, WARPS=config.num_warps, MAX_POLLS=config.max_polls,
    HAS_BIAS=True, SAVE=True, SPLIT=True,
)
types = dict(state_ptr="*fp16", arrivals_ptr="*i64", T="i32", B="i32", first_b="i32", first_d="i32")
signature = {p.name: "constexpr" if p.is_constexpr else types.get(p.name, "*fp32") for p in kernel.params}
constants = {(i,): values[p.name] for i, p in enumerate(kernel.params) if p.is_constexpr}
compiled = triton.compile(
    ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32), options=config.options()
)
assert compiled.metadata.launch_cooperative_grid
assert compiled.metadata.shared <= c._shared_memory(config), compiled.metadata.shared
print(compiled.asm["ptx"])
"""


@pytest.mark.here
@pytest.mark.parametrize("kernel", ["gru_forward_cooperative_kernel", "gru_backward_cooperative_kernel"])
def test_exchange_is_ordered_in_the_compiled_kernel(kernel, tmp_path):
    """Between a store and the arrival lies a barrier, and another between the acquire and what was waited for."""
    # In a process of its own: in this one the kernels may be interpreted.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, kernel], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    arrivals = acquires = exchanged = 0
    stored = acquired = False
    for line in done.stdout.splitlines():
        if "bar.sync" in line:
            stored = acquired = False
        elif "st.global" in line:
            stored = True
        elif ".release." in line:
            assert not stored, line
            arrivals += 1
        elif ".acquire." in line:
            acquired = True
            acquires += 1
        elif "ld.global.cg" in line:
            assert not acquired, line
            exchanged += 1
    assert arrivals >= 1
    assert acquires >= 2
    assert exchanged >= 1


def forward(config, inputs):
    """y, h_n and gates of one configuration."""
    gi, _, _, h0 = inputs
    steps, batch, _, _ = gi.shape
    outputs = (
        gi.new_empty(steps, batch, *h0.shape[::2]),
        torch.empty_like(h0),
        gi.new_empty(steps, batch, 2, 4, h0.shape[2]),
    )
    cooperative.forward(*inputs, *outputs, config)
    return outputs


def backward(config, inputs, upstream, y, gates):
    """dgi, dq and dh0 of one configuration."""
    gi, w_hh, _, h0 = inputs
    outputs = torch.empty_like(gi), torch.empty_like(y), torch.empty_like(h0)
    cooperative.backward(*upstream, y, gates, h0, w_hh, *outputs, config)
    return outputs


def run(config, inputs, upstream):
    """y, h_n, dgi, dh0 and db_hn of one configuration."""
    y, h_n, gates = forward(config, inputs)
    dgi, dq, dh0 = backward(config, inputs, upstream, y, gates)
    return {"y": y, "h_n": h_n, "dgi": dgi, "dh0": dh0, "db_hn": dq.sum((0, 1))}


class TestOneProgramAGroup:
    """The arithmetic, with nobody to wait for: so it runs in the interpreter too."""

    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize(
        ("mode", "hidden", "rows"), [("fp32", 16, 16), ("tf32", 13, 16), ("bf16", 16, 32), ("fp16", 7, 16)]
    )
    def test_matches_fp64_reference(self, mode, hidden, rows, kernel_device):
        dtype, precision = MODES[mode]
        inputs, upstream = make_inputs((3, 19, hidden), dtype, kernel_device)
        config = CooperativeConfig(16, rows, 128, 1, blocks=1, directions=2, split=mode == "fp32")
        wanted = dict(zip(NAMES, expected(inputs, upstream), strict=True))
        for name, value in run(config, inputs, upstream).items():
            assert error(value, wanted[name]) < TOLERANCE[dtype, precision], name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there, programs run at once, and none waits in vain")
def test_a_wait_in_vain_ends_in_nan(kernel_device):
    """The interpreter runs one program after another: the first waits for a second that has not begun."""
    inputs, upstream = make_inputs((3, 5, 32), torch.float32, kernel_device)
    config = CooperativeConfig(16, 16, 128, 2, blocks=1, directions=2, split=True, max_polls=5)
    y, h_n, gates = forward(config, inputs)
    assert y.isnan().all()
    assert h_n.isnan().all()
    dgi, _, dh0 = backward(config, inputs, upstream, torch.zeros_like(y), torch.zeros_like(gates))
    assert dh0.isnan().all()
    # The first backward step, the last of direction 0 and the first of direction 1, waits for nothing.
    assert dgi[:-1, :, 0].isnan().all()
    assert dgi[1:, :, 1].isnan().all()


@needs_gpu
@pytest.mark.here
@pytest.mark.usefixtures("poisoned")
class TestOnGpu:
    @pytest.fixture
    def small(self, kernel_device):
        """Five programs a group, four launches of a direction and block each."""
        inputs, upstream = make_inputs((5, 20, 160), torch.float32, kernel_device)
        return CooperativeConfig(32, 16, 256, 5, blocks=1, directions=1, split=True), inputs, upstream

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(
        ("units", "rows", "blocks", "directions"), [(16, 16, 2, 2), (16, 32, 1, 2), (32, 16, 1, 1), (32, 32, 2, 1)]
    )
    def test_matches_fp64_reference(self, units, rows, blocks, directions, mode, kernel_device):
        dtype, precision = MODES[mode]
        inputs, upstream = make_inputs((5, 35, 200), dtype, kernel_device)
        config = CooperativeConfig(units, rows, 256, -(-200 // units), blocks, directions, split=mode == "fp32")
        wanted = dict(zip(NAMES, expected(inputs, upstream), strict=True))
        for name, value in run(config, inputs, upstream).items():
            assert error(value, wanted[name]) < TOLERANCE[dtype, precision], name

    def test_long_sequences_bit_for_bit(self, kernel_device):
        """Many exchanges: a read that came too early would differ from run to run."""
        inputs, upstream = make_inputs((500, 64, 512), torch.float32, kernel_device)
        config = choose_cooperative(512, torch.float32, "fp32", 64, cooperative_device())
        first = run(config, inputs, upstream)
        for _ in range(10):
            for name, value in run(config, inputs, upstream).items():
                assert torch.equal(value, first[name]), name

    def test_a_missing_program_ends_in_nan(self, small, monkeypatch):
        config, inputs, upstream = small
        whole = run(config, inputs, upstream)
        gates = forward(config, inputs)[2]
        grids = list(config.launches(20))
        fewer = [(b, d, (programs - 1, *rest)) for b, d, (programs, *rest) in grids]
        monkeypatch.setattr(CooperativeConfig, "launches", lambda self, batch: iter(fewer))
        short = replace(config, max_polls=1000)
        y, h_n, _ = forward(short, inputs)
        assert y.isnan().all()
        assert h_n[..., :128].isnan().all()
        dgi, _, dh0 = backward(short, inputs, upstream, whole["y"], gates)
        assert dh0[..., :128].isnan().all()
        # The first backward step, the last of direction 0 and the first of direction 1, waits for nothing.
        assert dgi[:-1, :, 0, :128].isnan().all()
        assert dgi[1:, :, 1, :128].isnan().all()

    def test_a_wait_that_is_given_up_leaves_right_numbers_or_nan(self, small):
        config, inputs, upstream = small
        whole = run(config, inputs, upstream)
        for polls in (1, 2, 5, 10):
            y, h_n, _ = forward(replace(config, max_polls=polls), inputs)
            assert (y.isnan() | (y == whole["y"])).all()
            assert torch.equal(h_n[0].isnan(), y[-1, :, 0].isnan())

    def test_graph_capture(self, small):
        config, inputs, upstream = small
        wanted = run(config, inputs, upstream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(config, inputs, upstream)
        for _ in range(3):
            graph.replay()
            for name, value in captured.items():
                assert torch.equal(value, wanted[name]), name


def cooperative_device():
    """The GPU at hand, as the choice of a configuration sees it."""
    from bigru.kernels import launch

    return launch.describe(torch.device("cuda", torch.cuda.current_device()))
