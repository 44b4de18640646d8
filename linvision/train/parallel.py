"""One process or many: what `torchrun` starts, seen as a device, a rank and a few ways to agree.

    python recipes/X.py                          one process
    torchrun --nproc-per-node 8 recipes/X.py     eight; DDP, or FSDP2 with --parallel fsdp

The batch size of a recipe is global: each process takes its share of every batch, and gradients are averaged, so that
the result is that of one process. Small numbers (clocks, signals) are agreed on over gloo, beside NCCL for tensors.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from timm.utils import reduce_tensor
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

PARALLEL = ('ddp', 'fsdp')


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        device: Where it computes.
        rank: Its number, 0 for the one that prints and writes.
        count: How many there are.
    """

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def largest(self, *values: float) -> list[float]:
        """The largest of each value over the processes: what all of them then act on."""
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes."""
        return reduce_tensor(value, self.count) if self.count > 1 else value

    def first(self, function: Callable[[], Any]) -> Any:
        """What a function returns in the first process, which alone calls it; its error is raised in all."""
        result: list[Any] = [None, None]
        if self.main:
            try:
                result[0] = function()
            except Exception as error:
                result[1] = error
        if self.count > 1:
            dist.broadcast_object_list(result, device=torch.device('cpu'))
        if result[1] is not None:
            raise result[1]
        return result[0]

    def union(self, found: set[str]) -> list[str]:
        """All that any process has found, in order."""
        every: list[set[str]] = [set(found)] * self.count
        if self.count > 1:
            dist.all_gather_object(every, set(found))
        return sorted(set().union(*every))

    def wait(self) -> None:
        """Wait for the other processes."""
        self.largest(0.0)

    def shard(self, model: VisionTransformer) -> None:
        """Shard a model's parameters over the processes with FSDP2, block by block."""
        mesh = init_device_mesh(self.device.type, (self.count,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)


@contextmanager
def processes(device: str, parallel: str) -> Iterator[Processes]:
    """Join the other processes of the run, where there are any, and leave them at the end.

    Args:
        device: Name of a torch device; 'auto' is the accelerator, or the CPU.
        parallel: 'ddp' or 'fsdp'.

    Raises:
        ValueError: The device cannot be used.
    """
    where = choose_device(device)
    count = int(os.environ.get('WORLD_SIZE', 1))
    if count == 1 and parallel == 'ddp':
        yield Processes(where)
        return
    backend = (
        'cpu:gloo' if where.type == 'cpu' else f'cpu:gloo,{where.type}:{dist.get_default_backend_for_device(where)}'
    )
    if count == 1:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
        joined = Processes(where)
    else:
        found = init_distributed_device_so(where.type, dist_backend=backend)
        joined = Processes(torch.device(found['device']), found['global_rank'], found['world_size'])
    try:
        yield joined
    except BaseException:
        if count == 1:  # else the others may wait for this one: the launcher ends them
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """The torch device of a name; 'auto' is the accelerator, or the CPU."""
    if name == 'auto':
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device('cpu')
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'The device {name!r} cannot be used here ({str(error).splitlines()[0]}).') from error
    return device
