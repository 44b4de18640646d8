"""Streamed blocks: no N×K and no N×4D array is ever whole in memory.

Once the K rows of keys and values of a block are known, the rest of the block acts on each token alone (the local path
needs a few rows of neighbours). So a block is two loops over chunks of tokens that stay in cache: E x, summed over the
chunks; then attention, MLP and residuals, chunk by chunk. Notable here:

- `stream` runs inside the block's `forward`: FSDP2 gathers the block's parameters there.
- Without gradients the result goes to a buffer of the model's, never to the caller's tensor.
- With gradients only the block's input is kept: each chunk is recomputed in the backward pass, with the same dropout,
  and the gradients of keys, values, E and weights add up over the chunks. Drop path is drawn once for each image.
- Chunks are whole rows of the token grid, or several whole images where images are short (see `chunk_size.py`).
- `conv`, `max_pool`, `sharing='none'` and full attention get their keys and values from the whole sequence; all that
  follows is streamed.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils.checkpoint import get_device_states, set_device_states

from linvision.streaming import cpu_kernels
from linvision.streaming.chunks import row_chunks

if TYPE_CHECKING:
    from linvision.models.block import LinformerBlock


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
        self.chunk_size = chunk_size // len(x)
        attention = block.attn
        self.sums = attention.kind.part is not None and not attention.per_head and not attention.is_full(grid)

    def at(self, tokens: Tensor, rows: slice | None) -> Tensor:
        """A view of some rows of the token grid, (B, P + N, …) -> (B, rows, width, …); of the prefix for None."""
        if rows is None:
            return tokens[:, : self.P].unsqueeze(1)  # (B, 1, P, …)
        return tokens[:, self.P :].unflatten(1, self.grid)[:, rows]

    def run(self, projection: list[Tensor], out: Tensor | None = None) -> Tensor:
        """The block's output, written to `out` where it is given; no gradients."""
        with torch.no_grad():
            if self.sums:
                key, value, mask = self.key_value(self.project(projection), self.x[:, : self.P], projection)
            else:
                key, value, mask = self.key_value_of_all(self.x, projection)
            fused = None
            plain = self.block.compiled or self.drop or drops(self.block)
            if not plain and cpu_kernels.applies(self.block, self.x[:, : self.chunk_size], key, mask):
                fused = cpu_kernels.FusedTokens(self.block, self.chunk_size, self.x, key, value)
            for own, context, area, inside in self.chunks():
                x = self.at(self.x, context).flatten(1, 2)
                if fused is not None:
                    y = fused(*read(self.block, x, area, inside))
                else:
                    y = self.map(x, key, value, mask, area, inside)
                if out is None or out.dtype != y.dtype:
                    out = y.new_empty(self.x.shape)
                place = self.at(out, own)
                place.copy_(y.reshape(place.shape))
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
            x = self.at(self.x, context).flatten(1, 2).requires_grad_()
            y = self.map(x, key, value, made[2], area, inside)
            got = back([y], [self.at(grad, own).flatten(1, 2)], [x, key, value])
            for whole, part in zip((self.at(dx, context), dkey, dvalue), got, strict=True):
                whole += part.reshape(whole.shape)

        # back through keys and values to the tokens
        got = back(list(made[:2]), [dkey.to(made[0].dtype), dvalue.to(made[1].dtype)], sources)
        if not self.sums:
            dx += got[0]
        else:
            dx[:, : self.P] += got[-1]
            for rows, _, _ in row_chunks(self.grid, self.chunk_size):
                x = self.at(self.x, rows).requires_grad_()
                whole = self.at(dx, rows)
                whole += back(self.part(x, projection, rows), got[:-1], [x])[0]
        return [dx, *(found.get(id(t)) for t in inputs)]

    def project(self, projection: list[Tensor]) -> list[Tensor]:
        """[E x], or [E x, F x], as sums over the chunks: (B, K, D) each."""
        total: list[Tensor] = []
        for rows, _, _ in row_chunks(self.grid, self.chunk_size):
            parts = self.part(self.at(self.x, rows), projection, rows)
            total = [a + b for a, b in zip(total, parts, strict=True)] if total else parts
        return total

    def part(self, x: Tensor, projection: list[Tensor], rows: slice) -> list[Tensor]:
        """What neighbouring rows of the token grid, x of (B, rows, width, D), add to E x and F x."""
        attention = self.block.attn
        n = len(projection) // attention.matrices
        x = self.block.norm1(x).flatten(1, 2)
        if self.valid is not None:
            x = x.masked_fill(~self.at(self.valid, rows).flatten(1, 2).unsqueeze(-1), 0.0)
        parts = []
        for i in range(attention.matrices):
            factors = attention.kind.part(projection[i * n : (i + 1) * n - 1], rows.start, rows.stop)
            y = attention.reduce(x, factors, (rows.stop - rows.start, self.grid[1]), attention.rows)
            parts.append(y.to(torch.promote_types(y.dtype, torch.float32)))  # a sum of many
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

    def chunks(self) -> Iterator[tuple[slice | None, slice | None, Any, Tensor | None]]:
        """Of each chunk: its own rows, those that it reads (see `at`), and `area` and `inside` of `map_tokens`."""
        local, width = self.block.attn.local, self.grid[1]
        if self.P:
            yield None, None, None, None
        if local is None:
            yield from ((own, own, None, None) for own, _, _ in row_chunks(self.grid, self.chunk_size))
            return
        step = local.step(self.grid)
        for own, context, part in row_chunks(self.grid, self.chunk_size, step[0], local.half):
            rows = len(range(context.start, context.stop, context.step))
            area = (rows, width), (part.start * width, part.stop * width), (1, step[1])
            inside = None if self.valid is None else self.at(self.valid, context).flatten(1, 2).unsqueeze(-1)
            yield own, context, area, inside

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
