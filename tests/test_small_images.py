"""Small images in folders: names, labels and order; decoded once, and again where something has changed."""

import hashlib
import io
import json
import shutil
import zipfile
from itertools import islice
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from runs import CPU, small
from timm.data import ImageNetInfo

from linvision.cli.evaluate import main as score
from linvision.data import Augmentation, ImageSet, create_batches, create_dataset, decoded, in_memory, small_images
from linvision.data.datasets import part
from linvision.data.folders import ImageFiles
from linvision.train import train
from linvision.train.data import fingerprint

IDS = ('n01443537', 'n01629819', 'n02123394')
COLOURS = {name: (60 * i + 40, 200 - 50 * i, 30 * i) for i, name in enumerate(IDS)}


def picture(path, colour, size=64, **settings):
    """An image file of one colour; a number is a shade of grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB' if isinstance(colour, tuple) else 'L', (size, size), colour).save(path, **settings)


def tiny(root):
    """Tiny ImageNet as it is unpacked: five images a class, the last grey, and seven to score on."""
    for name, colour in COLOURS.items():
        for i in range(5):
            shade = colour if i < 4 else 128
            picture(root / 'train' / name / 'images' / f'{name}_{i}.JPEG', shade, quality=100)
        (root / 'train' / name / f'{name}_boxes.txt').write_text('')
    lines = [f'val_{i}.JPEG\t{IDS[(2 * i) % 3]}\t0\t0\t62\t62\n' for i in range(7)]
    for line in lines:
        name, wordnet_id, *_ = line.split('\t')
        picture(root / 'val' / 'images' / name, COLOURS[wordnet_id], quality=100)
    (root / 'val' / 'val_annotations.txt').write_text(''.join(lines))
    picture(root / 'test' / 'images' / 'test_0.JPEG', (1, 2, 3))  # without a label
    return root


def sorted_into_folders(root, place):
    """The same with `train/WNID/*` and `val/WNID/*`."""
    for path in sorted((root / 'train').glob('*/images/*')):
        (place / 'train' / path.parts[-3]).mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, place / 'train' / path.parts[-3])
    for line in (root / 'val' / 'val_annotations.txt').read_text().splitlines():
        name, wordnet_id, *_ = line.split('\t')
        (place / 'val' / wordnet_id).mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / 'val' / 'images' / name, place / 'val' / wordnet_id)
    return place


def cifar(folder, name='cifar10', suffix='jpg'):
    """CIFAR as image files: 4 + 1 images a class, of the class's number."""
    for label, c in enumerate(small_images.CIFAR_CLASSES[name]):
        for i in range(4):
            picture(folder / 'train' / c / f'{i:04}.{suffix}', (label, i, 0), 32)
        picture(folder / 'test' / c / f'0000.{suffix}', (label, 9, 0), 32)
    return folder


def refuse(*arguments, **settings):
    raise URLError('no network')


@pytest.mark.parametrize('place', ['', 'tiny-imagenet-200', 'tiny_imagenet'])
def test_tiny_imagenet_is_the_same_as_unpacked_and_in_folders(tmp_path, place):
    unpacked, ours = tmp_path / 'unpacked', tmp_path / 'ours'
    tiny(unpacked / place)
    sorted_into_folders(unpacked / place, ours / place)
    for split, count in (('train', 15), ('val', 7)):
        found = [create_dataset('tiny_imagenet', root, split) for root in (unpacked, ours)]
        for images in found:
            assert isinstance(images, ImageSet) and images.images.shape == (count, 3, 64, 64)
            assert images.note == '' and images.img_size == 64 and images.uncropped
        assert torch.equal(found[0].images, found[1].images) and torch.equal(found[0].labels, found[1].labels)


def test_the_classes_of_tiny_imagenet_have_words_in_the_order_of_their_ids(tmp_path):
    images = create_dataset('tiny_imagenet', tiny(tmp_path), 'train')
    words = [ImageNetInfo().label_name_to_description(name).split(',')[0] for name in IDS]
    assert list(images.classes) == words == ['goldfish', 'European fire salamander', 'Persian cat']


def test_labels_are_those_of_the_annotations(tmp_path):
    images = create_dataset('tiny_imagenet', tiny(tmp_path), 'test')
    assert images.labels.tolist() == sorted((2 * i) % 3 for i in range(7))
    colours = torch.tensor(list(COLOURS.values()))[images.labels]
    assert (images.images[:, :, 32, 32].int() - colours).abs().max() <= 3  # JPEG


def test_a_wrong_line_of_the_annotations_is_named(tmp_path):
    annotations = tiny(tmp_path) / 'val' / 'val_annotations.txt'
    for line in ('val_0.JPEG\tn99999999\t0', '../val_0.JPEG\tn01443537\t0', 'val_0.JPEG'):
        annotations.write_text(line)
        with pytest.raises(ValueError, match='val_annotations.txt has the line'):
            create_dataset('tiny_imagenet', tmp_path, 'test')
    annotations.unlink()
    with pytest.raises(FileNotFoundError, match='val_annotations.txt is missing'):
        create_dataset('tiny_imagenet', tmp_path, 'test')


def test_grey_images_have_three_equal_channels(tmp_path):
    images = create_dataset('tiny_imagenet', tiny(tmp_path), 'train')
    assert (images.images[4::5] == 128).all() and not (images.images[3::5] == 128).any()


def test_tiny_imagenet_is_fetched_and_appears_whole(tmp_path, monkeypatch):
    archive = io.BytesIO()
    tiny(tmp_path / 'made' / 'tiny-imagenet-200')
    with zipfile.ZipFile(archive, 'w') as file:
        for path in sorted((tmp_path / 'made').rglob('*.*')):
            file.write(path, path.relative_to(tmp_path / 'made'))
    monkeypatch.setattr(small_images, 'TINY_IMAGENET_MD5', hashlib.md5(archive.getvalue()).hexdigest())

    def download(url, root, filename, md5):
        assert url == 'http://cs231n.stanford.edu/tiny-imagenet-200.zip'
        path = tmp_path / 'root' / 'tiny-imagenet-200.zip'
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(archive.getvalue())
        assert hashlib.md5(path.read_bytes()).hexdigest() == md5

    monkeypatch.setattr('torchvision.datasets.utils.download_url', download)
    assert len(create_dataset('tiny_imagenet', tmp_path / 'root', 'train')) == 15
    assert [path.name for path in (tmp_path / 'root').iterdir()] == ['tiny-imagenet-200']
    monkeypatch.setattr('torchvision.datasets.utils.download_url', refuse)
    assert len(create_dataset('tiny_imagenet', tmp_path / 'root', 'val')) == 7


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr('torchvision.datasets.utils.download_url', refuse)
    with pytest.raises(FileNotFoundError, match='could not be fetched .*no network.*tiny-imagenet-200.zip into'):
        create_dataset('tiny_imagenet', tmp_path, 'train')
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match='download is switched off'):
        create_dataset('tiny_imagenet', tmp_path, 'train', download=False)
    with pytest.raises(FileNotFoundError, match='imagenet32 is not in .*Put images of 32×32 pixels'):
        create_dataset('imagenet32', tmp_path, 'train')
    picture(tmp_path / 'train' / 'cat' / 'a.png', 0)
    with pytest.raises(ValueError, match='holds folders of images, and tiny_imagenet is not among them'):
        create_dataset('tiny_imagenet', tmp_path, 'train')


@pytest.mark.parametrize('name, size', [('imagenet32', 32), ('imagenet64', 64)])
@pytest.mark.parametrize('below', [True, False])
def test_small_imagenet_is_read_from_folders_of_ids(tmp_path, name, size, below):
    folder = tmp_path / name if below else tmp_path
    for split in ('train', 'val'):
        for i, wordnet_id in enumerate(IDS):
            picture(folder / split / wordnet_id / f'{split}_{i}.png', COLOURS[wordnet_id], size)
    images = create_dataset(name, tmp_path, 'test')
    assert images.images[:, :, 0, 0].tolist() == [list(colour) for colour in COLOURS.values()]
    assert images.classes[0] == 'goldfish' and images.img_size == size


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
@pytest.mark.parametrize('below', [True, False])
def test_cifar_is_read_from_image_files_with_torchvisions_classes(tmp_path, name, below):
    classes = small_images.CIFAR_CLASSES[name]
    assert len(set(classes)) == int(name[5:]) and list(classes) == sorted(classes)
    cifar(tmp_path / name if below else tmp_path, name, 'png')
    images = create_dataset(name, tmp_path, 'train')
    assert images.classes == classes and images.note == 'PNG copy' and images.img_size == 32
    assert images.labels.tolist() == [label for label in range(len(classes)) for _ in range(4)]
    assert torch.equal(images.images[:, 0, 0, 0].long(), images.labels)
    assert (create_dataset(name, tmp_path, 'test').images[:, 1] == 9).all()


def test_cifars_own_batches_come_before_image_files(tmp_path):
    cifar(tmp_path / 'cifar10')
    (tmp_path / 'cifar-10-batches-py').mkdir()
    with pytest.raises(FileNotFoundError, match='cifar-10-batches-py, or not whole'):
        create_dataset('cifar10', tmp_path, 'train')


def test_a_folder_that_is_not_cifar_is_named(tmp_path):
    picture(cifar(tmp_path) / 'train' / 'zebra' / '0.png', 0, 32)
    with pytest.raises(ValueError, match=r"no class of this set: \['zebra'\]"):
        create_dataset('cifar10', tmp_path, 'train')
    shutil.rmtree(tmp_path / 'train' / 'zebra')
    shutil.rmtree(tmp_path / 'train' / 'cat')
    with pytest.raises(ValueError, match='lacks classes of cifar10: cat'):
        create_dataset('cifar10', tmp_path, 'train')


def test_an_image_of_another_size_is_named(tmp_path):
    picture(cifar(tmp_path) / 'train' / 'frog' / '0001.jpg', (0, 0, 0), 48)
    with pytest.raises(ValueError, match=r'frog/0001.jpg has 48×48 pixels, and this set has 32×32'):
        create_dataset('cifar10', tmp_path, 'train')


def test_a_run_says_that_it_saw_a_copy(tmp_path, capsys):
    cifar(tmp_path / 'cifar10')
    changes = {'dataset': 'cifar10', 'stages': ((16, 1.0),), 'batch_size': 20, 'augmentation': 'kornia', 'hflip': 0.5}
    metrics = train(small(tmp_path / 'run', **changes))
    assert 'cifar10 (JPEG copy): 40 training images' in capsys.readouterr().out.splitlines()[0]
    assert metrics['data_note'] == 'JPEG copy' and metrics['num_samples'] == 10
    assert json.loads((tmp_path / 'run' / 'metrics.json').read_text())['data_note'] == 'JPEG copy'
    train(small(tmp_path / 'dry', dry_run=True, **changes))
    assert 'cifar10 (JPEG copy): 40 images' in capsys.readouterr().out
    assert 'data_note' not in train(small(tmp_path / 'fake', max_steps=0, epochs=0.1))


def test_a_set_is_decoded_once(tmp_path, monkeypatch, caplog):
    folder = cifar(tmp_path / 'cifar10')
    first = create_dataset('cifar10', tmp_path, 'train')
    assert f'40 images of {folder} are decoded, once' in caplog.text
    kept = {path.name.split('.', 1)[1]: path for path in (folder / '.decoded').iterdir()}
    assert set(kept) == {'images.npy', 'labels.npy', 'facts.json'}
    assert np.load(kept['images.npy']).shape == (40, 3, 32, 32) and np.load(kept['labels.npy']).shape == (40,)
    monkeypatch.setattr(decoded, 'decode', refuse)
    caplog.clear()
    second = create_dataset('cifar10', tmp_path, 'train')
    assert not caplog.text
    assert torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)
    assert fingerprint(first) == fingerprint(second) and first.classes == second.classes
    second.images[0] = 77  # a change stays in this process
    assert torch.equal(create_dataset('cifar10', tmp_path, 'train').images, first.images)


def test_a_changed_folder_is_decoded_again(tmp_path, caplog):
    folder = cifar(tmp_path, suffix='png')
    before = create_dataset('cifar10', tmp_path, 'train')
    picture(folder / 'train' / 'airplane' / '0000.png', (250, 0, 0), 32)
    changed = create_dataset('cifar10', tmp_path, 'train')
    assert 'are decoded again, since they have changed' in caplog.text
    assert changed.images[0, 0, 0, 0] == 250 and fingerprint(changed) == fingerprint(before)  # the names are the same
    (folder / 'train' / 'airplane' / '0003.png').unlink()
    fewer = create_dataset('cifar10', tmp_path, 'train')
    assert len(fewer) == 39 and fingerprint(fewer) != fingerprint(before)
    assert len(list((folder / '.decoded').iterdir())) == 3  # the earlier ones are gone


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def empty(path):
    path.write_bytes(b'')


def pickled(path):
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)


def other_shape(path):
    np.save(path, np.zeros((2, 2), np.uint8))


def other_labels(path):
    np.save(path, np.full(40, 10))


def other_facts(path):
    path.write_text('{"fingerprint": "other", "unreadable": []}')


@pytest.mark.parametrize(
    'kind, damage',
    [('images.npy', damage) for damage in (cut, empty, pickled, other_shape)]
    + [('labels.npy', damage) for damage in (cut, empty, pickled, other_shape, other_labels)]
    + [('facts.json', damage) for damage in (cut, empty, other_facts)],
)
def test_what_is_cut_or_foreign_is_made_again_and_said(tmp_path, caplog, kind, damage):
    folder = cifar(tmp_path)
    first = create_dataset('cifar10', tmp_path, 'train')
    damage(next((folder / '.decoded').glob(f'*.{kind}')))
    caplog.clear()
    again = create_dataset('cifar10', tmp_path, 'train')
    assert 'is cut or not ours' in caplog.text and 'have changed' not in caplog.text
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    caplog.clear()
    create_dataset('cifar10', tmp_path, 'train')
    assert not caplog.text


def test_a_folder_that_cannot_be_written_has_its_images_in_a_temporary_place(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr('tempfile.gettempdir', lambda: str(tmp_path))
    folder = cifar(tmp_path / 'cifar10')
    (folder / '.decoded').write_text('in the way')
    first = create_dataset('cifar10', tmp_path, 'train')
    place = decoded.temporary_place(folder)
    assert f'the decoded images are in {place}' in caplog.text and place.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(decoded, 'decode', refuse)
    assert torch.equal(create_dataset('cifar10', tmp_path, 'train').images, first.images)


def test_another_users_temporary_place_is_not_read(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr('tempfile.gettempdir', lambda: str(tmp_path))
    folder = cifar(tmp_path / 'cifar10')
    (folder / '.decoded').write_text('in the way')
    create_dataset('cifar10', tmp_path, 'train')
    theirs = decoded.temporary_place(folder).parent
    theirs.rename(tmp_path / 'elsewhere')
    theirs.symlink_to(tmp_path / 'elsewhere')
    caplog.clear()
    create_dataset('cifar10', tmp_path, 'train')
    assert 'belongs to another user' in caplog.text and 'decoded again at every start' in caplog.text


def test_nothing_is_written_without_download_and_nothing_of_a_write_that_fails(tmp_path, monkeypatch):
    folder = cifar(tmp_path)
    assert len(create_dataset('cifar10', tmp_path, 'train', download=False)) == 40
    assert not (folder / '.decoded').exists()
    monkeypatch.setattr('tempfile.gettempdir', lambda: str(tmp_path / 'none'))
    monkeypatch.setattr('os.fsync', refuse)
    assert len(create_dataset('cifar10', tmp_path, 'train')) == 40
    assert not list((folder / '.decoded').iterdir())


@pytest.mark.parametrize('augmentation', [None, Augmentation('kornia', hflip=0.5), Augmentation(hflip=0.5)])
def test_damaged_images_stop_a_run_or_are_left_out_and_counted(tmp_path, caplog, augmentation):
    folder = cifar(tmp_path)
    (folder / 'train' / 'bird' / '0002.jpg').write_bytes(b'no image')
    for start in ('first', 'second'):
        images = create_dataset('cifar10', tmp_path, 'train')
        assert len(images) == 39 and images.labels.tolist().count(2) == 3, start
        wanted = (13, *images.statistics(), CPU, augmentation)
        with pytest.raises(OSError, match='bird/0002.jpg cannot be read .*--on-bad-image skip'):
            create_batches(images, *wanted)
        with pytest.raises(OSError, match='bird/0002.jpg cannot be read'):
            in_memory(images)
        found = create_batches(images, *wanted, on_bad_image='skip')
        assert [text.split(' cannot')[0] for text in found.bad_images] == [str(folder / 'train/bird/0002.jpg')]
        labels = torch.cat([labels for _, labels in islice(found.stream(0, 0, 32), 3)])
        assert sorted(labels.tolist()) == images.labels.tolist()
        assert 'left out' in caplog.text


def test_scores_count_what_is_left_out_once(tmp_path):
    cifar(tmp_path / 'cifar10')
    for name in ('train/bird/0002.jpg', 'test/cat/0000.jpg', 'test/dog/0000.jpg'):
        (tmp_path / 'cifar10' / name).write_bytes(b'no image')
    changes = {'dataset': 'cifar10', 'stages': ((16, 1.0),), 'batch_size': 20, 'val_fraction': 0.2}
    with pytest.raises(OSError, match='bird/0002.jpg cannot be read'):
        train(small(tmp_path / 'run', **changes))
    metrics = train(small(tmp_path / 'run', fresh=True, on_bad_image='skip', **changes))
    assert (metrics['num_samples'], metrics['num_left_out'], metrics['val_num_left_out']) == (8, 2, 0)
    assert len(metrics['bad_training_images']) == 1 and metrics['images']['num_images'] == 39


def test_evaluation_says_that_it_saw_a_copy(tmp_path, capsys):
    cifar(tmp_path / 'cifar10')
    metrics = train(small(tmp_path / 'run', dataset='cifar10', stages=((16, 1.0),), batch_size=20))
    capsys.readouterr()
    score(str(tmp_path / 'run'), as_json=True)
    scores = json.loads(capsys.readouterr().out)
    assert scores['data_note'] == 'JPEG copy' and scores['top1'] == metrics['top1']
    score(str(tmp_path / 'run'))
    words = f'test images of cifar10 (JPEG copy) at 16×16, 256 tokens: top-1 {100 * metrics["top1"]:.2f} %, '
    assert capsys.readouterr().out.startswith(words)


def test_a_set_of_which_nothing_can_be_read_is_an_error(tmp_path):
    for path in cifar(tmp_path).glob('train/*/*'):
        path.write_bytes(b'')
    with pytest.raises(OSError, match='No image can be read'):
        create_dataset('cifar10', tmp_path, 'train')


def test_workers_decode_what_one_process_does(tmp_path, monkeypatch):
    cifar(tmp_path, suffix='png')
    (tmp_path / 'train' / 'ship' / '0001.png').write_bytes(b'')
    alone = create_dataset('cifar10', tmp_path, 'train', download=False)
    monkeypatch.setattr(decoded, 'BLOCK', 7)
    monkeypatch.setattr(decoded, 'FEW', 20)
    shared = create_dataset('cifar10', tmp_path, 'train', download=False)
    assert torch.equal(alone.images, shared.images) and torch.equal(alone.labels, shared.labels)
    assert len(shared) == 39 and shared.unreadable == alone.unreadable


def test_a_set_too_large_for_memory_is_read_one_by_one(tmp_path, monkeypatch, caplog):
    cifar(tmp_path)
    monkeypatch.setattr(decoded, 'SHARE', 1e-9)
    images = create_dataset('cifar10', tmp_path, 'train')
    assert isinstance(images, ImageFiles) and 'not held in memory' in caplog.text


def test_a_part_of_a_set_has_images_of_all_classes(tmp_path):
    cifar(tmp_path)
    assert part(create_dataset('cifar10', tmp_path, 'train'), 10).labels.tolist() == list(range(10))


def test_statistics_are_those_of_all_pixels(tmp_path):
    torch.manual_seed(1)
    pixels = torch.randint(0, 256, (50, 3, 5, 5), dtype=torch.uint8)
    std, mean = torch.std_mean(pixels.double() / 255, dim=(0, 2, 3), correction=0)
    found = ImageSet(pixels, torch.arange(50), ('a',), 5).statistics()
    assert found[0] == pytest.approx(mean.tolist(), abs=5.1e-5) and found[1] == pytest.approx(std.tolist(), abs=5.1e-5)
