"""Streamed blocks: no N×K and no N×4D array is ever whole in memory.

Once the K rows of keys and values of a block are known, the rest of the block acts on each token alone (the local path
needs a few rows of neighbours). So a block is two loops over chunks of tokens that stay in cache: E x, from
what each chunk gives; then attention, MLP and residuals, chunk by chunk. Notable here:

- `stream` runs inside the block's `forward`: FSDP2 gathers the block's parameters there.
- Without gradients the result goes to a buffer of the model's, never to the caller's tensor.
- With gradients only the block's input is kept: each chunk is recomputed in the backward pass, with the same dropout,
  and the gradients of keys, values, E and weights add up over the chunks. Drop path is drawn once for each image.
- Chunks are whole rows of the token grid, or several whole images where images are short (see `chunks.py`).
- `conv`, `max_pool`, `sharing='none'` and full attention get their keys and values from the whole sequence; all that
  follows is streamed.
- Where several processes share an image, x are the tokens of this one's band (`models/band.py`): E x is joined over the
  processes, and so is its gradient. Rows of the token grid are always counted in the image.
- What a block computes is the block's own equation and its attention's `output`; on CPUs without gradients some parts
  are replaced by oneDNN's products (`cpu_kernels.py`).
- With `token_norm` the mean and variance of all tokens come first, before attention and before the MLP. Both are leaves
  of the backward pass, as keys and values are.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from linvision.compiled import compiled, open_sizes
from linvision.reweighted import reweighted
from linvision.streaming import cpu_kernels
from linvision.streaming.chunks import Chunk, TokenChunks
from linvision.streaming.parts import (
    BlockWith,
    Grid,
    KeysValues,
    StreamedBlock,
    draws_dropout,
    drop_path_scales,
    scaled,
)
from linvision.streaming.rows import Halo, Rows


def stream(
    block: StreamedBlock,
    x: Tensor,
    projection: list[Tensor],
    grid: Grid,
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
    tokens = x.shape[1]
    if block.attn.band is not None:  # all processes go through the images in the same steps, those of the largest band
        tokens = block.attn.num_prefix_tokens + math.prod(block.attn.band.grid(grid, 0))
    chunk_size = min(chunk_size, x.shape[0] * tokens)  # oneDNN packs weights for so many, and has no end of them
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *projection, *block.parameters()))
    step = max(1, chunk_size // tokens)  # images
    scales = drop_path_scales(block, x)
    results = []
    for i, images in enumerate(x.split(step)):
        part = slice(i * step, (i + 1) * step)
        settings = (grid, chunk_size, None if valid is None else valid[part], [s[part] for s in scales])
        if learns:
            weights = {name: p for name, p in block.named_parameters() if p.requires_grad}
            results.append(Recomputed.apply(block, settings, tuple(weights), images, *weights.values(), *projection))
        else:
            results.append(Pass(block, images, *settings).run(projection, None if out is None else out[part]))
    if len(results) == 1:
        return results[0]
    written = not learns and out is not None and out.dtype == results[0].dtype
    return out if written and out is not None else torch.cat(results)


class Recomputed(torch.autograd.Function):
    """A block over some images: keeps its input, and computes chunk by chunk again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, block: StreamedBlock, settings: tuple[Any, ...], names: tuple[str, ...], x: Tensor, *inputs: Tensor
    ) -> Tensor:
        """Inputs are the block's parameters that learn, whose names are given, then the projection tensors."""
        ctx.block, ctx.settings, ctx.names = block, settings, names
        ctx.save_for_backward(x, *inputs)
        device = x.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        # whatever draws in it: an MLP may be anyone's
        ctx.random = (torch.get_rng_state(), *get_device_states(x)) if block.training else None
        return Pass(block, x, *settings).run(list(inputs[len(names) :]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *inputs = ctx.saved_tensors
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
        weights = dict(zip(ctx.names, inputs, strict=False))
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
            return None, None, None, *Pass(reweighted(ctx.block, weights), x, *ctx.settings).gradients(inputs, grad)


def rest(
    block: StreamedBlock | BlockWith,
    scales: list[Tensor],
    x: Tensor,
    h: Tensor,
    local: Tensor | None,
    weights: list[Tensor],
    rope: Tensor | None,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """All that follows the keys and values of a block, which acts on each token alone: (B, n, D) -> (B, n, D).

    With `token_norm`, up to the first residual branch: the second needs that of all tokens.

    Args:
        block: The block, or one with some of its parts replaced.
        scales: Those of drop path.
        x, h: The block's input, and that normalised.
        local: The local path's output.
        weights: As `LinformerAttention.split_weights` gives them.
        rope: Sines and cosines of these tokens, where they are rotated.
        key, value, mask: As `LinformerAttention.key_value` gives them.
    """
    block = scaled(block, scales)
    query = block.attn.query(h, weights, rope)
    attended = block.attn.output(query, key, value, mask, local, block.attn.opening(h))
    return block.add_attention(x, attended) if block.token_norm else block.residuals(x, attended)


class Pass:
    """A block over some images, chunk by chunk: forward, or forward and backward.

    Args:
        block: The block.
        x: Their tokens, (B, P + N, D); of a band, those that this process has.
        grid: Token grid (height, width).
        chunk_size: Images × tokens in a chunk.
        valid: Which tokens are not padding, (B, P + N), None for all.
        scales: The two scales of drop path, (B, 1, 1), or none.
    """

    def __init__(
        self, block: StreamedBlock, x: Tensor, grid: Grid, chunk_size: int, valid: Tensor | None, scales: list[Tensor]
    ) -> None:
        self.block, self.grid, self.valid, self.x, self.scales = block, grid, valid, x.detach(), scales
        self.P, self.band, attention = block.attn.num_prefix_tokens, block.attn.band, block.attn
        self.chunk_size = chunk_size // len(x)
        self.cut = TokenChunks(attention, grid, self.chunk_size, valid)
        self.by_parts = attention.kind.by_parts and not attention.by_head and not attention.is_full(grid)
        self.statistics1: Tensor | None = None  # those of all tokens, where the norm needs them
        self.weights: list[Tensor] = []  # of queries, keys and values: read once for all chunks
        self.rope: Tensor | None = None  # sines and cosines of all tokens

    # ------------------------------------------------------------------------------------------------- the two passes

    def run(self, projection: list[Tensor], out: Tensor | None = None) -> Tensor:
        """The block's output, written to `out` where it is given; no gradients."""
        with torch.no_grad():
            halo = self.cut.halo(self.x)
            if self.block.token_norm:
                self.statistics1 = self.statistics(self.block.norm1, self.x)
            self.weights = self.block.attn.split_weights(self.x)
            projection = self.take_rope(projection)
            if self.by_parts:
                key, value, mask = self.key_value(self.reduce(projection), self.x[:, : self.P], projection)
            else:
                key, value, mask = self.key_value_of_all(self.x, projection)
            plain = self.scales or draws_dropout(self.block)
            if not plain and cpu_kernels.applies(self.block, self.x, mask):
                block: StreamedBlock | BlockWith = cpu_kernels.fused(self.block, self.chunk_size, self.x, key, value)
            else:
                block = self.block
            out = self.outputs(block, halo, (key, value, mask), out)
            if self.block.token_norm:
                statistics = self.statistics(self.block.norm2, out)
                for own in self.cut.parts():
                    place = self.cut.rows(out, own)
                    place.copy_(self.add_mlp(block, place.flatten(1, 2), own, statistics).view(place.shape))
        return out

    def outputs(
        self,
        block: StreamedBlock | BlockWith,
        halo: Halo | None,
        keys_values: KeysValues,
        out: Tensor | None = None,
    ) -> Tensor:
        """What `output` gives for all chunks: (B, P + N, D)."""
        tokens = self.cut.with_halo(self.x, halo)
        for chunk in self.cut.chunks():
            y = self.output(block, self.context(tokens, chunk), *keys_values, chunk)
            if out is None or out.dtype != y.dtype:
                out = y.new_empty(self.x.shape)
            place = self.cut.rows(out, chunk.own)
            place.copy_(y.reshape(place.shape))
        assert out is not None, 'a sequence has at least one chunk'
        return out

    def gradients(self, inputs: list[Tensor], grad: Tensor) -> list[Tensor | None]:
        """Gradients of the tokens and of the inputs, from that of the output.

        Args:
            inputs: The block's parameters that learn, then the projection tensors; all leaves.
            grad: Gradient of the output.
        """
        projection = self.take_rope(inputs[sum(p.requires_grad for p in self.block.parameters()) :])
        made_weights = self.block.attn.split_weights(self.x)
        self.weights = [w.detach().requires_grad_(w.requires_grad) for w in made_weights]  # leaves
        statistics: list[Tensor] = []  # leaves too, and made of the tokens at the end
        if self.block.token_norm:
            self.statistics1 = self.statistics(self.block.norm1, self.x).requires_grad_()
            statistics = [self.statistics1]
        learning = [t for t in (*inputs, *self.weights, *statistics) if t.requires_grad]
        dx = torch.zeros_like(self.x)
        sums: dict[int, Tensor] = {}  # gradients by the identity of what learns

        def backward(outputs: list[Tensor], grads: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
            """Gradients of the inputs; those of what learns are added up."""
            got = torch.autograd.grad(outputs, [*inputs, *learning], grads, allow_unused=True)
            for tensor, g in zip(learning, got[len(inputs) :], strict=True):
                if g is not None:
                    # a copy first: autograd may hand the same tensor out twice
                    wide = torch.promote_types(g.dtype, torch.float32)
                    sums[id(tensor)] = sums[id(tensor)].add_(g) if id(tensor) in sums else g.to(wide, copy=True)
            return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, got, strict=False)]

        edges = self.x.detach().requires_grad_()
        halo = self.cut.halo(edges)

        # keys and values, from leaves
        if self.by_parts:
            with torch.no_grad():
                rows = self.reduce(projection)
            sources = [r.requires_grad_() for r in (*rows, self.x[:, : self.P].clone())]
            made = self.key_value(sources[:-1], sources[-1], projection)
        else:
            sources = [self.x.clone().requires_grad_()]
            made = self.key_value_of_all(sources[0], projection)
        key, value = (t.detach().requires_grad_() for t in made[:2])

        if self.block.token_norm:
            grad = self.gradient_before_mlp(grad, halo, (key, value, made[2]), backward)

        # all that follows, chunk by chunk
        dkey, dvalue = (torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in (key, value))
        dhalo = None if halo is None else halo._replace(received=torch.zeros_like(halo.received))
        tokens, gradients = self.cut.with_halo(self.x, halo), self.cut.with_halo(dx, dhalo)
        for chunk in self.cut.chunks():
            x = self.context(tokens, chunk).requires_grad_()
            y = self.output(self.block, x, key, value, made[2], chunk)
            part, *parts = backward([y], [self.cut.rows(grad, chunk.own).flatten(1, 2)], [x, key, value])
            if chunk.context is None:
                dx[:, : self.P] += part
            else:
                gradients.add(chunk.context, part.unflatten(1, (-1, self.grid[1])))
            for total, part in zip((dkey, dvalue), parts, strict=True):
                total += part
        if halo is not None and dhalo is not None:
            dx += torch.autograd.grad(halo.received, edges, dhalo.received)[0]

        # back through keys and values to the tokens
        got = backward(list(made[:2]), [dkey.to(made[0].dtype), dvalue.to(made[1].dtype)], sources)
        if not self.by_parts:
            dx += got[0]
        else:
            dx[:, : self.P] += got[-1]
            totals = [r.detach() for r in rows]
            if self.band is not None:  # of all processes' losses
                got = [self.band.sum(g) for g in got]
            for own in self.cut.parts():
                x = self.cut.rows(self.x, own).requires_grad_()
                total = self.cut.rows(dx, own)
                # a part's share of the whole: the gradient is right, the value counts the part twice
                shares = self.merge(totals, self.reduce_rows(x, projection, own))
                total += backward(shares, got[:-1], [x])[0]
        for leaf in statistics:
            self.add_through_statistics(dx, self.block.norm1, self.x, leaf.detach(), sums[id(leaf)])
        # and through the weights, which a wrapper may have made of others
        used = [
            (w, sums[id(leaf)].to(w.dtype))
            for w, leaf in zip(made_weights, self.weights, strict=True)
            if id(leaf) in sums
        ]
        if used:
            backward([w for w, _ in used], [g for _, g in used], [])
        return [dx, *(sums[id(t)].to(t.dtype) if id(t) in sums else None for t in inputs)]

    def gradient_before_mlp(
        self,
        grad: Tensor,
        halo: Halo | None,
        keys_values: KeysValues,
        backward: Callable[[list[Tensor], list[Tensor], list[Tensor]], list[Tensor]],
    ) -> Tensor:
        """Where a norm over all tokens stands before the MLP, the gradient of the tokens before that norm.

        Args:
            grad: Gradient of the block's output.
            halo, keys_values: As for `outputs`.
            backward: That of `gradients`.
        """
        devices = get_device_states(self.x)[0]
        kind = self.x.device.type if devices else 'cuda'  # without devices, any
        drawn = self.block.training  # the first branch once more, after this
        with torch.random.fork_rng(devices, enabled=drawn, device_type=kind):
            with torch.no_grad():
                tokens = self.outputs(self.block, halo, keys_values)
            statistics = self.statistics(self.block.norm2, tokens).requires_grad_()
            dtokens, dstatistics = torch.empty_like(tokens), torch.zeros_like(statistics)
            for own in self.cut.parts():
                x = self.cut.rows(tokens, own).flatten(1, 2).requires_grad_()
                y = self.add_mlp(self.block, x, own, statistics)
                dx, part = backward([y], [self.cut.rows(grad, own).flatten(1, 2)], [x, statistics])
                dstatistics += part
                place = self.cut.rows(dtokens, own)
                place.copy_(dx.view(place.shape))
            self.add_through_statistics(dtokens, self.block.norm2, tokens, statistics.detach(), dstatistics)
            return dtokens

    # ------------------------------------------------------------------------------------- keys and values from chunks

    def take_rope(self, projection: list[Tensor]) -> list[Tensor]:
        """The tensors of E; sines and cosines, which come after them, are kept."""
        if not self.block.attn.rotary:
            return projection
        self.rope = projection[-1]
        return projection[:-1]

    def reduce(self, projection: list[Tensor]) -> list[Tensor]:
        """What all chunks give for [E x], or [E x, F x]: (B, K, C) each."""
        total: list[Tensor] = []
        for own in self.cut.parts():
            parts = self.reduce_rows(self.cut.rows(self.x, own), projection, own)
            total = self.merge(total, parts) if total else parts
        return total if self.band is None else [self.block.attn.kind.total(t, self.band) for t in total]

    def merge(self, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        """What two parts of the tokens give together."""
        return [self.block.attn.kind.merge(*pair) for pair in zip(a, b, strict=True)]

    def reduce_rows(self, x: Tensor, projection: list[Tensor], own: slice) -> list[Tensor]:
        """What neighbouring rows of the token grid, x of (B, rows, width, D), give for E x and F x."""
        attention = self.block.attn
        n = len(projection) // attention.matrices
        x, inside, parts = self.normalised(x.flatten(1, 2), own), self.cut.valid_in(own), []
        if inside is not None:
            x = x.masked_fill(~inside.unsqueeze(-1), 0.0)
        for i in range(attention.matrices):
            factors = projection[i * n : (i + 1) * n - 1] + ([] if inside is None else [inside])
            y = attention.kind.partial(x, factors, own, self.grid, attention.rows)
            parts.append(y.to(torch.promote_types(y.dtype, torch.float32)))  # a sum of many
        return parts

    def key_value(self, rows: list[Tensor], prefix: Tensor, projection: list[Tensor]) -> KeysValues:
        """Keys, values and mask from what all chunks give for [E x] or [E x, F x], and the prefix tokens."""
        attention, prefix = self.block.attn, self.normalised(prefix, None)
        rows = [attention.kind.finish(r).to(prefix.dtype) for r in rows]
        return attention.key_value_of_rows(rows, prefix, projection, self.grid, self.valid, self.weights)

    def key_value_of_all(self, x: Tensor, projection: list[Tensor]) -> KeysValues:
        """Keys, values and mask for kinds that take no parts, from the whole sequence."""
        attention, h = self.block.attn, self.normalised(x, self.cut.own)
        return attention.key_value(h, projection, self.grid, self.valid, self.weights, self.rope)

    # ------------------------------------------------------------------------------------------- norms over all tokens

    def normalised(self, x: Tensor, rows: slice | None) -> Tensor:
        """The block's first norm of tokens of some rows; of the prefix for None."""
        norm, statistics = self.block.norm1, self.statistics1
        h: Tensor = norm(x) if statistics is None else norm(x, self.cut.valid_in(rows), statistics)
        return h

    def statistics(self, norm: Any, tokens: Tensor) -> Tensor:
        """Mean and variance of each channel over the image, (B, 2, D), for a `TokenNorm`."""
        parts = [(self.cut.rows(tokens, own).flatten(1, 2), self.cut.valid_in(own)) for own in self.cut.parts()]
        found: Tensor = norm.statistics(parts, self.cut.count(self.x.device))
        return found

    def add_through_statistics(
        self, total: Tensor, norm: Any, tokens: Tensor, statistics: Tensor, grad: Tensor
    ) -> None:
        """Add to a gradient of the tokens what they get through the statistics, of whose gradient this is a part."""
        grad, count = norm.over_image(grad), self.cut.count(self.x.device)
        for own in self.cut.parts():
            x = self.cut.rows(tokens, own)
            dx = norm.through_statistics(x.flatten(1, 2), self.cut.valid_in(own), statistics, grad, count)
            self.cut.rows(total, own).add_(dx.view(x.shape))

    # ------------------------------------------------------------------------------------------ all that follows them

    def context(self, tokens: Rows, chunk: Chunk) -> Tensor:
        """The tokens that a chunk reads, (B, n, D)."""
        return self.x[:, : self.P] if chunk.context is None else tokens.read(chunk.context).flatten(1, 2)

    def add_mlp(self, block: StreamedBlock | BlockWith, x: Tensor, rows: slice, statistics: Tensor) -> Tensor:
        """The second residual branch, where a norm over all tokens stands before it: (B, n, D) -> (B, n, D).

        Args:
            block: As for `output`.
            x: Tokens of some rows after the first branch.
            rows: The rows.
            statistics: Mean and variance of all tokens, (B, 2, D).
        """
        block = scaled(block, self.scales if block is self.block else [])
        return block.add_mlp(x, self.block.norm2(x, self.cut.valid_in(rows), statistics))

    def output(
        self,
        block: StreamedBlock | BlockWith,
        x: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        chunk: Chunk,
    ) -> Tensor:
        """A chunk's output, once keys and values are known: (B, n, D) of its context -> (B, n', D) of its own.

        Args:
            block: The block, or one with some of its parts replaced.
            x: The block's input.
            key, value, mask: As `LinformerAttention.key_value` gives them.
            chunk: The chunk.
        """
        h = self.normalised(x, chunk.context)
        path, local = self.block.attn.local, None
        if path is not None and chunk.size is not None:
            valid = self.cut.valid_in(chunk.context)
            read = h if valid is None else h.masked_fill(~valid.unsqueeze(-1), 0.0)
            local = path.convolve(read, chunk.size, chunk.step)[:, chunk.tokens]
            x, h = x[:, chunk.tokens], h[:, chunk.tokens]
        rope: Tensor | None = None
        if self.rope is not None and chunk.own is not None:
            rope = self.rope.unflatten(-2, self.grid)[..., chunk.own, :, :].flatten(-3, -2)
        scales = self.scales if block is self.block else []  # a replaced block has none
        # the prefix is a few tokens; dropout must be the same in the backward pass, where it is another graph's
        plain = chunk.own is None or block is not self.block or draws_dropout(self.block)
        if plain or not self.block.compiles:
            return rest(block, scales, x, h, local, self.weights, rope, key, value, mask)
        for tensor in (x, h, local):
            open_sizes(tensor, 0, 1)
        for tensor in (key, value, mask, *scales):
            open_sizes(tensor, 0)
        return compiled(rest, self.block.compiles)(block, scales, x, h, local, self.weights, rope, key, value, mask)
