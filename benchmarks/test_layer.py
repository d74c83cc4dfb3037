"""`BiGRU` beside `torch.nn.GRU`: same weights, same input, same precision of products."""

import copy
from dataclasses import asdict

import pytest
import torch
from torch import nn

from benchmarks.cases import CASES, FEATURES, LAYERS, MODES, STEPS, products, require_same, require_same_gradients
from benchmarks.paired import compare
from benchmarks.rivals import step
from bigru import BiGRU


def make_pair(case, device):
    """A BiGRU and an nn.GRU with the same weights, an input and an upstream gradient."""
    mode = MODES[case.mode]
    torch.manual_seed(0)
    options = {"batch_first": True, "device": device, "dtype": mode.dtype}
    nn_gru = nn.GRU(FEATURES, case.hidden, LAYERS, bidirectional=True, **options)
    bigru = BiGRU(FEATURES, case.hidden, LAYERS, precision=mode.precision, **options)
    bigru.load_state_dict(nn_gru.state_dict())
    x = torch.randn(case.batch, STEPS, FEATURES, device=device, dtype=mode.dtype)
    return bigru, nn_gru, x, torch.randn(case.batch, STEPS, 2 * case.hidden, device=device, dtype=mode.dtype)


def prove(bigru, nn_gru, x, dy, mode):
    """BiGRU's output and every gradient of it against nn.GRU in fp64."""
    exact, x, x64 = copy.deepcopy(nn_gru).double(), x.clone().requires_grad_(), x.double().requires_grad_()
    require_same("y", step(bigru, x, dy), step(exact, x64, dy.double()), mode)
    require_same("gradient of x", x.grad, x64.grad, mode)
    require_same_gradients(bigru, exact, mode)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("work", ["forward", "forward+backward"])
def test_layer(benchmark, device, case, work):
    benchmark.group = "layer"
    benchmark.extra_info.update(asdict(case), work=work)
    bigru, nn_gru, x, dy = make_pair(case, device)
    with products(MODES[case.mode]):
        prove(bigru, nn_gru, x, dy, MODES[case.mode])
        if work == "forward":
            with torch.no_grad():
                compare(benchmark, f"layer {work} {case}", lambda: bigru(x), lambda: nn_gru(x), device)
        else:
            compare(benchmark, f"layer {work} {case}", lambda: step(bigru, x, dy), lambda: step(nn_gru, x, dy), device)
