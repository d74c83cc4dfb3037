"""Layers as a workload: equal weights and inputs for every candidate, each proven right before it is timed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from bigru.kernels.gru import BiGRU
from bigru.kernels.record import NN_GRU
from bigru.proof.checks import TOLERANCE, error
from bigru.proof.timing import Work

CALLS = 50
"""Calls of one round in the group "call", each of almost no arithmetic."""


@dataclass(frozen=True)
class Precision:
    """Storage, and the precision of products on either side."""

    dtype: torch.dtype
    precision: Literal["fp32", "tf32"]
    """BiGRU's argument."""
    cudnn_tf32: bool = False
    matmul_tf32: bool = False
    """Whether cuDNN's GRU and ATen's matrix products may use TF32."""


PRECISIONS = {
    "fp32": Precision(torch.float32, "fp32"),
    "tf32": Precision(torch.float32, "tf32", cudnn_tf32=True, matmul_tf32=True),
    "bf16": Precision(torch.bfloat16, "fp32"),
    "fp16": Precision(torch.float16, "fp32"),
    # What a user gets who sets nothing: PyTorch lets cuDNN use TF32.
    "default": Precision(torch.float32, "fp32", cudnn_tf32=True),
}


@dataclass(frozen=True)
class Case:
    """What is computed; the defaults are the main workload, the forecaster's encoder and its training batch."""

    group: str = "layer"
    batch: int = 64
    steps: int = 60
    hidden: int = 128
    input: int = 84
    layers: int = 2
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.group} {self.precision} B={self.batch} T={self.steps} H={self.hidden}"


@dataclass(frozen=True)
class Candidate:
    """One implementation at one case.

    Args:
        name: a backend of BiGRU (never "auto": the one that it takes), "nn.GRU", or a rival of the benchmarks'.
        works: what is timed, by mode.
        outcome: outputs and every gradient, by name.
    """

    name: str
    works: dict[str, Work]
    outcome: Callable[[torch.dtype | None], dict[str, Tensor]]


Make = Callable[[str, Case, torch.device], Candidate]


class Refused(Exception):
    """A candidate that does not take the case, for the reason given."""


@contextmanager
def products(name: str) -> Iterator[None]:
    """Sets whether ATen and cuDNN may use TF32, for as long as the block runs."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    mode = PRECISIONS[name]
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = mode.cudnn_tf32, mode.matmul_tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def errors(candidate: Candidate, truth: Candidate) -> dict[str, float]:
    """Returns the norm-relative error of each output and gradient against nn.GRU in fp64, which shares no code."""
    wanted = truth.outcome(torch.float64)
    actual = candidate.outcome(None)
    return {name: error(actual[name], tensor) for name, tensor in wanted.items()}


def verdict(found: dict[str, float], case: Case) -> str:
    """Returns what is wrong with errors, by the tests' tolerance for the precision; empty if nothing is."""
    mode = PRECISIONS[case.precision]
    tolerance = TOLERANCE[mode.dtype, mode.precision]
    # Written so that NaN is wrong.
    wrong = [f"{name} {value:.1e}" for name, value in found.items() if not value <= tolerance]
    return f"error above {tolerance:.0e}: {', '.join(wrong)}" if wrong else ""


def _exchange_gates(module: nn.Module) -> None:
    """Exchanges the reset and update gates in a layer's recurrent weights."""
    weight = dict(module.named_parameters())["weight_hh_l0"]
    r, z, n = weight.detach().chunk(3)
    with torch.no_grad():
        weight.copy_(torch.cat([z, r, n]))


def make_gru(name: str, case: Case, device: torch.device) -> nn.Module:
    """Makes a module with everybody's weights: those of an nn.GRU after a fixed seed.

    Raises:
        Refused: it does not take the case.
    """
    mode = PRECISIONS[case.precision]
    sizes = case.input, case.hidden, case.layers
    torch.manual_seed(0)
    options: dict[str, Any] = {"batch_first": True, "device": device, "dtype": mode.dtype}
    nn_gru = nn.GRU(*sizes, bidirectional=True, **options)
    if name == NN_GRU:
        return nn_gru
    try:
        gru = BiGRU(*sizes, backend=name, precision=mode.precision, **options)
        gru.resolve_backend(_input(case, device))
    except (ValueError, RuntimeError) as why:
        raise Refused(str(why)) from why
    gru.load_state_dict(nn_gru.state_dict())
    return gru


def _input(case: Case, device: torch.device) -> Any:
    """Returns (B, T, I), or, if ragged, a PackedSequence whose shortest sequence is half as long as the longest."""
    x = normal((case.batch, case.steps, case.input), device, PRECISIONS[case.precision].dtype)
    if case.group != "ragged":
        return x
    lengths = torch.linspace(case.steps, (case.steps + 1) // 2, case.batch).long()
    return pack_padded_sequence(x, lengths, batch_first=True)


def _with_data(x: Any, data: Tensor) -> Any:
    return x._replace(data=data) if isinstance(x, PackedSequence) else data


def _data(x: Any) -> Tensor:
    return x.data if isinstance(x, PackedSequence) else x


def make_layer(
    name: str,
    case: Case,
    device: torch.device,
    *,
    defect: bool = False,
    module: Callable[[str, Case, torch.device], nn.Module] = make_gru,
) -> Candidate:
    """Makes a candidate ready for a case, on the weights and inputs that all candidates get.

    Args:
        name: as in `Candidate`.
        case: what is computed.
        device: where.
        defect: exchange the reset and update gates of a layer, which `errors` must notice.
        module: makes what is called.

    Raises:
        Refused: it does not take the case.
    """
    # Forward runs in eval and backward in train mode, as users run them: cuDNN keeps less for the first.
    forward, training = (module(name, case, device) for _ in range(2))
    forward.eval()
    if defect:
        _exchange_gates(training)
    x = _input(case, device)
    leaf = _with_data(x, _data(x).clone().requires_grad_())
    sizes = (*_data(x).shape[:-1], 2 * case.hidden), (2 * case.layers, case.batch, case.hidden)
    dy, dh_n = (normal(size, device, _data(x).dtype) for size in sizes)
    if isinstance(training, BiGRU):
        name = training.resolve_backend(x)
    calls = CALLS if case.group == "call" else 1

    def run_forward() -> None:
        with torch.no_grad():
            for _ in range(calls):
                forward(x)

    def run_training() -> None:
        if case.group == "call":
            # With gradients wanted, and none computed.
            for _ in range(calls):
                training(leaf)
            return
        training.zero_grad(set_to_none=True)
        _data(leaf).grad = None
        _data(training(leaf)[0]).backward(dy)

    def outcome(dtype: torch.dtype | None) -> dict[str, Tensor]:
        module = training if dtype is None else copy.deepcopy(training).to(dtype)
        module.zero_grad(set_to_none=True)
        own = _data(x).to(dtype or _data(x).dtype).detach().clone().requires_grad_()
        y, h_n = module(_with_data(x, own))
        torch.autograd.backward([_data(y), h_n], [dy.to(h_n.dtype), dh_n.to(h_n.dtype)])
        gradients = {name.split(".")[-1]: parameter.grad for name, parameter in module.named_parameters()}
        return {"y": _data(y).detach(), "h_n": h_n.detach(), "dx": own.grad} | gradients

    return Candidate(name, {"forward": run_forward, "training": run_training}, outcome)


def normal(size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normal random numbers that depend on the size alone."""
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).to(device, dtype)
