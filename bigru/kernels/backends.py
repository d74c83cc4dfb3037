"""The table of kernels and the names of backends, without torch, so that a command's help need not wait for it.

A new kernel is one module with an instance of `bigru.kernels.kernel.Kernel` named `KERNEL`, and one line in `KERNELS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple


class Entry(NamedTuple):
    """A kernel's line in the registry."""

    module: str
    auto: str | None = None
    """The type of device on which "auto" asks it."""
    public: bool = True
    """True if its name is one of `BiGRU`'s backends."""


KERNELS = {
    "resident": Entry("bigru.kernels.resident", auto="cuda"),
    "cooperative": Entry("bigru.kernels.cooperative", auto="cuda"),
    "triton": Entry("bigru.kernels.triton_kernel", auto="cuda"),
    "cpu": Entry("bigru.kernels.cpu", auto="cpu"),
    "scan": Entry("bigru.kernels.scan", public=False),
}
"""The kernels by name, in the order in which "auto" asks them."""
PUBLIC = tuple(name for name, entry in KERNELS.items() if entry.public)
BACKENDS = ("auto", *PUBLIC, "torch", "reference")
"""The values of `BiGRU`'s `backend`."""
if TYPE_CHECKING:
    Backend = str
else:
    Backend = Literal[BACKENDS]
