"""The workloads of every benchmark: `bigru.proof.workloads`, a step of training, and rivals beside nn.GRU."""

from __future__ import annotations

import copy
import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigru.kernels.record import GEMM, NN_GRU
from bigru.proof.workloads import PRECISIONS, Candidate, Case, Refused, make_gru, make_layer, normal

MAIN = Case()
CALL = Case("call", batch=1, steps=1)


def make(name: str, case: Case, device: torch.device, *, defect: bool = False) -> Candidate:
    """As `make_layer`, also for steps of training, and for the rivals "onnxruntime" (forward on a CPU),
    "torch.compile" (of the reference loop), "flashrnn" and "torch.mm"."""
    if case.group == "training step":
        return _make_training_step(name, case, device)
    if name == "onnxruntime":
        return _make_onnx(case)
    if name == GEMM:
        return _make_product(case)
    return make_layer(name, case, device, defect=defect, module=_make_module)


def _make_module(name: str, case: Case, device: torch.device) -> nn.Module:
    if name == "torch.compile":
        return torch.compile(make_gru("reference", case, device))  # type: ignore[return-value]
    return FlashRNN(make_gru(NN_GRU, case, device)) if name == "flashrnn" else make_gru(name, case, device)


def _make_onnx(case: Case) -> Candidate:
    """Returns the forward pass of a BiGRU exported to ONNX in onnxruntime, on as many threads as torch has."""
    try:
        import onnxruntime

        from bigru import export_onnx
    except ImportError as why:
        raise Refused("onnxruntime is not installed") from why
    gru = make_gru("torch", case, torch.device("cpu")).eval()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(gru, path := Path(folder) / "gru.onnx")  # type: ignore[arg-type]
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = normal((case.batch, case.steps, case.input), torch.device("cpu"), torch.float32).numpy()
    return Candidate("onnxruntime", {"forward": lambda: session.run(None, {"input": x})}, lambda dtype: {})


def _make_product(case: Case) -> Candidate:
    """Returns one product with a matrix of 1024 x 1024 that multiplies as often as the layers; three for training."""
    widths = case.input + case.hidden + (case.layers - 1) * 3 * case.hidden
    rows = max(1, round(case.batch * case.steps * 6 * case.hidden * widths / 1024**2))
    a, b = torch.randn(rows, 1024), torch.randn(1024, 1024)
    training = torch.randn(3 * rows, 1024)
    return Candidate(GEMM, {"forward": lambda: a @ b, "training": lambda: training @ b}, lambda dtype: {})


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
            x = normal((case.batch, case.steps, case.input), device, torch.float32)
            name = model.encoder.core.resolve_backend(x)
    except (ValueError, RuntimeError) as why:
        raise Refused(str(why)) from why
    x = normal((case.batch, case.steps, case.input), device, torch.float32)
    target = normal((case.batch, case.steps, POSE_SIZE), device, torch.float32)
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

    def __init__(self, gru: nn.Module) -> None:
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
