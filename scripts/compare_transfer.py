"""Is the shipped backbone worth starting from? Against the same model from scratch, on handwritten digits.

    python scripts/digits_folder.py --output-dir data/digits
    python scripts/compare_transfer.py --data-dir data/digits

`recipes/finetune.py` on another real set, for few and for many epochs, with as many seeds as asked for. The learning
rate is chosen for each number of epochs and each start on a fifth of the training images, kept apart: the one whose
neighbours, three times as large and as small, are no better. The test images are for the scores alone. Writes
`docs/results/transfer.json`, and its table in `docs/results.md`, after each number of epochs; what runs gave is kept in
`docs/results/transfer_runs.json`, and they are not repeated.
"""

import json
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from linvision.train.metrics import machine
from trials import ROOT, Record, mean_and_spread, run_trials, write_table

STARTS: dict[str, dict[str, Any]] = {
    'from scratch': {'model': 'linformer_vit_pico_patch1_32', 'init': '', 'layer_decay': 1.0},
    'linear probe': {'freeze': -1, 'layer_decay': 1.0},
    'fine-tuned': {},
}
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # the search begins in the middle
FIELDS = ('top1', 'val_top1', 'num_samples', 'images_seen', 'train_minutes', 'seed')


def settings(start: str, epochs: float, lr: float, common: dict[str, Any]) -> dict[str, Any]:
    """Fields of a run."""
    return {**common, **STARTS[start], 'epochs': epochs, 'lr': lr, 'hflip': 0.0, 'shift': 1}


def name_of(start: str, epochs: float, lr: float) -> str:
    """What a run is called."""
    return f'{start}, {epochs} epochs, lr {lr:g}'


def choose_rates(
    around: dict[str, float], validate: Callable[[Iterable[tuple[str, float]]], dict[tuple[str, float], float]]
) -> tuple[dict[str, float], dict[str, dict[float, float]]]:
    """The rate of each start whose neighbours in `RATES` are no better, and the scores that say so.

    Args:
        around: Where to begin.
        validate: Scores of pairs of a start and a rate.
    """
    scores: dict[str, dict[float, float]] = {start: {} for start in around}
    best = dict(around)
    while True:
        near = {start: RATES[max(RATES.index(lr) - 1, 0) : RATES.index(lr) + 2] for start, lr in best.items()}
        asked = [(start, lr) for start, rates in near.items() for lr in rates if lr not in scores[start]]
        if not asked:
            return best, {start: dict(sorted(found.items())) for start, found in scores.items()}
        for (start, lr), score in validate(asked).items():
            scores[start][lr] = score
        best = {start: max(found, key=found.get) for start, found in scores.items()}


def table(found: dict[str, dict[str, list[dict[str, Any]]]], rates: dict[str, dict[str, float]]) -> str:
    """A line for each number of epochs and start, with its distance from scratch and the standard error of that."""
    lines = [
        '| epochs | | learning rate | top-1 | points above scratch | training, min | seeds |',
        '| --- | --- | --- | --- | --- | --- | --- |',
    ]
    for epochs, starts in found.items():
        scratch = starts['from scratch']
        for start, runs in starts.items():
            above = [100 * (run['top1'] - other['top1']) for run, other in zip(runs, scratch, strict=True)]
            error = f' (s.e. {statistics.stdev(above) / len(above) ** 0.5:.1f})' if len(above) > 1 else ''
            distance = f'{statistics.mean(above):+.1f}{error}' if start != 'from scratch' else ''
            score = mean_and_spread([100 * run['top1'] for run in runs])
            rate, minutes = rates[epochs][start], min(run['train_minutes'] for run in runs)
            lines.append(f'| {epochs} | {start} | {rate:g} | {score} % | {distance} | {minutes:.1f} | {len(runs)} |')
    return '\n'.join(lines)


def main(
    epochs: tuple[int, ...] = (1, 5, 20),
    seeds: int = 5,
    img_size: int = 16,
    workers: int = 2,
    precision: Literal['fp32', 'bf16'] = 'fp32',
    again: bool = False,
    data_dir: Path = Path('data/digits'),
    output_dir: Path = Path('outputs/transfer'),
) -> None:
    """Run the comparison.

    Args:
        epochs: Numbers of epochs.
        seeds: Runs of each.
        img_size: Image size of all runs; the backbone was trained at 16 and 32.
        workers: Runs at a time, one thread each.
        precision: Of every run.
        again: Make every run anew, whatever figures are kept.
        data_dir: Folder of images.
        output_dir: Folder for the runs; finished ones are not repeated.
    """
    common = {'data_dir': data_dir.resolve(), 'img_size': img_size, 'threads': 1, 'precision': precision}
    held_out = {**common, 'val_fraction': 0.2, 'test': False}
    record = Record(ROOT / 'docs' / 'results' / 'transfer_runs.json', FIELDS, again)

    def validate(n: int, asked: Iterable[tuple[str, float]]) -> dict[tuple[str, float], float]:
        names = {(start, lr): name_of(start, n, lr) for start, lr in asked}
        tried = {name: settings(start, n, lr, held_out) for (start, lr), name in names.items()}
        runs = run_trials('finetune', tried, range(1), workers, output_dir / 'rates', record=record)
        return {pair: runs[name][0]['val_top1'] for pair, name in names.items()}

    validation: dict[str, dict[str, dict[float, float]]] = {}
    rates: dict[str, dict[str, float]] = {}
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    best = dict.fromkeys(STARTS, RATES[len(RATES) // 2])
    (ROOT / 'docs' / 'results').mkdir(exist_ok=True)
    for n in epochs:
        best, validation[str(n)] = choose_rates(best, partial(validate, n))
        rates[str(n)] = best
        names = {start: name_of(start, n, lr) for start, lr in best.items()}
        variants = {names[start]: settings(start, n, lr, common) for start, lr in best.items()}
        scored = run_trials('finetune', variants, range(seeds), workers, output_dir / 'scores', record=record)
        found[str(n)] = {
            start: [{k: run[k] for k in FIELDS if k in run} for run in scored[name]] for start, name in names.items()
        }
        result = {'img_size': img_size, 'precision': precision, 'rates': validation, **machine(torch.device('cpu'))}
        (ROOT / 'docs' / 'results' / 'transfer.json').write_text(json.dumps(result | {'runs': found}, indent=2) + '\n')
        write_table('transfer', table(found, rates))
    print(table(found, rates))


if __name__ == '__main__':
    tyro.cli(main, description=__doc__)
