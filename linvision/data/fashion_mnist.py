"""Fashion-MNIST (arXiv 1708.07747): 60,000 + 10,000 grey images of 28×28 pixels in ten classes.

Read by `torchvision.datasets.FashionMNIST` from `<root>/FashionMNIST/raw`. Where that is missing, it comes from
torchvision's download, and where the network refuses, from Debian's package `dataset-fashion-mnist`, whose files are
compressed otherwise than torchvision's list of checksums expects, so that they are unpacked here.
"""

import gzip
import shutil
from pathlib import Path
from urllib.error import URLError

from torch import Tensor
from torchvision.datasets import FashionMNIST

FOLDER = FashionMNIST.__name__  # below the root, as torchvision names it
PACKAGE = 'dataset-fashion-mnist'
PACKAGE_FOLDER = Path('/usr/share/datasets/fashion-mnist')
FILES = tuple(f'{part}-{kind}-ubyte' for part in ('train', 't10k') for kind in ('images-idx3', 'labels-idx1'))


def load(root: Path, split: str, download: bool) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images (n, 28, 28) as uint8, labels (n) and class names of one split.

    Raises:
        FileNotFoundError: The files are missing and no source could give them.
    """
    raw = root / FOLDER / 'raw'
    tried = [] if _complete(raw) else fetch(root) if download else ['download is switched off, as in a dry run']
    if not _complete(raw):
        raise FileNotFoundError(
            f'Fashion-MNIST is not in {raw}, and could not be fetched ({"; ".join(tried)}). One of three ways '
            f'mends it: put the files ({", ".join(FILES)}, or the same with .gz) there; let torchvision download them, '
            f'where the network allows it; or install the Debian package {PACKAGE} (apt-get install {PACKAGE}).'
        )
    dataset = FashionMNIST(str(root), train=split == 'train', download=False)
    return dataset.data, dataset.targets, tuple(dataset.classes)


def fetch(root: Path) -> list[str]:
    """Try each source until the files are there; what went wrong with each, in words."""
    raw = root / FOLDER / 'raw'
    failures = []
    for name, source in {
        'the .gz files': _unpack_present,
        "torchvision's download": _download,
        f'the installed package {PACKAGE}': _unpack_installed,
    }.items():
        try:
            raw.mkdir(parents=True, exist_ok=True)
            source(root, raw)
        except (OSError, RuntimeError, URLError) as error:
            failures.append(f'{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}')
        if _complete(raw):
            break
    return failures


def _complete(raw: Path) -> bool:
    return all((raw / name).is_file() for name in FILES)


def _unpack_present(root: Path, raw: Path) -> None:
    _unpack(raw, raw)


def _download(root: Path, raw: Path) -> None:
    FashionMNIST(str(root), download=True)


def _unpack_installed(root: Path, raw: Path) -> None:
    _unpack(PACKAGE_FOLDER, raw)


def _unpack(folder: Path, raw: Path) -> None:
    """Gunzip the four files; each appears under its name only when it is whole."""
    for name in FILES:
        part = raw / (name + '.part')
        with gzip.open(folder / (name + '.gz')) as source, part.open('wb') as target:
            shutil.copyfileobj(source, target)
        part.replace(raw / name)
