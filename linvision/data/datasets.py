"""Datasets by name: `create_dataset('fashion_mnist', 'data', 'train')`."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from linvision.data import fashion_mnist
from linvision.nearest import nearest

SPLITS = ('train', 'test')


@dataclass(frozen=True)
class ImageSet:
    """A labelled set of images that fits into memory.

    Attributes:
        images: (n, C, H, W), uint8.
        labels: (n), int64.
        classes: Names of the classes, by label.
        img_size: The size that a model sees: smaller images are centred on a canvas of this size, in the mean colour.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    img_size: int

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> 'ImageSet':
        """The images at the given positions."""
        return ImageSet(self.images[index], self.labels[index], self.classes, self.img_size)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, on the scale 0..1 and rounded to four digits."""
        pixels = self.images.transpose(0, 1).flatten(1).float() / 255
        std, mean = torch.std_mean(pixels, dim=1, correction=0)
        return tuple(round(m, 4) for m in mean.tolist()), tuple(max(round(s, 4), 1e-4) for s in std.tolist())


def create_dataset(name: str, root: str | Path, split: str, download: bool = True) -> ImageSet:
    """Load a dataset.

    Args:
        name: One of `DATASETS`.
        root: The folder that holds the data.
        split: 'train' or 'test'.
        download: Fetch what is missing.

    Raises:
        ValueError: An unknown name or split.
        FileNotFoundError: The data is missing and could not be fetched; the message says what goes where.
    """
    if name not in DATASETS:
        raise ValueError(nearest('dataset', name, DATASETS))
    if split not in SPLITS:
        raise ValueError(nearest('split', split, SPLITS))
    return DATASETS[name](Path(root), split, download)


def _fashion_mnist(root: Path, split: str, download: bool) -> ImageSet:
    images, labels, classes = fashion_mnist.load(root, split, download)
    return ImageSet(images.unsqueeze(1), labels, classes, img_size=32)


def _fake(root: Path, split: str, download: bool) -> ImageSet:
    """Ten classes of noisy 16×16 images, each with a bright bar in its own row: no file, learnt in a few steps."""
    generator = torch.Generator().manual_seed(SPLITS.index(split))
    n = 256 if split == 'train' else 100
    labels = torch.arange(n) % 10
    images = torch.randint(0, 96, (n, 1, 16, 16), generator=generator, dtype=torch.uint8)
    images[torch.arange(n), 0, labels + 3] += 128
    return ImageSet(images, labels, tuple(f'bar {i}' for i in range(10)), img_size=16)


DATASETS = {'fashion_mnist': _fashion_mnist, 'fake': _fake}
