"""What the campaigns of odd settings and odd files share: the seed, the budget, and what it is to end well.

The seed is printed and is another one at each run; `CAMPAIGN_SEED=N` repeats one, `CAMPAIGN_BUDGET=10` tries ten times
as many. To end well is to give a result, or to end as `guard.py` ends a mistake.
"""

import os
import random

import pytest
from hypothesis import HealthCheck, given, seed, settings

from linvision.cli.main import main
from linvision.guard import Mistake

SEED = int(os.environ.get('CAMPAIGN_SEED', random.SystemRandom().getrandbits(32)))
BUDGET = float(os.environ.get('CAMPAIGN_BUDGET', 1))
MARKS = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]  # odd images make PIL warn
FLAGS_OF_RUN = ['--device', 'cpu', '--threads', '1', '--workers', '0', '--precision', 'fp32', '--epochs', '1']
FLAGS_OF_RUN += ['--model', 'test_linformer_vit', '--init', '', '--batch-size', '2', '--max-minutes', '0']


def campaign(cases: int, **strategies):
    """A test over so many drawn cases."""
    budget = settings(
        max_examples=max(1, round(cases * BUDGET)),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    return lambda test: seed(SEED)(budget(given(**strategies)(test)))


@pytest.fixture(autouse=True)
def printed_seed(capsys):
    with capsys.disabled():
        print(f'\n[campaign seed {SEED}] ', end='')


def ends_well(words: list[str]) -> bool:
    """Whether a command gives its result; or it ends in a sentence."""
    try:
        main(words)
    except Mistake as end:
        assert len(str(end)) > len('error: .'), words
        return False
    except SystemExit as end:  # of tyro, for a flag that it does not know or cannot read
        assert end.code in (0, 2), (words, end.code)
        return end.code == 0
    return True
