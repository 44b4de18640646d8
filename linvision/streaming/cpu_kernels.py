"""Blocks on CPUs by oneDNN: chunks of a streamed block without gradients, and the MLP of a block that learns.

What is computed is the block's own equation; attention and MLP are replaced by operators that PyTorch's compiler uses
on CPUs (`torch.ops.mkldnn._linear_pointwise`). They gain in two ways: a bias or an activation costs no pass of its own
over memory; and in fp32 on AMD's CPUs they reach twice the rate of `F.linear`, which calls MKL (Zen 5, two cores, torch
2.14: 490 against 230 GFLOP/s). Attention is, for each head, a product with the rows of keys, a softmax and a product
with the rows of values: with a few hundred rows that is faster than PyTorch's fused attention on CPUs with AVX-512.

In training the MLP, which has most of a block's arithmetic, takes the same products forward and for the gradient of its
input; the gradients of its weights stay with MKL, which is faster there.
"""

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from linvision.autocast import compute_dtype
from linvision.compiled import dispatched, looked_into
from linvision.streaming.parts import BlockWith, StreamedBlock

Layer = tuple[Tensor, Tensor | None]  # a packed weight, and a bias
# Tokens of an image from which products for each head of each image pay. Below, they took up to 2.8 times as long as
# PyTorch's attention (pico, 256 tokens, K = 64, fp32, one thread of a Zen 3). A Zen 5 gains from 4,096 tokens on; a Zen
# 3, which has no AVX-512, never does: 1.35 times the whole model's time at 4,096 tokens and equal at 16,384 (D = 192,
# K = 256, two threads).
LONG = 4096 if torch.backends.cpu.get_cpu_capability() == 'AVX512' else sys.maxsize
FUSED_TOKENS = 2048  # images × tokens; below, oneDNN gains little, and a model equals its torch.fx trace to the bit
MAX_ROWS = 1024  # up to so many rows of keys the array of weights stays in cache


# functions that compute fc2(GELU(fc1(x))), to which `models/mlp.py` adds its own: a subclass may compute anything else
EQUATIONS: list[Callable[..., Tensor]] = [Mlp.forward]
# private to PyTorch, which may rename them; without one of them blocks run as they are written
OPERATORS = ('_linear_pointwise', '_reorder_linear_weight', '_is_mkldnn_bf16_supported')


@cache
def supports(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and this CPU have oneDNN's products in a dtype."""
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def applies(block: StreamedBlock, x: Tensor, mask: Tensor | None) -> bool:
    """Whether `fused` can stand for the block, where there is no dropout and no drop path."""
    attention, mlp = block.attn, block.mlp
    return (
        x.is_cpu
        and mask is None
        and bool(torch.backends.mkldnn.enabled)
        and supports(compute_dtype(x))
        and x.dtype in (torch.float32, torch.bfloat16)
        and not dispatched()
        and isinstance(attention.q_norm, nn.Identity)
        and is_plain(mlp)
        and all(is_linear(layer) for layer in (attention.qkv, attention.proj))
    )


def is_plain(mlp: Any) -> bool:
    """Whether an MLP is two linear layers with GELU between them, and nothing else but dropout."""
    return (
        isinstance(mlp, Mlp)
        and type(mlp).forward in EQUATIONS
        and all(is_linear(layer) for layer in (mlp.fc1, mlp.fc2))
        and type(mlp.act) is nn.GELU
        and isinstance(mlp.norm, nn.Identity)
    )


def is_linear(layer: nn.Module) -> bool:
    """Whether it is a linear layer of plain weights: a tensor of another class (torchao's int8) knows no oneDNN."""
    return type(layer) is nn.Linear and all(
        type(p) in (nn.Parameter, Tensor, type(None)) for p in (layer.weight, layer.bias)
    )


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = 'none', algorithm: str = ''
) -> Tensor:
    """oneDNN's linear layer and what follows it, by a weight that is packed or not: (B, n, C) -> (B, n, C')."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)
    return out


class Products:
    """Linear layers as oneDNN likes them, in one dtype.

    Args:
        dtype: The dtype of the products.
        tokens: Tokens of a chunk, about.
    """

    def __init__(self, dtype: torch.dtype, tokens: int) -> None:
        self.dtype, self.tokens = dtype, tokens

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> Layer:
        """A linear layer: its weight (C', C) in blocks, and its bias."""
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(self.dtype).contiguous(), self.tokens)
        return packed, None if bias is None else bias.to(self.dtype)

    def linear(self, x: Tensor, layer: Layer, activation: str = 'none', algorithm: str = '') -> Tensor:
        """A linear layer and what follows it: (B, n, C) -> (B, n, C')."""
        return product(x.to(self.dtype), *layer, activation, algorithm)


class FusedAttention:
    """`LinformerAttention.output` for one block's keys and values, each head a product with their rows.

    Args:
        attention: The attention.
        products: The products.
        key: Keys, (B, H, P + K, D/H).
        value: Values, (B, H, P + K, D/H).
    """

    def __init__(self, attention: Any, products: Products, key: Tensor, value: Tensor) -> None:
        self.attention, self.products = attention, products
        self.norm, self.proj_drop, self.opening = attention.norm, attention.proj_drop, attention.opening
        weight, bias, d = attention.qkv.weight, attention.qkv.bias, key.shape[-1]
        heads = [slice(i * d, (i + 1) * d) for i in range(key.shape[1])]
        self.queries = [products.pack(weight[s], None if bias is None else bias[s]) for s in heads]
        self.key = [[products.pack(k) for k in image] for image in key * attention.scale]
        self.value = [[products.pack(v.T) for v in image] for image in value]
        self.packed_proj = products.pack(attention.proj.weight, attention.proj.bias)

    def proj(self, x: Tensor) -> Tensor:
        """The output projection."""
        return self.products.linear(x, self.packed_proj)

    def query(self, x: Tensor, weights: list[Tensor], rope: None = None) -> Tensor:
        """The tokens as they are: `attend` makes the queries of one head at a time, which stay in cache."""
        return x.to(self.products.dtype)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention over the keys and values that are packed: (B, n, D) -> (B, n, D)."""
        linear, images = self.products.linear, []
        for tokens, keys, values in zip(query.split(1), self.key, self.value, strict=True):
            heads = []
            for q, k, v in zip(self.queries, keys, values, strict=True):
                weights = linear(linear(tokens, q), k).softmax(-1)  # (1, n, P + K)
                heads.append(linear(weights, v))  # (1, n, D/H)
            images.append(torch.cat(heads, dim=-1))
        return torch.cat(images) if len(images) > 1 else images[0]

    def output(self, *tensors: Tensor | None) -> Tensor:
        """The attention's own equation, with the products that are here."""
        equation: Callable[..., Tensor] = type(self.attention).output
        return equation(self, *tensors)


class FusedMlp:
    """timm's `Mlp`, with GELU in the first product."""

    def __init__(self, mlp: Any, products: Products) -> None:
        self.products, self.approximate = products, mlp.act.approximate
        self.fc1, self.fc2 = (products.pack(layer.weight, layer.bias) for layer in (mlp.fc1, mlp.fc2))

    def __call__(self, x: Tensor) -> Tensor:
        """(B, n, D) -> (B, n, D)."""
        hidden = self.products.linear(x, self.fc1, 'gelu', self.approximate)
        return self.products.linear(hidden, self.fc2)


def fused(block: StreamedBlock, tokens: int, x: Tensor, key: Tensor, value: Tensor) -> BlockWith:
    """A block whose MLP is oneDNN's, and attention where images are long; weights are packed once for all chunks.

    Args:
        block: The block.
        tokens: Tokens of a chunk, about.
        x: Some of its input, for the dtype.
        key: Keys, (B, H, P + K, D/H).
        value: Values, (B, H, P + K, D/H).
    """
    products = Products(compute_dtype(x), tokens)
    parts: dict[str, Any] = {'mlp': FusedMlp(block.mlp, products)}
    if x.shape[1] >= LONG and not block.attn.rotary and key.shape[-2] <= MAX_ROWS:
        parts['attn'] = FusedAttention(block.attn, products, key, value)
    return BlockWith(block, **parts)


# ------------------------------------------------------------------------------------------------------------- learning


def learns_faster(mlp: Any, x: Any) -> bool:
    """Whether `learning_mlp` can stand for an MLP of this input, and gains."""
    return (
        type(x) is Tensor  # no proxy of torch.fx, and no subclass
        and x.is_cpu
        and not looked_into(*(m for m in mlp.modules() if m is not mlp))  # first: compilers do not see what follows
        and not dispatched()
        and torch.is_grad_enabled()
        and x.dim() == 3
        and x.shape[0] * x.shape[1] >= FUSED_TOKENS
        and x.dtype == compute_dtype(x) == torch.float32
        and bool(torch.backends.mkldnn.enabled)
        and supports(torch.float32)
        and is_plain(mlp)
        and not (mlp.training and max(mlp.drop1.p, mlp.drop2.p) > 0)
    )


def learning_mlp(mlp: Any, x: Tensor) -> Tensor:
    """fc2(GELU(fc1(x))) with gradients: (B, n, D) -> (B, n, D)."""
    first, second = mlp.fc1, mlp.fc2
    out: Tensor = LearningMlp.apply(x, first.weight, first.bias, second.weight, second.bias, mlp.act.approximate)
    return out


class LearningMlp(torch.autograd.Function):
    """Two linear layers with GELU between them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str
    ) -> Tensor:
        hidden = product(x, w1, b1)
        activated = F.gelu(hidden, approximate=approximate)
        ctx.save_for_backward(x, hidden, activated, w1, w2)
        ctx.approximate = approximate
        return product(activated, w2, b2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, hidden, activated, w1, w2 = ctx.saved_tensors
        grad = grad.contiguous()
        rows = grad.flatten(0, 1)  # (B · n, D)
        of_x, of_w1, of_b1, of_w2, of_b2, _ = ctx.needs_input_grad  # a frozen layer's products are saved
        dw2 = rows.t() @ activated.flatten(0, 1) if of_w2 else None
        db2 = rows.sum(0) if of_b2 else None
        if not (of_x or of_w1 or of_b1):
            return None, None, None, dw2, db2, None
        dhidden = product(grad, w2.t().contiguous())
        torch.ops.aten.gelu_backward.grad_input(dhidden, hidden, approximate=ctx.approximate, grad_input=dhidden)
        rows = dhidden.flatten(0, 1)  # (B · n, 4 D)
        dw1 = rows.t() @ x.flatten(0, 1) if of_w1 else None
        db1 = rows.sum(0) if of_b1 else None
        dx = product(dhidden, w1.t().contiguous()) if of_x else None
        return dx, dw1, db1, dw2, db2, None
