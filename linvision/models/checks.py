"""What a model refuses: arguments, image sizes, images and masks that it cannot honour."""

import inspect
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from linvision.installed_memory import installed_gib
from linvision.models.block import MLPS
from linvision.models.position import POSITIONS
from linvision.models.projection_kinds import PROJECTIONS
from linvision.models.rotary import check_rope
from linvision.nearest import nearest
from linvision.rules import COUNT, DEEP, FLAG, MANY, POSITIVE, RATE, SIDE, Rule, check, is_number, is_whole, positive


def is_size(x: Any) -> bool:
    """Whether it is an image or patch size."""
    sides = x if isinstance(x, tuple | list) and len(x) == 2 else [x]
    return all(is_whole(side, 1, SIDE) for side in sides)


def is_device(x: Any) -> bool:
    """Whether torch knows such a device, or none is named."""
    try:
        return x is None or bool(torch.device(x))
    except (RuntimeError, TypeError, ValueError):
        return False


DROPPED = Rule('a number from 0 to below 1', lambda x: is_number(x, 0, 1) and x < 1)
SIZE = Rule(f'{positive(SIDE).words}, or two of them (height, width)', is_size)

RULES = {
    'img_size': SIZE,
    'patch_size': SIZE,
    'in_chans': POSITIVE,
    'num_classes': COUNT,
    'embed_dim': POSITIVE,
    'depth': positive(DEEP),
    'num_heads': POSITIVE,
    'reg_tokens': COUNT,
    'local_size': Rule(
        f'0 or an odd side of at most {SIDE:,}', lambda x: is_whole(x, 0, SIDE) and (x == 0 or x % 2 == 1)
    ),
    'local_grid': Rule(f'0, or {SIZE.words}', lambda x: is_whole(x, 0, 0) or is_size(x)),
    'mlp_ratio': Rule(f'a finite number above 0 and at most {MANY:,}', lambda x: is_number(x, 0, MANY) and x > 0),
    'norm_eps': Rule('a finite number of at least 0', partial(is_number, low=0)),
    'init_values': Rule('a finite number, or None', lambda x: x is None or is_number(x)),
    'rope': Rule("a mapping with a 'rope_type'", lambda x: isinstance(x, Mapping)),
    'fc_norm': Rule('True, False or None', lambda x: x is None or isinstance(x, bool)),
    'drop_rate': RATE,
    'pos_drop_rate': RATE,
    'proj_drop_rate': RATE,
    'attn_drop_rate': RATE,
    'drop_path_rate': DROPPED,
    'patch_drop_rate': DROPPED,
    'device': Rule("a torch device, such as 'cpu' or 'cuda:0'", is_device),
    'dtype': Rule(
        'a floating-point torch.dtype, or None',
        lambda x: x is None or isinstance(x, torch.dtype) and x.is_floating_point,
    ),
}
CHOICES: dict[str, tuple[str, ...]] = {
    'pos_embed': ('', 'none', 'learn', *POSITIONS),
    'global_pool': ('', 'avg', 'avgmax', 'max', 'token', 'map', 'prr'),
    'weight_init': ('', 'skip', 'reset', 'jax', 'jax_nlhb', 'moco'),
}
# timm's names of those that act on the channels of a token
NORMS = ('layernorm', 'layernormfp32', 'rmsnorm', 'rmsnormfp32', 'simplenorm', 'simplenormfp32')
# what may be a class too
LAYERS: dict[str, tuple[str, ...]] = {
    'mlp_layer': tuple(MLPS),
    'norm_layer': NORMS,
    'embed_norm_layer': NORMS,
    'act_layer': (
        *('gelu', 'gelu_tanh', 'quick_gelu', 'relu', 'relu6', 'leaky_relu', 'elu', 'celu', 'selu', 'prelu', 'silu'),
        *('swish', 'mish', 'sigmoid', 'tanh', 'hard_sigmoid', 'hard_swish', 'hard_mish', 'identity'),
        *('hardsigmoid', 'hardswish'),
    ),
}


def check_values(values: Mapping[str, Any]) -> None:
    """Raise ValueError for the first argument whose value is none that it may have, by `RULES`, `CHOICES`, `LAYERS`."""
    check(values, RULES)
    for name, value in values.items():
        if name in CHOICES and (not isinstance(value, str) or value not in CHOICES[name]):
            raise ValueError(nearest(name, value, filter(None, CHOICES[name])))
        if name in LAYERS and isinstance(value, str):
            written = value.replace('_', '').lower() if LAYERS[name] is NORMS else value.lower()  # as timm reads it
            if written and written not in LAYERS[name]:
                raise ValueError(nearest(name, value, LAYERS[name]))
        elif name in LAYERS and value is not None and not callable(value):
            raise ValueError(f'{name} must be a class or a name ({", ".join(LAYERS[name][:3])} …), got {value!r}.')


def check_arguments(model: type[VisionTransformer], values: dict[str, Any]) -> None:
    """Raise ValueError or TypeError for arguments of a model that do not exist, cannot be, or do not go together.

    Args:
        model: The model's class; its signature and timm's say which arguments there are, and which are True or False.
        values: All arguments that were given, with the defaults of the model's own.
    """
    known = {**inspect.signature(VisionTransformer).parameters, **inspect.signature(model).parameters}
    for name in values:
        if name not in known or name == 'kwargs':
            raise TypeError(nearest('model argument', name, set(known) - {'kwargs'}))
    for name in ('block_fn', 'dynamic_img_pad'):
        if values.get(name):
            raise ValueError(f'{name} cannot be chosen: a Linformer ViT has no use for it, got {values[name]!r}.')
    if values.get('attn_layer'):
        raise ValueError(f"attn_layer cannot be chosen: the attention is Linformer's, got {values['attn_layer']!r}.")
    check(values, {name: FLAG for name in known if isinstance(known[name].default, bool)})
    check_values(values)
    check_sizes(values['img_size'], values['patch_size'])
    check_pool_token(values.get('global_pool', 'token'), values['class_token'])
    if values.get('patch_drop_rate', 0.0) > 0 and (values['projection'] != 'none' or values['local_size']):
        raise ValueError(
            f'patch_drop_rate must be 0: E needs every token of the grid, got {values["patch_drop_rate"]}.'
        )
    embed_dim, num_heads = values['embed_dim'], values['num_heads']
    if embed_dim % num_heads:
        raise ValueError(f'embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}.')
    check_rope(values)
    mlp_ratio, step = values.get('mlp_ratio', 4.0), 2 if values.get('mlp_layer') in ('glu', 'swiglu_packed') else 1
    hidden = int(embed_dim * mlp_ratio)
    if hidden < 1 or hidden % step:
        raise ValueError(
            f'mlp_ratio must give {"an even number of" if step == 2 else "some"} hidden channels, got {mlp_ratio} of '
            f'embed_dim {embed_dim}: {hidden}.'
        )


def check_memory(values: Mapping[str, Any], rows: Sequence[tuple[int, int]]) -> None:
    """Raise ValueError for a model on the CPU whose weights alone the machine's memory cannot hold.

    Args:
        values: All arguments, each of them legal.
        rows: The K rows of every layer, as `projected_rows` gives them.
    """
    device = values['device'] or torch.get_default_device()
    if torch.device(device).type != 'cpu':  # 'meta' takes none, and of its own memory a GPU says it
        return
    width, depth, patch = values['embed_dim'], values['depth'], to_2tuple(values['patch_size'])
    height, wide = (s // p for s, p in zip(to_2tuple(values['img_size']), patch, strict=True))
    kind, each = values['projection'], set(rows) if values['sharing'] == 'layerwise' else rows
    shapes = [] if kind == 'none' else [s for k in each for s in PROJECTIONS[kind].shapes((height, wide), k, 1)]
    entries = {  # at least: what is small beside these is not counted
        ('depth', 'embed_dim'): depth * width * (4 * width + int(width * values.get('mlp_ratio', 4.0))),
        ('depth', 'local_size'): depth * width * values['local_size'] ** 2,
        ('img_size', 'patch_size', 'proj_len'): sum(map(math.prod, shapes)),
        ('img_size', 'patch_size'): height * wide * width if values['pos_embed'] == 'learn' else 0,
        ('patch_size', 'in_chans'): patch[0] * patch[1] * width * values.get('in_chans', 3),
        ('embed_dim', 'num_classes'): width * values.get('num_classes', 1000),
    }
    gib = sum(entries.values()) * (values['dtype'] or torch.get_default_dtype()).itemsize / 2**30
    if gib > installed_gib():
        most = ', '.join(f'{name} {values[name]}' for name in max(entries, key=lambda k: entries[k]) if name in values)
        raise ValueError(
            f'The weights of this model take {gib:,.0f} GiB, but the machine has {installed_gib():.1f} GiB of memory: '
            f'most of them come of {most}. Choose less.'
        )


def check_pool_token(global_pool: str, class_token: bool) -> None:
    """Raise ValueError for a pooling that takes the class token of a model without one."""
    if global_pool == 'token' and not class_token:
        raise ValueError("global_pool='token' needs a class token; give class_token=True or global_pool='avg'.")


def check_indices(indices: Any, depth: int) -> None:
    """Raise ValueError for what says of no blocks that their output is wanted: how many of the last, or their indices.

    Args:
        indices: What was given; None for all.
        depth: Blocks that there are.
    """
    some = isinstance(indices, tuple | list | range) and len(indices) > 0
    if indices is not None and not (
        is_whole(indices, 1, depth) or some and all(is_whole(i, -depth, depth - 1) for i in indices)
    ):
        raise ValueError(
            f'Of {depth} blocks, the indices of some must be given ({-depth} to {depth - 1}), or how many of the last '
            f'(1 to {depth}), got {indices!r}.'
        )


def check_sizes(img_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> None:
    """Raise ValueError where an image does not divide into patches."""
    check_values({'img_size': img_size, 'patch_size': patch_size})
    image, patch = to_2tuple(img_size), to_2tuple(patch_size)
    if any(s < p or s % p for s, p in zip(image, patch, strict=True)):
        raise ValueError(f'The image size must be a multiple of the patch size, got {image} and {patch}.')


def check_image(
    x: Tensor, img_size: tuple[int, int], in_chans: int, patch_size: tuple[int, int], dynamic: bool = False
) -> None:
    """Raise ValueError for images of another size or number of channels than the model's."""
    fits = x.ndim == 4
    if fits and dynamic:
        fits = x.shape[2] % patch_size[0] == 0 and x.shape[3] % patch_size[1] == 0
    elif fits:
        fits = x.shape[2] == img_size[0] and x.shape[3] == img_size[1]
    if fits and x.shape[1] != in_chans:
        raise ValueError(
            f'Expected {in_chans} channel{"" if in_chans == 1 else "s"}, got {x.shape[1]}: convert the images, or '
            f'create the model with in_chans={x.shape[1]}.'
        )
    if not fits and dynamic:
        raise ValueError(
            f'Expected images of shape (B, {in_chans}, height, width) whose sides are multiples of the patch size '
            f'{patch_size}, got {list(x.shape)}.'
        )
    if not fits:
        raise ValueError(
            f'Expected images of shape (B, {in_chans}, {img_size[0]}, {img_size[1]}), got {list(x.shape)}. Resize the '
            f'images, call model.set_input_size(img_size=...), or create the model with img_size=... and in_chans=...'
        )


def refuse_mask(attn_mask: Tensor | None, is_causal: bool, key_padding_mask: Tensor | None) -> None:
    """Raise ValueError for masks that attention over projected rows cannot honour."""
    if is_causal:
        raise ValueError('Causal attention is impossible here: every projected row mixes tokens of the whole sequence.')
    if attn_mask is not None:
        raise ValueError(
            'An N×N attn_mask means nothing over K projected rows; for padding, give key_padding_mask, (B, N) and true '
            'for the tokens to ignore.'
        )
    if not torch.jit.is_scripting():
        if key_padding_mask is not None and not isinstance(key_padding_mask, Tensor):
            raise TypeError(
                f'key_padding_mask must be a boolean tensor, (B, N), got {type(key_padding_mask).__name__}.'
            )
