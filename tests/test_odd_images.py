"""Odd images and folders: long and thin, pipes, names that systems use too, folders that cannot be read."""

import os
import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from linvision.cli.images import find_images
from linvision.data.augmentation import TRANSFORMS, Augmentation
from linvision.data.folders import files_in, image_folder
from linvision.data.image_file import middle, read_image, squared
from linvision.data.loader_batches import Squared, evaluation_transform
from linvision.data.timm_transform import timm_transform


def folder_of(root: Path, *classes: str, count: int = 5) -> Path:
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)).save(root / name / f'{i}.png')
    return root


@pytest.mark.parametrize('crop_mode', ['border', 'squash'])
@pytest.mark.parametrize('size', [(40_000, 20), (20, 40_000)])
def test_a_long_thin_image_needs_no_more_memory_than_a_square_of_four_times_the_size(crop_mode, size, monkeypatch):
    made = []
    for name in ('new', 'fromarray'):
        method = getattr(Image, name)
        monkeypatch.setattr(Image, name, lambda *a, method=method, **k: made.append(method(*a, **k)) or made[-1])
    image = squared(Image.new('RGB', size), crop_mode, (1, 2, 3), 32)
    assert image.size == (128, 128)
    assert max(i.width * i.height for i in [image, *made]) <= max(128 * 128, size[0] * size[1])


@contextmanager
def memory_limit(mib):
    """Lets the process take so much more memory than it has."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path('/proc/self/statm').read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + mib * 2**20, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='no limit of memory that a process can lift again')
@pytest.mark.parametrize('crop_mode', ['center', 'border', 'squash'])
@pytest.mark.parametrize('library', ['timm', 'torchvision', 'albumentations'])
def test_a_long_thin_image_is_read_within_64_mib(crop_mode, library, tmp_path):
    change, mean = Augmentation(), (0.5,) * 3
    if library == 'timm':  # evaluation, predict, visualize
        transform = evaluation_transform(mean, 224, 0.9, crop_mode)
    else:
        if library == 'albumentations':
            pytest.importorskip('albumentations')
        transform = Squared(crop_mode, mean, 224, TRANSFORMS[library](change, 224, mean))
    transform(Image.new('RGB', (300, 200)), 0)  # what is loaded once
    for size in [(40_000, 20), (20, 40_000)]:
        Image.new('RGB', size, (200, 90, 30)).save(tmp_path / 'long.png')
        with memory_limit(64):
            pixels = transform(read_image(tmp_path / 'long.png', 3), 0)
        assert pixels.shape == (3, 224, 224)
        if crop_mode != 'border':
            assert pixels[:, 112, 112].tolist() == [200, 90, 30]


def test_the_middle_of_a_long_image_is_cropped_as_from_the_whole():
    band = Image.new('L', (1600, 20))
    band.putdata([x % 256 for _ in range(20) for x in range(1600)])
    cropped, plain = (make(input_size=(1, 20, 20), normalize=False) for make in (timm_transform, create_transform))
    assert middle(band).size == (320, 20) and torch.equal(cropped(band), plain(band))
    wide = Image.new('L', (320, 20))
    assert middle(wide) is wide


def test_images_of_usual_size_are_squared_at_their_own():
    image = squared(Image.new('RGB', (100, 60)), 'border', (1, 2, 3), 32)
    assert image.size == (100, 100) and image.getpixel((0, 0)) == (1, 2, 3)


def test_a_class_may_have_underscores_and_what_systems_leave_is_none(tmp_path):
    root = folder_of(tmp_path, '__background__', 'cat', '__MACOSX', '.cache')
    assert image_folder(root, 'train').classes == ('__background__', 'cat')
    inner = folder_of(root / 'cat', '__left__', count=1) / '__left__' / '0.png'
    assert str(inner) in files_in(root / 'cat')
    assert inner in find_images([root])


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    root = folder_of(tmp_path, 'cat', 'dog')
    folder_of(root / 'dog', 'secret')
    scandir = os.scandir

    def refused(path):  # root may read everything
        if Path(path).name == 'secret':
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refused)
    with pytest.raises(OSError, match=r'The folder .*secret cannot be read \(Permission denied\): give yourself'):
        image_folder(root, 'train')
    with pytest.raises(OSError, match='The folder .*secret cannot be read'):
        find_images([root])


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes with names here')
def test_a_pipe_among_the_images_is_not_waited_for(tmp_path):
    root = folder_of(tmp_path, 'cat', 'dog')
    pipe = root / 'cat' / '0pipe.png'
    os.mkfifo(pipe)
    images = image_folder(root, 'train')
    assert images.img_size == 8
    at = [path for path, _ in images.samples].index(str(pipe))
    with pytest.raises(OSError, match='0pipe.png cannot be read as an image .*no regular file'):
        images[at]
    with pytest.raises(OSError, match='/dev/zero cannot be read as an image'):
        read_image(Path('/dev/zero'), 3)
