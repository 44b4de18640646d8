"""A streamed block backward: each chunk once more, with gradients, then back through keys and values.

Keys, values, the weights of attention and the statistics of `token_norm` are leaves, where the graphs of chunks end.
Their gradients add up over the chunks, and go on to tokens, E and parameters when all chunks are done.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states

from linvision.streaming.forward import Forward
from linvision.streaming.parts import KeysValues, Weights


class Backward:
    """The gradients of a block over some images.

    Args:
        forward: The block over these images; gets leaves in place of weights and statistics.
        inputs: The block's parameters that learn, then the projection tensors; all leaves.
    """

    def __init__(self, forward: Forward, inputs: list[Tensor]) -> None:
        self.forward, self.inputs = forward, inputs
        self.block, self.x, self.cut = forward.block, forward.x, forward.cut
        self.projection = forward.take_rope(inputs[sum(p.requires_grad for p in self.block.parameters()) :])
        self.weights = self.block.attn.split_weights(self.x)
        ends: list[Any] = [None if w is None else w.detach().requires_grad_(w.requires_grad) for w in self.weights]
        forward.weights = Weights(*ends)
        leaves = [*inputs, *ends]
        if self.block.token_norm:
            forward.statistics1 = forward.statistics(self.block.norm1, self.x).requires_grad_()
            leaves.append(forward.statistics1)
        self.learning = [t for t in leaves if t is not None and t.requires_grad]
        self.sums: dict[int, Tensor] = {}  # their gradients, by identity
        self.dx = torch.zeros_like(self.x)
        self.edges = self.x.detach().requires_grad_()
        self.halo = self.cut.halo(self.edges)

    def gradients(self, grad: Tensor) -> list[Tensor | None]:
        """Gradients of the tokens and of the inputs, from that of the output, (B, P + N, D)."""
        sources, made = self.key_value()
        key, value = (t.detach().requires_grad_() for t in made[:2])
        if self.block.token_norm:
            grad = self.before_mlp(grad, (key, value, made[2]))
        self.through_key_value(sources, made, self.through_chunks(grad, (key, value, made[2])))
        statistics = self.forward.statistics1
        if statistics is not None:
            self.through_statistics(self.dx, self.block.norm1, self.x, statistics.detach(), self.sums[id(statistics)])
        self.through_weights()
        return [self.dx, *(self.sums[id(t)].to(t.dtype) if id(t) in self.sums else None for t in self.inputs)]

    def back(self, outputs: list[Tensor], grads: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
        """Gradients of the inputs; those of what learns are added up."""
        got = torch.autograd.grad(outputs, [*inputs, *self.learning], grads, allow_unused=True)
        for tensor, g in zip(self.learning, got[len(inputs) :], strict=True):
            if g is None:
                continue
            if id(tensor) in self.sums:
                self.sums[id(tensor)].add_(g)
            else:  # a copy: autograd may hand the same tensor out twice
                self.sums[id(tensor)] = g.to(torch.promote_types(g.dtype, torch.float32), copy=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, got, strict=False)]

    def key_value(self) -> tuple[list[Tensor], KeysValues]:
        """What keys and values are made of, as leaves, and them: of E x and the prefix tokens, or of all tokens."""
        forward = self.forward
        if not forward.by_parts:
            tokens = self.x.clone().requires_grad_()
            return [tokens], forward.key_value_of_all(tokens, self.projection)
        with torch.no_grad():
            rows = forward.reduce(self.projection)
        sources = [r.requires_grad_() for r in (*rows, self.x[:, : forward.P].clone())]
        return sources, forward.key_value(sources[:-1], sources[-1], self.projection)

    def through_chunks(self, grad: Tensor, keys_values: KeysValues) -> list[Tensor]:
        """Back through all that follows the keys and values, chunk by chunk: their gradients, in fp32 at least."""
        forward, (key, value, mask), dx = self.forward, keys_values, self.dx
        totals = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in (key, value)]
        dhalo = None if self.halo is None else self.halo._replace(received=torch.zeros_like(self.halo.received))
        tokens, gradients = self.cut.with_halo(self.x, self.halo), self.cut.with_halo(dx, dhalo)
        for chunk in self.cut.chunks():
            x = forward.context(tokens, chunk).requires_grad_()
            y = forward.output(self.block, x, key, value, mask, chunk)
            part, *parts = self.back([y], [self.cut.rows(grad, chunk.own).flatten(1, 2)], [x, key, value])
            if chunk.context is None:
                dx[:, : forward.P] += part
            else:
                gradients.add(chunk.context, part.unflatten(1, (-1, forward.grid[1])))
            for total, part in zip(totals, parts, strict=True):
                total += part
        if self.halo is not None and dhalo is not None:
            dx += torch.autograd.grad(self.halo.received, self.edges, dhalo.received)[0]
        return totals

    def through_key_value(self, sources: list[Tensor], made: KeysValues, grads: list[Tensor]) -> None:
        """Back through keys and values to the tokens, of which each part gave its share of E x."""
        forward, dx = self.forward, self.dx
        got = self.back(list(made[:2]), [g.to(t.dtype) for g, t in zip(grads, made[:2], strict=True)], sources)
        if not forward.by_parts:
            dx += got[0]
            return
        dx[:, : forward.P] += got[-1]
        totals = [r.detach() for r in sources[:-1]]
        if forward.band is not None:  # of all processes' losses
            got = [forward.band.sum(g) for g in got]
        for own in self.cut.parts():
            x = self.cut.rows(self.x, own).requires_grad_()
            # a part's share of the whole: the gradient is right, the value counts the part twice
            shares = forward.merge(totals, forward.reduce_rows(x, self.projection, own))
            self.cut.rows(dx, own).add_(self.back(shares, got[:-1], [x])[0])

    def through_weights(self) -> None:
        """Back through the weights of attention, which a wrapper may have made of others."""
        pairs = zip(self.weights, self.forward.weights, strict=True)
        used = [(w, self.sums[id(leaf)].to(w.dtype)) for w, leaf in pairs if w is not None and id(leaf) in self.sums]
        if used:
            self.back([w for w, _ in used], [g for _, g in used], [])

    def before_mlp(self, grad: Tensor, keys_values: KeysValues) -> Tensor:
        """Where a norm over all tokens stands before the MLP, the gradient of the tokens before that norm.

        Args:
            grad: Gradient of the block's output.
            keys_values: Keys, values and mask.
        """
        forward, devices = self.forward, get_device_states(self.x)[0]
        kind = self.x.device.type if devices else 'cuda'  # without devices, any
        drawn = self.block.training  # the first branch once more, after this
        with torch.random.fork_rng(devices, enabled=drawn, device_type=kind):
            with torch.no_grad():
                tokens = forward.outputs(self.block, self.halo, keys_values)
            statistics = forward.statistics(self.block.norm2, tokens).requires_grad_()
            dtokens, dstatistics = torch.empty_like(tokens), torch.zeros_like(statistics)
            for own in self.cut.parts():
                x = self.cut.rows(tokens, own).flatten(1, 2).requires_grad_()
                y = forward.add_mlp(self.block, x, own, statistics)
                dx, part = self.back([y], [self.cut.rows(grad, own).flatten(1, 2)], [x, statistics])
                dstatistics += part
                place = self.cut.rows(dtokens, own)
                place.copy_(dx.view(place.shape))
            self.through_statistics(dtokens, self.block.norm2, tokens, statistics.detach(), dstatistics)
            return dtokens

    def through_statistics(self, total: Tensor, norm: Any, tokens: Tensor, statistics: Tensor, grad: Tensor) -> None:
        """Add to a gradient of the tokens what they get through the statistics, of whose gradient this is a part."""
        grad, count = norm.over_image(grad), self.cut.count(self.x.device)
        for own in self.cut.parts():
            x = self.cut.rows(tokens, own)
            dx = norm.through_statistics(x.flatten(1, 2), self.cut.valid_in(own), statistics, grad, count)
            self.cut.rows(total, own).add_(dx.view(x.shape))
