"""Per-pixel features of the shipped backbone against a U-Net of equal size, with equal minutes after its pretraining.

    python scripts/compare_segmentation.py

Both by `recipes/segment_pixels.py`, on scenes of 64×64 pixels (4,096 tokens). Optimizer and learning rate of each are
chosen in short runs, on scenes of training items that are kept apart; the scenes of test items are for the scores
alone. Writes `docs/results/segmentation.json`, the pictures `docs/results/segmentation_linformer.png` and
`segmentation_unet.png`, and its table in `docs/results.md`.
"""

import contextlib
import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from linvision.train.metrics import machine
from trials import ROOT, recipe_module, write_table

NETWORKS = {'linformer': 'linformer_vit_pico_patch1_32.fashion_mnist', 'unet': 'U-Net'}
TRIED = {  # optimizers and learning rates
    'linformer': (('muon', 0.01), ('muon', 0.02)),
    'unet': (('muon', 0.01), ('muon', 0.02), ('adamw', 0.01)),
}
FIELDS = ('mean_iou', 'pixel_accuracy', 'iou', 'scenes_seen', 'train_minutes', 'num_parameters')


def in_words(opt: str, lr: float) -> str:
    """An optimizer and its learning rate."""
    return f'{opt}, {lr:g}'


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


def table(found: dict[str, dict[str, Any]], chosen: dict[str, str]) -> str:
    """A line for each network."""
    lines = [
        '| network | parameters | optimizer, learning rate | mean IoU | right pixels | scenes seen | training, min |',
        '| --- | --- | --- | --- | --- | --- | --- |',
    ]
    for network, run in found.items():
        lines.append(
            f'| {NETWORKS[network]} | {run["num_parameters"]:,} | {chosen[network]} | {100 * run["mean_iou"]:.1f} % | '
            f'{100 * run["pixel_accuracy"]:.1f} % | {run["scenes_seen"]:,} | {run["train_minutes"]:.1f} |'
        )
    return '\n'.join(lines)


def main(
    minutes: float = 20.0,
    search: float = 0.15,
    workers: int = 2,
    precision: Literal['fp32', 'bf16'] = 'fp32',
    data_dir: Path = Path('data'),
    output_dir: Path = Path('outputs/segmentation'),
) -> None:
    """Run the comparison.

    Args:
        minutes: Minutes of training of each network.
        search: Length of the runs that choose optimizer and learning rate, as a share of those.
        workers: Runs at a time, one thread each.
        precision: Of every run.
        data_dir: Folder that holds Fashion-MNIST.
        output_dir: Folder for the runs; finished ones are not repeated.
    """
    folder, common = output_dir.resolve(), {'data_dir': data_dir.resolve(), 'threads': 1, 'device': 'cpu'}
    common['precision'] = precision

    def settings(name: str, network: str, opt: str, lr: float, **own: Any) -> dict[str, Any]:
        return {**common, 'network': network, 'opt': opt, 'lr': lr, 'output_dir': folder / name, **own}

    short = {'minutes': search * minutes, 'validation': True, 'test_scenes': 100}
    choices = {f'{net}_{opt}_{lr:g}': (net, opt, lr) for net in NETWORKS for opt, lr in TRIED[net]}
    runs = segment_all({name: settings(name, *choice, **short) for name, choice in choices.items()}, workers)
    validation: dict[str, dict[str, float]] = {net: {} for net in NETWORKS}
    for name, (net, opt, lr) in choices.items():
        validation[net][in_words(opt, lr)] = runs[name]['mean_iou']
    best = {net: max(TRIED[net], key=lambda tried: validation[net][in_words(*tried)]) for net in NETWORKS}
    found = segment_all({net: settings(net, net, *best[net], minutes=minutes) for net in NETWORKS}, workers)
    results = ROOT / 'docs' / 'results'
    results.mkdir(exist_ok=True)
    for net in NETWORKS:
        shutil.copy(folder / net / 'scenes.png', results / f'segmentation_{net}.png')
    kept = {net: {k: run[k] for k in FIELDS} for net, run in found.items()}
    device = machine(torch.device('cpu'))
    result = {'minutes': minutes, 'search': search, 'precision': precision, 'tried': validation, **device, 'runs': kept}
    (results / 'segmentation.json').write_text(json.dumps(result, indent=2) + '\n')
    lines = table(found, {net: in_words(*best[net]) for net in NETWORKS})
    write_table('segmentation', lines)
    print(lines)


if __name__ == '__main__':
    tyro.cli(main, description=__doc__)
