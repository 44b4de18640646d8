"""A little locality: a depth-wise convolution of the tokens on their grid.

Two places use it: beside attention in a block (`local_size`), and as a conditional position embedding
(arXiv 2102.10882) in `position.py`. Its cost is linear in N. On a finer grid than its own the kernel is dilated, so
that it spans the same part of the image and means what it meant when it was trained.
"""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn


class LocalPath(nn.Module):
    """Depth-wise convolution of the tokens on their grid, zero-padded at the border.

    Args:
        dim: Width D of the tokens.
        size: Side of the kernel, odd.
        grid: The kernel's own token grid; on one that is r times as fine, taps are round(r) tokens apart. (0, 0):
            it has none, and taps are neighbours.
        num_prefix_tokens: Tokens at the head of the sequence that are not on the grid; their output is zero.
        std: Standard deviation of the initial kernel; zero leaves whatever it is added to as it was.
    """

    def __init__(
        self,
        dim: int,
        size: int,
        grid: tuple[int, int] = (0, 0),
        num_prefix_tokens: int = 0,
        std: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if size < 1 or size % 2 == 0:
            raise ValueError(f'The kernel of the local path must have an odd side, got {size}.')
        self.grid = grid
        self.num_prefix_tokens = num_prefix_tokens
        self.std = std
        self.weight = nn.Parameter(torch.empty(dim, 1, size, size, device=device, dtype=dtype))
        self.init_weights()

    def init_weights(self) -> None:
        if self.std > 0.0:
            trunc_normal_(self.weight, std=self.std)
        else:
            nn.init.zeros_(self.weight)

    def step(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Tokens between two taps, down and across."""
        return spacing(grid[0], self.grid[0]), spacing(grid[1], self.grid[1])

    def reach(self, grid: tuple[int, int]) -> int:
        """Rows of the token grid above and below a token that its output depends on."""
        return self.weight.shape[-1] // 2 * self.step(grid)[0]

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, P + N, D) -> (B, P + N, D)."""
        P = self.num_prefix_tokens
        out = self.convolve(x[:, P:], grid, self.step(grid))
        return F.pad(out, (0, 0, P, 0)) if P > 0 else out

    def convolve(self, x: Tensor, grid: tuple[int, int], step: tuple[int, int]) -> Tensor:
        """The convolution with taps `step` tokens apart, on whole rows of tokens: (B, N, D) -> (B, N, D)."""
        # Tokens `step` apart are images of their own, on which a dilated kernel is a plain one. PyTorch's dilation is
        # not safe in bf16 on CPUs: torch 2.14 died in the backward pass at 256 × 256 tokens and dilation 16.
        image, half, D = x.unflatten(1, grid), self.weight.shape[-1] // 2, x.shape[-1]  # (B, h, w, D)
        if step[0] == 1 and step[1] == 1:  # a view with channels last, which convolutions take as it is
            out = F.conv2d(image.permute(0, 3, 1, 2), self.weight, padding=half, groups=D)
            return out.permute(0, 2, 3, 1).flatten(1, 2)
        image = F.pad(image, (0, 0, 0, -grid[1] % step[1], 0, -grid[0] % step[0]))
        size = (-(-grid[0] // step[0]), -(-grid[1] // step[1]))
        image = image.unflatten(2, (size[1], step[1])).unflatten(1, (size[0], step[0]))
        image = image.permute(0, 2, 4, 5, 1, 3).flatten(0, 2)  # (B * s_h * s_w, D, h / s_h, w / s_w)
        out = F.conv2d(image, self.weight, padding=half, groups=D)
        out = out.unflatten(0, (-1, step[0], step[1])).permute(0, 4, 1, 5, 2, 3)  # (B, h / s_h, s_h, w / s_w, s_w, D)
        return out.flatten(3, 4).flatten(1, 2)[:, : grid[0], : grid[1]].flatten(1, 2)  # (B, N, D)


def spacing(tokens: int, own: int) -> int:
    """Tokens between two taps of a kernel made for an axis of `own` tokens, on an axis of `tokens`."""
    return max(1, int(tokens / own + 0.5)) if own > 0 else 1
