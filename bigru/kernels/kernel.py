"""`Kernel`: the interface that every implementation of the recurrence offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from bigru.kernels.config import Call
from bigru.kernels.varlen import Varlen


class Forward(NamedTuple):
    """The operands of a forward pass: contiguous, on the current device, B > 0.

    With a `varlen`, (T, B, ...) means (P, ...) here and below, P the number of all time steps of all sequences.
    """

    gi: Tensor
    """(T, B, D, 3H) input side of the gates."""
    w_hh: Tensor
    """(D, 3H, H) recurrent weights."""
    b_hn: Tensor | None
    """(D, H) recurrent bias of n."""
    h0: Tensor
    """(D, B, H) initial states."""
    y: Tensor
    """(T, B, D, H) every state, written."""
    h_n: Tensor
    """(D, B, H) last states, written."""
    gates: Tensor | None
    """Of `Kernel.gates_shape`, written; None if no backward pass will follow."""
    varlen: Varlen | None = None
    """The layout of sequences of different lengths."""
    given: bool = False
    """True if h0 is the caller's own and may hold any numbers; a kernel with scaled products then has them mended."""


class Backward(NamedTuple):
    """The operands of a backward pass, as those of `Forward`; y and gates are as the same kernel left them."""

    dy: Tensor
    """(T, B, D, H) gradient of y."""
    dh_n: Tensor
    """(D, B, H) gradient of h_n."""
    y: Tensor
    gates: Tensor
    h0: Tensor
    w_hh: Tensor
    dgi: Tensor
    """(T, B, D, 3H) gradient of gi, written."""
    dq: Tensor
    """(T, B, D, H) gradient of the n gate's recurrent side, W_hn h + b_hn, written."""
    dh0: Tensor
    """(D, B, H) gradient of h0, written."""
    varlen: Varlen | None = None
    h_prev: Tensor | None = None
    """(P, D, H) the state before each step, written; None without a `varlen`."""


class Kernel(ABC):
    """One implementation of the recurrence.

    A kernel is an instance named `KERNEL` in a module of its own, which `bigru.kernels.registry` lists. Everything
    that depends on the installation (Triton's version, the interpreter) is a field with a default, so that a test
    makes another instance instead of patching.
    """

    name: str
    """Key in the registry, and the name of the backend if the kernel is public."""

    rule = ""
    """What `is_proven` goes by, in a few words."""
    widths: tuple[int, ...] = ()
    """Hidden sizes for which `bigru.kernels.resources` compiles the kernel; none if Triton does not compile it."""
    varlen_widths: tuple[int, ...] = ()
    """Those of them that are compiled for sequences of different lengths too."""
    batches: tuple[int, ...] = (1, 4096)
    """Numbers of rows whose configurations are compiled: fewer programs than processors, and more."""
    steps_a_turn = 1
    """Time steps in one turn of the kernel's loop."""

    layer: Callable[[Tensor, Tensor, Sequence[Tensor], Varlen | None, bool], tuple[Tensor, Tensor]] | None = None
    """Runs a whole layer, all products and gradients included, in eager mode; None if `bigru.kernels.launched` does."""

    @abstractmethod
    def refusal(self, call: Call) -> str | None:
        """Returns the reason why the kernel cannot serve a call, or None if it can."""

    def is_proven(self, call: Call) -> bool:
        """Returns whether "auto" takes the kernel by its `rule`, where no record says anything of the call."""
        return False

    def choose(self, call: Call, batch: int) -> Any:
        """Returns the launch configuration of a call that is not refused, for B > 0 rows, or None."""
        return None

    def gates_shape(self, rows: tuple[int, ...], hidden: int) -> tuple[int, ...]:
        """Returns the shape of the tensor that the forward pass keeps for the backward pass.

        Args:
            rows: y's shape without H: (T, B, D), or (P, D).
            hidden: H.
        """
        return (*rows, 4, hidden)

    def forward(self, operands: Forward, config: Any) -> None:
        """Runs the forward recurrence in a configuration from `choose`."""
        raise NotImplementedError

    def backward(self, operands: Backward, config: Any) -> None:
        """Runs the backward recurrence in a configuration from `choose`."""
        raise NotImplementedError

    def launchers(self, config: Any, hidden: int) -> Any:
        """Returns the `bigru.kernels.launch.Launchers` that do all that `forward` and `backward` do, or None."""
        return None

    def functions(self, config: Any) -> dict[str, tuple[Any, dict[str, str]]]:
        """Returns the jit functions that a configuration launches, for `bigru.kernels.resources`.

        Returns:
            By direction, "forward" and "backward": the function, and the types of those pointers that are not to the
            storage's dtype; "operand" stands for the dtype of the products' factors.
        """
        return {}
