"""The paper's first claim on photographs: full attention against E that are fixed, or made from the image.

    python -m scripts.studies.run photographs

Trains `recipes/cifar10_pixels_pico.py` with patches of 2×2 pixels: 256 tokens, the image at its own size throughout.
All runs see the images equally often. The learning rate of each is chosen on 5 % of the training images, in shorter
runs; the test set is for the scores alone. Writes `results/photographs.json` and the table in `docs/results.md`; what
runs gave is kept in `results/photographs_runs.json` and not trained again, unless with `--again`.
"""

from dataclasses import dataclass
from functools import partial

from scripts.studies.attention import FULL, smallest_of_the_best
from scripts.studies.tables import Rows, points_above, publish, table
from scripts.studies.trials import Changes, SeedFlags, Trials

RECIPE = 'cifar10_pixels_pico'
RATES = (0.007, 0.014)  # and on either side, while the outermost is chosen
VALIDATION = 2500  # images: 5 % of the training set
LENGTHS = (64, 16)  # K: a quarter and a sixteenth of the tokens
RECORD = 'photographs_runs.json'


@dataclass
class Settings(SeedFlags):
    """What the study can be asked.

    Args:
        epochs: Epochs of each run.
        search: Length of the runs that choose a learning rate, as a share of those.
    """

    epochs: float = 3.0
    search: float = 1 / 3


def variants_of(epochs: float) -> Changes:
    """Full attention, and each kind of E with each K."""
    own = {'model': 'linformer_vit_pico_patch2_32', 'stages': ((32, 1.0),), 'max_minutes': 0.0, 'epochs': epochs}
    args = {FULL: {'projection': 'none'}}
    for K in LENGTHS:
        args |= {
            f'`{kind}`, K = {K}': {'projection': kind, 'proj_len': K} for kind in ('linear', 'separable', 'dynamic')
        }
    return {name: {**own, 'model_args': model_args} for name, model_args in args.items()}


def photographs(settings: Settings) -> None:
    """Full attention against E that are fixed, or made from the image, on CIFAR-10 at 256 tokens."""
    trials = Trials('photographs', settings, record=RECORD, val_fraction=0.05)
    short = variants_of(settings.epochs * settings.search)
    best = partial(smallest_of_the_best, images=VALIDATION)
    rates, scores = trials.choose_rates(RECIPE, short, dict.fromkeys(short, RATES), lambda lr: (lr / 2, 2 * lr), best)
    variants = {name: {**own, 'lr': rates[name]} for name, own in variants_of(settings.epochs).items()}
    rows: Rows = dict(trials.run(RECIPE, variants, range(settings.seeds)))
    columns = {
        'projection': lambda key, _: key,
        'learning rate': lambda key, _: f'{rates[key]:g}',
        'top-1': None,
        'points above full attention': points_above(FULL),
        'parameters': None,
        'training, min': None,
        'seeds': None,
    }
    length = {'epochs': settings.epochs, 'search': settings.search, 'val_top1': scores}
    publish('photographs', {**length, 'runs': rows}, table(columns, rows))
