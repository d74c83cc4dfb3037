"""`export_onnx`: a `BiGRU`, or the whole forecaster, as an ONNX model of standard operators, batch and time free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bigru.files import write_atomically
from bigru.kernels.decompositions import onnx_weights
from bigru.kernels.gru import BiGRU
from bigru.model.forecaster import Encoder, HandForecaster

if TYPE_CHECKING:
    import onnx

OPSET, IR_VERSION = 17, 8
"""The first operator set with LayerNormalization, and the file format of its release."""


def export_onnx(model: BiGRU | HandForecaster, path: str | Path, *, state: bool = False) -> None:
    """Writes a model for inference as ONNX, in float32 whatever its dtype, without dropout.

    A layer is one GRU operator, direction "bidirectional", linear_before_reset 1, which is torch.nn.GRU's equation
    (https://onnx.ai/onnx/operators/onnx__GRU.html); its gates are in the order z, r, h.

    The graph's inputs are `input` (T, B, I), or (B, T, I) if batch_first, and, if asked for, `hx` (2 * layers, B, H).
    Its outputs are `output`, of input's layout with 2H features, and `h_n` (2 * layers, B, H); of a forecaster,
    `output` (B, T, 84) alone.

    Args:
        model: a `BiGRU` or a `HandForecaster`, which stays as it is; its weights as a call in evaluation reads them:
            pruned, normed or parametrized ones as computed.
        path: file to write.
        state: whether the graph of a `BiGRU` takes the initial states; else they are zeros.

    Raises:
        ModuleNotFoundError: onnx is not installed; it comes with `pip install bigru[onnx]`.
        TypeError: any other module, or what the graph would leave out: a subclass or an instance with a forward of its
            own, a forward hook, a pre-hook that changes the input.
        ValueError: `state` for a forecaster, which takes none.
        RuntimeError: the graph, run in onnxruntime where that is installed, gives other numbers than the model.
    """
    if not isinstance(model, BiGRU | HandForecaster):
        raise TypeError(f"model: expected a BiGRU or a HandForecaster, got {type(model).__name__}")
    if state and isinstance(model, HandForecaster):
        raise ValueError("state: expected False for a HandForecaster, which takes no initial state")
    try:
        import onnx
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError("export_onnx needs onnx: pip install 'bigru[onnx]'", name="onnx") from missing
    gru = model if isinstance(model, BiGRU) else model.encoder.core
    _refuse_what_is_left_out(model)
    with _in_evaluation(model, gru):
        inputs = _random_inputs(gru, state)
        _run_pre_hooks(model, gru, inputs)
        expected = model(*inputs)
        proto = _model_proto(model, gru, state)
    onnx.checker.check_model(proto, full_check=True)
    _compare_in_onnxruntime(proto, inputs, expected)
    write_atomically(Path(path), proto.SerializeToString())


def _model_proto(model: BiGRU | HandForecaster, gru: BiGRU, state: bool) -> onnx.ModelProto:
    """Returns the ONNX model; `gru` is the model itself or the forecaster's encoder."""
    import onnx

    graph = _Graph()
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
        if model.residual is not None:
            # Of the last frame the hands alone, which come first.
            bounds = [torch.tensor(bound, device="cpu") for bound in ([-1, 0], [2**31, features], [1, 2])]
            (last,) = graph.node("Slice", ["input", *bounds])
            (y,) = graph.node("Add", [y, last])
    graph.node("Identity", [y], ["output"])
    if gru is model:
        graph.node("Identity", [h_n], ["h_n"])

    def declare(name: str, *shape: str | int) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    outer = ("batch", "time") if gru.batch_first else ("time", "batch")
    inputs = [declare("input", *outer, gru.input_size)] + ([declare("hx", *states)] if state else [])
    outputs = [declare("output", *outer, features)] + ([declare("h_n", *states)] if gru is model else [])
    return onnx.helper.make_model(
        onnx.helper.make_graph(graph.nodes, type(model).__name__, inputs, outputs, graph.initializers),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="bigru",
    )


def _parts(model: BiGRU | HandForecaster) -> dict[str, tuple[nn.Module, tuple[type[nn.Module], ...]]]:
    """Returns each module that a call goes through, by its name, and the classes whose forward the graph stands for."""
    if isinstance(model, BiGRU):
        return {"model": (model, (BiGRU,))}
    head = list(model.pose_head)
    if len(head) != 3:
        raise TypeError(f"pose_head: expected LayerNorm, Dropout and Linear, got {len(head)} modules")
    return {
        "model": (model, (HandForecaster,)),
        "encoder": (model.encoder, (Encoder,)),
        "encoder.core": (model.encoder.core, (BiGRU,)),
        "pose_head": (model.pose_head, (nn.Sequential,)),
        "pose_head.0": (head[0], (nn.LayerNorm,)),
        "pose_head.1": (head[1], (nn.Dropout, nn.Identity)),
        "pose_head.2": (head[2], (nn.Linear,)),
    }


def _refuse_what_is_left_out(model: BiGRU | HandForecaster) -> None:
    """Raises TypeError where a call would run more than the forwards that the graph stands for."""
    for name, (module, classes) in _parts(model).items():
        names = " or ".join(cls.__name__ for cls in classes)
        if "forward" in vars(module) or type(module).forward not in [cls.forward for cls in classes]:
            raise TypeError(
                f"{name}: expected the forward of {names}, got one of {type(module).__name__}'s own, which the graph "
                "would leave out; torch.onnx.export takes it"
            )
        for hook in module._forward_hooks.values():
            raise TypeError(
                f"{name}: expected no forward hooks, got {_name_of(hook)}, which the graph would leave out; remove it "
                "with the handle that registering it gave"
            )


def _run_pre_hooks(model: BiGRU | HandForecaster, gru: BiGRU, inputs: tuple[Tensor, ...]) -> None:
    """Runs the forward pre-hooks, such as pruning's, which write weights; raises TypeError if one changes the input."""
    y = inputs[0].new_zeros(*inputs[0].shape[:2], 2 * gru.hidden_size)
    for name, (module, _) in _parts(model).items():
        given = (y,) if name.startswith("pose_head") else inputs
        for key, hook in module._forward_pre_hooks.items():
            with_kwargs = key in module._forward_pre_hooks_with_kwargs
            if (hook(module, given, {}) if with_kwargs else hook(module, given)) is not None:
                raise TypeError(
                    f"{name}: expected forward pre-hooks that leave the input alone, got {_name_of(hook)}, whose "
                    "change the graph would leave out; remove it with the handle that registering it gave"
                )


def _name_of(hook: Any) -> str:
    return getattr(hook, "__qualname__", type(hook).__name__)


@contextmanager
def _in_evaluation(model: nn.Module, gru: BiGRU) -> Iterator[None]:
    """Puts a model in evaluation mode, uncompiled and without autocast, its GRU on ATen's, and everything back."""
    modes = {module: module.training for module in model.modules()}
    backend = gru.backend
    device = next(model.parameters()).device.type
    compiled = any(module._compiled_call_impl is not None for module in modes)
    model.eval()
    gru.backend = "torch"
    try:
        with (
            torch.no_grad(),
            torch.autocast(device, enabled=False),
            torch.compiler.set_stance("force_eager") if compiled else nullcontext(),
        ):
            yield
    finally:
        gru.backend = backend
        for module, training in modes.items():
            module.training = training


def _random_inputs(gru: BiGRU, state: bool) -> tuple[Tensor, ...]:
    """Returns a batch of 2 by 3, time or batch first, and initial states if the graph takes them."""
    generator = torch.Generator("cpu").manual_seed(0)
    like = getattr(gru, gru._flat_weights_names[0])  # as computed: a parametrization may store another dtype
    shapes = [(2, 3, gru.input_size)]
    if state:
        shapes.append((2 * gru.num_layers, 2 if gru.batch_first else 3, gru.hidden_size))
    return tuple(torch.randn(shape, generator=generator, device="cpu").to(like) for shape in shapes)


def _compare_in_onnxruntime(proto: onnx.ModelProto, inputs: tuple[Tensor, ...], expected: Any) -> None:
    """Raises RuntimeError if onnxruntime, where it is installed, computes something else than the model did."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    given = {name: tensor.float().cpu().numpy() for name, tensor in zip(names, inputs, strict=True)}
    outputs = expected if isinstance(expected, tuple) else (expected,)
    # Products may be TF32 on a GPU; a model of 16 bits rounds every state to them.
    exact = outputs[0].dtype in (torch.float32, torch.float64) and outputs[0].device.type == "cpu"
    for output, actual, wanted in zip(session.get_outputs(), session.run(None, given), outputs, strict=True):
        wanted = wanted.float().cpu()
        error = (torch.from_numpy(actual) - wanted).norm() / wanted.norm().clamp(min=1e-30)
        if not error < (1e-3 if exact else 3e-2):
            raise RuntimeError(
                f"model: its {output.name} and the ONNX graph's differ by {error:.1g} (norm-relative): a call runs "
                "something that the graph lacks, such as a global hook or a method of a subclass; nothing was written"
            )


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
        hidden, layers, weights = gru.hidden_size, gru.num_layers, gru._weights()
        states = [hx] * layers
        if hx and layers > 1:
            states = self.node("Split", [hx, torch.full((layers,), 2, device="cpu")], layers, axis=0)
        if gru.batch_first:
            (x,) = self.node("Transpose", [x], perm=[1, 0, 2])
        last: list[str | Tensor] = []
        for layer, h0 in enumerate(states):
            w, r, bias = onnx_weights(weights[layer * len(weights) // layers : (layer + 1) * len(weights) // layers])
            options: dict[str, Any] = {"direction": "bidirectional", "hidden_size": hidden, "linear_before_reset": 1}
            # The fifth input would be the sequences' lengths.
            y, h_n = self.node("GRU", [x, w, r, "" if bias is None else bias, "", h0], 2, **options)
            last.append(h_n)
            # (T, 2, B, H) to (T, B, 2H); a 0 keeps the size there.
            (y,) = self.node("Transpose", [y], perm=[0, 2, 1, 3])
            (x,) = self.node("Reshape", [y, torch.tensor([0, 0, 2 * hidden], device="cpu")])
        if gru.batch_first:
            (x,) = self.node("Transpose", [x], perm=[1, 0, 2])
        (h_n,) = self.node("Concat", last, axis=0)
        return x, h_n
