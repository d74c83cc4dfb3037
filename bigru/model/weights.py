"""Reads and writes weights: safetensors, or what torch.save wrote of data alone."""

from __future__ import annotations

import itertools
import logging
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bigru.command import CommandError
from bigru.config import latest_run
from bigru.files import printable, user_path, write_atomically
from bigru.layout import MODALITY_SIZES, POSE_SIZE
from bigru.model.forecaster import HandForecaster

log = logging.getLogger(__name__)

WEIGHTS = "weights.safetensors"
"""Of a run: the best so far."""
PREFIXES = ("module.", "_orig_mod.", "model.")
"""Of DataParallel, torch.compile, and a module that holds the network as `model`."""
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class CheckpointError(CommandError, ValueError):
    """A file of weights or a checkpoint that cannot be used; the message names it and why."""


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes a state dict as safetensors, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_atomically(path, safetensors.torch.save(tensors, metadata={"format": "pt"}))


def weights_file(path: str | Path) -> Path:
    """Returns the file of weights that a path names: itself, or that in a run's folder, or in `latest`'s."""
    path = latest_run(user_path(path))
    return path / WEIGHTS if path.is_dir() else path


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a state dict with the published names from .safetensors, .pt, .pth or a run's folder into the model.

    A file that holds the state dict under "model", "state_dict" or "model_state_dict" will do.

    Raises:
        CheckpointError: for a file that is missing or unreadable, holds more than data, whose names, shapes or
            modalities are not the model's, or whose tensors are not dense ones of finite real numbers.
    """
    path = weights_file(path)
    _fit(model, _read_weights(path), path)


def load_forecaster(path: str | Path, **options: Any) -> HandForecaster:
    """Builds the network that a file of weights is of, its sizes read from their shapes, and loads them.

    Args:
        path: as for `load_weights`.
        options: `backend` and `precision` of `HandForecaster`.

    Raises:
        CheckpointError: as `load_weights`, or where the weights are not of a forecaster.
    """
    path = weights_file(path)
    weights = _read_weights(path)
    names = [f"encoder.core.weight_{part}_l0" for part in ("ih", "hh")]
    if missing := [name for name in names if name not in weights]:
        raise CheckpointError(
            f"weights: {printable(path)} is no forecaster's state dict: no {', '.join(missing)}; it holds "
            f"{', '.join(list(weights)[:5]) or 'nothing'}"
        )
    for name in names:
        if _kind(weights[name]) or weights[name].dim() != 2 or 0 in weights[name].shape:
            raise CheckpointError(f"weights: {printable(path)}: expected a dense floating-point matrix in {name}")
    (rows, input_size), (gates, hidden_size) = (weights[name].shape for name in names)
    # Before a network of such a size is made.
    if not rows == gates == 3 * hidden_size:
        raise CheckpointError(
            f"weights: {printable(path)}: expected {3 * hidden_size} rows in {' and '.join(names)}, "
            f"three gates of {hidden_size} units, got {rows} and {gates}"
        )
    if modalities_of(input_size) is None:
        raise CheckpointError(
            f"weights: {printable(path)} is for {input_size} features, expected {POSE_SIZE} for hands and for "
            f"other modalities {MODALITY_SIZES}"
        )
    layers = sum(name.startswith("encoder.core.weight_ih_l") and not name.endswith("_reverse") for name in weights)
    model = HandForecaster(input_size, hidden_size, layers, residual="residual" in weights, **options)
    _fit(model, weights, path)
    return model


def _fit(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Loads weights of the model's own names, shapes and kind; `path` is named in the errors."""
    expected = model.state_dict()
    # Asked first: of some tensors not even the shape can be told.
    kinds = {name: _kind(weights[name]) for name in expected if name in weights}
    odd = [f"{name} is {kind}" for name, kind in kinds.items() if kind]
    if odd:
        raise CheckpointError(
            f"weights: {printable(path)}: expected dense tensors of float16, bfloat16, float32 or float64, "
            f"but {', '.join(odd)}"
        )
    problems = []
    if missing := sorted(expected.keys() - weights.keys()):
        problems.append(f"missing {', '.join(missing)}")
    if unknown := sorted(weights.keys() - expected.keys()):
        problems.append(f"unknown {', '.join(unknown)}")
    for name in expected.keys() & weights.keys():
        if weights[name].shape != expected[name].shape:
            problems.append(f"{name} is {tuple(weights[name].shape)}, expected {tuple(expected[name].shape)}")
    if problems:
        hint = _modality_hint(weights, expected)
        if ("residual" in weights) != ("residual" in expected):
            theirs, ours = ("with" if "residual" in names else "without" for names in (weights, expected))
            hint += f"it was trained {theirs} --residual, the run is {ours}; "
        raise CheckpointError(
            f"weights: {printable(path)} does not fit the network: {hint}{'; '.join(sorted(problems))}"
        )
    # As the model will hold them: a float64 may be too large for it.
    bad = sorted(name for name, tensor in weights.items() if not tensor.to(expected[name].dtype).isfinite().all())
    if bad:
        raise CheckpointError(f"weights: {printable(path)} holds values that are not finite in {', '.join(bad)}")
    model.load_state_dict(weights)


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Reads a state dict, without the prefixes that wrappers put before all of its names."""
    shown = printable(path)
    if not path.is_file():
        raise CheckpointError(f"weights: {shown} is not a file")
    if path.suffix == ".safetensors":
        _refuse_no_weights(path)
        try:
            # From bytes: the package opens no path that is not UTF-8.
            return _without_prefixes(safetensors.torch.load(path.read_bytes()), path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"weights: {shown} cannot be read as safetensors: {_first_line(error)}") from error
    if path.suffix not in (".pt", ".pth"):
        raise CheckpointError(f"weights: expected a .safetensors, .pt or .pth file, got {shown}")
    content = read_pickle(path)
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        raise CheckpointError(f"weights: {shown} holds no state dict, {{name: tensor}}")
    return _without_prefixes(content, path)


def _without_prefixes(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Takes off what DataParallel, torch.compile and wrapping modules put before every name, and logs it."""
    removed = ""
    while prefix := next((prefix for prefix in PREFIXES if weights and all(n.startswith(prefix) for n in weights)), ""):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
        removed += prefix
    if removed:
        log.warning("weights: the names in %s are read without their prefix %s", printable(path), removed)
    return dict(weights)


def _refuse_no_weights(path: Path) -> None:
    """Raises CheckpointError, saying what it is, for a file that is no weights by its first bytes."""
    with path.open("rb") as file:
        head = file.read(256).lstrip()
    what = ""
    if not head:
        what = "is empty"
    elif head.startswith(b"version https://git-lfs"):
        what = "is a pointer of Git LFS, not the file itself, which `git lfs pull` fetches"
    elif head[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        what = "is a web page, not the file itself; download it again"
    if what:
        raise CheckpointError(f"weights: {printable(path)} {what}")


def _first_line(error: Exception) -> str:
    """Returns what an error says, in one printable line: it may quote the file, or go on with a stack of C++."""
    return printable(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}")


def _kind(tensor: Tensor) -> str:
    """Names what keeps a tensor from being weights, dense real floating-point numbers on the CPU; empty for nothing."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout is not torch.strided:
        return str(tensor.layout)
    if tensor.is_meta:
        return "without values (meta)"
    return "" if tensor.dtype in WEIGHT_DTYPES else str(tensor.dtype)


def _modality_hint(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    name = "encoder.core.weight_ih_l0"
    if name not in weights or name not in expected or weights[name].dim() != 2:
        return ""
    theirs, ours = weights[name].shape[1], expected[name].shape[1]
    if theirs == ours:
        return ""
    return f"it is for {_modalities(theirs)}, the run feeds {_modalities(ours)}; "


def modalities_of(input_size: int) -> dict[str, bool] | None:
    """Returns which modalities beside hands make up an input size, all sums of which differ; None for no such size."""
    for choice in itertools.product((False, True), repeat=len(MODALITY_SIZES)):
        if POSE_SIZE + sum(itertools.compress(MODALITY_SIZES.values(), choice)) == input_size:
            return dict(zip(MODALITY_SIZES, choice, strict=True))
    return None


def _modalities(input_size: int) -> str:
    chosen = modalities_of(input_size)
    if chosen is None:
        return f"{input_size} features"
    return f"{input_size} features ({', '.join(['hands', *(name for name, on in chosen.items() if on)])})"


def read_pickle(path: Path) -> dict[str, Any]:
    """Reads a file of torch.save that holds data only.

    Raises:
        CheckpointError: it cannot be read, or is a pickle that would run code.
    """
    _refuse_no_weights(path)
    try:
        with warnings.catch_warnings():
            # A plain pickle gets a warning about its protocol before it is refused.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Not in torch's words, which advise to run whatever the file holds.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise CheckpointError(
            f"{printable(path)}: refused, it is damaged or holds more than tensors and numbers{what}, as a whole "
            "pickled model does; save model.state_dict() instead"
        ) from error
    # What the unpickler raises for a damaged file depends on where the damage is: nearly anything.
    except Exception as error:
        raise CheckpointError(
            f"{printable(path)} cannot be read, it is damaged or cut off: {_first_line(error)}"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{printable(path)}: expected a dictionary, got {type(content).__name__}")
    return dict(content)
