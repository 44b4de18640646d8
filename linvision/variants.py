"""The model names that timm knows once `linvision` is imported.

Widths, depths and heads are those of timm's ViT (tiny 192/12/3); pico (64/4/2) is for CPUs and small images. The number
at the end of a name is the image size: with a patch of one pixel, `patch1_32` has 1,024 tokens.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from linvision.network import LinformerVisionTransformer

__all__ = []  # timm's register_model adds the entry points


def _cfg(img_size: int, **kwargs: Any) -> dict[str, Any]:
    return {
        'num_classes': 1000,
        'input_size': (3, img_size, img_size),
        'pool_size': None,
        'crop_pct': 1.0,
        'interpolation': 'bicubic',
        'fixed_input_size': True,
        'mean': (0.5, 0.5, 0.5),
        'std': (0.5, 0.5, 0.5),
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
        'license': 'apache-2.0',
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        'test_linformer_vit.untrained': _cfg(16),
        'linformer_vit_pico_patch1_32.untrained': _cfg(32),
        'linformer_vit_tiny_patch1_32.untrained': _cfg(32),
    }
)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    """Build a variant through timm; `kwargs` override the variant's defaults."""
    return build_model_with_cfg(
        LinformerVisionTransformer,
        variant,
        pretrained,
        feature_cfg={'out_indices': kwargs.pop('out_indices', min(3, defaults['depth'])), 'feature_cls': 'getter'},
        **{**defaults, **kwargs},
    )


def _pixels(img_size: int, **kwargs: Any) -> dict[str, Any]:
    """One token a pixel: no class token, mean pooling, positions that do not grow with N·D, and a local path."""
    return {
        'img_size': img_size,
        'patch_size': 1,
        'class_token': False,
        'global_pool': 'avg',
        'pos_embed': 'conv',
        'projection': 'separable',
        'local_size': 3,
        **kwargs,
    }


@register_model
def test_linformer_vit(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT for tests: 256 tokens of one pixel, K = 16."""
    defaults = _pixels(16, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, proj_len=16)
    return _create('test_linformer_vit', pretrained, defaults, kwargs)


@register_model
def linformer_vit_pico_patch1_32(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT pico: 1,024 tokens of one pixel, K = 64."""
    defaults = _pixels(32, embed_dim=64, depth=4, num_heads=2, proj_len=64)
    return _create('linformer_vit_pico_patch1_32', pretrained, defaults, kwargs)


@register_model
def linformer_vit_tiny_patch1_32(pretrained: bool = False, **kwargs: Any) -> LinformerVisionTransformer:
    """Linformer ViT tiny: 1,024 tokens of one pixel, K = 64."""
    defaults = _pixels(32, embed_dim=192, depth=12, num_heads=3, proj_len=64)
    return _create('linformer_vit_tiny_patch1_32', pretrained, defaults, kwargs)
