"""timm's reading of an image for evaluation, for images of any shape; what fails is an error of that image, named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.data import create_transform
from timm.data.transforms import ResizeKeepRatio

from linvision.data.image_file import WHOLE, middle


def timm_transform(**config: Any) -> Callable[[Any], Any]:
    """`timm.data.create_transform`, under which no long, thin image shrinks to nothing or grows to gigabytes.

    Args:
        config: As `timm.data.resolve_model_data_config` gives it, or other arguments of `create_transform`.
    """
    transform = create_transform(**config)
    for step in transform.transforms:
        if isinstance(step, ResizeKeepRatio):
            step.get_params = pixels  # type: ignore[method-assign]  # a method of one object, not of timm's class
    if config.get('crop_mode') not in WHOLE:
        transform.transforms.insert(0, middle)
    return transform


def pixels(*args: Any) -> list[int]:
    """Height and width that an image is resized to, where timm would round a side to 0."""
    return [max(1, side) for side in ResizeKeepRatio.get_params(*args)]


def changed(transform: Callable[..., Any], image: Any, name: str | Path, *args: Any) -> Any:
    """An image as a transform makes it.

    Raises:
        OSError: The transform fails; the message names the image.
    """
    try:
        return transform(image, *args)
    except Exception as error:  # libraries have many words for an image that they cannot change
        reason = f'{type(error).__name__}: {error}' if str(error) else type(error).__name__
        raise OSError(f'{name} cannot be brought to the size of the model ({reason}).') from error
