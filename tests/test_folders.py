"""Folders of images, and the sets that torchvision knows: what is found in them, and what is said where it is not."""

import dataclasses
import json
import logging
import multiprocessing
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from runs import CPU, image_set, save_folder, small
from timm.data import create_transform, resolve_model_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.datasets import cifar, imagenette

import evaluate
from linvision.data import create_batches, create_dataset
from linvision.data.folders import read_image
from linvision.train import train
from linvision.train.data import TrainingData
from linvision.train.parallel import Processes

RECIPE = Path(__file__).parents[1] / 'recipes/image_folder.py'


def pictures(folder, *names, mode='L', size=(8, 8)):
    """Image files of one colour each, made with the folders that they lie in."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('L', size, 10 * i).convert(mode).save(folder / name)


def names(images):
    return [(path.rsplit('/', 1)[-1], images.classes[label]) for path, label in images.samples]


def refuse(*args, **kwargs):
    raise URLError('the network refuses')


# --------------------------------------------------------------------------------------------------------- image_folder


@pytest.mark.parametrize('test', ['val', 'validation', 'test'])
def test_train_and_val_are_the_two_splits(tmp_path, test):
    pictures(tmp_path / 'train', 'cat/a.png', 'cat/below/b.JPG', 'ant/c.png', 'ant/notes.txt.png')
    (tmp_path / 'train/ant/notes.txt').write_text('no image')
    pictures(tmp_path / test, 'cat/d.png')
    train, val = (create_dataset('image_folder', tmp_path, split) for split in ('train', 'test'))
    assert train.classes == val.classes == ('ant', 'cat')
    assert names(train) == [('c.png', 'ant'), ('notes.txt.png', 'ant'), ('a.png', 'cat'), ('b.JPG', 'cat')]
    assert names(val) == [('d.png', 'cat')]
    image, label = train.read(0)
    assert image.mode == 'L' and image.getpixel((3, 3)) == 20 and label == 0
    half = train.subset(torch.tensor([3, 0]))
    assert names(half) == [('b.JPG', 'cat'), ('c.png', 'ant')] and half.in_chans == 1


@pytest.mark.parametrize('below', ['', 'train'])
def test_without_val_every_fifth_image_of_a_class_is_for_the_test(tmp_path, below):
    pictures(tmp_path / below, *(f'cat/{i:02}.png' for i in range(11)), *(f'dog/{i}.png' for i in range(5)))
    train, test = (names(create_dataset('image_folder', tmp_path, split)) for split in ('train', 'test'))
    assert test == [('04.png', 'cat'), ('09.png', 'cat'), ('4.png', 'dog')]
    assert len(train) == 13 and not set(train) & set(test)


def test_a_class_folder_without_images_is_no_class(tmp_path):
    pictures(tmp_path / 'train', 'cat/a.png', 'dog/b.png')
    (tmp_path / 'train/bird').mkdir()
    (tmp_path / 'train/bird/readme.md').write_text('none yet')
    pictures(tmp_path / 'val', 'dog/c.png')
    assert create_dataset('image_folder', tmp_path, 'train').classes == ('cat', 'dog')
    assert names(create_dataset('image_folder', tmp_path, 'test')) == [('c.png', 'dog')]


def test_a_class_that_training_lacks_is_refused(tmp_path):
    pictures(tmp_path, 'train/cat/a.png', 'val/cat/a.png', 'val/fox/b.png')
    with pytest.raises(ValueError, match=r"val has classes that .*train lacks: \['fox'\]"):
        create_dataset('image_folder', tmp_path, 'test')


@pytest.mark.parametrize('modes, in_chans', [(('L', '1', 'LA'), 1), (('L', 'RGB'), 3), (('P',), 3), (('RGBA',), 3)])
def test_grey_and_colour_are_found_out(tmp_path, modes, in_chans):
    for mode in modes:
        pictures(tmp_path, f'a/{mode}.png', mode=mode)
    images = create_dataset('image_folder', tmp_path, 'train')
    assert images.in_chans == in_chans
    assert {images.read(i)[0].mode for i in range(len(images))} == {'L' if in_chans == 1 else 'RGB'}


def test_sixteen_bits_become_eight(tmp_path):
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(deep).save(tmp_path / 'deep.png')
    for in_chans in (1, 3):
        found = np.asarray(read_image(tmp_path / 'deep.png', in_chans)).reshape(8, 8, in_chans)
        assert (found == (deep // 256)[:, :, None]).all()


def test_size_is_the_median_of_the_shorter_sides_and_statistics_are_those_of_the_pixels(tmp_path):
    for i, size in enumerate([(20, 31), (40, 16), (18, 50)]):
        pictures(tmp_path / 'sizes', f'a/{i}.png', size=size)
    assert create_dataset('image_folder', tmp_path / 'sizes', 'train').img_size == 18
    images = np.random.default_rng(0).integers(0, 200, (8, 64, 64, 3), dtype=np.uint8)
    (tmp_path / 'noise/a').mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f'noise/a/{i}.png')
    (tmp_path / 'noise/a/9.png').write_bytes(b'damaged')
    images = np.delete(images, 4, axis=0)  # of the test
    mean, std = create_dataset('image_folder', tmp_path / 'noise', 'train').statistics()
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), atol=1e-4)


@pytest.mark.parametrize('side, size', [(300, 224), (224, 224), (30, 28), (3, 4)])
def test_a_run_without_stages_takes_the_size_of_the_files_at_most_the_models(tmp_path, side, size):
    pictures(tmp_path, *(f'a/{i}.png' for i in range(5)), size=(side, side + 7))
    recipe = small(tmp_path / 'run', dataset='image_folder', model='linformer_vit_tiny_patch4_224', stages=())
    recipe.batch_size = 1
    assert TrainingData(recipe, Processes(CPU)).stages == ((size, 1.0),)


def test_a_missing_folder_says_what_goes_where(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        create_dataset('image_folder', tmp_path / 'none', 'train')
    for words in ('none/train/CLASS/IMAGE', 'none/val/CLASS/IMAGE', '.png', 'is not there', '--data-dir'):
        assert words in str(error.value)
    pictures(tmp_path / 'flat', 'a.png', 'b.png')
    with pytest.raises(FileNotFoundError, match=r"flat holds \['a.png', 'b.png'\]"):
        create_dataset('image_folder', tmp_path / 'flat', 'train')


def test_too_few_images_for_a_test_are_refused(tmp_path):
    pictures(tmp_path, 'a/0.png', 'a/1.png', 'b/0.png')
    with pytest.raises(FileNotFoundError, match='a class needs five images, or put some in .*/val'):
        create_dataset('image_folder', tmp_path, 'test')


def test_a_folder_of_damaged_images_alone_is_refused(tmp_path):
    pictures(tmp_path, 'a/0.png', size=(64, 64))
    (tmp_path / 'a/0.png').write_bytes((tmp_path / 'a/0.png').read_bytes()[:50])  # not more than the header
    with pytest.raises(OSError, match='No image can be read: .*a/0.png'):
        create_dataset('image_folder', tmp_path, 'train').statistics()
    (tmp_path / 'a/0.png').write_bytes(b'damaged')
    with pytest.raises(OSError, match='No image can be read: .*a/0.png'):
        create_dataset('image_folder', tmp_path, 'train')


# --------------------------------------------------------------------------------------------------- sets with a name


@pytest.mark.parametrize('below', ['', 'imagenet'])
def test_imagenets_ids_become_words(tmp_path, below):
    for split in ('train', 'val'):
        pictures(tmp_path / below / split, 'n01440764/a.JPEG', 'n01443537/b.JPEG')
    for split in ('train', 'test'):
        images = create_dataset('imagenet', tmp_path, split)
        assert images.classes == ('tench', 'goldfish') and images.in_chans == 3
        assert images.statistics() == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        assert names(images) == [('a.JPEG', 'tench'), ('b.JPEG', 'goldfish')]


def test_imagenette_is_read_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.setattr(imagenette, 'download_and_extract_archive', refuse)
    for split in ('train', 'val'):
        pictures(tmp_path / 'imagenette2-320' / split, 'n03888257/a.JPEG', 'n02102040/b.JPEG')
    images = create_dataset('imagenette', tmp_path, 'train')
    assert images.classes == ('English springer', 'parachute')


@pytest.mark.parametrize('download', [True, False])
@pytest.mark.parametrize(
    'name, place', [('imagenette', 'imagenette2-320'), ('cifar10', 'cifar-10-batches-py'), ('imagenet', 'n01440764')]
)
def test_missing_sets_say_what_goes_where(tmp_path, monkeypatch, name, place, download):
    for module in (imagenette, cifar):
        monkeypatch.setattr(module, 'download_and_extract_archive', refuse)
    with pytest.raises(FileNotFoundError, match=place) as error:
        create_dataset(name, tmp_path, 'train', download=download)
    assert ('the network refuses' in str(error.value)) == (download and name != 'imagenet')


@pytest.mark.parametrize('name, classes', [('cifar10', 10), ('cifar100', 100)])
def test_cifar_is_read_from_its_files(tmp_path, monkeypatch, name, classes):
    pixels, labels = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8), [3, 1, 4, 1, 5, 9]
    words = [f'class {i}' for i in range(classes)]
    if name == 'cifar10':
        folder, kind, meta = 'cifar-10-batches-py', 'labels', ('batches.meta', {'label_names': words})
        parts = {**{f'data_batch_{i + 1}': slice(i, i + 1) for i in range(5)}, 'test_batch': slice(5, 6)}
    else:
        folder, kind, meta = 'cifar-100-python', 'fine_labels', ('meta', {'fine_label_names': words})
        parts = {'train': slice(0, 5), 'test': slice(5, 6)}
    (tmp_path / folder).mkdir()
    contents = {part: {'data': pixels[where], kind: labels[where]} for part, where in parts.items()}
    for part, content in [*contents.items(), meta]:
        (tmp_path / folder / part).write_bytes(pickle.dumps(content))
    with pytest.raises(FileNotFoundError, match=f'{folder}, or not whole'):
        create_dataset(name, tmp_path, 'train')
    monkeypatch.setattr(cifar, 'check_integrity', lambda path, md5=None: True)
    for split, where in (('train', slice(0, 5)), ('test', slice(5, 6))):
        images = create_dataset(name, tmp_path, split)
        assert torch.equal(images.images, torch.from_numpy(pixels[where]).view(-1, 3, 32, 32))
        assert images.labels.tolist() == labels[where] and images.classes == tuple(words) and images.img_size == 32


# ------------------------------------------------------------------------------------------------------ runs on folders


@pytest.fixture(scope='module')
def bars(tmp_path_factory):
    """Grey 20×20 images in three classes: 30 for training and 9 for the test."""
    folder = tmp_path_factory.mktemp('bars')
    for split, n in (('train', 30), ('test', 9)):
        images = create_dataset('fake', '', split, img_size=20, num_classes=3).subset(torch.arange(n))
        save_folder(images, folder / ('val' if split == 'test' else split))
    return folder


@pytest.fixture
def recipe(bars, tmp_path):
    """A run on a copy of these folders, which a test may spoil: three steps an epoch."""
    shutil.copytree(bars, tmp_path / 'bars')
    return small(tmp_path / 'run', dataset='image_folder', data_dir=tmp_path / 'bars', stages=(), batch_size=10)


def spoil(folder, how):
    """Damage the fifth image of a folder; its path."""
    path = sorted(folder.rglob('*.png'))[4]
    content = path.read_bytes()
    path.write_bytes({'truncated': content[: len(content) // 2], 'no image': b'no image', 'empty': b''}[how])
    return path


def test_timm_reads_what_a_run_exported_and_gives_its_score(recipe, capsys):
    metrics = train(dataclasses.replace(recipe, epochs=25, opt='muon', lr=0.01, hflip=0.5))
    assert metrics['top1'] > 0.6 and metrics['num_samples'] == 9 and metrics['classes'] == ['bar 0', 'bar 1', 'bar 2']
    model = timm.create_model(f'local-dir:{recipe.output_dir}/model', pretrained=True).eval()
    assert model.pretrained_cfg['label_names'] == metrics['classes']
    transform = create_transform(**resolve_model_data_config(model))
    paths = sorted((recipe.data_dir / 'val').rglob('*.png'))
    images = torch.stack([transform(Image.open(path)) for path in paths])
    labels = torch.tensor([metrics['classes'].index(path.parent.name) for path in paths])
    logits = model(images)
    assert (logits.argmax(-1) == labels).double().mean().item() == metrics['top1']
    assert torch.nn.functional.cross_entropy(logits, labels).item() == pytest.approx(metrics['loss'], rel=1e-5)
    capsys.readouterr()
    evaluate.main(recipe.output_dir / 'model', dataset='image_folder', data_dir=recipe.data_dir, device='cpu')
    found = json.loads(capsys.readouterr().out)
    for name in ('top1', 'loss', 'num_samples', 'num_left_out'):
        assert found[name] == metrics[name], name


@pytest.mark.parametrize('how, workers', [('truncated', 0), ('no image', 2), ('empty', 0)])
def test_a_damaged_image_ends_a_run_and_is_named_and_the_mended_run_goes_on(recipe, how, workers):
    recipe = dataclasses.replace(recipe, workers=workers, checkpoint_every=1)
    shutil.copy(path := sorted((recipe.data_dir / 'train').rglob('*.png'))[4], kept := recipe.data_dir / 'kept')
    assert spoil(recipe.data_dir / 'train', how) == path
    with pytest.raises(OSError, match=f'{path} cannot be read as an image .*--on-bad-image skip'):
        train(recipe)
    shutil.copy(kept, path)
    assert train(recipe)['steps'] == 3


def test_a_damaged_image_of_the_test_set_ends_a_run_and_is_named(recipe):
    path = spoil(recipe.data_dir / 'val', 'truncated')
    with pytest.raises(OSError, match=f'{path} cannot be read as an image'):
        train(recipe)
    assert not (recipe.output_dir / 'metrics.json').exists()


def test_a_command_with_workers_ends_where_an_image_is_damaged(recipe):
    path = spoil(recipe.data_dir / 'val', 'truncated')
    flags = '--model test_linformer_vit --batch-size 10 --workers 2 --max-minutes 0 --device cpu'.split()
    places = ['--data-dir', str(recipe.data_dir), '--output-dir', str(recipe.output_dir)]
    command = [sys.executable, str(RECIPE), *flags, *places]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1 and f'error: {path} cannot be read' in run.stderr and 'Traceback' not in run.stderr


def test_workers_end_with_the_batches_that_they_read(bars):
    found = create_batches(create_dataset('image_folder', bars, 'train'), 10, (0.5,), (0.5,), CPU, workers=2)
    before = set(multiprocessing.active_children())
    stream = found.stream(0, 0, 16)
    next(stream), next(found.ordered(16))
    assert len(set(multiprocessing.active_children()) - before) == 4
    del stream, found
    assert not set(multiprocessing.active_children()) - before


@pytest.mark.parametrize('workers', [0, 2])
def test_damaged_images_are_left_out_where_that_is_wished(recipe, workers, caplog):
    bad, worse = spoil(recipe.data_dir / 'train', 'truncated'), spoil(recipe.data_dir / 'val', 'no image')
    recipe = dataclasses.replace(recipe, on_bad_image='skip', workers=workers, epochs=2)
    with caplog.at_level(logging.WARNING):
        train(dataclasses.replace(recipe, max_steps=4))
        assert [str(bad) in message for message in caplog.messages] == [True]  # once in two epochs
        metrics = train(recipe)
    assert [str(path) in message for path, message in zip((bad, worse), caplog.messages, strict=True)] == [True] * 2
    (found,) = metrics['bad_training_images']
    assert found.startswith(f'{bad} cannot be read')
    assert metrics['num_samples'] == 8 and metrics['num_left_out'] == 1
    assert json.loads((recipe.output_dir / 'metrics.json').read_text())['bad_training_images'] == [found]


def test_the_next_image_stands_in_for_a_damaged_one_with_its_own_label(tmp_path):
    paths = save_folder(image_set(n=10, side=8), tmp_path / 'train')
    paths[3].write_bytes(b'damaged')
    images = create_dataset('image_folder', tmp_path, 'train')
    found = create_batches(images, 10, (0.0,), (1 / 255,), CPU, on_bad_image='skip')
    x, labels = next(found.stream(0, 0, 8))
    assert torch.equal(x[:, 0, 4, 4].round().long() - 1, torch.tensor([int(images.classes[i]) for i in labels]))
    assert sorted(labels.tolist()) == [0, 1, 2, 4, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize('workers', [0, 1])
def test_two_processes_score_every_readable_image_once(tmp_path, workers):
    paths = save_folder(image_set(n=13, side=8), tmp_path / 'train')
    for i in (3, 12):
        paths[i].write_bytes(b'damaged')
    images = create_dataset('image_folder', tmp_path, 'train')
    seen = []
    for rank in (0, 1):
        where = {'rank': rank, 'count': 2, 'workers': workers, 'on_bad_image': 'skip'}
        found = create_batches(images, 4, (0.0,), (1 / 255,), CPU, **where)
        for _ in range(2):  # again, by workers that stayed
            parts = list(found.ordered(8))
        assert [len(x) for x, _ in parts] == [2, 2, 2, 1]  # as many in each process
        x, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        counts = labels >= 0
        assert torch.equal(
            x[counts, 0, 4, 4].round().long() - 1, torch.tensor([int(images.classes[i]) for i in labels[counts]])
        )
        seen += labels[counts].tolist()
    readable = [images.classes.index(str(i)) for i in range(13) if i not in (3, 12)]
    assert sorted(seen) == sorted(readable)
