"""linvision: vision transformers over very long token sequences, in linear time and memory.

Importing the package registers its models with timm: `timm.create_model('linformer_vit_tiny_patch1_64')`. The modules
`linvision.convert`, `linvision.analysis` and `linvision.data`, and `linvision.create_dataset`, are imported where they
are first used, so that this import costs little more than timm's.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from linvision.version import __version__

# the program `linvision` registers them itself, for `--help` needs no torch
if TYPE_CHECKING or not getattr(sys.modules.get('linvision_command'), 'registers_later', False):
    from linvision.models import registry as registry
    from linvision.models.linformer_vit import LinformerVisionTransformer

if TYPE_CHECKING:
    from linvision import analysis as analysis
    from linvision import convert as convert
    from linvision import data as data
    from linvision.data import create_dataset

__all__ = ['LinformerVisionTransformer', '__version__', 'create_dataset']

LAZY_MODULES = ('analysis', 'convert', 'data')
LAZY_NAMES = {'create_dataset': 'linvision.data', 'LinformerVisionTransformer': 'linvision.models.linformer_vit'}


def __getattr__(name: str) -> Any:
    """Import a module or function of the package where it is first asked for (PEP 562)."""
    if name in LAZY_MODULES:
        return importlib.import_module(f'linvision.{name}')
    if name in LAZY_NAMES:
        return getattr(importlib.import_module(LAZY_NAMES[name]), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY_MODULES, *__all__})
