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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import tyro
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from torch import Tensor, nn

from linvision.convert import agreement, fit_projection, from_vit
from linvision.data import create_batches, create_dataset, part
from linvision.train.parallel import choose_device
from linvision.train.setup import source_of, split_validation


def load_vit(name: str, checkpoint: str, img_size: int) -> nn.Module:
    """The original: a timm name or a folder, with its own weights or those of a file, in eval mode.

    Raises:
        ValueError: Neither is there.
    """
    if not Path(name).is_dir() and ':' not in name and not timm.is_model(name):
        raise ValueError(f"{name!r} is neither a folder nor a name of timm's.")
    size = {'img_size': img_size} if img_size else {}
    return timm.create_model(source_of(name), pretrained=not checkpoint, checkpoint_path=checkpoint, **size).eval()


class ImagesOf:
    """Images of a set, as a model reads them.

    Args:
        model: The model, for its size, channels and normalisation.
        dataset: Name of the set.
        data_dir: Folder that holds it.
        batch_size: Images in a batch.
        device: Where they go.
    """

    def __init__(self, model: nn.Module, dataset: str, data_dir: Path, batch_size: int, device: torch.device) -> None:
        self.model, self.dataset, self.data_dir = model, dataset, data_dir
        self.batch_size, self.device = batch_size, device

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
        return create_batches(images, batch_size, config['mean'], config['std'], self.device, **cropping)

    @property
    def size(self) -> int:
        """The model's image size."""
        return self.model.patch_embed.img_size[0]

    def training(self, without: float = 0.0) -> Iterator[Tensor]:
        """Batches of training images in random order, without end; a validation slice may be left out."""
        return (images for images, _ in self.batches('train', without=without).stream(0, 0, self.size))

    def test(self, limit: int) -> Iterator[Tensor]:
        """Batches of test images."""
        return (images for images, _ in self.batches('test', limit).ordered(self.size))


def main(
    model: tyro.conf.Positional[str],
    output_dir: Path = Path('outputs/converted'),
    checkpoint: str = '',
    img_size: int = 0,
    proj_len: int = 64,
    projection: str = 'linear',
    sharing: str = 'layerwise',
    steps: int = 200,
    lr: float = 3e-3,
    dataset: str = 'image_folder',
    data_dir: Path = Path('data'),
    batch_size: int = 32,
    limit: int = 1000,
    device: str = 'auto',
) -> None:
    """Convert a model.

    Args:
        model: A timm name with pretrained weights, `hf-hub:…`, or a folder with a model.
        output_dir: Folder for the converted model.
        checkpoint: File with the weights, for a timm name.
        img_size: Image size, 0 for the model's own.
        proj_len: K, the number of projected rows.
        projection: 'linear', 'separable', 'conv', 'mean_pool', 'max_pool' or 'none'.
        sharing: 'layerwise', 'key_value', 'headwise' or 'none'.
        steps: Steps of fitting E, a batch each; 0 leaves it as pooling by area.
        lr: Learning rate of fitting.
        dataset: Name of the data set.
        data_dir: Folder that holds the data.
        batch_size: Images in a batch.
        limit: Test images to compare on, 0 for all.
        device: Torch device; 'auto' takes the accelerator if there is one.
    """
    where = choose_device(device)
    original = load_vit(model, checkpoint, img_size).to(where)
    converted = from_vit(original, proj_len, projection, sharing)
    images = ImagesOf(original, dataset, data_dir, batch_size, where)
    report = {
        'original': model,
        'proj_len': proj_len,
        'tokens': original.patch_embed.num_patches,
        'projection': projection,
        'sharing': sharing,
        'pooled': agreement(converted, original, images.test(limit)),
    }
    if steps and projection not in ('none', 'mean_pool', 'max_pool'):
        errors = fit_projection(converted, original, images.training(), steps, lr)
        report['fitted'] = agreement(converted, original, images.test(limit))
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
