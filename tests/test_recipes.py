"""Every recipe shows its flags, and trains two steps on a synthetic set."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from runs import slow_but

OWN_LOOP = 'segment_pixels'  # with a test of its own
FILES = sorted((Path(__file__).parent.parent / 'recipes').glob('*.py'))
RECIPES = [p for p in FILES if p.stem not in ('__init__', OWN_LOOP)]
NAMES = {
    'fashion_mnist_pixels',
    'cifar10_pixels',
    'cifar10_pixels_pico',
    'cifar10_patch2',
    'cifar100_pixels',
    'imagenette_patch4',
    'tiny_imagenet_pico',
    'imagenet_patch16',
    'imagenet_patch4',
    'imagenet_pixels',
    'imagenet_patch4_1024',
    'image_folder',
    'finetune',
    'distill_from_vit',
    'fashion_mnist_vit',
    'masked_pixels',
    'pathfinder_1k',
    'pathfinder_1k_pico',
    'pathfinder_4k',
    'pathfinder_16k',
    'pathfinder_65k',
}
SMALL = ['--dataset', 'fake', '--dataset-args', 'in_chans', '3', '--model', 'test_linformer_vit']
SMALL += ['--init', '', '--teacher', '']
SMALL += ['--precision', 'fp32', '--device', 'cpu', '--workers', '0', '--threads', '1']
SHORT = ['--stages', '8', '0.5', '16', '0.5', '--max-minutes', '0', '--epochs', '0.25']
SHORT += ['--batch-size', '32', '--accumulate', '1']


def run(recipe, *flags):
    """Run a recipe as `python RECIPE FLAGS` does."""
    argv = sys.argv
    sys.argv = [str(recipe), *flags]
    try:
        runpy.run_path(str(recipe), run_name='__main__')
    finally:
        sys.argv = argv


def test_every_recipe_is_here():
    assert {path.stem for path in RECIPES} == NAMES


@pytest.mark.parametrize('recipe', [p for p in RECIPES if 'pathfinder' not in p.stem], ids=lambda p: p.stem)
def test_a_recipe_trains_by_its_command_line(recipe, tmp_path):
    model = ['--model-args', 'projection', 'linear', 'proj_len', '9']
    run(recipe, *SMALL, *SHORT, *model, '--no-test', '--val-fraction', '0', '--output-dir', str(tmp_path))
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert metrics['steps'] == 2
    config = json.loads((tmp_path / 'model' / 'config.json').read_text())
    assert config['model_args']['projection'] == 'linear' and config['model_args']['proj_len'] == 9
    assert metrics['classes'] == config['label_names'] == [f'bar {i}' for i in range(10)]


@pytest.mark.parametrize('name', slow_but(['pathfinder_1k'], [name for name in sorted(NAMES) if 'pathfinder' in name]))
def test_a_pathfinder_recipe_trains_on_pathfinder(name, tmp_path):
    recipe = next(path for path in RECIPES if path.stem == name)
    data = ['--data-dir', str(tmp_path / 'data'), '--dataset-args', 'img_size', '32', 'num_images', '128']
    model = [*SMALL[SMALL.index('--model') :], '--batch-size', '32', '--epochs', '0.5', '--max-minutes', '0']
    run(recipe, *data, *model, '--output-dir', str(tmp_path / 'run'))
    metrics = json.loads((tmp_path / 'run' / 'metrics.json').read_text())
    assert metrics['steps'] == 2 and metrics['num_samples'] == 16
    assert metrics['classes'] == ['two paths', 'one path']
    made = np.load(next((tmp_path / 'data' / 'pathfinder').glob('*train*/made.npy')))
    assert made[:128].all() and not made[128:].any()  # kept for the next epoch


@pytest.mark.slow
@pytest.mark.parametrize('name', ['cifar10_patch2', 'imagenet_patch4', 'masked_pixels'])
def test_a_recipe_trains_in_two_processes_by_torchrun(name, tmp_path):
    recipe = next(path for path in RECIPES if path.stem == name)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    flags = [*SMALL, *SHORT, '--val-fraction', '0', '--output-dir', str(tmp_path)]
    subprocess.run([*command, str(recipe), *flags], check=True, capture_output=True, timeout=240)
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert metrics['processes'] == 2 and metrics['steps'] == 2 and metrics['num_samples'] == 100


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda p: p.stem)
def test_help_shows_the_flags_and_the_command(recipe, capsys):
    with pytest.raises(SystemExit) as error:
        run(recipe, '--help')
    assert error.value.code == 0
    shown = capsys.readouterr().out
    assert '--stages' in shown and '--output-dir' in shown and f'linvision train {recipe.stem}' in shown


def test_an_unknown_flag_lists_the_nearest(capsys):
    with pytest.raises(SystemExit) as error:
        run(RECIPES[0], '--epoch', '3')
    assert error.value.code == 2
    assert '--epochs' in capsys.readouterr().err


def test_a_mistake_is_one_line_and_no_traceback(tmp_path):
    with pytest.raises(SystemExit) as error:
        run(RECIPES[0], *SMALL, *SHORT, '--output-dir', str(tmp_path), '--model-args', 'projektion', 'linear')
    assert error.value.code == 2
    assert str(error.value).startswith("error: Unknown model argument 'projektion'. Nearest: projection")
