"""Batches whose images are read, and augmented one by one, in worker processes: sets that no memory holds.

The draws of an image are seeded by (seed, epoch, index), so that they depend on neither the number of workers nor that
of processes. An image that cannot be read ends the run, named; or it is left out, counted and logged: in training the
next image of the set takes its place, so that batches keep their size.
"""

import atexit
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from linvision.data.augmentation import ON_DEVICE, TRANSFORMS, Augmentation, Transform
from linvision.data.device_batches import DeviceBatches
from linvision.data.image_file import squared
from linvision.data.image_set import ImageSet, fill_colour
from linvision.data.order import Order, seed_of
from linvision.data.preparation import Preparation
from linvision.data.timm_transform import changed, timm_transform

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # that ask a run to end, beside Ctrl-C
MARGIN = 256 / 224  # by which images are larger than what is cropped from them on the device

_logger = logging.getLogger(__name__)


class KeyedImages(Dataset):
    """Images by (epoch, index), changed under a seed made of both: `(image, label, complaint)`.

    Args:
        images: The set.
        transform: What happens to each image.
        seed: Seed of the run.
    """

    def __init__(self, images: Any, transform: Transform, seed: int = 0) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, epoch_index: tuple[int, int]) -> tuple[Tensor, int, str]:
        epoch, index = epoch_index
        complaint = ''
        for step in range(len(self.images)):
            try:
                place = (index + step) % len(self.images)
                image, label = self.images[place]
                seed = seed_of(self.seed, epoch, index)
                return changed(self.transform, image, name_of(self.images, place), seed), label, complaint
            except OSError as error:
                complaint = complaint or str(error)
        raise OSError(f'No image of the set can be read. The first: {complaint}')


def name_of(images: Any, index: int) -> str:
    """What an error calls an image: its path, or its place."""
    return images.samples[index][0] if hasattr(images, 'samples') else f'image {index} of the set'


class Pairs:
    """A batch sampler: (epoch, index) of the images of each batch.

    Args:
        batches: Gives the epoch and the positions of each batch.
    """

    def __init__(self, batches: Callable[[], Iterable[tuple[int, Tensor]]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch, index in self.batches():
            yield [(epoch, i) for i in index.tolist()]


class LoaderBatches:
    """A set behind a `DataLoader`, cut into normalised batches.

    Args:
        images: A set of images and labels by index, as `ImageFiles`.
        order: Which image stands in which batch, and for which process.
        preparation: What happens to a batch on the device.
        augmentation: What is changed at random.
        crop_pct: Share of an image's shorter side that evaluation crops.
        crop_mode: What becomes of images that are not square: timm's 'center', 'border' or 'squash'.
        workers: Worker processes; 0 reads in this one.
        on_bad_image: 'stop' or 'skip'.
    """

    def __init__(
        self,
        images: Any,
        order: Order,
        preparation: Preparation,
        augmentation: Augmentation,
        crop_pct: float = 1.0,
        crop_mode: str = 'center',
        workers: int = 0,
        on_bad_image: str = 'stop',
    ) -> None:
        self.images = images.on_canvas(preparation.mean) if isinstance(images, ImageSet) else images
        self.absent = len(images.unreadable) if isinstance(images, ImageSet) else 0  # beside those met while reading
        self.order, self.preparation, self.augmentation = order, preparation, augmentation
        self.workers, self.bad_images = workers, BadImages(on_bad_image)
        self.cropping: dict[str, Any] = {'crop_pct': crop_pct, 'crop_mode': crop_mode}
        self.loaders: dict[int, DataLoader] = {}  # of evaluation, by size: their workers stay
        self.collate: Callable[[list[Any]], Any] | None = None  # how images become a batch; torch's by default

    def stream(self, seed: int, step: int, img_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled, augmented batches without end; see `DeviceBatches.stream`."""
        size = self.images.img_size if isinstance(self.images, ImageSet) else img_size
        transform = self.training_transform(size)
        places = self.order.shuffled(seed, step)
        pairs = Pairs(lambda: ((epoch, index) for epoch, _, index in self.order.shuffled(seed, step)))
        loader = create_loader(
            KeyedImages(self.images, transform, seed),
            self.workers,
            self.preparation,
            batch_sampler=pairs,
            collate_fn=self.collate,
        )
        for (epoch, number, _), (images, labels, complaints) in zip(places, batches_of(loader), strict=True):
            self.bad_images.note(complaints)
            images = self.preparation.augmented(images, img_size, size, seed, epoch, number)
            yield images, labels.to(images.device, non_blocking=True)

    def training_transform(self, size: int) -> Transform:
        """What happens to an image before it joins a batch: all changes, or what the device needs to make them."""
        mean, changes = self.preparation.mean, self.augmentation
        if changes.library in ON_DEVICE:
            margin = MARGIN if changes.crops else 1
            changes, size = Augmentation(), round(size * margin)
        return Squared(self.cropping['crop_mode'], mean, size, TRANSFORMS[changes.library](changes, size, mean))

    def evaluation_transform(self, size: int) -> Transform:
        """How an image is read in evaluation."""
        return evaluation_transform(self.preparation.mean, size, **self.cropping)

    def ordered(self, img_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share in order, never augmented, for evaluation; a label of -1 does not count."""
        order = self.order
        if isinstance(self.images, ImageSet):
            yield from DeviceBatches(self.images, order, self.preparation).ordered(img_size)
            return
        if img_size not in self.loaders:
            self.loaders.clear()  # the workers of another size go
            # not self in here: a loader in a cycle of references could not end its workers
            pairs = Pairs(lambda: ((0, index) for index, _ in order.in_order()))
            change = self.evaluation_transform(img_size)
            self.loaders[img_size] = create_loader(
                KeyedImages(self.images, change),
                self.workers,
                self.preparation,
                batch_sampler=pairs,
                collate_fn=self.collate,
                persistent_workers=self.workers > 0,
            )
        counted = (counts for _, counts in order.in_order())
        for counts, (images, labels, complaints) in zip(counted, batches_of(self.loaders[img_size]), strict=True):
            self.bad_images.note(complaints)
            readable = torch.tensor([not complaint for complaint in complaints])
            labels = torch.where(counts & readable, labels, -1)
            yield self.preparation.plain(images, img_size), labels.to(self.preparation.device, non_blocking=True)


class BadImages(set):
    """What could not be read, in words; each is logged once.

    Args:
        on_bad_image: 'stop' or 'skip'.
    """

    def __init__(self, on_bad_image: str) -> None:
        super().__init__()
        self.on_bad_image = on_bad_image

    def note(self, complaints: Iterable[str]) -> None:
        """Add what a batch met.

        Raises:
            OSError: With 'stop'.
        """
        for complaint in filter(None, complaints):
            if self.on_bad_image == 'stop':
                raise OSError(
                    f"{complaint} Mend it, or leave such images out with --on-bad-image skip (on_bad_image='skip')."
                )
            if complaint not in self:
                self.add(complaint)
                _logger.warning(f'left out: {complaint}')


@cache
def leaving() -> Any:
    """An event that is set when this process exits."""
    event = multiprocessing.Event()
    atexit.register(event.set)  # runs before multiprocessing ends the workers, since it was registered after that
    return event


def ignore_signals(leaving: Any, worker: int) -> None:
    """Let a signal to the whole group of processes end the run by its own process, after a checkpoint.

    Args:
        leaving: Set once that process exits: then such a signal ends this one.
        worker: Number of this worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: os._exit(0) if leaving.is_set() else None)


def available_cpus() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def create_loader(images: Any, workers: int, preparation: Preparation, seed: int = 0, **arguments: Any) -> DataLoader:
    """A `DataLoader` whose workers leave signals to the run's own process, with draws of its own."""
    return DataLoader(
        images,
        num_workers=workers,
        worker_init_fn=partial(ignore_signals, leaving()) if workers else None,
        pin_memory=preparation.device.type == 'cuda',
        generator=torch.Generator().manual_seed(seed),
        **arguments,
    )


def batches_of(loader: DataLoader) -> Iterator[Any]:
    """What a loader gives; an error of an image in its own words, without the traceback of the worker that met it."""
    try:
        yield from loader
    except OSError as error:
        if 'DataLoader worker' not in str(error):
            raise
        raise OSError(str(error).splitlines()[-1].partition(': ')[2]) from error


class Squared:
    """A transform of images that are made square before.

    Args:
        crop_mode: See `squared`.
        mean: Mean of each channel, on the scale 0..1: the colour of the border.
        size: Size of the images that are trained on.
        change: What happens to them then.
    """

    def __init__(self, crop_mode: str, mean: tuple[float, ...], size: int, change: Transform) -> None:
        self.crop_mode, self.size, self.change = crop_mode, size, change
        self.fill = tuple(fill_colour(mean).flatten().tolist())

    def __call__(self, image: Any, seed: int) -> Tensor:
        if isinstance(image, Image.Image):
            image = squared(image, self.crop_mode, self.fill, self.size)
        return self.change(image, seed)


def evaluation_transform(
    mean: tuple[float, ...], img_size: int, crop_pct: float, crop_mode: str = 'center'
) -> 'Unseeded':
    """timm's own reading of an image, uint8, so that the exported model reads images as they are read here."""
    cropping: dict[str, Any] = {'crop_pct': crop_pct, 'crop_mode': crop_mode, 'interpolation': 'bicubic'}
    return Unseeded(timm_transform(input_size=(len(mean), img_size, img_size), mean=mean, normalize=False, **cropping))


class Unseeded:
    """A transform that draws nothing.

    Args:
        change: What happens to an image.
    """

    def __init__(self, change: Callable[[Any], Tensor]) -> None:
        self.change = change

    def __call__(self, image: Any, seed: int = 0) -> Tensor:
        return self.change(image)
