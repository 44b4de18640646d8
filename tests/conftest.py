"""What all tests share: one thread, a fixed seed, settings that are put back after each test, runs without pictures.

Heavy packages are imported in the fixtures: of several test processes, the first only shares out the tests.
"""

import gc
import os

os.environ['MPLBACKEND'] = 'Agg'  # before matplotlib is imported: no window
os.environ['NO_ALBUMENTATIONS_UPDATE'] = '1'  # before albumentations is imported: no network

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from linvision.train import Recipe


def pytest_configure() -> None:
    gc.disable()  # until all is imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose fixtures train in two processes come first; `gpu` tests are skipped where there is no CUDA device."""
    import torch

    # work stealing takes a worker's last tests: it would split these files, and both workers would train
    items.sort(key=lambda item: item.path.stem not in ('test_parallel', 'test_sequence_training'))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker('gpu'):  # keywords have the names of folders too
            item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))


@pytest.fixture(scope='session', autouse=True)
def draw() -> Iterator[Callable[..., None]]:
    """Runs draw no pictures, which take as long as the rest of a short run; what draws them."""
    import torch

    import linvision  # noqa: F401  (registers the models)
    from linvision.train.board import Board

    torch.set_num_threads(1)  # tests run in several processes
    gc.freeze()  # what is imported stays: else half a second each time that objects are collected
    gc.set_threshold(10_000, 10, 10)  # and that is seldom
    gc.enable()
    pictures = Board.pictures
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Board, 'pictures', lambda *args: None)
        yield pictures


@pytest.fixture
def with_pictures(draw: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw their pictures, for a test that is about them."""
    from linvision.train.board import Board

    monkeypatch.setattr(Board, 'pictures', draw)


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """A fixed seed; timm's choice of attention and torch's threads and default dtype are restored."""
    import torch
    from timm.layers import set_fused_attn, use_fused_attn

    torch.manual_seed(0)
    threads, dtype, fused = torch.get_num_threads(), torch.get_default_dtype(), use_fused_attn()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    set_fused_attn(fused)


@pytest.fixture
def small_recipe(tmp_path: Path) -> 'Recipe':
    """A run of seconds on the fake data set, in two stages; the tests change what they are about."""
    from runs import small

    return small(tmp_path / 'run')


@pytest.fixture(scope='session')
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model for the fake data set (grey 16×16 images, classes 'bar 0' … 'bar 9') as a run exports it."""
    import timm
    import torch
    from runs import data_config

    from linvision.data import create_dataset
    from linvision.train.export import export_model

    folder = tmp_path_factory.mktemp('exported')
    images = create_dataset('fake', folder, 'train')
    torch.manual_seed(0)
    model = timm.create_model('test_linformer_vit', in_chans=1, num_classes=10)
    export_model(model, folder, images, data_config(images))
    return folder
