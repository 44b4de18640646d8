"""The projections E and F of a model (arXiv 2006.04768, section 4): who owns them, shares them and resizes them.

A projection reduces a sequence X (N tokens, D wide) to E X (K rows, D wide). Notable here:

- E is applied to the block's normalised input, before the key and value weights ('compress first'). It is the paper's
  equation 7 exactly, since E (X W + 1 bᵀ) = (E X) W + (E 1) bᵀ: the weights then touch K rows instead of N tokens. The
  row sums E 1 travel beside E for that. `sharing='none'`, where every head has its own E, and rotary keys keep the
  paper's order.
- One `Projection` module, owned by the model, holds all parameters; `forward` gives each layer its tensors, which
  travel to the blocks as arguments. No block owns or shares a parameter of another (safetensors, FSDP2, TorchScript).
- What E is, is said in `projection_kinds.py`: a new kind of projection is a class there, and nothing else.

Symbols: B images, N tokens, K projected rows, D width, H heads. `grid` is the token grid (height, width) with
N = height * width, `rows` the K rows seen as a grid (K_h, K_w) with K = K_h * K_w.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from linvision.models.projection_kinds import PROJECTIONS
from linvision.models.resize import is_open
from linvision.nearest import nearest
from linvision.rules import MANY, Rule, is_whole

SHARING = {'none': 2, 'headwise': 2, 'key_value': 1, 'layerwise': 1}  # matrices per layer: E and F, or E = F
LENGTH = Rule(f'a whole number of at least 1 and at most {MANY:,}', lambda k: is_whole(k, 1, MANY))


def row_grid(proj_len: int) -> tuple[int, int]:
    """The K rows as a grid (K_h, K_w), as near to a square as K's divisors allow.

    Whatever the shape of the images, so that a model means the same at every size.
    """
    k_h = max(k for k in range(1, math.isqrt(proj_len) + 1) if proj_len % k == 0)
    return k_h, proj_len // k_h


def projected_rows(kind: str, sharing: str, proj_len: int | Sequence[int], depth: int) -> list[tuple[int, int]]:
    """The K rows of every layer as grids (K_h, K_w): the one place where K is checked. (0, 0) for full attention.

    Args:
        kind: Name of the projection, or 'none'.
        sharing: How E and F are shared.
        proj_len: K, one number or one a layer.
        depth: Number of layers.

    Raises:
        ValueError: A kind, sharing or K that no projection can have.
    """
    if kind not in (*PROJECTIONS, 'none'):
        raise ValueError(nearest('projection', kind, [*PROJECTIONS, 'none']))
    if sharing not in list(SHARING):  # a list: it may be no text, and have no hash
        raise ValueError(nearest('sharing', sharing, SHARING))
    lengths = list(proj_len) if isinstance(proj_len, Sequence) else [proj_len] * depth
    if not lengths or not all(LENGTH.holds(k) for k in lengths):
        raise ValueError(f'proj_len is the number of projected rows K, {LENGTH.words}, got {proj_len!r}.')
    if len(lengths) != depth:
        raise ValueError(f'proj_len gives {len(lengths)} lengths for {depth} layers; give one number, or one a layer.')
    if sharing == 'layerwise' and len(set(lengths)) > 1:
        raise ValueError(
            f"With sharing='layerwise' all layers share one matrix, so that K cannot differ by layer (got "
            f"proj_len={proj_len}); use sharing='key_value', 'headwise' or 'none'."
        )
    return [(0, 0) if kind == 'none' else row_grid(k) for k in lengths]


class Projection(nn.Module):
    """All projection matrices of a model; the only owner of their parameters.

    Args:
        kind: Name of the projection, a key of `PROJECTIONS`.
        sharing: `layerwise` (one E for all layers, keys and values), `key_value` (one E = F a layer), `headwise` (E and
            F a layer) or `none` (E and F for each head of each layer).
        rows: The K rows of every layer as grids (K_h, K_w), from `projected_rows`.
        grid: Token grid (height, width).
        num_heads: Number of heads.
        dim: Width D of the tokens.

    Attributes:
        row_grids: The K rows of every set of matrices: one for `layerwise`, else one a layer.
    """

    __jit_unused_properties__ = ['proj_len']

    def __init__(
        self,
        kind: str,
        sharing: str,
        rows: Sequence[tuple[int, int]],
        grid: tuple[int, int],
        num_heads: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kind = PROJECTIONS[kind]
        self.row_grids = list(rows[:1] if sharing == 'layerwise' else rows)
        self.sharing = sharing
        self.grid = grid
        self.depth = len(rows)
        self.matrices = SHARING[sharing]
        self.factors, self.counts = self.kind.factors, self.kind.counts
        heads, dim = ((num_heads,), dim // num_heads) if sharing == 'none' else ((), dim)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(*heads, *shape, device=device, dtype=dtype))
            for own in self.row_grids
            for _ in range(self.matrices)
            for shape in self.kind.shapes(grid, own, dim)
        )
        self.num_weights = len(self.weights) // (len(self.row_grids) * self.matrices)  # of one matrix
        self.init_weights()

    @property
    def proj_len(self) -> list[int]:
        """K of every set of matrices."""
        return [k_h * k_w for k_h, k_w in self.row_grids]

    def indices(self, layer: int) -> range:
        """Which of `weights` are those of one layer alone; none of them, where all layers share."""
        own = 0 if self.sharing == 'layerwise' else self.matrices * self.num_weights
        return range(layer * own, (layer + 1) * own)

    @torch.no_grad()
    def init_weights(self) -> None:
        """From a normal distribution, as wide as the kind says."""
        for weight in self.weights:
            nn.init.normal_(weight, std=self.kind.std(weight.shape))

    reset_parameters = init_weights  # all that timm calls where weight_init is 'skip' or 'reset'

    @torch.no_grad()
    def pool(self) -> None:
        """Let every row be the mean of a cell of the token grid, by area (where K = N: every row one token).

        Cells of `conv` that the border cuts give less than a mean: their kernel counts tokens that are not there.
        """
        for i, rows in enumerate(self.row_grids):
            for j in range(i * self.matrices, (i + 1) * self.matrices):
                own = [self.weights[j * self.num_weights + n] for n in range(self.num_weights)]
                for weight, values in zip(own, self.kind.pooling(self.grid, rows, own[0]) if own else [], strict=True):
                    weight.copy_(values)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> list[list[Tensor]]:
        """The tensors of every layer: the factors of E and its row sums E 1, then those of F unless E = F.

        Args:
            x: Any tensor with the device and dtype of the tokens.
            grid: Token grid; on another than the projection's own, the parameters are resized on the fly.
        """
        weights: list[Tensor] = []
        for weight in self.weights:
            weights.append(weight)
        ones = x.new_ones(grid[0] * grid[1], 1)
        tensors: list[list[Tensor]] = []
        n = self.num_weights
        for layer, rows in enumerate(self.row_grids):
            matrices: list[Tensor] = []
            for i in range(layer * self.matrices, (layer + 1) * self.matrices):
                own = weights[i * n : (i + 1) * n]
                if not torch.jit.is_scripting():
                    if is_open(*grid) or grid != self.grid:
                        own = self.kind.resize(own, grid, rows)
                factors = [factor.to(x.dtype) for factor in self.factors(own, grid, rows, x)]  # once for all layers
                sums = self.counts(ones.to(factors[0].dtype) if len(factors) > 0 else ones, factors, grid, rows)
                matrices.extend(factors)
                matrices.append(sums.squeeze(-1))  # (K) or (H, K)
            tensors.append(matrices)
        return tensors if len(tensors) == self.depth else tensors * self.depth

    def zero(self, x: Tensor) -> Tensor:
        """x, with a (zero) gradient for every matrix: for forward passes that do not use them."""
        for weight in self.weights:
            x = x + (weight.sum() * 0.0).to(x.dtype)
        return x

    def truncate(self, depth: int) -> None:
        """Keep the matrices of the first `depth` layers."""
        self.depth = depth
        if self.sharing != 'layerwise':
            self.row_grids = self.row_grids[:depth]
            self.weights = self.weights[: depth * self.matrices * self.num_weights]

    @torch.no_grad()
    def set_grid(self, grid: tuple[int, int]) -> None:
        """Replace every parameter by itself on another token grid; K and each row's sum stay as they are."""
        if grid == self.grid:
            return
        for i, weight in enumerate(self.resized([w.detach() for w in self.weights], grid)):
            self.weights[i] = nn.Parameter(weight, requires_grad=self.weights[i].requires_grad)
        self.grid = grid

    def resized(self, weights: list[Tensor], grid: tuple[int, int]) -> list[Tensor]:
        """The parameters of such a projection, of whatever grid and K, for `grid` and this projection's rows."""
        out, n = [], self.num_weights
        for i in range(0, len(weights), max(n, 1)):
            out += self.kind.resize(weights[i : i + n], grid, self.row_grids[i // (n * self.matrices)])
        return out

    def adapt(self, state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """What a checkpoint of another grid or K holds for this projection, resized; empty where nothing is to be done.

        Raises:
            ValueError: The checkpoint's projection is of another kind or sharing.
        """
        old = {k: v for k, v in state_dict.items() if k.startswith(prefix + 'weights.')}
        new = {prefix + 'weights.' + str(i): weight for i, weight in enumerate(self.weights)}
        depth = sum(k.endswith('.attn.qkv.weight') for k in state_dict)
        if self.sharing != 'layerwise' and depth > self.depth and len(old) * self.depth == len(new) * depth:
            old = {k: v for k, v in old.items() if k in new}  # this model is pruned, the checkpoint is not
        if not old or {k: v.shape for k, v in old.items()} == {k: v.shape for k, v in new.items()}:
            return {}
        n = self.kind.sized
        if old.keys() != new.keys() or any(
            old[k].ndim != v.ndim or old[k].shape[: v.ndim - n] != v.shape[: v.ndim - n] for k, v in new.items()
        ):
            shapes = [tuple(v.shape) for v in old.values()]
            raise ValueError(
                f"The checkpoint's projection is of another kind or sharing: it holds {len(old)} matrices, first "
                f'{shapes[0]}; this model ({self.extra_repr()}) has {len(new)}, first '
                f'{tuple(self.weights[0].shape) if new else ()}. Create the model with the `projection` and `sharing` '
                'of the checkpoint.'
            )
        return dict(zip(new, self.resized([old[k] for k in new], self.grid), strict=True))

    def extra_repr(self) -> str:
        kind = next(name for name, kind in PROJECTIONS.items() if kind is self.kind)
        return f'projection={kind}, sharing={self.sharing}, proj_len={self.proj_len}, grid={self.grid}'
