"""Every recipe shows its flags, and trains two steps on a synthetic set."""

import json
import runpy
import sys
from pathlib import Path

import pytest

RECIPES = sorted((Path(__file__).parent.parent / 'recipes').glob('*.py'))
SMALL = ['--dataset', 'fake', '--model', 'test_linformer_vit', '--precision', 'fp32', '--device', 'cpu']


def run(recipe, *flags):
    """Run a recipe as `python RECIPE FLAGS` does."""
    argv = sys.argv
    sys.argv = [str(recipe), *flags]
    try:
        runpy.run_path(str(recipe), run_name='__main__')
    finally:
        sys.argv = argv


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda p: p.stem)
def test_a_recipe_trains_by_its_command_line(recipe, tmp_path):
    stages = ['--stages', '8', '0.5', '16', '0.5', '--epochs', '0.25', '--batch-size', '32']
    run(recipe, *SMALL, *stages, '--output-dir', str(tmp_path), '--model-args', 'projection', 'linear', 'proj_len', '9')
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert metrics['steps'] == 2 and metrics['num_samples'] == 100
    config = json.loads((tmp_path / 'model' / 'config.json').read_text())
    assert config['model_args']['projection'] == 'linear' and config['model_args']['proj_len'] == 9


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda p: p.stem)
def test_help_shows_the_flags_and_the_command(recipe, capsys):
    with pytest.raises(SystemExit) as error:
        run(recipe, '--help')
    assert error.value.code == 0
    shown = capsys.readouterr().out
    assert '--stages' in shown and '--output-dir' in shown and f'recipes/{recipe.name}' in shown


def test_an_unknown_flag_lists_the_nearest(capsys):
    with pytest.raises(SystemExit) as error:
        run(RECIPES[0], '--epoch', '3')
    assert error.value.code == 2
    assert '--epochs' in capsys.readouterr().err


def test_a_mistake_is_one_line_and_no_traceback(tmp_path):
    with pytest.raises(SystemExit) as error:
        run(RECIPES[0], *SMALL, '--output-dir', str(tmp_path), '--model-args', 'projektion', 'linear')
    assert str(error.value.code).startswith("error: Unknown model argument 'projektion'. Nearest: projection")
