"""The processes that train one model together on parts of every batch (torch.distributed, as torchrun starts them).

Base, response and outer updates differentiate different parameters by passes that are no plain forward, so gradients
are averaged where every update passes through (`stn_fx.bilevel.apply`), not by hooks of a wrapper around one forward.
Losses are means over a process's own examples; they are weighted by its number of examples, so that the average is the
mean over the whole batch. Perturbations are drawn for the whole batch by every process, which takes its own rows: they
do not depend on the number of processes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from stn_fx.errors import InputError


@dataclass(frozen=True)
class Rows:
    """The rows of the whole batch that this process has: `start` to `stop` of `total`, on one of so many processes."""

    start: int
    stop: int
    total: int
    processes: int = 1

    @property
    def share(self) -> float:
        """What the mean over these examples is multiplied by, so that the average over processes is the mean of all."""
        return (self.stop - self.start) * self.processes / self.total


class Replicas:
    """This process among those that train together; alone where torch.distributed is not initialised.

    Attributes:
        rank: position of this process.
        count: number of processes.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.count = dist.get_world_size() if together else 1

    def rows(self, size: int, device: torch.device) -> Rows:
        """Where this process's examples lie in the whole batch, in the order of the ranks.

        Raises:
            InputError: the whole batch is empty, so its loss has no mean.
        """
        if self.count == 1:
            return _filled(Rows(0, size, size))
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([size], device=device))
        counts = [int(each) for each in sizes]
        start = sum(counts[: self.rank])
        return _filled(Rows(start, start + size, sum(counts), self.count))

    def sums(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Each number added up over all processes."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Average tensors over all processes, in place, in one message for each dtype."""
        if self.count == 1:
            return
        for group in _by_dtype(tensors):
            flat = torch.cat([tensor.flatten() for tensor in group])
            dist.all_reduce(flat)
            _scatter(flat.div_(self.count), group)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the values of the first one, in place, in one message for each dtype."""
        if self.count > 1:
            for group in _by_dtype(tensors):
                flat = torch.cat([tensor.detach().flatten() for tensor in group])
                dist.broadcast(flat, 0)
                _scatter(flat, group)

    def first(self, number: int) -> int:
        """The number of the first process."""
        if self.count == 1:
            return number
        everyone = [number] * self.count
        dist.all_gather_object(everyone, number)
        return everyone[0]

    def common(self, numbers: Iterable[int]) -> set[int]:
        """The numbers that every process has."""
        mine = set(numbers)
        if self.count == 1:
            return mine
        everyone: list[set[int]] = [set() for _ in range(self.count)]
        dist.all_gather_object(everyone, mine)
        return set.intersection(*everyone)


def _by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


@torch.no_grad()
def _scatter(flat: Tensor, tensors: list[Tensor]) -> None:
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def _filled(rows: Rows) -> Rows:
    if rows.total == 0:
        raise InputError("The batch has no examples, so there is no loss to learn from. Let the loader leave it out.")
    return rows
