"""The fused recurrence alone, and what one time step of it takes. There is nothing to compare on a CPU."""

from dataclasses import asdict

import pytest
import torch

from benchmarks.cases import CASES, MODES, STEPS, products, require_same
from benchmarks.paired import finished, gpu_time_ms
from bigru.kernels.reference import gru_recurrence

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels need a GPU")


def make_inputs(case, device):
    """gi, w_hh, b_hn, h0 and the upstream gradients dy, dh_n."""
    torch.manual_seed(0)
    batch, hidden, dtype = case.batch, case.hidden, MODES[case.mode].dtype
    shapes = ((STEPS, batch, 2, 3 * hidden), (2, 3 * hidden, hidden), (2, hidden), (2, batch, hidden))
    gi, w_hh, b_hn, h0 = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    # Weights as nn.GRU initialises them: no larger than 1 / sqrt(H).
    w_hh, b_hn = (tensor.clamp(-1, 1) * hidden**-0.5 for tensor in (w_hh, b_hn))
    upstream = torch.randn(STEPS, batch, 2, hidden, device=device).to(dtype), torch.randn_like(h0)
    return (gi, w_hh, b_hn, h0), upstream


def exact(inputs, upstream):
    """y, h_n, dgi and dh0 in fp64."""
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    y, h_n, _ = gru_recurrence(*leaves)
    torch.autograd.backward((y, h_n), [gradient.double() for gradient in upstream])
    return y, h_n, leaves[0].grad, leaves[3].grad


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("work", ["forward", "backward"])
def test_recurrence(benchmark, device, case, work):
    benchmark.group = "recurrence"
    mode = MODES[case.mode]
    inputs, upstream = make_inputs(case, device)
    _, w_hh, _, h0 = inputs
    with products(mode):
        y, h_n, gates = torch.ops.bigru.gru_forward(*inputs, mode.precision, True)
        saved = *upstream, y, gates, h0, w_hh, mode.precision
        dgi, _, dh0 = torch.ops.bigru.gru_backward(*saved)
        for name, actual, expected in zip(
            ("y", "h_n", "dgi", "dh0"), (y, h_n, dgi, dh0), exact(inputs, upstream), strict=True
        ):
            require_same(name, actual, expected, mode)

        def launch():
            if work == "forward":
                torch.ops.bigru.gru_forward(*inputs, mode.precision, True)
            else:
                torch.ops.bigru.gru_backward(*saved)

        benchmark.pedantic(finished(launch, device), rounds=100, warmup_rounds=5)
        gpu_ms = gpu_time_ms(launch)
    benchmark.extra_info.update(asdict(case), work=work, gpu_ms=gpu_ms, step_us=1e3 * gpu_ms / STEPS)
