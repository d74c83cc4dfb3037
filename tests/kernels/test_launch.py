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
from bigru.kernels.kernel import Launcher
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
    for mode, (most_operators, most_kernels) in {"forward": (39, 6), "training": (211, 21)}.items():
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


def test_a_launcher_asks_triton_once_for_each_signature():
    grid, x, launcher = (3, 2, 1), torch.zeros(64), Launcher(Jit(launches := []))
    named = {"H": 16, "N": 8, "num_warps": 4}
    launcher(Config(8), None, grid, (x, None), 5, H=16)
    launcher(Config(8), None, grid, (x[4:], None), 6, H=16)
    assert launches.pop(0) == (grid, (x, None, 5), named)
    assert launches.pop(0) == (grid, (x[4:].data_ptr(), None, 6, 16, 8), {})
    for change in (
        lambda: launcher(Config(16), None, grid, (x, None), 5, H=16),
        lambda: launcher(Config(8), None, (1, 2, 1), (x, None), 5, H=16),
        lambda: launcher(Config(8), None, grid, (x, None), 5, H=32),
        lambda: launcher(Config(8), None, grid, (x.half(), None), 5, H=16),
        lambda: launcher(Config(8), "varlen", grid, (x, x), 5, H=16),
        lambda: launcher(Config(8), None, grid, (x[1:], None), 5, H=16),  # which Triton compiles anew for
    ):
        change()
        assert launches.pop()[2] != {}


CASES = {"biases": (True, torch.float32), "no biases": (False, torch.float32), "to half": (True, torch.float16)}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("bias", "dtype"), CASES.values(), ids=CASES.keys())
def test_what_is_gathered(bias, dtype, triton_device):
    from bigru.kernels.gather import gather

    gru = BiGRU(5, 7, bias=bias, device=triton_device)
    weights = [torch.randn_like(weight) for weight in gru._weights()]
    weights[1] = weights[1].T.contiguous().T
    x = torch.randn(2, 3, 5, device=triton_device).transpose(0, 1)
    gathered, h0, w_ih, out, b_gi, b_hn = gather(x, None, weights, 2, dtype)
    gi, w_hh, b_hn_wanted = layer_operands(x, weights)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.equal(gathered, x.reshape(-1, 5).to(dtype))
    assert h0.shape == (2, 2, 7)
    assert not h0.any()
    assert torch.equal(out[: w_hh.numel()].view_as(w_hh), w_hh.to(dtype))
    own = gathered.float() @ w_ih.float()
    assert error(own if b_gi is None else own + b_gi.float(), gi.view(-1, 42)) < tolerance
    assert (b_hn is None) == (not bias)
    if bias:
        assert torch.equal(b_hn, b_hn_wanted.to(dtype))


def test_weights_that_a_kernel_cannot_read(triton_device):
    gru = BiGRU(5, 7, backend="triton", device=triton_device)
    gru.weight_hh_l0_reverse = torch.nn.Parameter(gru.weight_hh_l0_reverse.detach().to("meta"))
    with pytest.raises(RuntimeError, match=r"weights: expected all in memory on .*like input.*meta"):
        gru(torch.zeros(3, 2, 5, device=triton_device))
