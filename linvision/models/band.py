"""One image over several processes: each has a band, neighbouring rows of the token grid (idea: arXiv 2105.13120).

Everything after keys and values acts on each token alone, and these come of K projected rows. So a block of a band is a
block, but for three things, all of which a `Band` does:

- E x of the image: what E makes of each band, joined over the processes (`Kind.total`). K·D numbers a layer (K·(D + 2)
  for `dynamic`, 3·K·D for `max_pool`), whatever N is; ring attention sends 2·N·D.
- The rows above and below that a local convolution reads: from the neighbours, no more than it reaches.
- The mean over all tokens before the head: D numbers an image.

All else that stands outside the token grid (class and register tokens, weights, logits) is the same in every process.

Gradients. What is differentiated is the sum of the losses of all processes, and the backward pass of each exchange is
its transpose: that of a sum over processes is the sum of their gradients; that of rows which were sent is the gradients
of those rows, sent back. All processes of an image have the same loss, so that this sum is `count` times the loss. **So
the mean over the processes of their gradients of a weight is its gradient in one process**, and DDP and FSDP2 take that
mean. It is equal to 1e-10 in float64 (`tests/test_sequence_parallel.py`).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh

from linvision.streaming.parts import Grid, StreamedKind
from linvision.streaming.rows import Halo


class Band:
    """This process's rows of the token grid, among the processes of a group; every method is called by all of them.

    Args:
        mesh: The processes that share an image, in one dimension.

    Attributes:
        count: How many processes there are.
        rank: Which of them this is; the first has the uppermost rows.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group, self.rank, self.count = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        # small numbers need not wait for what is queued on a card
        self.asks_on = torch.device('cpu') if 'cpu:' in dist.get_backend_config(self.group) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> 'Band':
        return self  # a copy of a model, such as its moving average, has the same band

    # -------------------------------------------------------------------------------------------- which part it is

    def rows(self, height: int, rank: int | None = None) -> slice:
        """The rows of this process, or of another, of the `height` rows of an image."""
        return band_rows(height, self.rank if rank is None else rank, self.count)

    def grid(self, grid: Grid, rank: int | None = None) -> Grid:
        """The token grid of this process, or of another, of that of the image."""
        own = self.rows(grid[0], rank)
        return own.stop - own.start, grid[1]

    def tokens(self, x: Tensor, grid: Grid, prefix: int = 0) -> Tensor:
        """The prefix, and this process's of the tokens of an image: (B, P + N, ...) -> (B, P + n, ...)."""
        own = self.rows(grid[0])
        mine = x[:, prefix + own.start * grid[1] : prefix + own.stop * grid[1]]
        return torch.cat([x[:, :prefix], mine], dim=1) if prefix else mine

    # --------------------------------------------------------------------------------------------- over the processes

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the processes; the gradient is the sum of theirs."""
        total: Tensor = Sum.apply(x, self.group)
        return total

    @torch.no_grad()
    def max(self, x: Tensor) -> Tensor:
        """The largest over the processes, without a gradient."""
        largest = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest

    def largest(self, x: Tensor) -> Tensor:
        """The largest over the processes; those that have it share its gradient."""
        mine = x == self.max(x)
        values, owners = self.sum(torch.stack([x.where(mine, 0.0), mine.to(x.dtype)])).unbind()
        return values / owners

    def whole(self, mask: Tensor, grid: Grid) -> Tensor:
        """A mask of the image's tokens from those of the bands: (B, n) -> (B, N), boolean."""
        own = self.rows(grid[0])
        above, below = own.start * grid[1], (grid[0] - own.stop) * grid[1]
        return self.max(F.pad(mask.to(torch.uint8), (above, below))).bool()

    def agreed(self, chunks: list[int], x: Tensor) -> list[int]:
        """The chunk sizes of the blocks, so that all processes run a block whole (0), or all in chunks.

        Bands differ by a row, and cards in what is free; but what runs in chunks exchanges more than what runs whole.
        """
        return self.max(torch.tensor(chunks, device=self.asks_on or x.device)).tolist()

    def halo(self, x: Tensor, grid: Grid, reach: int) -> Halo:
        """The rows above and below this band, `reach` of each, no more than the image has; on their way meanwhile.

        Args:
            x: This process's tokens, (B, n, D).
            grid: Token grid of the image.
            reach: Rows that are read above and below; they may lie in more than the next band.
        """
        height, width = grid
        x = x.unflatten(1, (-1, width))  # (B, rows, width, D)
        own, others = self.rows(height), [self.rows(height, rank) for rank in range(self.count)]
        gives = [common(own, reached(other, reach)) if other != own else slice(0, 0) for other in others]
        takes = [common(other, reached(own, reach)) if other != own else slice(0, 0) for other in others]
        offset = own.start
        sent = torch.cat([x[:, g.start - offset : g.stop - offset] for g in gives if g.stop > g.start] or [x[:, :0]], 1)
        received = all_to_all_single_autograd(
            sent.transpose(0, 1).contiguous(),  # rows first: these are counted out
            [t.stop - t.start for t in takes],
            [g.stop - g.start for g in gives],
            self.group,
        )
        return Halo(received, min(own.start, reach))

    # ------------------------------------------------------------------------------------------- what a model asks for

    def reduce(self, kind: StreamedKind, x: Tensor, factors: list[Tensor], grid: Grid, rows: Grid) -> Tensor:
        """E x of all tokens, from this process's: (..., n, D) -> (..., K, D)."""
        part = kind.partial(x, factors, self.rows(grid[0]), grid, rows)
        part = part.to(torch.promote_types(part.dtype, torch.float32))  # a sum of many
        return kind.finish(kind.total(part, self)).to(x.dtype)

    def pool(self, x: Tensor, kind: str, prefix: int, grid: Grid, padding: Tensor | None, with_prefix: bool) -> Tensor:
        """timm's pooling over the tokens of the image: (B, P + n, D) -> (B, D).

        Args:
            x: The prefix and this process's tokens.
            kind: timm's name: '', 'token', 'avg', 'max' or 'avgmax'; '' leaves the tokens as they are.
            prefix: P, tokens before those of the grid.
            grid: Token grid of the image.
            padding: Which of this process's tokens are padding, (B, n); None for none.
            with_prefix: Whether the prefix counts.
        """
        if not kind or kind == 'token':
            return x[:, 0] if kind else x
        first, tokens = x[:, : prefix * with_prefix], x[:, prefix:]
        if kind == 'max':
            return self.largest(torch.cat([first, tokens], dim=1).amax(1))
        n: Tensor | int = grid[0] * grid[1]
        if padding is not None:
            tokens = tokens.masked_fill(padding.unsqueeze(-1), 0.0)
            n = self.sum((~padding).sum(1, keepdim=True))
        wide = torch.promote_types(x.dtype, torch.float32)
        mean = (self.sum(tokens.sum(1, dtype=wide)) + first.sum(1, dtype=wide)) / (n + first.shape[1])
        if kind == 'avgmax':
            mean = 0.5 * (mean + self.pool(x, 'max', prefix, grid, None, with_prefix))
        return mean.to(x.dtype)


class Sum(torch.autograd.Function):
    """The sum over the processes of a group; so is its backward pass, of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Sum.apply(grad, ctx.group), None


def band_rows(height: int, rank: int, count: int) -> slice:
    """The rows of a process of `count`, of `height` rows: neighbouring ones; the first processes may have one more."""
    each, more = divmod(height, count)
    start = rank * each + min(rank, more)
    return slice(start, start + each + (rank < more))


def reached(rows: slice, reach: int) -> slice:
    """Some rows, with those that are within reach of them."""
    return slice(rows.start - reach, rows.stop + reach)


def common(a: slice, b: slice) -> slice:
    """The rows that are in both."""
    start = max(a.start, b.start)
    return slice(start, max(start, min(a.stop, b.stop)))


def check_shared(model: Any, count: int) -> None:
    """Raise ValueError for a model of which `count` processes cannot share an image at its present size.

    Args:
        model: A `LinformerVisionTransformer`.
        count: How many processes there are.
    """
    grid = model.patch_embed.grid_size
    full = [i for i, block in enumerate(model.blocks) if block.attn.is_full(grid)]
    reasons = {
        f'layers {some(full)} run full attention over all {grid[0] * grid[1]:,} tokens of the image. Choose a '
        'projection with K below them': bool(full),
        f'it has {grid[0]} rows of tokens for {count} processes. Choose fewer, or larger images': grid[0] < count,
        'rotary positions are those of whole images. Choose a model without rope': model.rope is not None,
        'with dynamic_img_size a band does not say how large its image is. Call set_input_size instead': (
            model.dynamic_img_size
        ),
        f"global_pool '{model.global_pool}' attends to all tokens. Choose 'avg', 'max', 'avgmax' or 'token'": (
            model.attn_pool is not None or model.global_pool == 'prr'
        ),
        'dropout of tokens or of attention is drawn in each process, and the class token would differ. Set '
        'pos_drop_rate, patch_drop_rate, proj_drop_rate and attn_drop_rate to 0; drop_path_rate may stay': (
            drops_tokens(model)
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f'Several processes cannot share an image with this model: {reason}.')


def some(layers: Sequence[int]) -> str:
    """Numbers of layers, in words."""
    return ', '.join(map(str, layers[:3])) + (' …' if len(layers) > 3 else '')


def drops_tokens(model: Any) -> bool:
    """Whether it has dropout of single tokens, channels or attention weights, or of patches."""
    modules = [model.pos_drop, *(m for block in model.blocks for m in block.modules())]
    drops = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in modules)
    return drops or not isinstance(model.patch_drop, torch.nn.Identity)
