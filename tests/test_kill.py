"""A run that is killed and started again ends with the same weights, bit for bit, as one that never stopped."""

import importlib
import multiprocessing
import os
import signal
from typing import Any

import pytest
import torch
from runs import PROCESSES, small, weights

from linvision.train import Recipe, train

KILLS = {  # what is replaced by a function that kills the process, and at which call
    'in the middle of an epoch': ('linvision.train.loop', 'TrainingRun', 'step', 8),
    'while a checkpoint is written': ('linvision.train.checkpoint', None, 'seal', 2),
    'before a checkpoint gets its name': ('linvision.train.checkpoint', 'os', 'replace', 3),
    'at a stage boundary': ('linvision.train.learner', 'Learner', 'set_size', 1),
}


def killed(kill: str, recipe: Recipe) -> None:
    """A run whose process is killed from within."""
    module, owner, name, last = KILLS[kill]
    holder = getattr(importlib.import_module(module), owner) if owner else importlib.import_module(module)
    original, calls = getattr(holder, name), []

    def kills(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(holder, name, kills)
    multiprocessing.set_start_method('fork', force=True)  # of the workers that load data: they end with this process
    torch.set_num_threads(1)
    train(recipe)


FIRST = 'while a checkpoint is written'  # the others are slow


@pytest.fixture(scope='module')
def recipe(tmp_path_factory) -> Recipe:
    return small(
        tmp_path_factory.mktemp('whole'),
        model_args={'proj_drop_rate': 0.1},
        epochs=1.75,
        opt='muon',
        lr=0.01,
        ema_decay=0.9,
        hflip=0.5,
        shift=1,
        mixup=0.2,
        checkpoint_every=3,
        workers=2,
        test=False,
    )


@pytest.fixture(scope='module')
def whole(recipe) -> dict[str, torch.Tensor]:
    train(recipe)
    return weights(recipe.run.output_dir)


@pytest.mark.parametrize(
    'kill', [FIRST, *(pytest.param(kill, marks=pytest.mark.slow) for kill in KILLS if kill != FIRST)]
)
def test_a_killed_run_ends_with_the_weights_of_one_that_never_stopped(kill, recipe, whole, tmp_path):
    recipe = recipe.replace(output_dir=tmp_path)
    run = PROCESSES.Process(target=killed, args=(kill, recipe))
    run.start()
    run.join()
    assert run.exitcode == -signal.SIGKILL
    assert not (tmp_path / 'metrics.json').exists()
    train(recipe)
    resumed = weights(tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not list((tmp_path / 'checkpoints').glob('*.part'))
