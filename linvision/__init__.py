"""linvision: vision transformers over very long token sequences, in linear time and memory.

Importing the package registers its models with timm: `timm.create_model('linformer_vit_tiny_patch1_64')`. The modules
`linvision.convert`, `linvision.analysis` and `linvision.data`, and `linvision.create_dataset`, are imported where they
are first used, so that this import costs little more than timm's.
"""

import importlib
from typing import TYPE_CHECKING, Any

from linvision.models import registry as registry
from linvision.models.linformer_vit import LinformerVisionTransformer
from linvision.version import __version__

if TYPE_CHECKING:
    from linvision import analysis as analysis
    from linvision import convert as convert
    from linvision import data as data
    from linvision.data import create_dataset

__all__ = ['LinformerVisionTransformer', '__version__', 'create_dataset']

LAZY_MODULES = ('analysis', 'convert', 'data')


def __getattr__(name: str) -> Any:
    """Import a module or function of the package where it is first asked for (PEP 562)."""
    if name in LAZY_MODULES:
        return importlib.import_module(f'linvision.{name}')
    if name == 'create_dataset':
        return importlib.import_module('linvision.data').create_dataset
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY_MODULES, *__all__})
