"""timm's MLP, whose training on a CPU takes oneDNN's products where they can be had."""

import timm.layers
import torch
from torch import Tensor

from linvision.streaming import cpu_kernels


class Mlp(timm.layers.Mlp):
    """timm's `Mlp`: fc2(GELU(fc1(x))); on a CPU that learns in fp32, the same function by faster products."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, D) -> (B, n, D)."""
        if not torch.jit.is_scripting():
            if cpu_kernels.learns_faster(self, x):
                return cpu_kernels.learning_mlp(self, x)
        x = self.norm(self.drop1(self.act(self.fc1(x))))
        return self.drop2(self.fc2(x))
