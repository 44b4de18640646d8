import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from runs import data_config
from timm.models import save_for_hf

from linvision.cli import evaluate
from linvision.cli.pretrained import load_model
from linvision.data import create_dataset
from linvision.train import Recipe, train
from linvision.train.export import export_model
from scripts.tools import report
from scripts.tools.softmax_regression import fit, pixels, softmax_regression

ROOT = Path(__file__).parents[1]
SHELL = ['scripts/demo.sh', 'scripts/test.sh', '.ci/run']


@pytest.fixture(scope='session')
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short, finished run on the fake data."""
    folder = tmp_path_factory.mktemp('run')
    recipe = Recipe().replace(model='test_linformer_vit', dataset='fake', output_dir=folder, epochs=1, precision='fp32')
    recipe = recipe.replace(threads=1, device='cpu')
    train(recipe)
    return folder


def test_softmax_regression_reaches_the_optimum_of_its_loss():
    images = create_dataset('fake', '', 'train').subset(torch.arange(40))
    weight, bias = fit(images, steps=200)
    logits = pixels(images) @ weight.T + bias
    loss = torch.nn.functional.cross_entropy(logits, images.labels)
    assert loss < 1e-3  # more pixels than images: separable, so that the infimum is zero


def test_softmax_regression_counts_its_parameters_and_images():
    scores = softmax_regression('fake', Path(), steps=20)
    assert scores['num_parameters'] == 16 * 16 * 10 + 10
    assert scores['num_samples'] == 100
    assert 0.9 < scores['top1'] <= 1
    assert softmax_regression('fake', Path(), steps=20)['top1'] == scores['top1']  # nothing is random


def test_a_validation_slice_keeps_the_test_set_out():
    assert softmax_regression('fake', Path(), steps=5, val_fraction=0.25)['num_samples'] == 64


def test_report_compares_both_scores_and_leaves_a_picture(finished_run):
    rows = report.report(finished_run)
    metrics = json.loads((finished_run / 'metrics.json').read_text())
    assert rows == json.loads((finished_run / 'report.json').read_text())
    assert rows['test_linformer_vit']['top1'] == metrics['top1']
    assert rows['softmax regression, raw pixels']['num_samples'] == metrics['num_samples'] == 100
    with Image.open(finished_run / 'predictions.png') as image:
        assert min(image.size) > 500
    table = report.table(rows)
    assert all(f'{100 * row["top1"]:.2f} %' in table for row in rows.values())


def test_a_picture_that_fails_costs_no_report(finished_run, monkeypatch, caplog):
    (finished_run / 'report.json').unlink(missing_ok=True)
    monkeypatch.setattr(report, 'choose', lambda right: 1 / 0)
    rows = report.report(finished_run)
    assert rows == json.loads((finished_run / 'report.json').read_text())
    (record,) = caplog.records
    assert 'no picture (ZeroDivisionError: division by zero)' in record.getMessage()


def test_report_leaves_the_images_of_its_picture_only(finished_run):
    stale = finished_run / 'images' / '99999_stale.png'
    stale.parent.mkdir(exist_ok=True)
    stale.touch()
    report.report(finished_run)
    assert not stale.exists()
    images = create_dataset('fake', '', 'test')
    saved = sorted((finished_run / 'images').glob('*.png'))
    assert len(saved) == report.COLUMNS * report.ROWS
    for path in saved:
        i = int(path.name[:5])
        with Image.open(path) as image:
            assert image.tobytes() == images.images[i].numpy().tobytes()
        assert images.classes[images.labels[i]].replace(' ', '_') in path.name


def test_report_refuses_an_unfinished_run(tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no finished run'):
        report.report(tmp_path)


def test_report_refuses_a_run_without_a_test_score(finished_run, tmp_path):
    metrics = json.loads((finished_run / 'metrics.json').read_text())
    del metrics['top1']
    (tmp_path / 'metrics.json').write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match='not scored on the test set'):
        report.report(tmp_path)


def test_the_picture_shows_wrong_ones_where_there_are_some():
    right = torch.arange(1000) % 10 != 0
    index = report.choose(right)
    assert len(set(index)) == report.COLUMNS * report.ROWS
    assert (~right[index]).sum() == report.WRONG
    assert report.choose(torch.ones(1000, dtype=torch.bool)) != index
    assert report.choose(right) == index
    assert len(report.choose(torch.tensor([True, False, True]))) == 3
    few = torch.arange(1000) < 5
    assert few[report.choose(few)].tolist() == [True] * 5 + [False] * 19


def test_overlay_is_red_above_zero_blue_below_and_clear_at_zero():
    image = torch.full((1, 1, 3), 0.5)
    red, blue, clear = report.overlay(image, torch.tensor([[[2.0, -2.0, 0.0]]]))[0, 0]
    assert red[0] > 0.8 > red[2]
    assert blue[2] > 0.8 > blue[0]
    assert clear.tolist() == [0.5, 0.5, 0.5]
    assert torch.equal(report.overlay(image, torch.zeros(1, 1, 3)), image[..., None].expand(-1, -1, -1, 3))


@pytest.mark.parametrize('script', SHELL)
def test_shell_scripts_parse_and_may_be_executed(script):
    subprocess.run(['bash', '-n', str(ROOT / script)], check=True)
    assert os.access(ROOT / script, os.X_OK)


def test_ci_runs_the_test_script_and_nothing_else():
    lines = (ROOT / '.ci/run').read_text().splitlines()
    assert [line for line in lines if line and not line.startswith('#')] == ['bash scripts/test.sh']


@pytest.mark.parametrize('script', SHELL[:2])
def test_an_old_python_is_refused_in_words(script, tmp_path):
    (tmp_path / 'scripts').mkdir()
    for file in (script, 'scripts/environment.sh'):
        shutil.copy(ROOT / file, tmp_path / 'scripts')
    old = tmp_path / 'old'
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.9\nexit 1\n')
    old.chmod(0o755)
    for tool in ('bash', 'dirname', 'sed', 'cat', 'cksum', 'id'):
        os.symlink(shutil.which(tool), tmp_path / tool)
    environment = {'PATH': str(tmp_path), 'PYTHON': str(old)}
    result = subprocess.run(
        [shutil.which('bash'), str(tmp_path / script)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert 'Python 3.11 or later is needed' in result.stderr and 'Python 3.9.9' in result.stderr


def test_demo_help_is_its_header():
    result = subprocess.run(
        ['bash', str(ROOT / 'scripts/demo.sh'), '--help'], check=True, capture_output=True, text=True
    )
    assert 'bash scripts/demo.sh' in result.stdout and 'set -euo' not in result.stdout


def test_demo_without_test_scores_is_refused_before_training():
    result = subprocess.run(['bash', str(ROOT / 'scripts/demo.sh'), '--no-test'], capture_output=True, text=True)
    assert result.returncode == 1 and 'the demo compares test scores' in result.stderr


@pytest.mark.parametrize(
    'change, message',
    [
        ({'limit': -5}, 'limit must be at least 0, got -5'),
        ({'batch_size': 0}, 'batch_size must be at least 1, got 0'),
        ({'precision': 'fp8'}, "Unknown precision 'fp8'. Nearest: fp32, fp16, bf16"),
    ],
)
def test_scoring_refuses_what_would_score_nothing(model_folder, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate.main(str(model_folder), dataset='fake', device='cpu', **change)


def test_evaluate_gives_exactly_the_score_that_training_reported(finished_run, capsys):
    metrics = json.loads((finished_run / 'metrics.json').read_text())
    evaluate.main(str(finished_run / 'model'), dataset='fake', device='cpu', as_json=True)
    found = json.loads(capsys.readouterr().out)
    for name in ('top1', 'top5', 'loss', 'num_samples', 'tokens'):
        assert found[name] == metrics[name], name


@pytest.mark.parametrize('tag', ['cifar10', 'fashion_mnist'])
def test_weights_of_the_package_know_their_data_by_their_name(tag):
    name = f'linformer_vit_pico_patch1_32.{tag}'
    metrics = evaluate.data_of(evaluate.folder_of(name))
    assert metrics['recipe']['dataset'] == tag and metrics['top1'] > 0.8


def test_a_model_of_a_hub_does_not_say_where_its_data_lies(model_folder):
    assert evaluate.folder_of('hf-hub:someone/model') is None
    assert evaluate.folder_of(f'local-dir:{model_folder}') == evaluate.folder_of(str(model_folder)) == model_folder


def test_a_model_of_classes_without_names_is_scored_on_as_many_only(tmp_path):
    save_for_hf(timm.create_model('test_linformer_vit', num_classes=5, in_chans=1), tmp_path, safe_serialization=True)
    with pytest.raises(ValueError, match='The model tells 5 classes apart, the set has 10'):
        evaluate.main(str(tmp_path), dataset='fake', device='cpu')


def test_scoring_a_folder_without_a_model_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'holds no model: config.json is missing'):
        evaluate.main(str(tmp_path), dataset='fake')


def test_contributing_names_files_that_exist():
    text = (ROOT / 'CONTRIBUTING.md').read_text()
    assert len(text.splitlines()) <= 45
    for path in re.findall(r'`((?:linvision|scripts|recipes)/[\w./]*)`', text):
        assert (ROOT / path).exists(), path


@pytest.mark.slow
def test_report_runs_as_a_module(finished_run):
    command = [sys.executable, '-m', 'scripts.tools.report', '--run', str(finished_run)]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert 'softmax regression' in out


def test_picture_of_a_coarser_token_grid_covers_the_image(tmp_path):
    images = create_dataset('fake', tmp_path, 'test').subset(torch.arange(30))
    model = timm.create_model('test_linformer_vit', in_chans=1, num_classes=10, patch_size=2)
    export_model(model, tmp_path, images, data_config(images))
    report.picture(tmp_path, load_model(tmp_path), images, 'untrained')
    assert (tmp_path / 'predictions.png').stat().st_size > 10_000
