"""The dtype that a model computes in: that of autocast, cast to once; and fp32 where a processor only emulates bf16.

Where a module of a model calls `in_compute_dtype`, it calls `torch.fx.wrap('in_compute_dtype')` too.
"""

from typing import Any

import torch
from torch import Tensor, nn

from linvision.compiled import looked_into
from linvision.reweighted import reweighted

# torch's names of what multiplies in bf16; the last is ARM's
CPU_BF16 = ('amx_bf16', 'avx512_bf16', 'sve_bf16', 'bf16')


def cpu_bf16() -> str:
    """What this processor multiplies bf16 with, '' where it has no instructions for it."""
    found = [name for name in CPU_BF16 if torch.cpu.get_capabilities().get(name)]
    return found[0] if found else ''


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that linear layers compute x in: that of autocast, where it is on."""
    if x.is_meta:  # a device that autocast does not know
        return x.dtype
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def in_compute_dtype(x: Tensor) -> Tensor:
    """A tensor in the dtype that it is computed in: cast here once, and not by each operation that reads it."""
    if not torch.jit.is_scripting():
        x = x.to(compute_dtype(x))
    return x


def computes_in_fp32(model: Any, x: Any) -> bool:
    """Whether a model's images x go through `InFp32`: a processor would emulate bf16, at a tenth of the speed of fp32.

    Not if blocks are checkpointed and weights are in bf16: what is computed again finds weights in bf16.
    """
    return (
        type(x) is Tensor  # no proxy of torch.fx
        and x.is_cpu
        and not looked_into()  # first: compilers do not see what follows
        and compute_dtype(x) == torch.bfloat16
        and not cpu_bf16()
        and not (
            model.grad_checkpointing
            and torch.is_grad_enabled()
            and any(p.dtype == torch.bfloat16 for p in model.parameters())
        )
    )


class InFp32(nn.Module):
    """A method of a model, computed in fp32 whatever the dtype of its weights: the result has the dtype it would have.

    Args:
        model: The model.
        method: The method's name; its first argument are the images.
    """

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        out: Tensor = getattr(self.model, self.method)(x, *args)
        return out

    def compute(self, x: Tensor, *args: Any) -> Tensor:
        """The method's result for images x."""
        dtype = compute_dtype(x)
        every = (*self.named_parameters(), *self.named_buffers())
        weights = {name: tensor.float() for name, tensor in every if tensor.dtype == dtype}
        with torch.autocast('cpu', enabled=False):
            out: Tensor = reweighted(self, weights)(x.float(), *args)
        return out.to(dtype)
