"""The paper's two claims, on pixels: K projected rows are enough, and one projection for all layers is enough.

    python -m scripts.studies.run parity
    python -m scripts.studies.run sharing

Trains `recipes/fashion_mnist_pixels.py` with one thing changed (and, where the image grows in training, convolutions
that keep the span of the first stage). Parity: full attention (K = N) against K of 16, 64 and
256, on 16×16 images (256 tokens), and in the recipe's stages, three quarters of the steps at 16×16 and the rest at
32×32 (1,024 tokens). The learning rate of each is chosen at 256 tokens on 5 % of the training images. Sharing: a
projection for each head, for keys and for values, for each layer, or one for all, at 256 tokens with K = 64 and the
learning rate that parity chose for it. The test set is for the scores alone. Writes `results/parity.json` or
`sharing.json`, parity's picture, and the table in `docs/results.md`. What runs gave is kept in
`results/attention_runs.json`, and validation scores of an earlier go in `results/rates.json`: what stands there is not
trained again, unless with `--again`, and a table can be added to on another day.
"""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.studies.tables import DOCS, RESULTS, Rows, points_above, publish, table
from scripts.studies.trials import FIGURES, Changes, Scores, SeedFlags, Trials

RECIPE = 'fashion_mnist_pixels'
RATES = (0.01, 0.02, 0.04)  # and on either side, while the outermost is chosen
VALIDATION = 3000  # images: 5 % of the training set
STAGES = {256: ((16, 1.0),), 1024: ((16, 0.75), (32, 0.25))}  # by tokens at the end
LENGTHS = {256: (64, 16), 1024: (256, 64, 16)}  # K by tokens at the end
SHARINGS = ('key_value', 'headwise', 'none')  # layerwise is parity's own
FULL = 'K = N, full attention'


@dataclass
class Settings(SeedFlags):
    """What both studies can be asked.

    Args:
        epochs: Epochs of each run.
        search: Length of the runs that choose a learning rate, as a share of those (short ones prefer rates that
            are too high in the end).
        seeds_1024: Runs of each variant with 1,024 tokens; `--seeds` are those with 256.
    """

    epochs: float = 0.5
    search: float = 1.0
    seeds_1024: int = 1


def variants_of(tokens: int, epochs: float) -> Changes:
    """Full attention and each K; where the image grows in training, convolutions keep the span of its first size."""
    (first, _), *later = stages = STAGES[tokens]
    own = {'stages': stages, 'epochs': epochs, 'eval_every': epochs / 5}
    span = {'local_grid': first} if later else {}
    models = {FULL: {'projection': 'none'}, **{f'K = {K}': {'proj_len': K} for K in LENGTHS[tokens]}}
    return {name: {**own, 'model_args': model_args | span} for name, model_args in models.items()}


def smallest_of_the_best(scores: dict[float, float], images: int = VALIDATION) -> float:
    """The smallest learning rate whose score, on so many images, lies within a standard error of the best."""
    best = max(scores.values())
    error = math.sqrt(best * (1 - best) / images)
    return min(lr for lr, score in scores.items() if score >= best - error)


def known_scores(file: Path, run: dict[str, Any]) -> Scores:
    """Validation scores that an earlier go left, of runs of this length and precision."""
    entries = json.loads(file.read_text()) if file.is_file() else []
    found = next((entry for entry in entries if all(entry[k] == v for k, v in run.items())), {'val_top1': {}})
    return {name: {float(lr): score for lr, score in scores.items()} for name, scores in found['val_top1'].items()}


def prepared(settings: Settings) -> tuple[Trials, dict[str, float], dict[str, Any]]:
    """What both studies begin with: the runs, the learning rates at 256 tokens, and what is written of them."""
    fields, epochs = (*FIGURES, 'val_curve'), settings.search * settings.epochs
    trials = Trials('attention', settings, fields, 'attention_runs.json', val_fraction=0.05)
    known = known_scores(RESULTS / 'rates.json', {'epochs': epochs, 'precision': settings.precision})
    variants, around = variants_of(256, epochs), lambda lr: (lr / 2, 2 * lr)
    first, known = dict.fromkeys(variants, RATES), {} if settings.again else known
    rates, scores = trials.choose_rates(RECIPE, variants, first, around, smallest_of_the_best, known)
    chosen = {name: {'lr': lr, 'val_top1': scores[name]} for name, lr in rates.items()}
    length = {'epochs': settings.epochs, 'search': settings.search}
    return trials, rates, {**length, 'precision': settings.precision, 'rates': chosen}


def parity(settings: Settings) -> None:
    """K rows against full attention, on 256 and on 1,024 pixels."""
    trials, rates, result = prepared(settings)
    rows: Rows = {}
    for tokens, count in ((256, settings.seeds), (1024, settings.seeds_1024)):
        variants = variants_of(tokens, settings.epochs) if count else {}
        for name, own in variants.items():
            own['lr'] = rates.setdefault(name, rates[FULL])  # K = 256 is full attention at 256 tokens
        runs = trials.run(RECIPE, variants, range(count), f'parity_{tokens}')
        rows |= {(tokens, name): found for name, found in runs.items()}
    draw(rows, DOCS / 'images' / 'parity.png')
    runs = {tokens: {name: found for (n, name), found in rows.items() if n == tokens} for tokens in STAGES}
    publish('parity', {**result, 'runs': runs}, parity_table(rows, rates))


def parity_table(rows: Rows, rates: dict[str, float]) -> str:
    """A line for each number of tokens and each K."""
    columns = {
        'tokens': lambda key, _: f'{key[0]:,}',
        'K': lambda key, _: key[1].removeprefix('K = '),
        'learning rate': lambda key, _: f'{rates[key[1]]:g}',
        'top-1': None,
        'points above full attention': points_above(FULL),
    }
    return table({**columns, 'training, min': None, 'seeds': None}, rows)


def sharing(settings: Settings) -> None:
    """One projection for all layers against one for each layer, for keys and values, for each head."""
    trials, rates, result = prepared(settings)
    lr, seeds = rates['K = 64'], range(settings.seeds)
    own = {**variants_of(256, settings.epochs)['K = 64'], 'lr': lr}
    shared = trials.run(RECIPE, {'K = 64': own}, seeds, 'parity_256')  # parity's run: one projection for all
    variants = {name: {**own, 'model_args': {'proj_len': 64, 'sharing': name}} for name in SHARINGS}
    rows = {'layerwise': shared['K = 64'], **trials.run(RECIPE, variants, seeds, 'sharing')}
    columns = {'sharing': lambda key, _: f'`{key}`', 'top-1': None, 'parameters': None}
    text = table({**columns, 'training, min': None, 'seeds': None}, rows)
    publish('sharing', {**result, 'lr': lr, 'runs': rows}, text)


def draw(rows: Rows, path: Path) -> None:
    """Accuracy on the validation slice against minutes of training, a panel for each number of tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout='constrained')
    colours = {name: f'C{i}' for i, name in enumerate(dict.fromkeys(name for _, name in rows))}
    sizes = list(dict.fromkeys(tokens for tokens, _ in rows))
    for axis, tokens in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        for name, runs in ((name, runs) for (n, name), runs in rows.items() if n == tokens):
            points = list(zip(*(run['val_curve'] for run in runs if 'val_curve' in run), strict=True))
            spent = [
                min((seed['minutes'] for seed in seeds if 'minutes' in seed), default=math.nan) for seeds in points
            ]
            scores = [100 * statistics.mean(seed['top1'] for seed in seeds) for seeds in points]
            axis.plot(spent, scores, 'o-', color=colours[name], label=name)
        axis.set(title=f'{tokens:,} tokens at the end', xlabel='minutes of training', ylabel='validation top-1, %')
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
