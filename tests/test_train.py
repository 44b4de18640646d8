"""The engine on a small synthetic set: it learns, resumes to the bit, exports what it scored, and refuses bad input."""

import json
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from runs import CPU, assert_stops_change_nothing, small, weights
from timm.optim import muon as timm_muon
from timm.optim.muon import zeropower_via_newtonschulz

from linvision.data import create_batches, create_dataset
from linvision.data.preparation import Preparation
from linvision.train import Recipe, train
from linvision.train.board import Board
from linvision.train.checkpoint import check_same_run, newest_checkpoint, read_state
from linvision.train.evaluate import evaluate
from linvision.train.optimizer import create_optimizer, create_schedule, step_in_stacks


def short(folder: Path) -> Recipe:
    """16 steps, 8 in each stage."""
    return small(folder, epochs=2, opt='muon', lr=0.01, hflip=0.5, shift=1, checkpoint_every=10)


@pytest.fixture
def recipe(tmp_path):
    return short(tmp_path / 'run')


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A finished run with a moving average, and what it returned."""
    recipe = short(tmp_path_factory.mktemp('finished') / 'run').replace(ema_decay=0.9)
    return recipe, train(recipe)


def test_training_learns_and_writes_everything(recipe):
    metrics = train(recipe.replace(epochs=12, val_fraction=0.25, shift=0))
    assert metrics['top1'] > 0.6  # chance is 0.1
    assert metrics['num_samples'] == 100 and metrics['val_num_samples'] == 64
    assert metrics['images_seen'] == 12 * (192 // 32) * 32
    assert json.loads((recipe.run.output_dir / 'metrics.json').read_text()) == metrics
    assert list((recipe.run.output_dir / 'tensorboard').glob('events.*'))


def test_exported_model_gives_the_reported_score_and_the_same_logits(finished):
    recipe, metrics = finished
    model = timm.create_model(f'local-dir:{recipe.run.output_dir}/model', pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    batches = create_batches(create_dataset('fake', '.', 'test'), 100, config['mean'], config['std'], CPU)
    scores = evaluate(model, batches, 16)
    assert scores['top1'] == metrics['top1'] and scores['loss'] == pytest.approx(metrics['loss'], rel=1e-6)
    assert model.pretrained_cfg['label_names'] == metrics['classes']


@pytest.mark.slow  # the run of tests/test_train_facts.py has all of this, and draws dropout and mixtures besides
def test_an_interrupted_run_ends_with_the_same_weights_to_the_bit(recipe, tmp_path):
    assert_stops_change_nothing(recipe, tmp_path / 'parts', 3, 11)  # within the first stage, and within the second


def test_projection_and_positions_keep_training_after_the_boundary(recipe):
    recipe = recipe.replace(model_args={'pos_embed': 'separable'}, test=False)
    train(recipe.replace(max_steps=9))
    state = read_state(newest_checkpoint(recipe.run.output_dir / 'checkpoints'))
    before = {k: v.clone() for k, v in state['learner']['model'].items()}
    assert state['progress']['stage'] == 1 and before['projection.weights.0'].shape == (4, 16)
    train(recipe)
    after = weights(recipe.run.output_dir)
    for name in ('projection.weights.0', 'projection.weights.1', 'position.row', 'position.column'):
        assert (after[name] - before[name]).abs().max() > 1e-4


def test_a_finished_run_is_reported_and_not_trained_again(finished, capsys):
    recipe, metrics = finished
    changed = (recipe.run.output_dir / 'model' / 'model.safetensors').stat().st_mtime_ns
    assert train(recipe) == metrics
    assert 'finished' in capsys.readouterr().out
    assert (recipe.run.output_dir / 'model' / 'model.safetensors').stat().st_mtime_ns == changed


def test_muon_leaves_projection_embedding_and_head_to_its_fallback(recipe):
    model = timm.create_model('test_linformer_vit', in_chans=1, num_classes=10)
    names = {id(p): n for n, p in model.named_parameters()}
    optimizer = create_optimizer(recipe.optim, model)
    fallback = {names[id(p)] for g in optimizer.param_groups if g.get('use_fallback') for p in g['params']}
    assert {n for n in names.values() if n.startswith(('projection', 'position', 'patch_embed', 'head'))} <= fallback
    assert 'blocks.0.attn.qkv.weight' not in fallback
    decayed = {names[id(p)] for g in optimizer.param_groups if g['weight_decay'] > 0 for p in g['params']}
    assert not any(n.startswith(('projection', 'position')) for n in decayed)


def test_muon_on_a_cpu_steps_as_in_float64_and_not_as_in_bf16(recipe, monkeypatch):
    def step(precision):
        torch.manual_seed(0)
        model = timm.create_model('test_linformer_vit', in_chans=1, num_classes=10)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        before = model.blocks[0].attn.qkv.weight.clone()
        create_optimizer(recipe.replace(lr=1.0, weight_decay=0.0).optim, model, precision).step()
        return (model.blocks[0].attn.qkv.weight - before).detach()

    ours, theirs = step('fp32'), step('bf16')
    assert timm_muon.zeropower_via_newtonschulz is zeropower_via_newtonschulz  # of other optimizers
    exact = partial(zeropower_via_newtonschulz, dtype=torch.float64)
    monkeypatch.setattr(timm_muon, 'zeropower_via_newtonschulz', lambda *args, **kwargs: exact(*args, **kwargs).float())
    exact_step = step('bf16')
    torch.testing.assert_close(ours, exact_step, rtol=1e-4, atol=1e-5)
    assert (theirs - exact_step).abs().max() > 1e-3


@pytest.mark.parametrize(
    'arguments',
    [{}, {'nesterov': True}, {'scale_eps': True, 'adjust_lr_fn': 'original', 'ns_steps': 3}, {'algo': 'adamuon'}],
    ids=str,
)
def test_muon_in_stacks_steps_as_timms_own(recipe, arguments):
    """In bf16, whose products the kernels of stacks may round otherwise, and to rounding in fp32."""
    shapes = [(24, 8), (8, 8), (24, 8), (8, 8), (8, 24), (24, 8), (4, 2, 3, 3), (4, 2, 3, 3), (8,)]
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
        weights = [[torch.nn.Parameter(w.clone()) for w in map(torch.randn, shapes)] for _ in range(2)]
        weights[1] = [torch.nn.Parameter(w.detach().clone()) for w in weights[0]]
        theirs, ours = (timm_muon.Muon(w, lr=0.1, weight_decay=0.1, **arguments) for w in weights)
        step_in_stacks(ours, dtype == torch.float32)
        if dtype == torch.float32:  # timm's own, in fp32 too
            name, exact = 'zeropower_via_newtonschulz', partial(zeropower_via_newtonschulz, dtype=dtype)
            theirs.register_step_pre_hook(lambda *_, name=name, exact=exact: setattr(timm_muon, name, exact))
            theirs.register_step_post_hook(lambda *_, name=name: setattr(timm_muon, name, zeropower_via_newtonschulz))
        for _ in range(3):
            for one, other in zip(*weights, strict=True):
                one.grad = torch.randn_like(one)
                other.grad = one.grad.clone()
            theirs.step()
            ours.step()
            assert timm_muon.muon.__module__ == 'timm.optim.muon'
        for one, other in zip(*weights, strict=True):
            torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance)


def test_schedule_rises_to_the_rate_and_falls_to_zero(recipe):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = create_schedule(recipe.replace(warmup=0.1).optim, optimizer, 100)
    rates = []
    for t in range(100):
        schedule.step(t)
        rates.append(optimizer.param_groups[0]['lr'])
    assert rates[0] == 0 and rates[5] == pytest.approx(0.25) and max(rates) == pytest.approx(0.5, rel=0.03)
    assert rates[-1] < 0.001


def test_mixing_trains(recipe):
    metrics = train(recipe.replace(mixup=0.2, cutmix=0.2, epochs=0.5))
    assert 0 < metrics['loss'] < 10


def test_minutes_replace_epochs(recipe):
    metrics = train(recipe.replace(max_minutes=0.01, epochs=1000))
    assert metrics['schedule'] == 'minutes' and 0.01 <= metrics['train_minutes'] < 0.2


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(recipe, monkeypatch):
    train(recipe.replace(max_steps=3))
    kept = {p.name for p in (recipe.run.output_dir / 'checkpoints').iterdir()}
    monkeypatch.setattr(Preparation, 'plain', lambda self, images, size: images[:, :, :8, :8] * float('nan'))
    with pytest.raises(FloatingPointError, match='not finite in step 3'):
        train(recipe)
    assert {p.name for p in (recipe.run.output_dir / 'checkpoints').iterdir()} == kept


def test_other_settings_in_the_folder_are_refused(recipe):
    train(recipe.replace(max_steps=1))
    words = r'of other settings.* --init .*/run --output-dir OTHER. Nothing was changed.\n  lr: 0.01 there, 0.02 now$'
    with pytest.raises(ValueError, match=words):
        train(recipe.replace(lr=0.02))


def test_the_last_line_of_a_run_says_where_its_model_is_and_what_to_do_with_it(recipe, capsys):
    folder = recipe.run.output_dir
    train(recipe.replace(epochs=0.25, stages=()))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f'model: {folder}/model; linvision predict {folder} IMAGE'


@pytest.mark.parametrize('speed, words', [(0.44, ' 0.4 images/s'), (9.96, ' 10 images/s'), (123.4, ' 123 images/s')])
def test_slow_training_has_a_digit_more(recipe, speed, words, tmp_path, capsys):
    board = Board(tmp_path / 'board', recipe, 0)
    scalars = {'train/loss': 1.0, 'train/lr': 0.1, 'speed/images_per_s': speed, 'speed/waiting_for_data': 0.0}
    board.log(1, 0.5, scalars, 1.0)
    board.close()
    assert words in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_refused(recipe, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='cannot be written'):
        train(recipe.replace(output_dir=tmp_path / 'file' / 'run'))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'model': 'linformer_vit_pico_patch1_23'}, 'linformer_vit_pico_patch1_32'),
        ({'dataset': 'fashion_mnsit'}, 'fashion_mnist'),
        ({'opt': 'moun'}, 'muon'),
        ({'sched': 'cosin'}, 'cosine'),
        ({'precision': 'bf61'}, 'bf16'),
        ({'epochs': 0}, 'epochs must be above 0'),
        ({'batch_size': 0}, 'batch_size must be at least 1'),
        ({'lr': float('nan')}, 'lr must be a finite number of at most 1e[+]38 in size, got nan'),
        ({'hflip': 1.5}, 'hflip must lie between 0 and 1'),
        ({'stages': ((8, 0.5), (16, 0.6))}, 'sum to 1'),
        ({'batch_size': 257}, 'larger than the training set of 256'),
        ({'device': 'gpu0'}, 'cannot be used here'),
    ],
)
def test_recipe_errors_say_what_was_wanted(recipe, change, message):
    with pytest.raises(ValueError, match=message):
        train(recipe.replace(**change))


def test_a_run_that_is_older_than_a_setting_goes_on_with_the_default_of_it():
    recipe = Recipe().to_dict() | {'processes': 1}
    older = {name: value for name, value in recipe.items() if name not in ('layer_decay', 'native_sizes')}
    check_same_run(Path(), recipe, older)
    with pytest.raises(ValueError, match=r'layer_decay: 1\.0 there, 0\.5 now'):
        check_same_run(Path(), recipe | {'layer_decay': 0.5}, older)
