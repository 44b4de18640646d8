"""Images by the paths or the data set that a user gives, as a model reads them."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor

from linvision.data import create_batches, create_dataset, part, split_validation
from linvision.data.folders import files_in
from linvision.data.image_file import SUFFIXES
from linvision.train.model import side_of


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Files as they are given, and the images in each folder and below it, by name, without hidden ones.

    Raises:
        FileNotFoundError: A path does not exist, or a folder holds no image.
        OSError: A folder cannot be read.
    """
    images = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f'{path} does not exist.')
        found = [path]
        if path.is_dir():
            found = [Path(file) for file in files_in(path) if file.lower().endswith(SUFFIXES)]
            if not found:
                raise FileNotFoundError(f'{path} holds no image ({", ".join(SUFFIXES)}).')
        images += found
    return images


def short(path: Path) -> str:
    """An image's name in a picture: that of its folder, which is often its class, and its own."""
    return '/'.join(path.with_suffix('').parts[-2:])[-24:]


def caption(path: Path, name: str, probability: float) -> str:
    """What stands above an image in a picture: its name, and the likeliest class below."""
    return f'{short(path)}\n→ {name[:18]} {100 * probability:.0f} %'


def class_names(model: Any) -> Sequence[str]:
    """Names of a model's classes, by number where it has none."""
    return model.pretrained_cfg.get('label_names') or [f'class {i}' for i in range(model.num_classes)]


class ImagesOf:
    """Images of a set, as a model reads them.

    Args:
        model: The model, for its size, channels and normalisation.
        dataset: Name of the set.
        data_dir: Folder that holds it.
        batch_size: Images in a batch.
        device: Where they go.
        on_bad_image: 'stop', or 'skip' to leave out what cannot be read.
    """

    def __init__(
        self,
        model: Any,  # one of timm's, with a patch_embed
        dataset: str,
        data_dir: Path,
        batch_size: int,
        device: torch.device,
        on_bad_image: str = 'stop',
    ) -> None:
        self.model, self.dataset, self.data_dir = model, dataset, data_dir
        self.batch_size, self.device, self.on_bad_image = batch_size, device, on_bad_image

    def batches(self, split: str, limit: int = 0, without: float = 0.0) -> Any:
        """A split of the set, or a part of it, cut into batches.

        Args:
            split: 'train' or 'test'.
            limit: Take so many images, 0 for all.
            without: Leave out the validation slice of a run with this `val_fraction` and seed 0.

        Raises:
            ValueError: The images have other channels than the model.
        """
        images, config = create_dataset(self.dataset, self.data_dir, split), resolve_model_data_config(self.model)
        if images.in_chans != self.model.in_chans:
            raise ValueError(
                f'The model takes {self.model.in_chans} channels, but the images of {self.dataset} have '
                f'{images.in_chans}.'
            )
        if without:
            images, _ = split_validation(images, without, 0)
        images = part(images, limit)
        cropping = {'crop_pct': min(config['crop_pct'], 1.0), 'crop_mode': config['crop_mode']}
        batch_size = min(self.batch_size, len(images))
        reading = {'on_bad_image': self.on_bad_image, **cropping}
        return create_batches(images, batch_size, config['mean'], config['std'], self.device, **reading)

    @property
    def size(self) -> int:
        """Side of the images that the model takes."""
        return side_of(self.model)

    def training(self, without: float = 0.0) -> Iterator[Tensor]:
        """Batches of training images in random order, without end; a validation slice may be left out."""
        return readable(self.batches('train', without=without).stream(0, 0, self.size))

    def test(self, limit: int) -> Iterator[Tensor]:
        """Batches of test images."""
        return readable(self.batches('test', limit).ordered(self.size))


def readable(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """The images that could be read, which have a label, batch by batch."""
    return (images[labels >= 0] for images, labels in batches if (labels >= 0).any())
