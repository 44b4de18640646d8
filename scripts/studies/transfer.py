"""Is the shipped backbone worth starting from? Against the same model from scratch, on handwritten digits.

    python -m scripts.tools.digits_folder --output-dir data/digits
    python -m scripts.studies.run transfer --data-dir data/digits

`recipes/finetune.py` on another real set, for few and for many epochs, with as many seeds as asked for. The learning
rate is chosen for each number of epochs and each start on a fifth of the training images, kept apart: the one whose
neighbours, three times as large and as small, are no better. The test images are for the scores alone. Writes
`results/transfer.json`, and its table in `docs/results.md`, after each number of epochs; what runs gave is kept in
`results/transfer_runs.json`, and they are not repeated.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.studies.tables import Rows, points_above, publish, table
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


def transfer(settings: Settings) -> None:
    """Is the shipped backbone worth starting from? Against the same model from scratch, on handwritten digits."""
    own = {'img_size': settings.img_size, 'hflip': 0.0, 'shift': 1}
    trials = Trials('transfer', settings, record='transfer_runs.json', **own)
    rows: Rows = {}
    rates: dict[tuple[int, str], float] = {}
    validation: dict[int, Scores] = {}
    best = dict.fromkeys(STARTS, RATES[len(RATES) // 2])
    for epochs in settings.epochs:
        held_out = {start: {**own, 'epochs': epochs, 'val_fraction': 0.2} for start, own in STARTS.items()}
        first = {start: neighbours(lr) for start, lr in best.items()}
        best, validation[epochs] = trials.choose_rates(
            'finetune', held_out, first, neighbours, folder=f'rates_{epochs}'
        )
        rates |= {(epochs, start): lr for start, lr in best.items()}
        variants = {start: {**STARTS[start], 'epochs': epochs, 'lr': lr} for start, lr in best.items()}
        scored = trials.run('finetune', variants, range(settings.seeds), f'scores_{epochs}')
        rows |= {(epochs, start): runs for start, runs in scored.items()}
        runs: dict[int, Any] = {n: {s: found for (k, s), found in rows.items() if k == n} for n in validation}
        result = {'img_size': settings.img_size, 'precision': settings.precision, 'rates': validation, 'runs': runs}
        publish('transfer', result, transfer_table(rows, rates))


def transfer_table(rows: Rows, rates: dict[tuple[int, str], float]) -> str:
    """A line for each number of epochs and start."""
    columns = {
        'epochs': lambda key, _: str(key[0]),
        '': lambda key, _: key[1],
        'learning rate': lambda key, _: f'{rates[key]:g}',
        'top-1': None,
        'points above scratch': points_above('from scratch'),
    }
    return table({**columns, 'training, min': None, 'seeds': None}, rows)
