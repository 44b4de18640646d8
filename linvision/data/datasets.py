"""Datasets by name: `create_dataset('fashion_mnist', root='data', split='train')`.

| name | what it reads, below `root` |
| --- | --- |
| fashion_mnist | FashionMNIST/raw; fetched |
| cifar10, cifar100 | cifar-10-batches-py, cifar-100-python; fetched by torchvision |
| the same, as image files | train/CLASS/ and test/CLASS/, or cifar10/train …; what comes of it carries a note |
| tiny_imagenet | tiny-imagenet-200, as unpacked; fetched. Or train/WNID/ and val/WNID/, or tiny_imagenet/train … |
| imagenet32, imagenet64 | train/WNID/ and val/WNID/ with images of that size, or imagenet32/train … |
| imagenette | imagenette2-320; fetched by torchvision |
| imagenet | train/ and val/ with a folder for each WordNet id, or imagenet/train and imagenet/val |
| image_folder | train/CLASS/ and val/CLASS/, or CLASS/, which is then split |
| pathfinder | nothing: made on the spot (`pathfinder.py`), 32 to 256 pixels square |
| fake | nothing: made up, of any size, for tests and throughput |
| wds/…, hfds/…, hfids/…, tfds/…, torch/… | what timm reads (`timm_sets.py`) |
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets import CIFAR10, CIFAR100

from linvision.data import fashion_mnist, small_images
from linvision.data.folders import IMAGENETTE, ImageFiles, holds_images, image_folder, imagenet, imagenette
from linvision.data.image_set import ImageSet
from linvision.data.pathfinder import Pathfinder, pathfinder
from linvision.data.timm_sets import PREFIXES, TimmImages, TimmStream, open_timm_set
from linvision.nearest import nearest
from linvision.rules import FLAG, POSITIVE, SIDE, at_least, check, positive

SPLITS = ('train', 'test', 'all')
ALIASES = {'val': 'test', 'valid': 'test', 'validation': 'test'}
PLACES = {  # of what is fetched, below its root
    'fashion_mnist': fashion_mnist.FOLDER,
    'cifar10': CIFAR10.base_folder,
    'cifar100': CIFAR100.base_folder,
    'imagenette': IMAGENETTE,
    'tiny_imagenet': small_images.TINY_IMAGENET,
}
# arguments of sets; those of timm's that are not here are timm's to check
RULES = {
    'img_size': positive(SIDE),
    'in_chans': POSITIVE,
    'num_classes': POSITIVE,
    'num_images': at_least(0, 10**9),
    'contour_length': POSITIVE,
    'seed': at_least(0, 2**63 - 1),
    'markers': FLAG,
    'cache': FLAG,
}
Images = ImageSet | ImageFiles | Pathfinder | TimmImages | TimmStream


def create_dataset(name: str, root: str | Path, split: str, download: bool = True, **arguments: Any) -> Images:
    """Open a dataset.

    Args:
        name: One of `DATASETS`, or a name of `timm.data.create_dataset` with one of its prefixes.
        root: The folder that holds the data.
        split: 'train' or 'test'; where a set has no labelled test images, its validation images are the test ('val' is
            another name for it). 'all' is every image of an `image_folder`.
        download: Fetch what is missing.
        arguments: Further ones of a dataset: those of `fake`, of `pathfinder`, and timm's.

    Returns:
        An `ImageSet` (tensors), `ImageFiles` or `TimmImages` (read one by one) or `TimmStream`. `images[i]` is an
        image and its label (a stream has none). All have `classes`, `in_chans`, `img_size`, `uncropped`, a length,
        `subset`, `statistics` and `data_config`.

    Raises:
        ValueError: An unknown name, split or argument; or a folder of other images, which nothing is fetched into.
        FileNotFoundError: The data is missing and could not be fetched; the message says what goes where.
    """
    check_name(name)
    check(arguments, RULES)
    split = ALIASES.get(split, split)
    if split not in SPLITS:
        raise ValueError(nearest('split', split, SPLITS))
    if split == 'all' and name != 'image_folder':
        raise ValueError(f"Only an image_folder has a split 'all', not {name}: take 'train' or 'test'.")
    if name in PLACES and not is_there(name, Path(root)) and holds_images(Path(root)):
        raise ValueError(
            f'{root} holds folders of images, and {name} is not among them. For your own images say --dataset '
            f'image_folder; to fetch {name}, name another folder with --data-dir.'
        )
    if name.startswith(PREFIXES):
        return open_timm_set(name, Path(root), split, download, arguments)
    try:
        return DATASETS[name](Path(root), split, download, **arguments)
    except TypeError as error:
        if 'unexpected keyword argument' not in str(error):
            raise
        raise ValueError(
            f'The data set {name} does not take {str(error).split("argument ")[-1]}: {arguments}.'
        ) from error


def is_there(name: str, root: Path) -> bool:
    """Whether a set that is fetched lies below a root, in one of the forms it has."""
    return (root / PLACES[name]).exists() or small_images.found(name, root) is not None


def part(images: Images, count: int) -> Images:
    """So many images of a set (0: all): the first, or, of files, which are sorted by class, some evenly over all."""
    if not 0 < count < len(images):
        return images
    index = torch.arange(count)
    from_files = isinstance(images, ImageFiles) or isinstance(images, ImageSet) and images.digest != ''
    return images.subset(index * len(images) // count if from_files else index)


def split_validation(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """The set without a random slice, and the slice; which images are in it depends on the seed alone."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    n = round(len(images) * fraction)
    kept, apart = images.subset(order[n:].sort().values), images.subset(order[:n].sort().values)
    if isinstance(apart, ImageSet):
        apart = replace(apart, unreadable=())  # counted once, with the others
    return kept, apart


def check_name(name: str) -> None:
    """Raise ValueError for a name of no dataset."""
    if name not in DATASETS and not name.startswith(PREFIXES):
        raise ValueError(f"{nearest('dataset', name, DATASETS)} (timm's begin with {', '.join(PREFIXES)}.)")


def _fashion_mnist(root: Path, split: str, download: bool) -> ImageSet:
    images, labels, classes = fashion_mnist.load(root, split, download)
    return ImageSet(images.unsqueeze(1), labels, classes, img_size=32)


def _cifar(kind: type[CIFAR10]) -> Callable[[Path, str, bool], ImageSet | ImageFiles]:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009), by torchvision, or as image files where those alone are there."""

    def load(root: Path, split: str, download: bool) -> ImageSet | ImageFiles:
        folder, name = root / kind.base_folder, kind.__name__.lower()
        of_files = small_images.found(name, root)
        if of_files and not folder.is_dir():
            return small_images.cifar_files(of_files, name, split, download)
        try:
            data = kind(str(root), split == 'train', download=download and not folder.is_dir())
        except (RuntimeError, OSError) as error:
            raise FileNotFoundError(
                f'{kind.__name__} is not in {folder}, or not whole, and could not be fetched ({error}). Unpack '
                f'{kind.filename} (its "python version") into {root}, so that {folder} holds its batches, or put image '
                f'files into {root / name}/train/CLASS/ and {root / name}/test/CLASS/.'
            ) from error
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()  # (n, H, W, C) -> (n, C, H, W)
        return ImageSet(images, torch.tensor(data.targets), tuple(data.classes), img_size=32)

    return load


def _fake(
    root: Path,
    split: str,
    download: bool,
    img_size: int = 16,
    in_chans: int = 1,
    num_classes: int = 10,
    num_images: int = 256,
) -> ImageSet:
    """Noisy images, each with a bright bar in its class's own row: no file, learnt in a few steps."""
    generator = torch.Generator().manual_seed(SPLITS.index(split))
    n = (num_images or 256) if split == 'train' else 100
    labels = torch.arange(n) % num_classes
    images = torch.randint(0, 96, (n, in_chans, img_size, img_size), generator=generator, dtype=torch.uint8)
    images[torch.arange(n), :, (labels + 3) % img_size] += 128
    return ImageSet(images, labels, tuple(f'bar {i}' for i in range(num_classes)), img_size)


DATASETS: dict[str, Callable[..., Images]] = {
    'fashion_mnist': _fashion_mnist,
    'cifar10': _cifar(CIFAR10),
    'cifar100': _cifar(CIFAR100),
    'imagenette': imagenette,
    'tiny_imagenet': small_images.small_imagenet('tiny_imagenet'),
    'imagenet32': small_images.small_imagenet('imagenet32'),
    'imagenet64': small_images.small_imagenet('imagenet64'),
    'imagenet': lambda root, split, download: imagenet(root, split),
    'image_folder': lambda root, split, download: image_folder(root, split),
    'pathfinder': pathfinder,
    'fake': _fake,
}
