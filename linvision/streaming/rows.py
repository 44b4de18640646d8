"""Rows of the token grid, some of which another process may hold (`models/band.py`)."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Halo(NamedTuple):
    """The rows next to those that a process has.

    Attributes:
        received: First those above, then those below: (rows, B, width, D).
        above: How many of them are above.
    """

    received: Tensor
    above: int


class Rows:
    """Neighbouring rows of the token grid, addressed by their place in the image.

    Args:
        own: The rows that a process has, (B, rows, width, C).
        first: The place of the first of them.
        halo: The rows above and below; None for none.
    """

    def __init__(self, own: Tensor, first: int = 0, halo: Halo | None = None) -> None:
        self.parts, self.first = [own], first
        if halo is not None:
            received = halo.received.transpose(0, 1)  # (B, rows, width, C)
            self.parts = [received[:, : halo.above], own, received[:, halo.above :]]
            self.first -= halo.above

    def pieces(self, rows: slice) -> Iterator[Tensor]:
        """Views of some of the rows, from above to below; those within one tensor are one."""
        first, step = self.first, rows.step or 1
        for part in self.parts:
            start = rows.start if rows.start >= first else first + (rows.start - first) % step
            stop = min(rows.stop, first + part.shape[1])
            if start < stop:
                yield part[:, start - first : stop - first : step]
            first += part.shape[1]

    def read(self, rows: slice) -> Tensor:
        """Some of the rows, (B, rows, width, C): a view where they are within one tensor."""
        pieces = list(self.pieces(rows))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def add(self, rows: slice, values: Tensor) -> None:
        """Add values (B, rows, width, C) to some of the rows, in place."""
        first = 0
        for piece in self.pieces(rows):
            piece += values[:, first : first + piece.shape[1]]
            first += piece.shape[1]
