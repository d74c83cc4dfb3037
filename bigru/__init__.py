"""bigru: a fused bidirectional GRU for PyTorch, and the hand-motion forecaster it was made for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigru import prove
    from bigru.export import export_onnx
    from bigru.kernels.convert import replace_gru
    from bigru.kernels.decompositions import decompositions
    from bigru.kernels.gru import BiGRU
    from bigru.model.forecaster import HandForecaster

__version__ = "0.1.0"

__all__ = ["BiGRU", "HandForecaster", "__version__", "decompositions", "export_onnx", "prove", "replace_gru"]

# Imported when first asked for, and torch with it, which a command's help has no need of.
LATER = {
    "BiGRU": "bigru.kernels.gru",
    "HandForecaster": "bigru.model.forecaster",
    "decompositions": "bigru.kernels.decompositions",
    "export_onnx": "bigru.export",
    "prove": "bigru.prove",
    "replace_gru": "bigru.kernels.convert",
}


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # `prove` is a module that can be called.
    return import_module("bigru.prove") if name == "prove" else getattr(import_module(LATER[name]), name)


def __dir__() -> list[str]:
    return __all__
