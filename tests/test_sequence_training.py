"""A recipe whose images processes share has the losses of one process, and goes on in another number of them."""

import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.multiprocessing as mp
from runs import events, free_port, in_two_processes, small, weights
from torch import Tensor

from linvision.data import Augmentation
from linvision.data.order import Order
from linvision.data.preparation import Preparation
from linvision.train import Recipe, train
from linvision.train.parallel import Processes, processes

STEPS = 12


def curve(folder: Path) -> list[float]:
    return [point.value for point in events(folder).Scalars('train/loss')]


def process(rank: int, count: int, port: int, recipes: list[Recipe]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR='localhost')
    for i, recipe in enumerate(recipes):
        os.environ['MASTER_PORT'] = str(port + i)
        train(recipe)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """The same 12 steps in one process; in two that share images, with whole weights and FSDP2; stopped after 5."""
    folder = tmp_path_factory.mktemp('sequence')
    # drop path, Mixup and flips are the same draws in all processes of an image; 9 rows do not divide by 2
    one = small(
        folder / 'one',
        model_args={'local_size': 3, 'drop_path_rate': 0.2},
        stages=((9, 0.5), (16, 0.5)),
        batch_size=20,
        epochs=STEPS * 20 / 230,
        lr=3e-3,
        ema_decay=0.9,
        hflip=0.5,
        mixup=0.4,
        val_fraction=0.1,
        eval_batch_size=7,
        log_every=1,
    )
    recipes = {
        'sequence': one.replace(output_dir=folder / 'sequence', parallel='sequence'),
        'fsdp': one.replace(output_dir=folder / 'fsdp', parallel='fsdp', sequence=2),
        'stopped': one.replace(output_dir=folder / 'stopped', parallel='sequence', sequence=2, max_steps=5),
    }
    found = train(one)
    in_two_processes(process, 2, free_port(), list(recipes.values()))
    return folder, found, recipes


@pytest.mark.slow
@pytest.mark.parametrize('parallel', ['sequence', 'fsdp'])
def test_processes_that_share_images_give_the_losses_and_scores_of_one(runs, parallel):
    folder, found, recipes = runs
    assert len(curve(folder / 'one')) == found['steps'] == STEPS
    torch.testing.assert_close(curve(folder / parallel), curve(folder / 'one'), rtol=2e-5, atol=0)
    torch.testing.assert_close(weights(folder / parallel), weights(folder / 'one'), rtol=1e-3, atol=5e-5)
    metrics = train(recipes[parallel].replace(sequence=0))  # finished: what it reported
    assert metrics['processes'] == 2
    for name in ('num_samples', 'val_num_samples', 'loss', 'top1', 'val_loss', 'val_top1'):
        assert metrics[name] == pytest.approx(found[name], rel=1e-5)


@pytest.mark.slow
def test_a_run_of_two_that_share_images_goes_on_in_one(runs):
    folder, _, recipes = runs
    assert len(curve(folder / 'stopped')) == 5
    train(recipes['stopped'].replace(max_steps=0, sequence=1))
    torch.testing.assert_close(weights(folder / 'stopped'), weights(folder / 'one'), rtol=1e-3, atol=5e-5)


@pytest.mark.slow
def test_four_processes_two_for_each_image_stop_and_go_on_as_two_of_ddp(runs):
    folder, _, recipes = runs
    two = recipes['stopped'].replace(output_dir=folder / 'two', parallel='ddp', sequence=0, max_steps=0)
    four = recipes['stopped'].replace(output_dir=folder / 'four')
    in_two_processes(process, 2, free_port(), [two])
    for recipe in (four, four.replace(max_steps=0)):
        mp.start_processes(process, (4, free_port(), [recipe]), nprocs=4, start_method='forkserver')
    assert len(curve(folder / 'four')) == STEPS
    torch.testing.assert_close(curve(folder / 'four'), curve(folder / 'two'), rtol=2e-5, atol=0)
    torch.testing.assert_close(weights(folder / 'four'), weights(folder / 'two'), rtol=1e-3, atol=5e-5)


def prepared(rows: Any, img_size: int, library: str = 'torchvision') -> Tensor:
    changes = Augmentation(library, hflip=0.5, shift=2)
    order, images = Order(4, 4), torch.arange(4 * 3 * 16 * 16).view(4, 3, 16, 16).remainder(251).to(torch.uint8)
    preparation = Preparation((0.5,) * 3, (0.25,) * 3, torch.device('cpu'), changes, order, rows)
    return preparation.augmented(images, img_size, 16, 0, 1, 2)


@pytest.mark.parametrize('library', ['torchvision', 'torch'])
@pytest.mark.parametrize('img_size', [16, 8, 24])
def test_the_rows_that_processes_get_are_those_of_the_image_that_one_gets(img_size, library):
    own = [Processes(torch.device('cpu'), rank, 3, 3).rows for rank in range(3)]
    bands = [prepared(rows, img_size, library) for rows in own]
    assert torch.equal(torch.cat(bands, dim=2), prepared(None, img_size, library))
    assert len(bands[0]) == 4 and max(band.shape[2] for band in bands) == -(-img_size // 3)


def test_processes_that_share_an_image_have_one_share_of_a_batch():
    four = [Processes(torch.device('cpu'), rank, 4, 2) for rank in range(4)]
    assert [(p.share, p.shares) for p in four] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [p.rows(20, patch=4) for p in four] == [slice(0, 12), slice(12, 20)] * 2


@pytest.mark.parametrize(
    'changes', [dict(cutmix=1.0), dict(task='masked_pixels'), dict(teacher='vit_tiny_patch16_224')]
)
def test_what_needs_whole_images_is_refused(changes):
    recipe = Recipe().replace(parallel='sequence', **changes)
    with pytest.raises(ValueError, match='some rows of it each'):
        recipe.validate()


def test_processes_that_cannot_be_divided_are_an_error_with_both_numbers(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '4')
    with pytest.raises(ValueError, match='3 processes are to share each image, but 4'), processes('cpu', 'ddp', 3):
        pass


def test_a_model_of_others_is_refused():
    model: Any = timm.create_model('vit_tiny_patch16_224', img_size=32)
    with pytest.raises(ValueError, match='linformer_vit'):
        Processes(torch.device('cpu'), 0, 2, 2).divide(model)
