"""Projections, position embeddings and whole checkpoints between grids of different size.

Sizes change by area: a cell of the new grid takes from each old cell the share that it covers. For a projection the
columns of that matrix sum to one, so every row of E keeps its sum (a mean stays a mean) although rows are signed and
must never be divided by their sum.
"""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import Tensor, nn

_logger = logging.getLogger(__name__)


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
        F.interpolate(table.transpose(1, 2).double(), size=length, mode='linear')
        .transpose(1, 2)
        .to(table.dtype)
        .contiguous()
    )


def resized_state(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of another image size, patch size or K must be changed to, to fit a Linformer ViT.

    Args:
        state_dict: The checkpoint.
        model: The model that it is for.

    Returns:
        The entries that change: patch embedding, table of positions, positions by axis, projection.

    Raises:
        ValueError: The checkpoint's projection is of another kind or sharing.
    """
    own = model.state_dict()
    stem = {k: state_dict[k] for k in ('patch_embed.proj.weight', 'pos_embed') if k in state_dict and k in own}
    changed = {}
    if any(v.shape[2:] != own[k].shape[2:] or v.ndim == 3 and v.shape != own[k].shape for k, v in stem.items()):
        changed = {k: v for k, v in vit_checkpoint_filter_fn(stem, model).items() if k in stem}
    for name in ('position.row', 'position.column'):
        if name in state_dict and name in own:
            changed[name] = resize_axis(state_dict[name], own[name].shape[1])
    if model.projection is not None:
        changed.update(model.projection.adapt(state_dict, 'projection.'))
    changed = {k: v for k, v in changed.items() if v.shape != state_dict[k].shape}
    if changed:
        _logger.info(f'Resized from the checkpoint to {tuple(model.patch_embed.img_size)} images: {", ".join(changed)}')
    return changed


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Checkpoints of Linformer ViTs of any size, and of plain ViTs, for a Linformer ViT; timm calls it.

    A plain ViT has no projection: the model's own, as initialised, takes its place, and a warning says so. Sizes are
    changed where the state is loaded (`network.resize_on_load`).
    """
    state_dict = vit_checkpoint_filter_fn(state_dict, model)
    missing = {k: v for k, v in model.state_dict().items() if k.startswith('projection.') and k not in state_dict}
    if missing and not any(k.startswith('projection.') for k in state_dict):
        _logger.warning('The checkpoint has no projection: it stays as initialised, and wants training.')
        state_dict.update(missing)
    return state_dict
