"""The last step before the model, on its device: uint8 batches to normalised ones of the right size.

A process that shares images has some rows of each. What is not resized or augmented here is cut to these as uint8.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from linvision.data.augmentation import ON_DEVICE, Augmentation, KorniaBatches
from linvision.data.device_augmentation import TorchBatches
from linvision.data.order import Order, seed_of


class Preparation:
    """What happens to a batch on the device.

    Args:
        mean: Mean of each channel, on the scale 0..1.
        std: Standard deviation of each channel.
        device: The device.
        augmentation: What is changed at random; only that of libraries `ON_DEVICE` happens here.
        order: Who gets which images of a batch.
        rows: Which rows of pixels this process has of images of a size; None for all.
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        augmentation: Augmentation,
        order: Order,
        rows: Callable[[int], slice] | None = None,
    ) -> None:
        self.mean, self.device, self.rows = mean, device, rows
        self.shift, self.scale = (torch.tensor(x, device=device).view(1, -1, 1, 1) for x in (mean, std))
        self.augments = augmentation.active and augmentation.library in ON_DEVICE

        @cache
        def changes(size: int) -> KorniaBatches | TorchBatches:
            if augmentation.library == 'kornia':
                return KorniaBatches(augmentation, size, mean, std, order.rank, order.count)
            return TorchBatches(augmentation, size, mean, std, device, order.rank, order.count)

        self.changes = changes

    def send(self, numbers: Tensor) -> Tensor:
        """A small tensor on the device; from pinned memory, else the copy would wait for all that is queued there."""
        numbers = numbers.pin_memory() if self.device.type == 'cuda' else numbers
        return numbers.to(self.device, non_blocking=True)

    def plain(self, images: Tensor, img_size: int) -> Tensor:
        """Never augmented: uint8 (B, C, H, W) to float (B, C, img_size, img_size)."""
        images = images.to(self.device, non_blocking=True)
        fits = img_size == images.shape[-1]
        images = self.own(images, img_size) if fits else images
        images = resize((images.float() / 255 - self.shift) / self.scale, img_size)
        return images if fits else self.own(images, img_size)

    def own(self, images: Tensor, img_size: int) -> Tensor:
        """This process's rows of images that have their size."""
        return images if self.rows is None else images[:, :, self.rows(img_size)].contiguous()

    def augmented(self, images: Tensor, img_size: int, size: int, *numbers: int) -> Tensor:
        """As `plain`, changed at random under a seed made of `numbers`.

        Args:
            images: uint8 (B, C, H, W).
            img_size: Size of the images that come out.
            size: Size that images are cropped to before they are resized to that.
            numbers: Seed, epoch and number of the batch.
        """
        if not self.augments:
            return self.plain(images, img_size)
        images = images.to(self.device, non_blocking=True)
        return self.own(resize(self.changes(size)(images, seed_of(*numbers)), img_size), img_size)


def resize(images: Tensor, img_size: int) -> Tensor:
    """Images (B, C, H, W) of another size: by area where they shrink, bicubic where they grow."""
    if img_size < images.shape[-1]:
        return F.interpolate(images, size=(img_size, img_size), mode='area')
    if img_size > images.shape[-1]:
        return F.interpolate(images, size=(img_size, img_size), mode='bicubic')
    return images
