"""Who takes part: nn.GRU, our kernels and others, with the same weights, each proven right before it is timed."""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from support import TOLERANCE, error, expected, make_inputs, outputs_and_gradients
from torch import Tensor, nn

from benchmarks.cases import MODES, Mode, products
from benchmarks.correctness import errors_of, kernel, verdict
from benchmarks.gpu_record import FIGURES, KERNELS, RIVAL, Row, mode_of
from benchmarks.machine import Machine
from benchmarks.parts import Report
from benchmarks.timing import Contestant, Work, figures_of, race
from bigru import BiGRU

BACKENDS = {"triton": "triton", "resident": "resident", "cooperative": "cooperative", "torch.compile": "reference"}
"""BiGRU's backend behind each path of ours; what torch.compile gets is the reference loop."""


def make_nn_gru(row: Row, device: torch.device) -> nn.GRU:
    """nn.GRU of a row's shape, the weights that everyone gets."""
    torch.manual_seed(0)
    return nn.GRU(
        row["input"],
        row["hidden"],
        row["layers"],
        batch_first=True,
        bidirectional=True,
        device=device,
        dtype=MODES[mode_of(row)].dtype,
    )


def make_path(path: str, nn_gru: nn.GRU, mode: Mode) -> nn.Module:
    """A module of a path with the weights of `nn_gru`."""
    if path == RIVAL:
        return nn_gru
    if path == "flashrnn":
        return FlashRNN(nn_gru)
    sizes = nn_gru.input_size, nn_gru.hidden_size, nn_gru.num_layers
    weight = nn_gru.weight_hh_l0
    gru = BiGRU(
        *sizes,
        batch_first=True,
        backend=BACKENDS[path],
        precision=mode.precision,
        device=weight.device,
        dtype=weight.dtype,
    )
    gru.load_state_dict(nn_gru.state_dict())
    return torch.compile(gru) if path == "torch.compile" else gru


class FlashRNN(nn.Module):
    """The same layers on flashrnn's kernels, each direction by itself; it shares the parameters of `gru`.

    flashrnn's recurrent gates are q, r, z, its input gates r, z, n and its biases q, r, z, n.
    """

    def __init__(self, gru: nn.GRU) -> None:
        super().__init__()
        from flashrnn import flashrnn

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


def step(gru: nn.Module, x: Tensor, dy: Tensor) -> Tensor:
    """Forward and backward, from no gradients to all of them."""
    gru.zero_grad(set_to_none=True)
    x.grad = None
    y, _ = gru(x)
    y.backward(dy)
    return y


def outcome(gru: nn.Module, x: Tensor, *upstream: Tensor) -> dict[str, Tensor]:
    """Outputs and every gradient, the parameters' by their names in nn.GRU."""
    gru.zero_grad(set_to_none=True)
    leaf = x.detach().clone().requires_grad_()
    y, h_n = gru(leaf)
    torch.autograd.backward([y, h_n], upstream)
    gradients = {name.split(".")[-1]: parameter.grad for name, parameter in gru.named_parameters()}
    return {"y": y.detach(), "h_n": h_n.detach(), "dx": leaf.grad} | gradients


def layer(machine: Machine, parts: dict[str, list[Row]], report: Report, seconds: float) -> None:
    """Forward (no gradients wanted) and forward + backward of the stacked layers, all paths in the same rounds."""
    row = next(iter(parts.values()))[0]
    mode = MODES[mode_of(row)]
    nn_gru = make_nn_gru(row, machine.device)
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(machine.device, mode.dtype)

    batch, steps, hidden = row["batch"], row["steps"], row["hidden"]
    x, dy = normal(batch, steps, row["input"]), normal(batch, steps, 2 * hidden)
    dh_n = normal(2 * row["layers"], batch, hidden)
    # ATen's GRU in fp64 shares nothing with our kernels.
    wanted = outcome(copy.deepcopy(nn_gru).double(), *(tensor.double() for tensor in (x, dy, dh_n)))

    def enter(path: str) -> Entrant:
        gru = make_path(path, nn_gru, mode)

        def errors() -> dict[str, float]:
            actual = outcome(gru, x, dy, dh_n)
            return {name: error(actual[name], tensor) for name, tensor in wanted.items()}

        def forward() -> None:
            with torch.no_grad():
                gru(x)

        return Entrant(errors, {"forward": Entry(forward), "forward+backward": Entry(lambda: step(gru, x, dy))})

    with products(mode):
        compete(machine, parts, report, seconds, enter, beside=RIVAL)


def recurrence(machine: Machine, parts: dict[str, list[Row]], report: Report, seconds: float) -> None:
    """The two operators of one layer's recurrence alone; only our own kernels can take part."""
    row = next(iter(parts.values()))[0]
    mode = MODES[mode_of(row)]
    inputs, upstream = make_inputs((row["steps"], row["batch"], row["hidden"]), mode.dtype, machine.device)
    _, w_hh, _, h0 = inputs
    wanted = expected(inputs, upstream)

    def enter(path: str) -> Entrant:
        y, _, gates = torch.ops.bigru.gru_forward(*inputs, mode.precision, True, path)
        saved = *upstream, y, gates, h0, w_hh, mode.precision, path
        return Entrant(
            lambda: errors_of(outputs_and_gradients(kernel(path, mode), inputs, upstream), wanted),
            {
                "forward": Entry(lambda: torch.ops.bigru.gru_forward(*inputs, mode.precision, True, path)),
                "backward": Entry(lambda: torch.ops.bigru.gru_backward(*saved)),
            },
        )

    with products(mode):
        compete(machine, parts, report, seconds, enter)


@dataclass(frozen=True)
class Entry:
    """One piece of a path's work."""

    eager: Work
    for_graph: Work | None = None
    """What is captured, where that is not the eager work."""
    graphed: Callable[[], Work] | None = None
    """Makes the work that uses graphs inside, where the whole cannot be one graph; then all is timed by the wall."""

    def contestant(self, machine: Machine, path: str, row: Row) -> Contestant:
        """The work ready to be timed, its peak memory in its row; where it cannot be captured, the row says why."""
        self.eager()
        row["peak_mib"] = machine.peak_mib(self.eager)
        works = {"eager_ms": self.eager} if self.graphed else {"gpu_ms": self.eager, "eager_ms": self.eager}
        try:
            replay = self.graphed() if self.graphed else machine.capture(self.for_graph or self.eager)
            replay()
            machine.finish()
            works["graph_ms"] = replay
        except Exception as error:
            note = f"no graph: {type(error).__name__}: {' '.join(str(error).split())}"[:300]
            row["message"] = joined(row["message"], note)
            # If more than the capture failed, this raises, and the part with it.
            machine.finish()
        return Contestant(path, works, by_wall=self.graphed is not None)


@dataclass(frozen=True)
class Entrant:
    """A path: its errors against fp64, and its works by name."""

    errors: Callable[[], dict[str, float]]
    works: dict[str, Entry]


def compete(
    machine: Machine,
    parts: dict[str, list[Row]],
    report: Report,
    seconds: float,
    enter: Callable[[str], Entrant],
    *,
    beside: str | None = None,
) -> None:
    """Proves each path right, then times those that are, work by work, all paths in the same rounds.

    Args:
        machine: where.
        parts: a part is a path, its rows the works.
        report: takes the rows.
        seconds: for the rounds of each work.
        enter: makes a path ready.
        beside: a path that runs in the same rounds even where it is no part, and then stands in the others' messages.
    """
    ready: dict[str, dict[str, Contestant]] = {}
    rows = {path: {row["work"]: row for row in own} for path, own in parts.items()}
    for path, own in rows.items():
        with report.part(path):
            any_row = parts[path][0]
            mode = MODES[mode_of(any_row)]
            if (why := refusal_of(machine, path, any_row, mode)) is not None:
                report.finish(path, [row | {"status": "refused", "message": why} for row in own.values()])
                continue
            entrant = enter(path)
            errors = entrant.errors()
            wrong = verdict(errors, TOLERANCE[mode.dtype, mode.precision])
            for row in own.values():
                row |= {"error": max(errors.values()), "message": joined(row["message"], wrong)}
            # nn.GRU is what is compared with, whatever its error, which its row states.
            if wrong is not None and path != RIVAL:
                report.finish(path, [row | {"status": "failed"} for row in own.values()])
                continue
            ready[path] = {work: entry.contestant(machine, path, own[work]) for work, entry in entrant.works.items()}
            machine.finish()
    if not ready:
        return
    if beside is not None and beside not in parts:
        extra = enter(beside)
        ready[beside] = {
            work: entry.contestant(machine, beside, {"message": None}) for work, entry in extra.works.items()
        }
    report.together()
    found: dict[str, list[Row]] = {path: [] for path in ready}
    for work in next(iter(ready.values())):
        times = race(machine, [own[work] for own in ready.values()], seconds)
        medians = {path: figures_of(taken) for path, taken in times.items()}
        for path in set(medians) & set(parts):
            row = rows[path][work] | medians[path] | {"status": "measured"}
            if beside is not None and beside not in parts:
                said = ", ".join(f"{name} {medians[beside][name]:.4f}" for name in FIGURES if name in medians[beside])
                row["message"] = joined(row["message"], f"{beside} in the same rounds: {said}")
            found[path].append(row)
    for path in parts:
        if path in ready:
            report.finish(path, found[path])


def joined(*notes: str | None) -> str | None:
    """Notes as one message."""
    return "; ".join(filter(None, notes)) or None


def refusal_of(machine: Machine, path: str, row: Row, mode: Mode) -> str | None:
    """Why a path cannot take part, or None."""
    if path in KERNELS:
        return machine.refusal(path, row["hidden"], mode.dtype, mode.precision)
    if path == "flashrnn" and importlib.util.find_spec("flashrnn") is None:
        return "flashrnn is not installed"
    return None
