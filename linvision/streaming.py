"""Streamed blocks: no N×K and no N×4D array is ever whole in memory.

Once the K rows of keys and values of a block are known, the rest of the block acts on each token alone (the local path
needs a few rows of neighbours). So a block is two loops over chunks of tokens that stay in cache: E x, summed over the
chunks; then attention, MLP and residuals, chunk by chunk. Notable here:

- `stream` runs inside the block's `forward`: FSDP2 gathers the block's parameters there.
- Without gradients the result goes to a buffer of the model's, never to the caller's tensor.
- With gradients only the block's input is kept: each chunk is recomputed in the backward pass, with the same dropout,
  and the gradients of keys, values, E and weights add up over the chunks. Drop path is drawn once for each image.
- Chunks are whole rows of the token grid, or several whole images where images are short.
- `conv`, `max_pool`, `sharing='none'` and full attention get their keys and values from the whole sequence; all that
  follows is streamed.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call
from torch.utils.checkpoint import get_device_states, set_device_states

from linvision import onednn

if TYPE_CHECKING:
    from linvision.block import LinformerBlock

CACHE_BYTES = 8 * 2**20  # what the hidden layer of a chunk may take on a CPU
FUSED_TOKENS = 2047  # below, oneDNN's products gain little, and a model equals its torch.fx trace to the bit
DEVICE_BYTES = 2**28  # and on an accelerator
KEPT_BYTES = (
    2**32
)  # training recomputes (1.4 times the time, a fifth of the memory or less) where blocks would keep more


def choose_chunk_size(
    chunk_size: int | str, x: Tensor, blocks: nn.Sequential, hidden: int, grid: tuple[int, int]
) -> int:
    """Images × tokens in a chunk for tokens x; 0 (whole) where something looks into the blocks or traces them.

    Args:
        chunk_size: What the model was told: 'auto', 0 or a number.
        x: Tokens, (B, P + N, D).
        blocks: The model's blocks.
        hidden: Width of their hidden layer.
        grid: Token grid (height, width).
    """
    if chunk_size == 0 or not isinstance(x, Tensor) or x.is_meta:  # a proxy of torch.fx; nothing is computed
        return 0
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not blocks[0].attn.fused_attn:
        return 0
    if any(m._forward_hooks or m._forward_pre_hooks for m in blocks.modules() if not isinstance(m, FSDPModule)):
        return 0
    if chunk_size == 'auto' and torch.is_grad_enabled():
        limit = torch.cuda.get_device_properties(x.device).total_memory // 4 if x.is_cuda else KEPT_BYTES
        if kept_bytes(x, len(blocks)) < limit:
            return 0
    if chunk_size != 'auto':
        return chunk_size
    tokens, local = auto_chunk_size(x, hidden), blocks[0].attn.local
    if tokens > 0 and local is not None:  # what neighbouring chunks both read is to stay below a half
        tokens = max(tokens, 4 * local.reach(grid) * grid[1])
    return tokens


def kept_bytes(x: Tensor, depth: int) -> int:
    """What whole blocks keep for the backward pass, about: 24 numbers a token, channel and block."""
    return 24 * x.numel() * depth * onednn.compute_dtype(x).itemsize


def auto_chunk_size(x: Tensor, hidden: int) -> int:
    """Tokens in a chunk so that an MLP layer `hidden` wide stays in cache; 0, whole, where streaming gains nothing.

    Args:
        x: Tokens, (B, P + N, D).
        hidden: Width of the hidden layer.
    """
    device = x.device.type
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
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *projection, *block.parameters()))
    step = max(1, chunk_size // x.shape[1])  # images
    scales: list[Tensor] = []
    if block.training and not isinstance(block.drop_path1, nn.Identity):
        # drop path of ones: timm's own draw, one number an image
        scales = [path(x.new_ones(x.shape[0], 1, 1)) for path in (block.drop_path1, block.drop_path2)]
    results = []
    for i, images in enumerate(x.split(step)):
        part = slice(i * step, (i + 1) * step)
        settings = (grid, chunk_size, None if valid is None else valid[part], [s[part] for s in scales])
        if learns:
            weights = {name: p for name, p in block.named_parameters() if p.requires_grad}
            results.append(Recomputed.apply(block, settings, tuple(weights), images, *weights.values(), *projection))
        else:
            results.append(Images(block, images, *settings).run(projection, None if out is None else out[part]))
    if len(results) == 1:
        return results[0]
    written = not learns and out is not None and out.dtype == results[0].dtype
    return out if written else torch.cat(results)


class Recomputed(torch.autograd.Function):
    """A block over some images: keeps its input, and computes chunk by chunk again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, block: 'LinformerBlock', settings: tuple, names: tuple[str, ...], x: Tensor, *inputs: Tensor
    ) -> Tensor:
        """Inputs are the block's parameters that learn, whose names are given, then the projection tensors."""
        ctx.block, ctx.settings, ctx.names = block, settings, names
        ctx.save_for_backward(x, *inputs)
        device = x.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.random = (torch.get_rng_state(), *get_device_states(x)) if drops(block) else None
        return Images(block, x, *settings).run(list(inputs[len(names) :]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *inputs = ctx.saved_tensors
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
        weights = {f'block.{n}': t for n, t in zip(ctx.names, inputs, strict=False)}
        device, dtype, enabled = ctx.autocast
        state, devices, states = ctx.random or (None, [], [])
        kind = device if devices else 'cuda'  # without devices, any
        with (
            torch.enable_grad(),
            torch.autocast(device, dtype, enabled),
            torch.random.fork_rng(devices, enabled=state is not None, device_type=kind),
        ):
            if state is not None:
                torch.set_rng_state(state)
                set_device_states(devices, states, device_type=kind)
            # the weights of the forward pass, whatever the block holds by now
            return None, None, None, *functional_call(Again(ctx.block), weights, (x, ctx.settings, inputs, grad))


class Again(nn.Module):
    """A block's backward pass as a module, so that `torch.func.functional_call` can give it its weights."""

    def __init__(self, block: 'LinformerBlock') -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, settings: tuple, inputs: list[Tensor], grad: Tensor) -> list[Tensor | None]:
        """Gradients of x and the inputs of `Recomputed`."""
        return Images(self.block, x, *settings).gradients(inputs, grad)


def drops(block: 'LinformerBlock') -> bool:
    """Whether the block draws dropout."""
    return block.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in block.modules())


class Images:
    """Some images' tokens, cut into chunks of whole rows of the token grid; the prefix is a chunk of its own.

    Args:
        block: The block.
        x: Their tokens, (B, P + N, D).
        grid: Token grid (height, width).
        chunk_size: Images × tokens in a chunk.
        valid: Which tokens are not padding, (B, P + N), None for all.
        drop: The two scales of drop path, (B, 1, 1), or none.
    """

    def __init__(
        self,
        block: 'LinformerBlock',
        x: Tensor,
        grid: tuple[int, int],
        chunk_size: int,
        valid: Tensor | None,
        drop: list[Tensor],
    ) -> None:
        self.block, self.grid, self.valid, self.drop, self.x = block, grid, valid, drop, x.detach()
        self.P = block.attn.num_prefix_tokens
        rows = max(1, chunk_size // (len(x) * grid[1]))
        self.rows = [(start, min(start + rows, grid[0])) for start in range(0, grid[0], rows)]  # of each chunk
        attention = block.attn
        self.sums = attention.kind.part is not None and not attention.per_head and not attention.is_full(grid)

    def tokens(self, first: int, last: int) -> slice:
        """Where some rows of the token grid are in the sequence."""
        return slice(self.P + first * self.grid[1], self.P + last * self.grid[1])

    def run(self, projection: list[Tensor], out: Tensor | None = None) -> Tensor:
        """The block's output, written to `out` where it is given; no gradients."""
        with torch.no_grad():
            if self.sums:
                key, value, mask = self.key_value(self.project(projection), self.x[:, : self.P], projection)
            else:
                key, value, mask = self.key_value_of_all(self.x, projection)
            fused = None
            first = self.tokens(*self.rows[0])
            plain = self.block.compiled or self.drop or drops(self.block)
            if not plain and onednn.applies(self.block, self.x[:, first], key, mask):
                fused = onednn.FusedTokens(self.block, first.stop - first.start, self.x, key, value)
            for own, context, area, inside in self.chunks():
                x = self.x[:, context]
                if fused is not None:
                    y = fused(*read(self.block, x, area, inside))
                else:
                    y = self.map(x, key, value, mask, area, inside)
                if out is None or out.dtype != y.dtype:
                    out = y.new_empty(self.x.shape)
                out[:, own] = y
        return out

    def gradients(self, inputs: list[Tensor], grad: Tensor) -> list[Tensor | None]:
        """Gradients of the tokens and of the inputs, from that of the output.

        Args:
            inputs: The block's parameters that learn, then the projection tensors; all leaves.
            grad: Gradient of the output.
        """
        projection = inputs[sum(p.requires_grad for p in self.block.parameters()) :]
        learning = [t for t in inputs if t.requires_grad]
        dx = torch.zeros_like(self.x)
        found: dict[int, Tensor] = {}  # by the identity of what learns

        def back(outputs: list[Tensor], grads: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
            """Gradients of the inputs; those of what learns are added up."""
            got = torch.autograd.grad(outputs, [*inputs, *learning], grads, allow_unused=True)
            for tensor, g in zip(learning, got[len(inputs) :], strict=True):
                if g is not None:
                    # a copy first: autograd may hand the same tensor out twice
                    found[id(tensor)] = found[id(tensor)].add_(g) if id(tensor) in found else g.clone()
            return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, got, strict=False)]

        # keys and values, from leaves
        if self.sums:
            with torch.no_grad():
                rows = self.project(projection)
            sources = [r.requires_grad_() for r in (*rows, self.x[:, : self.P].clone())]
            made = self.key_value(sources[:-1], sources[-1], projection)
        else:
            sources = [self.x.clone().requires_grad_()]
            made = self.key_value_of_all(sources[0], projection)
        key, value = (t.detach().requires_grad_() for t in made[:2])

        # all that follows, chunk by chunk
        dkey, dvalue = (torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in (key, value))
        for own, context, area, inside in self.chunks():
            x = self.x[:, context].requires_grad_()
            y = self.map(x, key, value, made[2], area, inside)
            got = back([y], [grad[:, own]], [x, key, value])
            for whole, part in zip((dx[:, context], dkey, dvalue), got, strict=True):
                whole += part

        # back through keys and values to the tokens
        got = back(list(made[:2]), [dkey.to(made[0].dtype), dvalue.to(made[1].dtype)], sources)
        if not self.sums:
            dx += got[0]
        else:
            dx[:, : self.P] += got[-1]
            for first, last in self.rows:
                x = self.x[:, self.tokens(first, last)].requires_grad_()
                dx[:, self.tokens(first, last)] += back(self.part(x, projection, first, last), got[:-1], [x])[0]
        return [dx, *(found.get(id(t)) for t in inputs)]

    def project(self, projection: list[Tensor]) -> list[Tensor]:
        """[E x], or [E x, F x], as sums over the chunks: (B, K, D) each."""
        total: list[Tensor] = []
        for first, last in self.rows:
            parts = self.part(self.x[:, self.tokens(first, last)], projection, first, last)
            total = [a + b for a, b in zip(total, parts, strict=True)] if total else parts
        return total

    def part(self, x: Tensor, projection: list[Tensor], first: int, last: int) -> list[Tensor]:
        """What some rows of the token grid add to E x and F x."""
        attention = self.block.attn
        n = len(projection) // attention.matrices
        x = self.block.norm1(x)
        if self.valid is not None:
            x = x.masked_fill(~self.valid[:, self.tokens(first, last)].unsqueeze(-1), 0.0)
        parts = []
        for i in range(attention.matrices):
            factors = attention.kind.part(projection[i * n : (i + 1) * n - 1], first, last)
            rows = attention.reduce(x, factors, (last - first, self.grid[1]), attention.rows)
            parts.append(rows.to(torch.promote_types(rows.dtype, torch.float32)))  # a sum of many
        return parts

    def key_value(
        self, rows: list[Tensor], prefix: Tensor, projection: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask from [E x] or [E x, F x] and the prefix tokens."""
        prefix = self.block.norm1(prefix)
        rows = [r.to(prefix.dtype) for r in rows]
        return self.block.attn.key_value_of_rows(rows, prefix, projection, self.grid, self.valid)

    def key_value_of_all(self, x: Tensor, projection: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask for kinds that are no sums over tokens, from the whole sequence."""
        return self.block.attn.key_value(self.block.norm1(x), projection, self.grid, self.valid)

    def chunks(self) -> Iterator[tuple[slice, slice, Any, Tensor | None]]:
        """Of each chunk: its own tokens, those that it reads, and `area` and `inside` of `map_tokens`."""
        local, width = self.block.attn.local, self.grid[1]
        if self.P:
            yield slice(0, self.P), slice(0, self.P), None, None
        for first, last in self.rows:
            own = self.tokens(first, last)
            if local is None:
                yield own, own, None, None
                continue
            reach = local.reach(self.grid)
            top, bottom = max(0, first - reach), min(self.grid[0], last + reach)
            context = self.tokens(top, bottom)
            area = (bottom - top, width), ((first - top) * width, (last - top) * width), local.step(self.grid)
            yield own, context, area, None if self.valid is None else self.valid[:, context].unsqueeze(-1)

    def map(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, area: Any, inside: Any) -> Tensor:
        """`map_tokens`, compiled or not."""
        function = compiled_map_tokens() if self.block.compiled else map_tokens
        return function(self.block, x, key, value, mask, self.drop, area, inside)


def read(
    block: 'LinformerBlock',
    x: Tensor,
    area: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None,
    inside: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A chunk's own tokens, the same normalised, and the local path's output for them; arguments as in `map_tokens`."""
    h = block.norm1(x)
    if area is None:
        return x, h, None
    grid, own, step = area
    local = block.attn.local.convolve(h if inside is None else h.masked_fill(~inside, 0.0), grid, step)
    part = slice(*own)
    return x[:, part], h[:, part], local[:, part]


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
    x, h, local = read(block, x, area, inside)
    y = block.ls1(block.attn.output(h, key, value, mask, local))
    x = x + (y * drop[0] if drop else y)
    y = block.ls2(block.mlp(block.norm2(x)))
    return x + (y * drop[1] if drop else y)


@cache
def compiled_map_tokens() -> Callable[..., Tensor]:
    """`map_tokens`, compiled: once for all blocks, since their parameters are inputs of the graph."""
    return torch.compile(map_tokens)
