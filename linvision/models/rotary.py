"""Rotary positions (RoPE, arXiv 2104.09864; for images 2403.13298 and DINOv3, 2508.10104), by timm's modules.

Queries and keys are rotated by the position of their token, so that their product depends on how far apart two tokens
are. A rotation cannot be moved past E: E (R K) is not R (E K). So a model with rotary positions keeps the paper's
order, keys and values of all N tokens first, rotated, and then E. What 'compress first' saves is lost for keys and
values; attention over K rows stays. Prefix tokens are not rotated.
"""

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import apply_rot_embed_cat, create_rope_embed
from torch import Tensor, nn

ROPES = ('cat', 'mixed', 'dinov3')  # timm's names of those that images have
OWN_CHANNELS = ('conv', 'dynamic')  # projections whose parameters are as wide as tokens, where keys are split by head


def check_rope(values: Mapping[str, Any]) -> None:
    """Raise ValueError for rotary positions that do not exist, or do not go with a model's other arguments."""
    rope, width = values['rope'], values['embed_dim'] // values['num_heads']
    if not rope:
        return
    if rope.get('rope_type') not in ROPES:
        raise ValueError(f"rope must have a 'rope_type' of {', '.join(ROPES)}, got {dict(rope)!r}.")
    if width % 4:
        raise ValueError(
            f'With rope a head has a multiple of 4 channels, got embed_dim {values["embed_dim"]} and '
            f'num_heads {values["num_heads"]}: {width}.'
        )
    if values['projection'] in OWN_CHANNELS and values['sharing'] != 'none':
        raise ValueError(
            f"With rope keys are projected by head, and projection={values['projection']!r} needs sharing='none', got "
            f'{values["sharing"]!r}.'
        )
    if values.get('patch_drop_rate', 0.0) > 0:
        raise ValueError(f'With rope patch_drop_rate must be 0, got {values["patch_drop_rate"]}.')


def create_rope(rope: Mapping[str, Any], dim: int, depth: int, num_heads: int, **dd: Any) -> nn.Module:
    """timm's module for `rope`, a type and its arguments, for any token grid."""
    arguments = {**rope, **({'depth': depth} if rope['rope_type'] == 'mixed' else {})}
    try:
        return create_rope_embed(dim=dim, num_heads=num_heads, **arguments, **dd)
    except TypeError as error:  # timm's, of an argument that it does not know
        raise ValueError(f'rope must have arguments of timm.layers.create_rope_embed, got {dict(rope)!r}.') from error


def rope_tensors(rope: Any, grid: tuple[int, int], depth: int) -> list[Tensor]:
    """Sines and cosines of every layer: (N, 2 d), or (H, N, 2 d) where heads have their own."""
    tensor = rope.get_embed(shape=list(grid))
    return list(tensor.unbind(0)) if tensor.ndim == 4 else [tensor] * depth


@torch.fx.wrap
def rotated(x: Tensor, rope: Tensor, half: bool) -> Tensor:
    """Queries or keys by head, whose last tokens are rotated, all but the prefix: (B, H, P + N, d)."""
    P = x.shape[-2] - rope.shape[-2]
    tokens = apply_rot_embed_cat(x[..., P:, :], rope, half=half).to(x.dtype)
    return tokens if P == 0 else torch.cat([x[..., :P, :], tokens], dim=-2)
