"""Memory: how much is in use, and what to change where it does not suffice."""

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from linvision.train.model import can_stream, empty_model, needs_batch
from linvision.train.parallel import Processes
from linvision.train.recipe import Recipe


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: on the accelerator, or the process's resident set on the CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == 'darwin' else 2**20)


@contextmanager
def memory_advice(recipe: Recipe, processes: Processes, where: Callable[[], str]) -> Iterator[None]:
    """Turn torch's errors about memory into a `MemoryError` that names the settings that would help.

    Args:
        recipe: The recipe.
        processes: The processes.
        where: What the run was doing.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        images = recipe.images_at_once(processes.shares)
        parts = next((n for n in range(2, images + 1) if images % n == 0), 0)
        model, ways = empty_model(recipe, {}), []
        if parts and not needs_batch(model):
            ways.append(f'--accumulate {parts * recipe.data.accumulate} (the same batch in smaller parts)')
        if can_stream(model) and model.chunk_size in ('auto', 0):
            ways.append('--chunk-size 8192 (blocks in pieces, each computed again)')
        if not recipe.run.grad_checkpointing:
            ways.append('--grad-checkpointing')
        ways.append('a smaller --batch-size or --eval-batch-size')
        raise MemoryError(
            f'Memory does not suffice for {images} images at a time {where()}; {peak_memory_gib(processes.device):.1f} '
            f'GiB were in use at most. Try, in this order: {"; ".join(ways)}. All but the batch size leave the run '
            'what it is: it goes on from its last checkpoint.'
        ) from error
