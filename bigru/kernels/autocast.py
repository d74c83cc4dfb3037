"""The dtype that a call is computed in under torch.autocast."""

from __future__ import annotations

import torch


def autocasts(device: str) -> bool:
    """Returns whether autocast is on for a type of device; there is none for "meta"."""
    return device != "meta" and torch.is_autocast_enabled(device)


def dtype_of_call(dtype: torch.dtype, device: str) -> torch.dtype:
    """Returns the dtype that an input is computed in: autocast's where it is on, which leaves doubles alone."""
    return torch.get_autocast_dtype(device) if dtype != torch.float64 and autocasts(device) else dtype
