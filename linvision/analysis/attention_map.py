"""What a model attends to, as pictures.

Attention runs over K projected rows, not over tokens. A picture needs it back on the token grid: row k of E says with
which (signed) weight each token enters row k, so that the attention a over the rows, lifted by Eᵀ a, says with which
weight each token enters the output. It is signed and does not sum to one: not a probability over tokens. Where rows are
normalised (`row_norm`), it is the weight before that norm.

With `projection='dynamic'` each image has its own E, a function of the block's tokens: it is written out, K×N, here and
nowhere else.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from linvision.analysis.watched import watched
from linvision.models.linformer_vit import LinformerVisionTransformer
from linvision.models.projection_kinds import Conv, Dynamic, MaxPool, MeanPool


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
    grid = tuple(model.patch_embed.grid_size)
    if model.dynamic_img_size:
        grid = tuple(model.patch_embed.dynamic_feat_size(images.shape[-2:]))
    if query is not None and not (0 <= query[0] < grid[0] and 0 <= query[1] < grid[1]):
        raise IndexError(f'query must lie on the token grid of {grid[0]}×{grid[1]}, got {query}.')
    if not -len(model.blocks) <= block < len(model.blocks):
        raise IndexError(f'block must be one of the {len(model.blocks)} there are, got {block}.')
    attention: Any = model.blocks[block].attn
    P, captured, tokens = model.num_prefix_tokens, [], []

    def capture(module: nn.Module, args: tuple[Tensor, ...], weights: Tensor) -> None:  # (B, H, P + N, P + K)
        rows = weights if query is None else weights[:, :, P + query[0] * grid[1] + query[1], None]
        captured.append(rows[..., P:].mean(dim=2))  # (B, H, K)

    hooks = [attention.attn_drop.register_forward_hook(capture)]
    hooks.append(attention.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0])))
    fused, training = attention.fused_attn, model.training
    attention.fused_attn = False
    try:
        model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
        attention.fused_attn = fused
        model.train(training)
    (maps,) = captured
    if attention.kind is Dynamic and not attention.is_full(grid):
        _, E = matrices_of_tokens(model, block, tokens[0], grid)
        maps = (maps.unsqueeze(-2) @ (E if E.ndim == 4 else E.unsqueeze(1))).squeeze(-2)  # (B, H, N)
    elif not attention.is_full(grid):
        reduce, _, factors = projections(model, block, grid)
        maps = lift(maps.movedim(0, -1), reduce, factors, grid, attention.rows).movedim(-1, 0)  # (B, H, N)
    maps = maps.unflatten(-1, grid)
    return maps if per_head else maps.mean(dim=1)


def projection_matrices(
    model: LinformerVisionTransformer, block: int, tokens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The matrices that project a block's keys and values, written out: (K, N) each, (H, K, N) with one for each head.

    `conv` and `max_pool` have no such matrices; the mean of each cell stands in for them.

    Args:
        model: The model.
        block: Which block.
        tokens: What the block's attention reads, (B, P + N, D), from `tokens_of_images`: `dynamic` has its own matrices
            for each image, (B, K, N) or (B, H, K, N). Without tokens they are those of its prior alone.
    """
    attention, grid = model.blocks[block].attn, model.patch_embed.grid_size
    rows = attention.rows
    if attention.kind is Dynamic:
        return matrices_of_tokens(model, block, tokens, grid)
    reduce, *both = projections(model, block, grid)
    matrices = []
    for factors in both:
        column = reduce(model.patch_embed.proj.weight.new_zeros(grid[0] * grid[1], 1), factors, grid, rows)
        K = column.shape[-2]
        identity = torch.eye(K, device=column.device, dtype=column.dtype).expand(*column.shape[:-2], K, K)
        matrices.append(lift(identity, reduce, factors, grid, rows).mT)
    return matrices[0], matrices[1]


def matrices_of_tokens(
    model: LinformerVisionTransformer, block: int, tokens: Tensor | None, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """`projection_matrices` of a `dynamic` block, on any token grid."""
    attention, (_, E, F) = model.blocks[block].attn, projections(model, block, grid)
    if tokens is None:
        return Dynamic.matrix(None, E), Dynamic.matrix(None, F)
    key = value = tokens[:, model.num_prefix_tokens :]
    if attention.by_head:
        key, value = attention.heads_key_value(key, attention.split_weights(key))
    return Dynamic.matrix(key, E), Dynamic.matrix(value, F)


@torch.no_grad()
def tokens_of_images(model: LinformerVisionTransformer, images: Tensor, block: int) -> Tensor:
    """What a block's attention reads of some images, (B, P + N, D), in eval mode."""
    ((tokens, _),) = watched(model, [model.blocks[block].attn], images)
    return tokens


def difference_between_images(E: Tensor) -> float:
    """How far apart the rows of E are from image to image: 0 where all images have the same, 1 where none overlap.

    The mean over pairs of images and over rows of half the sum of |E − E'| (total variation): with E of (B, …, K, N), B
    at least 2.
    """
    pairs = torch.combinations(torch.arange(len(E)))
    return torch.stack([(E[a] - E[b]).abs().sum(-1).mean() / 2 for a, b in pairs]).mean().item()


@torch.inference_mode(False)  # what `lift` differentiates must be no inference tensor
def projections(
    model: LinformerVisionTransformer, block: int, grid: tuple[int, int]
) -> tuple[Callable[..., Tensor], list[Tensor], list[Tensor]]:
    """A block's `reduce`, and what it takes for the keys and for the values; cell means for `conv` and `max_pool`."""
    attention, like = model.blocks[block].attn, model.patch_embed.proj.weight
    if attention.reduce in (Conv.reduce, MaxPool.reduce):
        means = MeanPool.factors([], grid, attention.rows, like)
        return MeanPool.reduce, means, means
    tensors = model.projection_tensors(like, grid)[block]
    tensors = tensors[:-1] if attention.rotary else tensors
    n = len(tensors) // attention.matrices
    return attention.reduce, tensors[: n - 1], tensors[-n:-1]


def lift(
    weights: Tensor, reduce: Callable[..., Tensor], factors: list[Tensor], grid: tuple[int, int], rows: tuple[int, int]
) -> Tensor:
    """Eᵀ a, as the vector-Jacobian product of E x: (..., K, n) -> (..., N, n). No matrix is written out."""
    with torch.inference_mode(False), torch.enable_grad():
        x = weights.new_zeros(*weights.shape[:-2], grid[0] * grid[1], weights.shape[-1]).requires_grad_()
        projected = reduce(x, factors, grid, rows)
    return torch.autograd.grad(projected, x, weights.to(projected.dtype))[0]
