"""What timm reads: WebDataset shards as streams, torchvision's sets by number."""

import io
import json
import pickle
import tarfile
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from runs import CPU, assert_stops_change_nothing, small
from torchvision.datasets import cifar

from linvision.data import Augmentation, create_batches, create_dataset

CLASSES = {'num_classes': 20}


def write_shard(path, numbers, bad):
    """A shard of images of one colour: image i is 10·i everywhere, and of class i."""
    with tarfile.open(path, 'w') as tar:
        for i in numbers:
            file = io.BytesIO()
            Image.new('RGB', (8, 8), (10 * i,) * 3).save(file, 'PNG')
            for ending, content in (('cls', str(i).encode()), ('png', b'damaged' if i in bad else file.getvalue())):
                entry = tarfile.TarInfo(f'{i:05}.{ending}')
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def write_shards(folder, train=20, val=7, shards=4, bad=(), bad_val=()):
    """Shards as img2dataset and timm write them; their folder."""
    folder.mkdir()
    splits = {}
    for split, n, damaged in (('train', train, bad), ('validation', val, bad_val)):
        parts = {f'{split}-{k:04}.tar': range(k, n, shards) for k in range(shards)}
        for name, numbers in parts.items():
            write_shard(folder / name, numbers, damaged)
        lengths = [len(numbers) for numbers in parts.values()]
        splits[split] = {'name': split, 'num_samples': n, 'filenames': list(parts), 'shard_lengths': lengths}
    (folder / '_info.json').write_text(json.dumps({'splits': splits}))
    return folder


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp('wds') / 'shards')


def batches(folder, split='train', **where):
    images = create_dataset('wds/x', folder, split, **CLASSES)
    return create_batches(images, 4, (0.0,) * 3, (10 / 255,) * 3, CPU, **where)


def numbers(found):
    """Labels of batches, batch by batch; what counts must hold the number that its label says."""
    out = []
    for x, labels in found:
        counts = labels >= 0
        assert torch.equal(x[counts].mean((1, 2, 3)).round().long(), labels[counts])
        out.append(labels.tolist())
    return out


def first(found, n, step=0, seed=0):
    return numbers(islice(found.stream(seed, step, 8), n))


@pytest.mark.parametrize('workers', [0, 1])
def test_an_epoch_shows_every_sample_once_in_an_order_of_seed_and_epoch(shards, workers):
    epochs = first(batches(shards, workers=workers), 10)
    one, two = sum(epochs[:5], []), sum(epochs[5:], [])
    assert sorted(one) == sorted(two) == list(range(20)) and one != two != sorted(two)
    assert first(batches(shards, workers=workers), 10) == epochs
    assert sum(first(batches(shards, workers=workers), 5, seed=1), []) not in (one, two)


def test_one_shard_is_shuffled_anew_in_each_epoch(tmp_path):
    epochs = first(batches(write_shards(tmp_path / 'one', shards=1)), 10)
    assert sum(epochs[:5], []) != sum(epochs[5:], []) and sorted(sum(epochs[5:], [])) == list(range(20))


@pytest.mark.parametrize('workers', [0, 2])
def test_resuming_at_a_step_gives_the_batches_of_one_that_never_stopped(shards, workers):
    augmentation = Augmentation('torchvision', shift=2, hflip=0.5, erase=0.5)

    def images(n, step):
        found = batches(shards, augmentation=augmentation, workers=workers).stream(0, step, 8)
        return torch.stack([x for x, _ in islice(found, n)])

    whole = images(9, 0)  # into the second epoch of 5
    assert torch.equal(images(6, 3), whole[3:]) and torch.equal(images(2, 7), whole[7:])
    assert (whole[5] != whole[0]).any()


@pytest.mark.parametrize('library', ['albumentations', 'kornia'])
def test_changes_keep_images_and_labels_together(shards, library):
    augmentation = Augmentation(library, crop_scale=(0.5, 1.0), hflip=0.5)
    assert sorted(sum(first(batches(shards, augmentation=augmentation, workers=1), 5), [])) == list(range(20))


@pytest.mark.parametrize('workers', [0, 1])
def test_two_processes_train_on_different_samples(shards, workers):
    halves = [sum(first(batches(shards, rank=rank, count=2, workers=workers), 5), []) for rank in (0, 1)]
    assert sorted(sum(halves, [])) == list(range(20))


def test_workers_of_two_processes_read_different_samples(shards):
    """Four readers with a shard of five samples each: two batches of two are read of each before any is repeated."""
    halves = [first(batches(shards, rank=rank, count=2, workers=2), 4) for rank in (0, 1)]
    assert len(set(sum(sum(halves, []), []))) == 16


def test_no_two_readers_draw_the_same(shards):
    augmentation, areas, n = Augmentation('torchvision', erase=1.0), set(), 0
    for rank in (0, 1):
        found = batches(shards, rank=rank, count=2, workers=2, augmentation=augmentation)
        for x, labels in islice(found.stream(0, 0, 32), 4):
            shown = x[labels > 0]  # what is erased is zero, as image 0 is
            areas |= {tuple((image == 0).flatten().tolist()) for image in shown}
            n += len(shown)
    assert len(areas) == n >= 15


@pytest.mark.parametrize('count', [1, 2, 3])
@pytest.mark.parametrize('workers', [0, 2])
def test_evaluation_counts_every_sample_once_over_all_processes(shards, count, workers):
    shares = [
        numbers(batches(shards, 'test', rank=rank, count=count, workers=workers).ordered(8)) for rank in range(count)
    ]
    assert len({tuple(map(len, share)) for share in shares}) == 1  # as many in each process
    seen = [label for share in shares for part in share for label in part if label >= 0]
    assert sorted(seen) == list(range(7))


def test_evaluation_is_never_augmented(shards):
    found = batches(shards, 'test', augmentation=Augmentation('torchvision', erase=1.0))
    assert all(x.std((1, 2, 3)).max() == 0 for x, _ in found.ordered(8))


def test_too_few_shards_for_the_workers_are_refused(shards):
    with pytest.raises(ValueError, match='wds/x has 4 shards, but 8 processes read it'):
        next(batches(shards, workers=2, count=4).stream(0, 0, 8))


def test_what_a_stream_must_say_is_asked_for(tmp_path, shards):
    with pytest.raises(ValueError, match='wds/x does not say how many classes it has: say --dataset-args num_classes'):
        create_dataset('wds/x', shards, 'train')
    with pytest.raises(FileNotFoundError, match=r"timm cannot open wds/x, split 'train', in .*--dataset-args"):
        create_dataset('wds/x', tmp_path, 'train', **CLASSES)
    (shards / '_info.json').rename(tmp_path / '_info.json')
    try:
        with pytest.raises(ValueError, match=r"does not say how many images.*'name-\{0000..0009\}.tar\|NUMBER'"):
            create_dataset('wds/x', shards, 'train', train_split='train-{0000..0003}.tar', **CLASSES)
        named = create_dataset('wds/x', shards, 'train', train_split='train-{0000..0003}.tar|20', **CLASSES)
    finally:
        (tmp_path / '_info.json').rename(shards / '_info.json')
    assert len(named) == 20
    with pytest.raises(ValueError, match='has no slice for validation: use --val-fraction 0'):
        named.subset(torch.arange(5))


@pytest.mark.parametrize('workers', [0, 2])
def test_a_damaged_sample_stops_a_run_or_is_left_out_by_name(tmp_path, workers, caplog):
    folder = write_shards(tmp_path / 'bad', shards=2, bad=(5, 18), bad_val=(2, 5))  # 5 is the last of its shard
    for split, words in (('train', '000(05|18) in .*/train'), ('test', '0000[25] in .*/validation')):
        found = batches(folder, split, workers=workers)
        with pytest.raises(OSError, match=rf'{words}-000[01].tar cannot be read .*--on-bad-image skip'):
            list(found.ordered(8) if split == 'test' else islice(found.stream(0, 0, 8), 10))
    found = batches(folder, on_bad_image='skip', workers=workers)
    assert not {5, 18} & set(sum(first(found, 10), [])) and len(found.bad_images) == 2
    caplog.clear()
    found = batches(folder, 'test', on_bad_image='skip', workers=workers)
    for _ in range(2):
        seen = sum(numbers(found.ordered(8)), [])
        assert sorted(label for label in seen if label >= 0) == [0, 1, 3, 4, 6]
    said = sorted(r.getMessage() for r in caplog.records if r.name.startswith('linvision'))  # once each
    wanted = (f'{i:05} in {folder}/validation-{i % 2:04}.tar cannot be read (UnidentifiedImageError).' for i in (2, 5))
    assert said == [f'left out: {words}' for words in wanted]


def test_a_missing_shard_stops_a_run(tmp_path):
    folder = write_shards(tmp_path / 'gone', shards=2)
    (folder / 'validation-0001.tar').unlink()
    with pytest.raises(OSError, match=r'a sample in .*validation-0001.tar cannot be read \(FileNotFoundError\)'):
        list(batches(folder, 'test').ordered(8))


def test_shards_without_a_readable_sample_end_the_run(tmp_path):
    folder = write_shards(tmp_path / 'worst', shards=1, bad=range(20))
    with pytest.raises(OSError, match='No sample of wds/x can be read'):
        next(batches(folder, on_bad_image='skip').stream(0, 0, 8))


def test_a_run_on_shards_ends_the_same_whether_it_stops_or_not(tmp_path, shards):
    settings = {'dataset': 'wds/x', 'dataset_args': CLASSES, 'data_dir': shards, 'hflip': 0.5}
    whole = small(tmp_path / 'whole', stages=((8, 1.0),), batch_size=4, epochs=2, **settings)
    metrics = assert_stops_change_nothing(whole, tmp_path / 'parts', 3, 7)
    assert metrics['num_samples'] == 7 and metrics['num_left_out'] == 0 and metrics['steps'] == 10


# ------------------------------------------------------------------------------------------------- sets of torchvision


def test_timms_names_of_torchvisions_sets_are_read_by_number(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    (tmp_path / 'cifar-10-batches-py').mkdir()
    parts = [*(f'data_batch_{i + 1}' for i in range(5)), 'test_batch']
    contents = {part: {'data': pixels[i : i + 1], 'labels': [i]} for i, part in enumerate(parts)}
    contents['batches.meta'] = {'label_names': [f'class {i}' for i in range(10)]}
    for name, content in contents.items():
        (tmp_path / 'cifar-10-batches-py' / name).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(cifar, 'check_integrity', lambda path, md5=None: True)
    images = create_dataset('torch/cifar10', tmp_path, 'train', download=False)
    assert len(images) == 5 and images.classes[9] == 'class 9'
    found = create_batches(images.subset(torch.tensor([4, 2])), 2, (0.0,) * 3, (1 / 255,) * 3, CPU)
    x, labels = next(found.ordered(32))
    assert labels.tolist() == [4, 2]
    torch.testing.assert_close(x, torch.from_numpy(pixels[[4, 2]]).view(-1, 3, 32, 32).float(), rtol=1e-5, atol=1e-3)


def test_a_damaged_image_of_torchvisions_folder_is_named(tmp_path):
    (tmp_path / 'train/a').mkdir(parents=True)
    for i in range(4):
        Image.effect_noise((32, 32), 50).save(tmp_path / f'train/a/{i}.png')
    path = tmp_path / 'train/a/2.png'
    path.write_bytes(path.read_bytes()[:300])
    images = create_dataset('torch/image_folder', tmp_path, 'train')
    found = create_batches(images, 4, (0.5,) * 3, (0.5,) * 3, CPU)
    with pytest.raises(OSError, match='image 2 of the set cannot be read'):
        list(found.ordered(32))


def test_a_set_whose_package_is_missing_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match='timm cannot open tfds/x.*what packages that needs'):
        create_dataset('tfds/x', tmp_path, 'train')
