"""A trained model as a folder that timm loads: `timm.create_model('local-dir:FOLDER', pretrained=True)`."""

from pathlib import Path
from typing import Any

from timm.models import save_for_hf
from torch import nn

from linvision.data import Images


def export_model(model: nn.Module, folder: Path, images: Images, data_config: dict[str, Any]) -> None:
    """Write `config.json` and `model.safetensors`.

    Args:
        model: The model.
        folder: Where to.
        images: A set with its classes.
        data_config: How images are read (mean, std, crop_pct, …), so that timm's `resolve_model_data_config` and
            `create_transform` repeat what evaluation did.
    """
    save_for_hf(
        model,
        str(folder),
        # tag and names in timm's config belong to the weights that the model may have started from, or to its name's
        model_config={'label_names': list(images.classes), 'pretrained_cfg': {'tag': None, 'label_names': None}},
        data_config=data_config,
        safe_serialization=True,
    )
