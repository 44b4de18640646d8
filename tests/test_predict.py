import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from runs import CPU, data_config

from linvision.cli import predict
from linvision.cli.images import find_images
from linvision.cli.main import main
from linvision.cli.pretrained import load_model
from linvision.data import ImageSet, create_batches, create_dataset
from linvision.train.export import export_model


def save(images: ImageSet, folder: Path, n: int) -> list[Path]:
    """The first n images of a grey set as PNG files."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f'{i}.png' for i in range(n)]
    for path, image in zip(paths, images.images[:n, 0], strict=True):
        Image.fromarray(image.numpy()).save(path)
    return paths


def run(*words: object) -> None:
    """The command in this process."""
    main(['predict', *map(str, words)])


@pytest.mark.parametrize('side', [16, 12])  # as large as the model's images, and smaller: with a border
def test_predictions_equal_those_of_evaluation(tmp_path, side):
    fake = create_dataset('fake', tmp_path, 'test')
    images = ImageSet(fake.images[:, :, :side, :side], fake.labels, fake.classes, img_size=16)
    model = timm.create_model('test_linformer_vit', in_chans=1, num_classes=10)
    export_model(model, tmp_path, images, data_config(images))
    model = load_model(tmp_path)
    batches = create_batches(images, 7, *images.statistics(), CPU)
    with torch.inference_mode():
        expected = model(next(batches.ordered(16))[0]).softmax(-1)
    results = predict.predict(model, save(images, tmp_path / 'images', 7), topk=10, batch_size=3)
    for row, result in zip(expected, results, strict=True):
        found = torch.empty(10)
        for c in result['classes']:
            found[c['label']] = c['probability']
            assert c['name'] == images.classes[c['label']]
        torch.testing.assert_close(found, row, rtol=1e-4, atol=1e-6)


def test_classes_come_likeliest_first_and_at_most_all(model_folder, tmp_path):
    paths = save(create_dataset('fake', tmp_path, 'test'), tmp_path, 2)
    results = predict.predict(load_model(model_folder), paths, topk=99)
    for result in results:
        probabilities = [c['probability'] for c in result['classes']]
        assert probabilities == sorted(probabilities, reverse=True)
        assert len(probabilities) == 10
        assert sum(probabilities) == pytest.approx(1)


def test_an_image_that_is_named_twice_is_answered_twice(model_folder, tmp_path):
    (path,) = save(create_dataset('fake', tmp_path, 'test'), tmp_path, 1)
    results = predict.predict(load_model(model_folder), [path, path])
    assert [result['image'] for result in results] == [str(path)] * 2
    first, second = ([c['probability'] for c in result['classes']] for result in results)
    assert first == pytest.approx(second)


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'P', '1', 'LA'])
def test_any_kind_of_image_is_read(model_folder, tmp_path, mode):
    path = tmp_path / 'image.png'
    Image.new('L', (40, 30), 128).convert(mode).save(path)
    assert len(predict.predict(load_model(model_folder), [path])) == 1


def test_a_folder_gives_its_images_in_order_and_nothing_else(tmp_path):
    for name in ('b.png', 'a.JPG', 'below/c.png', 'notes.txt', '.cache/d.png', '.e.png'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images([tmp_path]) == [tmp_path / name for name in ('a.JPG', 'b.png', 'below/c.png')]


def test_json_and_table_hold_every_image(model_folder, tmp_path, capsys):
    paths = save(create_dataset('fake', tmp_path, 'test'), tmp_path / 'images', 2)
    run(model_folder, tmp_path / 'images', '--topk', 3, '--json')
    results = json.loads(capsys.readouterr().out)
    assert [r['image'] for r in results] == [str(p) for p in paths]
    assert [len(r['classes']) for r in results] == [3, 3]
    run(model_folder, *paths, '--topk', 3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for path, line, result in zip(paths, lines, results, strict=True):
        assert line.startswith(str(path))
        assert all(c['name'] in line for c in result['classes'])


def test_a_picture_shows_the_images_with_their_classes(model_folder, tmp_path, monkeypatch):
    paths = save(create_dataset('fake', tmp_path, 'test'), tmp_path / 'a $^$ folder', 7)
    drawn = []
    figure_of = predict.picture
    monkeypatch.setattr(predict, 'picture', lambda *a: drawn.append(figure_of(*a)) or drawn[0])
    run(model_folder, *paths, '--picture', tmp_path / 'new' / 'picture.png')
    with Image.open(tmp_path / 'new' / 'picture.png') as image:
        assert image.width > 900 and image.height > 300  # six in a row
    titles = [axis.get_title() for axis in drawn[0].axes if axis.images]
    assert len(titles) == 7 and all(re.search(r'→ bar \d \d+ %$', title) for title in titles)
    with pytest.raises(SystemExit, match="must end in .png, .* got 'picture.gif'"):
        run(model_folder, *paths, '--picture', tmp_path / 'picture.gif')


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['MODEL', 'missing.png'], 'missing.png does not exist'),
        (['MODEL', 'text.png'], r'text.png cannot be read as an image'),
        (['MODEL', 'empty'], 'empty holds no image'),
        (['MODEL'], 'at least one image'),
        (['MODEL', 'image.png', '--topk', '0'], 'topk must be at least 1, got 0'),
        (['empty', 'image.png'], 'empty holds no model: config.json is missing'),
        (['damaged', 'image.png'], 'The model in damaged cannot be loaded'),
    ],
)
def test_a_mistake_ends_with_an_error_that_names_it(model_folder, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path('text.png').write_text('no image')
    Path('empty').mkdir()
    Path('damaged').mkdir()
    Path('damaged/config.json').write_text((model_folder / 'config.json').read_text())
    Path('damaged/model.safetensors').write_bytes((model_folder / 'model.safetensors').read_bytes()[:1000])
    Image.new('L', (16, 16)).save('image.png')
    with pytest.raises(SystemExit, match=f'error: .*{message}'):
        run(*(model_folder if word == 'MODEL' else word for word in words))


def test_a_model_is_named_as_timm_names_it(model_folder, tmp_path):
    paths = save(create_dataset('fake', tmp_path, 'test'), tmp_path, 1)
    results = [predict.predict(load_model(f'{kind}{model_folder}'), paths) for kind in ('', 'local-dir:')]
    assert results[0] == results[1]
    assert load_model('linformer_vit_pico_patch1_32.fashion_mnist').pretrained_cfg['label_names'][1] == 'Trouser'
    with pytest.raises(FileNotFoundError, match='nowhere does not exist'):
        load_model('nowhere')


def test_a_name_without_a_tag_says_which_weights_it_has(tmp_path, caplog):
    Image.new('L', (28, 28)).save(tmp_path / 'black.png')
    pico = 'linformer_vit_pico_patch1_32'
    for name, said in ((pico, ['cifar10']), (f'{pico}.fashion_mnist', [])):
        caplog.clear()
        run(name, tmp_path / 'black.png')
        assert [message.rpartition('.')[2] for message in caplog.messages] == said


def test_a_truncated_image_is_named(model_folder, tmp_path):
    path = tmp_path / 'half.png'
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(OSError, match='half.png cannot be read.*--on-bad-image skip'):
        predict.predict(load_model(model_folder), [path])


def test_an_unreadable_image_is_left_out_where_that_is_wished(model_folder, tmp_path, caplog):
    model, paths = load_model(model_folder), save(create_dataset('fake', tmp_path, 'test'), tmp_path, 3)
    expected = predict.predict(model, paths, batch_size=1)
    paths[1].write_bytes(b'damaged')
    assert predict.predict(model, paths, on_bad_image='skip', batch_size=1) == [expected[0], expected[2]]
    assert [str(paths[1]) in message for message in caplog.messages] == [True]


@pytest.mark.slow
def test_the_command_runs_as_a_module(model_folder, tmp_path):
    paths = save(create_dataset('fake', tmp_path, 'test'), tmp_path, 1)
    command = [sys.executable, '-m', 'linvision', 'predict', str(model_folder), str(paths[0]), '--topk', '1']
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert out.startswith(str(paths[0])) and 'bar' in out
