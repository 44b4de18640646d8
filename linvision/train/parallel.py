"""One process or many: what `torchrun` starts, seen as a device, a rank and a few ways to agree.

    python recipes/X.py                          one process
    torchrun --nproc-per-node 8 recipes/X.py     eight; DDP, or FSDP2 with --parallel fsdp
    torchrun --nproc-per-node 8 recipes/X.py --parallel sequence --sequence 4      each image over four of them

Processes that share an image (`models/band.py`) stand side by side: of eight with `--sequence 4`, the first four have
one half of a batch, and the others the other. To the data such four are one process.

The batch size of a recipe is global: each process takes its share of every batch, and gradients are averaged, so that
the result is that of one process. Small numbers (clocks, signals) are agreed on over gloo, beside NCCL for tensors.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from timm.utils import reduce_tensor
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from linvision.models.band import band_rows
from linvision.models.linformer_vit import LinformerVisionTransformer


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        device: Where it computes.
        rank: Its number, 0 for the one that prints and writes.
        count: How many there are.
        sequence: How many of them share each image.
    """

    device: torch.device
    rank: int = 0
    count: int = 1
    sequence: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @property
    def share(self) -> int:
        """Which share of a batch is this process's."""
        return self.rank // self.sequence

    @property
    def shares(self) -> int:
        """How many shares a batch has."""
        return self.count // self.sequence

    @cached_property
    def mesh(self) -> DeviceMesh:
        """The processes that share an image with this one."""
        shape, names = (self.shares, self.sequence), ('data', 'sequence')
        return init_device_mesh(self.device.type, shape, mesh_dim_names=names)['sequence']

    def rows(self, img_size: int, patch: int = 1) -> slice:
        """The rows of pixels that this process has of an image."""
        own = band_rows(img_size // patch, self.rank % self.sequence, self.sequence)
        return slice(own.start * patch, own.stop * patch)

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

    def divide(self, model: VisionTransformer) -> None:
        """Let a model take this process's rows of each image, where several share it.

        Raises:
            ValueError: It cannot.
        """
        if self.sequence == 1:
            return
        if not isinstance(model, LinformerVisionTransformer):
            raise ValueError(
                f'Processes can share an image with linformer_vit_* models only, got {type(model).__name__}: leave out '
                '--sequence and --parallel sequence.'
            )
        model.share_images(self.mesh)

    def shard(self, model: VisionTransformer) -> None:
        """Shard a model's parameters over the processes with FSDP2, block by block."""
        mesh = init_device_mesh(self.device.type, (self.count,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)


@contextmanager
def processes(device: str, parallel: str, sequence: int = 0) -> Iterator[Processes]:
    """Join the other processes of the run, where there are any, and leave them at the end.

    Args:
        device: Name of a torch device; 'auto' is the accelerator, or the CPU.
        parallel: 'ddp', 'fsdp' or 'sequence'.
        sequence: How many share each image; 0 for one, or with 'sequence' for all.

    Raises:
        ValueError: The device cannot be used, or there are no such processes to share an image.
    """
    where = choose_device(device)
    count = int(os.environ.get('WORLD_SIZE', 1))
    sequence = sequence or (count if parallel == 'sequence' else 1)
    if count % sequence:
        raise ValueError(
            f'{sequence} processes are to share each image, but {count} cannot be divided so: start a multiple of '
            f'{sequence} (torchrun --nproc-per-node {sequence} …), or say another --sequence.'
        )
    if count == 1 and parallel != 'fsdp':
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
        joined = Processes(torch.device(found['device']), found['global_rank'], found['world_size'], sequence)
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
