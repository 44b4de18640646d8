"""From N tokens to K rows: the projections E and F of Linformer (arXiv 2006.04768, section 4).

A projection reduces a sequence X (N tokens, D wide) to E X (K rows, D wide). Notable here:

- E is applied to the block's normalised input, before the key and value weights ('compress first'). It is the paper's
  equation 7 exactly, since E (X W + 1 bᵀ) = (E X) W + (E 1) bᵀ: the weights then touch K rows instead of N tokens. The
  row sums E 1 travel beside E for that. Only `sharing='none'`, where every head has its own E, keeps the paper's order.
- One `Projection` module, owned by the model, holds all parameters; `forward` gives each layer its tensors, which
  travel to the blocks as arguments. No block owns or shares a parameter of another (safetensors, FSDP2, TorchScript).
- To add a projection: write a class like `Linear` below and add it to `PROJECTIONS`. Nothing else needs to change.

Symbols: B images, N tokens, K projected rows, D width, H heads. `grid` is the token grid (height, width) with
N = height * width, `rows` the K rows seen as a grid (K_h, K_w) with K = K_h * K_w.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from linvision.nearest import nearest
from linvision.resize import area_matrix, resize_rows

SHARING = {'none': 2, 'headwise': 2, 'key_value': 1, 'layerwise': 1}  # matrices per layer: E and F, or E = F


class Linear:
    """E is a learned K×N matrix, without structure (the paper's)."""

    @staticmethod
    def factors(grid: tuple[int, int], rows: tuple[int, int]) -> list[tuple[int, ...]]:
        return [(rows[0] * rows[1], grid[0] * grid[1])]

    @staticmethod
    def reduce(x: Tensor, weight: list[Tensor], grid: tuple[int, int], rows: tuple[int, int]) -> Tensor:
        return weight[0] @ x  # (..., K, N) @ (..., N, D) -> (..., K, D)

    @staticmethod
    def resize(weight: list[Tensor], grid: tuple[int, int], new_grid: tuple[int, int], rows, new_rows) -> list[Tensor]:
        E = weight[0].unflatten(-1, grid)  # (..., K, h, w)
        E = area_matrix(grid[0], new_grid[0], E) @ E @ area_matrix(grid[1], new_grid[1], E).T
        return [resize_rows(E.flatten(-2), new_rows[0] * new_rows[1])]


class Separable:
    """E = E_h ⊗ E_w, one small matrix for each image axis: K_h·h + K_w·w parameters instead of K·N."""

    @staticmethod
    def factors(grid: tuple[int, int], rows: tuple[int, int]) -> list[tuple[int, ...]]:
        return [(rows[0], grid[0]), (rows[1], grid[1])]

    @staticmethod
    def reduce(x: Tensor, weight: list[Tensor], grid: tuple[int, int], rows: tuple[int, int]) -> Tensor:
        x = x.unflatten(-2, grid).flatten(-2)  # (..., h, w*D)
        x = weight[0] @ x  # (..., K_h, w*D)
        x = x.unflatten(-1, (grid[1], -1))  # (..., K_h, w, D)
        x = weight[1].unsqueeze(-3) @ x  # (..., K_h, K_w, D)
        return x.flatten(-3, -2)  # (..., K, D)

    @staticmethod
    def resize(weight: list[Tensor], grid: tuple[int, int], new_grid: tuple[int, int], rows, new_rows) -> list[Tensor]:
        return [
            resize_rows(E @ area_matrix(old, new, E).T, new_k)
            for E, old, new, new_k in zip(weight, grid, new_grid, new_rows, strict=True)
        ]


PROJECTIONS = {'linear': Linear, 'separable': Separable}


def row_grid(proj_len: int, grid: tuple[int, int]) -> tuple[int, int]:
    """The K rows as a grid (K_h, K_w) with the shape of the token grid, as nearly as K's divisors allow."""
    divisors = [k for k in range(1, proj_len + 1) if proj_len % k == 0]
    k_h = min(divisors, key=lambda k: abs(math.log(k * k / proj_len * grid[1] / grid[0])))
    return k_h, proj_len // k_h


class Projection(nn.Module):
    """All projection matrices of a model; the only owner of their parameters.

    Args:
        kind: Name of the projection, a key of `PROJECTIONS`.
        sharing: `layerwise` (one E for all layers, keys and values), `key_value` (one E = F a layer), `headwise` (E and
            F a layer) or `none` (E and F for each head of each layer).
        proj_len: K, the number of rows; a sequence gives one K a layer (not with `layerwise`).
        grid: Token grid (height, width).
        depth: Number of layers.
        num_heads: Number of heads.

    Raises:
        ValueError: An unknown kind or sharing, K below 1, or more than one K where all layers share one matrix.
    """

    def __init__(
        self,
        kind: str,
        sharing: str,
        proj_len: int | Sequence[int],
        grid: tuple[int, int],
        depth: int,
        num_heads: int,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_projection(kind, sharing, proj_len, depth)
        self.kind = PROJECTIONS[kind]
        self.sharing = sharing
        self.grid = grid
        self.depth = depth
        lengths = [proj_len] * depth if isinstance(proj_len, int) else list(proj_len)
        self.proj_len = lengths[:1] if sharing == 'layerwise' else lengths
        self.matrices = SHARING[sharing]
        heads = (num_heads,) if sharing == 'none' else ()
        self.reduce = self.kind.reduce
        self.row_grids = [row_grid(k, grid) for k in self.proj_len]
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(*heads, *shape, device=device, dtype=dtype))
            for rows in self.row_grids
            for _ in range(self.matrices)
            for shape in self.kind.factors(grid, rows)
        )
        self.num_factors = len(self.weights) // (len(self.proj_len) * self.matrices)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Each factor from N(0, 1/n) for rows of length n: E X has the scale of X, at every N and K ('gain 1')."""
        for weight in self.weights:
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def forward(self) -> list[list[Tensor]]:
        """The tensors of every layer: the factors of E and its row sums E 1, then those of F unless E = F."""
        tensors: list[list[Tensor]] = []
        layer: list[Tensor] = []
        for weight in self.weights:
            layer.append(weight)
            if (len(layer) + 1) % (self.num_factors + 1) == 0:
                layer.append(self.row_sums(layer[-self.num_factors :], self.row_grids[len(tensors)]))
            if len(layer) == self.matrices * (self.num_factors + 1):
                tensors.append(layer)
                layer = []
        return tensors if len(tensors) == self.depth else tensors * self.depth

    def row_sums(self, factors: list[Tensor], rows: tuple[int, int]) -> Tensor:
        """E 1 of one matrix, (K) or (H, K)."""
        ones = torch.ones(self.grid[0] * self.grid[1], 1, device=factors[0].device, dtype=factors[0].dtype)
        return self.reduce(ones, factors, self.grid, rows).squeeze(-1)

    def zero(self) -> Tensor:
        """Zero, with a (zero) gradient for every matrix: for forward passes that do not use them."""
        total = torch.zeros((), device=self.weights[0].device, dtype=self.weights[0].dtype)
        for weight in self.weights:
            total = total + weight.sum() * 0.0
        return total

    @torch.no_grad()
    def set_grid(self, grid: tuple[int, int]) -> None:
        """Replace every parameter by itself on another token grid; K and each row's sum stay as they are."""
        if grid == self.grid:
            return
        n = self.num_factors
        for i in range(0, len(self.weights), n):
            rows = self.row_grids[i // (n * self.matrices)]
            factors = self.kind.resize([w.detach() for w in self.weights[i : i + n]], self.grid, grid, rows, rows)
            for j, factor in enumerate(factors, start=i):
                self.weights[j] = nn.Parameter(factor, requires_grad=self.weights[j].requires_grad)
        self.grid = grid

    def extra_repr(self) -> str:
        return f'{self.kind.__name__.lower()}, sharing={self.sharing}, proj_len={self.proj_len}, grid={self.grid}'


def check_projection(kind: str, sharing: str, proj_len: int | Sequence[int], depth: int) -> None:
    """Raise ValueError for a kind, sharing or K that no projection can have."""
    if kind not in (*PROJECTIONS, 'none'):
        raise ValueError(nearest('projection', kind, [*PROJECTIONS, 'none']))
    if sharing not in SHARING:
        raise ValueError(nearest('sharing', sharing, SHARING))
    lengths = [proj_len] if isinstance(proj_len, int) else list(proj_len)
    if not lengths or any(not isinstance(k, int) or k < 1 for k in lengths):
        raise ValueError(f'proj_len is the number of projected rows K and must be at least 1, got {proj_len}.')
    if isinstance(proj_len, int):
        return
    if len(lengths) != depth:
        raise ValueError(f'proj_len gives {len(lengths)} lengths for {depth} layers; give one number, or one a layer.')
    if sharing == 'layerwise' and len(set(lengths)) > 1:
        raise ValueError(
            f"sharing='layerwise' has one matrix for all layers, so K cannot differ by layer (got proj_len={lengths}); "
            "use sharing='key_value', 'headwise' or 'none'."
        )
