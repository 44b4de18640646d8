"""Batches of a set that lives on the device as uint8, augmented there.

Order and augmentation of image i in epoch e under seed s are functions of (s, e, i) alone: a run that is resumed in the
middle of an epoch repeats nothing and skips nothing. A batch is global: of several processes, each gets its share.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from linvision.data.datasets import ImageSet


class DeviceBatches:
    """An image set on the device, cut into normalised batches.

    Args:
        images: The set.
        batch_size: Images in a batch, over all processes.
        mean: Mean of each channel, on the scale 0..1; also the colour of the border around smaller images.
        std: Standard deviation of each channel.
        device: Where the set lives.
        rank: Number of this process.
        count: How many processes share a batch; it must divide `batch_size` in training.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        rank: int = 0,
        count: int = 1,
    ) -> None:
        self.batch_size, self.rank, self.count = batch_size, rank, count
        self.labels = images.labels.to(device)
        self.mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, -1, 1, 1)
        self.images = self._canvas(images.images.to(device), images.img_size)
        self.img_size = images.img_size

    def _canvas(self, images: Tensor, size: int) -> Tensor:
        """Centre the images on a canvas of the mean colour, as timm's crop mode 'border' does: (n, C, size, size)."""
        n, C, H, W = images.shape
        top, left = (size - H) // 2, (size - W) // 2
        if (H, W) == (size, size):
            return images
        canvas = self.fill.expand(n, C, size, size).clone()
        canvas[:, :, top : top + H, left : left + W] = images
        return canvas

    @property
    def fill(self) -> Tensor:
        """The mean colour, (1, C, 1, 1), uint8."""
        return (self.mean * 255).round().to(torch.uint8)

    def __len__(self) -> int:
        """Full batches in an epoch of training."""
        return len(self.labels) // self.batch_size

    def normalise(self, images: Tensor, img_size: int) -> Tensor:
        """uint8 (B, C, H, W) to normalised float (B, C, img_size, img_size): by area if smaller, bicubic if larger."""
        x = images.float() / 255
        if img_size < self.img_size:
            x = F.interpolate(x, size=(img_size, img_size), mode='area')
        elif img_size > self.img_size:
            x = F.interpolate(x, size=(img_size, img_size), mode='bicubic')
        return (x - self.mean.to(x.device)) / self.std.to(x.device)

    def epoch(
        self, seed: int, epoch: int, img_size: int, start: int = 0, hflip: float = 0.0, shift: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled, augmented batches of one epoch; the last, incomplete one is left out.

        Args:
            seed: Seed of the run.
            epoch: Number of the epoch.
            img_size: Size of the images, reduced by area from their own.
            start: First batch, for a run that goes on in the middle of the epoch.
            hflip: Probability of a horizontal flip.
            shift: Largest shift in pixels, in each direction; what moves in has the mean colour.
        """
        generator, order = self.order(seed, epoch)
        draws = torch.rand(len(self.labels), 3, generator=generator).to(self.labels.device)
        for index in self.shares(order.to(self.labels.device), start):
            images = self._augment(self.images[index], draws[index], hflip, shift)
            yield self.normalise(images, img_size), self.labels[index]

    def order(self, seed: int, epoch: int) -> tuple[torch.Generator, Tensor]:
        """The order of an epoch, and the generator that drew it."""
        generator = torch.Generator().manual_seed(key(seed, epoch))
        return generator, torch.randperm(len(self.labels), generator=generator)

    def shares(self, order: Tensor, start: int) -> Iterator[Tensor]:
        """Positions of this process's images in each full batch of an epoch, from batch `start` on."""
        for i in range(start, len(self)):
            yield order[i * self.batch_size : (i + 1) * self.batch_size][self.rank :: self.count]

    def epochs(self, step: int) -> Iterator[tuple[int, int]]:
        """Epochs without end from a step of the run on, each with its first batch."""
        epoch, start = divmod(step, len(self))
        while True:
            yield epoch, start
            epoch, start = epoch + 1, 0

    def stream(
        self, seed: int, step: int, img_size: int, hflip: float = 0.0, shift: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches without end from a step of the run on, epoch after epoch; arguments as in `epoch`."""
        for epoch, start in self.epochs(step):
            yield from self.epoch(seed, epoch, img_size, start, hflip, shift)

    def _augment(self, images: Tensor, draws: Tensor, hflip: float, shift: int) -> Tensor:
        """Flip and shift each image by its own three numbers in 0..1: (B, C, H, W), (B, 3) -> (B, C, H, W)."""
        B, C, H, W = images.shape
        dy, dx = ((draws[:, 1:] * (2 * shift + 1)).long()).unbind(1)
        rows = torch.arange(H, device=images.device) + dy[:, None]  # (B, H)
        columns = torch.arange(W, device=images.device) + dx[:, None]  # (B, W)
        columns = torch.where(draws[:, :1] < hflip, columns.flip(1), columns)
        padded = self.fill.expand(B, C, H + 2 * shift, W + 2 * shift).clone()
        padded[:, :, shift : shift + H, shift : shift + W] = images
        batch = torch.arange(B, device=images.device)[:, None, None]
        return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def ordered(self, img_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share in order, never augmented: for evaluation.

        Of n images, process r gets r, r + count, …; the last one again where that makes all shares equally long (see
        `num_valid`).
        """
        n, share = len(self.labels), -(-len(self.labels) // self.count)
        index = (torch.arange(share, device=self.labels.device) * self.count + self.rank).clamp(max=n - 1)
        for part in index.split(max(1, self.batch_size // self.count)):
            yield self.normalise(self.images[part], img_size), self.labels[part]

    @property
    def num_valid(self) -> int:
        """How many of the images that `ordered` gives are this process's own; the others follow them."""
        return len(range(self.rank, len(self.labels), self.count))


def key(*numbers: int) -> int:
    """A seed from whole numbers, the same in every process."""
    return hash(numbers) % 2**63
