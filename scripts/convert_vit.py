"""A plain ViT as a Linformer ViT: convert it, fit E to images, and report how near the two are.

    python scripts/convert_vit.py vit_tiny_patch16_224 --data-dir MY_IMAGES --output-dir outputs/converted
    python scripts/convert_vit.py outputs/my_vit --dataset fashion_mnist --proj-len 64 --output-dir outputs/converted

The first argument is a timm name with pretrained weights, `hf-hub:…`, or the folder of a model (a run's output folder
too). Fitting takes training images of the set, without labels; agreement is that on its test images. Writes
`config.json` and `model.safetensors`, which `timm.create_model('local-dir:FOLDER', pretrained=True)`, `predict.py`,
`evaluate.py` and a recipe's `--init` read, and `conversion.json`, which is printed as well.
"""

import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import tyro
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from torch import Tensor, nn

from linvision.convert import agreement, fit_projection, from_vit
from linvision.data import create_batches, create_dataset, part, split_validation
from linvision.train.checkpoint import first_line
from linvision.train.parallel import choose_device
from linvision.train.pretrained import is_source, source_of


def load_vit(name: str, checkpoint: str, img_size: int) -> nn.Module:
    """The original: a timm name or a folder, with its own weights or those of a file, in eval mode.

    Raises:
        ValueError: Neither is there, or the weights are not to be loaded.
    """
    if not is_source(name):
        raise ValueError(f"{name!r} is neither a folder nor a name of timm's.")
    size = {'img_size': img_size} if img_size else {}
    try:
        return timm.create_model(source_of(name), pretrained=not checkpoint, checkpoint_path=checkpoint, **size).eval()
    except RuntimeError as error:  # weights of another shape, or a file that is more than weights
        raise ValueError(f'The weights of {checkpoint or name} cannot be loaded: {first_line(error)}') from error


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
        model: nn.Module,
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
        """The model's image size."""
        return self.model.patch_embed.img_size[0]

    def training(self, without: float = 0.0) -> Iterator[Tensor]:
        """Batches of training images in random order, without end; a validation slice may be left out."""
        return readable(self.batches('train', without=without).stream(0, 0, self.size))

    def test(self, limit: int) -> Iterator[Tensor]:
        """Batches of test images."""
        return readable(self.batches('test', limit).ordered(self.size))


def readable(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """The images that could be read, which have a label, batch by batch."""
    return (images[labels >= 0] for images, labels in batches if (labels >= 0).any())


def counted(batches: Iterable[Tensor], steps: int, seconds: float = 10.0) -> Iterator[Tensor]:
    """The batches; on the way it is said, every so many seconds, how many were asked for and how long it will take."""
    start = said = time.perf_counter()
    for step, images in enumerate(batches):
        now = time.perf_counter()
        if step and now - said > seconds:
            said = now
            left = (now - start) / step * (steps - step) / 60
            print(f'fitting: step {step} of {steps}, {left:.1f} min left', file=sys.stderr, flush=True)
        yield images


def main(
    model: tyro.conf.Positional[str],
    output_dir: Path = Path('outputs/converted'),
    checkpoint: str = '',
    img_size: int = 0,
    proj_len: int | tuple[int, ...] = 64,
    projection: str = 'linear',
    sharing: str = 'layerwise',
    steps: int = 200,
    lr: float = 3e-3,
    dataset: str = 'image_folder',
    data_dir: Path = Path('data'),
    batch_size: int = 32,
    limit: int = 1000,
    on_bad_image: Literal['stop', 'skip'] = 'stop',
    device: str = 'auto',
) -> None:
    """Convert a model.

    Args:
        model: A timm name with pretrained weights, `hf-hub:…`, or a folder with a model.
        output_dir: Folder for the converted model.
        checkpoint: File with the weights, for a timm name.
        img_size: Image size, 0 for the model's own.
        proj_len: K, the number of projected rows; or one for each layer, where each has an E (`--sharing key_value`).
        projection: 'linear', 'separable', 'conv', 'mean_pool', 'max_pool' or 'none'.
        sharing: 'layerwise', 'key_value', 'headwise' or 'none'.
        steps: Steps of fitting E, a batch each; 0 leaves it as pooling by area.
        lr: Learning rate of fitting.
        dataset: Name of the data set.
        data_dir: Folder that holds the data.
        batch_size: Images in a batch.
        limit: Test images to compare on, 0 for all.
        on_bad_image: What becomes of an image that cannot be read: it stops the conversion, or is left out.
        device: Torch device; 'auto' takes the accelerator if there is one.
    """
    where = choose_device(device)
    original = load_vit(model, checkpoint, img_size).to(where)
    converted = from_vit(original, proj_len, projection, sharing)
    images = ImagesOf(original, dataset, data_dir, batch_size, where, on_bad_image)
    report = {
        'original': model,
        'proj_len': proj_len,
        'tokens': original.patch_embed.num_patches,
        'projection': projection,
        'sharing': sharing,
        'pooled': agreement(converted, original, images.test(limit)),
    }
    if steps and projection not in ('none', 'mean_pool', 'max_pool'):
        errors = fit_projection(converted, original, counted(images.training(), steps), steps, lr)
        report['fitted'] = agreement(converted, original, images.test(limit))
        if report['fitted']['relative_error'] > report['pooled']['relative_error']:
            logging.warning('the fitted E is further from the original than pooling: try more steps, or a smaller lr.')
        report['attention_error'] = {'first': errors[0], 'last': errors[-1], 'steps': steps}
    save_for_hf(converted, str(output_dir), safe_serialization=True)
    (output_dir / 'conversion.json').write_text(json.dumps(report, indent=2) + '\n')
    print(json.dumps(report))


if __name__ == '__main__':
    logging.basicConfig(format='%(levelname)s: %(message)s')
    try:
        tyro.cli(main, description=__doc__)
    except (ValueError, OSError) as error:
        sys.exit(f'error: {error}')
