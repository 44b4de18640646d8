"""Streamed blocks: no N×K and no N×4D array is ever whole in memory.

Once the K rows of keys and values of a block are known, the rest of the block acts on each token alone (the local path
needs a few rows of neighbours). So a block is two loops over chunks of tokens that stay in cache: E x, summed over the
chunks; then attention, MLP and residuals, chunk by chunk. Notable here:

- `stream` runs inside the block's `forward`: FSDP2 gathers the block's parameters there.
- Without gradients the result goes to a buffer of the model's, never to the caller's tensor.
- With gradients only the block's input is kept: each chunk is recomputed in the backward pass
  (`torch.utils.checkpoint`), which also repeats its dropout. Drop path is drawn once for each image and block.
- Chunks are whole rows of the token grid, or several whole images where images are short.
- `conv`, `max_pool`, `sharing='none'` and full attention get their keys and values from the whole sequence; all that
  follows is streamed.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from linvision import onednn

if TYPE_CHECKING:
    from linvision.block import LinformerBlock

CACHE_BYTES = 8 * 2**20  # what the hidden layer of a chunk may take on a CPU
FUSED_TOKENS = 2047  # below, oneDNN's products gain little, and a model equals its torch.fx trace to the bit
DEVICE_BYTES = 2**28  # and on an accelerator


def choose_chunk_size(chunk_size: int | str, x: Tensor, blocks: nn.Sequential, hidden: int) -> int:
    """Images × tokens in a chunk for tokens x; 0 (whole) where something looks into the blocks or traces them.

    Args:
        chunk_size: What the model was told: 'auto', 0 or a number.
        x: Tokens, (B, P + N, D).
        blocks: The model's blocks.
        hidden: Width of their hidden layer.
    """
    if chunk_size == 'auto' and torch.is_grad_enabled():  # it saves memory, but its speed in training is not measured
        return 0
    if chunk_size == 0 or not isinstance(x, Tensor):  # a proxy of torch.fx
        return 0
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not blocks[0].attn.fused_attn:
        return 0
    if any(m._forward_hooks or m._forward_pre_hooks for m in blocks.modules() if not isinstance(m, FSDPModule)):
        return 0
    return auto_chunk_size(x, hidden) if chunk_size == 'auto' else chunk_size


def auto_chunk_size(x: Tensor, hidden: int) -> int:
    """Tokens in a chunk so that an MLP layer `hidden` wide stays in cache; 0, whole, where streaming gains nothing.

    Args:
        x: Tokens, (B, P + N, D).
        hidden: Width of the hidden layer.
    """
    device = x.device.type
    if device == 'meta':  # nothing is computed, and it has no autocast
        return 0
    dtype = onednn.compute_dtype(x)
    tokens = (CACHE_BYTES if device == 'cpu' else DEVICE_BYTES) // (hidden * dtype.itemsize)
    tokens = max(256, 2 ** (tokens.bit_length() - 1))
    fused = device == 'cpu' and x.shape[1] >= onednn.LONG and onednn.supports(dtype)
    return tokens if x.shape[0] * x.shape[1] > (FUSED_TOKENS if fused else tokens) else 0


def stream(
    block: 'LinformerBlock',
    x: Tensor,
    projection: list[Tensor],
    grid: tuple[int, int],
    valid: Tensor | None,
    chunk_size: int,
    out: Tensor | None = None,
) -> Tensor:
    """A block, chunk by chunk: (B, P + N, D) -> (B, P + N, D), equal to the block run whole but for rounding.

    Args:
        block: The block.
        x: Its input; not changed.
        projection: This layer's tensors, from `Projection.forward`.
        grid: Token grid (height, width).
        valid: Which tokens are not padding, (B, P + N), None for all.
        chunk_size: Images × tokens in a chunk; it has one row of the token grid at least.
        out: Where the result goes when there are no gradients; not `x`. By default a new tensor.
    """
    learns = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in block.parameters()))
    step = max(1, chunk_size // x.shape[1])  # images
    scales: list[Tensor] = []
    if block.training and not isinstance(block.drop_path1, nn.Identity):
        # drop path of ones: timm's own draw, one number an image
        scales = [path(x.new_ones(x.shape[0], 1, 1)) for path in (block.drop_path1, block.drop_path2)]
    if not learns and out is None:
        out = torch.empty_like(x)
    results = []
    for i, images in enumerate(x.split(step)):
        part = slice(i * step, (i + 1) * step)
        padding, drop = None if valid is None else valid[part], [s[part] for s in scales]
        cut = Images(block, images, grid, chunk_size, padding, drop, learns)
        if learns:
            results.append(torch.cat(cut.run(projection), dim=1))
        else:
            cut.run(projection, out[part])
    if not learns:
        return out
    return torch.cat(results) if len(results) > 1 else results[0]


class Images:
    """Some images' tokens, cut into chunks of whole rows of the token grid; the prefix is a chunk of its own.

    Args:
        block: The block.
        x: Their tokens, (B, P + N, D).
        grid: Token grid (height, width).
        chunk_size: Images × tokens in a chunk.
        valid: Which tokens are not padding, (B, P + N), None for all.
        drop: The two scales of drop path, (B, 1, 1), or none.
        learns: Recompute in the backward pass.
    """

    def __init__(
        self,
        block: 'LinformerBlock',
        x: Tensor,
        grid: tuple[int, int],
        chunk_size: int,
        valid: Tensor | None,
        drop: list[Tensor],
        learns: bool,
    ) -> None:
        self.block, self.grid, self.valid, self.drop, self.learns = block, grid, valid, drop, learns
        self.P = block.attn.num_prefix_tokens
        rows = max(1, chunk_size // (len(x) * grid[1]))
        self.rows = [(start, min(start + rows, grid[0])) for start in range(0, grid[0], rows)]  # of each chunk
        # split, not slices: the backward pass of a slice fills a whole gradient with zeros
        self.prefix, *self.chunks = x.split([self.P] + [(b - a) * grid[1] for a, b in self.rows], dim=1)
        self.x = x

    def do(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        """Call a function of tensors, or checkpoint it."""
        return checkpoint(function, *tensors, use_reentrant=False) if self.learns else function(*tensors)

    def run(self, projection: list[Tensor], out: Tensor | None = None) -> list[Tensor]:
        """The block's output, chunk by chunk; written to `out` where it is given."""
        key, value, mask = self.key_value(projection)
        self.fused = None
        if not self.learns and not self.block.compiled and onednn.applies(self.block, self.chunks[0], key, mask):
            self.fused = onednn.FusedTokens(self.block, self.chunks[0].shape[1], self.x, key, value)
        results = []
        start = 0
        for i in range(-1 if self.P else 0, len(self.chunks)):  # -1 is the prefix
            chunk = self.output(i, key, value, mask)
            if out is None:
                results.append(chunk)
            else:
                out[:, start : start + chunk.shape[1]] = chunk
                start += chunk.shape[1]
        return results

    def key_value(self, projection: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask as `LinformerAttention.key_value` gives them, from chunks where the kind allows it."""
        block, attention, grid = self.block, self.block.attn, self.grid
        if attention.kind.part is None or attention.per_head or attention.is_full(grid):
            return self.do(lambda x: attention.key_value(block.norm1(x), projection, grid, self.valid), self.x)
        n = len(projection) // attention.matrices
        matrices = [projection[i * n : (i + 1) * n - 1] for i in range(attention.matrices)]
        total: list[Tensor] = []
        for chunk, (first, last) in zip(self.chunks, self.rows, strict=True):

            def part(x: Tensor, first: int = first, last: int = last) -> list[Tensor]:
                x = self.masked(block.norm1(x), first, last)
                sub = (last - first, grid[1])
                parts = [
                    attention.reduce(x, attention.kind.part(m, first, last), sub, attention.rows) for m in matrices
                ]
                return [p.to(torch.promote_types(p.dtype, torch.float32)) for p in parts]  # a sum of many

            parts = self.do(part, chunk)
            total = [a + b for a, b in zip(total, parts, strict=True)] if total else parts
        prefix = block.norm1(self.prefix)
        rows = [t.to(prefix.dtype) for t in total]
        return attention.key_value_of_rows(rows, prefix, projection, grid, self.valid)

    def masked(self, x: Tensor, first: int, last: int) -> Tensor:
        """Normalised tokens of some rows of the grid, the padded ones set to zero."""
        if self.valid is None:
            return x
        inside = self.valid[:, self.P + first * self.grid[1] : self.P + last * self.grid[1]]
        return x.masked_fill(~inside.unsqueeze(-1), 0.0)

    def output(self, i: int, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """What the block makes of chunk i (-1: the prefix) once keys and values are known."""
        function = compiled_map_tokens() if self.block.compiled else map_tokens
        block, width, local = self.block, self.grid[1], self.block.attn.local
        if i < 0 or local is None:
            chunk = self.prefix if i < 0 else self.chunks[i]
            if self.fused is not None:
                return self.fused(chunk)
            return self.do(lambda x, k, v: function(block, x, k, v, mask, self.drop), chunk, key, value)
        (first, last), reach = self.rows[i], local.reach(self.grid)
        top, bottom = max(0, first - reach), min(self.grid[0], last + reach)
        own = ((first - top) * width, (last - top) * width)
        area = (bottom - top, width), own, local.step(self.grid)
        inside = None
        if self.valid is not None:
            inside = self.valid[:, self.P + top * width : self.P + bottom * width].unsqueeze(-1)
        if not self.learns:
            x = self.x[:, self.P + top * width : self.P + bottom * width]
            if self.fused is not None:
                return self.fused(x, area, inside)
            return function(block, x, key, value, mask, self.drop, area, inside)
        near = [j for j, (a, b) in enumerate(self.rows) if a < bottom and b > top]
        skip = (top - self.rows[near[0]][0]) * width

        def joined(k: Tensor, v: Tensor, *parts: Tensor) -> Tensor:
            x = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            return function(block, x[:, skip : skip + (bottom - top) * width], k, v, mask, self.drop, area, inside)

        # neighbouring chunks as they are: nothing new is kept for the backward pass
        return self.do(joined, key, value, *(self.chunks[j] for j in near))


def map_tokens(
    block: 'LinformerBlock',
    x: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    drop: list[Tensor],
    area: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None = None,
    inside: Tensor | None = None,
) -> Tensor:
    """Attention, MLP and both residuals of some tokens, once keys and values are known.

    Args:
        block: The block.
        x: Its input: the tokens, and with a local path also the rows above and below that it reads, (B, n, D).
        key, value, mask: As `LinformerAttention.key_value` gives them.
        drop: The two scales of drop path, (B, 1, 1), or none.
        area: For the local path: the grid that x is, the first token of its own and the one after the last, the step
            of the taps. None for no local path.
        inside: Which tokens of x are not padding, (B, n, 1), None for all.
    """
    h = block.norm1(x)
    local: Tensor | None = None
    if area is not None:
        grid, own, step = area
        local = block.attn.local.convolve(h if inside is None else h.masked_fill(~inside, 0.0), grid, step)
        x, h, local = (t[:, own[0] : own[1]] for t in (x, h, local))
    y = block.ls1(block.attn.output(h, key, value, mask, local))
    x = x + (y * drop[0] if drop else y)
    y = block.ls2(block.mlp(block.norm2(x)))
    return x + (y * drop[1] if drop else y)


@cache
def compiled_map_tokens() -> Callable[..., Tensor]:
    """`map_tokens`, compiled: once for all blocks, since their parameters are inputs of the graph."""
    return torch.compile(map_tokens)
