"""What a run is worth: its score beside softmax regression on the raw pixels, and a picture of what it attends to.

    python scripts/demo_report.py --run outputs/demo

Reads a finished run (`metrics.json`, `model/`) and the data that it was trained on. Writes into the same folder:
`report.json` (both scores), `predictions.png` (test images, what the model sees in them and where it looks) and `images/`
(the images of the picture, for `scripts/predict.py`).
"""

import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch
import tyro
from PIL import Image
from predict import load_model
from softmax_regression import softmax_regression
from torch import Tensor, nn

from linvision.attention_map import attention_maps
from linvision.data import DeviceBatches, ImageSet, create_dataset

COLUMNS, ROWS, WRONG = 6, 4, 8  # the picture's grid, and how many of its images the model gets wrong
SEED = 0


@torch.inference_mode()
def probabilities(model: nn.Module, batches: DeviceBatches) -> Tensor:
    """Probabilities of every image: (n, classes)."""
    size = model.pretrained_cfg['input_size'][-1]
    return torch.cat([model(images).softmax(-1) for images, _ in batches.ordered(size)])


def choose(right: Tensor) -> list[int]:
    """Positions of the images to show: drawn by a fixed seed, right ones first, at most `WRONG` wrong ones."""
    order = torch.randperm(len(right), generator=torch.Generator().manual_seed(SEED))
    wrong = order[~right[order]][:WRONG]
    return [*order[right[order]][: COLUMNS * ROWS - len(wrong)].tolist(), *wrong.tolist()]


def draw(path: Path, images: Tensor, maps: Tensor, captions: list[tuple[str, str, bool]], title: str) -> None:
    """A grid of pairs: the image, and the same with the attention laid over it.

    Args:
        path: The PNG.
        images: (n, H, W) in 0..1.
        maps: (n, H, W), signed; each is scaled by its own largest magnitude.
        captions: For each image what the model says, what is true, and whether they agree.
        title: Title of the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 11.4), layout='constrained')
    figure.suptitle(title, fontsize=15)
    cells = figure.subfigures(ROWS, COLUMNS, wspace=0.03, hspace=0.02)
    overlay = None
    for cell, image, weight, (says, truth, right) in zip(cells.flat, images, maps, captions, strict=False):
        cell.suptitle(f'{says}\n{truth}', fontsize=10.5, color='#1a6e34' if right else '#b3261e')
        left, centre = cell.subplots(1, 2)
        left.imshow(image, cmap='gray', vmin=0, vmax=1)
        centre.imshow(image, cmap='gray', vmin=0, vmax=1)
        scaled = weight / weight.abs().max().clamp(min=1e-12)
        overlay = centre.imshow(scaled, cmap='RdBu_r', vmin=-1, vmax=1, alpha=0.7)
        for axes in (left, centre):
            axes.set_axis_off()
    figure.colorbar(
        overlay,
        ax=figure.subfigs,
        location='bottom',
        aspect=60,
        shrink=0.5,
        label="weight of each pixel in the last block's mean attention output (signed; each image by its own maximum)",
    )
    figure.savefig(path, dpi=110)
