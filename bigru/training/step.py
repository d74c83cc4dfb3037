"""One training step: forward, loss, backward, clipping, AdamW; the same code eager and in a CUDA graph.

Nothing in it waits for a GPU: its results stay on the device until they are read.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bigru.model.metrics import masked_mse
from bigru.proof.timing import Work, capture_graph

Loss = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""Of prediction, target, present and coordinates, as `masked_mse`."""
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_optimizer(model: nn.Module, lr: float, weight_decay: float, *, capturable: bool = False) -> torch.optim.AdamW:
    """Returns AdamW over a network's parameters, fused on a GPU.

    `capturable` keeps counters and learning rate on the GPU, so that a CUDA graph can hold the step; on a CPU, where
    nothing is captured, it has no effect.
    """
    device = next(model.parameters()).device
    gpu = device.type == "cuda"
    capturable = capturable and gpu
    rate = torch.tensor(lr, device=device) if capturable else lr
    # Fused AdamW on a CPU would do too, but it rounds otherwise than the runs on record.
    return torch.optim.AdamW(
        model.parameters(), rate, weight_decay=weight_decay, fused=gpu or None, capturable=capturable
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate from now on, in a captured step too."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class TrainStep:
    """Forward, loss, backward, clipping and the optimiser's step on a batch.

    Args:
        model: the network; changes with every step.
        optimizer: over its parameters.
        grad_clip: largest norm of the gradient.
        amp: "bf16" or "fp16" runs the forward pass under autocast, with a scaled loss for fp16; weights, loss and
            optimiser stay fp32. "none": everything is of the parameters' dtype.
        reduce: what is done to the gradients of a backward pass, in place: summed over several processes, say.
        loss: to be minimised.

    Attributes:
        device: where the model is.
        prediction, loss, norm: of the last step, (B, T, 84), () and (): the gradient's norm before clipping.
            A replayed graph fills the tensors that its capture left here.
        scaler: of the loss; does nothing but for fp16.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        grad_clip: float,
        *,
        amp: str = "none",
        reduce: Callable[[list[Tensor]], None] | None = None,
        loss: Loss = masked_mse,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.device = next(model.parameters()).device
        self.prediction = self.loss = self.norm = torch.empty(0)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        self._grad_clip = grad_clip
        self._amp_dtype = AMP_DTYPES.get(amp)
        self._reduce = reduce
        self._loss = loss

    def __call__(
        self, x: Tensor, target: Tensor, present: Tensor | None = None, coordinates: Tensor | None = None
    ) -> Tensor:
        """Learns from a batch and returns the prediction.

        Args:
            x: (B, T, I) observed frames.
            target: (B, T, 84) the frames that followed.
            present: (B, T, 42) bool; every joint counts without it.
            coordinates: () how many coordinates the squared error is averaged over: those of all processes' shares of
                the batch; default: those of this one.
        """
        with self._autocast():
            prediction: Tensor = self.model(x)
        if self._amp_dtype is not None:
            prediction = prediction.float()
        loss = self._loss(prediction, target, present, coordinates)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self._reduce is not None:
            self._reduce([parameter.grad for parameter in self.model.parameters() if parameter.grad is not None])
        self.scaler.unscale_(self.optimizer)
        self.norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._grad_clip).detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.prediction, self.loss = prediction.detach(), loss.detach()
        return prediction

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._amp_dtype is None:
            return nullcontext()
        # No cache: a captured step has to cast the weights anew with every replay.
        return torch.autocast(self.device.type, self._amp_dtype, cache_enabled=False)


Capture = Callable[[Work, torch.device], Work]


def capture_training(work: Work, step: TrainStep, capture: Capture = capture_graph) -> Work:
    """Captures work that trains; weights, optimiser and random state are then as if it had not been warmed up.

    They are put back in place, since the graph holds their addresses.
    """
    weights = [parameter.detach().clone() for parameter in step.model.parameters()]
    states = step.optimizer.state
    before = {
        parameter: {name: tensor.clone() for name, tensor in state.items()} for parameter, state in states.items()
    }
    random_state = get_random_state(step.device)
    replay = capture(work, step.device)
    with torch.no_grad():
        for parameter, weight in zip(step.model.parameters(), weights, strict=True):
            parameter.copy_(weight)
        for key, state in states.items():
            for name, tensor in state.items():
                # AdamW begins with zeros: means, and counts of steps.
                old = before.get(key, {}).get(name)
                tensor.zero_() if old is None else tensor.copy_(old)
    set_random_state(random_state, step.device)
    return replay


def get_random_state(device: torch.device) -> Tensor:
    """Returns the state of torch's generators for the CPU and, behind it, for that GPU: bytes, on the CPU."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Restores what `get_random_state` returned; a part of it for another kind of device is left out."""
    size = torch.get_rng_state().numel()
    torch.set_rng_state(state[:size].clone())
    if device.type == "cuda" and state.numel() > size:
        torch.cuda.set_rng_state(state[size:].clone(), device)
