"""Random changes of a batch on its device, in plain PyTorch: nothing is drawn on the CPU, nothing waits for the device.

Each image's draws are a function of the batch's seed and of its place in the global batch (`keyed.py`): the same for
any number of processes, on a CPU and on a GPU. Shift, flip and erasing are one gather, whatever is switched on; crops
are one bilinear resampling before it. kornia's shift goes through a batch image by image.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from linvision.data.augmentation import ERASED_RATIO, ERASED_SCALE, RATIO, Augmentation
from linvision.data.keyed import uniform

GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as torchvision and kornia have it


class TorchBatches:
    """A batch at a time on its device: uint8 to normalised.

    Args:
        augmentation: What is changed.
        size: Side of the images that come out.
        mean: Mean of each channel, on the scale 0..1.
        std: Standard deviation of each channel.
        rank: Number of this process.
        count: How many processes share a batch.
    """

    def __init__(
        self,
        augmentation: Augmentation,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        rank: int = 0,
        count: int = 1,
    ) -> None:
        self.augmentation, self.size, self.rank, self.count = augmentation, size, rank, count
        self.mean, self.std, self.grey = (torch.tensor(x, device=device).view(1, -1, 1, 1) for x in (mean, std, GREY))

    def __call__(self, images: Tensor, seed: int) -> Tensor:
        """This process's uint8 images of the batch with this seed, (B, C, H, W), normalised: (B, C, size, size)."""
        places = torch.arange(len(images), device=images.device) * self.count + self.rank
        draws = uniform(seed, places, 15).T.unsqueeze(-1)  # 15 of (B, 1)
        a, x = self.augmentation, images
        if a.color_jitter or a.crops:
            x = x.float() / 255
        if a.color_jitter:
            x = self.coloured(x, draws[:3])
        if a.crops:
            x = self.cropped(x, draws[3:7])
        x, kept = self.moved(x, draws[7:])  # of uint8 where it may be: a quarter of the bytes
        x = (x if x.is_floating_point() else x.float() / 255) - self.mean
        return x.div_(self.std).mul_(kept)  # what is not kept is zero: the mean colour

    def coloured(self, x: Tensor, draws: Tensor) -> Tensor:
        """Brightness, contrast and saturation, each times 1 ± color_jitter: (B, 3, H, W) on the scale 0..1."""
        brightness, contrast, saturation = (
            1 + self.augmentation.color_jitter * (2 * draw - 1).view(-1, 1, 1, 1) for draw in draws
        )
        x = (x * brightness).clamp(0, 1)
        x = torch.lerp((x * self.grey).sum(1, keepdim=True).mean((2, 3), keepdim=True), x, contrast).clamp(0, 1)
        return torch.lerp((x * self.grey).sum(1, keepdim=True), x, saturation).clamp(0, 1)

    def cropped(self, x: Tensor, draws: Tensor) -> Tensor:
        """Random parts of the wanted area and proportions, resized: (B, C, H, W) -> (B, C, size, size)."""
        small, large = self.augmentation.crop_scale
        area, ratio = small + (large - small) * draws[0], log_uniform(draws[1], *RATIO)
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)  # shares, (B, 1)
        steps = (torch.arange(self.size, device=x.device) + 0.5) * 2 / self.size - 1  # of -1 to 1
        across = steps * width + (1 - width) * (2 * draws[2] - 1)  # (B, size)
        down = steps * height + (1 - height) * (2 * draws[3] - 1)
        grid = torch.stack(
            [across.unsqueeze(1).expand(-1, self.size, -1), down.unsqueeze(2).expand(-1, -1, self.size)], dim=-1
        )
        return F.grid_sample(x, grid, padding_mode='border', align_corners=False)

    def moved(self, x: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Shifted and flipped, by one gather, and which pixels are neither border nor erased, (B, 1, size, size)."""
        a, size = self.augmentation, self.size
        places = torch.arange(size, device=x.device)
        mirrored = torch.where(draws[0] < a.hflip, size - 1 - places, places)  # (B, size)
        columns, rows = mirrored + shifts(draws[1], a.shift), places + shifts(draws[2], a.shift)
        index = rows.clamp(0, size - 1).unsqueeze(2) * size + columns.clamp(0, size - 1).unsqueeze(1)
        index = index.flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)  # (B, C, size · size)
        inside = inside_of(rows, size).unsqueeze(2) & inside_of(columns, size).unsqueeze(1)
        if a.erase:
            area = ERASED_SCALE[0] + (ERASED_SCALE[1] - ERASED_SCALE[0]) * draws[4]
            height = (area * log_uniform(draws[5], *ERASED_RATIO)).sqrt().clamp(max=1)
            tall, wide = (share.mul(size).round().clamp(1, size) for share in (height, (area / height).clamp(max=1)))
            top, left = ((draw * (size - side + 1)).floor() for draw, side in ((draws[6], tall), (draws[7], wide)))
            down, across = (
                (places >= start) & (places < start + side) for start, side in ((top, tall), (left, wide))
            )  # (B, size)
            inside &= ~((draws[3] < a.erase).unsqueeze(2) & down.unsqueeze(2) & across.unsqueeze(1))
        return x.flatten(2).gather(2, index).unflatten(2, (size, size)), inside.unsqueeze(1)


def log_uniform(draw: Tensor, low: float, high: float) -> Tensor:
    """From low to high, their logarithms alike."""
    return (math.log(low) + (math.log(high) - math.log(low)) * draw).exp()


def shifts(draw: Tensor, largest: int) -> Tensor:
    """Whole numbers from -largest to largest."""
    return (draw * (2 * largest + 1)).long() - largest


def inside_of(places: Tensor, size: int) -> Tensor:
    """Which places are on an axis of this length."""
    return (places >= 0) & (places < size)
