"""Refuses the derivatives that the fused kernels lack: torch.func's transforms, forward mode, second derivatives.

Each would be silently wrong, or fail in a way that says nothing of the way out, which is backend="reference".
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

INSTEAD = 'BiGRU(..., backend="reference") can: it is a plain PyTorch loop, differentiable to any order and in any mode'


def transformed() -> bool:
    """Returns whether the caller runs inside a transform of torch.func: grad, vmap, jvp, jacrev, ..."""
    return torch._C._are_functorch_transforms_active()


def vmapped() -> bool:
    """Returns whether one of those transforms is vmap; not to be asked under a compiler, which cannot tell."""
    if not transformed():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(interpreter.key() == torch._C._functorch.TransformType.Vmap for interpreter in stack)


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Raises RuntimeError inside a transform of torch.func, or where a tensor carries a tangent of forward mode."""
    if transformed():
        raise RuntimeError(f"the fused kernels cannot run inside a transform of torch.func; {INSTEAD}")
    # No level, no tangents: the usual case costs one look. A compiler cannot look for tangents.
    if forward_ad._current_level >= 0 and (
        torch.compiler.is_compiling()
        or any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors if tensor is not None)
    ):
        raise RuntimeError(f"the fused kernels have no forward-mode derivative; {INSTEAD}")


def refuse_second_derivative(*gradients: Tensor | None) -> None:
    """Raises RuntimeError in a backward pass that was asked for a graph of itself, or is given a batch of gradients."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"the fused kernels' gradients cannot be differentiated again, as create_graph=True asks; {INSTEAD}"
        )
    if any(torch._C._functorch.is_legacy_batchedtensor(gradient) for gradient in gradients if gradient is not None):
        raise RuntimeError(f"the fused kernels take no is_grads_batched=True; {INSTEAD}")
