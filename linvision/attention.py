"""Attention of N queries over K projected rows (arXiv 2006.04768, equation 7):

    head_h = softmax(Q_h (E K_h)ᵀ / √(D/H)) (F V_h),   Q = X W_q + b_q,  K = X W_k + b_k,  V = X W_v + b_v

Notable here:

- Same parameters and names as timm's `Attention` (`qkv`, `proj`, …), so that weights of a plain ViT load as they are.
- E X is computed before the key and value weights; equal to the paper's order, and cheaper (see `projection.py`).
- Prefix tokens (class, registers) bypass E: they join the K projected rows as exact keys and values.
- With K >= N, or `projection='none'`, this is full attention over all tokens.
- An optional local path, a depth-wise convolution of the block's input on the token grid, joins the attention's output
  before the output projection. It starts at zero: a plain Linformer.
"""

from typing import Final

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, use_fused_attn
from torch import Tensor, nn

from linvision.local import LocalPath
from linvision.projection import PROJECTIONS, SHARING


class LinformerAttention(nn.Module):
    """Multi-head attention over K projected rows.

    Args:
        dim: Width D of the tokens.
        num_heads: Number of heads H; divides D.
        qkv_bias: Learn biases of query, key and value.
        qk_norm: Normalise queries and keys by head.
        scale_norm: Normalise the heads' output before the output projection.
        proj_bias: Learn a bias of the output projection.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of the output.
        norm_layer: Norm used by `qk_norm` and `scale_norm`.
        projection: Name of the projection, or 'none' for full attention.
        sharing: How E and F are shared (see `projection.Projection`).
        rows: The K projected rows as a grid (K_h, K_w).
        num_prefix_tokens: Tokens at the head of the sequence that bypass E.
        local_size: Side of the local path's kernel, 0 for none.

    Raises:
        ValueError: `dim` is not divisible by `num_heads`.
    """

    fused_attn: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        projection: str = 'linear',
        sharing: str = 'layerwise',
        rows: tuple[int, int] = (8, 8),
        num_prefix_tokens: int = 0,
        local_size: int = 0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f'The width must be divisible by the number of heads, got {dim} and {num_heads}.')
        dd = {'device': device, 'dtype': dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = use_fused_attn()
        self.rows = rows if projection != 'none' else (0, 0)
        self.num_prefix_tokens = num_prefix_tokens
        self.per_head = sharing == 'none'
        self.matrices = SHARING[sharing]  # 1: E = F; 2: E and F
        self.reduce = PROJECTIONS[projection].reduce if projection != 'none' else no_projection

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.q_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.local = LocalPath(dim, local_size, num_prefix_tokens, **dd) if local_size else nn.Identity()
        self.has_local = local_size > 0
        self.norm = norm_layer(dim, **dd) if scale_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, projection: list[Tensor], grid: tuple[int, int]) -> Tensor:
        """Attend.

        Args:
            x: Normalised block input, (B, P + N, D) with P prefix tokens.
            projection: This layer's tensors from `Projection.forward`.
            grid: Token grid (height, width), N = height * width.

        Returns:
            Output of the attention, (B, P + N, D).
        """
        key, value = self.key_value(x, projection, grid)
        out = self.attend(x, key, value)
        if self.has_local:
            out = out + self.local(x, grid)
        return self.proj_drop(self.proj(self.norm(out)))

    def is_full(self, grid: tuple[int, int]) -> bool:
        """Whether attention runs over all tokens: there is no projection, or it would not shorten this sequence."""
        return self.rows[0] * self.rows[1] == 0 or self.rows[0] * self.rows[1] >= grid[0] * grid[1]

    def key_value(self, x: Tensor, projection: list[Tensor], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Keys and values of the prefix tokens and the K projected rows (of all tokens where K >= N).

        Returns:
            Keys and values, each (B, H, P + K, D/H).
        """
        n = len(projection) // self.matrices
        if self.is_full(grid):
            ones = x.new_ones(x.shape[1])
            key, value = self.linear(x, ones, 1), self.linear(x, ones, 2)
        elif self.per_head:  # every head has its own E: the paper's order, keys and values before the projection
            ones = x.new_ones(x.shape[1])
            key = self.project(self.linear(x, ones, 1), projection[:n], grid)[0]
            value = self.project(self.linear(x, ones, 2), projection[n:], grid)[0]
        else:  # compress first
            rows, sums = self.project(x, projection[:n], grid)
            key = self.linear(rows, sums, 1)
            if self.matrices == 2:
                rows, sums = self.project(x, projection[n:], grid)
            value = self.linear(rows, sums, 2)
        return self.k_norm(key), value

    def project(self, x: Tensor, matrix: list[Tensor], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Prefix tokens as they are, then E x: (..., P + N, D) -> (..., P + K, D), and the row sums of that map."""
        P = self.num_prefix_tokens
        rows, sums = self.reduce(x[..., P:, :], matrix[:-1], grid, self.rows), matrix[-1]
        if P > 0:
            rows = torch.cat([x[..., :P, :].to(rows.dtype), rows], dim=-2)
            sums = F.pad(sums, (P, 0), value=1.0)
        return rows, sums

    def linear(self, x: Tensor, sums: Tensor, part: int) -> Tensor:
        """Query (0), key (1) or value (2) of x by head: (B, n, D) -> (B, H, n, D/H). The row sums scale its bias."""
        D = x.shape[-1]
        out = F.linear(x, self.qkv.weight[part * D : (part + 1) * D])
        if self.qkv.bias is not None:
            out = out + (sums.unsqueeze(-1) * self.qkv.bias[part * D : (part + 1) * D]).to(out.dtype)
        return out.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def attend(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of each token of x over given keys and values: (B, n, D) -> (B, n, D)."""
        D = x.shape[-1]
        bias = self.qkv.bias[:D] if self.qkv.bias is not None else None
        query = F.linear(x, self.qkv.weight[:D], bias)
        query = self.q_norm(query.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2))  # (B, H, n, D/H)
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            out = fused_attention(query, key, value, dropout)
        else:
            attn = (query * self.scale) @ key.transpose(-2, -1)  # (B, H, n, P + K)
            out = self.attn_drop(attn.softmax(dim=-1)) @ value
        return out.transpose(1, 2).flatten(2)


@register_notrace_function
def fused_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """`scaled_dot_product_attention`, but for training on a CPU below fp32.

    There PyTorch's fused backward is slow (2.14, B32 H3 N1024 K64 d32 in bf16 on one core: 152 ms for both passes,
    42 ms written out), and with K rows the N×K array is small.
    """
    if query.is_cpu and query.dtype != torch.float32 and query.dtype != torch.float64 and torch.is_grad_enabled():
        weights = ((query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)).softmax(dim=-1)
        return F.dropout(weights, dropout) @ value
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)


def no_projection(x: Tensor, weight: list[Tensor], grid: tuple[int, int], rows: tuple[int, int]) -> Tensor:
    """The reduction of a model without projection: every token stays a row."""
    return x
