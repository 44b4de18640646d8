"""How many tokens a block handles at a time: the rule behind `chunk_size='auto'`.

A chunk is small enough for the MLP's hidden layer to stay in cache. Whole blocks are used where something must see the
model's operators one by one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from linvision.autocast import compute_dtype
from linvision.compiled import looked_into
from linvision.streaming import cpu_kernels
from linvision.streaming.parts import StreamedBlock

CACHE_BYTES = 8 * 2**20  # what the hidden layer of a chunk may take on a CPU
# Numbers that a whole block keeps for the backward pass, for each token and channel, about: on a GPU 15.4, counted at
# 16,384 tokens in bf16; on a CPU below fp32 the attention weights come on top.
KEPT_NUMBERS = {'cpu': 24, 'gpu': 16}
TOKEN_NORM_NUMBERS = 2  # more for `token_norm` below fp32, whose norms keep fp32 in place of what they were given
# On a CPU training recomputes (1.4 times the time, a fifth of the memory) where blocks would keep more than this; on a
# GPU so many blocks that the others keep no more than a share of what is free.
KEPT_BYTES = 2**32
WHOLE_SHARE = 0.8
# Of what is free on a GPU, for all that one chunk needs: few large chunks, since each costs launches.
CHUNK_SHARE = 0.125


def choose_chunk_sizes(
    chunk_size: int | str, x: Tensor, blocks: Sequence[StreamedBlock], on_grid: bool = True
) -> list[int]:
    """Images × tokens in a chunk of each block for tokens x. All that keeps blocks whole (0) is here.

    Args:
        chunk_size: What the model was told: 'auto', 0 or a number.
        x: Tokens, (B, N, D), with or without prefix.
        blocks: The model's blocks.
        on_grid: Whether x are the tokens of the whole grid; patch dropout leaves some of them only.
    """
    depth = len(blocks)
    whole = [0] * depth
    if chunk_size == 0 or not on_grid:
        return whole
    if not isinstance(x, Tensor) or x.is_meta:  # a proxy of torch.fx; nothing is computed
        return whole
    if x.shape[0] == 0:  # there is nothing to cut
        return whole
    if getattr(blocks[0], '_is_replica', False):  # of nn.DataParallel, which has no parameters for `Recomputed` to name
        return whole
    if not blocks[0].attn.fused_attn or looked_into(*(m for block in blocks for m in block.modules())):
        return whole
    if chunk_size != 'auto':
        return [int(chunk_size)] * depth
    if not torch.is_grad_enabled():
        return [auto_chunk_size(x, blocks[0].hidden)] * depth
    n = whole_blocks(x.numel(), depth, compute_dtype(x), x.device, blocks[0].token_norm)
    return whole if n == depth else whole[:n] + [chunk_tokens(x, blocks[0].hidden)] * (depth - n)


def whole_blocks(numbers: int, depth: int, dtype: torch.dtype, device: torch.device, token_norm: bool = False) -> int:
    """How many blocks run whole in training, the first ones: all that fit; on a CPU all of them or none.

    A streamed block computes twice, so that none is streamed in vain. (On a CPU memory is not what is short: there
    chunks that stay in cache make up for half of that.)

    Args:
        numbers, depth, dtype, device, token_norm: As for `kept_bytes`.
    """
    kept, limit = kept_bytes(numbers, depth, dtype, device, token_norm), whole_bytes(device)
    if kept < limit:
        return depth
    if device.type == 'cpu':
        return 0
    inputs = numbers * dtype.itemsize  # what a streamed block keeps
    return max(0, (limit - depth * inputs) // (kept // depth - inputs))


def kept_bytes(numbers: int, depth: int, dtype: torch.dtype, device: torch.device, token_norm: bool = False) -> int:
    """What whole blocks keep for the backward pass, about.

    Args:
        numbers: Numbers in the tokens x of a block, B · N · D.
        depth: Blocks.
        dtype: What is computed in.
        device: Where.
        token_norm: Whether the blocks have norms over all tokens.
    """
    each = KEPT_NUMBERS['cpu' if device.type == 'cpu' else 'gpu']
    each += TOKEN_NORM_NUMBERS * (token_norm and dtype.itemsize < 4)
    return each * numbers * depth * dtype.itemsize


def whole_bytes(device: torch.device) -> int:
    """Up to how much whole blocks may keep in training; where it is more, blocks are streamed."""
    return KEPT_BYTES if device.type == 'cpu' else int(WHOLE_SHARE * free_bytes(device))


def free_bytes(device: torch.device) -> int:
    """What is free on an accelerator, with what torch has cached there; without a way to ask, 8 GiB."""
    if device.type != 'cuda':
        return 2**33
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def chunk_tokens(x: Tensor, hidden: int) -> int:
    """Images × tokens in a chunk: on a CPU an MLP layer `hidden` wide stays in cache; a power of two."""
    itemsize = compute_dtype(x).itemsize
    if x.is_cpu:
        tokens = CACHE_BYTES // (hidden * itemsize)
    else:
        tokens = int(CHUNK_SHARE * free_bytes(x.device)) // (KEPT_NUMBERS['gpu'] * x.shape[-1] * itemsize)
    return max(256, 2 ** (tokens.bit_length() - 1))


def auto_chunk_size(x: Tensor, hidden: int) -> int:
    """Images × tokens in a chunk without gradients; 0, whole, where streaming gains nothing.

    Args:
        x: Tokens, (B, N, D).
        hidden: Width of the MLP's hidden layer.
    """
    tokens, dtype = chunk_tokens(x, hidden), compute_dtype(x)
    fused = x.is_cpu and cpu_kernels.supports(dtype)
    least = cpu_kernels.FUSED_TOKENS if fused else tokens + 1
    return tokens if x.shape[0] * x.shape[1] >= least else 0
