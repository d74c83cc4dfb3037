"""The calls for which a recorded run on a GPU has shown a kernel right and not slower: "auto" takes it only there."""

from __future__ import annotations

from dataclasses import dataclass

from bigru.kernels.config import Call


@dataclass(frozen=True)
class Proven:
    """A kernel that a recorded run has shown right and not slower than nn.GRU, and the calls that it covers."""

    kernel: str
    """Its name in the registry."""
    capability: tuple[int, int]
    hidden: tuple[int, ...]
    """Hidden sizes of the record; sizes in between are not covered."""
    dtype: str
    """Storage: "float32", "bfloat16" or "float16"."""
    precision: str
    """"fp32" or "tf32"; of no account for 16-bit storage."""
    record: str
    """The record's file name in benchmarks/results/."""
    varlen: bool = False
    """True if the record shows sequences of different lengths too."""

    def covers(self, call: Call) -> bool:
        """Returns whether the record covers a call."""
        dtype = str(call.dtype).removeprefix("torch.")
        same = self.dtype == dtype and (dtype != "float32" or self.precision == call.precision)
        covered = same and self.capability == call.device.capability and call.hidden in self.hidden
        return covered and (self.varlen or not call.varlen)


PROVEN: tuple[Proven, ...] = ()
"""Empty: no run on a GPU has been recorded yet."""


def proven_for(kernel: str) -> tuple[Proven, ...]:
    """Returns the entries of one kernel."""
    return tuple(entry for entry in PROVEN if entry.kernel == kernel)
