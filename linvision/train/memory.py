"""Memory: how much is in use, and what to change where it does not suffice."""

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

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
        share = recipe.share(processes.count)
        part = next((n for n in range(2, share + 1) if share % n == 0), 0)
        ways = []
        if part and not recipe.model_args.get('head_norm'):
            ways.append(f'--accumulate {part * recipe.accumulate} (the same batch in smaller parts)')
        chunks = recipe.chunk_size not in ('auto', 0) or recipe.model_args.get('chunk_size')
        if not chunks and not recipe.model_args.get('token_norm'):
            ways.append('--chunk-size 8192 (blocks in pieces, each computed again)')
        if not recipe.grad_checkpointing:
            ways.append('--grad-checkpointing')
        ways.append('a smaller --batch-size or --eval-batch-size')
        raise MemoryError(
            f'Memory does not suffice for {share} images at a time {where()}; {peak_memory_gib(processes.device):.1f} '
            f'GiB were in use at most. Try, in this order: {"; ".join(ways)}. All but the batch size leave the run '
            'what it is: it goes on from its last checkpoint.'
        ) from error
