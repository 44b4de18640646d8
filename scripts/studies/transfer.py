"""Is the shipped backbone worth starting from? Against the same model from scratch, on handwritten digits.

    python -m scripts.tools.digits_folder --output-dir data/digits
    python -m scripts.studies.run transfer --data-dir data/digits

`recipes/finetune.py` on another real set, for few and for many epochs, with as many seeds as asked for. The learning
rate is chosen for each number of epochs and each start on a fifth of the training images, kept apart: the one whose
neighbours, three times as large and as small, are no better. The test images are for the scores alone. Writes
`results/transfer.json`, and its table in `docs/results.md`, after each number of epochs; what runs gave is kept in
`results/transfer_runs.json`, and they are not repeated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.studies.tables import Cell, Rows, points_above, publish, table
from scripts.studies.trials import Changes, Scores, SeedFlags, Trials

BACKBONE = 'linformer_vit_pico_patch1_32.fashion_mnist'  # the digits are grey too
STARTS: Changes = {
    'from scratch': {'model': 'linformer_vit_pico_patch1_32', 'init': '', 'layer_decay': 1.0},
    'linear probe': {'init': BACKBONE, 'freeze': -1, 'layer_decay': 1.0},
    'fine-tuned': {'init': BACKBONE},
}
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # the search begins in the middle


@dataclass
class Settings(SeedFlags):
    """What the study can be asked.

    Args:
        epochs: Numbers of epochs.
        img_size: Image size of all runs; the backbone was trained at 16 and 32.
    """

    epochs: tuple[int, ...] = (1, 5, 20)
    img_size: int = 16
    seeds: int = 5
    data_dir: Path = Path('data/digits')


def neighbours(lr: float) -> tuple[float, ...]:
    """A rate of `RATES` and those next to it."""
    place = RATES.index(lr)
    return RATES[max(place - 1, 0) : place + 2]


def compare_starts(
    trials: Trials,
    name: str,
    keys: Sequence[int],
    variants_of: Callable[[int], tuple[Changes, Changes]],
    columns: dict[str, Cell],
    seeds: int,
    facts: dict[str, Any],
    score: str = 'val_top1',
) -> None:
    """Choose a learning rate for each start and train it with all seeds; publish after each key what there is.

    Args:
        trials: The study's runs.
        name: Of the study.
        keys: What stands first in a line of the table, such as numbers of epochs; the search for a key's rates begins
            with those of the key before.
        variants_of: For a key, the starts as rates are chosen and as they are scored.
        columns: The first cells of a line, whose key is (key, start).
        seeds: Runs of each that is scored.
        facts: What else the result says.
        score: As for `choose_rates`.
    """
    rows: Rows = {}
    rates: dict[tuple[int, str], float] = {}
    validation: dict[int, Scores] = {}
    best: dict[str, float] = {}
    for key in keys:
        tried, variants = variants_of(key)
        first = {start: neighbours(best.get(start, RATES[len(RATES) // 2])) for start in tried}
        best, validation[key] = trials.choose_rates(
            'finetune', tried, first, neighbours, folder=f'rates_{key}', score=score
        )
        rates |= {(key, start): lr for start, lr in best.items()}
        chosen: Changes = {start: {**own, 'lr': best[start]} for start, own in variants.items()}
        scored = trials.run('finetune', chosen, range(seeds), f'scores_{key}')
        rows |= {(key, start): runs for start, runs in scored.items()}
        runs: dict[int, Any] = {n: {s: found for (k, s), found in rows.items() if k == n} for n in validation}
        publish(name, {**facts, 'rates': validation, 'runs': runs}, starts_table(columns, rows, rates))


def starts_table(columns: dict[str, Cell], rows: Rows, rates: dict[tuple[int, str], float]) -> str:
    """A line for each key and start."""
    shared = {
        '': lambda key, _: key[1],
        'learning rate': lambda key, _: f'{rates[key]:g}',
        'top-1': None,
        'points above scratch': points_above('from scratch'),
        'training, min': None,
        'seeds': None,
    }
    return table({**columns, **shared}, rows)


EPOCHS: dict[str, Cell] = {'epochs': lambda key, _: str(key[0])}


def transfer(settings: Settings) -> None:
    """Is the shipped backbone worth starting from? Against the same model from scratch, on handwritten digits."""
    own = {'img_size': settings.img_size, 'hflip': 0.0, 'shift': 1}
    trials = Trials('transfer', settings, record='transfer_runs.json', **own)

    def variants_of(epochs: int) -> tuple[Changes, Changes]:
        variants = {start: {**own, 'epochs': epochs} for start, own in STARTS.items()}
        return {start: {**own, 'val_fraction': 0.2} for start, own in variants.items()}, variants

    facts = {'img_size': settings.img_size, 'precision': settings.precision}
    compare_starts(trials, 'transfer', settings.epochs, variants_of, EPOCHS, settings.seeds, facts)
