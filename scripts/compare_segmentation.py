"""Per-pixel features of the shipped backbone against a U-Net of equal size, with equal minutes after its pretraining.

    python scripts/compare_segmentation.py

Both by `recipes/segment_pixels.py`, on scenes of 64×64 pixels (4,096 tokens). The learning rate of each is chosen in
short runs, on scenes of training items that are kept apart; the scenes of test items are for the scores alone. Writes
`docs/results/segmentation.json`, the pictures `docs/results/segmentation_linformer.png` and `segmentation_unet.png`,
and its table in `docs/results.md`.
"""

import contextlib
import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import tyro

from linvision.train.metrics import machine
from trials import ROOT, recipe_module, write_table

NETWORKS = {'linformer': 'linformer_vit_pico_patch1_32.fashion_mnist', 'unet': 'U-Net'}
RATES = {'linformer': (1e-3, 3e-3), 'unet': (3e-3, 1e-2)}
FIELDS = ('mean_iou', 'pixel_accuracy', 'iou', 'scenes_seen', 'train_minutes', 'num_parameters')


def segment(settings: dict[str, Any]) -> dict[str, Any]:
    """Metrics of a run of the recipe; one that is finished in its folder is not repeated."""
    recipe = recipe_module('segment_pixels')
    settings['output_dir'].mkdir(parents=True, exist_ok=True)
    with (settings['output_dir'] / 'log.txt').open('a') as log, contextlib.redirect_stdout(log):
        return recipe.main(recipe.Settings(**settings))


def segment_all(runs: dict[str, dict[str, Any]], workers: int) -> dict[str, dict[str, Any]]:
    """Metrics of each run, by name; so many at a time."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'), max_tasks_per_child=1) as pool:
        return dict(zip(runs, pool.map(segment, runs.values()), strict=True))


def table(found: dict[str, dict[str, Any]], rates: dict[str, float]) -> str:
    """A line for each network."""
    lines = [
        '| network | parameters | learning rate | mean IoU | right pixels | scenes seen | training, min |',
        '| --- | --- | --- | --- | --- | --- | --- |',
    ]
    for network, run in found.items():
        lines.append(
            f'| {NETWORKS[network]} | {run["num_parameters"]:,} | {rates[network]:g} | {100 * run["mean_iou"]:.1f} % | '
            f'{100 * run["pixel_accuracy"]:.1f} % | {run["scenes_seen"]:,} | {run["train_minutes"]:.1f} |'
        )
    return '\n'.join(lines)


def main(
    minutes: float = 30.0,
    search: float = 0.2,
    workers: int = 2,
    data_dir: Path = Path('data'),
    output_dir: Path = Path('outputs/segmentation'),
) -> None:
    """Run the comparison.

    Args:
        minutes: Minutes of training of each network.
        search: Length of the runs that choose a learning rate, as a share of those.
        workers: Runs at a time, one thread each.
        data_dir: Folder that holds Fashion-MNIST.
        output_dir: Folder for the runs; finished ones are not repeated.
    """
    folder, common = output_dir.resolve(), {'data_dir': data_dir.resolve(), 'threads': 1, 'device': 'cpu'}

    def settings(name: str, network: str, lr: float, **own: Any) -> dict[str, Any]:
        return {**common, 'network': network, 'lr': lr, 'output_dir': folder / name, **own}

    short = {'minutes': search * minutes, 'validation': True, 'test_scenes': 100}
    tried = {
        f'{net}_lr_{lr:g}': settings(f'{net}_lr_{lr:g}', net, lr, **short) for net in NETWORKS for lr in RATES[net]
    }
    runs = segment_all(tried, workers)
    validation = {net: {lr: runs[f'{net}_lr_{lr:g}']['mean_iou'] for lr in RATES[net]} for net in NETWORKS}
    rates = {net: max(scores, key=scores.get) for net, scores in validation.items()}
    found = segment_all({net: settings(net, net, rates[net], minutes=minutes) for net in NETWORKS}, workers)
    results = ROOT / 'docs' / 'results'
    results.mkdir(exist_ok=True)
    for net in NETWORKS:
        shutil.copy(folder / net / 'scenes.png', results / f'segmentation_{net}.png')
    kept = {net: {k: run[k] for k in FIELDS} for net, run in found.items()}
    result = {'minutes': minutes, 'search': search, 'rates': validation, **machine(torch.device('cpu')), 'runs': kept}
    (results / 'segmentation.json').write_text(json.dumps(result, indent=2) + '\n')
    lines = table(found, rates)
    write_table('segmentation', lines)
    print(lines)


if __name__ == '__main__':
    tyro.cli(main, description=__doc__)
