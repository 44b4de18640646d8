"""Random changes of training images, by torchvision, albumentations, kornia or plain PyTorch.

torchvision and albumentations change one image at a time on the CPU, uint8 in and out; kornia and PyTorch
(`device_augmentation.py`) change a batch on its device, and normalise it too. Each offers the same operations as far as
it has them: crop, shift, flip, RandAugment (torchvision alone: kornia's draws one operation for a whole batch,
albumentations has none), colour, erasing. What an
erased area or a border is filled with is the mean colour, zero once normalised. Mixup and CutMix are timm's, in the
training loop. `docs/augmentation.md` compares the four.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from linvision.data.image_set import fill_colour
from linvision.extras import needed
from linvision.nearest import nearest

LIBRARIES = ('torchvision', 'albumentations', 'kornia', 'torch')
ON_DEVICE = ('kornia', 'torch')  # those that change batches on the device
RATIO = (3 / 4, 4 / 3)  # of the sides of a random resized crop
ERASED_SCALE, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)  # area and sides of what is erased: torchvision's defaults


@dataclass(frozen=True)
class Augmentation:
    """What is changed at random, and by which library.

    Attributes:
        library: One of `LIBRARIES`.
        crop_scale: Smallest and largest share of the image's area in a random resized crop; (1, 1) for none.
        shift: Largest shift, in pixels, in each direction.
        hflip: Probability of a horizontal flip.
        rand_augment: Magnitude of RandAugment's two operations, 0 to 30 (0: off).
        color_jitter: Largest relative change of brightness, contrast and saturation (0: off).
        erase: Probability that a random rectangle is erased.
    """

    library: str = 'torchvision'
    crop_scale: tuple[float, float] = (1.0, 1.0)
    shift: int = 0
    hflip: float = 0.0
    rand_augment: int = 0
    color_jitter: float = 0.0
    erase: float = 0.0

    @property
    def crops(self) -> bool:
        """Whether images are cropped and resized at random."""
        return tuple(self.crop_scale) != (1.0, 1.0)

    @property
    def active(self) -> bool:
        """Whether anything is changed at all."""
        return self.crops or any((self.shift, self.hflip, self.rand_augment, self.color_jitter, self.erase))

    def check(self, in_chans: int) -> None:
        """Raise ValueError for what the library cannot do to images of so many channels."""
        if self.library not in LIBRARIES:
            raise ValueError(nearest('augmentation', self.library, LIBRARIES))
        if self.rand_augment and self.library != 'torchvision':
            raise ValueError(
                f"rand_augment is torchvision's alone, got augmentation {self.library!r}: "
                'say --augmentation torchvision.'
            )
        if in_chans != 3 and (self.rand_augment or self.color_jitter):
            raise ValueError(
                f'rand_augment and color_jitter change colours, but the images have {in_chans} channel(s): switch them '
                'off with --rand-augment 0 --color-jitter 0.'
            )


Transform = Callable[[Tensor | Image.Image, int], Tensor]
"""An image, uint8 (C, H, W) or PIL, and a seed to a uint8 tensor (C, size, size)."""


class TorchvisionTransform:
    """One image at a time, by torchvision.transforms.v2; a class, so that it can be sent to workers.

    Args:
        augmentation: What is changed.
        size: Side of the images that come out, or their height and width.
        mean: Mean of each channel, on the scale 0..1.
    """

    def __init__(self, augmentation: Augmentation, size: int | tuple[int, int], mean: tuple[float, ...]) -> None:
        a, fill = augmentation, fill_colour(mean).flatten().tolist()
        steps: list[Any] = [v2.ToImage()]
        if a.crops:
            shape = size[1] / size[0] if isinstance(size, tuple) else 1.0
            ratio = (shape * RATIO[0], shape * RATIO[1])
            steps.append(v2.RandomResizedCrop(size, a.crop_scale, ratio, v2.InterpolationMode.BICUBIC))
        else:
            steps += [v2.Resize(size, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)]
        if a.rand_augment:
            steps.append(v2.RandAugment(magnitude=a.rand_augment, fill=fill))
        if a.color_jitter:
            steps.append(v2.ColorJitter(*[a.color_jitter] * 3))
        if a.shift:  # after the colours, which would change the border's
            steps.append(v2.RandomCrop(size, padding=a.shift, fill=fill))
        steps.append(v2.RandomHorizontalFlip(a.hflip))
        if a.erase:
            steps.append(v2.RandomErasing(a.erase, value=fill))
        self.change = v2.Compose([*steps, v2.ToPureTensor()])

    def __call__(self, image: Tensor | Image.Image, seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.change(image)


class AlbumentationsTransform:
    """One image at a time, by albumentations; seeded for each, since its workers else draw the same numbers.

    Args:
        augmentation: What is changed.
        size: Side of the images that come out.
        mean: Mean of each channel, on the scale 0..1.
    """

    def __init__(self, augmentation: Augmentation, size: int, mean: tuple[float, ...]) -> None:
        os.environ['NO_ALBUMENTATIONS_UPDATE'] = '1'  # before the import, which else asks the network
        with needed('albumentations as augmentation'):
            import albumentations as A
            import cv2

        cv2.setNumThreads(0)  # workers are processes
        a, fill = augmentation, fill_colour(mean).flatten().tolist()
        smooth = {'interpolation': cv2.INTER_CUBIC, 'area_for_downscale': 'image'}
        steps: list[Any] = []
        if a.crops:
            steps.append(A.RandomResizedCrop((size, size), a.crop_scale, RATIO, **smooth))
        else:
            steps += [A.SmallestMaxSize(size, **smooth), A.CenterCrop(size, size)]
        if a.color_jitter:
            steps.append(A.ColorJitter(*[(1 - a.color_jitter, 1 + a.color_jitter)] * 3, hue=(0, 0), p=1))
        if a.shift:  # after the colours, which would change the border's
            side = size + 2 * a.shift
            steps += [A.PadIfNeeded(side, side, border_mode=cv2.BORDER_CONSTANT, fill=fill), A.RandomCrop(size, size)]
        steps.append(A.HorizontalFlip(p=a.hflip))
        if a.erase:
            steps.append(A.Erasing(scale=ERASED_SCALE, ratio=ERASED_RATIO, fill=fill, p=a.erase))
        self.size, self.change = size, A.Compose(steps)

    def __call__(self, image: Tensor | Image.Image, seed: int) -> Tensor:
        self.change.set_random_seed(seed % 2**32)
        array = image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) else np.asarray(image)
        array = self.change(image=array[:, :, None] if array.ndim == 2 else array)['image']  # (H, W, C)
        return torch.from_numpy(np.ascontiguousarray(array.reshape(self.size, self.size, -1).transpose(2, 0, 1)))


TRANSFORMS: dict[str, Callable[[Augmentation, int, tuple[float, ...]], Transform]] = {
    'torchvision': TorchvisionTransform,
    'albumentations': AlbumentationsTransform,
}


class KorniaBatches:
    """A batch at a time on its device, by kornia: uint8 to normalised.

    Each image's draws are those of its place in the global batch, whatever the number of processes.

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
        rank: int = 0,
        count: int = 1,
    ) -> None:
        with needed('kornia as augmentation'):
            import kornia.augmentation as K

        a, steps = augmentation, []
        if a.color_jitter:
            steps.append(K.ColorJitter(*[a.color_jitter] * 3))  # not ColorJiggle, which adds brightness
        steps.append(K.Normalize(torch.tensor(mean), torch.tensor(std)))  # from here on the mean colour is zero
        if a.crops:
            steps.append(K.RandomResizedCrop((size, size), a.crop_scale, RATIO))
        if a.shift:
            steps.append(K.RandomCrop((size, size), padding=a.shift))
        steps.append(K.RandomHorizontalFlip(p=a.hflip))
        if a.erase:
            steps.append(K.RandomErasing(p=a.erase, scale=ERASED_SCALE, ratio=ERASED_RATIO))
        self.change = K.AugmentationSequential(*steps, data_keys=['input'])
        self.rank, self.count = rank, count

    def __call__(self, images: Tensor, seed: int) -> Tensor:
        """This process's uint8 images of the batch with this seed, (B, C, H, W), normalised: (B, C, size, size)."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            drawn = self.change.forward_parameters(torch.Size((len(images) * self.count, *images.shape[1:])))
        for item in drawn:
            for name, values in item.data.items():
                if name == 'forward_input_shape':
                    item.data[name] = torch.tensor(images.shape)
                elif name != 'order':  # of the colour operations: one for the batch
                    item.data[name] = values[self.rank :: self.count]
        return self.change(images.float() / 255, params=drawn)
