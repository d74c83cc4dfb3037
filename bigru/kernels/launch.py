"""Launches of jit functions, at as little cost to the host as there can be."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from bigru.kernels.cell import TRITON_VERSION
from bigru.kernels.kernel import Backward, Forward
from bigru.kernels.varlen import steps_and_table

KNOWN = (3, 6), (3, 9)
"""The oldest and the newest of the tritons whose launcher's arguments are known here."""
Grid = tuple[int, int, int]
"""The numbers of programs."""


class Launcher:
    """A jit function of pointers, integers and constants, compiled for whatever it is asked for.

    Args:
        function: the jit function.
        alignment: the multiple, in bytes, for addresses off which Triton compiles the function anew.
        triton_version: the installed one.
    """

    def __init__(
        self, function: Any, alignment: int = 16, triton_version: tuple[int, ...] = TRITON_VERSION
    ) -> None:  # fmt: skip
        self.function, self.alignment, self.triton_version = function, alignment, triton_version
        self._prepared = functools.lru_cache(maxsize=1024)(functools.partial(Launch, self))

    def prepare(self, config: Any, ragged: bool, dtype: torch.dtype, device: int, **constants: Any) -> Launch:
        """Returns the launch of calls that differ in grid, addresses and sizes alone.

        Args:
            config: the configuration.
            ragged: whether there is a layout of sequences of different lengths, without which some pointers are None.
            dtype: of the first tensor, which with the configuration says all others'.
            device: index of the device.
            constants: compile-time arguments beside those of the configuration.
        """
        return self._prepared(config, ragged, dtype, device, **constants)


class Launch:
    """Launches a function through Triton's own path the first time, which compiles it, then directly.

    Triton binds and specialises the arguments at every call, which takes several times as long as the launch.
    """

    def __init__(self, launcher: Launcher, config: Any, *key: Any, **constants: Any) -> None:
        self._launcher, self._config, self._constants = launcher, config, constants | config.constants()
        self._odd = launcher.alignment - 1
        self._direct: dict[tuple[bool, ...], Callable[..., None]] = {}
        self._last: list[Any] = []

    def __call__(
        self, grid: Grid, tensors: Sequence[Tensor | None], sizes: Sequence[int], offsets: Sequence[int] | None = None
    ) -> None:
        """Launches on the current device and stream.

        Args:
            grid: the numbers of programs.
            tensors: what the pointers are to; None where they were None in the first call.
            sizes: the integers.
            offsets: what is added to each pointer, in bytes.
        """
        if offsets is None:
            addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        else:
            addresses = [
                None if tensor is None else tensor.data_ptr() + offset
                for tensor, offset in zip(tensors, offsets, strict=True)
            ]
        # Triton compiles anew for other addresses that are no multiples; mostly there are none.
        odd: tuple[bool, ...] = ()
        if self._odd and functools.reduce(operator.or_, filter(None, addresses), 0) & self._odd:
            odd = tuple([bool(address and address & self._odd) for address in addresses])
        if (launch := self._direct.get(odd)) is not None:
            launch(*grid, *addresses, *sizes, *self._last)
            return
        if offsets is not None:
            tensors = [
                tensor if tensor is None or offset == 0 else tensor.view(-1)[offset // tensor.itemsize :]
                for tensor, offset in zip(tensors, offsets, strict=True)
            ]
        function = self._launcher.function
        compiled = function[grid](*tensors, *sizes, **self._constants, **self._config.options())
        # Not in the interpreter, and not for AMD, for which Triton compiles anew for large tensors too.
        if compiled is not None and torch.version.hip is None:
            self._last = [self._constants[parameter.name] for parameter in function.params if parameter.is_constexpr]
            self._direct[odd] = direct(compiled, self._launcher.triton_version)


class Launchers(NamedTuple):
    """What serves a call in one launch of each direction, of the operands in the order of `Forward` and `Backward`."""

    forward: Launcher
    constants: dict[str, Any]
    """Its compile-time arguments beside those of the configuration, H, HAS_BIAS and SAVE."""
    backward: Launcher
    mended: tuple[int, int] | None
    """If initial states that are given are looked at after the forward pass of fp32 numbers (`bigru.kernels.mend`): how
    far one unit's gates lie from the next unit's, and from one another."""


def direct(compiled: Any, triton_version: tuple[int, ...], driver: Any = None) -> Callable[..., None]:
    """Returns a function of a grid and a compiled kernel's arguments that launches it on the current stream."""

    def launch(x: int, y: int, z: int, *arguments: Any) -> None:
        compiled[x, y, z](*arguments)

    if not KNOWN[0] <= triton_version <= KNOWN[1]:
        return launch
    driver, hooks = driver or triton.runtime.driver.active, triton.knobs.runtime
    run, device, current_stream = compiled.run, driver.get_current_device(), driver.get_current_stream
    function, metadata = compiled.function, compiled.packed_metadata

    def launch_without_hooks(x: int, y: int, z: int, *arguments: Any) -> None:
        enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler's
            launch(x, y, z, *arguments)
        else:
            run(x, y, z, current_stream(device), function, metadata, None, None, None, *arguments)

    return launch_without_hooks


def launch_forward(launcher: Launcher, operands: Forward, config: Any, **constants: Any) -> None:
    """Launches a jit function that takes these operands, a program for each block of rows and direction."""
    gi, w_hh, b_hn, h0, y, h_n, gates, varlen, _ = operands
    directions, batch, hidden = h0.shape
    steps, table = steps_and_table(y, varlen)
    tensors = gi, w_hh, gi if b_hn is None else b_hn, h0, y, h_n, y if gates is None else gates, table
    launch = launcher.prepare(
        config, varlen is not None, gi.dtype, gi.get_device(), H=hidden, HAS_BIAS=b_hn is not None,
        SAVE=gates is not None, **constants,
    )  # fmt: skip
    launch((-(-batch // config.rows), directions, 1), tensors, (steps, batch))


def launch_backward(launcher: Launcher, operands: Backward, config: Any) -> None:
    """Launches a jit function as `launch_forward` does."""
    *tensors, varlen, h_prev = operands
    directions, batch, hidden = operands.h0.shape
    steps, table = steps_and_table(operands.y, varlen)
    launch = launcher.prepare(config, varlen is not None, operands.y.dtype, operands.y.get_device(), H=hidden)
    launch((-(-batch // config.rows), directions, 1), (*tensors, table, h_prev), (steps, batch))
