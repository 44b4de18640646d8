"""Models with their weights, by the name or folder that a user gives: timm's, whose attributes no type has."""

from pathlib import Path
from typing import Any

from timm import is_model

import linvision  # noqa: F401  (registers the models)
from linvision.data.image_file import MODES
from linvision.train.pretrained import check_weights_file, is_source, load_source, model_folder


def load_model(name: str | Path) -> Any:
    """A model with its weights, in eval mode.

    Args:
        name: Folder with `config.json` and `model.safetensors`, a run's output folder, `hf-hub:OWNER/MODEL`, or a name
            with weights.

    Raises:
        FileNotFoundError: There is no such folder, or it lacks one of the two.
        ValueError: They cannot be loaded, or the model takes no ordinary images.
    """
    if not is_source(str(name)):
        model_folder(Path(name))  # says what is missing
    model = load_source(str(name), f'The model in {name} cannot be loaded').eval()
    if not model.num_classes:
        raise ValueError(f'The model in {name} is a backbone without classes: start a recipe from it with --init.')
    if model.in_chans not in MODES:
        raise ValueError(f'The model in {name} takes images of {model.in_chans} channels; 1 or 3 were expected.')
    return model


def load_vit(name: str, checkpoint: str | None, img_size: int, **arguments: Any) -> Any:
    """A timm name or a folder, with its own weights or those of a file, and other arguments, in eval mode.

    Args:
        name: The name or the folder.
        checkpoint: The file, '' for their own; None where the command has no such flag.
        img_size: Image size, 0 for their own.
        arguments: Of `timm.create_model`.

    Raises:
        ValueError: Neither is there, or the weights are not to be loaded.
        OSError: They cannot be fetched.
    """
    if not is_source(name):
        raise ValueError(f"{name!r} is neither a folder nor a name of timm's.")
    check_weights_file(checkpoint or '')
    arguments |= {'img_size': img_size} if img_size else {}
    named = is_model(name)
    if checkpoint and named:  # as the weights of a name: timm fits positions to the image size
        arguments |= {'pretrained_cfg_overlay': {'file': checkpoint, 'custom_load': False}}
    elif checkpoint:
        arguments |= {'checkpoint_path': checkpoint}
    what = f'The weights of {checkpoint or name} cannot be loaded'
    try:
        return load_source(name, what, weights=named or not checkpoint, **arguments).eval()
    except ValueError as error:
        if named and checkpoint == '' and isinstance(error.__cause__, OSError):
            raise OSError(f'{error} Without a network, a file of these weights does: --checkpoint FILE.') from error
        raise
