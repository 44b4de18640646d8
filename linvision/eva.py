"""timm's `Eva` (EVA-02, DINOv3, RoPE-ViT, Perception Encoder) as arguments and weights of a Linformer ViT.

These ViTs have rotary positions. Their blocks compute what a ViT's do and spell it otherwise: layer scale is `gamma_1`,
the biases of queries and values are tensors of their own (keys have none), and queries, keys and values may be three
layers. What has no equal in a Linformer ViT is refused: norms after the branches, groups of heads that share keys.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed
from torch import Tensor

# the arguments of each kind of rotary positions, which its module keeps by the same names
AUGMENTED = ('shift_coords', 'jitter_coords', 'rescale_coords')
ROPE_ARGUMENTS: dict[type, tuple[str, tuple[str, ...]]] = {
    RotaryEmbeddingCat: (
        'cat',
        (
            *('max_res', 'temperature', 'in_pixels', 'linear_bands', 'ref_feat_shape', 'grid_offset', 'grid_indexing'),
            *('rotate_half', 'grid_type', 'normalize_coords'),
        ),
    ),
    RotaryEmbeddingMixed: ('mixed', ('temperature', 'grid_indexing')),
    RotaryEmbeddingDinoV3: (
        'dinov3',
        (
            *('temperature', 'min_period', 'max_period', 'normalize_coords', 'grid_offset', 'grid_indexing'),
            'rotate_half',
        ),
    ),
}


def eva_arguments(model: Any, is_part: Callable[[Any], bool]) -> dict[str, Any]:
    """The arguments of a Linformer ViT that are about what `Eva` spells otherwise than `VisionTransformer`.

    Args:
        model: The model.
        is_part: Whether an optional part is there.

    Raises:
        ValueError: It has a part that a Linformer ViT does not have.
    """
    block = model.blocks[0]
    state = model.state_dict()
    if type(block).__name__ != 'EvaBlock':
        raise ValueError(f'A block cannot be converted: a {type(block).__name__} has its norms after its branches.')
    if any(getattr(b.attn, 'num_kv_groups', 1) > 1 for b in model.blocks):
        raise ValueError('The attention cannot be converted: groups of heads share keys and values.')
    if block.gamma_1 is not None and block.gamma_2 is None:
        raise ValueError('A block cannot be converted: its layer scale is of the attention alone.')
    if is_part(model.norm) and is_part(model.fc_norm):
        raise ValueError('The model cannot be converted: it has a norm before pooling and another after it.')
    return {
        'qkv_bias': any(f'blocks.0.attn.{name}' in state for name in ('q_bias', 'qkv.bias', 'q_proj.bias')),
        'proj_bias': True,
        'class_token': model.cls_token is not None,
        'reg_tokens': 0 if model.reg_token is None else model.reg_token.shape[1],
        'pool_include_prefix': False,
        'rope': {} if model.rope is None else rope_arguments(model.rope),
        **({} if block.gamma_1 is None else {'init_values': 1.0}),  # the weights come from the original
    }


def rope_arguments(rope: Any) -> dict[str, Any]:
    """The type of rotary positions, and those of its arguments that have a value."""
    if type(rope) not in ROPE_ARGUMENTS:
        raise ValueError(f'Rotary positions cannot be converted: there is no counterpart of {type(rope).__name__}.')
    kind, names = ROPE_ARGUMENTS[type(rope)]
    found = {name: getattr(rope, name) for name in (*names, *AUGMENTED)}
    return {'rope_type': kind} | {
        name: list(value) if isinstance(value, tuple) else value for name, value in found.items() if value is not None
    }


def eva_state(model: Any) -> dict[str, Tensor]:
    """The weights by the names of a ViT."""
    state = dict(model.state_dict())
    for i, block in enumerate(model.blocks):
        attn, name = block.attn, f'blocks.{i}.attn.'
        if attn.qkv is None:
            layers = (attn.q_proj, attn.k_proj, attn.v_proj)
            weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        else:
            weights, biases = [attn.qkv.weight], [attn.qkv.bias]
            if getattr(attn, 'q_bias', None) is not None:
                biases = [attn.q_bias, None, attn.v_bias]
        for key in ('q_bias', 'v_bias', *(f'{x}_proj.{y}' for x in 'qkv' for y in ('weight', 'bias'))):
            state.pop(name + key, None)
        state[name + 'qkv.weight'] = torch.cat(weights)
        if any(bias is not None for bias in biases):
            like = next(bias for bias in biases if bias is not None)
            state[name + 'qkv.bias'] = torch.cat([torch.zeros_like(like) if b is None else b for b in biases])
        for ours, theirs in (('ls1.gamma', 'gamma_1'), ('ls2.gamma', 'gamma_2')):
            if f'blocks.{i}.{theirs}' in state:
                state[f'blocks.{i}.{ours}'] = state.pop(f'blocks.{i}.{theirs}')
    return {key: value.detach() for key, value in state.items()}
