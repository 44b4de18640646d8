"""How far the rows of a `dynamic` E differ from photograph to photograph, before training and after a little of it.

    python -m scripts.studies.seeing --data-dir data

The model is `test_linformer_vit` on CIFAR-10 at 256 tokens (patches of 2×2), K = 16; it is trained for 400 steps of 32
images, without augmentation: enough to see whether the content of W leaves zero, and no measure of accuracy. What is
written, for each block, is `difference_between_images` over all pairs of 32 test images: 0 where all images have the
same E, 1 where none overlap. Writes `results/seeing.json`.
"""

import json
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import linvision  # noqa: F401  # its models, for timm
from linvision.analysis import difference_between_images, projection_matrices, tokens_of_images
from linvision.data.batches import in_memory
from linvision.data.datasets import create_dataset, part
from linvision.guard import guarded
from scripts.studies.tables import RESULTS

BATCH = 32


def photographs(data_dir: Path, split: str, count: int) -> tuple[Tensor, Tensor]:
    """Some images of CIFAR-10, evenly over its classes and normalised, and their labels."""
    images = in_memory(part(create_dataset('cifar10', data_dir, split), count))
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in images.statistics())
    return (images.images / 255 - mean) / std, images.labels


def differences(model: Any, images: Tensor) -> list[float]:
    """`difference_between_images` of every block."""
    blocks = range(len(model.blocks))
    found = [projection_matrices(model, i, tokens_of_images(model, images, i))[0] for i in blocks]
    return [round(difference_between_images(E), 4) for E in found]


def train(model: Any, images: Tensor, labels: Tensor, steps: int) -> None:
    """AdamW at 2e-3, with a cosine to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,))
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def main(data_dir: Path = Path('data'), steps: int = 400, output: Path = RESULTS / 'seeing.json') -> None:
    """Measure, train, measure again.

    Args:
        data_dir: Folder that holds CIFAR-10.
        steps: Steps of training; 0 looks at the untrained model alone.
        output: File for the result.
    """
    torch.manual_seed(0)
    model = timm.create_model(
        'test_linformer_vit', img_size=32, patch_size=2, proj_len=16, projection='dynamic', sharing='key_value'
    )
    looks, _ = photographs(data_dir, 'test', BATCH)
    result = {'untrained': differences(model, looks)}
    if steps:
        train(model, *photographs(data_dir, 'train', BATCH * steps // 2), steps)
        result[f'after {steps} steps'] = differences(model, looks)
    output.write_text(json.dumps(result) + '\n')
    print(json.dumps(result))


if __name__ == '__main__':
    with guarded():
        tyro.cli(main)
