"""The hand-motion forecaster: a bidirectional GRU encoder and a linear pose head."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bigru.kernels.backends import Backend
from bigru.kernels.gru import BiGRU
from bigru.layout import POSE_SIZE


class Encoder(nn.Module):
    """Holds the GRU under the published name, `encoder.core`."""

    def __init__(self, core: BiGRU) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: Tensor) -> Tensor:
        """Returns every step's hidden states, both directions: x (B, T, I) to (B, T, 2H)."""
        return self.core(x)[0]


class HandForecaster(nn.Module):
    """Forecasts as many frames of both hands as it has observed; frame t is read off encoder step t.

    y_t = W LayerNorm([h_t forward, h_t backward]) + b, with dropout before W while training. The parameters' names
    are those of the published state dict: encoder.core.*, pose_head.0.*, pose_head.2.*; a residual network's state dict
    holds `residual` (a 1) too, so that neither's weights load into the other.

    Args:
        input_size: features per frame; 84 for hands alone (see DataConfig.input_size).
        hidden_size: hidden units per direction.
        num_layers: stacked bidirectional layers.
        dropout: probability of dropping a feature before the linear layer; none between the GRU's layers.
        residual: y_t is the displacement from the last observed frame, which is added; a departure from the published.
        backend: which implementation of the GRU serves, as for `BiGRU`.
        precision: products of the recurrence: "fp32" or "tf32".

    Raises:
        ValueError: for sizes below 1 or a dropout outside 0 to 1, as torch.nn.GRU and torch.nn.Dropout raise it.
    """

    def __init__(
        self,
        input_size: int = POSE_SIZE,
        hidden_size: int = 128,
        num_layers: int = 2,
        dropout: float = 0.2,
        *,
        residual: bool = False,
        backend: Backend = "auto",
        precision: Literal["fp32", "tf32"] = "fp32",
    ) -> None:
        super().__init__()
        self.encoder = Encoder(
            BiGRU(input_size, hidden_size, num_layers, batch_first=True, backend=backend, precision=precision)
        )
        self.pose_head = nn.Sequential(
            nn.LayerNorm(2 * hidden_size), nn.Dropout(dropout), nn.Linear(2 * hidden_size, POSE_SIZE)
        )
        self.residual: Tensor | None
        self.register_buffer("residual", torch.ones(()) if residual else None)

    @classmethod
    def load(cls, path: str | Path, *, device: str = "cpu", **options: Any) -> HandForecaster:
        """Reads a trained network, its sizes from the weights' shapes, and puts it into evaluation mode.

        Args:
            path: a run's folder (`runs/latest`: the last one), a .safetensors, or a published .pt or .pth, which is
                read with weights_only=True.
            device: where it is to compute.
            options: `backend` and `precision`, as above.

        Raises:
            CheckpointError: for a file that cannot be read or holds another network.
        """
        from bigru.model.weights import load_forecaster

        return load_forecaster(path, **options).to(device).eval()

    def forward(self, x: Tensor) -> Tensor:
        """Forecasts the frames that follow.

        Args:
            x: observed frames, (B, T, I) float, centred units.

        Returns:
            The T frames after them, (B, T, 84), in the centred units of the observed ones.
        """
        y = self.pose_head(self.encoder(x))
        return y if self.residual is None else y + self.residual * x[:, -1:, :POSE_SIZE]
