"""Datasets by name, and batches that are functions of (seed, epoch, index)."""

import gzip
import struct
from itertools import islice

import pytest
import torch
from PIL import Image
from runs import CPU, data_config, image_set
from timm.data import create_transform
from torchvision.transforms.functional import to_pil_image

from linvision.data import Augmentation, ImageSet, create_batches, create_dataset, fashion_mnist, split_validation
from linvision.data.order import seed_of
from linvision.train.export import export_model


def batches(images, batch_size=8, augmentation=None):
    return create_batches(images, batch_size, (0.5,), (0.25,), CPU, augmentation)


def test_an_epoch_shows_every_image_once_with_its_label():
    stream = batches(image_set()).stream(seed=3, step=5, img_size=8)  # the second epoch
    seen = []
    for images, labels in islice(stream, 5):
        pixels = ((images * 0.25 + 0.5) * 255).round().long()[:, 0, 4, 4] - 1
        assert torch.equal(pixels, labels)
        seen += labels.tolist()
    assert sorted(seen) == list(range(40)) and seen != sorted(seen)


def test_seeds_are_the_same_on_every_machine_and_differ():
    # printf '\0\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0' | b2sum -l 64, halved
    assert seed_of(0, 1) == int.from_bytes(bytes.fromhex('eb82aaee034ca970'), 'little') // 2
    assert len({seed_of(*numbers) for numbers in [(0,), (1,), (-1,), (0, 0), (0, 1), (1, 0), (2**40, 1)]}) == 7


def test_batches_on_the_device_depend_on_seed_epoch_and_index_alone():
    found = batches(image_set(), augmentation=Augmentation('kornia', hflip=0.5, shift=2))
    whole = [x for x, _ in islice(found.stream(5, 10, 8), 5)]  # the third epoch
    resumed = [x for x, _ in islice(found.stream(5, 13, 8), 2)]
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], resumed, strict=True))
    assert not torch.equal(whole[0], next(found.stream(5, 15, 8))[0])
    assert not torch.equal(whole[0], next(found.stream(6, 10, 8))[0])


def test_smaller_sizes_are_means_over_areas():
    found = batches(image_set(side=8))
    x = found.preparation.plain(found.images[:4], 4)
    expected = (found.images[:4].double() / 255).unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5))
    torch.testing.assert_close(x.double(), (expected - 0.5) / 0.25, rtol=1e-5, atol=1e-6)


def test_evaluation_is_complete_ordered_and_not_augmented():
    found = batches(image_set(n=21), augmentation=Augmentation('kornia', hflip=1.0, erase=1.0))
    images, labels = (torch.cat(part) for part in zip(*found.ordered(8), strict=True))
    assert labels.tolist() == list(range(21))
    torch.testing.assert_close(images, found.preparation.plain(found.images, 8))


def test_batches_that_nothing_fills_or_nobody_can_share_are_refused():
    with pytest.raises(ValueError, match='batch_size must be at most the 40 images that there are, got 41'):
        next(batches(image_set(), batch_size=41).stream(0, 0, 8))
    shared = create_batches(image_set(), 7, (0.5,), (0.25,), CPU, count=2)
    with pytest.raises(ValueError, match='batch_size must be a multiple of the 2 processes, got 7'):
        next(shared.stream(0, 0, 8))
    with pytest.raises(ValueError, match=r'img_size must be at least that of the images, \(6, 6\), got 4'):
        ImageSet(image_set().images, image_set().labels, ('a',), 4)


def test_statistics_are_those_of_the_pixels():
    images = create_dataset('fake', '.', 'train')
    mean, std = images.statistics()
    pixels = images.images.double() / 255
    assert mean[0] == pytest.approx(pixels.mean().item(), abs=1e-4)
    assert std[0] == pytest.approx(pixels.std(correction=0).item(), abs=1e-4)


def test_validation_slice_is_disjoint_complete_and_drawn_by_seed():
    train, val = split_validation(image_set(), 0.25, seed=1)
    assert len(val) == 10 and sorted(train.labels.tolist() + val.labels.tolist()) == list(range(40))
    assert val.labels.tolist() == split_validation(image_set(), 0.25, seed=1)[1].labels.tolist()
    assert val.labels.tolist() != split_validation(image_set(), 0.25, seed=2)[1].labels.tolist()


def test_timms_transform_of_the_exported_config_equals_our_batches(tmp_path):
    import timm

    images = ImageSet(torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8), torch.arange(5), tuple('abcde'), 32)
    model = timm.create_model('linformer_vit_pico_patch1_32', in_chans=1, num_classes=5)
    export_model(model, tmp_path / 'model', images, data_config(images))
    loaded = timm.create_model(f'local-dir:{tmp_path}/model', pretrained=True)
    transform = create_transform(**timm.data.resolve_model_data_config(loaded))
    ours = next(create_batches(images, 5, *images.statistics(), CPU).ordered(32))[0]
    theirs = torch.stack([transform(to_pil_image(image)) for image in images.images])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def write_fashion_mnist(folder):
    """Four tiny files in the IDX form, compressed as Debian's package has them."""
    folder.mkdir(parents=True)
    for part, n in (('train', 3), ('t10k', 2)):
        images = struct.pack('>IIII', 2051, n, 28, 28) + bytes(range(n)) * 784
        labels = struct.pack('>II', 2049, n) + bytes(range(n))
        with gzip.open(folder / f'{part}-images-idx3-ubyte.gz', 'wb') as file:
            file.write(images)
        with gzip.open(folder / f'{part}-labels-idx1-ubyte.gz', 'wb') as file:
            file.write(labels)


def test_fashion_mnist_comes_from_debians_package_where_the_network_refuses(tmp_path, monkeypatch):
    write_fashion_mnist(tmp_path / 'package')
    monkeypatch.setattr(fashion_mnist, 'PACKAGE_FOLDER', tmp_path / 'package')
    monkeypatch.setattr(fashion_mnist, '_download', refuse)
    train = create_dataset('fashion_mnist', tmp_path, 'train')
    assert train.labels.tolist() == [0, 1, 2] and train.images.shape == (3, 1, 28, 28) and train.img_size == 32
    assert create_dataset('fashion_mnist', tmp_path, 'test', download=False).labels.tolist() == [0, 1]
    assert train.classes[0] == 'T-shirt/top'


def refuse(*args):
    raise RuntimeError('the network refuses')


def test_missing_data_names_the_three_ways(tmp_path, monkeypatch):
    for source in ('_download', '_unpack_installed'):
        monkeypatch.setattr(fashion_mnist, source, refuse)
    with pytest.raises(FileNotFoundError) as error:
        create_dataset('fashion_mnist', tmp_path, 'train')
    for words in ('FashionMNIST/raw', 'the network refuses', 'let torchvision download', 'apt-get install'):
        assert words in str(error.value)


def test_unknown_names_list_the_nearest():
    with pytest.raises(ValueError, match="Unknown dataset 'fashion_mist'. Nearest: fashion_mnist"):
        create_dataset('fashion_mist', '.', 'train')
    with pytest.raises(ValueError, match="Unknown split 'tset'. Nearest: test"):
        create_dataset('fake', '.', 'tset')


def test_smaller_images_are_centred_in_the_mean_colour():
    found = batches(image_set(side=6, img_size=8))
    assert (found.images[:, :, 0, :] == 128).all() and (found.images[:, :, :, -1] == 128).all()
    assert torch.equal(found.images[:, :, 1:-1, 1:-1], image_set().images)
    assert Image.fromarray(found.images[0, 0].numpy()).getpixel((1, 1)) == 200


def test_a_mean_of_other_channels_is_refused():
    images = create_dataset('fake', '', 'train')
    with pytest.raises(ValueError, match=r'each of the 1 channels, got \(0.5, 0.5, 0.5\)'):
        create_batches(images, 4, (0.5,) * 3, (0.5,) * 3, torch.device('cpu'))
