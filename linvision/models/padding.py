"""Padding of images: a mask over tokens, and what of the model it changes outside the blocks.

A `key_padding_mask` is boolean, (B, N), and true for the tokens to ignore, as in `torch.nn.MultiheadAttention`. Inside
the blocks it travels as its opposite, with the prefix tokens: `valid`, (B, P + N).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def check_padding(key_padding_mask: Tensor, batch: int, grid: tuple[int, int], looks: bool = True) -> None:
    """Raise ValueError for a padding mask that does not fit the tokens, or leaves an image none, if we may look."""
    N = grid[0] * grid[1]
    if key_padding_mask.dtype != torch.bool or list(key_padding_mask.shape) != [batch, N]:
        raise ValueError(
            f'key_padding_mask must be boolean with shape ({batch}, {N}), true for the tokens to ignore, got '
            f'{key_padding_mask.dtype} {list(key_padding_mask.shape)}.'
        )
    if not torch.jit.is_scripting():
        if not looks or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        if key_padding_mask.all(dim=1).any():
            empty = key_padding_mask.all(dim=1).nonzero().flatten().tolist()
            raise ValueError(f'key_padding_mask must leave every image a token, but hides all of images {empty}.')


def padded_pixels(key_padding_mask: Tensor, grid: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """The padding mask of tokens as one of pixels: (B, N) -> (B, 1, height, width)."""
    mask = key_padding_mask.unflatten(1, grid).unsqueeze(1)
    return mask.repeat_interleave(patch_size[0], dim=2).repeat_interleave(patch_size[1], dim=3)


def check_pool(global_pool: str) -> None:
    """Raise ValueError for a pooling that cannot leave out padding."""
    if global_pool not in ('', 'token', 'avg'):
        raise ValueError(f"With a key_padding_mask, global_pool must be 'avg' or 'token', got '{global_pool}'.")


def masked_pool(
    x: Tensor, global_pool: str, num_prefix_tokens: int, key_padding_mask: Tensor, include_prefix: bool = False
) -> Tensor:
    """The pooled tokens of an image without its padding, with its prefix if wished: (B, P + N, D) -> (B, D)."""
    check_pool(global_pool)
    if global_pool == '':
        return x
    if global_pool == 'token':
        return x[:, 0]
    if include_prefix:
        key_padding_mask = F.pad(key_padding_mask, (num_prefix_tokens, 0), value=False)  # (B, P + N)
    else:
        x = x[:, num_prefix_tokens:]
    mean = x.masked_fill(key_padding_mask.unsqueeze(-1), 0.0).mean(dim=1)
    n = key_padding_mask.shape[1]
    return mean * (n / (~key_padding_mask).sum(dim=1, keepdim=True)).to(x.dtype)  # a sum could overflow in fp16
