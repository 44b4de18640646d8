"""Why the pixel models and their recipe are as they are: each choice against its alternatives, at equal training time.

    python scripts/compare_choices.py

Trains `recipes/fashion_mnist_pixels.py` with one thing changed at a time, for the same minutes on one thread each, and
scores 3,000 images kept from the training set (5 %, drawn by the seed); the test set is not touched. Writes
`docs/choices.json` and `docs/choices.md`.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import torch
import tyro

from linvision.models.projection import Projection
from linvision.models.resize import area_matrix
from trials import ROOT, mean_and_spread, run_trials

FIELDS = ('val_top1', 'val_num_samples', 'images_seen', 'num_parameters', 'train_minutes')  # that are kept of a run
MODEL = {
    'separable E, conv positions, local path, Muon': {},
    'linear E': {'projection': 'linear'},
    'full attention': {'projection': 'none'},
    'E starts as block means': {},
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
    fields = {k: change[k] for k in ('opt', 'lr') if k in change}
    return {**fields, 'model_args': {'row_norm': False, **{k: v for k, v in change.items() if k not in fields}}}


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
    for table, variants in tables.items():
        before = {'E starts as block means': block_means}
        runs = run_trials('fashion_mnist_pixels', variants, range(seeds), workers, output_dir, before)
        result[table] = {name: [{k: run[k] for k in FIELDS} for run in found] for name, found in runs.items()}
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
        scores = mean_and_spread([100 * run['val_top1'] for run in trials])
        seen = statistics.mean(run['images_seen'] for run in trials)
        lines.append(f'| {name} | {scores} % | {seen:,.0f} | {trials[0]["num_parameters"]:,} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    tyro.cli(main, description=__doc__)
