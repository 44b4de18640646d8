"""Per-pixel features of the shipped backbone against a U-Net of equal size, with equal minutes after its pretraining.

    python -m scripts.studies.run segmentation

Both by `recipes/segment_pixels.py`, on scenes of 64×64 pixels (4,096 tokens). Optimizer and learning rate of each are
chosen in short runs, on scenes of training items that are kept apart; the scenes of test items are for the scores
alone. One seed. Writes `results/segmentation.json`, the pictures `segmentation_linformer.png` and
`segmentation_unet.png`, and its table in `docs/results.md`.
"""

import contextlib
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from linvision.train.metrics import machine
from scripts.studies.tables import DOCS, publish, table
from scripts.studies.trials import Flags, recipe_module

NETWORKS = {'linformer': 'linformer_vit_pico_patch1_32.fashion_mnist', 'unet': 'U-Net'}
TRIED = {  # optimizers and learning rates
    'linformer': (('muon', 0.01), ('muon', 0.02)),
    'unet': (('muon', 0.01), ('muon', 0.02), ('adamw', 0.01)),
}
FIELDS = ('mean_iou', 'pixel_accuracy', 'iou', 'scenes_seen', 'train_minutes', 'num_parameters')


@dataclass
class Settings(Flags):
    """What the study can be asked.

    Args:
        minutes: Minutes of training of each network.
        search: Length of the runs that choose optimizer and learning rate, as a share of those.
    """

    minutes: float = 20.0
    search: float = 0.15


def segment(settings: dict[str, Any]) -> dict[str, Any]:
    """Metrics of a run of the recipe, which has a loop of its own; a finished one is not repeated."""
    recipe = recipe_module('segment_pixels')
    settings['output_dir'].mkdir(parents=True, exist_ok=True)
    with (settings['output_dir'] / 'log.txt').open('a') as log, contextlib.redirect_stdout(log):
        return recipe.main(recipe.Settings(**settings))


def segment_all(runs: dict[str, dict[str, Any]], workers: int) -> dict[str, dict[str, Any]]:
    """Metrics of each run, by name; so many at a time."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'), max_tasks_per_child=1) as pool:
        return dict(zip(runs, pool.map(segment, runs.values()), strict=True))


def segmentation(settings: Settings) -> None:
    """Per-pixel features of the shipped backbone against a U-Net of equal size, with equal minutes."""
    folder = settings.output_dir.resolve() / 'segmentation'
    common = {'data_dir': settings.data_dir.resolve(), 'threads': 1, 'device': 'cpu', 'precision': settings.precision}

    def own(name: str, network: str, opt: str, lr: float, **length: Any) -> dict[str, Any]:
        return {**common, 'network': network, 'opt': opt, 'lr': lr, 'output_dir': folder / name, **length}

    short = {'minutes': settings.search * settings.minutes, 'validation': True, 'test_scenes': 100}
    choices = {f'{net}_{opt}_{lr:g}': (net, opt, lr) for net in NETWORKS for opt, lr in TRIED[net]}
    runs = segment_all({name: own(name, *choice, **short) for name, choice in choices.items()}, settings.workers)
    scores = {net: {(o, lr): runs[f'{net}_{o}_{lr:g}']['mean_iou'] for o, lr in TRIED[net]} for net in NETWORKS}
    best = {net: max(found, key=found.get) for net, found in scores.items()}
    length = {'minutes': settings.minutes}
    found = segment_all({net: own(net, net, *best[net], **length) for net in NETWORKS}, settings.workers)
    for net in NETWORKS:
        shutil.copy(folder / net / 'scenes.png', DOCS / 'images' / f'segmentation_{net}.png')
    tried = {net: {f'{opt}, {lr:g}': score for (opt, lr), score in of.items()} for net, of in scores.items()}
    kept = {net: {k: run[k] for k in FIELDS} for net, run in found.items()}
    result = {**length, 'search': settings.search, 'precision': settings.precision, 'tried': tried}
    columns = {
        'network': lambda key, _: NETWORKS[key],
        'parameters': lambda key, rows: f'{rows[key]["num_parameters"]:,}',
        'optimizer, learning rate': lambda key, _: f'{best[key][0]}, {best[key][1]:g}',
        'mean IoU': lambda key, rows: f'{100 * rows[key]["mean_iou"]:.1f} %',
        'right pixels': lambda key, rows: f'{100 * rows[key]["pixel_accuracy"]:.1f} %',
        'scenes seen': lambda key, rows: f'{rows[key]["scenes_seen"]:,}',
        'training, min': lambda key, rows: f'{rows[key]["train_minutes"]:.1f}',
    }
    result |= {**machine(torch.device('cpu')), 'runs': kept}
    publish('segmentation', result, table(columns, found))
