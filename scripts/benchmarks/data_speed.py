"""How fast images are read and changed: three libraries on the same pipeline, and the loader beside the step.

    python -m scripts.tools.imagenet_layout --output-dir data/imagenet_layout
    python -m scripts.benchmarks.data_speed --data-dir data/imagenet_layout

Writes `results/augmentation.json` beside this file and the tables of `docs/augmentation.md` (between its markers).
"""

import json
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import albumentations
import kornia
import torch
import torchvision
import tyro
from torch import Tensor

from linvision.data import Augmentation, create_batches, create_dataset
from linvision.data.augmentation import LIBRARIES
from linvision.guard import guarded
from scripts import ROOT
from scripts.studies.tables import write_table
from scripts.studies.trials import trial

PIPELINE = {'crop_scale': (0.08, 1.0), 'hflip': 0.5, 'color_jitter': 0.4, 'erase': 0.25}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Source = Callable[[], Iterator[Any]]
SHARDS = {'num_classes': 1000, 'test_split': 'val'}


def images_per_s(batches: Iterator[tuple[Tensor, Tensor]], n: int) -> float:
    """Images a second over n batches, after two that are not counted."""
    list(islice(batches, 2))
    start = time.perf_counter()
    images = sum(len(labels) for _, labels in islice(batches, n))
    return images / (time.perf_counter() - start)


def alternate(sources: dict[str, Source], n: int, repeats: int) -> dict[str, list[float]]:
    """Images a second of each source, measured in turns."""
    rates: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(repeats):
        for name, source in sources.items():
            rates[name].append(images_per_s(source(), n))
    return rates


def source(images: Any, change: Augmentation, batch_size: int, size: int, workers: int = 0) -> Source:
    """Batches of a set on the CPU, from the beginning at every call."""
    cpu = torch.device('cpu')
    return lambda: create_batches(images, batch_size, MEAN, STD, cpu, change, workers=workers).stream(0, 0, size)


def libraries(root: Path, batch_size: int, n: int, repeats: int) -> dict[str, list[float]]:
    """The three libraries on the same pipeline, from JPEG to a normalised 224×224 batch, all in one process."""
    images = create_dataset('imagenet', root, 'train')
    changes = {'none: read, resize and crop the middle': Augmentation()}
    changes |= {name: Augmentation(name, **PIPELINE) for name in LIBRARIES}
    return alternate({name: source(images, a, batch_size, 224) for name, a in changes.items()}, n, repeats)


def on_device(batch_size: int, n: int, repeats: int) -> dict[str, list[float]]:
    """Shift and flip for a set in memory, 32×32 RGB: kornia in batches, the others one by one."""
    images = create_dataset('fake', '.', 'train', img_size=32, in_chans=3, num_images=50_000)
    changes = {name: Augmentation(name, hflip=0.5, shift=4) for name in LIBRARIES}
    return alternate({name: source(images, a, batch_size, 32) for name, a in changes.items()}, n, repeats)


def loaders(root: Path, batch_size: int, workers: int, n: int, repeats: int) -> dict[str, list[float]]:
    """Folder and shards through worker processes, with the recipe's changes at 224×224."""
    change = Augmentation('torchvision', crop_scale=(0.05, 1.0), hflip=0.5, rand_augment=10)
    sets = {
        'folders': create_dataset('imagenet', root, 'train'),
        'shards': create_dataset('wds/imagenet', root / 'shards', 'train', **SHARDS),
    }
    sources = {name: source(images, change, batch_size, 224, workers) for name, images in sets.items()}
    return alternate(sources, n, repeats)


def epochs(root: Path, output_dir: Path, workers: int) -> dict[str, dict[str, Any]]:
    """An epoch of `imagenet_patch16`, shrunk to tiny, from folders and from shards: what the whole run makes."""
    shrunk = {'model': 'linformer_vit_tiny_patch16_224', 'epochs': 1, 'batch_size': 64, 'val_fraction': 0.0}
    shrunk |= {'workers': workers, 'threads': 1, 'precision': 'bf16', 'log_every': 10}
    runs = {
        'folders': {'dataset': 'imagenet', 'data_dir': root},
        'shards': {'dataset': 'wds/imagenet', 'data_dir': root / 'shards', 'dataset_args': SHARDS},
    }
    kept = ('images_per_s', 'images_seen', 'num_samples', 'train_minutes', 'tokens')
    found = {name: trial('imagenet_patch16', name, 0, {**shrunk, **run}, output_dir) for name, run in runs.items()}
    return {name: {k: metrics[k] for k in kept} for name, metrics in found.items()}


def main(
    data_dir: Path = Path('data/imagenet_layout'),
    output_dir: Path = Path('outputs/data_speed'),
    batch_size: int = 64,
    workers: int = 1,
    n: int = 10,
    repeats: int = 3,
) -> None:
    """Measure, one torch thread in every process.

    Args:
        data_dir: What `imagenet_layout.py` wrote.
        output_dir: Receives the two runs; finished ones are not repeated.
        batch_size: Images in a batch.
        workers: Worker processes where there are any.
        n: Batches of each measurement.
        repeats: Measurements of each, in turns.
    """
    torch.set_num_threads(1)
    root = data_dir.resolve()
    result = {
        'libraries': libraries(root, batch_size, n, repeats),
        'on_device': on_device(256, 10 * n, repeats),
        'loaders': loaders(root, batch_size, workers, n, repeats),
        'epochs': epochs(root, output_dir.resolve(), workers),
        'settings': {'batch_size': batch_size, 'workers': workers, 'batches': n, 'repeats': repeats},
        'versions': {m.__name__: m.__version__ for m in (torch, torchvision, albumentations, kornia)},
    }
    (Path(__file__).parent / 'results' / 'augmentation.json').write_text(json.dumps(result, indent=2) + '\n')
    write_table('figures', tables(result), ROOT / 'docs' / 'augmentation.md')


def tables(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    settings = result['settings']
    size, workers = settings['batch_size'], settings['workers']
    versions = ', '.join(f'{name} {version}' for name, version in result['versions'].items())
    runs = [
        f'| {name} | {run["images_per_s"]:.0f} | {median(result["loaders"][name]):.0f} |'
        for name, run in result['epochs'].items()
    ]
    return f"""One torch thread a process; median (least to most) of {settings['repeats']} measurements in turns.
{versions}.

JPEGs of 500×375 to normalised 224×224 batches of {size}, in the process that trains: random resized crop, flip, colour,
erasing.

{rows(result['libraries'])}

A set in memory, 32×32 RGB, batches of 256: shift by 4 and flip.

{rows(result['on_device'])}

The loader alone, {workers} worker(s), RandAugment; 2,000 JPEGs in 1,000 classes.

{rows(result['loaders'])}

One epoch of `imagenet_patch16` from each, shrunk to `linformer_vit_tiny_patch16_224`, batches of 64 in bf16, {workers}
worker(s); the step sets the pace where the loader alone is faster.

| | images/s of the run | images/s of the loader alone |
| --- | --- | --- |
{chr(10).join(runs)}"""


def rows(rates: dict[str, list[float]]) -> str:
    """A table of images a second."""
    lines = ['| | images/s |', '| --- | --- |']
    return '\n'.join(
        lines + [f'| {name} | {median(r):,.0f} ({min(r):,.0f} to {max(r):,.0f}) |' for name, r in rates.items()]
    )


if __name__ == '__main__':
    with guarded():
        tyro.cli(main, description=__doc__)
