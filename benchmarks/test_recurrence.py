"""The fused recurrence alone, and what one time step of it takes. There is nothing to compare on a CPU."""

from dataclasses import asdict

import pytest
import torch
from support import NAMES, expected, make_inputs

from benchmarks.cases import CASES, MODES, STEPS, products, require_same
from benchmarks.paired import median_gpu_ms
from benchmarks.timing import finished

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels need a GPU")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("work", ["forward", "backward"])
def test_recurrence(benchmark, device, case, work):
    benchmark.group = "recurrence"
    mode = MODES[case.mode]
    inputs, upstream = make_inputs((STEPS, case.batch, case.hidden), mode.dtype, device)
    _, w_hh, _, h0 = inputs
    with products(mode):
        y, h_n, gates = torch.ops.bigru.gru_forward(*inputs, mode.precision, True)
        saved = *upstream, y, gates, h0, w_hh, mode.precision
        dgi, _, dh0 = torch.ops.bigru.gru_backward(*saved)
        wanted = dict(zip(NAMES, expected(inputs, upstream), strict=True))
        for name, actual in {"y": y, "h_n": h_n, "dgi": dgi, "dh0": dh0}.items():
            require_same(name, actual, wanted[name], mode)

        def launch():
            if work == "forward":
                torch.ops.bigru.gru_forward(*inputs, mode.precision, True)
            else:
                torch.ops.bigru.gru_backward(*saved)

        benchmark.pedantic(finished(launch, device), rounds=100, warmup_rounds=5)
        gpu_ms = median_gpu_ms(launch)
    benchmark.extra_info.update(asdict(case), work=work, gpu_ms=gpu_ms, step_us=1e3 * gpu_ms / STEPS)
