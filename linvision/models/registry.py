"""The model names that timm knows once `linvision` is imported.

Widths, depths and heads are those of timm's ViT (tiny 192/12/3, small 384/12/6, base 768/12/12, large 1024/24/16); pico
(64/4/2) is for CPUs and small images. A name ends in patch and image size, `patch1_32` has 32 × 32 = 1,024 tokens. Two
families:

- Patches of 1, 2 and 4 pixels (1,024 to 65,536 tokens): no class token, mean pooling, positions by a depth-wise
  convolution, a separable E whose rows are normalised, and a local path beside each attention (`docs/choices.md`).
- Patches of 8 and 16 pixels: timm's ViT with a linear E, so that the weights of a plain ViT of the same size load.

`docs/models.md` lists tokens, K, parameters and multiply-adds of all names. A name with weights has a tag for each
(`linformer_vit_pico_patch1_32.fashion_mnist`); as everywhere in timm, the first tag is the default, whose channels and
classes a model has that is created without any.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model

from linvision.models.checks import check_indices
from linvision.models.linformer_vit import LinformerVisionTransformer
from linvision.models.pyramid import FeaturePyramid
from linvision.models.resize import checkpoint_filter_fn
from linvision.rules import POSITIVE

__all__ = []  # timm's register_model adds the entry points

SIZES = {
    'pico': dict(embed_dim=64, depth=4, num_heads=2),
    'tiny': dict(embed_dim=192, depth=12, num_heads=3),
    'small': dict(embed_dim=384, depth=12, num_heads=6),
    'base': dict(embed_dim=768, depth=12, num_heads=12),
    'large': dict(embed_dim=1024, depth=24, num_heads=16),
}


def _cfg(img_size: int, **kwargs: Any) -> dict[str, Any]:
    return {
        'num_classes': 1000,
        'input_size': (3, img_size, img_size),
        'pool_size': None,
        'crop_pct': 0.9 if img_size >= 224 else 1.0,
        'interpolation': 'bicubic',
        'fixed_input_size': True,
        'mean': (0.5, 0.5, 0.5),
        'std': (0.5, 0.5, 0.5),
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
        'license': 'apache-2.0',
        **kwargs,
    }


WEIGHTS = Path(__file__).parents[1] / 'weights'  # that come with the package, in NAME.TAG/
SHAPE = ('in_chans', 'num_classes', 'img_size', 'global_pool')  # what timm's config of weights says itself


TRAINED = {  # what was exported with each of them, by name; the first of a model is its default
    name: json.loads((WEIGHTS / name / 'config.json').read_text())
    for name in (
        'linformer_vit_pico_patch1_32.cifar10',
        'linformer_vit_pico_patch1_32.fashion_mnist',
        'linformer_vit_pico_patch2_64.tiny_imagenet',
    )
}


def _trained(name: str) -> dict[str, Any]:
    """timm's config of weights that come with the package."""
    config = TRAINED[name]
    return {
        **config['pretrained_cfg'],
        'label_names': tuple(config['label_names']),
        'file': str(WEIGHTS / name / 'model.safetensors'),
    }


default_cfgs = generate_default_cfgs(
    {
        'test_linformer_vit.untrained': _cfg(16),
        **{name: _trained(name) for name in TRAINED},
        'linformer_vit_pico_patch1_32.untrained': _cfg(32),
        'linformer_vit_pico_patch2_32.untrained': _cfg(32),
        'linformer_vit_pico_patch4_32.untrained': _cfg(32),
        'linformer_vit_tiny_patch2_32.untrained': _cfg(32),
        'linformer_vit_pico_patch2_64.untrained': _cfg(64),
        'linformer_vit_pico_patch1_64.untrained': _cfg(64),
        'linformer_vit_pico_patch1_128.untrained': _cfg(128),
        'linformer_vit_pico_patch1_256.untrained': _cfg(256),
        'linformer_vit_tiny_patch1_32.untrained': _cfg(32),
        'linformer_vit_tiny_patch1_64.untrained': _cfg(64),
        'linformer_vit_tiny_patch1_128.untrained': _cfg(128),
        'linformer_vit_tiny_patch1_224.untrained': _cfg(224),
        'linformer_vit_tiny_patch1_256.untrained': _cfg(256),
        'linformer_vit_small_patch1_32.untrained': _cfg(32),
        'linformer_vit_small_patch1_64.untrained': _cfg(64),
        'linformer_vit_small_patch1_128.untrained': _cfg(128),
        'linformer_vit_small_patch1_224.untrained': _cfg(224),
        'linformer_vit_small_patch1_256.untrained': _cfg(256),
        'linformer_vit_base_patch1_224.untrained': _cfg(224),
        'linformer_vit_tiny_patch2_224.untrained': _cfg(224),
        'linformer_vit_small_patch2_224.untrained': _cfg(224),
        'linformer_vit_base_patch2_224.untrained': _cfg(224),
        'linformer_vit_small_patch2_512.untrained': _cfg(512),
        'linformer_vit_tiny_patch4_224.untrained': _cfg(224),
        'linformer_vit_small_patch4_224.untrained': _cfg(224),
        'linformer_vit_base_patch4_224.untrained': _cfg(224),
        'linformer_vit_base_patch4_1024.untrained': _cfg(1024),
        'linformer_vit_tiny_patch8_224.untrained': _cfg(224),
        'linformer_vit_small_patch8_224.untrained': _cfg(224),
        'linformer_vit_base_patch8_224.untrained': _cfg(224),
        'linformer_vit_large_patch8_224.untrained': _cfg(224),
        'linformer_vit_tiny_patch16_224.untrained': _cfg(224),
        'linformer_vit_small_patch16_224.untrained': _cfg(224),
        'linformer_vit_base_patch16_224.untrained': _cfg(224),
        'linformer_vit_large_patch16_224.untrained': _cfg(224),
    }
)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    """Build a variant through timm; `kwargs` override the defaults of the variant and of the weights that it names."""
    tag = kwargs.get('pretrained_cfg')
    if tag is None:  # a name without a tag is that of its default weights
        tag = getattr(get_pretrained_cfg(variant, allow_unregistered=True), 'tag', None)
    told = TRAINED.get(f'{variant}.{tag}', {'model_args': {}})['model_args']
    own = {k: v for k, v in told.items() if k not in SHAPE}
    depth = kwargs.get('depth', defaults['depth'])
    indices = kwargs.pop('out_indices', None)
    features: dict[str, Any] = {'feature_cls': 'getter'}
    refuse_output_stride(variant, {**defaults, **kwargs})
    kwargs.pop('output_stride', None)
    if 'reductions' in kwargs:
        features = {'feature_cls': FeaturePyramid, 'reductions': kwargs.pop('reductions')}
        if not kwargs.get('features_only'):
            raise ValueError('reductions are of the maps of features_only=True; give both, or neither.')
        if indices is None and isinstance(features['reductions'], Sequence):
            indices = len(features['reductions'])
    if POSITIVE.holds(depth):  # which the model itself says, if not
        indices = min(3, depth) if indices is None else indices
        check_indices(indices, depth)
    model: Any = build_model_with_cfg(
        LinformerVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={'out_indices': indices, **features},
        **{**defaults, **own, **kwargs},
    )
    if own:
        model._model_args = own  # what an export of the model must repeat; timm adds what it was asked for
    return model


def refuse_output_stride(variant: str, arguments: dict[str, Any]) -> None:
    """Raise ValueError for another output stride than the one that the model has."""
    stride, patch = arguments.get('output_stride'), arguments['patch_size']
    if stride is not None and to_2tuple(stride) != to_2tuple(patch):
        raise ValueError(
            f'The output stride of {variant} is its patch size, {patch}, in every block, got {stride}: choose a '
            f'patch_size, or with features_only=True coarser maps by reductions=(…).'
        )


def _pixels(img_size: int, patch_size: int, proj_len: int, **kwargs: Any) -> dict[str, Any]:
    """Thousands of tokens: mean pooling, positions that do not grow with N·D, a separable E, normalised rows."""
    return {
        'img_size': img_size,
        'patch_size': patch_size,
        'proj_len': proj_len,
        'projection': 'separable',
        'class_token': False,
        'global_pool': 'avg',
        'pos_embed': 'conv',
        'local_size': 3,
        'local_grid': img_size // patch_size,
        'row_norm': True,
        **kwargs,
    }


def _vit(img_size: int, patch_size: int, proj_len: int, **kwargs: Any) -> dict[str, Any]:
    """timm's ViT, with a linear E."""
    return {
        'img_size': img_size,
        'patch_size': patch_size,
        'proj_len': proj_len,
        'projection': 'linear',
        'local_grid': img_size // patch_size,
        **kwargs,
    }


@register_model
def test_linformer_vit(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT for tests: 256 tokens of one pixel, K = 16."""
    defaults = _pixels(16, 1, 16, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2)
    return _create('test_linformer_vit', pretrained, defaults, kwargs)


@register_model
def linformer_vit_pico_patch1_32(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT pico: 1,024 tokens of one pixel, K = 64."""
    defaults = _pixels(32, 1, 64, **SIZES['pico'])
    return _create('linformer_vit_pico_patch1_32', pretrained, defaults, kwargs)


@register_model
def linformer_vit_pico_patch1_64(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT pico: 4,096 tokens of one pixel, K = 256."""
    defaults = _pixels(64, 1, 256, **SIZES['pico'])
    return _create('linformer_vit_pico_patch1_64', pretrained, defaults, kwargs)


@register_model
def linformer_vit_pico_patch1_128(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT pico: 16,384 tokens of one pixel, K = 256."""
    defaults = _pixels(128, 1, 256, **SIZES['pico'])
    return _create('linformer_vit_pico_patch1_128', pretrained, defaults, kwargs)


@register_model
def linformer_vit_pico_patch1_256(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT pico: 65,536 tokens of one pixel, K = 256."""
    defaults = _pixels(256, 1, 256, **SIZES['pico'])
    return _create('linformer_vit_pico_patch1_256', pretrained, defaults, kwargs)


@register_model
def linformer_vit_tiny_patch1_32(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT tiny: 1,024 tokens of one pixel, K = 64."""
    defaults = _pixels(32, 1, 64, **SIZES['tiny'])
    return _create('linformer_vit_tiny_patch1_32', pretrained, defaults, kwargs)


@register_model
def linformer_vit_tiny_patch1_64(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT tiny: 4,096 tokens of one pixel, K = 256."""
    defaults = _pixels(64, 1, 256, **SIZES['tiny'])
    return _create('linformer_vit_tiny_patch1_64', pretrained, defaults, kwargs)


@register_model
def linformer_vit_tiny_patch1_128(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT tiny: 16,384 tokens of one pixel, K = 256."""
    defaults = _pixels(128, 1, 256, **SIZES['tiny'])
    return _create('linformer_vit_tiny_patch1_128', pretrained, defaults, kwargs)


@register_model
def linformer_vit_tiny_patch1_224(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT tiny: 50,176 tokens of one pixel, K = 256."""
    defaults = _pixels(224, 1, 256, **SIZES['tiny'])
    return _create('linformer_vit_tiny_patch1_224', pretrained, defaults, kwargs)


@register_model
def linformer_vit_tiny_patch1_256(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT tiny: 65,536 tokens of one pixel, K = 256."""
    defaults = _pixels(256, 1, 256, **SIZES['tiny'])
    return _create('linformer_vit_tiny_patch1_256', pretrained, defaults, kwargs)


@register_model
def linformer_vit_small_patch1_32(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT small: 1,024 tokens of one pixel, K = 64."""
    defaults = _pixels(32, 1, 64, **SIZES['small'])
    return _create('linformer_vit_small_patch1_32', pretrained, defaults, kwargs)


@register_model
def linformer_vit_small_patch1_64(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT small: 4,096 tokens of one pixel, K = 256."""
    defaults = _pixels(64, 1, 256, **SIZES['small'])
    return _create('linformer_vit_small_patch1_64', pretrained, defaults, kwargs)


@register_model
def linformer_vit_small_patch1_128(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT small: 16,384 tokens of one pixel, K = 256."""
    defaults = _pixels(128, 1, 256, **SIZES['small'])
    return _create('linformer_vit_small_patch1_128', pretrained, defaults, kwargs)


@register_model
def linformer_vit_small_patch1_224(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT small: 50,176 tokens of one pixel, K = 256."""
    defaults = _pixels(224, 1, 256, **SIZES['small'])
    return _create('linformer_vit_small_patch1_224', pretrained, defaults, kwargs)


@register_model
def linformer_vit_small_patch1_256(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT small: 65,536 tokens of one pixel, K = 256."""
    defaults = _pixels(256, 1, 256, **SIZES['small'])
    return _create('linformer_vit_small_patch1_256', pretrained, defaults, kwargs)


@register_model
def linformer_vit_base_patch1_224(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT base: 50,176 tokens of one pixel, K = 256."""
    defaults = _pixels(224, 1, 256, **SIZES['base'])
    return _create('linformer_vit_base_patch1_224', pretrained, defaults, kwargs)


@register_model
def linformer_vit_pico_patch2_32(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT pico: 256 tokens of 2×2 pixels, K = 64."""
    defaults = _pixels(32, 2, 64, **SIZES['pico'])
    return _create('linformer_vit_pico_patch2_32', pretrained, defaults, kwargs)


@register_model
def linformer_vit_pico_patch2_64(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT pico: 1,024 tokens of 2×2 pixels, K = 64."""
    defaults = _pixels(64, 2, 64, **SIZES['pico'])
    return _create('linformer_vit_pico_patch2_64', pretrained, defaults, kwargs)


@register_model
def linformer_vit_pico_patch4_32(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT pico: 64 tokens of 4×4 pixels, K = 16."""
    defaults = _pixels(32, 4, 16, **SIZES['pico'])
    return _create('linformer_vit_pico_patch4_32', pretrained, defaults, kwargs)


@register_model
def linformer_vit_tiny_patch2_32(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT tiny: 256 tokens of 2×2 pixels, K = 64."""
    defaults = _pixels(32, 2, 64, **SIZES['tiny'])
    return _create('linformer_vit_tiny_patch2_32', pretrained, defaults, kwargs)


@register_model
def linformer_vit_tiny_patch2_224(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT tiny: 12,544 tokens of 2×2 pixels, K = 256."""
    defaults = _pixels(224, 2, 256, **SIZES['tiny'])
    return _create('linformer_vit_tiny_patch2_224', pretrained, defaults, kwargs)


@register_model
def linformer_vit_small_patch2_224(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT small: 12,544 tokens of 2×2 pixels, K = 256."""
    defaults = _pixels(224, 2, 256, **SIZES['small'])
    return _create('linformer_vit_small_patch2_224', pretrained, defaults, kwargs)


@register_model
def linformer_vit_base_patch2_224(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT base: 12,544 tokens of 2×2 pixels, K = 256."""
    defaults = _pixels(224, 2, 256, **SIZES['base'])
    return _create('linformer_vit_base_patch2_224', pretrained, defaults, kwargs)


@register_model
def linformer_vit_small_patch2_512(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT small: 65,536 tokens of 2×2 pixels, K = 256."""
    defaults = _pixels(512, 2, 256, **SIZES['small'])
    return _create('linformer_vit_small_patch2_512', pretrained, defaults, kwargs)


@register_model
def linformer_vit_tiny_patch4_224(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT tiny: 3,136 tokens of 4×4 pixels, K = 256."""
    defaults = _pixels(224, 4, 256, **SIZES['tiny'])
    return _create('linformer_vit_tiny_patch4_224', pretrained, defaults, kwargs)


@register_model
def linformer_vit_small_patch4_224(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT small: 3,136 tokens of 4×4 pixels, K = 256."""
    defaults = _pixels(224, 4, 256, **SIZES['small'])
    return _create('linformer_vit_small_patch4_224', pretrained, defaults, kwargs)


@register_model
def linformer_vit_base_patch4_224(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT base: 3,136 tokens of 4×4 pixels, K = 256."""
    defaults = _pixels(224, 4, 256, **SIZES['base'])
    return _create('linformer_vit_base_patch4_224', pretrained, defaults, kwargs)


@register_model
def linformer_vit_base_patch4_1024(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT base: 65,536 tokens of 4×4 pixels, K = 256."""
    defaults = _pixels(1024, 4, 256, **SIZES['base'])
    return _create('linformer_vit_base_patch4_1024', pretrained, defaults, kwargs)


@register_model
def linformer_vit_tiny_patch8_224(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT tiny: 784 tokens of 8×8 pixels, K = 128."""
    defaults = _vit(224, 8, 128, **SIZES['tiny'])
    return _create('linformer_vit_tiny_patch8_224', pretrained, defaults, kwargs)


@register_model
def linformer_vit_small_patch8_224(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT small: 784 tokens of 8×8 pixels, K = 128."""
    defaults = _vit(224, 8, 128, **SIZES['small'])
    return _create('linformer_vit_small_patch8_224', pretrained, defaults, kwargs)


@register_model
def linformer_vit_base_patch8_224(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT base: 784 tokens of 8×8 pixels, K = 128."""
    defaults = _vit(224, 8, 128, **SIZES['base'])
    return _create('linformer_vit_base_patch8_224', pretrained, defaults, kwargs)


@register_model
def linformer_vit_large_patch8_224(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT large: 784 tokens of 8×8 pixels, K = 128."""
    defaults = _vit(224, 8, 128, **SIZES['large'])
    return _create('linformer_vit_large_patch8_224', pretrained, defaults, kwargs)


@register_model
def linformer_vit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT tiny: 196 tokens of 16×16 pixels, K = 64."""
    defaults = _vit(224, 16, 64, **SIZES['tiny'])
    return _create('linformer_vit_tiny_patch16_224', pretrained, defaults, kwargs)


@register_model
def linformer_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT small: 196 tokens of 16×16 pixels, K = 64."""
    defaults = _vit(224, 16, 64, **SIZES['small'])
    return _create('linformer_vit_small_patch16_224', pretrained, defaults, kwargs)


@register_model
def linformer_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT base: 196 tokens of 16×16 pixels, K = 64."""
    defaults = _vit(224, 16, 64, **SIZES['base'])
    return _create('linformer_vit_base_patch16_224', pretrained, defaults, kwargs)


@register_model
def linformer_vit_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT large: 196 tokens of 16×16 pixels, K = 64."""
    defaults = _vit(224, 16, 64, **SIZES['large'])
    return _create('linformer_vit_large_patch16_224', pretrained, defaults, kwargs)
