"""Folders of images, and the sets that torchvision knows: what is found in them, and what is said where it is not."""

import pickle
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from runs import CPU, small
from timm.data import ImageNetInfo
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.datasets import cifar, imagenette

from linvision.data import create_dataset, part
from linvision.data.folders import ImageFiles, in_words
from linvision.data.image_file import read_image
from linvision.train.data import TrainingData
from linvision.train.parallel import Processes


def pictures(folder, *names, mode='L', size=(8, 8)):
    """Image files of one colour each, made with the folders that they lie in."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('L', size, 10 * i).convert(mode).save(folder / name)


def names(images):
    return [(path.rsplit('/', 1)[-1], images.classes[label]) for path, label in images.samples]


def refuse(*args, **kwargs):
    raise URLError('the network refuses')


# --------------------------------------------------------------------------------------------------------- image_folder


@pytest.mark.parametrize('test', ['val', 'validation', 'test'])
def test_train_and_val_are_the_two_splits(tmp_path, test):
    pictures(tmp_path / 'train', 'cat/a.png', 'cat/below/b.JPG', 'ant/c.png', 'ant/notes.txt.png')
    (tmp_path / 'train/ant/notes.txt').write_text('no image')
    pictures(tmp_path / test, 'cat/d.png')
    train, val = (create_dataset('image_folder', tmp_path, split) for split in ('train', 'test'))
    assert train.classes == val.classes == ('ant', 'cat')
    assert names(train) == [('c.png', 'ant'), ('notes.txt.png', 'ant'), ('a.png', 'cat'), ('b.JPG', 'cat')]
    assert names(val) == [('d.png', 'cat')]
    image, label = train[0]
    assert image.mode == 'L' and image.getpixel((3, 3)) == 20 and label == 0
    half = train.subset(torch.tensor([3, 0]))
    assert names(half) == [('b.JPG', 'cat'), ('c.png', 'ant')] and half.in_chans == 1


def test_of_val_and_test_the_test_is_scored_if_it_has_classes(tmp_path, caplog):
    pictures(tmp_path, 'train/cat/a.png', 'val/cat/b.png', 'test/c.png')  # as ImageNet's, without labels
    assert names(create_dataset('image_folder', tmp_path, 'test')) == [('b.png', 'cat')] and not caplog.messages
    pictures(tmp_path, 'test/cat/d.png')
    assert names(create_dataset('image_folder', tmp_path, 'test')) == [('d.png', 'cat')]
    assert caplog.messages[-1] == f'the test is {tmp_path}/test; val beside it is left aside'


@pytest.mark.parametrize('other', ['eval/cat/d.png', 'test/d.png'])  # an unknown name; images without labels
def test_a_folder_with_classes_that_is_called_train_is_the_training_set(tmp_path, other, caplog):
    pictures(tmp_path, *(f'train/{c}/{i}.png' for c in ('cat', 'dog') for i in range(5)), other)
    train, test = (create_dataset('image_folder', tmp_path, split) for split in ('train', 'test'))
    assert train.classes == ('cat', 'dog') and len(train) == 8
    assert names(test) == [('4.png', 'cat'), ('4.png', 'dog')]
    beside = other.split('/')[0]
    assert caplog.messages == [f'the test is every fifth image of {tmp_path}/train; {beside} beside it is left aside']


def test_images_without_folders_of_classes_are_refused(tmp_path):
    pictures(tmp_path, 'train/a.png', 'test/b.png')
    with pytest.raises(FileNotFoundError, match='Expected images in folders of classes'):
        create_dataset('image_folder', tmp_path, 'train')


@pytest.mark.parametrize('below', ['', 'train'])
def test_without_val_every_fifth_image_of_a_class_is_for_the_test(tmp_path, below):
    pictures(tmp_path / below, *(f'cat/{i:02}.png' for i in range(11)), *(f'dog/{i}.png' for i in range(5)))
    train, test = (names(create_dataset('image_folder', tmp_path, split)) for split in ('train', 'test'))
    assert test == [('04.png', 'cat'), ('09.png', 'cat'), ('4.png', 'dog')]
    assert len(train) == 13 and not set(train) & set(test)


def test_empty_folders_and_those_of_systems_are_no_classes(tmp_path):
    pictures(tmp_path / 'train', 'cat/a.png', 'dog/b.gif', '.cache/c.png', '__MACOSX/d.png', 'dog/.hidden.png')
    pictures(tmp_path / 'train/cat', '.thumbnails/a.png', '__MACOSX/a.png')
    (tmp_path / 'train/cat/up').symlink_to(tmp_path / 'train', target_is_directory=True)  # whose cat was seen
    (tmp_path / 'train/bird').mkdir()
    pictures(tmp_path / 'val', 'dog/c.png')
    train = create_dataset('image_folder', tmp_path, 'train')
    assert names(train) == [('a.png', 'cat'), ('b.gif', 'dog')] and train.classes == ('cat', 'dog')
    assert names(create_dataset('image_folder', tmp_path, 'test')) == [('c.png', 'dog')]


def test_what_is_left_aside_is_named_once(tmp_path, caplog):
    pictures(tmp_path, 'train/cat/a.png', 'val/cat/a.png')
    (tmp_path / 'train/cat/notes.txt').touch()
    (tmp_path / 'train/bird').mkdir()
    for split in ('train', 'test'):
        create_dataset('image_folder', tmp_path, split)
    assert {record.message for record in caplog.records} == {
        f'1 file(s) in {tmp_path}/train/cat left aside, no images to be read: {tmp_path}/train/cat/notes.txt …',
        f'{tmp_path}/train/bird is empty, and so no class',
    }
    assert len(caplog.records) == 2


def test_a_part_of_a_folder_is_of_all_its_classes_and_of_another_set_its_first_images(tmp_path):
    for split in ('train', 'val'):
        pictures(tmp_path / split, *(f'{name}/{i}.png' for name in 'abcd' for i in range(3)))
    images = create_dataset('image_folder', tmp_path, 'test')
    assert [label for _, label in part(images, 4).samples] == [0, 1, 2, 3]
    assert part(images, 0) is images and part(images, 99) is images
    fake = create_dataset('fake', tmp_path, 'test')
    assert torch.equal(part(fake, 5).images, fake.images[:5])


def test_all_is_every_image_and_val_another_name_of_the_test(tmp_path):
    pictures(tmp_path / 'flat', *(f'cat/{i}.png' for i in range(6)))
    assert len(create_dataset('image_folder', tmp_path / 'flat', 'all')) == 6
    pictures(tmp_path, 'two/train/cat/a.png', 'two/train/dog/b.png', 'two/val/dog/c.png')
    found = names(create_dataset('image_folder', tmp_path / 'two', 'all'))
    assert found == [('a.png', 'cat'), ('b.png', 'dog'), ('c.png', 'dog')]
    assert names(create_dataset('image_folder', tmp_path / 'two', 'val')) == [('c.png', 'dog')]
    with pytest.raises(ValueError, match="Only an image_folder has a split 'all', not fake"):
        create_dataset('fake', tmp_path, 'all')


@pytest.mark.parametrize('name', ['fashion_mnist', 'cifar10', 'imagenette'])
@pytest.mark.parametrize('where, download', [('train/cat', True), ('cat', True), ('cat', False)])
def test_nothing_is_fetched_into_a_folder_of_images(tmp_path, name, where, download):
    pictures(tmp_path / where, 'a.png')
    with pytest.raises(ValueError, match=f'holds folders of images, and {name} is not among them.*--dataset image_fo'):
        create_dataset(name, tmp_path, 'train', download=download)
    assert [path.name for path in tmp_path.rglob('*') if path.is_file()] == ['a.png']


def test_sets_are_sequences_whose_names_are_short(tmp_path):
    pictures(tmp_path, *(f'cat/{i}.png' for i in range(3)))
    files, tensors = create_dataset('image_folder', tmp_path, 'train'), create_dataset('fake', tmp_path, 'train')
    assert [image.getpixel((0, 0)) for image, _ in files] == [0, 10, 20]
    image, label = next(iter(torch.utils.data.DataLoader(tensors, batch_size=256)))
    assert torch.equal(image, tensors.images) and torch.equal(label, tensors.labels)
    assert repr(files).startswith("ImageFiles(classes=('cat',)") and len(repr(tensors)) < 200


def test_a_class_of_files_that_are_no_images_is_refused(tmp_path):
    pictures(tmp_path, 'train/cat/a.png', 'train/dog/b.png', 'val/cat/a.png')
    (tmp_path / 'train/dog/b.png').rename(tmp_path / 'train/dog/b.heic')
    with pytest.raises(
        ValueError, match=r"dog holds no image that can be read, but files with the endings \['.heic'\]"
    ):
        create_dataset('image_folder', tmp_path, 'train')


def test_a_class_without_an_image_for_the_test_is_named(tmp_path, caplog):
    pictures(tmp_path, *(f'many/{i}.png' for i in range(5)), 'few/0.png')
    for split in ('train', 'test'):
        create_dataset('image_folder', tmp_path, split)
    assert caplog.messages == ['no image for the test, since there are fewer than five: few']


def test_a_class_may_be_called_train(tmp_path):
    pictures(tmp_path, *(f'{name}/{i}.png' for name in ('train', 'tram') for i in range(5)))
    images = create_dataset('image_folder', tmp_path, 'train')
    assert images.classes == ('train', 'tram') and len(images) == 8


def test_a_class_that_training_lacks_is_refused(tmp_path):
    pictures(tmp_path, 'train/cat/a.png', 'val/cat/a.png', 'val/fox/b.png')
    with pytest.raises(ValueError, match=r"val has classes that .*train lacks: \['fox'\]"):
        create_dataset('image_folder', tmp_path, 'test')


@pytest.mark.parametrize('modes, in_chans', [(('L', '1', 'LA'), 1), (('L', 'RGB'), 3), (('P',), 3), (('RGBA',), 3)])
def test_grey_and_colour_are_found_out(tmp_path, modes, in_chans):
    for mode in modes:
        pictures(tmp_path, f'a/{mode}.png', mode=mode)
    images = create_dataset('image_folder', tmp_path, 'train')
    assert images.in_chans == in_chans
    assert {images[i][0].mode for i in range(len(images))} == {'L' if in_chans == 1 else 'RGB'}


def test_sixteen_bits_become_eight_and_thirty_two_are_refused(tmp_path):
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(deep).save(tmp_path / 'deep.png')
    for in_chans in (1, 3):
        found = np.asarray(read_image(tmp_path / 'deep.png', in_chans)).reshape(8, 8, in_chans)
        assert (found == (deep // 256)[:, :, None]).all()
    (tmp_path / 'deep.pgm').write_bytes(b'P5 8 8 65535\n' + deep.astype('>u2').tobytes())
    assert abs(np.asarray(read_image(tmp_path / 'deep.pgm', 1)).astype(int) - deep // 256).max() <= 1
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / 'real.tif')
    with pytest.raises(OSError, match='real.tif cannot be read as an image .*32 bits'):
        read_image(tmp_path / 'real.tif', 1)


def test_photographs_stand_upright_and_what_is_transparent_lies_on_white(tmp_path):
    exif, image = Image.Exif(), Image.new('RGB', (16, 8), 'black')
    exif[0x0112] = 6  # the camera was held on its side: turn by 90° clockwise
    image.paste('white', (0, 0, 8, 8))
    image.save(tmp_path / 'photo.png', exif=exif)
    upright = np.asarray(read_image(tmp_path / 'photo.png', 1))
    assert upright.shape == (16, 8) and (upright[:8] == 255).all() and (upright[8:] == 0).all()
    Image.new('RGBA', (8, 8), (0, 0, 0, 0)).save(tmp_path / 'clear.png')
    assert np.asarray(read_image(tmp_path / 'clear.png', 3)).min() == 255


@pytest.mark.parametrize('side', [8, 64])
def test_size_is_the_median_of_the_shorter_sides_and_statistics_are_those_of_the_pixels(tmp_path, side):
    for i, size in enumerate([(20, 31), (40, 16), (18, 50)]):
        pictures(tmp_path / 'sizes', f'a/{i}.png', size=size)
    assert create_dataset('image_folder', tmp_path / 'sizes', 'train').img_size == 18
    images = np.random.default_rng(0).integers(0, 200, (8, side, side, 3), dtype=np.uint8)
    (tmp_path / 'noise/a').mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f'noise/a/{i}.png')
    (tmp_path / 'noise/a/9.png').write_bytes(b'damaged')
    images = np.delete(images, 4, axis=0)  # of the test
    mean, std = create_dataset('image_folder', tmp_path / 'noise', 'train').statistics()
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), atol=1e-4)


@pytest.mark.parametrize('side, size', [(300, 224), (224, 224), (30, 28), (3, 4)])
def test_a_run_without_stages_takes_the_size_of_the_files_at_most_the_models(tmp_path, side, size):
    pictures(tmp_path, *(f'{c}/{i}.png' for c in 'ab' for i in range(5)), size=(side, side + 7))
    recipe = small(tmp_path / 'run', dataset='image_folder', model='linformer_vit_tiny_patch4_224', stages=())
    recipe = recipe.replace(batch_size=1)
    assert TrainingData(recipe, Processes(CPU)).stages == ((size, 1.0),)


def test_a_missing_folder_says_what_goes_where(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        create_dataset('image_folder', tmp_path / 'none', 'train')
    for words in ('none/train/CLASS/IMAGE', 'none/val/CLASS/IMAGE', '.png', 'is not there', '--data-dir'):
        assert words in str(error.value)
    pictures(tmp_path / 'flat', 'a.png', 'b.png')
    with pytest.raises(FileNotFoundError, match=r"flat holds \['a.png', 'b.png'\]"):
        create_dataset('image_folder', tmp_path / 'flat', 'train')


def test_a_folder_with_test_images_alone_is_refused(tmp_path):
    pictures(tmp_path, 'val/cat/a.png', 'val/dog/a.png')
    with pytest.raises(FileNotFoundError, match='holds val/ alone: put the images to train on into .*/train/CLASS'):
        create_dataset('image_folder', tmp_path, 'train')


def test_too_few_images_for_a_test_are_refused(tmp_path):
    pictures(tmp_path, 'a/0.png', 'a/1.png', 'b/0.png')
    with pytest.raises(FileNotFoundError, match='a class needs five images, or put some in .*/val'):
        create_dataset('image_folder', tmp_path, 'test')


def test_a_folder_of_damaged_images_alone_is_refused(tmp_path):
    pictures(tmp_path, 'a/0.png', size=(64, 64))
    (tmp_path / 'a/0.png').write_bytes((tmp_path / 'a/0.png').read_bytes()[:50])  # not more than the header
    with pytest.raises(OSError, match='No image can be read: .*a/0.png'):
        create_dataset('image_folder', tmp_path, 'train').statistics()
    (tmp_path / 'a/0.png').write_bytes(b'damaged')
    with pytest.raises(OSError, match='No image can be read: .*a/0.png'):
        create_dataset('image_folder', tmp_path, 'train')


# --------------------------------------------------------------------------------------------------- sets with a name


@pytest.mark.parametrize('below', ['', 'imagenet'])
def test_imagenets_ids_become_words(tmp_path, below):
    for split in ('train', 'val'):
        pictures(tmp_path / below / split, 'n01440764/a.JPEG', 'n01443537/b.JPEG')
    for split in ('train', 'test'):
        images = create_dataset('imagenet', tmp_path, split)
        assert images.classes == ('tench', 'goldfish') and images.in_chans == 3
        assert images.statistics() == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        assert names(images) == [('a.JPEG', 'tench'), ('b.JPEG', 'goldfish')]


def test_each_of_imagenets_classes_has_a_name_of_its_own():
    ids = tuple(ImageNetInfo().label_names())
    classes = in_words(ImageFiles([], ids)).classes
    assert len(set(classes)) == len(ids) == 1000
    assert {'crane (n02012849)', 'crane (n03126707)', 'tench'} <= set(classes)  # the bird, the machine


def test_imagenette_is_read_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.setattr(imagenette, 'download_and_extract_archive', refuse)
    for split in ('train', 'val'):
        pictures(tmp_path / 'imagenette2-320' / split, 'n03888257/a.JPEG', 'n02102040/b.JPEG')
    images = create_dataset('imagenette', tmp_path, 'train')
    assert images.classes == ('English springer', 'parachute')


@pytest.mark.parametrize('download', [True, False])
@pytest.mark.parametrize(
    'name, place', [('imagenette', 'imagenette2-320'), ('cifar10', 'cifar-10-batches-py'), ('imagenet', 'n01440764')]
)
def test_missing_sets_say_what_goes_where(tmp_path, monkeypatch, name, place, download):
    for module in (imagenette, cifar):
        monkeypatch.setattr(module, 'download_and_extract_archive', refuse)
    with pytest.raises(FileNotFoundError, match=place) as error:
        create_dataset(name, tmp_path, 'train', download=download)
    assert ('the network refuses' in str(error.value)) == (download and name != 'imagenet')


@pytest.mark.parametrize('name, classes', [('cifar10', 10), ('cifar100', 100)])
def test_cifar_is_read_from_its_files(tmp_path, monkeypatch, name, classes):
    pixels, labels = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8), [3, 1, 4, 1, 5, 9]
    words = [f'class {i}' for i in range(classes)]
    if name == 'cifar10':
        folder, kind, meta = 'cifar-10-batches-py', 'labels', ('batches.meta', {'label_names': words})
        parts = {**{f'data_batch_{i + 1}': slice(i, i + 1) for i in range(5)}, 'test_batch': slice(5, 6)}
    else:
        folder, kind, meta = 'cifar-100-python', 'fine_labels', ('meta', {'fine_label_names': words})
        parts = {'train': slice(0, 5), 'test': slice(5, 6)}
    (tmp_path / folder).mkdir()
    contents = {file: {'data': pixels[where], kind: labels[where]} for file, where in parts.items()}
    for file, content in [*contents.items(), meta]:
        (tmp_path / folder / file).write_bytes(pickle.dumps(content))
    with pytest.raises(FileNotFoundError, match=f'{folder}, or not whole'):
        create_dataset(name, tmp_path, 'train')
    monkeypatch.setattr(cifar, 'check_integrity', lambda path, md5=None: True)
    for split, where in (('train', slice(0, 5)), ('test', slice(5, 6))):
        images = create_dataset(name, tmp_path, split)
        assert torch.equal(images.images, torch.from_numpy(pixels[where]).view(-1, 3, 32, 32))
        assert images.labels.tolist() == labels[where] and images.classes == tuple(words) and images.img_size == 32
