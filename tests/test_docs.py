"""The pages of docs/ that promise to run do: every block of Python and of commands, from top to bottom."""

import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import linvision
from linvision.cli.main import main

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r'^```(python|bash)\n(.*?)^```$', re.M | re.S)


def run(page, folder, monkeypatch):
    """Run a page as if `folder` were the repository; the names that its Python leaves, and what its commands print."""
    for name in ('linvision', 'scripts', 'recipes'):
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.chdir(folder)
    environment = {**os.environ, 'PYTHONPATH': str(folder), 'OMP_NUM_THREADS': '1'}
    command = folder / 'bin' / 'linvision'  # of this checkout, whatever is installed
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m linvision "$@"\n')
    command.chmod(0o755)
    environment['PATH'] = os.pathsep.join([str(command.parent), str(Path(sys.executable).parent), environment['PATH']])
    monkeypatch.setattr(sys, 'path', sys.path[:])
    monkeypatch.setattr(sys, 'argv', ['linvision'])
    names, printed = {}, []
    blocks = BLOCK.findall((ROOT / 'docs' / page).read_text())
    assert blocks
    for kind, code in blocks:
        if kind == 'python':
            exec(compile(code, page, 'exec'), names)
        elif all(line.startswith('linvision ') for line in code.splitlines()):  # in this process: sooner
            with redirect_stdout(StringIO()) as shown:
                for line in code.splitlines():
                    main(shlex.split(line, comments=True)[1:])
            printed.append(shown.getvalue())
        else:
            done = subprocess.run(['bash', '-ec', code], env=environment, capture_output=True, text=True, timeout=400)
            assert done.returncode == 0, f'{code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}'
            printed.append(done.stdout)
    return names, printed


@pytest.mark.slow
def test_classify(tmp_path, monkeypatch, capsys):
    pytest.importorskip('onnxscript', reason='needs the [onnx] extra')
    _, printed = run('classify.md', tmp_path, monkeypatch)
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r'academic gown +5\d\.\d %', said[0]) and '4096 tokens' in said[-1]
    assert 'academic gown' in printed[0]
    assert '"largest_relative_difference"' in printed[1]
    assert (tmp_path / 'outputs/pico.onnx').is_file()


@pytest.mark.slow
def test_finetune(tmp_path, monkeypatch, capsys):
    pytest.importorskip('sklearn', reason='needs the [digits] extra')
    names, printed = run('finetune.md', tmp_path, monkeypatch)
    assert list(names['model'].pretrained_cfg['label_names']) == list('0123456789')
    assert names['model'].patch_embed.grid_size == (16, 16)
    assert '355 images' in printed[2] and 'test images of image_folder' in printed[2]


def test_pixel_features(tmp_path, monkeypatch):
    names, _ = run('pixel_features.md', tmp_path, monkeypatch)
    assert names['last'].shape == (1, 64, 32, 32) and names['maps'].shape == (1, 2, 32, 32)
    alike = np.asarray(Image.open(tmp_path / 'outputs/alike.png'))
    assert alike[196, 132] >= 254  # itself
    assert alike[160:240, 40:220].mean() > alike[10:80, 200:240].mean() + 10  # the uniform; the sky
    weights = names['weights']['blocks.0.attn.attn_drop']
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 1024))
    assert names['cam'].min() >= 0 and names['cam'].max() > 0


@pytest.mark.parametrize('page', ['concepts/projection', 'concepts/sharing', 'concepts/any_size'])
def test_pages_of_models_alone(page, tmp_path, monkeypatch):
    names, printed = run(f'{page}.md', tmp_path, monkeypatch)
    assert isinstance(names['model'], linvision.LinformerVisionTransformer) and not printed


def test_streaming(tmp_path, monkeypatch, capsys):
    run('concepts/streaming.md', tmp_path, monkeypatch)
    (difference,) = re.findall(r'tensor\((.*)\)', capsys.readouterr().out)
    assert float(difference) < 1e-4


def test_start(tmp_path, monkeypatch):
    _, (printed,) = run('index.md', tmp_path, monkeypatch)
    assert 'fashion_mnist_pixels' in printed and '1,024 tokens' in printed


@pytest.mark.slow
def test_export(tmp_path, monkeypatch):
    names, printed = run('howto/export.md', tmp_path, monkeypatch)
    assert names['model'](torch.zeros(7, 1, 32, 32)).shape == (7, 10) and '"batches"' in printed[0]
    assert names['free'](torch.zeros(7, 1, 24, 40)).shape == (7, 10) and '"at_least"' in printed[1]


def test_convert(tmp_path, monkeypatch, capsys):
    run('howto/convert.md', tmp_path, monkeypatch)
    assert capsys.readouterr().out.startswith('True ')


def test_adapters(tmp_path, monkeypatch, capsys):
    pytest.importorskip('peft', reason='needs peft')
    run('howto/adapters.md', tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert 'trainable params' in said
    assert all(float(difference) < 1e-5 for difference in re.findall(r'tensor\((.*)\)', said))


def test_decoders(tmp_path, monkeypatch, capsys):
    pytest.importorskip('segmentation_models_pytorch', reason='needs segmentation-models-pytorch')
    names, _ = run('howto/decoders.md', tmp_path, monkeypatch)
    assert 'torch.Size([2, 5, 96, 128])' in capsys.readouterr().out
    assert [m.shape[-1] for m in names['maps']] == [32, 16, 8, 4]


@pytest.mark.slow
def test_notebook(tmp_path, monkeypatch, capsys):
    """Its cells, one after the other, as a person runs them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    monkeypatch.setenv('MPLBACKEND', 'agg')
    cells = json.loads((ROOT / 'docs/start.ipynb').read_text())['cells']
    names = {}
    for cell in cells:
        if cell['cell_type'] == 'code':
            assert not cell['outputs'] and cell['execution_count'] is None
            exec(compile(''.join(cell['source']), 'start.ipynb', 'exec'), names)
    said = capsys.readouterr().out
    assert 'top-1 100.00 %' in said
    assert list(names['tuned'].pretrained_cfg['label_names']) == ['Bag', 'T-shirt', 'Trouser']
    assert (np.array(names['spectrum'].lengths(0.01)) < 64).all()


def test_every_page_that_runs_is_run():
    text = Path(__file__).read_text()
    pages = [page for page in (ROOT / 'docs').rglob('*.md') if re.search('^```python', page.read_text(), re.M)]
    names = {page.relative_to(ROOT / 'docs').with_suffix('').as_posix() for page in pages}
    # one fetches Fashion-MNIST, one shows three lines of a study, one is for torchrun and GPUs
    not_run = {'own_images', 'results', 'sequence'}
    assert [name for name in names - not_run if f'{name}.md' not in text and f"'{name}'" not in text] == []


def test_pathfinder(tmp_path, monkeypatch, capsys):
    names, _ = run('pathfinder.md', tmp_path, monkeypatch)
    assert names['image'].size == (32, 32) and names['images'].classes[names['label']] in capsys.readouterr().out


@pytest.mark.slow
def test_readme(tmp_path, monkeypatch, capsys):
    """Its Python runs as it stands, from 65,536 tokens to a converted ViT, and classifies as the command does."""
    names: dict = {}
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient('L').resize((40, 30)).save('my_photo.jpg')
    for kind, code in BLOCK.findall((ROOT / 'README.md').read_text()):
        if kind == 'python':
            exec(compile(code, 'README.md', 'exec'), names)
    assert names['logits'].shape == (1, 10) and names['maps'][0].shape == (1, 64, 256, 256)
    assert names['long'].patch_embed.num_patches == 1024
    said = capsys.readouterr().out
    main(['predict', 'linformer_vit_pico_patch1_32.cifar10', 'my_photo.jpg', '--topk', '1'])
    assert said.strip() and said.strip() in capsys.readouterr().out


def test_readme_is_read_in_two_minutes():
    assert len((ROOT / 'README.md').read_text().split()) <= 1000
