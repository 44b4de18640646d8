"""What Pathfinder images look like, how fast they are made, and what of the label leaks past the paths.

    python -m scripts.studies.run pathfinder
    python -m scripts.studies.run pathfinder --contour-length 6 --counts 20000 0 0 0

A picture of each size; images/s on one core; and, on test images that no classifier was trained on, how often the label
is found (1) from statistics of the pixels, (2) from the distance between the markers, which is part of the published
stimulus, and by a small CNN at 32 pixels, (3) on images without markers and (4) on images with them, which is no leak.
Writes `results/pathfinder_14.json`, the picture `pathfinder_14.png` (or 6, or 9) and the table in
`docs/pathfinder.md`.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linvision.data import create_dataset
from linvision.data.pathfinder import SIZES, Pathfinder, draw
from linvision.train.metrics import machine
from scripts.studies.tables import DOCS, publish, table

BINS = 16  # of a histogram of brightness
WIDTHS = ((1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 96, 2), (96, 96, 1))  # of the CNN


@dataclass
class Settings:
    """What the study can be asked.

    Args:
        contour_length: Dashes of a path.
        counts: Training images, and as many test images, of 32, 64, 128 and 256 pixels (0: none of this size).
        cnn_epochs: Epochs of the CNN (0: none).
    """

    contour_length: Literal[6, 9, 14] = 14
    counts: tuple[int, int, int, int] = (20_000, 4_000, 2_000, 1_000)
    cnn_epochs: int = 4


def features(images: Tensor) -> Tensor:
    """Statistics of images (n, H, W), uint8: mean, spread, histogram, centre and extent of what is lit. (n, F)."""
    x = images.float() / 255
    grid = torch.linspace(-1, 1, images.shape[-1])
    mass = x.sum((1, 2)).clamp(min=1e-6)
    across, down = x.sum(1) / mass[:, None], x.sum(2) / mass[:, None]
    moments = [moment for side in (across, down) for moment in (side @ grid, side @ grid.square(), side @ grid.pow(4))]
    levels = (images.flatten(1) // (256 // BINS)).long()
    histogram = torch.zeros(len(images), BINS).scatter_add_(1, levels, torch.ones(levels.shape))
    return torch.cat([torch.stack([x.mean((1, 2)), x.std((1, 2)), *moments], 1), histogram], 1)


def linear_score(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> float:
    """Accuracy on test features of logistic regression on features and their squares."""
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (torch.cat([x, x.square()], 1) for x in ((train - mean) / std, (test - mean) / std))
    weights = torch.zeros(train.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn='strong_wolfe')

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(train @ weights[1:] + weights[0], labels.float())
        value = value + 1e-3 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return ((test @ weights[1:] + weights[0] > 0) == truth.bool()).float().mean().item()


def histogram_score(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, bins: int = 20) -> float:
    """Accuracy of the likelier label in each of the bins, by quantiles, of one number."""
    edges = torch.quantile(train, torch.linspace(0, 1, bins + 1)[1:-1])
    votes = torch.zeros(bins).scatter_add_(0, torch.bucketize(train, edges), 2 * labels.float() - 1)
    return ((votes[torch.bucketize(test, edges)] > 0) == truth.bool()).float().mean().item()


def small_cnn() -> nn.Sequential:
    """Seven convolutions, three of which halve the image, a mean, and a linear layer: 208,498 parameters."""
    layers: list[nn.Module] = []
    for before, after, stride in WIDTHS:
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 2))


def cnn_score(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, epochs: int) -> float:
    """Accuracy on test images (n, H, W), uint8, of a small CNN that has to give either label to half of them."""
    torch.manual_seed(0)
    model = small_cnn()
    steps = epochs * (len(train) // 100)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    order = torch.cat([torch.randperm(len(train))[: len(train) // 100 * 100] for _ in range(epochs)])
    for index in order.split(100):
        optimizer.zero_grad()
        F.cross_entropy(model(train[index].unsqueeze(1) / 255), labels[index]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(part.unsqueeze(1) / 255) for part in test.split(500)])
    for_one = logits[:, 1] - logits[:, 0]
    return ((for_one > for_one.median()) == truth.bool()).float().mean().item()


class Looked:
    """The first images of a split, with and where wished without markers, (n, H, W), and how far apart the markers are.

    Args:
        images: The set.
        count: How many.
        plain: Whether those without markers are wanted.
    """

    def __init__(self, images: Pathfinder, count: int, plain: bool) -> None:
        self.labels = torch.tensor([images.label(i) for i in range(count)])
        made = [(images.scene(i), label) for i, label in enumerate(self.labels.tolist())]
        marked = [np.asarray(draw(scene, label, images.img_size)) for scene, label in made]
        self.marked = torch.from_numpy(np.stack(marked))
        if plain:
            unmarked = [np.asarray(draw(scene, label, images.img_size, markers=False)) for scene, label in made]
            self.plain = torch.from_numpy(np.stack(unmarked))
        self.distances = torch.tensor([math.dist(*scene.marked(label)) for scene, label in made])


def images_per_s(size: int, length: int, count: int = 300) -> float:
    """How many images one core makes in a second of its own time."""
    images = create_dataset('pathfinder', '', 'train', img_size=size, contour_length=length)
    start = time.process_time()
    for i in range(count):
        images[i]
    return count / (time.process_time() - start)


def leaks(size: int, length: int, count: int, cnn_epochs: int) -> dict[str, Any]:
    """What is found out about one size from `count` training and as many test images."""
    with_cnn = bool(cnn_epochs) and size == 32
    train, test = (
        Looked(create_dataset('pathfinder', '', split, img_size=size, contour_length=length), count, with_cnn)
        for split in ('train', 'test')
    )
    labels = {'labels': train.labels, 'truth': test.labels}
    found = {
        'num_samples': count,
        'statistics': linear_score(train=features(train.marked), test=features(test.marked), **labels),
        'marker_distance': histogram_score(train=train.distances, test=test.distances, **labels),
    }
    if with_cnn:
        found['cnn_without_markers'] = cnn_score(train=train.plain, test=test.plain, epochs=cnn_epochs, **labels)
        found['cnn'] = cnn_score(train=train.marked, test=test.marked, epochs=cnn_epochs, **labels)
    return found


def draw_samples(path: Path, length: int, columns: int = 6) -> None:
    """Samples of each size, with their labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 * columns, 8.6), layout='constrained')
    for row, size in zip(figure.subplots(len(SIZES), columns), SIZES, strict=True):
        images = create_dataset('pathfinder', '', 'train', img_size=size, contour_length=length)
        row[0].set_ylabel(f'{size}×{size}')
        for axis, i in zip(row, range(columns), strict=True):
            image, label = images[i]
            axis.imshow(image, cmap='gray', interpolation='nearest')
            axis.set_title(images.classes[label], fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
    figure.savefig(path, dpi=110)


def pathfinder(settings: Settings) -> None:
    """What Pathfinder images look like, how fast they are made, and what of the label leaks past the paths."""
    torch.set_num_threads(1)
    length, epochs = settings.contour_length, settings.cnn_epochs
    draw_samples(DOCS / 'images' / f'pathfinder_{length}.png', length)
    sizes = {size: count for size, count in zip(SIZES, settings.counts, strict=True) if count}
    rates = {size: images_per_s(size, length) for size in sizes}
    print({size: round(rate) for size, rate in rates.items()}, flush=True)
    found = {size: {'images_per_s': rates[size], **leaks(size, length, n, epochs)} for size, n in sizes.items()}
    result = {'contour_length': length, 'cnn_epochs': epochs, **machine(torch.device('cpu')), 'sizes': found}

    def per_cent(field: str) -> Any:
        return lambda size, rows: f'{100 * rows[size][field]:.1f} %' if field in rows[size] else ''

    columns = {
        'size': lambda size, _: str(size),
        'tokens': lambda size, _: f'{size**2:,}',
        'images/s, one core': lambda size, rows: f'{rows[size]["images_per_s"]:.0f}',
        'statistics of the pixels': per_cent('statistics'),
        'distance of the markers': per_cent('marker_distance'),
        'CNN without markers': per_cent('cnn_without_markers'),
        'CNN with markers': per_cent('cnn'),
        'test images': lambda size, rows: f'{rows[size]["num_samples"]:,}',
    }
    publish(f'pathfinder_{length}', result, table(columns, found), 'pathfinder.md', f'images_{length}')
