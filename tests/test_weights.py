"""Weights that come with the package: no network, the score that the card names, timm's ways in and out."""

import json
import os
import shutil
import socket
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from runs import CPU
from timm.data import create_transform, resolve_model_data_config
from timm.models import _hub, push_to_hf_hub
from torchvision.transforms.functional import to_pil_image

from linvision.data import create_batches, create_dataset
from linvision.train.evaluate import evaluate

ROOT = Path(__file__).parents[1]
NAMES = timm.list_models('*linformer_vit*', pretrained=True)
GOLDEN = {  # logits of the ramp below, fp32, torch 2.14.1
    'linformer_vit_pico_patch1_32.fashion_mnist': [
        *(2.1130807, -1.0465409, -2.1195104, -0.2585614, -0.3483056),
        *(-3.2363343, 2.1212339, -7.3743868, 8.8493624, -2.3217034),
    ],
    'linformer_vit_pico_patch1_32.cifar10': [
        *(4.8490238, -3.6003799, 4.3102479, 1.6412237, 1.2206961),
        *(-0.2556204, -1.7183467, -4.3096976, 1.9131582, -3.4872794),
    ],
    'linformer_vit_pico_patch2_64.tiny_imagenet': [  # of its first classes
        *(2.8140094, -3.4593773, -1.7091845, -1.3118727, 2.3995481),
        *(-0.9058923, 0.9017854, -0.2767636, 0.4147012, 0.3162315),
    ],
}
SLICE = {  # test images, and how many of them are right; of CIFAR-10 those of the JPEG copy
    'linformer_vit_pico_patch1_32.fashion_mnist': (400, 375),
    'linformer_vit_pico_patch1_32.cifar10': (200, 167),
    'linformer_vit_pico_patch2_64.tiny_imagenet': (100, 79),
}


@pytest.fixture
def offline(monkeypatch):
    """No connection can be made."""

    def refuse(*args, **kwargs):
        raise OSError('the network is off')

    connect = socket.socket.connect

    def local(self, address):  # to the workers of a data loader
        return connect(self, address) if self.family == socket.AF_UNIX else refuse()

    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    monkeypatch.setattr(socket.socket, 'connect', local)


@pytest.fixture(params=NAMES)
def model(request, offline):
    return timm.create_model(request.param, pretrained=True).eval()


def name_of(model):
    return f'{model.pretrained_cfg["architecture"]}.{model.pretrained_cfg["tag"]}'


def ramp(model):
    """A fixed image."""
    size = model.pretrained_cfg['input_size']
    return torch.linspace(-1, 1, size[0] * size[1] * size[2]).view(1, *size)


def test_every_weight_has_a_golden_output_and_a_small_file():
    assert set(NAMES) == set(GOLDEN) == set(SLICE)
    for name in NAMES:
        file = Path(timm.get_pretrained_cfg(name).file)
        assert file.stat().st_size <= 4e6 and file.parent.name == name


def test_weights_load_without_a_network_and_give_the_golden_output(model):
    expected = torch.tensor([GOLDEN[name_of(model)]])
    torch.testing.assert_close(model(ramp(model))[:, :10], expected, rtol=1e-3, atol=1e-3)


def test_the_tagged_weights_are_the_default():
    assert timm.get_pretrained_cfg('linformer_vit_pico_patch1_32').tag == 'cifar10'
    plain = timm.create_model('linformer_vit_pico_patch1_32.untrained')
    assert plain.num_classes == 1000 and plain.patch_embed.proj.in_channels == 3


def test_colour_images_of_one_grey_and_another_size_and_head_take_the_weights(model):
    name = name_of(model)
    if ramp(model).shape[1] == 1:
        colour = timm.create_model(name, pretrained=True, in_chans=3).eval()
        torch.testing.assert_close(colour(ramp(model).expand(-1, 3, -1, -1)), model(ramp(model)), rtol=1e-4, atol=1e-4)
    other = timm.create_model(name, pretrained=True, num_classes=3, img_size=48).eval()
    expected = timm.create_model(name, pretrained=True, img_size=48).eval()
    images = torch.randn(1, ramp(model).shape[1], 48, 48)
    assert other(images).shape == (1, 3)
    torch.testing.assert_close(other.forward_features(images), expected.forward_features(images))


def test_weights_have_the_arguments_that_they_were_trained_with():
    model = timm.create_model('linformer_vit_pico_patch1_32.cifar10', pretrained=True)
    assert model.blocks[0].attn.local.grid == (16, 16)  # its size alone would say 32
    other = timm.create_model('linformer_vit_pico_patch1_32.cifar10', local_grid=8)
    assert other.blocks[0].attn.local.grid == (8, 8)
    model = timm.create_model('linformer_vit_pico_patch1_32.fashion_mnist', pretrained=True)
    assert model.blocks[0].attn.local.grid == (32, 32)


@pytest.mark.parametrize('name', NAMES)
def test_a_name_without_its_tag_is_that_of_its_default_weights(name):
    architecture, tag = name.split('.')
    if timm.get_pretrained_cfg(architecture).tag != tag:
        pytest.skip(reason='another tag is the default')
    model = timm.create_model(architecture, pretrained=True).eval()
    expected = torch.tensor([GOLDEN[name]])
    torch.testing.assert_close(model(ramp(model))[:, :10], expected, rtol=1e-3, atol=1e-3)


def test_what_is_pushed_to_a_hub_is_what_a_folder_gives(model, tmp_path, monkeypatch):
    class Hub:
        """Keeps the folder."""

        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            return type('Url', (), {'repo_id': repo_id})

        def file_exists(self, **kwargs):
            return False

        def upload_folder(self, folder_path, **kwargs):
            shutil.copytree(folder_path, tmp_path / 'repo')

    monkeypatch.setattr(_hub, 'HfApi', Hub)
    names = {'label_names': ['a'] * model.num_classes}
    push_to_hf_hub(model, 'someone/model', safe_serialization=True, model_config=names)
    assert {path.name for path in (tmp_path / 'repo').iterdir()} == {'config.json', 'model.safetensors', 'README.md'}
    found = timm.create_model(f'local-dir:{tmp_path}/repo', pretrained=True).eval()
    assert torch.equal(found(ramp(model)), model(ramp(model)))
    for key in ('mean', 'std', 'crop_pct', 'crop_mode'):
        assert resolve_model_data_config(found)[key] == resolve_model_data_config(model)[key]
    assert '/linvision/' not in (tmp_path / 'repo/config.json').read_text()  # no path of this machine


def test_the_score_on_a_slice_of_the_test_set_with_the_inputs_that_timm_makes(model):
    dataset = model.pretrained_cfg['tag']
    n, right = SLICE[name_of(model)]
    try:
        images = create_dataset(dataset, os.environ.get('LINVISION_DATA', ROOT / 'data'), 'test', download=False)
    except FileNotFoundError:
        pytest.skip(reason=f'{dataset} is in neither LINVISION_DATA nor {ROOT}/data')
    images = images.subset(torch.arange(n))
    config = resolve_model_data_config(model)
    batches, size = create_batches(images, 100, config['mean'], config['std'], CPU), config['input_size'][-1]
    assert evaluate(model, batches, size)['top1'] * n == pytest.approx(right)
    transform = create_transform(**config)
    read = torch.stack([transform(to_pil_image(image)) for image, _ in images])
    torch.testing.assert_close(read, torch.cat([part for part, _ in batches.ordered(size)]))  # so is timm's score
    assert images.classes == model.pretrained_cfg['label_names']


def test_the_card_names_the_score_and_the_recipe():
    for name in NAMES:
        folder = Path(timm.get_pretrained_cfg(name).file).parent
        card = (folder / 'README.md').read_text()
        metrics = json.loads((folder / 'metrics.json').read_text())
        assert f'{100 * metrics["top1"]:.2f} %' in card and metrics['recipe']['model'] in card


@pytest.mark.slow
def test_the_wheel_holds_the_weights(tmp_path):
    from hatchling import build

    where = Path.cwd()
    shutil.copytree(ROOT, tmp_path / 'source', ignore=shutil.ignore_patterns('.git', '.venv', 'data', 'outputs'))
    os.chdir(tmp_path / 'source')
    try:
        wheel = build.build_wheel(str(tmp_path))
    finally:
        os.chdir(where)
    names = zipfile.ZipFile(tmp_path / wheel).namelist()
    for name in NAMES:
        assert {f'linvision/weights/{name}/{file}' for file in ('config.json', 'model.safetensors')} <= set(names)
