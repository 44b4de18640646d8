"""A trained model as a folder that timm loads: `timm.create_model('local-dir:FOLDER', pretrained=True)`."""

from pathlib import Path

from timm.models import save_for_hf
from torch import nn

from linvision.data import ImageSet


def export_model(
    model: nn.Module, folder: Path, images: ImageSet, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    """Write `config.json` and `model.safetensors`.

    The config says how images are read, so that timm's `resolve_model_data_config` and `create_transform` repeat what
    training did: an image is fitted into the part of the canvas that the data set's images take, and bordered with the
    mean colour (timm's crop mode 'border').
    """
    side = max(images.images.shape[-2:])
    data_config = {
        'mean': mean,
        'std': std,
        'crop_pct': round(images.img_size / (side + 0.5), 4) if side < images.img_size else 1.0,  # timm rounds down
        'crop_mode': 'border',
        'interpolation': 'bicubic',
    }
    save_for_hf(
        model,
        str(folder),
        model_config={'label_names': list(images.classes)},
        data_config=data_config,
        safe_serialization=True,
    )
