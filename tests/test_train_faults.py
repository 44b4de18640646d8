"""Faults that the engine once had: each test states the fact that is wanted."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import assert_stops_change_nothing, save_folder, small, weights
from torch import nn

from linvision.data import create_dataset
from linvision.data.loader_batches import SIGNALS
from linvision.train import main as train_by_flags
from linvision.train import train
from linvision.train.loop import TrainingRun
from linvision.train.main import Interrupt, main


@pytest.fixture
def recipe(small_recipe):
    return small_recipe.replace(epochs=1.25, lr=3e-3)


@pytest.mark.parametrize(
    'change', [{'opt_args': {'betas': (0.9, 0.95)}}, {'model_args': {'proj_len': (9, 16, 4), 'sharing': 'key_value'}}]
)
def test_a_finished_run_with_a_tuple_among_its_arguments_is_recognised(recipe, change):
    recipe = recipe.replace(epochs=0.25, test=False, **change)
    assert json.loads(json.dumps(train(recipe))) == train(recipe)


@pytest.mark.slow
def test_an_interruption_at_a_rounded_stage_boundary_changes_nothing(recipe, tmp_path):
    stages = ((8, 0.1), (12, 0.2), (16, 0.7))  # 0.1 + 0.2 > 3 / 10 in floating point; 10 steps in all
    assert_stops_change_nothing(recipe.replace(stages=stages), tmp_path / 'parts', 3)


def test_an_odd_batch_for_mixing_is_a_value_error(recipe):
    with pytest.raises(ValueError, match='even'):
        train(recipe.replace(mixup=0.2, batch_size=31))


def test_a_validation_slice_of_everything_is_a_value_error(recipe):
    with pytest.raises(ValueError, match='val_fraction'):
        train(recipe.replace(val_fraction=1.0))


def test_epochs_that_are_no_number_are_named(recipe):
    with pytest.raises(ValueError, match='epochs'):
        train(recipe.replace(epochs=float('nan')))


def test_arguments_that_json_cannot_hold_are_refused_before_training(recipe):
    with pytest.raises((ValueError, TypeError)):
        train(recipe.replace(model_args={'norm_layer': nn.LayerNorm}))
    assert not (recipe.run.output_dir / 'checkpoints').exists()


def test_the_same_max_steps_again_takes_no_further_step(recipe):
    for _ in range(2):
        train(recipe.replace(max_steps=3))
    assert sorted(os.listdir(recipe.run.output_dir / 'checkpoints')) == ['step_00000003']


def test_a_checkpoint_never_holds_weights_that_are_not_finite(recipe, monkeypatch):
    """A finite loss with a gradient that is not: the update spoils the weights, the next checkpoint keeps them."""

    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float('nan')

    import linvision.models.linformer_vit as network

    forward = network.LinformerVisionTransformer.forward_features
    spoilt = lambda self, x, *a, **k: Bad.apply(forward(self, x))  # noqa: E731
    monkeypatch.setattr(network.LinformerVisionTransformer, 'forward_features', spoilt)
    with pytest.raises(FloatingPointError):
        train(recipe.replace(checkpoint_every=1))
    for path in (recipe.run.output_dir / 'checkpoints').glob('step_*'):
        state = torch.load(path / 'state.pt', weights_only=True)
        assert all(v.isfinite().all() for v in state['learner']['model'].values())


def test_scores_of_a_diverged_last_step_are_not_reported_as_a_result(recipe, monkeypatch):
    """metrics.json must stay JSON: NaN is none."""
    with pytest.raises(FloatingPointError):
        train(recipe.replace(epochs=0.25, warmup=0.0, sched='constant', opt='sgd', clip_grad=0.0, lr=1e38))
    assert not (recipe.run.output_dir / 'metrics.json').exists()


@pytest.mark.parametrize(
    'change, message',
    [
        ({'threads': -1}, 'threads must be at least 0 and at most 1,024, got -1'),
        (
            {'stages': ((0, 0.5), (16, 0.5))},
            r'sizes of the stages must be at least 1 and at most 65,536, got \[0, 16\]',
        ),
        ({'model': 'resnet18'}, r'resnet18 .* its image size cannot be set.*linformer_vit_'),
        ({'model': 'swin_tiny_patch4_window7_224'}, 'swin_tiny.* no plain vision transformer, and has no blocks'),
        (
            {'model': 'naflexvit_base_patch16_gap'},
            'naflexvit_base.* no plain vision transformer, and has no patch_embed',
        ),
        ({'model_args': {'checkpoint_path': 'nowhere.pt'}}, 'nowhere.pt does not exist: a file with weights'),
        ({'stages': ((8, 0.5), (16, math.nan))}, r'shares of the stages must be positive.*nan'),
        ({'stages': ((8, math.nan), (16, math.nan))}, r'shares of the stages must be positive.*nan'),
        ({'epochs': float('inf')}, 'epochs must be a finite number.*got inf'),
        *[({'lr': float('inf'), 'dry_run': dry}, 'lr must be a finite number') for dry in (False, True)],
        ({'lr': 1e300}, r'lr must be a finite number of at most 1e\+38 in size, got 1e\+300'),
        ({'cutmix': float('inf')}, 'cutmix must be a finite number'),
        ({'stages': ((10**9, 1.0),)}, r'stages must be at least 1 and at most 65,536, got \[1000000000\]'),
        ({'img_size': 10**9}, 'img_size must be at least 0 and at most 65,536, got 1000000000'),
        (
            {'dataset_args': {'img_size': 10**9}},
            'img_size must be a positive integer of at most 65,536',
        ),
        ({'model_args': {'depth': 10**30}}, 'depth must be a positive integer of at most 10,000, got 10'),
        ({'seed': 2**64}, 'seed must be at least 0 and at most 9,223,372,036,854,775,807, got 18446744073709551616'),
        ({'threads': 100_000}, 'threads must be at least 0 and at most 1,024, got 100000'),
        ({'batch_size': 1.5}, 'batch_size must be a whole number'),
        ({'test': 'no'}, "test must be True or False, got 'no'"),
        ({'crop_mode': 'centre'}, "Unknown crop_mode 'centre'. Nearest: center"),
        ({'chunk_size': -1}, "chunk_size must be 'auto'.*got -1"),
        ({'opt_args': {'eps': float('nan')}}, 'eps must be a finite number'),
        ({'opt_args': {'eps': 'x'}}, "eps must be a finite number .*got 'x'"),
        ({'opt': 'muon', 'opt_args': {'betas': -1}}, r'betas must be 2 numbers, as \(0.9, 0.95\), .*got -1'),
        ({'opt': 'muon', 'opt_args': {'betas': [0.9]}}, r'betas must be 2 numbers, as .*got \[0.9\]'),
        ({'opt': 'muon', 'opt_args': {'ns_steps': 2.5}}, 'ns_steps must be a whole number .*got 2.5'),
        ({'opt': 'muon', 'opt_args': {'nesterov': 2}}, 'nesterov must be True or False, got 2'),
        ({'dataset_args': {'num_classes': 0}}, 'num_classes must be a positive integer .*got 0'),
        ({'model_args': {'num_heads': 0}}, 'num_heads must be a positive integer .*got 0'),
        ({'opt': 'muon', 'opt_args': {'nestrov': True}}, "'nestrov'. Nearest: nesterov"),
        ({'precision': 'fp8'}, "Unknown precision 'fp8'. Nearest: fp32, fp16, auto, bf16"),
    ],
)
def test_settings_that_cannot_be_trained_are_named(recipe, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(recipe.replace(**change))


def test_a_run_that_is_interrupted_saves_its_last_step_and_ends_with_the_same_weights(recipe, tmp_path):
    recipe = recipe.replace(test=False)
    train(recipe)
    parts = recipe.replace(output_dir=tmp_path / 'parts')
    asked = iter([False, False, True])
    assert train(parts, lambda: next(asked)) == {}
    assert os.listdir(parts.run.output_dir / 'checkpoints') == ['step_00000003']
    train(parts)
    whole, resumed = weights(recipe.run.output_dir), weights(parts.run.output_dir)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_within_a_step_ends_a_run_with_that_step(number, recipe, monkeypatch, handlers):
    step = TrainingRun.step

    def signalled(self, *args):
        if self.progress.step == 2:
            os.kill(os.getpid(), number)
        return step(self, *args)

    monkeypatch.setattr(TrainingRun, 'step', signalled)
    monkeypatch.setattr(sys, 'argv', ['recipe.py'])
    with pytest.raises(SystemExit) as end:
        main(recipe)
    assert end.value.code == 128 + number
    assert os.listdir(recipe.run.output_dir / 'checkpoints') == ['step_00000003']


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_a_signal_ends_a_command_with_a_checkpoint(number, tmp_path):
    recipe = Path(__file__).parents[1] / 'recipes/fashion_mnist_pixels.py'
    flags = ['--model', 'test_linformer_vit', '--dataset', 'fake', '--stages', '16', '1', '--epochs', '100000']
    command = [sys.executable, str(recipe), *flags, '--output-dir', str(tmp_path), '--device', 'cpu']
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not run.stdout.readline().startswith('step '):
        assert run.poll() is None, run.stderr.read()
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + number and 'Traceback' not in errors
    assert len(list((tmp_path / 'checkpoints').glob('step_*'))) >= 1


@pytest.fixture
def handlers():
    """What handles signals is put back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, *SIGNALS)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which `nohup` has pytest ignore
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def at_step(monkeypatch, step, act):
    """Do something before a step of a run."""
    original, steps = TrainingRun.step, []

    def stepping(self, *args):
        steps.append(1)
        if len(steps) == step:
            act()
        return original(self, *args)

    monkeypatch.setattr(TrainingRun, 'step', stepping)


@pytest.mark.parametrize('number', SIGNALS, ids=lambda number: number.name)
def test_signals_of_clusters_and_of_a_closed_terminal_save_a_checkpoint(recipe, number, monkeypatch, handlers):
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), number))
    assert train(recipe, Interrupt()) == {}
    assert os.listdir(recipe.run.output_dir / 'checkpoints') == ['step_00000003']


def test_nohup_is_heeded(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt = Interrupt()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not interrupt() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


class Gone(io.StringIO):
    """A terminal that was closed."""

    def write(self, words):
        raise OSError(5, 'Input/output error')

    def flush(self):
        raise OSError(5, 'Input/output error')


def test_a_run_whose_terminal_is_gone_saves_its_checkpoint_and_goes_on_to_its_score(recipe, monkeypatch, handlers):
    with open(os.devnull, 'w') as nowhere:
        gone = Gone()
        gone.fileno = nowhere.fileno
        monkeypatch.setattr(sys, 'stdout', gone)
        interrupt = Interrupt()

        def hang_up():
            with monkeypatch.context() as patch:
                patch.setattr(os, 'write', lambda number, words: gone.write(words))
                interrupt.note(signal.SIGHUP, None)

        at_step(monkeypatch, 3, hang_up)
        assert train(recipe, interrupt) == {}
        assert os.listdir(recipe.run.output_dir / 'checkpoints') == ['step_00000003']
        assert 'top1' in train(recipe)


def files(folder):
    """A run on image files that two workers read."""
    save_folder(create_dataset('fake', '', 'train', img_size=16, num_classes=2).subset(torch.arange(20)), folder / 'x')
    return small(folder / 'run', dataset='image_folder', data_dir=folder / 'x', stages=(), batch_size=8, workers=2)


def test_a_second_ctrl_c_is_a_sentence(tmp_path, monkeypatch, handlers, capfd):
    at_step(monkeypatch, 2, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    monkeypatch.setattr(sys.modules['linvision.train.main'], 'read_flags', lambda recipe, *words: recipe)
    with pytest.raises(SystemExit) as end:
        train_by_flags(files(tmp_path))
    errors = capfd.readouterr().err
    assert end.value.code == 130 and 'stopped at once' in errors and 'Traceback' not in errors


def test_a_worker_whose_images_are_all_gone_says_so_in_a_sentence(tmp_path, monkeypatch):
    recipe = files(tmp_path).replace(on_bad_image='skip', epochs=9)
    at_step(monkeypatch, 1, lambda: shutil.rmtree(recipe.data.data_dir))
    with pytest.raises(
        OSError, match=r'^No image of the set can be read. The first: /.*/x/bar .*\(FileNotFoundError\).$'
    ):
        train(recipe)


def test_a_run_without_a_test_is_scored_by_the_same_command_with_one(recipe):
    first = train(recipe.replace(test=False, val_fraction=0.25, epochs=0.4))
    assert 'top1' not in first and first['val_num_samples'] == 64
    before = weights(recipe.run.output_dir)
    scored = train(recipe.replace(val_fraction=0.25, epochs=0.4))
    assert (
        scored['num_samples'] == 100 and scored['val_loss'] == first['val_loss'] and scored['steps'] == first['steps']
    )
    assert all(torch.equal(before[name], value) for name, value in weights(recipe.run.output_dir).items())


@pytest.mark.parametrize('change, words', [
    ({'stages': ((8, 0.4), (13, 0.2), (16, 0.4)), 'model': 'linformer_vit_pico_patch2_32'}, 'multiple of the patch'),
    ({'val_fraction': 0.001}, 'val_fraction 0.001 of 256 training images is none: say --val-fraction 0.0039 or more'),
])  # fmt: skip
def test_what_cannot_be_reached_is_said_before_the_first_step(recipe, change, words):
    with pytest.raises(ValueError, match=words):
        train(recipe.replace(**change))
    assert not list(recipe.run.output_dir.glob('checkpoints/*'))


def test_scores_that_will_not_come_are_announced(recipe, capsys):
    train(recipe.replace(eval_every=0.5, max_steps=1))
    assert 'no scores on the way: --eval-every needs a --val-fraction' in capsys.readouterr().out


def test_a_teacher_of_other_classes_is_refused(recipe, model_folder):
    recipe = recipe.replace(stages=(), teacher=str(model_folder), test=False, max_steps=1)
    train(recipe)
    with pytest.raises(ValueError, match='tells 10 classes apart, the student 5.*Fine-tune the teacher'):
        train(recipe.replace(dataset_args={'num_classes': 5}, fresh=True))
    config = json.loads((model_folder / 'config.json').read_text())
    names = config['label_names'][::-1]
    turned = recipe.run.output_dir / 'turned'
    shutil.copytree(model_folder, turned)
    (turned / 'config.json').write_text(json.dumps({**config, 'label_names': names}))
    with pytest.raises(ValueError, match="the student 10: .'bar 9', "):
        train(recipe.replace(teacher=str(turned), output_dir=recipe.run.output_dir / 'other'))
