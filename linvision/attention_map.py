"""What a model attends to, as pictures.

Attention runs over K projected rows, not over tokens. A picture needs it back on the token grid: row k of E says with
which (signed) weight each token enters row k, so that the attention a over the rows, lifted by Eᵀ a, says with which
weight each token enters the output. It is signed and does not sum to one: not a probability over tokens. Where rows are
normalised (`row_norm`), it is the weight before that norm.
"""

import torch
from torch import Tensor

from linvision.network import LinformerVisionTransformer
from linvision.reduction import Conv, MaxPool, MeanPool


@torch.no_grad()
def attention_maps(
    model: LinformerVisionTransformer,
    images: Tensor,
    block: int = -1,
    query: tuple[int, int] | None = None,
    per_head: bool = False,
) -> Tensor:
    """Attention of one block on the token grid, of one token or the mean over all, of each head or the mean over all.

    Args:
        model: The model.
        images: Normalised images, (B, C, height, width).
        block: Which block; negative numbers count from the last.
        query: The token that asks, by its place (row, column) on the token grid; by default the mean over all tokens.
        per_head: Keep the heads apart.

    Returns:
        The weight of the value of each token in the output, (B, h, w), or (B, H, h, w) by head; signed.

    Raises:
        IndexError: There is no such block, or no such token.
    """
    grid = model.patch_embed.grid_size
    if query is not None and not (0 <= query[0] < grid[0] and 0 <= query[1] < grid[1]):
        raise IndexError(f'query must lie on the token grid of {grid[0]}×{grid[1]}, got {query}.')
    if not -len(model.blocks) <= block < len(model.blocks):
        raise IndexError(f'block must be one of the {len(model.blocks)} there are, got {block}.')
    attention = model.blocks[block].attn
    captured: list[Tensor] = []
    hook = attention.attn_drop.register_forward_hook(lambda module, args, output: captured.append(output))
    fused, training = attention.fused_attn, model.training
    attention.fused_attn = False
    try:
        model.eval()(images)
    finally:
        hook.remove()
        attention.fused_attn = fused
        model.train(training)
    weights = captured[0]  # (B, H, P + N, P + K)
    P = model.num_prefix_tokens
    if query is None:
        maps = weights[..., P:].mean(dim=2)  # (B, H, K)
    else:
        maps = weights[:, :, P + query[0] * grid[1] + query[1], P:]  # (B, H, K)
    if not attention.is_full(grid):
        _, matrix = projection_matrices(model, block)  # (K, N) or (H, K, N)
        maps = (maps.unsqueeze(-2) @ matrix).squeeze(-2)  # (B, H, N)
    maps = maps.unflatten(-1, grid)
    return maps if per_head else maps.mean(dim=1)


def projection_matrices(model: LinformerVisionTransformer, block: int) -> tuple[Tensor, Tensor]:
    """The matrices that project a block's keys and values, written out: (K, N) each, (H, K, N) with one for each head.

    `conv` and `max_pool` have no such matrices; the mean of each cell stands in for them.
    """
    attention, grid = model.blocks[block].attn, model.patch_embed.grid_size
    like = model.patch_embed.proj.weight
    identity = torch.eye(grid[0] * grid[1], device=like.device, dtype=like.dtype)
    if attention.reduce in (Conv.reduce, MaxPool.reduce):
        means = MeanPool.reduce(identity, MeanPool.factors([], grid, attention.rows, like), grid, attention.rows)
        return means, means
    tensors = model.projection_tensors(like, grid)[block]
    n = len(tensors) // attention.matrices
    key, value = (attention.reduce(identity, part[:-1], grid, attention.rows) for part in (tensors[:n], tensors[-n:]))
    return key, value
