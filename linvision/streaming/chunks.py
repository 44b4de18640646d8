"""How the tokens of some images are cut into chunks of whole rows of the token grid.

A local path whose taps are s rows apart never mixes row i with row i + 1: each s-th row makes an image of its own, and
chunks are cut from these, so that a chunk's neighbours are few however far it reaches.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from linvision.streaming.parts import Grid, StreamedAttention
from linvision.streaming.rows import Halo, Rows


def row_chunks(
    grid: tuple[int, int], tokens: int, step: int = 1, reach: int = 0, rows: slice | None = None
) -> Iterator[tuple[slice, slice, slice]]:
    """The token grid cut into chunks of whole rows, `step` apart.

    Args:
        grid: Token grid (height, width).
        tokens: Tokens in a chunk; it has one row at least.
        step: Rows from one row of a chunk to the next.
        reach: How many of such rows above and below a chunk reads besides its own.
        rows: The rows to cut, all by default; what a chunk reads may lie beside them.

    Yields:
        A chunk's own rows, the rows that it reads, and which of these are its own.
    """
    start, stop = (rows.start, rows.stop) if rows is not None else (0, grid[0])
    each = max(1, tokens // grid[1])
    for phase in range(start, min(start + step, stop)):
        n, above, below = len(range(phase, stop, step)), phase // step, len(range(phase, grid[0], step))
        for first in range(0, n, each):
            last = min(first + each, n)
            top, bottom = max(-above, first - reach), min(below, last + reach)
            own = slice(phase + first * step, phase + (last - 1) * step + 1, step)
            context = slice(phase + top * step, phase + (bottom - 1) * step + 1, step)
            yield own, context, slice(first - top, last - top)


class Chunk(NamedTuple):
    """Some rows of the token grid, or the prefix.

    Attributes:
        own: The rows whose output it gives, counted in the image; None for the prefix.
        context: The rows that it reads: its own, and those above and below that the local path reaches.
        size: For a local path: rows and width of the context; None for no local path.
        tokens: For a local path: which tokens of the context are its own.
        step: For a local path: tokens from tap to tap, down and across.
    """

    own: slice | None
    context: slice | None
    size: Grid | None = None
    tokens: slice = slice(None)
    step: tuple[int, int] = (1, 1)


class TokenChunks:
    """Tokens (B, P + N, …) of some images in chunks of whole rows of the token grid; the prefix is a chunk of its own.

    Where several processes share an image, the tokens are those of this one's band, and rows are counted in the image.

    Args:
        attention: The attention of the block that they are for: its prefix, band and local path.
        grid: Token grid (height, width).
        size: Tokens of an image in a chunk; it has one row at least.
        valid: Which tokens are not padding, (B, P + N), None for all.
    """

    def __init__(self, attention: StreamedAttention, grid: Grid, size: int, valid: Tensor | None) -> None:
        self.attention, self.grid, self.size, self.valid = attention, grid, size, valid
        self.P, self.band = attention.num_prefix_tokens, attention.band
        self.own = slice(0, grid[0]) if self.band is None else self.band.rows(grid[0])  # the rows that are here

    def rows(self, tokens: Tensor, rows: slice | None) -> Tensor:
        """A view of some of this process's rows, (B, P + N, …) -> (B, rows, width, …); of the prefix for None."""
        if rows is None:
            return tokens[:, : self.P].unsqueeze(1)  # (B, 1, P, …)
        return self.with_halo(tokens).read(rows)

    def with_halo(self, tokens: Tensor, halo: Halo | None = None) -> Rows:
        """This process's rows of tokens (B, P + N, …), and those that it has of its neighbours."""
        return Rows(tokens[:, self.P :].unflatten(1, (-1, self.grid[1])), self.own.start, halo)

    def halo(self, x: Tensor) -> Halo | None:
        """What the local path reads of the neighbours' tokens; None where it reads nothing."""
        local = self.attention.local
        if self.band is None or local is None:
            return None
        return self.band.halo(x[:, self.P :], self.grid, local.rows_needed(self.grid))

    def valid_in(self, rows: slice | None) -> Tensor | None:
        """Which tokens of some rows are not padding: (B, n), None for all, and for the prefix (None)."""
        if self.valid is None or rows is None:
            return None
        return self.valid[:, self.P :].unflatten(1, self.grid)[:, rows].flatten(1)

    def parts(self) -> Iterator[slice]:
        """This process's rows of the token grid in chunks."""
        return (own for own, _, _ in row_chunks(self.grid, self.size, rows=self.own))

    def chunks(self) -> Iterator[Chunk]:
        """The chunks of the token grid, after the prefix where there is one."""
        local = self.attention.local
        if self.P:
            yield Chunk(None, None)
        if local is None:
            yield from (Chunk(own, own) for own in self.parts())
            return
        (down, across), width = local.step(self.grid), self.grid[1]
        for own, context, part in row_chunks(self.grid, self.size, down, local.reach, self.own):
            size = (len(range(context.start, context.stop, context.step)), width)
            yield Chunk(own, context, size, slice(part.start * width, part.stop * width), (1, across))

    def count(self, device: torch.device) -> Tensor:
        """How many tokens an image has, (B, 1, 1) or, where there is no padding, (1, 1, 1)."""
        if self.valid is not None:
            return self.valid.sum(1).view(-1, 1, 1)
        return torch.full((1, 1, 1), math.prod(self.grid), device=device)
