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
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from linvision.reweighted import reweighted
from linvision.streaming.backward import Backward
from linvision.streaming.forward import Forward
from linvision.streaming.parts import Grid, StreamedBlock, drop_path_scales


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
            results.append(Forward(block, images, *settings).run(projection, None if out is None else out[part]))
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
        return Forward(block, x, *settings).run(list(inputs[len(names) :]))

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
            forward = Forward(reweighted(ctx.block, weights), x, *ctx.settings)
            return None, None, None, *Backward(forward, inputs).gradients(grad)
