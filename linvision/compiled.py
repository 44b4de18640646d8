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
import torch.nn.modules.module as registered
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.fsdp import FSDPModule

HOOKS = ('forward_hooks', 'forward_pre_hooks', 'backward_hooks', 'backward_pre_hooks')  # torch's names, of a module


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
    """Whether something traces the modules, or must see their calls: hooks, or a `forward` that replaces their own."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:  # torch.func, forward_ad
        return True
    if any(getattr(registered, f'_global_{kind}') for kind in HOOKS):
        return True
    # FSDP's own hooks look into nothing
    calls = (m.__dict__ for m in modules if not isinstance(m, FSDPModule))
    return any('forward' in own or any(own[f'_{kind}'] for kind in HOOKS) for own in calls)


def dispatched() -> bool:
    """Whether something sees every operator, as `FlopCounterMode` and `FakeTensorMode` do."""
    return torch._C._len_torch_dispatch_stack() > 0
