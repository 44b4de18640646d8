"""The wheel works where the repository is not: built, installed into an empty environment, and run by its command."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PACKED = ['linvision', 'recipes', 'pyproject.toml', 'README.md', 'LICENSE']
MODEL = 'linformer_vit_pico_patch1_32.fashion_mnist'

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def linvision(tmp_path_factory):
    """Calls the installed command with some words in a folder of its own, and gives what it printed."""
    folder = tmp_path_factory.mktemp('wheel')
    environment = {k: v for k, v in os.environ.items() if not k.startswith('PYTHON')} | {'OMP_NUM_THREADS': '1'}

    def run(*command):
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, f'{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}'
        return done.stdout

    for name in PACKED:
        source, target = ROOT / name, folder / 'source' / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns('__pycache__'))
        else:
            shutil.copy(source, target)
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '--quiet']
    run(*pip, 'wheel', '--no-deps', '--no-build-isolation', '--no-index', '--wheel-dir', '.', './source')
    shutil.rmtree(folder / 'source')
    (wheel,) = folder.glob('*.whl')

    venv.create(folder / 'env', with_pip=False)
    python = folder / 'env/bin/python'
    site = Path(run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip())
    # this environment's packages, without what it installs in development: a path in a file is not searched for more
    (site / 'dependencies.pth').write_text(sysconfig.get_path('purelib'))
    run(*pip, '--python', str(python), 'install', '--no-deps', '--no-index', '--ignore-installed', str(wheel))
    place = run(python, '-c', 'import linvision; print(linvision.__file__)')
    assert place.startswith(str(site))
    return lambda *words: run(folder / 'env/bin/linvision', *words)


def test_train_evaluate_and_predict(linvision, tmp_path):
    flags = ['--dataset', 'fake', '--max-minutes', '0', '--epochs', '0.25', '--stages', '16', '1', '--device', 'cpu']
    said = linvision('train', 'fashion_mnist_pixels', *flags, '--output-dir', tmp_path / 'run')
    assert 'test: top-1' in said
    lines = linvision('evaluate', tmp_path / 'run', '--json').splitlines()
    (scores,) = [json.loads(line) for line in lines if line[0] == '{']
    assert scores['num_samples'] == 100
    assert scores['top1'] == json.loads((tmp_path / 'run/metrics.json').read_text())['top1']

    Image.new('L', (28, 28)).save(tmp_path / 'black.png')
    assert 'black.png' in linvision('predict', tmp_path / 'run', tmp_path / 'black.png')
    assert 'black.png' in linvision('predict', MODEL, tmp_path / 'black.png')  # the weights are in it


def test_recipes_and_models_are_listed(linvision):
    recipes = {path.stem for path in (ROOT / 'recipes').glob('*.py')} - {'__init__'}
    assert recipes <= set(linvision('train', '--list').split())
    assert 'linformer_vit_large_patch16_224' in linvision('models')
