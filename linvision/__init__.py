"""linvision: vision transformers over very long token sequences, in linear time and memory.

Importing the package registers its models with timm: `timm.create_model('linformer_vit_tiny_patch1_64')`.
"""

from linvision import variants as variants
from linvision.network import LinformerVisionTransformer
from linvision.version import __version__

__all__ = ['LinformerVisionTransformer', '__version__']
