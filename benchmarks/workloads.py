"""The workloads and candidates of every benchmark: equal weights and inputs, each proven right before it is timed."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from support import TOLERANCE, error
from torch import Tensor, nn

from benchmarks.record import GEMM, NN_GRU
from benchmarks.timing import Work
from bigru import BiGRU

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


MAIN = Case()
CALL = Case("call", batch=1, steps=1)


@dataclass(frozen=True)
class Candidate:
    """One implementation at one case.

    Args:
        name: a backend of BiGRU (never "auto": the one that it takes), "nn.GRU", "onnxruntime" (forward on a CPU),
            "torch.compile", "flashrnn" or "torch.mm".
        works: what is timed, by mode.
        outcome: outputs and every gradient, by name.
    """

    name: str
    works: dict[str, Work]
    outcome: Callable[[torch.dtype | None], dict[str, Tensor]]


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


def make(name: str, case: Case, device: torch.device, *, defect: bool = False) -> Candidate:
    """Makes a candidate ready for a case, on the weights and inputs that all candidates get.

    Args:
        name: as in `Candidate`.
        case: what is computed.
        device: where.
        defect: exchange the reset and update gates of a layer, which `errors` must notice.

    Raises:
        Refused: it does not take the case.
    """
    if case.group == "training step":
        return _make_training_step(name, case, device)
    if name == "onnxruntime":
        return _make_onnx(case)
    if name == GEMM:
        return _make_product(case)
    return _make_layer(name, case, device, defect)


def errors(candidate: Candidate, case: Case, device: torch.device) -> dict[str, float]:
    """Returns the norm-relative error of each output and gradient against nn.GRU in fp64, which shares no code."""
    with products(case.precision):
        wanted = make(NN_GRU, case, device).outcome(torch.float64)
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


def _make_layer(name: str, case: Case, device: torch.device, defect: bool) -> Candidate:
    # Forward runs in eval and backward in train mode, as users run them: cuDNN keeps less for the first.
    forward, training = (_make_gru(name, case, device) for _ in range(2))
    forward.eval()
    if defect:
        _exchange_gates(training)
    dtype = PRECISIONS[case.precision].dtype
    x, dy, dh_n = (
        _normal(size, device, dtype)
        for size in (
            (case.batch, case.steps, case.input),
            (case.batch, case.steps, 2 * case.hidden),
            (2 * case.layers, case.batch, case.hidden),
        )
    )
    leaf = x.clone().requires_grad_()
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
        leaf.grad = None
        training(leaf)[0].backward(dy)

    def outcome(dtype: torch.dtype | None) -> dict[str, Tensor]:
        module = training if dtype is None else copy.deepcopy(training).to(dtype)
        module.zero_grad(set_to_none=True)
        own = x.to(dtype or x.dtype).detach().clone().requires_grad_()
        y, h_n = module(own)
        torch.autograd.backward([y, h_n], [dy.to(y.dtype), dh_n.to(y.dtype)])
        gradients = {name.split(".")[-1]: parameter.grad for name, parameter in module.named_parameters()}
        return {"y": y.detach(), "h_n": h_n.detach(), "dx": own.grad} | gradients

    return Candidate(name, {"forward": run_forward, "training": run_training}, outcome)


def _make_onnx(case: Case) -> Candidate:
    """Returns the forward pass of a BiGRU exported to ONNX in onnxruntime, on as many threads as torch has."""
    try:
        import onnxruntime

        from bigru import export_onnx
    except ImportError as why:
        raise Refused("onnxruntime is not installed") from why
    gru = _make_gru("torch", case, torch.device("cpu")).eval()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(gru, path := Path(folder) / "gru.onnx")  # type: ignore[arg-type]
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = _normal((case.batch, case.steps, case.input), torch.device("cpu"), torch.float32).numpy()
    return Candidate("onnxruntime", {"forward": lambda: session.run(None, {"input": x})}, lambda dtype: {})


def _make_product(case: Case) -> Candidate:
    """Returns one product with a matrix of 1024 x 1024 that multiplies as often as the layers; three for training."""
    widths = case.input + case.hidden + (case.layers - 1) * 3 * case.hidden
    rows = max(1, round(case.batch * case.steps * 6 * case.hidden * widths / 1024**2))
    a, b = torch.randn(rows, 1024), torch.randn(1024, 1024)
    training = torch.randn(3 * rows, 1024)
    return Candidate(GEMM, {"forward": lambda: a @ b, "training": lambda: training @ b}, lambda dtype: {})


def _make_gru(name: str, case: Case, device: torch.device) -> nn.Module:
    """A module with everybody's weights: those of an nn.GRU after a fixed seed."""
    mode = PRECISIONS[case.precision]
    sizes = case.input, case.hidden, case.layers
    torch.manual_seed(0)
    options: dict[str, Any] = {"batch_first": True, "device": device, "dtype": mode.dtype}
    nn_gru = nn.GRU(*sizes, bidirectional=True, **options)
    if name == NN_GRU:
        return nn_gru
    if name == "flashrnn":
        return FlashRNN(nn_gru)
    # torch.compile gets the reference loop.
    backend = "reference" if name == "torch.compile" else name
    try:
        gru = BiGRU(*sizes, backend=backend, precision=mode.precision, **options)
        gru.resolve_backend(_normal((case.batch, case.steps, case.input), device, mode.dtype))
    except (ValueError, RuntimeError) as why:
        raise Refused(str(why)) from why
    gru.load_state_dict(nn_gru.state_dict())
    return torch.compile(gru) if name == "torch.compile" else gru  # type: ignore[return-value]


def _normal(size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normal random numbers that depend on the size alone."""
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).to(device, dtype)


def _make_training_step(name: str, case: Case, device: torch.device) -> Candidate:
    try:
        from bigru import HandForecaster
        from bigru.layout import POSE_SIZE
        from bigru.model.metrics import masked_mse
        from bigru.training.step import TrainStep, make_optimizer
    except ModuleNotFoundError as why:
        raise Refused(str(why)) from why

    torch.manual_seed(0)
    sizes = case.input, case.hidden, case.layers
    backend = "torch" if name == NN_GRU else name
    try:
        model = HandForecaster(*sizes, backend=backend, precision=PRECISIONS[case.precision].precision).to(device)
        if name == NN_GRU:
            core = nn.GRU(*sizes, batch_first=True, bidirectional=True, device=device)
            core.load_state_dict(model.encoder.core.state_dict())
            model.encoder.core = core  # type: ignore[assignment]
        else:
            x = _normal((case.batch, case.steps, case.input), device, torch.float32)
            name = model.encoder.core.resolve_backend(x)
    except (ValueError, RuntimeError) as why:
        raise Refused(str(why)) from why
    x = _normal((case.batch, case.steps, case.input), device, torch.float32)
    target = _normal((case.batch, case.steps, POSE_SIZE), device, torch.float32)
    # The step changes its weights; what is compared with the truth is a copy from before.
    untrained = copy.deepcopy(model)
    step = TrainStep(model, make_optimizer(model, 1e-3, 1e-5, capturable=True), 1.0)

    def outcome(dtype: torch.dtype | None) -> dict[str, Tensor]:
        # Without dropout, which draws other numbers in another dtype.
        network = copy.deepcopy(untrained).to(dtype or torch.float32).eval()
        for module in network.modules():
            if isinstance(module, nn.GRU):
                # The copy lost cuDNN's flat buffer of weights; its backward pass wants training mode.
                module.train().flatten_parameters()
        prediction = network(x.to(dtype or x.dtype))
        masked_mse(prediction, target.to(prediction.dtype)).backward()
        return {"prediction": prediction.detach()} | {
            n: p.grad for n, p in network.named_parameters() if p.grad is not None
        }

    return Candidate(name, {"training": functools.partial(step, x, target)}, outcome)


class FlashRNN(nn.Module):
    """The same layers on flashrnn's kernels, each direction by itself; it shares the parameters of `gru`.

    flashrnn's recurrent gates are q, r, z, its input gates r, z, n and its biases q, r, z, n.

    Raises:
        Refused: flashrnn is not installed.
    """

    def __init__(self, gru: nn.GRU) -> None:
        super().__init__()
        try:
            from flashrnn import flashrnn
        except ImportError as why:
            raise Refused("flashrnn is not installed") from why
        self.gru = gru
        dtype = str(gru.weight_hh_l0.dtype).removeprefix("torch.")
        self._run = functools.partial(flashrnn, function="gru", backend="cuda", dtype=dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        states = []
        for layer in range(self.gru.num_layers):
            outputs = []
            for suffix in (f"_l{layer}", f"_l{layer}_reverse"):
                w_ih, w_hh, b_ih, b_hh = (
                    getattr(self.gru, name + suffix) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                )
                gates = nn.functional.linear(x, w_ih, b_ih).unflatten(-1, (3, 1, -1))  # (B, T, 3, 1, H)
                gates = gates.flip(1) if suffix.endswith("reverse") else gates
                w_r, w_z, w_q = w_hh.chunk(3)
                b_r, b_z, b_q = b_hh.chunk(3)
                w = torch.stack([w_q, w_r, w_z]).unsqueeze(1)  # (3, 1, H, H)
                b = torch.stack([b_q, b_r, b_z, torch.zeros_like(b_q)]).unsqueeze(1)  # (4, 1, H)
                y, last = self._run(gates, w, b)  # (1, B, T, 1, H), (1, B, 1, 1, H)
                y = y[0, :, :, 0]
                outputs.append(y.flip(1) if suffix.endswith("reverse") else y)
                states.append(last[0, :, 0, 0])
            x = torch.cat(outputs, -1)
        return x, torch.stack(states)


def sweep(case: Case, **sizes: tuple[Any, ...]) -> list[Case]:
    """Returns the cases that differ from one in a single size: `sweep(MAIN, batch=(1, 8))`."""
    return [replace(case, **{name: size}) for name, values in sizes.items() for size in values]
