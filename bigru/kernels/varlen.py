"""Sequences of different lengths: where the rows of a PackedSequence lie, and padded batches with lengths."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


@dataclass(frozen=True)
class Varlen:
    """The layout of P rows in T steps: step t has rows of the first batch_sizes[t] sequences, the longest first."""

    batch_sizes: Tensor
    """(T,) int64 on the CPU, never rising."""
    device: torch.device
    """The device of the rows."""

    @property
    def steps(self) -> int:
        """T, the length of the longest sequence."""
        return len(self.batch_sizes)

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return int(self.batch_sizes[0])

    @functools.cached_property
    def table(self) -> Tensor:
        """(B + T,) int64 on the device: each sequence's length, then each step's first row."""
        first_rows = self.batch_sizes.cumsum(0) - self.batch_sizes
        return to_device(torch.cat([conjugate(self.batch_sizes, self.batch), first_rows]), self.device)


def steps_and_table(y: Tensor, varlen: Varlen | None) -> tuple[int, Tensor | None]:
    """Returns T and `Varlen.table` of a call whose states are y."""
    return (y.shape[0], None) if varlen is None else (varlen.steps, varlen.table)


def varlen_of(packed: PackedSequence) -> Varlen:
    """Returns the layout of a PackedSequence.

    Raises:
        RuntimeError: its data is no matrix, or its batch sizes do not describe its rows. The kernels would read where
            there are none.
    """
    sizes, rows = packed.batch_sizes, packed.data.shape[0]
    if packed.data.dim() != 2:
        raise RuntimeError(f"input: expected a PackedSequence of 2-D data, got shape {tuple(packed.data.shape)}")
    falling = sizes.dim() == 1 and len(sizes) > 0 and int(sizes[-1]) > 0 and not (sizes.diff() > 0).any()
    if not falling or int(sizes.sum()) != rows:
        raise RuntimeError(
            f"input: expected batch_sizes of at least 1, never rising, that add up to {rows} rows, got {sizes.tolist()}"
        )
    return Varlen(sizes, packed.data.device)


def conjugate(sizes: Tensor, count: int) -> Tensor:
    """Counts those of `sizes`, which never rise, above each of 0 ... count - 1: lengths to batch sizes, and back."""
    return torch.searchsorted(-sizes, -torch.arange(count, device=sizes.device))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Makes a copy on a device that the host does not wait for; from pageable memory it would."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def checked_lengths(lengths: Tensor | Sequence[int], steps: int, batch: int) -> Tensor:
    """Returns the lengths given for a padded batch as a (B,) int64 tensor.

    Raises:
        TypeError: neither a tensor of integers nor a sequence of them.
        RuntimeError: not on the CPU, not one for each sequence, or not between 1 and T.
    """
    if isinstance(lengths, Tensor):
        if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
            raise TypeError(f"lengths: expected integers, got {lengths.dtype}")
        if lengths.device.type != "cpu":
            raise RuntimeError(f"lengths: expected a tensor on the CPU, got one on {lengths.device}")
        lengths = lengths.to(torch.int64)
    else:
        try:
            if any(isinstance(length, bool) for length in lengths):
                raise TypeError
            lengths = torch.tensor([operator.index(length) for length in lengths], dtype=torch.int64, device="cpu")
        except TypeError:
            raise TypeError(f"lengths: expected an int64 tensor or a list of int, got {lengths!r}") from None
    if lengths.shape != (batch,):
        raise RuntimeError(f"lengths: expected shape ({batch},), one for each sequence, got {tuple(lengths.shape)}")
    if batch and (int(lengths.min()) < 1 or int(lengths.max()) > steps):
        raise RuntimeError(f"lengths: expected numbers from 1 to {steps} (time steps of input), got {lengths.tolist()}")
    return lengths


def pack(padded: Tensor, lengths: Tensor, batch_first: bool) -> tuple[PackedSequence, Tensor]:
    """Packs the rows of a padded batch that lie within its lengths.

    As `pack_padded_sequence(..., enforce_sorted=False)`, in one copy rather than one for each length, and with one for
    its gradient rather than one for each step.

    Args:
        padded: (T, B, I), or (B, T, I) if `batch_first`.
        lengths: (B,) int64, from `checked_lengths`.

    Returns:
        The P rows packed, and (P,) where each comes from, in T * B (or B * T) rows.
    """
    lengths, order = lengths.sort(descending=True, stable=True)
    batch_sizes = conjugate(lengths, int(lengths[0]))
    t = torch.arange(len(batch_sizes), device="cpu").repeat_interleave(batch_sizes)
    b = order[torch.arange(len(t), device="cpu") - (batch_sizes.cumsum(0) - batch_sizes)[t]]
    index = b * padded.shape[1] + t if batch_first else t * padded.shape[1] + b
    index, order, inverse = (to_device(x, padded.device) for x in (index, order, order.argsort()))
    data = padded.flatten(0, 1).index_select(0, index)
    return PackedSequence(data, batch_sizes, order, inverse), index


def unpack(packed: PackedSequence, index: Tensor, shape: Sequence[int]) -> Tensor:
    """Puts rows back to where they came from in (T, B) or (B, T), as `shape` says; zeros elsewhere."""
    rows = packed.data.new_zeros(shape[0] * shape[1], packed.data.shape[1]).index_copy(0, index, packed.data)
    return rows.unflatten(0, tuple(shape))
