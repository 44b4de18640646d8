"""Packages that only an extra brings, and what to say where one of them is missing.

`pip install linvision` brings what models and image sets need. Everything else is imported where it is used, inside
`with needed(…)`, so that a missing package ends in a sentence with the command that installs it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

EXTRAS = {
    'albumentations': 'train',
    'cv2': 'train',
    'kornia': 'train',
    'matplotlib': 'train',
    'tensorboard': 'train',
    'tqdm': 'train',
    'tyro': 'train',
    'onnx': 'onnx',
    'onnxruntime': 'onnx',
    'onnxscript': 'onnx',
    'webdataset': 'wds',
    'sklearn': 'digits',
    'linformer': 'bench',
    'linformer_pytorch': 'bench',
}
NAMES = {'sklearn': 'scikit-learn', 'linformer_pytorch': 'linformer-pytorch', 'cv2': 'albumentations'}  # on PyPI


class MissingPackage(ModuleNotFoundError):
    """A package that an extra brings is not installed; the text names the command that installs it."""


@contextmanager
def needed(what: str) -> Iterator[None]:
    """Say what needs a package and how to install it, where an import inside fails for want of it.

    Args:
        what: What needs the packages, as the subject of a sentence.

    Raises:
        MissingPackage: A package of `EXTRAS` is not installed. Other errors pass as they are.
    """
    try:
        yield
    except MissingPackage:
        raise  # closer to the import, so that it knows better
    except ModuleNotFoundError as error:
        package = (error.name or '').partition('.')[0]
        if package not in EXTRAS:
            raise
        text = f"{what} needs {NAMES.get(package, package)}: pip install 'linvision[{EXTRAS[package]}]'"
        raise MissingPackage(text, name=error.name) from error
