"""What several tests of training share: a small recipe, and what a run leaves behind."""

from pathlib import Path
from typing import Any

import timm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from linvision.train import Recipe


def small(folder: Path, **changes: Any) -> Recipe:
    """A run of seconds on the fake data set, in two stages, in an output folder."""
    settings = dict(
        model='test_linformer_vit',
        dataset='fake',
        output_dir=folder,
        data_dir=folder.parent,
        stages=((8, 0.5), (16, 0.5)),
        precision='fp32',
        device='cpu',
        threads=1,
    )
    return Recipe(**{**settings, **changes})


def weights(folder: Path) -> dict[str, Tensor]:
    """The exported weights of a run."""
    return timm.create_model(f'local-dir:{folder}/model', pretrained=True).state_dict()


def events(folder: Path) -> EventAccumulator:
    """What TensorBoard shows of a run."""
    return EventAccumulator(str(folder / 'tensorboard'), size_guidance={'images': 0}).Reload()
