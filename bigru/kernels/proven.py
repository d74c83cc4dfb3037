"""What has been seen right on a GPU: "auto" takes the experimental kernels only for what is listed here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Proven:
    """A family of kernels that a recorded run has shown right, and for what."""

    kernel: str
    """"resident" or "cooperative"."""
    capability: tuple[int, int]
    hidden: tuple[int, ...]
    """Hidden sizes of the record; sizes in between are not covered."""
    dtype: str
    """Storage: "float32", "bfloat16" or "float16"."""
    precision: str
    """"fp32" or "tf32"; of no account for 16-bit storage."""
    record: str
    """The record's file name in benchmarks/results/."""

    def covers(self, hidden: int, dtype: str, precision: str, capability: tuple[int, int]) -> bool:
        """Whether a call is among what was shown."""
        same = self.dtype == dtype and (dtype != "float32" or self.precision == precision)
        return same and self.capability == capability and hidden in self.hidden


PROVEN: tuple[Proven, ...] = ()
"""Empty: no run on a GPU has been recorded yet."""
