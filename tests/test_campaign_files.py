"""A campaign of odd images, damaged checkpoints and strangers' folders: each ends well, or in a sentence.

Slow; `campaigns.py` says how a seed is repeated.
"""

import json
import os
import pickle
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import timm
from campaigns import FLAGS_OF_RUN, MARKS, campaign, ends_well, printed_seed  # noqa: F401
from hypothesis import strategies as st
from PIL import Image
from runs import small
from safetensors import SafetensorError
from timm.models import save_for_hf

from linvision.cli.pretrained import load_model
from linvision.data import create_dataset
from linvision.guard import Mistake, guarded
from linvision.train import train

pytestmark = MARKS

# -------------------------------------------------------------------------------------------------------------- images

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
        ends_well(['predict', str(root / 'run'), str(root / 'images'), '--on-bad-image', 'skip'])


# --------------------------------------------------------------------------------------------------------- checkpoints


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


# --------------------------------------------------------------------------------------------------- strangers' folders

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.sampled_from([-2, -1, 0, 1, 2, 3, 16, 10**9, 10**30, '', 'x', 'bicubic', 'pipe:touch canary #']),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(['a', 'recipe', 'url']), inner, max_size=3)
    ),
    max_leaves=5,
)
KINDS = (ValueError, TypeError, OSError, RuntimeError, pickle.UnpicklingError, SafetensorError)  # not KeyError, say


def make_strange(folder: Path, draw) -> None:
    """Change a value of a model's config, or of the metrics beside it; at times damage a file besides."""
    file = folder / draw(st.sampled_from(['config.json', 'config.json', 'metrics.json']))
    found = json.loads(file.read_text())
    places = {'config.json': ['', 'pretrained_cfg', 'model_args'], 'metrics.json': ['', 'recipe', 'images']}
    place = draw(st.sampled_from(places[file.name]))
    inner = found.setdefault(place, {}) if place else found
    key = draw(st.sampled_from([*sorted(inner), 'custom_load', 'url', 'file', 'embed_dim', 'dataset_args']))
    inner[key] = draw(JUNK, label=f'{file.name} {place}.{key}')
    file.write_text(json.dumps(found))
    if draw(st.integers(0, 3)) == 0:
        damage(draw(st.sampled_from(sorted(p for p in folder.iterdir() if p.is_file()))), draw)


@pytest.fixture(scope='module')
def folders(model_folder, tmp_path_factory) -> list[Path]:
    """A Linformer ViT, and a plain ViT, as strangers would send them: with metrics."""
    linformer, plain = (tmp_path_factory.mktemp('strangers') / name for name in ('linformer', 'plain'))
    shutil.copytree(model_folder, linformer)
    sizes = dict(img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=2, in_chans=1, num_classes=10)
    images = create_dataset('fake', '', 'train')
    save_for_hf(
        timm.create_model('vit_tiny_patch16_224', **sizes),
        str(plain),
        model_config={'label_names': list(images.classes), 'model_args': sizes},
        safe_serialization=True,
    )
    for folder in (linformer, plain):
        recipe = small(folder, dataset='fake').to_dict()
        (folder / 'metrics.json').write_text(json.dumps({'recipe': recipe, 'images': {'num_images': 256}, 'top1': 0.5}))
    return [linformer, plain]


@contextmanager
def watched(folder: Path):
    """In a folder of its own, which must stay empty: commands of strangers would leave a file there."""
    before, here = os.getcwd(), folder / 'here'
    here.mkdir()
    os.chdir(here)
    try:
        yield
    finally:
        os.chdir(before)
    assert not list(here.iterdir())


@campaign(60, data=st.data())
def test_a_strange_model_folder_is_refused_or_used_and_runs_nothing(data, folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp('strange')
    shutil.copytree(data.draw(st.sampled_from(folders)), folder, dirs_exist_ok=True)
    make_strange(folder, data.draw)
    with watched(folder):
        try:
            load_model(folder)
        except (ValueError, FileNotFoundError) as error:
            cause = error.__cause__ or error
            assert isinstance(cause, KINDS) and str(folder) in str(error) and '\n' not in str(error), repr(cause)


READING = {
    'evaluate': ['FOLDER', '--device', 'cpu'],
    'predict': ['FOLDER', 'IMAGE'],
    'export': ['FOLDER', '--output', 'OUT/model.pt2'],
    'visualize': ['FOLDER', 'IMAGE', '--output-dir', 'OUT'],
    'spectrum': ['FOLDER', '--dataset', 'fake', '--limit', '2', '--output-dir', 'OUT', '--device', 'cpu'],
    'convert': ['FOLDER', '--dataset', 'fake', '--steps', '1', '--limit', '2', '--output-dir', 'OUT'],
    'train --init': ['FOLDER', '--output-dir', 'OUT'],
    'train --teacher': ['FOLDER', '--output-dir', 'OUT'],
}


@campaign(32, data=st.data())
def test_a_strange_folder_ends_well_in_every_command_that_reads_one(data, folders, tmp_path_factory):
    root = tmp_path_factory.mktemp('strange')
    shutil.copytree(data.draw(st.sampled_from(folders)), root / 'folder')
    make_strange(root / 'folder', data.draw)
    Image.new('L', (20, 16), 90).save(root / 'image.png')
    command = data.draw(st.sampled_from(sorted(READING)))
    name, _, flag = command.partition(' ')
    if flag:
        name = ['train', 'image_folder', *FLAGS_OF_RUN, '--dataset', 'fake', '--max-steps', '1', '--no-test', flag]
    places = {'FOLDER': root / 'folder', 'IMAGE': root / 'image.png', 'OUT': root / 'out'}
    words = [*([name] if isinstance(name, str) else name), *READING[command]]
    for place, path in places.items():
        words = [word.replace(place, str(path)) for word in words]
    with watched(root):
        ends_well(words)
