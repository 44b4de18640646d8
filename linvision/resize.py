"""Projections and position embeddings between grids of different size.

Sizes change by area: a cell of the new grid takes from each old cell the share that it covers. For a projection the
columns of that matrix sum to one, so every row of E keeps its sum (a mean stays a mean) although rows are signed and
must never be divided by their sum.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def area_matrix(old: int, new: int, like: Tensor) -> Tensor:
    """The share of each of `old` equal cells that each of `new` equal cells covers: (new, old), columns sum to one.

    Args:
        old: Number of cells before.
        new: Number of cells after, over the same length.
        like: A tensor that gives device and dtype.
    """
    edges_old = torch.arange(old + 1, device=like.device, dtype=torch.float64) / old
    edges_new = torch.arange(new + 1, device=like.device, dtype=torch.float64) / new
    upper = torch.minimum(edges_new[1:, None], edges_old[None, 1:])
    lower = torch.maximum(edges_new[:-1, None], edges_old[None, :-1])
    return ((upper - lower).clamp(min=0) * old).to(like.dtype)


def resize_rows(E: Tensor, rows: int) -> Tensor:
    """Another number of rows (K, N) -> (rows, N): each new row is the mean of the old rows that it covers."""
    if E.shape[-2] == rows:
        return E
    return area_matrix(E.shape[-2], rows, E) * (rows / E.shape[-2]) @ E


def resize_axis(table: Tensor, length: int) -> Tensor:
    """A table of positions along one image axis (1, n, D) -> (1, length, D), interpolated linearly."""
    if table.shape[1] == length:
        return table
    return (
        F.interpolate(table.transpose(1, 2).float(), size=length, mode='linear')
        .transpose(1, 2)
        .to(table.dtype)
        .contiguous()
    )
