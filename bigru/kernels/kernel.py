"""`Kernel`: the interface that every implementation of the recurrence offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from bigru.kernels.config import Call
from bigru.kernels.proven import Proven
from bigru.kernels.varlen import Varlen


class Kernel(ABC):
    """One implementation of the recurrence.

    A kernel is an instance named `KERNEL` in a module of its own, which `bigru.kernels.registry` lists. Everything
    that depends on the installation (Triton's version, the interpreter) is a field with a default, so that a test
    makes another instance instead of patching.

    Shapes are (T, B, ...) below; with a `varlen` they are (P, ...), P the number of all time steps of all sequences.
    """

    name: str
    """Key in the registry, and the name of the backend if the kernel is public."""
    proven: tuple[Proven, ...] | None = None
    """The calls for which "auto" takes this kernel; None for all that it does not refuse."""

    widths: tuple[int, ...] = ()
    """Hidden sizes for which `bigru.kernels.resources` compiles the kernel; none if Triton does not compile it."""
    varlen_widths: tuple[int, ...] = ()
    """Those of them that are compiled for sequences of different lengths too."""
    batches: tuple[int, ...] = (1, 4096)
    """Numbers of rows whose configurations are compiled: fewer programs than processors, and more."""
    steps_a_turn = 1
    """Time steps in one turn of the kernel's loop."""

    layer: Callable[[Tensor, Tensor, Sequence[Tensor], Varlen | None, bool], tuple[Tensor, Tensor]] | None = None
    """Runs a whole layer, input products and gradients included, in eager mode; None if `bigru.kernels.layer` does."""

    @abstractmethod
    def refusal(self, call: Call) -> str | None:
        """Returns the reason why the kernel cannot serve a call, or None if it can."""

    def is_proven(self, call: Call) -> bool:
        """Returns whether "auto" may take the kernel: it needs no recorded run, or one covers the call."""
        return self.proven is None or any(entry.covers(call) for entry in self.proven)

    @abstractmethod
    def choose(self, call: Call, batch: int) -> Any:
        """Returns the launch configuration of a call that is not refused, for B > 0 rows."""

    def gates_shape(self, rows: tuple[int, ...], hidden: int) -> tuple[int, ...]:
        """Returns the shape of the tensor that the forward pass keeps for the backward pass.

        Args:
            rows: y's shape without H: (T, B, D), or (P, D).
            hidden: H.
        """
        return (*rows, 4, hidden)

    @abstractmethod
    def forward(
        self, gi: Tensor, w_hh: Tensor, b_hn: Tensor | None, h0: Tensor, y: Tensor, h_n: Tensor, gates: Tensor,
        call: Call, varlen: Varlen | None, config: Any = None,
    ) -> None:  # fmt: skip
        """Runs the forward recurrence; every tensor is contiguous and on the current device, B > 0.

        Args:
            gi: (T, B, D, 3H) input side of the gates.
            w_hh: (D, 3H, H) recurrent weights.
            b_hn: (D, H) recurrent bias of n, or None.
            h0: (D, B, H) initial states.
            y: (T, B, D, H) every state, written.
            h_n: (D, B, H) last states, written.
            gates: written, of `gates_shape`; empty if no backward pass will follow.
            call: what `refusal` was asked.
            varlen: the layout of sequences of different lengths.
            config: from `choose`, which is asked if None.
        """

    @abstractmethod
    def backward(
        self, dy: Tensor, dh_n: Tensor, y: Tensor, gates: Tensor, h0: Tensor, w_hh: Tensor, dgi: Tensor, dq: Tensor,
        dh0: Tensor, h_prev: Tensor | None, call: Call, varlen: Varlen | None, config: Any = None,
    ) -> None:  # fmt: skip
        """Runs the backward recurrence; every tensor is contiguous and on the current device, B > 0.

        Args:
            dy: (T, B, D, H) gradient of y.
            dh_n: (D, B, H) gradient of h_n.
            y, gates: as the forward pass of the same kernel left them.
            h0, w_hh: as in `forward`.
            dgi: (T, B, D, 3H) gradient of gi, written.
            dq: (T, B, D, H) gradient of the n gate's recurrent side, W_hn h + b_hn, written.
            dh0: (D, B, H) gradient of h0, written.
            h_prev: (P, D, H) the state before each step, written; None without a `varlen`.
            call, varlen, config: as in `forward`.
        """

    def functions(self, config: Any) -> dict[str, tuple[Any, dict[str, str]]]:
        """Returns the jit functions that a configuration launches, for `bigru.kernels.resources`.

        Returns:
            By direction, "forward" and "backward": the function, and the types of those pointers that are not to the
            storage's dtype; "operand" stands for the dtype of the products' factors.
        """
        return {}
