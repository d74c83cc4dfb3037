"""`export_onnx`: a `BiGRU`, or the whole forecaster, as an ONNX model of standard operators, batch and time free."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bigru.kernels.gru import BiGRU
from bigru.model.forecaster import HandForecaster

if TYPE_CHECKING:
    import onnx

OPSET, IR_VERSION = 17, 8
"""The first operator set with LayerNormalization, and the file format of its release."""
SIDES = ("ih", "hh")
"""Of the input and of the state: weight_ih, weight_hh."""


def export_onnx(model: BiGRU | HandForecaster, path: str | Path, *, state: bool = False) -> None:
    """Writes a model for inference as ONNX, in float32 whatever its dtype, without dropout.

    A layer is one GRU operator, direction "bidirectional", linear_before_reset 1, which is torch.nn.GRU's equation
    (https://onnx.ai/onnx/operators/onnx__GRU.html); its gates are in the order z, r, h.

    The graph's inputs are `input` (T, B, I), or (B, T, I) if batch_first, and, if asked for, `hx` (2 * layers, B, H).
    Its outputs are `output`, of input's layout with 2H features, and `h_n` (2 * layers, B, H); of a forecaster,
    `output` (B, T, 84) alone.

    Args:
        model: a `BiGRU` or a `HandForecaster`; its weights as they are read now, parametrized ones as computed.
        path: file to write.
        state: whether the graph of a `BiGRU` takes the initial states; else they are zeros.

    Raises:
        ModuleNotFoundError: onnx is not installed; it comes with `pip install bigru[onnx]`.
        TypeError: any other module.
        ValueError: `state` for a forecaster, which takes none.
    """
    if not isinstance(model, BiGRU | HandForecaster):
        raise TypeError(f"model: expected a BiGRU or a HandForecaster, got {type(model).__name__}")
    if state and isinstance(model, HandForecaster):
        raise ValueError("state: expected False for a HandForecaster, which takes no initial state")
    try:
        import onnx
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError("export_onnx needs onnx: pip install 'bigru[onnx]'", name="onnx") from missing
    graph = _Graph()
    gru = model if isinstance(model, BiGRU) else model.encoder.core
    features, states = 2 * gru.hidden_size, (2 * gru.num_layers, "batch", gru.hidden_size)
    y, h_n = graph.gru(gru, "input", "hx" if state else "")
    if isinstance(model, HandForecaster):
        norm, _, linear = model.pose_head
        assert isinstance(norm, nn.LayerNorm)
        assert isinstance(linear, nn.Linear)
        features = linear.out_features
        (y,) = graph.node("LayerNormalization", [y, norm.weight, norm.bias], axis=-1, epsilon=norm.eps)
        (y,) = graph.node("MatMul", [y, linear.weight.T])
        (y,) = graph.node("Add", [y, linear.bias])
    graph.node("Identity", [y], ["output"])
    if gru is model:
        graph.node("Identity", [h_n], ["h_n"])

    def declare(name: str, *shape: str | int) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    outer = ("batch", "time") if gru.batch_first else ("time", "batch")
    inputs = [declare("input", *outer, gru.input_size)] + ([declare("hx", *states)] if state else [])
    outputs = [declare("output", *outer, features)] + ([declare("h_n", *states)] if gru is model else [])
    opset = [onnx.helper.make_opsetid("", OPSET)]
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(graph.nodes, type(model).__name__, inputs, outputs, graph.initializers),
        opset_imports=opset,
        ir_version=IR_VERSION,
        producer_name="bigru",
    )
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


class _Graph:
    """Nodes and constants of a graph under construction; a value is its name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def node(
        self, operator: str, inputs: list[str | Tensor], outputs: int | list[str] = 1, **attributes: Any
    ) -> list[str]:
        """Adds a node and returns its outputs, named or counted; tensors among its inputs become constants."""
        import onnx

        label = f"{operator}_{len(self.nodes)}"
        names = [f"{label}_{i}" for i in range(outputs)] if isinstance(outputs, int) else outputs
        operands = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        self.nodes.append(onnx.helper.make_node(operator, operands, names, name=label, **attributes))
        return names

    def constant(self, value: Tensor) -> str:
        """Adds a constant: whole numbers as int64, all others as float32."""
        import onnx

        name = f"constant_{len(self.initializers)}"
        array = value.detach().to("cpu", torch.float32 if value.is_floating_point() else torch.int64).numpy()
        self.initializers.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def gru(self, gru: BiGRU, x: str, hx: str) -> tuple[str, str]:
        """Adds all layers of a GRU and returns y and h_n; no `hx` means zeros."""
        hidden, layers = gru.hidden_size, gru.num_layers
        states = [hx] * layers
        if hx and layers > 1:
            states = self.node("Split", [hx, torch.full((layers,), 2)], layers, axis=0)
        if gru.batch_first:
            (x,) = self.node("Transpose", [x], perm=[1, 0, 2])
        last: list[str | Tensor] = []
        for layer, h0 in enumerate(states):
            names = [f"l{layer}", f"l{layer}_reverse"]
            w, r = (torch.stack([_gates_zrh(getattr(gru, f"weight_{side}_{n}")) for n in names]) for side in SIDES)
            bias: str | Tensor = ""
            if gru.bias:
                of_both = [[_gates_zrh(getattr(gru, f"bias_{side}_{n}")) for side in SIDES] for n in names]
                bias = torch.stack([torch.cat(pair) for pair in of_both])
            options: dict[str, Any] = {"direction": "bidirectional", "hidden_size": hidden, "linear_before_reset": 1}
            # The fifth input would be the sequences' lengths.
            y, h_n = self.node("GRU", [x, w, r, bias, "", h0], 2, **options)
            last.append(h_n)
            # (T, 2, B, H) to (T, B, 2H); a 0 keeps the size there.
            (y,) = self.node("Transpose", [y], perm=[0, 2, 1, 3])
            (x,) = self.node("Reshape", [y, torch.tensor([0, 0, 2 * hidden])])
        if gru.batch_first:
            (x,) = self.node("Transpose", [x], perm=[1, 0, 2])
        (h_n,) = self.node("Concat", last, axis=0)
        return x, h_n


def _gates_zrh(weight: Tensor) -> Tensor:
    """(3H, ...) rows in torch's order r, z, n to ONNX's z, r, h."""
    r, z, n = weight.chunk(3)
    return torch.cat([z, r, n])
