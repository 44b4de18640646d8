"""`torch.compile` of what blocks have in common: one function for all blocks, and one for all chunks of tokens.

Whole models are compiled for minutes, and dynamo unrolls loops over chunks. Here a function that takes the block as an
argument is compiled at its first call and serves every block: the blocks differ in their weights alone, which are
inputs of the graph. Sizes that change from call to call, those of a batch and of a chunk, are marked, so that the first
graph has them open.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


@cache
def compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """A function, compiled where it is called first."""
    # modes × dtypes × image sizes × drop path are more than dynamo's 8, beyond which it would run plainly
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    return torch.compile(function, backend=backend)


def open_sizes(tensor: Tensor | None, *dims: int) -> Tensor | None:
    """A tensor whose sizes along some axes the graph leaves open; a size of 1 has a graph of its own."""
    if tensor is not None:
        for dim in dims:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensor


def looked_into(*modules: nn.Module) -> bool:
    """Whether something traces the modules, or looks at what is computed inside them, operator by operator."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if torch._C._are_functorch_transforms_active():  # torch.func
        return True
    # FSDP's own hooks look into nothing
    return any(m._forward_hooks or m._forward_pre_hooks for m in modules if not isinstance(m, FSDPModule))
