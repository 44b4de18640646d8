"""Position embeddings for long token sequences, whose size does not grow with N·D.

timm's learned table has N·D parameters: 12.6 M for 65,536 tokens at D=192, twice the rest of a tiny model. Here:

- `separable`: one learned table for each image axis, (h + w)·D parameters; a token's embedding is the sum of two rows.
- `conv`: a depth-wise 3×3 convolution of the tokens on their grid (arXiv 2102.10882), 9·D parameters: position comes
  from the zero padding at the border, and from the neighbours.

Where processes share an image, each has the tokens of its `band`; `grid` is that of the image.
"""

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from linvision.models.band import Band
from linvision.models.local_conv import LocalPath
from linvision.models.resize import resize_axis
from linvision.streaming.chunks import row_chunks
from linvision.streaming.rows import Halo, Rows


class SeparablePosition(nn.Module):
    """x + row[i] + column[j] for the token in row i and column j."""

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        local_grid: tuple[int, int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.band: Band | None = None
        self.row = nn.Parameter(torch.empty(1, grid[0], dim, device=device, dtype=dtype))
        self.column = nn.Parameter(torch.empty(1, grid[1], dim, device=device, dtype=dtype))
        self.init_weights()

    def init_weights(self) -> None:
        trunc_normal_(self.row, std=0.02)
        trunc_normal_(self.column, std=0.02)

    reset_parameters = init_weights  # all that timm calls where weight_init is 'skip' or 'reset'

    def set_grid(self, grid: tuple[int, int]) -> None:
        self.row = nn.Parameter(resize_axis(self.row.detach(), grid[0]), requires_grad=self.row.requires_grad)
        self.column = nn.Parameter(resize_axis(self.column.detach(), grid[1]), requires_grad=self.column.requires_grad)

    def forward(self, x: Tensor, grid: tuple[int, int], chunk_size: int = 0) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        row, column = resize_axis(self.row, grid[0]), resize_axis(self.column, grid[1])
        if self.band is not None:
            row = row[:, self.band.rows(grid[0])]
        return x + (row.unsqueeze(2) + column.unsqueeze(1)).flatten(1, 2)


class ConvPosition(nn.Module):
    """x + depth-wise 3×3 convolution of x on the token grid."""

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        local_grid: tuple[int, int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.band: Band | None = None
        self.local = LocalPath(dim, 3, local_grid, std=0.2, device=device, dtype=dtype)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Nothing depends on the grid."""

    def forward(self, x: Tensor, grid: tuple[int, int], chunk_size: int = 0) -> Tensor:
        """(B, N, D) -> (B, N, D); without gradients by chunks of so many tokens, where it is not 0."""
        if not torch.jit.is_scripting():
            if chunk_size > 0 and not torch.is_grad_enabled():
                return self.by_chunks(x, grid, chunk_size)
        halo: Halo | None = None
        if self.band is not None:
            halo = self.band.halo(x, grid, self.local.rows_needed(grid))
        return x + self.local(x, grid, halo)

    @torch.jit.unused
    def by_chunks(self, x: Tensor, grid: tuple[int, int], chunk_size: int) -> Tensor:
        """`forward` without gradients, in less memory."""
        step, own = self.local.step(grid), slice(0, grid[0])
        image, halo = x.unflatten(1, (-1, grid[1])), None  # (B, h, w, D)
        if self.band is not None:
            own, halo = self.band.rows(grid[0]), self.band.halo(x, grid, self.local.rows_needed(grid))
        read, written = Rows(image, own.start, halo), Rows(torch.empty_like(image), own.start)
        for mine, context, part in row_chunks(grid, chunk_size // x.shape[0], step[0], self.local.reach, own):
            rows = read.read(context)
            size = (rows.shape[1], grid[1])
            local = self.local.convolve(rows.flatten(1, 2), size, (1, step[1])).unflatten(1, size)
            written.read(mine).copy_(rows[:, part] + local[:, part])
        return written.parts[0].flatten(1, 2)


POSITIONS: dict[str, type[SeparablePosition] | type[ConvPosition]] = {
    'separable': SeparablePosition,
    'conv': ConvPosition,
}

# a function of another module, which a trace calls as it is
torch.fx.wrap('resize_axis')
