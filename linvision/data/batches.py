"""A set, cut into batches: on the device where it fits, else behind workers that read it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linvision.data.augmentation import Augmentation
from linvision.data.datasets import Images
from linvision.data.device_batches import DeviceBatches
from linvision.data.image_set import ImageSet
from linvision.data.loader_batches import BadImages, LoaderBatches, available_cpus, evaluation_transform, name_of
from linvision.data.native_sizes import NativeBatches, NativeSizes, grouped
from linvision.data.order import Order
from linvision.data.preparation import Preparation
from linvision.data.stream_batches import StreamBatches
from linvision.data.timm_sets import TimmStream
from linvision.data.timm_transform import changed

Batches = DeviceBatches | LoaderBatches  # a StreamBatches is one too


def create_batches(
    images: Images,
    batch_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    augmentation: Augmentation | None = None,
    rank: int = 0,
    count: int = 1,
    crop_pct: float = 1.0,
    crop_mode: str = 'center',
    workers: int = 0,
    on_bad_image: str = 'stop',
    rows: Callable[[int], slice] | None = None,
    native: NativeSizes | None = None,
) -> Batches:
    """Batches of a set, for training (`stream`) or evaluation (`ordered`), normalised on the device.

    Args:
        images: What `create_dataset` gave.
        batch_size: Images in a batch, over all processes.
        mean: Mean of each channel, on the scale 0..1.
        std: Standard deviation of each channel.
        device: Where batches go.
        augmentation: What is changed at random in training; nothing by default.
        rank: Number of this process.
        count: How many processes share a batch; it must divide `batch_size` in training.
        crop_pct: Of sets that are read one by one, as the next two: see `LoaderBatches`.
        crop_mode: What becomes of images that are not square.
        workers: Worker processes.
        on_bad_image: 'stop' or 'skip' what cannot be read.
        rows: Which rows of pixels this process has of images of a size, where several share an image; all by default.
        native: For image files that keep their shape, to which size each is brought; batches are then `MixedBatch`es.

    Raises:
        OSError: An image of a set in memory could not be read, with 'stop'.
        ValueError: What the augmentation's library cannot do to such images, or a mean of other channels.
    """
    if not len(mean) == len(std) == images.in_chans:
        raise ValueError(
            f'mean and std need a number for each of the {images.in_chans} channels, got {mean} and {std}.'
        )
    augmentation = augmentation or Augmentation()
    augmentation.check(images.in_chans)
    if native is not None:
        order_by_size = grouped(images, native, batch_size, rank, count)
        reading = (min(workers, available_cpus()), on_bad_image)
        return NativeBatches(images, native, order_by_size, mean, std, device, augmentation, *reading)
    order = Order(len(images), batch_size, rank, count)
    preparation = Preparation(mean, std, device, augmentation, order, rows)
    bad_images = BadImages(on_bad_image)
    bad_images.note(images.unreadable if isinstance(images, ImageSet) else ())
    if isinstance(images, ImageSet) and (preparation.augments or not augmentation.active):
        return DeviceBatches(images, order, preparation, bad_images)
    kind = StreamBatches if isinstance(images, TimmStream) else LoaderBatches
    if kind is LoaderBatches:  # whose draws depend on no number of workers; of more than CPUs, torch warns
        workers = min(workers, available_cpus())
    batches = kind(images, order, preparation, augmentation, crop_pct, crop_mode, workers, on_bad_image)
    batches.bad_images.update(bad_images)
    return batches


def in_memory(images: Any, img_size: int = 0, crop_mode: str = 'center', on_bad_image: str = 'stop') -> ImageSet:
    """All images of a set that is read one by one, each read as in evaluation; a set in memory is given back as it is.

    Args:
        images: What `create_dataset` gave, but for a stream.
        img_size: Size of the images (0: the set's own).
        crop_mode: What becomes of images that are not square: timm's 'center', 'border' or 'squash'.
        on_bad_image: 'stop' or 'skip' what cannot be read.

    Raises:
        OSError: An image cannot be read, with 'stop', or none can.
        ValueError: No size is named, and the set has none.
    """
    if isinstance(images, ImageSet):
        BadImages(on_bad_image).note(images.unreadable)
        return images
    size = img_size or images.img_size
    if not size:
        raise ValueError('The images have no size of their own: name one.')
    mean = images.statistics()[0] if crop_mode == 'border' else (0.0,) * images.in_chans  # the border's colour
    change = evaluation_transform(mean, size, 1.0, crop_mode)
    pixels: list[Tensor] = []
    labels: list[int] = []
    for i in range(len(images)):
        try:
            image, label = images[i]
            image = changed(change, image, name_of(images, i))
        except OSError:
            if on_bad_image == 'stop' or not pixels and i == len(images) - 1:
                raise
            continue
        pixels.append(image)
        labels.append(label)
    return ImageSet(torch.stack(pixels), torch.tensor(labels), images.classes, size)
