"""Projections, position embeddings and whole checkpoints between grids of different size.

Sizes change by area: a cell of the new grid takes from each old cell the share that it covers. For a projection the
columns of that matrix sum to one, so every row of E keeps its sum (a mean stays a mean) although rows are signed and
must never be divided by their sum.
"""

import logging
import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import Tensor

_logger = logging.getLogger(__name__)


def is_open(*sizes: int) -> bool:
    """Whether sizes are open in a graph that is being exported: what is done must not depend on what they are."""
    return any(isinstance(size, torch.SymInt) for size in sizes)


def open_max(a: int, b: int) -> int:
    """The larger of two sizes that may be open."""
    return torch.sym_max(a, b)  # type: ignore[return-value]  # an open size is no int


def area_matrix(old: int, new: int, like: Tensor) -> Tensor:
    """The share of each of `old` equal cells that each of `new` equal cells covers: (new, old), columns sum to one.

    Args:
        old: Number of cells before.
        new: Number of cells after, over the same length.
        like: A tensor that gives device and dtype.
    """
    # in units of 1 / (old · new), exact without fp64, which MPS lacks
    edges_old = torch.arange(old + 1, device=like.device, dtype=torch.int32) * new
    edges_new = torch.arange(new + 1, device=like.device, dtype=torch.int32) * old
    upper = torch.minimum(edges_new[1:, None], edges_old[None, 1:])
    lower = torch.maximum(edges_new[:-1, None], edges_old[None, :-1])
    return (upper - lower).clamp(min=0).to(like.dtype) / new


def resize_rows(E: Tensor, rows: int) -> Tensor:
    """Another number of rows (K, N) -> (rows, N): each new row is the mean of the old rows that it covers."""
    if E.shape[-2] == rows:
        return E
    return area_matrix(E.shape[-2], rows, E) * (rows / E.shape[-2]) @ E


def resize_axis(table: Tensor, length: int) -> Tensor:
    """A table of positions along one image axis (1, n, D) -> (1, length, D), interpolated linearly."""
    if not is_open(length) and table.shape[1] == length:
        return table
    channels = table.transpose(1, 2).to(torch.promote_types(table.dtype, torch.float32))  # (1, D, n)
    return F.interpolate(channels, size=length, mode='linear').transpose(1, 2).to(table.dtype).contiguous()


def resized_state(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """What a checkpoint of another image size, patch size or K must be changed to, to fit a Linformer ViT.

    Args:
        state_dict: The checkpoint.
        model: The model that it is for.

    Returns:
        The entries that change: patch embedding, table of positions, positions by axis, projection.

    Raises:
        ValueError: The checkpoint's projection is of another kind or sharing, or its token grid cannot be known.
    """
    own, changed = model.state_dict(), {}
    if model.projection is not None:
        changed.update(model.projection.adapt(state_dict, 'projection.'))
    kernel = {k: v for k, v in state_dict.items() if k == 'patch_embed.proj.weight' and v.shape[2:] != own[k].shape[2:]}
    changed.update(vit_checkpoint_filter_fn(kernel, model))
    for name in ('position.row', 'position.column'):
        if name in state_dict and name in own:
            changed[name] = resize_axis(state_dict[name], own[name].shape[1])
    changed = {k: v for k, v in changed.items() if v.shape != state_dict[k].shape}
    if 'pos_embed' in state_dict and 'pos_embed' in own:
        table = resized_table(state_dict['pos_embed'], model, grid_of(state_dict, model))
        if table is not state_dict['pos_embed']:
            changed['pos_embed'] = table
    if changed:
        _logger.info(f'Resized from the checkpoint to {tuple(model.patch_embed.img_size)} images: {", ".join(changed)}')
    return changed


def grid_of(state_dict: dict[str, Tensor], model: Any) -> tuple[int, ...]:
    """The token grid of a checkpoint as its E has it; empty where E has none, or not one of all its positions."""
    projection = getattr(model, 'projection', None)  # a plain ViT has none
    if projection is None:
        return ()
    names = [f'projection.weights.{i}' for i in range(projection.num_weights)]
    if not names or any(name not in state_dict for name in ('pos_embed', *names)):
        return ()
    grid = projection.kind.grid([state_dict[name] for name in names])
    return tuple(grid) if math.prod(grid) == state_dict['pos_embed'].shape[1] - prefix_positions(model) else ()


def prefix_positions(model: VisionTransformer) -> int:
    """How many entries of a ViT's table of positions are not of the token grid."""
    return 0 if model.no_embed_class else model.num_prefix_tokens


def resized_table(table: Tensor, model: VisionTransformer, grid: tuple[int, ...] = ()) -> Tensor:
    """A table of positions of token grid `grid` on that of a model; (1, P + N, D).

    Args:
        table: The table.
        model: The model.
        grid: Its token grid; empty where it is not known: that of the model, or else a square.

    Raises:
        ValueError: A grid that is not known is not square.
    """
    prefix, new = prefix_positions(model), tuple(model.patch_embed.grid_size)
    N = table.shape[1] - prefix
    if not grid and N == math.prod(new):
        return table
    side = math.isqrt(N)
    if not grid and side * side != N:
        raise ValueError(
            f'The checkpoint has {N} positions, which are no square, on a token grid that it does not tell; the model '
            f"has {new}. Load it into a model made with the checkpoint's img_size, and call set_input_size."
        )
    old = tuple(grid or (side, side))
    if old == new:
        return table
    # the form that does not take two grids for one because they have as many tokens
    image = resample_abs_pos_embed_nhwc(table[:, prefix:].unflatten(1, old), list(new))
    return torch.cat([table[:, :prefix], image.flatten(1, 2)], dim=1)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: VisionTransformer) -> dict[str, Tensor]:
    """Checkpoints of Linformer ViTs of any size, and of plain ViTs, for a Linformer ViT; timm calls it.

    A plain ViT has no projection: the model's own, as initialised, takes its place, and a warning says so. Sizes are
    changed where the state is loaded (`linformer_vit.resize_on_load`): E and the positions together, on E's token grid.
    """
    own = state_dict.get('model', state_dict)
    own = own.get('state_dict', own)
    if grid_of(own, model):
        return own
    state_dict = vit_checkpoint_filter_fn(state_dict, model)
    missing = {k: v for k, v in model.state_dict().items() if k.startswith('projection.') and k not in state_dict}
    if missing and not any(k.startswith('projection.') for k in state_dict):
        _logger.warning('The checkpoint has no projection: it stays as initialised, and wants training.')
        state_dict.update(missing)
    return state_dict
