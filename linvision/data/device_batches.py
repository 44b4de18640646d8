"""Batches of a set that lives on the device as uint8, and is augmented there."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from linvision.data.image_set import ImageSet
from linvision.data.order import Order
from linvision.data.preparation import Preparation


class DeviceBatches:
    """An image set on the device, cut into normalised batches.

    Args:
        images: The set; images smaller than its `img_size` are bordered with the mean colour.
        order: Which image stands in which batch, and for which process.
        preparation: What happens to a batch.
        bad_images: What is not in the set, since it could not be read, in words.
    """

    def __init__(
        self, images: ImageSet, order: Order, preparation: Preparation, bad_images: Iterable[str] = ()
    ) -> None:
        self.order, self.preparation = order, preparation
        self.images = images.on_canvas(preparation.mean).images.to(preparation.device)
        self.labels = images.labels.to(preparation.device)
        self.img_size = images.img_size
        self.bad_images: set[str] = set(bad_images)
        self.absent = len(images.unreadable)  # images that evaluation leaves out

    def stream(self, seed: int, step: int, img_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled, augmented batches without end, from a step of the run on.

        Args:
            seed: Seed of the run.
            step: First step; with the seed, it says the epoch and the place in it.
            img_size: Size of the images.
        """
        for epoch, number, index in self.order.shuffled(seed, step):
            index = self.preparation.send(index)
            images = self.preparation.augmented(self.images[index], img_size, self.img_size, seed, epoch, number)
            yield images, self.labels[index]

    def ordered(self, img_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share in order, never augmented, for evaluation; a label of -1 does not count."""
        for index, counts in self.order.in_order():
            index, counts = self.preparation.send(index), self.preparation.send(counts)
            labels = torch.where(counts, self.labels[index], -1)
            yield self.preparation.plain(self.images[index], img_size), labels
