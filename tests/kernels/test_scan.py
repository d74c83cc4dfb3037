"""The loops that stand for ATen's GRU under a compiler, against the reference."""

import functools

import pytest
import torch
from support import TOLERANCE, make_inputs, matches_reference, opcheck, outputs_and_gradients

from bigru.kernels.recurrence import fused_gru_recurrence

run = functools.partial(fused_gru_recurrence, precision="fp32", kernel="scan")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 3), (4, 1, 5), (5, 3, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_the_reference(dtype, shape, bias, poisoned):
    inputs, upstream = make_inputs(shape, dtype, "cpu", bias=bias)
    matches_reference(run, inputs, upstream, TOLERANCE.get((dtype, "fp32"), 1e-14))


def test_empty_batch():
    inputs, upstream = make_inputs((3, 0, 5), torch.float32, "cpu")
    y, _, dgi, dw_hh, *_ = outputs_and_gradients(run, inputs, upstream)
    assert y.shape == (3, 0, 2, 5)
    assert dgi.shape == (3, 0, 2, 15)
    assert not dw_hh.any()


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    opcheck("scan", "cpu", bias)
