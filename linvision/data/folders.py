"""Images in folders of classes: `train/CLASS/IMAGE` and `val/CLASS/IMAGE`, as ImageNet lies on most disks.

What can be found out is not asked for: classes are the folders' names, channels and size come from a look at some of
the images. A folder of classes without `train/` and `val/` is split, every fifth image of a class for the test.
"""

import logging
import os
import statistics as median_of
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.datasets import Imagenette

from linvision.data.image_file import SUFFIXES, UNREADABLE, is_grey, opened, read_image
from linvision.data.image_set import statistics

LOOKS = 500  # images that are looked at to find out channels, size, mean and standard deviation
LEFT_BY_SYSTEMS = ('__MACOSX', '__pycache__')  # VOC has a class __background__
IMAGENETTE = 'imagenette2-320'
TRAIN_FOLDERS = ('train', 'training')
TEST_FOLDERS = ('test', 'testing', 'val', 'valid', 'validation')  # the first that holds folders

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFiles:
    """Labelled image files.

    Attributes:
        samples: Path and label of each.
        classes: Names of the classes, by label.
        in_chans: Channels that images are read with: 1 (grey) or 3 (RGB).
        known_statistics: Mean and standard deviation of each channel, where they are known.
        uncropped: Whether images are read at their own size and whole; these are cropped and resized.
    """

    samples: Sequence[tuple[str, int]] = field(repr=False)
    classes: tuple[str, ...]
    in_chans: int = 3
    known_statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    uncropped: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """An image and its label.

        Raises:
            OSError: The file cannot be read as an image; the message names it.
        """
        path, label = self.samples[index]
        return read_image(path, self.in_chans), label

    @property
    def names(self) -> list[str]:
        """The images' paths within the folder that holds them all."""
        paths = [path for path, _ in self.samples]
        start = len(os.path.commonpath([min(paths), max(paths)]))  # that of all, and soon said of a million
        return [path[start:] for path in paths]

    def subset(self, index: Tensor) -> 'ImageFiles':
        """The images at the given positions."""
        return replace(self, samples=[self.samples[i] for i in index.tolist()])

    def labelled(self, classes: tuple[str, ...]) -> 'ImageFiles':
        """The same images with labels among other classes, which hold all of theirs."""
        samples = [(path, classes.index(self.classes[label])) for path, label in self.samples]
        return replace(self, samples=samples, classes=classes)

    @cached_property
    def img_size(self) -> int:
        """The median of the shorter sides of some images."""
        return int(median_of.median(map(min, self.sizes)))

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of some images."""
        return [size for _, size in modes_and_sizes([path for path, _ in self.samples])]

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, of some images; ImageNet's where it is ImageNet.

        Images of more than 64×64 pixels are shrunk to that, which models see too.

        Raises:
            OSError: None of them can be read.
        """
        if self.known_statistics:
            return self.known_statistics
        pixels = []
        for path in sample_of([path for path, _ in self.samples]):
            try:
                image = read_image(path, self.in_chans, smallest=64)
            except OSError:  # named when training meets it
                continue
            if image.width * image.height > 64 * 64:
                image = image.resize((64, 64))
            pixels.append(torch.from_numpy(np.array(image)).view(-1, self.in_chans))
        if not pixels:
            raise OSError(none_readable(self.samples[0][0]))
        return statistics(torch.cat(pixels).T)

    def data_config(self, crop_pct: float, crop_mode: str = 'center') -> dict[str, Any]:
        """How timm reads such an image as evaluation did."""
        return {'crop_pct': crop_pct, 'crop_mode': crop_mode, 'interpolation': 'bicubic'}


def sample_of(paths: list[str]) -> list[str]:
    """Up to `LOOKS` paths, evenly over all of them."""
    return paths[:: -(-len(paths) // LOOKS)]


def modes_and_sizes(paths: list[str]) -> list[tuple[str, tuple[int, int]]]:
    """PIL mode and size of some images, by their headers.

    Raises:
        OSError: None of them can be read.
    """
    seen = []
    for path in sample_of(paths):
        try:
            with opened(path) as image:
                seen.append((image.mode, image.size))
        except UNREADABLE:  # named when training meets it
            continue
    if not seen:
        raise OSError(none_readable(paths[0]))
    return seen


def none_readable(path: str) -> str:
    """An error's words."""
    return f'No image can be read: {path} and others are damaged or no images.'


def image_folder(root: Path, split: str) -> ImageFiles:
    """A folder of one's own; the split 'all' is every image of it.

    Raises:
        FileNotFoundError: There are no class folders with images; the message says what goes where.
        ValueError: A class cannot be read, or is in the test folder only.
    """
    train, test = split_folders(root)
    images = scan(train, root, quiet=split == 'test')
    beside = [] if train == root else [path for path in visible(root) if path not in (train, test)]
    aside = [path.name for path in beside if test is None or visible(path)]
    if aside and split != 'train':
        scored = test or f'every fifth image of {train}'
        _logger.warning(f'the test is {scored}; {", ".join(aside)} beside it is left aside')
    classes = tuple(images)
    modes = [mode for mode, _ in modes_and_sizes([path for paths in images.values() for path in paths])]
    in_chans = 1 if all(map(is_grey, modes)) else 3
    if test is None and split != 'all':  # every fifth image of a class, by name, is for the test
        small = [name for name, paths in images.items() if len(paths) < 5]
        if small and split == 'test':
            _logger.warning(f'no image for the test, since there are fewer than five: {", ".join(small[:20])}')
        images = {
            c: [p for i, p in enumerate(paths) if (i % 5 == 4) == (split == 'test')] for c, paths in images.items()
        }
    elif test is not None and split != 'train':
        of_test = scan(test, root)
        if unknown := set(of_test) - set(classes):
            raise ValueError(f'{test} has classes that {train} lacks: {sorted(unknown)}. Both need the same folders.')
        kept = images if split == 'all' else {}
        images = {name: [*kept.get(name, []), *of_test.get(name, [])] for name in classes}
    samples = [(path, label) for label, name in enumerate(classes) for path in images.get(name, [])]
    if not samples:
        raise FileNotFoundError(
            f'{root} leaves no image for the test: a class needs five images, or put some in {root}/val.'
        )
    return ImageFiles(samples, classes, in_chans)


def split_folders(root: Path) -> tuple[Path, Path | None]:
    """The folders with the classes for training and for the test; None where one folder serves both.

    A folder called `train` that holds images, beside others that are no split, is a class, of trains. Where the folder
    for the test holds no folders, its images have no labels, and are of no use here.

    Raises:
        FileNotFoundError: There is a folder for the test, and nothing to train on beside it.
    """
    folders = {path.name.lower(): path for path in visible(root)}
    train = next((folders[name] for name in TRAIN_FOLDERS if name in folders), None)
    for_test = [folders[name] for name in TEST_FOLDERS if name in folders]
    test = next((path for path in for_test if visible(path)), None)
    if test is not None and len(folders) == 1:
        raise FileNotFoundError(
            f'{root} holds {test.name}/ alone: put the images to train on into {root}/train/CLASS/.'
        )
    if train is None or not for_test and len(folders) > 1 and not visible(train):
        return root, None
    return train, test


def visible(folder: Path) -> list[Path]:
    """Folders in a folder, by name, without those that systems and editors leave (`.cache`, `__MACOSX`)."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and not is_hidden(p.name))


def is_hidden(name: str) -> bool:
    """Whether systems and editors leave a folder of this name."""
    return name.startswith('.') or name in LEFT_BY_SYSTEMS


def holds_images(root: Path) -> bool:
    """Whether a folder holds folders of images, as an `image_folder` does."""
    names = {path.name.lower() for path in visible(root)}
    if names & {*TRAIN_FOLDERS, *TEST_FOLDERS}:
        return True
    return any(file.suffix.lower() in SUFFIXES for folder in visible(root) for file in folder.iterdir())


def scan(folder: Path, root: Path, quiet: bool = False) -> dict[str, list[str]]:
    """Paths of the images in each class folder, by name; empty folders are no class.

    Args:
        folder: Holds the class folders.
        root: What the user named, for an error.
        quiet: Do not log what is left aside.

    Raises:
        FileNotFoundError: There are no class folders with images; the message says what goes where.
        ValueError: A folder holds files, but no image that can be read.
    """
    images: dict[str, list[str]] = {}
    for path in visible(folder):
        files = files_in(path)
        found = [file for file in files if file.lower().endswith(SUFFIXES)]
        others = sorted(set(files) - set(found))
        if files and not found:
            raise ValueError(
                f'The folder {path} holds no image that can be read, but files with the endings '
                f'{sorted({os.path.splitext(file)[1] for file in others})[:5]}. Expected {", ".join(SUFFIXES)}: '
                'convert them, or take the folder away if it is no class.'
            )
        if others and not quiet:
            _logger.warning(f'{len(others)} file(s) in {path} left aside, no images to be read: {others[0]} …')
        if not files and not quiet:
            _logger.warning(f'{path} is empty, and so no class')
        if found:
            images[path.name] = found
    whole = [name for name in images if (folder / name / 'train').is_dir()]
    if not images or whole:
        held = f'holds {[p.name for p in sorted(folder.iterdir())[:5]]}' if folder.is_dir() else 'is not there'
        raise FileNotFoundError(
            f'Expected images in folders of classes, {root}/train/CLASS/IMAGE and {root}/val/CLASS/IMAGE (or '
            f'{root}/CLASS/IMAGE, which is then split), with the endings {", ".join(SUFFIXES)}; {folder} {held}'
            + (f', of which {whole[0]} is no class: it has a train/ of its own. ' if whole else '. ')
            + f'Name your folder with --data-dir{f" {folder / whole[0]}" if whole else ""}.'
        )
    return images


def files_in(folder: Path) -> list[str]:
    """Paths of all files below a folder, by name, but for hidden files and folders; a link is followed, not back.

    Raises:
        OSError: A folder cannot be read: its images would be left out in silence.
    """
    files, seen = [], {str(path) for path in folder.resolve().parents}
    for where, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (place := os.path.realpath(where)) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = [name for name in folders if not is_hidden(name)]
        files += [os.path.join(where, name) for name in names if not name.startswith('.')]
    return sorted(files)


def refuse(error: OSError) -> None:
    """Raise the error of a folder that cannot be read, with what to do."""
    raise OSError(
        f'The folder {error.filename} cannot be read ({error.strerror}): give yourself the right to, or take it away.'
    ) from error


def imagenet(root: Path, split: str) -> ImageFiles:
    """ImageNet-1k (arXiv 1409.0575) as `train/` and `val/` folders of WordNet ids, below `root` or `root/imagenet`.

    Raises:
        FileNotFoundError: It is not there.
    """
    root = root if (root / 'train').is_dir() else root / 'imagenet'
    if not (root / 'train').is_dir() or not (root / 'val').is_dir():
        raise FileNotFoundError(
            f'ImageNet is not in {root}, and cannot be downloaded. Put its images into {root}/train/n01440764/*.JPEG … '
            f'and {root}/val/n01440764/*.JPEG …, 1,000 folders each, or name the folder that holds train/ and val/ '
            'with --data-dir.'
        )
    return in_words(image_folder(root, split))


def imagenette(root: Path, split: str, download: bool) -> ImageFiles:
    """Imagenette, ten easy classes of ImageNet with a shorter side of 320 pixels, fetched by torchvision.

    Raises:
        FileNotFoundError: It is missing and could not be fetched.
    """
    folder = root / IMAGENETTE
    try:
        Imagenette(str(root), 'train', '320px', download and not folder.is_dir())
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f'Imagenette is not in {folder} and could not be fetched ({error}). Unpack imagenette2-320.tgz into '
            f'{root}, so that {folder}/train and {folder}/val hold its ten folders.'
        ) from error
    return in_words(image_folder(folder, split))


def in_words(found: ImageFiles) -> ImageFiles:
    """A set of ImageNet's: words for WordNet ids, RGB, ImageNet's mean and standard deviation."""
    info = ImageNetInfo()
    known = set(info.label_names())
    whole = [info.label_name_to_description(c) if c in known else c for c in found.classes]
    first = [words.split(',')[0] for words in whole]
    names = [long if first.count(short) > 1 else short for short, long in zip(first, whole, strict=True)]
    names = [f'{n} ({c})' if names.count(n) > 1 else n for n, c in zip(names, found.classes, strict=True)]  # two cranes
    return ImageFiles(found.samples, tuple(names), 3, (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
