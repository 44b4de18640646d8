"""What makes a pixel transformer leave chance on Pathfinder? Its recipe, with one thing changed, and with all.

    python scripts/compare_norms.py

`recipes/pathfinder_1k_pico.py` on its images at half their size, 256 tokens, for equal numbers of images; the score is
that of the validation slice. Writes its table in `docs/pathfinder.md`; what runs gave is kept in
`docs/results/norms_runs.json`, and they are not repeated.
"""

from pathlib import Path
from typing import Any

import tyro

from trials import ROOT, Record, mean_and_spread, recipe_module, run_trials, write_table

RECIPE = 'pathfinder_1k_pico'
CHANGES: dict[str, dict[str, Any]] = {
    'as in the recipe': {},
    'layer norm in the blocks': {'token_norm': False},
    'no norm before the classifier': {'head_norm': False},
    "neither, and timm's initial weights": {'token_norm': False, 'head_norm': False, 'weight_init': ''},
}
FIELDS = ('val_top1', 'val_loss', 'images_seen', 'train_minutes', 'seed')


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """A line for each change."""
    lines = ['| | top-1 | training, min | seeds |', '| --- | --- | --- | --- |']
    for name, runs in found.items():
        score = mean_and_spread([100 * run['val_top1'] for run in runs])
        minutes = min(run['train_minutes'] for run in runs)
        lines.append(f'| {name} | {score} % | {minutes:.1f} | {len(runs)} |')
    return '\n'.join(lines)


def main(
    epochs: float = 0.6,
    seeds: int = 1,
    workers: int = 1,
    again: bool = False,
    data_dir: Path = Path('data'),
    output_dir: Path = Path('outputs/norms'),
) -> None:
    """Run the comparison.

    Args:
        epochs: Of each run.
        seeds: Runs of each.
        workers: Runs at a time, one thread each.
        again: Make every run anew, whatever figures are kept.
        data_dir: Folder that keeps the images once they are made.
        output_dir: Folder for the runs; finished ones are not repeated.
    """
    own = recipe_module(RECIPE).RECIPE.model_args
    common = {'epochs': epochs, 'max_minutes': 0.0, 'stages': ((16, 1.0),), 'eval_every': 0.0, 'test': False}
    variants = {
        name: {**common, 'data_dir': data_dir.resolve(), 'model_args': own | change} for name, change in CHANGES.items()
    }
    record = Record(ROOT / 'docs' / 'results' / 'norms_runs.json', FIELDS, again)
    found = run_trials(RECIPE, variants, range(seeds), workers, output_dir, record=record)
    write_table('norms', table(found), ROOT / 'docs' / 'pathfinder.md')
    print(table(found))


if __name__ == '__main__':
    tyro.cli(main, description=__doc__)
