"""Further facts of a run: what resumes, what is scored, what the probe and the board leave behind."""

import sys

import pytest
import torch
from runs import events

from linvision.data import ImageSet, create_dataset, datasets
from linvision.train import precision, train
from linvision.train.checkpoint import newest_checkpoint, read_state
from linvision.train.parallel import Processes
from linvision.train.precision import choose_precision


@pytest.fixture
def recipe(small_recipe):
    return small_recipe.replace(epochs=1, lr=3e-3, model_args={'drop_rate': 0.1, 'drop_path_rate': 0.1})


def last(folder):
    state = read_state(newest_checkpoint(folder / 'checkpoints'))
    return state['position'], state['learner']


def test_an_interrupted_run_with_dropout_mixing_and_a_moving_average_ends_the_same(recipe, tmp_path):
    recipe = recipe.replace(ema_decay=0.9, mixup=0.2, cutmix=1.0, opt='muon', shift=1, hflip=0.5, epochs=2)
    train(recipe)
    parts = recipe.replace(output_dir=tmp_path / 'parts')
    for stop in (3, 11, 0):
        train(parts.replace(max_steps=stop))
    (at, whole), (resumed_at, resumed) = last(recipe.output_dir), last(parts.output_dir)
    for part in ('model', 'ema'):
        assert whole[part].keys() == resumed[part].keys()
        assert all(torch.equal(whole[part][k], resumed[part][k]) for k in whole[part])
    assert at['tokens'] == resumed_at['tokens']


def test_a_run_that_died_before_its_metrics_scores_again_without_training(recipe):
    metrics = train(recipe)
    (recipe.output_dir / 'metrics.json').unlink()
    again = train(recipe)
    for name in ('top1', 'loss', 'steps', 'train_minutes', 'tokens_per_s'):
        assert again[name] == metrics[name]


def test_three_classes_have_no_top5(recipe, monkeypatch):
    def three(root, split, download):
        images = create_dataset('fake', root, split)
        return ImageSet(images.images.expand(-1, 3, -1, -1).contiguous(), images.labels % 3, ('a', 'b', 'c'), 16)

    monkeypatch.setitem(datasets.DATASETS, 'three', three)
    metrics = train(recipe.replace(dataset='three', eval_batch_size=7))
    assert 'top5' not in metrics and metrics['num_samples'] == 100


def test_the_probe_leaves_weights_gradients_and_random_state_alone():
    import timm

    model = timm.create_model('test_linformer_vit', in_chans=1, num_classes=10, drop_rate=0.5, head_norm=True)
    images = torch.randn(4, 1, 16, 16)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    found, seconds = choose_precision('auto', model, images, Processes(torch.device('cpu')))
    assert found in seconds and set(seconds) == {'fp32', 'bf16'}
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize('slower, sizes', [(10, {1}), (1.2, {1, 4})])
def test_the_probe_spares_the_batch_where_one_image_decides(monkeypatch, slower, sizes):
    clock, seen = [0.0], set()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, images):
            seen.add(len(images))
            clock[0] += len(images) * (slower if torch.is_autocast_enabled('cpu') else 1.0)
            return images * self.weight

    monkeypatch.setattr(precision.time, 'perf_counter', lambda: clock[0])
    found, seconds = choose_precision('auto', Model(), torch.ones(4, 3), Processes(torch.device('cpu')))
    n = max(sizes)
    assert found == 'fp32' and seen == sizes and seconds == {'fp32': n, 'bf16': pytest.approx(n * slower)}


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(recipe, monkeypatch, capsys):
    train(recipe.replace(log_every=2))
    lines = capsys.readouterr().out
    assert 'loss' in lines and 'images/s' in lines and 'min left' in lines and '\r' not in lines
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    train(recipe.replace(log_every=2, seed=1, output_dir=recipe.output_dir.with_name('tty')))
    shown = capsys.readouterr()
    assert '\r' in shown.err and 'images/s' in shown.err and 'min left' in shown.err


def test_tensorboard_holds_scalars_a_batch_and_the_recipe(recipe):
    train(recipe.replace(log_every=2))
    board = events(recipe.output_dir)
    tags = board.Tags()
    assert {
        'train/loss',
        'train/lr',
        'train/grad_norm',
        'test/top1',
        'test/top5',
        'test/loss',
        'speed/images_per_s',
    } <= set(tags['scalars'])
    assert 'train/batch' in tags['images'] and any('recipe' in t for t in tags['tensors'])
    assert [e.step for e in board.Scalars('train/loss')] == [2, 4, 6, 8]
