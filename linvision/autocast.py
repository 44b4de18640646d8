"""The dtype that autocast computes in, and tensors cast to it once."""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that linear layers compute x in: that of autocast, where it is on."""
    if x.is_meta:  # a device that autocast does not know
        return x.dtype
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@torch.fx.wrap
def in_compute_dtype(x: Tensor) -> Tensor:
    """A tensor in the dtype that it is computed in: cast here once, and not by each operation that reads it."""
    if not torch.jit.is_scripting():
        x = x.to(compute_dtype(x))
    return x
