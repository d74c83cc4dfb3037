"""Whether a kernel computes the recurrence: against fp64, twice to the bit, in a CUDA graph, under the sanitizer."""

from __future__ import annotations

import copy
import functools
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from support import NAMES, TOLERANCE, error, expected, make_inputs, outputs_and_gradients
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks.cases import MODES, Mode, products
from benchmarks.gpu_record import Row, mode_of
from benchmarks.machine import Machine
from bigru import BiGRU
from bigru.kernels.recurrence import fused_gru_recurrence

SANITIZER_S = 80
"""What a sanitizer's tool may take, most of it the start of Python and torch under it."""
FINDINGS = 9
"""Exit code by which a sanitizer's tool says that it found something."""

Tensors = Sequence[Tensor | None]


def check(machine: Machine, rows: list[Row]) -> list[Row]:
    """One shape: outputs and every gradient against fp64, outputs poisoned with NaN before, twice to the bit."""
    row, mode = rows[0], MODES[mode_of(rows[0])]
    if (why := machine.refusal(row["kernel"], row["hidden"], mode.dtype, mode.precision)) is not None:
        return [row | {"status": "refused", "message": why}]
    inputs, upstream = inputs_of(row, machine)
    wanted = expected(inputs, upstream)
    run = kernel(row["kernel"], mode)
    with poisoned():
        first, second = (outputs_and_gradients(run, inputs, upstream) for _ in range(2))
        # Where no gradient is wanted another kernel runs, which saves no gates.
        with torch.no_grad():
            alone = run(*inputs)
        machine.finish()
    errors = errors_of(first, wanted)
    for name, actual, truth in zip(NAMES, alone, wanted, strict=False):
        errors[name] = max(errors[name], error(actual, truth))
    tolerance = TOLERANCE[mode.dtype, mode.precision]
    deterministic = all(a is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))
    found = verdict(errors, tolerance)
    if found is None and not deterministic:
        found = "two runs differ"
    row = row | {"errors": errors, "tolerance": tolerance, "deterministic": deterministic, "message": found}
    return [row | {"status": "passed" if found is None else "failed"}]


def planted_defect(machine: Machine, rows: list[Row]) -> list[Row]:
    """Whether the comparison notices a kernel that takes r for z: its rows of w_hh are swapped."""
    row, mode = rows[0], MODES[mode_of(rows[0])]
    if (why := machine.refusal(row["kernel"], row["hidden"], mode.dtype, mode.precision)) is not None:
        return [not_available(row, why)]
    inputs, upstream = inputs_of(row, machine)
    gi, w_hh, b_hn, h0 = inputs
    r, z, n = w_hh.chunk(3, dim=1)
    wrong = outputs_and_gradients(kernel(row["kernel"], mode), [gi, torch.cat([z, r, n], 1), b_hn, h0], upstream)
    found = verdict(errors_of(wrong, expected(inputs, upstream)), TOLERANCE[mode.dtype, mode.precision])
    if found is None:
        return [of_check(row) | {"status": "failed", "message": "r and z swapped, and the comparison did not notice"}]
    return [of_check(row) | {"status": "passed", "message": f"noticed: {found}"}]


def graph_capture(machine: Machine, rows: list[Row]) -> list[Row]:
    """Whether a CUDA graph of forward, and of forward + backward, gives on new numbers what eager execution gives."""
    row, mode = rows[0], MODES[mode_of(rows[0])]
    if (why := machine.refusal(row["kernel"], row["hidden"], mode.dtype, mode.precision)) is not None:
        return [not_available(row, why)]
    run = kernel(row["kernel"], mode)
    inputs, upstream = inputs_of(row, machine)
    fresh, fresh_upstream = inputs_of(row, machine, seed=1)
    static = [x.clone().requires_grad_() for x in inputs]
    static_upstream = [x.clone() for x in upstream]
    results: dict[str, list[Tensor]] = {}

    def forward() -> None:
        with torch.no_grad():
            results["forward"] = list(run(*static))

    def forward_and_backward() -> None:
        # Gradients made inside the capture are the graph's own, and a replay writes them anew.
        for x in static:
            x.grad = None
        y, h_n = run(*static)
        torch.autograd.backward([y, h_n], static_upstream)
        results["forward+backward"] = [y.detach(), h_n.detach(), *(x.grad for x in static)]

    replays = [machine.capture(work) for work in (forward, forward_and_backward)]
    captured = dict(results)
    with torch.no_grad():
        for old, new in zip([*static, *static_upstream], [*fresh, *fresh_upstream], strict=True):
            old.copy_(new)
    for replay in replays:
        replay()
    machine.finish()
    # On a CPU a replay is a run, and what it found lies in `results`.
    replayed = captured if machine.device.type == "cuda" else results
    eager = outputs_and_gradients(run, fresh, fresh_upstream)
    tolerance, problems = TOLERANCE[mode.dtype, mode.precision], []
    for work, tensors in replayed.items():
        for name, actual, wanted in zip(NAMES, tensors, eager, strict=False):
            # The weights' gradients are products of cuBLAS, which may choose another algorithm in a graph.
            same = torch.equal(actual, wanted) or (name in ("dw_hh", "db_hn") and error(actual, wanted) <= tolerance)
            problems += [] if same else [f"{work}: {name} differs by {error(actual, wanted):.1e}"]
    return [of_check(row) | {"status": "failed" if problems else "passed", "message": "; ".join(problems) or None}]


def ragged_batch(machine: Machine, rows: list[Row]) -> list[Row]:
    """A PackedSequence of lengths from 1 to T: outputs and every gradient against ATen's GRU in fp64."""
    row, mode = rows[0], MODES[mode_of(rows[0])]
    if (why := machine.refusal(row["kernel"], row["hidden"], mode.dtype, mode.precision)) is not None:
        return [not_available(row, why)]
    torch.manual_seed(0)
    gru = BiGRU(8, row["hidden"], backend="triton", precision=mode.precision, device=machine.device, dtype=mode.dtype)
    steps, batch, hidden = row["steps"], row["batch"], row["hidden"]
    lengths = [1 + i % steps for i in range(batch)]
    sizes = (steps, batch, 8), (max(lengths), batch, 2 * hidden), (2, batch, hidden)
    x, *upstream = (torch.randn(size).to(machine.device, mode.dtype) for size in sizes)

    def outcome(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        leaf = x.to(dtype).requires_grad_()
        packed, h_n = module(pack_padded_sequence(leaf, lengths, enforce_sorted=False))
        y, _ = pad_packed_sequence(packed)
        torch.autograd.backward([y, h_n], [gradient.to(dtype) for gradient in upstream])
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        return {"y": y.detach(), "h_n": h_n.detach(), "dx": leaf.grad} | gradients

    with products(mode):
        wanted = outcome(copy.deepcopy(gru.to_gru()).double(), torch.float64)
        with poisoned():
            actual = outcome(gru, mode.dtype)
    found = verdict(
        {name: error(actual[name], tensor) for name, tensor in wanted.items()}, TOLERANCE[mode.dtype, mode.precision]
    )
    return [of_check(row) | {"status": "passed" if found is None else "failed", "message": found}]


def sanitizer(machine: Machine, rows: list[Row], hidden: Sequence[int]) -> list[Row]:
    """Runs a tool of compute-sanitizer over small calls of one kernel, where the tool is on the PATH."""
    row = rows[0]
    command = shutil.which("compute-sanitizer")
    if machine.device.type != "cuda" or command is None:
        return [row | {"status": "not available", "message": "compute-sanitizer is not on the PATH, or no GPU is here"}]
    small = [sys.executable, "-m", "benchmarks.gpu", "--small", row["kernel"], *map(str, hidden)]
    try:
        run = subprocess.run(
            [command, "--tool", row["name"], "--error-exitcode", str(FINDINGS), *small],
            capture_output=True,
            text=True,
            timeout=SANITIZER_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        # Slow is not wrong.
        return [row | {"status": "not available", "message": f"{type(error).__name__}: {error}"[:500]}]
    said = (run.stdout + run.stderr).strip().splitlines()
    summaries = [line.strip() for line in said if "SUMMARY" in line] or said[-3:]
    return [
        row
        | {
            "status": "failed" if run.returncode else "passed",
            "message": f"exit code {run.returncode}: {' | '.join(summaries)}"[:500],
        }
    ]


def small_calls(machine: Machine, name: str, hidden: Sequence[int]) -> int:
    """What the sanitizer watches: forward and backward of one kernel at small shapes; how many calls there were."""
    calls = 0
    for width in hidden:
        for mode_name, mode in MODES.items():
            if machine.refusal(name, width, mode.dtype, mode.precision) is not None:
                continue
            inputs, upstream = make_inputs((3, 9, width), mode.dtype, machine.device)
            outputs_and_gradients(kernel(name, mode), inputs, upstream)
            machine.finish()
            print(f"{name} H={width} {mode_name}: done", flush=True)
            calls += 1
    return calls


def kernel(name: str, mode: Mode) -> Callable[..., tuple[Tensor, Tensor]]:
    """A kernel behind the autograd operator."""
    return functools.partial(fused_gru_recurrence, precision=mode.precision, kernel=name)


def inputs_of(row: Row, machine: Machine, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and upstream gradients of a row's shape, with the same numbers for every kernel."""
    shape = row["steps"], row["batch"], row["hidden"]
    return make_inputs(shape, MODES[mode_of(row)].dtype, machine.device, bias=row["bias"], seed=seed)


def errors_of(actual: Tensors, wanted: Tensors) -> dict[str, float]:
    """Norm-relative error of everything there is."""
    return {name: error(a, b) for name, a, b in zip(NAMES, actual, wanted, strict=True) if b is not None}


def verdict(errors: dict[str, float], tolerance: float) -> str | None:
    """What is wrong, or None."""
    # Written so that NaN is wrong.
    wrong = [f"{name} {found:.1e}" for name, found in errors.items() if not found <= tolerance]
    return f"error above {tolerance:.0e}: {', '.join(wrong)}" if wrong else None


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills every uninitialised buffer with NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def of_check(row: Row) -> Row:
    """A row of the grid as a row of the checks."""
    names = ("name", "kernel", "steps", "batch", "hidden", "dtype", "precision", "status", "message")
    return {name: row[name] for name in names}


def not_available(row: Row, why: str) -> Row:
    """A check that cannot be made."""
    return of_check(row) | {"status": "not available", "message": why}
