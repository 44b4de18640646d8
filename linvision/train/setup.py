"""What a run needs before its first step: a folder, a device, a validation slice, a model."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from linvision.data import ImageSet
from linvision.nearest import nearest
from linvision.train.checkpoint import check_same_run
from linvision.train.recipe import Recipe


def open_folder(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Make the output folder, see that it can be written and holds no finished run of another recipe.

    Returns:
        The metrics of a finished run, or an empty dict.

    Raises:
        OSError: The folder cannot be written.
        ValueError: It holds a finished run of another recipe.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / '.writable'
        probe.write_text('')
        probe.unlink()
    except OSError as error:
        raise OSError(
            f'The output folder {folder} cannot be written ({error}). Choose another --output-dir.'
        ) from error
    metrics = folder / 'metrics.json'
    if metrics.exists():
        found = json.loads(metrics.read_text())
        check_same_run(folder, recipe.to_dict(), found['recipe'])
        return found
    return {}


def choose_device(name: str) -> torch.device:
    """The torch device of a name; 'auto' is the accelerator, or the CPU."""
    if name == 'auto':
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device('cpu')
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'The device {name!r} cannot be used here ({str(error).splitlines()[0]}).') from error
    return device


def split_validation(images: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """The set without a random slice, and the slice; which images are in it depends on the seed alone."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    n = round(len(images) * fraction)
    return images.subset(order[n:].sort().values), images.subset(order[:n].sort().values)


def create_model(recipe: Recipe, images: ImageSet, img_size: int) -> nn.Module:
    """The recipe's model for these images: their channels, classes and size."""
    defaults = {'in_chans': images.images.shape[1], 'num_classes': len(images.classes), 'img_size': img_size}
    try:
        return timm.create_model(recipe.model, **{**defaults, **recipe.model_args})
    except TypeError as error:
        if "'img_size'" not in str(error):
            raise
        names = ('linformer_vit_*', 'vit_*', 'deit_*')
        raise ValueError(
            f'{recipe.model} cannot be trained by a recipe: its image size cannot be set. Models that can: '
            f'{", ".join(names)}, and others that take img_size.'
        ) from error


def set_size(model: nn.Module, img_size: int) -> None:
    """Give the model another image size, unless it has it."""
    if tuple(model.patch_embed.img_size) == (img_size, img_size):
        return
    if not hasattr(model, 'set_input_size'):
        raise ValueError(nearest('way to change the image size of', type(model).__name__, ['linformer_vit_*', 'vit_*']))
    model.set_input_size(img_size=(img_size, img_size))


def count_tokens(model: nn.Module) -> int:
    """Tokens of one image at the model's present size."""
    return model.patch_embed.num_patches
