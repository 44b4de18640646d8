"""A chunk of a streamed block on CPUs without gradients: products, biases, GELU and residuals fused by oneDNN.

`stream.map_tokens` says what is computed; this says it in operators that PyTorch's compiler uses on CPUs
(`torch.ops.mkldnn._linear_pointwise`). They gain in two ways: a bias, an activation or a residual costs no pass of its
own over memory; and in fp32 on AMD's CPUs they reach twice the rate of `F.linear`, which calls MKL (Zen 5, two cores,
torch 2.14: 490 against 230 GFLOP/s). Attention is, for each head, a product with the rows of keys, a softmax and a
product with the rows of values: with a few hundred rows that is faster than PyTorch's fused attention on CPUs.
"""

from functools import cache
from typing import TYPE_CHECKING

import torch
from timm.layers import Mlp
from torch import Tensor, nn

if TYPE_CHECKING:
    from linvision.models.block import LinformerBlock

LONG = 256  # tokens of an image from which products for each head of each image pay
MAX_ROWS = 1024  # up to so many rows of keys the array of weights stays in cache


@cache
def supports(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and this CPU have oneDNN's products in a dtype."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, '_linear_pointwise'):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that linear layers compute x in: that of autocast, where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def applies(block: 'LinformerBlock', x: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether `FusedTokens` can stand for `map_tokens`, where there is no dropout and no drop path."""
    attention, mlp = block.attn, block.mlp
    return (
        x.is_cpu
        and mask is None
        and torch.backends.mkldnn.enabled
        and supports(compute_dtype(x))
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.shape[1] >= LONG
        and key.shape[-2] <= MAX_ROWS
        and isinstance(attention.q_norm, nn.Identity)
        and type(mlp) is Mlp
        and all(type(layer) is nn.Linear for layer in (attention.qkv, attention.proj, mlp.fc1, mlp.fc2))
        and type(mlp.act) is nn.GELU
        and isinstance(mlp.norm, nn.Identity)
    )


class FusedTokens:
    """`map_tokens` of one block and its keys and values, without gradients; weights are cast once for all chunks.

    Args:
        block: The block.
        tokens: Tokens of a chunk, about.
        x: Some of its input, for the dtype.
        key: Keys, (B, H, P + K, D/H).
        value: Values, (B, H, P + K, D/H).
    """

    def __init__(self, block: 'LinformerBlock', tokens: int, x: Tensor, key: Tensor, value: Tensor) -> None:
        attention, D = block.attn, x.shape[-1]
        self.block, self.dtype, self.tokens = block, compute_dtype(x), tokens
        bias = attention.qkv.bias
        d = attention.head_dim
        parts = [slice(i, i + d) for i in range(0, D, d)]  # of each head
        self.query = [self.pack(attention.qkv.weight[s], None if bias is None else bias[s]) for s in parts]
        self.proj, self.fc1, self.fc2 = (
            self.pack(layer.weight, layer.bias) for layer in (attention.proj, block.mlp.fc1, block.mlp.fc2)
        )
        self.key = [[self.pack(k) for k in image] for image in key * attention.scale]
        self.value = [[self.pack(v.T) for v in image] for image in value]

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """A linear layer as oneDNN likes it: its weight (C', C) in blocks, and its bias."""
        weight = torch.ops.mkldnn._reorder_linear_weight(self.cast(weight).contiguous(), self.tokens)
        return weight, None if bias is None else self.cast(bias)

    def cast(self, t: Tensor) -> Tensor:
        """A tensor in the dtype of the products."""
        return t.to(self.dtype)

    def linear(self, x: Tensor, layer: tuple[Tensor, Tensor | None], activation: str = 'none') -> Tensor:
        """A linear layer and what follows it: (B, n, C) -> (B, n, C')."""
        algorithm = self.block.mlp.act.approximate if activation == 'gelu' else ''
        return torch.ops.mkldnn._linear_pointwise(self.cast(x), *layer, activation, [], algorithm)

    def residual(self, x: Tensor, y: Tensor, layer: tuple[Tensor, Tensor | None], scale: nn.Module) -> Tensor:
        """x plus the (scaled) linear layer of y; x is not changed."""
        if isinstance(scale, nn.Identity) and x.dtype == self.dtype:
            return torch.ops.mkldnn._linear_pointwise.binary(self.cast(y), x, *layer, 'add')
        return x + scale(self.linear(y, layer))

    def attend(self, h: Tensor) -> Tensor:
        """Attention before its output projection: (B, n, D) -> (B, n, D)."""
        h, images = self.cast(h), []
        for x, keys, values in zip(h.split(1), self.key, self.value, strict=True):
            heads = []
            for query, key, value in zip(self.query, keys, values, strict=True):
                weights = self.linear(self.linear(x, query), key).softmax(-1)  # (1, n, P + K)
                heads.append(self.linear(weights, value))  # (1, n, D/H)
            images.append(torch.cat(heads, dim=-1))
        return torch.cat(images) if len(images) > 1 else images[0]

    def __call__(self, x: Tensor, h: Tensor, local: Tensor | None) -> Tensor:
        """Attention, MLP and both residuals of some tokens, as `stream.read` gives them."""
        block = self.block
        y = self.attend(h)
        if local is not None:
            y += local
        x = self.residual(x, block.attn.norm(y), self.proj, block.ls1)
        y = self.linear(block.norm2(x), self.fc1, 'gelu')
        return self.residual(x, y, self.fc2, block.ls2)
