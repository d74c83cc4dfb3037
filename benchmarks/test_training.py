"""One training step of the forecaster beside the same network on `torch.nn.GRU`."""

import functools
from dataclasses import asdict

import pytest
import torch
from torch import nn

from benchmarks.cases import CASES, FEATURES, LAYERS, MAIN, MODES, STEPS, products, require_same, require_same_gradients
from benchmarks.forecaster import make_step
from benchmarks.paired import compare
from bigru import HandForecaster

# Parameters are fp32 in training; the precision of products is what differs.
TRAINED = [case for case in CASES if case.mode in ("fp32", "tf32") and case.hidden == MAIN.hidden]


def make_pair(case, device):
    """The forecaster, and one whose encoder is nn.GRU with the same weights."""
    torch.manual_seed(0)
    ours = HandForecaster(FEATURES, case.hidden, LAYERS, precision=MODES[case.mode].precision).to(device)
    theirs = HandForecaster(FEATURES, case.hidden, LAYERS)
    theirs.encoder.core = nn.GRU(FEATURES, case.hidden, LAYERS, batch_first=True, bidirectional=True)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.to(device)


@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_training_step(benchmark, device, case):
    benchmark.group = "training"
    benchmark.extra_info.update(asdict(case))
    mode = MODES[case.mode]
    ours, theirs = make_pair(case, device)
    x = torch.randn(case.batch, STEPS, FEATURES, device=device)
    target = torch.randn_like(x)
    steps = [functools.partial(make_step(model), x, target) for model in (ours, theirs)]
    with products(mode):
        predictions = []
        for step in steps:
            # The same dropout mask for both.
            torch.manual_seed(1)
            predictions.append(step())
        require_same("prediction", *predictions, mode)
        require_same_gradients(ours, theirs, mode)
        compare(benchmark, f"training step {case}", *steps, device)
