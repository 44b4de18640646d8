"""What all tests share: one thread, a fixed seed, and settings that are put back after each test."""

import os

os.environ['MPLBACKEND'] = 'Agg'  # before matplotlib is imported: no window
os.environ['NO_ALBUMENTATIONS_UPDATE'] = '1'  # before albumentations is imported: no network

from pathlib import Path

import pytest
import timm
import timm.layers
import torch
from runs import data_config, small

import linvision  # noqa: F401  (registers the models)
from linvision.data import create_dataset
from linvision.train import Recipe
from linvision.train.export import export_model

torch.set_num_threads(1)  # tests run in several processes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker('gpu'):  # keywords have the names of folders too
            item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))


@pytest.fixture(autouse=True)
def settings():
    """A fixed seed; timm's choice of attention and torch's threads and default dtype are restored."""
    torch.manual_seed(0)
    threads, dtype, fused = torch.get_num_threads(), torch.get_default_dtype(), timm.layers.use_fused_attn()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    timm.layers.set_fused_attn(fused)


@pytest.fixture
def small_recipe(tmp_path: Path) -> Recipe:
    """A run of seconds on the fake data set, in two stages; the tests change what they are about."""
    return small(tmp_path / 'run')


@pytest.fixture(scope='session')
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model for the fake data set (grey 16×16 images, classes 'bar 0' … 'bar 9') as a run exports it."""
    folder = tmp_path_factory.mktemp('exported')
    images = create_dataset('fake', folder, 'train')
    torch.manual_seed(0)
    model = timm.create_model('test_linformer_vit', in_chans=1, num_classes=10)
    export_model(model, folder, images, data_config(images))
    return folder
