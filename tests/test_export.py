"""What is exported computes what the model does, for any number of images; what does not is removed."""

import itertools
import json

import pytest
import timm
import torch
from runs import slow_but

from linvision.cli import export
from linvision.cli.pretrained import load_model
from linvision.convert import from_vit


def class_token_model():
    vit = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=2)
    return from_vit(vit, 4, 'separable')


MODELS = {
    'pixels': lambda: timm.create_model('test_linformer_vit'),
    'features': lambda: timm.create_model('test_linformer_vit', num_classes=0, in_chans=1),
    'class_token': class_token_model,
}


@pytest.mark.parametrize('suffix, name', slow_but([('.pt2', 'class_token')], itertools.product(export.FORMATS, MODELS)))
@pytest.mark.filterwarnings('ignore')  # what onnxscript and torch.export deprecate among themselves
def test_an_exported_file_gives_the_models_outputs_on_other_images_and_batches(suffix, name, tmp_path):
    if suffix == '.onnx':
        pytest.importorskip('onnxscript', reason='needs the [onnx] extra')
    model = MODELS[name]()
    report = export.export(model, tmp_path / (name + suffix))
    images = torch.randn(3, model.in_chans, *model.patch_embed.img_size)
    found = export.FORMATS[suffix][1](tmp_path / (name + suffix))(images)
    torch.testing.assert_close(found, model(images).detach(), rtol=1e-3, atol=1e-4)
    assert report['input'] == ['batch', *images.shape[1:]] and report['largest_relative_difference'] < 1e-4


@pytest.mark.parametrize('suffix', export.FORMATS)
@pytest.mark.filterwarnings('ignore')  # as above
def test_a_file_says_how_images_are_read_and_what_the_classes_are(suffix, tmp_path, model_folder, caplog):
    if suffix == '.onnx':
        pytest.importorskip('onnxscript', reason='needs the [onnx] extra')
    file = tmp_path / f'model{suffix}'
    model = load_model(model_folder)
    model.blocks = model.blocks[:1]  # one is enough for what is said
    model.projection.truncate(1)
    report = export.export(model, file)
    if suffix == '.onnx':
        import onnxruntime

        found = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
        found = {name: json.loads(value) for name, value in found.items()}
        assert 'constant folding' not in caplog.text
    else:
        files = {'images.json': ''}
        torch.export.load(file, extra_files=files)
        found = json.loads(files['images.json'])
    assert found['classes'] == [f'bar {i}' for i in range(10)] and found['input'] == ['batch', 1, 16, 16]
    assert {'mean', 'std', 'crop_pct', 'crop_mode', 'interpolation'} < set(found)
    assert all(found[name] == json.loads(json.dumps(report[name])) for name in found)


FREE = {
    'pixels': {},
    'linear': {'projection': 'linear', 'sharing': 'key_value', 'proj_len': (9, 16)},
    'dynamic': {'projection': 'dynamic', 'pos_embed': 'separable'},
    'none': {'projection': 'none', 'patch_size': 2, 'local_size': 0},
    'positions': {'pos_embed': 'learn', 'class_token': True, 'local_size': 5, 'local_grid': 4},
}


@pytest.mark.parametrize('suffix, name', slow_but([('.pt2', 'pixels')], itertools.product(export.FORMATS, FREE)))
@pytest.mark.filterwarnings('ignore')  # as above
@torch.no_grad()
def test_a_file_of_free_size_gives_the_models_outputs_at_every_size(suffix, name, tmp_path, monkeypatch):
    if suffix == '.onnx':
        pytest.importorskip('onnxscript', reason='needs the [onnx] extra')
    model = timm.create_model('test_linformer_vit', depth=1, dynamic_img_size=True, **FREE[name]).eval()
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)  # the local path starts at zero
    write, read, needs = export.FORMATS[suffix]
    runs = []  # the file as it was read to be checked: reading takes seconds
    monkeypatch.setitem(export.FORMATS, suffix, (write, lambda file: runs.append(read(file)) or runs[-1], needs))
    report = export.export(model, tmp_path / f'model{suffix}', free_size=True)
    assert report['input'] == ['batch', 3, 'height', 'width'] and len(report['sizes']) == 3
    assert (tmp_path / f'model{suffix}').exists()
    (run,) = runs
    for size in (report['at_least'], (16, 16), (44, 28)):  # the last: taps of a local path further apart
        images = torch.randn(3, 3, *size)
        torch.testing.assert_close(run(images), model(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('kind', ['conv', 'mean_pool', 'max_pool'])
def test_cells_of_the_grid_are_not_exported_for_free_sizes(kind, tmp_path):
    model = timm.create_model('test_linformer_vit', projection=kind, dynamic_img_size=True)
    with pytest.raises(ValueError, match=f"'none': '{kind}' cuts the token grid into cells.*without --free-size"):
        export.export(model, tmp_path / 'model.pt2', free_size=True)
    with pytest.raises(ValueError, match='made with dynamic_img_size=True; this one is not'):
        export.export(timm.create_model('test_linformer_vit'), tmp_path / 'model.pt2', free_size=True)


def test_a_file_that_gives_something_else_is_removed(tmp_path, monkeypatch):
    model = timm.create_model('test_linformer_vit')
    for spoil, words in (
        (lambda outputs: outputs * 1.001, 'from those of the model: removed'),
        (lambda outputs: outputs[:, :2], r'gave \(\d+, 2\) outputs'),
    ):
        form = (
            lambda model, images, file, facts: file.write_bytes(b'a model'),
            lambda file, spoil=spoil: lambda images: spoil(model(images)),
            (),
        )
        monkeypatch.setitem(export.FORMATS, '.pt2', form)
        with pytest.raises(ValueError, match=words):
            export.export(model, tmp_path / 'model.pt2')
        assert not list(tmp_path.iterdir())


def test_images_of_their_own_shape_stay_so_in_a_file_of_free_size_alone(tmp_path, monkeypatch):
    model = timm.create_model('test_linformer_vit', dynamic_img_size=True)
    model.pretrained_cfg = {**model.pretrained_cfg, 'crop_mode': 'native'}
    form = (lambda model, images, file, facts: file.write_bytes(b'a model'), lambda file: model, ())
    monkeypatch.setitem(export.FORMATS, '.pt2', form)
    for free_size, crop_mode in ((True, 'native'), (False, 'center')):
        assert export.export(model, tmp_path / 'model.pt2', free_size)['crop_mode'] == crop_mode


def test_a_file_that_was_there_stays_where_the_new_one_is_wrong(tmp_path, monkeypatch):
    def broken(model, images, file, facts):
        file.write_bytes(b'half')
        raise ImportError('no onnxscript')

    (tmp_path / 'model.onnx').write_bytes(b'good')
    monkeypatch.setitem(export.FORMATS, '.onnx', (broken, None, ()))
    with pytest.raises(ImportError):
        export.export(timm.create_model('test_linformer_vit'), tmp_path / 'model.onnx')
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b'good']


def test_an_unknown_format_or_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in .pt2 or .onnx, got 'model.tflite'"):
        export.export(timm.create_model('test_linformer_vit'), tmp_path / 'model.tflite')
    with pytest.raises(ValueError, match='got ResNet'):
        export.export(timm.create_model('resnet10t'), tmp_path / 'model.onnx')
    with pytest.raises(ValueError, match="'nowhere' is neither a folder"):
        export.main('nowhere', tmp_path / 'model.onnx')
