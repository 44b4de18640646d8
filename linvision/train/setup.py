"""What a run needs before its first step: a validation slice, a model, a teacher."""

from pathlib import Path

import timm
import torch
from torch import nn

from linvision.data import ImageSet
from linvision.nearest import nearest
from linvision.train.recipe import Recipe


def split_validation(images: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """The set without a random slice, and the slice; which images are in it depends on the seed alone."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    n = round(len(images) * fraction)
    return images.subset(order[n:].sort().values), images.subset(order[:n].sort().values)


def create_model(recipe: Recipe, shape: dict[str, int], img_size: int) -> nn.Module:
    """The recipe's model.

    Args:
        recipe: The recipe.
        shape: What the images ask for: `in_chans` and `num_classes`.
        img_size: Image size.
    """
    arguments = {**shape, 'img_size': img_size, **recipe.model_args}
    if recipe.chunk_size != 'auto':
        arguments['chunk_size'] = recipe.chunk_size
    try:
        return timm.create_model(recipe.model, **arguments)
    except TypeError as error:
        if "'img_size'" not in str(error):
            raise
        names = ('linformer_vit_*', 'vit_*', 'deit_*')
        raise ValueError(
            f'{recipe.model} cannot be trained by a recipe: its image size cannot be set. Models that can: '
            f'{", ".join(names)}, and others that take img_size.'
        ) from error


def load_teacher(name: str, student: nn.Module, img_size: int, device: torch.device) -> nn.Module:
    """A trained model that the student learns from: a folder that a run exported, or a name of timm's."""
    source = f'local-dir:{name}' if Path(name).is_dir() else name
    shape = {'in_chans': student.patch_embed.proj.in_channels, 'num_classes': student.num_classes}
    teacher = timm.create_model(source, pretrained=True, img_size=img_size, **shape)
    return teacher.to(device).eval().requires_grad_(False)


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
