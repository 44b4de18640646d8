"""Attention of N queries over K projected rows (arXiv 2006.04768, equation 7):

    head_h = softmax(Q_h (E K_h)ᵀ / √(D/H)) (F V_h),   Q = X W_q + b_q,  K = X W_k + b_k,  V = X W_v + b_v

Notable here:

- Same parameters and names as timm's `Attention` (`qkv`, `proj`, …), so that weights of a plain ViT load as they are.
  `qkv` is never called: its weight and bias are read in parts, those of a wrapper by `wrapped_linear.py`.
- E X is computed before the key and value weights; equal to the paper's order, and cheaper (see `projection.py`).
- Prefix tokens (class, registers) bypass E: they join the K projected rows as exact keys and values.
- With K >= N, or `projection='none'`, this is full attention over all tokens.
- Padded tokens are set to zero before E and the local path, biases included; rows of pooling projections without any
  other token, and padded tokens themselves in full attention, are left out of the softmax.
- Rotary positions (`rotary.py`) keep the paper's order; a gate multiplies the heads' output, token by token.
- An optional local path, a depth-wise convolution of the block's input on the token grid, joins the attention's output
  before the output projection. It starts at zero: a plain Linformer.
"""

from typing import Any, Final

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from torch import Tensor, nn

from linvision.autocast import in_compute_dtype
from linvision.models.band import Band
from linvision.models.local_conv import LocalPath
from linvision.models.projection import SHARING
from linvision.models.projection_kinds import PROJECTIONS
from linvision.models.rotary import rotated
from linvision.models.wrapped_linear import weight_and_bias
from linvision.streaming.parts import Weights
from linvision.streaming.rows import Halo


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
        rows: The K projected rows as a grid (K_h, K_w); (0, 0) for full attention.
        num_prefix_tokens: Tokens at the head of the sequence that bypass E.
        local_size: Side of the local path's kernel, 0 for none.
        local_grid: Token grid that the local path's kernel is made for; (0, 0) for any.
        row_norm: Normalise the K projected rows, as a layer norm without parameters: rows of the block's input before
            the key and value weights, but where the paper's order is kept rows of each head's keys and values.
        rotary: Rotate queries and keys; the layer's sines and cosines come last of its projection tensors.
        rotate_half: In timm's layout 'half', else 'interleaved'.
        gated: Multiply the heads' output by the sigmoid of a linear layer of the block's input.

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
        local_grid: tuple[int, int] = (0, 0),
        row_norm: bool = False,
        rotary: bool = False,
        rotate_half: bool = False,
        gated: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f'The width must be divisible by the number of heads, got {dim} and {num_heads}.')
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = use_fused_attn()
        self.row_norm = row_norm
        self.rows = rows
        self.num_prefix_tokens = num_prefix_tokens
        self.per_head = sharing == 'none'
        self.rotary, self.rotate_half = rotary, rotate_half
        self.by_head = self.per_head or rotary  # keys and values before E, the paper's order
        self.matrices = SHARING[sharing]  # 1: E = F; 2: E and F
        self.kind = PROJECTIONS.get(projection, PROJECTIONS['mean_pool'])  # 'none' is always full and never calls it
        self.reduce, self.counts = self.kind.reduce, self.kind.counts
        self.pools, self.padding = self.kind.pools, self.kind.padding
        self.band: Band | None = None  # this process's part of the image, where several share it

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.q_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.local = LocalPath(dim, local_size, local_grid, num_prefix_tokens, **dd) if local_size else None
        self.norm = norm_layer(dim, **dd) if scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, dim, bias=qkv_bias, **dd) if gated else None
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Tensor, projection: list[Tensor], grid: tuple[int, int], valid: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Where several processes share an image, x are the tokens of this one's `band`, and all else is of the image.

        Args:
            x: Normalised block input, (B, P + N, D) with P prefix tokens.
            projection: This layer's tensors from `Projection.forward`.
            grid: Token grid (height, width), N = height * width.
            valid: Which tokens are not padding, (B, P + N), boolean.

        Returns:
            Output of the attention, (B, P + N, D).
        """
        tokens = x
        local: Tensor | None = None
        halo: Halo | None = None
        if self.local is not None:
            if valid is not None:
                tokens = x.masked_fill(~self.own(valid, grid).unsqueeze(-1), 0.0)
            if self.band is not None:  # on its way while keys and values are made
                halo = self.band.halo(tokens[:, self.num_prefix_tokens :], grid, self.local.rows_needed(grid))
        weights = self.split_weights(x)
        rope: Tensor | None = None
        if self.rotary:
            rope, projection = projection[-1], projection[:-1]
        key, value, mask = self.key_value(x, projection, grid, valid, weights, rope)
        if self.local is not None:
            local = self.local(tokens, grid, halo)
        return self.output(self.query(x, weights, rope), key, value, mask, local, self.opening(x))

    def output(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        local: Tensor | None,
        opening: Tensor | None = None,
    ) -> Tensor:
        """What becomes of each token once keys and values are known: (B, H, n, D/H) -> (B, n, D).

        Args:
            query: Queries of any tokens.
            key: Keys, (B, H, P + K, D/H).
            value: Values, (B, H, P + K, D/H).
            mask: Which of them to attend to, (B, 1, 1, P + K), None for all.
            local: The local path's output for these tokens, (B, n, D).
            opening: How far the gate is open for them, (B, n, D).
        """
        out = self.attend(query, key, value, mask)
        if local is not None:
            out = out + local
        out = self.norm(out)
        if opening is not None:
            out = out * opening
        return self.proj_drop(self.proj(out))

    def opening(self, x: Tensor) -> Tensor | None:
        """How far the gate is open for some tokens, (B, n, D); None without a gate."""
        if self.gate is None:
            return None
        return self.gate(x).sigmoid()

    def is_full(self, grid: tuple[int, int]) -> bool:
        """Whether attention runs over all tokens: there is no projection, or it would not shorten this sequence."""
        return self.rows[0] * self.rows[1] == 0 or self.rows[0] * self.rows[1] >= grid[0] * grid[1]

    def own(self, valid: Tensor, grid: tuple[int, int]) -> Tensor:
        """What is said of all tokens of an image, (B, P + N, ...), of those that this process has."""
        if self.band is not None:
            valid = self.band.tokens(valid, grid, self.num_prefix_tokens)
        return valid

    def split_weights(self, x: Tensor) -> Weights:
        """Weight and bias of the queries, and of keys and values together, in the dtype that x is computed in.

        Raises:
            TypeError: `qkv` is neither an `nn.Linear` nor a wrapper that is linear.
        """
        D = x.shape[-1]
        if torch.jit.is_scripting():
            weight: Tensor = self.qkv.weight
            bias: Tensor | None = self.qkv.bias
        else:
            weight, bias = weight_and_bias(self.qkv, self.num_heads * self.head_dim, x)
        weight = in_compute_dtype(weight)
        if torch.jit.is_scripting():
            query, key_value = weight.split([D, 2 * D])
        else:
            query, key_value = query_and_rest(weight, D)
        if bias is None:
            return Weights(query, key_value, None, None)
        query_bias, key_value_bias = in_compute_dtype(bias).split([D, 2 * D])
        return Weights(query, key_value, query_bias, key_value_bias)

    def query(self, x: Tensor, weights: Weights, rope: Tensor | None = None) -> Tensor:
        """Queries by head, rotated by the sines and cosines of the last tokens: (B, n, D) -> (B, H, n, D/H)."""
        query = F.linear(x, weights.query, weights.query_bias)
        query = self.q_norm(query.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2))
        return query if rope is None else rotated(query, rope, self.rotate_half)

    def key_value(
        self,
        x: Tensor,
        projection: list[Tensor],
        grid: tuple[int, int],
        valid: Tensor | None,
        weights: Weights,
        rope: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of the prefix tokens and the K projected rows (of all tokens where K >= N).

        Returns:
            Keys and values, each (B, H, P + K, D/H), and which of them to attend to, (B, 1, 1, P + K) or None for all.
        """
        n = len(projection) // self.matrices
        mask: Tensor | None = None
        full = self.is_full(grid)
        if not full and not self.by_head:  # compress first
            tokens = x[:, self.num_prefix_tokens :]
            rows = [self.reduce_valid(tokens, projection[: n - 1], grid, valid)]
            if self.matrices == 2:
                rows.append(self.reduce_valid(tokens, projection[n:-1], grid, valid))
            return self.key_value_of_rows(rows, x[:, : self.num_prefix_tokens], projection, grid, valid, weights)
        key, value = self.heads_key_value(x, weights)
        if rope is not None:
            key = rotated(self.k_norm(key), rope, self.rotate_half)
        if not full:  # the paper's order, keys and values before the projection
            key, _, mask = self.project(key, projection[:n], grid, valid)
            value, _, _ = self.project(value, projection[-n:], grid, valid)
        elif valid is not None:
            mask = valid.unsqueeze(1).unsqueeze(1)
        return self.k_norm(key) if rope is None else key, value, mask

    def heads_key_value(self, x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        """Keys (not yet normalised) and values of every token by head: (B, n, D) -> (B, H, n, D/H) each."""
        both = F.linear(x, weights.key_value, weights.key_value_bias)
        key, value = both.unflatten(-1, (2, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        return key, value

    def key_value_of_rows(
        self,
        rows: list[Tensor],
        prefix: Tensor,
        projection: list[Tensor],
        grid: tuple[int, int],
        valid: Tensor | None,
        weights: Weights,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values from projected rows: [E x] or [E x, F x] of (B, K, D), and the prefix tokens (B, P, D)."""
        n = len(projection) // self.matrices
        compressed, sums, mask = self.complete(rows[0], prefix, projection[:n], grid, valid)
        if self.matrices == 1:  # one product for both
            both = self.linear(compressed, sums, weights.key_value, weights.key_value_bias)
            key, value = both.unflatten(-1, (2, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
            return self.k_norm(key), value, mask
        D = compressed.shape[-1]
        parts: list[Tensor] = []
        for i in range(2):
            if i == 1:
                compressed, sums, _ = self.complete(rows[1], prefix, projection[n:], grid, valid)
            bias = weights.key_value_bias
            if bias is not None:
                bias = bias[i * D : (i + 1) * D]
            out = self.linear(compressed, sums, weights.key_value[i * D : (i + 1) * D], bias)
            parts.append(out.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2))
        return self.k_norm(parts[0]), parts[1], mask

    def linear(self, x: Tensor, sums: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values, or both, of projected rows, whose row sums scale the bias: (B, n, D) -> (B, n, C)."""
        out = F.linear(x, weight)
        if bias is None:
            return out
        return out + sums.unsqueeze(-1).to(bias.dtype) @ bias.unsqueeze(0)  # (n, 1) @ (1, C)

    def project(
        self, x: Tensor, matrix: list[Tensor], grid: tuple[int, int], valid: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Prefix tokens as they are, then E x: (..., P + N, D) -> (..., P + K, D); see `complete`."""
        P = self.num_prefix_tokens
        rows = self.reduce_valid(x[..., P:, :], matrix[:-1], grid, valid)
        return self.complete(rows, x[..., :P, :], matrix, grid, valid)

    def reduce_valid(self, x: Tensor, factors: list[Tensor], grid: tuple[int, int], valid: Tensor | None) -> Tensor:
        """E x without the padded tokens: (..., N, D) -> (..., K, D)."""
        if valid is not None:
            padded = ~self.own(valid, grid)[:, self.num_prefix_tokens :].unsqueeze(-1)  # (B, N, 1)
            x = x.masked_fill(padded.unsqueeze(1) if self.by_head else padded, self.padding)
            factors = factors + [~padded.squeeze(-1)]
        if self.band is not None:
            return self.band.reduce(self.kind, x, factors, grid, self.rows)
        return self.reduce(x, factors, grid, self.rows)

    def complete(
        self, rows: Tensor, prefix: Tensor, matrix: list[Tensor], grid: tuple[int, int], valid: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows that count their padding, are normalised if wished, and have the prefix tokens before them.

        Returns:
            The rows, (..., P + K, D), the row sums of that map, (P + K) or (B, P + K), and which rows hold tokens,
            (B, 1, 1, P + K) or None for all.
        """
        P = self.num_prefix_tokens
        factors, sums = matrix[:-1], matrix[-1]
        used: Tensor | None = None
        if valid is not None:
            inside = valid[:, P:].unsqueeze(-1)  # (B, N, 1)
            if self.pools:
                part = self.counts(inside.to(rows.dtype), factors, grid, self.rows)  # (B, K, 1), share of real tokens
                empty = part == 0.0
                used = F.pad(~empty.squeeze(-1), (P, 0), value=True).unsqueeze(1).unsqueeze(1)
                if self.by_head:
                    part, empty = part.unsqueeze(1), empty.unsqueeze(1)
                rows = (rows / part.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)
            elif not self.by_head:
                sums = self.counts(inside.to(sums.dtype), factors, grid, self.rows).squeeze(-1)  # (B, K)
        if self.row_norm:
            rows = F.layer_norm(rows, (rows.shape[-1],))
        if P > 0:
            rows = torch.cat([prefix.to(rows.dtype), rows], dim=-2)
            sums = F.pad(sums, (P, 0), value=1.0)
        return rows, sums, used

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of some queries over given keys and values, where the mask is true: (B, H, n, D/H) -> (B, n, D)."""
        if self.fused_attn:
            out = attention(query, key, value, mask, self.attn_drop.p if self.training else 0.0)
        else:  # so that hooks and traces see the weights
            out = self.attn_drop(attention_weights(query * self.scale, key, mask)) @ value
        return out.transpose(1, 2).flatten(2)


def query_and_rest(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The rows for queries of a weight (3 D, …), and those for keys and values."""
    try:
        first, rest = weight.split([dim, 2 * dim])
    except NotImplementedError:  # by tensors of another class, as torchao's int8; slices cost two kernels more
        first, rest = weight[:dim], weight[dim:]
    return first, rest


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(Q Kᵀ), for scaled queries, where the mask is true: (B, H, n, D/H), … -> (B, H, n, P + K)."""
    weights = query @ key.transpose(-2, -1)
    if mask is not None:
        weights = weights.masked_fill(~mask, float('-inf'))
    return weights.softmax(dim=-1)


@torch.fx.wrap
def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(Q Kᵀ / √(D/H)) V by the faster kernel: PyTorch's fused one, but for few rows below fp32 on a CPU.

    There the fused one is slow: torch 2.14, bf16, B32 H3 N1024 K64 d32 on one core: 152 ms forward and backward, 42 ms
    written out; forward alone B1 H3 N2048 K256 d64 on two cores (Zen 5): twice the time. The array of weights is small.
    (Streamed blocks without gradients on CPUs have kernels of their own: `streaming/cpu_kernels.py`.)
    """
    low = query.dtype != torch.float32 and query.dtype != torch.float64
    if query.is_cpu and low and key.shape[-2] <= 1024:
        return F.dropout(attention_weights(query * query.shape[-1] ** -0.5, key, mask), dropout) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


# functions of another module, which a trace calls as they are
torch.fx.wrap('in_compute_dtype')
torch.fx.wrap('rotated')
