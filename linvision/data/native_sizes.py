"""Images in their own shape: whole, never cropped to a square, and shrunk only where they have too many tokens.

Sides are rounded up to a step of some tokens, so that photographs of all shapes come to few sizes; timm's
`get_image_size_for_seq` finds the largest size that is allowed. The images of a batch are alike in size, since a model
makes a pass for each (`models/mixed_sizes.py`), and every batch has as many images: each weighs the same in the loss,
and epochs, steps and the shares of processes are those of other runs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.data.naflex_transforms import get_image_size_for_seq
from torch import Tensor
from torchvision.transforms.v2.functional import to_image

from linvision.data.augmentation import Augmentation, TorchvisionTransform
from linvision.data.folders import ImageFiles
from linvision.data.image_file import UNREADABLE, upright_size
from linvision.data.loader_batches import LoaderBatches
from linvision.data.order import Order, seed_of
from linvision.data.preparation import Preparation
from linvision.meter import counted
from linvision.models.mixed_sizes import MixedBatch, collate

CROP_MODE = 'native'  # in the data config of an exported model, where timm has 'center', 'border' and 'squash'
STEPS = 16  # at least, of the side of a square image of the most tokens: what sides are rounded up to


@dataclass(frozen=True)
class NativeSizes:
    """To which size an image is brought.

    Attributes:
        patch_size: Patch size, (height, width).
        max_seq_len: Tokens of an image at most, timm's name.
    """

    patch_size: tuple[int, int]
    max_seq_len: int

    @classmethod
    def of(cls, model: Any) -> 'NativeSizes':
        """For at most as many tokens as a model has at its own image size."""
        return cls(tuple(model.patch_embed.patch_size), model.patch_embed.num_patches)

    @classmethod
    def read_by(cls, model: Any) -> 'NativeSizes | None':
        """For a model that was trained on images in their own shape, as its config says; None for any other."""
        return cls.of(model) if model.pretrained_cfg.get('crop_mode') == CROP_MODE else None

    @property
    def step(self) -> int:
        """Tokens that sides are rounded up to multiples of; the side of the square of the most tokens is one."""
        side = math.isqrt(self.max_seq_len)
        return max(step for step in range(1, max(1, side // STEPS) + 1) if side % step == 0)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels that an image of a size is brought to."""
        cell = (self.patch_size[0] * self.step, self.patch_size[1] * self.step)
        return get_image_size_for_seq((height, width), cell, self.max_seq_len // self.step**2, max_ratio=1.0)[1]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Its token grid then."""
        size = self.size(height, width)
        return size[0] // self.patch_size[0], size[1] // self.patch_size[1]


class NativeTransform:
    """An image in its own shape, uint8 (C, height, width), changed at random by torchvision.

    Args:
        sizes: To which size it is brought.
        augmentation: What is changed; a random crop is resized to the size that the whole image has.
        mean: Mean of each channel, on the scale 0..1.
    """

    def __init__(self, sizes: NativeSizes, augmentation: Augmentation, mean: tuple[float, ...]) -> None:
        self.sizes, self.augmentation, self.mean = sizes, augmentation, mean

    def __call__(self, image: Any, seed: int = 0) -> Tensor:
        image = to_image(image)
        return TorchvisionTransform(self.augmentation, self.sizes.size(*image.shape[-2:]), self.mean)(image, seed)


class OrderBySize(Order):
    """An order in which the images of a batch are alike in size.

    Args:
        grids: Token grid of each image of the set.
        batch_size, rank, count: As of `Order`.
    """

    def __init__(self, grids: Sequence[tuple[int, int]], batch_size: int, rank: int = 0, count: int = 1) -> None:
        super().__init__(len(grids), batch_size, rank, count)
        self.grids = sorted(set(grids), key=lambda grid: (math.prod(grid), grid))
        places = {grid: i for i, grid in enumerate(self.grids)}
        self.kind = torch.tensor([places[grid] for grid in grids], dtype=torch.int64)  # of each image
        self.tokens = torch.tensor([math.prod(grid) for grid in grids], dtype=torch.float64)

    def permutation(self, seed: int, epoch: int) -> Tensor:
        """The images of an epoch's full batches, drawn at random, side by side by size; then batches are shuffled."""
        drawn = super().permutation(seed, epoch)[: len(self) * self.batch_size]
        batches = drawn[self.kind[drawn].argsort(stable=True)].unflatten(0, (-1, self.batch_size))
        generator = torch.Generator().manual_seed(seed_of(seed, epoch, -1))  # which is the seed of no image
        return batches[torch.randperm(len(self), generator=generator)].flatten()

    def in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        """As of `Order`, by size."""
        by_size = self.kind.argsort(stable=True)
        for index, counts in super().in_order():
            yield by_size[index], counts

    def largest(self, seed: int) -> tuple[int, int]:
        """The step of the first epoch whose images have the most tokens, and the most that one of them has."""
        tokens = self.tokens[self.permutation(seed, 0).unflatten(0, (-1, self.batch_size))]
        step = int(tokens.sum(1).argmax())
        return step, int(tokens[step].amax())

    @property
    def words(self) -> str:
        """What a user would want to know of the batches of an epoch."""
        batches = self.permutation(0, 0).unflatten(0, (-1, self.batch_size))
        passes = sum(len(set(kinds)) for kinds in self.kind[batches].tolist()) / len(batches)
        padding = 1 - float(self.tokens[batches].mean() / self.tokens[batches].amax(1).mean())
        return (
            f'{len(self.grids)} sizes, {self.tokens.mean():,.0f} tokens on average; {passes:.1f} passes a batch, one '
            f'for each of its sizes; {100 * padding:.1f} % of its memory is padding, and 0 % of what is computed'
        )


def grouped(images: Any, sizes: NativeSizes, batch_size: int, rank: int = 0, count: int = 1) -> OrderBySize:
    """An order of a set of files, by the sizes that their headers tell; what cannot be read is named when it is met.

    Raises:
        ValueError: It is none of image files.
    """
    if not isinstance(images, ImageFiles):
        raise ValueError(
            f'Native sizes are of image files, as in an image_folder, and these images have one size or are streamed: '
            f'leave out --native-sizes (native), got {type(images).__name__}.'
        )
    found = []
    for path, _ in counted(images.samples, 'reading the sizes of', len(images), 'images', shows=rank == 0):
        try:
            found.append(sizes.grid(*upright_size(path)))
        except UNREADABLE:
            found.append((1, 1))
    return OrderBySize(found, batch_size, rank, count)


class MixedPreparation(Preparation):
    """What happens on the device to a batch of images of different sizes."""

    def plain(self, images: Any, img_size: int) -> Any:
        """uint8 patches to normalised ones; the sizes are those that the images have."""
        images = images.to(self.device, non_blocking=True)
        shift, scale = self.shift.flatten(), self.scale.flatten()
        patches = images['patches'].unflatten(-1, (-1, len(shift)))  # (B, N, P · P, C)
        return MixedBatch({**images, 'patches': ((patches.float() / 255 - shift) / scale).flatten(2)})


class NativeBatches(LoaderBatches):
    """A set of files behind a `DataLoader`, cut into normalised batches of images in their own shape.

    Args:
        images: The set.
        sizes: To which size an image is brought.
        order: As `grouped` gives it.
        mean, std, device, augmentation, workers, on_bad_image: As of `create_batches`.

    Raises:
        ValueError: The augmentation's library changes batches of one size, or images to squares.
    """

    order: OrderBySize

    def __init__(
        self,
        images: Any,
        sizes: NativeSizes,
        order: OrderBySize,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        augmentation: Augmentation,
        workers: int = 0,
        on_bad_image: str = 'stop',
    ) -> None:
        if augmentation.library != 'torchvision':
            raise ValueError(
                f'Images in their own shape are changed by torchvision alone, got augmentation '
                f'{augmentation.library!r}: say --augmentation torchvision.'
            )
        preparation = MixedPreparation(mean, std, device, augmentation, order)
        super().__init__(images, order, preparation, augmentation, workers=workers, on_bad_image=on_bad_image)
        self.sizes = sizes
        self.collate = partial(together, patch_size=sizes.patch_size)

    def training_transform(self, size: int) -> NativeTransform:
        """What happens to an image before it joins a batch."""
        return NativeTransform(self.sizes, self.augmentation, self.preparation.mean)

    def evaluation_transform(self, size: int) -> NativeTransform:
        """The same without what is random."""
        return NativeTransform(self.sizes, Augmentation(), self.preparation.mean)


def together(samples: list[tuple[Tensor, int, str]], patch_size: tuple[int, int]) -> tuple[Any, Tensor, list[str]]:
    """Images of `KeyedImages` as a batch in NaFlex form, with their labels and complaints."""
    batch, labels = collate([(image, label) for image, label, _ in samples], patch_size)
    return batch, labels, [complaint for _, _, complaint in samples]
