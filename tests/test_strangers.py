"""What comes from a stranger runs nothing: folders of models and runs, checkpoints, data sets and their shards."""

import dataclasses
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed.checkpoint as dcp
from runs import assert_stops_change_nothing, free_port, small
from test_streams import CLASSES, write_shards

from linvision.cli import evaluate
from linvision.cli.pretrained import load_model, load_vit
from linvision.data import create_dataset
from linvision.train import train
from linvision.train.checkpoint import load_shards, read_state, seal
from linvision.train.pretrained import load_backbone, load_teacher
from scripts.tools import model_card, report


class Planted:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f'touch {self.marker}',)


@pytest.fixture
def marker(tmp_path):
    """The file that a planted command makes: it must not be there at the end."""
    path = tmp_path / 'it_ran'
    yield path
    assert not path.exists()


def plant(folder: Path, model: Path, **recipe) -> Path:
    """A folder as a run leaves it, whose `metrics.json` asks for data of the planter's."""
    asked = {'task': 'classify', 'dataset_args': {}, 'data_dir': 'data', 'output_dir': 'x', 'stages': [], **recipe}
    shutil.copytree(model, folder / 'model')
    (folder / 'metrics.json').write_text(json.dumps({'recipe': asked, 'top1': 0.5, 'num_samples': 100}))
    return folder


# ------------------------------------------------------------------------------------------- what metrics.json may say


def score(folder, **named):
    evaluate.main(str(folder), device='cpu', as_json=True, **named)


def card(folder):
    shutil.copy(folder / 'metrics.json', folder / 'model')
    model_card.main(str(folder / 'model'))  # an absolute path leads out of linvision/weights


@pytest.mark.parametrize('command', [score, report.report, card])
@pytest.mark.parametrize('dataset', ['wds/x', 'WDS/x', 'hfds/a/b', 'hfids/a/b', 'tfds/a', 'torch/cifar10'])
def test_a_folder_alone_opens_no_set_of_timms(command, dataset, model_folder, tmp_path, marker):
    args = {'train_split': 'a-{0..1}.tar|2', 'num_classes': 10}
    folder = plant(tmp_path / 'f', model_folder, dataset=dataset, data_dir=f'pipe:touch {marker} #', dataset_args=args)
    with pytest.raises(
        ValueError, match=rf"asks for the data set '{dataset}' in 'pipe:touch .*--dataset, --data-dir and"
    ):
        command(folder)


@pytest.mark.parametrize('command', [score, report.report])
@pytest.mark.parametrize(
    'asked, words',
    [
        ({'data_dir': 'pipe:touch MARKER #'}, 'asks for data in .*--data-dir FOLDER'),
        ({'data_dir': 'http://host/x'}, 'asks for data in .*--data-dir FOLDER'),
        ({'dataset_args': {'train_split': 'pipe:touch MARKER #'}}, 'train_split = .*--dataset-args train_split VALUE'),
        ({'dataset_args': {'x': 's3://a'}}, 'with x = .*--dataset-args x VALUE'),
        ({'dataset_args': {'download': True}}, 'with download = True'),
        ({'dataset_args': {'root': '/'}}, 'with root = '),
        ({'dataset_args': {'x': ['pipe:touch MARKER #']}}, 'with x = '),
        ({'dataset_args': ['pipe:touch MARKER #']}, 'is none that a run wrote'),
        ({'dataset': 5}, 'is none that a run wrote'),
    ],
)
def test_a_folder_alone_names_no_url(command, asked, words, model_folder, tmp_path, marker):
    asked = json.loads(json.dumps({'dataset': 'fake', **asked}).replace('MARKER', str(marker)))
    with pytest.raises(ValueError, match=words):
        command(plant(tmp_path / 'f', model_folder, **asked))


def test_what_the_user_names_takes_nothing_from_a_folder_that_asks_for_a_set_of_timms(
    model_folder, tmp_path, marker, capsys
):
    split = {'test_split': f'pipe:touch {marker} #', 'pipe': f'touch {marker} #'}
    folder = plant(tmp_path / 'f', model_folder, dataset='wds/x', data_dir=f'pipe:touch {marker}', dataset_args=split)
    score(folder, dataset='fake')
    assert json.loads(capsys.readouterr().out)['num_samples'] == 100
    for named in ({'dataset': 'wds/x'}, {'data_dir': tmp_path}):
        with pytest.raises(ValueError, match='name all of it yourself'):
            score(folder, **named)
    shards = write_shards(tmp_path / 'shards')
    with pytest.raises(ValueError, match='wds/x does not say how many classes'):
        score(folder, dataset='wds/x', data_dir=shards)
    with pytest.raises(ValueError, match='The model takes 1 channels, but the images of the set have 3'):
        score(folder, dataset='wds/x', data_dir=shards, dataset_args=CLASSES)


def test_a_run_goes_on_by_its_own_recipe_and_not_by_the_folders(model_folder, tmp_path, marker):
    folder = plant(tmp_path / 'f', model_folder, dataset='wds/x', data_dir=f'pipe:touch {marker} #')
    with pytest.raises(ValueError, match='holds a run of other settings'):
        train(small(folder))


def test_commands_that_read_a_model_read_no_metrics(model_folder, tmp_path, marker):
    folder = plant(tmp_path / 'f', model_folder, dataset='wds/x', data_dir=f'pipe:touch {marker} #')
    for load in (load_model, lambda name: load_vit(str(name), '', 0)):
        assert load(folder).num_classes == 10


# ----------------------------------------------------------------------------------------------- weights that are code


@pytest.fixture
def planted_model(model_folder, tmp_path, marker):
    """A model whose weights are a pickle that runs a command."""
    folder = shutil.copytree(model_folder, tmp_path / 'planted')
    (folder / 'model.safetensors').unlink()
    torch.save({'norm.weight': Planted(marker)}, folder / 'pytorch_model.bin')
    return folder


def test_weights_that_are_code_are_refused_by_every_command(planted_model, tmp_path):
    name, student = str(planted_model), timm.create_model('test_linformer_vit', in_chans=1, num_classes=10)
    for load in (
        load_model,  # and evaluate, report
        lambda name: load_vit(name, '', 0),  # and export, spectrum, visualize
        lambda name: load_vit('test_linformer_vit', f'{name}/pytorch_model.bin', 0),
        lambda name: load_backbone(student, name),  # --init
        lambda name: load_teacher(name, student, 16, torch.device('cpu')),  # --teacher
    ):
        with pytest.raises(ValueError, match='system|Unsupported') as refused:
            load(name)
        words = str(refused.value)  # a sentence, without torch's advice to load it all the same
        assert '\n' not in words and 'weights_only=False' not in words


# ------------------------------------------------------------------------------------------- streams, and their shards


ROOTS = ['pipe:touch MARKER #', 'PIPE:touch MARKER #', ' pipe:touch MARKER #', 'p\tipe:touch MARKER', 'x/pipe:touch M']


@pytest.mark.parametrize('root', ROOTS)
@pytest.mark.parametrize('kind', [str, Path])
def test_a_root_is_no_command(root, kind, marker):
    with pytest.raises((ValueError, FileNotFoundError), match='which may be a URL or a shell command|timm cannot open'):
        create_dataset('wds/x', kind(root.replace('MARKER', str(marker))), 'train', **CLASSES)


@pytest.mark.parametrize('url', ['http://host/x', 'https:/host/x', 's3://b', 'gs://b', 'hf://a', 'ais:b', 'file:/etc'])
def test_a_root_is_no_url(url):
    for root in (url, Path(url)):
        with pytest.raises(ValueError, match='data_dir is .* which may be a URL'):
            create_dataset('wds/x', root, 'train', **CLASSES)


@pytest.mark.parametrize('split', ['pipe:touch MARKER #.tar|9', 'a.tar::pipe:touch MARKER #.tar|9', 'http://h/a.tar|9'])
def test_a_split_is_no_command(split, tmp_path, marker):
    with pytest.raises(ValueError, match='train_split is .* which may be a URL or a shell command'):
        create_dataset('wds/x', tmp_path, 'train', train_split=split.replace('MARKER', str(marker)), **CLASSES)


@pytest.mark.parametrize('name', ['pipe:touch MARKER #.tar', '{pipe,x}:touch MARKER #.tar'])
def test_names_of_shards_in_a_strangers_folder_are_files(name, tmp_path, marker, monkeypatch):
    folder = write_shards(tmp_path / 'shards', shards=1)
    info = json.loads((folder / '_info.json').read_text())
    info['splits']['train']['filenames'] = [name.replace('MARKER', str(marker))]
    (folder / '_info.json').write_text(json.dumps(info))
    monkeypatch.chdir(folder)
    for root in (folder, '.', ''):
        stream = create_dataset('wds/x', root, 'train', **CLASSES).open(True, 0, 0, 4, 0)
        assert list(stream) == []  # no such file


def test_a_command_that_the_user_names_prints_shards(tmp_path, marker):
    folder = write_shards(tmp_path / 'shards', train=6, shards=1)
    images = create_dataset('wds/x', 'nowhere', 'train', pipe=f'cat {folder}', **CLASSES)
    assert len(images) == 6 and sorted(label for _, label in images.open(True, 0, 0, 2, 0)) == list(range(6))
    with pytest.raises(ValueError, match='pipe is a command that prints the shards of a wds/… set'):
        create_dataset('torch/cifar10', folder, 'train', pipe='cat')
    info = (folder / '_info.json').read_text()
    (folder / '_info.json').write_text(info.replace('train-0000.tar', f'x; touch {marker}'))
    again = lambda: create_dataset('wds/x', 'nowhere', 'train', pipe=f'cat {folder}')  # noqa: E731
    for look in (again, lambda: images.open(True, 0, 0, 2, 0)):
        with pytest.raises(ValueError, match='The name of a shard becomes part of a shell command'):
            look()


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope='module')
def sharded(tmp_path_factory):
    """A run under FSDP in one process, stopped after 4 steps, with a moving average."""
    recipe = small(tmp_path_factory.mktemp('sharded') / 'run', parallel='fsdp', ema_decay=0.9, batch_size=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MASTER_ADDR', 'localhost')
        patch.setenv('MASTER_PORT', str(free_port()))
        for name, value in {'RANK': 0, 'LOCAL_RANK': 0, 'WORLD_SIZE': 1}.items():
            patch.setenv(name, str(value))
        train(recipe.replace(max_steps=2))
        yield recipe


def with_metadata(recipe, folder, content):
    """A copy of a run whose only checkpoint has other metadata, with checksums that are right."""
    shutil.copytree(recipe.run.output_dir, folder)
    (path,) = (folder / 'checkpoints').iterdir()
    (path / 'shards/.metadata').write_bytes(content)
    (path / 'checksums.json').unlink()
    seal(path)
    return recipe.replace(output_dir=folder)


@pytest.mark.slow
def test_a_sharded_run_goes_on_to_the_weights_of_one_that_never_stopped(sharded, tmp_path):
    whole = sharded.replace(output_dir=tmp_path / 'whole', opt='muon')
    assert_stops_change_nothing(whole, tmp_path / 'parts', 2)


def test_metadata_that_are_code_are_refused(sharded, tmp_path, marker):
    recipe = with_metadata(sharded, tmp_path / 'run', pickle.dumps(Planted(marker)))
    with pytest.raises(OSError, match=r'/shards/\.metadata is not what a run writes.*(posix|nt)\.system.*--fresh'):
        train(recipe)


NONE = [b'', b'no pickle', pickle.dumps({}), pickle.dumps(dataclasses.field), b'cos\nsystem\n.']


@pytest.mark.parametrize('content', NONE, ids=range(len(NONE)))
def test_metadata_that_are_none_are_refused(sharded, tmp_path, content):
    recipe = with_metadata(sharded, tmp_path / 'run', content)
    with pytest.raises(OSError, match=r'/shards/\.metadata is not what a run writes'):
        train(recipe)


@pytest.mark.filterwarnings('ignore:torch.distributed is disabled')
def test_values_in_shards_that_are_code_are_refused(tmp_path, marker):
    dcp.save({'lr': Planted(marker)}, checkpoint_id=tmp_path / 'shards')
    with pytest.raises(OSError, match=r'/shards is not what a run writes.*system'):
        load_shards(tmp_path, {'lr': 0.1})


def test_a_state_that_is_code_is_refused(tmp_path, marker):
    torch.save(Planted(marker), tmp_path / 'state.pt')
    with pytest.raises(OSError, match=r'state\.pt is not what a run writes.*system'):
        read_state(tmp_path)


def test_nothing_of_ours_loads_a_pickle_as_it_is():
    root = Path(__file__).parents[1]
    for path in [p for folder in ('linvision', 'scripts', 'recipes') for p in (root / folder).rglob('*.py')]:
        for call in re.findall(r'torch\.load\([^\n]*|np\.load\([^\n]*|pickle\.loads?\([^\n]*', path.read_text()):
            assert 'weights_only=True' in call or 'allow_pickle=False' in call, f'{path}: {call}'
