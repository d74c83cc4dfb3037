"""`BiGRU`: the parameters, results and errors of torch.nn.GRU(bidirectional=True), and a choice of who computes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from bigru.kernels.choice import choice_of
from bigru.kernels.compiling import not_compiled
from bigru.kernels.config import autocasts, dtype_of_call, without_autocast
from bigru.kernels.decompositions import onnx_gru_layer, writes_onnx
from bigru.kernels.launched import Common, launched_gru, launches
from bigru.kernels.layer import fused_gru_layer
from bigru.kernels.reference import gru_recurrence, layer_operands
from bigru.kernels.registry import check_options
from bigru.kernels.twin import own_callable, twin, unlike_bigru
from bigru.kernels.varlen import Varlen, checked_lengths, pack, unpack, varlen_of


class BiGRU(nn.RNNBase):
    """A bidirectional GRU with the parameters, initialisation and results of `torch.nn.GRU(bidirectional=True)`.

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr), z likewise, n = tanh(W_in x + b_in + r * (W_hn h + b_hn)),
    h' = n + z * (h - n); see https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html.

    Args:
        input_size: features per time step, I.
        hidden_size: hidden units per direction, H.
        num_layers: stacked bidirectional layers.
        bias: whether to learn b_ih and b_hh.
        batch_first: input and output as (B, T, features) instead of (T, B, features).
        dropout: probability of dropping an output between two layers in training.
        bidirectional: True; the parameter is there for calls that were written for torch.nn.GRU.
        proj_size: refused, as by torch.nn.GRU.
        backend: who computes the recurrence. "triton": the fused kernels, on a GPU (or in Triton's interpreter);
            "resident" (H up to 128) and "cooperative" (H from 129): experimental kernels for GPUs; "torch": ATen's own
            GRU (cuDNN on a GPU), or, under torch.compile and torch.export, a loop inside an operator, since compilers
            unroll ATen's; "reference": a plain PyTorch loop, slow, differentiable to any order and in any mode;
            "auto": the fastest kernel that a record, such as `python -m bigru.prove` leaves on this machine, shows
            right and not slower for the call, else "torch"; but
            "reference" inside those transforms of torch.func that need it.
        precision: products of the fused recurrence for fp32 storage: "fp32" (error below 1e-5 against fp64, unless one
            recurrent weight is some 10^4 times as large as the others) or "tf32" (below 2e-3). Products over all steps
            at once (of the inputs, and for the gradients of inputs and weights) are ATen's and follow
            torch.backends.cuda.matmul.allow_tf32; the "torch" backend follows torch.backends.cudnn.allow_tf32.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError, ValueError: for arguments that torch.nn.GRU refuses, bidirectional=False, or an unknown backend or
            precision.

    Example:
        >>> gru = BiGRU(84, 128, num_layers=2, batch_first=True)
        >>> y, h_n = gru(torch.randn(64, 60, 84))
        >>> y.shape, h_n.shape
        (torch.Size([64, 60, 256]), torch.Size([4, 64, 128]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = True,
        proj_size: None = None,
        *,
        backend: str = "auto",
        precision: str = "fp32",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(bidirectional, bool):
            raise TypeError(f"bidirectional: expected a bool, got {type(bidirectional).__name__}")
        if not bidirectional:
            raise ValueError("bidirectional: expected True, got False; for one direction there is torch.nn.GRU")
        if proj_size is not None:
            raise ValueError(f"proj_size: only an LSTM has one, got {proj_size!r}")
        check_options(backend, precision)
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, True, device=device, dtype=dtype
        )
        self.backend = backend
        self.precision = precision

    @classmethod
    def from_gru(cls, gru: nn.GRU, *, backend: str = "auto", precision: str = "fp32") -> Self:
        """A BiGRU in place of a torch.nn.GRU: the same Parameter objects, options, hooks and training mode.

        Args:
            gru: a bidirectional torch.nn.GRU; it stays as it is.
            backend, precision: as for the constructor.

        Raises:
            TypeError: for a subclass, which may compute something else, for an instance with a forward (or any other
                callable) of its own, or for anything else.
            ValueError: for one direction or a proj_size.
        """
        if refusal := unlike_bigru(gru):
            raise refusal
        check_options(backend, precision)
        return twin(gru, cls, backend=backend, precision=precision)

    def to_gru(self) -> nn.GRU:
        """The torch.nn.GRU that computes the same, of the same Parameter objects, hooks and training mode.

        Raises:
            TypeError: for a subclass, such as parametrizations make, or an instance with a callable of its own.
        """
        if type(self) is not BiGRU:
            raise TypeError(f"expected a BiGRU itself, got {type(self).__name__}, a subclass")
        if name := own_callable(self):
            raise TypeError(f"expected a BiGRU without a {name} of its own, which would go on with its code")
        gru = twin(self, nn.GRU)
        del gru.backend, gru.precision
        return gru

    # `lengths` is not by name alone: the tracing ONNX exporter passes every default by position.
    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Runs the GRU over a batch of sequences.

        Args:
            input: (T, B, I), (B, T, I) if `batch_first`, (T, I) for one sequence, or a PackedSequence.
            hx: (2 * num_layers, B, H) initial states, (2 * num_layers, H) for one sequence; default zeros.
            lengths: (B,) time steps of each sequence of a padded input, from 1 to T, int64 on the CPU or a list, for
                what a PackedSequence gives: no step past a sequence's end is computed, the reverse direction starts
                there, and h_n is the state after each sequence's last step. y is zero past each end.

        Under torch.compile a PackedSequence, or `lengths`, breaks the graph: the rows at each step are data.

        Returns:
            y, shaped as the input with 2H features, and h_n, shaped as hx.

        Raises:
            ValueError: input of the wrong rank or dtype.
            TypeError: lengths that are no integers, or beside a PackedSequence.
            RuntimeError: wrong sizes, T = 0, tensors on different devices, or a backend that cannot serve the call.
        """
        if lengths is not None:
            return self._forward_padded(input, hx, lengths)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(f"input: expected 2 or 3 dimensions, got {input.dim()}")
        dims = input.dim()
        if hx is not None and hx.dim() != dims:
            raise RuntimeError(f"hx: expected {dims} dimensions for {dims}-D input, got shape {tuple(hx.shape)}")
        batched = dims == 3
        time_first = not self.batch_first or not batched
        x = input if batched else input.unsqueeze(1)
        if hx is not None and not batched:
            hx = hx.unsqueeze(1)
        weights = self._weights()
        steps, batch = x.shape[:2] if time_first else (x.shape[1], x.shape[0])
        self._check(x, hx, weights, batch)
        if torch.compiler.is_compiling():
            # A length may be data, of which a graph can be told but not ask.
            torch._check(steps != 0, lambda: "input: expected at least one time step")
        elif steps == 0:
            raise RuntimeError(f"input: expected at least one time step, got shape {tuple(input.shape)}")
        backend = self._backend_that_serves(input)
        # A compiler would unroll ATen's GRU over time, and again for every length.
        if backend == "torch" and not torch.compiler.is_compiling():
            hx = self._zeros(x, batch) if hx is None else hx
            y, h_n = torch._VF.gru(
                x, hx, weights, self.bias, self.num_layers, self.dropout, self.training, True, not time_first
            )
        else:
            y, h_n = self._forward_layers(x, hx, weights, backend, batch, batch_first=not time_first)
        return (y, h_n) if batched else (y.squeeze(1), h_n.squeeze(1))

    def resolve_backend(self, input: Tensor | PackedSequence) -> str:
        """Name of the backend that serves `input`, never "auto".

        Raises:
            RuntimeError: the backend asked for cannot serve it; the message says why.
        """
        return choice_of(self, input).backend

    def _backend_that_serves(self, input: Tensor | PackedSequence) -> str:
        """As `resolve_backend`, but for what exports to ONNX and for what torch.jit traces.

        A tracer would freeze the reference's loops and a PackedSequence's rows. ATen's GRU is one operator for all
        sizes, loads without bigru, and has a rule in the ONNX exporter that traces; for the other exporter "onnx"
        writes ONNX's own. No backend is refused there: the graph may run on another machine.
        """
        if torch.jit.is_tracing() and (self.backend in ("auto", "reference") or torch.onnx.is_in_onnx_export()):
            data = input.data if isinstance(input, PackedSequence) else input
            if self.backend not in ("auto", "torch") and autocasts(data.device.type):
                raise RuntimeError(
                    f"backend {self.backend!r} cannot be traced under autocast: a trace records ATen's GRU, which "
                    "heeds no autocast on a CPU and takes float16 alone on a GPU; trace without autocast"
                )
            return "torch"
        return "onnx" if writes_onnx() else self.resolve_backend(input)

    def extra_repr(self) -> str:
        """As torch.nn.GRU's, with backend and precision."""
        return f"{super().extra_repr()}, backend={self.backend!r}, precision={self.precision!r}"

    # A compiled call belongs to the module that compiled it: in a copy it would run that one's code and weights.
    # torch.nn.RNNBase's own __getstate__ keeps it, which torch.nn.Module's drops.
    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state.pop("_compiled_call_impl", None)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Parametrized modules refuse __getstate__.
        state = vars(self).copy() if parametrize.is_parametrized(self) else self.__getstate__()
        for name in ("_compiled_call_impl", "_flat_weight_refs"):
            state.pop(name, None)
        memo[id(self)] = copied = self.__new__(type(self))
        copied.__setstate__(copy.deepcopy(state, memo))
        return copied

    def __prepare_scriptable__(self) -> NoReturn:
        # torch.jit.script asks for another module here, and leaves it in the user's model.
        raise RuntimeError("torch.jit.script takes no BiGRU, but its to_gru(); torch.jit.trace takes it")

    def _replicate_for_data_parallel(self) -> Self:
        replica: Self = super()._replicate_for_data_parallel()
        vars(replica).pop("_compiled_call_impl", None)
        return replica

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("backend", "precision"):
            check_options(**{name: value})
        super().__setattr__(name, value)

    def _weights(self) -> list[Tensor]:
        # Read at call time, so that functional_call, weight_norm and pruning are honoured. What is still a parameter is
        # found six times as fast in its dictionary; what one of them replaced is an attribute.
        own = self._parameters
        names = self._flat_weights_names
        return [getattr(self, name) if (weight := own.get(name)) is None else weight for name in names]

    def _zeros(self, x: Tensor, batch: int | Tensor) -> Tensor:
        """Initial states where there are none."""
        shape: tuple[Any, ...] = (2 * self.num_layers, batch, self.hidden_size)
        return x.new_zeros(shape)  # of x's class too

    def _check(self, x: Tensor, hx: Tensor | None, weights: list[Tensor], batch: int | Tensor) -> None:
        """Raises unless the input, the initial states and the weights as computed with go together."""
        wanted, device, autocast = weights[0].dtype, weights[0].device, autocasts(x.device.type)
        if autocast and not x.dtype.is_floating_point:
            raise RuntimeError(f"input: expected a floating dtype under autocast, got {x.dtype}")
        if x.dtype != wanted and not autocast:
            raise ValueError(
                f"input: expected {wanted} like the weights, got {x.dtype}. RNN input dtype ({x.dtype}) does not match "
                f"weight dtype ({wanted}). Convert input: input.to({wanted}), or convert model: model.to({x.dtype})"
            )
        if not autocast and len({weight.dtype for weight in weights}) > 1:
            dtypes = {name: weight.dtype for name, weight in zip(self._flat_weights_names, weights, strict=True)}
            raise RuntimeError(f"weights: expected all of {wanted}, got {dtypes}")
        if x.device != device:
            raise RuntimeError(f"input: expected a tensor on {device} like the weights, got one on {x.device}")
        if x.shape[-1] != self.input_size:
            raise RuntimeError(f"input: expected {self.input_size} features (input_size), got {x.shape[-1]}")
        shape: tuple[Any, ...] = (2 * self.num_layers, batch, self.hidden_size)
        if hx is None:
            return
        if torch.compiler.is_compiling():
            for size, expected in zip(hx.shape, shape, strict=True):
                torch._check(size == expected, lambda: "hx: expected shape (2 * num_layers, batch, hidden)")
        elif tuple(hx.shape) != shape:
            raise RuntimeError(f"hx: expected shape {shape} (2 * num_layers, batch, hidden), got {tuple(hx.shape)}")
        if hx.device != x.device:
            raise RuntimeError(f"hx: expected a tensor on {x.device} like input, got one on {hx.device}")
        if not hx.dtype.is_floating_point or (hx.dtype != x.dtype and not autocast):
            raise RuntimeError(f"hx: expected {x.dtype} like input, got {hx.dtype}")

    def _forward_layers(
        self,
        x: Tensor,
        hx: Tensor | None,
        weights: list[Tensor],
        backend: str,
        batch: Any,
        varlen: Varlen | None = None,
        batch_first: bool = False,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """y and h_n, of x (T, B, I), both of the batch first if asked, or (P, I), packed; `lengths` are for "onnx"."""
        device, precision, hidden = x.device.type, self.precision, self.hidden_size
        # Everything is of autocast's dtype, as in cuDNN's GRU, but the user's own rather than always fp16. ATen's GRU
        # on a CPU heeds no autocast, so neither does what stands for it.
        dtype = x.dtype if backend == "torch" and device == "cpu" else dtype_of_call(x.dtype, device)
        if launches(backend, varlen is not None):
            common = Common(backend, precision, dtype, hidden, batch, varlen)
            dropout = self.dropout if self.training else 0.0
            return launched_gru(x, hx, weights, common, self.num_layers, batch_first, dropout)
        hx, given = self._zeros(x, batch) if hx is None else hx, hx is not None
        x = x.transpose(0, 1) if batch_first else x
        per_layer = len(weights) // self.num_layers
        sizes = None if varlen is None else varlen.batch_sizes.tolist()
        states = []
        with without_autocast(device):
            for layer in range(self.num_layers):
                last = layer == self.num_layers - 1
                own = weights[layer * per_layer : (layer + 1) * per_layer]
                h0 = hx[2 * layer : 2 * layer + 2]
                if backend == "onnx":
                    x, h_n = onnx_gru_layer(x, h0, own, lengths)
                    x = x.transpose(0, 1) if last and batch_first else x
                elif backend == "reference":
                    operands = layer_operands(x.to(dtype), [w.to(dtype) for w in own])
                    y, h_n = gru_recurrence(*operands, h0.to(dtype), sizes)
                    x = y.flatten(-2)
                    # A copy, since a view could not be detached in place.
                    x = (x.transpose(0, 1) if batch_first else x).clone() if last else x
                else:
                    kernel = "scan" if backend == "torch" else backend
                    how = hidden, dtype, precision, kernel, varlen, last and batch_first, given
                    x, h_n = fused_gru_layer(x, h0, own, *how)
                states.append(h_n)
                if self.dropout and not last:
                    x = nn.functional.dropout(x, self.dropout, self.training)
        return x, torch.cat(states)

    @not_compiled("the number of rows at each step of a PackedSequence is data")
    def _forward_packed(self, packed: PackedSequence, hx: Tensor | None) -> tuple[PackedSequence, Tensor]:
        if hx is not None and hx.dim() != 3:
            raise RuntimeError(f"hx: expected 3 dimensions for a PackedSequence, got shape {tuple(hx.shape)}")
        # A tracer follows the batch size where it stays a tensor.
        varlen = None if torch.jit.is_tracing() else varlen_of(packed)
        batch = packed.batch_sizes[0] if varlen is None else varlen.batch
        if hx is not None and packed.sorted_indices is not None and hx.shape[1] == batch:
            hx = hx.index_select(1, packed.sorted_indices)
        weights = self._weights()
        self._check(packed.data, hx, weights, batch)
        backend = self._backend_that_serves(packed)
        if backend == "torch":
            hx = self._zeros(packed.data, batch) if hx is None else hx
            y, h_n = torch._VF.gru(
                packed.data, packed.batch_sizes, hx, weights, self.bias, self.num_layers, self.dropout, self.training,
                True,
            )  # fmt: skip
        else:
            y, h_n = self._forward_layers(packed.data, hx, weights, backend, batch, varlen or varlen_of(packed))
        if packed.unsorted_indices is not None:
            h_n = h_n.index_select(1, packed.unsorted_indices)
        return PackedSequence(y, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices), h_n

    @not_compiled("the number of rows at each step of a ragged batch is data")
    def _forward_padded(
        self, input: Tensor | PackedSequence, hx: Tensor | None, lengths: Tensor | Sequence[int]
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        if isinstance(input, PackedSequence):
            raise TypeError("lengths: expected None beside a PackedSequence, which has its own")
        if input.dim() != 3:
            raise ValueError(f"lengths: expected 3-D input beside them, got {input.dim()}-D")
        batch, steps = input.shape[:2] if self.batch_first else (input.shape[1], input.shape[0])
        if writes_onnx():
            weights = self._weights()
            self._check(input, hx, weights, batch)
            lengths = torch.as_tensor(lengths, device=input.device)
            return self._forward_layers(
                input, hx, weights, "onnx", batch, batch_first=self.batch_first, lengths=lengths
            )
        lengths = checked_lengths(lengths, steps, batch)
        if batch == 0:
            return self.forward(input, hx)
        if torch.jit.is_tracing():
            # Recorded operator by operator; `pack` reads the lengths, which a trace would keep.
            packed = pack_padded_sequence(input, lengths, self.batch_first, enforce_sorted=False)
            y, h_n = self._forward_packed(packed, hx)
            return pad_packed_sequence(y, self.batch_first, total_length=steps)[0], h_n
        packed, index = pack(input, lengths, self.batch_first)
        y, h_n = self._forward_packed(packed, hx)
        return unpack(y, index, input.shape[:2]), h_n
