"""Two processes over gloo give what one gives, and a sharded checkpoint loads on another number of them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import events, free_port, in_two_processes, small, weights

from linvision.train import Recipe, train
from linvision.train.board import Board
from linvision.train.model import check_batch, empty_model

RECIPE = Path(__file__).parents[1] / 'recipes/fashion_mnist_pixels.py'


def curve(folder: Path, tag: str = 'train/loss') -> list[float]:
    return [point.value for point in events(folder).Scalars(tag)]


def process(rank: int, count: int, port: int, recipes: list[Recipe]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR='localhost')
    Board.pictures = lambda *args: None  # as in the tests' own process
    for i, recipe in enumerate(recipes):
        os.environ['MASTER_PORT'] = str(port + i)
        train(recipe)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """The same recipe in one process and in two, by DDP, resumed in the middle, and by FSDP2, also stopped early."""
    folder = tmp_path_factory.mktemp('parallel')
    one = small(
        folder / 'one',
        epochs=0.75,
        lr=3e-3,
        ema_decay=0.9,
        hflip=0.5,
        val_fraction=0.1,
        eval_batch_size=7,
        batch_size=28,
        log_every=1,
        max_steps=6,  # all that there are: the run ends with scores
    )
    ddp = one.replace(output_dir=folder / 'ddp', accumulate=2)
    fsdp = one.replace(output_dir=folder / 'fsdp', parallel='fsdp')
    stopped = fsdp.replace(output_dir=folder / 'stopped', max_steps=2)
    found = {'one': train(one)}
    in_two_processes(process, 2, free_port(), [ddp.replace(max_steps=3), ddp, fsdp, stopped])
    return folder, found, {'one': one, 'ddp': ddp, 'fsdp': fsdp, 'stopped': stopped}


@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_two_processes_give_the_losses_and_scores_of_one(runs, parallel):
    folder, found, recipes = runs
    torch.testing.assert_close(curve(folder / parallel), curve(folder / 'one'), rtol=2e-5, atol=0)
    assert len(curve(folder / 'one')) == found['one']['steps'] == 6
    torch.testing.assert_close(weights(folder / parallel), weights(folder / 'one'), rtol=1e-3, atol=2e-5)
    metrics = train(recipes[parallel])  # finished: what it reported
    assert metrics['processes'] == 2 and metrics['num_samples'] == 100 and metrics['val_num_samples'] == 26
    for name in ('loss', 'top1', 'val_loss', 'val_top1'):
        assert metrics[name] == pytest.approx(found['one'][name], rel=1e-5)


def test_a_sharded_checkpoint_of_two_processes_goes_on_in_one(runs):
    folder, _, recipes = runs
    assert (folder / 'stopped/checkpoints/step_00000002/shards').is_dir()
    train(recipes['stopped'].replace(max_steps=0))
    torch.testing.assert_close(weights(folder / 'stopped'), weights(folder / 'one'), rtol=1e-3, atol=2e-5)


def test_a_batch_that_cannot_be_shared_is_an_error_with_both_numbers():
    with pytest.raises(ValueError, match=r'got 32 for 3 × 2\. The nearest that fit are 30 and 36'):
        Recipe().replace(batch_size=32, accumulate=2).images_at_once(3)


@pytest.mark.parametrize('batch_size, accumulate, count', [(32, 1, 2), (32, 2, 1), (1, 1, 1)])
def test_a_norm_over_the_batch_that_would_fall_apart_is_an_error(batch_size, accumulate, count):
    recipe = Recipe(model='test_linformer_vit', model_args={'head_norm': True})
    recipe = recipe.replace(batch_size=batch_size, accumulate=accumulate)
    model = empty_model(recipe, {})
    with pytest.raises(ValueError, match=f'got {count}, {accumulate} and a batch_size of {batch_size}'):
        check_batch(model, recipe, count)
    check_batch(model, recipe.replace(batch_size=2, accumulate=1), 1)


KILLED = """
import os, signal, sys, dataclasses
from pathlib import Path
from linvision.train import Recipe, train, loop
step = loop.TrainingRun.step
def killed(self, *args):
    first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'
    if self.progress.step == 7 and self.processes.rank == 1 and first and sys.argv[2] == 'killed':
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args)
loop.TrainingRun.step = killed
recipe = Recipe(model='test_linformer_vit').replace(dataset='fake', output_dir=Path(sys.argv[1]), lr=3e-3, threads=1)
recipe = recipe.replace(stages=((8, .5), (16, .5)), epochs=1.25, checkpoint_every=2, precision='fp32', device='cpu')
train(recipe.replace(parallel=sys.argv[3]))
"""


@pytest.mark.slow
@pytest.mark.parametrize('parallel', ['ddp', 'sequence'])
def test_torchrun_starts_a_killed_worker_again_and_the_weights_are_the_same(parallel, tmp_path):
    script = tmp_path / 'run.py'
    script.write_text(KILLED)
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    # torch 2.14 else keeps one store, in which a new process may find the address of one that is gone
    environment = {**os.environ, 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}
    for name in ('whole', 'killed'):
        command = [*launch, '--max-restarts', '1', str(script), str(tmp_path / name), name, parallel]
        subprocess.run(command, check=True, env=environment)
    whole, resumed = weights(tmp_path / 'whole'), weights(tmp_path / 'killed')
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_sigterm_to_torchrun_ends_a_recipe_with_a_checkpoint(parallel, tmp_path):
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    flags = ['--model', 'test_linformer_vit', '--dataset', 'fake', '--stages', '16', '1', '--epochs', '100000']
    flags += ['--opt', 'adamw', '--workers', '2']
    command = [*launch, str(RECIPE), *flags, '--output-dir', str(tmp_path), '--device', 'cpu', '--parallel', parallel]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not run.stdout.readline().startswith('step '):
        assert run.poll() is None, run.stderr.read()
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert run.returncode != 0
    assert len(list((tmp_path / 'checkpoints').glob('step_*'))) >= 1
    assert not list((tmp_path / 'checkpoints').glob('*.part'))
