"""Why the pixel models and their recipe are as they are: each choice against its alternatives, at equal training time.

    python scripts/compare_choices.py

Trains `recipes/fashion_mnist_pixels.py` with one thing changed at a time, for the same minutes on one thread each, and
scores 3,000 images kept from the training set (5 %, drawn by the seed); the test set is not touched. Writes
`docs/choices.json` and `docs/choices.md`.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import runpy
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import tyro

from linvision.projection import Projection
from linvision.resize import area_matrix
from linvision.train import Recipe, train

ROOT = Path(__file__).resolve().parent.parent
MODEL = {
    'separable E, conv positions, local path, Muon': {},
    'linear E': {'projection': 'linear'},
    'full attention': {'projection': 'none'},
    'E starts as block means': {'change': 'block_means'},
    'layer norm after E (as registered)': {'row_norm': True},
    'queries and keys normalised': {'qk_norm': True},
    'separable positions': {'pos_embed': 'separable'},
    'no local path': {'local_size': 0},
    'AdamW, lr 3e-3': {'opt': 'adamw', 'lr': 3e-3},
}
STAGES = {
    f'{share:.0%} of the time at 16×16': {'stages': ((16, share), (32, 1 - share))} for share in (0.75, 0.5, 0.25)
}


def block_means() -> None:
    """Let every factor of E start as the means of equal blocks, plus the noise that sets the rows apart."""

    @torch.no_grad()
    def init_weights(self: Projection) -> None:
        for weight in self.weights:
            K, n = weight.shape
            weight.copy_(area_matrix(n, K, weight) * K / n + 0.01 * torch.randn_like(weight))

    Projection.init_weights = init_weights


def settings_of(change: dict[str, Any]) -> dict[str, Any]:
    """Fields of the recipe for a change of the first table; its first line has no norm after E."""
    fields = {k: change[k] for k in ('change', 'opt', 'lr') if k in change}
    return {**fields, 'model_args': {'row_norm': False, **{k: v for k, v in change.items() if k not in fields}}}


def trial(name: str, seed: int, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train one variant with one seed, in a process of its own; its figures."""
    settings = dict(settings)
    change = settings.pop('change', '')
    if change:
        globals()[change]()
    base: Recipe = runpy.run_path(str(ROOT / 'recipes' / 'fashion_mnist_pixels.py'))['RECIPE']
    output_dir = folder / f'{name.replace(" ", "_")}_{seed}'
    recipe = dataclasses.replace(base, output_dir=output_dir, seed=seed, **settings)
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / 'log.txt').open('a') as log, contextlib.redirect_stdout(log):
        metrics = train(recipe)
    print(f'{name}, seed {seed}: {100 * metrics["val_top1"]:.2f} %, {metrics["images_seen"]:,} images', flush=True)
    return {k: metrics[k] for k in ('val_top1', 'val_num_samples', 'images_seen', 'num_parameters', 'train_minutes')}


def main(
    minutes: float = 2.0,
    stage_minutes: float = 5.0,
    seeds: int = 3,
    workers: int = 2,
    data_dir: Path = Path('data'),
    output_dir: Path = Path('outputs/choices'),
) -> None:
    """Run the comparison.

    Args:
        minutes: Minutes of training of each run that compares models, on 16×16 images.
        stage_minutes: Minutes of training of each run that compares stages, on 16×16 and then 32×32 images.
        seeds: Runs of each variant.
        workers: Runs at a time, one thread each; the order is by seed, so that all variants meet the same conditions.
        data_dir: Folder that holds the data.
        output_dir: Folder for the runs; finished ones are not repeated.
    """
    common = {
        'data_dir': data_dir.resolve(),
        'val_fraction': 0.05,
        'test': False,
        'threads': 1,
        'precision': 'bf16',
    }
    tables = {
        'model': {
            k: {**common, 'max_minutes': minutes, 'stages': ((16, 1.0),), **settings_of(v)} for k, v in MODEL.items()
        },
        'stages': {k: {**common, 'max_minutes': stage_minutes, **v} for k, v in STAGES.items()},
    }
    result = {'minutes': minutes, 'stage_minutes': stage_minutes, 'seeds': seeds, 'torch': torch.__version__}
    context = multiprocessing.get_context('spawn')
    for table, variants in tables.items():
        jobs = [(name, seed) for seed in range(seeds) for name in variants]
        with ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool:
            runs = [pool.submit(trial, name, seed, variants[name], output_dir.resolve()) for name, seed in jobs]
        result[table] = {
            name: [run.result() for job, run in zip(jobs, runs, strict=True) if job[0] == name] for name in variants
        }
    (ROOT / 'docs' / 'choices.json').write_text(json.dumps(result, indent=2) + '\n')
    (ROOT / 'docs' / 'choices.md').write_text(page(result))


def page(result: dict[str, Any]) -> str:
    """The comparison as a page."""
    minutes, stage_minutes, seeds = result['minutes'], result['stage_minutes'], result['seeds']
    command = (
        f'python scripts/compare_choices.py --minutes {minutes:g} --stage-minutes {stage_minutes:g} --seeds {seeds}'
    )
    return f"""# Why the pixel models and their recipe are as they are

Fashion-MNIST, `linformer_vit_pico_patch1_32` (K = 64), equal training time on one CPU thread in bf16, torch
{result['torch']}, on two cores. Top-1 on 3,000 validation images kept from the training set, mean ± standard
deviation over {seeds} seeds; the test set was not touched. Written by

    {command}

## The model: 16×16 images (256 tokens), {minutes:g} minutes

{rows(result['model'], 'one change')}

## Coarse to fine: {stage_minutes:g} minutes, scored at 32×32 (1,024 tokens)

{rows(result['stages'], 'stages')}
"""


def rows(runs: dict[str, list[dict[str, Any]]], title: str) -> str:
    """One table of variants."""
    lines = [f'| {title} | validation top-1 | images seen | parameters |', '| --- | --- | --- | --- |']
    for name, trials in runs.items():
        scores = [100 * run['val_top1'] for run in trials]
        spread = f' ± {statistics.stdev(scores):.1f}' if len(scores) > 1 else ''
        seen = statistics.mean(run['images_seen'] for run in trials)
        lines.append(
            f'| {name} | {statistics.mean(scores):.1f}{spread} % | {seen:,.0f} | {trials[0]["num_parameters"]:,} |'
        )
    return '\n'.join(lines)


if __name__ == '__main__':
    tyro.cli(main, description=__doc__)
