"""A campaign of odd settings, images, checkpoints, folders and command lines: each ends well, or in a sentence.

Slow. The seed is printed and is another one at each run; `CAMPAIGN_SEED=N` repeats one, `CAMPAIGN_BUDGET=10` tries ten
times as many. To end well is to give a result, or to end as `guard.py` ends a mistake.
"""

import json
import math
import os
import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from runs import small

from linvision.cli.main import main
from linvision.cli.pretrained import load_model
from linvision.guard import Mistake, guarded
from linvision.models.checks import CHOICES, LAYERS, RULES
from linvision.models.projection import SHARING
from linvision.models.projection_kinds import PROJECTIONS
from linvision.train import train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]  # odd images make PIL warn
SEED = int(os.environ.get('CAMPAIGN_SEED', random.SystemRandom().getrandbits(32)))
BUDGET = float(os.environ.get('CAMPAIGN_BUDGET', 1))
ODD = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    0.5,
    -0.5,
    1.5,
    math.nan,
    math.inf,
    10**30,
    '',
    'x',
    '1',
    (),
    (1,),
    (2, 3),
    [4],
]


def campaign(cases: int, **strategies):
    """A test over so many drawn cases."""
    budget = settings(
        max_examples=max(1, round(cases * BUDGET)),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    return lambda test: seed(SEED)(budget(given(**strategies)(test)))


@pytest.fixture(autouse=True)
def printed_seed(capsys):
    with capsys.disabled():
        print(f'\n[campaign seed {SEED}] ', end='')


def ends_well(words: list[str]) -> bool:
    """Whether a command gives its result; or it ends in a sentence."""
    try:
        main(words)
    except Mistake as end:
        assert len(str(end)) > len('error: .'), words
        return False
    except SystemExit as end:  # of tyro, for a flag that it does not know or cannot read
        assert end.code in (0, 2), (words, end.code)
        return end.code == 0
    return True


# ------------------------------------------------------------------------------------------------------------- models

LEGAL = {
    'img_size': [4, 8, (8, 4), (16, 1)],
    'patch_size': [1, 2, (2, 1)],
    'embed_dim': [8, 12],
    'depth': [1, 2],
    'num_heads': [1, 2, 4],
    'proj_len': [1, 5, 64],
    'local_size': [0, 1, 3],
    'local_grid': [0, 4, (2, 3)],
    'in_chans': [1, 3],
    'num_classes': [0, 5],
    'chunk_size': ['auto', 0, 3, 10**9],
    'reg_tokens': [0, 2],
    'mlp_ratio': [0.25, 1.5, 4],
    'dtype': [torch.float32],
    'device': ['cpu'],
}
FLAGS = ('class_token', 'row_norm', 'token_norm', 'head_norm', 'dynamic_img_size', 'qk_norm', 'pre_norm', 'final_norm')
ARGUMENTS = sorted({*LEGAL, *RULES, *CHOICES, *LAYERS, *FLAGS, 'projection', 'sharing', 'no_embed_class', 'qkv_bias'})


def values(name: str) -> st.SearchStrategy:
    """Values of an argument: three in four legal ones, where they are known, else odd ones."""
    known = LEGAL.get(name) or CHOICES.get(name) or LAYERS.get(name)
    known = known or {'projection': [*PROJECTIONS, 'none'], 'sharing': list(SHARING)}.get(name, [True, False, 0.0])
    return st.integers(0, 3).flatmap(lambda die: st.sampled_from(list(known) if die else ODD))


@campaign(250, data=st.data())
def test_a_model_is_made_and_runs_or_the_argument_is_named(data):
    names = data.draw(st.lists(st.sampled_from(ARGUMENTS), min_size=1, max_size=5, unique=True))
    arguments = {name: data.draw(values(name), label=name) for name in names}
    small_size = {'img_size': 8, 'patch_size': 1, 'depth': 1, 'embed_dim': 8, 'num_heads': 2, 'local_grid': 0}
    try:
        model = timm.create_model('test_linformer_vit', **{**small_size, **arguments}).eval()
    except (ValueError, TypeError) as error:
        given_names = [name for name, value in arguments.items() if value is not None]
        assert any(name.split('_')[0] in str(error) for name in [*given_names, 'image size']), (arguments, error)
        return
    images = torch.randn(2, model.in_chans, *model.patch_embed.img_size)
    with torch.no_grad():
        out = model(images)
        assert out.shape[0] == 2 and out.isfinite().all(), arguments
        assert model(images[:0]).shape[0] == 0


@campaign(60, data=st.data())
def test_streamed_equals_whole(data):
    draw = lambda name, *choices: data.draw(st.sampled_from(choices), label=name)  # noqa: E731
    grid = draw('grid', (16, 1), (1, 16), (5, 3), (8, 6), (1, 1))
    arguments = dict(
        projection=draw('projection', *PROJECTIONS, 'none'),
        sharing=draw('sharing', *SHARING),
        proj_len=draw('proj_len', 1, 4, 6, 64),
        local_size=draw('local_size', 0, 3, 5),
        local_grid=draw('local_grid', 0, 2, 16),
        pos_embed=draw('pos_embed', 'learn', 'conv', 'separable', 'none'),
        reg_tokens=draw('reg_tokens', 0, 2),
        row_norm=draw('row_norm', False, True),
    )
    torch.manual_seed(data.draw(st.integers(0, 99)))
    model = timm.create_model(
        'test_linformer_vit', img_size=grid, patch_size=1, num_classes=3, depth=2, dtype=torch.float64, **arguments
    )
    images = torch.randn(3, 3, *grid, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, grid[0] * grid[1]) < 0.3 if draw('masked', False, True) else None
    if mask is not None:
        mask[:, 0] = False
    found = []
    for chunk_size in (0, draw('chunk_size', 1, 7, 16, 1000)):
        model.set_chunk_size(chunk_size)
        logits = model(images, key_padding_mask=mask)
        found.append((logits.detach(), *torch.autograd.grad(logits.square().sum(), images)))
    for whole, streamed in zip(*found, strict=True):
        torch.testing.assert_close(streamed, whole, rtol=1e-9, atol=1e-10)


# ---------------------------------------------------------------------------------------------------- images and runs

FLAGS_OF_RUN = ['--device', 'cpu', '--threads', '1', '--workers', '0', '--precision', 'fp32', '--epochs', '1']
FLAGS_OF_RUN += ['--model', 'test_linformer_vit', '--init', '', '--batch-size', '2', '--max-minutes', '0']
CLASSES = ['cat', '$^$', '__background__', 'é猫', 'a b', '-n', 'x' * 100, '%s{}', '0']
MODES = ['L', 'RGB', 'RGBA', 'P', 'I;16', 'CMYK', '1', 'LA']


@st.composite
def image_files(draw) -> tuple[str, bytes | tuple]:
    """Name of a file; its bytes, or mode, width and height of an image."""
    name = draw(st.sampled_from(['a', 'ü', '$', 'b c'])) + str(draw(st.integers(0, 99)))
    if draw(st.integers(0, 7)) == 0:
        return name + draw(st.sampled_from(['.png', '.jpg', '.txt', '.gif'])), draw(st.binary(max_size=40))
    side = st.sampled_from([1, 2, 16, 17, 300])
    return name + '.png', (draw(st.sampled_from(MODES)), draw(side), draw(side))


def write(folder: Path, files: list[tuple[str, bytes | tuple]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files:
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
            continue
        mode, width, height = content
        image = Image.new('RGB' if mode == 'I;16' else 'RGB', (width, height), (200, 90, 30))
        if mode == 'I;16':
            image = Image.fromarray(np.full((height, width), 40_000, np.uint16))
        else:
            image = image.convert('L').convert(mode) if mode == 'LA' else image.convert(mode)
        image.save(folder / (name if mode != 'CMYK' else name.replace('.png', '.jpg')))


@campaign(6, data=st.data())
def test_a_folder_of_odd_images_trains_is_scored_and_predicted(data, tmp_path_factory):
    root = tmp_path_factory.mktemp('odd')
    names = data.draw(st.lists(st.sampled_from(CLASSES), min_size=2, max_size=4, unique=True))
    for name in names:
        write(
            root / 'images' / name, data.draw(st.lists(image_files(), min_size=5, max_size=9, unique_by=lambda f: f[0]))
        )
    bad, crop = data.draw(st.sampled_from(['stop', 'skip'])), data.draw(st.sampled_from(['center', 'border', 'squash']))
    reading = ['--data-dir', str(root / 'images'), '--on-bad-image', bad]
    run = ['train', 'image_folder', *FLAGS_OF_RUN, *reading, '--crop-mode', crop, '--img-size', '8']
    if ends_well([*run, '--val-fraction', '0', '--output-dir', str(root / 'run')]):
        assert 'top1' in json.loads((root / 'run' / 'metrics.json').read_text())
        assert (root / 'run' / 'model' / 'model.safetensors').is_file()
        ends_well(['evaluate', str(root / 'run'), '--device', 'cpu', '--on-bad-image', bad])
        ends_well(['predict', str(root / 'images'), '--model', str(root / 'run'), '--on-bad-image', 'skip'])


def damage(file: Path, draw) -> None:
    """Cut a file, change a byte of it, replace it by a folder or by other text, or take it away."""
    way, content = draw(st.sampled_from(['cut', 'change', 'folder', 'text', 'gone'])), file.read_bytes()
    at = draw(st.integers(0, max(0, len(content) - 1)))
    file.unlink()
    if way == 'folder':
        file.mkdir()
    elif way != 'gone':
        changed = content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :] if content else b'x'
        text = draw(st.sampled_from([b'', b'{}', b'[]', b'null', b'{"model": 1}', b'\xff\xfe']))
        file.write_bytes({'cut': content[:at], 'change': changed, 'text': text}[way])


@pytest.fixture(scope='module')
def stopped_run(tmp_path_factory) -> Path:
    """A run that was interrupted after two steps, with two checkpoints."""
    folder = tmp_path_factory.mktemp('stopped') / 'run'
    train(small(folder, epochs=0.5, checkpoint_every=1, max_steps=2))
    return folder


@campaign(12, data=st.data())
def test_a_run_with_a_damaged_checkpoint_goes_on_or_says_so(data, stopped_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp('damaged') / 'run'
    shutil.copytree(stopped_run, folder)
    files = sorted(p for p in (folder / 'checkpoints').rglob('*') if p.is_file())
    damage(data.draw(st.sampled_from(files)), data.draw)
    try:
        with guarded():
            metrics = train(small(folder, epochs=0.5, checkpoint_every=1))
    except Mistake:
        return
    assert metrics['steps'] == 4


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 10**9)
    | st.floats()
    | st.sampled_from(['', 'x', 'pipe:touch canary #']),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(['a', 'recipe', 'url']), inner, max_size=3)
    ),
    max_leaves=5,
)


@campaign(40, data=st.data())
def test_a_strange_model_folder_is_refused_or_used_and_runs_nothing(data, model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp('strange')
    shutil.copytree(model_folder, folder, dirs_exist_ok=True)
    config = json.loads((folder / 'config.json').read_text())
    place = data.draw(st.sampled_from(['', 'pretrained_cfg', 'model_args']))
    inner = config.setdefault(place, {}) if place else config
    key = data.draw(st.sampled_from([*sorted(inner), 'custom_load', 'url', 'file']))
    inner[key] = data.draw(JUNK, label=f'{place}.{key}')
    (folder / 'config.json').write_text(json.dumps(config))
    if data.draw(st.integers(0, 3)) == 0:
        damage(data.draw(st.sampled_from(sorted(p for p in folder.iterdir() if p.is_file()))), data.draw)
    before, here = os.getcwd(), folder / 'here'
    here.mkdir()
    os.chdir(here)
    try:
        with guarded(), warnings.catch_warnings():
            load_model(folder)
    except Mistake:
        pass
    finally:
        os.chdir(before)
    assert not list(here.iterdir())


# ------------------------------------------------------------------------------------------------------- command lines

FLAG_VALUES = [
    '-1',
    '0',
    '1',
    '2.5',
    'nan',
    'inf',
    '1e300',
    '99999999999999999999',
    '',
    'x',
    'é',
    '8 0.5 16 0.5',
    '8 nan',
]
NUMBERS = ['epochs', 'lr', 'weight-decay', 'layer-decay', 'warmup', 'clip-grad', 'smoothing', 'ema-decay', 'mixup']
NUMBERS += ['cutmix', 'hflip', 'shift', 'rand-augment', 'color-jitter', 'erase', 'batch-size', 'accumulate', 'freeze']
NUMBERS += [
    'eval-batch-size',
    'workers',
    'threads',
    'seed',
    'img-size',
    'stages',
    'crop-scale',
    'chunk-size',
    'mask-size',
]
NUMBERS += ['val-fraction', 'max-steps', 'log-every', 'checkpoint-every', 'keep-checkpoints', 'eval-every', 'precision']
PAIRS = ['model-args num_heads', 'model-args proj_len', 'model-args global_pool', 'model-args drop_path_rate']
PAIRS += ['dataset-args num_classes', 'dataset-args img_size', 'dataset-args nothing', 'opt-args eps', 'opt-args betas']


@campaign(60, data=st.data())
def test_a_command_line_ends_well(data, tmp_path_factory):
    words = ['--dataset', 'fake', '--dry-run', '--output-dir', str(tmp_path_factory.mktemp('run') / 'out')]
    for flag in data.draw(st.lists(st.sampled_from([*NUMBERS, *PAIRS]), min_size=1, max_size=3, unique=True)):
        value = data.draw(st.sampled_from(FLAG_VALUES), label=flag)
        if flag in ('workers', 'threads') and value == '1':
            continue
        words += [*f'--{flag}'.split(' '), *(value.split(' ') if value else [''])]
    ends_well(['train', 'image_folder', *FLAGS_OF_RUN, '--data-dir', '.', *words])
