"""What a call costs beside the arithmetic: one step of one sequence, where there is next to none.

On a CPU, where "auto" is ATen's GRU on both sides, BiGRU's call is to cost at most 1.3 times nn.GRU's: a ratio of 0.77.
"""

import contextlib
from dataclasses import replace

import pytest
import torch

from benchmarks.cases import FEATURES, LAYERS, MAIN, MODES, products
from benchmarks.paired import compare
from benchmarks.test_layer import make_pair, prove

CALLS = 50
"""Of each side in a round."""


@pytest.mark.parametrize("mode", ["grad", "inference_mode"])
def test_overhead(benchmark, device, mode):
    benchmark.group = "overhead"
    benchmark.extra_info.update(batch=1, steps=1, features=FEATURES, hidden=MAIN.hidden, layers=LAYERS, calls=CALLS)
    bigru, nn_gru, x, dy = make_pair(replace(MAIN, batch=1), device)
    x, dy = x[:, :1], dy[:, :1]

    def calls(module):
        for _ in range(CALLS):
            module(x)

    with products(MODES[MAIN.mode]):
        prove(bigru, nn_gru, x, dy, MODES[MAIN.mode])
        with torch.inference_mode() if mode == "inference_mode" else contextlib.nullcontext():
            name = f"{CALLS} calls B=1 T=1 {mode}"
            compare(benchmark, name, lambda: calls(bigru), lambda: calls(nn_gru), device)
