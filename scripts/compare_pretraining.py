"""Does self-pretraining by masked pixels pay for its time? Against training from scratch, with as many steps in all.

    python scripts/compare_pretraining.py

At 256 tokens, by the recipes `fashion_mnist_pixels` and `masked_pixels`. One model sees classes from the first step to
the last. The other spends a share of the steps on masked pixels, without labels, and the rest on classes; its
backbone, with its projection, is what goes over (arXiv 2310.02980). A step of either kind is one batch of the same
model; the table shows the minutes of both. The learning rate of the classes is chosen on the validation slice, for
each; that of the pixels is the recipe's. Writes
`docs/results/pretraining.json`, and its table in `docs/results.md`.
"""

import json
import statistics
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from linvision.train.metrics import machine
from trials import ROOT, mean_and_spread, run_folder, run_trials, write_table

RATES = (0.01, 0.02)
FIELDS = ('top1', 'val_top1', 'num_samples', 'images_seen', 'train_minutes', 'seed')


class Comparison:
    """Runs that share their settings.

    Args:
        epochs: Epochs of each model, in all.
        share: Of them, on masked pixels.
        workers: Runs at a time, one thread each.
        precision: Of every run.
        data_dir: Folder that holds the data.
        output_dir: Folder for the runs; finished ones are not repeated.
    """

    def __init__(
        self, epochs: float, share: float, workers: int, precision: str, data_dir: Path, output_dir: Path
    ) -> None:
        self.epochs, self.share, self.workers, self.folder = epochs, share, workers, output_dir.resolve()
        common = {'data_dir': data_dir.resolve(), 'threads': 1, 'precision': precision, 'stages': ((16, 1.0),)}
        self.common = common | {'val_fraction': 0.05}

    def pretrain(self, seeds: int) -> list[dict[str, Any]]:
        """A backbone for each seed."""
        own = {'task': 'masked_pixels', 'epochs': self.share * self.epochs, 'test': False}
        settings, folder = {'masked pixels': self.common | own}, self.folder / 'pretraining'
        return run_trials('fashion_mnist_pixels', settings, range(seeds), self.workers, folder)['masked pixels']

    def classify(self, seed: int, rates: dict[str, tuple[float, ...]], test: bool) -> dict[str, dict[str, Any]]:
        """Runs of one seed by variant and learning rate, side by side."""
        own = {
            'from scratch': {'epochs': self.epochs},
            'masked pixels first': {
                'epochs': (1 - self.share) * self.epochs,
                'init': str(run_folder(self.folder / 'pretraining', 'masked pixels', seed)),
            },
        }
        settings = {
            f'{name}, lr {lr:g}': self.common | own[name] | {'lr': lr, 'test': test}
            for name in own
            for lr in rates[name]
        }
        folder = self.folder / ('scores' if test else 'rates')
        runs = run_trials('fashion_mnist_pixels', settings, [seed], self.workers, folder)
        return {name: run for name, (run,) in runs.items()}


def table(found: dict[str, list[dict[str, Any]]], rates: dict[str, float]) -> str:
    """A line for each variant, and their difference, seed by seed."""
    lines = [
        '| | learning rate | top-1 | images seen | training, min | seeds |',
        '| --- | --- | --- | --- | --- | --- |',
    ]
    for name, runs in found.items():
        scores = mean_and_spread([100 * run['top1'] for run in runs])
        seen, minutes = runs[0]['images_seen'], min(run['train_minutes'] for run in runs)
        lines.append(f'| {name} | {rates[name]:g} | {scores} % | {seen:,} | {minutes:.1f} | {len(runs)} |')
    scratch, pretrained = found['from scratch'], found['masked pixels first']
    above = [100 * (b['top1'] - a['top1']) for a, b in zip(scratch, pretrained, strict=True)]
    error = f', standard error {statistics.stdev(above) / len(above) ** 0.5:.1f}' if len(above) > 1 else ''
    return '\n'.join([*lines, '', f'Masked pixels first: {statistics.mean(above):+.1f} points{error}.'])


def main(
    epochs: float = 0.5,
    share: float = 0.5,
    seeds: int = 3,
    workers: int = 2,
    precision: Literal['fp32', 'bf16'] = 'fp32',
    data_dir: Path = Path('data'),
    output_dir: Path = Path('outputs/pretraining'),
) -> None:
    """Run the comparison.

    Args:
        epochs: Epochs of each model, in all.
        share: Of them, on masked pixels.
        seeds: Runs of each.
        workers: Runs at a time, one thread each.
        precision: Of every run.
        data_dir: Folder that holds the data.
        output_dir: Folder for the runs; finished ones are not repeated.
    """
    comparison = Comparison(epochs, share, workers, precision, data_dir, output_dir)
    pretraining = comparison.pretrain(seeds)
    names = ('from scratch', 'masked pixels first')
    tried = comparison.classify(0, dict.fromkeys(names, RATES), test=False)
    validation = {name: {lr: tried[f'{name}, lr {lr:g}']['val_top1'] for lr in RATES} for name in names}
    rates = {name: max(scores, key=scores.get) for name, scores in validation.items()}
    scores = [comparison.classify(seed, {name: (rates[name],) for name in names}, test=True) for seed in range(seeds)]
    found = {name: [{k: run[f'{name}, lr {rates[name]:g}'][k] for k in FIELDS} for run in scores] for name in names}
    for run, before in zip(found['masked pixels first'], pretraining, strict=True):
        run.update({k: run[k] + before[k] for k in ('train_minutes', 'images_seen')}, val_loss=before['val_loss'])
    settings = {'epochs': epochs, 'share': share, 'precision': precision, 'rates': validation}
    result = {**settings, **machine(torch.device('cpu')), 'runs': found}
    (ROOT / 'docs' / 'results').mkdir(exist_ok=True)
    (ROOT / 'docs' / 'results' / 'pretraining.json').write_text(json.dumps(result, indent=2) + '\n')
    write_table('pretraining', table(found, rates))
    print(table(found, rates))


if __name__ == '__main__':
    tyro.cli(main, description=__doc__)
