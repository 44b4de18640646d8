"""Two other ways to make rows of E from the image, beside `dynamic`: are they level with full attention?

    python -m scripts.studies.run other_rows

As `photographs.py`, whose runs of `dynamic` and of full attention it takes, at the learning rate that was the best for
`dynamic` there, with one seed. Both kinds are here alone, without streaming, padding and resizing:

- `superpixels`: weights sum to one over the rows for each token, not over the tokens for each row: each token chooses
  among the rows, and a row is the mean of the tokens that chose it.
- `agents`: what a row asks for is its own W and the mean of its cell, so that each image asks for something else.

Writes `results/other_rows.json` and its table in `docs/results.md`; what runs gave is kept in
`results/other_rows_runs.json`, and they are not repeated.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from linvision.models.dynamic_rows import logits, place_scale
from linvision.models.projection_kinds import PROJECTIONS, Dynamic, MeanPool
from scripts.studies.attention import FULL
from scripts.studies.photographs import LENGTHS, RECIPE, RECORD, variants_of
from scripts.studies.tables import Rows, points_above, publish, table
from scripts.studies.trials import SeedFlags, Trials

RATE = 0.007


class Superpixels(Dynamic):
    """E = softmax over rows of W xᵀ + prior, each row then divided by its sum."""

    by_parts = False

    @staticmethod
    def reduce(x: Tensor, factors: list[Tensor], grid: tuple[int, int], rows: tuple[int, int]) -> Tensor:
        # what Dynamic's prior leaves out, −c² / (2 σ²), is the same for all tokens, but not for all rows
        prior = factors[0][..., x.shape[-1] :].float().unflatten(-1, (-1, 4)).sum(-2)  # low precision has it twice
        down, middle, across, centre = (prior / (1 if x.element_size() > 2 else 2)).unbind(-1)
        rest = place_scale() / 4 * (middle.square() / down + centre.square() / across)  # (K,)
        E = (logits(x, factors) + rest.unsqueeze(-1)).softmax(-2)  # (B, K, N)
        return (E / E.sum(-1, keepdim=True)).to(x.dtype) @ x


class Agents(Dynamic):
    """E = softmax over tokens of (W + mean of the row's cell / √D) xᵀ + prior."""

    by_parts = False

    @staticmethod
    def reduce(x: Tensor, factors: list[Tensor], grid: tuple[int, int], rows: tuple[int, int]) -> Tensor:
        cells = MeanPool.reduce(x, MeanPool.factors([], grid, rows, x), grid, rows)  # (B, K, D)
        D = x.shape[-1]
        own, place = factors[0].expand(x.shape[0], -1, -1).split([D, factors[0].shape[-1] - D], dim=-1)
        query = torch.cat([own + cells / math.sqrt(D), place], dim=-1)
        return logits(x, [query, factors[1]]).softmax(-1).to(x.dtype) @ x


KINDS = {'superpixels': Superpixels, 'agents': Agents}


def install() -> None:
    """Let models have these kinds, in this process."""
    PROJECTIONS.update(KINDS)


@dataclass
class Settings(SeedFlags):
    """What the study can be asked.

    Args:
        epochs: Epochs of each run.
    """

    epochs: float = 3.0
    seeds: int = 1


def other_rows(settings: Settings) -> None:
    """Two other ways to make rows from the image: superpixels and agents, beside `dynamic` and full attention."""
    own = variants_of(settings.epochs)
    rows: Rows = dict(
        Trials('photographs', settings, record=RECORD, val_fraction=0.05).run(
            RECIPE,
            {name: {**own[name], 'lr': RATE} for name in (FULL, *(f'`dynamic`, K = {K}' for K in LENGTHS))},
            range(settings.seeds),
        )
    )
    variants = {
        f'`{kind}`, K = {K}': {**own[FULL], 'lr': RATE, 'model_args': {'projection': kind, 'proj_len': K}}
        for K in LENGTHS
        for kind in KINDS
    }
    trials = Trials('other_rows', settings, record='other_rows_runs.json', val_fraction=0.05)
    rows |= trials.run(RECIPE, variants, range(settings.seeds), before=dict.fromkeys(variants, install))
    columns = {
        'projection': lambda key, _: key,
        'top-1': None,
        'points above full attention': points_above(FULL),
        'parameters': None,
        'seeds': None,
    }
    result = {'epochs': settings.epochs, 'learning_rate': RATE, 'runs': rows}
    publish('other_rows', result, table(columns, rows))
