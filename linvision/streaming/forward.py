"""A streamed block forward: keys and values from chunks, then all that follows them, chunk by chunk."""

from typing import Any

import torch
from torch import Tensor

from linvision.compiled import compiled, open_sizes
from linvision.streaming import cpu_kernels
from linvision.streaming.chunks import Chunk, TokenChunks
from linvision.streaming.parts import BlockWith, Grid, KeysValues, StreamedBlock, Weights, draws_dropout, scaled
from linvision.streaming.rows import Halo, Rows


def rest(
    block: StreamedBlock | BlockWith,
    scales: list[Tensor],
    x: Tensor,
    h: Tensor,
    local: Tensor | None,
    weights: Weights,
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


class Forward:
    """A block over some images, chunk by chunk: its output, and the parts that `backward.py` takes gradients of.

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
        self.weights: Any = None  # of queries, keys and values: read once for all chunks
        self.rope: Tensor | None = None  # sines and cosines of all tokens

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
