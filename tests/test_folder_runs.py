"""Runs on folders of images: what they leave behind, and what becomes of damaged files."""

import json
import logging
import multiprocessing
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from runs import CPU, image_set, save_folder, small
from timm.data import create_transform, resolve_model_data_config

from linvision.cli import evaluate
from linvision.data import create_batches, create_dataset
from linvision.train import train
from scripts.tools import report

RECIPE = Path(__file__).parents[1] / 'recipes/image_folder.py'


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
    metrics = train(recipe.replace(epochs=15, opt='muon', lr=0.01, hflip=0.5))
    assert metrics['top1'] > 0.6 and metrics['num_samples'] == 9 and metrics['classes'] == ['bar 0', 'bar 1', 'bar 2']
    model = timm.create_model(f'local-dir:{recipe.run.output_dir}/model', pretrained=True).eval()
    assert model.pretrained_cfg['label_names'] == metrics['classes']
    transform = create_transform(**resolve_model_data_config(model))
    paths = sorted((recipe.data.data_dir / 'val').rglob('*.png'))
    images = torch.stack([transform(Image.open(path)) for path in paths])
    labels = torch.tensor([metrics['classes'].index(path.parent.name) for path in paths])
    logits = model(images)
    assert (logits.argmax(-1) == labels).double().mean().item() == metrics['top1']
    assert torch.nn.functional.cross_entropy(logits, labels).item() == pytest.approx(metrics['loss'], rel=1e-5)
    capsys.readouterr()
    evaluate.main(
        str(recipe.run.output_dir / 'model'), 'image_folder', recipe.data.data_dir, device='cpu', as_json=True
    )
    found = json.loads(capsys.readouterr().out)
    for name in ('top1', 'loss', 'num_samples', 'num_left_out'):
        assert found[name] == metrics[name], name


def test_a_run_says_where_images_are_read_at_half_their_size_or_less(recipe, capsys):
    for path in recipe.data.data_dir.rglob('*.png'):
        Image.new('L', (50, 32), 128).save(path)
    for size, words in ((16, 'images of 32 pixels .* are read at 16×16: .*--img-size 32'), (24, '')):
        train(recipe.replace(stages=(), img_size=size, output_dir=recipe.run.output_dir / str(size), max_steps=1))
        said = re.search('images of .* are read at .*', capsys.readouterr().out)
        assert (said is not None and re.match(words, said.group())) if words else said is None


@pytest.mark.parametrize('crop_mode', ['center', 'border', 'squash'])
def test_images_that_are_not_square_are_read_alike_in_training_evaluation_and_by_timm(recipe, crop_mode, capsys):
    for path in recipe.data.data_dir.rglob('*.png'):  # the bright bar is in the upper or the lower quarter
        image = Image.new('L', (20, 40), 128)
        image.paste(255, (0, 5, 20, 7) if path.parent.name == 'bar 0' else (0, 33, 20, 35))
        image.save(path)
    shutil.rmtree(recipe.data.data_dir / 'train/bar 2')
    shutil.rmtree(recipe.data.data_dir / 'val/bar 2')
    metrics = train(recipe.replace(epochs=12, opt='muon', lr=0.01, crop_mode=crop_mode))
    out = capsys.readouterr().out
    assert ('100 % of the images are not square: their middle is used' in out) == (crop_mode == 'center')
    assert metrics['top1'] == (0.5 if crop_mode == 'center' else 1)  # the middle shows no bar
    model = timm.create_model(f'local-dir:{recipe.run.output_dir}/model', pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    paths = sorted((recipe.data.data_dir / 'val').rglob('*.png'))
    logits = model(torch.stack([transform(Image.open(path)) for path in paths]))
    labels = torch.tensor([metrics['classes'].index(path.parent.name) for path in paths])
    assert torch.nn.functional.cross_entropy(logits, labels).item() == pytest.approx(metrics['loss'], rel=1e-5)


def test_a_run_is_scored_on_its_own_images_and_on_others(recipe, tmp_path, capsys, monkeypatch):
    metrics = train(recipe)
    some = tmp_path / 'some/bar 1'
    shutil.copytree(recipe.data.data_dir / 'val/bar 1', some)
    for path in some.iterdir():
        path.rename(path.with_stem(f'other_{path.stem}'))
    capsys.readouterr()
    evaluate.main(str(recipe.run.output_dir), device='cpu', as_json=True)  # the folder of the run will do
    others = str(recipe.run.output_dir / 'model'), 'image_folder', tmp_path / 'some', 'all'
    evaluate.main(*others, device='cpu', as_json=True)
    own, others = map(json.loads, capsys.readouterr().out.splitlines())
    assert own['top1'] == metrics['top1'] and own['num_samples'] == 9
    assert others['num_samples'] == 3  # one class of three
    assert (own['split'], others['split'], own['data_dir']) == ('test', 'all', str(recipe.data.data_dir))
    model = timm.create_model(f'local-dir:{recipe.run.output_dir}/model', pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    logits = model(torch.stack([transform(Image.open(path)) for path in some.iterdir()]))
    assert others['top1'] == pytest.approx((logits.argmax(-1) == 1).float().mean().item())
    with pytest.raises(FileNotFoundError, match=r'Looked for from .*; --data-dir names another folder'):
        evaluate.main(str(recipe.run.output_dir), data_dir=tmp_path / 'nowhere', device='cpu')
    with pytest.raises(ValueError, match='has no metrics.json'):
        evaluate.main(str(shutil.copytree(recipe.run.output_dir / 'model', tmp_path / 'alone/model')), device='cpu')


@pytest.mark.parametrize('how, workers', [('truncated', 0), ('no image', 2), ('empty', 0)])
def test_a_damaged_image_ends_a_run_and_is_named_and_the_mended_run_goes_on(recipe, how, workers):
    recipe = recipe.replace(workers=workers, checkpoint_every=1)
    folder = recipe.data.data_dir
    shutil.copy(path := sorted((folder / 'train').rglob('*.png'))[4], kept := folder / 'kept')
    assert spoil(folder / 'train', how) == path
    with pytest.raises(OSError, match=f'{path} cannot be read as an image .*--on-bad-image skip'):
        train(recipe)
    shutil.copy(kept, path)
    assert train(recipe)['steps'] == 3


def test_a_damaged_image_of_the_test_set_ends_a_run_and_is_named(recipe):
    path = spoil(recipe.data.data_dir / 'val', 'truncated')
    with pytest.raises(OSError, match=f'{path} cannot be read as an image'):
        train(recipe)
    assert not (recipe.run.output_dir / 'metrics.json').exists()


@pytest.mark.slow
def test_a_command_with_workers_ends_where_an_image_is_damaged(recipe):
    path = spoil(recipe.data.data_dir / 'val', 'truncated')
    flags = '--model test_linformer_vit --batch-size 10 --workers 2 --max-minutes 0 --device cpu'.split()
    places = ['--data-dir', str(recipe.data.data_dir), '--output-dir', str(recipe.run.output_dir)]
    command = [sys.executable, str(RECIPE), *flags, *places]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and f'error: {path} cannot be read' in run.stderr and 'Traceback' not in run.stderr


def test_workers_end_with_the_batches_that_they_read(bars):
    found = create_batches(create_dataset('image_folder', bars, 'train'), 10, (0.5,), (0.5,), CPU, workers=2)
    before = set(multiprocessing.active_children())
    stream = found.stream(0, 0, 16)
    next(stream), next(found.ordered(16))
    assert len(set(multiprocessing.active_children()) - before) == 2 * found.workers  # no more than there are CPUs
    del stream, found
    assert not set(multiprocessing.active_children()) - before


@pytest.mark.parametrize('workers', [0, 2])
def test_damaged_images_are_left_out_where_that_is_wished(recipe, workers, caplog):
    bad, worse = spoil(recipe.data.data_dir / 'train', 'truncated'), spoil(recipe.data.data_dir / 'val', 'no image')
    recipe = recipe.replace(on_bad_image='skip', workers=workers, epochs=2)
    with caplog.at_level(logging.WARNING):
        train(recipe.replace(max_steps=4))
        assert [str(bad) in message for message in caplog.messages] == [True]  # once in two epochs
        metrics = train(recipe)
    assert [str(path) in message for path, message in zip((bad, worse), caplog.messages, strict=True)] == [True] * 2
    (found,) = metrics['bad_training_images']
    assert found.startswith(f'{bad} cannot be read')
    assert metrics['num_samples'] == 8 and metrics['num_left_out'] == 1
    assert json.loads((recipe.run.output_dir / 'metrics.json').read_text())['bad_training_images'] == [found]


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


def test_a_folder_with_a_run_on_other_images_is_refused(recipe, tmp_path):
    train(recipe.replace(max_steps=2))
    moved = recipe.data.data_dir.rename(tmp_path / 'moved')
    other = recipe.replace(data_dir=moved)
    first = sorted((moved / 'train').rglob('*.png'))[0]
    content = first.read_bytes()
    first.unlink()
    with pytest.raises(ValueError, match=r'on other training images \(30 there, 29 now\).*--fresh'):
        train(other)
    renamed = first.with_name('another.png')
    renamed.write_bytes(content)
    with pytest.raises(ValueError, match=r'on other training images \(30, of other names or classes\)'):
        train(other)
    renamed.rename(first)
    assert train(other)['steps'] == 3  # the same images in another place
    copied = shutil.copytree(moved, tmp_path / 'copied')
    (copied / 'train/bar 1').rename(copied / 'train/bar 3')
    (copied / 'val/bar 1').rename(copied / 'val/bar 3')
    with pytest.raises(ValueError, match='on other training images'):
        train(recipe.replace(data_dir=copied))


def test_a_finished_run_and_its_report_know_their_images(recipe):
    recipe = recipe.replace(on_bad_image='skip')
    damaged = spoil(recipe.data.data_dir / 'train', 'truncated')
    metrics = train(recipe)
    rows = report.report(recipe.run.output_dir)  # which leaves out what training left out
    assert rows[recipe.model]['top1'] == metrics['top1'] and len(rows) == 2
    test_image = sorted((recipe.data.data_dir / 'val').rglob('*.png'))[0]
    content = test_image.read_bytes()
    test_image.unlink()
    with pytest.raises(ValueError, match='has 8 test images, and 9 when .* was scored'):
        report.report(recipe.run.output_dir)
    test_image.write_bytes(content)
    damaged.unlink()
    for look in (lambda: train(recipe), lambda: report.report(recipe.run.output_dir)):
        with pytest.raises(ValueError, match=r'on other training images \(30 there, 29 now\)'):
            look()
    shutil.rmtree(recipe.data.data_dir)  # a finished run is told of without its images
    assert train(recipe) == metrics


def test_images_that_may_have_changed_sides_are_not_scored(bars, tmp_path, capsys):
    for path in sorted((bars / 'train').rglob('*.png')):
        (tmp_path / 'all' / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / 'all' / path.parent.name)
    recipe = small(tmp_path / 'run', dataset='image_folder', data_dir=tmp_path / 'all', stages=(), batch_size=8)
    metrics = train(recipe)
    capsys.readouterr()
    evaluate.main(str(recipe.run.output_dir), device='cpu', as_json=True)
    assert json.loads(capsys.readouterr().out)['top1'] == metrics['top1']
    sorted((tmp_path / 'all').rglob('*.png'))[0].unlink()
    elsewhere = tmp_path / 'run' / '..' / 'all'  # the same folder
    for data_dir in (None, elsewhere):
        with pytest.raises(ValueError, match='learnt may be among them now.*--split all'):
            evaluate.main(str(recipe.run.output_dir), data_dir=data_dir, device='cpu')
