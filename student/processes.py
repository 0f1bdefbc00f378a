"""The processes that share each step of a training: one alone, or several that PyTorch joined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


class Processes:
    """One process that trains alone; what is to be summed and gathered is its own.

    Of several, each has a :class:`JoinedProcesses`, and all call the same methods in the same
    order.
    """

    rank = 0
    count = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that keeps what is learnt."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        return values

    def any(self, value: bool) -> bool:  # noqa: FBT001 - as the built-in
        """Return whether something is so for one of them."""
        return any(self.gather(value))

    def gather(self, value: T) -> list[T]:
        """Return what each process has, by rank."""
        return [value]

    def of_first(self, value: T) -> T:
        """Return what the first process has."""
        return value

    def join(self, model: nn.Module) -> nn.Module:
        """Return a module that computes as ``model``, with gradients averaged over processes."""
        return model

    def share_buffers(self, model: nn.Module) -> None:
        """Give a model the buffers, such as running statistics, of the first process's."""

    def share_of(self, items: Sequence[T], size: int) -> list[T]:
        """Return this process's share of what all do in batches of ``size`` for each.

        Every round but the last takes ``count * size`` items; what is left for the last is divided
        evenly. If that is less than one item for each process, nobody does it.
        """
        share: list[T] = []
        for start in range(0, len(items), self.count * size):
            turn = items[start : start + self.count * size]
            least, more = divmod(len(turn), self.count)
            if not least:
                break
            begin = self.rank * least + min(self.rank, more)
            share += turn[begin : begin + least + (self.rank < more)]
        return share


class JoinedProcesses(Processes):
    """A process of several whose default process group PyTorch has initialised."""

    def __init__(self) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def sum(self, values: Tensor) -> Tensor:
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    def gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def of_first(self, value: T) -> T:
        found: list[Any] = [value]
        dist.broadcast_object_list(found, 0)
        first: T = found[0]
        return first

    def share_buffers(self, model: nn.Module) -> None:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)

    def join(self, model: nn.Module) -> nn.Module:
        device = next(model.parameters()).device
        # A loss may leave decoders out. And were it not for that, gradients would be put together
        # anew after the first step of each process: a run that was continued would add them up in
        # another order.
        joined: nn.Module = nn.parallel.DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
        )
        return joined


def synchronise_norms(model: nn.Module) -> None:
    """Have batch norms take their statistics from the clips of all processes, on GPUs."""
    nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
