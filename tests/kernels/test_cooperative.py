"""The cooperative kernels: what they serve and with which parameters, the order of their exchange, and on a GPU the
recurrence itself, also when a program is missing."""

from dataclasses import replace

import pytest
import torch
from support import MODES, TOLERANCE, assert_near, compiled_apart, error, expected, make_inputs, run_kernel

pytest.importorskip("triton")

from bigru.kernels.config import A100, B200, H100, Call, CooperativeConfig, describe
from bigru.kernels.cooperative import KERNEL
from bigru.kernels.kernel import Forward

DEVICES = {"A100": A100, "H100": H100, "B200": B200}
HIDDEN = (129, 160, 192, 255, 256, 257, 384, 512, 640, 768, 900, 1024, 1056)
NARROW = ("tf32", "bf16", "fp16")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the programs wait for one another")


def call(hidden, mode="fp32", device=H100):
    dtype, precision = MODES[mode]
    return Call(device, dtype, hidden, precision)


class TestRefusal:
    def test_sizes_that_one_multiprocessor_holds_and_that_no_gpu_holds(self):
        reason = KERNEL.refusal(call(128))
        assert reason == "hidden_size is 128, and the cooperative kernels serve 129 and more"
        reason = KERNEL.refusal(call(4096, "bf16"))
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
        fits = {name for name, device in DEVICES.items() if KERNEL.refusal(call(hidden, mode, device)) is None}
        assert fits == served

    def test_a_slice_of_a_gpu(self):
        assert KERNEL.refusal(call(512, device=replace(H100, processors=16))) is None
        assert KERNEL.refusal(call(512, device=replace(H100, processors=15))) is not None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
@pytest.mark.parametrize("hidden", HIDDEN)
def test_every_choice_fits_at_once_and_serves_everything_once(hidden, device, mode):
    if KERNEL.refusal(call(hidden, mode, device)) is not None:
        return
    for batch in (1, 16, 17, 64, 100, 1000):
        config = KERNEL.choose(call(hidden, mode, device), batch)
        launches = list(config.launches(batch))
        # One program a processor: what a cooperative launch needs so as not to be refused.
        assert all(grid[0] * grid[1] * grid[2] <= device.processors for _, _, grid in launches)
        # The weights alone; `resources` compares what the kernels compile to.
        weights = 3 * config.units * config.padded * (4 if config.split else 2)
        assert weights + 8192 <= device.shared_memory
        # Every unit has one program.
        assert (config.programs - 1) * config.units < hidden <= config.programs * config.units
        assert config.padded % config.chunk == 0
        assert config.programs * config.units <= config.padded < hidden + config.chunk
        served = [
            (d, row)
            for first_b, first_d, (_, blocks, directions) in launches
            for d in range(first_d, first_d + directions)
            for row in range(first_b, min(batch, first_b + blocks * config.rows))
        ]
        assert sorted(served) == [(d, row) for d in range(2) for row in range(batch)]
        assert config.split == (mode == "fp32")


class TestChoice:
    def test_a_batch_that_fits_takes_one_launch_and_an_empty_one_none(self):
        for hidden in (192, 256, 384, 512):
            assert len(list(KERNEL.choose(call(hidden), 64).launches(64))) == 1
        assert list(KERNEL.choose(call(256), 0).launches(0)) == []

    @pytest.mark.parametrize(("batch", "expected"), [(16, (16, 16, 32, 2)), (64, (32, 16, 16, 4))])
    def test_the_narrowest_slices_that_fit(self, batch, expected):
        config = KERNEL.choose(call(512), batch)
        assert (config.units, config.rows, config.programs, config.blocks) == expected

    def test_one_direction_at_a_time_where_two_do_not_fit(self):
        config = KERNEL.choose(call(1024, "bf16", replace(H100, processors=32)), 16)
        assert (config.units, config.directions) == (32, 1)
        assert [(b, d) for b, d, _ in config.launches(33)] == [(0, 0), (0, 1), (16, 0), (16, 1), (32, 0), (32, 1)]

    def test_sums_are_joined_where_there_is_room(self):
        assert KERNEL.choose(call(256), 64).joined
        assert KERNEL.choose(call(512, "bf16"), 64).joined
        assert not KERNEL.choose(call(512), 64).joined

    def test_chunks_pad_as_little_as_can_be(self):
        for hidden, padded in ((192, 256), (384, 384), (512, 512), (640, 640), (768, 768)):
            assert KERNEL.choose(call(hidden, "bf16"), 1).padded == padded


COMPILE = """
from bigru.kernels import resources
from bigru.kernels.config import cooperative_shared_memory
from bigru.kernels.cooperative import KERNEL
config = KERNEL.choose(resources.Call(resources.H100, resources.torch.float32, 160), 1)
for direction in ("forward", "backward"):
    compiled = resources.compile_case(
        resources.Case("sm_90", "cooperative", direction, 160, "fp32", "fp32", config))
    assert compiled.metadata.launch_cooperative_grid
    assert compiled.metadata.shared <= cooperative_shared_memory(config), compiled.metadata.shared
    print("#", compiled.asm["ptx"])
"""


@pytest.mark.slow
def test_exchange_is_ordered_in_the_compiled_kernels(tmp_path):
    """Between a store and the arrival lies a barrier, and another between the acquire and what was waited for."""
    _, *kernels = compiled_apart(COMPILE, tmp_path).split("#")
    assert len(kernels) == 2
    for ptx in kernels:
        check_exchange(ptx)
    check_operands(kernels[0])


def check_exchange(ptx):
    arrivals = acquires = exchanged = 0
    stored = acquired = False
    for line in ptx.splitlines():
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


def check_operands(ptx):
    """The state that is loaded is multiplied as it lies in registers, with no way through shared memory."""
    loaded = multiplied = False
    for line in ptx.splitlines():
        if "ld.global.cg" in line:
            loaded = True
        elif "mma." in line and loaded:
            multiplied = True
            break
        assert not (loaded and "st.shared" in line), line
    assert multiplied


def run(config, inputs, upstream, **given):
    return run_kernel(KERNEL, inputs, upstream, config=config, **given)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("mode", "hidden", "rows", "chunk", "joined"),
    [
        ("fp32", 16, 16, 128, True),
        ("tf32", 13, 16, 256, False),
        ("bf16", 16, 32, 128, False),
        ("fp16", 7, 32, 256, True),
    ],
)
def test_one_program_a_group_matches_fp64_reference(mode, hidden, rows, chunk, joined, kernel_device):
    """The arithmetic, with nobody to wait for: so it runs in the interpreter too."""
    dtype, precision = MODES[mode]
    inputs, upstream = make_inputs((3, 19, hidden), dtype, kernel_device)
    config = CooperativeConfig(16, rows, chunk, 1, blocks=1, directions=2, split=mode == "fp32", joined=joined)
    assert_near(run(config, inputs, upstream)[0], inputs, upstream, TOLERANCE[dtype, precision])


@pytest.mark.parametrize("split", [True, False])
def test_what_a_large_initial_state_spoils_is_mended(split, kernel_device):
    inputs, upstream = make_inputs((3, 3, 16), torch.float32, kernel_device)
    gi, w_hh, b_hn, h0 = inputs
    w_hh[:, :, 0], h0[:, 1, 0] = 0, 1e8
    w_hh[:, 16:32, 0] = -0.2  # z = 0, so that it is forgotten
    y, h_n, gates = torch.empty_like(gi[..., :16]), torch.empty_like(h0), gi.new_empty(3, 3, 2, 4, 16)
    config = CooperativeConfig(16, 16, 128, 1, blocks=1, directions=2, split=split)
    KERNEL.forward(Forward(gi, w_hh, b_hn, h0, y, h_n, gates, given=True), config)
    wanted = expected(inputs, upstream)
    assert error(y[:, 1], wanted[0][:, 1]) < 1e-6
    assert error(h_n[:, 1], wanted[1][:, 1]) < 1e-6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there, programs run at once, and none waits in vain")
def test_a_wait_in_vain_ends_in_nan(kernel_device):
    """The interpreter runs one program after another: the first waits for a second that has not begun."""
    inputs, upstream = make_inputs((3, 5, 32), torch.float32, kernel_device)
    config = CooperativeConfig(16, 16, 128, 2, blocks=1, directions=2, split=True, max_polls=5)
    finite = {"y": torch.zeros(3, 5, 2, 32), "gates": torch.zeros(3, 5, 2, 4, 32)}
    results, _ = run(config, inputs, upstream, **finite)
    for name in ("y", "h_n", "dh0"):
        assert results[name].isnan().all(), name
    # The first backward step, the last of direction 0 and the first of direction 1, waits for nothing.
    assert results["dgi"][:-1, :, 0].isnan().all()
    assert results["dgi"][1:, :, 1].isnan().all()


@needs_gpu
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
        for joined in (False, True):
            results, _ = run(replace(config, joined=joined), inputs, upstream)
            assert_near(results, inputs, upstream, TOLERANCE[dtype, precision])

    def test_long_sequences_bit_for_bit(self, kernel_device):
        """Many exchanges: a read that came too early would differ from run to run."""
        inputs, upstream = make_inputs((500, 64, 512), torch.float32, kernel_device)
        config = KERNEL.choose(call(512, device=describe(kernel_device)), 64)
        first = run(config, inputs, upstream)[0]
        for _ in range(10):
            for name, value in run(config, inputs, upstream)[0].items():
                assert torch.equal(value, first[name]), name

    def test_a_missing_program_ends_in_nan(self, small):
        class Short(CooperativeConfig):
            def launches(self, batch):
                for first_b, first_d, (programs, *rest) in super().launches(batch):
                    yield first_b, first_d, (programs - 1, *rest)

        config, inputs, upstream = small
        whole, gates = run(config, inputs, upstream)
        short = Short(**vars(replace(config, max_polls=1000)))
        results, _ = run(short, inputs, upstream, y=whole["y"], gates=gates)
        assert results["y"].isnan().all()
        assert results["h_n"][..., :128].isnan().all()
        assert results["dh0"][..., :128].isnan().all()
        # The first backward step, the last of direction 0 and the first of direction 1, waits for nothing.
        assert results["dgi"][:-1, :, 0, :128].isnan().all()
        assert results["dgi"][1:, :, 1, :128].isnan().all()

    def test_a_wait_that_is_given_up_leaves_right_numbers_or_nan(self, small):
        config, inputs, upstream = small
        whole, gates = run(config, inputs, upstream)
        for polls in (1, 2, 5, 10):
            results, _ = run(replace(config, max_polls=polls), inputs, upstream, y=whole["y"], gates=gates)
            y, h_n = results["y"], results["h_n"]
            assert (y.isnan() | (y == whole["y"])).all()
            assert torch.equal(h_n[0].isnan(), y[-1, :, 0].isnan())

    def test_graph_capture(self, small):
        config, inputs, upstream = small
        wanted = run(config, inputs, upstream)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(config, inputs, upstream)[0]
        for _ in range(3):
            graph.replay()
            for name, value in captured.items():
                assert torch.equal(value, wanted[name]), name
