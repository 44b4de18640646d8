"""Models whose files are damaged, or say what no model says, are refused in a sentence by every command."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from runs import small

from linvision.cli.pretrained import load_model, load_vit
from linvision.train.model import resolved
from linvision.train.pretrained import check_reading, load_backbone, load_teacher


def loaders():
    """Every way in which a command loads a model from a folder: its name and a function of the folder."""
    student = timm.create_model('test_linformer_vit', in_chans=1, num_classes=10)
    return {
        'predict, evaluate, report': load_model,
        'convert, export, visualize, spectrum': lambda name: load_vit(name, '', 0),
        '--init': lambda name: load_backbone(student, name),
        '--teacher': lambda name: load_teacher(name, student, 16, torch.device('cpu')),
        '--init without --model': lambda name: resolved(small(Path(name), model='', init=name)),
    }


def with_config(folder, **changes):
    """Change a model's `config.json`; a name with a dot is one of the inner config."""
    config = json.loads((folder / 'config.json').read_text())
    for name, value in changes.items():
        (config['pretrained_cfg'] if name in READING else config)[name] = value
    (folder / 'config.json').write_text(json.dumps(config))


READING = ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode', 'input_size')
ODD = [
    ({'label_names': 'bars'}, 'label_names must be a list of names'),
    ({'label_names': {'0': 'bar'}}, 'label_names must be a list of names'),
    ({'label_names': [['a']] * 10}, 'label_names must be a list of names'),
    ({'label_names': list(range(10))}, 'label_names must be a list of names'),
    ({'label_names': ['bar']}, 'label_names must be one for each of 10 classes, got 1'),
    ({'mean': 'grey'}, 'mean must be a list of numbers'),
    ({'mean': [None]}, 'mean must be a list of numbers'),
    ({'mean': [float('nan')]}, 'mean must be a list of numbers'),
    ({'mean': [[0.5]]}, 'mean must be a list of numbers'),
    ({'mean': {}}, 'mean must be a list of numbers'),
    ({'std': [0]}, 'std must be a list of numbers, above 0'),
    ({'std': [True]}, 'std must be a list of numbers, above 0'),
    ({'interpolation': 'bicubik'}, "Unknown interpolation 'bicubik'. Nearest: bicubic"),
    ({'interpolation': 5}, "Unknown interpolation '5'"),
    ({'interpolation': ['bicubic']}, 'Unknown interpolation'),
    ({'crop_mode': 'corner'}, "Unknown crop_mode 'corner'"),
    ({'crop_pct': 0}, 'crop_pct must be a number'),
    ({'crop_pct': 1e-9}, 'crop_pct must be a number'),
    ({'crop_pct': 1e9}, 'crop_pct must be a number'),
    ({'crop_pct': '1'}, 'crop_pct must be a number'),
    ({'input_size': [1, 16]}, 'input_size must be three whole numbers'),
    ({'input_size': [1, 16, 10**9]}, 'input_size must be three whole numbers'),
    ({'input_size': 16}, 'input_size must be three whole numbers'),
    ({'architecture': 5}, '/config.json is damaged .it names no architecture'),
    ({'architecture': 'no_such_model'}, 'no_such_model'),
    ({'model_args': {'embed_dim': -1}}, '.'),
    ({'model_args': {'embed_dim': 'x'}}, '.'),
    ({'model_args': {'no_such_argument': 1}}, 'no_such_argument'),
    ({'model_args': [1]}, 'model_args must be names with their values, got .1.'),
    ({'model_args': {'img_size': []}}, 'img_size must be a positive integer'),
    ({'model_args': {'in_chans': '3'}}, "in_chans must be a positive integer .* got '3'"),
    ({'pretrained_cfg': 5}, 'pretrained_cfg must be names with their values, got 5'),
    ({'num_classes': 'ten'}, '.'),
]


@pytest.mark.parametrize('change, words', ODD, ids=[next(iter(change)) + f'-{i}' for i, (change, _) in enumerate(ODD)])
def test_a_config_of_the_wrong_form_is_refused_in_a_sentence_by_every_command(change, words, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / 'odd')
    with_config(folder, **change)
    for name, load in loaders().items():
        with pytest.raises(ValueError, match=words) as refused:
            load(str(folder))
        assert 'odd' in str(refused.value) and '\n' not in str(refused.value), name


@pytest.mark.parametrize('change', [{'mean': [0.5] * 3}, {'std': [0.5] * 3}])
def test_a_mean_of_other_channels_is_refused_where_images_are_read_by_it(change, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / 'odd')
    with_config(folder, **change)
    for load in (load_model, lambda name: load_vit(name, '', 0)):
        with pytest.raises(ValueError, match=r'must be one number for each of 1 channels, got \[0.5, 0.5, 0.5\]'):
            load(str(folder))


DAMAGED = {
    'config.json': [b'', b'{', b'[]', b'null', b'\xff\xfe', b'[' * 10000],
    'model.safetensors': [b'', b'no weights', b'\xff' * 100, 'cut', 'header'],
}


@pytest.mark.parametrize('file, content', [(file, content) for file, each in DAMAGED.items() for content in each])
def test_damaged_files_of_a_model_are_named_by_every_command(file, content, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / 'odd')
    path = folder / file
    before = path.read_bytes()
    content = {'cut': before[: len(before) // 2], 'header': before[:20]}.get(content, content)
    path.write_bytes(content)
    for name, load in loaders().items():
        with pytest.raises(ValueError, match=f'/odd/{file} is damaged') as refused:
            load(str(folder))
        assert '\n' not in str(refused.value), name


def test_weights_in_a_file_that_is_not_there_are_missed_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.pt does not exist: a file with weights was expected'):
        load_vit('vit_tiny_patch16_224', str(tmp_path / 'nowhere.pt'), 0)


@pytest.mark.parametrize('kind', [AssertionError, KeyError, ZeroDivisionError])
def test_a_fault_of_ours_is_no_damaged_model(kind, model_folder, monkeypatch):
    def fail(*args, **kwargs):
        raise kind('ours')

    monkeypatch.setattr(timm, 'create_model', fail)
    with pytest.raises(kind, match='ours'):
        load_model(model_folder)
    with pytest.raises(ValueError, match='cannot be loaded: .*ours'):  # a hub's config, which nobody has looked at
        load_model('hf-hub:nobody/nothing')


def test_what_timms_own_models_say_of_images_is_accepted():
    for name in timm.list_models(pretrained=True):
        check_reading(timm.get_pretrained_cfg(name).to_dict())
