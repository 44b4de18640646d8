"""A little locality: a depth-wise convolution of the tokens on their grid.

Two places use it: beside attention in a block (`local_size`), and as a conditional position embedding
(arXiv 2102.10882) in `position.py`. Its cost is linear in N. On a finer grid than its own the kernel is dilated, so
that it spans the same part of the image and means what it meant when it was trained.
"""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from linvision.models.resize import is_open, open_max
from linvision.streaming.rows import Halo


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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if size < 1 or size % 2 == 0:
            raise ValueError(f'The kernel of the local path must have an odd side, got {size}.')
        self.grid = grid
        self.num_prefix_tokens = num_prefix_tokens
        self.std = std
        self.reach = size // 2  # taps on either side of a token
        self.weight = nn.Parameter(torch.empty(dim, 1, size, size, device=device, dtype=dtype))
        self.init_weights()

    def init_weights(self) -> None:
        if self.std > 0.0:
            trunc_normal_(self.weight, std=self.std)
        else:
            nn.init.zeros_(self.weight)

    reset_parameters = init_weights  # all that timm calls where weight_init is 'skip' or 'reset'

    def step(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Tokens between two taps, down and across."""
        return spacing(grid[0], self.grid[0]), spacing(grid[1], self.grid[1])

    def forward(self, x: Tensor, grid: tuple[int, int], halo: Halo | None = None) -> Tensor:
        """(B, P + N, D) -> (B, P + N, D); of a band of the grid's rows with the rows above and below it."""
        P, step = self.num_prefix_tokens, self.step(grid)
        tokens = x[:, P:]
        if halo is None:
            out = self.convolve(tokens, grid, step)
        else:
            above, width = halo.above, grid[1]
            received = halo.received.transpose(0, 1).flatten(1, 2)  # (B, rows * width, D)
            tokens = torch.cat([received[:, : above * width], tokens, received[:, above * width :]], dim=1)
            out = self.convolve(tokens, (tokens.shape[1] // width, width), step)
            out = out[:, above * width : above * width + x.shape[1] - P]
        return F.pad(out, (0, 0, P, 0)) if P > 0 else out

    def rows_needed(self, grid: tuple[int, int]) -> int:
        """Rows of the token grid that a token's output reads above and below its own."""
        return self.reach * self.step(grid)[0]

    def convolve(self, x: Tensor, grid: tuple[int, int], step: tuple[int, int]) -> Tensor:
        """The convolution with taps `step` tokens apart, on whole rows of tokens: (B, N, D) -> (B, N, D)."""
        # Rows `step` apart are images of their own, and tokens `step` apart in a row channels of their own: on these
        # a dilated kernel is a plain one. PyTorch's dilation is not safe in bf16 on CPUs: torch 2.14 died in the
        # backward pass at 256 × 256 tokens and dilation 16.
        down, across = step
        if not torch.jit.is_scripting():
            if is_open(down, across):
                return self.sum_of_taps(x.unflatten(1, grid), down, across).flatten(1, 2)
        weight: Tensor = self.weight
        image = x.unflatten(1, grid)  # (B, h, w, D)
        if grid[0] % down or grid[1] % across:
            image = F.pad(image, (0, 0, 0, -grid[1] % across, 0, -grid[0] % down))
        if across > 1:
            image = image.unflatten(2, (-1, across)).flatten(3)  # (B, h, w / across, across * D)
            weight = weight.repeat(across, 1, 1, 1)
        if down > 1:
            image = image.unflatten(1, (-1, down)).transpose(1, 2).flatten(0, 1)  # (B * down, h / down, …)
        image = image.permute(0, 3, 1, 2)  # a view with channels last, which convolutions take as it is
        out = F.conv2d(image, weight, padding=self.reach, groups=weight.shape[0]).permute(0, 2, 3, 1)
        if down > 1:
            out = out.unflatten(0, (-1, down)).transpose(1, 2).flatten(1, 2)
        if across > 1:
            out = out.unflatten(3, (across, x.shape[-1])).flatten(2, 3)  # (B, h, w, D)
        if grid[0] % down or grid[1] % across:
            out = out[:, : grid[0], : grid[1]]
        return out.flatten(1, 2)

    @torch.jit.unused
    def sum_of_taps(self, image: Tensor, down: int, across: int) -> Tensor:
        """The convolution where an exported graph leaves the step open: (B, h, w, D) -> (B, h, w, D)."""
        r, (h, w) = self.reach, image.shape[1:3]
        padded = F.pad(image, (0, 0, r * across, r * across, r * down, r * down))
        taps = self.weight.squeeze(1).permute(1, 2, 0)  # (size, size, D)
        out = torch.zeros_like(image)
        for i in range(2 * r + 1):
            for j in range(2 * r + 1):
                out = out + padded.narrow(1, i * down, h).narrow(2, j * across, w) * taps[i, j]
        return out


def spacing(tokens: int, own: int) -> int:
    """Tokens between two taps of a kernel made for an axis of `own` tokens, on an axis of `tokens`."""
    if own == 0:
        return 1
    steps = (2 * tokens + own) // (2 * own)  # rounded
    if not torch.jit.is_scripting():
        if is_open(tokens):
            return open_max(1, steps)
    return max(1, steps)
