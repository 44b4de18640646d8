"""The folder of a run: what is damaged in it is named and made again, and nothing but a run's own is moved."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from runs import small, weights

from linvision.cli import evaluate
from linvision.train import checkpoint, train
from linvision.train.checkpoint import newest_checkpoint, read_state, seal
from linvision.train.folder import finished_run, set_aside
from linvision.train.main import read_flags
from linvision.train.model import resolved
from scripts.tools import report


@pytest.fixture(scope='module')
def ended(tmp_path_factory):
    """A finished run of four steps, with checkpoints of the second and the last."""
    recipe = small(tmp_path_factory.mktemp('ended') / 'run', epochs=0.5, checkpoint_every=2)
    train(recipe)
    return recipe


@pytest.fixture
def recipe(ended, tmp_path):
    """That run in a folder of its own, which a test may spoil."""
    shutil.copytree(ended.run.output_dir, tmp_path / 'run')
    return ended.replace(output_dir=tmp_path / 'run')


def same(one, two):
    """Whether two runs have the same weights."""
    return all(torch.equal(value, weights(two.run.output_dir)[k]) for k, value in weights(one.run.output_dir).items())


# ------------------------------------------------------------------------------------------------- metrics.json, model/

DAMAGED = ['', '{', '{}', '[]', 'null', '5', '"x"', '{"recipe": []}', '{"recipe": null}', '[' * 10000, '\x00']


@pytest.mark.parametrize('content', DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_metrics_are_named(recipe, content, capsys):
    (recipe.run.output_dir / 'metrics.json').write_text(content)
    assert finished_run(recipe.run.output_dir, resolved(recipe)) == {}
    words = f'{recipe.run.output_dir}/metrics.json is damaged ('
    assert words in (out := capsys.readouterr().out) and 'scored again from its last checkpoint' in out


def test_damaged_metrics_are_made_again_from_the_last_checkpoint(ended, recipe):
    whole = json.loads((ended.run.output_dir / 'metrics.json').read_text())
    (recipe.run.output_dir / 'metrics.json').write_text('{')
    again = train(recipe)
    assert (again['top1'], again['loss'], again['steps']) == (whole['top1'], whole['loss'], 4)
    assert json.loads((recipe.run.output_dir / 'metrics.json').read_text()) == json.loads(json.dumps(again))


@pytest.mark.parametrize('content', ['{', '[]'])
@pytest.mark.parametrize('command', [lambda folder: evaluate.main(str(folder), device='cpu'), report.report])
def test_commands_name_damaged_metrics(recipe, content, command):
    (recipe.run.output_dir / 'metrics.json').write_text(content)
    with pytest.raises(ValueError, match='/metrics.json is damaged'):
        command(recipe.run.output_dir)


def test_metrics_without_checkpoints_are_not_made_again(recipe):
    (recipe.run.output_dir / 'metrics.json').write_text('{}')
    shutil.rmtree(recipe.run.output_dir / 'checkpoints')
    with pytest.raises(ValueError, match='/metrics.json is damaged.*Put it back as it was, or start over .*--fresh'):
        finished_run(recipe.run.output_dir, resolved(recipe))


def test_a_folder_in_the_place_of_the_metrics_is_named(recipe):
    (recipe.run.output_dir / 'metrics.json').unlink()
    (recipe.run.output_dir / 'metrics.json').mkdir()
    with pytest.raises(ValueError, match='/metrics.json is a folder, where a run writes a file'):
        finished_run(recipe.run.output_dir, resolved(recipe))


def spoil(folder, how):
    """Damage a model's folder."""
    file = folder / 'model.safetensors'
    if how == 'gone':
        shutil.rmtree(folder)
    elif how == 'without weights':
        file.unlink()
    elif how == 'cut':
        file.write_bytes(file.read_bytes()[:-100])
    elif how == 'empty':
        file.write_bytes(b'')
    else:
        (folder / 'config.json').write_text(how)


@pytest.mark.parametrize('how', ['gone', 'without weights', 'cut', 'empty', '{', '[]', '{"architecture": 5}'])
def test_a_damaged_model_is_named(recipe, how, capsys):
    spoil(recipe.run.output_dir / 'model', how)
    assert finished_run(recipe.run.output_dir, resolved(recipe)) == {}
    words = f'{recipe.run.output_dir}/model'
    assert words in (out := capsys.readouterr().out) and 'its model written again from its last checkpoint' in out


@pytest.mark.parametrize('how', ['gone', 'cut'])
def test_a_damaged_model_is_written_again(ended, recipe, how):
    spoil(recipe.run.output_dir / 'model', how)
    assert train(recipe)['steps'] == 4 and same(ended, recipe)


def test_a_model_that_was_moved_away_with_its_checkpoints_leaves_the_score(recipe, capsys):
    for name in ('model', 'checkpoints'):
        shutil.rmtree(recipe.run.output_dir / name)
    assert 'top1' in finished_run(recipe.run.output_dir, resolved(recipe))
    assert 'model does not exist' in (out := capsys.readouterr().out) and 'the score alone is left' in out


# -------------------------------------------------------------------------------------------------------- checkpoints/


def with_state(path, change):
    """Change what a checkpoint holds, with checksums that are right."""
    torch.save(change(read_state(path)), path / 'state.pt')
    (path / 'checksums.json').unlink()
    seal(path)


def without(*keys):
    """A state that lacks a key, or a key within one."""

    def change(state):
        inner = state
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        return state

    return change


def as_folder(path):
    (path / 'state.pt').unlink()
    (path / 'state.pt').mkdir()


SPOILT = {
    'checksums a list': lambda path: (path / 'checksums.json').write_text('[]'),
    'checksums null': lambda path: (path / 'checksums.json').write_text('null'),
    'checksums of nothing': lambda path: (path / 'checksums.json').write_text('{}'),
    'checksums cut': lambda path: (path / 'checksums.json').write_text('{"state'),
    'checksums no text': lambda path: (path / 'checksums.json').write_bytes(b'\xff\xfe\xff'),
    'no checksums': lambda path: (path / 'checksums.json').unlink(),
    'a state that is a folder': as_folder,
    'no state': lambda path: (path / 'state.pt').unlink(),
    'an empty state': lambda path: with_state(path, lambda state: {}),
    'a state that is none': lambda path: with_state(path, lambda state: [1]),
    'no recipe': lambda path: with_state(path, without('recipe')),
    'no arguments of the set': lambda path: with_state(path, without('recipe', 'dataset_args')),
    'no precision': lambda path: with_state(path, without('precision')),
    'no learner': lambda path: with_state(path, without('learner')),
    'no scaler': lambda path: with_state(path, without('learner', 'scaler')),
    'no schedule': lambda path: with_state(path, without('learner', 'schedule')),
    'no random states': lambda path: with_state(path, without('random')),
}


@pytest.mark.parametrize('spoil', SPOILT.values(), ids=SPOILT)
def test_of_damaged_checkpoints_the_one_before_is_used(recipe, spoil, capsys):
    folder = recipe.run.output_dir / 'checkpoints'
    spoil(folder / 'step_00000004')
    assert newest_checkpoint(folder) == folder / 'step_00000002'
    assert f'{folder}/step_00000004 is damaged (' in capsys.readouterr().out
    assert (folder / 'damaged_step_00000004').is_dir()


def test_a_run_goes_on_from_the_checkpoint_before_to_the_same_weights(ended, recipe):
    with_state(recipe.run.output_dir / 'checkpoints/step_00000004', lambda state: {})
    (recipe.run.output_dir / 'metrics.json').unlink()
    assert train(recipe)['steps'] == 4 and same(ended, recipe)


@pytest.mark.parametrize('keys', [('learner', 'model'), ('learner', 'optimizer'), ('learner', 'model', 'head.weight')])
def test_a_checkpoint_without_a_part_of_the_model_is_a_sentence(recipe, keys):
    with_state(recipe.run.output_dir / 'checkpoints/step_00000004', without(*keys))
    (recipe.run.output_dir / 'metrics.json').unlink()
    with pytest.raises(ValueError, match='step_00000004 is a checkpoint of another model'):
        train(recipe)


@pytest.mark.parametrize('progress', [None, {}, [], {'stride': 4}])
def test_a_checkpoint_without_a_place_is_a_sentence(recipe, progress):
    with_state(recipe.run.output_dir / 'checkpoints/step_00000004', lambda state: {**state, 'progress': progress})
    (recipe.run.output_dir / 'metrics.json').unlink()
    with pytest.raises(ValueError, match='step_00000004 is of another version of linvision'):
        train(recipe)


def test_random_states_that_cannot_be_put_back_change_nothing(ended, recipe):
    odd = dict.fromkeys(('python', 'numpy', 'torch', 'cuda'), 5)
    for path in (recipe.run.output_dir / 'checkpoints').iterdir():
        with_state(path, lambda state: {**state, 'random': odd})
    (recipe.run.output_dir / 'metrics.json').unlink()
    train(recipe)
    assert same(ended, recipe)


def test_a_checkpoint_that_cannot_be_read_is_a_sentence_and_stays(recipe, monkeypatch):
    def refuse(path):
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr(checkpoint, 'digest', refuse)
    folder = recipe.run.output_dir / 'checkpoints'
    with pytest.raises(
        OSError, match='step_00000004 cannot be read .*Permission denied.*Let it be read.*or move it away'
    ):
        newest_checkpoint(folder)
    assert (folder / 'step_00000004').is_dir()


def test_what_is_no_checkpoint_is_left_alone(recipe):
    folder = recipe.run.output_dir / 'checkpoints'
    for name in ('x.part', 'step_notes.txt', 'step_00000009', 'step_1'):
        (folder / name).write_text('mine')
    (folder / 'best.part').mkdir()
    (folder / 'step_00000006.part').write_text('of a run that died')
    assert newest_checkpoint(folder) == folder / 'step_00000004'
    (recipe.run.output_dir / 'metrics.json').unlink()
    train(recipe)
    kept = {'x.part', 'step_notes.txt', 'step_00000009', 'step_1', 'best.part', 'step_00000002', 'step_00000004'}
    assert set(os.listdir(folder)) == kept


@pytest.mark.parametrize('name', ['checkpoints', 'model'])
def test_a_file_in_the_place_of_a_runs_folder_is_named_before_training(small_recipe, name):
    small_recipe.run.output_dir.mkdir()
    (small_recipe.run.output_dir / name).write_text('mine')
    with pytest.raises(OSError, match=f'{name}, and that is a file.*Move it away'):
        train(small_recipe)


# -------------------------------------------------------------------------------------------------------------- --fresh


def test_fresh_moves_what_a_run_wrote_and_nothing_else(recipe):
    folder = recipe.run.output_dir
    mine = ('thesis.tex', 'images/a.png', 'earlier_backup/x', 'earlier_/x', '.git/config', 'report.md')
    for name in mine:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text('mine')
    (folder / 'earlier_7').mkdir()
    (folder / 'report.json').write_text('{}')
    set_aside(folder)
    assert all((folder / name).read_text() == 'mine' for name in mine)
    moved = {'checkpoints', 'model', 'tensorboard', 'metrics.json', 'report.json'}
    assert set(os.listdir(folder / 'earlier_8')) == moved and not moved & set(os.listdir(folder))
    set_aside(folder)
    assert not (folder / 'earlier_9').exists()


def test_fresh_moves_no_folder_of_a_runs_name_in_which_no_run_wrote(tmp_path):
    for name in ('checkpoints/mine.txt', 'model/network.py', 'tensorboard/notes.txt'):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text('mine')
    (tmp_path / 'metrics.json').mkdir()
    set_aside(tmp_path)
    assert set(os.listdir(tmp_path)) == {'checkpoints', 'model', 'tensorboard', 'metrics.json'}


def test_a_run_without_its_data_leaves_nothing_behind(small_recipe, tmp_path):
    missing = small_recipe.replace(dataset='image_folder', data_dir=tmp_path / 'nowhere')
    with pytest.raises(FileNotFoundError):
        train(missing)
    assert os.listdir(tmp_path) == []
    missing.run.output_dir.mkdir()  # one's own folder stays
    with pytest.raises(FileNotFoundError):
        train(missing)
    assert os.listdir(tmp_path) == ['run'] and os.listdir(tmp_path / 'run') == []


def test_epochs_switch_minutes_off_and_both_are_refused(small_recipe):
    by_the_clock = small_recipe.replace(max_minutes=15)
    for words in (['--epochs', '2'], ['--epochs=2'], ['--max-minutes', '0', '--epochs', '2']):
        run = read_flags(by_the_clock, args=words).run
        assert (run.epochs, run.max_minutes) == (2, 0)
    assert read_flags(by_the_clock, args=['--max_minutes', '3']).run.max_minutes == 3
    assert read_flags(by_the_clock, args=['--model-args', 'epochs', '3']).run.max_minutes == 15
    with pytest.raises(ValueError, match='--epochs 2 and --max-minutes 3 both say .*: give one'):
        read_flags(small_recipe, args=['--epochs', '2', '--max_minutes', '3'])


@pytest.mark.parametrize(
    'words', [('--output-dir', ''), ('--output-dir=',), ('--output_dir', '', '--fresh'), ('--data-dir', '')]
)
def test_an_empty_path_is_refused(small_recipe, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='is empty: name a folder'):
        read_flags(small_recipe, args=words)
    with pytest.raises(ValueError, match='output_dir is empty'):
        train(small_recipe.replace(output_dir=''))
    assert os.listdir(tmp_path) == [] and read_flags(small_recipe, args=['--output-dir', '.']).run.output_dir == Path()


def test_a_report_removes_its_own_pictures_alone(recipe):
    images = recipe.run.output_dir / 'images'
    images.mkdir()
    for name in ('00012_bar.png', 'mine.png', '2024_holiday.png'):
        (images / name).write_bytes(b'')
    report.save_images(images, None, [])
    assert sorted(os.listdir(images)) == ['2024_holiday.png', 'mine.png']
