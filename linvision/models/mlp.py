"""timm's MLP, whose training on a CPU takes oneDNN's products where they can be had."""

from typing import Any

import timm.layers
import torch
from timm.layers import use_fused_attn
from torch import Tensor

from linvision.streaming import cpu_kernels


class Mlp(timm.layers.Mlp):
    """timm's `Mlp`: fc2(GELU(fc1(x))); on a CPU that learns in fp32, the same function by faster products.

    Made while timm's fused attention is off, it keeps to plain operators, as attention does.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fused = use_fused_attn()

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, D) -> (B, n, D)."""
        if not torch.jit.is_scripting():
            if self.fused and cpu_kernels.learns_faster(self, x):
                return cpu_kernels.learning_mlp(self, x)
        x = self.norm(self.drop1(self.act(self.fc1(x))))
        return self.drop2(self.fc2(x))


cpu_kernels.EQUATIONS.append(Mlp.forward)
