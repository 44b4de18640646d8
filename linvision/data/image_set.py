"""A labelled set of images that fits into memory."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """Images of one size and their labels.

    Attributes:
        images: (n, C, H, W), uint8.
        labels: (n), int64.
        classes: Names of the classes, by label.
        img_size: The size that a model sees: smaller images are centred on a canvas of this size, in the mean colour.
        note: What a result on them must say of them: 'JPEG copy'.
        unreadable: What could not be read and is not among them, in words.
        digest: Of the files' names, where they were read from files, which are sorted by class; '' elsewhere.
        uncropped: Whether images are read at their own size and whole, whatever size and crop a model was made for.
    """

    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    classes: tuple[str, ...]
    img_size: int
    note: str = ''
    unreadable: tuple[str, ...] = field(default=(), repr=False)
    digest: str = field(default='', repr=False)
    uncropped: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if max(self.images.shape[2:]) > self.img_size:
            raise ValueError(
                f'img_size must be at least that of the images, {tuple(self.images.shape[2:])}, got {self.img_size}.'
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.images.shape[1]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """An image, uint8 (C, H, W), and its label."""
        return self.images[index], int(self.labels[index])

    def subset(self, index: Tensor) -> 'ImageSet':
        """The images at the given positions."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, on the scale 0..1 and rounded to four digits."""
        return statistics(self.images.unbind(1))

    def on_canvas(self, mean: tuple[float, ...]) -> 'ImageSet':
        """Each image in the middle of a canvas of the mean colour, as timm's crop mode 'border' has it."""
        n, C, H, W = self.images.shape
        size = self.img_size
        if (H, W) == (size, size):
            return self
        top, left = (size - H) // 2, (size - W) // 2
        canvas = fill_colour(mean).expand(n, C, size, size).clone()
        canvas[:, :, top : top + H, left : left + W] = self.images
        return replace(self, images=canvas)

    def data_config(self, crop_pct: float, crop_mode: str = 'center') -> dict[str, Any]:
        """How timm reads such an image as training did: fitted into its part of the canvas, with a border around it."""
        side = max(self.images.shape[-2:])
        share = self.img_size / (side + 0.5) if side < self.img_size else 1.0  # timm rounds down
        return {'crop_pct': round(share, 4), 'crop_mode': 'border', 'interpolation': 'bicubic'}


def fill_colour(mean: tuple[float, ...]) -> Tensor:
    """The mean colour, (1, C, 1, 1), uint8: it is nearly zero once normalised."""
    return torch.tensor(mean).mul(255).round().to(torch.uint8).view(1, -1, 1, 1)


def statistics(channels: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the uint8 pixels of each channel, on the scale 0..1 and rounded to four digits.

    How often each of the 256 values stands there is counted: a billion pixels in fp32 would not fit into memory.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for pixels in channels:
        shares = torch.bincount(pixels.flatten(), minlength=256).double() / pixels.numel()
        mean = (shares * values).sum()
        std = (shares * (values - mean).square()).sum().sqrt()
        means.append(round(mean.item(), 4))
        stds.append(max(round(std.item(), 4), 1e-4))
    return tuple(means), tuple(stds)
