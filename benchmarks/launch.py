"""What a call of the GPU kernels costs the host, measured on a machine without a GPU: `python -m benchmarks.launch`.

It counts the operators that torch's profiler sees, and the kernels that a GPU would launch: one for each operator that
is no view and no allocation, and one for each launch by Triton. It times the Python of a call. No result is computed:

- tensors are on the CPU, and the kernels' choice takes that for an H100, for which Triton compiles as ever;
- they are so small (B=T=2, I=H=1) that an operator takes hardly longer than its dispatch;
- Triton's driver is one that launches nothing: its launcher returns where CUDA's driver would be called, and so reads
  no pointer out of a tensor.

So what the CUDA driver, the allocator and cuBLAS take on the host comes on top, and figures of two machines say little
of one another.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher

from bigru import BiGRU
from bigru.kernels import choice, plan
from bigru.kernels.config import H100

NAMES = ("triton", "resident")
MODES = ("forward", "training")


class Idle(CudaDriver):
    """Launches nothing, and counts how often."""

    launches = 0

    def __init__(self) -> None:
        self.launcher_cls = _Launcher
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (self, 0, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": H100.shared_memory},
            launch=self._launch,
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def _launch(self, *_: Any) -> None:
        self.launches += 1


class _Launcher(CudaLauncher):  # type: ignore[misc]
    """Triton's own, but for what is compiled in C."""

    gsan_enabled, num_ctas, launch_pdl, arg_annotations, kernel_signature = False, 1, False, (), b""
    global_scratch_size = profile_scratch_size = global_scratch_align = profile_scratch_align = 0

    def __init__(self, src: Any, metadata: Any) -> None:
        self.launch = triton.runtime.driver.active.utils.launch
        self.launch_cooperative_grid = metadata.launch_cooperative_grid


def make_call(backend: str, mode: str) -> Callable[[], Any]:
    """Returns a call of two layers, batch first; in mode "training" with its backward pass."""
    gru = BiGRU(1, 1, 2, batch_first=True, backend=backend).train(mode == "training")
    x, upstream = torch.randn(2, 2, 1), torch.randn(2, 2, 2)

    def forward() -> Tensor:
        y: Tensor = gru(x)[0]
        return y

    def training() -> None:
        gru.zero_grad()
        forward().backward(upstream)

    return torch.no_grad()(forward) if mode == "forward" else training


def count(call: Callable[[], Any], driver: Idle) -> tuple[int, int]:
    """Returns the operators that a call dispatches and the kernels that it would launch."""
    call()
    launched = driver.launches
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    events = profile.events()
    computing = sum(computes(event) and not any(map(computes, ancestors(event))) for event in events)
    return sum(event.name.startswith("aten::") for event in events), computing + driver.launches - launched


def ancestors(event: Any) -> Iterator[Any]:
    """Yields the operators that called an operator."""
    while event := event.cpu_parent:
        yield event


def computes(event: Any) -> bool:
    """Returns whether an operator launches a kernel: not one that is made of others, a view or an allocation."""
    name = event.name.removeprefix("aten::")
    if name == event.name or name.startswith(("empty", "new_empty", "_unsafe_view", "transpose_", "as_strided_")):
        return False
    overload = getattr(torch.ops.aten, name).overloads()[0]
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(
        event.name if overload == "default" else f"{event.name}.{overload}", "CompositeImplicitAutograd"
    )
    returned = getattr(getattr(torch.ops.aten, name), overload)._schema.returns
    return not composite and all(value.alias_info is None or value.alias_info.is_write for value in returned)


def microseconds(call: Callable[[], Any], calls: int = 50, rounds: int = 40) -> float:
    """Returns what a call takes in the fastest of the rounds."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        taken.append((time.perf_counter() - start) / calls * 1e6)
    return min(taken)


def idle() -> Idle:
    """Makes Triton's driver one that launches nothing, and the CPU an H100."""
    driver = Idle()
    triton.runtime.driver.set_active(driver)
    choice.describe = plan.describe = lambda device: H100  # type: ignore[attr-defined,assignment]
    return driver


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", choices=NAMES, help="only count, for this backend; prints JSON")
    only = parser.parse_args().count
    driver = idle()
    if only:
        print(json.dumps({mode: count(make_call(only, mode), driver) for mode in MODES}))
        return
    print(f"nothing is launched, tensors are on the CPU; torch {torch.__version__}, triton {triton.__version__}")
    for name in NAMES:
        for mode in MODES:
            call = make_call(name, mode)
            operators, kernels = count(call, driver)
            print(f"{name} {mode}: {operators} operators, {kernels} kernels, {microseconds(call) / 2:.0f} us a layer")


if __name__ == "__main__":
    main()
