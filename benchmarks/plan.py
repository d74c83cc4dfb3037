"""What a run does, in which order: jobs as plain data, for a GPU machine or, tiny, for a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.gpu_record import FIGURES, KERNELS, RIVAL, Row

PRECISIONS = {
    "fp32": ("float32", "fp32"),
    "tf32": ("float32", "tf32"),
    "bf16": ("bfloat16", "-"),
    "fp16": ("float16", "-"),
}
"""A mode's dtype and precision of products, as the record names them."""
CHECKED_HIDDEN = {"triton": (128, 256), "resident": (128,), "cooperative": (256,)}
"""Where each kernel's checks other than the grid run; the portable kernel has two forms."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a timed case; the defaults are the main workload."""

    steps: int = 60
    batch: int = 64
    input: int = 84
    hidden: int = 128
    layers: int = 2


@dataclass(frozen=True)
class Job:
    """One order to a worker. It reports part by part, so that a part that kills it costs no other part."""

    do: str
    section: str
    parts: dict[str, list[Row]]
    """The rows that each part will report, still without what is found out."""
    args: dict[str, Any] = field(default_factory=dict)
    limit_s: float = 60.0
    """Longest silence before the worker is given up."""
    late: str = "failed"
    """Status of a part that was given up."""


@dataclass(frozen=True)
class Plan:
    """Sizes of everything; the defaults are for a GPU machine."""

    main: Shape = Shape()
    modes: tuple[str, ...] = tuple(PRECISIONS)
    sweep_modes: tuple[str, ...] = ("fp32", "bf16")
    late_sweep_modes: tuple[str, ...] = ("tf32", "fp16")
    trained_modes: tuple[str, ...] = ("fp32", "tf32")
    hidden: tuple[int, ...] = (128, 256, 64, 512, 32, 96, 192, 1024, 129, 16, 100, 33, 1, 384, 768)
    """The correctness grid's H, the ones that are timed first."""
    edges: tuple[int, ...] = (128, 256, 129, 16, 33)
    """Those of them that get the edges of T and B and run without a bias too."""
    odd: tuple[int, int] = (5, 17)
    """T and B, no multiple of any block."""
    whole: tuple[int, int] = (3, 64)
    """T and B of the timed cases as the compiler sees them, so that timing finds its kernels compiled."""
    extremes: tuple[tuple[int, int], ...] = ((1, 1), (1, 3), (7, 1))
    main_only: tuple[tuple[int, int], ...] = ((60, 64), (240, 8), (3, 1100))
    checked_hidden: dict[str, tuple[int, ...]] = field(default_factory=lambda: CHECKED_HIDDEN)
    batches: tuple[int, ...] = (1, 8, 256, 1024, 4096)
    lengths: tuple[int, ...] = (15, 240, 1024)
    widths: tuple[int, ...] = (32, 64, 96, 192, 256, 512, 1024)
    main_s: float = 6.0
    """What the rounds of one piece of work may take together, all paths."""
    sweep_s: float = 1.2
    windows: int = 7391
    """Train windows of the full dataset."""
    slow: Shape = Shape()
    """What the rivals that compile for long compute."""
    slow_s: float = 60.0
    """What they may take to compile."""

    def correctness(self) -> Iterator[Job]:
        """The grid, one job for each H, mode and kernel, and behind the main H all other checks."""
        for hidden in self.hidden:
            for mode in self.modes:
                for kernel in KERNELS:
                    rows = [self._grid_row(kernel, mode, hidden, *size) for size in self._sizes(hidden, mode)]
                    parts = {f"T={r['steps']} B={r['batch']} bias={r['bias']}": [r] for r in rows}
                    yield Job("correctness", "correctness", parts)
            if hidden == self.main.hidden:
                yield from self.checks()

    def _sizes(self, hidden: int, mode: str) -> Iterator[tuple[int, int, bool]]:
        if hidden == self.main.hidden or (hidden in self.widths and mode in self.sweep_modes):
            yield *self.whole, True
        yield *self.odd, True
        if hidden in self.edges:
            yield *self.odd, False
            yield from ((*size, True) for size in self.extremes)
        if hidden == self.main.hidden:
            yield from ((*size, True) for size in self.main_only)

    @staticmethod
    def _grid_row(kernel: str, mode: str, hidden: int, steps: int, batch: int, bias: bool) -> Row:
        dtype, precision = PRECISIONS[mode]
        return {
            "kernel": kernel,
            "steps": steps,
            "batch": batch,
            "hidden": hidden,
            "dtype": dtype,
            "precision": precision,
            "bias": bias,
            "errors": {},
            "tolerance": None,
            "deterministic": None,
            "status": None,
            "message": None,
        }

    def checks(self) -> Iterator[Job]:
        """A planted defect, graph capture and the sanitizer's tools, for every kernel; ragged batches for those that
        take them."""
        for kernel, widths in self.checked_hidden.items():
            named: list[tuple[str, tuple[str, ...]]] = [
                ("planted defect", ("fp32",)),
                ("graph capture", ("fp32", "bf16")),
            ]
            named += [("ragged batch", self.modes)] if kernel == "triton" else []
            for hidden in widths:
                for name, modes in named:
                    rows = [self._grid_row(kernel, mode, hidden, *self.odd, True) for mode in modes]
                    parts = {mode: [{"name": name} | row] for mode, row in zip(modes, rows, strict=True)}
                    yield Job(name, "checks", parts)
        for tool in ("memcheck", "racecheck"):
            for kernel in self.checked_hidden:
                row = {"name": tool, "kernel": kernel, "status": None, "message": None}
                yield Job("sanitizer", "checks", {tool: [row]}, {"hidden": self.checked_hidden[kernel]}, 90.0)

    def facts(self) -> Job:
        """What the device can do: bandwidth, launches, the floors of a time step."""
        names = ["copy_gb_s", "launch_us", "graph_launch_us"]
        names += [f"step_floor_us/mufu/{name}" for name in ("accurate", "approximate")]
        names += [f"step_floor_us/mma/{mode}" for mode in PRECISIONS]
        parts = {name: [{"name": name, "value": None, "status": None, "message": None}] for name in names}
        return Job("facts", "facts", parts)

    def main_workload(self) -> Iterator[Job]:
        """The main workload in every mode, and its recurrence alone."""
        for mode in self.modes:
            yield layer_job(self.main, mode, (RIVAL, *KERNELS), self.main_s)
        for mode in self.modes:
            alone = replace(self.main, layers=1)
            parts = {path: timing_rows("recurrence", path, alone, mode, ("forward", "backward")) for path in KERNELS}
            yield Job("recurrence", "timings", parts, {"seconds": self.sweep_s})

    def training(self) -> Iterator[Job]:
        """The forecaster's training step and epoch."""
        for mode in self.trained_modes:
            for group, work in (("training step", "step"), ("epoch", "epoch")):
                parts = {path: timing_rows(group, path, self.main, mode, (work,)) for path in (RIVAL, *KERNELS)}
                yield Job(group, "timings", parts, {"seconds": self.main_s, "windows": self.windows}, 90.0)

    def sweeps(self, modes: tuple[str, ...]) -> Iterator[Job]:
        """Batch, time and width, one at a time around the main workload."""
        shapes = [replace(self.main, hidden=hidden) for hidden in self.widths]
        shapes += [replace(self.main, batch=batch) for batch in self.batches]
        shapes += [replace(self.main, steps=steps) for steps in self.lengths]
        for shape in shapes:
            for mode in modes:
                yield layer_job(shape, mode, (RIVAL, *KERNELS), self.sweep_s)

    def slow_rivals(self) -> Iterator[Job]:
        """Rivals that compile for long, each beside nn.GRU once more, whose rows the main workload has already."""
        for path, mode in (("torch.compile", "fp32"), ("flashrnn", "bf16")):
            if mode in self.modes:
                job = layer_job(self.slow, mode, (path,), self.main_s)
                yield replace(job, limit_s=self.slow_s, late="out of time")


def timing_rows(group: str, path: str, shape: Shape, mode: str, works: tuple[str, ...]) -> list[Row]:
    """A path's rows of one case, without figures."""
    dtype, precision = PRECISIONS[mode]
    sizes = {
        "steps": shape.steps,
        "batch": shape.batch,
        "input": shape.input,
        "hidden": shape.hidden,
        "layers": shape.layers,
    }
    if group == "recurrence":
        sizes["input"] = None
    found = dict.fromkeys(FIGURES) | {"quartiles": {}, "rounds": 0, "peak_mib": None, "floor_ms": None}
    found |= {"error": None, "status": None, "message": None}
    names = {"dtype": dtype, "precision": precision}
    return [{"group": group, "work": work, "path": path} | sizes | names | found for work in works]


def layer_job(shape: Shape, mode: str, paths: tuple[str, ...], seconds: float) -> Job:
    """Forward and forward + backward of the layers, all paths in the same rounds."""
    parts = {path: timing_rows("layer", path, shape, mode, ("forward", "forward+backward")) for path in paths}
    return Job("layer", "timings", parts, {"seconds": seconds})


FULL = Plan()
_TINY = Shape(steps=2, batch=3, hidden=16, layers=1)
SMOKE = Plan(
    main=_TINY,
    modes=("fp32", "bf16"),
    sweep_modes=("fp32",),
    late_sweep_modes=(),
    trained_modes=("fp32",),
    hidden=(16, 129),
    edges=(16,),
    odd=(2, 3),
    whole=(2, 4),
    extremes=((1, 1),),
    main_only=((3, 4),),
    checked_hidden=dict.fromkeys(KERNELS, (16,)),
    batches=(1,),
    lengths=(1,),
    widths=(20,),
    main_s=0.3,
    sweep_s=0.2,
    windows=8,
    slow=Shape(steps=1, batch=2, hidden=8, layers=1),
    slow_s=40.0,
)
