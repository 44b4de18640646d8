"""Odd images and folders: long and thin, pipes, names that systems use too, folders that cannot be read."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from linvision.cli.images import find_images
from linvision.data.folders import files_in, image_folder
from linvision.data.image_file import read_image, squared


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
