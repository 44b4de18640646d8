"""What a model refuses: arguments, image sizes, images and masks that it cannot honour."""

import inspect
from numbers import Integral
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from linvision.models.block import MLPS
from linvision.models.position import POSITIONS
from linvision.nearest import nearest


def check_arguments(
    model: type[VisionTransformer],
    kwargs: dict[str, Any],
    embed_dim: int,
    num_heads: int,
    projection: str,
    local_size: int,
    norms: dict[str, bool],
    pos_embed: str,
    class_token: bool,
) -> None:
    """Raise ValueError or TypeError for arguments of a model that do not exist or do not go together.

    Args:
        model: The model's class; its signature and timm's say which arguments there are.
        kwargs: Arguments that only timm's class names.
        norms: Arguments that are True or False, by name.
    """
    known = {*inspect.signature(VisionTransformer).parameters, *inspect.signature(model).parameters} - {'kwargs'}
    for name in kwargs:
        if name not in known:
            raise TypeError(nearest('model argument', name, known))
    for name in ('block_fn', 'dynamic_img_pad'):
        if kwargs.get(name):
            raise ValueError(f'{name} cannot be chosen: a Linformer ViT has no use for it, got {kwargs[name]!r}.')
    if not isinstance(local_size, int):
        raise ValueError(f'local_size must be a whole number, got {local_size!r}.')
    for name, value in norms.items():
        if not isinstance(value, bool):
            raise ValueError(f'{name} must be True or False, got {value!r}.')
    if kwargs.get('global_pool', 'token') == 'token' and not class_token:
        raise ValueError("global_pool='token' needs a class token; give class_token=True or global_pool='avg'.")
    if pos_embed not in ('', 'none', 'learn', *POSITIONS):
        raise ValueError(nearest('pos_embed', pos_embed, ['none', 'learn', *POSITIONS]))
    if isinstance(kwargs.get('mlp_layer'), str) and kwargs['mlp_layer'] not in MLPS:
        raise ValueError(nearest('mlp_layer', kwargs['mlp_layer'], MLPS))
    if kwargs.get('patch_drop_rate', 0.0) > 0 and (projection != 'none' or local_size):
        raise ValueError(
            f'patch_drop_rate must be 0: E needs every token of the grid, got {kwargs["patch_drop_rate"]}.'
        )
    if kwargs.get('attn_layer'):
        raise ValueError(f"attn_layer cannot be chosen: the attention is Linformer's, got {kwargs['attn_layer']!r}.")
    if embed_dim % num_heads:
        raise ValueError(f'embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}.')


def check_sizes(img_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> None:
    """Raise ValueError where an image does not divide into patches."""
    image, patch = to_2tuple(img_size), to_2tuple(patch_size)
    if not all(isinstance(size, Integral) for size in (*image, *patch)):
        raise ValueError(f'Image size and patch size must be whole numbers, got {image} and {patch}.')
    if any(p < 1 or s < p or s % p for s, p in zip(image, patch, strict=True)):
        raise ValueError(f'The image size must be a multiple of the patch size, got {image} and {patch}.')


def check_image(
    x: Tensor, img_size: tuple[int, int], in_chans: int, patch_size: tuple[int, int], dynamic: bool = False
) -> None:
    """Raise ValueError for images of another size or number of channels than the model's."""
    if dynamic:
        if x.ndim != 4 or x.shape[1] != in_chans or x.shape[2] % patch_size[0] or x.shape[3] % patch_size[1]:
            raise ValueError(
                f'Expected images of shape (B, {in_chans}, height, width) whose sides are multiples of the patch size '
                f'{patch_size}, got {list(x.shape)}.'
            )
    elif x.ndim != 4 or x.shape[1] != in_chans or x.shape[2] != img_size[0] or x.shape[3] != img_size[1]:
        raise ValueError(
            f'Expected images of shape (B, {in_chans}, {img_size[0]}, {img_size[1]}), got {list(x.shape)}. Resize the '
            f'images, call model.set_input_size(img_size=...), or create the model with img_size=... and in_chans=...'
        )


def refuse_mask(attn_mask: Tensor | None, is_causal: bool, key_padding_mask: Tensor | None) -> None:
    """Raise ValueError for masks that attention over projected rows cannot honour."""
    if is_causal:
        raise ValueError('Causal attention is impossible here: every projected row mixes tokens of the whole sequence.')
    if attn_mask is not None:
        raise ValueError(
            'An N×N attn_mask means nothing over K projected rows; for padding, give key_padding_mask, (B, N) and true '
            'for the tokens to ignore.'
        )
    if not torch.jit.is_scripting():
        if key_padding_mask is not None and not isinstance(key_padding_mask, Tensor):
            raise TypeError(
                f'key_padding_mask must be a boolean tensor, (B, N), got {type(key_padding_mask).__name__}.'
            )
