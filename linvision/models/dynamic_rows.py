"""Rows whose weights the tokens give (`projection_kinds.Dynamic`): softmax over tokens of W xᵀ + prior, times x.

The prior −|p − c|² / (2 σ²) of a row for a token at place p is linear in (p², p), down and across. So it joins the dot
product of W and x as more channels, and PyTorch's fused attention computes the rows: no K×N matrix is stored.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def place_scale() -> float:
    """What places are multiplied and queries divided by, so that a narrow prior stays within fp16; for TorchScript."""
    return 256.0


def axis_places(n: int, like: Tensor) -> Tensor:
    """The middles of `n` equal cells of an axis from -1/2 to 1/2, in fp32 at least."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return (torch.arange(n, device=like.device, dtype=dtype) + 0.5) / n - 0.5


def place_queries(prior: Tensor, rows: tuple[int, int], like: Tensor) -> Tensor:
    """What each row asks of a token's place: (..., 4, K_h, K_w) -> (..., K, 4), and more in low precision.

    −(p − c)² / (2 σ²) = −p² / (2 σ²) + p c / σ² + what is the same for all tokens, and has no part in the softmax.
    """
    prior = prior.to(torch.promote_types(prior.dtype, torch.float32))
    down, across, log_down, log_across = prior.flatten(-2).unbind(-2)  # (..., K)
    down = down / rows[0] + axis_places(rows[0], prior).repeat_interleave(rows[1])
    across = across / rows[1] + axis_places(rows[1], prior).repeat(rows[0])
    # σ of a uniform cell is 1 / (√12 n); the floor keeps a narrow prior finite
    sharp_down = 12 * rows[0] ** 2 / place_scale() * torch.exp(-2 * log_down.clamp(min=-3.0))
    sharp_across = 12 * rows[1] ** 2 / place_scale() * torch.exp(-2 * log_across.clamp(min=-3.0))
    query = torch.stack([-0.5 * sharp_down, sharp_down * down, -0.5 * sharp_across, sharp_across * across], dim=-1)
    high, low = halves(query, like)
    return query if low is None else torch.cat([high, high, low, low], dim=-1)


def places(grid: tuple[int, int], like: Tensor) -> Tensor:
    """(y², y, x², x) of every token, from the middle of the image: (h, w, 4), and more in low precision.

    In 16 bits these are too coarse. There each is the sum of two numbers, and so is what a row asks of it: the 16
    products of both add up to the 4 exact ones.
    """
    y = axis_places(grid[0], like).unsqueeze(1).expand(grid)
    x = axis_places(grid[1], like).unsqueeze(0).expand(grid)
    place = place_scale() * torch.stack([y.square(), y, x.square(), x], dim=-1)
    high, low = halves(place, like)
    return place if low is None else torch.cat([high, low, high, low], dim=-1)


def halves(x: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """x as a sum of two numbers that the dtype of `like` has; one where it has x itself, or nearly."""
    if like.element_size() > 2:
        return x, None
    high = x.to(like.dtype).to(x.dtype)
    return high, x - high


def weighted_means(x: Tensor, query: Tensor, place: Tensor, inside: Tensor | None) -> Tensor:
    """softmax(query [x, place]ᵀ) x over the tokens inside, by fused attention: (..., N, D) -> (..., K, D).

    Args:
        x: Tokens; (B, H, N, D) where each head has its queries.
        query: (K, D + C), or (H, K, D + C).
        place: Places of the tokens, (h, w, C).
        inside: Which tokens are not padding, (B, N); None for all.
    """
    place = place.flatten(0, 1)  # (N, C)
    key = torch.cat([x, place.expand(x.shape[:-1] + place.shape[-1:])], dim=-1)  # (..., N, D + C)
    key = key.reshape(-1, query.shape[0] if query.ndim == 3 else 1, key.shape[-2], key.shape[-1])
    query = query.expand(key.shape[0], key.shape[1], -1, -1)
    mask: Tensor | None = None
    if inside is not None:
        mask = inside.unsqueeze(1).unsqueeze(1)  # (B, 1, 1, N)
    # the keys are values too: the kernels want both equally wide
    out = F.scaled_dot_product_attention(query, key, key, attn_mask=mask, scale=1.0)
    return out[..., : x.shape[-1]].reshape(x.shape[:-2] + query.shape[-2:-1] + x.shape[-1:])


def logits(x: Tensor, factors: list[Tensor]) -> Tensor:
    """What `weighted_means` takes the softmax of, in fp32 at least: (..., N, D) -> (..., K, N)."""
    query, place = factors[0].expand(x.shape[:-2] + (-1, -1)), factors[1].flatten(0, 1)  # (..., K, D + C), (N, C)
    with torch.autocast(x.device.type, enabled=False):
        if x.element_size() > 2:
            scores = query @ torch.cat([x, place.expand(x.shape[:-1] + (-1,))], dim=-1).mT
        else:  # the sum of both parts would be rounded to 16 bits
            scores = (query[..., : x.shape[-1]] @ x.mT).float()
            scores += factors[0][..., x.shape[-1] :].float() @ place.float().mT
    if len(factors) > 2:
        inside = factors[2].reshape(len(x), *[1] * (x.ndim - 2), -1)  # (B, ..., 1, N)
        scores = scores.masked_fill_(~inside, float('-inf'))
    return scores
