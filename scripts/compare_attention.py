"""The paper's two claims, on pixels: K projected rows are enough, and one projection for all layers is enough.

    python scripts/compare_attention.py parity
    python scripts/compare_attention.py sharing

Trains `recipes/fashion_mnist_pixels.py` with one thing changed (and, where the image grows in training, convolutions
that keep the span of the first stage). Parity: full attention (K = N) against K of 16, 64 and
256, on 16×16 images (256 tokens), and in the recipe's stages, three quarters of the steps at 16×16 and the rest at
32×32 (1,024 tokens). The learning rate of each is chosen at 256 tokens on 5 % of the training images. Sharing: a
projection for each head, for keys and for values, for each layer, or one for all, at 256 tokens with K = 64 and the
learning rate that parity chose for it. The test set is for the scores alone. Writes `docs/results/parity.json` or
`sharing.json`, its picture, and its table in `docs/results.md`. What runs gave is kept in
`docs/results/attention_runs.json`, and validation scores of learning rates in `rates.json` beside it: what stands
there is not trained again, unless with `--again`, and a table can be added to on another day.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from linvision.train.metrics import machine
from trials import MACHINE, ROOT, Record, mean_and_spread, run_trials, write_table

RATES = (0.01, 0.02, 0.04)  # and on either side, while the outermost is chosen
VALIDATION = 3000  # images: 5 % of the training set
STAGES = {256: ((16, 1.0),), 1024: ((16, 0.75), (32, 0.25))}  # by tokens at the end
LENGTHS = {256: (64, 16), 1024: (256, 64, 16)}  # K by tokens at the end
SHARINGS = ('key_value', 'headwise', 'none')  # layerwise is parity's own
FULL = 'K = N, full attention'
FIELDS = (
    'top1',
    'val_top1',
    'num_samples',
    'images_seen',
    'train_minutes',
    'num_parameters',
    'tokens',
    'val_curve',
    'seed',
)


def variants_of(tokens: int) -> dict[str, dict[str, Any]]:
    """Arguments of the model by name: full attention, and each K."""
    return {FULL: {'projection': 'none'}, **{f'K = {K}': {'proj_len': K} for K in LENGTHS[tokens]}}


class Comparison:
    """Runs that share their settings.

    Args:
        data_dir: Folder that holds the data.
        output_dir: Folder for the runs; finished ones are not repeated.
        workers: Runs at a time, one thread each.
        precision: Of every run.
        record: Runs that need not be made again.
    """

    def __init__(
        self, data_dir: Path, output_dir: Path, workers: int, precision: str, record: Record | None = None
    ) -> None:
        self.record = record
        self.output_dir, self.workers = output_dir, workers
        self.common = {'data_dir': data_dir.resolve(), 'threads': 1, 'precision': precision, 'val_fraction': 0.05}

    def run(self, name: str, variants: dict[str, dict[str, Any]], seeds: int) -> dict[str, list[dict[str, Any]]]:
        """Metrics of each variant's seeds; variants are fields of the recipe."""
        fields = {variant: {**self.common, **changed} for variant, changed in variants.items()}
        where = (self.workers, self.output_dir / name)
        runs = run_trials('fashion_mnist_pixels', fields, range(seeds), *where, record=self.record)
        return {
            variant: [{k: run[k] for k in (*FIELDS, *MACHINE) if k in run} for run in found]
            for variant, found in runs.items()
        }

    def choose_rates(self, epochs: float, known: dict[str, dict[float, float]]) -> dict[str, dict[str, Any]]:
        """The best learning rate of each variant at 256 tokens on the validation slice, and what chose it.

        Args:
            epochs: Length of a run.
            known: Validation scores by variant and learning rate, which need no run.
        """
        found = {name: dict(known.get(name, {})) for name in variants_of(256)}
        asked = {name: [lr for lr in RATES if lr not in scores] for name, scores in found.items()}
        while True:
            tried = {
                f'{name}, lr {lr:g}': settings(256, variants_of(256)[name], lr, epochs) | {'test': False}
                for name, rates in asked.items()
                for lr in rates
            }
            runs = self.run('rates', tried, 1) if tried else {}
            for name, rates in asked.items():
                found[name].update({lr: runs[f'{name}, lr {lr:g}'][0]['val_top1'] for lr in rates})
            best = {name: smallest_of_the_best(scores) for name, scores in found.items()}
            asked = {
                name: [2 * lr] * (lr == max(found[name])) + [lr / 2] * (lr == min(found[name]))
                for name, lr in best.items()
            }
            if not any(asked.values()):
                break
        return {name: {'lr': best[name], 'val_top1': scores} for name, scores in found.items()}


class Known:
    """Validation scores by variant and learning rate, in a file that is kept.

    Args:
        path: The file.
        run: What a score depends on besides.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path, self.run = path, run

    def read(self) -> dict[str, dict[float, float]]:
        """The scores; none where none of these runs are kept."""
        kept = next((kept for kept in self.all() if self.mine(kept)), {'val_top1': {}})
        return {name: {float(lr): score for lr, score in scores.items()} for name, scores in kept['val_top1'].items()}

    def all(self) -> list[dict[str, Any]]:
        """What is kept, of other runs too."""
        return json.loads(self.path.read_text()) if self.path.is_file() else []

    def mine(self, kept: dict[str, Any]) -> bool:
        """Whether an entry is of these runs."""
        return all(kept[name] == value for name, value in self.run.items())

    def write(self, rates: dict[str, dict[str, Any]]) -> None:
        """Keep the scores that chose `rates`."""
        scores = {name: dict(sorted(found['val_top1'].items())) for name, found in rates.items()}
        if scores != self.read():
            kept = {**self.run, **machine(torch.device('cpu')), 'val_top1': scores}
            others = [other for other in self.all() if not self.mine(other)]
            self.path.write_text(json.dumps([*others, kept], indent=2) + '\n')


def smallest_of_the_best(scores: dict[float, float]) -> float:
    """The smallest learning rate whose score lies within a standard error of the best."""
    best = max(scores.values())
    error = math.sqrt(best * (1 - best) / VALIDATION)
    return min(lr for lr, score in scores.items() if score >= best - error)


def settings(tokens: int, model_args: dict[str, Any], lr: float, epochs: float) -> dict[str, Any]:
    """Fields of a run. Where the image grows in training, convolutions span what they span in its first size."""
    (first, _), *later = stages = STAGES[tokens]
    model_args = model_args | ({'local_grid': first} if later else {})
    return {'stages': stages, 'model_args': model_args, 'lr': lr, 'epochs': epochs, 'eval_every': epochs / 5}


def rate_of(rates: dict[str, dict[str, Any]], name: str) -> float:
    """The learning rate of a variant; K = 256 takes that of full attention, which it is at 256 tokens."""
    return rates.get(name, rates[FULL])['lr']


def parity(
    comparison: Comparison, seeds: dict[int, int], epochs: float, rates: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Full attention against each K, by tokens at the end."""
    tables = {}
    for tokens in (tokens for tokens in STAGES if seeds[tokens]):
        variants = {
            name: settings(tokens, arguments, rate_of(rates, name), epochs)
            for name, arguments in variants_of(tokens).items()
        }
        tables[tokens] = comparison.run(f'parity_{tokens}', variants, seeds[tokens])
    return {'rates': rates, 'runs': tables}


def sharing(comparison: Comparison, seeds: int, epochs: float, lr: float) -> dict[str, Any]:
    """Each kind of sharing at 256 tokens; one projection for all is parity's run with K = 64."""
    shared = comparison.run('parity_256', {'K = 64': settings(256, {'proj_len': 64}, lr, epochs)}, seeds)
    variants = {name: settings(256, {'proj_len': 64, 'sharing': name}, lr, epochs) for name in SHARINGS}
    return {'lr': lr, 'runs': {'layerwise': shared['K = 64'], **comparison.run('sharing', variants, seeds)}}


def main(
    table: tyro.conf.Positional[Literal['parity', 'sharing']],
    epochs: float = 0.5,
    search: float = 1.0,
    seeds: int = 3,
    seeds_1024: int = 1,
    workers: int = 2,
    precision: Literal['fp32', 'bf16'] = 'fp32',
    again: bool = False,
    data_dir: Path = Path('data'),
    output_dir: Path = Path('outputs/attention'),
) -> None:
    """Run a comparison.

    Args:
        table: Which.
        epochs: Epochs of each run.
        search: Length of the runs that choose a learning rate, as a share of those (short ones prefer rates that
            are too high in the end).
        seeds: Runs of each variant with 256 tokens.
        seeds_1024: Runs of each variant with 1,024 tokens.
        workers: Runs at a time, one thread each.
        precision: Of every run.
        again: Make every run anew, whatever figures are kept.
        data_dir: Folder that holds the data.
        output_dir: Folder for the runs; finished ones are not repeated.
    """
    (ROOT / 'docs' / 'results').mkdir(exist_ok=True)
    record = Record(ROOT / 'docs' / 'results' / 'attention_runs.json', FIELDS, again)
    comparison = Comparison(data_dir, output_dir, workers, precision, record)
    known = Known(ROOT / 'docs' / 'results' / 'rates.json', {'epochs': search * epochs, 'precision': precision})
    rates = comparison.choose_rates(search * epochs, {} if again else known.read())
    known.write(rates)
    if table == 'parity':
        found = parity(comparison, {256: seeds, 1024: seeds_1024}, epochs, rates)
        draw(found['runs'], ROOT / 'docs' / 'results' / 'parity.png')
        lines = parity_table(found)
    else:
        found = sharing(comparison, seeds, epochs, rates['K = 64']['lr'])
        lines = sharing_table(found['runs'])
    result = {'epochs': epochs, 'search': search, 'precision': precision, **found}
    (ROOT / 'docs' / 'results' / f'{table}.json').write_text(json.dumps(result, indent=2) + '\n')
    write_table(table, lines)
    print(lines)


def mean(runs: list[dict[str, Any]], field: str) -> float:
    """The mean of a figure over the seeds."""
    return statistics.mean(run[field] for run in runs)


def minutes_of(runs: list[dict[str, Any]], field: str = 'train_minutes') -> float:
    """Minutes of the seed that was disturbed least by what else the machine did."""
    return min((run[field] for run in runs if field in run), default=math.nan)


def scores(runs: list[dict[str, Any]]) -> str:
    """Top-1 in per cent, mean and spread."""
    return f'{mean_and_spread([100 * run["top1"] for run in runs])} %'


def parity_table(found: dict[str, Any]) -> str:
    """A line for each K, with its distance from full attention."""
    lines = [
        '| tokens | K | learning rate | top-1 | points above full attention | training, min | seeds |',
        '| --- | --- | --- | --- | --- | --- | --- |',
    ]
    for tokens, variants in found['runs'].items():
        full = mean(variants[FULL], 'top1')
        for name, runs in variants.items():
            above = f'{100 * (mean(runs, "top1") - full):+.1f}' if name != FULL else ''
            rate, minutes = rate_of(found['rates'], name), minutes_of(runs)
            lines.append(
                f'| {tokens:,} | {name.removeprefix("K = ")} | {rate:g} | {scores(runs)} | {above} | {minutes:.1f} | '
                f'{len(runs)} |'
            )
    return '\n'.join(lines)


def sharing_table(variants: dict[str, list[dict[str, Any]]]) -> str:
    """A line for each kind of sharing."""
    lines = ['| sharing | top-1 | parameters | training, min | seeds |', '| --- | --- | --- | --- | --- |']
    for name, runs in variants.items():
        parameters, minutes = runs[0]['num_parameters'], minutes_of(runs)
        lines.append(f'| `{name}` | {scores(runs)} | {parameters:,} | {minutes:.1f} | {len(runs)} |')
    return '\n'.join(lines)


def draw(tables: dict[int, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Accuracy on the validation slice against minutes of training, a panel for each number of tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout='constrained')
    colours = {name: f'C{i}' for i, name in enumerate(dict.fromkeys(n for runs in tables.values() for n in runs))}
    for axis, (tokens, variants) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        for name, runs in variants.items():
            points = list(zip(*(run['val_curve'] for run in runs if 'val_curve' in run), strict=True))
            minutes = [minutes_of(seeds, 'minutes') for seeds in points]
            axis.plot(minutes, [100 * mean(seeds, 'top1') for seeds in points], 'o-', color=colours[name], label=name)
        axis.set(title=f'{tokens:,} tokens at the end', xlabel='minutes of training', ylabel='validation top-1, %')
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == '__main__':
    tyro.cli(main, description=__doc__)
