"""`replace_gru`: every bidirectional torch.nn.GRU of a model becomes a `BiGRU`, where it is."""

from __future__ import annotations

import warnings

from torch import nn
from torch.nn.utils import parametrize

from bigru.kernels.gru import BiGRU
from bigru.kernels.registry import check_options
from bigru.kernels.twin import own_callable, unlike_bigru


def replace_gru(model: nn.Module, *, backend: str = "auto", precision: str = "fp32") -> list[str]:
    """Turns every bidirectional torch.nn.GRU of a model, the model itself included, into a `BiGRU`.

    The modules stay the objects that they are: parameters (so optimisers go on), hooks, training mode, device, dtype,
    names, and every reference to them; but a call compiled by `module.compile()` is dropped: compile again. One
    direction, a proj_size, subclasses and instances with a forward of their own, which may compute something else, are
    left alone.

    Args:
        model: changed in place.
        backend, precision: as for `BiGRU`.

    Returns:
        The names of what was replaced, as in model.named_modules(); a module that the model holds twice is named once.

    Raises:
        ValueError: unknown backend or precision.

    Warns:
        UserWarning: names a GRU that was left because it is parametrized, which makes it a subclass, or because its
            instance holds a callable, such as a forward that a wrapper put there.
    """
    check_options(backend, precision)
    replaced = []
    for name, module in model.named_modules():
        if unlike_bigru(module) is None:
            # Both are RNNBase in mode "GRU": what a module holds is the same in either class.
            module.__class__ = BiGRU
            module.backend, module.precision = backend, precision
            vars(module).pop("_compiled_call_impl", None)
            replaced.append(name)
        elif isinstance(module, nn.GRU) and module.bidirectional:
            own = own_callable(module)
            if parametrize.is_parametrized(module) or own:
                reason = f"has a {own} of its own" if own else "is parametrized"
                then = "wrap" if own else "parametrize"
                left = f"{name or 'the model'} {reason} and was left a torch.nn.GRU: replace first, {then} after"
                warnings.warn(left, stacklevel=2)
    return replaced
