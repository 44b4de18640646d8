"""A run that has trained ends with its score and its model, whatever else fails."""

import builtins
import json
import os
import shutil

import pytest
import torch
from PIL import Image
from runs import events, save_folder, small, weights

from linvision.analysis.figure_text import literal
from linvision.cli import predict
from linvision.cli.pretrained import load_model
from linvision.data import create_dataset, in_memory, loader_batches
from linvision.train import events as tensorboard
from linvision.train import train

pytestmark = pytest.mark.usefixtures('with_pictures')


@pytest.fixture
def recipe(small_recipe):
    return small_recipe.replace(epochs=0.5)


@pytest.fixture
def folders(tmp_path):
    """A run on image files in two classes: 20 for training, 6 for the test."""
    for split, n in (('train', 20), ('test', 6)):
        images = create_dataset('fake', '', split, img_size=16, num_classes=2).subset(torch.arange(n))
        save_folder(images, tmp_path / 'bars' / split)
    return small(tmp_path / 'run', dataset='image_folder', data_dir=tmp_path / 'bars', stages=(), batch_size=10)


def whole(folder):
    """Whether a run's folder holds a score, and weights that load."""
    return 'top1' in json.loads((folder / 'metrics.json').read_text()) and bool(weights(folder))


# -------------------------------------------------------------------------------------------- pictures and TensorBoard


@pytest.mark.parametrize('name', [b'$^$', b'$\\frac{', b'\xff\xfe', '服'.encode()])
def test_a_class_may_have_any_name_that_a_folder_has(folders, name, caplog):
    for split in ('train', 'test'):
        path = folders.data.data_dir / split
        (path / 'bar 0').rename(path / os.fsdecode(name))
    assert os.fsdecode(name) in train(folders)['classes']
    assert not caplog.records
    assert {'test/misclassified', 'test/attention'} <= set(events(folders.run.output_dir).Tags()['images'])


@pytest.mark.parametrize('text', ['$^$', r'\$', 'a $b$ c', r'a\$$', '$'])
def test_text_in_pictures_is_no_mathematics(text):
    from matplotlib.text import Text

    drawn = Text(text=literal(text))
    assert drawn._preprocess_math(drawn.get_text()) == (text, False)


def test_a_picture_that_fails_costs_the_picture_alone(recipe, monkeypatch, caplog):
    def broken(*args):
        raise ZeroDivisionError('no such picture')

    monkeypatch.setattr('linvision.train.pictures.misclassified', broken)
    train(recipe)
    assert whole(recipe.run.output_dir)
    assert [r.getMessage() for r in caplog.records] == [
        'no picture test/misclassified (ZeroDivisionError: no such picture); score and model are written all the same'
    ]
    assert 'test/attention' in events(recipe.run.output_dir).Tags()['images']


def test_a_run_without_matplotlib_has_its_score_and_says_what_is_missing(recipe, monkeypatch, caplog):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith('matplotlib'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', without)
    train(recipe)
    assert whole(recipe.run.output_dir)
    assert "A picture of a run needs matplotlib: pip install 'linvision[train]'" in caplog.text


def test_a_folder_where_tensorboard_cannot_write_costs_its_curves_alone(recipe, caplog):
    recipe.run.output_dir.mkdir()
    (recipe.run.output_dir / 'tensorboard').write_text('a file')
    train(recipe.replace(checkpoint_every=2))
    assert whole(recipe.run.output_dir) and len(list((recipe.run.output_dir / 'checkpoints').glob('step_*'))) == 2
    (record,) = caplog.records
    assert 'TensorBoard cannot write to' in record.getMessage() and '/tensorboard (' in record.getMessage()


def test_points_of_steps_that_were_lost_leave_the_curve(tmp_path):
    for first, steps in ((0, (1, 2, 3, 4, 5)), (3, (5, 6))):  # a run that died after step 5, and goes on from step 3
        board = tensorboard.Events(tmp_path / 'tensorboard', first)
        for step in steps:
            board.write('add_scalar', 'loss', float(first), step)
        board.close()
    assert [(p.step, p.value) for p in events(tmp_path).Scalars('loss')] == [(1, 0), (2, 0), (3, 0), (5, 3), (6, 3)]


@pytest.mark.parametrize('calls', [1, 30])
def test_a_disk_that_fills_up_under_tensorboard_costs_its_curves_alone(recipe, monkeypatch, caplog, calls):
    from tensorboard.summary.writer.record_writer import RecordWriter

    write, done = RecordWriter.write, []

    def full(self, data):
        done.append(1)
        if len(done) >= calls:
            raise OSError(28, 'No space left on device')
        return write(self, data)

    monkeypatch.setattr(RecordWriter, 'write', full)
    train(recipe.replace(log_every=1, checkpoint_every=2))
    assert whole(recipe.run.output_dir) and len(list((recipe.run.output_dir / 'checkpoints').glob('step_*'))) == 2
    (record,) = caplog.records  # once
    assert 'No space left on device; ' in record.getMessage() and 'Make room there' in record.getMessage()


def test_errors_in_threads_of_others_are_told_as_before(tmp_path):
    import threading

    before, told = threading.excepthook, []
    threading.excepthook = told.append
    try:
        shown = tensorboard.Events(tmp_path, 0)
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
        shown.close()
        assert [args.exc_type for args in told] == [ZeroDivisionError] and threading.excepthook == told.append
    finally:
        threading.excepthook = before


# ---------------------------------------------------------------------------------------------- images at the very end


@pytest.mark.parametrize('size', [(2000, 10), (10, 2000), (4000, 1)])
def test_a_long_thin_image_is_scored_and_predicted(folders, size):
    path = folders.data.data_dir / 'test/bar 1/00001.png'
    Image.new('L', size, 100).save(path)
    metrics = train(folders.replace(crop_mode='border'))
    assert metrics['num_samples'] == 6 and metrics['num_left_out'] == 0
    (found,) = predict.predict(load_model(folders.run.output_dir), [path])
    assert len(found['classes']) == 2


def test_a_transform_that_fails_is_an_error_of_that_image(folders, monkeypatch, tmp_path):
    path = folders.data.data_dir / 'test/bar 1/00001.png'
    Image.new('L', (30, 16), 100).save(path)
    make = loader_batches.evaluation_transform

    def strict(*args, **cropping):
        change = make(*args, **cropping)

        def refuse(image, seed=0):
            if image.size == (30, 16):
                raise ZeroDivisionError('too wide')
            return change(image, seed)

        return refuse

    monkeypatch.setattr(loader_batches, 'evaluation_transform', strict)
    with pytest.raises(
        OSError, match=r'00001.png cannot be brought to the size of the model \(ZeroDivisionError: too w'
    ):
        train(folders)
    assert weights(folders.run.output_dir), 'the weights are there before the score'
    metrics = train(folders.replace(on_bad_image='skip'))
    assert metrics['num_samples'] == 5 and metrics['num_left_out'] == 1 and whole(folders.run.output_dir)


def test_a_test_image_that_is_damaged_while_the_run_trains_costs_no_weights(folders):
    (folders.data.data_dir / 'test/bar 1/00001.png').write_bytes(b'no image')
    with pytest.raises(OSError, match='00001.png cannot be read as an image.*--on-bad-image skip'):
        train(folders)
    trained = weights(folders.run.output_dir)
    assert train(folders.replace(on_bad_image='skip'))['num_left_out'] == 1
    assert all(torch.equal(trained[name], value) for name, value in weights(folders.run.output_dir).items())


def test_a_set_in_memory_leaves_out_what_cannot_be_changed(folders, monkeypatch):
    images = create_dataset('image_folder', folders.data.data_dir, 'test')

    def refuse(image):
        if image.getpixel((0, 0)) == images[2][0].getpixel((0, 0)) and image == images[2][0]:
            raise ValueError('not this one')
        return torch.zeros(1, 16, 16, dtype=torch.uint8)

    monkeypatch.setattr('linvision.data.batches.evaluation_transform', lambda *args: refuse)
    assert len(in_memory(images, 16, on_bad_image='skip')) == 5
    with pytest.raises(OSError, match='not this one'):
        in_memory(images, 16)
    shutil.rmtree(folders.data.data_dir)
