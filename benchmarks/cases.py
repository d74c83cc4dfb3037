"""What is compared: shapes, dtypes and precisions, and the proof that both sides compute the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from support import TOLERANCE, error
from torch import Tensor, nn

STEPS, FEATURES, LAYERS = 60, 84, 2


@dataclass(frozen=True)
class Mode:
    """Storage and the precision of products, the same for both sides."""

    dtype: torch.dtype
    precision: str
    """BiGRU's argument."""
    tf32: bool = False
    """Whether cuDNN and ATen's matrix products may use TF32."""


MODES = {
    "fp32": Mode(torch.float32, "fp32"),
    "tf32": Mode(torch.float32, "tf32", tf32=True),
    "bf16": Mode(torch.bfloat16, "fp32"),
    "fp16": Mode(torch.float16, "fp32"),
}


@dataclass(frozen=True)
class Case:
    """One shape in one mode; the defaults are the main workload."""

    batch: int = 64
    hidden: int = 128
    mode: str = "fp32"

    def __str__(self) -> str:
        return f"{self.mode} B={self.batch} H={self.hidden}"


MAIN = Case()
BATCHES = [Case(batch, mode=mode) for batch in (1, 256, 1024) for mode in ("fp32", "tf32", "bf16")]
WIDTHS = [Case(hidden=hidden, mode=mode) for hidden in (64, 256) for mode in MODES]
# The main workload in every mode, then batch and width one at a time; a CPU gets the main workload alone.
CASES = [Case(mode=mode) for mode in MODES] + BATCHES + WIDTHS if torch.cuda.is_available() else [MAIN]


@contextmanager
def products(mode: Mode) -> Iterator[None]:
    """Sets whether ATen and cuDNN may use TF32, for as long as the block runs."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = mode.tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def require_same(name: str, actual: Tensor, expected: Tensor, mode: Mode) -> None:
    """Fails unless the norm-relative error is within the tests' tolerance for the mode."""
    found, allowed = error(actual, expected), TOLERANCE[mode.dtype, mode.precision]
    assert found <= allowed, f"{name}: error {found:.1e}, at most {allowed:.0e} allowed"


def require_same_gradients(actual: nn.Module, expected: nn.Module, mode: Mode) -> None:
    """`require_same` for the gradient of every parameter."""
    of_expected = dict(expected.named_parameters())
    for name, parameter in actual.named_parameters():
        require_same(f"gradient of {name}", parameter.grad, of_expected[name].grad, mode)
