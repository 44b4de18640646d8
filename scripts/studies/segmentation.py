"""A U-Net with a Linformer ViT at its lowest level against U-Nets of convolutions alone, of equal size, at equal time.

    python -m scripts.studies.run segmentation

All by `recipes/segment_pixels.py`: scenes of Fashion-MNIST and of CIFAR-10 on 64×64 pixels, where what stands next to a
pixel decides on its class, and scenes on 128×128 pixels where two things in opposite corners do. The learning rate of
each is chosen in short runs, on scenes of training images that are kept apart; scenes of test images are for the scores
alone. A run that is finished in its folder is not repeated. Writes `results/segmentation.json`, pictures of the first
seed's scenes, and its table in `docs/results.md`.
"""

import contextlib
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from linvision.train.metrics import machine
from scripts.studies.tables import DOCS, Rows, per_cent, points_above, publish, table
from scripts.studies.trials import Flags, recipe_module

NETWORKS = {'linformer': 'U-Net with a Linformer ViT', 'unet': 'U-Net', 'deep_unet': 'U-Net, two levels deeper'}
KINDS = {'clothes': 1, 'objects': 1, 'corners': 2}  # how many times as long runs are
RATES = (0.01, 0.02)
FIELDS = ('mean_iou', 'pixel_accuracy', 'iou', 'scenes_seen', 'train_minutes', 'num_parameters')


@dataclass
class Settings(Flags):
    """What the study can be asked.

    Args:
        minutes: Minutes of training of each network; on corners twice as many.
        search: Length of the runs that choose a learning rate, as a share of those.
        seeds: Runs of each network on each kind of scenes.
    """

    minutes: float = 5.0
    search: float = 0.4
    seeds: int = 3


def segment(settings: dict[str, Any]) -> dict[str, Any]:
    """Metrics of a run of the recipe, which has a loop of its own; a finished one is not repeated."""
    recipe = recipe_module('segment_pixels')
    settings['output_dir'].mkdir(parents=True, exist_ok=True)
    with (settings['output_dir'] / 'log.txt').open('a') as log, contextlib.redirect_stdout(log):
        metrics = recipe.main(recipe.Settings(**settings))
    print(f'{settings["output_dir"].name}: mean IoU {100 * metrics["mean_iou"]:.1f} %', flush=True)
    return metrics


def segment_all(runs: dict[Any, dict[str, Any]], workers: int) -> dict[Any, dict[str, Any]]:
    """Metrics of each run, by its key; so many at a time."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'), max_tasks_per_child=1) as pool:
        return dict(zip(runs, pool.map(segment, runs.values()), strict=True))


def segmentation(settings: Settings) -> None:
    """A U-Net with a Linformer ViT at its lowest level against U-Nets of convolutions alone, with equal minutes."""
    folder = settings.output_dir.resolve() / 'segmentation'
    common = {'data_dir': settings.data_dir.resolve(), 'threads': 1, 'device': 'cpu', 'precision': settings.precision}
    pairs = [(kind, net) for kind in KINDS for net in NETWORKS]

    def own(kind: str, net: str, lr: float, name: Any, share: float = 1.0, **more: Any) -> dict[str, Any]:
        where, minutes = folder / f'{kind}_{net}_{name}', share * KINDS[kind] * settings.minutes
        return {**common, 'scenes': kind, 'network': net, 'lr': lr, 'minutes': minutes, 'output_dir': where, **more}

    short = {'share': settings.search, 'validation': True, 'test_scenes': 100}
    search = {(*pair, lr): own(*pair, lr, f'lr_{lr:g}', **short) for pair in pairs for lr in RATES}
    tried = {key: run['mean_iou'] for key, run in segment_all(search, settings.workers).items()}
    rates = {pair: max((tried[(*pair, lr)], lr) for lr in RATES)[1] for pair in pairs}
    runs = {(*pair, seed): own(*pair, rates[pair], seed, seed=seed) for seed in range(settings.seeds) for pair in pairs}
    found = segment_all(runs, settings.workers)
    rows: Rows = {pair: [found[(*pair, seed)] for seed in range(settings.seeds)] for pair in pairs}
    for kind in ('clothes', 'corners'):
        name = f'{kind}_linformer'
        shutil.copy(folder / f'{name}_0' / 'scenes.png', DOCS / 'images' / f'segmentation_{name}.png')
    columns = {
        'scenes': lambda key, _: key[0],
        'network': lambda key, _: NETWORKS[key[1]],
        'parameters': None,
        'learning rate': lambda key, _: f'{rates[key]:g}',
        'mean IoU': per_cent('mean_iou'),
        'points above the U-Net': points_above('unet', 'mean_iou'),
        'right pixels': per_cent('pixel_accuracy'),
        'scenes seen': lambda key, rows: f'{sum(run["scenes_seen"] for run in rows[key]) / len(rows[key]):,.0f}',
        'seeds': None,
    }
    result = {'minutes': settings.minutes, 'search': settings.search, 'precision': settings.precision}
    result['tried'] = {f'{kind}, {net}, {lr:g}': score for (kind, net, lr), score in tried.items()}
    kept = {f'{kind}, {net}': [{k: run[k] for k in FIELDS} for run in rows[kind, net]] for kind, net in pairs}
    publish('segmentation', {**result, **machine(torch.device('cpu')), 'runs': kept}, table(columns, rows))
