"""`BiGRU` as it chooses its backend beside `torch.nn.GRU`: the layer, what a call costs, and a step of training."""

from dataclasses import replace

import pytest
import torch

from benchmarks.workloads import CALL, MAIN, sweep
from bigru.proof.workloads import PRECISIONS

# The main workload in every precision, then batch and width; a CPU gets the main workload and small batches in fp32.
if torch.cuda.is_available():
    CASES = [replace(MAIN, precision=name) for name in PRECISIONS]
    CASES += sweep(MAIN, batch=(1, 256, 1024), hidden=(64, 256))
else:
    CASES = [MAIN, *sweep(MAIN, batch=(1, 8))]
TRAINED = [replace(case, group="training step") for case in CASES if case.precision in ("fp32", "tf32")]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("mode", ["forward", "training"])
def test_layer(beside_nn_gru, case, mode):
    beside_nn_gru(case, mode)


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_call(beside_nn_gru, mode):
    """50 calls of one step of one sequence, in which there is next to no arithmetic; "training" records gradients."""
    beside_nn_gru(CALL, mode)


@pytest.mark.parametrize("case", [case for case in TRAINED if case.batch == MAIN.batch], ids=str)
def test_training_step(beside_nn_gru, case):
    """Forward, loss, backward, clipping and AdamW of the forecaster."""
    beside_nn_gru(case, "training")
