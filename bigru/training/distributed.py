"""The processes that train one network, as torchrun starts them, and their collective operations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bigru.command import CommandError
from bigru.config import ConfigError

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for another one: longer than the first takes to read the data."""

Value = TypeVar("Value")


class LostProcessError(CommandError, RuntimeError):
    """Another process of the run has ended, or has not answered in time."""

    code = 1


@dataclass(frozen=True)
class Team:
    """The processes of a run. With one process every collective returns its argument."""

    rank: int = 0
    """This process's number; only the first, 0, writes and prints."""
    size: int = 1
    local_rank: int = 0
    """This process's number on its machine."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, name: str, gpus: int | None = None) -> str:
        """Returns the name of this process's device: `auto` and `cuda` mean a GPU of its own.

        `name` is as given on the command line, `gpus` how many this machine has; default: as PyTorch finds.

        Raises:
            ConfigError: a numbered GPU for several processes, or fewer GPUs than processes on this machine.
        """
        if self.size > 1 and name.startswith("cuda:"):
            raise ConfigError(
                f"device: expected auto, cuda or cpu for {self.size} processes, which take a GPU each, got {name}"
            )
        gpus = torch.cuda.device_count() if gpus is None else gpus
        if self.size == 1 or name not in ("auto", "cuda") or not gpus:
            return name
        # Those of all processes here are asked for in each of them, since only the first says what is wrong.
        wanted = max(self.local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        if wanted > gpus:
            raise ConfigError(f"device: expected a GPU for each process on this machine, got {gpus} for {wanted}")
        return f"cuda:{self.local_rank}"

    def share(self, count: int) -> slice:
        """Returns which of `count` items in a row are this process's; the processes' counts differ by one at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def all_reduce_gradients(self, gradients: list[Tensor]) -> None:
        """Replaces every gradient by its sum over all processes, to the bit the same in each.

        One message does for all: the published network's gradients are 1.9 MB, so that there is nothing to overlap.
        """
        # Not by DistributedDataParallel: its buckets are laid out anew after the first step, so that a resumed run of
        # three processes would sum in another order; and freed last, as at an interruption, it holds Python's lock
        # while it joins gloo's threads, one of which may wait for that lock.
        summed = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(summed)
        for gradient, part in zip(gradients, summed.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Returns the sum over all processes, to the bit the same in each."""
        if self.size == 1:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, number: int) -> int:
        """Returns the largest of all processes' numbers, which the CPUs exchange: no GPU waits for it."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Returns every process's tensor, all of one shape and on the CPU, by rank."""
        if self.size == 1:
            return [tensor]
        tensors = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(tensors, tensor)
        return tensors

    def broadcast(self, value: Value | None) -> Value:
        """Returns the first process's value in all of them."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, device=torch.device("cpu"))
        assert values[0] is not None
        return values[0]

    def first_then_others(self, work: Callable[[], Value]) -> Value:
        """Does work in the first process, and after it in the others, which find the files that it left.

        Where the first fails the others do too: the processes stay in step, whatever is done about the error.
        """
        if not self.first:
            failed = self.all_reduce_max(0)
            result = work()
            if failed:
                raise LostProcessError("the first process of this run failed where this one did not")
            return result
        try:
            result = work()
        except Exception:
            self.all_reduce_max(1)
            raise
        self.all_reduce_max(0)
        return result


def current_team() -> Team:
    """Returns the processes that this one has joined; one alone where it has not."""
    if not dist.is_initialized():
        return Team()
    return Team(dist.get_rank(), dist.get_world_size(), _local_rank())


@contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that torchrun started for as long as the block runs, if it did start several.

    Raises:
        LostProcessError: another process ended or did not answer in `TIMEOUT`, here or in the block.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    # Tensors on a GPU go through NCCL; what the CPUs agree on does not make a GPU wait.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available() and _local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(_local_rank())
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
        yield
    except RuntimeError as error:
        # Gloo raises plain RuntimeErrors, which name its source files.
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise LostProcessError(
            f"another process of this run has ended, or has not answered in "
            f"{TIMEOUT.seconds // 60} minutes: {str(error).splitlines()[0]}"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
