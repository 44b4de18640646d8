"""What `timm.data.create_dataset` reads: WebDataset shards, datasets of Hugging Face, TensorFlow and torchvision.

Names as timm's: `wds/NAME` (shards in the root folder), `hfds/…`, `hfids/…`, `tfds/…`, `torch/…`. Sets with random
access are read like folders of images; streams (`wds/`, `hfids/`, `tfds/`) are shuffled by timm's readers, by (seed,
epoch) at a given number of workers and processes (`stream_batches.py`).

webdataset takes a root like `pipe:COMMAND` for a shell command, and runs programs for other URLs. So a root is a folder
here, handed on as an absolute path, in which nothing can be read as a URL. A command is named as one, by `pipe`.
"""

import re
from pathlib import Path
from typing import Any

import timm.data
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from linvision.data.image_file import UNREADABLE, read_image
from linvision.data.order import seed_of
from linvision.extras import needed

PREFIXES = ('wds/', 'hfds/', 'hfids/', 'tfds/', 'torch/')
STREAMS = ('wds/', 'hfids/', 'tfds/')
SPLITS = {'train': 'train', 'test': 'validation'}
# a Path makes http:/ of http://; at the beginning, a scheme is one without a slash too
URL = re.compile(r'pipe\s*:|[a-z][a-z0-9+.-]+:/|\A\s*[a-z][a-z0-9+.-]+:', re.IGNORECASE)
SHARD = re.compile(r'[\w./@%+=,~-]+')  # no shell reads more than a name in it


def open_timm_set(
    name: str, root: Path, split: str, download: bool, arguments: dict[str, Any]
) -> 'TimmImages | TimmStream':
    """A set that timm reads.

    Args:
        name: timm's name of it.
        root: The folder that holds it.
        split: 'train' or 'test'.
        download: Let the reader fetch what is missing.
        arguments: timm's further arguments, and four of ours: `train_split` and `test_split` (timm's names of the
            splits, as 'name-train-{0000..1023}.tar|1281167'), `num_classes` where the set does not say, and, for
            `wds/`, `pipe`: a shell command that prints a shard, to which '/SHARD' is added, in place of the root.

    Raises:
        FileNotFoundError: The set, or the package that reads it, is not there.
        MissingPackage: webdataset is not there.
        ValueError: A root or an argument is a URL, or a shard's name is none that a shell may see.
    """
    arguments = dict(arguments)
    command = str(arguments.pop('pipe', ''))
    place = source(name, root, arguments, command)
    splits = {s: arguments.pop(f'{s}_split', default) for s, default in SPLITS.items()}
    num_classes = int(arguments.pop('num_classes', 0))
    known = {'name': name, 'root': place, 'split': splits[split], 'download': download, **arguments}
    if name.startswith('wds/'):
        with needed(name):  # timm would name another way to it
            import webdataset as webdataset
    try:
        found = timm.data.create_dataset(**known)
    except (ImportError, RuntimeError, OSError, KeyError, ValueError, AssertionError) as error:
        raise FileNotFoundError(
            f'timm cannot open {name}, split {splits[split]!r}, in {root}: {error or type(error).__name__}. What it '
            'reads and what packages that needs is in timm.data.create_dataset; splits are named by --dataset-args '
            'train_split … test_split ….'
        ) from error
    reader = getattr(found, 'reader', None)
    shard_names(reader, bool(command))
    by_name: dict[Any, int]
    by_name = getattr(reader, 'class_to_idx', None) or getattr(found, 'class_to_idx', None) or {}
    classes = tuple(sorted(by_name, key=by_name.__getitem__)) or tuple(f'class {i}' for i in range(num_classes))
    if not classes:
        raise ValueError(f'{name} does not say how many classes it has: say --dataset-args num_classes NUMBER.')
    if name.startswith(STREAMS):
        return TimmStream(known, tuple(map(str, classes)), len_of(found, name))
    return TimmImages(found, tuple(map(str, classes)))


def source(name: str, root: Path, arguments: dict[str, Any], command: str) -> str:
    """What timm is given as the root: an absolute path, or the command that the user names.

    Raises:
        ValueError: The root or an argument is a URL, or there is a command for a set that takes none.
    """
    for what, value in {'data_dir': root, **arguments}.items():
        if URL.search(str(value)):
            raise ValueError(
                f'{name} is read from a folder, and {what} is {str(value)!r}, which may be a URL or a shell command: '
                'neither is opened. Name the folder by its whole path. Shards that a shell command is to print are '
                "asked for by --dataset-args pipe 'COMMAND'."
            )
    if not command:
        return str(root.absolute())
    if not name.startswith('wds/'):
        raise ValueError(f'pipe is a command that prints the shards of a wds/… set, and {name} has none: leave it out.')
    return f'pipe:{command}'


def shard_names(reader: Any, piped: bool) -> tuple[str, ...]:
    """The shards that a reader found, where it reads shards.

    Raises:
        ValueError: A command would see a name in which a shell reads more: `_info.json` may be a stranger's.
    """
    names = tuple(getattr(getattr(reader, 'split_info', None), 'filenames', None) or ())
    odd = [name for name in names if piped and not SHARD.fullmatch(str(name))]
    if odd:
        raise ValueError(
            f'The name of a shard becomes part of a shell command (pipe), and {odd[0]!r} holds more than letters, '
            "digits and './@%+=,~-': rename the shard, or read it from a folder without pipe."
        )
    return names


def len_of(dataset: Any, name: str) -> int:
    """Images in a stream.

    Raises:
        ValueError: It does not say.
    """
    n = getattr(dataset.reader, 'num_samples', 0)
    if not n:
        raise ValueError(
            f'{name} does not say how many images it has: put an _info.json beside its shards, or write the split as '
            "'name-{0000..0009}.tar|NUMBER'."
        )
    return n


class TimmSet:
    """What both kinds have in common: RGB, read at the model's size, ImageNet's mean and standard deviation."""

    in_chans = 3
    img_size = 0  # unknown: the model's
    uncropped = False

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """ImageNet's mean and standard deviation."""
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    def data_config(self, crop_pct: float, crop_mode: str = 'center') -> dict[str, Any]:
        """How timm reads such an image as evaluation did."""
        return {'crop_pct': crop_pct, 'crop_mode': crop_mode, 'interpolation': 'bicubic'}


class TimmImages(TimmSet):
    """A set with random access.

    Args:
        dataset: timm's `ImageDataset`, or one of torchvision's.
        classes: Names of the classes, by label.
        index: Which of its images; None for all.
    """

    def __init__(self, dataset: Any, classes: tuple[str, ...], index: Tensor | None = None) -> None:
        self.dataset, self.classes = dataset, classes
        self.index = torch.arange(len(dataset)) if index is None else index

    def __len__(self) -> int:
        return len(self.index)

    def subset(self, index: Tensor) -> 'TimmImages':
        """The images at the given positions."""
        return TimmImages(self.dataset, self.classes, self.index[index])

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """An image and its label.

        Raises:
            OSError: It cannot be read; the message says which.
        """
        place = int(self.index[index])
        reader = getattr(self.dataset, 'reader', None)  # timm's dataset itself would go on to the next image
        name = f'image {place} of the set'
        try:
            if reader is None:
                image, label = self.dataset[place]
                return image.convert('RGB'), int(label)
            source, label = reader[place]
        except UNREADABLE as error:
            raise OSError(f'{name} cannot be read ({type(error).__name__}: {error}).') from error
        return read_image(source, self.in_chans, name), int(label)


class TimmStream(TimmSet):
    """A stream of images.

    Args:
        arguments: Of `timm.data.create_dataset`.
        classes: Names of the classes, by label.
        n: Images in it.
    """

    def __init__(self, arguments: dict[str, Any], classes: tuple[str, ...], n: int) -> None:
        self.arguments, self.classes, self.n = arguments, classes, n

    def __len__(self) -> int:
        return self.n

    def subset(self, index: Tensor) -> 'TimmStream':
        """All of it, or none.

        Raises:
            ValueError: A part.
        """
        if len(index) in (0, self.n):
            return TimmStream(self.arguments, self.classes, len(index))
        raise ValueError(
            f'A stream ({self.arguments["name"]}) has no slice for validation: use --val-fraction 0, and name another '
            'split with --dataset-args test_split ….'
        )

    def open(
        self, training: bool, seed: int, epoch: int, batch_size: int, workers: int, rank: int = 0, count: int = 1
    ) -> Any:
        """timm's dataset for one epoch.

        Args:
            training: Shuffled, and this process's share alone.
            seed: Seed of the run.
            epoch: Number of the epoch.
            batch_size: This process's images in a batch.
            workers: Worker processes.
            rank: Number of this process.
            count: How many processes share it; by default, this one reads all.

        Raises:
            ValueError: There are fewer shards than workers.
        """
        dataset = timm.data.create_dataset(**self.arguments, is_training=training, seed=seed, batch_size=batch_size)
        tell_reader(dataset.reader, rank, count, seed_of(seed, epoch))
        dataset.set_loader_cfg(num_workers=workers)
        dataset.set_epoch(epoch)
        shards = shard_names(dataset.reader, str(self.arguments['root']).startswith('pipe:'))
        readers = count * max(1, workers)
        if training and shards and len(shards) < readers:
            raise ValueError(
                f'{self.arguments["name"]} has {len(shards)} shards, but {readers} processes read it, at least one '
                'each: write more shards, or use fewer --workers.'
            )
        return dataset


def tell_reader(reader: Any, rank: int, count: int, seed: int) -> None:
    """Let a reader of timm's take the share of one of `count` processes, and shuffle by a seed.

    timm's readers ask torch's process group when they are made, and have no argument for either; but in evaluation
    every process reads all, and a group may be there for other reasons. So their attributes are set before they read.

    Args:
        reader: The reader, not read from yet.
        rank: Number of the process.
        count: How many share the stream.
        seed: Of this process; workers take their loader's.
    """
    reader.dist_rank, reader.dist_num_replicas, reader.worker_seed = rank, count, seed
