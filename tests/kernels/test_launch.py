"""What a call costs the host: operators, kernels, and launches past Triton's own path. Nothing is timed."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from support import error

from bigru import BiGRU
from bigru.kernels.launch import Launcher, direct
from bigru.kernels.reference import layer_operands


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="what launches nothing takes the place of the GPU's driver")
@pytest.mark.parametrize("backend", ["triton", "resident"])
def test_operators_and_kernels_of_a_call(backend):
    pytest.importorskip("triton")
    pytest.importorskip("triton.backends.nvidia")
    command = [sys.executable, "-m", "benchmarks.launch", "--count", backend]
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    counted = json.loads(run.stdout.splitlines()[-1])
    for mode, (most_operators, most_kernels) in {"forward": (28, 6), "training": (160, 21)}.items():
        operators, kernels = counted[mode]
        assert operators <= most_operators, mode
        assert kernels <= most_kernels, mode


class Jit:
    """Stands for a jit function, and for what it is compiled to: records what is launched."""

    params = tuple(SimpleNamespace(name=name, is_constexpr=name.isupper()) for name in ("x", "y", "n", "H", "N"))

    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.launches.append((grid, arguments, constants))
            return Jit(self.launches)

        return launch


class Config(NamedTuple):
    rows: int

    def constants(self):
        return {"N": self.rows}

    def options(self):
        return {"num_warps": 4}


UNKNOWN = 99, 0
"""A version of triton whose launcher's arguments are not known."""


def test_a_launch_asks_triton_once():
    grid, x, launcher = (3, 2, 1), torch.zeros(64), Launcher(Jit(launches := []), triton_version=UNKNOWN)
    named = {"H": 16, "N": 8, "num_warps": 4}
    launch = launcher.prepare(Config(8), False, x.dtype, -1, H=16)
    launch(grid, (x, None), (5,))
    launch((1, 2, 1), (x[4:], None), (6,))
    assert launches.pop(0) == (grid, (x, None, 5), named)
    assert launches.pop(0) == ((1, 2, 1), (x[4:].data_ptr(), None, 6, 16, 8), {})
    for _ in range(2):
        launch(grid, (x[1:], None), (5,))  # which Triton compiles anew for
    assert launches.pop(0)[2] == named
    assert launches.pop(0) == (grid, (x[1:].data_ptr(), None, 5, 16, 8), {})


def test_a_launch_at_offsets():
    x, launcher = torch.zeros(64), Launcher(Jit(launches := []), triton_version=UNKNOWN)
    launch = launcher.prepare(Config(8), False, x.dtype, -1, H=16)
    launch((1, 1, 1), (x, None), (5,), (16, 0))
    assert launches[0][1][0].data_ptr() == x.data_ptr() + 16
    launch((1, 1, 1), (x, None), (5,), (32, 0))
    assert launches[1] == ((1, 1, 1), (x.data_ptr() + 32, None, 5, 16, 8), {})
    launch((1, 1, 1), (x, None), (5,), (4, 0))
    assert launches[2][1][0].data_ptr() == x.data_ptr() + 4


def test_a_launch_past_the_hooks_of_a_profiler():
    """In a known triton: while nobody listens, none are called."""
    knobs = pytest.importorskip("triton").knobs
    launched, hooks = [], knobs.runtime.launch_enter_hook

    class Compiled:
        function, packed_metadata, run = "function", "metadata", staticmethod(lambda *args: launched.append(args))

        def __getitem__(self, grid):
            return lambda *args: launched.append((grid, *args))

    active = SimpleNamespace(get_current_device=lambda: 4, get_current_stream=lambda device: device + 3)
    launch = direct(Compiled(), (3, 6), active)
    launch(3, 2, 1, 10, None)
    hooks.add(print)
    try:
        launch(3, 2, 1, 10, None)
    finally:
        hooks.remove(print)
    assert launched == [(3, 2, 1, 7, "function", "metadata", None, None, None, 10, None), ((3, 2, 1), 10, None)]


def test_what_another_launch_is_compiled_for():
    x, launcher = torch.zeros(64), Launcher(Jit([]))
    launch = launcher.prepare(Config(8), False, x.dtype, -1, H=16)
    assert launcher.prepare(Config(8), False, x.dtype, -1, H=16) is launch
    for about in ((Config(16), False, x.dtype, -1), (Config(8), True, x.dtype, -1), (Config(8), False, torch.half, -1)):
        assert launcher.prepare(*about, H=16) is not launch
    assert launcher.prepare(Config(8), False, x.dtype, 0, H=16) is not launch
    assert launcher.prepare(Config(8), False, x.dtype, -1, H=32) is not launch


CASES = {"biases": (True, torch.float32), "no biases": (False, torch.float32), "to half": (True, torch.float16)}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("bias", "dtype"), CASES.values(), ids=CASES.keys())
def test_what_is_gathered(bias, dtype, triton_device):
    from bigru.kernels.plan import plan_of

    gru = BiGRU(5, 7, bias=bias, device=triton_device)
    weights = [torch.randn_like(weight) for weight in gru._weights()]
    weights[1] = weights[1].T.contiguous().T
    x = torch.randn(2, 3, 5, device=triton_device)
    dtypes = (*[torch.float32] * (1 + len(weights)), dtype)
    plan = plan_of("triton", "fp32", x.device, dtypes, x.shape, x.stride(), 7, 2, False, True, 0, True, False)
    out = plan.forward(x, None, weights, None, False)[3]
    gi, w_hh, b_hn = layer_operands(x.transpose(0, 1), weights)
    rows, w_ih = out.as_strided(*plan.x), out.as_strided(*plan.w_ih_t)
    assert torch.equal(rows, x.transpose(0, 1).reshape(-1, 5).to(dtype))
    assert not out.as_strided(*plan.h0).any()
    assert torch.equal(out[: w_hh.numel()].view_as(w_hh), w_hh.to(dtype))
    own = rows.float() @ w_ih.float()
    own = own + out.as_strided(*plan.bias).float() if bias else own
    assert error(own, gi.view(-1, 42)) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert (plan.bias is not None) == bias
    if bias:
        assert torch.equal(out.as_strided(*plan.b_hn), b_hn.to(dtype))


def test_weights_that_a_kernel_cannot_read(triton_device):
    gru = BiGRU(5, 7, backend="triton", device=triton_device)
    gru.weight_hh_l0_reverse = torch.nn.Parameter(gru.weight_hh_l0_reverse.detach().to("meta"))
    with pytest.raises(RuntimeError, match=r"weights: expected all in memory on .*like input.*meta"):
        gru(torch.zeros(3, 2, 5, device=triton_device))
