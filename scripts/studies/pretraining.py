"""Does self-pretraining by masked pixels pay for its time? Against training from scratch, with as many steps in all.

    python -m scripts.studies.run pretraining

At 256 tokens, by the recipes `fashion_mnist_pixels` and `masked_pixels`. One model sees classes from the first step to
the last. The other spends a share of the steps on masked pixels, without labels, and the rest on classes; its
backbone, with its projection, is what goes over (arXiv 2310.02980). A step of either kind is one batch of the same
model; the table shows the minutes of both. The learning rate of the classes is chosen on the validation slice, for
each; that of the pixels is the recipe's. Writes `results/pretraining.json`, and its table in `docs/results.md`.
"""

from dataclasses import dataclass

from scripts.studies.tables import Rows, points_above, publish, table
from scripts.studies.trials import FIGURES, Changes, SeedFlags, Trials, run_folder

RECIPE = 'fashion_mnist_pixels'
RATES = (0.01, 0.02)
SCRATCH, PIXELS_FIRST = 'from scratch', 'masked pixels first'


@dataclass
class Settings(SeedFlags):
    """What the study can be asked.

    Args:
        epochs: Epochs of each model, in all.
        share: Of them, on masked pixels.
    """

    epochs: float = 0.5
    share: float = 0.5


def pretraining(settings: Settings) -> None:
    """Does self-pretraining by masked pixels pay for its time? Against training from scratch, with as many steps."""
    fields = (*FIGURES, 'val_loss')
    trials = Trials('pretraining', settings, fields, stages=((16, 1.0),), val_fraction=0.05)
    own = {'task': 'masked_pixels', 'epochs': settings.share * settings.epochs, 'test': False}
    before = trials.run(RECIPE, {'masked pixels': own}, range(settings.seeds), 'pretraining')['masked pixels']

    def classes(seed: int) -> Changes:
        backbone = run_folder(trials.folder / 'pretraining', 'masked pixels', seed)
        pretrained = {'epochs': (1 - settings.share) * settings.epochs, 'init': str(backbone)}
        return {SCRATCH: {'epochs': settings.epochs}, PIXELS_FIRST: pretrained}

    rates, scores = trials.choose_rates(RECIPE, classes(0), dict.fromkeys((SCRATCH, PIXELS_FIRST), RATES))
    rows: Rows = {SCRATCH: [], PIXELS_FIRST: []}
    for seed in range(settings.seeds):  # each has a backbone of its own
        variants = {name: {**own, 'lr': rates[name]} for name, own in classes(seed).items()}
        for name, runs in trials.run(RECIPE, variants, [seed], 'scores').items():
            rows[name] += runs
    for run, pixels in zip(rows[PIXELS_FIRST], before, strict=True):
        run.update({k: run[k] + pixels[k] for k in ('train_minutes', 'images_seen')}, val_loss=pixels['val_loss'])
    columns = {
        '': lambda key, _: key,
        'learning rate': lambda key, _: f'{rates[key]:g}',
        'top-1': None,
        'points above scratch': points_above(SCRATCH),
    }
    text = table({**columns, 'images seen': None, 'training, min': None, 'seeds': None}, rows)
    length = {'epochs': settings.epochs, 'share': settings.share, 'precision': settings.precision}
    publish('pretraining', {**length, 'rates': scores, 'runs': rows}, text)
