"""How low-rank attention is (arXiv 2006.04768, figure 1), for any plain ViT and any image size.

Of an attention matrix P = softmax(Q Kᵀ / √(D/H)), N×N, the best matrix of rank K keeps the K largest singular values.
Notable here:

- Two shares: of the sum of singular values (the paper's figure), and of the sum of their squares, `energy`, which says
  how near the best P_K comes: ‖P − P_K‖² = (1 − energy) ‖P‖² in the Frobenius norm.
- Short sequences are decomposed exactly. Longer ones by randomised subspace iteration (arXiv 0909.4061, algorithm 4.4)
  from products with P and Pᵀ, a chunk of queries at a time: no N×N matrix is ever stored. ‖P‖² is exact in both.
- The same share for what a projection makes of P: softmax(Q (E K)ᵀ / √(D/H)) E is of rank K too, and cannot be nearer.
- Prefix tokens (class, registers) are left out of the matrix, as E leaves them out: it is that of the image's tokens.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from linvision.analysis.attention_map import projection_matrices
from linvision.analysis.watched import watched
from linvision.models.attention import LinformerAttention
from linvision.models.linformer_vit import LinformerVisionTransformer
from linvision.models.projection import row_grid
from linvision.models.projection_kinds import Dynamic, Linear

EXACT = 2048  # tokens up to which matrices are decomposed whole
CHUNK_NUMBERS = 2**24  # of P that are in memory at a time
OVERSAMPLING, ITERATIONS = 16, 2  # of the subspace iteration


@dataclass
class Spectrum:
    """Mean over images of what the K largest singular values keep.

    Attributes:
        tokens: N.
        energy: Share of the sum of squares that the first 1, 2, … singular values hold, (layers, H, R).
        cumulative: Share of the sum, (layers, H, N), as in the paper; None where only the largest are known.
        projected: Share of P that a projection keeps, 1 − ‖P − P̃‖² / ‖P‖², (layers, H); None without one. It is
            negative where P̃ is further from P than nothing is.
        num_samples: Images.
    """

    tokens: int
    energy: Tensor
    cumulative: Tensor | None
    projected: Tensor | None
    num_samples: int

    def lengths(self, loss: float) -> list[int]:
        """The smallest K of each layer that loses at most `loss` of the energy, mean over heads: what `proj_len` takes.

        Raises:
            ValueError: So little is not lost with as many singular values as are known.
        """
        kept = self.energy.mean(1)  # (layers, R)
        enough = kept >= 1 - loss - 1e-9  # what rounding leaves of a whole
        if not enough.any(1).all():
            raise ValueError(
                f'The first {kept.shape[1]} singular values lose up to {1 - kept[:, -1].min().item():.3f} of the '
                f'energy, more than {loss}. Ask for more of them, or allow more.'
            )
        return (enough.int().argmax(1) + 1).tolist()


@torch.no_grad()
def attention_spectrum(
    model: VisionTransformer,
    batches: Iterable[Tensor],
    rank: int = 256,
    projection: Callable[[int, Tensor], tuple[Tensor, Tensor]] | None = None,
    exact: int = EXACT,
    progress: Callable[[int], None] = lambda done: None,
) -> Spectrum:
    """Singular values of the attention of every layer and head, mean over images.

    Args:
        model: A plain timm ViT, or a Linformer ViT with `projection='none'`; for one with a projection, the matrices
            are those that its queries and keys would give without it.
        batches: Images as the model reads them, (B, C, height, width).
        rank: Singular values of sequences longer than `exact`.
        projection: Gives E and F of a layer and of the tokens of an image that it reads, (1, P + N, D): (K, N) or
            (H, K, N), to compare with. `own_projection(model)`, or `pooling(model, K)`.
        exact: Tokens up to which whole matrices are decomposed.
        progress: Told after each layer of each image how many of these are done.

    Raises:
        ValueError: The model's attention is of another kind, or there are no images.
    """
    layers = attention_layers(model)
    total: dict[str, list[Tensor]] = {}
    count = tokens = done = 0
    for images in batches:
        for layer, (query, key, x) in enumerate(queries_and_keys(model, layers, images)):
            tokens = query.shape[-2]
            for q, k, own in zip(query, key, x.split(1), strict=True):  # (H, N, D/H), and (1, P + N, D)
                found = exact_shares(q, k) if tokens <= exact else randomised_shares(q, k, min(rank, tokens))
                if projection is not None:
                    found['projected'] = projected_share(q, k, *projection(layer, own))
                for name, value in found.items():
                    sums = total.setdefault(name, [])
                    if len(sums) == layer:
                        sums.append(torch.zeros_like(value))
                    sums[layer] += value
                done += 1
                progress(done)
        count += len(images)
    if not count:
        raise ValueError('There are no images to look at: batches is empty.')
    mean = {name: torch.stack(sums).cpu() / count for name, sums in total.items()}
    return Spectrum(tokens, mean['energy'], mean.get('cumulative'), mean.get('projected'), count)


def attention_layers(model: nn.Module) -> list[Any]:
    """The attention of every block.

    Raises:
        ValueError: There are none, or they have no queries and keys to look at.
    """
    layers = [block.attn for block in getattr(model, 'blocks', ()) if hasattr(block, 'attn')]
    if not layers or any(type(layer) not in (Attention, LinformerAttention) for layer in layers):
        kinds = sorted({type(layer).__name__ for layer in layers}) or ['none']
        raise ValueError(
            f'{type(model).__name__} has no attention that can be looked into: plain ViTs (vit_*, deit_*, and '
            f'linformer_vit_*) can, this is {", ".join(kinds)}.'
        )
    if any(getattr(layer, 'rotary', False) for layer in layers):
        raise ValueError('The spectrum is of attention without rotary positions, and this model has them.')
    return layers


def queries_and_keys(
    model: VisionTransformer, layers: list[Any], images: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries (scaled) and keys of every layer, of the image's tokens alone, in fp32 at least: (B, H, N, D/H) each.

    Third is what they were made of, with the prefix tokens: (B, P + N, D).
    """
    for layer, (x, _) in zip(layers, watched(model, layers, images), strict=True):
        both = layer.qkv(x[:, model.num_prefix_tokens :]).unflatten(-1, (3, layer.num_heads, -1))  # (B, N, 3, H, D/H)
        query, key, _ = both.permute(2, 0, 3, 1, 4)
        dtype = torch.promote_types(x.dtype, torch.float32)  # there is no decomposition below
        yield layer.q_norm(query).to(dtype) * layer.scale, layer.k_norm(key).to(dtype), x


def double(x: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (x.cpu() if x.device.type == 'mps' else x).double()


def exact_shares(query: Tensor, key: Tensor) -> dict[str, Tensor]:
    """Shares from all singular values of each head, (H, N)."""
    values = torch.linalg.svdvals(double((query @ key.transpose(-1, -2)).softmax(-1)))
    squares = values.square()
    return {
        'energy': squares.cumsum(-1) / squares.sum(-1, keepdim=True),
        'cumulative': values.cumsum(-1) / values.sum(-1, keepdim=True),
    }


def randomised_shares(query: Tensor, key: Tensor, rank: int) -> dict[str, Tensor]:
    """Shares from the largest singular values of each head, (H, rank), by subspace iteration."""
    attention = Chunks(query, key)
    size = len(query), key.shape[-2], min(rank + OVERSAMPLING, key.shape[-2])
    start = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=query.dtype).to(query.device)
    basis = torch.linalg.qr(attention.times(start)).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(attention.times(torch.linalg.qr(attention.transposed_times(basis)).Q)).Q
    values = torch.linalg.svdvals(double(attention.transposed_times(basis)))[:, :rank]
    return {'energy': values.square().cumsum(-1) / attention.square_norm().unsqueeze(-1)}


class Chunks:
    """An attention matrix of each head that is never stored whole.

    Args:
        query: Scaled queries, (H, N, D/H).
        key: Keys, (H, N, D/H).
    """

    def __init__(self, query: Tensor, key: Tensor) -> None:
        self.query, self.key = query, key
        self.step = max(1, CHUNK_NUMBERS // (key.shape[0] * key.shape[1]))

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        """Some rows of P at a time, (H, n, N)."""
        for first in range(0, self.query.shape[1], self.step):
            part = slice(first, first + self.step)
            yield part, (self.query[:, part] @ self.key.transpose(-1, -2)).softmax(-1)

    def times(self, x: Tensor) -> Tensor:
        """P x, (H, N, r) -> (H, N, r)."""
        return torch.cat([rows @ x for _, rows in self.rows()], dim=1)

    def transposed_times(self, x: Tensor) -> Tensor:
        """Pᵀ x, (H, N, r) -> (H, N, r)."""
        total = torch.zeros_like(x)
        for part, rows in self.rows():
            total += rows.transpose(-1, -2) @ x[:, part]
        return total

    def square_norm(self) -> Tensor:
        """‖P‖² of each head, (H)."""
        return torch.stack([double(rows).square().sum((-1, -2)) for _, rows in self.rows()]).sum(0)


def projected_share(query: Tensor, key: Tensor, E: Tensor, values: Tensor) -> Tensor:
    """1 − ‖P − P̃‖² / ‖P‖² of each head, (H), with P̃ = softmax(Q (E K)ᵀ) F for E and F = `values`."""
    E, values = (matrix.to(query.dtype).expand(len(query), -1, -1) for matrix in (E, values))  # (H, K, N)
    weights = (query @ (E @ key).transpose(-1, -2)).softmax(-1)  # (H, N, K)
    attention = Chunks(query, key)
    parts = [double(rows - weights[:, part] @ values).square().sum((-1, -2)) for part, rows in attention.rows()]
    return 1 - torch.stack(parts).sum(0) / attention.square_norm()


def own_projection(model: LinformerVisionTransformer) -> Callable[[int, Tensor], tuple[Tensor, Tensor]]:
    """E and F of a model's layers, as they are before any norm of the rows."""

    def matrices(layer: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        E, F = projection_matrices(model, layer, tokens)
        return (E[0], F[0]) if model.blocks[layer].attn.kind is Dynamic else (E, F)

    return matrices


def pooling(model: VisionTransformer, proj_len: int) -> Callable[[int, Tensor], tuple[Tensor, Tensor]]:
    """E = F that pools by area, as `convert.from_vit` starts with."""
    like = model.patch_embed.proj.weight
    E = Linear.pooling(model.patch_embed.grid_size, row_grid(proj_len), like)[0].flatten(-2)
    return lambda layer, tokens: (E, E)
