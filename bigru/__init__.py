"""bigru: a fused bidirectional GRU for PyTorch, and the hand-motion forecaster it was made for."""

from bigru.export import export_onnx
from bigru.kernels.convert import replace_gru
from bigru.kernels.decompositions import decompositions
from bigru.kernels.gru import BiGRU
from bigru.model.forecaster import HandForecaster

__version__ = "0.1.0"

__all__ = ["BiGRU", "HandForecaster", "__version__", "decompositions", "export_onnx", "replace_gru"]
